"""The training loop: resumable to the bit, gated by scores, and really learning."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid.nano.conversation import encode
from hybrid.nano.data import copy_list
from hybrid.nano.mixture import BASICS, Mixture
from hybrid.nano.probe import exact, probes
from hybrid.nano.train import CONFIG, Phase, Trainer

CPU = torch.device("cpu")
SHORT = Phase("short", BASICS, 200, 4, probes={copy_list: 2}, probed_every=2, quantised=True)


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


def test_a_resumed_training_is_the_same_training(begin: Any) -> None:
    whole = begin("whole")
    whole.run((SHORT, replace(SHORT, name="decay", decays=True)))
    begin("parts").run((replace(SHORT, steps=2),))
    resumed = begin("parts")
    assert resumed.progress.steps == 2
    resumed.progress.phase, resumed.progress.step = 0, 2
    resumed.run((SHORT, replace(SHORT, name="decay", decays=True)))
    assert resumed.progress.tokens == whole.progress.tokens
    for (name, a), (_, b) in zip(whole.network.named(), resumed.network.named(), strict=True):
        assert torch.equal(a, b), name
    for layer, bias in whole.network.biases.items():
        assert torch.equal(bias, resumed.network.biases[layer])
        assert bias.any()


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
    one = copy_list(__import__("random").Random(5), False, 3)
    trainer.run((Phase("heart", only, 1, 60, {}, {lambda rng, held_out: one: 1}, 60),))
    document = encode(one, trainer.vocabulary)
    ((right, total),) = exact(trainer.network, [document], CPU).values()
    assert (right, total) == (1, 1)


def test_probes_are_always_the_same_and_held_out(begin: Any) -> None:
    vocabulary = begin("probes").vocabulary
    families = {partial(copy_list, longest=4): 3}
    assert [e.ids for e in probes(families, vocabulary)] == [e.ids for e in probes(families, vocabulary)]
