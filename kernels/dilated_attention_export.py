"""Dilated attention in a program that torch.export writes; see `export_scan`.

Of each branch all segments side by side, and in them the slots of each head. Gradients are
autograd's.
"""

import torch

from .dilated_attention import NO_WEIGHT, _block_size, _is_fused, _merged
from .export_scan import count_chunks, from_chunks, into_chunks, without_autocast
from .linear_recurrence import accumulator_dtype


def dilated_attention_exported(q, k, v, branches, scale, offsets, log_decay, weight_gradient):
    """Arguments and results as `dilated_attention`, with its `Branch`es.

    There are no packed documents, and nothing is held from before.
    """
    dtype, (_, time, num_heads, _) = accumulator_dtype(q), q.shape
    heads_H1 = torch.arange(num_heads, device=q.device)[:, None]
    outputs, logs = [], []
    with without_autocast(q):
        for branch in branches:
            # A text that is shorter than a segment fills one.
            length = torch.sym_min(branch.length, time)
            offset_H = branch.offsets(num_heads, offsets, q.device)
            slots_C = torch.arange(count_chunks(length, branch.rate), device=q.device)
            # Slots that the segment does not have lie behind all that it has: nobody sees them.
            token_HC = (slots_C * branch.rate + offset_H[:, None]).clamp(max=length - 1)
            q_SHCK, k_SHCK, v_SHCV = (
                into_chunks(x.to(dtype), length).flatten(0, 1)[:, token_HC, heads_H1]
                for x in (q, k, v)
            )
            decay = None if log_decay is None else log_decay.detach().to(dtype) * branch.rate
            size = _block_size(branch.rate)
            o_SHCV, log_SHC = _attend(
                q_SHCK, k_SHCK, v_SHCV, scale, decay, size, not weight_gradient
            )
            tokens_T = torch.arange(length, device=q.device)
            has_HT = tokens_T % branch.rate == offset_H[:, None]
            o_SHTV, log_SHT = (x[:, :, tokens_T // branch.rate] for x in (o_SHCV, log_SHC))
            o_SHTV = torch.where(has_HT[..., None], o_SHTV, 0)
            log_SHT = torch.where(has_HT, log_SHT, NO_WEIGHT)
            batch_first = (
                x.unflatten(0, (-1, q.shape[0])).transpose(2, 3) for x in (o_SHTV, log_SHT)
            )
            o_BTHV, log_BTH = (from_chunks(x, time) for x in batch_first)
            outputs.append(o_BTHV)
            logs.append(log_BTH)
        return _merged(outputs, logs, weight_gradient).to(v.dtype)


def _attend(q_SHCK, k_SHCK, v_SHCV, scale, decay_K, size, may_fuse):
    """`dilated_attention._attend`, for any number of slots.

    Args:
        decay_K: log of the decay per slot; None: none.
        size: queries at a time under a decay, which is split between q and k around the middle of
            a block.
        may_fuse: whether the logarithms need no gradient.
    """
    count, device = q_SHCK.shape[2], q_SHCK.device
    keys_C = torch.arange(count, device=device)
    if decay_K is None:
        return _softmax(q_SHCK, k_SHCK, v_SHCV, scale, None, may_fuse)

    def repeated(x_SHCK):
        return x_SHCK.expand(num_blocks, *x_SHCK.shape).flatten(0, 1)

    num_blocks, segments = count_chunks(count, size), q_SHCK.shape[0]
    starts_N1 = torch.arange(num_blocks, device=device)[:, None] * size
    queries_NC = starts_N1 + torch.arange(size, device=device)
    steps_C = torch.arange(size, device=device) - size // 2
    query_CK = (steps_C[:, None] * decay_K).exp()
    seen_NC = keys_C < starts_N1 + size
    distance_NC = torch.where(seen_NC, starts_N1 + size // 2 - keys_C, 0)
    key_NCK = (distance_NC[..., None] * decay_K).exp()
    mask_NCC = torch.where(keys_C <= queries_NC[..., None], 0.0, -torch.inf).to(q_SHCK.dtype)
    q_NSHCK = into_chunks(q_SHCK.transpose(1, 2), size).transpose(2, 3) * query_CK
    k_NSHCK = k_SHCK * key_NCK[:, None, None]
    mask = mask_NCC[:, None, None].expand(-1, segments, -1, -1, -1).flatten(0, 1)
    o, log = _softmax(
        q_NSHCK.flatten(0, 1), k_NSHCK.flatten(0, 1), repeated(v_SHCV), scale, mask, may_fuse
    )
    o_SCHV, log_SCH = (
        from_chunks(x.unflatten(0, (num_blocks, segments)).transpose(2, 3), count) for x in (o, log)
    )
    return o_SCHV.transpose(1, 2), log_SCH.transpose(1, 2)


def _softmax(q, k, v, scale, mask, may_fuse):
    """(o, log of the denominators); mask None: causal."""
    if may_fuse and _is_fused(q) and k.shape[-1] == v.shape[-1]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, mask is None, attn_mask=mask, scale=scale
        )
    if mask is None:
        slots_C = torch.arange(q.shape[2], device=q.device)
        mask = torch.where(slots_C <= slots_C[:, None], 0.0, -torch.inf).to(q.dtype)
    score = q @ k.mT * scale + mask
    return score.softmax(-1) @ v, score.logsumexp(-1)
