"""A machine's facts and measured rates, one file per machine: `profile.yaml`.

`measure.py` writes it, `cost.py` reads it. Rates that could not be measured (no time left, no such device) are absent,
and whoever needs one says so by name. Knows no model but the size that kernels were timed at.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from placement.document import (
    Count,
    Measured,
    MeasuredByteRate,
    MeasuredFlopRate,
    MeasuredSeconds,
    Positive,
    RatesByCount,
    Rule,
    SecondsByRows,
    read_document,
    write_document,
)
from placement.hardware import Hardware

DOCUMENT, VERSION = "profile", 1
Source = Literal["measured", "datasheet"]
KERNEL = re.compile(r"[^/\s]+(/[^/\s]+){3}")
KernelName = Annotated[
    str, Rule("backend/tier/format/precision, as numba/avx2/int4/a8", lambda name: bool(KERNEL.fullmatch(name)))
]


@dataclass(frozen=True, slots=True)
class Memory:
    """Reading RAM with vector loads, bytes per second."""

    read: RatesByCount  # threads over all nodes, to the rate in total
    per_node: tuple[MeasuredByteRate, ...] = ()  # a node's own cores reading its own memory


@dataclass(frozen=True, slots=True)
class Kernel:
    """One expert backend in one format: seconds of one expert by the number of its rows, in a layer of eight.

    `name` is backend/tier/format/precision, as numba/avx2/int4/a8. The experts are read from RAM, not from a cache.
    """

    name: KernelName
    hidden: Count
    inner: Count
    seconds: SecondsByRows


@dataclass(frozen=True, slots=True)
class Link:
    """Copies between RAM and the device, bytes per second."""

    to_device: MeasuredByteRate  # from pinned memory
    from_device: MeasuredByteRate
    both_ways: MeasuredByteRate | None = None  # sum of the two directions at once
    to_device_pageable: MeasuredByteRate | None = None
    from_device_pageable: MeasuredByteRate | None = None
    to_device_beside_kernels: MeasuredByteRate | None = None  # while the expert kernels run
    kernels_beside_copies: Positive | None = None  # the kernels' time while copies run, over their time alone


@dataclass(frozen=True, slots=True)
class Gemm:
    """Products of (rows, size) with a (size, size) weight that is not in a cache: seconds by rows."""

    dtype: Literal["float32", "bfloat16", "fp8", "int8"]
    size: Count
    seconds: SecondsByRows


@dataclass(frozen=True, slots=True)
class Device:
    """The device that runs everything but the routed experts; on a machine without a GPU the CPU stands in."""

    kind: Literal["cpu", "cuda"]
    name: str
    gemms: tuple[Gemm, ...]
    kv_read: MeasuredByteRate  # the latent cache, as attention reads it while decoding
    attention_decode: MeasuredFlopRate  # absorbed, one new token for a request
    attention_prefill: MeasuredFlopRate  # many new tokens
    per_step: MeasuredSeconds  # of a step whatever it holds
    per_layer: MeasuredSeconds  # launches and hand-offs of one layer
    per_row: MeasuredSeconds  # of a sequence in the step: its inputs and its sampling, without the vocabulary
    per_logit: MeasuredSeconds  # of one sampled row, for each word of the vocabulary


@dataclass(frozen=True, slots=True)
class Profile:
    """One machine. `kernels` hold the figures that were reached, best tier first."""

    name: str
    source: Source
    measured: str  # date, or where datasheet figures come from
    hardware: Hardware
    memory: Memory | None = None
    kernels: tuple[Kernel, ...] = ()
    device: Device | None = None
    link: Link | None = None  # None where device and RAM are one memory
    disk_read: MeasuredByteRate | None = None  # experts of a mapped file that are in no cache
    notes: tuple[str, ...] = field(default=())

    def kernel(self, name: str) -> Kernel | None:
        """The figures of one backend."""
        return next((kernel for kernel in self.kernels if kernel.name == name), None)


def read_profile(path: Path) -> Profile:
    """Raises DocumentError, one line with the file and the key."""
    return read_document(path, DOCUMENT, VERSION, Profile)


def write_profile(path: Path, profile: Profile) -> None:
    """The file is whole or not there. Raises OSError."""
    write_document(path, DOCUMENT, VERSION, profile)


def median_of(values: list[float]) -> Measured:
    """Median with the fifth and ninety-fifth percentile."""
    ordered = sorted(values)
    last = len(ordered) - 1
    middle = (ordered[last // 2] + ordered[-(-last // 2)]) / 2
    return Measured(middle, ordered[round(0.05 * last)], ordered[round(0.95 * last)])
