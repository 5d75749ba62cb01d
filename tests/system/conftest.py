"""The real `hybrid serve` in its own process on loopback, over a tiny random Kimi-K2.5 checkpoint."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import openai
import pytest

from hybrid.random_checkpoint import write_checkpoint
from tests import families
from tests.system.serving import Serve, Server, serving


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Serve:
    """`with serve(model, *flags) as server:` runs a server and stops it afterwards."""

    def run(model: Path, *flags: str) -> AbstractContextManager[Server]:
        return serving(model, tmp_path_factory.mktemp("serve") / "stderr.txt", *flags)

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
