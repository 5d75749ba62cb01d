"""The HTTP application: routes, middleware, lifetimes, and the run from start to exit status.

`run` is what the `hybrid` command calls. Order of a start: read the model's config, tokenizer and template, take the
port, start the engine, answer; inference says 503 until the model is loaded.
"""

import asyncio
import logging
import signal
import socket
import time
from collections.abc import AsyncIterator

from aiohttp import web

from hybrid.config import ModelConfig
from server import middleware, openai
from server.admission import Admission
from server.bridge import BUILD_ENGINE, EngineBridge
from server.chat import Json
from server.info import server_info
from server.keys import BODIES, SERVING, Bodies, Serving
from server.metrics import CONTENT_TYPE, Metrics
from server.openai_chat import chat_completions
from server.openai_completions import completions
from server.planned import check_files
from server.progress import LoadLog
from server.sampling_defaults import load_sampling_defaults
from server.service import Service
from server.settings import ServerSettings
from server.template import load_template
from server.tokenizer import load_tokenizer
from server.wire import MAX_BODY

logger = logging.getLogger(__name__)

RUNTIME_FAILURE = 1
BAD_CONFIGURATION = 78
CLOSE_SECONDS = 2.0  # for connections that are still open once every request has been ended


def run(settings: ServerSettings, build: str = BUILD_ENGINE) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status. `build` is the path of the engine's builder."""
    try:
        return asyncio.run(_run(settings, build))
    except (ValueError, FileNotFoundError) as error:  # of the config, the tokenizer or the template
        logger.error("%s", error)
        return BAD_CONFIGURATION


async def _run(settings: ServerSettings, build: str) -> int:
    app = create_app(settings, build)
    try:
        listener = listen(settings.host, settings.port)
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        logger.error("cannot listen on %s: %s; choose another --host or --port", where, error.strerror)
        return RUNTIME_FAILURE
    stop = _Stop(asyncio.get_running_loop())
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=CLOSE_SECONDS, access_log=None)
    await runner.setup()
    try:
        await web.SockSite(runner, listener).start()
        host, port = listener.getsockname()[:2]
        logger.info("listening on http://%s:%d (model %s)", f"[{host}]" if ":" in host else host, port, settings.name)
        if not settings.api_key and not host.startswith(("127.", "::1")):
            logger.warning("anyone who reaches %s can use this server: set --api-key", host)
        return await _serve(app, stop, settings)
    finally:
        await runner.cleanup()
        stop.close()


async def _serve(app: web.Application, stop: "_Stop", settings: ServerSettings) -> int:
    """Wait for the first load, then for a signal; drain."""
    service = app[SERVING].service
    loaded = asyncio.create_task(service.bridge.loaded())
    stopped = asyncio.create_task(stop.wait(1))
    await asyncio.wait({loaded, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if loaded.done() and (failure := loaded.result()) is not None:
        stopped.cancel()
        logger.error("%s", failure.message)
        return BAD_CONFIGURATION if failure.configuration else RUNTIME_FAILURE
    await stopped
    loaded.cancel()
    logger.info("stopping: running requests may take %g s; a second signal ends them now", settings.drain_seconds)
    drained = asyncio.create_task(service.drain(settings.drain_seconds))
    now = asyncio.create_task(stop.wait(2))
    await asyncio.wait({drained, now}, return_when=asyncio.FIRST_COMPLETED)
    drained.cancel()
    now.cancel()
    service.end_all()
    return 0


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket. OSError when the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=1024)


def create_app(settings: ServerSettings, build: str = BUILD_ENGINE) -> web.Application:
    """The application; the engine starts with it. Raises ValueError for a model directory that cannot be served."""
    config = ModelConfig.from_directory(settings.model)
    check_files(settings, config)
    tokenizer = load_tokenizer(settings.model)
    if tokenizer.n_vocab > config.vocab_size:
        raise ValueError(
            f"{settings.model}: the tokenizer has ids up to {tokenizer.n_vocab - 1} and config.json says vocab_size "
            f"{config.vocab_size}: they do not belong together, copy both from one checkpoint"
        )
    template = load_template(settings.model, tokenizer)
    sampling = load_sampling_defaults(settings.model, template.kind == "kimi")
    bridge = EngineBridge(settings, build, LoadLog())
    metrics = Metrics(bridge, settings.name)
    service = Service(
        bridge=bridge,
        tokenizer=tokenizer,
        template=template,
        stop_ids=tokenizer.stop_ids | frozenset(config.eos_token_ids),
        admission=Admission(settings.max_queued_requests, settings.max_queued_tokens),
        metrics=metrics,
    )
    app = web.Application(
        middlewares=[middleware.request_id, middleware.errors, middleware.guard], client_max_size=MAX_BODY
    )
    app[SERVING] = Serving(
        name=settings.name,
        service=service,
        metrics=metrics,
        n_vocab=config.vocab_size,
        sampling=sampling,
        created=int(time.time()),
        stall_seconds=settings.stall_seconds,
        api_keys=tuple(key.encode() for key in settings.api_key),
        hosts=frozenset({"localhost", settings.host.lower(), socket.gethostname().lower()}),
    )
    app[BODIES] = Bodies()
    logging.getLogger("aiohttp.server").addFilter(middleware.is_our_fault)
    app.add_routes(ROUTES)
    app.on_response_prepare.append(middleware.on_prepare)
    app.cleanup_ctx.append(_engine)
    return app


async def _engine(app: web.Application) -> AsyncIterator[None]:
    """The engine lives as long as the application; it goes last, when no handler needs it."""
    bridge = app[SERVING].service.bridge
    bridge.start()
    yield
    await bridge.stop()


async def live(request: web.Request) -> web.Response:
    """`GET /livez`: this process answers."""
    return web.json_response({"status": "alive"})


async def ready(request: web.Request) -> web.Response:
    """`GET /readyz`, `/health`: 200 once the model answers, else 503 with how far loading is, or why it failed."""
    service = request.app[SERVING].service
    bridge = service.bridge
    status = "draining" if service.draining else bridge.phase
    body: Json = {"status": status}
    if bridge.phase == "loading":
        loading = bridge.loading
        body |= {"stage": loading.stage, "bytes_done": loading.bytes_done, "bytes_total": loading.bytes_total}
        body["eta_s"] = None if loading.eta_s is None else round(loading.eta_s, 1)
    if bridge.phase != "ready" and bridge.failure is not None:
        body["reason"] = bridge.failure.message
    return web.json_response(body, status=200 if status == "ready" else 503)


async def metrics_text(request: web.Request) -> web.Response:
    """`GET /metrics`."""
    text = request.app[SERVING].metrics.text()
    return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE})


ROUTES = [
    web.get("/livez", live),
    web.get("/readyz", ready),
    web.get("/health", ready),
    web.get("/metrics", metrics_text),
    web.get("/v1/server/info", server_info),
    web.get("/v1/models", openai.list_models),
    web.get("/v1/models/{id:.+}", openai.get_model),
    web.post("/v1/chat/completions", chat_completions),
    web.post("/v1/completions", completions),
    web.post("/tokenize", openai.tokenize),
    web.post("/detokenize", openai.detokenize),
]


class _Stop:
    """Counts SIGTERM and SIGINT."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._n = 0
        self._changed = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._count)

    def _count(self) -> None:
        self._n += 1
        self._changed.set()
        self._changed.clear()  # `wait` looks at the count again

    async def wait(self, n: int) -> None:
        """Return once `n` signals have come."""
        while self._n < n:
            await self._changed.wait()

    def close(self) -> None:
        """Back to the defaults."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.remove_signal_handler(number)
