"""Two processes that train one network: the same bits on both, and what one process makes of all their documents."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.spawn import spawn

from hybrid.nano.conversation import Encoded
from hybrid.nano.data import copy_list
from hybrid.nano.mixture import Mixture
from hybrid.nano.pictures import picture
from hybrid.nano.train import CONFIG, Phase, Trainer
from hybrid.nano.workers import ALONE, Workers, join

CPU = torch.device("cpu")
PHASE = Phase("both", Mixture({copy_list: 0.5, picture: 0.5}), 400, 2, probes={copy_list: 3}, probed_every=2)
Tensors = dict[str, torch.Tensor]


class Watched(Trainer):
    """Keeps the gradients of its first update, and the selection biases after it. Only the first worker sees pictures,
    as happens by chance: the second has no gradients for the tower."""

    def __init__(self, directory: Path, workers: Workers = ALONE) -> None:
        super().__init__(directory, CPU, workers=workers)
        self.gradients: Tensors = {}
        self.first_biases: list[torch.Tensor] = []
        update = self.optimiser.step

        def step(muon_rate: float, adam_rate: float) -> None:
            if not self.gradients:
                self.gradients = {n: w.grad.clone() for n, w in self.network.named_parameters() if w.grad is not None}
                self.first_biases = [bias.clone() for bias in self.network.biases.values()]
            update(muon_rate, adam_rate)

        self.optimiser.step = step  # type: ignore[method-assign]

    def _documents(self, phase: Phase) -> list[Encoded]:
        documents = super()._documents(phase)
        return [one for one in documents if not one.images] if self._workers.rank else documents


class Both(Watched):
    """One process with the documents of two workers."""

    def _documents(self, phase: Phase) -> list[Encoded]:
        shares = []
        for rank in range(2):
            self._workers = Workers(rank, 2)
            shares.append(super()._documents(phase))
        self._workers = ALONE
        assert all(shares)
        first, second = ({tuple(one.ids) for one in share} for share in shares)
        assert not first & second
        assert any(one.images for one in shares[0])
        return [*shares[0], *shares[1]]


def work(rank: int, directory: Path, meeting: Path) -> None:
    """What a worker does, in a process of its own."""
    torch.set_num_threads(1)
    workers = join(rank, 2, meeting)
    parts = [torch.full((2, 3), float(rank + 1)), torch.tensor([10.0 * rank]), torch.tensor(float(rank))]
    workers.add_up(parts)
    trainer = Watched(directory, workers)
    trainer.run((PHASE,))
    state: dict[str, Any] = {
        "summed": parts,
        "gathered": workers.gathered({"rank": rank}),
        "weights": trainer.network.state_dict(),
        "biases": list(trainer.network.biases.values()),
        "momentum": trainer.optimiser.state()["momentum"],
        "tokens": trainer.progress.tokens,
        "gradients": trainer.gradients,
        "first_biases": trainer.first_biases,
    }
    torch.save(state, directory / f"worker {rank}.pt")


def begun(directory: Path) -> Path:
    directory.mkdir()
    shutil.copyfile(CONFIG.with_name("model") / "tiktoken.model", directory / "tiktoken.model")
    return directory


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What either worker held in the end, by rank."""
    scratch = tmp_path_factory.mktemp("workers")
    directory = begun(scratch / "training")
    spawn(work, (directory, scratch / "meeting"), 2)  # type: ignore[no-untyped-call]
    assert [path.name for path in sorted(directory.glob("*.pt"))] == ["state.pt", "worker 0.pt", "worker 1.pt"]
    return [torch.load(directory / f"worker {rank}.pt", weights_only=True) for rank in range(2)]


def test_tensors_are_summed_and_values_gathered(two: list[dict[str, Any]]) -> None:
    for worker in two:
        matrix, vector, scalar = worker["summed"]
        assert torch.equal(matrix, torch.full((2, 3), 3.0))
        assert torch.equal(vector, torch.tensor([10.0]))
        assert torch.equal(scalar, torch.tensor(1.0))
        assert worker["gathered"] == [{"rank": 0}, {"rank": 1}]


def test_all_workers_hold_the_same_bits(two: list[dict[str, Any]]) -> None:
    first, second = two
    assert first["weights"].keys() == second["weights"].keys()
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name
    for kind in ("biases", "momentum"):
        assert all(torch.equal(a, b) for a, b in zip(first[kind], second[kind], strict=True))
    assert first["tokens"] == second["tokens"]


def test_two_workers_are_one_with_all_their_documents(two: list[dict[str, Any]], tmp_path: Path) -> None:
    alone = Both(begun(tmp_path / "alone"))
    begin = {name: weight.clone() for name, weight in alone.network.state_dict().items()}
    alone.run((PHASE,))
    worker = two[1]
    assert worker["tokens"] == alone.progress.tokens
    assert worker["gradients"].keys() == alone.gradients.keys() == begin.keys()
    for name, gradient in alone.gradients.items():
        assert gradient.any(), name
        assert (worker["gradients"][name] - gradient).norm() < 1e-5 * gradient.norm(), name
    for ours, theirs in zip(alone.first_biases, worker["first_biases"], strict=True):
        assert torch.equal(ours, theirs)
    for name, weight in alone.network.state_dict().items():  # loosely: Adam makes much of the least gradients
        moved = weight - begin[name]
        assert (worker["weights"][name] - weight).norm() < 0.01 * moved.norm(), name
