"""A request on its way: the ids so far (prompt and answer), how many of them are computed, and its next row.

Plain state, moved by `scheduler.py` and looked at by `policy.py`.
"""

from dataclasses import dataclass, field

from hybrid.batch import Row, TokenLogprob
from hybrid.pages import Holding
from server.request import FinishReason, Progress, Request


@dataclass(slots=True, eq=False)
class Sequence:
    """One request known to the scheduler."""

    request: Request
    held: Holding
    number: int  # order of arrival
    n_computed: int = 0
    cached_tokens: int | None = None  # of the first admission; None before it
    scores: list[TokenLogprob | None] = field(default_factory=lambda: [None])  # logprobs of the leading prompt ids
    cancelled: bool = False  # while in flight
    overtaken: int = 0  # requests that came later and were started first
    gave_way: int = 0  # times that it was preempted since its last token

    @property
    def n_output(self) -> int:
        """Tokens of the answer so far."""
        return len(self.held.ids) - len(self.request.prompt)

    @property
    def remaining(self) -> int:
        """Tokens that its answer may still have."""
        return self.request.max_tokens - self.n_output

    @property
    def n_left(self) -> int:
        """Ids that must be computed before the next token can be sampled: 1 for a request that decodes."""
        return len(self.held.ids) - self.n_computed

    @property
    def scoring(self) -> bool:
        """True while prompt logprobs are still missing."""
        return self.request.prompt_logprobs is not None and len(self.scores) < len(self.request.prompt)

    @property
    def shareable(self) -> int | None:
        """Tokens that may come from shared pages. A position not scored yet must be computed."""
        return len(self.scores) - 1 if self.scoring else None

    def row(self, n: int) -> Row:
        """The next `n` ids as a row; it asks for a token where they are the last ones."""
        request, ids = self.request, self.held.ids
        start, end = self.n_computed, self.n_computed + n
        sampling = request.sampling if end == len(ids) and request.max_tokens > 0 else None
        penalised = sampling is not None and sampling.penalised
        return Row(
            request_id=request.id,
            ids=tuple(ids[start:end]),
            position=start,
            pages=tuple(self.held.pages),
            sampling=sampling,
            n_sampled=self.n_output,
            targets=request.prompt[start + 1 : end + 1] if self.scoring else None,
            n_alternatives=request.prompt_logprobs or 0,
            prompt=request.prompt if penalised else (),
            output=tuple(ids[len(request.prompt) :]) if penalised else (),
        )

    def progress(self, finish: FinishReason | None) -> Progress:
        """What is told of it now."""
        return Progress(self.request.id, finish=finish, cached_tokens=self.cached_tokens or 0)
