"""Triton's interpreter without what it does over and over: less than a quarter of its time.

The same checks, the same numbers (test_quick_interpreter.py). What it repeats, and here does not:

- It goes through every function of `triton.language` at each launch and at each call of a jitted
  helper, to replace what another one has replaced already.
- It finds out at each `a + b` what types these are of (quick_operations.py).
- It asks in nine steps of its own language whether a sum of whole numbers overflows: NumPy says so
  in one, as exactly.
- It describes the shape of each value anew, and writes NumPy's types down at each look at them.
- It takes numbers apart into sign, exponent and digits to make bfloat16 of float32 and back, which
  are the upper half of its bits. (What is too small for an exponent it gets wrong; here it is not.)
"""

import contextlib
import functools
import math

import numpy as np
import pytest
import triton.language as tl
from quick_language import operations
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

# What is replaced, as Triton has it.
ORIGINALS = [
    (owner, name, getattr(owner, name))
    for owner, name in (
        (interpreter, "_patch_lang"),
        (interpreter, "_get_np_dtype"),
        (interpreter, "_convert_float"),
        (TritonSemantic, "binary_op_sanitize_overflow_impl"),
        (tl.block_type, "__init__"),
        (tl.tensor, "__init__"),
        (TritonSemantic, "to_tensor"),
    )
]
_QUICK = list(operations())
ORIGINALS += [(owner, name, getattr(owner, name)) for owner, name, _ in _QUICK]


@contextlib.contextmanager
def quick_interpreter():
    """The interpreter is quick within."""
    with pytest.MonkeyPatch.context() as patch, _prepare_once():
        _describe_shapes_once(patch)
        patch.setattr(interpreter, "_get_np_dtype", _numpy_type)
        patch.setattr(interpreter, "_convert_float", _convert)
        patch.setattr(TritonSemantic, "binary_op_sanitize_overflow_impl", _refuse_overflow)
        patch.setattr(TritonSemantic, "to_tensor", _to_tensor)
        for owner, name, quick in _QUICK:
            patch.setattr(owner, name, quick)
        yield


@contextlib.contextmanager
def _prepare_once():
    """Within, what a launch replaces stays replaced."""
    prepare, nothing, scopes = interpreter._patch_lang, interpreter._LangPatchScope(), {}

    def prepare_once(function):
        module = function.__globals__["__name__"]
        if module not in scopes:
            scopes[module] = prepare(function)
        return nothing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", prepare_once)
        yield
    for scope in reversed(scopes.values()):
        scope.restore()


def _describe_shapes_once(patch):
    define_block = tl.block_type.__init__

    @functools.cache
    def block_of(*sizes):
        block = tl.block_type.__new__(tl.block_type)
        define_block(block, tl.int32, [*sizes])
        return block.shape, block.numel, str(block.shape)

    def make_block(self, element_type, shape):
        sizes = [size.value if isinstance(size, tl.constexpr) else size for size in shape]
        self.element_ty = element_type
        self.shape, self.numel, text = block_of(*sizes)
        self.name = f"<{text}, {element_type}>"

    @functools.cache
    def shape_of(*sizes):
        shape = tl.core.tuple([tl.constexpr(size) for size in sizes])
        return tl.constexpr(math.prod(sizes)), shape

    def make_tensor(self, handle, kind):
        self.handle, self.type, self.dtype = handle, kind, kind.scalar
        self.numel, self.shape = shape_of(*(kind.shape if kind.is_block() else ()))

    patch.setattr(tl.block_type, "__init__", make_block)
    patch.setattr(tl.tensor, "__init__", make_tensor)


_scalar_type = functools.cache(interpreter._get_np_dtype)


def _numpy_type(kind):
    if isinstance(kind, tl.block_type):
        kind = kind.element_ty
    return np.dtype(np.uint64) if isinstance(kind, tl.pointer_type) else _scalar_type(kind)


_take_apart = interpreter._convert_float


def _convert(numbers, kind, wanted, rounding):
    if (kind, wanted, rounding) == (tl.bfloat16, tl.float32, None):
        return numbers.view(np.uint16).astype(np.uint32) << 16
    if (kind, wanted, rounding) == (tl.float32, tl.bfloat16, None):
        return (np.ascontiguousarray(numbers).view(np.uint32) >> 16).astype(np.uint16)
    return _take_apart(numbers, kind, wanted, rounding)


_make_tensor = TritonSemantic.to_tensor


def _to_tensor(self, x, check_type=True):
    return x if type(x) is tl.tensor else _make_tensor(self, x, check_type)


_EXACTLY = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def _refuse_overflow(self, left, right, operation):
    kind, name = left.type.scalar, operation.__name__
    if kind.int_bitwidth >= 64:
        return
    exact = _EXACTLY[name](left.handle.data, right.handle.data, dtype=np.int64)
    if exact.min() < kind.get_int_min_value() or exact.max() > kind.get_int_max_value():
        raise OverflowError(f"int{kind.int_bitwidth} overflow detected for operation {name}")
