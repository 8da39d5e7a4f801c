"""The chunked linear recurrence with a decay per channel (GLA, RWKV-5, RWKV-6), in plain PyTorch.

`channel_scan` is the walk over chunks that `linear_recurrence` takes for this form of `log_decay`.
Decay between key j and query i now stands inside the scalar product,

    P_ij = sum_a q_ia exp(r_ia - c_ja) k_ja        for j < i, in one chunk

with c the cumulative log decay and r the one a query reads with: c, or the c before its own token
if that is read through `bonus`. Two neighbouring blocks of W positions meet at a boundary b, and
exp(r_i - c_j) = exp(r_i - c_b) exp(c_b - c_j) splits there into a factor of the later block's
queries and one of the earlier block's keys: the pair is a single product, whatever the decay. With
W = 1, 2, 4 ... C/2 such pairs cover the chunk below its diagonal. A factor that reaches to the edge
of a block reaches to the edge of the next wider one by the decay of the whole block between: so
decays are multiplied and never divided, log decays are not even added up, and nothing is clamped.
"""

import torch
import torch.nn.functional as F

from .autograd_rules import by_formula


def channel_scan(q_NHCK, k_NHCK, v_NHCV, log_decay_NHCK, bonus_HK, state_NHKV, counts):
    """Outputs and final states of all chunks, with gradients by formula.

    Args:
        q_NHCK, k_NHCK, v_NHCV, log_decay_NHCK: chunks in the order of the walk: step n takes chunk
            n of every document that has one, longest documents first. C is any length.
        bonus_HK: weight of the current token, which is then not read otherwise; or None.
        state_NHKV: state before the first token, one per document; None is zero.
        counts: how many documents take part in each step.

    Returns:
        (o_NHCV, final state [N, H, K, V], one per document).
    """
    length = q_NHCK.shape[2]
    padding = (1 << (length - 1).bit_length()) - length
    inputs = q_NHCK, k_NHCK, v_NHCV, log_decay_NHCK
    if padding:
        # Tokens of zeros that decay by nothing leave the state as it is.
        inputs = [F.pad(x, (0, 0, 0, padding)) for x in inputs]
    o_NHCV, final_NHKV = _ChannelScan.apply(*inputs, bonus_HK, state_NHKV, counts)
    return o_NHCV[:, :, :length], final_NHKV


