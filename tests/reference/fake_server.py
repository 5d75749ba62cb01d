"""A whole server over real sockets, around a fake engine (`fake_engine.py`), for tests of the REST side.

It runs in a thread with its own event loop, so tests stay plain functions and use blocking clients.
"""

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families

from hybrid.random_tokenizer import write_small_tokenizer
from server.app import create_app, listen
from server.keys import SERVING
from server.service import Service
from server.settings import ServerSettings

WAIT_SECONDS = 30.0


def write_model(directory: Path) -> Path:
    """A model directory without weights: a small model's config and the 256-byte tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    config = Path(__file__).with_name("small_model.json").read_bytes()
    (directory / "config.json").write_bytes(config)
    write_small_tokenizer(directory, json.loads(config)["text_config"]["vocab_size"])
    return directory


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer. `body` is the decoded JSON, or the bytes of anything else."""

    status: int
    body: Any
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def error(self) -> dict[str, Any]:
        """The error object; fails where the body is no OpenAI error."""
        error = self.body["error"]
        assert set(error) == {"message", "type", "param", "code"} and isinstance(error["message"], str)
        return dict(error)


class FakeServer:
    """A running server."""

    def __init__(self, service: Service, port: int) -> None:
        self.service = service
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.name = "tiny"

    def client(self, **settings: Any) -> openai.OpenAI:
        """The official client. A context manager."""
        return openai.OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, **settings})

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        """One request. `body` is sent as it is when it is bytes, else as JSON."""
        raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        sent = {"Content-Type": "application/json"} if raw is not None else {}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_SECONDS)
        try:
            connection.request(method, path, raw, {**sent, **(headers or {})})
            response = connection.getresponse()
            content = response.read()
            is_json = response.getheader("Content-Type", "").startswith("application/json")
            return Answer(response.status, json.loads(content) if is_json else content, dict(response.getheaders()))
        finally:
            connection.close()

    def metrics(self) -> dict[str, float]:
        """Every sample by name, without our prefix and the model's label; other labels follow in braces."""
        found = {}
        for family in text_string_to_metric_families(self.ask("GET", "/metrics").body.decode()):
            for sample in family.samples:
                labels = "".join(f"{{{v}}}" for k, v in sample.labels.items() if k != "model_name")
                found[sample.name.removeprefix("hybrid:") + labels] = sample.value
        return found

    def wait(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not condition():
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.005)

    def wait_ready(self) -> None:
        """Wait until the engine answers."""

        def is_ready() -> bool:
            bridge = self.service.bridge
            assert bridge.phase != "failed", bridge.failure
            return bridge.phase == "ready"

        self.wait(is_ready)

    def wait_empty(self) -> None:
        """Wait until no request is left anywhere."""
        self.wait(lambda: all(self.metrics()[name] == 0 for name in GAUGES))


GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")


@contextmanager
def fake_server(model: Path, build: str = "build", *, is_ready: bool = True, **settings: Any) -> Iterator[FakeServer]:
    """Serve `model` (see `write_model`) with an engine of `fake_engine.py`."""
    chosen = ServerSettings(**{"model": model, "served_model_name": "tiny", "stall_seconds": 5.0, **settings})
    started: list[FakeServer] = []
    up, down = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def main() -> None:
        app = create_app(chosen, f"tests.reference.fake_engine:{build}")
        listener = listen("127.0.0.1", 0)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.5, access_log=None)
        await runner.setup()
        await web.SockSite(runner, listener).start()
        started.append(FakeServer(app[SERVING].service, listener.getsockname()[1]))
        up.set()
        await down.wait()
        await runner.cleanup()

    def work() -> None:
        try:
            loop.run_until_complete(main())
            loop.run_until_complete(loop.shutdown_default_executor())
        finally:
            up.set()
            loop.close()

    thread = threading.Thread(target=work)
    thread.start()
    up.wait()
    try:
        if is_ready:
            started[0].wait_ready()
        yield started[0]
    finally:
        if not loop.is_closed():
            loop.call_soon_threadsafe(down.set)
        thread.join()
