"""Softmax attention by transformers' own functions: what our layers have, in their terms."""

import math

import torch
from torch.nn.attention.flex_attention import create_block_mask

from ..kernels.windowed_attention import visible_keys

# log of how large numbers may be that decays are shared out to.
ROOM = 8.0


def mask_arguments(
    name,
    q_BTHK,
    k_BSHK,
    window,
    cu_seqlens=None,
    first_key=None,
    visible_BS=None,
    bias_BHTS=None,
):
    """Which keys are visible, in the terms of one of transformers' attention functions.

    A bias is as large as all scores of a row; in a mask of numbers it has the dtype of queries.

    Args:
        name: of the implementation.
        q_BTHK: queries.
        k_BSHK: keys.
        window: W or None.
        cu_seqlens, first_key: as of `windowed_attention`.
        visible_BS: instead of all these, for one query per row, bool.
        bias_BHTS: what is added to scores, [B or 1, H, T, S]; None: nothing.

    Returns:
        Its keyword arguments.
    """
    length, num_keys, device = q_BTHK.shape[1], k_BSHK.shape[1], q_BTHK.device
    if name.startswith("flash"):
        if visible_BS is not None:
            return {"attention_mask": visible_BS.long()}
        arguments = {"attention_mask": None, "sliding_window": window}
        if first_key is not None:
            keys_S = torch.arange(num_keys, device=device)
            arguments["attention_mask"] = (keys_S >= first_key[:, None]).long()
        if cu_seqlens is not None:
            bounds, longest = cu_seqlens.int(), int(cu_seqlens.diff().max())
            for side in "qk":
                arguments |= {f"cu_seq_lens_{side}": bounds, f"max_length_{side}": longest}
        return arguments
    if visible_BS is not None:
        visible_BTS = visible_BS[:, None]
    else:
        documents = {"cu_seqlens": cu_seqlens, "first_key": first_key}
        visible_BTS = visible_keys(length, num_keys, window, **documents, device=device)
    if name == "flex_attention":
        visible_BTS = visible_BTS.expand(len(q_BTHK), -1, -1)
        sizes = len(q_BTHK), None, length, num_keys
        mask = create_block_mask(lambda b, h, i, j: visible_BTS[b, i, j], *sizes, device=device)
        if bias_BHTS is None:
            return {"attention_mask": mask}
        # A mask of numbers would be that of the first head alone.
        return {"attention_mask": mask, "position_bias": bias_BHTS.expand(len(q_BTHK), -1, -1, -1)}
    if bias_BHTS is not None:
        bias_BHTS = bias_BHTS.to(q_BTHK.dtype).masked_fill(~visible_BTS[:, None], -torch.inf)
        return {"attention_mask": bias_BHTS}
    is_plain = visible_BS is None and cu_seqlens is None and first_key is None
    if is_plain and length == num_keys <= (window or num_keys):
        return {"attention_mask": None}  # causal, which they are by themselves, and faster
    return {"attention_mask": visible_BTS[:, None]}


def all_biases(length, num_keys, device, distance_bias=None, query_bias=None, slot_bias=None):
    """What is added to all scores of a pass, or of a step, [B or 1, H, T, S]; None: nothing.

    Args:
        length, num_keys, device: T, S and where they are.
        distance_bias, query_bias: as of `windowed_attention`.
        slot_bias: as of `attention_step`.
    """
    if slot_bias is not None:
        return slot_bias[:, :, None]
    if query_bias is None and distance_bias is None:
        return None
    distance_TS = query_distances(length, num_keys, device)
    if query_bias is not None:
        return query_bias(torch.arange(length, device=device), distance_TS)
    return distance_bias[None, :, distance_TS.clamp(max=distance_bias.shape[1] - 1)]


def query_distances(length, num_keys, device):
    """How far before each of the last so many tokens each key is, [T, S]; 0 for later ones."""
    i_T1 = torch.arange(num_keys - length, num_keys, device=device)[:, None]
    return (i_T1 - torch.arange(num_keys, device=device)).clamp(min=0)


def decayed(q_BTHK, k_BSHK, log_decay, steepest, distance=None):
    """Queries and keys whose products decay by distance, for attention that knows of no decay.

    Of a pass with powers counted from its middle, so that it must not be too long.

    Args:
        q_BTHK: queries, the last tokens.
        k_BSHK: keys.
        log_decay: as of `windowed_attention`.
        steepest: the largest of -log_decay, a number.
        distance: of a step, as of `attention_step`; None: of a pass.

    Raises:
        ValueError: a pass so long that a number could be infinite.
    """
    if distance is not None:
        return q_BTHK, k_BSHK * (distance[..., None, None] * log_decay).exp().to(k_BSHK.dtype)
    length, num_keys = q_BTHK.shape[1], k_BSHK.shape[1]
    # A product may be of the tokens at both ends, even if it is not seen.
    most = int((math.log(torch.finfo(k_BSHK.dtype).max) - ROOM) / steepest)
    if num_keys > most:
        raise ValueError(
            f"position_embedding_type 'xpos' takes up to {most} tokens in {k_BSHK.dtype} with this "
            f"attn_implementation, got {num_keys}; use 'banded', which has no limit."
        )
    place_S1 = torch.arange(num_keys, device=k_BSHK.device)[:, None] - num_keys // 2
    q_factor_TK = (place_S1[num_keys - length :] * log_decay).exp()[:, None]
    k_factor_SK = (-place_S1 * log_decay).exp()[:, None]
    return q_BTHK * q_factor_TK.to(q_BTHK.dtype), k_BSHK * k_factor_SK.to(k_BSHK.dtype)
