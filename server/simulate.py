"""What a workload would do on a machine: the server's own scheduler, driven in simulated time by the cost model.

    report = simulate(workload, scheduler_config, clock(rates))

Time moves only by steps and by waiting for the next arrival. Requests that arrive within a step are seen at its end,
as in the engine's process. Knows no HTTP and no text: rendering, parsing and the wire cost nothing here. Called by the
`simulate` command; `timeline.py` draws what comes out.
"""

import heapq
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from hybrid.batch import Batch, Row, RowOutput, Sampling, StepOutput
from placement.cost import Load, Rates, StepCost, step_cost
from server.request import Progress, Request
from server.scheduler import Scheduler, SchedulerConfig
from server.workload import Workload

GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True, slots=True)
class Served:
    """One request that was answered. Times are seconds since the start, sizes tokens."""

    agent: int  # its number in the workload, from 0
    turn: int
    arrived: float
    started: float  # of the first step that it was part of
    first_token: float
    finished: float
    prompt: int
    cached: int  # of the prompt, found in shared pages
    output: int
    patient: bool = False


@dataclass(frozen=True, slots=True)
class Refused:
    """One request that the server would refuse; its agent ends there, `turns_lost` turns early, this one included."""

    agent: int
    turn: int
    reason: str
    turns_lost: int


@dataclass(frozen=True, slots=True)
class Step:
    """One engine step."""

    start: float  # seconds
    seconds: float
    decoding: int  # rows that go on with an answer
    prefilled: int  # tokens of prompts, those computed again after a preemption included


@dataclass(frozen=True, slots=True)
class Report:
    """What happened, in simulated time. `parts` are seconds by cause before overlap, `moved` bytes by link, `binding`
    the seconds of the steps that each part decided: as in StepCost, summed over all steps."""

    agents: int
    makespan: float  # seconds until the last answer, waits included
    served: tuple[Served, ...]  # in order of their ends
    refused: tuple[Refused, ...]
    steps: tuple[Step, ...]
    parts: dict[str, float]
    moved: dict[str, float]
    binding: dict[str, float]
    preemptions: int

    @property
    def busy(self) -> float:
        """Seconds in which a step ran."""
        return sum(step.seconds for step in self.steps)

    @property
    def generated(self) -> int:
        """Tokens sampled."""
        return sum(request.output for request in self.served)

    @property
    def prefilled(self) -> int:
        """Prompt tokens computed."""
        return sum(step.prefilled for step in self.steps)

    @property
    def cached(self) -> int:
        """Prompt tokens found in shared pages."""
        return sum(request.cached for request in self.served)

    @property
    def ttft(self) -> list[float]:
        """Seconds from each request's arrival to its first token."""
        return [request.first_token - request.arrived for request in self.served]

    @property
    def tpot(self) -> list[float]:
        """Mean seconds between the tokens of each answer that has two or more."""
        return [(r.finished - r.first_token) / (r.output - 1) for r in self.served if r.output > 1]

    @property
    def queued(self) -> list[float]:
        """Seconds from each request's arrival to its first step."""
        return [request.started - request.arrived for request in self.served]

    @property
    def lanes(self) -> dict[str, "Report"]:
        """Of a swarm with users beside it, the two parts by name; else nothing. Only what is told of requests holds."""
        parts = {
            "swarm": tuple(request for request in self.served if request.patient),
            "users": tuple(request for request in self.served if not request.patient),
        }
        return {name: replace(self, served=served) for name, served in parts.items()} if all(parts.values()) else {}

    @property
    def utilisation(self) -> dict[str, float]:
        """Share of the makespan in which each part was at work."""
        return {name: seconds / self.makespan if self.makespan else 0.0 for name, seconds in self.parts.items()}


def clock(rates: Rates, page_size: int = 16) -> Callable[[Batch], StepCost]:
    """The cost model as the clock of `simulate`. Pages that change tiers cross the link before the step."""

    def cost(batch: Batch) -> StepCost:
        sampled = sum(row.sampling is not None for row in batch.rows)
        found = step_cost(rates, Load.of(((len(row.ids), row.position) for row in batch.rows), sampled))
        n_out, n_in = len(batch.moves.demoted), len(batch.moves.promoted)
        if not n_out + n_in:
            return found
        page, (out, back) = page_size * rates.kv_token, rates.hand_over
        seconds = page * (n_out * out + n_in * back)
        parts = {**found.parts, "link": found.parts["link"] + seconds}
        moved = {**found.moved, "link": found.moved["link"] + page * (n_out + n_in)}
        return replace(found, seconds=found.seconds + seconds, parts=parts, moved=moved)

    return cost


