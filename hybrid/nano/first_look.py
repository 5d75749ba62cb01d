"""The tower's first lessons, without the text model: `python -m hybrid.nano.first_look DIR`.

Telling shapes and digits apart takes tens of thousands of pictures. Through the text model each costs ten times as
much as through the tower alone, so a throw-away reader asks the tower first: one attention with a query for each
question, and a choice among all short answers. Shapes come first and alone, as they take longest to learn. DIR gets
`tower.pt` at the end, some minutes later, and `hybrid.nano.train` begins with it.
"""

import argparse
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy, pad

from hybrid.nano.conversation import Conversation
from hybrid.nano.optimiser import Optimiser
from hybrid.nano.pictures import COLOURS, COUNTS, MARKUP, PLACES, SHAPES, picture
from hybrid.nano.vision import Tower

CONFIG = Path(__file__).with_name("config.json")
SEED = 50_000
LESSONS = ((("shape",), 350, 32), (("shape", "digit"), 350, 32), (None, 2500, 48))  # kinds, steps, pictures of a step
MUON_RATE = 5e-3
ADAM_RATE = 1.5e-3
_WARM_UP = 50  # steps
_LOG_STEPS = 250
_MOST_TOKENS = 12  # of one picture
_PARTS = 4  # of a page, at most
_QUESTIONS = ("colour", "shape", "place", "count", "digit", *(f"part {i}" for i in range(_PARTS)))
_ANSWERS = (*COLOURS, *SHAPES, *PLACES, *COUNTS, *map(str, range(10)), *MARKUP.values(), "")

Lesson = tuple[tuple[str, ...] | None, int, int]


class Reader(nn.Module):
    """Answers questions about one picture's tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.queries = nn.Embedding(len(_QUESTIONS), width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.choice = nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, len(_ANSWERS)))

    def forward(self, tokens: torch.Tensor, unused: torch.Tensor, questions: torch.Tensor) -> torch.Tensor:
        """Logits (Q, answers) of questions (Q,) about pictures (Q, M, D), of whose tokens some are unused (Q, M)."""
        queries = self.queries(questions)
        found, _ = self.attention(queries[:, None], tokens, tokens, key_padding_mask=unused, need_weights=False)
        logits: torch.Tensor = self.choice(torch.cat((queries, found[:, 0]), -1))
        return logits


def lessons(talk: Conversation) -> list[tuple[str, str]]:
    """Questions about a conversation's picture, and their answers."""
    score, answer = talk.graded[1], talk.messages[1]["content"]
    if score == "image page":
        parts = re.findall("|".join(map(re.escape, MARKUP.values())), answer)
        return [(f"part {i}", part) for i, part in enumerate([*parts, "", ""][:_PARTS])]
    if score == "image both":
        _, colour, shape, place = re.split(r"An? | |\. It is ", answer.removesuffix("."), maxsplit=3)
        return [("colour", colour), ("shape", shape), ("place", place)]
    if score == "image count":
        return [("count", next(count for count in COUNTS if f" {count} " in answer))]
    return [(score.removeprefix("image "), answer)]


def asked(tower: Tower, reader: Reader, talks: Sequence[Conversation]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Logits (Q, answers), right answers (Q,) and the questions."""
    images = [talk.images[0] for talk in talks]
    rows = tower([image.tensor() for image in images]).split([image.n_tokens for image in images])
    tokens = torch.stack([pad(row, (0, 0, 0, _MOST_TOKENS - len(row))) for row in rows])
    unused = torch.tensor([[i >= image.n_tokens for i in range(_MOST_TOKENS)] for image in images])
    items = [(i, question, answer) for i, talk in enumerate(talks) for question, answer in lessons(talk)]
    of = torch.tensor([i for i, _, _ in items])
    questions = torch.tensor([_QUESTIONS.index(question) for _, question, _ in items])
    answers = torch.tensor([_ANSWERS.index(answer) for _, _, answer in items])
    return reader(tokens[of], unused[of], questions), answers, [question for _, question, _ in items]


def teach(
    tower: Tower, width: int, file: Path, tell: Callable[[str], None], lessons: Sequence[Lesson] = LESSONS
) -> None:
    """Teach the tower, telling its scores on held-out pictures now and then, and write its weights at the end."""
    torch.manual_seed(SEED)
    reader = Reader(width)
    optimiser = Optimiser([*tower.named(), *reader.named_parameters()])
    plan = [(kinds, pictures) for kinds, steps, pictures in lessons for _ in range(steps)]
    losses = []
    for step, (kinds, pictures) in enumerate(plan, 1):
        rng = random.Random(f"{SEED} {step}")
        talks = [picture(rng, False, rng.choice(kinds) if kinds else None) for _ in range(pictures)]
        logits, answers, _ = asked(tower, reader, talks)
        loss = cross_entropy(logits, answers)
        loss.backward()  # type: ignore[no-untyped-call]
        rate = min(1, step / _WARM_UP, 3 * (len(plan) + 1 - step) / len(plan))
        optimiser.step(MUON_RATE * rate, ADAM_RATE * rate)
        losses.append(float(loss.detach()))
        if step % _LOG_STEPS == 0 or step == len(plan):
            tell(json.dumps({"step": step, "loss": sum(losses) / len(losses), "scores": scores(tower, reader)}))
            losses = []
    torch.save({name: weight.detach() for name, weight in tower.named()}, file.with_suffix(".part"))
    file.with_suffix(".part").replace(file)


@torch.no_grad()
def scores(tower: Tower, reader: Reader, n: int = 400) -> dict[str, float]:
    """Share of right answers by question on held-out pictures."""
    rng = random.Random(SEED)
    logits, answers, questions = asked(tower, reader, [picture(rng, held_out=True) for _ in range(n)])
    right = (logits.argmax(-1) == answers).tolist()
    totals, hits = Counter(questions), Counter(q for q, ok in zip(questions, right, strict=True) if ok)
    return {question: round(hits[question] / totals[question], 3) for question in _QUESTIONS}


def main(arguments: list[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m hybrid.nano.first_look", description=__doc__)
    parser.add_argument("directory", type=Path, help="where tower.pt goes")
    options = parser.parse_args(arguments)
    options.directory.mkdir(parents=True, exist_ok=True)
    config = json.loads(CONFIG.read_text())
    torch.manual_seed(SEED)
    tower = Tower(config["vision_config"], torch.device("cpu"))
    teach(tower, config["text_config"]["hidden_size"], options.directory / "tower.pt", print)


if __name__ == "__main__":
    main(sys.argv[1:])
