"""Landmark attention to all earlier blocks on a CPU, a head and some queries at a time.

The same numbers as `attend_to_all` of zoo/layers/landmark_softmax.py, with two softmaxes that leave
the scores in the cache: with p_t|c that over the tokens t of block c, and w_c that over the
landmarks of earlier blocks and the logarithm of the own block's sum,

    P_t = w_c p_t|c,   o = sum_t P_t v_t

and, with do the gradient of o, dP_t = do^T v_t and g_c = sum_{t in c} P_t dP_t,

    ds_t = p_t|c (w_c dP_t - h_c),   h_c = g_c of an earlier block, w_c sum g of the own one
    ds_{landmark c} = g_c - w_c sum g

Queries are all that follow each other from one place on. In blocks after a query's own, w is 0.
"""

import functools

import torch

from ..kernels.attention_by_head import (
    BLOCK,
    gradients_again,
    heads_first,
    takes_blocks_by_head,
)
from ..kernels.host_products import product


def takes_all_by_head(q, k, v, first):
    """Whether `attend_to_all_by_head` is faster, and may run.

    Args: as of `attend_to_all`.
    """
    return first is not None and takes_blocks_by_head(q, k, v, q.shape[1], k.shape[1] * k.shape[2])


def attend_to_all_by_head(q, k, v, scale, first, otherwise):
    """`attend_to_all` of such a call.

    Args:
        q, k, v, scale, first: as there.
        otherwise: (q, k, v) to the same by PyTorch's differentiable operations.

    Returns:
        [B, Q, H, V] in v's dtype.
    """
    o_BQHV = _ToAll.apply(*(x.float() for x in (q, k, v)), scale, first, otherwise)
    return o_BQHV.to(v.dtype)


