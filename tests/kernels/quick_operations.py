"""Operations of Triton's interpreter as one call of NumPy each.

Triton's way to `a + b` goes through a dozen functions, which find out what types `a` and `b` are of
and bring both to one type and shape; NumPy's own work is a twentieth of it. Here, what they find is
kept for each pair of types. The first call with two types is Triton's own; the quick way must come
to the same, bit for bit. What is not listed here, and what fails (an overflow), goes Triton's way.
"""

import functools
import math

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

TENSOR, CONSTANT = tl.tensor, tl.constexpr
SEMANTIC = interpreter.interpreter_semantic
# Types between which Triton's interpreter converts by `astype`, and by its own `_convert_float`.
_AS_TYPE = {
    ("int1", "int32"),
    ("int32", "int64"),
    ("int32", "fp32"),
    ("int64", "fp32"),
    ("fp16", "fp32"),
    ("fp32", "fp16"),
    ("fp32", "fp64"),
}
_BY_BITS = {("bf16", "fp32"), ("fp32", "bf16")}


class NotQuickError(Exception):
    """Only Triton's own way does this."""


class _Maker:
    """Makes tensors that look like the one that Triton made."""

    def __init__(self, tensor):
        self.kind = tensor.handle.dtype
        self.look = {k: v for k, v in tensor.__dict__.items() if k != "handle"}

    def __call__(self, data):
        handle = object.__new__(interpreter.TensorHandle)
        handle.data, handle.dtype, handle.attr = data, self.kind, {}
        tensor = object.__new__(TENSOR)
        tensor.__dict__.update(self.look)
        tensor.handle = handle
        return tensor


def type_of(x):
    """What Triton goes by, and NumPy."""
    if type(x) is TENSOR:
        return x.type.name, x.handle.data.dtype.num
    if x is None:
        return None
    if type(x) is int and -(2**31) <= x < 2**31:
        return int
    if type(x) is float and (x == 0 or not math.isfinite(x) or 2**-126 <= abs(x) < 2**127):
        return float
    raise NotQuickError


def quickly(original, plan, dynamic=3):
    """An operation that goes Triton's way once for each combination of types.

    Args:
        original: Triton's own function.
        plan: of the result that this gave for some arguments, and of these, the function that
            computes the data quickly. Both raise NotQuickError for what Triton alone shall do.
        dynamic: how many arguments are values; those behind are part of what is computed.
    """
    plans = {}
    by_triton = original
    if tl.core.is_builtin(original):
        by_triton = functools.partial(original, _semantic=SEMANTIC)

    def first(key, *args):
        result = by_triton(*args)
        plans[key] = None
        try:
            require(all(is_as_ever(x) for x in args[:dynamic]))
            compute = plan(result, *args)
            ours, theirs = compute(*args), result.handle.data
        except NotQuickError:
            return result
        if result.dtype == tl.int1:
            theirs = theirs.astype(bool)  # Triton has some in as many bits as what was compared
        if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape) or (
            ours.tobytes() != theirs.tobytes()
        ):
            raise AssertionError(f"{original}: {ours} quickly, {theirs} by Triton")
        make = _Maker(result)
        plans[key] = make, compute
        return make(ours)

    def run(*args, _semantic=None, **options):
        if options:
            return by_triton(*args, **options)
        args = [x.value if type(x) is CONSTANT else x for x in args]
        try:
            key = (*[type_of(x) for x in args[:dynamic]], *args[dynamic:])
            if key not in plans:
                return first(key, *args)
            if plans[key] is None:
                return by_triton(*args)
            make, compute = plans[key]
            return make(compute(*args))
        except NotQuickError:
            return by_triton(*args)

    return run


def require(condition):
    if not condition:
        raise NotQuickError


def is_as_ever(x):
    """Triton's interpreter has some truth values as whole numbers."""
    return type(x) is not TENSOR or x.handle.data.dtype == interpreter._get_np_dtype(x.type)


def is_of(x, *kinds):
    return type(x) is TENSOR and x.dtype.name in kinds


def _unsigned(kind, x):
    require(x >= 0)  # Triton refuses it otherwise
    return kind(x)


def reader(example, kind):
    """Of arguments like this one, the data as they are in a type of Triton's."""
    wanted = interpreter._get_np_dtype(kind)
    if type(example) is not TENSOR:
        if kind == tl.uint32:
            return functools.partial(_unsigned, wanted.type)
        require(kind.name in ("fp32", "fp64", "int32", "int64"))
        return lambda x: wanted.type(x or 0)  # Triton has one zero, without a sign
    source = example.dtype
    if source == kind:
        return lambda x: x.handle.data
    names = source.name, kind.name
    if names in _BY_BITS:
        return lambda x: interpreter._convert_float(x.handle.data, source, kind, None).view(wanted)
    require(names in _AS_TYPE)
    return lambda x: x.handle.data.astype(wanted)


_MAY_OVERFLOW = (np.add, np.subtract, np.multiply)


