"""Windowed attention in a program that torch.export writes; see `export_scan`.

All blocks of queries side by side, each with the band of keys that its window reaches. Without a
window it is PyTorch's own attention, or, where that lacks something, the definition.
"""

import torch
import torch.nn.functional as F

from .export_scan import count_chunks, from_chunks, into_chunks
from .windowed_attention import (
    MAX_BLOCK,
    _attend,
    _band_of_bias,
    windowed_attention_reference,
)


def windowed_attention_exported(
    q,
    k,
    v,
    window,
    *,
    scale,
    first_key,
    sinks,
    sink_logits,
    delay,
    distance_bias,
    query_bias,
    log_decay,
    block_length,
):
    """Arguments and results as `windowed_attention`; there are no packed documents."""
    extras = first_key, sinks, sink_logits, distance_bias, query_bias, log_decay
    if window is None and q.shape[1] == k.shape[1] and all(x is None for x in extras):
        dtype = torch.promote_types(q.dtype, torch.float32)
        heads_first = (x.transpose(1, 2).to(dtype) for x in (q, k, v))
        is_grouped = q.shape[2] > k.shape[2]
        o_BHTV = F.scaled_dot_product_attention(
            *heads_first, is_causal=True, scale=scale, enable_gqa=is_grouped
        )
        return o_BHTV.transpose(1, 2).to(v.dtype)
    has_bias = distance_bias is not None or query_bias is not None
    if window is None and (log_decay is None or has_bias):
        return windowed_attention_reference(
            q,
            k,
            v,
            scale=scale,
            first_key=first_key,
            sinks=sinks,
            sink_logits=sink_logits,
            delay=delay,
            distance_bias=distance_bias,
            query_bias=query_bias,
            log_decay=log_decay,
        )
    return _in_blocks(
        q,
        k,
        v,
        window,
        scale,
        first_key,
        sinks,
        sink_logits,
        delay,
        distance_bias,
        query_bias,
        log_decay,
        1 if q.shape[1] == 1 else block_length or MAX_BLOCK,
    )


def _in_blocks(
    q,
    k,
    v,
    window,
    scale,
    first_key,
    sinks,
    sink_logits,
    delay,
    distance_bias,
    query_bias,
    log_decay,
    length,
):
    dtype, (batch, time, num_heads, _) = torch.promote_types(q.dtype, torch.float32), q.shape
    num_keys, num_groups = k.shape[1:3]
    groups = num_groups, num_heads // num_groups
    count = count_chunks(time, length)
    # Without a window every block has all keys: bands would overlap by as much.
    band = num_keys if window is None else length + window - 1

    def grouped(x_BTHK):
        """Blocks of queries, [N B, G, R, C, K]."""
        x_NBCHK = into_chunks(x_BTHK.to(dtype), length)
        return x_NBCHK.flatten(0, 1).transpose(1, 2).unflatten(1, groups)

    def repeated(x_B):
        """What belongs to rows, for each of their blocks, [N B, ...]."""
        return x_B.expand(count, *x_B.shape).flatten(0, 1)

    starts_N1 = torch.arange(count, device=q.device)[:, None] * length + (num_keys - time - delay)
    i_NC = starts_N1 + torch.arange(length, device=q.device)
    if window is None:
        j_NS = torch.arange(band, device=q.device).expand(count, -1)
        visible_NCS = j_NS[:, None] <= i_NC[..., None]
    else:
        j_NS = starts_N1 - (window - 1) + torch.arange(band, device=q.device)
        visible_NCS = j_NS[:, None] <= i_NC[..., None]
        visible_NCS = visible_NCS & (j_NS[:, None] > i_NC[..., None] - window)
        visible_NCS = visible_NCS & (j_NS >= 0)[:, None]
    visible_NBCS = visible_NCS[:, None].expand(-1, batch, -1, -1)
    if first_key is not None:
        visible_NBCS = visible_NBCS & (j_NS[:, None] >= first_key[:, None])[:, :, None]
    # Queries that fill up the last block see some key, so that no softmax is over nothing.
    index_NS = j_NS.clamp(min=0).clamp(max=num_keys - 1)
    k_BGSK, v_BGSV = (
        x.to(dtype)[:, index_NS].transpose(0, 1).flatten(0, 1).transpose(1, 2) for x in (k, v)
    )
    extra = logits = bias = None
    if sinks is not None:
        q_BGRCK = grouped(sinks.q) * scale
        k_BMGK, v_BMGV = (repeated(x.to(dtype)) for x in (sinks.k, sinks.v))
        score_BGRCM = torch.einsum("bgrck,bmgk->bgrcm", q_BGRCK, k_BMGK)
        if sinks.bias is not None:
            bias_BTMH = sinks.bias.to(dtype).expand(batch, -1, -1, -1)
            bias_BHCM = into_chunks(bias_BTMH, length).flatten(0, 1).movedim(-1, 1)
            score_BGRCM = score_BGRCM + bias_BHCM.unflatten(1, groups)
        seen_BCM = (
            torch.arange(k_BMGK.shape[1], device=q.device)
            < (into_chunks(sinks.count, length).flatten(0, 1)[..., None])
        )
        score_BGRCM = score_BGRCM.masked_fill(~seen_BCM[:, None, None], -torch.inf)
        extra = score_BGRCM, v_BMGV[:, None].expand(-1, length, -1, -1, -1)
    if sink_logits is not None:
        logits = grouped(sink_logits.expand(batch, time, num_heads)[..., None])
    if distance_bias is not None:
        bias_HCS = _band_of_bias(distance_bias.to(dtype), window - 1, length, band)
        bias = bias_HCS.unflatten(0, groups)
    elif query_bias is not None:
        rows_NC = i_NC + delay - (num_keys - time)
        distance_CS = (window - 1) + torch.arange(length, device=q.device)[:, None]
        distance_CS = (distance_CS - torch.arange(band, device=q.device)).clamp(min=0)
        bias_BHNCS = query_bias(rows_NC.clamp(max=time - 1), distance_CS).to(dtype)
        bias_NBHCS = bias_BHNCS.movedim(2, 0).expand(-1, batch, -1, -1, -1)
        bias = bias_NBHCS.flatten(0, 1).unflatten(1, groups)
    q_BGRCK = grouped(q) * scale
    if log_decay is not None:
        # From the middle of each block; keys after it, which none of its queries see, as the last.
        steps_C = torch.arange(length, device=q.device) - length // 2
        steps_NS = (starts_N1 + length // 2 - j_NS).clamp(min=-(length // 2))
        q_CK = (steps_C[:, None] * log_decay).exp().to(dtype)
        k_NSK = (steps_NS[..., None] * log_decay).exp().to(dtype)
        k_B1SK = k_NSK[:, None].expand(-1, batch, -1, -1).flatten(0, 1)[:, None]
        q_BGRCK, k_BGSK = q_BGRCK * q_CK, k_BGSK * k_B1SK
    o_BGRCV = _attend(q_BGRCK, k_BGSK, v_BGSV, visible_NBCS.flatten(0, 1), extra, logits, bias)
    o_NBCHV = o_BGRCV.flatten(1, 2).transpose(1, 2).unflatten(0, (count, batch))
    return from_chunks(o_NBCHV, time).to(v.dtype)
