"""The operators by way of flash-linear-attention, for `backend="fla"` and to measure beside it.

https://github.com/fla-org/flash-linear-attention, checked against 0.6.0. Which of its functions
computes `linear_recurrence` depends on the decay and the bonus:

    None             chunk_simple_gla without a gate (chunk_linear_attn, unnormalised)
    [H]              chunk_simple_gla with g_gamma (chunk_retention, chunk_lightning_attn)
    [B, T, H]        chunk_simple_gla with g
    [B, T, H, K]     chunk_gla
    any, with bonus  chunk_rwkv6, which wants a decay per channel: others are repeated

`delta_recurrence` is chunk_rwkv7. Layouts are the same; its scale, unlike ours, would default to
K^-0.5. fla is imported on the first call, never before.

What to know of it: the backward of a decay per token refuses to run on Hopper with Triton 3.4 to
3.7.0, whose code for it is wrong; a log decay of -inf makes NaN; packed streams make the host wait.
"""

import functools
import importlib

import torch


def linear_recurrence_fla(
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
    """`linear_recurrence` by flash-linear-attention; arguments and results as there.

    Raises:
        ValueError: tensors that are not on a GPU, float64, a gradient of a decay per head.
    """
    _check("linear_recurrence", q, k, v, log_decay)
    if log_decay is not None and log_decay.ndim == 1 and bonus is None and _is_learned(log_decay):
        raise ValueError(
            'linear_recurrence: backend "fla" has no gradient of log_decay [H], which asks for '
            'one; repeat it to [B, T, H], or use backend="triton".'
        )
    dtype = _common_dtype(q, k, v)
    inputs = {name: x.to(dtype) for name, x in (("q", q), ("k", k), ("v", v))}
    options = _options(scale, initial_state, output_final_state, cu_seqlens)
    if bonus is not None:
        inputs["r"] = inputs.pop("q")
        inputs |= {"w": _per_channel(log_decay, q), "u": bonus}
        function = _function("rwkv6", "chunk_rwkv6")
    elif log_decay is None:
        function = _function("simple_gla", "chunk_simple_gla")
    elif log_decay.ndim == 1:
        inputs["g_gamma"] = log_decay.float()
        function = _function("simple_gla", "chunk_simple_gla")
    elif log_decay.ndim == 3:
        inputs["g"] = log_decay.float()
        function = _function("simple_gla", "chunk_simple_gla")
    else:
        inputs["g"] = log_decay.float()
        function = _function("gla", "chunk_gla")
    o, final_state = function(**inputs, **options)
    return o.to(v.dtype), final_state if output_final_state else None


def delta_recurrence_fla(
    q,
    k,
    v,
    log_decay,
    a,
    b,
    *,
    scale=1.0,
    initial_state=None,
    output_final_state=False,
    cu_seqlens=None,
):
    """`delta_recurrence` by flash-linear-attention; arguments and results as there.

    It assumes nothing of the decay, and therefore works in chunks of 16 tokens; RWKV-7's own layer
    in fla promises a bound and gets 64.

    Raises:
        ValueError: tensors that are not on a GPU, float64, K above 256.
    """
    _check("delta_recurrence", q, k, v, log_decay, a, b)
    if q.shape[-1] > 256:
        raise ValueError(
            f'delta_recurrence: backend "fla" takes K up to 256, got {q.shape[-1]}; '
            'use more heads, or backend="torch".'
        )
    dtype = _common_dtype(q, k, v, a, b)
    o, final_state = _function("rwkv7", "chunk_rwkv7")(
        r=q.to(dtype),
        w=_per_channel(log_decay, q),
        k=k.to(dtype),
        v=v.to(dtype),
        a=a.to(dtype),
        b=b.to(dtype),
        **_options(scale, initial_state, output_final_state, cu_seqlens),
    )
    return o.to(v.dtype), final_state if output_final_state else None


def _check(operator, *tensors):
    """Refuses what fla cannot take; the operators have checked the shapes."""
    for x in tensors:
        if x is None:
            continue
        if x.dtype == torch.float64:
            raise ValueError(
                f'{operator}: backend "fla" takes float32, bfloat16 or float16, got float64; '
                'convert the tensors, or use backend="torch".'
            )
        if not _is_on_gpu(x):
            raise ValueError(
                f'{operator}: backend "fla" needs tensors on a GPU, got {x.device.type}; move them '
                'there, or use backend="auto".'
            )


def _is_on_gpu(x):
    return x.is_cuda


def _is_learned(x):
    return x.requires_grad and torch.is_grad_enabled()


def _common_dtype(*tensors):
    """fla's kernels multiply tensors of one dtype."""
    return functools.reduce(torch.promote_types, (x.dtype for x in tensors))


def _options(scale, initial_state, output_final_state, cu_seqlens):
    """The keywords that all of fla's functions share."""
    return {
        "scale": scale,
        "initial_state": None if initial_state is None else initial_state.float(),
        "output_final_state": output_final_state,
        "cu_seqlens": None if cu_seqlens is None else cu_seqlens.long(),
    }


def _per_channel(log_decay, q):
    """Log decays [B, T, H, K] in float32 from any form."""
    if log_decay is None:
        return torch.zeros_like(q, dtype=torch.float32)
    log_decay = log_decay.float()
    if log_decay.ndim < 4:
        log_decay = log_decay[..., None]
    return log_decay.expand(q.shape)


@functools.cache
def _function(module, name):
    """One of fla's public operators, or an ImportError that says what to install."""
    try:
        return getattr(importlib.import_module(f"fla.ops.{module}"), name)
    except ImportError as error:
        raise ImportError(
            f'backend "fla" needs flash-linear-attention ({error}); pip install longzoo[gpu].'
        ) from error
