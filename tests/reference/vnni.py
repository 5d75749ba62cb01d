"""The instructions of tiers that this processor lacks, spelt out in plain LLVM or in halves that it has.

So the rest of their code (layouts, 16 lanes, scales, sums through memory) runs and is tested on any AVX2 machine.
"""

from typing import Any

from llvmlite import ir
from numba import cfunc

from offload.config import ExpertFormat, Isa, Precision
from offload.kernels.activation import layout
from offload.kernels.intrinsics import I8, I16, I32, NOPYTHON
from offload.kernels.product import MAX_TOKENS, TOKENS, emit_product
from offload.kernels.table import PRODUCT, Kernels, encoders, kernels
from offload.kernels.vector import Emitter

DOTS = {"vpdpbusd": (I8, 4), "vpdpwssd": (I16, 2)}
HALVES = {
    "llvm.x86.avx512.pmaddubs.w.512": "llvm.x86.avx2.pmadd.ub.sw",
    "llvm.x86.avx512.pmaddw.d.512": "llvm.x86.avx2.pmadd.wd",
}


class SpelledOut(Emitter):
    """An emitter that calls functions of its own for the dot products: written once, so they are compiled once."""

    def _call(self, name: str, returns: Any, *args: Any) -> Any:
        instruction = name.split(".")[-2]
        if name not in HALVES and instruction not in DOTS:
            return super()._call(name, returns, *args)
        kind = ir.FunctionType(returns, [arg.type for arg in args])
        module, own = self.builder.module, f"spelt.{name}"
        function = module.globals.get(own) or ir.Function(module, kind, own)
        if function.is_declaration:
            function.linkage = "internal"
            function.attributes.add("noinline")
            emitter = SpelledOut(ir.IRBuilder(function.append_basic_block()), "avx2")
            inside = function.args
            spelt = emitter.halves(name, returns, *inside) if name in HALVES else emitter.dot(instruction, *inside)
            emitter.builder.ret(spelt)
        return self.builder.call(function, args)

    def dot(self, instruction: str, total: Any, left: Any, right: Any) -> Any:
        """Multiplications and additions of 32-bit lanes."""
        element, per_lane = DOTS[instruction]
        b, lanes = self.builder, per_lane * total.type.count
        narrow, wide = ir.VectorType(element, lanes), ir.VectorType(I32, lanes)
        widen_left = b.zext if element is I8 else b.sext
        products = b.mul(widen_left(b.bitcast(left, narrow), wide), b.sext(b.bitcast(right, narrow), wide))
        for i in range(per_lane):
            total = b.add(total, self._pick(products, range(i, lanes, per_lane)))
        return total

    def halves(self, name: str, returns: Any, *args: Any) -> Any:
        """AVX2's instruction twice."""
        parts = []
        for i in (0, 1):
            pieces = [self._pick(a, range(i * a.type.count // 2, (i + 1) * a.type.count // 2)) for a in args]
            half = ir.VectorType(returns.element, returns.count // 2)
            parts.append(super()._call(HALVES[name], half, *pieces))
        return self.builder.shuffle_vector(*parts, self._indexes(range(2 * parts[0].type.count)))

    def _pick(self, value: Any, indexes: range) -> Any:
        return self.builder.shuffle_vector(value, value, self._indexes(indexes))

    def _indexes(self, indexes: range) -> Any:
        return ir.Constant(ir.VectorType(I32, len(indexes)), list(indexes))


def product(isa: Isa, fmt: ExpertFormat, precision: Precision, tokens: int) -> Any:
    @cfunc(PRODUCT, **NOPYTHON)
    def function(weights, n_blocks, records, out):  # type: ignore[no-untyped-def]
        emit_product(isa, fmt, precision, tokens, weights, n_blocks, records, out)

    return function


def spelled_out_kernels(isa: Isa, fmt: ExpertFormat, precision: Precision) -> Kernels:
    """The kernels of `isa`; call it with `offload.kernels.product.Emitter` replaced by SpelledOut."""
    plain = kernels("portable", fmt, precision)
    inputs, swiglu = encoders(isa, fmt, precision)  # plain LLVM
    products = {tokens: product(isa, fmt, precision, tokens) for tokens in TOKENS}
    return Kernels(
        layout=layout(isa, fmt, precision),
        products=tuple(products[n].address if n in products else 0 for n in range(1, MAX_TOKENS + 1)),
        encode_inputs=inputs.address,
        encode_swiglu=swiglu.address,
        layer=plain.layer,
        many=None,
        code=(*plain.code, inputs, swiglu, *products.values()),
    )
