"""Fixtures of the REST side's tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.reference.fake_server import FakeServer, fake_server, write_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory without weights, for fake engines."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[FakeServer]:
    """A server over a fake engine that answers scripts; shared by a module's tests."""
    with fake_server(tiny_model) as running:
        yield running


@pytest.fixture(scope="module")
def slow_server(tiny_model: Path) -> Iterator[FakeServer]:
    """Likewise, with steps of 50 ms."""
    with fake_server(tiny_model, "build_slow") as running:
        yield running
