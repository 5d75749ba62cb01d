"""Packing against the obvious layout, on sources that end where readable memory ends."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from offload.config import BLOCKS, MATRICES, PROJECTIONS, ExpertFormat, ExpertGeometry
from offload.kernels.pack import MEMBERS, aligned, pack_expert, pack_units
from offload.packed import VERSION
from tests.reference import packing
from tests.reference.expert_memory import guarded, quantised

SIZES = [(64, 64), (32, 32), (192, 160), (160, 96), (256, 416), (128, 544)]  # hidden, inner
ODD = [(45, 71), (1, 1), (130, 131), (257, 15)]  # formats without groups
CASES = [(fmt, *size) for fmt in BLOCKS for size in SIZES + (ODD if fmt in ("bf16", "fp8") else [])]
Matrices = dict[str, tuple[np.ndarray, np.ndarray | None]]


def random_expert(fmt: ExpertFormat, geometry: ExpertGeometry) -> Matrices:
    rng = np.random.default_rng(geometry.hidden + geometry.inner)
    return {p: quantised(fmt, rng.standard_normal(geometry.shape(p)).astype(np.float32)) for p in PROJECTIONS}


def oracle(fmt: ExpertFormat, geometry: ExpertGeometry, matrices: Matrices) -> dict[str, list[np.ndarray]]:
    return dict(zip(MATRICES, packing.expert(fmt, geometry, matrices), strict=True))


@pytest.mark.parametrize(("fmt", "hidden", "inner"), CASES)
def test_an_expert(fmt: ExpertFormat, hidden: int, inner: int) -> None:
    geometry = ExpertGeometry(1, hidden, inner)
    matrices = random_expert(fmt, geometry)
    packed = pack_expert(fmt, geometry, matrices)  # type: ignore[arg-type]
    assert packed.dtype == np.uint8 and packed.ctypes.data % 64 == 0
    assert packed.nbytes == geometry.expert_bytes(fmt)
    units = oracle(fmt, geometry, matrices)
    assert packed.tobytes() == b"".join(unit.tobytes() for matrix in MATRICES for unit in units[matrix])


@pytest.mark.parametrize(("fmt", "hidden", "inner"), CASES)
def test_no_byte_outside_is_touched(fmt: ExpertFormat, hidden: int, inner: int) -> None:
    """Sources in front of unreadable memory, at whatever address that is; one unit after the other."""
    geometry = ExpertGeometry(1, hidden, inner)
    matrices = random_expert(fmt, geometry)
    held = {p: [guarded(a) for a in arrays if a is not None] for p, arrays in matrices.items()}
    units = oracle(fmt, geometry, matrices)
    for matrix in MATRICES:
        sources = [(*(a.ctypes.data for a in held[p]), 0)[:2] for p in MEMBERS[matrix]]
        size = geometry.unit_bytes(matrix, fmt)
        for unit in range(geometry.n_units(matrix)):
            out = aligned(size + 128)
            out[:] = 77
            pack_units(fmt, geometry, matrix, sources, range(unit, unit + 1), out.ctypes.data + 64)
            assert out[64:-64].tobytes() == units[matrix][unit].tobytes()
            assert (out[:64] == 77).all() and (out[-64:] == 77).all()


def test_threads_pack_side_by_side() -> None:
    geometry = ExpertGeometry(1, 256, 416)
    every = {fmt: random_expert(fmt, geometry) for fmt in BLOCKS}
    with ThreadPoolExecutor(4) as pool:
        jobs = [(fmt, pool.submit(pack_expert, fmt, geometry, every[fmt])) for fmt in list(BLOCKS) * 5]  # type: ignore[arg-type]
        found = [(fmt, job.result().tobytes()) for fmt, job in jobs]
    assert len(set(found)) == len(BLOCKS)


# A packed file of an older layout must not be read as one of today's: whoever changes a digest raises packed.VERSION.
DIGESTS = {
    "int4": "87a2191e53231b34",
    "int8": "58935b2a73365b45",
    "bf16": "7b7700205853e321",
    "fp8": "81bc0300b1957b1d",
}


@pytest.mark.parametrize("fmt", DIGESTS)
def test_the_layout_is_that_of_its_version(fmt: ExpertFormat) -> None:
    geometry, rng = ExpertGeometry(1, 96, 160), np.random.default_rng(0)
    matrices = {}
    for projection in PROJECTIONS:
        data, scales = quantised(fmt, np.ones(geometry.shape(projection), np.float32))
        for array in (data, *([] if scales is None else [scales])):
            array.view(np.uint8)[:] = rng.integers(0, 256, array.view(np.uint8).shape, np.uint8)
        matrices[projection] = data, scales
    digest = hashlib.sha256(pack_expert(fmt, geometry, matrices)).hexdigest()[:16]
    assert (VERSION, digest) == (1, DIGESTS[fmt])
