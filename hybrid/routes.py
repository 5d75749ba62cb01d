"""A routing record: which experts every token chose in every layer, and for some tokens what the router scored.

Whole documents, token by token, so that a sequence can be replayed; docs/ROUTING.md describes the file. Knows no model
and no torch. Written by `hybrid.nano.record`; read by `hybrid.nano.load`, `hybrid.nano.plots` and `placement.routing`.
"""

import contextlib
import lzma
import textwrap
import tokenize
import warnings
import zipfile
import zlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FORMAT = "hybrid routing record"
VERSION = 2
READABLE = ("1", "2")  # version 1 never had `ahead`
Integers = npt.NDArray[np.integer]
Floats = npt.NDArray[np.floating]
Words = npt.NDArray[np.str_]

# Shape and kind of every array. Letters stand for sizes: L layers, E experts of a layer, T tokens, K experts of a
# token, D documents, M turns, S tokens with scores; 2 stands for itself.
ARRAYS = {
    "model": ("", "text"), "layers": ("L", "integers"), "bias": ("LE", "numbers"), "tokens": ("T", "integers"),
    "starts": ("D", "integers"), "families": ("D", "text"), "turns": ("M2", "integers"), "kinds": ("M", "text"),
    "experts": ("TLK", "integers"), "scores": ("SLE", "numbers"), "ahead": ("SL2E", "numbers"),
}  # fmt: skip
OPTIONAL = "ahead"
KINDS = {"text": "U", "integers": "iu", "numbers": "f"}  # NumPy's letters
# What zipfile and NumPy raise for bytes that are no archive of arrays; they parse headers as Python.
_DAMAGED = (
    ValueError, TypeError, IndexError, EOFError, OverflowError, RuntimeError, MemoryError, SyntaxError,
    tokenize.TokenError, zipfile.BadZipFile, zlib.error, lzma.LZMAError,
)  # fmt: skip


class RecordError(ValueError):
    """A file that is no routing record. One line that names the file, and the array where one is wrong."""


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """The choices of T tokens of D documents, laid end to end. Letters as in `ARRAYS`."""

    model: str  # SHA-256 of the checkpoint, see `hybrid.nano.record.model_hash`
    layers: Integers  # (L,) numbers of the MoE layers
    bias: Floats  # (L, E) float32, added to the scores before the best K are chosen
    tokens: Integers  # (T,) ids
    starts: Integers  # (D,) first token of each document, which ends where the next one begins
    families: Words  # (D,) what kind of conversation it is
    turns: Integers  # (M, 2) tokens start to stop that the model wrote in one turn, its end token included
    kinds: Words  # (M,) what kind of turn it is
    experts: Integers  # (T, L, K) ids of the chosen experts, ascending
    scores: Floats  # (S, L, E) float16, of the first S tokens, which are whole documents: before the bias
    # (S, L, 2, E) float16, of the same tokens: what the layer's router scores the input of the MoE layer one and two
    # before it; zeros where there is none. None: not recorded
    ahead: Floats | None = None

    @property
    def n_experts(self) -> int:
        """E, of one layer."""
        return int(self.bias.shape[1])

    @property
    def lengths(self) -> Integers:
        """(D,) tokens of each document."""
        return np.diff(self.starts, append=len(self.tokens))

    @property
    def documents(self) -> Integers:
        """(T,) number of each token's document."""
        return np.repeat(np.arange(len(self.starts)), self.lengths)

    @property
    def positions(self) -> Integers:
        """(T,) place of each token in its document."""
        return np.arange(len(self.tokens)) - np.repeat(self.starts, self.lengths)

    @property
    def decoded(self) -> npt.NDArray[np.bool_]:
        """(T,) whether a server runs the token as a decode step: the model wrote it, and goes on after it."""
        found = np.zeros(len(self.tokens), np.bool_)
        for start, stop in self.turns:
            found[start : stop - 1] = True
        return found

    def counts(self, chosen: npt.NDArray[np.bool_] | None = None) -> npt.NDArray[np.int64]:
        """(L, E) how often each expert was chosen, by all tokens or by those of a mask (T,)."""
        experts = self.experts if chosen is None else self.experts[chosen]
        rows = [np.bincount(experts[:, layer].ravel(), minlength=self.n_experts) for layer in range(len(self.layers))]
        return np.stack(rows).astype(np.int64)


