"""What operators are made of in a program that torch.export writes: it has to hold at any length.

A loop over chunks that Python runs is unrolled into as many as the example had. So while a program
is being exported, each operator takes a form of its own (`*_export.py`): whole chunks in tensors
with an axis for them, and where one chunk needs what the one before left, PyTorch's `scan`. All of
it is PyTorch's own operators: a program needs nothing of ours to run, and can be trained.
"""

import contextlib
import inspect

import torch


def chunk_length(time, length):
    """Positions per chunk: that many, of a single token one."""
    return 1 if time == 1 else length


def count_chunks(time, length):
    """How many chunks a sequence is cut into: one more than it fills, at its end.

    Exporting takes a size that is 1 for a constant, and this one never is.
    """
    return (time - 1) // length + 2


def into_chunks(x_BTX, length):
    """[B, T, ...] to [N, B, C, ...], with zeros behind the last token.

    Taken by index, not reshaped: exporting cannot prove how the two shapes hang together.
    """
    time = x_BTX.shape[1]
    starts_N1 = torch.arange(count_chunks(time, length), device=x_BTX.device)[:, None] * length
    token_NC = starts_N1 + torch.arange(length, device=x_BTX.device)
    x_BNCX = x_BTX[:, token_NC.clamp(max=time - 1)]
    is_token_NC = (token_NC < time).reshape(*token_NC.shape, *[1] * (x_BTX.ndim - 2))
    return torch.where(is_token_NC, x_BNCX, 0).transpose(0, 1)


def from_chunks(x_NBCX, time):
    """The inverse of `into_chunks`."""
    token_T, length = torch.arange(time, device=x_NBCX.device), x_NBCX.shape[2]
    return x_NBCX.transpose(0, 1)[:, token_T // length, token_T % length]


def without_autocast(x):
    """A context that keeps autocast off; not in a program where it is off: that could not be saved.

    Args:
        x: a tensor of the device.
    """
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def joined(first, second, dim=-2):
    """Pairs of blocks, [..., pairs, W, ...] each, as blocks of 2 W; dim: the axis of W."""
    return torch.stack([first, second], dim=dim - 1).flatten(dim - 2, dim)


def scan(step, state, *parts):
    """A recursion over the first axis of `parts`.

    Args:
        step: (state, *parts of this place) to (the next state, what is put together); pure, and
            what it returns are new tensors.
        state: the first one's: a tuple of tensors.
        parts: [N, ...] each.

    Returns:
        (the state after the last, [N, ...] of what is put together: a tuple).
    """
    from torch._higher_order_ops.scan import scan as torch_scan

    if not torch.compiler.is_dynamo_compiling():
        # It would try whether one that was made before fits, and keep what it asked of the sizes.
        for inner in filter(inspect.iscode, torch_scan.__code__.co_consts):
            torch._dynamo.eval_frame.remove_from_cache(inner)
    return torch_scan(lambda state, parts: step(state, *parts), state, parts)
