"""One engine step as host values: what the scheduler asks for and what the engine answers.

Plain picklable data, no torch. A row is "new ids from position p": a prefill chunk, a decode step and the rest of a
prompt after a prefix hit are one case.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn. `temperature` 0 is greedy; None switches a filter off.

    The draw is a function of (`seed`, `Row.n_sampled`), so it does not depend on the rest of the batch and
    survives preemption.
    """

    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    logprobs: int | None = None  # alternatives to report beside the sampled token; None: no logprobs at all

    @property
    def penalised(self) -> bool:
        """True where the ids so far change the distribution."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1


@dataclass(frozen=True, slots=True)
class Row:
    """New ids of one request, written from `position` on.

    `sampling` None asks for no token (a chunk that does not end the prompt, or a request that only scores).
    `targets`, where given, are the known ids that follow each of `ids` in the prompt (one fewer than `ids` at the
    prompt's end): the engine returns their logprobs with `n_alternatives` alternatives each.
    `prompt` and `output` are the ids so far, filled only where `sampling.penalised`.
    """

    request_id: int
    ids: tuple[int, ...]
    position: int
    pages: tuple[int, ...]  # page ids that hold positions 0 .. position + len(ids) - 1, in order
    sampling: Sampling | None = None
    n_sampled: int = 0  # tokens this request has sampled before this one
    targets: tuple[int, ...] | None = None
    n_alternatives: int = 0
    prompt: tuple[int, ...] = ()
    output: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Moves:
    """KV pages copied between the device and RAM before a step's rows, as (from, to): first all that go out, then all
    that come in. No page is the goal of two."""

    demoted: tuple[tuple[int, int], ...] = ()  # device page, RAM page
    promoted: tuple[tuple[int, int], ...] = ()  # RAM page, device page


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one step; at most one row for a request."""

    rows: tuple[Row, ...]
    moves: Moves = Moves()

    @property
    def n_tokens(self) -> int:
        """New ids over all rows."""
        return sum(len(row.ids) for row in self.rows)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of `token` under the raw logits, and the most probable alternatives, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class RowOutput:
    """The answer to one row, in the batch's order. `scored` answers `Row.targets`."""

    request_id: int
    token: int | None = None
    logprob: TokenLogprob | None = None
    scored: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class StepOutput:
    """The answer to one batch, with what the step cost."""

    rows: tuple[RowOutput, ...]
    seconds: float = 0.0
    expert_bytes: int = 0  # bytes of distinct routed experts read
    distinct_experts: int = 0  # summed over layers
