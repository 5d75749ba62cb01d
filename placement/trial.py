"""The real things that `hybrid doctor` runs: a layer of made-up experts, every kernel tier against plain arithmetic,
and steps of an engine.

Measures and checks, and judges nothing: `doctor.py` calls it and `checks.py` says what the figures mean.
"""

import itertools
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from hybrid.batch import Batch, Row, Sampling, StepOutput
from hybrid.config import EngineConfig
from hybrid.engine import Engine
from hybrid.trial_steps import TrialSteps, pages_needed
from offload.config import PROJECTIONS, ExpertFormat, ExpertGeometry, Isa, PoolConfig, Precision, Progress
from offload.experts import Experts
from offload.formats import dequantise
from offload.kernels.amx import MANY_TOKENS
from offload.repeated import LAYER, Matrices, random_expert, repeated_store
from offload.topology import Place, Topology, read_text
from placement.measure_kernels import ACTIVE
from placement.measure_timing import Effort, take_turns, timed

PROMPT = 64  # tokens
PAGE_SIZE = 16
MOST_STEPS = 9  # of one kind
CHECKED = ExpertGeometry(4, 128, 96)  # of the kernels' check: blocks and units that are not full
CHECK_ROWS = (1, 3, 2 * MANY_TOKENS + 1)  # one product, several, and tiles of AMX where there are any


class TrialLayer:
    """A layer of experts in memory, `sets` times eight; each call runs the next eight."""

    def __init__(
        self, hidden: int, inner: int, fmt: ExpertFormat, sets: int, config: PoolConfig, topology: Topology
    ) -> None:
        """Raises ValueError for a tier that cannot run here."""
        geometry = ExpertGeometry(ACTIVE * sets, hidden, inner)
        store = repeated_store(geometry, fmt, [random_expert(fmt, geometry)], topology.nodes)
        self.notices = store.notices  # why memory of a node could not be had
        self.n_bytes = ACTIVE * geometry.expert_bytes(fmt)  # read by a call
        self.address = int(store.addresses.min())
        self._hidden = hidden
        self._chosen = itertools.cycle(torch.arange(ACTIVE * sets).view(sets, ACTIVE))
        self._experts = Experts(store, config, topology)

    def call_with(self, rows: int) -> Callable[[], float]:
        """A call of the layer with so many rows, which all choose the same eight experts; it answers its seconds."""
        x = torch.randn((rows, self._hidden), generator=torch.Generator().manual_seed(0))
        weights = torch.full((rows, ACTIVE), 1 / ACTIVE)

        def call() -> float:
            ids = next(self._chosen).expand(rows, -1).contiguous()
            began = time.perf_counter()
            self._experts.submit(LAYER, x, ids, weights).wait()
            return time.perf_counter() - began

        return call

    def close(self) -> None:
        """Ends the workers and lets go of the memory."""
        self._experts.close()


def time_layers(
    layers: Mapping[str, TrialLayer], rows: tuple[int, ...], effort: Effort
) -> dict[tuple[str, int], list[float]]:
    """Seconds of calls by layer and rows, all by turns. What takes too long is left out."""
    return take_turns({(name, n): layer.call_with(n) for n in rows for name, layer in layers.items()}, effort)


def kernel_error(isa: Isa, precision: Precision, fmt: ExpertFormat) -> float:
    """Relative error of a tier on a small layer, against plain arithmetic on the same weights: the worst of some
    numbers of rows. Raises ValueError for a tier that cannot run here."""
    experts = [random_expert(fmt, CHECKED, seed) for seed in range(CHECKED.n_experts)]
    store = repeated_store(CHECKED, fmt, experts)
    rng = np.random.default_rng(0)
    worst = 0.0
    with closing(Experts(store, PoolConfig(1, precision, isa), Topology((0,), (Place(None, 0),)))) as ours:
        for n in CHECK_ROWS:
            x = rng.standard_normal((n, CHECKED.hidden), np.float32)
            ids = np.array([[row % 2, 2 + row % 2] for row in range(n)])  # each expert gets half of the rows
            weights = rng.random((n, 2), np.float32)
            found = ours.submit(LAYER, *(torch.from_numpy(array) for array in (x, ids, weights))).wait().numpy()
            expected = plain_layer(fmt, experts, x, ids, weights)
            error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
            worst = max(worst, error) if math.isfinite(error) else math.inf
    return worst


