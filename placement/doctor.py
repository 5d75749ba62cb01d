"""`hybrid doctor`: is this machine in order, and what would make it faster.

Reads what Linux says, tries every kernel tier, times a real layer of experts and real steps of an engine beside their
ceilings, and has `checks.py` judge; `trial.py` does the running and `diagnosis.py` shows the answer. Changes no
settings and writes nothing but a small model in a temporary directory. Called by the command, whose process should set
OMP_WAIT_POLICY=PASSIVE before torch is loaded, as the engine's does.
"""

import itertools
import math
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from hybrid.config import ModelConfig
from hybrid.random_checkpoint import write_checkpoint
from offload.bandwidth import ReadCeiling
from offload.checkpoint import Checkpoint
from offload.config import ExpertFormat, ExpertGeometry, Isa, PoolConfig, Progress
from offload.isa import choose, permit_amx
from offload.ram import ram
from offload.sources import packed_path
from offload.store import packed_is_used
from offload.topology import PROCESS, SYSTEM, Topology, allowed_cpus, find_topology, read_text
from placement import checks, trial
from placement.checks import Compared, Finding, Room
from placement.diagnosis import TINY, Phase, Report
from placement.hardware import Hardware
from placement.ledger import MAX_BATCH_TOKENS, human
from placement.measure_kernels import ACTIVE, CACHES, cache_bytes, small_config
from placement.measure_timing import Effort, Sizes
from placement.probe import find_hardware
from placement.tensor_bytes import expert_bytes, weight_bytes

Tell = Callable[[str], None]
Device = Literal["cpu", "cuda"]

SIZES = Sizes(effort=Effort(seconds=1.0, longest=0.5))
ROWS = (1, 16)
SHARE_OF_RAM = 0.15  # of what is free, for one layer of experts; as many as three are there at once
UNNAMED_CACHE = 8 << 20  # where the system does not tell their size


@dataclass(frozen=True, slots=True)
class _Case:
    """What is examined."""

    model: ModelConfig | None
    directory: Path | None
    config: PoolConfig
    hardware: Hardware
    topology: Topology  # with the threads that were asked for
    default: Topology  # with one for each core
    free: int  # bytes of RAM
    device: Device
    sizes: Sizes
    system: Path
    process: Path

    @property
    def best(self) -> Isa:
        return next(tier for tier in self.hardware.tiers if tier != "amx")

    @property
    def used(self) -> Isa:
        return self.config.isa or self.best

    @property
    def expert(self) -> tuple[int, int, ExpertFormat]:
        if self.model is None:
            return self.sizes.hidden, self.sizes.inner, "int4"
        return self.model.hidden_size, self.model.moe_intermediate_size, self.model.expert_format


def examine(
    model: Path | None,
    config: PoolConfig,
    *,
    sizes: Sizes = SIZES,
    system: Path = SYSTEM,
    process: Path = PROCESS,
    progress: Progress = lambda stage, done, total: None,
    tell: Tell = lambda line: None,
) -> Report:
    """Look at everything. `model` is a checkpoint directory, a config.json in one is enough for all but its own step.

    `system` and `process` are where Linux answers; `sizes` of the trial's experts hold where there is no model.
    Raises ValueError for a model that cannot be read, and for threads and instructions that cannot be had.
    """
    choose(config.isa)
    average = _number(read_text(process.parent / "loadavg").split()[:1])
    hardware = find_hardware(model, system=system, process=process, tell=tell)
    case = _Case(
        model=None if model is None else ModelConfig.from_directory(model),
        directory=model,
        config=config,
        hardware=hardware,
        topology=find_topology(config.threads, system, process),
        default=find_topology(None, system, process),
        free=ram(process / "cgroup", system / "fs" / "cgroup")[1],
        device="cuda" if torch.cuda.is_available() else "cpu",
        sizes=sizes,
        system=system,
        process=process,
    )
    findings = [*_read_findings(case, average), *_try_kernels(case, progress)]
    read: float | None = None
    layer_phases: list[Phase] = []
    rate: dict[int, float] = {}
    if sets := _sets(case):
        read, layer_phases, rate, more = _run_layer(case, sets, _read_memory(case, progress), progress)
        findings += more
    else:
        tell(f"{human(case.free)} of RAM are free: too little for a trial of experts, so nothing was timed")
    fits = not any(finding.severity == "broken" for finding in findings)
    step_phases, more = _run_engine(case, fits, read, rate, progress, tell)
    phases = (*layer_phases, *step_phases)
    return Report(hardware, len(case.topology.places), case.used, read, phases, checks.in_order([*findings, *more]))


