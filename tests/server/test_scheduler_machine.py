"""Any order of arrivals, steps, tool waits and cancellations: pages stay whole, answers are those given alone."""

from dataclasses import replace
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from hybrid.batch import Batch
from server.request import Request
from tests.server.house import GREEDY, House, assert_empty, assert_same_as_alone, small

GROUPS = ("", "a", "b")
TIMES = (0.01, 0.1, 1.0, 30.0)  # seconds of a step


class Lives(RuleBasedStateMachine):
    """Requests of two groups and of nobody, patient and not, in few pages, with and without a second tier."""

    @initialize(
        n_pages=st.integers(8, 20),
        n_ram_pages=st.sampled_from([0, 1, 2, 5, 40]),
        most=st.integers(1, 12),
        running=st.integers(1, 5),
    )
    def begin(self, n_pages: int, n_ram_pages: int, most: int, running: int) -> None:
        sizes = {"n_pages": n_pages, "n_ram_pages": n_ram_pages, "max_batch_tokens": most, "max_running": running}
        self.house = House(small(page_size=2, **sizes))
        self.requests: dict[int, Request] = {}
        self.flying: Batch | None = None
        self.cancelled: set[int] = set()

    def arrive(self, prompt: list[int], max_tokens: int, group: str, patient: bool) -> None:
        made = Request(len(self.requests), tuple(prompt[:12]), max_tokens, GREEDY, group=group, patient=patient)
        self.requests[made.id] = made
        self.house.add(made)

    @rule(
        shared=st.integers(0, 9), own=st.integers(1, 3), most=st.integers(1, 4), group=st.sampled_from(GROUPS),
        patient=st.booleans(),
    )  # fmt: skip
    def ask(self, shared: int, own: int, most: int, group: str, patient: bool) -> None:
        """A prompt that begins like others of its group."""
        self.arrive([len(group) * 7] * shared + [len(self.requests) % 50] * own, most, group, patient)

    @rule(data=st.data(), most=st.integers(1, 3))
    def come_back_from_a_tool(self, data: Any, most: int) -> None:
        """The conversation so far and a result."""
        ended = [r for i, r in self.requests.items() if i not in self.cancelled and self._finish(i) == "length"]
        if ended:
            before = data.draw(st.sampled_from(ended))
            self.arrive([*before.prompt, *self.house.tokens(before.id), 3], most, before.group, before.patient)

    @precondition(lambda self: self.flying is None)
    @rule()
    def launch(self) -> None:
        self.flying = self.house.launch()

    @precondition(lambda self: self.flying is not None)
    @rule(seconds=st.sampled_from(TIMES))
    def land(self, seconds: float) -> None:
        assert self.flying is not None
        self.house.seconds = lambda batch: seconds
        self.house.land(self.flying)
        self.flying = None

    @rule(data=st.data())
    def cancel(self, data: Any) -> None:
        if self.requests:
            self._cancel(data.draw(st.sampled_from(sorted(self.requests))))

    @rule(group=st.sampled_from(GROUPS[1:]))
    def end_a_group(self, group: str) -> None:
        """Nothing of it is left after the step in flight."""
        for i, request in self.requests.items():
            if request.group == group:
                self._cancel(i)
        if self.flying is not None:
            self.land(0.1)
        assert all(self._finish(i) is not None for i, request in self.requests.items() if request.group == group)

    def teardown(self) -> None:
        if not hasattr(self, "house"):
            return
        if self.flying is not None:
            self.land(0.1)
        self.house.run()
        assert_empty(self.house)
        for i, request in self.requests.items():
            if i not in self.cancelled:
                assert_same_as_alone(self.house, replace(request, group="", patient=False))

    def _cancel(self, request_id: int) -> None:
        if self._finish(request_id) is None:
            self.cancelled.add(request_id)
        self.house.cancel(request_id)

    def _finish(self, request_id: int) -> str | None:
        return self.house.finish(request_id) if request_id in self.house.progress else None


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=40, stateful_step_count=60, deadline=None, derandomize=True)
