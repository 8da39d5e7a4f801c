"""The recurrences over a slice of a sequence, whose other slices other processes have.

Every recurrence is affine in its state: a slice makes A S + U of the state S that enters it. So no
process waits for the one before. Each finds the A and U of its own slice, all of them exchange
these, and each puts together what enters it (LASP-2, Sun et al. 2025,
https://arxiv.org/abs/2502.07563, and for transitions that are matrices).

A mixer calls `linear_recurrence_of(sequence, x_BTD)(...)` for `linear_recurrence(...)`, the same of
`delta_recurrence` and, without x_BTD, of `wkv4`: with the arguments of the operator, but for the
initial state, which comes from the left. A plain step gets the operator's step.
"""

import functools

import torch

from ..core.exchange import scan
from ..core.tails import tail
from ..kernels.autograd_rules import by_formula
from ..kernels.delta_recurrence import delta_recurrence
from ..kernels.linear_recurrence import accumulator_dtype, linear_recurrence
from ..kernels.recurrence_steps import (
    delta_recurrence_step,
    linear_recurrence_step,
    takes_plain_step,
)
from ..kernels.wkv4 import EMPTY_MAX, LOWEST, wkv4


def linear_recurrence_of(sequence, x_BTD, name="memory_NHKV"):
    """`linear_recurrence` for the tokens of a sequence.

    Args:
        sequence: the `Sequence`; a slice, if it has ranks.
        x_BTD: what the mixer was given.
        name: of the state that it carries on.
    """
    if takes_plain_step(sequence, x_BTD):
        return linear_recurrence_step
    if sequence.ranks is None:
        return linear_recurrence
    return functools.partial(_linear_over_slices, sequence.ranks, name)


def delta_recurrence_of(sequence, x_BTD, name="memory_NHKV"):
    """`delta_recurrence` for the tokens of a sequence; arguments as above."""
    if takes_plain_step(sequence, x_BTD):
        return delta_recurrence_step
    if sequence.ranks is None:
        return delta_recurrence
    return functools.partial(_delta_over_slices, sequence.ranks, name)


def wkv4_of(sequence, names=("num_ND", "den_ND", "max_ND")):
    """`wkv4` for the tokens of a sequence; the state it carries on has three names."""
    if sequence.ranks is None:
        return wkv4
    return functools.partial(_wkv4_over_slices, sequence.ranks, names)


def _linear_over_slices(
    ranks,
    name,
    q,
    k,
    v,
    log_decay=None,
    *,
    initial_state=None,
    output_final_state=False,
    **options,
):
    dtype = accumulator_dtype(q)
    gates, everyones_a = log_decay, None
    if gates is None:
        gates = torch.zeros(q.shape[2], dtype=dtype, device=q.device)
    if gates.ndim == 1:
        if not gates.requires_grad:
            everyones_a = [
                _left_of(ranks, rank, ranks.own_RB[rank].to(q.device)[:, None] * gates).to(dtype)
                for rank in range(ranks.size)
            ]
        gates = gates.expand(*q.shape[:2], -1)
    if gates.ndim == 3:
        gates = gates[..., None]
    u_BHKV, total_BHK = _FinalState.apply(*(tail(ranks, x) for x in (k, v, gates)), dtype)
    a_BHK1 = _left_of(ranks, ranks.rank, total_BHK)
    state_BHKV = ranks.affine(a_BHK1, u_BHKV, everyones_a=everyones_a)
    return linear_recurrence(
        q,
        k,
        v,
        log_decay,
        initial_state=ranks.entering(state_BHKV, name=name if output_final_state else None),
        output_final_state=output_final_state,
        **options,
    )


def _left_of(ranks, rank, total_BHX):
    """What a slice leaves of a state, from its log; nothing where a document starts."""
    a_BHX = total_BHX.exp() if total_BHX.ndim == 3 else total_BHX.exp()[..., None]
    starts_B = ranks.start_RB[rank].to(a_BHX.device)
    return torch.where(starts_B[:, None, None], 0, a_BHX)[..., None]


