"""The compiled functions of one variant, by tier, format and precision.

`kernels` is what start-up calls: it compiles, or loads from the cache, exactly what one store and one precision need,
so that no request pays for it. Knows C signatures and nothing about jobs or threads.
"""

# mypy: disallow-untyped-defs=False

from dataclasses import dataclass
from typing import Any

from numba import cfunc, types

from offload.config import ExpertFormat, Isa, Precision
from offload.kernels.activation import ENCODE, Layout, encode, layout
from offload.kernels.intrinsics import NOPYTHON, load_i64, store_f32
from offload.kernels.layer import run_layer
from offload.kernels.portable import row_product
from offload.kernels.product import MAX_TOKENS, TILE, emit_product

# weights, row_bytes, scales, scale_bytes: address and stride of the first row;  rows: 1 to TILE
# n_in: inputs of a row;  n: tokens, 1 to MAX_TOKENS;  records: address of their records' addresses
# out: float32 (tokens, TILE), at least the first `rows` columns are written;  after: what will be read after this
PRODUCT = types.void(*[types.int64] * 10)
JOB_FUNCTION = types.int64(types.int64, types.int64, types.int64)  # pool, argument, worker -> status


@dataclass(frozen=True, slots=True)
class Kernels:
    """Addresses of compiled code and what a caller must know to use it."""

    isa: Isa
    layout: Layout
    products: tuple[int, ...]  # by tokens, 1 to MAX_TOKENS
    encode: int  # activation.encode
    layer: int  # the job function of kernels.layer
    code: tuple[Any, ...]  # keeps the compiled functions alive


def vector_product(isa: Isa, fmt: ExpertFormat, precision: Precision, tokens: int) -> Any:
    # The variant is closed over as plain strings and numbers: numba's cache key holds them.
    @cfunc(PRODUCT, cache=True, **NOPYTHON)
    def product(weights, row_bytes, scales, scale_bytes, rows, n_in, n, records, out, after):
        emit_product(
            isa, fmt, precision, tokens, weights, row_bytes, scales, scale_bytes, rows, n_in, n, records, out, after
        )

    return product


def portable_product(fmt: ExpertFormat, precision: Precision) -> Any:
    element = layout("portable", fmt, precision).element

    @cfunc(PRODUCT, cache=True, **NOPYTHON)
    def product(weights, row_bytes, scales, scale_bytes, rows, n_in, n, records, out, after):
        for token in range(n):
            record = load_i64(records + 8 * token)
            for row in range(rows):
                place = weights + row * row_bytes, scales + row * scale_bytes
                store_f32(out + 4 * (token * TILE + row), row_product(fmt, element, *place, n_in, record))

    return product


def kernels(isa: Isa, fmt: ExpertFormat, precision: Precision) -> Kernels:
    """Compile or load one variant: some 10 s of processor time the first time, under a second after."""
    encoder = cfunc(ENCODE, cache=True, **NOPYTHON)(encode)
    layer = cfunc(JOB_FUNCTION, cache=True, **NOPYTHON)(run_layer)
    if isa == "portable":
        products = [portable_product(fmt, precision)] * MAX_TOKENS
    else:
        products = [vector_product(isa, fmt, precision, tokens) for tokens in range(1, MAX_TOKENS + 1)]
    return Kernels(
        isa=isa,
        layout=layout(isa, fmt, precision),
        products=tuple(product.address for product in products),
        encode=encoder.address,
        layer=layer.address,
        code=(encoder, layer, *products),
    )
