"""Copies from host memory to the device beside its computing, and the events that order the two.

Everything that only CUDA has (streams, events, pinned memory) is here. `PlainCopies` stands in where the CPU is the
device: every operation is over when it returns, so an event has nothing to wait for; order and ownership above are the
same. Knows no experts. Called by `offload.ring` and `offload.streaming`.
"""

import contextlib
import math
from dataclasses import dataclass, field
from typing import Any

import torch

PAGE = 4096
CHUNK = 1 << 30  # pinned at a time: the driver refuses some larger pieces


Event = Any  # of the copies that made it: PlainEvent or torch.cuda.Event


@dataclass(frozen=True, slots=True, eq=False)
class PlainEvent:
    """Something that is over."""

    what: str


class PlainCopies:
    """The CPU as the device."""

    def memory(self, n: int, n_bytes: int) -> torch.Tensor:
        """(n, n_bytes) of the device."""
        return torch.zeros((n, n_bytes), dtype=torch.uint8)

    def host_memory(self, n: int, n_bytes: int) -> torch.Tensor:
        """(n, n_bytes) of the host, as fast to copy from as can be."""
        return torch.zeros((n, n_bytes), dtype=torch.uint8)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Begin a copy to the device, after those begun before."""
        target.copy_(source)

    def copied(self) -> Event:
        """The end of the copies begun so far."""
        return PlainEvent("copies")

    def computed(self) -> Event:
        """The end of the device's work begun so far."""
        return PlainEvent("computing")

    def copy_after(self, event: Event) -> None:
        """Later copies wait for the event."""

    def compute_after(self, event: Event) -> None:
        """The device's later work waits for the event."""

    def host_after(self, event: Event) -> None:
        """The caller waits for the event."""


class CudaCopies:
    """A stream of copies beside the stream that is current where work is begun."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def memory(self, n: int, n_bytes: int) -> torch.Tensor:
        """(n, n_bytes) of the device."""
        return torch.empty((n, n_bytes), dtype=torch.uint8, device=self._device)  # a fill might come after a copy

    def host_memory(self, n: int, n_bytes: int) -> torch.Tensor:
        """(n, n_bytes) pinned."""
        return torch.zeros((n, n_bytes), dtype=torch.uint8, pin_memory=True)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Begin a copy to the device, after those begun before. From memory that is not pinned it waits for its end."""
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def copied(self) -> Event:
        """The end of the copies begun so far."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def computed(self) -> Event:
        """The end of the device's work begun so far."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def copy_after(self, event: Event) -> None:
        """Later copies wait for the event."""
        self._stream.wait_event(event)

    def compute_after(self, event: Event) -> None:
        """The device's later work waits for the event."""
        torch.cuda.current_stream(self._device).wait_event(event)

    def host_after(self, event: Event) -> None:
        """The caller waits for the event."""
        event.synchronize()


Copies = PlainCopies | CudaCopies


def copies_to(device: torch.device) -> Copies:
    """Copies from the host to this device."""
    return CudaCopies(device) if device.type == "cuda" else PlainCopies()


@dataclass(slots=True)
class Pinned:
    """Memory that somebody else allocated, pinned for as long as this lives. `close` before the memory goes."""

    addresses: list[int] = field(default_factory=list)

    def add(self, address: int, n_bytes: int, step: int) -> bool:
        """Pin `n_bytes` that start at a page, in pieces of whole `step` bytes: no copy of a step crosses two of them.

        False, and nothing of it pinned, where the system or the driver refuses.
        """
        assert address % PAGE == 0, "memory that begins a page"
        whole = math.lcm(step, PAGE)
        chunk = -(-CHUNK // whole) * whole
        before = len(self.addresses)
        for at in range(address, address + n_bytes, chunk):
            size = min(chunk, address + n_bytes - at)
            if int(_runtime().cudaHostRegister(at, size, 0)):
                self._drop(before)
                forget_refusal()
                return False
            self.addresses.append(at)
        return True

    def close(self) -> None:
        """Pinned no more."""
        self._drop(0)

    def _drop(self, keep: int) -> None:
        while len(self.addresses) > keep:
            _runtime().cudaHostUnregister(self.addresses.pop())


def forget_refusal() -> None:
    """CUDA keeps the error of a refused registration and hands it to the next launch that asks: this one."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda").add_(1)


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
