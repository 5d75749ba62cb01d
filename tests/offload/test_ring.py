"""Who owns a place of the ring: random orders on a device that is late, and ownership broken on purpose."""

import random
from collections import deque
from collections.abc import Callable

import pytest
import torch

from offload.copies import PlainCopies
from offload.ring import Loan, Ring, RingError

N_BYTES = 64


class LateCopies(PlainCopies):
    """Copies and computing as two queues that go on whenever chance says so, but for the events they wait for."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self._queues: dict[str, deque[Callable[[], bool]]] = {"copy": deque(), "compute": deque()}

    def compute(self, work: Callable[[], None]) -> None:
        def whole() -> bool:
            work()
            return True

        self._queues["compute"].append(whole)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        half = len(target) // 2  # not all bytes at once

        def some(part: slice) -> Callable[[], bool]:
            return lambda: target[part].copy_(source[part]) is not None

        self._queues["copy"] += [some(slice(0, half)), some(slice(half, None))]

    def copied(self) -> list[bool]:
        return self._mark("copy")

    def computed(self) -> list[bool]:
        return self._mark("compute")

    def copy_after(self, event: list[bool]) -> None:
        self._queues["copy"].append(lambda: bool(event))

    def compute_after(self, event: list[bool]) -> None:
        self._queues["compute"].append(lambda: bool(event))

    def host_after(self, event: list[bool]) -> None:
        while not event:
            self.go_on(1)

    def go_on(self, steps: int) -> None:
        for _ in range(steps):
            queue = self._queues[self._chance.choice(["copy", "compute"])]
            if queue and queue[0]():
                queue.popleft()

    def finish(self) -> None:
        while any(self._queues.values()):
            self.go_on(1)

    def _mark(self, name: str) -> list[bool]:
        event: list[bool] = []

        def pass_by() -> bool:
            event.append(True)
            return True

        self._queues[name].append(pass_by)
        return event


def expert(key: int) -> list[torch.Tensor]:
    """Two parts whose bytes tell the expert."""
    values = torch.arange(N_BYTES, dtype=torch.uint8) * 7 + key * 13
    return [values[:40].clone(), values[40:].clone()]


def play(seed: int, ring: Ring, copies: LateCopies, steps: int = 60) -> tuple[int, int]:
    """Random loads, reads and drops; how many readers found their expert's bytes, and how many others."""
    chance, loans, key = random.Random(seed), deque[Loan](), 0
    right = wrong = 0

    def look(data: torch.Tensor, wanted: torch.Tensor) -> None:
        nonlocal right, wrong
        right, wrong = (right + 1, wrong) if torch.equal(data, wanted) else (right, wrong + 1)

    def read() -> None:
        loan = loans.popleft()
        data, wanted = ring.read(loan), torch.cat(expert(loan.key))  # type: ignore[arg-type]
        for _ in range(3):  # a reader takes its time
            copies.compute(lambda: look(data, wanted))
        ring.done(loan)

    for _ in range(steps):
        act = chance.random()
        if act < 0.55 and ring.n_free:
            parts = expert(key)
            loans.append(ring.load(key, parts))
            key += 1
        elif act < 0.9 and loans:
            read()
        elif act < 0.95 and loans:
            ring.drop(loans.pop())
        copies.go_on(chance.randrange(6))
        ring.check()
    copies.finish()
    return right, wrong


@pytest.mark.parametrize("staged", [False, True])
def test_every_reader_finds_its_expert_however_late_the_device_is(staged: bool) -> None:
    for seed in range(150):
        copies = LateCopies(seed)
        right, wrong = play(seed, Ring(copies, 2 + seed % 3, N_BYTES, staged=staged), copies)
        assert wrong == 0 and right > 20


@pytest.mark.parametrize("wait", ["copy_after", "compute_after", "host_after"])
def test_each_wait_is_needed(wait: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any one of the three some reader finds other bytes: the play above can fail."""
    monkeypatch.setattr(LateCopies, wait, lambda self, event: None)
    found = 0
    for seed in range(150):
        copies = LateCopies(seed)
        found += play(seed, Ring(copies, 2, N_BYTES, staged=wait == "host_after"), copies)[1]
    assert found > 0


class Careless(Ring):
    """Frees a place when its reader begins."""

    def read(self, loan: Loan) -> torch.Tensor:
        data = super().read(loan)
        self._free.appendleft(loan.place)
        return data


def use_too_early(checked: bool) -> torch.Tensor:
    """A place is lent again while its first expert is read; what that reader had before it."""
    ring = Careless(PlainCopies(), 2, N_BYTES, staged=False, checked=checked)
    first = ring.load(0, expert(0))
    data = ring.read(first)
    second = ring.load(1, expert(1))
    seen = data.clone()
    ring._loans[first.place] = first  # as a careless table would have it
    ring.done(first)
    ring._free.clear()
    ring._free.extend({0, 1} - {second.place})
    ring._loans = {second.place: second}
    ring.check()
    return seen


def test_a_place_used_too_early_is_caught_by_its_bytes() -> None:
    with pytest.raises(RingError, match="place 0 of the ring did not hold 0 while it was read"):
        use_too_early(checked=True)
    assert not torch.equal(use_too_early(checked=False), torch.cat(expert(0)))  # what the check is for


def test_a_place_read_before_its_upload_is_caught_by_its_bytes() -> None:
    class Lost(PlainCopies):
        def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
            """Comes later."""

    ring = Ring(Lost(), 2, N_BYTES, staged=False, checked=True)
    loan = ring.load(5, expert(5))
    ring.read(loan)
    with pytest.raises(RingError, match="did not hold 5"):
        ring.check()


@pytest.mark.parametrize("staged", [False, True])
def test_a_checked_ring_lets_right_bytes_pass(staged: bool) -> None:
    ring = Ring(PlainCopies(), 2, N_BYTES, staged=staged, checked=True)
    for key in range(250):  # sums beyond 2^63 among them
        loan = ring.load(key, expert(key))
        assert torch.equal(ring.read(loan), torch.cat(expert(key)))
        ring.done(loan)
        ring.check()


def test_what_breaks_the_rules_is_named() -> None:
    ring = Ring(PlainCopies(), 2, N_BYTES, staged=False)
    loans = [ring.load(key, expert(key)) for key in range(2)]
    with pytest.raises(RingError, match=r"no place is free for 2: \[0, 1\] are there"):
        ring.load(2, expert(2))
    ring.drop(loans[0])
    for use in (ring.read, ring.done, ring.drop):
        with pytest.raises(RingError, match="place 0 of the ring is not lent to 0 any more"):
            use(loans[0])
    ring._free.append(1)
    with pytest.raises(RingError, match="no owner, or with two"):
        ring.check()
