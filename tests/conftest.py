"""Shared fixtures."""

from pathlib import Path

import pytest

KIMI_DIR = Path(__file__).resolve().parents[2] / "shared" / "kimi"


@pytest.fixture(scope="session")
def kimi_dir() -> Path:
    """The published tokenizer and golden vectors, where they lie beside the checkout."""
    if not (KIMI_DIR / "tiktoken.model").is_file():
        pytest.skip("the published Kimi tokenizer and golden vectors are not beside this checkout (../shared/kimi)")
    return KIMI_DIR
