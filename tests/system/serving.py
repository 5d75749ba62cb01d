"""A real `hybrid serve` process as the system tests see it: start, ask, measure, stop."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 240  # a cold kernel cache on two busy cores compiles for a while
Serve = Callable[..., AbstractContextManager["Server"]]  # (model, *flags)
# Values of logit_bias for the vocabulary of 256 bytes and 256 specials. Without the stop tokens an answer's length is
# known; with ASCII only, a token's text says which one it is.
NO_STOP = {"257": -100, "258": -100}
ASCII_ONLY = {str(token): -100 for token in range(128, 512)}


@dataclass(frozen=True, slots=True)
class Server:
    """A running server. `log` is its stderr."""

    process: subprocess.Popen[bytes]
    url: str
    name: str
    log: Path

    def get(self, path: str, timeout: float = 30) -> tuple[int, bytes]:
        """Status and body, whatever the status."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=timeout) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def client(self, api_key: str = "none") -> openai.OpenAI:
        """The official client. A context manager."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=120)

    def metrics(self) -> dict[str, float]:
        """Every sample without labels but the model's name, by name without our prefix; labelled ones are summed."""
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(self.get("/metrics")[1].decode()):
            for sample in family.samples:
                name = sample.name.removeprefix("hybrid:")
                found[name] = found.get(name, 0.0) + sample.value
        return found

    def tree(self) -> list[psutil.Process]:
        """The REST process and all its descendants."""
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def n_fds(self) -> list[int]:
        """Open file descriptors of every process of the tree."""
        return [process.num_fds() for process in self.tree()]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command(model: Path, port: int, *flags: str) -> list[str]:
    """`hybrid serve` as an operator would type it."""
    serve = [sys.executable, "-m", "server", "serve", "--model", str(model), "--device", "cpu", "--dtype", "float32"]
    return [*serve, "--host", "127.0.0.1", "--port", str(port), *flags]


def environment() -> dict[str, str]:
    """This environment without the operator's own settings."""
    return {k: v for k, v in os.environ.items() if not k.startswith("HYBRID_")}


def wait_ready(server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        try:
            if server.get("/readyz", timeout=5)[0] == 200:
                return
        except OSError:
            pass  # not listening yet
        time.sleep(0.1)
    raise AssertionError(f"server not ready (exit status {server.process.poll()}):\n{server.log.read_text()[-4000:]}")


def stop(server: Server) -> int:
    """SIGTERM, then the exit status. A server that does not leave is a failure, and is killed."""
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGTERM)
    try:
        return server.process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        for process in server.tree():
            process.kill()
        raise


@contextmanager
def serving(
    model: Path, log: Path, *flags: str, env: dict[str, str] | None = None, typed: Callable[..., list[str]] = command
) -> Iterator[Server]:
    """A server until the end of the block. `typed(model, port, *flags)` is the command line."""
    port = free_port()
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            typed(model, port, *flags), cwd=ROOT, env=env or environment(), stdout=subprocess.DEVNULL, stderr=stderr
        )
    server = Server(process, f"http://127.0.0.1:{port}", model.name, log)
    try:
        wait_ready(server)
        yield server
    finally:
        stop(server)


@dataclass(frozen=True, slots=True)
class Answer:
    """A greedy completion: its tokens as text pieces, and how many prompt tokens came from shared pages."""

    tokens: tuple[str, ...]
    text: str
    cached: int


def complete(client: openai.OpenAI, model: str, ids: list[int], max_tokens: int, **options: Any) -> Answer:
    """Greedy tokens after `ids`, ASCII bytes only."""
    answer = client.completions.create(
        model=model, prompt=ids, max_tokens=max_tokens, temperature=0, logprobs=0, logit_bias=ASCII_ONLY, **options
    )
    choice, usage = answer.choices[0], answer.usage
    assert choice.logprobs and choice.logprobs.tokens and usage and usage.prompt_tokens_details
    assert choice.finish_reason == "length" and len(choice.logprobs.tokens) == max_tokens
    return Answer(tuple(choice.logprobs.tokens), choice.text, usage.prompt_tokens_details.cached_tokens or 0)
