"""Plain talk: greetings, who nano is, what the project does, a little everyday sense.

`talk.json` holds questions in several phrasings, the last of each for held-out conversations, with their answers.
Called by `hybrid.nano.mixture`.
"""

import json
import random
from pathlib import Path
from typing import Any

from hybrid.nano import words
from hybrid.nano.conversation import Conversation
from hybrid.nano.data import phrase, tools_with

_ANSWERS: list[dict[str, Any]] = json.loads(Path(__file__).with_name("talk.json").read_text())


def talk(rng: random.Random, held_out: bool) -> Conversation:
    """One to three short exchanges, at times with tools that are not needed."""
    chat = Conversation(rng.random() < 0.5)
    if rng.random() < 0.2:
        chat.tools = tools_with(rng, [], 2)
    for _ in range(rng.choice((1, 1, 2, 3))):
        _exchange(rng, held_out, chat)
    return chat


def _exchange(rng: random.Random, held_out: bool, chat: Conversation) -> None:
    kind = rng.random()
    if kind < 0.75:
        known = rng.choice(_ANSWERS)
        asked = phrase(rng, known["asked"], held_out)
        chat.user(asked.lower().rstrip(".?!") if rng.random() < 0.2 else asked)  # as people type
        chat.assistant("chat", known["answer"], reasoning="A simple question.")
        return
    who, what = words.name(rng, held_out), words.item(rng, held_out)
    chat.copied += [who, what]
    if kind < 0.9:
        chat.user(
            phrase(
                rng,
                ["Hi, I am {}.", "My name is {}.", "Hello, I am {}.", "I am {}.", "This is {}.", "You can call me {}."],
                held_out,
            ).format(who)
        )
        chat.assistant("chat", f"Hello {who}! How can I help?", reasoning="Greet by name.")
        return
    other, thing = words.name(rng, held_out), words.item(rng, held_out)
    facts = [f"{who} likes {what}.", f"{other} likes {thing}."]
    rng.shuffle(facts)
    chat.user(
        phrase(
            rng,
            [
                "{} What does {} like?",
                "{} Tell me what {} likes.",
                "{} So {} likes what?",
                "{} Which thing does {} like?",
            ],
            held_out,
        ).format(" ".join(facts), who)
    )
    chat.assistant("chat", f"{who} likes {what}.", reasoning="It was said.")
