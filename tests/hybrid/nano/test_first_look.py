"""The tower's first lessons: right answers to its questions, and something is learned."""

import json
import random
from pathlib import Path

import pytest
import torch

from hybrid.nano.first_look import lessons, teach
from hybrid.nano.pictures import COLOURS, MARKUP, PLACES, QUESTIONS, SHAPES, picture
from hybrid.nano.train import CONFIG
from hybrid.nano.vision import Tower

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", QUESTIONS)
def test_the_answers_are_those_of_the_conversation(kind: str) -> None:
    for seed in range(20):
        talk = picture(random.Random(seed), False, kind)
        answer = talk.messages[1]["content"]
        found = dict(lessons(talk))
        if kind == "page":
            assert "".join(found[f"part {i}"] for i in range(4)) == answer.removeprefix("<body>").removesuffix(
                "</body>"
            )
            assert set(found.values()) <= {*MARKUP.values(), ""}
        elif kind == "both":
            assert found["colour"] in COLOURS and found["shape"] in SHAPES and found["place"] in PLACES
            assert f" {found['colour']} {found['shape']}. It is {found['place']}." in answer
        else:
            (value,) = found.values()
            assert value in answer


def test_colours_are_learned_at_once(tmp_path: Path) -> None:
    config = json.loads(CONFIG.read_text())
    torch.manual_seed(1)
    tower = Tower(config["vision_config"], CPU)
    told: list[str] = []
    teach(tower, config["text_config"]["hidden_size"], tmp_path / "tower.pt", told.append, ((("colour",), 60, 24),))
    last = json.loads(told[-1])
    assert last["step"] == 60
    assert last["scores"]["colour"] > 0.5  # one in eight by chance
    assert last["scores"]["digit"] < 0.5
    saved = torch.load(tmp_path / "tower.pt", weights_only=True)
    assert all(torch.equal(saved[name], weight) for name, weight in tower.named())
