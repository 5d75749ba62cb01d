"""What a plan will bring, by `cost.py`: tokens per second by batch, time to the first token, a swarm's makespan.

Knows where the KV lies and how much of it there is, and nothing of how that was settled. Called by the planner, for
the figures of a plan and to compare the ways of dividing memory.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from placement.cost import Load, Rates, StepCost, prompt_seconds, step_cost
from placement.plan import Goal, Point, Prediction, Swarm

BATCHES = (1, 2, 4, 8, 16, 32, 64, 100)
PROMPTS = (256, 1024, 2048, 8192, 32768)
SAMPLED_CHUNKS = 9  # of a prompt with more: the time of a chunk changes evenly with what precedes it
# A swarm's agent: a prompt that all share, one of its own, an answer. Tokens.
SHARED, PRIVATE, ANSWER = 8192, 600, 1000


@dataclass(frozen=True, slots=True)
class Cache:
    """Tokens that the pages hold."""

    on_device: int
    in_ram: int = 0
    running: int | None = None  # requests that may run at once, as many as there is room for if None

    @property
    def tokens(self) -> int:
        return self.on_device + self.in_ram


def swarm_of(agents: int, longest: int) -> Swarm:
    """The swarm that a plan is for, cut down where the longest request is shorter; its seconds are 0."""
    answer, private = min(ANSWER, longest // 2), min(PRIVATE, longest // 4)
    return Swarm(agents, max(0, min(SHARED, longest - answer - private)), private, answer, 0.0)


def request_tokens(goal: Goal) -> int:
    """Tokens of one of the goal's requests at its end."""
    if goal.kind != "swarm":
        return goal.context
    swarm = swarm_of(goal.concurrency, goal.context)
    return swarm.shared_tokens + swarm.private_tokens + swarm.answer_tokens


def cached_tokens(goal: Goal, requests: int) -> int:
    """Tokens that so many requests of the goal keep at their ends; a swarm's shared prompt counts once."""
    if goal.kind != "swarm":
        return requests * goal.context
    swarm = swarm_of(goal.concurrency, goal.context)
    return swarm.shared_tokens + requests * (swarm.private_tokens + swarm.answer_tokens)


