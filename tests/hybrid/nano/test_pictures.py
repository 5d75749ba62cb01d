"""Pictures are what their answers say, fit Kimi's preprocessing as they are, and come back from their data URLs."""

import collections
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hybrid.nano.conversation import Conversation, encode
from hybrid.nano.pictures import COLOURS, COUNTS, MARKUP, QUESTIONS, Picture, picture
from hybrid.nano.vocabulary import SPECIAL, Vocabulary

LETTERS = Vocabulary({bytes([byte]): byte for byte in range(256)})


def drawn(kind: str, n: int, held_out: bool = False) -> list[Conversation]:
    rng = random.Random(f"{kind} {held_out}")
    return [picture(rng, held_out, kind) for _ in range(n)]


def answer(talk: Conversation) -> str:
    text = talk.messages[-1]["content"]
    assert isinstance(text, str)
    return text


def question(talk: Conversation) -> str:
    """Which of the kind's questions is asked, whatever stands around it."""
    text = talk.messages[0]["content"][1]["text"]
    (asked,) = [asked for kind in QUESTIONS.values() for asked in kind if asked[1:-1] in text]
    return asked


def foreground(image: Picture) -> np.ndarray[Any, Any]:
    """(H, W) bool: far from the median colour, which is the background's."""
    pixels = image.pixels.astype(float)
    return np.asarray(np.linalg.norm(pixels - np.median(pixels, (0, 1)), axis=-1) > 60)


def pieces(mask: np.ndarray[Any, Any]) -> list[list[tuple[int, int]]]:
    """Connected pixels, in groups of ten or more (fewer are noise)."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    found = []
    while left:
        border = [left.pop()]
        piece = list(border)
        while border:
            y, x = border.pop()
            for near in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if near in left:
                    left.remove(near)
                    piece.append(near)
                    border.append(near)
        found.append(piece)
    return [piece for piece in found if len(piece) >= 10]


def big(kind: str, n: int) -> list[tuple[Conversation, np.ndarray[Any, Any]]]:
    """Conversations with the foregrounds of their pictures, where the shape covers less than half of the image."""
    pairs = [(talk, foreground(talk.images[0])) for talk in drawn(kind, n)]
    return [(talk, mask) for talk, mask in pairs if mask.mean() < 0.4]


def test_counts() -> None:
    for talk, mask in big("count", 40):
        n = len(pieces(mask))
        assert answer(talk) == ("There is one shape." if n == 1 else f"There are {COUNTS[n]} shapes.")


def test_colours_and_places() -> None:
    for talk, mask in big("both", 40):
        rows, columns = np.nonzero(mask)
        seen = np.median(talk.images[0].pixels[mask], 0)
        colour = min(COLOURS, key=lambda name: float(np.linalg.norm(seen - COLOURS[name])))
        place = f"{'top' if rows.mean() < 42 else 'bottom'} {'left' if columns.mean() < 42 else 'right'}"
        article, said, *_ = answer(talk).split()
        assert (said, article) == (colour, "An" if colour == "orange" else "A")
        assert answer(talk).endswith(f"It is {place}.")


def test_shapes() -> None:
    """By the share of their bounding box that they fill, and by how much narrower the top is than the bottom."""
    for talk, mask in big("shape", 60):
        rows, columns = np.nonzero(mask)
        box = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        eighth = max(1, len(box) // 8)
        if box[:eighth].mean() < 0.3 and box[-eighth:].mean() > 0.7:
            shape = "triangle"
        else:
            shape = "square" if box.mean() > 0.95 else "circle" if box.mean() > 0.7 else "cross"
        assert answer(talk) == shape


def test_digits_differ_by_their_ink() -> None:
    """Each digit's bitmap, read back from the image, is always the same, and no two digits share one."""
    read = collections.defaultdict(set)
    for talk, mask in big("digit", 60):
        rows, columns = np.nonzero(mask)
        ys = np.linspace(rows.min(), rows.max() + 1, 15)[1::2].astype(int)
        xs = np.linspace(columns.min(), columns.max() + 1, 11)[1::2].astype(int)
        if answer(talk) != "1":  # narrower than its cell
            read[answer(talk)].add(mask[np.ix_(ys, xs)].tobytes())
    assert set(map(len, read.values())) == {1}
    assert len(set().union(*read.values())) == len(read) == 9