def arithmetic(function):
    """Of two arguments that are brought to the type of the result."""

    def plan(result, a, b):
        require(is_of(result, "fp16", "fp32", "fp64", "int32", "int64", "uint32"))
        left, right = reader(a, result.dtype), reader(b, result.dtype)
        if not is_of(result, "int32", "uint32") or function not in _MAY_OVERFLOW:
            return lambda a, b: function(left(a), right(b))
        kind = interpreter._get_np_dtype(result.dtype)

        def compute(a, b):
            exact = function(left(a), right(b), dtype=np.int64)
            data = exact.astype(kind)
            require((data == exact).all())  # Triton refuses it otherwise
            return data

        return compute

    return plan


def addition(result, a, b):
    """Of a pointer and a whole number, or of numbers."""
    if not result.dtype.is_ptr():
        return arithmetic(np.add)(result, a, b)
    require(type(a) is TENSOR and a.dtype.is_ptr() and is_of(b, "int32", "int64"))
    size = np.uint64(max(1, result.dtype.element_ty.primitive_bitwidth // 8))
    return lambda a, b: a.handle.data + size * b.handle.data.astype(np.uint64)


def comparison(function):
    def plan(result, a, b):
        other = SEMANTIC.to_tensor(b).dtype
        require(not a.dtype.is_ptr() and not other.is_ptr())
        kind = SEMANTIC.computation_type_impl(a.dtype, False, other, False, False)
        require(kind.name in ("fp32", "fp64", "int32", "int64"))
        left, right = reader(a, kind), reader(b, kind)
        return lambda a, b: function(left(a), right(b))

    return plan


def logic(function):
    """Of truth values, or of the bits of whole numbers."""

    def plan(result, a, b):
        if result.dtype != tl.int1:
            return arithmetic(function)(result, a, b)
        require(is_of(a, "int1") and is_of(b, "int1"))
        return lambda a, b: function(a.handle.data, b.handle.data)

    return plan


def elementwise(function):
    def plan(result, x):
        require(is_of(x, "fp32"))
        return lambda x: function(x.handle.data)

    return plan


def choice(result, condition, a, b):
    require(is_of(condition, "int1") and not result.dtype.is_ptr())
    left, right = reader(a, result.dtype), reader(b, result.dtype)
    return lambda condition, a, b: np.where(condition.handle.data, left(a), right(b))


def cast(result, x, kind):
    require(type(x) is TENSOR and x.dtype != kind)
    read = reader(x, kind)
    return lambda x, _: read(x)


def bits(result, x, kind):
    require(kind.name in ("fp32", "int32", "uint32") and is_of(x, "fp32", "int32", "uint32"))
    wanted = interpreter._get_np_dtype(kind)
    return lambda x, _: x.handle.data.view(wanted)


@functools.cache
def filled(shape, kind, number):
    data = np.full(shape, number, kind)
    data.flags.writeable = False
    return data


def spread(data, shape):
    return data if data.shape == shape else np.broadcast_to(data, shape)


def loading(result, pointer, mask, other):
    kind, shape = pointer.dtype.element_ty, pointer.handle.data.shape
    require(kind != tl.int1 and result.handle.data.shape == shape)
    require(mask is None or is_of(mask, "int1"))
    wanted, load = interpreter._get_np_dtype(kind), interpreter._interpreter.load
    everything, nothing = filled(shape, np.dtype(bool), True), filled(shape, wanted, 0)
    read = reader(other, kind) if type(other) is TENSOR or kind == tl.float32 else None

    def compute(pointer, mask, other):
        mask = everything if mask is None else spread(mask.handle.data, shape)
        if other is None or (type(other) is not TENSOR and other == 0):
            return load(pointer.handle.data, mask, nothing, wanted)
        require(read)
        return load(pointer.handle.data, mask, spread(read(other), shape), wanted)

    return compute


def product(result, a, b, to, *_):
    kind = result.dtype
    require(kind == tl.float32 and is_of(a, "fp16", "fp32") and a.dtype == b.dtype)
    zero = filled(result.handle.data.shape, np.dtype(np.float32), 0)

    def compute(a, b, to, *_):
        product = np.matmul(a.handle.data, b.handle.data, dtype=np.float32)
        return product + (zero if to is None else to.handle.data)

    return compute


def total(result, x, axis, keep):
    require(is_of(x, "fp32") and axis is not None and result.type.is_block())
    return lambda x, *_: np.sum(x.handle.data, axis=axis, keepdims=keep)


def transposed(result, x):
    require(len(x.type.shape) == 2)
    return lambda x: np.transpose(x.handle.data, (1, 0))


def reshaped(result, x, *_):
    require(x.type.is_block())
    shape = result.handle.data.shape
    return lambda x, *_: x.handle.data.reshape(shape)


def full_of(result, shape, kind, number=0):
    data = filled(result.handle.data.shape, result.handle.data.dtype, number or 0)
    return lambda *_: data


def range_of(result, start, end):
    data = np.arange(start, end, dtype=np.int32)
    data.flags.writeable = False
    return lambda *_: data
