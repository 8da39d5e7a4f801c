"""`triton.language` by operations that are one call of NumPy each: quick_operations.py.

What is called with options that no kernel here uses goes Triton's way.
"""

import contextlib

import numpy as np
import quick_operations as quick
import triton.language as tl
from quick_operations import TENSOR, quickly
from triton.runtime import interpreter


def _whole_quotient(a, b):
    return (a - np.fmod(a, b)) // b


def _swapped(operation):
    return lambda self, other, _semantic=None: operation(other, self)


def _member(name, plan):
    return quickly(getattr(TENSOR, name), plan)


def _load_quickly():
    original, run = tl.load, quickly(tl.load, quick.loading)

    def load(pointer, mask=None, other=None, _semantic=None, **options):
        if options:
            return original(pointer, mask, other, _semantic=quick.SEMANTIC, **options)
        return run(pointer, mask, other)

    return load


def _store_quickly():
    original, plans = tl.store, {}

    def first(key, pointer, value, mask):
        original(pointer, value, mask, _semantic=quick.SEMANTIC)
        plans[key] = None
        kind, shape = pointer.dtype.element_ty, pointer.handle.data.shape
        quick.require(kind != tl.int1 and (mask is None or quick.is_of(mask, "int1")))
        quick.require(quick.is_as_ever(value) and quick.is_as_ever(mask))
        read, everything = quick.reader(value, kind), quick.filled(shape, np.dtype(bool), True)

        def compute(value, mask):
            mask = everything if mask is None else quick.spread(mask.handle.data, shape)
            return quick.spread(read(value), shape), mask

        data, mask = compute(value, mask)
        stored = interpreter._interpreter.load(pointer.handle.data, mask, data, data.dtype)
        if stored.tobytes() != data.tobytes():
            raise AssertionError(f"store: {data} quickly, {stored} by Triton")
        plans[key] = compute

    def store(pointer, value, mask=None, _semantic=None, **options):
        if type(mask) is quick.CONSTANT:
            mask = mask.value
        if options or type(value) is not TENSOR or type(mask) not in (type(None), TENSOR):
            return original(pointer, value, mask, _semantic=quick.SEMANTIC, **options)
        key = quick.type_of(pointer), quick.type_of(value), quick.type_of(mask)
        if key not in plans:
            with contextlib.suppress(quick.NotQuickError):
                first(key, pointer, value, mask)
        elif plans[key] is None:
            original(pointer, value, mask, _semantic=quick.SEMANTIC)
        else:
            interpreter._interpreter.store(pointer.handle.data, *plans[key](value, mask))

    return store


def _dot_quickly():
    original = tl.dot

    def whole(a, b, to, precision):
        return original(a, b, to, input_precision=precision, _semantic=quick.SEMANTIC)

    run = quickly(whole, quick.product)

    def dot(input, other, acc=None, input_precision=None, _semantic=None, **options):
        if options:
            options |= {"input_precision": input_precision, "_semantic": quick.SEMANTIC}
            return original(input, other, acc, **options)
        return run(input, other, acc, input_precision)

    return dot


def _to_quickly():
    original, run = TENSOR.to, quickly(TENSOR.to, quick.cast, dynamic=1)

    def bits_of(x, dtype):
        return original(x, dtype, bitcast=True, _semantic=quick.SEMANTIC)

    by_bits = quickly(bits_of, quick.bits, dynamic=1)

    def to(self, dtype, *rest, _semantic=None, **options):
        if type(dtype) is quick.CONSTANT:
            dtype = dtype.value
        if options == {"bitcast": True} and not rest:
            return by_bits(self, dtype)
        if rest or options:
            return original(self, dtype, *rest, _semantic=quick.SEMANTIC, **options)
        return self if self.dtype is dtype else run(self, dtype)

    return to


def _index_quickly():
    original, everything = TENSOR.__getitem__, slice(None)

    def axes(x, *new):
        index = tuple(None if is_new else everything for is_new in new)
        return original(x, index, _semantic=quick.SEMANTIC)

    run = quickly(axes, quick.reshaped, dynamic=1)

    def getitem(self, index, _semantic=None):
        if type(index) is not tuple or any(i is not None and i != everything for i in index):
            return original(self, index, _semantic=quick.SEMANTIC)
        return run(self, *[i is None for i in index])

    return getitem


