"""What the routed experts of one step cost: which of them, where they run, how long, how many bytes.

How many experts a batch touches follows from each expert's share of the tokens, taken as independent: an expert with
share q has m of T tokens with binomial probability, so its expected time is the mean of t(m), and a layer's distinct
experts are the sum of 1 - (1 - q)^T. Knows no model's names and no requests. Called by `cost.py`.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placement.routing import chosen

Array = npt.NDArray[np.float64]
EXACT_TOKENS = 1024  # beyond, t(m) is as good as straight over the spread of m: its mean is t(mean) of those chosen
EXACT_SHARES = 64  # different shares that are computed one by one; of more, between so many of them


class CostError(ValueError):
    """A figure that the profile lacks. One line with its name and the remedy."""


@dataclass(frozen=True, slots=True)
class RowTable:
    """Seconds by rows, measured at some; between them straight lines, beyond the last one the slope of the last part.

    The slope is taken from a quarter of the largest rows on: two neighbours alone would multiply their noise.
    """

    rows: Array
    values: Array
    slope: float

    @classmethod
    def of(cls, seconds: dict[int, float]) -> "RowTable":
        """Raises CostError for a table that has no row 1."""
        if 1 not in seconds:
            raise CostError("a table of seconds by rows has no entry for 1 row: measure it again")
        rows = np.array(sorted(seconds), np.float64)
        values = np.array([seconds[int(m)] for m in rows])
        first = int(np.searchsorted(rows, rows[-1] / 4))
        run = rows[-1] - rows[first]
        slope = (values[-1] - values[first]) / run if run else values[-1] / rows[-1]
        return cls(rows, values, max(float(slope), 0.0))

    def seconds(self, rows: float) -> float:
        """Seconds of so many rows; 0 of none."""
        last = self.rows[-1]
        if rows >= last:
            return float(self.values[-1] + (rows - last) * self.slope)
        i = int(self.rows.searchsorted(rows, "right"))
        left, start = (self.rows[i - 1], self.values[i - 1]) if i else (0.0, 0.0)
        return float(start + (self.values[i] - start) * (rows - left) / (self.rows[i] - left))

    def many(self, rows: Array) -> Array:
        """`seconds` of an array of rows. Less than one row counts as that share of one."""
        beyond = np.maximum(rows - self.rows[-1], 0) * self.slope
        return np.asarray(np.interp(rows, np.append(0.0, self.rows), np.append(0.0, self.values)) + beyond)

    def rows_at(self, seconds: float) -> float | None:
        """The least rows that take as long; None where even endless rows do not."""
        if seconds > self.values[-1]:
            return float(self.rows[-1] + (seconds - self.values[-1]) / self.slope) if self.slope else None
        rising = np.maximum.accumulate(self.values)
        return float(np.interp(seconds, rising, self.rows))


@dataclass(frozen=True, slots=True)
class Device:
    """How the device runs experts: bytes of them per second that it decodes and reads, and FLOP/s."""

    read: float
    flops: float


@dataclass(frozen=True, slots=True)
class ExpertRates:
    """One model's experts on one machine."""

    expert_bytes: int
    expert_flops: float  # of one row
    rows: RowTable  # seconds on the CPU
    ram_read: float
    disk_read: float
    link: float  # bytes per second to the device, 0 for none
    from_disk: float
    device: Device
    beside_copies: float = 1.0  # the CPU's time while experts are copied, over its time alone


@dataclass(frozen=True, slots=True)
class Layers:
    """Layers that cost the same: which they are, their experts' shares from the hottest on, and their VRAM slots."""

    members: tuple[int, ...]
    shares: Array  # (E,), descending
    slots: int


@dataclass(frozen=True, slots=True)
class ExpertCost:
    """Seconds and bytes over all layers."""

    cpu: float = 0.0
    vram: float = 0.0
    link: float = 0.0
    disk: float = 0.0
    cpu_bytes: float = 0.0
    vram_bytes: float = 0.0
    link_bytes: float = 0.0
    disk_bytes: float = 0.0
    distinct: float = 0.0
    path: float = 0.0  # layers one after the other, in each the longer of the CPU's side and the device's

    def plus(self, other: "ExpertCost", times: int) -> "ExpertCost":
        """This and `times` another."""
        return ExpertCost(*(getattr(self, name) + times * getattr(other, name) for name in self.__slots__))


def group_layers(shares: Array, slots: tuple[int, ...]) -> tuple[Layers, ...]:
    """Equal layers together. `shares` (L, E); `slots` by layer, or empty."""
    groups: dict[bytes, Layers] = {}
    for layer, row in enumerate(shares):
        ordered = np.sort(row)[::-1]
        mine = slots[layer] if slots else 0
        key = ordered.tobytes() + mine.to_bytes(4, "little")
        members = groups[key].members if key in groups else ()
        groups[key] = Layers((*members, layer), ordered, mine)
    return tuple(groups.values())


