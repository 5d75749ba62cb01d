"""What the conversations are about: names, properties, file names, and the split between training and held-out items.

Every item is a pure function of a `random.Random`. Names that `is_held_out` says yes to never occur in training.
Called by `hybrid.nano.data`.
"""

import base64
import functools
import random
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path


def table(text: str) -> list[str]:
    """Words of a table; `_` stands for a space inside one."""
    return [word.replace("_", " ") for word in text.split()]


_ONSETS = table(
    """
    b bl br c ch cl cr d dr f fl fr g gl gr h j k kl kr l m n p pl pr qu r s sh sk sl sp st t th tr v w y z
    """
)
_VOWELS = table("a e i o u ai ea ou")
_CODAS = ["", "", "", "", "n", "r", "s", "l", "m", "x"]

NAMES = table(
    """
    Paris London Berlin Madrid Rome Vienna Oslo Lima Cairo Tokyo Delhi Seoul Lisbon Dublin Prague Warsaw Athens Havana
    Boston Chicago Denver Dallas Seattle Toronto Sydney Munich Hamburg Milan Naples Venice Lyon Geneva Zurich Porto
    Seville Bergen Malmo Riga Vilnius Minsk Kyiv Odessa Ankara Izmir Tehran Baghdad Dubai Doha Mumbai Chennai Kolkata
    Dhaka Bangkok Hanoi Manila Jakarta Osaka Kyoto Nagoya Busan Taipei Nairobi Lagos Accra Tunis Rabat Dakar Luanda
    Quito Bogota Caracas Santiago Montevideo Brasilia Recife Phoenix Houston Austin Miami Atlanta Detroit Portland
    Ottawa Montreal Calgary Vancouver Perth Brisbane Auckland Alice Bob Carol David Emma Frank Grace Henry Irene Jack
    Kate Leo Maria Nina Oscar Peter Quinn Rosa Sam Tina Victor Wendy Anna Bruno Clara Diego Elena Felix Greta Hugo Ivan
    Julia Karl Laura Marco Nora Olga Paul Ruth Simon Thomas Ursula Walter Yara Zoe France Spain Italy Germany Poland
    Sweden Norway Finland Denmark Greece Turkey Egypt Kenya Ghana Brazil Chile Peru Mexico Canada Japan China India
    Nepal Vietnam Australia Iceland Ireland Austria Hungary Romania Croatia Serbia Portugal Belgium Mercury Venus Mars
    Jupiter Saturn Uranus Neptune Pluto Python Java Rust Swift Kotlin Ruby Perl Linux Debian Ubuntu Fedora Chrome
    Firefox Safari Intel Nvidia Tesla Toyota Honda Volvo Fiat Ford Boeing Airbus Siemens Philips Nokia Sony Canon Nikon
    """
)
THINGS = table(
    """
    apple pear plum peach cherry lemon orange banana grape melon mango onion garlic carrot potato tomato pepper bread
    butter cheese milk sugar salt rice pasta coffee tea water juice wine beer chair table lamp clock mirror window door
    bed sofa desk shelf phone laptop camera radio printer keyboard monitor cable battery hammer saw drill screw nail
    rope ladder bucket brush paint car bus train tram bike boat ship plane truck horse cow sheep goat pig dog cat rabbit
    mouse lion tiger bear wolf fox deer eagle owl crow swan duck goose frog snake turtle shark whale salmon oak pine
    maple birch willow rose tulip lily daisy gold silver copper iron zinc lead glass paper wood stone sand
    """
)
_REAL = NAMES + THINGS
PROPERTIES = table(
    """
    capital population price owner colour leader area age height author title total status date score length weight
    address phone_number speed depth budget deadline summary rating size width volume founder director language currency
    climate temperature distance version licence result winner name code value count topic main_point opening_time
    """
)
UNSEEN_PROPERTIES = table("elevation manager birthday ticket_price sponsor postcode")
COUNTED = table("page chapter section row day week ticket question lesson invoice file step room floor seat")
WEATHER = table("sun rain snow wind fog clouds storms")
_SUFFIXES = table("txt md csv json log py html")


def is_held_out(text: str) -> bool:
    """Whether an item belongs to the held-out tenth. By a fixed hash, so that it never changes between runs."""
    return zlib.crc32(text.lower().encode()) % 10 == 3


def syllable(rng: random.Random) -> str:
    """One made-up syllable."""
    return rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)


@functools.cache
def pieces() -> tuple[str, ...]:
    """The letters that tokens of the shipped vocabulary consist of, two or more; real words where there is none."""
    file = Path(__file__).with_name("model") / "tiktoken.model"
    if not file.is_file():
        return tuple(_REAL)
    tokens = (base64.b64decode(line.split()[0]) for line in file.read_bytes().splitlines())
    letters = {token.decode().strip() for token in tokens if token.isascii()}
    return tuple(sorted(text for text in letters if len(text) > 1 and text.isalpha()))


