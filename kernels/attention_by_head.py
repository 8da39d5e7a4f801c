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
from .export_scan import without_autocast
from .host_products import is_faster_here, product

BLOCK = 256  # queries
# Fewer queries or smaller heads are as fast in PyTorch's kernel; with more keys the scores of a
# block, 8 MB, would leave the cache.
LEAST_QUERIES, LEAST_WIDTH, MOST_KEYS = 512, 64, 1 << 13
# Beside products of all heads at once and passes over their scores.
LEAST_IN_BLOCK = 128


def takes_blocks_by_head(q, k, v, num_queries, num_keys, least=None):
    """Whether attention by head is faster than what PyTorch has, and may run.

    Args:
        q, k, v: of any float dtype, [..., K] and [..., V].
        num_queries, num_keys: T and S.
        least: queries that it takes; None: `LEAST_QUERIES`, beside PyTorch's kernel.
    """
    # Sizes last: a program that is compiled would be one for such sizes.
    return (
        q.device.type == "cpu"
        and type(q) is type(k) is type(v) is torch.Tensor
        and torch.promote_types(q.dtype, torch.float32) == torch.float32
        and by_autograd_alone()
        and is_faster_here()
        and torch.backends.mkldnn.enabled
        and num_queries >= (LEAST_QUERIES if least is None else least)
        and num_keys <= MOST_KEYS
        and min(q.shape[-1], v.shape[-1]) >= LEAST_WIDTH
    )


def attention_by_head(q, k, v, scale, is_causal, otherwise):
    """Softmax attention, where `takes_blocks_by_head` allows it.

    Args:
        q: [B, T, H, K] of any float dtype.
        k, v: [B, S, G, K] and [B, S, G, V]; G divides H: each is shared by H / G neighbours.
        scale: of the scores.
        is_causal: whether a query sees the keys up to its own, the last T being the queries', or
            all of them.
        otherwise: (q, k, v) to the same by PyTorch's differentiable operations.

    Returns:
        o [B, T, H, V] in float32.
    """
    with without_autocast(q):
        return _ByHead.apply(*(x.float() for x in (q, k, v)), scale, is_causal, otherwise)


class _ByHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BTHK, k_BSGK, v_BSGV, scale, is_causal, otherwise):
        q_NTK, k_MSK, v_MSV = _laid_out(q_BTHK, k_BSGK, v_BSGV, scale)
        o_NTV, _ = attend(q_NTK, k_MSK, v_MSV, is_causal)
        ctx.scale, ctx.is_causal, ctx.otherwise = scale, is_causal, otherwise
        ctx.save_for_backward(q_BTHK, k_BSGK, v_BSGV, o_NTV)
        return _as_given(o_NTV, q_BTHK)

    @staticmethod
    def backward(ctx, do_BTHV):
        *inputs, o_NTV = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *gradients_again(ctx, do_BTHV, ctx.otherwise), None, None, None
        found = attend_gradients(
            *_laid_out(*inputs, ctx.scale), o_NTV, heads_first(do_BTHV), ctx.is_causal
        )
        dq, dk, dv = (_as_given(dx, x) for dx, x in zip(found, inputs, strict=True))
        return dq * ctx.scale, dk, dv, None, None, None


def _laid_out(q_BTHK, k_BSGK, v_BSGV, scale):
    return heads_first(q_BTHK, scale), heads_first(k_BSGK), heads_first(v_BSGV)


def _as_given(x_NTK, like_BTHK):
    """Rows and heads [B H, T, ...] to [B, T, H, ...]."""
    return x_NTK.unflatten(0, (like_BTHK.shape[0], -1)).transpose(1, 2)


def gradients_again(ctx, do, function):
    """Gradients that have gradients, of the first three inputs; None for those nobody wants.

    Args:
        ctx: of a function of autograd that saved them first.
        do: gradient of its output.
        function: of the three, by PyTorch's differentiable operations.
    """
    inputs = ctx.saved_tensors[:3]
    wanted = [x for x, needed in zip(inputs, ctx.needs_input_grad) if needed]
    with without_autocast(do):
        found = iter(torch.autograd.grad(function(*inputs), wanted, do, create_graph=True))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[:3]]


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


