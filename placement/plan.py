"""A plan: what goes where and what that will bring, as a file that people read and `hybrid serve --plan` reproduces.

Only the values and their file; `planner.py` finds them. A plan remembers which model and which machine it was made
for, so that a stale one is refused and not silently used.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from hybrid.config import ModelConfig
from offload.config import ExpertFormat, Isa, Precision
from placement.document import Bytes, Count, DocumentError, Duration, Seconds, read_document, write_document

DOCUMENT, VERSION = "plan", 1

WeightDtype = Literal["float32", "bfloat16", "fp8", "int8"]
GoalKind = Literal["latency", "throughput", "swarm"]
# What a plan may want of the engine beyond what every engine does.
Ability = Literal[
    "fp8 weights", "int8 weights", "experts in VRAM", "experts leaving RAM", "streaming prefill", "KV in RAM",
    "embedding in RAM",
]  # fmt: skip
# Of this version; a plan that needs others is not served.
ENGINE_ABILITIES: frozenset[Ability] = frozenset({"streaming prefill"})


@dataclass(frozen=True, slots=True)
class Goal:
    """What the plan is for. `context` are tokens of one request, prompt and answer together."""

    kind: GoalKind = "latency"
    context: Count = 8192
    concurrency: Count = 1  # requests that generate at once; a swarm's agents


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the ledger of bytes."""

    where: Literal["device", "RAM", "disk"]
    what: str
    size: Bytes


@dataclass(frozen=True, slots=True)
class Choice:
    """Something that was settled, and why, in one line."""

    what: str
    value: str
    reason: str


@dataclass(frozen=True, slots=True)
class Point:
    """A predicted figure. `size` is the batch of a decode step, or the tokens of a prompt."""

    size: Count
    seconds: Duration  # of one decode step, or until the first token
    tokens_per_second: float
    binding: str  # what most of the time goes to
    measured: Duration | None = None  # by `hybrid tune`, median


@dataclass(frozen=True, slots=True)
class Swarm:
    """Predicted end of a swarm that starts at once, all agents with a shared prompt, a private one and an answer."""

    agents: Count
    shared_tokens: int
    private_tokens: int
    answer_tokens: int
    seconds: Seconds


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted by `cost.py` from a profile."""

    decode: tuple[Point, ...]
    prefill: tuple[Point, ...]
    swarm: Swarm | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    """What the engine and the scheduler are started with. Sizes are bytes, lengths tokens."""

    device: Literal["cpu", "cuda"]
    weights: WeightDtype
    expert_format: ExpertFormat
    expert_precision: Precision
    experts: Literal["numba", "kt"]
    isa: Isa | None  # None: the best that can run
    threads: Count
    slots: tuple[int, ...]  # VRAM expert slots of each MoE layer; empty for none
    experts_leave_ram: bool  # those in VRAM
    experts_mapped: bool  # read from the file of `hybrid pack`, which may exceed RAM
    embedding_in_ram: bool
    ring: Bytes  # buffers for streaming experts to the device, 0 for none
    stream_from_rows: float | None  # an expert with more rows is cheaper over the link than on the CPU
    page_size: Count
    pages_on_device: Count
    pages_in_ram: int
    max_batch_tokens: Count  # the chunk of a prefill
    max_running: Count
    max_model_len: Count


@dataclass(frozen=True, slots=True)
class Trial:
    """One value of a setting, as `hybrid tune` timed it against the plan's own value, round by round."""

    setting: Literal["experts", "threads", "chunk"]
    value: str
    seconds: Seconds  # median
    ratio: float  # of its time to that of the plan's own value in the same round, median
    kept: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """What goes where for one model on one machine."""

    model: str
    model_fingerprint: str
    machine: str
    machine_fingerprint: str
    profile: str  # "measured", "datasheet", or "none": no predictions then
    goal: Goal
    settings: Settings
    ledger: tuple[Line, ...]
    choices: tuple[Choice, ...]
    prediction: Prediction | None
    notes: tuple[str, ...] = ()
    trials: tuple[Trial, ...] = ()

    @property
    def needs(self) -> tuple[Ability, ...]:
        """What the engine must be able to do, sorted. From the settings: people edit plans."""
        settings = self.settings
        asked: dict[Ability, bool] = {
            "fp8 weights": settings.weights == "fp8",
            "int8 weights": settings.weights == "int8",
            "experts in VRAM": any(settings.slots),
            "experts leaving RAM": settings.experts_leave_ram,
            "streaming prefill": settings.ring > 0 or settings.stream_from_rows is not None,
            "KV in RAM": settings.pages_in_ram > 0,
            "embedding in RAM": settings.embedding_in_ram,
        }
        return tuple(sorted(ability for ability, wanted in asked.items() if wanted))

    @property
    def lacking(self) -> tuple[Ability, ...]:
        """What it needs and this version's engine does not do."""
        return tuple(ability for ability in self.needs if ability not in ENGINE_ABILITIES)


def model_fingerprint(model: ModelConfig) -> str:
    """Twelve hex digits of everything that config.json settles."""
    return hashlib.sha256(json.dumps(asdict(model), sort_keys=True).encode()).hexdigest()[:12]


def read_plan(path: Path) -> Plan:
    """Raises DocumentError, one line with the file and the key."""
    return read_document(path, DOCUMENT, VERSION, Plan)


def write_plan(path: Path, plan: Plan) -> None:
    """The file is whole or not there. Raises OSError."""
    write_document(path, DOCUMENT, VERSION, plan)


def check_fresh(
    path: Path, plan: Plan, model: ModelConfig, machine_fingerprint: str, machine: str = "this machine"
) -> None:
    """Raises DocumentError where the plan was made for another model or another machine than `machine`."""
    again = "make a new one with `hybrid plan`"
    if plan.model_fingerprint != model_fingerprint(model):
        raise DocumentError(f"{path}: made for {plan.model}, whose config.json differs from this model's; {again}")
    if plan.machine_fingerprint != machine_fingerprint:
        raise DocumentError(
            f"{path}: made for {plan.machine}, which is other hardware than {machine}, or had other cores; {again}"
        )


def check_slots(path: Path, plan: Plan, model: ModelConfig) -> None:
    """Raises DocumentError where the slots are not those of the model's MoE layers. Nobody else counts them: an engine
    that cannot have any refuses them all."""
    slots, layers, experts = plan.settings.slots, len(model.moe_layers), model.n_routed_experts
    if slots and (len(slots) != layers or max(slots) > experts):
        raise DocumentError(
            f"{path}: settings.slots: expected none, or one for each of {layers} MoE layers, of at most {experts} "
            f"experts; found {len(slots)}, the largest {max(slots)}"
        )
