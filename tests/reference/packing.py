"""The packed layout, obviously: one dword after the other, in NumPy.

What offload/config.py draws, written without looking at offload/kernels/pack.py; only the sizes of blocks are shared.
"""

import numpy as np

from offload.config import BLOCKS, ExpertFormat, ExpertGeometry

TILE = 16


def block_rows(fmt: ExpertFormat, data: np.ndarray) -> np.ndarray:
    """(rows, blocks, dwords): each row's bytes, filled up with weights of zero."""
    raw = np.ascontiguousarray(data).view(np.uint8).reshape(len(data), -1)
    width = 4 * BLOCKS[fmt].lines
    blocks = -(-raw.shape[1] // width)
    full = np.full((len(raw), blocks * width), 0x88 if fmt == "int4" else 0, np.uint8)
    full[:, : raw.shape[1]] = raw
    return full.view("<u4").reshape(len(raw), blocks, -1)


def scale_line(fmt: ExpertFormat, scales: np.ndarray | None, rows: np.ndarray, block: int) -> list[np.ndarray]:
    """The last line of a block, for the 16 row numbers `rows`; -1 is a row that is not there."""
    if scales is None:
        return []
    if fmt == "fp8":
        return [np.array([scales[r // 128, block] if r >= 0 else 0 for r in rows], "<f4").view(np.uint8)]
    groups = range(2 * block, 2 * block + 2)
    wide = scales.view(np.uint16)
    bits = [wide[r, g] if r >= 0 and g < wide.shape[1] else 0 for g in groups for r in rows]
    return [np.array(bits, "<u2").view(np.uint8)]


def tile(fmt: ExpertFormat, data: np.ndarray, scales: np.ndarray | None, first: int) -> np.ndarray:
    """The bytes of the tile of rows [first, first + 16)."""
    every = block_rows(fmt, data)
    zero = np.uint32(0x88888888 if fmt == "int4" else 0)
    rows = np.array([r if r < len(data) else -1 for r in range(first, first + TILE)])
    pieces: list[np.ndarray] = []
    for block in range(every.shape[1]):
        for j in range(every.shape[2]):
            pieces.append(np.array([every[r, block, j] if r >= 0 else zero for r in rows], "<u4").view(np.uint8))
        pieces += scale_line(fmt, scales, rows, block)
    return np.concatenate(pieces)


def expert(
    fmt: ExpertFormat, geometry: ExpertGeometry, matrices: dict[str, tuple[np.ndarray, np.ndarray | None]]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The gate_up units and the down units of one expert."""
    gate_up = [
        np.concatenate([tile(fmt, *matrices[name], 32 * u + 16 * t) for name in ("gate", "up") for t in range(2)])
        for u in range(-(-geometry.inner // 32))
    ]
    down = [
        np.concatenate([tile(fmt, *matrices["down"], 64 * u + 16 * t) for t in range(4)])
        for u in range(-(-geometry.hidden // 64))
    ]
    return gate_up, down
