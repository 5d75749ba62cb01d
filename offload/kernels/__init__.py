"""Compiled code of the expert products.

The only `__init__` of the tree that does something: it names the directory where numba keeps compiled code, before
any kernel is defined. `cache=True` looks at the file of the function itself and not at its callees (an edited callee
kept giving the old answer), so the directory carries a hash of every kernel source, of numba and of the processor.
"""

import hashlib
import os
from pathlib import Path

import numba
from llvmlite import binding
from numba.core import config


def cache_directory(base: Path) -> Path:
    """Where compiled kernels of exactly these sources, this numba and this processor lie under `base`."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    cpu = config.CPU_NAME or binding.get_host_cpu_name()
    features = config.CPU_FEATURES if config.CPU_FEATURES is not None else binding.get_host_cpu_features().flatten()
    digest.update(f"{numba.__version__} {cpu} {features}".encode())
    return base / "hybrid" / "kernels" / digest.hexdigest()[:16]


# XDG: the one environment variable that library code reads, because it only names where a cache lies. A directory
# given to numba itself wins.
config.CACHE_DIR = str(
    cache_directory(Path(config.CACHE_DIR or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"))
)
