"""What the operators' tests share: values with every gradient, and how far two sets differ."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def values_and_gradients(function, positional, keyword):
    """Outputs, final states and every gradient for a fixed random cotangent."""
    o, state = function(*positional, **keyword, output_final_state=True)
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum()
        for x in (o, state)
    )
    leaves = [
        x for x in (*positional, *keyword.values()) if torch.is_tensor(x) and x.is_floating_point()
    ]
    return [o, state, *torch.autograd.grad(loss, leaves)]


def worst(got, expected):
    """Largest difference, relative to each tensor's largest entry if that is above 1.

    Not a number if any is none: Python's own max would pass over it.
    """
    differences = [
        (a.double() - b.double()).abs().max() / b.abs().max().clamp(min=1)
        for a, b in zip(got, expected, strict=True)
    ]
    return torch.stack(differences).max().item()


class BytesWritten(TorchDispatchMode):
    """Counts, while it is entered, the bytes of new memory that operators return: `count`."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        old = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if torch.is_tensor(x)}
        for x in tree_leaves(result):
            if torch.is_tensor(x) and x.untyped_storage().data_ptr() not in old:
                self.count += x.nbytes
        return result
