"""The linear recurrence in a program that torch.export writes; see `export_scan`.

As `linear_recurrence_chunked`, with all chunks side by side and the states between them from a
scan. Gradients are autograd's.
"""

import torch

from .export_scan import chunk_length, from_chunks, into_chunks, joined, scan, without_autocast
from .linear_recurrence import CHUNK_LENGTH, _decay_factors, _scaled, _visible, accumulator_dtype


def linear_recurrence_exported(
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
    """Arguments and results as `linear_recurrence`; there are no packed documents."""
    dtype, (batch, time, heads, key_dim) = accumulator_dtype(q), q.shape
    length = chunk_length(time, CHUNK_LENGTH)

    def split(x_BTHX):
        return into_chunks(x_BTHX.to(dtype), length).transpose(2, 3)

    with without_autocast(q):
        q_NBHCK, k_NBHCK, v_NBHCV = split(q) * scale, split(k), split(v)
        if log_decay is not None and log_decay.ndim == 1 and output_final_state:
            # What fills up the last chunk must not decay the state, as zeros by token do not.
            log_decay = log_decay.expand(batch, time, heads)
        if log_decay is not None and log_decay.ndim == 1:
            gates = log_decay.to(dtype)[:, None, None].expand(-1, length, 1)
        elif log_decay is not None:
            gates = split(log_decay if log_decay.ndim == 4 else log_decay[..., None])
        else:
            gates = None
        bonus = None if bonus is None else bonus.to(dtype)
        if gates is not None and gates.shape[-1] > 1:
            o_NBHCV, query, key, whole = _by_channel(q_NBHCK, k_NBHCK, v_NBHCV, gates.exp(), bonus)
        else:
            o_NBHCV, query, key, whole = _by_head(q_NBHCK, k_NBHCK, v_NBHCV, gates, bonus)
        if bonus is not None:
            own_NBHC1 = (q_NBHCK * bonus[:, None] * k_NBHCK).sum(-1, keepdim=True)
            o_NBHCV = o_NBHCV + own_NBHC1 * v_NBHCV

        update_NBHKV = _scaled(k_NBHCK, key).mT @ v_NBHCV
        if initial_state is None:
            state = q_NBHCK.new_zeros(batch, heads, key_dim, v.shape[-1])
        else:
            state = initial_state.to(dtype)
        by_chunk = whole is not None and whole.ndim == update_NBHKV.ndim

        def step(state, update, decay=whole):
            return (_scaled(state[0], decay) + update,), (state[0].clone(),)

        parts = (update_NBHKV, whole) if by_chunk else (update_NBHKV,)
        (state,), (entering_NBHKV,) = scan(step, (state,), *parts)
        o_NBHCV = o_NBHCV + _scaled(q_NBHCK, query) @ entering_NBHKV
        o = from_chunks(o_NBHCV.transpose(2, 3), time)
    return o.to(v.dtype), state if output_final_state else None


def _by_head(q_NBHCK, k_NBHCK, v_NBHCV, gates, bonus):
    """What each position reads of its own chunk; factors on queries, on keys and on the state."""
    length, strict = q_NBHCK.shape[-2], bonus is not None
    score_NBHCC = q_NBHCK @ k_NBHCK.mT
    if gates is None:
        seen_CC = _visible(length, strict, q_NBHCK.device).to(score_NBHCC.dtype)
        return (score_NBHCC * seen_CC) @ v_NBHCV, None, None, None
    decay = _decay_factors(gates, strict)
    return (score_NBHCC * decay.scores) @ v_NBHCV, decay.query, decay.key, decay.state


def _by_channel(q_NBHCK, k_NBHCK, v_NBHCV, decay_NBHCK, bonus):
    """The same with a decay per channel; the pairs of blocks of `linear_recurrence_channels`."""
    o_NBHCV = torch.zeros_like(v_NBHCV)
    if bonus is None:
        o_NBHCV = (q_NBHCK * k_NBHCK).sum(-1, keepdim=True) * v_NBHCV
    query = decay_NBHCK if bonus is None else torch.ones_like(decay_NBHCK)
    key, whole = torch.ones_like(decay_NBHCK), decay_NBHCK
    width, length = 1, q_NBHCK.shape[-2]
    while width < length:
        tensors = q_NBHCK, k_NBHCK, v_NBHCV, query, key
        halves = [x.unflatten(-2, (-1, 2, width)).unbind(-3) for x in tensors]
        (_, q), (k, _), (v, _), (query_1, query_2), (key_1, key_2) = halves
        read = ((q * query_2) @ (k * key_1).mT) @ v
        o_NBHCV = o_NBHCV + joined(torch.zeros_like(read), read)
        whole_1, whole_2 = whole.unflatten(-2, (-1, 2)).unbind(-2)
        query = joined(query_1, query_2 * whole_1[..., None, :])
        key = joined(key_1 * whole_2[..., None, :], key_2)
        whole, width = whole_1 * whole_2, 2 * width
    return o_NBHCV, query, key, whole.mT