def simulate(
    workload: Workload,
    config: SchedulerConfig,
    cost: Callable[[Batch], StepCost],
    max_model_len: int | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Report:
    """Run the workload to its end. `max_model_len` (tokens) is the server's limit for prompt and answer together.

    `progress` hears of (stage, requests done, requests in all).
    """
    run = _Run(workload, config, cost, max_model_len)
    while run.arrivals or not run.scheduler.idle:
        before = run.n_done
        run.advance()
        if run.n_done != before:
            progress("simulating", run.n_done, workload.n_requests)
    return run.report()


@dataclass(slots=True)
class _Live:
    """A request on its way."""

    agent: int
    turn: int
    arrived: float
    prompt: int
    started: float | None = None
    first_token: float | None = None


class _Run:
    """One simulation: the time, what is still to arrive, and what happened."""

    def __init__(
        self,
        workload: Workload,
        config: SchedulerConfig,
        cost: Callable[[Batch], StepCost],
        max_model_len: int | None,
    ) -> None:
        self.agents = workload.agents
        self.scheduler = Scheduler(config, lambda batch: cost(batch).seconds)
        self.cost = cost
        self.longest = max_model_len
        self.now = 0.0
        # (seconds, agent, turn): who comes at the same time comes in the workload's order.
        self.arrivals = [(agent.turns[0].wait, i, 0) for i, agent in enumerate(self.agents)]
        heapq.heapify(self.arrivals)
        self.live: dict[int, _Live] = {}  # by request id
        self.n_asked = 0
        self.served: list[Served] = []
        self.refused: list[Refused] = []
        self.steps: list[Step] = []
        self.parts, self.moved, self.binding = (defaultdict[str, float](float) for _ in range(3))

    @property
    def n_done(self) -> int:
        """Requests that are over: answered, refused, or never to be made because their agent was refused."""
        return len(self.served) + sum(refused.turns_lost for refused in self.refused)

    def advance(self) -> None:
        """One step; where there is nothing to compute, the time goes on to the next arrival."""
        if self.scheduler.idle:
            self.now = max(self.now, self.arrivals[0][0])
        while self.arrivals and self.arrivals[0][0] <= self.now:
            self._ask(*heapq.heappop(self.arrivals))
        batch = self.scheduler.next()
        if batch is not None:
            self._step(batch)

    def report(self) -> Report:
        """Everything so far."""
        return Report(
            agents=len(self.agents),
            makespan=max((request.finished for request in self.served), default=0.0),
            served=tuple(self.served),
            refused=tuple(self.refused),
            steps=tuple(self.steps),
            parts=dict(self.parts),
            moved=dict(self.moved),
            binding=dict(self.binding),
            preemptions=self.scheduler.stats().preemptions,
        )

    def _ask(self, arrived: float, i: int, turn: int) -> None:
        agent, request_id = self.agents[i], self.n_asked
        self.n_asked += 1
        length, output = agent.prompt_tokens(turn), agent.turns[turn].output
        reason = self._too_long(length, output)
        if reason is None:
            request = Request(request_id, agent.prompt(turn), output, GREEDY, group=agent.group, patient=agent.patient)
            refusal = self.scheduler.add(request)
            reason = refusal.error if refusal is not None else None
        if reason is None:
            self.live[request_id] = _Live(i, turn, arrived, length)
        else:
            self.refused.append(Refused(i, turn, reason, len(agent.turns) - turn))

    def _too_long(self, prompt: int, output: int) -> str | None:
        """The REST side's refusal, which the scheduler never sees."""
        if self.longest is None or prompt + output <= self.longest:
            return None
        return (
            f"{prompt} prompt tokens and an answer of {output} are more than the {self.longest} that a request may have"
        )

    def _step(self, batch: Batch) -> None:
        start, cost = self.now, self.cost(batch)
        self.now += cost.seconds
        decoding = prefilled = 0
        answers = []
        for row in batch.rows:
            live = self.live[row.request_id]
            if live.started is None:
                live.started = start
            if _decodes(row):
                decoding += 1
            else:
                prefilled += len(row.ids)
            token = None if row.sampling is None else self.agents[live.agent].own_id
            answers.append(RowOutput(row.request_id, token))
        self.steps.append(Step(start, cost.seconds, decoding, prefilled))
        _add(self.parts, cost.parts)
        _add(self.moved, cost.moved)
        _add(self.binding, {cost.binding: cost.seconds})
        for progress in self.scheduler.commit(StepOutput(tuple(answers), cost.seconds)):
            self._note(progress)

    def _note(self, progress: Progress) -> None:
        live = self.live[progress.request_id]
        if live.first_token is None:
            live.first_token = self.now
        if progress.finish is not None:
            del self.live[progress.request_id]
            self._end(live, progress.cached_tokens)

    def _end(self, live: _Live, cached: int) -> None:
        assert live.started is not None and live.first_token is not None, "an answer without a step"
        agent = self.agents[live.agent]
        turns = agent.turns
        times = (live.arrived, live.started, live.first_token, self.now)
        sizes = (live.prompt, cached, turns[live.turn].output)
        self.served.append(Served(live.agent, live.turn, *times, *sizes, agent.patient))
        following = live.turn + 1
        if following < len(turns):
            heapq.heappush(self.arrivals, (self.now + turns[following].wait, live.agent, following))


def _add(totals: dict[str, float], more: Mapping[str, float]) -> None:
    for name, value in more.items():
        totals[name] += value


def _decodes(row: Row) -> bool:
    return row.n_sampled > 0 and row.sampling is not None and len(row.ids) == 1