class _ToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale, first, otherwise):
        ctx.scale, ctx.first, ctx.otherwise = scale, first, otherwise
        ctx.save_for_backward(q, k, v)
        q_NQK, k_LSK, v_LSV = _laid_out(q, k, v, scale)
        repeats = q_NQK.shape[0] // k_LSK.shape[0]
        o_NQV = q_NQK.new_empty(*q_NQK.shape[:2], v.shape[-1])
        for part in _parts(first, q.shape[1], k.shape[2]):
            for n in range(q_NQK.shape[0]):
                k_SK, v_SV = (x[n // repeats, : part.seen] for x in (k_LSK, v_LSV))
                p_CMN, w_CM, _ = part.weights(q_NQK[n, part.rows], k_SK)
                p_CS = p_CMN.mul_(w_CM[..., None]).flatten(1)
                o_NQV[n, part.rows] = product(p_CS, v_SV.T, None)
        return o_NQV.unflatten(0, (q.shape[0], -1)).transpose(1, 2)

    @staticmethod
    def backward(ctx, do_BQHV):
        q, k, v = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants gradients of these gradients
            return *gradients_again(ctx, do_BQHV, ctx.otherwise), *[None] * 3
        (q_NQK, k_LSK, v_LSV), do_NQV = _laid_out(q, k, v, ctx.scale), heads_first(do_BQHV)
        repeats, dq_NQK = q_NQK.shape[0] // k_LSK.shape[0], torch.empty_like(q_NQK)
        dk_LKS, dv_LVS = (x.new_zeros(x.mT.shape) for x in (k_LSK, v_LSV))
        for part in _parts(ctx.first, q.shape[1], k.shape[2]):
            rows, seen = part.rows, slice(part.seen)
            for n in range(q_NQK.shape[0]):
                m, q_CK, do_CV = n // repeats, q_NQK[n, rows], do_NQV[n, rows]
                k_SK, v_SV = k_LSK[m, seen], v_LSV[m, seen]
                p_CMN, w_CM, is_earlier_CM = part.weights(q_CK, k_SK)
                p_CS = (p_CMN * w_CM[..., None]).flatten(1)
                dv_LVS[m, :, seen] += product(do_CV.T.contiguous(), p_CS.T, None)
                dscore_CS = product(do_CV, v_SV, None)
                # p_CS is used up: it becomes P dP.
                g_CM = p_CS.mul_(dscore_CS).view_as(p_CMN).sum(-1)
                share_CM = w_CM * g_CM.sum(-1, keepdim=True)
                dscore_CMN = dscore_CS.view_as(p_CMN).mul_(w_CM[..., None])
                dscore_CMN.sub_(torch.where(is_earlier_CM, g_CM, share_CM)[..., None]).mul_(p_CMN)
                dscore_CMN[..., -1] = torch.where(is_earlier_CM, g_CM - share_CM, 0)
                dq_NQK[n, rows] = product(dscore_CS, k_SK.T, None)
                dk_LKS[m, :, seen] += product(q_CK.T.contiguous(), dscore_CS.T, None)
        dq = dq_NQK.mul_(ctx.scale).unflatten(0, (q.shape[0], -1)).transpose(1, 2)
        dk, dv = (
            dx_LKS.mT.unflatten(0, (x.shape[0], -1)).transpose(1, 2).unflatten(1, x.shape[1:3])
            for dx_LKS, x in ((dk_LKS, k), (dv_LVS, v))
        )
        return dq, dk, dv, *[None] * 3


def _laid_out(q, k, v, scale):
    """q [B H, Q, K], scaled, k and v [B G, S, ...]; landmarks' values, which none takes, are 0."""
    v_LSV = heads_first(v.flatten(1, 2))
    v_LSV.unflatten(1, v.shape[1:3])[:, :, -1] = 0
    return heads_first(q, scale), heads_first(k.flatten(1, 2)), v_LSV


def _parts(first, count, size):
    for start in range(0, count, BLOCK):
        yield _Part(first, slice(start, min(start + BLOCK, count)), size)


class _Part:
    """Some queries.

    Args:
        first: the place of the first of all.
        rows: which of them they are.
        size: N, places of a block.

    Attributes:
        seen: how many keys are in the blocks up to the last one's own.
    """

    def __init__(self, first, rows, size):
        self.rows, self.size = rows, size
        number = functools.partial(torch.arange, device="cpu")  # whatever is PyTorch's default
        place_C = number(first + rows.start, first + rows.stop)
        self.own_C, slot_C = place_C // size, place_C % size
        self.low = (first + rows.start) // size
        num_blocks = (first + rows.stop - 1) // size + 1
        self.seen = num_blocks * size
        block_M = number(num_blocks)
        self.every_C = number(len(place_C))
        self.is_earlier_CM = block_M < self.own_C[:, None]
        self.is_not_earlier_CM = ~self.is_earlier_CM
        is_own_CM = block_M[self.low :] == self.own_C[:, None]
        is_after_CN = number(size) > slot_C[:, None]
        hidden = is_own_CM[..., None] & is_after_CN[:, None]
        # From the block of the first query on.
        zeros_CMN = torch.zeros_like(hidden, dtype=torch.float32)
        self.hidden_CMN = zeros_CMN.masked_fill_(hidden, -torch.inf)

    def weights(self, q_CK, k_SK):
        """(p [C, M, N], w [C, M], which blocks are earlier [C, M]); p of a landmark is 0."""
        score_CMN = product(q_CK, k_SK, None).unflatten(1, (-1, self.size))
        landmark_CM = score_CMN[..., -1].clone()
        score_CMN[..., -1] = -torch.inf
        score_CMN[:, self.low :] += self.hidden_CMN
        p_CMN = score_CMN.softmax(-1)
        blocks_CM = landmark_CM.masked_fill_(self.is_not_earlier_CM, -torch.inf)
        # The logarithm of the own block's sum, from its largest score and that one's share.
        most_C, share_C = (x[self.every_C, self.own_C].amax(-1) for x in (score_CMN, p_CMN))
        blocks_CM[self.every_C, self.own_C] = most_C - share_C.log_()
        return p_CMN, blocks_CM.softmax(-1), self.is_earlier_CM
