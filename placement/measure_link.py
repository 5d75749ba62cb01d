"""Copies between RAM and the device, alone and beside the expert kernels; and experts of a packed file from the disk.

The pieces are as large as one K2.5 expert. With the CPU as the device every line of the copies runs the same, pinning
apart, so that tests can run them. Knows no plans. Called by `placement.measure`.
"""

import mmap
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from offload.config import ExpertGeometry, PoolConfig
from offload.disk import DiskReader, blocks
from offload.experts import Experts
from offload.repeated import LAYER, random_expert, repeated_store
from offload.topology import Topology
from placement.document import Measured
from placement.measure_kernels import ACTIVE
from placement.measure_timing import CannotMeasureError, Sizes, take_turns, timed
from placement.profile import Link, median_of

RING = 8  # pieces on either side
GROUP = 4  # pieces of a file that are asked for at once
SEED = 5
CPU = torch.device("cpu")


class Copies:
    """Pieces in pinned and pageable RAM and on the device."""

    def __init__(self, device: torch.device, sizes: Sizes) -> None:
        self._device, self._n_bytes, self.n_pieces = device, sizes.copy_bytes, sizes.copies
        pins = device.type == "cuda"
        shape = (RING, sizes.copy_bytes)
        self.pinned = torch.ones(shape, dtype=torch.uint8, pin_memory=pins)
        self.pageable = torch.ones(shape, dtype=torch.uint8)
        self.there = torch.ones(shape, dtype=torch.uint8, device=device)
        self.other = torch.ones((RING // 2, sizes.copy_bytes), dtype=torch.uint8, device=device)  # for the way back

    @property
    def n_bytes(self) -> int:
        """Of one run of copies."""
        return self.n_pieces * self._n_bytes

    def run(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Start all copies, in the current stream."""
        for i in range(self.n_pieces):
            target[i % RING].copy_(source[i % RING], non_blocking=True)

    def both_ways(self) -> None:
        """Start both directions, a stream each, and let the current stream wait for them."""
        halves = (self.pinned[: RING // 2], self.there[: RING // 2]), (self.other, self.pinned[RING // 2 :])
        streams = [self._stream() for _ in halves]
        for stream, (source, target) in zip(streams, halves, strict=True):
            with self._within(stream):
                for i in range(self.n_pieces):
                    target[i % len(target)].copy_(source[i % len(source)], non_blocking=True)
            if stream is not None:
                torch.cuda.current_stream(self._device).wait_stream(stream)

    def _stream(self) -> torch.cuda.Stream | None:
        """A stream that begins where the current one is now."""
        if self._device.type != "cuda":
            return None
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        return stream

    def _within(self, stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
        return nullcontext() if stream is None else torch.cuda.stream(stream)


def measure_link(device: torch.device, topology: Topology, sizes: Sizes) -> Link:
    """All kinds of copies, by the device's clock."""
    copies = Copies(device, sizes)
    runs: dict[str, Callable[[], None]] = {
        "to": lambda: copies.run(copies.pinned, copies.there),
        "from": lambda: copies.run(copies.there, copies.pinned),
        "both": copies.both_ways,
        "to pageable": lambda: copies.run(copies.pageable, copies.there),
        "from pageable": lambda: copies.run(copies.there, copies.pageable),
    }
    samples = take_turns({name: _timed_call(device, run) for name, run in runs.items()}, sizes.effort)
    rates = {name: median_of([copies.n_bytes / s for s in seconds]) for name, seconds in samples.items()}
    beside, slowdown = _beside_kernels(copies, device, topology, sizes)
    return Link(
        to_device=rates["to"],
        from_device=rates["from"],
        both_ways=Measured(*(2 * value for value in _ends(rates["both"]))),
        to_device_pageable=rates["to pageable"],
        from_device_pageable=rates["from pageable"],
        to_device_beside_kernels=beside,
        kernels_beside_copies=slowdown,
    )


def measure_disk(sizes: Sizes, scratch: Path) -> Measured:
    """Bytes per second of experts of a packed file, in random order, some asked for at once as the engine does.

    Raises CannotMeasureError where the file can only be read through the page cache, which may hold it.
    """
    with TemporaryDirectory(dir=scratch) as folder:
        path = Path(folder) / "experts"
        _write_cold(path, sizes)
        with closing(DiskReader(path)) as reader:
            if not reader.direct:
                raise CannotMeasureError("the scratch directory cannot be read past the page cache: is it a RAM disk?")
            order = np.random.default_rng(SEED).permutation(sizes.copies).tolist()
            room = blocks(1, sizes.copy_bytes)[1]
            memory = memoryview(mmap.mmap(-1, GROUP * room))
            rates = []
            for first in range(0, len(order), GROUP):
                group = order[first : first + GROUP]
                began = time.perf_counter()
                reads = []
                for i, number in enumerate(group):
                    at, n_bytes = blocks(number * sizes.copy_bytes, sizes.copy_bytes)
                    wanted = (number + 1) * sizes.copy_bytes - at
                    reads.append(reader.read(at, memory[i * room : i * room + n_bytes], wanted, urgent=True))
                reader.wait(reads)
                rates.append(len(group) * sizes.copy_bytes / (time.perf_counter() - began))
        return median_of(rates)


def _beside_kernels(copies: Copies, device: torch.device, topology: Topology, sizes: Sizes) -> tuple[Measured, float]:
    """The copies' rate while the expert kernels run, and the kernels' time then over their time alone."""
    geometry = ExpertGeometry(2 * ACTIVE, sizes.hidden, sizes.inner)
    store = repeated_store(geometry, "int4", [random_expert("int4", geometry)], topology.nodes)
    x, weights = torch.ones((1, sizes.hidden)), torch.full((1, ACTIVE), 1 / ACTIVE)
    turns = 0
    with closing(Experts(store, PoolConfig(len(topology.places)), topology)) as experts:

        def layer() -> None:
            nonlocal turns
            turns += 1
            experts.submit(LAYER, x, torch.arange(ACTIVE)[None] + turns % 2 * ACTIVE, weights).wait()

        alone: list[float] = []
        beside: list[float] = []
        rates: list[float] = []
        for _ in range(sizes.effort.rounds + 2):
            alone += [timed(CPU, layer) for _ in range(RING)]
            layers, seconds = _layers_beside(copies, device, layer)
            beside += layers
            rates.append(copies.n_bytes / seconds)
    return median_of(rates), median_of(beside).value / median_of(alone).value


def _layers_beside(copies: Copies, device: torch.device, layer: Callable[[], None]) -> tuple[list[float], float]:
    """Start the copies and run layers until they are done; seconds of each layer, and of the copies."""
    if device.type != "cuda":
        return [timed(CPU, layer)], timed(device, lambda: copies.run(copies.pinned, copies.there))
    start, done = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
    start.record()
    copies.run(copies.pinned, copies.there)
    done.record()
    seconds = [timed(CPU, layer)]
    while not done.query():  # type: ignore[no-untyped-call]
        seconds.append(timed(CPU, layer))
    return seconds, float(start.elapsed_time(done)) / 1e3


def _write_cold(path: Path, sizes: Sizes) -> None:
    """Random bytes that are on the disk and in no cache."""
    piece = np.random.default_rng(SEED).bytes(sizes.copy_bytes)
    with path.open("wb") as file:
        for number in range(sizes.copies):
            file.write(number.to_bytes(8, "little") + piece[8:])
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _timed_call(device: torch.device, run: Callable[[], None]) -> Callable[[], float]:
    return lambda: timed(device, run)


def _ends(rate: Measured) -> tuple[float, float, float]:
    assert rate.low is not None and rate.high is not None
    return rate.value, rate.low, rate.high