def shares_of(counts: npt.NDArray[Any], per_token: int) -> npt.NDArray[np.float64]:
    """Probability that a token chooses each expert, from counts (L, E); a row's sum is `per_token`.

    Each expert counts as chosen half a time more than it was, so that none is impossible.
    """
    more = counts + 0.5
    return np.asarray(more / more.sum(axis=1, keepdims=True) * per_token)


def write_record(path: Path, record: Record) -> None:
    """Write the record in one move, or leave nothing; the same record is the same file. Raises OSError."""
    arrays: dict[str, Any] = {field.name: getattr(record, field.name) for field in fields(record)}
    if record.ahead is None:
        del arrays[OPTIONAL]
    scratch = path.with_name(f".{path.name}.part")
    try:
        with scratch.open("wb") as file:
            np.savez_compressed(file, format=np.array(FORMAT), version=np.array(VERSION), **arrays)
        scratch.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None  # the name that the caller knows


def read_record(path: Path) -> Record:
    """The record that a file holds. Raises RecordError."""
    arrays = _arrays(path)
    if str(arrays.get("format")) != FORMAT or str(arrays.get("version")) not in READABLE:
        raise RecordError(f"{path}: not a routing record of this version; make one with python -m hybrid.nano.record")
    sizes = {"2": 2}
    for name, (letters, noun) in ARRAYS.items():
        array = arrays.get(name)
        if array is None and name == OPTIONAL:
            continue
        if not isinstance(array, np.ndarray) or array.ndim != len(letters) or array.dtype.kind not in KINDS[noun]:
            raise RecordError(f"{path}: {name}: expected {noun} of shape ({', '.join(letters)})")
        for letter, size in zip(letters, array.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise RecordError(f"{path}: {name}: expected {letter} to be {sizes[letter]} as elsewhere, found {size}")
    # Signed, so that differences are: only the two large arrays keep the types that they have in the file.
    small = {name: arrays[name].astype(np.int64) for name in ("layers", "tokens", "starts", "turns")}
    record = Record(
        **{name: arrays[name] for name in ARRAYS if name in arrays} | small | {"model": str(arrays["model"])}
    )
    wrong = _wrong(record)
    if wrong:
        raise RecordError(f"{path}: {wrong}")
    return record


def _arrays(path: Path) -> dict[str, Any]:
    try:
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")  # an odd header is no reason to talk besides
            with np.lib.npyio.NpzFile(file, allow_pickle=False) as members:
                return {name: members[name] for name in ("format", "version", *ARRAYS) if name in members}
    except OSError as error:
        raise RecordError(f"{path}: cannot be read: {error.strerror or error}") from None
    except _DAMAGED as error:
        why = textwrap.shorten(str(error), 100, placeholder=" ...") or type(error).__name__
        raise RecordError(f"{path}: not an .npz file of plain arrays, or a damaged one: {why}") from None


def _wrong(record: Record) -> str | None:
    """What is impossible in arrays of the right shapes."""
    n_tokens = len(record.tokens)
    if not n_tokens or record.starts[:1].tolist() != [0] or record.lengths.min() < 1:
        return "starts: expected 0 and then ascending numbers of tokens"
    if not record.experts.size or record.experts.min() < 0 or record.experts.max() >= record.n_experts:
        return f"experts: expected ids from 0 to {record.n_experts - 1}"
    if (np.diff(record.experts.astype(np.int64), axis=2) <= 0).any():
        return "experts: expected different experts for a token, ascending"
    if len(record.scores) not in (*record.starts, n_tokens):
        return "scores: expected those of whole documents"
    if record.layers[0] < 0 or (np.diff(record.layers) <= 0).any():
        return "layers: expected numbers from 0, ascending"
    if record.tokens.min() < 0:
        return "tokens: expected ids from 0"
    for name in ("bias", "scores", OPTIONAL):
        found = getattr(record, name)
        if found is not None and not np.isfinite(found).all():
            return f"{name}: expected finite numbers"
    begin, end = record.turns.T
    if (begin < 0).any() or (begin >= end).any() or (end > n_tokens).any():
        return f"turns: expected start and stop from 0 to {n_tokens}"
    if (record.documents[begin] != record.documents[end - 1]).any():
        return "turns: expected each within one document"
    if (begin[1:] < end[:-1]).any():
        return "turns: expected them in order, none within another"
    return None