class _FinalState(torch.autograd.Function):
    """What a linear recurrence comes to from nothing, without outputs: one product.

        U = sum_t exp(s_t) k_t v_t^T,  s_t = sum_{r > t} log_decay_r

    which is as precise as its chunks, for s is added up from the end. Nothing but the arguments is
    kept for backward, where for dU and the gradient of the whole log decay

        dv = (exp(s) k) dU,  dk = exp(s) (v dU^T),  ds = k dk,  dlog_decay_r = sum_{t < r} ds_t
    """

    @staticmethod
    def forward(ctx, k_BLHK, v_BLHV, gates_BLHX, dtype):
        ctx.dtype = dtype
        ctx.save_for_backward(k_BLHK, v_BLHV, gates_BLHX)
        with torch.autocast(k_BLHK.device.type, enabled=False):
            kept_BLHX, total_BHX = _kept_until_end(gates_BLHX, dtype)
            return _outer(k_BLHK * kept_BLHX, v_BLHV.to(dtype)), total_BHX

    @staticmethod
    @by_formula
    def backward(ctx, du_BHKV, dtotal_BHX):
        k_BLHK, v_BLHV, gates_BLHX = ctx.saved_tensors
        kept_BLHX, _ = _kept_until_end(gates_BLHX, ctx.dtype)
        dv_BLHV = torch.einsum("blhk,bhkv->blhv", k_BLHK * kept_BLHX, du_BHKV)
        dk_BLHK = torch.einsum("blhv,bhkv->blhk", v_BLHV.to(ctx.dtype), du_BHKV)
        dk_BLHK *= kept_BLHX
        dgates_BLHX = None
        if ctx.needs_input_grad[2]:
            ds_BLHX = k_BLHK * dk_BLHK
            if gates_BLHX.shape[-1] == 1:
                ds_BLHX = ds_BLHX.sum(-1, keepdim=True)
            dgates_BLHX = torch.cat([dtotal_BHX[:, None], ds_BLHX[:, :-1]], dim=1).cumsum(1)
            dgates_BLHX = dgates_BLHX.to(gates_BLHX.dtype)
        return dk_BLHK.to(k_BLHK.dtype), dv_BLHV.to(v_BLHV.dtype), dgates_BLHX, None


def _kept_until_end(gates_BLHX, dtype):
    """exp(s) of each token, and the log decay of all of them together [B, H, 1 or K]."""
    since_BLHX = gates_BLHX.to(dtype).flip(1).cumsum(1)
    total_BHX = since_BLHX[:, -1]
    first_B1HX = torch.zeros_like(since_BLHX[:, :1])
    return torch.cat([first_B1HX, since_BLHX[:, :-1]], dim=1).flip(1).exp(), total_BHX


def _outer(k_BLHK, v_BLHV):
    return torch.einsum("blhk,blhv->bhkv", k_BLHK, v_BLHV)


def _delta_over_slices(
    ranks,
    name,
    q,
    k,
    v,
    log_decay,
    a,
    b,
    *,
    initial_state=None,
    output_final_state=False,
    cu_seqlens=None,
    **options,
):
    """U, the transition and what is read through it, in one pass: columns of v, and of unit states.

    A unit state that enters, into which nothing is written, leaves as M; what is read of it, P, is
    what is read of any state: o = o_U + P S.
    """
    dtype, (key_dim, value_dim) = accumulator_dtype(q), (k.shape[-1], v.shape[-1])
    heads, documents = q.shape[2], len(ranks.row_N)
    v_wide = torch.cat([v.to(dtype), v.new_zeros(k.shape, dtype=dtype)], dim=-1)
    unit_KX = torch.eye(key_dim, key_dim + value_dim, dtype=dtype, device=q.device)
    unit_NHKX = unit_KX.roll(value_dim, 1).expand(documents, heads, -1, -1).contiguous()
    o, final = delta_recurrence(
        q,
        k,
        v_wide,
        log_decay,
        a,
        b,
        initial_state=unit_NHKX,
        output_final_state=True,
        cu_seqlens=cu_seqlens,
        **options,
    )
    with torch.autocast(q.device.type, enabled=False):
        u_NHKV, m_NHKK = final.split([value_dim, key_dim], dim=-1)
        o_BTHV, p_BTHK = o.split([value_dim, key_dim], dim=-1)
        state_BHKV = ranks.affine(ranks.transition(m_NHKK, is_matrix=True), ranks.outgoing(u_NHKV))
        state_NHKV = ranks.entering(state_BHKV, name=name if output_final_state else None)
        o_BTHV = _with_read(ranks, o_BTHV, p_BTHK, state_NHKV)
        final = u_NHKV + m_NHKK @ state_NHKV if output_final_state else None
    return o_BTHV.to(v.dtype), final


def _with_read(ranks, o_BTHV, p_BTHK, state_NHKV):
    """o + P S, for the tokens of documents that go on from the left."""
    if ranks.cu_seqlens is None:
        return o_BTHV + torch.einsum("bthk,bhkv->bthv", p_BTHK, state_NHKV)
    going_on_C = ranks.continues_N.nonzero()[:, 0]
    if len(going_on_C) == 0:
        return o_BTHV
    start_C1, length_C1 = ranks.cu_seqlens[going_on_C, None], ranks.length_N[going_on_C, None]
    step_L = torch.arange(int(length_C1.max()), device=o_BTHV.device)
    is_there_CL = step_L < length_C1
    index_CL = torch.where(is_there_CL, start_C1 + step_L, 0)
    read_CLHV = torch.einsum("clhk,chkv->clhv", p_BTHK[0][index_CL], state_NHKV[going_on_C])
    return o_BTHV.index_add(1, index_CL[is_there_CL], read_CLHV[is_there_CL][None])