def made_up(rng: random.Random) -> str:
    """A made-up lower-case word, from neither side of the split in particular.

    Syllables, pieces of the vocabulary, or two ends of real words, so that every token has to be copied at times: one
    that stands in held-out words only would otherwise never be learned.
    """
    kind = rng.random()
    if kind < 0.65:
        return "".join(syllable(rng) for _ in range(rng.choice((2, 2, 3))))
    if kind < 0.75:  # few: pieces such as "What" or "price" are no part of any name
        return "".join(rng.choice(pieces()) for _ in range(rng.choice((1, 2, 2))))
    first, second = rng.choice(_REAL), rng.choice(_REAL)
    return (first[: rng.randint(1, 4)] + second[-rng.randint(2, 4) :]).lower()


def name(rng: random.Random, held_out: bool) -> str:
    """A capitalised name: real or made up in training, of the held-out side where asked for."""

    def any_name() -> str:
        return rng.choice(NAMES) if rng.random() < 0.4 else _capitalised(made_up(rng))

    return _of_side(any_name, held_out)


def _capitalised(word: str) -> str:
    return word[0].upper() + word[1:]


def thing(rng: random.Random, held_out: bool) -> str:
    """A lower-case noun."""
    return _of_side(lambda: rng.choice(THINGS) if rng.random() < 0.5 else made_up(rng), held_out)


def item(rng: random.Random, held_out: bool) -> str:
    """Whatever a list may hold: mostly names, some nouns, codes and file names."""
    kind = rng.random()
    if kind < 0.65:
        return name(rng, held_out)
    if kind < 0.8:
        return thing(rng, held_out)
    return code(rng) if kind < 0.88 else path(rng, held_out)


def items(rng: random.Random, n: int, held_out: bool) -> list[str]:
    """`n` different items of one kind, as a user would list them."""
    make = rng.choices((name, thing, item), (6, 2, 2))[0]
    return distinct(lambda: make(rng, held_out), n)


def code(rng: random.Random) -> str:
    """A short part number, such as B7-204."""
    return f"{rng.choice('ABCDEFGHKLMNPRSTXZ')}{rng.randint(1, 9)}-{rng.randint(1, 999)}"


def path(rng: random.Random, held_out: bool) -> str:
    """A relative file name."""
    folder, file = distinct(lambda: thing(rng, held_out), 2)  # so few are held out that they would often be the same
    file = f"{file}.{rng.choice(_SUFFIXES)}"
    return f"{folder}/{file}" if rng.random() < 0.3 else file


def number(rng: random.Random) -> str:
    """A whole number of one to five digits, each length as likely."""
    digits = rng.randint(1, 5)
    return str(rng.randint(10 ** (digits - 1), 10**digits - 1))


def value(rng: random.Random, held_out: bool) -> str:
    """What a search finds: a number, a name, or a number with a unit."""
    kind = rng.random()
    if kind < 0.5:
        return number(rng)
    return name(rng, held_out) if kind < 0.85 else f"{number(rng)} {rng.choice(['km', 'kg', 'EUR', 'years', 'MB'])}"


def a_property(rng: random.Random, held_out: bool) -> str:
    """A property something may have; a few are made up, or real ones never trained on where held out."""
    if rng.random() >= 0.15:
        return rng.choice(PROPERTIES)
    if held_out:
        return rng.choice(UNSEEN_PROPERTIES)
    made = thing(rng, False)
    return f"{made} {rng.choice(PROPERTIES)}" if rng.random() < 0.3 else made


def distinct(make: Callable[[], str], n: int) -> list[str]:
    """`n` different results of `make`."""
    found: list[str] = []
    while len(found) < n:
        made = make()
        if made not in found:
            found.append(made)
    return found


def listed(rng: random.Random, things: Sequence[str]) -> str:
    """The list as people write it: with commas, with an "and", as bullets or numbered."""
    style = rng.random()
    if style < 0.4 or len(things) == 1:
        return ", ".join(things)
    if style < 0.7:
        return f"{', '.join(things[:-1])} and {things[-1]}"
    if style < 0.85:
        return "\n" + "\n".join(f"- {thing}" for thing in things)
    return "\n" + "\n".join(f"{i}. {thing}" for i, thing in enumerate(things, 1))


def _of_side(make: Callable[[], str], held_out: bool) -> str:
    while True:
        made = make()
        if is_held_out(made) == held_out:
            return made
