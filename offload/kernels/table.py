"""The compiled functions of one variant, by tier, format and precision.

`kernels` is what start-up calls: it compiles, or loads from the cache, exactly what one store and one precision need,
so that no request pays for it. Knows C signatures and nothing about jobs or threads.
"""

# mypy: disallow-untyped-defs=False

from dataclasses import dataclass
from typing import Any

from numba import cfunc, types

from offload.config import ExpertFormat, Isa, Precision
from offload.kernels.activation import Layout, bf16_inputs, bf16_swiglu, encode_inputs, encode_swiglu, layout
from offload.kernels.amx import AmxFormat, emit_multiply, emit_unpack
from offload.kernels.intrinsics import NOPYTHON, load_i64, store_f32
from offload.kernels.layer import run_layer
from offload.kernels.portable import row_product
from offload.kernels.product import MAX_TOKENS, TOKENS, UNIT_SUMS, emit_product

# weights: address of a unit;  n_blocks: of each of its tiles;  records: address of the tokens' records' addresses
# out: float32 (tokens, UNIT_SUMS)
PRODUCT = types.void(*[types.int64] * 4)
ENCODE = types.void(types.int64, types.int64)  # address of float32 values, address of the group's record
UNPACK = types.void(types.int64, types.int64, types.int64)  # kernels.amx: unit, n_blocks, panel
# panel; steps of a tile;  tokens: address of their first row;  stride: to the next row;  n: up to amx.TOKENS;  out
MULTIPLY = types.void(*[types.int64] * 6)
JOB_FUNCTION = types.int64(types.int64, types.int64, types.int64)  # pool, argument, worker -> status


@dataclass(frozen=True, slots=True)
class ManyTokens:
    """The functions of kernels.amx, and their sizes."""

    fmt: AmxFormat
    inputs: int  # ENCODE, bf16
    swiglu: int
    unpack: int
    multiply: int
    code: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Kernels:
    """Addresses of compiled code and what a caller must know to use it."""

    layout: Layout
    products: tuple[int, ...]  # by tokens - 1; 0 where product.TOKENS has none
    encode_inputs: int
    encode_swiglu: int
    layer: int  # the job function of kernels.layer
    many: ManyTokens | None  # None: every expert goes through the products
    code: tuple[Any, ...]  # keeps the compiled functions alive


# The variant is closed over as plain strings and numbers: numba's cache key holds them.


def vector_product(isa: Isa, fmt: ExpertFormat, precision: Precision, tokens: int) -> Any:
    @cfunc(PRODUCT, cache=True, **NOPYTHON)
    def product(weights, n_blocks, records, out):
        emit_product(isa, fmt, precision, tokens, weights, n_blocks, records, out)

    return product


def portable_product(fmt: ExpertFormat, precision: Precision, tokens: int) -> Any:
    element = layout("portable", fmt, precision).element

    @cfunc(PRODUCT, cache=True, **NOPYTHON)
    def product(weights, n_blocks, records, out):
        for token in range(tokens):
            record = load_i64(records + 8 * token)
            for row in range(UNIT_SUMS):
                value = row_product(fmt, element, weights, n_blocks, row, record)
                store_f32(out + 4 * (token * UNIT_SUMS + row), value)

    return product


def encoders(isa: Isa, fmt: ExpertFormat, precision: Precision) -> tuple[Any, Any]:
    @cfunc(ENCODE, cache=True, **NOPYTHON)
    def inputs(values, record):
        encode_inputs(isa, fmt, precision, values, record)

    @cfunc(ENCODE, cache=True, **NOPYTHON)
    def swiglu(sums, record):
        encode_swiglu(isa, fmt, precision, sums, record)

    return inputs, swiglu


def many_tokens(fmt: AmxFormat) -> ManyTokens:
    @cfunc(ENCODE, cache=True, **NOPYTHON)
    def inputs(values, target):
        bf16_inputs(values, target)

    @cfunc(ENCODE, cache=True, **NOPYTHON)
    def swiglu(sums, target):
        bf16_swiglu(sums, target)

    @cfunc(UNPACK, cache=True, **NOPYTHON)
    def unpack(weights, n_blocks, panel):
        emit_unpack(weights, n_blocks, panel)

    @cfunc(MULTIPLY, cache=True, **NOPYTHON)
    def multiply(panel, steps, tokens, stride, n, out):
        emit_multiply(panel, steps, tokens, stride, n, out)

    code = inputs, swiglu, unpack, multiply
    return ManyTokens(fmt, inputs.address, swiglu.address, unpack.address, multiply.address, code)


def kernels(isa: Isa, fmt: ExpertFormat, precision: Precision) -> Kernels:
    """Compile or load one variant: some 10 s of processor time the first time, under a second after."""
    layer = cfunc(JOB_FUNCTION, cache=True, **NOPYTHON)(run_layer)
    inputs, swiglu = encoders(isa, fmt, precision)
    if isa == "portable":
        products = {tokens: portable_product(fmt, precision, tokens) for tokens in TOKENS}
    else:
        products = {tokens: vector_product(isa, fmt, precision, tokens) for tokens in TOKENS}
    return Kernels(
        layout=layout(isa, fmt, precision),
        products=tuple(products[n].address if n in products else 0 for n in range(1, MAX_TOKENS + 1)),
        encode_inputs=inputs.address,
        encode_swiglu=swiglu.address,
        layer=layer.address,
        many=many_tokens(fmt) if isa == "amx" and (fmt == "int4" or fmt == "bf16") else None,
        code=(layer, inputs, swiglu, *products.values()),
    )
