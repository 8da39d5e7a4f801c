"""The loss in chunks on a CPU: logits once, gradients of autograd, and who is left to autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.core.chunked_loss import can_take_gradient_at_once, chunked_cross_entropy

TARGET = torch.tensor([3, -100, 0, 6, 6, -100, 1])


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(5, 8, bias=False)
    head.weight = nn.Parameter(torch.randn(8, 5, generator=generator).to(dtype))
    hidden = torch.randn(7, 5, generator=generator).to(dtype).requires_grad_()
    return head, hidden


def by_autograd(head, hidden, z_loss):
    logits = head(hidden).float()
    nats = F.cross_entropy(logits, TARGET, ignore_index=-100, reduction="sum")
    penalty = z_loss * logits[TARGET != -100].logsumexp(-1).square().sum()
    return (nats + penalty) / 5, penalty / 5


def gradients(loss, head, hidden):
    return torch.autograd.grad(3 * loss, [hidden, head.weight], retain_graph=True)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [
        (torch.float64, False, 1e-6),  # logits are float32
        (torch.float32, False, 1e-6),
        (torch.float32, True, 2**-7),  # two roundings to bf16: of logits' gradients, of their sums
        (torch.bfloat16, False, 2**-7),
    ],
)
def test_gradients_are_those_of_autograd(dtype, autocast, tolerance, size, z_loss):
    head, hidden = inputs(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = by_autograd(head, hidden, z_loss)
        found = chunked_cross_entropy(head, hidden, TARGET, -100, size, 1 / 5, z_loss)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-6, atol=1e-6)
    assert not found[1].requires_grad
    expected = gradients(expected[0], head, hidden)
    for _ in range(2):  # a second pass backward gives the same again
        for one, other in zip(gradients(found[0], head, hidden), expected, strict=True):
            assert one.dtype == other.dtype
            assert (one - other).norm() <= tolerance * other.norm()


def test_logits_are_computed_once():
    """Three products of that size: logits, the gradients of states and of weights."""
    head, hidden = inputs()
    products = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            products.append(function.overloadpacket.__name__)
            return function(*args, **kwargs or {})

    with Watch():
        chunked_cross_entropy(head, hidden, TARGET, -100, 100, 1.0)[0].backward()
    assert products.count("mm") == 3


def test_gradients_add_up_in_a_parameter():
    head, hidden = inputs()
    loss = chunked_cross_entropy(head, hidden, TARGET, -100, 3, 1.0)[0]
    loss.backward(retain_graph=True)
    once = head.weight.grad.clone()
    for _ in range(2):
        loss.backward(retain_graph=True)
    torch.testing.assert_close(head.weight.grad, 3 * once)


def test_what_goes_around_the_module_is_left_to_it():
    head, hidden = inputs()
    assert can_take_gradient_at_once(head, hidden)
    with torch.no_grad():
        assert not can_take_gradient_at_once(head, hidden)
    with torch.autocast("cpu", torch.float16):
        assert not can_take_gradient_at_once(head, hidden)
    assert not can_take_gradient_at_once(head, hidden.bfloat16())  # what fails says so itself
    assert not can_take_gradient_at_once(head, hidden.to("meta"))
    assert not can_take_gradient_at_once(nn.Linear(5, 8), hidden)  # a bias
    assert not can_take_gradient_at_once(nn.Sequential(head), hidden)
    handle = head.register_forward_hook(lambda *_: None)
    assert not can_take_gradient_at_once(head, hidden)
    handle.remove()
    head.forward = lambda x: x
    assert not can_take_gradient_at_once(head, hidden)
