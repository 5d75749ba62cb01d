"""The real `hybrid serve` in its own process on loopback, over a tiny random Kimi-K2.5 checkpoint."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest

from hybrid.random_checkpoint import write_checkpoint
from tests import families
from tests.system.serving import ROOT, Serve, Server, command, environment, free_port, stop, wait_ready


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Serve:
    """`with serve(model, *flags) as server:` runs a server and stops it afterwards."""

    @contextmanager
    def run(model: Path, *flags: str) -> Iterator[Server]:
        port = free_port()
        log = tmp_path_factory.mktemp("serve") / "stderr.txt"
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                command(model, port, *flags), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=stderr
            )
        server = Server(process, f"http://127.0.0.1:{port}", model.name, log)
        try:
            wait_ready(server)
            yield server
        finally:
            stop(server)

    return run


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Kimi-K2.5-shaped checkpoint that all system tests serve."""
    directory = tmp_path_factory.mktemp("model") / "tiny-k25"
    write_checkpoint(families.kimi_k25(), directory, seed=7, tokenizer=None)
    return directory


@pytest.fixture(scope="session")
def server(serve: Serve, model_dir: Path) -> Iterator[Server]:
    """One server for all tests that need nothing special. a16, so that the oracle's tolerance is the tight one."""
    with serve(model_dir, "--expert-precision", "a16") as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    """The official client of the shared server."""
    with server.client() as opened:
        yield opened
