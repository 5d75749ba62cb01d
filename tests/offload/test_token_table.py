"""offload.token_table against dictionaries that are filled token by token."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from offload.token_table import DOUBT, OLD, TokenTable, pair_keys

L, E, K = 3, 12, 3


@dataclass
class Row:
    seen: int = 0
    counts: list[list[list[int]]] = field(default_factory=lambda: [[] for _ in range(L)])  # [expert, count] by way


class Dictionaries:
    """The same table, spelt out."""

    def __init__(self, n_keys: int, ways: int) -> None:
        self.n_keys, self.ways = n_keys, ways
        self.rows: dict[int, Row] = {}

    def learn(self, key: int, experts: np.ndarray) -> None:
        row = self.rows.pop(key, None)
        if row is None:
            row = Row()
            if len(self.rows) == self.n_keys:
                del self.rows[next(iter(self.rows))]
        self.rows[key] = row
        if row.seen >= OLD:
            row.seen //= 2
            for layer in row.counts:
                for way in layer:
                    way[1] //= 2
        row.seen += 1
        for layer, chosen in zip(row.counts, experts.tolist(), strict=True):
            for expert in chosen:
                known = [way for way in layer if way[0] == expert]
                if known:
                    known[0][1] += 1
                elif len(layer) < self.ways and all(way[1] > 0 for way in layer):
                    layer.append([expert, 1])
                else:
                    least = min(range(len(layer)), key=lambda i: layer[i][1])
                    layer[least] = [expert, 1]

    def probabilities(self, layer: int, key: int, base: np.ndarray) -> np.ndarray:
        found = base.astype(float).copy()
        if key in self.rows:
            row = self.rows[key]
            found *= DOUBT
            for expert, count in row.counts[layer]:
                found[expert] += count
            found /= row.seen + DOUBT
        return found


def draw(rng: np.random.Generator, n: int) -> np.ndarray:
    """Skewed experts (n, L, K), different for a token."""
    noise = rng.gumbel(size=(n, L, E)) - 0.4 * np.arange(E)
    return np.argsort(-noise, axis=2)[..., :K]


@pytest.mark.parametrize(("n_keys", "ways", "n_ids"), [(50, E, 20), (6, E, 20), (6, 4, 9), (1, 3, 4)])
def test_it_counts_as_dictionaries_do(n_keys: int, ways: int, n_ids: int) -> None:
    rng = np.random.default_rng(n_keys)
    table, plain = TokenTable(n_keys, L, E, ways), Dictionaries(n_keys, ways)
    base = rng.random((n_ids, E)).astype(np.float32)
    for _ in range(60):
        keys = rng.integers(n_ids, size=rng.integers(1, n_keys + 1))  # with repeats
        experts = draw(rng, len(keys))
        table.learn(keys, experts)
        # Keys of one call become the latest in the order of their first tokens.
        for key in dict.fromkeys(keys.tolist()):
            for i in np.flatnonzero(keys == key):
                plain.learn(key, experts[i])
        assert len(table) == len(plain.rows) <= n_keys
        layer = int(rng.integers(L))
        found = table.probabilities(layer, np.arange(n_ids), base)
        wanted = [plain.probabilities(layer, key, base[key]) for key in range(n_ids)]
        assert np.allclose(found, wanted, rtol=1e-5)


def test_more_keys_at_once_than_rows() -> None:
    table = TokenTable(2, L, E, K)
    experts = draw(np.random.default_rng(1), 7)
    table.learn(np.arange(7), experts)
    zeros = np.zeros((7, E), np.float32)
    found = table.probabilities(1, np.arange(7), zeros)
    assert not found[:5].any()
    assert [sorted(np.flatnonzero(row)) for row in found[5:]] == [sorted(chosen[1]) for chosen in experts[5:].tolist()]


def test_old_counts_make_room_for_new_ones() -> None:
    table = TokenTable(1, 1, E, 2)
    one, other = np.array([[[0, 1]]]), np.array([[[2, 3]]])
    for _ in range(1000):
        table.learn(np.array([5]), one)
    zeros = np.zeros((1, E), np.float32)
    assert table.probabilities(0, np.array([5]), zeros)[0, :2] == pytest.approx(1, abs=0.05)
    for _ in range(1000):
        table.learn(np.array([5]), other)
    assert table.probabilities(0, np.array([5]), zeros)[0, 2:4].max() > 0.9


def test_memory_is_bounded() -> None:
    table = TokenTable(4, L, E, K)
    before = table.n_bytes
    table.learn(np.arange(100), draw(np.random.default_rng(2), 100))
    assert (len(table), table.n_bytes) == (4, before)
    assert before == 4 * (L * K * 3 + 1)


def test_a_pair_is_another_key_than_its_reverse() -> None:
    ids = np.array([-1, 0, 1, 2, 163_839])
    before, tokens = np.repeat(ids, 4), np.tile(ids[1:], 5)
    assert len(set(pair_keys(before, tokens).tolist())) == 20


def test_sizes_that_cannot_be() -> None:
    for n_keys, ways in ((0, 2), (3, 0), (3, E + 1)):
        with pytest.raises(ValueError, match="at least one key"):
            TokenTable(n_keys, L, E, ways)
