"""The bound on what may wait."""

import pytest

from server.admission import Admission
from server.errors import ApiError


def test_requests_are_bounded() -> None:
    admission = Admission(max_requests=3, max_tokens=100)
    tickets = [admission.enter(1), admission.enter(2)]
    with pytest.raises(ApiError) as refused:
        admission.enter(1)
    assert (refused.value.status, refused.value.code) == (429, "queue_full")
    assert 1 <= int(refused.value.headers["Retry-After"]) <= 60
    tickets[0].close()
    admission.enter(1)


def test_prompt_tokens_are_bounded_but_one_prompt_always_fits() -> None:
    admission = Admission(max_requests=10, max_tokens=100)
    long = admission.enter(1)
    long.add_tokens(1000)
    late = admission.enter(1)
    with pytest.raises(ApiError, match="1000 prompt tokens wait"):
        late.add_tokens(1)
    long.started(1000)
    late.add_tokens(1)


def test_closing_gives_everything_back_once() -> None:
    admission = Admission(max_requests=10, max_tokens=100)
    ticket = admission.enter(3)
    ticket.add_tokens(30)
    ticket.started(10)
    assert (admission.requests, admission.tokens) == (2, 20)
    ticket.close()
    ticket.close()
    assert (admission.requests, admission.tokens) == (0, 0)


def test_retry_after_follows_the_measured_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("server.admission.time.monotonic", lambda: now[0])
    admission = Admission(max_requests=1, max_tokens=10**6)
    for second in range(11):  # 100 prompt tokens a second
        now[0] = float(second)
        admission.note_served(100)
    admission.enter(1).add_tokens(4400)
    with pytest.raises(ApiError) as refused:
        admission.enter(1)
    assert refused.value.headers["Retry-After"] == "20"  # half of 4400 at 110 a second