def batch_held(goal: Goal, tokens: int) -> int:
    """Requests of the goal that so many cached tokens are enough for, at most the goal's number; 0 for not one."""
    first = cached_tokens(goal, 1)
    each = cached_tokens(goal, 2) - first
    return 0 if tokens < goal.context else min(goal.concurrency, 1 + (tokens - first) // max(each, 1))


def batch_run(goal: Goal, cache: Cache) -> int:
    """Requests of the goal that run at once: those that the pages hold, as far as they may; 1 at the least."""
    return max(1, min(batch_held(goal, cache.tokens), cache.running or goal.concurrency))


def share_in_ram(goal: Goal, cache: Cache, batch: int, context: int) -> float:
    """Of what `batch` requests read in a step: the cached tokens beyond the device's pages, which fill up first."""
    beyond = max(0, min(cached_tokens(goal, batch), cache.tokens) - cache.on_device)
    return min(1.0, beyond / (batch * context))


def decode_step(rates: Rates, goal: Goal, cache: Cache, batch: int, context: int | None = None) -> StepCost:
    """A step of `batch` requests at the goal's context. Cached tokens beyond the device's pages cross the link once."""
    context = context or request_tokens(goal)
    share = share_in_ram(goal, cache, batch, context)
    return step_cost(replace(rates, setup=replace(rates.setup, kv_in_ram=share)), Load.decode(batch, context))


def first_token(rates: Rates, tokens: int, chunk: int, before: int = 0) -> float:
    """`prompt_seconds` for prompts of any number of chunks: of many, the sum over a few times their number."""
    whole, rest = divmod(tokens, chunk)
    if whole <= SAMPLED_CHUNKS:
        return prompt_seconds(rates, tokens, chunk, before)
    starts = np.linspace(0, whole - 1, SAMPLED_CHUNKS).round() * chunk + before
    seconds = [step_cost(rates, Load.prompt(chunk, int(start), 0)).seconds for start in starts]
    mean = float(np.trapezoid(seconds, starts) / (starts[-1] - starts[0]))
    last = step_cost(rates, Load.prompt(rest, before + whole * chunk)).seconds if rest else 0.0
    return whole * mean + last


def prefill_seconds(rates: Rates, goal: Goal, chunk: int) -> float:
    """Reading the prompts: one of the goal's context, or a swarm's shared one and then every agent's own."""
    if goal.kind != "swarm":
        return first_token(rates, goal.context, chunk)
    swarm = swarm_of(goal.concurrency, goal.context)
    shared, private = swarm.shared_tokens, max(swarm.private_tokens, 1)
    first = first_token(rates, shared, chunk) if shared else 0.0
    together = min(swarm.agents, chunk // private)  # whose own prompts fit into one step
    if together < 2:
        return first + swarm.agents * first_token(rates, private, chunk, shared)
    full, rest = divmod(swarm.agents, together)
    steps = [(together, full), (rest, 1 if rest else 0)]
    own = sum(n * step_cost(rates, Load(0, 0, ((private, shared),) * k, k)).seconds for k, n in steps if n)
    return first + own


def makespan(rates: Rates, goal: Goal, cache: Cache, chunk: int) -> float:
    """Seconds until a swarm's last agent has answered: prompts, then all decode in as large batches as pages allow.

    Closed form: the batch stays full until the end (longest remaining first), and contexts count half the answer.
    """
    swarm = swarm_of(goal.concurrency, goal.context)
    batch = batch_run(goal, cache)
    context = swarm.shared_tokens + swarm.private_tokens + swarm.answer_tokens // 2
    step = decode_step(rates, goal, cache, batch, max(context, 1)).seconds
    return prefill_seconds(rates, goal, chunk) + swarm.answer_tokens * swarm.agents / batch * step


def score(rates: Rates, goal: Goal, cache: Cache, chunk: int) -> float:
    """What the planner makes small: a swarm's makespan, else seconds for one token of every request."""
    if goal.kind == "swarm":
        return makespan(rates, goal, cache, chunk)
    batch = batch_run(goal, cache)
    return decode_step(rates, goal, cache, batch).seconds * goal.concurrency / batch


def predict(rates: Rates, goal: Goal, cache: Cache, chunk: int) -> Prediction:
    """All figures of a plan, batches as far as the goal and the pages go and prompts up to the context."""
    most = batch_run(goal, cache)
    decode = []
    for batch in sorted({*(size for size in BATCHES if size < most), most}):
        step = decode_step(rates, goal, cache, batch)
        decode.append(Point(batch, step.seconds, batch / step.seconds, step.binding))
    prefill = []
    for tokens in [size for size in PROMPTS if size <= goal.context] or [goal.context]:
        seconds = first_token(rates, tokens, chunk)
        step = step_cost(rates, Load.prompt(min(tokens, chunk)))
        prefill.append(Point(tokens, seconds, tokens / seconds, step.binding))
    swarm = None
    if goal.kind == "swarm":
        swarm = replace(swarm_of(goal.concurrency, goal.context), seconds=makespan(rates, goal, cache, chunk))
    return Prediction(tuple(decode), tuple(prefill), swarm)


def human_seconds(value: float) -> str:
    """Seconds for people."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:,.0f} {unit}" if value >= 100 * size else f"{value / size:.3g} {unit}"
    return f"{value * 1e6:.3g} us"


def best_chunk(rates: Rates, goal: Goal, sizes: tuple[int, ...], within: float) -> tuple[int, dict[int, float]]:
    """The smallest size whose prompts are read in at most `within` times the best time, and the seconds of each."""
    seconds = {size: prefill_seconds(rates, goal, size) for size in sizes}
    least = min(seconds.values())
    assert math.isfinite(least), "a prompt that never ends"
    return min(size for size, value in seconds.items() if value <= within * least), seconds
