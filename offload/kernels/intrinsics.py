"""Single instructions and calls that nopython code cannot say: memory by address, atomics, futex, calls by address.

Every function takes addresses as int64; nothing here knows what lies at them. Scalars by address rather than array
views, because a view costs the compiler half a second each and every start of a new version pays it. Used by all
other kernel files.
"""

# mypy: disallow-untyped-defs=False

import platform

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_RELAX = {"x86_64": "llvm.x86.sse2.pause", "AMD64": "llvm.x86.sse2.pause"}.get(platform.machine())


def _load(kind, lowered):
    """An intrinsic that reads one value at an address, aligned or not."""

    @intrinsic
    def load(typingctx, address):
        def codegen(context, builder, signature, args):
            value = builder.load(builder.inttoptr(args[0], ir.PointerType(lowered)))
            value.align = 1
            return value

        return kind(types.int64), codegen

    return load


def _store(kind, lowered):
    """An intrinsic that writes one value at an address, aligned or not."""

    @intrinsic
    def store(typingctx, address, value):
        def codegen(context, builder, signature, args):
            builder.store(args[1], builder.inttoptr(args[0], ir.PointerType(lowered))).align = 1
            return context.get_dummy_value()

        return types.void(types.int64, kind), codegen

    return store


load_u8, load_u16 = _load(types.uint8, I8), _load(types.uint16, I16)
load_i8, load_i16 = _load(types.int8, I8), _load(types.int16, I16)
load_i32, load_i64, load_f32 = _load(types.int32, I32), _load(types.int64, I64), _load(types.float32, F32)
store_i64, store_f32 = _store(types.int64, I64), _store(types.float32, F32)


@intrinsic
def atomic_load(typingctx, address):
    def codegen(context, builder, signature, args):
        return builder.load_atomic(builder.inttoptr(args[0], ir.PointerType(I64)), "seq_cst", 8)

    return types.int64(types.int64), codegen


@intrinsic
def atomic_store(typingctx, address, value):
    def codegen(context, builder, signature, args):
        builder.store_atomic(args[1], builder.inttoptr(args[0], ir.PointerType(I64)), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def atomic_add(typingctx, address, amount):
    """Add and return the value before."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", builder.inttoptr(args[0], ir.PointerType(I64)), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def relax(typingctx):
    """Tell the core that this is a spin loop (`pause`), where there is such an instruction."""

    def codegen(context, builder, signature, args):
        if _RELAX is not None:
            builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), []), _RELAX), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def system_call(typingctx, number, first, second, third, fourth):
    """libc's `syscall` with four arguments and two zeros; the thread holds no interpreter lock meanwhile."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(I64, [I64], var_arg=True)
        function = cgutils.get_or_insert_function(builder.module, kind, "syscall")
        return builder.call(function, [*args, *[ir.Constant(I64, 0)] * 2])

    return types.int64(*[types.int64] * 5), codegen


@intrinsic
def sleep_microseconds(typingctx, duration):
    def codegen(context, builder, signature, args):
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(I32, [I32]), "usleep")
        builder.call(function, [builder.trunc(args[0], I32)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


def _call(n_args, returns):
    """An intrinsic that calls a C function of `n_args` int64 at an address."""
    result, lowered = (types.int64, I64) if returns else (types.void, ir.VoidType())

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(lowered, [I64] * n_args)
        value = builder.call(builder.inttoptr(args[0], ir.PointerType(kind)), args[1:])
        return value if returns else context.get_dummy_value()

    return result(*[types.int64] * (n_args + 1)), codegen


@intrinsic
def call_job(typingctx, function, pool, argument, worker):
    """status = function(pool, argument, worker)"""
    return _call(3, returns=True)


@intrinsic
def call_encode(typingctx, function, values, record):
    """table.ENCODE"""
    return _call(2, returns=False)


@intrinsic
def call_product(typingctx, function, weights, n_blocks, records, out):
    """table.PRODUCT"""
    return _call(4, returns=False)


@intrinsic
def call_unpack(typingctx, function, weights, n_blocks, panel):
    """table.UNPACK"""
    return _call(3, returns=False)


@intrinsic
def call_multiply(typingctx, function, panel, steps, tokens, stride, n, out):
    """table.MULTIPLY"""
    return _call(6, returns=False)


def record_at(kind):
    """An intrinsic that takes an address for a record of this numba type."""

    @intrinsic
    def record(typingctx, address):
        def codegen(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(kind))

        return kind(types.int64), codegen

    return record


NOPYTHON = {"nogil": True, "error_model": "numpy", "_nrt": False}  # no exceptions, no reference counts: less code
