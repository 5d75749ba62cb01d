"""How often each expert will be needed soon, learned from how often it was.

Every expert has traces: shares of the latest steps that used it, fading over 1 to 256 steps. What a trace is worth is
learned as the steps go by: one weight for each trace and one for what all experts have in common, such that the
weighted sum is the uses of the coming steps, the near ones counting most (least-squares temporal-difference learning).
So where experts come
back at once the value follows the last uses, as LRU does, and where they do not it follows the long run, as LFU does.
Knows no slots. Called by `offload.slots`.
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Mask = npt.NDArray[np.bool_]

HALVES = np.array([1.0, 4.0, 16.0, 64.0, 256.0])  # steps after which a use counts half in each trace
MEMORY = 1000.0  # steps after which what was learned of the weights counts half
CAUTION = 1e-3  # of the least squares: no weights before there is evidence


class UseForecast:
    """Expected uses of every expert within a horizon."""

    def __init__(self, n_layers: int, n_experts: int, horizon: float) -> None:
        """`horizon`: steps that count, fading: the step that far ahead counts 1/e."""
        n = len(HALVES)
        self._keep, self._fading = 0.5 ** (1 / HALVES), 1 - 1 / horizon
        self._sums = np.zeros((n, n_layers, n_experts))
        self._weight = np.zeros(n)  # of the steps in the sums: early on there are few
        self._before: Floats | None = None  # the traces a step ago and ones, (n + 1, L E)
        self._squares, self._targets = CAUTION * np.eye(n + 1), np.zeros(n + 1)

    def observe(self, used: Mask) -> Floats:
        """(L, E) expected uses, after a step that used the experts (L, E)."""
        self._sums = self._sums * self._keep[:, None, None] + used
        self._weight = self._weight * self._keep + 1
        traces = (self._sums / self._weight[:, None, None]).reshape(len(HALVES), -1)
        traces = np.concatenate((traces, np.ones((1, used.size))))
        if self._before is not None:
            fade = 0.5 ** (1 / MEMORY)
            # A value is the coming step's use and what the value is then, but for the fading.
            squares = self._before @ (self._before - self._fading * traces).T / used.size
            self._squares = fade * self._squares + squares
            self._targets = fade * self._targets + self._before @ used.ravel() / used.size
        self._before = traces
        weights = np.linalg.solve(self._squares + CAUTION * np.eye(len(traces)), self._targets)
        return np.asarray((weights @ traces).reshape(used.shape))
