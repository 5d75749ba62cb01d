"""Compiled code of the expert products.

The only `__init__` of the tree that does something: it names the directory where numba keeps compiled code, before
any kernel is defined. `cache=True` looks at the file of the function itself and not at its callees (an edited callee
kept giving the old answer), so the directory carries a hash of every kernel source, of the layout, of numba and of
the processor. It must be one that can be written: numba else falls back to `__pycache__` beside the sources, without
the hash, or refuses to compile.
"""

import hashlib
import os
import stat
import tempfile
from pathlib import Path

import numba
from llvmlite import binding
from numba.core import config


def cache_directory(base: Path) -> Path:
    """Where compiled kernels of exactly these sources, this numba and this processor lie under `base`."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for source in (*sorted(here.glob("*.py")), here.parent / "config.py"):  # the latter holds the sizes of the layout
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    cpu = config.CPU_NAME or binding.get_host_cpu_name()
    features = config.CPU_FEATURES if config.CPU_FEATURES is not None else binding.get_host_cpu_features().flatten()
    digest.update(f"{numba.__version__} {cpu} {features}".encode())
    return base / "hybrid" / "kernels" / digest.hexdigest()[:16]


def choose_directory() -> Path:
    """Under the user's cache directory, or under a temporary one where that cannot be written or there is no home.

    XDG_CACHE_HOME is the one environment variable that library code reads, because it only names where a cache lies.
    A directory given to numba itself wins.
    """
    base = config.CACHE_DIR or os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    wanted = cache_directory(Path(base))
    has_home = not base.startswith("~")  # still there for a user without a home
    return wanted if has_home and _writable(wanted) else cache_directory(_private_directory())


def _writable(directory: Path) -> bool:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return True
    except OSError:
        return False


def _private_directory() -> Path:
    """This user's own among the temporary ones: what lies there is run as code, so nobody else may write to it."""
    own = Path(tempfile.gettempdir()) / f"hybrid-{os.getuid()}"
    try:
        own.mkdir(mode=0o700, exist_ok=True)
        status = own.lstat()
    except OSError:
        return Path(tempfile.mkdtemp(prefix="hybrid-"))
    ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022
    return own if ours else Path(tempfile.mkdtemp(prefix="hybrid-"))


config.CACHE_DIR = str(choose_directory())
