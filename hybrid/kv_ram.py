"""The second tier of the latent cache: pages in RAM, copied from and to the device before a step's rows.

A page lies here as one piece over all layers, so that it crosses the link in one copy; on the device torch gathers it
first, or scatters it afterwards. Everything is put on the device's current stream in order and nothing waits: the host
never looks at what lies here. Without CUDA the same code makes plain copies.

Which prefix lies in which page is `hybrid.pages`' business. Called by `hybrid.engine`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hybrid.batch import Moves
from offload.copies import forget_refusal

WORDS = (torch.int64, torch.int32, torch.int16)


class RamTier:
    """`n_pages` pages in RAM beside a cache's memory: tensors (L, P, page_size, …) whose second axis is the page."""

    def __init__(
        self, storage: Sequence[torch.Tensor], n_pages: int, notice: Callable[[str], None] = lambda line: None
    ) -> None:
        """Where CUDA will not pin so much, copies wait for one another: slower, and right."""
        self.n_pages = n_pages
        self._device = [_as_words(tensor) for tensor in storage]  # each (L, P, W)
        self._pinned = bool(n_pages) and storage[0].device.type == "cuda"
        self._host = [
            torch.empty((n_pages, words.shape[0], words.shape[2]), dtype=words.dtype) for words in self._device
        ]
        for i, tensor in enumerate(self._host if self._pinned else ()):
            if int(_runtime().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)):
                forget_refusal()
                self._release(i)
                gigabytes = sum(one.nbytes for one in self._host) / 1e9
                notice(f"--kv-ram: CUDA does not pin {gigabytes:.1f} GB of RAM: pages are copied more slowly")
                break

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers."""
        return sum(words.shape[0] * words.shape[2] * words.itemsize for words in self._device)

    def move(self, moves: Moves) -> None:
        """Copy all that goes out, then all that comes in."""
        check_moves(moves, self._device[0].shape[1], self.n_pages)
        for device, host in zip(self._device, self._host, strict=True):
            for page, to in moves.demoted:
                host[to].copy_(device[:, page], non_blocking=True)
            for source, page in moves.promoted:
                device[:, page].copy_(host[source], non_blocking=True)

    def close(self) -> None:
        """Let go of the memory. No step may be running."""
        if self._pinned:
            torch.cuda.synchronize()
            self._release(len(self._host))
        self._host = []

    def _release(self, n: int) -> None:
        for tensor in self._host[:n]:
            _runtime().cudaHostUnregister(tensor.data_ptr())
        self._pinned = False


def check_moves(moves: Moves, n_pages: int, n_ram_pages: int) -> None:
    """Assert what the page table owes us: pages that exist, and none that is the goal of two copies."""
    for pairs, n_from, n_to in ((moves.demoted, n_pages, n_ram_pages), (moves.promoted, n_ram_pages, n_pages)):
        assert all(0 <= a < n_from and 0 <= b < n_to for a, b in pairs), "a move names a page that is not there"
        assert len({b for _, b in pairs}) == len(pairs), "two moves have the same goal"


def _as_words(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as (L, P, W) whole numbers, the widest that divide a page."""
    octets = tensor.flatten(2).view(torch.uint8)
    fitting = (dtype for dtype in WORDS if octets.shape[2] % dtype.itemsize == 0)
    return octets.view(next(fitting, torch.uint8))


def _runtime() -> Any:
    """CUDA's own functions, as torch has loaded them."""
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
