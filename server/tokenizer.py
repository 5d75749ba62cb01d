"""Text to token ids and back, with the tokenizer that a checkpoint brings along.

Two families share one interface: Kimi's byte-pair ranks (`tiktoken.model` with `tokenizer_config.json`) and
`tokenizer.json`. Special tokens never come from text unless the caller asks for it, so that a user who types
`<|im_end|>` gets those ten characters. Knows nothing about chats, templates or requests; the template, the output
parser and the service call it. Encoding releases the interpreter lock, but belongs in a worker thread.
"""

import base64
import binascii
import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tiktoken
import tokenizers

from server.detokenizer import DiffDecoder, IncrementalDecoder, Utf8Decoder

Piece = str | int  # a stretch of plain text, or the id of a special token

# Kimi's split into words, alternatives in order. `&&` is class intersection: Rust's regex syntax, not Python's.
_MARKED = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"  # letters that may open a word
_SMALL = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"  # letters that may go on
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_WORDS = "|".join(
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_MARKED}*{_SMALL}+{_SUFFIX}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_MARKED}+{_SMALL}*{_SUFFIX}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
# The published encoder cuts long input before it splits words; code points.
_CHUNK = 400_000
_RUN = 25_000

_N_RESERVED = 256  # special ids behind the ranks in the published layout
_STOP_NAMES = ("<|im_end|>", "[EOS]")


class TokenizerError(ValueError):
    """The tokenizer's files are missing or damaged. One line that names the file and the remedy."""


class KimiTokenizer:
    """Byte-pair ranks in tiktoken's format and a block of special ids behind them.

    `specials` maps names to ids; ids between the ranks and the specials may be unused and decode to nothing.
    """

    bos_ids: tuple[int, ...] = ()  # Kimi's encoder adds none

    def __init__(self, ranks: Mapping[bytes, int], specials: Mapping[str, int], stop_ids: frozenset[int]) -> None:
        self.specials = dict(specials)
        self.stop_ids = stop_ids
        self.n_vocab = max(max(ranks.values()), max(specials.values())) + 1
        self._bytes = [b""] * self.n_vocab
        for text, rank in ranks.items():
            self._bytes[rank] = text
        for name, token in specials.items():
            self._bytes[token] = name.encode()
        self._special_ids = frozenset(specials.values())
        self._bpe = tiktoken.Encoding("kimi", pat_str=_WORDS, mergeable_ranks=dict(ranks), special_tokens=self.specials)

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """Ids of the text. Special strings are plain text unless `parse_special`; lone surrogates become U+FFFD."""
        ids: list[int] = []
        for stretch in _cut(_valid(text)):
            bpe = self._bpe
            ids += bpe.encode(stretch, allowed_special="all") if parse_special else bpe.encode_ordinary(stretch)
        return ids

    def encode_pieces(self, pieces: Iterable[Piece]) -> list[int]:
        """Ids of a rendered template: each stretch between two special ids is encoded once, as plain text."""
        ids: list[int] = []
        for piece in _joined(pieces):
            ids += [piece] if isinstance(piece, int) else self.encode(piece)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, specials by name; bytes that are not UTF-8 give U+FFFD."""
        return b"".join(self.token_bytes(token) for token in ids).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes an id stands for; empty for an id without a token."""
        return self._bytes[token] if 0 <= token < self.n_vocab else b""

    def special_id(self, name: str) -> int | None:
        """The id of a special token, None if this tokenizer has none of that name."""
        return self.specials.get(name)

    def is_special(self, token: int) -> bool:
        """Whether the id is a special token."""
        return token in self._special_ids

    def detokenizer(self) -> Utf8Decoder:
        """A fresh decoder for one stream."""
        return Utf8Decoder(self.token_bytes)


