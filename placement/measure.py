"""This machine's rates, item by item, into a profile: `hybrid measure`.

    profile = measure(find_hardware(), None, 60, save, progress, tell, "auto", scratch)

A list of items, the most important first: what `serve` needs today, then other formats, tiers and links. Each is saved
as soon as it is known, so that an interrupted or a timed-out run goes on where it stopped. The items are timed in the
`measure_` modules. Knows no models and no plans. Called by the `hybrid` command and by `tests.bench.predict`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Literal

import psutil
import torch

from offload.config import ExpertFormat, Isa, Precision
from offload.isa import choose
from offload.kt import installed
from offload.topology import Topology, find_topology
from placement.hardware import Hardware
from placement.measure_device import measure_device, measure_gemm, own_dtype
from placement.measure_kernels import measure_kernel, measure_kt, measure_memory
from placement.measure_link import measure_disk, measure_link
from placement.measure_report import show_profile
from placement.measure_timing import CannotMeasureError, Sizes
from placement.plan import WeightDtype
from placement.probe import machine_name
from placement.profile import Kernel, Profile

__all__ = ["Item", "ItemProgress", "MeasureError", "items_of", "measure", "run_items", "show_profile"]

Kind = tuple[Isa, ExpertFormat, Precision]
Tell = Callable[[str], None]
ItemProgress = Callable[[str, int, int], None]  # what is being measured, items done, items in all

QUANTISED: tuple[ExpertFormat, ...] = ("int4", "int8")  # the others' products take activations as they are
FIRST: tuple[ExpertFormat, Precision] = ("int4", "a8")
LATER: tuple[tuple[ExpertFormat, Precision], ...] = (
    ("int8", "a8"), ("bf16", "a8"), ("fp8", "a8"), ("int4", "a16"), ("int8", "a16"),
)  # fmt: skip
FULL = Sizes()
BUSY, LOOK_SECONDS = 20.0, 0.5  # percent that others may use, and how long to look
NAMED = 6  # items that are told by name when time runs out


class MeasureError(ValueError):
    """What was asked for cannot be measured here. One line with the remedy."""


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to measure. `run` answers the profile with it."""

    title: str
    done: Callable[[Profile], bool]
    run: Callable[[Profile], Profile]


def measure(
    hardware: Hardware,
    previous: Profile | None,
    budget_seconds: float,
    save: Callable[[Profile], None],
    progress: ItemProgress,
    tell: Tell,
    device: Literal["auto", "cpu", "cuda"],
    scratch: Path,
    sizes: Sizes = FULL,
) -> Profile:
    """Measure what `previous` lacks until the time is up; the last item begun is finished.

    `previous` is a profile of this very machine, or None. `save` is called after each item. `scratch` is a directory
    on the disk that experts would be mapped from; some 0.6 GB are written there. Raises MeasureError.
    """
    where = _device(device)
    if (busy := psutil.cpu_percent(LOOK_SECONDS)) > BUSY:
        tell(f"other programs use {busy:.0f} % of the processor now: the figures will be too slow")
    items = items_of(hardware, where, sizes, scratch, tell)
    return run_items(items, start(hardware, previous, where.type), budget_seconds, save, progress, tell)


def start(hardware: Hardware, previous: Profile | None, device: str) -> Profile:
    """The profile to fill: the previous one's rates under today's facts, or none."""
    today = date.today().isoformat()
    if previous is None:
        return Profile(machine_name(hardware), "measured", today, hardware)
    if previous.device is not None and previous.device.kind != device:
        previous = replace(previous, device=None, link=None)
    return replace(previous, source="measured", measured=today, hardware=hardware)


def run_items(
    items: Sequence[Item],
    profile: Profile,
    budget_seconds: float,
    save: Callable[[Profile], None],
    progress: ItemProgress,
    tell: Tell,
) -> Profile:
    """Run what is not done, in order, and save after each."""
    began = time.monotonic()
    waiting = [item for item in items if not item.done(profile)]
    for number, item in enumerate(waiting):
        if time.monotonic() - began >= budget_seconds:
            tell(_left_out(waiting[number:], budget_seconds))
            return profile
        progress(item.title, number, len(waiting))
        try:
            profile = item.run(profile)
        except (RuntimeError, OSError) as error:
            # Torch, the workers or the disk refuse; the rest can still be measured.
            tell(f"{item.title}: not measured: {(str(error) or repr(error)).splitlines()[0]}")
            continue
        save(profile)
        tell(f"{item.title}: measured, {time.monotonic() - began:.0f} s so far")
    progress("done", len(waiting), len(waiting))
    return profile


