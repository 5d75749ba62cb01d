"""Simple pictures with questions: colours, shapes, counts, positions, digits, and page mock-ups told as HTML.

Drawn with numpy alone; sizes, places, colours and grain vary, so that no two are the same. Called by
`hybrid.nano.mixture` and `hybrid.nano.first_look`.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from hybrid.nano.conversation import Conversation
from hybrid.nano.data import phrase

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Rgb = tuple[int, ...]

SIZE = 84  # pixels: three tokens wide, and high but for pages
PAGE_HEIGHT = 112

COLOURS = {
    "red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (240, 220, 50),
    "black": (20, 20, 20), "white": (250, 250, 250), "orange": (250, 150, 40), "purple": (140, 60, 180),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = ("top left", "top right", "bottom left", "bottom right")
COUNTS = ("no", "one", "two", "three", "four")
PARTS = ("header", "button", "image", "text", "list", "footer")
QUESTIONS = {
    "colour": [
        "What colour is the shape?", "Which colour do you see?",
        "Name the colour.", "What is the colour in this image?",
    ],
    "shape": ["What shape is it?", "Which shape do you see?", "Name the shape.", "What is drawn in this image?"],
    "both": ["What do you see?", "Describe the image.", "What is in the picture?", "Tell me what this image shows."],
    "count": [
        "How many shapes are there?", "Count the shapes.",
        "How many shapes do you see?", "What is the number of shapes?",
    ],
    "place": [
        "Where is the shape?", "In which corner is the shape?",
        "Where do you see the shape?", "Name the corner with the shape.",
    ],
    "digit": ["Which digit is shown?", "Read the digit.", "What number do you see?", "Which number is drawn?"],
    "page": [
        "Write this page as HTML.", "Turn the mock-up into HTML.",
        "Describe this page as HTML.", "Give me the HTML of this page.",
    ],
}  # fmt: skip
MARKUP = {
    "header": "<header></header>", "button": "<button></button>", "image": "<img>",
    "text": "<p></p>", "list": "<ul></ul>", "footer": "<footer></footer>",
}  # fmt: skip


def texts() -> list[str]:
    """Everything that questions and answers are written with, for the vocabulary."""
    answers = [f"A {colour} {shape}. It is {place}." for colour in COLOURS for shape in SHAPES for place in PLACES]
    counted = [f"There are {count} shapes." for count in COUNTS]
    questions = [question for asked in QUESTIONS.values() for question in asked]
    pages = ["<body>" + "".join(MARKUP.values()) + "</body>"]
    return [*answers, *counted * 20, *questions * 20, *pages * 60, "I look at the image."]


_TOKEN = 28  # pixels of a token's side: two patches
_APART = 100  # least distance of colours that lie on each other; black and white are 441 apart
_DIGITS = (  # rows of five bits
    "0E 11 13 15 19 11 0E", "04 0C 04 04 04 04 0E", "0E 11 01 02 04 08 1F", "1F 02 04 02 01 11 0E",
    "02 06 0A 12 1F 02 02", "1F 10 1E 01 01 11 0E", "06 08 10 1E 11 11 0E", "1F 01 02 04 08 08 08",
    "0E 11 11 0E 11 11 0E", "0E 11 11 0F 01 02 0C",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Picture:
    """An image whose sides are multiples of 28 pixels, so that Kimi's preprocessing neither resizes nor pads it."""

    pixels: Pixels  # (H, W, 3)

    @property
    def n_tokens(self) -> int:
        """Tokens that the projector makes of it."""
        return len(self.pixels) // _TOKEN * (len(self.pixels[0]) // _TOKEN)

    def tensor(self) -> torch.Tensor:
        """(3, H, W) float32 between -1 and 1: mean and deviation 0.5, as Kimi-K2.5 normalises."""
        return torch.from_numpy(self.pixels).permute(2, 0, 1).float().div_(127.5).sub_(1)


def picture(rng: random.Random, held_out: bool, kind: str | None = None) -> Conversation:
    """A question about one picture, of any kind of `QUESTIONS` or of one."""
    kind = kind or rng.choices(list(_SHARES), list(_SHARES.values()))[0]
    talk = Conversation(rng.random() < 0.5)
    canvas, answer = _KINDS[kind](rng)
    talk.images.append(Picture(canvas.grained(rng)))
    asked = {"type": "text", "text": phrase(rng, QUESTIONS[kind], held_out)}
    talk.user([{"type": "image_url", "image_url": {"url": ""}}, asked])
    talk.assistant(f"image {kind}", answer, reasoning="I look at the image.")
    return talk


