"""The two AVX-512 VNNI instructions of the kernels spelt out in plain LLVM, for processors without them.

So the rest of the avx512vnni code (layouts, 16 lanes, scales, row ends) runs and is tested on any x86-64 machine.
"""

from typing import Any

from llvmlite import ir
from numba import cfunc

from offload.config import ExpertFormat, Isa, Precision
from offload.kernels.activation import layout
from offload.kernels.intrinsics import I8, I16, I32, NOPYTHON
from offload.kernels.product import MAX_TOKENS, emit_product
from offload.kernels.table import PRODUCT, Kernels, kernels
from offload.kernels.vector import Emitter

NAMES = {"llvm.x86.avx512.vpdpbusd.512": (I8, 4), "llvm.x86.avx512.vpdpwssd.512": (I16, 2)}


class SpelledOut(Emitter):
    """An emitter whose dot products are multiplications and additions of 32-bit lanes."""

    def _call(self, name: str, kind: Any, args: Any) -> Any:
        if name not in NAMES:
            return super()._call(name, kind, args)
        element, per_lane = NAMES[name]
        b, (total, left, right) = self.builder, args
        narrow = ir.VectorType(element, per_lane * self.lanes)
        wide = ir.VectorType(I32, per_lane * self.lanes)
        widen_left = b.zext if element is I8 else b.sext
        products = b.mul(widen_left(b.bitcast(left, narrow), wide), b.sext(b.bitcast(right, narrow), wide))
        for i in range(per_lane):
            total = b.add(total, b.shuffle_vector(products, products, self._order(range(i, wide.count, per_lane))))
        return total


def product(isa: Isa, fmt: ExpertFormat, precision: Precision, tokens: int) -> Any:
    @cfunc(PRODUCT, **NOPYTHON)
    def function(weights, row_bytes, scales, scale_bytes, rows, n_in, n, records, out, after):  # type: ignore[no-untyped-def]
        emit_product(
            isa, fmt, precision, tokens, weights, row_bytes, scales, scale_bytes, rows, n_in, n, records, out, after
        )

    return function


def spelled_out_kernels(isa: Isa, fmt: ExpertFormat, precision: Precision) -> Kernels:
    """The kernels of `isa`; call it with `offload.kernels.product.Emitter` replaced by SpelledOut."""
    plain = kernels("portable", fmt, precision)
    products = [product(isa, fmt, precision, tokens) for tokens in range(1, MAX_TOKENS + 1)]
    return Kernels(
        isa=isa,
        layout=layout(isa, fmt, precision),
        products=tuple(function.address for function in products),
        encode=plain.encode,
        layer=plain.layer,
        code=(*plain.code, *products),
    )
