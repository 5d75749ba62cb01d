"""The training loop: resumable to the bit, gated by scores, and really learning."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid.nano.conversation import encode
from hybrid.nano.data import copy_list
from hybrid.nano.mixture import BASICS, Mixture
from hybrid.nano.pictures import picture
from hybrid.nano.probe import exact
from hybrid.nano.train import CONFIG, Phase, Trainer

CPU = torch.device("cpu")
SHORT = Phase("short", BASICS, 200, 4, probes={copy_list: 2}, probed_every=2, quantised=True)
SEEING = Phase("seeing", Mixture({picture: 0.5, copy_list: 0.5}), 200, 2, probes={copy_list: 2}, probed_every=2)
DECAY = replace(SEEING, name="decay", steps=1, decays=True)


@pytest.fixture
def begin(tmp_path: Path) -> Any:
    """A fresh trainer in a directory of its own, with the shipped vocabulary."""

    def made(name: str) -> Trainer:
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        for file in ("tiktoken.model", "tokenizer_config.json"):
            shutil.copyfile(CONFIG.with_name("model") / file, directory / file)
        return Trainer(directory, CPU)

    return made


def lines(trainer: Trainer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (trainer.directory / "log.jsonl").read_text().splitlines()]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def snapshot(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Every weight, the tower's too."""
    return {name: weight.clone() for name, weight in trainer.network.state_dict().items()}


def update(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Every weight after one more update, from gradients that are the same for all."""
    generator = torch.Generator().manual_seed(4)
    for weight in trainer.network.parameters():
        weight.grad = torch.randn(weight.shape, generator=generator)
    trainer.optimiser.step(1e-3, 1e-3)
    return snapshot(trainer)


def test_a_resumed_training_is_the_same_training(begin: Any) -> None:
    fresh, whole = snapshot(begin("fresh")), begin("whole")
    whole.run((SEEING, DECAY))
    begin("parts").run((replace(SEEING, steps=1),))
    resumed = begin("parts")
    assert resumed.progress.steps == 1
    resumed.progress.phase, resumed.progress.step = 0, 1
    resumed.run((SEEING, DECAY))
    assert resumed.progress.tokens == whole.progress.tokens
    same(snapshot(resumed), snapshot(whole))
    for layer, bias in whole.network.biases.items():
        assert torch.equal(bias, resumed.network.biases[layer])
        assert bias.any()
    assert not [name for name, weight in whole.network.state_dict().items() if torch.equal(weight, fresh[name])]


def test_a_state_brings_back_every_weight_and_what_the_optimiser_remembers(begin: Any) -> None:
    first = begin("state")
    fresh = snapshot(first)
    for weight in first.network.parameters():
        weight.grad = torch.randn_like(weight)
    first.optimiser.step(1e-2, 1e-2)
    first.save()
    second = begin("state")
    assert not [name for name, weight in snapshot(first).items() if torch.equal(weight, fresh[name])]
    same(snapshot(second), snapshot(first))
    same(update(second), update(first))


def test_a_phase_ends_when_its_scores_are_reached(begin: Any) -> None:
    trainer = begin("gate")
    trainer.run((replace(SHORT, steps=8, until={"copy": 0.0}),))
    assert trainer.progress.steps == 2


def test_a_phase_goes_on_while_a_score_is_short(begin: Any) -> None:
    trainer = begin("gate")
    trainer.run((replace(SHORT, until={"copy": 1.0}),))
    assert trainer.progress.steps == 4
    assert [line["steps"] for line in lines(trainer) if "scores" in line] == [2, 4]


def test_a_few_steps_learn_something(begin: Any) -> None:
    """One conversation over and over is known by heart, INT4 rounding and all."""
    trainer = begin("heart")
    only = Mixture({lambda rng, held_out: one: 1.0})
    one = copy_list(random.Random(5), False, 3)
    trainer.run((Phase("heart", only, 1, 60, {}, {lambda rng, held_out: one: 1}, 60),))
    document = encode(one, trainer.vocabulary)
    ((right, total),) = exact(trainer.network, [document], CPU).values()
    assert (right, total) == (1, 1)