def _wkv4_over_slices(
    ranks,
    names,
    w,
    u,
    k,
    v,
    *,
    initial_state=None,
    output_final_state=False,
    cu_seqlens=None,
):
    """Sums in units of the largest weight so far: first all learn the units, then the sums.

    A unit is a choice and has no gradient: that of w goes through what is left of the sums.
    """
    with torch.autocast(k.device.type, enabled=False):
        decay_D = w.to(accumulator_dtype(k)).clamp(min=LOWEST)
        log_left_RBD = ranks.own_RB.to(decay_D)[..., None] * decay_D
        passes_RBD = ~ranks.start_RB.to(decay_D.device)[..., None]
        sums_B2D, max_BD = _weighted_sums(ranks, decay_D, k, v)
        before, after, everyones_a = _units(ranks, log_left_RBD.detach(), passes_RBD, max_BD)

        own = ranks.rank
        left_BD = torch.where(passes_RBD[own], before + log_left_RBD[own] - after, -torch.inf).exp()
        sums_B2D = sums_B2D * (max_BD - after).exp()[:, None]
        sums_B2D = ranks.affine(left_BD[:, None], sums_B2D, everyones_a=everyones_a)
        state_B3D = torch.cat([sums_B2D, before[:, None]], dim=1)
        if output_final_state:
            ranks.left.update(zip(names, state_B3D.unbind(1), strict=True))
        empty_31 = state_B3D.new_tensor([0, 0, EMPTY_MAX])[:, None]
        state_N3D = ranks.entering(state_B3D, fill=empty_31)
    return wkv4(
        w,
        u,
        k,
        v,
        initial_state=state_N3D,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )


def _weighted_sums(ranks, decay_D, k, v):
    """Numerator and denominator of each row's last document [B, 2, D], and their unit [B, D]."""
    k_BLD, v_BLD = tail(ranks, k).to(decay_D), tail(ranks, v).to(decay_D)
    later_L = torch.arange(k_BLD.shape[1], device=k.device).flip(0)
    exponent_BLD = torch.addcmul(k_BLD, later_L[:, None].to(decay_D), decay_D)
    is_there_BL1 = later_L[:, None] < ranks.own_RB[ranks.rank].to(k.device)[:, None, None]
    exponent_BLD = torch.where(is_there_BL1, exponent_BLD, -torch.inf)
    max_BD = exponent_BLD.detach().amax(1).clamp(min=EMPTY_MAX)
    weight_BLD = (exponent_BLD - max_BD[:, None]).exp()
    return torch.stack([(weight_BLD * v_BLD).sum(1), weight_BLD.sum(1)], dim=1), max_BD


def _units(ranks, log_left_RBD, passes_RBD, max_BD):
    """The largest exponents before this slice and after it [B, D], and what each slice leaves.

    Args:
        ranks: the `Ranks` of the pass.
        log_left_RBD: log decay over the last document of each row in each slice.
        passes_RBD: whether it goes on from the slice before.
        max_BD: the largest exponent of this slice.

    Returns:
        (before [B, D], after, list of [B, 1, D] of all slices: None if only their own is known).
    """
    log_left_RBD = torch.where(passes_RBD, log_left_RBD, EMPTY_MAX)
    if not ranks.wire.are_few:
        before = scan(ranks.wire, log_left_RBD[ranks.rank], max_BD, 1, _later_maximum)
        before = torch.full_like(before, EMPTY_MAX) if ranks.is_first else before
        return before, _later_maximum(0, before, log_left_RBD[ranks.rank], max_BD)[1], None
    units, everyones_a = [torch.full_like(max_BD, EMPTY_MAX)], []
    for log_left_BD, other_BD in zip(log_left_RBD, ranks.wire.all_gather(max_BD), strict=True):
        before = units[-1]
        units.append(_later_maximum(0, before, log_left_BD, other_BD)[1])
        everyones_a.append((before + log_left_BD - units[-1]).exp()[:, None])
    return units[ranks.rank], units[ranks.rank + 1], everyones_a


def _later_maximum(before_a, before_m, a, m):
    """For `scan`: log decays add up, and of exponents the largest counts."""
    return (before_a + a).clamp(min=EMPTY_MAX), torch.maximum(before_m + a, m)
