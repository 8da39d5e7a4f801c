"""What the operators' tests share: values with every gradient, and how far two sets differ."""

import torch


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
