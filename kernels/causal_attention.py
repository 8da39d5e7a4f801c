"""Attention of every query to all keys of its document up to its own, on a CPU.

PyTorch's flash attention, which computes no score twice and keeps none: a third of the time that
blocks of queries take after 4,096 tokens, two thirds after 1,024. Where oneDNN's products are much
faster than those that it is made of, `attention_by_head` takes two thirds of its time. Both work in
float32 at least, as the blocks of `windowed_attention` do. Neither has a second gradient: there the
blocks come in.
"""

import torch

from .attention_by_head import attention_by_head, gradients_again, takes_blocks_by_head
from .autograd_rules import by_autograd_alone
from .export_scan import without_autocast

_NAME = "_scaled_dot_product_flash_attention_for_cpu"
# PyTorch has no public name for them; without, blocks of queries do.
_flash, _flash_backward = (
    getattr(torch.ops.aten, name, None) for name in (_NAME, f"{_NAME}_backward")
)


def takes_flash_attention(q, k, v, window, cu_seqlens):
    """Whether `causal_attention` may run, where nothing but scores is in the softmax.

    Args: as of `windowed_attention`, all keys the queries' own.
    """
    # Sizes last: a program that is compiled would be one for such sizes.
    return (
        None not in (_flash, _flash_backward)
        and q.device.type == "cpu"
        and type(q) is type(k) is type(v) is torch.Tensor
        and by_autograd_alone()
        and q.shape[1] == k.shape[1] > 1
        and q.shape[-1] == k.shape[-1] == v.shape[-1]
        and (cu_seqlens is None or q.shape[0] == 1)
        and (window is None or window >= _longest(q, cu_seqlens))
    )


def _longest(q, cu_seqlens):
    return q.shape[1] if cu_seqlens is None else int(cu_seqlens.diff().max())


def causal_attention(q, k, v, scale, cu_seqlens, in_blocks):
    """`windowed_attention` of such a call.

    Args:
        q, k, v, scale, cu_seqlens: as there.
        in_blocks: (q, k, v, scale) to the same by PyTorch's differentiable operations, for one
            document.

    Returns:
        o [B, T, H, V] in v's dtype.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    repeats = q.shape[2] // k.shape[2]
    lengths = [q.shape[1]] if cu_seqlens is None else [n for n in cu_seqlens.diff().tolist() if n]
    with without_autocast(q):
        own = (x.to(dtype) for x in (q, k, v))
        documents = zip(*(x.split(lengths, dim=1) for x in own), strict=True)
        outputs = [_of_document(*document, repeats, scale, in_blocks) for document in documents]
        o = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return o.to(v.dtype)


def _of_document(q, k, v, repeats, scale, in_blocks):
    if takes_blocks_by_head(q, k, v, q.shape[1], k.shape[1]):
        return attention_by_head(q, k, v, scale, True, lambda *x: in_blocks(*x, scale))
    if repeats > 1:
        k, v = (x.repeat_interleave(repeats, dim=2) for x in (k, v))
    return _Causal.apply(q, k, v, scale, in_blocks)


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BTHK, k_BTHK, v_BTHV, scale, in_blocks):
        o_BHTV, log_BHT = _flash(
            *(x.transpose(1, 2) for x in (q_BTHK, k_BTHK, v_BTHV)), 0.0, True, scale=scale
        )
        ctx.scale, ctx.in_blocks = scale, in_blocks
        ctx.save_for_backward(q_BTHK, k_BTHK, v_BTHV, o_BHTV, log_BHT)
        return o_BHTV.transpose(1, 2)

    @staticmethod
    def backward(ctx, do_BTHV):
        q_BTHK, k_BTHK, v_BTHV, o_BHTV, log_BHT = ctx.saved_tensors
        if torch.is_grad_enabled():
            found = gradients_again(ctx, do_BTHV, lambda *x: ctx.in_blocks(*x, ctx.scale))
            return *found, None, None
        tensors = (x.transpose(1, 2) for x in (do_BTHV, q_BTHK, k_BTHK, v_BTHV))
        found = _flash_backward(*tensors, o_BHTV, log_BHT, 0.0, True, scale=ctx.scale)
        return *(x.transpose(1, 2) for x in found), None, None
