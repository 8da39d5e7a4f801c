"""Softmax attention in float32 on a CPU, a head and a block of queries at a time.

    p_ij = exp(s_ij - l_i),  s_ij = q_i^T k_j,  l_i = log sum_j exp(s_ij),  o_i = sum_j p_ij v_j

for keys j up to query i's own, or for all of them. The scores of a block stay in the cache from
the product that makes them to the one that uses them up, and both are large enough for oneDNN to
run at full speed, which PyTorch's flash attention, in tiles of 32 queries by MKL, is far from
(kernels/bench/LOG.md). The gradients make them once more,

    dv_j = sum_i p_ij do_i,   ds_ij = p_ij (do_i^T v_j - do_i^T o_i),
    dq_i = sum_j ds_ij k_j,   dk_j = sum_i ds_ij q_i
"""

import torch

from .autograd_rules import by_autograd_alone
from .host_products import is_faster_here, product

BLOCK = 256  # queries
# Fewer queries or smaller heads are as fast in PyTorch's kernel; with more keys the scores of a
# block, 8 MB, would leave the cache.
LEAST_QUERIES, LEAST_WIDTH, MOST_KEYS = 512, 64, 1 << 13


def takes_blocks_by_head(q, k, v, num_queries, num_keys):
    """Whether `attend` is the faster one, and may run.

    Args:
        q, k, v: of any float dtype, [..., K] and [..., V].
        num_queries, num_keys: T and S.
    """
    # Sizes last: a program that is compiled would be one for such sizes.
    return (
        q.device.type == "cpu"
        and type(q) is type(k) is type(v) is torch.Tensor
        and torch.promote_types(q.dtype, torch.float32) == torch.float32
        and by_autograd_alone()
        and is_faster_here()
        and torch.backends.mkldnn.enabled
        and num_queries >= LEAST_QUERIES
        and num_keys <= MOST_KEYS
        and min(q.shape[-1], v.shape[-1]) >= LEAST_WIDTH
    )


def heads_first(x_BTHK, scale=None):
    """[B H, T, K] float32, laid out like that, and scaled."""
    x_BHTK = x_BTHK.transpose(1, 2)
    x_BHTK = x_BHTK.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    return (x_BHTK if scale is None else x_BHTK.mul_(scale)).flatten(0, 1)


def attend(q_NTK, k_MSK, v_MSV, is_causal, wants_log=False):
    """Outputs and the logarithms of sums.

    Args:
        q_NTK: queries of N rows and heads, scaled, float32, contiguous, as keys and values.
        k_MSK, v_MSV: of M, which divides N: each is shared by N / M neighbours.
        is_causal: whether a query sees the keys up to its own, the last T being the queries', or
            all of them.
        wants_log: whether l is asked for.

    Returns:
        (o [N, T, V], l [N, T] or None).
    """
    length, repeats = q_NTK.shape[1], q_NTK.shape[0] // k_MSK.shape[0]
    o_NTV = q_NTK.new_empty(*q_NTK.shape[:2], v_MSV.shape[2])
    log_NT = q_NTK.new_empty(q_NTK.shape[:2]) if wants_log else None
    blocks = _Blocks(length, k_MSK.shape[1], is_causal)
    for n in range(q_NTK.shape[0]):
        k_SK, v_SV = k_MSK[n // repeats], v_MSV[n // repeats]
        for start, end, seen in blocks:
            score_CS = blocks.scores(q_NTK[n, start:end], k_SK[:seen])
            p_CS = score_CS.softmax(-1)
            o_NTV[n, start:end] = product(p_CS, v_SV[:seen].T, None)
            if wants_log:
                log_NT[n, start:end] = _log_sum(score_CS, p_CS)
    return o_NTV, log_NT


def _log_sum(score_CS, p_CS):
    """l [C], from the largest score and its share, exp(s) / exp(l)."""
    return score_CS.amax(-1) - p_CS.amax(-1).log_()


def attend_gradients(q_NTK, k_MSK, v_MSV, o_NTV, do_NTV, is_causal, log_NT=None):
    """Gradients of `attend`, of its outputs alone.

    Args: as there, and
        o_NTV: the outputs; do_NTV: their gradients.
        log_NT: l of a softmax that these keys are a part of, whose outputs are o; None: of these
            keys alone.

    Returns:
        (dq [N, T, K], of the scaled queries, dk [M, S, K], dv [M, S, V]).
    """
    length, repeats = q_NTK.shape[1], q_NTK.shape[0] // k_MSK.shape[0]
    dq_NTK = torch.empty_like(q_NTK)
    dk_MKS, dv_MVS = (
        torch.zeros_like(x.mT, memory_format=torch.contiguous_format) for x in (k_MSK, v_MSV)
    )
    delta_NT = (do_NTV * o_NTV).sum(-1)
    q_NKT, do_NVT = q_NTK.mT.contiguous(), do_NTV.mT.contiguous()
    blocks = _Blocks(length, k_MSK.shape[1], is_causal)
    for n in range(q_NTK.shape[0]):
        m = n // repeats
        for start, end, seen in blocks:
            rows, k_SK, v_SV = slice(start, end), k_MSK[m, :seen], v_MSV[m, :seen]
            score_CS = blocks.scores(q_NTK[n, rows], k_SK)
            p_CS = score_CS.softmax(-1)
            if log_NT is not None:
                p_CS.mul_((_log_sum(score_CS, p_CS) - log_NT[n, rows]).exp_()[:, None])
            dv_MVS[m, :, :seen] += product(do_NVT[n, :, rows].contiguous(), p_CS.T, None)
            ds_CS = product(do_NTV[n, rows], v_SV, None)
            ds_CS.sub_(delta_NT[n, rows, None]).mul_(p_CS)
            dq_NTK[n, rows] = product(ds_CS, k_SK.T, None)
            dk_MKS[m, :, :seen] += product(q_NKT[n, :, rows].contiguous(), ds_CS.T, None)
    return dq_NTK, dk_MKS.mT, dv_MVS.mT


class _Blocks:
    """(first query, last + 1, keys that are seen) of each block of queries, and their scores."""

    def __init__(self, length, num_keys, is_causal):
        size, older, self.hidden_CC = min(BLOCK, length), num_keys - length, None
        self.bounds = []
        for start in range(0, length, size):
            end = min(start + size, length)
            self.bounds.append((start, end, older + end if is_causal else num_keys))
        if is_causal:
            self.hidden_CC = torch.full((size, size), -torch.inf).triu_(1)

    def __iter__(self):
        return iter(self.bounds)

    def scores(self, q_CK, k_SK):
        """[C, S]; -inf for keys after a query's own, which are at the end."""
        score_CS, count = product(q_CK, k_SK, None), q_CK.shape[0]
        if self.hidden_CC is not None:
            score_CS[:, -count:] += self.hidden_CC[:count, :count]
        return score_CS
