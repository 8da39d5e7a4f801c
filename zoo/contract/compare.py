"""Distances between results, and the random functional that turns results into a loss."""

import math

import torch

from .subject import generator

# "Equal" for each dtype: the largest difference relative to the largest value.
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-5}
NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}


def relative(found, expected):
    """max |found - expected| / max |expected|; infinite if anything is not finite."""
    if found.shape != expected.shape:
        raise ValueError(f"shape {list(found.shape)}, expected {list(expected.shape)}")
    if found.numel() == 0:
        return 0.0
    found, expected = found.detach().double(), expected.detach().double()
    difference = (found - expected).abs().max().item()
    if not math.isfinite(difference):
        return math.inf
    return difference / (expected.abs().max().item() or 1.0)


def relative_states(found, expected):
    """The worst `relative` over two sets of named tensors."""
    if found.keys() != expected.keys():
        raise ValueError(f"state has {sorted(found)}, expected {sorted(expected)}")
    return max((relative(found[name], expected[name]) for name in expected), default=0.0)


def relative_gradients(found, expected):
    """The worst `relative` over parameters.

    A gradient a thousand times smaller than the largest is what cancellation left of it: it is
    compared with a thousandth of the largest, not with itself.
    """
    floor = 1e-3 * max(x.abs().max().item() for x in expected.values())
    worst = 0.0
    for name, x in expected.items():
        difference = (found[name].double() - x.double()).abs().max().item()
        if not math.isfinite(difference):
            return math.inf
        worst = max(worst, difference / max(x.abs().max().item(), floor, 1e-300))
    return worst


def loss_weight(shape, like, seed=5):
    """A fixed random weight for each entry of a result."""
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(like)


def loss_of(logits, state=None):
    """A loss over all logits, and over the state where it carries a gradient."""
    loss = (logits * loss_weight(logits.shape, logits)).sum() / logits.numel() ** 0.5
    for x in (state or {}).values():
        if x.requires_grad:
            loss = loss + (x * loss_weight(x.shape, x)).sum() / x.numel() ** 0.5
    return loss


def gradients(model, loss):
    """The gradient of a loss by parameter name; zeros where there is none."""
    names, parameters = zip(*model.named_parameters())
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if grad is None else grad
        for name, parameter, grad in zip(names, parameters, grads)
    }
