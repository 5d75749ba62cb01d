"""Which families a phase of the training draws from, and the vocabulary that fits them all.

Called by `hybrid.nano.train`.
"""

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from hybrid.nano import pictures, words
from hybrid.nano.conversation import Conversation, declaration
from hybrid.nano.data import Make, copy_list, known_tool, unseen_tool
from hybrid.nano.pictures import picture
from hybrid.nano.sums import arithmetic
from hybrid.nano.swarm_data import counted_fan_out, named_fan_out, sub_agent
from hybrid.nano.talk import talk
from hybrid.nano.vocabulary import Vocabulary, build_vocabulary

VOCABULARY_SEED = 5
_COUNTED = 6_000  # conversations read to build the vocabulary


def named(least: int, most: int) -> Make:
    """Fan-out over `least` to `most` named items."""
    return partial(named_fan_out, least=least, most=most)


def numbered(least: int, most: int) -> Make:
    """Fan-out over `least` to `most` numbered items."""
    return partial(counted_fan_out, least=least, most=most)


@dataclass(frozen=True, slots=True)
class Mixture:
    """Families and their shares of the conversations."""

    shares: Mapping[Make, float]

    def draw(self, rng: random.Random) -> Conversation:
        """One training conversation."""
        (make,) = rng.choices(list(self.shares), list(self.shares.values()))
        return make(rng, False)


COPYING = Mixture({partial(copy_list, longest=10): 1.0})
BASICS = Mixture(
    {
        copy_list: 0.15, known_tool: 0.2, unseen_tool: 0.1, sub_agent: 0.15, arithmetic: 0.8,
        named(2, 5): 0.08, numbered(2, 6): 0.04, talk: 0.08,
    }
)  # fmt: skip
TEXT = Mixture(
    {
        copy_list: 0.15, known_tool: 0.35, unseen_tool: 0.12, sub_agent: 0.35, arithmetic: 0.35,
        named(2, 5): 0.12, named(4, 12): 0.14, numbered(3, 12): 0.05, numbered(13, 40): 0.04, numbered(41, 100): 0.05,
        talk: 0.12,
    }
)  # fmt: skip
FULL = Mixture({**TEXT.shares, picture: 0.25})
LONG_LISTS = Mixture(
    {
        copy_list: 0.15, known_tool: 0.4, unseen_tool: 0.12, sub_agent: 0.4, arithmetic: 0.25,
        named(2, 5): 0.1, named(4, 12): 0.14, numbered(3, 12): 0.05, numbered(13, 40): 0.1, numbered(41, 100): 0.08,
        talk: 0.12, picture: 0.25,
    }
)  # fmt: skip


def vocabulary() -> Vocabulary:
    """A vocabulary counted on these data. Takes about half a minute."""
    rng = random.Random(VOCABULARY_SEED)
    texts = pictures.texts()
    items: set[str] = set()
    for _ in range(_COUNTED):
        conversation = TEXT.draw(rng)
        texts += _texts(conversation)
        items.update(word for text in conversation.copied for word in re.findall("[A-Za-z]+", text))
    items -= set(" ".join(words.PROPERTIES).split())
    return build_vocabulary(texts, items)


def _texts(conversation: Conversation) -> Iterator[str]:
    """Every stretch of text that a rendering encodes; long runs of calls count with their first few only."""
    yield "tool_declare"
    yield declaration(conversation.tools)
    for message in conversation.messages:
        yield message["role"]
        if message["role"] == "tool":
            yield f"## Return of {message['tool_call_id']}\n"
        yield message["content"]
        yield message.get("reasoning_content", "")
        for call in message.get("tool_calls", ())[:3]:
            yield call["id"]
            yield call["function"]["arguments"]
