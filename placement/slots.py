"""Which experts get the VRAM that is left: slots dealt over the layers, the most valuable first.

A layer's n-th hottest expert saves a step so many seconds (`cost.slot_values`), less than the one before it: the curve
of its savings is concave. All slots cost the same bytes, so taking the largest values of all layers is optimal: they
are the top of every layer's own list, and no other choice of as many has a larger sum (an exchange argument; the test
compares with every possible deal). Where a value rises along a layer's list that is no longer so: the good expert
behind a poor one cannot be had alone, and a deal that passes the poor one by misses both.
Knows no models and no devices. Called by the planner.
"""

import numpy as np
import numpy.typing as npt

NOTHING = 1e-9  # of the largest value: what is left of a subtraction


class SlotMarket:
    """Values sorted once, dealt for any number of slots. `values` (L, E): seconds saved by each layer's n-th slot."""

    def __init__(self, values: npt.NDArray[np.float64]) -> None:
        self._n_layers, n_slots = values.shape
        # A slot is worth no more than the ones before it in its layer: it cannot be had without them.
        reachable = np.minimum.accumulate(values, axis=1)
        # Equal values: first slots before second ones, so that equal layers get equal shares.
        order = np.argsort(-reachable.T.ravel(), kind="stable")
        self._layers = np.tile(np.arange(self._n_layers), n_slots)[order]
        self.worth = int(np.count_nonzero(reachable > NOTHING * reachable.max(initial=0.0)))  # slots that save anything

    def deal(self, n: int) -> tuple[int, ...]:
        """Slots of each layer, `n` in all (fewer where the experts end); () for none."""
        if n <= 0:
            return ()
        counts = np.bincount(self._layers[:n], minlength=self._n_layers)
        return tuple(int(count) for count in counts)
