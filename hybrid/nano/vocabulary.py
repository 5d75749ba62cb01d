"""Nano's own small byte-pair vocabulary, in tiktoken's format with all of Kimi's special tokens.

Built so that copying is a walk over equal tokens: digits never merge, and an item's first letter never merges with
the space, quote or bracket before it, so that a name has the same ids in a list, in JSON and in an answer. `encode`
is plain Python for the ASCII text of the training data (no package needed where nano is trained); the server's
tokenizer reads the same file, and a test holds the two together.
"""

import base64
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from hybrid.random_tokenizer import RESERVED, SPECIAL_TOKENS, write_tokenizer_config

N_RANKS = 2048
VOCAB_SIZE = N_RANKS + RESERVED
_N_PREFIXED = 260  # of the ranks: whole words with the space or mark before them, " the", "_task"
SPECIAL = {text: N_RANKS + offset for offset, text, _ in SPECIAL_TOKENS}

# Kimi's split into words (see `server.tokenizer`), for ASCII.
_SUFFIX = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?"
_WORDS = re.compile(
    rf"[^\r\nA-Za-z0-9]?[A-Z]*[a-z]+{_SUFFIX}|[^\r\nA-Za-z0-9]?[A-Z]+[a-z]*{_SUFFIX}|[0-9]{{1,3}}"
    r"| ?[^\sA-Za-z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Vocabulary:
    """Ranks in merge order. Words once encoded are remembered."""

    def __init__(self, ranks: Mapping[bytes, int]) -> None:
        self.ranks = dict(ranks)
        self.tokens = {rank: token for token, rank in self.ranks.items()}
        self._words: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Ids of plain ASCII text. ValueError for any other text."""
        if not text.isascii():
            raise ValueError(f"the training data is ASCII, this is not: {text!r}")
        ids: list[int] = []
        for word in _WORDS.findall(text):
            if word not in self._words:
                self._words[word] = self._merged(word.encode())
            ids += self._words[word]
        return ids

    def _merged(self, word: bytes) -> list[int]:
        """Byte-pair encoding of one word: the pair of lowest rank merges first."""
        parts = [bytes([byte]) for byte in word]
        while len(parts) > 1:
            pairs = [self.ranks.get(a + b, len(self.ranks)) for a, b in itertools.pairwise(parts)]
            best = min(pairs)
            if best == len(self.ranks):
                break
            at = pairs.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [self.ranks[part] for part in parts]

    def write(self, directory: Path) -> None:
        """`tiktoken.model` and `tokenizer_config.json`."""
        lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in self.ranks.items())
        (directory / "tiktoken.model").write_text("".join(lines), encoding="ascii")
        write_tokenizer_config(directory, VOCAB_SIZE)


def read_vocabulary(directory: Path) -> Vocabulary:
    """The vocabulary that a directory holds. OSError where it has none."""
    lines = (line.split() for line in (directory / "tiktoken.model").read_bytes().splitlines())
    return Vocabulary({base64.b64decode(token): int(rank) for token, rank in lines})


def build_vocabulary(texts: Iterable[str], items: Iterable[str], size: int = N_RANKS) -> Vocabulary:
    """Count words in `texts`, merge inside words, then join frequent words with the mark before them.

    `items` are the open-ended words (names, codes): their letters merge like others', yet never with a mark before.
    """
    open_ended = set(items)
    words: Counter[bytes] = Counter()
    prefixed: Counter[tuple[bytes, bytes]] = Counter()
    for text in texts:
        for word in _WORDS.findall(text):
            mark, bare = (word[:1], word[1:]) if len(word) > 1 and word[1].isalpha() else ("", word)
            if word[0].isalpha():
                mark, bare = "", word
            if bare.isdigit():
                continue
            words[bare.encode()] += 1
            if mark and bare not in open_ended:
                prefixed[mark.encode(), bare.encode()] += 1
    ranks = {bytes([byte]): byte for byte in range(256)}
    _merge(words, ranks, size - _N_PREFIXED)
    for (mark, bare), _ in prefixed.most_common():
        if len(ranks) == size:
            break
        if bare in ranks:
            ranks.setdefault(mark + bare, len(ranks))
    return Vocabulary(ranks)


def _merge(words: Mapping[bytes, int], ranks: dict[bytes, int], size: int) -> None:
    """Byte-pair merges by frequency until `ranks` holds `size` tokens."""
    split = [([bytes([byte]) for byte in word], count) for word, count in words.items()]
    while len(ranks) < size:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for parts, count in split:
            for pair in itertools.pairwise(parts):
                pairs[pair] += count
        if not pairs:
            break
        (a, b), _ = pairs.most_common(1)[0]
        ranks[a + b] = len(ranks)
        for parts, _ in split:
            at = parts.index(a) if a in parts else len(parts)
            while at < len(parts) - 1:
                if parts[at] == a and parts[at + 1] == b:
                    parts[at : at + 2] = [a + b]
                at += 1
        split = [(parts, count) for parts, count in split if len(parts) > 1]