class _Canvas:
    """Colours (H, W, 3) to draw on: mostly a light grey with a tint, or `background`.

    Were all greys as frequent, shapes would be lighter than the background as often as darker, and the tower would
    need twice the pictures to tell them apart (measured: 51 instead of 74 % right after 12,800).
    """

    def __init__(self, rng: random.Random, height: int = SIZE, background: Rgb | None = None) -> None:
        if background is None:
            grey = rng.randint(225, 255) if rng.random() < 0.8 else rng.randint(0, 255)
            background = _near(rng, (grey, grey, grey), 10)
        self.background = background
        self.colours = np.full((height, SIZE, 3), background, np.float32)
        self.rows, self.columns = np.ogrid[:height, :SIZE]

    def visible(self, rng: random.Random) -> str:
        """The name of a colour that stands out from the background."""
        return rng.choice([name for name, colour in COLOURS.items() if _distance(colour, self.background) >= _APART])

    def shape(self, shape: str, spot: tuple[int, int, int], colour: Rgb) -> None:
        """A shape within `radius` pixels of a row and column."""
        row, column, radius = spot
        y, x = self.rows - row, self.columns - column
        self.colours[_inside(shape, y / radius, x / radius)] = colour

    def box(self, top: int, left: int, height: int, width: int, colour: Rgb) -> None:
        """A filled rectangle, cut off at the edges."""
        self.colours[top : top + height, left : left + width] = colour

    def digit(self, rng: random.Random, digit: int, colour: Rgb) -> None:
        """A digit of any size, anywhere."""
        bits = np.array([[int(row, 16) >> bit & 1 for bit in range(4, -1, -1)] for row in _DIGITS[digit].split()])
        height = rng.randint(24, 74)
        width = round(height * rng.uniform(0.6, 0.85))
        drawn = bits[np.arange(height) * 7 // height][:, np.arange(width) * 5 // width].astype(bool)
        top, left = rng.randint(2, SIZE - 2 - height), rng.randint(2, SIZE - 2 - width)
        self.colours[top : top + height, left : left + width][drawn] = colour

    def grained(self, rng: random.Random) -> Pixels:
        """The finished image, with noise."""
        noise = np.random.default_rng(rng.getrandbits(64)).standard_normal(self.colours.shape, np.float32)
        return (self.colours + noise * rng.uniform(0, 8)).clip(0, 255).astype(np.uint8)


def _inside(shape: str, y: Floats, x: Floats) -> Mask:
    """Where a shape of radius 1 around the origin is."""
    across, down = np.abs(x), np.abs(y)
    if shape == "circle":
        return np.asarray(x * x + y * y <= 1)
    if shape == "square":
        return np.asarray(np.maximum(across, down) <= 0.85)
    if shape == "triangle":
        return np.asarray((2 * across <= y + 1) & (y <= 0.85))
    return np.asarray((np.minimum(across, down) <= 0.3) & (np.maximum(across, down) <= 1))


def _near(rng: random.Random, colour: Rgb, spread: int = 14) -> Rgb:
    return tuple(min(255, max(0, value + rng.randint(-spread, spread))) for value in colour)


def _distance(a: Rgb, b: Rgb) -> float:
    return math.dist(a, b)


def _spot(rng: random.Random, least: int, most: int, side: int = SIZE) -> tuple[int, int, int]:
    """Row, column and radius of a shape that lies within a square of `side` pixels."""
    radius = rng.randint(least, most)
    return rng.randint(radius + 1, side - radius - 2), rng.randint(radius + 1, side - radius - 2), radius


def _one(rng: random.Random) -> tuple[_Canvas, str, str]:
    """One shape anywhere, its colour and its name."""
    canvas = _Canvas(rng)
    colour, shape = canvas.visible(rng), rng.choice(SHAPES)
    canvas.shape(shape, _spot(rng, 9, 34), _near(rng, COLOURS[colour]))
    return canvas, colour, shape


def _in_a_corner(rng: random.Random) -> tuple[_Canvas, str, str, str]:
    """One shape in a quarter of the image, its colour, its name and its place."""
    canvas = _Canvas(rng)
    colour, shape, place = canvas.visible(rng), rng.choice(SHAPES), rng.choice(PLACES)
    row, column, radius = _spot(rng, 7, 18, SIZE // 2)
    row += SIZE // 2 * place.startswith("bottom")
    column += SIZE // 2 * place.endswith("right")
    canvas.shape(shape, (row, column, radius), _near(rng, COLOURS[colour]))
    return canvas, colour, shape, place


def _colour(rng: random.Random) -> tuple[_Canvas, str]:
    canvas, colour, _ = _one(rng)
    return canvas, colour


def _shape(rng: random.Random) -> tuple[_Canvas, str]:
    canvas, _, shape = _one(rng)
    return canvas, shape


def _place(rng: random.Random) -> tuple[_Canvas, str]:
    canvas, _, _, place = _in_a_corner(rng)
    return canvas, place


def _both(rng: random.Random) -> tuple[_Canvas, str]:
    canvas, colour, shape, place = _in_a_corner(rng)
    return canvas, f"{'An' if colour == 'orange' else 'A'} {colour} {shape}. It is {place}."


def _count(rng: random.Random) -> tuple[_Canvas, str]:
    canvas, n = _Canvas(rng), rng.randrange(len(COUNTS))
    while True:
        spots = [_spot(rng, 6, 13) for _ in range(n)]
        gaps = [
            max(abs(a[0] - b[0]), abs(a[1] - b[1])) - a[2] - b[2] for i, a in enumerate(spots) for b in spots[i + 1 :]
        ]
        if all(gap > 2 for gap in gaps):
            break
    for spot in spots:
        canvas.shape(rng.choice(SHAPES), spot, _near(rng, COLOURS[canvas.visible(rng)]))
    return canvas, "There is one shape." if n == 1 else f"There are {COUNTS[n]} shapes."


def _digit(rng: random.Random) -> tuple[_Canvas, str]:
    canvas, digit = _Canvas(rng), rng.randrange(10)
    canvas.digit(rng, digit, _near(rng, COLOURS[canvas.visible(rng)]))
    return canvas, str(digit)


def _page(rng: random.Random) -> tuple[_Canvas, str]:
    """Two to four parts under each other: a header only on top, a footer only at the bottom."""
    n = rng.randint(2, 4)
    parts = sorted(rng.sample(PARTS, n), key=lambda part: {"header": 0, "footer": 2}.get(part, 1))
    canvas = _Canvas(rng, PAGE_HEIGHT, _near(rng, (244, 244, 244), 10))
    spare = PAGE_HEIGHT - n * _TOKEN
    cuts = [0, *sorted(rng.randint(0, spare) for _ in range(n - 1)), spare]
    for i, part in enumerate(parts):
        _DRAWN[part](canvas, rng, cuts[i] + i * _TOKEN, cuts[i + 1] - cuts[i] + _TOKEN)
    return canvas, "<body>" + "".join(MARKUP[part] for part in parts) + "</body>"


def _header(canvas: _Canvas, rng: random.Random, top: int, height: int) -> None:
    canvas.box(top, 0, rng.randint(16, 24), SIZE, _near(rng, (40, 50, 90), 30))
    canvas.box(top + 6, rng.randint(4, 10), 5, rng.randint(22, 44), (240, 240, 240))


def _footer(canvas: _Canvas, rng: random.Random, top: int, height: int) -> None:
    bar = rng.randint(14, 20)
    canvas.box(top + height - bar, 0, bar, SIZE, _near(rng, (170, 170, 170), 15))
    for i in range(3):
        canvas.box(top + height - bar // 2 - 3, 26 + 12 * i, 5, 6, (70, 70, 70))


def _button(canvas: _Canvas, rng: random.Random, top: int, height: int) -> None:
    width, left = rng.randint(30, 46), rng.randint(8, 30)
    canvas.box(top + 6, left, 16, width, _near(rng, COLOURS[rng.choice(("blue", "green", "red", "orange"))]))
    canvas.box(top + 12, left + 8, 4, width - 16, (250, 250, 250))


def _photograph(canvas: _Canvas, rng: random.Random, top: int, height: int) -> None:
    width, left = rng.randint(44, 68), rng.randint(4, 12)
    canvas.box(top + 2, left, 25, width, (60, 60, 60))
    canvas.box(top + 3, left + 1, 23, width - 2, _near(rng, (150, 200, 240)))
    canvas.shape("triangle", (top + 17, left + rng.randint(12, width - 12), 9), _near(rng, (70, 130, 70)))
    canvas.shape("circle", (top + 8, left + rng.randint(6, width - 6), 3), (250, 220, 80))


def _text(canvas: _Canvas, rng: random.Random, top: int, height: int) -> None:
    left, ink = rng.randint(4, 8), _near(rng, (90, 90, 90), 30)
    for i in range(4):
        canvas.box(top + 4 + 6 * i, left, 3, rng.randint(64, 72) if i < 3 else rng.randint(20, 50), ink)


def _list(canvas: _Canvas, rng: random.Random, top: int, height: int) -> None:
    left, ink = rng.randint(6, 14), _near(rng, (60, 60, 60), 30)
    for i in range(3):
        canvas.shape("circle", (top + 6 + 8 * i, left + 2, 3), ink)
        canvas.box(top + 5 + 8 * i, left + 9, 3, rng.randint(24, 42), ink)


_KINDS: dict[str, Callable[[random.Random], tuple[_Canvas, str]]] = {
    "colour": _colour, "shape": _shape, "both": _both, "count": _count,
    "place": _place, "digit": _digit, "page": _page,
}  # fmt: skip
_SHARES = {"colour": 1, "shape": 2, "both": 2, "count": 2, "place": 1, "digit": 3, "page": 2}  # by how hard they are
_DRAWN: dict[str, Callable[[_Canvas, random.Random, int, int], None]] = {
    "header": _header, "button": _button, "image": _photograph, "text": _text, "list": _list, "footer": _footer,
}  # fmt: skip
