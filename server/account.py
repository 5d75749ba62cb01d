"""Predicted against achieved: what the engine's steps took beside what the cost model said of them.

Steps of one kind and a like size share a tally; sizes double from one to the next, so the account stays small however
long the server runs. Knows no requests. The engine process keeps one account and sends its tallies to the REST side,
where `info.py` shows them.
"""

import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from hybrid.batch import Batch, Row
from hybrid.config import ModelConfig
from placement.cost import CostError, Load, resolve, step_cost
from placement.plan import Plan
from placement.planner import setup_of
from placement.profile import Profile
from placement.routing import uniform
from server.request import StepKind, Tally

Predict = Callable[[Batch], float]  # seconds of a step

RECENT = 64  # steps that a median is taken of: the first ones of an engine are slow, and sums never forget them


@dataclass(slots=True)
class _Steps:
    """All steps of one kind and size."""

    n: int = 0
    seconds: float = 0.0
    predicted: float = 0.0
    recent: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=RECENT))  # (achieved, predicted)


class Account:
    """The steps of one engine. Without a predictor only what was achieved."""

    def __init__(self, predict: Predict | None = None) -> None:
        self._predict = predict
        self._steps: dict[tuple[StepKind, int], _Steps] = {}

    def add(self, batch: Batch, seconds: float) -> None:
        """One step took so long."""
        steps = self._steps.setdefault(_size(batch), _Steps())
        predicted = self._predict(batch) if self._predict else 0.0
        steps.n += 1
        steps.seconds += seconds
        steps.predicted += predicted
        steps.recent.append((seconds, predicted))

    def expect(self, batch: Batch) -> float:
        """Seconds that a step will take: as predicted, times what steps of its kind and size lately took more or less.

        Without a predictor, as long as these took; 0 before the first one. A median, so that a few odd ones are lost.
        """
        predicted = self._predict(batch) if self._predict else 0.0
        steps = self._steps.get(_size(batch))
        if steps is None:
            return predicted
        if not predicted:
            return statistics.median(seconds for seconds, _ in steps.recent)
        return predicted * statistics.median(seconds / most for seconds, most in steps.recent if most)

    def tallies(self) -> tuple[Tally, ...]:
        """What there is so far, decoding first, small steps first."""
        return tuple(self._tally(kind, most, steps) for (kind, most), steps in sorted(self._steps.items()))

    def _tally(self, kind: StepKind, most: int, steps: _Steps) -> Tally:
        achieved, predicted = zip(*steps.recent, strict=True)
        known = self._predict is not None
        return Tally(
            kind=kind,
            least=most // 2 + 1,
            most=most,
            steps=steps.n,
            seconds=steps.seconds,
            predicted_seconds=steps.predicted if known else None,
            recent_seconds=statistics.median(achieved),
            recent_predicted_seconds=statistics.median(predicted) if known else None,
        )


def _size(batch: Batch) -> tuple[StepKind, int]:
    """Kind of a step, and the power of two that its tokens do not exceed."""
    tokens = batch.n_tokens
    return "decode" if tokens == len(batch.rows) else "prompt", 1 << (tokens - 1).bit_length()


def predictor(model: ModelConfig, profile: Profile, plan: Plan) -> Predict:
    """Seconds of a step under a plan. Raises CostError for a rate that the profile lacks."""
    kind = plan.settings.device
    if profile.device is not None and profile.device.kind != kind:
        raise CostError(f"the profile {profile.name} is of {profile.device.kind}, not {kind}: run `hybrid measure`")
    rates = resolve(model, profile, setup_of(plan, profile), uniform(model))

    def predict(batch: Batch) -> float:
        load = Load.of([(len(row.ids), row.position) for row in batch.rows], sum(map(_logits, batch.rows)))
        return step_cost(rates, load).seconds

    return predict


def _logits(row: Row) -> int:
    """Positions of a row that need logits."""
    return (row.sampling is not None) + len(row.targets or ())
