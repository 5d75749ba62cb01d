"""A layer's tokens from the device to the workers and their sum back, without the device or the caller standing still.

Per layer the device packs x, ids and weights side by side and copies them to pinned memory at once; behind them, on
the same stream, it writes a number that grows by one, the flag. A thread that needs no interpreter looks at the flag
and releases the workers (kernels/handoff.py), while the caller is already enqueueing what the device does next. The
sum comes back with one copy.

Who may write where, with one layer under way: the staging buffers belong to the device from `send` until the flag,
then to the workers until `wait`; the next `send` comes after that. The sum belongs to the workers from the flag on: by
then the copy of the layer before, on the same stream, has left. So nothing needs a second buffer or an event.

On the CPU as device the copies are plain and everything else is the same; only tests and benches ask for that. Knows
no experts. Used by experts.py.
"""

import threading
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from offload.config import LINE
from offload.kernels import handoff, sync
from offload.kernels.handoff import BOARD_BYTES, CLOSING, NAP, NEVER_CAME, STUCK, TICKET, TICKET_AT
from offload.pool import PoolError, WorkerPool

MOST_PACKED = 16 * 2**20  # bytes packed on the device: some 500 tokens of K2.5; more would take its memory
PIECE_ROWS = 2048  # whose float32 lie on the device at once
NAP_SECONDS = 2 * NAP * 1e-6  # as the kernel rounds it


class HostTokens(NamedTuple):
    """A layer's tokens where the workers read them; of `send`, there when the flag is."""

    x: torch.Tensor  # (T, D) float32
    ids: torch.Tensor  # (T, K) int64
    weights: torch.Tensor  # (T, K) float32
    result: torch.Tensor  # (T, D) float32, for the workers to write


class Staging:
    """Buffers on both sides that grow and never shrink; a layer's x, ids and weights lie side by side."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pinned = device, device.type == "cuda"
        self._here, self._there = self._host(0), torch.empty(0, dtype=torch.uint8, device=device)
        self._sums = self._host(0)

    def _host(self, n_bytes: int) -> torch.Tensor:
        return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=self._pinned)

    def send(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> HostTokens:
        """Enqueue the copies of x (T, D), ids and weights (T, K): one, or for many tokens some that need no buffer on
        the device."""
        n_ids, n_x, n_weights = 8 * ids.numel(), 4 * x.numel(), 4 * weights.numel()
        total = n_ids + n_x + n_weights
        if total > self._here.numel():
            self._here, self._sums = self._host(total), self._host(total)
        here = self._split(self._here, (ids.shape, x.shape))
        if total <= MOST_PACKED:
            if total > self._there.numel():
                self._there = self._there.new_empty(total)
            for part, source in zip(self._split(self._there, (ids.shape, x.shape)), (ids, x, weights), strict=True):
                part.copy_(source)
            self._here[:total].copy_(self._there[:total], non_blocking=True)
        else:
            for part, source in zip(here, (ids, x, weights), strict=True):
                for a, b in zip(torch.split(part, PIECE_ROWS), torch.split(source, PIECE_ROWS), strict=True):
                    a.copy_(b, non_blocking=True)
        return HostTokens(here[1], here[0], here[2], self._sums[:n_x].view(torch.float32).view(x.shape))

    @staticmethod
    def _split(memory: torch.Tensor, shapes: tuple[torch.Size, torch.Size]) -> tuple[torch.Tensor, ...]:
        """ids, x and weights."""
        ids, x = shapes
        a, b = 8 * ids.numel(), 8 * ids.numel() + 4 * x.numel()
        return (
            memory[:a].view(torch.int64).view(ids),
            memory[a:b].view(torch.float32).view(x),
            memory[b : b + a // 2].view(torch.float32).view(ids),
        )


class Handoff:
    """The thread, its ticket, the flag and the staging buffers. Used by one caller."""

    def __init__(self, pool: WorkerPool, device: torch.device, stuck_seconds: float) -> None:
        handoff.warm()
        self._pool, self._stuck_seconds = pool, stuck_seconds
        self._staging = Staging(device)
        self._counter = torch.zeros(1, dtype=torch.int64, device=device)
        self._flag = torch.zeros(1, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._sent = 0
        memory = np.zeros(BOARD_BYTES + LINE, np.uint8)
        start = -memory.ctypes.data % LINE
        self._board: npt.NDArray[np.uint8] = memory[start : start + BOARD_BYTES]
        self._ticket = self._board[TICKET_AT : TICKET_AT + TICKET.itemsize].view(TICKET)[0]
        self._ticket["flag"], self._ticket["naps"] = self._flag.data_ptr(), int(stuck_seconds / NAP_SECONDS)
        self._thread = threading.Thread(
            target=handoff.serve, args=(pool.address, self._address), name="expert-handoff", daemon=True
        )
        self._thread.start()

    @property
    def _address(self) -> int:
        return self._board.ctypes.data

    def send(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> HostTokens:
        """Enqueue a layer's way to the host, and the flag behind it."""
        sent = self._staging.send(x.detach(), ids, weights.detach())
        self._counter += 1
        self._flag.copy_(self._counter, non_blocking=True)
        self._sent += 1
        return sent

    def arrive(self) -> None:
        """Wait here until what was sent is there. Raises PoolError when it does not come."""
        if not handoff.await_flag(self._flag.data_ptr(), self._sent, int(self._ticket["naps"])):
            raise self._missing()

    def post(self, function: int, grouping: tuple[int, ...], warming: int) -> None:
        """Let the workers run the job when the flag comes. `grouping` is LayerJob.grouping's, `warming` the stop word
        of a job that only warms caches and still runs, or 0. The pool must be reserved.
        """
        ticket = self._ticket
        ticket["number"], ticket["function"], ticket["warming"] = self._sent, function, warming
        names = ("job", "addresses", "n_experts", "x", "ids", "weights", "n_tokens", "k", "y", "ends", "chosen")
        for name, value in zip(names, grouping, strict=True):
            ticket[name] = value
        handoff.post(self._pool.address, self._address)

    def wait(self) -> int:
        """Wait until the job was published: its experts, or UNKNOWN_EXPERT where there is none for an id.

        Raises PoolError when the flag did not come.
        """
        while not handoff.handed(self._pool.address, self._address, self._pool.address + sync.PATIENCE):
            assert self._thread.is_alive(), "the thread ends only in close"
        answer = int(self._ticket["answer"])
        if answer == NEVER_CAME:
            raise self._missing()
        if answer == STUCK:
            raise PoolError("the expert workers did not leave off warming their caches")
        return answer

    def _missing(self) -> PoolError:
        return PoolError(
            f"the device did not hand a layer over within {self._stuck_seconds:g} s: it is stuck, or an earlier "
            "operation failed there"
        )

    def close(self) -> bool:
        """End the thread, after a ticket under way. True where the last one was handed over."""
        if self._thread.is_alive():
            while not handoff.handed(self._pool.address, self._address, self._pool.address + sync.PATIENCE):
                pass  # the flag comes, or is given up
            self._board[CLOSING : CLOSING + 8].view(np.int64)[0] = 1
            handoff.post(self._pool.address, self._address)
            self._thread.join()
        return int(self._ticket["answer"]) >= 0
