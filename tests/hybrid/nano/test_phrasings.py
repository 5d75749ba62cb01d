"""The last phrasing of every list is for held-out conversations: no user of a training conversation speaks like it.

The lists that stand inside functions are found by watching `phrase`; that every user message comes from it is checked.
"""

import random
import string
import sys
from collections.abc import Iterable, Iterator, Sequence

import pytest

from hybrid.nano import data, mixture, pictures
from hybrid.nano import talk as plain_talk
from hybrid.nano.conversation import Conversation
from hybrid.nano.data import SKILLS, Make
from hybrid.nano.mixture import Mixture
from hybrid.nano.swarm_data import FIND, READ, sub_agent

TEXT = Mixture({make: share for make, share in mixture.FULL.shares.items() if make is not pictures.picture})
HELD_OUT: dict[Make, int] = dict.fromkeys(TEXT.shares, 80) | {data.known_tool: 700, plain_talk.talk: 900}
N_TRAINED = 4000
N_PICTURES = 150  # of either side; drawing them takes long
Phrasings = tuple[str, ...]


def said(conversations: Iterable[Conversation]) -> Iterator[str]:
    """What the users say, without images."""
    for conversation in conversations:
        for message in conversation.messages:
            if message["role"] != "user":
                continue
            content = message["content"]
            yield content if isinstance(content, str) else content[-1]["text"]


def static() -> set[Phrasings]:
    """The lists of the tables."""
    lists: list[Sequence[str]] = [*pictures.QUESTIONS.values(), FIND.asked, READ.asked]
    lists += [asked for skill in SKILLS.values() for asked in (skill.asked, skill.many) if asked]
    lists += [known["asked"] for known in plain_talk._ANSWERS]
    return {tuple(asked) for asked in lists}


def fixed(phrasing: str) -> list[str]:
    """The text outside the braces, in small letters, as a training phrasing may be put after "Please"."""
    return [text.lower() for text, *_ in string.Formatter().parse(phrasing)]


def holds(text: str, parts: Sequence[str]) -> bool:
    """Whether `parts` stand in `text` one after the other."""
    at, text = 0, text.lower()
    for part in parts:
        found = text.find(part, at)
        if found < 0:
            return False
        at = found + len(part)
    return True


def drawn(make: Make, n: int, held_out: bool, seed: str) -> list[Conversation]:
    rng = random.Random(seed)
    return [make(rng, held_out) for _ in range(n)]


@pytest.fixture(scope="module")
def watched() -> Iterator[list[Phrasings]]:
    """Every list that `phrase` was given, a call an entry."""
    calls: list[Phrasings] = []
    original = data.phrase

    def phrase(rng: random.Random, phrasings: Sequence[str], held_out: bool) -> str:
        calls.append(tuple(phrasings))
        return original(rng, phrasings, held_out)

    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith("hybrid.nano.") and hasattr(module, "phrase"):
                patch.setattr(module, "phrase", phrase)
        yield calls


@pytest.fixture(scope="module")
def held_out(watched: list[Phrasings]) -> list[str]:
    """What users of held-out conversations say."""
    spoken: list[str] = []
    for make, n in [*HELD_OUT.items(), (pictures.picture, N_PICTURES)]:
        before = len(watched)
        mine = list(said(drawn(make, n, True, f"held out {n}")))
        spoken += mine
        # A sub-agent is told its task in the only words that its orchestrator knows.
        assert len(watched) - before == (0 if make is sub_agent else len(mine)), make
    return spoken


@pytest.fixture(scope="module")
def trained() -> list[str]:
    """What users of training conversations say, in every phase."""
    rng = random.Random("trained")
    conversations = [mix.draw(rng) for mix in (TEXT, mixture.BASICS, mixture.COPYING) for _ in range(N_TRAINED // 3)]
    conversations += drawn(plain_talk.talk, 1500, False, "talk") + drawn(data.known_tool, 600, False, "tools")
    return list(said(conversations + drawn(pictures.picture, N_PICTURES, False, "pictures")))


@pytest.fixture(scope="module")
def lists(watched: list[Phrasings], held_out: list[str]) -> list[Phrasings]:
    """All lists, those of the tables and those inside functions."""
    found = sorted(set(watched))
    assert static() < set(found)
    return found


def test_every_list_keeps_a_phrasing_back(lists: list[Phrasings], held_out: list[str]) -> None:
    """And held-out conversations really use it."""
    for phrasings in lists:
        assert len(phrasings) > 1, phrasings
        assert any(holds(text, fixed(phrasings[-1])) for text in held_out), phrasings[-1]


def test_no_training_phrasing_is_like_one_that_is_kept_back(lists: list[Phrasings]) -> None:
    """Of any list: one family may not train what another keeps back."""
    kept = {phrasings[-1] for phrasings in lists}
    for phrasings in lists:
        for phrasing in phrasings[:-1]:
            assert not [one for one in kept if holds(phrasing, fixed(one))], phrasing


def test_no_user_in_training_speaks_in_a_phrasing_that_is_kept_back(
    lists: list[Phrasings], held_out: list[str], trained: list[str]
) -> None:
    kept = [fixed(phrasings[-1]) for phrasings in lists]
    assert len(trained) > N_TRAINED
    used = {text for text in held_out if any(holds(text, parts) for parts in kept)}
    assert len(used) > 700
    for text in trained:
        assert text not in used
        assert not [parts for parts in kept if holds(text, parts)], text


def test_users_in_training_speak_in_all_other_phrasings(lists: list[Phrasings], trained: list[str]) -> None:
    missing = [p for phrasings in lists for p in phrasings[:-1] if not any(holds(t, fixed(p)) for t in trained)]
    assert not missing