def items_of(hardware: Hardware, device: torch.device, sizes: Sizes, scratch: Path, tell: Tell) -> tuple[Item, ...]:
    """Everything there is to measure on this machine, the most important first."""
    topology = find_topology()
    best = choose()
    tiers = (best, *(tier for tier in hardware.tiers if tier != best))
    kernel = partial(_kernel_item, hardware, topology, sizes, tell, tiers)
    gemm = partial(_gemm_item, hardware, device, sizes)
    cuda = device.type == "cuda"
    kt = Item("kt-kernel", _has_kt, lambda p: _with_kernel(p, tiers, measure_kt(hardware, topology, sizes, scratch)))
    return (
        kernel(best, *FIRST),
        Item(
            "reading RAM",
            lambda p: p.memory is not None,
            lambda p: replace(p, memory=measure_memory(hardware, topology, sizes, tell)),
        ),
        Item(
            f"products in {own_dtype(device)}, attention, overheads",
            lambda p: p.device is not None,
            lambda p: replace(p, device=measure_device(hardware, device, sizes, scratch)),
        ),
        *([_link_item(device, topology, sizes), gemm("float32")] if cuda else []),
        *([kt] if installed() else []),
        *(kernel(best, *kind) for kind in LATER),
        Item(
            "reading experts from the disk",
            lambda p: p.disk_read is not None,
            lambda p: replace(p, disk_read=measure_disk(sizes, scratch)),
        ),
        *([gemm("fp8"), gemm("int8")] if cuda else [gemm("bfloat16")]),
        *(kernel(tier, *kind) for tier in tiers[1:] for kind in (FIRST, *LATER)),
    )


def _kernel_item(
    hardware: Hardware,
    topology: Topology,
    sizes: Sizes,
    tell: Tell,
    tiers: tuple[Isa, ...],
    isa: Isa,
    fmt: ExpertFormat,
    precision: Precision,
) -> Item:
    name = f"numba/{isa}/{fmt}/{precision}"

    def run(profile: Profile) -> Profile:
        kernel = measure_kernel(hardware, topology, (isa, fmt, precision), sizes, tell)
        profile = _with_kernel(profile, tiers, kernel)
        if fmt in QUANTISED:
            return profile
        return _with_kernel(profile, tiers, replace(kernel, name=f"numba/{isa}/{fmt}/a16"))  # the same code

    return Item(f"experts {name}", lambda p: p.kernel(name) is not None, run)


def _gemm_item(hardware: Hardware, device: torch.device, sizes: Sizes, dtype: WeightDtype) -> Item:
    def done(profile: Profile) -> bool:
        return profile.device is not None and any(gemm.dtype == dtype for gemm in profile.device.gemms)

    def run(profile: Profile) -> Profile:
        if profile.device is None:
            raise CannotMeasureError("the device's first figures are missing")
        gemms = (*profile.device.gemms, measure_gemm(hardware, device, dtype, sizes))
        return replace(profile, device=replace(profile.device, gemms=gemms))

    return Item(f"products in {dtype}", done, run)


def _link_item(device: torch.device, topology: Topology, sizes: Sizes) -> Item:
    return Item(
        "copies to and from the device",
        lambda p: p.link is not None,
        lambda p: replace(p, link=measure_link(device, topology, sizes)),
    )


def _with_kernel(profile: Profile, tiers: tuple[Isa, ...], kernel: Kernel) -> Profile:
    """The profile with one kernel more, in the order in which `serve` would take them."""
    kinds = (FIRST, *LATER, ("bf16", "a16"), ("fp8", "a16"))
    order = [f"numba/{tier}/{fmt}/{precision}" for tier in tiers for fmt, precision in kinds]
    kept = [known for known in profile.kernels if known.name != kernel.name]
    kernels = sorted((*kept, kernel), key=lambda k: order.index(k.name) if k.name in order else len(order))
    return replace(profile, kernels=tuple(kernels))


def _has_kt(profile: Profile) -> bool:
    return any(kernel.name.startswith("kt/") for kernel in profile.kernels)


def _left_out(items: Sequence[Item], budget_seconds: float) -> str:
    names = ", ".join(item.title for item in items[:NAMED])
    more = f" and {len(items) - NAMED} more" if len(items) > NAMED else ""
    return f"{budget_seconds:g} s are over; left out: {names}{more}. Run it again to go on"


def _device(asked: Literal["auto", "cpu", "cuda"]) -> torch.device:
    if asked == "cuda" and not torch.cuda.is_available():
        raise MeasureError(
            "--device cuda: torch finds no CUDA device here; use --device cpu, or install torch for CUDA"
        )
    return torch.device("cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu")