def plain_layer(
    fmt: ExpertFormat,
    experts: list[Matrices],
    x: npt.NDArray[np.float32],
    ids: npt.NDArray[np.int64],
    weights: npt.NDArray[np.float32],
) -> npt.NDArray[np.float64]:
    """y (T, D) = sum_k weights_k * down(silu(gate x) * up x), in float64 NumPy."""
    dense = [{name: dequantise(fmt, *expert[name]).astype(np.float64) for name in PROJECTIONS} for expert in experts]
    y = np.zeros(x.shape)
    for row, (chosen, shares) in enumerate(zip(ids, weights, strict=True)):
        for expert, share in zip(chosen, shares, strict=True):
            gate, up = dense[expert]["gate"] @ x[row], dense[expert]["up"] @ x[row]
            y[row] += share * (dense[expert]["down"] @ (gate / (1 + np.exp(-gate)) * up))
    return y


def share_in_huge_pages(address: int, smaps: Path) -> float | None:
    """Of the mapping that `address` lies in, what is in memory at all; None where the system does not say.

    `smaps` is /proc/self/smaps: a line `start-end rights …` for each mapping, then lines `Rss:  12 kB`.
    """
    sizes: dict[str, int] = {}
    inside = False
    for line in read_text(smaps).splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and (size := re.match(r"(Rss|AnonHugePages):\s+(\d+) kB", line)):
            sizes[size[1]] = int(size[2])
    return sizes["AnonHugePages"] / sizes["Rss"] if sizes.get("Rss") and "AnonHugePages" in sizes else None


@dataclass(frozen=True, slots=True)
class Step:
    """One kind of step: median seconds, and what the last one read of the experts."""

    name: str
    tokens: int
    seconds: float
    expert_bytes: int
    distinct: int


def run_steps(
    directory: Path,
    pool: PoolConfig,
    device: Literal["cpu", "cuda"],
    most: float,
    progress: Progress,
    tell: Callable[[str], None],
) -> list[Step]:
    """Load a model and run a prompt and single tokens through it, `most` seconds of each kind and once at least.

    Raises ValueError or RuntimeError, one line each; RuntimeError too where the model's answer is not a number.
    """
    dtype: Literal["float32", "bfloat16"] = "bfloat16" if device == "cuda" else "float32"
    n_pages = pages_needed(PAGE_SIZE, PROMPT, PROMPT, 1, 1)
    config = EngineConfig(directory, device, dtype, "native", pool, n_pages, PAGE_SIZE)
    with closing(Engine(config, progress, tell)) as engine:
        _check_answer(engine)
        steps = TrialSteps(engine)
        prompt = _repeat(f"step: a prompt of {PROMPT} tokens", PROMPT, most, lambda: steps.prompt(PROMPT)[0])
        steps.fill(PROMPT, 1, PROMPT)
        return [_repeat("step: 1 new token", 1, most, lambda: steps.decode(1)), prompt]


def read_device(device: Literal["cpu", "cuda"]) -> tuple[float | None, float]:
    """Bytes per second of the device's own memory, None for the CPU, which has none; FLOP/s of a large product."""
    where = torch.device(device)
    x, weight = torch.ones((1024, 2048)), torch.ones((2048, 2048))
    if device == "cuda":
        x, weight = x.to(where, torch.bfloat16), weight.to(where, torch.bfloat16)
    flop = 2 * x.shape[0] * weight.numel()
    rate = flop / min(timed(where, lambda: torch.nn.functional.linear(x, weight)) for _ in range(5))
    if device == "cpu":
        return None, rate
    memory = torch.ones(1 << 28, dtype=torch.uint8, device=where)
    return 2 * memory.numel() / min(timed(where, memory.clone) for _ in range(5)), rate


def pin(n_bytes: int) -> str | None:
    """Why so many bytes cannot be pinned; None where they can."""
    try:
        torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None


def _check_answer(engine: Engine) -> None:
    ids = tuple(range(min(8, engine.model.vocab_size)))
    row = Row(0, ids, 0, (0,), Sampling(temperature=0.0, logprobs=0))
    answer = engine.step(Batch((row,))).rows[0]
    assert answer.logprob is not None  # was asked for
    if not math.isfinite(answer.logprob.logprob):
        raise RuntimeError("the model's answer to a prompt of 8 tokens is not a number")


def _repeat(name: str, tokens: int, most: float, step: Callable[[], StepOutput]) -> Step:
    out = step()  # warms up
    seconds: list[float] = []
    while not seconds or (sum(seconds) < most and len(seconds) < MOST_STEPS):
        out = step()
        seconds.append(out.seconds)
    return Step(name, tokens, statistics.median(seconds), out.expert_bytes, out.distinct_experts)
