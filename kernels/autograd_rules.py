"""What is written by hand beside autograd: who else follows operations, and types of gradients."""

import contextlib
import functools

import torch
from torch.autograd.function import once_differentiable

from .export_scan import without_autocast


def by_autograd_alone():
    """Whether operations run as they are called, followed by nobody but autograd.

    Not so where they are compiled, traced, counted, transformed or differentiated forward: those
    want operations that they know. Nor where a PyTorch to come no longer says so.
    """
    return not torch.compiler.is_compiling() and not any(is_one() for is_one in _followers)


def _all_followers():
    """Who else may follow operations: functions that say so, which PyTorch has for itself."""
    try:
        from torch.autograd import forward_ad
        from torch.utils import _python_dispatch

        found = (
            torch.jit.is_tracing,
            _python_dispatch.is_in_torch_dispatch_mode,
            torch._C._are_functorch_transforms_active,
            lambda: forward_ad._current_level >= 0,
        )
        any(is_one() for is_one in found)
    except (AttributeError, ImportError, TypeError):
        return (lambda: True,)
    return found


_followers = _all_followers()


def by_formula(backward):
    """A decorator of backward passes that are written down: they have no gradient of their own.

    Their tensors have the types that they were saved in, and so have products of them, also where
    backward is called under autocast.

    Args:
        backward: (ctx, *gradients) to gradients; None stands for one that is not there.
    """

    @functools.wraps(backward)
    def in_own_types(ctx, *gradients):
        given = next((x for x in gradients if x is not None), None)
        with contextlib.nullcontext() if given is None else without_autocast(given):
            return backward(ctx, *gradients)

    return once_differentiable(in_own_types)