class _ChannelScan(torch.autograd.Function):
    """With dP_ij = do_i . v_j, f the factor of a query or key up to the boundary of its pair, F the
    one up to the chunk's start or end, S the state that enters the chunk and dS the gradient of the
    one that leaves it, and the sums over the pairs of all widths:

        o  = P v                        + F (q . S)
        dq = sum of f (dP (f k))        + F (do S^T)
        dk = sum of f (dP^T (f q))      + F (v dS^T)
        dv = P^T do                     + (F k) dS

    A log decay counts wherever it is part of a factor: its gradient is the sum of q dq over the
    queries that reach back beyond it inside their block, of k dk over the keys that reach on beyond
    it, for each width, and of S dS over the whole chunk. (The difference of all q dq and all k dk
    that come later is the same number, but of its digits most cancel.)
    """

    @staticmethod
    def forward(ctx, q_NHCK, k_NHCK, v_NHCV, log_decay_NHCK, bonus_HK, initial_NHKV, counts):
        decay_NHCK = log_decay_NHCK.exp()
        length, strict = q_NHCK.shape[2], bonus_HK is not None
        scores_NHCC = q_NHCK.new_zeros(*q_NHCK.shape[:3], length)
        reach = _Reach(decay_NHCK, strict)
        for width in _widths(length):
            q, k = _later(q_NHCK, width), _earlier(k_NHCK, width)
            q = q * _later(reach.query_NHCK, width)
            k = k * _earlier(reach.key_NHCK, width)
            _pairs(scores_NHCC, width).copy_(_unflatten(q @ k.mT, scores_NHCC))
            reach.widen(width)
        own_NHCK = q_NHCK * k_NHCK if bonus_HK is None else q_NHCK * bonus_HK[:, None] * k_NHCK
        scores_NHCC.diagonal(dim1=-2, dim2=-1).copy_(own_NHCK.sum(-1))

        o_NHCV = scores_NHCC @ v_NHCV
        state = initial_NHKV
        if state is None:
            state = q_NHCK.new_zeros(counts[0], *q_NHCK.shape[1::2], v_NHCV.shape[-1])
        whole_NHK1 = reach.whole_NHCK.mT
        # What each chunk adds to the state, then in its place the state that enters the chunk.
        states_NHKV = (k_NHCK * reach.key_NHCK).mT @ v_NHCV
        finished = []
        for now in _steps(counts):
            count = now.stop - now.start
            finished.append(state[count:])
            entering, state = state[:count], states_NHKV[now] + whole_NHK1[now] * state[:count]
            states_NHKV[now] = entering
        # Documents leave the walk shortest first.
        final_NHKV = torch.cat([state, *finished[::-1]])
        _add_product(o_NHCV, q_NHCK * reach.query_NHCK, states_NHKV)
        ctx.counts, ctx.has_initial = counts, initial_NHKV is not None
        ctx.save_for_backward(
            q_NHCK, k_NHCK, v_NHCV, decay_NHCK, bonus_HK, scores_NHCC, states_NHKV
        )
        return o_NHCV, final_NHKV

    @staticmethod
    @by_formula
    def backward(ctx, do_NHCV, dfinal_NHKV):
        (
            q_NHCK,
            k_NHCK,
            v_NHCV,
            decay_NHCK,
            bonus_HK,
            scores_NHCC,
            states_NHKV,
        ) = ctx.saved_tensors
        length, strict = q_NHCK.shape[2], bonus_HK is not None
        do_NHCV = do_NHCV.contiguous()
        dscores_NHCC = do_NHCV @ v_NHCV.mT
        dv_NHCV = scores_NHCC.mT @ do_NHCV
        dq_NHCK, dk_NHCK = torch.zeros_like(q_NHCK), torch.zeros_like(k_NHCK)
        needs_decay = ctx.needs_input_grad[3]
        dlog_decay_NHCK = torch.zeros_like(decay_NHCK) if needs_decay else None
        reach = _Reach(decay_NHCK, strict)
        for width in _widths(length):
            query, key = _later(reach.query_NHCK, width), _earlier(reach.key_NHCK, width)
            q, k = _later(q_NHCK, width) * query, _earlier(k_NHCK, width) * key
            dpairs = _pairs(dscores_NHCC, width).flatten(0, 1)
            dquery, dkey = dpairs @ k, dpairs.mT @ q
            _later(dq_NHCK, width).addcmul_(dquery, query)
            _earlier(dk_NHCK, width).addcmul_(dkey, key)
            if needs_decay and (width > 1 or not strict):
                _later(dlog_decay_NHCK, width).add_(_until(q.mul_(dquery), strict))
                _earlier(dlog_decay_NHCK, width).add_(_since(k.mul_(dkey)))
            reach.widen(width)

        dquery_NHCK = (do_NHCV @ states_NHKV.mT).mul_(reach.query_NHCK)
        dq_NHCK += dquery_NHCK
        whole_NHK1 = reach.whole_NHCK.mT
        # What each chunk adds to the gradient, then that of the state that leaves the chunk.
        dstates_NHKV = (q_NHCK * reach.query_NHCK).mT @ do_NHCV
        dstate = dfinal_NHKV[:0]
        for now in reversed(list(_steps(ctx.counts))):
            count, running = now.stop - now.start, len(dstate)
            # Documents whose last chunk this is join with the gradient of their final state.
            leaving = torch.cat([dstate, dfinal_NHKV[running:count]]) if running < count else dstate
            dstate = dstates_NHKV[now] + whole_NHK1[now] * leaving
            dstates_NHKV[now] = leaving
        dkey_NHCK = (v_NHCV @ dstates_NHKV.mT).mul_(reach.key_NHCK)
        dk_NHCK += dkey_NHCK
        _add_product(dv_NHCV, k_NHCK * reach.key_NHCK, dstates_NHKV)
        if needs_decay:
            dlog_decay_NHCK += _until(dquery_NHCK.mul_(q_NHCK), strict)
            dlog_decay_NHCK += _since(dkey_NHCK.mul_(k_NHCK))
            through_NHK = torch.einsum("nhkv,nhkv->nhk", states_NHKV, dstates_NHKV)
            dlog_decay_NHCK += (through_NHK * whole_NHK1[..., 0])[:, :, None]
        down_NHC1 = dscores_NHCC.diagonal(dim1=-2, dim2=-1)[..., None]
        dbonus_HK = None
        if bonus_HK is None:
            dq_NHCK.addcmul_(down_NHC1, k_NHCK)
            dk_NHCK.addcmul_(down_NHC1, q_NHCK)
        else:
            down_NHCK = down_NHC1 * bonus_HK[:, None]
            dq_NHCK.addcmul_(down_NHCK, k_NHCK)
            dk_NHCK.addcmul_(down_NHCK, q_NHCK)
            if ctx.needs_input_grad[4]:
                dbonus_HK = (down_NHC1 * q_NHCK * k_NHCK).sum((0, 2))
        dinitial_NHKV = None
        if ctx.has_initial:
            dinitial_NHKV = torch.cat([dstate, dfinal_NHKV[len(dstate) :]])
        return dq_NHCK, dk_NHCK, dv_NHCV, dlog_decay_NHCK, dbonus_HK, dinitial_NHKV, None