class JsonTokenizer:
    """A `tokenizer.json`, through the `tokenizers` library.

    The library finds added tokens in any text it encodes. So every marker is renamed on loading to a string that
    nobody can type (it holds a random number); the ids stay, and text can only name a marker through us.
    """

    def __init__(self, spec: dict[str, Any], bos: str | None, add_bos: bool | None, stop_ids: frozenset[int]) -> None:
        added = spec.get("added_tokens") or ()
        self.specials: dict[str, int] = {t["content"]: int(t["id"]) for t in added if _is_marker(t)}
        secret = secrets.token_hex(8)
        self._alias = {name: f"\ue000{secret}.{token}\ue001" for name, token in self.specials.items()}
        self._name = {token: name for name, token in self.specials.items()}
        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(_renamed(spec, self._alias)))
        self.n_vocab = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        self.stop_ids = stop_ids
        self.bos_ids = self._opening_ids(bos, add_bos)
        self._by_bytes = _is_byte_level(spec.get("decoder"))
        self._from_char = _byte_of_char()
        self._alias_pattern = re.compile(f"\ue000{secret}\\.(\\d+)\ue001")
        self._special_pattern = special_pattern(self.specials)

    def _opening_ids(self, bos: str | None, add_bos: bool | None) -> tuple[int, ...]:
        token = self.specials.get(bos) if bos is not None else None
        if add_bos is None:  # no word from tokenizer_config.json: the post-processor knows
            add_bos = self._tokenizer.encode("").ids[:1] == [token]
        return (token,) if add_bos and token is not None else ()

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """Ids of the text, no BOS added. Special strings are plain text unless `parse_special`."""
        text = _valid(text)
        if parse_special:
            text = self._special_pattern.sub(lambda match: self._alias[match[0]], text)
        return self._encode(text)

    def encode_pieces(self, pieces: Iterable[Piece]) -> list[int]:
        """Ids of a rendered template, encoded in one pass: pre-tokenizers may look across special tokens."""
        text = "".join(self._alias[self._name[p]] if isinstance(p, int) else _valid(p) for p in pieces)
        return self._encode(text)

    def _encode(self, text: str) -> list[int]:
        # As a batch of one: only the batch calls release the interpreter lock (800,000 letters held it for 5 s).
        return list(self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, specials by name."""
        if self._by_bytes:
            return b"".join(self.token_bytes(token) for token in ids).decode("utf-8", "replace")
        return self._alias_pattern.sub(lambda match: self._name[int(match[1])], self._decode_raw(list(ids)))

    def _decode_raw(self, ids: Sequence[int]) -> str:
        known = [token for token in ids if 0 <= token < self.n_vocab]
        return str(self._tokenizer.decode(known, skip_special_tokens=False))

    def token_bytes(self, token: int) -> bytes:
        """The bytes an id stands for, taken alone; empty for an id without a token."""
        name = self._name.get(token)
        if name is not None:
            return name.encode()
        text: str | None = self._tokenizer.id_to_token(token) if 0 <= token < self.n_vocab else None
        if text is None:
            return b""
        if self._by_bytes:
            if all(char in self._from_char for char in text):
                return bytes(self._from_char[char] for char in text)
            return text.encode()  # added tokens are not spelled in the byte alphabet
        byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", text)
        return bytes([int(byte[1], 16)]) if byte else text.replace("\u2581", " ").encode()

    def special_id(self, name: str) -> int | None:
        """The id of a special token, None if this tokenizer has none of that name."""
        return self.specials.get(name)

    def is_special(self, token: int) -> bool:
        """Whether the id is a special token."""
        return token in self._name

    def detokenizer(self) -> IncrementalDecoder:
        """A fresh decoder for one stream."""
        return Utf8Decoder(self.token_bytes) if self._by_bytes else DiffDecoder(self._decode_raw, self._name.get)


Tokenizer = KimiTokenizer | JsonTokenizer


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a checkpoint directory. TokenizerError names the missing or damaged file."""
    ranks, config_file, spec = (directory / n for n in ("tiktoken.model", "tokenizer_config.json", "tokenizer.json"))
    config = _read_json(config_file) if config_file.is_file() else {}
    if ranks.is_file():
        return _load_kimi(ranks, config_file, config)
    if not spec.is_file():
        raise TokenizerError(
            f"{directory}: no tokenizer: tiktoken.model with tokenizer_config.json, or tokenizer.json, is needed; "
            "copy these files from the published checkpoint"
        )
    content = _read_json(spec)
    added = {t["content"]: int(t["id"]) for t in content.get("added_tokens") or ()}
    try:
        return JsonTokenizer(
            content, _token_text(config, "bos_token"), config.get("add_bos_token"), _stop_ids(directory, config, added)
        )
    except Exception as error:  # the library raises plain Exception for any fault in the file
        raise TokenizerError(f"{spec}: not a tokenizer that can be read ({error}); copy the file again") from error


def special_pattern(names: Iterable[str]) -> re.Pattern[str]:
    """Finds special strings in text, the longest where one begins another; matches nothing if there are none."""
    return re.compile("|".join(re.escape(n) for n in sorted(names, key=len, reverse=True)) or r"(?!)")


def _load_kimi(ranks_file: Path, config_file: Path, config: dict[str, Any]) -> KimiTokenizer:
    listed = {int(k): str(v["content"]) for k, v in (config.get("added_tokens_decoder") or {}).items()}
    if not listed:
        raise TokenizerError(
            f"{config_file}: added_tokens_decoder, the list of special tokens, is missing; "
            "copy tokenizer_config.json from the published checkpoint"
        )
    ranks = _read_ranks(ranks_file)
    if min(listed) < len(ranks):
        raise TokenizerError(
            f"{config_file}: special id {min(listed)} is also a rank of {ranks_file.name} ({len(ranks)} ranks); "
            "the two files must come from the same checkpoint"
        )
    # Published layout: 256 special ids right behind the ranks. A small tokenizer under a larger vocabulary keeps its
    # specials at the end of it, with unused ids in between.
    block = range(len(ranks), len(ranks) + _N_RESERVED)
    if max(listed) >= block.stop:
        block = range(min(listed), max(listed) + 1)
    specials = {listed.get(token, f"<|reserved_token_{token}|>"): token for token in block}
    return KimiTokenizer(ranks, specials, _stop_ids(ranks_file.parent, config, specials))


def _read_ranks(file: Path) -> dict[bytes, int]:
    """Lines `<base64 of the bytes> <rank>`; every single byte must have one, ranks are 0..n-1."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            text, rank = line.split()
            ranks[base64.b64decode(text, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise TokenizerError(f"{file}: line {number} is not `base64 rank`; copy the file again") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
        raise TokenizerError(f"{file}: {len(ranks)} ranks, not 0..n-1 with every single byte; copy the file again")
    return ranks


def _stop_ids(directory: Path, config: dict[str, Any], specials: Mapping[str, int]) -> frozenset[int]:
    """Ids that end an answer: the tokenizer's EOS, Kimi's two (revisions disagree), and generation_config.json's."""
    names = (*_STOP_NAMES, _token_text(config, "eos_token"))
    ids = {specials[name] for name in names if name is not None and name in specials}
    file = directory / "generation_config.json"
    eos = _read_json(file).get("eos_token_id") if file.is_file() else None
    return frozenset(ids | set(eos if isinstance(eos, list) else [] if eos is None else [eos]))


def _token_text(config: Mapping[str, Any], key: str) -> str | None:
    """`bos_token` and the like: the text itself, or an object that holds it."""
    value = config.get(key)
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{file}: not valid JSON ({error}); copy the file again") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{file}: a JSON object is expected; copy the file again")
    return content


