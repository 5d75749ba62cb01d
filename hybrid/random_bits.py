"""Random numbers that are the same on every machine, for made-up weights.

NumPy promises stable streams for its bit generators, not for its distributions, and the maths library differs between
machines. So everything here is integers from PCG64 and exactly rounded arithmetic. `hybrid.random_weights` and
`hybrid.random_router` draw from it.
"""

import hashlib

import numpy as np
import numpy.typing as npt

BELL_MAX = 255
BELL_STD = ((256**2 - 1) / 6) ** 0.5  # of the sum of two uniform bytes, 104.5


class RandomBits:
    """The stream of one (seed, name): tensors do not depend on each other or on their order in the files."""

    def __init__(self, seed: int, name: str) -> None:
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        self._generator = np.random.PCG64(np.random.SeedSequence(list(np.frombuffer(digest, "<u4").tolist())))

    def bytes(self, n: int) -> npt.NDArray[np.uint8]:
        """`n` uniform bytes, in whole steps of eight from the stream."""
        words = np.asarray(self._generator.random_raw(-(-n // 8)), dtype="<u8")
        return words.view(np.uint8)[:n]

    def words(self, n: int) -> npt.NDArray[np.uint16]:
        """`n` uniform 16-bit integers, to look up in a table made by `bell`."""
        return self.bytes(2 * n).view("<u2")

    def uniform(self, n: int, low: float, high: float) -> npt.NDArray[np.float64]:
        """`n` values in [low, high)."""
        words = self.bytes(8 * n).view("<u8")
        return low + (high - low) * ((words >> np.uint64(11)).astype(np.float64) * 2.0**-53)

    def shuffled(self, n: int) -> list[int]:
        """A random order of 0 .. n-1."""
        return [int(i) for i in np.argsort(self.bytes(8 * n).view("<u8"), kind="stable")]


def bell() -> npt.NDArray[np.float32]:
    """What each 16-bit integer stands for: the sum of its bytes less 255, a bell of standard deviation `BELL_STD`."""
    every = np.arange(1 << 16)
    return ((every & 255) + (every >> 8) - BELL_MAX).astype(np.float32)


def coarse_bell() -> npt.NDArray[np.float32]:
    """What each byte may stand for: the same bell cut into 256 equally likely values, from -1 to 1."""
    likely = (np.arange(128) + 0.5) / 128
    half = 1 - np.sqrt(likely[::-1])  # a square root is exactly rounded everywhere
    return np.asarray(np.concatenate([-half[::-1], half]) / half[-1], np.float32)
