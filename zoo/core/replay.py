"""Segment replay: exact backpropagation through sequences far longer than their activations fit.

The memory-replay backpropagation of Memformer (Wu et al. 2020, https://arxiv.org/abs/2010.06891):
forward keeps the recurrent states at the segments' boundaries and nothing else; backward takes the
segments from last to first, runs each again from its state, and hands the gradient of that state to
the segment before. It costs one more forward pass.
"""

import torch


def replay(run, x_BTD, sizes, states, parameters):
    """Runs segments one after the other, so that backward runs them again.

    Args:
        run: (segment's index, x [B, size, D], states) -> (y [B, size, D], states), the states
            being lists of tensors; the same every time it is called.
        x_BTD: the input.
        sizes: of the segments.
        states: before the first; may be empty, and longer after it.
        parameters: the tensors that get gradients beside the input and the states.

    Returns:
        (y [B, T, D], states after the last segment).
    """
    y_BTD, *states = _Replay.apply(run, sizes, len(states), x_BTD, *states, *parameters)
    return y_BTD, states


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, sizes, num_states, x_BTD, *tensors):
        states, parameters = list(tensors[:num_states]), tensors[num_states:]
        ctx.run, ctx.sizes, ctx.num_states = run, sizes, num_states
        ctx.parameters = parameters
        ctx.autocast = {
            "device_type": x_BTD.device.type,
            "dtype": torch.get_autocast_dtype(x_BTD.device.type),
            "enabled": torch.is_autocast_enabled(x_BTD.device.type),
        }
        ctx.states, ctx.random, outputs = [], [], []
        for index, x in enumerate(x_BTD.split(sizes, dim=1)):
            # A copy: a single token may be written into the state itself.
            ctx.states.append([state.detach().clone() for state in states])
            ctx.random.append(_random_state(x_BTD.device))
            y, states = run(index, x, states)
            outputs.append(y)
        ctx.save_for_backward(x_BTD)
        return torch.cat(outputs, dim=1), *(state.detach() for state in states)

    @staticmethod
    def backward(ctx, grad_y_BTD, *grad_states):
        (x_BTD,) = ctx.saved_tensors
        if not ctx.states:
            raise RuntimeError(
                "the states of a replayed pass are freed as backward runs; run the forward pass "
                "again for a second backward."
            )
        parameters = [p for p in ctx.parameters if p.requires_grad]
        totals = [None] * len(parameters)
        pieces = list(zip(x_BTD.split(ctx.sizes, dim=1), grad_y_BTD.split(ctx.sizes, dim=1)))
        grad_pieces = []
        for index in reversed(range(len(pieces))):
            x, grad_y = pieces[index]
            x = x.detach().requires_grad_()
            states = [state.requires_grad_(state.is_floating_point()) for state in ctx.states.pop()]
            with torch.enable_grad(), torch.autocast(**ctx.autocast), _Random(ctx.random.pop()):
                y, states_after = ctx.run(index, x, states)
            outputs = [(y, grad_y), *zip(states_after, grad_states, strict=True)]
            outputs = [(o, g) for o, g in outputs if o.requires_grad and g is not None]
            inputs = [x, *(state for state in states if state.requires_grad), *parameters]
            grads = torch.autograd.grad(
                [o for o, _ in outputs], inputs, [g for _, g in outputs], allow_unused=True
            )
            grad_pieces.append(torch.zeros_like(x) if grads[0] is None else grads[0])
            grads = iter(grads[1:])
            grad_states = [next(grads) if state.requires_grad else None for state in states]
            totals = [
                total if grad is None else grad if total is None else total.add_(grad)
                for total, grad in zip(totals, grads, strict=True)
            ]
        totals = iter(totals)
        grad_parameters = [next(totals) if p.requires_grad else None for p in ctx.parameters]
        grad_x_BTD = torch.cat(grad_pieces[::-1], dim=1)
        return None, None, None, grad_x_BTD, *grad_states, *grad_parameters


def _random_state(device):
    """The random generators that dropout may draw from."""
    on_device = torch.get_device_module(device).get_rng_state(device) if _has_own(device) else None
    return torch.get_rng_state(), device, on_device


def _has_own(device):
    return device.type not in ("cpu", "meta")


class _Random:
    """Puts the generators back to a `_random_state`, and afterwards to where they were."""

    def __init__(self, state):
        self.state = state

    def __enter__(self):
        self.before = _random_state(self.state[1])
        self._set(self.state)

    def __exit__(self, *error):
        self._set(self.before)

    def _set(self, state):
        on_cpu, device, on_device = state
        torch.set_rng_state(on_cpu)
        if on_device is not None:
            torch.get_device_module(device).set_rng_state(on_device, device)
