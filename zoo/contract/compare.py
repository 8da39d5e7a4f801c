"""Distances between results, and the random functional that turns results into a loss."""

import functools
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


class Bounds:
    """The largest differences that count as equal, for one kind of result.

    No float32 result is more exact than the last bit of the weights. A head norm divides by the
    size of what may be almost zero, at a document's first token above all, and there that last
    bit alone can move a gradient by more than 1e-5. So in float32 a bound is 1e-5 or, if that is
    more, four times what moving all weights by their last bit changes, measured in float64. It is
    measured where a difference is beyond 1e-5; elsewhere the bound is met already.

    Args:
        subject: the `Subject`.
        dtype: what the compared models compute in.
        result: model -> an object with the compared quantities as attributes.
    """

    def __init__(self, subject, dtype, result):
        self.subject, self.dtype, self.result = subject, dtype, result

    @functools.cached_property
    def _results(self):
        models = [self.subject.model(), *self.subject.shaken()]
        return [self.result(model) for model in models]

    def of(self, quantity, distance, measured):
        """The bound of one attribute under a distance, as far as a measured one asks for it."""
        bound = BOUNDS[self.dtype]
        if self.dtype == torch.float64 or measured <= bound:
            return bound
        exact, *moved = (getattr(result, quantity) for result in self._results)
        return max(bound, 4 * max(distance(x, exact) for x in moved))


def worst_of(distance):
    """The same distance between two lists: the worst of their items."""
    return lambda found, expected: max(map(distance, found, expected))


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
    return max((_relative_state(found[name], expected[name]) for name in expected), default=0.0)


def _relative_state(found, expected):
    if found.ndim == expected.ndim == 4 and found.shape[1] != expected.shape[1]:
        # A state that grows has room for its longest row; slots without a token hold zeros.
        slots = max(found.shape[1], expected.shape[1])
        found, expected = (
            torch.nn.functional.pad(x, (0, 0, 0, 0, 0, slots - x.shape[1]))
            for x in (found, expected)
        )
    return relative(found, expected)


def relative_gradients(found, expected):
    """The worst `relative` over parameters.

    A gradient a thousand times smaller than the largest is what cancellation left of it: it is
    compared with a thousandth of the largest, not with itself. One that is no larger than a
    rounding of the largest is rounding itself, as that of a bias of keys, which a softmax does not
    feel: another order of sums makes another of it, by as much as such a rounding.
    """
    largest = max(x.abs().max().item() for x in expected.values())
    worst = 0.0
    for name, x in expected.items():
        difference = (found[name].double() - x.double()).abs().max().item()
        if not math.isfinite(difference):
            return math.inf
        size, rounding = x.abs().max().item(), torch.finfo(x.dtype).eps / 2 * largest
        floor = 1e-3 * largest
        if size <= rounding and x.dtype in BOUNDS:
            floor = max(floor, rounding / BOUNDS[x.dtype])
        worst = max(worst, difference / max(size, floor, 1e-300))
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
