"""Operators of Triton kernels as eager PyTorch calls them: both passes, autograd, nothing else.

`Ready` is a call whose shapes, dtypes and numbers are known. What a model calls over and over is
kept (known_calls.py), and its passes become programs (programs_triton.py).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .programs_triton import Program


class Passes(NamedTuple):
    """What an operator consists of. Its tensors come first, or None, then its numbers.

    Attributes:
        prepare: the tensors of a call to those that the passes take: contiguous, of one dtype.
        forward: (*tensors, *numbers) to results.
        backward: (*tensors, *saved results, *gradients of the outputs, *what `ask` says) to the
            gradients of the tensors in their order, as many as can have any; what stands for one
            that was not asked for is not looked at.
        outputs: how many of the results are outputs; the first in the dtype of the values.
        values: which tensor holds the values.
        saved: which of the results backward needs.
        ask: (numbers, whether the gradient of each tensor is wanted) to the last arguments.
    """

    prepare: Callable
    forward: Callable
    backward: Callable
    outputs: int
    values: int
    saved: slice
    ask: Callable


class Ready:
    """Both passes of calls that have the same form.

    Args:
        passes: the operator's.
        numbers: of the calls.
        is_kept: whether there will be more of them: then the passes are written down.
    """

    def __init__(self, passes, numbers, is_kept):
        self.passes, self.numbers = passes, numbers
        self._keep = Program if is_kept else lambda function: function
        self.forward = self._keep(self._forward)
        self.backward = {}

    def __call__(self, *tensors):
        """The outputs, in a tuple."""
        if torch.is_grad_enabled():
            return _Eager.apply(self, *tensors)
        return self._forward(*tensors)[0]

    def _forward(self, *tensors):
        passes = self.passes
        prepared = passes.prepare(*tensors)
        first, *results = passes.forward(*prepared, *self.numbers)
        results = first.to(tensors[passes.values].dtype), *results
        return results[: passes.outputs], (*prepared, *results[passes.saved])

    def gradients(self, saved, gradients, wanted):
        """The gradients of what `_Eager` was given.

        Args:
            saved: what the forward pass left.
            gradients: of the outputs, None where there is none.
            wanted: whether each of the results is.
        """
        key = wanted, *map(type, gradients)
        program = self.backward.get(key)
        if program is None:
            function = functools.partial(self._backward, wanted[1:], len(saved))
            program = self.backward[key] = self._keep(function)
        return program(*saved, *gradients)

    def _backward(self, wanted, num_saved, *tensors):
        saved, (do, *others) = tensors[:num_saved], tensors[num_saved:]
        values = saved[self.passes.values]
        do = torch.zeros_like(values) if do is None else do.to(values.dtype).contiguous()
        others = [None if x is None else x.contiguous() for x in others]
        asked = self.passes.ask(self.numbers, wanted)
        found = self.passes.backward(*saved, do, *others, *asked)
        found = [x if is_wanted else None for x, is_wanted in zip(found, wanted)]
        return None, *found, *[None] * (len(wanted) - len(found))


class _Eager(torch.autograd.Function):
    """An operator without the dispatch of a custom one, which costs 30 microseconds."""

    @staticmethod
    def forward(ctx, ready, *tensors):
        outputs, saved = ready.forward(*tensors)
        ctx.ready = ready
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        return outputs

    @staticmethod
    def backward(ctx, *gradients):
        # With create_graph only: what comes out is refused a gradient of its own.
        run = _gradients_once if torch.is_grad_enabled() else _gradients
        return run(ctx, *gradients)


def _gradients(ctx, *gradients):
    return ctx.ready.gradients(ctx.saved_tensors, gradients, ctx.needs_input_grad)


_gradients_once = once_differentiable(_gradients)


def prepared_call(passes, numbers, run):
    """What to keep for calls of one form (known_calls.py): a callable of their tensors.

    Args:
        passes, numbers: as of `Ready`.
        run: the whole call without gradients, of the same tensors.
    """
    if torch.is_grad_enabled():
        return functools.partial(_Eager.apply, Ready(passes, numbers, is_kept=True))
    return Program(run)
