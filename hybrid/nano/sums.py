"""Sums and differences of numbers below 100, worked digit by digit where nano thinks.

Called by `hybrid.nano.mixture` and `hybrid.nano.evaluate`.
"""

import random

from hybrid.nano import words
from hybrid.nano.conversation import Conversation
from hybrid.nano.data import phrase


def arithmetic(rng: random.Random, held_out: bool) -> Conversation:
    """Sums and differences of numbers below 100, bare or as a word problem; held-out pairs are never trained on."""
    while True:
        a, b = rng.randint(0, 99), rng.randint(0, 99)
        if words.is_held_out(f"{max(a, b)} {min(a, b)}") == held_out:  # neither order may be trained on
            break
    plus = rng.random() < 0.7
    a, b = (a, b) if plus else (max(a, b), min(a, b))
    talk = Conversation(rng.random() < 0.7)
    worded = rng.random() < 0.3
    if worded:
        who, what = words.name(rng, held_out), rng.choice(["apples", "books", "coins", "cards", "stamps", "shells"])
        more = [
            "{} has {} {} and gets {} more. How many now?",
            "{} has {} {} and finds {} more. How many are there?",
            "{} sees {} {} and then {} more. How many in all?",
            "{} had {} {} and bought {} more. How many now?",
            "{} finds {} {}, then gets {} more. How many in all?",
            "{} buys {} {} and later {} more. How many now?",
            "{} buys {} {}, then {} more. How many in all?",
        ]
        fewer = [
            "{} has {} {} and gives away {}. How many are left?",
            "{} has {} {} and sells {}. How many are left?",
            "{} has {} {} and eats {}. How many remain?",
            "{} had {} {} and sold {}. How many are left?",
            "{} lost {} {} and found {} of them. How many are still lost?",
            "{} had {} {}, but gave away {}. How many remain?",
            "{} had {} {} and lost {}. How many remain?",
        ]
        talk.user(phrase(rng, more if plus else fewer, held_out).format(who, a, what, b))
    else:
        asked = [
            "What is {} {} {}?",
            "{} {} {} = ?",
            "Compute {} {} {}.",
            "Calculate {} {} {}.",
            "{} {} {}",
            "Can you please calculate {} {} {}?",
        ]
        talk.user(phrase(rng, asked, held_out).format(a, "+" if plus else "-", b))
    kind = "word problem" if worded else "sum" if plus else "difference"
    score = f"{kind} {'think' if talk.thinking else 'direct'}"
    talk.assistant(score, str(a + b if plus else a - b), reasoning=worked(a, b, plus))
    return talk


def worked(a: int, b: int, plus: bool) -> str:
    """The sum or difference digit by digit: ones, then tens with what was carried or borrowed."""
    if plus:
        ones = a % 10 + b % 10
        tens = f"{a // 10} + {b // 10} + {ones // 10} = {a // 10 + b // 10 + ones // 10}"
        return f"{a} + {b}: {a % 10} + {b % 10} = {ones}, {tens}."
    borrowed = int(a % 10 < b % 10)
    last = f"{a % 10 + 10 * borrowed} - {b % 10} = {a % 10 + 10 * borrowed - b % 10}"
    return f"{a} - {b}: {last}, {a // 10} - {b // 10} - {borrowed} = {a // 10 - b // 10 - borrowed}."
