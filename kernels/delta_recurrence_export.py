"""The delta recurrence in a program that torch.export writes; see `export_scan`.

As `delta_recurrence_chunked`, with all chunks side by side and the states between them from a scan.
Gradients are autograd's, so nothing is done in place.
"""

import torch

from .delta_recurrence_sizes import CHUNK_LENGTH
from .export_scan import chunk_length, from_chunks, into_chunks, joined, scan, without_autocast
from .linear_recurrence import accumulator_dtype


def delta_recurrence_exported(
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
    """Arguments and results as `delta_recurrence`; there are no packed documents."""
    dtype, (batch, time, heads, key_dim) = accumulator_dtype(q), q.shape
    length = chunk_length(time, CHUNK_LENGTH)

    def split(x_BTHX):
        return into_chunks(x_BTHX.to(dtype), length).transpose(2, 3)

    with without_autocast(q):
        v_NBHCV = split(v)
        # Two readers and two writers per position, [N, B, H, C, 2, K].
        readers = torch.stack([split(a), split(q) * scale], dim=-2)
        writers = torch.stack([split(b), split(k)], dim=-2)
        if log_decay is None:
            log_decay = q.new_zeros(heads)
        if log_decay.ndim == 1:
            log_decay = log_decay.expand(batch, time, heads)
        if log_decay.ndim == 3:
            log_decay = log_decay[..., None]
        scores, readers, writers, decay_NBHK = _scores(readers, writers, split(log_decay).exp())
        scores = scores.unflatten(-1, (length, 2)).unflatten(-3, (length, 2))
        ab, ak, qb, qk = (scores[..., i, :, j] for i in (0, 1) for j in (0, 1))
        a_NBHCK, q_NBHCK = readers.unbind(-2)
        b_NBHCK, k_NBHCK = writers.unbind(-2)
        one_CC = torch.eye(length, dtype=dtype, device=q.device)
        # The names of `_DeltaScan`.
        solved = torch.linalg.solve_triangular(
            one_CC - ab, torch.cat([ak @ v_NBHCV, a_NBHCK], dim=-1), upper=False, unitriangular=True
        )
        u_NBHCV, w_NBHCK = solved.split([v.shape[-1], key_dim], dim=-1)
        one_KK = torch.eye(key_dim, dtype=dtype, device=q.device)
        transition_NBHKK = b_NBHCK.mT @ w_NBHCK + one_KK * decay_NBHK[..., None]
        update_NBHKV = b_NBHCK.mT @ u_NBHCV + k_NBHCK.mT @ v_NBHCV
        if initial_state is None:
            state = v_NBHCV.new_zeros(batch, heads, key_dim, v.shape[-1])
        else:
            state = initial_state.to(dtype)

        def step(state, transition, update):
            return (transition @ state[0] + update,), (state[0].clone(),)

        (state,), (entering_NBHKV,) = scan(step, (state,), transition_NBHKK, update_NBHKV)
        o_NBHCV = qb @ u_NBHCV + qk @ v_NBHCV + (q_NBHCK + qb @ w_NBHCK) @ entering_NBHKV
        o = from_chunks(o_NBHCV.transpose(2, 3), time)
    return o.to(v.dtype), state if output_final_state else None


def _scores(readers, writers, decay):
    """`delta_recurrence._scores`, of decays [N, B, H, C, 1 or K], with new tensors at each size.

    Returns:
        scores [N, B, H, 2 C, 2 C], readers and writers with the decay from the chunk's start and to
        its end, and the decay over the chunk [N, B, H, 1 or K].
    """
    a, q = readers.unbind(-2)
    own = (q[..., None, :] * writers).sum(-1)
    scores = torch.stack([torch.zeros_like(own), own], dim=-2)  # [..., C blocks, 2, 2]
    readers = torch.stack([a, q * decay], dim=-2)
    size, length = 1, readers.shape[-3]
    while size < length:
        (reads_1, reads_2), (writes_1, writes_2) = (
            x.unflatten(-3, (-1, 2, size)).unbind(-4) for x in (readers, writers)
        )
        meet = reads_2.flatten(-3, -2) @ writes_1.flatten(-3, -2).mT
        first, second = scores.unflatten(-3, (-1, 2)).unbind(-3)
        upper = torch.cat([first, torch.zeros_like(meet)], dim=-1)
        scores = torch.cat([upper, torch.cat([meet, second], dim=-1)], dim=-2)
        decay_1, decay_2 = decay.unflatten(-2, (-1, 2)).unbind(-2)
        readers = joined(reads_1, reads_2 * decay_1[..., None, None, :], dim=-3)
        writers = joined(writes_1 * decay_2[..., None, None, :], writes_2, dim=-3)
        decay, size = decay_1 * decay_2, 2 * size
    return scores.squeeze(-3), readers, writers, decay.squeeze(-2)
