"""How often each expert is chosen: recorded from real use, or the uniform law where there is no record.

A record is a JSON file that the server writes (`hybrid serve --record-routing FILE`): tokens seen, and how many of them
chose each expert of each layer. Or it is an .npz with every token's choices (`hybrid.routes`), which are counted here.
Knows no costs.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hybrid.config import ModelConfig
from hybrid.routes import Record, RecordError, read_record, shares_of

DOCUMENT = "hybrid routing"
ARCHIVE = b"PK"  # how an .npz begins, and no JSON does
BEYOND = 2**63  # no count of a record reaches it: they are 64-bit integers
Shares = npt.NDArray[np.float64]


class RoutingError(ValueError):
    """A record that cannot be used with this model. One line with the file and the remedy."""


@dataclass(frozen=True, slots=True)
class Routing:
    """`shares` (L, E): the probability that a token chooses each expert of each MoE layer; a row's sum is top-k."""

    shares: Shares
    tokens: int | None  # that were recorded; None for the uniform law

    @property
    def uniform(self) -> bool:
        return self.tokens is None


def uniform(model: ModelConfig) -> Routing:
    """Every expert as often as any other: the most distinct experts that a batch can have in expectation."""
    share = model.num_experts_per_tok / model.n_routed_experts
    return Routing(np.full((len(model.moe_layers), model.n_routed_experts), share), None)


def chosen(shares: Shares, tokens: int) -> Shares:
    """Probability that any of so many tokens chooses each expert, 1 - (1 - q)^tokens: the tokens are independent.

    Its sum over a layer is the expected number of distinct experts.
    """
    return np.asarray(1 - (1 - shares) ** tokens)


def write_routing(path: Path, layers: tuple[int, ...], counts: npt.NDArray[np.int64], tokens: int) -> None:
    """Write a record: `counts` (L, E) of `tokens` tokens. Raises OSError."""
    rows = {str(layer): row.tolist() for layer, row in zip(layers, counts, strict=True)}
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_text(json.dumps({"document": DOCUMENT, "version": 1, "tokens": tokens, "chosen": rows}))
    scratch.replace(path)


def read_routing(path: Path, model: ModelConfig) -> Routing:
    """A record as probabilities, by `hybrid.routes.shares_of`. Raises RoutingError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RoutingError(f"{path}: cannot be read: {error.strerror}") from None
    if content.startswith(ARCHIVE):
        counts, tokens = _of_tokens(path, model)
    else:
        counts, tokens = _of_counts(path, content, model)
    shares = shares_of(counts, model.num_experts_per_tok)
    if shares.max() > 1 + 1e-9:  # which rounding does not reach
        layer = model.moe_layers[int(shares.max(axis=1).argmax())]
        raise RoutingError(
            f"{path}: chosen.{layer}: an expert more than once for a token; make one with --record-routing"
        )
    return Routing(shares, tokens)


def check_record(path: Path, record: Record, model: ModelConfig) -> None:
    """Raises RoutingError for a record that cannot be of this model."""
    found = (record.layers.tolist(), record.n_experts, record.experts.shape[2])
    wanted = (list(model.moe_layers), model.n_routed_experts, model.num_experts_per_tok)
    if found != wanted:
        raise RoutingError(
            f"{path}: recorded with {_shape(*found)}; this model has {_shape(*wanted)}: another model's?"
        )


def _of_tokens(path: Path, model: ModelConfig) -> tuple[Shares, int]:
    """Counts (L, E) and number of tokens of an .npz."""
    try:
        record = read_record(path)
    except RecordError as error:
        raise RoutingError(str(error)) from None
    check_record(path, record, model)
    return record.counts().astype(np.float64), len(record.tokens)


def _shape(layers: list[int], n_experts: int, per_token: int) -> str:
    which = f"{layers[0]} to {layers[-1]}" if layers == [*range(layers[0], layers[-1] + 1)] else f"{layers}"
    return f"{per_token} of {n_experts} experts in layers {which}"


def _of_counts(path: Path, content: bytes, model: ModelConfig) -> tuple[Shares, int]:
    """The same of a JSON record."""
    try:
        values = json.loads(content.decode())
    except ValueError as error:
        raise RoutingError(f"{path}: not JSON: {error}") from None
    except RecursionError:
        raise RoutingError(f"{path}: not JSON: nested too deeply") from None
    if not isinstance(values, dict) or values.get("document") != DOCUMENT or values.get("version") != 1:
        raise RoutingError(f"{path}: not a routing record of this version; make one with --record-routing")
    tokens, rows = values.get("tokens"), values.get("chosen")
    wanted = [str(layer) for layer in model.moe_layers]
    if type(tokens) is not int or not 0 < tokens < BEYOND or not isinstance(rows, dict) or list(rows) != wanted:
        raise RoutingError(
            f"{path}: expected tokens from 1 to 2**63 - 1 and layers {wanted[0]} to {wanted[-1]}: another model's?"
        )
    counts = [_counts(path, layer, row, model.n_routed_experts) for layer, row in rows.items()]
    return np.array(counts, np.float64), tokens


def _counts(path: Path, layer: str, row: object, n_experts: int) -> list[int]:
    if not isinstance(row, list) or len(row) != n_experts or not all(type(n) is int and 0 <= n < BEYOND for n in row):
        raise RoutingError(f"{path}: chosen.{layer}: expected {n_experts} counts from 0 to 2**63 - 1: another model's?")
    return row
