"""Kernels of the linear recurrence as operators of PyTorch: autograd, graphs, export.

`make_operator` turns a pair of raw passes over contiguous tensors into what a model calls. The
kernels for one decay per head and those for one per channel share it.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .launch_triton import operator_namespace, whole
from .ready_triton import Passes, Ready

# What both operators begin with, as PyTorch writes it.
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? bonus, Tensor? initial_state, "
    "Tensor? cu_seqlens"
)


class Operator(NamedTuple):
    """The recurrence as it is called, and the two operators that a graph of it holds.

    Attributes:
        run: arguments and results as `linear_recurrence`; they are not checked.
        forward, backward: the custom operators.
        passes: what eager calls of it consist of.
    """

    run: Callable
    forward: torch.library.CustomOpDef
    backward: torch.library.CustomOpDef
    passes: Passes


def make_operator(module, raw_forward, raw_backward, num_kept):
    """Registers the operators of a module.

    Args:
        module: its `__name__`.
        raw_forward: (q, k, v, log_decay, bonus, initial_state, cu_seqlens, scale,
            output_final_state) to (o, final state or None, entering states or None): those of each
            segment, None where no document is cut.
        raw_backward: (the first seven of these, entering states, do, dfinal, scale, whether the
            gradients of the decay and of the initial state are wanted) to (dq, dk, dv, dlog_decay,
            dbonus, dinitial), None where not wanted.
        num_kept: (q, v, log_decay, bonus, cu_seqlens) to the number of these entering states.
    """
    namespace = operator_namespace(module)

    @torch.library.custom_op(
        f"{namespace}::forward",
        mutates_args=(),
        schema=f"({_INPUTS}, float scale, bool output_final_state) -> (Tensor, Tensor, Tensor)",
    )
    def forward_operator(q, *others):
        return without_none(q, raw_forward(q, *others))

    @forward_operator.register_fake
    def _(q, k, v, log_decay, bonus, initial_state, cu_seqlens, scale, output_final_state):
        batch, _, heads, key_dim = q.shape
        num_documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
        state = heads, key_dim, v.shape[-1]
        num_segments = num_kept(q, v, log_decay, bonus, cu_seqlens)
        return (
            torch.empty_like(v),
            q.new_empty((num_documents, *state) if output_final_state else 0, dtype=torch.float32),
            q.new_empty((num_segments, *state) if num_segments else 0, dtype=torch.float32),
        )

    @torch.library.custom_op(
        f"{namespace}::backward",
        mutates_args=(),
        schema=f"({_INPUTS}, Tensor entering, Tensor do, Tensor? dfinal, float scale, "
        "bool decay_gradient, bool initial_gradient) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    )
    def backward_operator(q, *others):
        return without_none(q, raw_backward(q, *others))

    @backward_operator.register_fake
    def _(q, k, v, log_decay, bonus, initial_state, cu_seqlens, *others):
        *_, decay_gradient, initial_gradient = others
        batch, _, heads, key_dim = q.shape
        num_documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
        state = (num_documents, heads, key_dim, v.shape[-1]) if initial_gradient else 0
        return (
            *map(torch.empty_like, (q, k, v)),
            torch.empty_like(log_decay) if decay_gradient else nothing(q),
            nothing(q) if bonus is None else torch.empty_like(bonus),
            q.new_empty(state, dtype=torch.float32),
        )

    def setup_context(ctx, inputs, output):
        *tensors, ctx.scale, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output[2])

    def gradients(ctx, do, dfinal, _):
        *inputs, entering = ctx.saved_tensors
        do = torch.zeros_like(inputs[2]) if do is None else do.contiguous()
        dfinal = None if dfinal is None else dfinal.contiguous()
        wanted = ctx.needs_input_grad[:6]
        found = backward_operator(*inputs, entering, do, dfinal, ctx.scale, wanted[3], wanted[5])
        found = (x if is_wanted else None for x, is_wanted in zip(found, wanted, strict=True))
        return *found, None, None, None

    forward_operator.register_autograd(gradients, setup_context=setup_context)

    passes = Passes(
        prepare=_prepare,
        forward=raw_forward,
        backward=raw_backward,
        outputs=2,
        values=2,
        saved=slice(2, 3),
        ask=lambda numbers, wanted: (numbers[0], wanted[3], wanted[5]),
    )

    def run(
        q,
        k,
        v,
        log_decay=None,
        *,
        bonus=None,
        scale=1.0,
        initial_state=None,
        output_final_state=False,
        cu_seqlens=None,
    ):
        """The recurrence on a GPU; arguments and results as `linear_recurrence`, checked by it.

        Tensors of different dtypes are computed in the widest, in float32 or narrower.
        """
        tensors = q, k, v, log_decay, bonus, initial_state, cu_seqlens
        numbers = float(scale), output_final_state
        if not is_traced(q):
            return Ready(passes, numbers, is_kept=False)(*tensors)
        o, final, _ = forward_operator(*_prepare(*tensors), *numbers)
        return o.to(v.dtype), final if output_final_state else None

    return Operator(run, forward_operator, backward_operator, passes)


def _prepare(q, k, v, log_decay, bonus, initial_state, cu_seqlens):
    dtype = functools.reduce(torch.promote_types, (q.dtype, k.dtype, v.dtype))
    inputs = [x.to(dtype).contiguous() for x in (q, k, v)]
    inputs += [None if x is None else narrow(x) for x in (log_decay, bonus)]
    inputs.append(None if initial_state is None else initial_state.float().contiguous())
    return *inputs, cu_seqlens


def nothing(like):
    """A tensor without elements, for what an operator returns but nobody asked for."""
    return like.new_empty(0, dtype=torch.float32)


def without_none(like, results):
    """What an operator may return: tensors only, all different."""
    return tuple(nothing(like) if x is None else x for x in results)


def is_traced(x):
    """Whether a graph is being made, for which a launch has to be an operator."""
    return torch.compiler.is_compiling() or isinstance(x, torch._subclasses.FakeTensor)


# Decays that belong to a model, as the kernels read them, with the version they were made from.
_narrowed = WeakTensorKeyDictionary()


@whole
def narrow(x):
    """Contiguous and in float32 at most. That of a constant is kept: nothing runs at each call."""
    if x.dtype != torch.float64 and x.is_contiguous():
        return x
    if x.requires_grad or x.ndim > 2 or torch.compiler.is_compiling():
        return (x.float() if x.dtype == torch.float64 else x).contiguous()
    version, narrowed = _narrowed.get(x, (None, None))
    if version != x._version:
        narrowed = (x.float() if x.dtype == torch.float64 else x).contiguous()
        _narrowed[x] = x._version, narrowed
    return narrowed
