"""Causal attention by PyTorch's flash kernel on a CPU: when, and that it is the same."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from zoo.kernels import windowed_attention as module
from zoo.kernels.windowed_attention import windowed_attention, windowed_attention_reference

# Documents of one token, none, and longer than the kernel's blocks of 32.
PACKED = torch.tensor([0, 1, 1, 38, 60])


@pytest.fixture
def calls(monkeypatch):
    """Arguments of the calls that take it."""
    calls, run = [], module.causal_attention
    monkeypatch.setattr(module, "causal_attention", lambda *args: calls.append(args) or run(*args))
    return calls


def inputs(dtype=torch.float64, rows=2, time=60, heads=4, groups=2):
    generator = torch.Generator().manual_seed(0)

    def random(heads):
        x = torch.randn(rows, time, heads, 8, generator=generator, dtype=torch.float64)
        return x.to(dtype)

    return random(heads), random(groups), random(groups)


def values_and_gradients(function, x, **keyword):
    x = [value.clone().requires_grad_() for value in x]
    o = function(*x, **keyword)
    cotangent = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(o.dtype)
    return [o, *torch.autograd.grad(o, x, cotangent)]


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("cu_seqlens", [None, PACKED], ids=["dense", "packed"])
@pytest.mark.parametrize("window", [None, 60, 100])
def test_equals_the_definition(calls, window, cu_seqlens, groups):
    x = inputs(rows=2 if cu_seqlens is None else 1, groups=groups)
    keyword = {"window": window, "cu_seqlens": cu_seqlens, "scale": 0.3}
    found = values_and_gradients(windowed_attention, x, **keyword)
    expected = values_and_gradients(windowed_attention_reference, x, **keyword)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_as_precise_as_blocks(calls, dtype):
    """Scores and sums in float32, one rounding. Its exp is a little less precise than PyTorch's."""
    x = inputs(dtype)
    exact = values_and_gradients(windowed_attention_reference, [y.double() for y in x])
    flash = values_and_gradients(windowed_attention, x)
    blocks = values_and_gradients(windowed_attention, x, block_length=32)
    assert len(calls) == 1
    for one, other, right in zip(flash, blocks, exact, strict=True):
        assert one.dtype == dtype
        error, allowed = ((y.double() - right).norm() / right.norm() for y in (one, other))
        assert error <= (2 if dtype == torch.float32 else 1.02) * allowed


def test_gradients_of_gradients(calls):
    def penalty(**keyword):
        x = [y.requires_grad_() for y in inputs()]
        o = windowed_attention(*x, **keyword)
        gradients = torch.autograd.grad(o.square().sum(), x, create_graph=True)
        return torch.autograd.grad(sum(y.square().sum() for y in gradients), x)

    for one, other in zip(penalty(), penalty(block_length=32), strict=True):
        torch.testing.assert_close(one, other)
    assert len(calls) == 1


def test_a_frozen_operand(calls):
    q, k, v = inputs()
    q.requires_grad_()
    for create_graph in (False, True):
        o = windowed_attention(q, k, v)
        (found,) = torch.autograd.grad(o.sum(), q, create_graph=create_graph)
        (expected,) = torch.autograd.grad(windowed_attention(q, k, v, block_length=32).sum(), q)
        torch.testing.assert_close(found, expected)


def test_autocast_does_not_round_scores(calls):
    x = [y.requires_grad_() for y in inputs(torch.float32)]
    expected = windowed_attention(*x)
    with torch.autocast("cpu", torch.bfloat16):
        found = windowed_attention(*x)
        torch.autograd.grad(found.sum(), x, create_graph=True)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "keyword",
    [
        {"window": 59},
        {"window": 36, "cu_seqlens": PACKED},
        {"first_key": torch.tensor([0, 3])},
        {"sink_logits": torch.zeros(4)},
        {"distance_bias": torch.zeros(4, 60)},
        {"log_decay": torch.zeros(8)},
    ],
    ids=lambda keyword: ", ".join(keyword),
)
def test_whatever_else_is_in_the_softmax_goes_by_blocks(calls, keyword):
    rows = 1 if "cu_seqlens" in keyword else 2
    windowed_attention(*inputs(torch.float32, rows=rows), **keyword)
    assert calls == []


def test_keys_before_the_queries_go_by_blocks(calls):
    q, k, v = inputs()
    windowed_attention(q[:, 10:], k, v)
    assert calls == []


def test_a_window_of_the_longest_document_sees_all_of_it(calls):
    x = inputs(rows=1)
    found = windowed_attention(*x, window=37, cu_seqlens=PACKED)
    assert len(calls) == 1
    expected = windowed_attention_reference(*x, cu_seqlens=PACKED)
    torch.testing.assert_close(found, expected)


def test_who_follows_operations_is_shown_those_that_all_know(calls):
    x = inputs(torch.float32, groups=4)
    with FlopCounterMode(display=False) as counter:
        windowed_attention(*x)
    assert counter.get_total_flops() > 0
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x[0], torch.ones_like(x[0]))
        o = windowed_attention(dual, *x[1:])
        assert forward_ad.unpack_dual(o).tangent is not None
    each = torch.vmap(lambda q, k, v: windowed_attention(q[None], k[None], v[None])[0])(*x)
    assert calls == []
    torch.testing.assert_close(each, windowed_attention(*x))
    compiled = torch.compile(windowed_attention, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*x), each)
    assert len(calls) == 1