class _Reach:
    """How far decay has been taken along: to the edges of blocks that double in width.

    Attributes:
        query_NHCK: decay from the start of its block to each query.
        key_NHCK: decay from each key to the end of its block.
        whole_NHCK: decay over each block, [N, H, C / width, K].
    """

    def __init__(self, decay_NHCK, strict):
        self.query_NHCK = torch.ones_like(decay_NHCK) if strict else decay_NHCK.clone()
        self.key_NHCK = torch.ones_like(decay_NHCK)
        self.whole_NHCK = decay_NHCK

    def widen(self, width):
        """Takes each pair of neighbouring blocks of this width together."""
        earlier, later = self.whole_NHCK.unflatten(2, (-1, 2)).unbind(3)
        _later(self.query_NHCK, width).mul_(earlier.flatten(0, 2)[:, None])
        _earlier(self.key_NHCK, width).mul_(later.flatten(0, 2)[:, None])
        self.whole_NHCK = earlier * later


def _widths(length):
    """1, 2, 4 ... up to half of the chunk."""
    return [1 << n for n in range(length.bit_length() - 1)]


def _earlier(x_NHCK, width):
    """The first block of each pair, a view [number of pairs, W, K]."""
    return x_NHCK.view(-1, 2, width, x_NHCK.shape[-1])[:, 0]


def _later(x_NHCK, width):
    """The second block of each pair, likewise."""
    return x_NHCK.view(-1, 2, width, x_NHCK.shape[-1])[:, 1]


def _pairs(x_NHCC, width):
    """Where queries of later blocks meet keys of earlier ones, a view [N H, pairs, W, W]."""
    num_pairs = x_NHCC.shape[-1] // (2 * width)
    grid = x_NHCC.view(-1, num_pairs, 2, width, num_pairs, 2, width)[:, :, 1, :, :, 0]
    return grid.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def _unflatten(x, like_NHCC):
    return x.unflatten(0, (like_NHCC.shape[0] * like_NHCC.shape[1], -1))


def _until(x, strict):
    """For each decay, what comes at its position (unless strict) and later: [..., W, K] to same."""
    width = x.shape[-2]
    return x.new_ones(width, width).triu(int(strict)) @ x


def _since(x):
    """For each decay, what comes before its position."""
    width = x.shape[-2]
    return x.new_ones(width, width).tril(-1) @ x


def _steps(counts):
    """The slice of chunks that each step of the walk takes."""
    start = 0
    for count in counts:
        yield slice(start, start + count)
        start += count


def _add_product(out_NHCV, a_NHCK, b_NHKV):
    """out += a @ b, in place."""
    out_NHCV.flatten(0, 1).baddbmm_(a_NHCK.flatten(0, 1), b_NHKV.flatten(0, 1))
