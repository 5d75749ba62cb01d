"""Nano, the model `hybrid serve` starts with when none is named: a small trained one that ships with the package.

Knows where its files lie, not what is in them. `__main__.py` asks for the directory, `args.py` for the name.
"""

from importlib import resources
from pathlib import Path

from server.options import SettingsError

NAME = "nano"
NOTICE = f"{NAME}: a demonstration model of a few million weights; name a real checkpoint with --model"
FILES = (
    "config.json",
    "generation_config.json",
    "model-00001-of-000001.safetensors",
    "model.safetensors.index.json",
    "tiktoken.model",
    "tokenizer_config.json",
)


def directory() -> Path:
    """Nano's checkpoint directory. Nothing writes to it. Raises SettingsError where the installation lacks a file."""
    found = Path(str(resources.files("hybrid"))) / "nano" / "model"
    for name in FILES:
        if not (found / name).is_file():
            raise SettingsError(
                f"{found / name}: no such file, so this installation has no {NAME}: install hybrid again, or name a "
                "checkpoint with --model"
            )
    return found
