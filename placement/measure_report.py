"""A profile as tables for people: every figure with its spread and its share of the ceiling it runs against.

Ceilings: the processor's memory for experts and for the products of a CPU, the fastest product for the others, the
bus's nominal rate for copies. Knows no plans and measures nothing. Called by the `hybrid` command.
"""

from collections.abc import Iterator

from offload.config import ExpertFormat, ExpertGeometry
from placement.document import BYTE_RATE, FLOP_RATE, SECONDS, Measured, Unit
from placement.profile import Device, Gemm, Kernel, Link, Memory, Profile

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "fp8": 1, "int8": 1}
FORMATS: dict[str, ExpertFormat] = {"int4": "int4", "int8": "int8", "bf16": "bf16", "fp8": "fp8"}
# Bytes per second of one PCIe lane and direction, by generation: transfers times the share that carries data.
PCIE_LANE = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}
SAME_CODE = ("/bf16/a16", "/fp8/a16")  # as /a8: these formats take activations as they are
SHOWN_ROWS = (1, 2, 4, 8, 16, 32, 64, 256, 1024)


def show_profile(profile: Profile) -> str:
    """All figures; those that were not reached are named at the end."""
    lines = [f"{profile.name} ({profile.source}, {profile.measured})"]
    if profile.memory:
        lines += ["", "reading RAM", *_memory_lines(profile.memory)]
    if profile.kernels:
        lines += ["", "one routed expert", *_kernel_lines(profile)]
    if profile.device:
        lines += ["", f"device: {profile.device.name}", *_device_lines(profile.device, profile.memory)]
    if profile.link:
        lines += ["", "copies between RAM and the device", *_link_lines(profile)]
    if profile.disk_read:
        lines += ["", _line("experts from the disk", profile.disk_read, BYTE_RATE)]
    absent = ", ".join(_absent(profile))
    return "\n".join([*lines, *profile.notes, *(["", f"not measured: {absent}"] if absent else [])])


def _memory_lines(memory: Memory) -> Iterator[str]:
    best = max(rate.value for rate in memory.read.values())
    for threads, rate in sorted(memory.read.items()):
        yield _line(
            f"{threads} thread{'s' if threads > 1 else ''}", rate, BYTE_RATE, f"{rate.value / best:.0%} of the best"
        )
    if len(memory.per_node) > 1:
        for node, rate in enumerate(memory.per_node):
            yield _line(f"node {node}, its own cores", rate, BYTE_RATE)


def _kernel_lines(profile: Profile) -> Iterator[str]:
    ceiling = max((rate.value for rate in profile.memory.read.values()), default=None) if profile.memory else None
    for kernel in profile.kernels:
        if kernel.name.endswith(SAME_CODE):
            continue
        rows = [n for n in SHOWN_ROWS if n in kernel.seconds]
        yield f"  {kernel.name}, {kernel.hidden} x {kernel.inner}, ms by rows"
        yield "    " + "  ".join(f"{n}: {kernel.seconds[n].value * 1e3:.3g}" for n in rows)
        yield "    " + _kernel_rates(kernel, ceiling)


def _kernel_rates(kernel: Kernel, ceiling: float | None) -> str:
    """What one row reads against the memory's ceiling, and what most rows compute."""
    fmt = FORMATS[kernel.name.split("/")[2]]
    n_bytes = ExpertGeometry(1, kernel.hidden, kernel.inner).expert_bytes(fmt)
    least, most = min(kernel.seconds), max(kernel.seconds)
    first = kernel.seconds[least]
    read = n_bytes / first.value
    share = f", {read / ceiling:.0%} of reading RAM" if ceiling else ""
    flops = 6.0 * kernel.hidden * kernel.inner * most / kernel.seconds[most].value
    return f"{_rows(least)}: {BYTE_RATE.show(read)}{share}{_spread(first)}; {_rows(most)}: {FLOP_RATE.show(flops)}"


