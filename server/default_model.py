"""The model `hybrid serve` starts with when none is named: small, in the published layout, with random weights.

It exists so that a fresh install answers at once. Its answers are gibberish until a trained one ships.
The checkpoint is made on first use in the user's cache directory. Called by `__main__.py`.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path

from hybrid import random_checkpoint
from server.options import SettingsError

NAME = "nano-random"
WARNING = f"{NAME}: the embedded default model has random weights, so its answers are gibberish"
SEED = 1
MANIFEST = "manifest.json"


def cache_directory(environ: Mapping[str, str]) -> Path:
    """Where hybrid keeps what it makes for this user. Raises SettingsError where the user has no home."""
    try:
        return Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hybrid"
    except RuntimeError:  # a user id that the system does not know
        raise SettingsError("this user has no home directory: set XDG_CACHE_HOME, or name every file") from None


def default_model(cache: Path, making: Callable[[], None]) -> Path:
    """Directory of the default model under `cache`; `making` is called before it is written.

    A damaged copy is replaced. Raises OSError where the cache cannot be written.
    """
    config = resources.files("server").joinpath("default_model.json").read_bytes()
    home = cache / "models" / hashlib.sha256(config + _writer()).hexdigest()[:12]
    model = home / NAME
    if _is_whole(model, home / MANIFEST):
        return model
    making()
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home) as scratch:
        made = Path(scratch) / NAME
        random_checkpoint.write_checkpoint(json.loads(config), made, SEED, None)
        manifest = Path(scratch) / MANIFEST
        manifest.write_text(json.dumps(_digests(made)))
        _publish(made, model)
        os.replace(manifest, home / MANIFEST)
    return model


def _writer() -> bytes:
    """The source of what writes it, so that a new version of hybrid does not serve an old version's weights."""
    modules = sorted(Path(random_checkpoint.__file__).parent.glob("random_*.py"))
    return b"".join(path.read_bytes() for path in modules)


def _publish(made: Path, model: Path) -> None:
    """Move the finished directory into place. Two first starts at once write the same bytes: either may win."""
    shutil.rmtree(model, ignore_errors=True)
    try:
        made.rename(model)
    except OSError:
        if not model.is_dir():
            raise


def _is_whole(model: Path, manifest: Path) -> bool:
    try:
        return bool(json.loads(manifest.read_text()) == _digests(model))
    except (OSError, ValueError):
        return False


def _digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}
