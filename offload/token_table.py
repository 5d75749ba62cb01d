"""Which experts followed a token before: a table of bounded memory, learned online.

A key is a token id, or an id with the one before it (`pair_keys`). Each of the latest keys has a row: for every layer
a few experts with how often they were chosen. So 160,000 ids times 60 layers times 384 experts are never spelt out,
and what is known holds for all layers at the start of a step. Knows no models. Called by `offload.predict`.
"""

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.integer]
Floats = npt.NDArray[np.float32]

OLD = 128  # times a key is seen until its counts are halved, so that they fit a byte and the row can learn anew
DOUBT = 2.0  # observations that the base counts for


def pair_keys(before: Integers, tokens: Integers) -> Integers:
    """One key for each token (T,) and the one before it, -1 where there is none."""
    return np.asarray((np.asarray(before, np.int64) + 1) << 32 | np.asarray(tokens, np.int64))


class TokenTable:
    """Counts of chosen experts for at most `n_keys` keys. The key that was learned longest ago makes room."""

    def __init__(self, n_keys: int, n_layers: int, n_experts: int, ways: int) -> None:
        """`ways`: experts that a row keeps for a layer; the least counted makes room."""
        if n_keys < 1 or not 1 <= ways <= n_experts:
            raise ValueError(f"expected at least one key and 1 to {n_experts} ways, found {n_keys} and {ways}")
        self._n_experts = n_experts
        self._rows: dict[int, int] = {}  # key to row, the key learned longest ago first
        # Column n_experts stands for no expert.
        self._experts = np.full((n_keys, n_layers, ways), n_experts, np.uint16)
        self._counts = np.zeros((n_keys, n_layers, ways), np.uint8)
        self._seen = np.zeros(n_keys, np.uint8)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def n_bytes(self) -> int:
        """Of the rows, without the dictionary of keys."""
        return self._experts.nbytes + self._counts.nbytes + self._seen.nbytes

    def probabilities(self, layer: int, keys: Integers, base: Floats) -> Floats:
        """(T, E): how likely each expert is for keys (T,); `base` (T, E) counts for `DOUBT` observations."""
        rows = np.array([self._rows.get(key, -1) for key in keys.tolist()], np.int64)
        known = np.flatnonzero(rows >= 0)
        rows = rows[known]
        counts = np.zeros((len(known), self._n_experts + 1), np.float32)
        np.put_along_axis(counts, self._experts[rows, layer].astype(np.int64), self._counts[rows, layer], 1)
        found = base.astype(np.float32)
        found[known] = (counts[:, :-1] + DOUBT * base[known]) / (self._seen[rows, None] + np.float32(DOUBT))
        return found

    def learn(self, keys: Integers, experts: Integers) -> None:
        """Count the experts (T, L, K) that tokens with keys (T,) chose, in their order."""
        places: dict[int, list[int]] = {}
        for i, key in enumerate(keys.tolist()):
            places.setdefault(key, []).append(i)
        # First tokens of all keys, then second ones: rows of different keys do not touch each other. No more keys at
        # once than there are rows.
        waiting = list(places.items())
        for a in range(0, len(waiting), len(self._seen)):
            some = waiting[a : a + len(self._seen)]
            rows = [self._row(key) for key, _ in some]
            for turn in range(max(len(at) for _, at in some)):
                now = [(row, at[turn]) for row, (_, at) in zip(rows, some, strict=True) if turn < len(at)]
                self._count(np.array([row for row, _ in now]), experts[[at for _, at in now]])

    def _row(self, key: int) -> int:
        """The row of a key, which becomes the latest; a cleared one for a new key."""
        row = self._rows.pop(key, None)
        if row is None:
            row = len(self._rows)
            if row == len(self._seen):
                row = self._rows.pop(next(iter(self._rows)))
            self._experts[row], self._counts[row], self._seen[row] = self._n_experts, 0, 0
        self._rows[key] = row
        return row

    def _count(self, rows: Integers, experts: Integers) -> None:
        """Count one token's experts (N, L, K) in each of N different rows."""
        old = rows[self._seen[rows] >= OLD]
        self._counts[old] >>= 1
        self._seen[old] >>= 1
        self._seen[rows] += 1
        names, counts = self._experts[rows], self._counts[rows]  # (N, L, W) each, copies
        for expert in np.moveaxis(experts.astype(names.dtype), 2, 0)[..., None]:  # (N, L, 1)
            same = names == expert
            way = np.where(same.any(-1), same.argmax(-1), counts.argmin(-1))[..., None]
            before = np.where(np.take_along_axis(names, way, -1) == expert, np.take_along_axis(counts, way, -1), 0)
            np.put_along_axis(names, way, expert, -1)
            np.put_along_axis(counts, way, before.astype(np.uint8) + np.uint8(1), -1)
        self._experts[rows], self._counts[rows] = names, counts