def expert_cost(
    rates: ExpertRates, layers: tuple[Layers, ...], tokens: int, beside: float = 0.0, before: float | None = None
) -> ExpertCost:
    """All layers' experts for `tokens` new ids.

    `beside` are the device's other seconds of a layer while the CPU's experts run, `before` those until they start;
    with `before`, experts may go over the link.
    """
    total = ExpertCost()
    for group in layers:
        total = total.plus(_layer_cost(rates, group, tokens, beside, before), len(group.members))
    return total


def slot_seconds(rates: ExpertRates, layers: tuple[Layers, ...], n_layers: int, tokens: int) -> Array:
    """Seconds that each layer's n-th hottest expert in VRAM saves, (L, E), where CPU and device work side by side."""
    values = np.zeros((n_layers, len(layers[0].shares)))
    for group in layers:
        cpu = _cpu_seconds(rates, group.shares, tokens)
        device = _device_seconds(rates, group.shares, chosen(group.shares, tokens), tokens)
        left, taken = (np.append(0.0, np.cumsum(seconds)) for seconds in (cpu, device))
        values[list(group.members)] = np.maximum(-np.diff(np.maximum(left[-1] - left, taken)), 0)
    return values


def _layer_cost(rates: ExpertRates, layer: Layers, tokens: int, beside: float, before: float | None) -> ExpertCost:
    active = chosen(layer.shares, tokens)
    cpu = _cpu_seconds(rates, layer.shares, tokens)
    device = _device_seconds(rates, layer.shares, active, tokens)
    n_vram = layer.slots
    n_stream = 0
    if before is not None:
        n_stream = _best_stream(rates, active[n_vram:], cpu[n_vram:], device, n_vram, before, beside)
    here = n_vram + n_stream
    count = np.array([active[:n_vram].sum(), active[n_vram:here].sum(), active[here:].sum()]) * rates.expert_bytes
    disk_bytes = float((count[1] + count[2]) * rates.from_disk)
    disk, vram, host = disk_bytes / rates.disk_read, float(device[:here].sum()), float(cpu[here:].sum())
    if n_stream:  # copies and products read the same RAM: together they take at least what its bandwidth allows
        host = max(host * rates.beside_copies, float(count[1] + count[2]) / rates.ram_read)
    return ExpertCost(
        cpu=host,
        vram=vram,
        link=float(count[1]) / rates.link if n_stream else 0.0,
        disk=disk,
        cpu_bytes=float(count[2]),
        vram_bytes=float(count[0] + count[1]),
        link_bytes=float(count[1]),
        disk_bytes=disk_bytes,
        distinct=float(active.sum()),
        path=max(host + disk, beside + vram),
    )


def _best_stream(
    rates: ExpertRates, active: Array, cpu: Array, device: Array, n_vram: int, before: float, beside: float
) -> int:
    """How many of the hottest experts outside VRAM go over the link: the prefix with the shortest layer.

    One scan over experts by falling rows is enough, since copying costs the same for each and computing more for the
    hotter (HybriMoE, DALI): max(link, before + max(CPU, device)).
    """
    link = np.append(0.0, np.cumsum(active)) * rates.expert_bytes / rates.link
    on_cpu = (cpu.sum() - np.append(0.0, np.cumsum(cpu))) * rates.beside_copies
    on_device = beside + np.cumsum(np.append(device[:n_vram].sum(), device[n_vram:]))
    return int(np.argmin(np.maximum(link, before + np.maximum(on_cpu, on_device))))


def _cpu_seconds(rates: ExpertRates, shares: Array, tokens: int) -> Array:
    """Expected seconds of each expert on the CPU, (E,)."""
    if tokens > EXACT_TOKENS:
        active = np.maximum(chosen(shares, tokens), 1e-12)
        return active * rates.rows.many(shares * tokens / active)
    kinds, which = np.unique(shares, return_inverse=True)
    if len(kinds) <= EXACT_SHARES:
        return np.asarray(_expected(rates.rows, kinds, tokens)[which])
    grid = np.geomspace(kinds[0], kinds[-1], EXACT_SHARES)
    return np.interp(shares, grid, _expected(rates.rows, grid, tokens))


def _expected(table: RowTable, shares: Array, tokens: int) -> Array:
    """Mean of t(m) for m of `tokens` with each share: sum of C(T, m) q^m (1 - q)^(T - m) t(m)."""
    m = np.arange(tokens + 1, dtype=np.float64)
    log_factorial = np.append(0.0, np.cumsum(np.log(np.arange(1, tokens + 1))))
    choose = log_factorial[-1] - log_factorial - log_factorial[::-1]
    q = np.clip(shares, 1e-300, 1 - 1e-15)[:, None]
    weights = np.exp(choose + m * np.log(q) + (tokens - m) * np.log1p(-q))  # (E, T + 1)
    return np.asarray(weights @ table.many(m))


def _device_seconds(rates: ExpertRates, shares: Array, active: Array, tokens: int) -> Array:
    """Expected seconds of each expert on the device: decoding and reading it, or multiplying, whichever is longer."""
    read = active * rates.expert_bytes / rates.device.read
    return np.asarray(np.maximum(read, shares * tokens * rates.expert_flops / rates.device.flops))