def _read_findings(case: _Case, average: float | None) -> Iterator[Finding]:
    """What follows from what Linux and the drivers say."""
    hardware, kernel = case.hardware, case.process.parent / "sys"
    yield from checks.room(_room(case)) if case.model is not None else ()
    yield from checks.cuda(tuple(gpu.name for gpu in hardware.gpus), torch.cuda.is_available(), str(torch.__version__))
    if case.device == "cuda":
        hidden = case.expert[0]
        staging = 2 * 4 * hidden * MAX_BATCH_TOKENS  # a step's rows on their way to the workers and back, float32
        yield from checks.pinning(trial.pin(staging), staging, hardware.memlock)
    asks = "amx" in hardware.tiers and case.used != "amx"
    yield from checks.amx(hardware.tiers, case.used, permitted=asks and permit_amx())
    yield from checks.load(average, hardware.cores)
    frequency = case.system / "devices" / "system" / "cpu" / "cpu0" / "cpufreq"
    governor, driver = (read_text(frequency / f"scaling_{name}").strip() for name in ("governor", "driver"))
    yield from checks.governor(governor or None, driver or None)
    clone, most, restricted = (
        read_text(kernel / name).strip() or None
        for name in (
            "kernel/unprivileged_userns_clone",
            "user/max_user_namespaces",
            "kernel/apparmor_restrict_unprivileged_userns",
        )
    )
    yield from checks.sandboxes(clone, most, restricted, shutil.which("bwrap") is not None)


def _room(case: _Case) -> Room:
    assert case.model is not None and case.directory is not None
    model, hardware = case.model, case.hardware
    weights = sum(weight_bytes(model, 4).values()) if case.device == "cpu" else 0
    experts, is_packed = expert_bytes(model, model.expert_format), _is_packed(case.directory, model)
    name = str(case.directory)
    return Room(name, experts, weights, is_packed, hardware.ram_installed, hardware.ram, case.free)


def _is_packed(directory: Path, model: ModelConfig) -> bool:
    """Whether the engine would map the file of `hybrid pack`."""
    if not packed_path(directory, model.expert_format).exists():
        return False
    with closing(Checkpoint(directory)) as checkpoint:
        return packed_is_used(checkpoint, model.expert_name, model.expert_geometry, model.moe_layers, "native")


def _try_kernels(case: _Case, progress: Progress) -> list[Finding]:
    """Every tier that may run, on a layer whose answer is known: int4 experts, and those of the model's own format."""
    formats: tuple[ExpertFormat, ...] = tuple(dict.fromkeys(("int4", case.expert[2])))
    tiers = [tier for tier in case.hardware.tiers if tier != "amx" or permit_amx()]
    errors = {}
    for done, (tier, fmt) in enumerate(itertools.product(tiers, formats)):
        progress(f"trying the {tier} kernels, {fmt}", done, len(tiers) * len(formats))
        errors[tier, fmt] = trial.kernel_error(tier, case.config.precision, fmt)
    return list(checks.kernels(errors))


