"""A layer whose state is not linear in the one before: processes of a sequence take turns.

Each waits for the state that the process before has after its slice, runs its own, and passes the
state on. Everything else of a layer they do at the same time. Backward goes the other way.
"""

import torch

from .state import State, new_cache
from .wire import as_bytes, from_bytes

DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
)


class Turns(State):
    """A layer's state when processes take turns: it arrives when the layer looks at it.

    That has to be inside the layer's call. Under FSDP all processes bring a layer's weights
    together when they call it, and who waits for a state before that waits forever.

    Args:
        held: the `StateLayer` it goes into, and from which it is read.
        sequence: the `Sequence`.
        specs: of the layer's state.
        is_kept: as of `State`.
    """

    def __init__(self, held, sequence, specs, is_kept):
        super().__init__(dict.fromkeys(specs), is_kept)
        self._arrive = lambda: _arrived(held, sequence, specs, is_kept)
        self._state = None

    def copy(self):
        """The state; a layer that is run again in backward gets the same one."""
        if self._state is None:
            self._state = self._arrive()
        return self._state.copy()


def _arrived(held, sequence, specs, is_kept):
    ranks = sequence.ranks
    if not ranks.is_first:
        held.tensors = dict(zip(specs, ranks.make(_Receive)))
    with _kept():
        state = held.read(sequence, specs)
    state.is_kept, state.may_overwrite = is_kept, False
    return state


def run_in_turn(layer, x_BTD, sequence, held, is_kept, carried, inputs):
    """Calls a layer when it is this process' turn.

    Args:
        layer: called as `ZooBlock` is.
        x_BTD: the tokens.
        sequence: how they lie, a slice.
        held: an empty `StateLayer`; it has the state after this slice then, if it is kept.
        is_kept: whether somebody wants that beside the process after this one.
        carried: what the layer before gave this one.
        inputs: of all layers.

    Returns:
        What the layer returns.
    """
    ranks, specs = sequence.ranks, layer.state_specs()
    state = Turns(held, sequence, specs, is_kept or not ranks.is_last)

    def pass_on(state):
        if state.is_kept:
            with _kept():
                held.write(sequence, specs, state, None)
        if not ranks.is_last:
            ranks.make(_Send, *held.tensors.values())

    return run_together(layer, x_BTD, sequence, state, carried, inputs, pass_on)


def _kept():
    """What is saved for backward in this context stays: a checkpoint does not make it again."""
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


def run_together(layer, x_BTD, sequence, state, carried, inputs, pass_on=None):
    """Calls a layer such that backward begins it before it makes any of its exchanges.

    Under FSDP all processes bring a layer's weights together where its backward begins, and who
    makes an exchange before that waits for one that waits for it.

    Args:
        layer, x_BTD, sequence, carried, inputs: as of `run_in_turn`.
        state: of the layer.
        pass_on: (the state after the slice), which makes the last exchange.

    Returns:
        What the layer returns.
    """

    def tie(module, arguments, output):
        x_BTD, state, *carried = output
        if pass_on is not None:
            pass_on(state)
        return _Tie.apply(x_BTD, sequence.ranks.token), state, *carried

    # Inside of the call, before FSDP's own hook looks at what comes out. A checkpoint that runs the
    # layer again does so without.
    handle = layer.register_forward_hook(tie, prepend=True)
    try:
        return layer(x_BTD, sequence, state, *carried, **inputs)
    finally:
        handle.remove()


def run_stack_in_turn(model, run, sequence, cache):
    """The same for a whole stack, which is walked from segment to segment.

    Args:
        model: the `ZooModel`.
        run: (cache) to the output; then the cache has the state after the slice.
        sequence: how the tokens lie, a slice.
        cache: an empty one; None: nobody wants it.

    Returns:
        The output.

    Raises:
        ValueError: weights in shards, which processes bring together layer by layer.
    """
    if any(type(p).__name__ == "DTensor" for p in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} walks all its layers for one segment after the other, so "
            "processes of a sequence run one after the other, and weights in shards (FSDP) want "
            "all of them in the same layer; use DDP, or leave sequence_parallel out."
        )
    ranks = sequence.ranks
    if cache is None and not ranks.is_last:
        cache = new_cache(model.config)
    if not ranks.is_first:
        if cache is None:
            cache = new_cache(model.config)
        tensors = iter(ranks.make(_Receive))
        for layer, specs in zip(cache.layers, model.state_specs()):
            layer.tensors = {name: next(tensors) for name in specs}
    output = run(cache)
    if not ranks.is_last:
        ranks.make(_Send, *(x for layer in cache.layers for x in layer.tensors.values()))
    return output


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTD, token):
        ctx.token = token.new_zeros(())
        return x_BTD.clone()  # of a view FSDP fears that somebody writes to it

    @staticmethod
    def backward(ctx, grad):
        return grad, ctx.token


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx, token, wire, *tensors):
        ctx.wire, ctx.like = wire, [torch.empty_like(x, device="meta") for x in tensors]
        ctx.device = token.device
        header = _header(tensors).to(token.device)
        wire.send(torch.tensor([len(header)], device=token.device), wire.rank + 1)
        wire.send(header, wire.rank + 1)
        wire.send(as_bytes(tensors), wire.rank + 1)
        return (token.clone(),)

    @staticmethod
    def backward(ctx, grad_token):
        floats = [x for x in ctx.like if x.is_floating_point()]
        flat = torch.empty(_num_bytes(floats), dtype=torch.uint8, device=ctx.device)
        pieces = iter(from_bytes(ctx.wire.receive(flat, ctx.wire.rank + 1), floats))
        grads = [next(pieces) if x.is_floating_point() else None for x in ctx.like]
        return grad_token, None, *grads


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, token, wire):
        source, device = wire.rank - 1, token.device
        size = wire.receive(torch.empty(1, dtype=torch.int64, device=device), source)
        header = torch.empty(int(size), dtype=torch.int64, device=device)
        like = _described(wire.receive(header, source).tolist())
        flat = torch.empty(_num_bytes(like), dtype=torch.uint8, device=device)
        tensors = from_bytes(wire.receive(flat, source), like)
        ctx.wire, ctx.like, ctx.device = wire, like, device
        ctx.mark_non_differentiable(*(x for x in tensors if not x.is_floating_point()))
        return *tensors, token.clone()

    @staticmethod
    def backward(ctx, *grads):
        *grads, grad_token = grads
        grads = [
            torch.zeros_like(x, device=ctx.device) if grad is None else grad
            for x, grad in zip(ctx.like, grads)
            if x.is_floating_point()
        ]
        ctx.wire.send(as_bytes(grads), ctx.wire.rank - 1)
        return grad_token, None


def _num_bytes(tensors):
    return sum(x.nbytes for x in tensors)


def _header(tensors):
    """The dtypes and shapes of tensors, as int64: of each its dtype, number of sizes, and sizes."""
    numbers = [(DTYPES.index(x.dtype), x.ndim, *x.shape) for x in tensors]
    return torch.tensor([n for of_one in numbers for n in of_one], dtype=torch.int64)


def _described(header):
    """Tensors of the dtypes and shapes that a header says, without memory."""
    tensors = []
    while header:
        dtype, ndim, *header = header
        tensors.append(torch.empty(header[:ndim], dtype=DTYPES[dtype], device="meta"))
        header = header[ndim:]
    return tensors
