"""What crosses between the REST process and the engine process. Plain picklable data, no torch."""

from dataclasses import dataclass, field
from typing import Literal

from hybrid.batch import Sampling, TokenLogprob
from placement.plan import Plan

FinishReason = Literal["stop", "length", "cancelled", "error"]
StepKind = Literal["decode", "prompt"]


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to continue. Generation ends at an id in `stop_ids` or after `max_tokens` tokens.

    `max_tokens` 0 only scores the prompt. `prompt_logprobs` (alternatives per prompt token, None for none) asks for
    the logprob of every prompt token but the first. Requests of one `group` count as one where places are dealt out;
    a `patient` one leaves time and places to those that are not.
    """

    id: int
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    prompt_logprobs: int | None = None
    group: str = ""
    patient: bool = False


@dataclass(frozen=True, slots=True)
class Submit:
    """REST → engine."""

    request: Request


@dataclass(frozen=True, slots=True)
class Cancel:
    """REST → engine: stop a request within one step. Unknown ids are ignored (it may just have finished)."""

    request_id: int


@dataclass(frozen=True, slots=True)
class Shutdown:
    """REST → engine: leave the loop, close the engine, exit 0."""


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """Engine → REST, while loading. `eta_s` is None until it can be estimated."""

    stage: str
    bytes_done: int = 0
    bytes_total: int = 0
    eta_s: float | None = None


@dataclass(frozen=True, slots=True)
class Notice:
    """Engine → REST: lines for the operator's terminal (the ledger of bytes, measured weight error)."""

    text: str


@dataclass(frozen=True, slots=True)
class Ready:
    """Engine → REST: the model answers from now on."""

    n_pages: int
    page_size: int  # tokens
    max_model_len: int  # tokens, prompt and answer together
    device: str
    load_seconds: float
    plan: Plan | None = None  # in force
    profile: str = "none"  # name of the rates behind the predictions, or why there are none


@dataclass(frozen=True, slots=True)
class Failed:
    """Engine → REST: the engine cannot go on. `configuration`: the operator can fix it (exit status 78)."""

    message: str
    configuration: bool = False


@dataclass(frozen=True, slots=True)
class Progress:
    """What one step did for one request. `finish` is set once, on the last one.

    The token that ended the answer (a stop id) is included. `prompt_logprobs` come with the first progress after
    the prompt is done, the first entry None.
    """

    request_id: int
    token: int | None = None
    logprob: TokenLogprob | None = None
    finish: FinishReason | None = None
    cached_tokens: int = 0  # prompt tokens taken from shared pages
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Gauges and counters after a step. Counters only grow."""

    running: int = 0
    waiting: int = 0
    pages_used: int = 0  # held by requests; pages kept only for reuse do not count
    pages_total: int = 0
    ram_pages_used: int = 0  # prefixes in RAM, whether the device has them too or not
    ram_pages_total: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_queries: int = 0  # prompt tokens looked up
    prefix_hits: int = 0  # prompt tokens found in shared pages, in either tier
    demoted: int = 0  # pages copied to RAM
    promoted: int = 0  # pages copied from RAM
    ram_hits: int = 0  # tokens in them, which were not computed again: of new requests and of preempted ones
    steps: int = 0
    step_seconds: float = 0.0
    expert_bytes: int = 0
    distinct_experts: int = 0


@dataclass(frozen=True, slots=True)
class Stepped:
    """Engine → REST: one message per step with every row's progress (and once more when it falls idle)."""

    progress: tuple[Progress, ...]
    stats: EngineStats


@dataclass(frozen=True, slots=True)
class Tally:
    """Steps of one kind with `least` to `most` new tokens (of a decode step: sequences), since the engine's start.

    `seconds` are sums over all steps, `recent_…` medians of the last ones. Predictions are None without a profile.
    """

    kind: StepKind
    least: int
    most: int
    steps: int
    seconds: float
    predicted_seconds: float | None
    recent_seconds: float
    recent_predicted_seconds: float | None


@dataclass(frozen=True, slots=True)
class Tallies:
    """Engine → REST: predicted against achieved; at most once a second, and when the engine falls idle."""

    tallies: tuple[Tally, ...]


ToEngine = Submit | Cancel | Shutdown
FromEngine = LoadProgress | Notice | Ready | Failed | Stepped | Tallies