def _filled_quickly():
    zeros = quickly(tl.zeros, quick.full_of, dynamic=0)
    original = tl.full
    full = quickly(
        lambda shape, kind, number: original(shape, number, kind, _semantic=quick.SEMANTIC),
        quick.full_of,
        dynamic=0,
    )

    def sizes(shape):
        return tuple([x.value if type(x) is quick.CONSTANT else x for x in shape])

    def filled_with(shape, value, dtype, _semantic=None):
        if type(value) is TENSOR:
            return original(shape, value, dtype, _semantic=quick.SEMANTIC)
        return full(sizes(shape), dtype, value)

    return lambda shape, dtype: zeros(sizes(shape), dtype), filled_with


def _sum_quickly():
    original, run = tl.sum, quickly(tl.sum, quick.total, dynamic=1)

    def sum_of(input, axis=None, keep_dims=False, dtype=None):
        if dtype is not None:
            return original(input, axis, keep_dims, dtype)
        return run(input, axis, keep_dims)

    return sum_of


def _transpose_quickly():
    original, run = tl.trans, quickly(tl.trans, quick.transposed)

    def trans(input, *dims, _semantic=None):
        return original(input, *dims, _semantic=quick.SEMANTIC) if dims else run(input)

    return trans


def operations():
    """What takes the place of Triton's own: owner, name, function. To be called before a launch."""
    add = quickly(tl.add, quick.addition)
    sub = quickly(tl.sub, quick.arithmetic(np.subtract))
    mul = quickly(tl.mul, quick.arithmetic(np.multiply))
    yield from [
        (TENSOR, "__add__", add),
        (TENSOR, "__radd__", _swapped(add)),
        (TENSOR, "__sub__", sub),
        (TENSOR, "__rsub__", _swapped(sub)),
        (TENSOR, "__mul__", mul),
        (TENSOR, "__rmul__", _swapped(mul)),
        (TENSOR, "__truediv__", _member("__truediv__", quick.arithmetic(np.divide))),
        (TENSOR, "__floordiv__", _member("__floordiv__", quick.arithmetic(_whole_quotient))),
        (TENSOR, "__mod__", _member("__mod__", quick.arithmetic(np.fmod))),
        (TENSOR, "__and__", _member("__and__", quick.logic(np.bitwise_and))),
        (TENSOR, "__or__", _member("__or__", quick.logic(np.bitwise_or))),
        (TENSOR, "__lshift__", _member("__lshift__", quick.arithmetic(np.left_shift))),
        (TENSOR, "__rshift__", _member("__rshift__", quick.arithmetic(np.right_shift))),
        (TENSOR, "__lt__", _member("__lt__", quick.comparison(np.less))),
        (TENSOR, "__le__", _member("__le__", quick.comparison(np.less_equal))),
        (TENSOR, "__gt__", _member("__gt__", quick.comparison(np.greater))),
        (TENSOR, "__ge__", _member("__ge__", quick.comparison(np.greater_equal))),
        (TENSOR, "__eq__", _member("__eq__", quick.comparison(np.equal))),
        (TENSOR, "__ne__", _member("__ne__", quick.comparison(np.not_equal))),
        (TENSOR, "__getitem__", _index_quickly()),
        (TENSOR, "to", _to_quickly()),
        (tl, "maximum", quickly(tl.maximum, quick.arithmetic(np.maximum))),
        (tl, "minimum", quickly(tl.minimum, quick.arithmetic(np.minimum))),
        (tl, "exp", quickly(tl.exp, quick.elementwise(np.exp))),
        (tl, "exp2", quickly(tl.exp2, quick.elementwise(np.exp2))),
        (tl, "log", quickly(tl.log, quick.elementwise(np.log))),
        (tl, "log2", quickly(tl.log2, quick.elementwise(np.log2))),
        (tl, "where", quickly(tl.where, quick.choice)),
        (tl, "load", _load_quickly()),
        (tl, "store", _store_quickly()),
        (tl, "dot", _dot_quickly()),
        (tl, "sum", _sum_quickly()),
        (tl, "trans", _transpose_quickly()),
        (tl, "arange", quickly(tl.arange, quick.range_of, dynamic=0)),
    ]
    zeros, full = _filled_quickly()
    yield from [(tl, "zeros", zeros), (tl, "full", full)]
