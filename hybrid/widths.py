"""How wide the tensors outside the routed experts are held, and what that takes. Torch-free: the ledger counts with it.

Narrow are the matrices that a token is multiplied by, in one byte for each value: attention's, the dense layers' and
the shared experts', and the output head. The router chooses experts and the norms are small, so they stay wide, and of
the embedding a token reads one row. `hybrid.narrow` computes with them, `hybrid.weights` makes them.
"""

import math

from hybrid.config import KvDtype, ModelConfig, NarrowFormat, is_router
from offload.config import FP8_BLOCK

SCALE_BYTES = 4  # float32
HEAD = "lm_head.weight"


def format_of(name: str, shape: tuple[int, ...], narrow: NarrowFormat | None) -> NarrowFormat | None:
    """The format of one tensor in a model whose matrices are `narrow`; None where it stays wide.

    The head, which no checkpoint publishes in fp8, is int8 in both: with a factor for each row that has a third of
    fp8's error in as many bytes.
    """
    if narrow is None or len(shape) != 2 or is_router(name) or "embed_tokens" in name:
        return None
    return "int8" if name == HEAD else narrow


def best_narrow(model: ModelConfig) -> NarrowFormat:
    """The format with the smaller error: none where the checkpoint is published in fp8, else that of int8, which is a
    third of fp8's (docs/LOG.md)."""
    return "fp8" if model.expert_format == "fp8" else "int8"


def held_bytes(
    name: str, shape: tuple[int, ...], itemsize: int, narrow: NarrowFormat | None, published_fp8: bool
) -> int:
    """Bytes of one tensor as the engine holds it, the factors of a narrow one included. `itemsize` is a wide value's;
    fp8 that is published as such keeps its blocks' factors, all else has one for each row."""
    fmt = format_of(name, shape, narrow)
    if fmt is None:
        return math.prod(shape) * (4 if is_router(name) else itemsize)
    by_block = published_fp8 and fmt == "fp8"
    n_scales = math.prod(-(-size // FP8_BLOCK) for size in shape) if by_block else shape[0]
    return math.prod(shape) + n_scales * SCALE_BYTES


def kv_bytes_per_token(model: ModelConfig, itemsize: int, kv_dtype: KvDtype = "model") -> int:
    """Bytes of cache for one token over all layers: a narrow entry has two factors, `hybrid.kv`."""
    if kv_dtype == "model":
        return model.kv_bytes_per_token(itemsize)
    return model.kv_bytes_per_token(1) + model.num_hidden_layers * 2 * SCALE_BYTES
