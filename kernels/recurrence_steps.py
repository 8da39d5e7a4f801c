"""One token of each row, without gradients: what a decoding step on a CPU runs.

The operators' chunks of one position, in as few operations as there are: a step of a small model
spends its time in starting them. States that come in are left as they are.
"""

import torch


def is_plain_step(x, cu_seqlens=None):
    """Whether a call may take the functions of this file.

    Args:
        x: a tensor [B, T, ...] of the call.
        cu_seqlens: document boundaries of a packed stream, or None.
    """
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_exporting()
        and x.shape[1] == 1
        and cu_seqlens is None
        and not torch.is_autocast_enabled(x.device.type)
    )


def takes_plain_step(sequence, x):
    """Whether a mixer may take them: one token of each row, on a CPU, in one process.

    Args:
        sequence: the `Sequence` of its tokens.
        x: its input [B, T, D].
    """
    return (
        sequence.ranks is None and x.device.type == "cpu" and is_plain_step(x, sequence.cu_seqlens)
    )


def linear_recurrence_step(
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
    """A step of `linear_recurrence`, with its arguments and results, of which it checks none.

    log_decay may also be [H, K].
    """
    dtype, decay = torch.promote_types(q.dtype, torch.float32), None
    if log_decay is not None and initial_state is not None:
        decay = log_decay.to(dtype).exp()
        if log_decay.ndim <= 2:
            decay = decay.reshape(q.shape[2], -1, 1)
        else:
            decay = decay.reshape(*initial_state.shape[:2], -1, 1)
    o_BTHV, state_BHKV = decayed_step(q, k, v, decay, bonus, initial_state)
    if scale != 1.0:
        o_BTHV = o_BTHV * scale
    return o_BTHV.to(v.dtype), state_BHKV if output_final_state else None


def decayed_step(q, k, v, decay, bonus, state):
    """`linear_recurrence_step` with the decay itself.

    Args:
        q, k, v, bonus: as there; q, k and v also without the axis of time.
        decay: what is left of the state, of any shape that spreads to [B, H, K, V]; None: all.
        state: before the token, [B, H, K, V], or None.

    Returns:
        (o [B, 1, H, V] in the state's dtype, the state after it).
    """
    batch, (heads, key_dim), value_dim = q.shape[0], q.shape[-2:], v.shape[-1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_N1K = q.to(dtype).reshape(-1, 1, key_dim)
    k_BHK1 = k.to(dtype).reshape(batch, heads, key_dim, 1)
    v_BH1V = v.to(dtype).reshape(batch, heads, 1, value_dim)
    o_N1V = None
    if bonus is not None:
        weight_N11 = (q.to(dtype) * bonus.to(dtype)).reshape(-1, 1, key_dim)
        weight_N11 = weight_N11.bmm(k_BHK1.view(-1, key_dim, 1))
        o_N1V = v_BH1V.view(-1, 1, value_dim) * weight_N11
        if state is not None:
            o_N1V.baddbmm_(q_N1K, state.to(dtype).reshape(-1, key_dim, value_dim))
    if state is None:
        state_BHKV = k_BHK1 * v_BH1V
    elif decay is None:
        state_BHKV = torch.addcmul(state.to(dtype), k_BHK1, v_BH1V)
    else:
        state_BHKV = (state.to(dtype) * decay).addcmul_(k_BHK1, v_BH1V)
    if bonus is None:
        o_N1V = q_N1K.bmm(state_BHKV.view(-1, key_dim, value_dim))
    return o_N1V.view(batch, 1, heads, value_dim), state_BHKV


def delta_recurrence_step(
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
    """A step of `delta_recurrence`, with its arguments and results, of which it checks none."""
    dtype, decay = torch.promote_types(q.dtype, torch.float32), None
    if log_decay is not None and initial_state is not None:
        decay = log_decay.to(dtype).exp()
        if log_decay.ndim == 1:
            decay = decay.reshape(-1, 1, 1)
        else:
            decay = decay.reshape(*initial_state.shape[:2], -1, 1)
    o_BTHV, state_BHKV = corrected_step(q, k, v, decay, a, b, initial_state)
    if scale != 1.0:
        o_BTHV = o_BTHV * scale
    return o_BTHV.to(v.dtype), state_BHKV if output_final_state else None


def corrected_step(q, k, v, decay, a, b, state):
    """`delta_recurrence_step` with the decay itself.

    Args:
        q, k, v, a, b: as there, or without the axis of time.
        decay: what is left of the state, of any shape that spreads to [B, H, K, V]; None: all.
        state: before the token, [B, H, K, V], or None.

    Returns:
        (o [B, 1, H, V] in the state's dtype, the state after it).
    """
    batch, (heads, key_dim), value_dim = q.shape[0], q.shape[-2:], v.shape[-1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    k_BHK1 = k.to(dtype).reshape(batch, heads, key_dim, 1)
    v_BH1V = v.to(dtype).reshape(batch, heads, 1, value_dim)
    if state is None:
        state_BHKV = k_BHK1 * v_BH1V
    else:
        state = state.to(dtype)
        read_N1V = a.to(dtype).reshape(-1, 1, key_dim).bmm(state.reshape(-1, key_dim, value_dim))
        if decay is None:
            state_BHKV = torch.addcmul(state, k_BHK1, v_BH1V)
        else:
            state_BHKV = (state * decay).addcmul_(k_BHK1, v_BH1V)
        read_BH1V = read_N1V.view(batch, heads, 1, value_dim)
        state_BHKV.addcmul_(b.to(dtype).reshape(batch, heads, key_dim, 1), read_BH1V)
    o_N1V = q.to(dtype).reshape(-1, 1, key_dim).bmm(state_BHKV.view(-1, key_dim, value_dim))
    return o_N1V.view(batch, 1, heads, value_dim), state_BHKV


def gated_delta_step(q, k, v, decay, beta, state):
    """A step of the gated delta rule: what the state holds at k moves to v, beta of the way.

        S = decay S',  S = S + beta k (v - S^T k)^T

    Args:
        q, k, v: [B, H, K or V].
        decay, beta: [B, H].
        state: S' before the token, [B, H, K, V].

    Returns:
        (o [B, 1, H, V] in the state's dtype, the state after it).
    """
    batch, heads, key_dim = q.shape
    value_dim, dtype = v.shape[-1], torch.promote_types(q.dtype, torch.float32)
    k_BHK = k.to(dtype)
    state_BHKV = state.to(dtype) * decay.view(batch, heads, 1, 1)
    flat_NKV = state_BHKV.view(-1, key_dim, value_dim)
    held_BHV = k_BHK.reshape(-1, 1, key_dim).bmm(flat_NKV).view(batch, heads, value_dim)
    change_BHV = (v.to(dtype) - held_BHV).mul_(beta.to(dtype)[..., None])
    state_BHKV.addcmul_(k_BHK[..., None], change_BHV[..., None, :])
    o_N1V = q.to(dtype).reshape(-1, 1, key_dim).bmm(flat_NKV)
    return o_N1V.view(batch, 1, heads, value_dim), state_BHKV


def wkv4_step(w_D, u_D, k_BD, v_BD, state):
    """A step of `wkv4`: (y [B, D], the state after it).

    Args:
        w_D, u_D: as there, in the state's dtype.
        k_BD, v_BD: the token of each row.
        state: (num, den, max) before it, [B, D] each; den is 0 or, as its largest summand is 1, at
            least 1.
    """
    num_BD, den_BD, top_BD = state
    k_BD, v_BD = k_BD.to(num_BD.dtype), v_BD.to(num_BD.dtype)
    # y_t = (1 - s) num / den + s v_t with s = sigmoid(u + k_t - log of the sum of weights).
    now_BD = (k_BD + u_D).sub_(top_BD).sub_(den_BD.log()).sigmoid_()
    y_BD = torch.lerp(num_BD / den_BD.clamp(min=torch.finfo(den_BD.dtype).tiny), v_BD, now_BD)
    kept_BD = top_BD + w_D
    top_BD = torch.maximum(kept_BD, k_BD)
    kept_BD = kept_BD.sub_(top_BD).exp_()
    added_BD = (k_BD - top_BD).exp_()
    num_BD = torch.addcmul(num_BD * kept_BD, added_BD, v_BD)
    den_BD = torch.addcmul(added_BD, den_BD, kept_BD)
    return y_BD, (num_BD, den_BD, top_BD)


__all__ = [
    "corrected_step",
    "decayed_step",
    "delta_recurrence_step",
    "gated_delta_step",
    "is_plain_step",
    "linear_recurrence_step",
    "takes_plain_step",
    "wkv4_step",
]
