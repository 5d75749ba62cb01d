"""Scores while training: one wrong token spoils its turn, and what is asked was never trained on."""

import random
import re

import pytest
import torch
from torch import nn

from hybrid.nano import probe, words
from hybrid.nano.conversation import Conversation, Encoded, encode
from hybrid.nano.data import Make, copy_list, known_tool, unseen_tool
from hybrid.nano.network import Batch
from hybrid.nano.probe import exact, probes
from hybrid.nano.sums import arithmetic
from hybrid.nano.train import CONFIG
from hybrid.nano.vocabulary import VOCAB_SIZE, read_vocabulary

CPU = torch.device("cpu")
VOCABULARY = read_vocabulary(CONFIG.with_name("model"))
N = 3


class Knowing(nn.Module):
    """Predicts every token rightly but those in places `wrong` of what each batch asks for."""

    def __init__(self, *wrong: int) -> None:
        super().__init__()
        self.wrong = list(wrong)
        self.n_batches = 0

    def forward(self, batch: Batch) -> torch.Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.n_batches += 1
        said = batch.targets.clone()
        said[self.wrong] += 1
        return nn.functional.one_hot(said, VOCAB_SIZE).float()


def one(make: Make) -> Encoded:
    return encode(make(random.Random(5), False), VOCABULARY)


def n_asked(document: Encoded) -> int:
    return sum(weight > 0 for weight in document.weights)


def scored(network: nn.Module, *documents: Encoded) -> dict[str, tuple[int, int]]:
    scores = exact(network, documents, CPU)
    assert network.training
    return scores


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_one_wrong_token_spoils_the_turn(share: float) -> None:
    document = one(copy_list)
    ((_, _, score),) = document.turns
    wrong = round(share * (n_asked(document) - 1))  # the first, one in the middle, the last
    every = [i * n_asked(document) + wrong for i in range(N)]
    assert scored(Knowing(*every), *[document] * N) == {score: (0, N)}
    assert scored(Knowing(every[1]), *[document] * N) == {score: (N - 1, N)}
    assert scored(Knowing(), *[document] * N) == {score: (N, N)}


def test_a_wrong_token_spoils_no_other_turn() -> None:
    document = one(known_tool)
    (_, stop, first), (_, _, second) = document.turns
    asked_first = sum(weight > 0 for weight in document.weights[:stop])
    assert scored(Knowing(asked_first - 1), document) == {first: (0, 1), second: (1, 1)}
    assert scored(Knowing(asked_first), document) == {first: (1, 1), second: (0, 1)}


def test_every_document_counts_however_many_batches_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    document = one(copy_list)
    ((_, _, score),) = document.turns
    monkeypatch.setattr(probe, "_TOKENS", 2 * len(document.ids))
    network = Knowing(0)  # of each batch the first
    assert scored(network, *[document] * 5) == {score: (2, 5)}
    assert network.n_batches == 3


def test_probes_are_held_out_and_always_the_same() -> None:
    asked: list[bool] = []

    def watched(rng: random.Random, held_out: bool) -> Conversation:
        asked.append(held_out)
        return copy_list(rng, held_out)

    families: dict[Make, int] = {watched: 2, arithmetic: 3}
    first = probes(families, VOCABULARY)
    assert asked == [True, True]
    assert len(first) == 5
    assert [document.ids for document in probes(families, VOCABULARY)] == [document.ids for document in first]


def shown(document: Encoded) -> str:
    tokens = VOCABULARY.tokens
    return b"".join(tokens[i] for i in document.ids if i < len(tokens)).decode()


def test_probes_name_what_never_trains() -> None:
    """Read back from the ids: parameters of made-up tools, and pairs of numbers."""
    keys = [
        key for d in probes({unseen_tool: 40}, VOCABULARY) for key in re.findall(r"Get the .* of a (\w+)\.\n", shown(d))
    ]
    assert len(keys) > 20
    assert all(words.is_held_out(key) for key in keys)
    sums = [re.search(r"(\d+) [+-] (\d+)", shown(d)) for d in probes({arithmetic: 40}, VOCABULARY)]
    pairs = [sorted(map(int, found.groups()), reverse=True) for found in sums if found]
    assert len(pairs) > 20
    assert all(words.is_held_out(f"{more} {fewer}") for more, fewer in pairs)
