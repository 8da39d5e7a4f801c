"""Landmark attention by head on a CPU: the same as in pieces, and who takes it."""

import pytest
import torch

from zoo.kernels import attention_by_head, host_products
from zoo.layers import landmark_by_head, landmark_softmax

pytestmark = pytest.mark.skipif(
    not host_products._is_what_we_know(), reason="this PyTorch was built without oneDNN"
)


@pytest.fixture
def calls(monkeypatch):
    """Calls of any size and on any processor, in parts of 16 queries."""
    calls, run = [], landmark_softmax.attend_to_all_by_head
    monkeypatch.setattr(attention_by_head, "is_faster_here", lambda: True)
    monkeypatch.setattr(landmark_by_head, "BLOCK", 16)
    for name in ("LEAST_QUERIES", "LEAST_WIDTH"):
        monkeypatch.setattr(attention_by_head, name, 4)

    def counted(*args):
        calls.append(args[4])
        return run(*args)

    monkeypatch.setattr(landmark_softmax, "attend_to_all_by_head", counted)
    return calls


def inputs(dtype=torch.float32, count=50, groups=2, blocks=8, size=9, factor=1.0):
    """The values of landmarks are of no meaning."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, count, 4, 8), *[(2, blocks, size, groups, 8)] * 2
    q, k, v = (torch.randn(x, generator=generator, dtype=torch.float64) for x in shapes)
    v[:, :, -1] = torch.inf
    return [x.to(dtype) for x in (factor * q, factor * k, v)]


def values_and_gradients(function, x, first, **options):
    q, k, v = (value.clone().requires_grad_() for value in x)
    clock = first + torch.arange(q.shape[1])[None]
    o = function(q, k, v, clock, 0.3, first)
    cotangent = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(o.dtype)
    return [o, *torch.autograd.grad(o, (q, k, v), cotangent, **options)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("first", "groups"), [(0, 4), (0, 1), (7, 2), (13, 2), (18, 2)])
def test_equals_attention_in_pieces(calls, first, groups, dtype):
    x = inputs(dtype, groups=groups)
    pieces = landmark_softmax._all_in_pieces
    exact = values_and_gradients(pieces, [y.double() for y in x], first)
    one = values_and_gradients(pieces, x, first)
    assert calls == []
    found = values_and_gradients(landmark_softmax.attend_to_all, x, first)
    assert calls == [first]
    for y, other, right in zip(found, one, exact, strict=True):
        assert y.dtype == dtype
        error, allowed = ((x.double() - right).norm() / right.norm() for x in (y, other))
        assert error <= (2 if dtype == torch.float32 else 1.02) * allowed
    with torch.no_grad():
        clock = first + torch.arange(50)[None]
        assert torch.equal(landmark_softmax.attend_to_all(*x, clock, 0.3, first), found[0])


def test_scores_that_no_exponential_holds(calls):
    x = inputs(factor=50.0)
    found = values_and_gradients(landmark_softmax.attend_to_all, x, 5)
    exact = values_and_gradients(landmark_softmax._all_in_pieces, [y.double() for y in x], 5)
    for one, other in zip(found, exact, strict=True):
        assert (one - other).norm() < 1e-4 * other.norm()
    assert calls == [5]


def test_gradients_of_gradients(calls):
    def penalty(function):
        x = [y.requires_grad_() for y in inputs()]
        o = function(*x, torch.arange(50)[None], 0.3, 0)
        gradients = torch.autograd.grad(o.square().sum(), x, create_graph=True)
        return torch.autograd.grad(sum(y.square().sum() for y in gradients), x)

    found = penalty(landmark_softmax.attend_to_all)
    for one, other in zip(found, penalty(landmark_softmax._all_in_pieces), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
    assert calls == [0]


def test_who_is_left_alone(calls, monkeypatch):
    x, clock = inputs(), torch.arange(50)[None]
    attend = landmark_softmax.attend_to_all
    attend(*inputs(torch.float64), clock, 0.3, 0)
    attend(*x, clock, 0.3)
    attend(*inputs(count=3), clock[:, :3], 0.3, 0)
    torch.compile(attend, backend="eager", fullgraph=True)(*x, clock, 0.3, 0)
    monkeypatch.setattr(attention_by_head, "is_faster_here", lambda: False)
    attend(*x, clock, 0.3, 0)
    assert calls == []