def test_pages() -> None:
    seen = set()
    for talk in drawn("page", 40):
        inner = answer(talk).removeprefix("<body>").removesuffix("</body>")
        parts = []
        while inner:
            parts.append(next(part for part, markup in MARKUP.items() if inner.startswith(markup)))
            inner = inner.removeprefix(MARKUP[parts[-1]])
        assert 2 <= len(parts) == len(set(parts)) <= 4
        assert "header" not in parts[1:] and "footer" not in parts[:-1]
        assert talk.images[0].pixels.shape == (112, 84, 3)
        dark = talk.images[0].pixels[:4, :20].mean() < 160  # only a header is dark up to the edge
        assert dark == (parts[0] == "header")
        seen.update(parts)
    assert seen == set(MARKUP)


@pytest.mark.parametrize("kind", QUESTIONS)
def test_questions_of_a_kind(kind: str) -> None:
    taught, held_out = drawn(kind, 60), drawn(kind, 60, held_out=True)
    assert {question(talk) for talk in taught} == set(QUESTIONS[kind][:-1])
    assert {question(talk) for talk in held_out} == set(QUESTIONS[kind])
    assert {talk.thinking for talk in taught} == {True, False}
    assert {score for talk in taught for score in talk.graded.values()} == {f"image {kind}"}
    assert len({talk.images[0].pixels.tobytes() for talk in taught + held_out}) == 120


def test_every_kind_is_drawn_and_a_seed_repeats() -> None:
    rng, again = random.Random(4), random.Random(4)
    talks = [picture(rng, held_out=False) for _ in range(80)]
    assert {talk.graded[1] for talk in talks} == {f"image {kind}" for kind in QUESTIONS}
    for talk in talks[:5]:
        same = picture(again, held_out=False)
        assert same.messages == talk.messages
        assert np.array_equal(same.images[0].pixels, talk.images[0].pixels)


def test_pads_in_the_prompt() -> None:
    for kind, n in (("colour", 9), ("page", 12)):
        (talk,) = drawn(kind, 1)
        ids = encode(talk, LETTERS).ids
        first = ids.index(SPECIAL["<|media_pad|>"])
        assert ids[first : first + n + 1] == [SPECIAL["<|media_pad|>"]] * n + [SPECIAL["<|media_end|>"]]
        assert ids.count(SPECIAL["<|media_pad|>"]) == n == talk.images[0].n_tokens


def test_pixels_as_kimi_preprocesses_them(kimi_dir: Path) -> None:
    """The published code's patches of the golden images that it need not pad."""
    golden = json.loads((kimi_dir / "golden" / "vision.json").read_text())
    stored = np.load(kimi_dir / "golden" / "vision_patches.npz")
    cases = [c for c in golden["pixels"] if c["kind"] == "image" and c["mode"] == "RGB"]
    fitting = [c for c in cases if c["resized"] == [c["width"], c["height"]] and not any(n % 28 for n in c["resized"])]
    assert fitting
    for case in fitting:
        f = case["formula"]
        y, x, k = np.indices((case["height"], case["width"], 3))
        values = f["ax"] * x + f["ay"] * y + f["ak"] * k + f["axy"] * x * y + f["c"]
        image = Picture((values % 256).astype(np.uint8))
        patches = image.tensor().unfold(1, 14, 14).unfold(2, 14, 14).permute(1, 2, 0, 3, 4).flatten(0, 1)
        assert image.n_tokens == case["tokens"] and list(patches.shape) == case["shape"]
        chosen = patches[torch.from_numpy(stored[f"{case['id']}_idx"]).long()].numpy()
        assert np.abs(chosen - stored[f"{case['id']}_patches"]).max() < 1e-6
