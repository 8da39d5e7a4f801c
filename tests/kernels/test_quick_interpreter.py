"""The quick interpreter of these tests is Triton's: the same numbers, the same refusals."""

import operator

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from quick_interpreter import ORIGINALS, quick_interpreter
from quick_operations import arithmetic, quickly
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


@triton.jit
def _all_floats(left, right, result):
    index = tl.arange(0, 16)
    i = tl.program_id(0)
    kept = (i < 1) & (index < 13)
    a, b = tl.load(left + index), tl.load(right + index, mask=index < 13, other=-1.5)
    c, d = tl.load(right + index, mask=kept, other=0.0), tl.load(left + index, mask=kept)
    square, rest = tl.reshape(a, (4, 4)), tl.reshape(b, (4, 4))
    total = tl.sum(square, axis=1)[:, None] + tl.sum(rest, axis=0, keep_dims=True)
    product = tl.dot(square, tl.trans(rest), input_precision="ieee")
    product = tl.dot(square.to(tl.float16), rest.to(tl.float16), product)
    bits = a.to(tl.uint32, bitcast=True)
    bits = ((bits >> 16) & 1) + (bits & 0xFFFF)
    rows = (a + b, a - b, a * b, a / b, 2.0 * a, a * -0.0, 1 - a, 1 / b, a + i, b * index)
    rows += (tl.maximum(a, b), tl.minimum(a, 0.25), tl.exp(a), tl.exp2(b), tl.log(a), tl.log2(b))
    rows += (a.to(tl.bfloat16).to(tl.float32) + b, a.to(tl.float16) * 2, a.to(tl.float16) - b)
    rows += (tl.where(a > b, a, -3), tl.where(a <= 0, b, float("nan")), tl.where(kept, 1.0, b))
    rows += (c, d, tl.where((a == b) | (a != a), a, b), tl.where((a >= 0) & (b < a), a, -0.0))
    rows += (tl.reshape(total, (16,)), tl.reshape(product, (16,)), bits, b.to(tl.float32))
    rows += (tl.zeros((16,), dtype=tl.float32) - a, tl.full((16,), -0.0, tl.float32) + b, -a)
    for row in rows:
        tl.store(result + index, row, mask=index < 15)
        tl.store(result + 15, tl.sum(row.to(tl.float32)))
        result += 16


@triton.jit
def _all_numbers(left, right, result):
    index = tl.arange(0, 16)
    i = tl.program_id(0) + 3
    a, b = tl.load(left + index), tl.load(right + index)
    rows = (a + b, a - b, a * b, a // b, a % b, a & b, a | b, a << 2, a >> 1, 7 * a, a - 1, 1 - b)
    rows += (a // 3, a % 3, a + i, i * 5 - 2, i // 2, tl.maximum(a, b), tl.minimum(a, -2))
    rows += ((a < b).to(tl.int32), (a >= 2) & (b != 1), (a.to(tl.int64) * 2**20 + b) > i)
    for row in rows:
        tl.store(result + index, row)
        result += 16


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


def in_both_ways(monkeypatch, run):
    """What a function returns with the quick interpreter, and with Triton's own."""
    ours = run()
    with monkeypatch.context() as patch:
        for owner, name, value in ORIGINALS:
            patch.setattr(owner, name, value)
        return ours, run()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_every_operation_is_that_of_triton(monkeypatch):
    """Of numbers that the first call, which is compared by itself, has not seen."""
    torch.manual_seed(0)
    plain = torch.rand(2, 16) + 0.5
    unusual = torch.tensor([0.0, -0.0, 1.0, -2.5, 1e-30, float("inf"), -float("inf"), float("nan")])
    unusual = torch.stack([unusual.repeat(2), unusual.repeat_interleave(2)])
    for numbers in (plain, unusual, torch.randn(2, 16) * 20):

        def run(numbers=numbers):
            result = torch.full((40, 16), 7.0)
            _all_floats[(1,)](*numbers, result)
            return result.view(torch.int32)

        ours, theirs = in_both_ways(monkeypatch, run)
        assert ours.equal(theirs), (ours != theirs).nonzero()
    for low, high in ((1, 9), (-50, 50)):
        numbers = torch.randint(low, high, (2, 16), dtype=torch.int32)
        numbers[1] += numbers[1] == 0

        def run(numbers=numbers):
            result = torch.full((30, 16), 7, dtype=torch.int32)
            _all_numbers[(1,)](*numbers, result)
            return result

        ours, theirs = in_both_ways(monkeypatch, run)
        assert ours.equal(theirs), (ours != theirs).nonzero()


def test_a_first_call_is_compared_with_tritons():
    numbers = np.array([1, 2], dtype=np.float32)
    handle = interpreter.TensorHandle(numbers, tl.float32)
    x = tl.tensor(handle, tl.block_type(tl.float32, [2]))
    (sub,) = (f for _, name, f in ORIGINALS if name == "__sub__")
    with pytest.raises(AssertionError, match=r"\[2. 4.\] quickly, \[0. 0.\] by Triton"):
        quickly(sub, arithmetic(np.add))(x, x)


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