def _valid(text: str) -> str:
    """JSON can smuggle in half a surrogate pair, which no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _cut(text: str) -> Iterator[str]:
    """Kimi's published cut: chunks of 400,000, and inside them runs of white space or of anything else of 25,000.

    Without it one endless word would take the pair merging minutes.
    """
    for start in range(0, len(text), _CHUNK):
        chunk = text[start : start + _CHUNK]
        begin = 0
        for run in re.finditer(r"\s+|\S+", chunk) if len(chunk) > _RUN else ():
            for end in range(run.start() + _RUN, run.end(), _RUN):
                yield chunk[begin:end]
                begin = end
        yield chunk[begin:]


def _joined(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The same pieces with neighbouring stretches of text made one."""
    text: list[str] = []
    for piece in pieces:
        if isinstance(piece, str):
            text.append(piece)
            continue
        yield "".join(text)
        yield piece
        text = []
    yield "".join(text)


def _is_marker(token: Mapping[str, Any]) -> bool:
    """Special by flag, or by shape: `<think>` and role markers are often added without the flag."""
    return bool(token.get("special")) or re.fullmatch(r"<\S+>", token["content"]) is not None


def _renamed(spec: dict[str, Any], alias: Mapping[str, str]) -> dict[str, Any]:
    """The specification with every marker under its alias, wherever it is named."""
    model = dict(spec["model"])
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        model["vocab"] = {alias.get(text, text): token for text, token in vocab.items()}
    elif isinstance(vocab, list):  # unigram: [text, score]
        model["vocab"] = [[alias.get(text, text), score] for text, score in vocab]
    if model.get("unk_token") in alias:
        model["unk_token"] = alias[model["unk_token"]]
    added = [{**t, "content": alias.get(t["content"], t["content"])} for t in spec.get("added_tokens") or ()]
    return {**spec, "model": model, "added_tokens": added, "truncation": None, "padding": None}


def _is_byte_level(decoder: dict[str, Any] | None) -> bool:
    kinds = [d.get("type") for d in (decoder, *((decoder or {}).get("decoders") or ())) if d]
    return "ByteLevel" in kinds


def _byte_of_char() -> dict[str, int]:
    """The byte-level alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 and up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}