def _sets(case: _Case) -> int:
    """Sets of eight experts that are more than the caches hold, or as many as RAM has room for."""
    each = ACTIVE * _bytes_of(case.expert)
    wanted = max(case.sizes.expert_bytes, CACHES * cache_bytes(case.hardware))
    return min(max(2, math.ceil(wanted / each)), int(SHARE_OF_RAM * case.free) // each)


def _bytes_of(expert: tuple[int, int, ExpertFormat]) -> int:
    hidden, inner, fmt = expert
    return ExpertGeometry(1, hidden, inner).expert_bytes(fmt)


def _read_memory(case: _Case, progress: Progress) -> float:
    """Bytes per second that all cores together read."""
    progress("reading memory", 0, 0)
    places, nodes = case.default.places, case.default.nodes
    cpus = [place.cpu for place in places if place.cpu is not None] or sorted(allowed_cpus())[: len(places)]
    of_cpus = [nodes[place.node] for place in places] if len(nodes) > 1 else []
    n_bytes = min(case.sizes.read_bytes, int(SHARE_OF_RAM * case.free))
    with closing(ReadCeiling(cpus, n_bytes, of_cpus)) as ceiling:
        return ceiling.measure()


def _run_layer(
    case: _Case, sets: int, read: float, progress: Progress
) -> tuple[float, list[Phase], dict[int, float], list[Finding]]:
    """A layer of experts as the engine would run it, and beside it: one small enough for the caches, one with the best
    instructions and one with the usual threads, where those are others.

    The rate at which RAM is read, the phases, the kernels' own rate (seconds for each byte of an expert that has so
    many rows), and what was found.
    """
    progress("timing a layer of experts", 0, 0)
    hidden, inner, fmt = case.expert
    with ExitStack() as stack:

        def layer(inner: int, sets: int, config: PoolConfig, topology: Topology) -> trial.TrialLayer:
            return stack.enter_context(closing(trial.TrialLayer(hidden, inner, fmt, sets, config, topology)))

        layers = {"cached": layer(_cached_inner(case), 1, case.config, case.topology)}
        if case.used != case.best:
            layers["best isa"] = layer(inner, sets, replace(case.config, isa=None), case.topology)
        if case.topology != case.default:
            layers["all cores"] = layer(inner, sets, replace(case.config, threads=None), case.default)
        main = layers["as asked"] = layer(inner, sets, case.config, case.topology)
        backed = trial.share_in_huge_pages(main.address, case.process / "smaps")
        samples = trial.time_layers(layers, ROWS, case.sizes.effort)
        sizes = {name: of.n_bytes for name, of in layers.items()}
    reached = {key: min(seconds) / sizes[key[0]] for key, seconds in samples.items()}  # per byte
    # What was reached is no more than a ceiling, however other programs disturbed the ceiling's own measurement.
    rate = {
        n: min(reached["cached", n], reached.get(("as asked", n), math.inf)) for n in ROWS if ("cached", n) in reached
    }
    read = max(read, *(1 / seconds for (name, _), seconds in reached.items() if name != "cached"))
    phases = []
    for n in [n for n in ROWS if ("as asked", n) in samples]:
        ceilings = {"RAM": sizes["as asked"] / read, "kernels": rate[n] * sizes["as asked"]}
        name = f"{ACTIVE} experts, {n} row{'s' if n > 1 else ''} each"
        phases.append(Phase(name, statistics.median(samples["as asked", n]), ceilings))
    return read, phases, rate, list(_judge_layer(case, samples, backed, main.notices))


def _judge_layer(
    case: _Case, samples: Mapping[tuple[str, int], list[float]], backed: float | None, notices: tuple[str, ...]
) -> Iterator[Finding]:
    def compared(other: str) -> Compared:
        # The best of each: with other programs about, the fastest call is the one that was left alone.
        both = [n for n in ROWS if (other, n) in samples and ("as asked", n) in samples]
        return {n: (min(samples["as asked", n]), min(samples[other, n])) for n in both}

    hardware = case.hardware
    yield from checks.tiers(hardware.tiers, case.best, case.used, compared("best isa"))
    cores, default = hardware.cores, len(case.default.places)
    yield from checks.threads(case.config.threads, default, cores, hardware.cpu_quota, compared("all cores"))
    yield from checks.huge_pages(hardware.huge_pages, backed)
    yield from checks.nodes(notices)


def _cached_inner(case: _Case) -> int:
    """The inner size at which eight experts take half of the caches, or the real size where that is smaller."""
    hidden, inner, fmt = case.expert
    step = 128  # whole blocks of every format
    room = (cache_bytes(case.hardware) or UNNAMED_CACHE) / 2
    return min(inner, step * max(1, int(room / (ACTIVE * _bytes_of((hidden, step, fmt))))))


def _run_engine(
    case: _Case, fits: bool, read: float | None, rate: Mapping[int, float], progress: Progress, tell: Tell
) -> tuple[list[Phase], list[Finding]]:
    """Steps of the model, or of a tiny one where there are no weights or something is in their way."""
    with tempfile.TemporaryDirectory(prefix="hybrid-doctor-") as folder:
        directory = case.directory
        if directory is None or not fits or not any(directory.glob("*.safetensors")):
            if directory is not None:
                tell(f"{directory} is not loaded: {'no weights there' if fits else 'see the findings'}; {TINY} instead")
            directory = Path(folder) / "model"
            write_checkpoint(small_config(), directory, seed=0)
        name = TINY if directory != case.directory else directory.name
        try:
            steps = trial.run_steps(directory, case.config, case.device, case.sizes.effort.seconds, progress, tell)
        except (ValueError, RuntimeError) as error:
            why = str(error).partition("\n")[0]
            remedy = (
                "the line above names the cause" if case.directory else "install hybrid anew; its tests narrow it down"
            )
            return [], [Finding("broken", f"no step of {name} can be run", why, remedy)]
        model = ModelConfig.from_directory(directory)
    if read is None or len(rate) < len(ROWS):
        return [], []
    progress("timing the device", 0, 0)
    device = trial.read_device(case.device)
    return [
        Phase(f"{step.name}, {name}", step.seconds, _ceilings(step, model, read, rate, device)) for step in steps
    ], []


def _ceilings(
    step: trial.Step, model: ModelConfig, read: float, rate: Mapping[int, float], device: tuple[float | None, float]
) -> dict[str, float]:
    """Seconds that a step needs of each resource. On the CPU one memory and the same cores do both parts."""
    vram, flops = device
    sizes = weight_bytes(model, 4 if vram is None else 2)
    weights = sum(size for what, size in sizes.items() if what != "embedding")  # only a row of that for each token
    arithmetic = 2 * step.tokens * weights / (4 if vram is None else 2) / flops
    assignments = step.tokens * model.num_experts_per_tok * len(model.moe_layers)
    rows = ROWS[0] if assignments <= step.distinct else ROWS[-1]
    kernels = rate[rows] / rows * assignments * model.expert_geometry.expert_bytes(model.expert_format)
    if vram is None:
        return {"RAM": (step.expert_bytes + weights) / read, "kernels": kernels + arithmetic}
    return {"RAM": step.expert_bytes / read, "VRAM": weights / vram, "kernels": kernels, "GPU": arithmetic}


def _number(words: list[str]) -> float | None:
    try:
        return float(words[0])
    except (IndexError, ValueError):
        return None
