"""The quick interpreter of these tests is Triton's: the same numbers, the same refusals."""

import operator

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from quick_interpreter import ORIGINALS, quick_interpreter
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled")

LIMITS = torch.iinfo(torch.int32)


@triton.jit
def _binary(left, right, result, operation: tl.constexpr, size: tl.constexpr):
    index = tl.arange(0, size)
    a, b = tl.load(left + index), tl.load(right + index)
    if operation == "add":
        c = a + b
    elif operation == "sub":
        c = a - b
    else:
        c = a * b
    tl.store(result + index, c)


@triton.jit
def _shapes(left, right, result, rows: tl.constexpr, columns: tl.constexpr):
    i, j = tl.arange(0, rows), tl.arange(0, columns)
    a = tl.load(left + i)[:, None] * tl.trans(tl.load(right + j)[:, None])
    a = tl.reshape(a.to(tl.bfloat16), (columns, rows)).to(tl.float32)
    a += tl.sum(a, axis=0)[None, :] + a.numel + a.shape[0]
    tl.store(result + j[:, None] * rows + i[None, :], a)


def binary(operation, left, right, dtype=torch.int32):
    left, right = (torch.tensor([0, x], dtype=dtype) for x in (left, right))
    result = torch.empty_like(left)
    _binary[(1,)](left, right, result, operation, 2)
    return result.tolist()[1]


@pytest.mark.parametrize(
    ("operation", "left", "right"),
    [
        ("add", LIMITS.max, 1),
        ("add", LIMITS.min, -1),
        ("sub", LIMITS.min, 1),
        ("sub", 0, LIMITS.min),
        ("mul", 1 << 16, 1 << 15),
        ("mul", LIMITS.min, -1),
    ],
)
def test_overflow_is_refused(operation, left, right):
    with pytest.raises(
        InterpreterError, match=f"int32 overflow detected for operation {operation}"
    ):
        binary(operation, left, right)
    exact = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}[operation](left, right)
    assert binary(operation, left, right, torch.int64) == exact
    nearer = right - 1 if right > 0 else right + 1
    assert LIMITS.min <= binary(operation, left, nearer) <= LIMITS.max


def test_numbers_are_those_of_triton(monkeypatch):
    left, right, results = torch.randn(4), torch.randn(8), []
    for own in (True, False):
        result = torch.empty(8, 4)
        with monkeypatch.context() as patch:
            if own:
                for owner, name, value in ORIGINALS:
                    patch.setattr(owner, name, value)
            _shapes[(1,)](left, right, result, 4, 8)
        results.append(result)
    assert results[0].equal(results[1])
    exact = (left[:, None] * right).reshape(8, 4)
    # The interpreter cuts bfloat16 off where a GPU rounds: one unit of it for each of nine numbers.
    bound = 9 * 2**-7 * exact.abs().max()
    torch.testing.assert_close(results[0], exact + exact.sum(0) + 32 + 8, rtol=0, atol=bound)


def test_bfloat16_is_that_of_triton():
    """Of every bfloat16 but those too small for an exponent, and of what lies between two."""
    bits = np.arange(2**16, dtype=np.uint16)
    bits = bits[(bits & 0x7F80 > 0) | (bits & 0x7F == 0)].reshape(2, -1)
    (theirs,) = (f for _, name, f in ORIGINALS if name == "_convert_float")
    with quick_interpreter():
        ours = interpreter._convert_float
    wide = ours(bits, tl.bfloat16, tl.float32, None)
    assert np.array_equal(wide, theirs(bits, tl.bfloat16, tl.float32, None))
    between = (wide | np.where(bits & 0x7F80, 0xBEEF, 0)).astype(np.uint32).view(np.float32)
    for numbers in (between, between[:, ::2]):
        narrow = ours(numbers, tl.float32, tl.bfloat16, None)
        assert np.array_equal(narrow, theirs(numbers, tl.float32, tl.bfloat16, None))
