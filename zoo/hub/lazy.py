"""Tensors whose values are read, and computed, when they are asked for.

A checkpoint may be larger than the memory. Its names, shapes and dtypes are not, and they are all
that checks and converters look at. So they are given tensors without values: what is computed from
them is noted down and done in the end, a tensor at a time.
"""

import torch
from torch.utils._pytree import tree_map


class Lazy(torch.Tensor):
    """A tensor that remembers how to come by its values.

    Functions of it that give tensors give lazy ones, of the right shape and dtype; those that give
    a number or a truth compute it at once. It cannot be written to, and nothing is kept: asked
    twice, it reads twice.

    Args:
        outline: a tensor of its shape, strides and dtype on the meta device.
        read: () -> the tensor with its values.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, outline, read):
        return torch.Tensor._make_wrapper_subclass(
            cls, outline.shape, strides=outline.stride(), dtype=outline.dtype, device="cpu"
        )

    def __init__(self, outline, read):
        self.outline = outline
        self.read = read

    def __repr__(self):
        return f"Lazy({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function._schema.is_mutable:
            raise NotImplementedError(f"{function} writes to a tensor that is not read yet")

        def compute():
            return function(*tree_map(value_of, args), **tree_map(value_of, kwargs))

        results = [str(result.type) for result in function._schema.returns]
        if any(result not in ("Tensor", "List[Tensor]") for result in results):
            return compute()
        outlines = function(*tree_map(outline_of, args), **tree_map(outline_of, kwargs))
        if isinstance(outlines, torch.Tensor):
            return cls(outlines, compute)
        return [cls(part, lambda i=i: compute()[i]) for i, part in enumerate(outlines)]


def value_of(x):
    """The tensor itself, of a lazy one; anything else is returned as it is."""
    return x.read() if isinstance(x, Lazy) else x


def outline_of(x):
    """A tensor's shape, strides and dtype on the meta device; anything else is returned as is."""
    if isinstance(x, Lazy):
        return x.outline
    return x.to("meta") if isinstance(x, torch.Tensor) else x


def cast(x, dtype, name):
    """A lazy tensor of another dtype.

    Args:
        x: a tensor, lazy or not.
        dtype: to round to.
        name: of it, for messages.

    Returns:
        One that, when it is read, raises a ValueError if a number is too large for the dtype.
    """
    if x.dtype == dtype:
        return x

    def read():
        before = value_of(x)
        after = before.to(dtype)
        if after.isinf().any() and not torch.equal(before.isinf(), after.isinf()):
            largest = before[before.isfinite()].abs().max()
            raise ValueError(
                f"{name} holds {largest:.4g}, which is beyond {_plain(dtype)} (up to "
                f"{torch.finfo(dtype).max:.4g}); leave it {_plain(x.dtype)}, as it is."
            )
        return after

    return Lazy(outline_of(x).to(dtype), read)


def _plain(dtype):
    return str(dtype).removeprefix("torch.")


def are_equal(a, b):
    """Whether two tensors, lazy or not, have the same shape and values."""
    return a is b or a.shape == b.shape and torch.equal(a, b)