def attend_block(q_BGRCK, k_BGSK, v_BGSV, visible_BCS, logits_BGRC1, bias):
    """Attention of a block of queries to the keys it is shown, without gradients.

    Args:
        q_BGRCK: scaled; R heads share keys.
        k_BGSK, v_BGSV: float32, as q.
        visible_BCS: bool, of all rows, or [1, C, S].
        logits_BGRC1: of each query, what takes part without a value; None: nothing.
        bias: of scores, broadcast to [B, G, R, C, S]; None: nothing.

    Returns:
        o [B, G, R, C, V].
    """
    size, shape = k_BGSK.shape[2], q_BGRCK.shape
    mask_BCS = q_BGRCK.new_zeros(visible_BCS.shape).masked_fill_(~visible_BCS, -torch.inf)
    mask_BCS = mask_BCS.expand(shape[0], -1, -1)
    if bias is not None:
        bias = bias.expand(*shape[:4], size)
    if logits_BGRC1 is not None:  # that of a key 0, whose value is 0
        logits_BGRC1 = logits_BGRC1.expand(*shape[:4], 1)
        k_BGSK, v_BGSV = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (k_BGSK, v_BGSV))
    q_BGRCK, k_BGSK, v_BGSV = (x.contiguous() for x in (q_BGRCK, k_BGSK, v_BGSV))
    o_BGRCV = q_BGRCK.new_empty(*shape[:4], v_BGSV.shape[-1])
    for b in range(shape[0]):
        for g in range(shape[1]):
            score_RCS = product(q_BGRCK[b, g].flatten(0, 1), k_BGSK[b, g], None)
            score_RCS = score_RCS.unflatten(0, shape[2:4])
            of_keys_RCS = score_RCS[..., :size]
            if bias is not None:
                of_keys_RCS += bias[b, g]
            of_keys_RCS += mask_BCS[b]
            if logits_BGRC1 is not None:
                score_RCS[..., size:] = logits_BGRC1[b, g]
            p_NS = score_RCS.flatten(0, 1).softmax(-1)
            o_BGRCV[b, g] = product(p_NS, v_BGSV[b, g].T, None).unflatten(0, shape[2:4])
    return o_BGRCV


def padded_scores(q_BCHK, k_SHK):
    """q^T k [B, H, C, S + 1], a head at a time, without gradients; what is last has no meaning.

    Args:
        q_BCHK, k_SHK: float32; all rows have the same k.
    """
    q_BHCK, k_HSK = q_BCHK.transpose(1, 2).contiguous(), k_SHK.transpose(0, 1).contiguous()
    score_BHCS = q_BCHK.new_zeros(*q_BHCK.shape[:3], k_HSK.shape[1] + 1)
    for b in range(len(q_BHCK)):
        for h, k_SK in enumerate(k_HSK):
            score_BHCS[b, h, :, :-1] = product(q_BHCK[b, h], k_SK, None)
    return score_BHCS


class _Blocks:
    """(first query, last + 1, keys that are seen) of each block of queries, and their scores."""

    def __init__(self, length, num_keys, is_causal):
        size, older, self.hidden_CC = min(BLOCK, length), num_keys - length, None
        self.bounds = []
        for start in range(0, length, size):
            end = min(start + size, length)
            self.bounds.append((start, end, older + end if is_causal else num_keys))
        if is_causal:
            hidden_CC = torch.full((size, size), -torch.inf, dtype=torch.float32, device="cpu")
            self.hidden_CC = hidden_CC.triu_(1)

    def __iter__(self):
        return iter(self.bounds)

    def scores(self, q_CK, k_SK):
        """[C, S]; -inf for keys after a query's own, which are at the end."""
        score_CS, count = product(q_CK, k_SK, None), q_CK.shape[0]
        if self.hidden_CC is not None:
            score_CS[:, -count:] += self.hidden_CC[:count, :count]
        return score_CS
