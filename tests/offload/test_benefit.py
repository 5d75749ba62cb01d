"""When uploads stop, and when they are tried again."""

from offload.benefit import REST, WINDOW, Benefit, Spent


def window(benefit: Benefit, spent: Spent) -> bool:
    """A window of equal steps: whether its end stops uploads."""
    return [
        benefit.step(Spent(spent.hits, spent.uploads, spent.experts, spent.seconds, spent.late)) for _ in range(WINDOW)
    ][-1]


def test_uploads_go_on_while_hits_save_more() -> None:
    benefit = Benefit()
    for _ in range(3):
        assert not window(benefit, Spent(hits=10, uploads=8, experts=20, seconds=0.02, late=0.001))
    assert benefit.uploads
    assert abs(benefit.won - 3 * WINDOW * (10 * 0.001 - 0.001 - 8 * 0.001)) < 1e-9


def test_uploads_rest_after_a_loss_and_are_tried_again() -> None:
    benefit, loss = Benefit(), Spent(hits=2, uploads=3, experts=20, seconds=0.02)
    assert window(benefit, loss)
    assert not benefit.uploads
    assert benefit.hits  # what is there saves time
    for _ in range(REST - 1):
        assert not window(benefit, Spent(hits=2, experts=20, seconds=0.02))
        assert not benefit.uploads
    assert not window(benefit, Spent(experts=20, seconds=0.02))
    assert benefit.uploads
    assert window(benefit, loss)


def test_a_device_that_is_late_runs_no_experts() -> None:
    benefit = Benefit()
    assert window(benefit, Spent(hits=4, experts=20, seconds=0.02, late=0.01))
    assert not benefit.hits
    for _ in range(REST):
        window(benefit, Spent(experts=20, seconds=0.02))
    assert benefit.hits
