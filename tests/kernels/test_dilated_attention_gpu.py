"""Dilated attention on a GPU, at sizes that are used: part of `make gpu`, as test_gpu.py."""

import pytest
import torch
from test_gpu import (
    DEVICE,
    HAS_GPU,
    IS_TINY,
    LIMITS,
    Random,
    boundaries,
    gpu_only,
    pytestmark,  # noqa: F401
    relative,
)

from zoo.kernels.dilated_attention import Held, branches_of, dilated_attention

LENGTHS, RATES = [2048, 4096, 8192, 16384], [1, 2, 4, 8]
if IS_TINY:
    LENGTHS = [w // 128 for w in LENGTHS]


def inputs(tokens, heads, key_dim, dtype, batch=1, documents=None, decay=False):
    """(leaves by name, keywords of a call)."""
    random = Random()
    tokens = min(tokens, 70) if IS_TINY else tokens
    shape = batch, tokens, heads, key_dim
    leaves = {name: random(*shape, dtype=dtype) for name in "qkv"}
    keyword = {"segment_lengths": LENGTHS, "dilation_rates": RATES}
    if decay:
        keyword["log_decay"] = torch.linspace(-0.0024, 0, key_dim, device=DEVICE)
    if documents is not None:
        last = branches_of(LENGTHS, RATES)[-1]
        slots = documents, heads, last.first + last.count, key_dim
        leaves |= {name: random(*slots, dtype=dtype) for name in ("keys", "values")}
        keyword["count"] = torch.arange(documents, device=DEVICE) * 997
    return leaves, keyword


def call(leaves, keyword, backend):
    keyword = dict(keyword)
    leaves = dict(leaves)
    if "keys" in leaves:
        keyword["held"] = Held(leaves.pop("keys"), leaves.pop("values"), keyword.pop("count"))
    return dilated_attention(**leaves, **keyword, backend=backend)


def results(leaves, keyword, backend):
    """The output and all gradients by name."""
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    o = call(leaves, keyword, backend)
    cotangent = Random(2)(*o.shape).to(o.dtype)
    grads = torch.autograd.grad(o, list(leaves.values()), cotangent)
    return {"o": o.detach()} | dict(zip(leaves, grads, strict=True))


def check(leaves, keyword, dtype, factor=1):
    got = results(leaves, keyword, "triton")
    exact = {name: x.double() for name, x in leaves.items()}
    expected = results(exact, keyword, "torch")
    errors = {name: relative(got[name], expected[name]) for name in expected}
    assert all(error < factor * LIMITS[dtype] for error in errors.values()), errors


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(("heads", "key_dim"), [(12, 64), (5, 48), (4, 128), (2, 256)])
@pytest.mark.parametrize("decay", [False, True], ids=["plain", "decay"])
def test_values_and_gradients(heads, key_dim, decay, dtype):
    leaves, keyword = inputs(
        10_007, heads, min(key_dim, 32 if IS_TINY else 256), dtype, decay=decay
    )
    check(leaves, keyword, dtype)


@pytest.mark.parametrize("weights", [False, True], ids=["constant weights", "weight gradient"])
@pytest.mark.parametrize("held", [False, True], ids=["fresh", "held"])
def test_packed_documents(held, weights):
    lengths = [0, 1, 5000, 0, 64, 2048, 2047, 1, 3000, 0]
    if IS_TINY:
        lengths = [0, 1, 30, 0, 16, 15, 1, 0, 7, 0]
    documents = len(lengths) if held else None
    leaves, keyword = inputs(sum(lengths), 4, 32, torch.float32, documents=documents)
    keyword |= {"cu_seqlens": boundaries(lengths), "weight_gradient": weights}
    check(leaves, keyword, torch.float32)


def test_twice_the_same():
    """To the bit: branches add up one after the other."""
    leaves, keyword = inputs(4099, 8, 64, torch.bfloat16, decay=True)
    first, second = (results(leaves, keyword, "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_compiles_whole():
    leaves, keyword = inputs(4099, 4, 64, torch.bfloat16, documents=1)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="inductor" if HAS_GPU else "aot_eager")
    def compiled(leaves):
        return call(leaves, keyword, "triton") * 2

    expected = results(leaves, keyword, "triton")
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    o = compiled(leaves)
    cotangent = Random(2)(*o.shape).to(o.dtype) / 2
    got = torch.autograd.grad(o, list(leaves.values()), cotangent)
    assert relative(o / 2, expected["o"]) < 1e-3
    for name, gradient in zip(leaves, got, strict=True):
        assert relative(gradient, expected[name]) < 1e-2


@gpu_only
@pytest.mark.parametrize("held", [False, True], ids=["fresh", "held"])
def test_the_host_never_waits(held):
    leaves, keyword = inputs(9000, 4, 64, torch.bfloat16, documents=3 if held else None)
    keyword["cu_seqlens"] = boundaries([1000, 0, 8000])
    results(leaves, keyword, "triton")  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(leaves, keyword, "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu_only
@pytest.mark.alone
def test_offsets_beyond_31_bits():
    """2.2e9 elements; the last segments have a reference of their own."""
    # Queries, keys and values of 4.5 GB each, the sums in float32, and what they are rounded to.
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB")
    tokens, tail = (1 << 20) + (1 << 14), 1 << 14
    random = Random()
    qkv = [random(1, tokens, 16, 128, dtype=torch.bfloat16) for _ in range(3)]
    assert qkv[0].numel() > 2**31
    branches = LENGTHS, RATES
    with torch.no_grad():
        o = dilated_attention(*qkv, *branches, backend="triton")
        few = [x[:, -tail:, :2].double() for x in qkv]
        expected = dilated_attention(*few, *branches, offsets="modulo", backend="torch")
        # In groups of heads the first has every branch's first offset, as it has one by one.
    assert relative(o[:, -tail:, :1], expected[:, :, :1]) < LIMITS[torch.bfloat16]


@gpu_only
@pytest.mark.alone
def test_peak_memory_is_linear_and_small():
    """Training on 131,072 tokens: nothing of quadratic size, no copies of branches."""
    leaves, keyword = inputs(131_072, 8, 64, torch.bfloat16)
    leaves = {name: x.requires_grad_() for name, x in leaves.items()}

    def step():
        o = call(leaves, keyword, "triton")
        return torch.autograd.grad(o, list(leaves.values()), torch.ones_like(o))

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    used = torch.cuda.max_memory_allocated() - before
    one = leaves["q"].numel() * 2
    # The output and its gradient, those of the branches (1 + 1/2 + ...), three sums of gradients in
    # float32 and what they are rounded to, and numbers per token and head.
    assert used < 16 * one