def _device_lines(device: Device, memory: Memory | None) -> Iterator[str]:
    on_cpu = device.kind == "cpu" and memory is not None
    ceiling = max(rate.value for rate in memory.read.values()) if on_cpu and memory else None
    for gemm in device.gemms:
        yield from _gemm_lines(gemm, ceiling)
    best = max(_gemm_flops(gemm, rows) for gemm in device.gemms for rows in gemm.seconds)
    for name, rate in (("decoding", device.attention_decode), ("a prompt", device.attention_prefill)):
        yield _line(f"attention, {name}", rate, FLOP_RATE, f"{rate.value / best:.0%} of the best product")
    yield _line("gathering cached latents", device.kv_read, BYTE_RATE)
    for name, seconds in (
        ("a step", device.per_step),
        ("a layer", device.per_layer),
        ("a sequence", device.per_row),
        ("a word of the vocabulary", device.per_logit),
    ):
        yield _line(f"overhead of {name}", seconds, SECONDS)


def _gemm_lines(gemm: Gemm, ceiling: float | None) -> Iterator[str]:
    yield f"  products in {gemm.dtype}, {gemm.size} x {gemm.size}, ms by rows"
    shown = [rows for rows in SHOWN_ROWS if rows in gemm.seconds]
    yield "    " + "  ".join(f"{rows}: {gemm.seconds[rows].value * 1e3:.3g}" for rows in shown)
    least = min(gemm.seconds)
    read = ITEM_BYTES[gemm.dtype] * gemm.size**2 / gemm.seconds[least].value
    share = f", {read / ceiling:.0%} of reading RAM" if ceiling else ""
    best = max(gemm.seconds, key=lambda rows: _gemm_flops(gemm, rows))
    first = f"{_rows(least)}: {BYTE_RATE.show(read)}{share}{_spread(gemm.seconds[least])}"
    yield f"    {first}; {_rows(best)}: {FLOP_RATE.show(_gemm_flops(gemm, best))}"


def _link_lines(profile: Profile) -> Iterator[str]:
    link = profile.link
    assert link is not None, "no link to show"
    nominal = _nominal(profile)
    for name, rate, ways in _link_rates(link):
        if rate is not None:
            share = (
                f"{rate.value / (ways * nominal):.0%} of the bus's {BYTE_RATE.show(ways * nominal)}" if nominal else ""
            )
            yield _line(name, rate, BYTE_RATE, share)
    if link.kernels_beside_copies is not None:
        yield f"  {'expert kernels beside copies':<34}{link.kernels_beside_copies:.2f} times their time alone"


def _link_rates(link: Link) -> tuple[tuple[str, Measured | None, int], ...]:
    return (
        ("to the device, pinned", link.to_device, 1),
        ("from the device, pinned", link.from_device, 1),
        ("both ways at once", link.both_ways, 2),
        ("to the device, pageable", link.to_device_pageable, 1),
        ("from the device, pageable", link.from_device_pageable, 1),
        ("to the device, beside kernels", link.to_device_beside_kernels, 1),
    )


def _nominal(profile: Profile) -> float | None:
    """Bytes per second of the first GPU's bus, one direction."""
    gpu = profile.hardware.gpus[0] if profile.hardware.gpus else None
    if gpu is None or gpu.pcie_width is None or gpu.pcie_generation not in PCIE_LANE:
        return None
    return PCIE_LANE[gpu.pcie_generation] * gpu.pcie_width


def _gemm_flops(gemm: Gemm, rows: int) -> float:
    return 2.0 * rows * gemm.size**2 / gemm.seconds[rows].value


def _rows(number: int) -> str:
    return f"{number} row{'s' if number > 1 else ''}"


def _line(what: str, figure: Measured, unit: Unit, ceiling: str = "") -> str:
    shown = f"  {what:<34}{unit.show(figure.value):>14}{_spread(figure)}"
    return f"{shown}, {ceiling}" if ceiling else shown


def _spread(figure: Measured) -> str:
    """How far the fifth and the ninety-fifth percentile are from the median."""
    if figure.low is None or figure.high is None or not figure.value:
        return ""
    return f" ({figure.low / figure.value - 1:+.0%} {figure.high / figure.value - 1:+.0%})"


def _absent(profile: Profile) -> Iterator[str]:
    needs_link = profile.device is not None and profile.device.kind == "cuda"
    for what, figure in (
        ("reading RAM", profile.memory),
        ("routed experts", profile.kernels or None),
        ("the device", profile.device),
        ("copies", profile.link or not needs_link or None),
        ("the disk", profile.disk_read),
    ):
        if figure is None:
            yield what
