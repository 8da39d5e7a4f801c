"""WKV of RWKV-4: a decaying average of the values, weighted by exp(key), channel by channel.

    y_t = (sum_{i<t} e^{(t-1-i) w + k_i} v_i + e^{u + k_t} v_t)
        / (sum_{i<t} e^{(t-1-i) w + k_i}     + e^{u + k_t})

Peng et al. 2023, https://arxiv.org/abs/2305.13048, eq. 16. w is the log of the decay as the
official kernel uses it, -exp(time_decay) of a checkpoint, so never positive; the previous token
is not decayed yet. u is `time_first`, the weight of the current token in place of a decay.

Both sums are carried as (num, den, max): the sums are num e^max and den e^max, and max is the
running maximum of the exponents, so keys of any size stay finite.

Call `wkv4`. `wkv4_reference` is the definition, one step at a time; `wkv4_chunked` gives the same
numbers with all chunks of positions side by side, and its gradients by formula.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .linear_recurrence import (
    accumulator_dtype,
    check_boundaries,
    check_not_positive,
    choose_backend,
)

# The max of a state that has seen nothing; its den is 0. Finite, as -inf - (-inf) is not a number.
EMPTY_MAX = -1e38
# A log decay of -inf is taken for this one: 0 * -inf, for a chunk's last token, is not a number.
LOWEST = -1e30


def wkv4(
    w,
    u,
    k,
    v,
    *,
    initial_state=None,
    output_final_state=False,
    cu_seqlens=None,
    backend="auto",
):
    """Runs the WKV of the module docstring over a batch or a packed stream.

    Args:
        w: natural log of the decay per step [D], <= 0: `-exp(time_decay)`, not `time_decay` itself.
            With -inf a token sees itself and the one before.
        u: what is added to the current token's key [D], `time_first`.
        k: keys [B, T, D], any float dtype.
        v: values [B, T, D].
        initial_state: (num, den, max) before the first token, [N, 3, D], den >= 0; None is empty,
            which is den = 0 with num = 0 (and has no gradient). N is B, or the number of documents
            with `cu_seqlens`.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: document boundaries in a packed stream, [N + 1] integers from 0 to T, as in
            FlashAttention; B must be 1. Documents may be empty. None: one document per row.
        backend: "triton", "torch", or "auto": "triton" for tensors on a GPU where it is installed
            and they are not float64, else "torch". What is asked for is done or refused.

    Returns:
        (y, final_state): y is [B, T, D] in v's dtype; final_state is [N, 3, D], in float32 or in
        float64 if k is, or None unless asked for. Its max is a choice of units, a constant to
        autograd: gradients go through num and den, which is exact for whatever depends on the sums
        (num e^max and den e^max) alone, as every continuation does.

    Raises:
        ValueError: shapes that do not fit, no tokens, a positive w, an unknown backend.
    """
    if backend == "fla":
        raise ValueError(
            "wkv4: backend is one of auto, torch, triton, got 'fla', whose RWKV-4 has no packed "
            'documents; use backend="auto".'
        )
    backend = choose_backend("wkv4", backend, k)
    check_arguments(w, u, k, v, initial_state, cu_seqlens)
    run = _run_triton if backend == "triton" else wkv4_chunked
    return run(
        w,
        u,
        k,
        v,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )


def _run_triton(w, u, k, v, **keyword):
    """The kernels; a step of its own for one token of each row without gradients."""
    from .wkv4_triton import wkv4_step, wkv4_triton

    tensors = (w, u, k, v, keyword["initial_state"])
    is_differentiated = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in tensors
    )
    if k.shape[1] > 1 or is_differentiated or keyword["cu_seqlens"] is not None:
        return wkv4_triton(w, u, k, v, **keyword)
    y, state = wkv4_step(w, u, k, v, state=keyword["initial_state"])
    return y, state if keyword["output_final_state"] else None


def check_arguments(w, u, k, v, initial_state, cu_seqlens):
    """Raises a ValueError that says what was expected and what came. See `wkv4`."""

    def require(condition, message):
        if not condition:
            raise ValueError(f"wkv4: {message}")

    require(k.ndim == 3, f"k is [B, T, D], got shape {list(k.shape)}.")
    batch, time, width = k.shape
    require(v.shape == k.shape, f"v has the shape of k {list(k.shape)}, got {list(v.shape)}.")
    require(time > 0, f"there are no tokens (T = 0, k is {list(k.shape)}); pass at least one.")
    for name, x in (("w", w), ("u", u)):
        require(list(x.shape) == [width], f"{name} is [D] = {[width]}, got {list(x.shape)}.")
    check_not_positive("wkv4", w, "w", "-exp(time_decay), not time_decay")
    num_documents = check_boundaries("wkv4", cu_seqlens, batch, time)
    if initial_state is not None:
        expected = [num_documents, 3, width]
        require(
            list(initial_state.shape) == expected,
            f"initial_state is [N, 3, D] = {expected}, got {list(initial_state.shape)}.",
        )


def wkv4_reference(w, u, k, v, *, initial_state=None, output_final_state=False, cu_seqlens=None):
    """The definition, one step at a time. Same arguments and results as `wkv4`.

    Runs in float64 if k is, else in float32. Differentiable by autograd; slow.
    """
    dtype = accumulator_dtype(k)
    w_D, u_D, k_BTD, v_BTD = (x.to(dtype) for x in (w, u, k, v))
    batch, time, width = k.shape
    if cu_seqlens is None:
        documents = [(row, 0, time) for row in range(batch)]
    else:
        bounds = cu_seqlens.tolist()
        documents = [(0, start, end) for start, end in zip(bounds, bounds[1:], strict=False)]
    if initial_state is None:
        initial_state = _empty_state(len(documents), w_D)

    outputs_TD, states_3D = [], []
    for n, (row, start, end) in enumerate(documents):
        num_D, den_D, max_D = initial_state[n].to(dtype)
        for t in range(start, end):
            key_D, value_D = k_BTD[row, t], v_BTD[row, t]
            top_D = torch.maximum(max_D, u_D + key_D).detach()
            past_D, now_D = (max_D - top_D).exp(), (u_D + key_D - top_D).exp()
            outputs_TD.append((past_D * num_D + now_D * value_D) / (past_D * den_D + now_D))
            top_D = torch.maximum(max_D + w_D, key_D).detach()
            past_D, now_D = (max_D + w_D - top_D).exp(), (key_D - top_D).exp()
            num_D, den_D = past_D * num_D + now_D * value_D, past_D * den_D + now_D
            max_D = top_D
        states_3D.append(torch.stack([num_D, den_D, max_D.detach()]))
    y_BTD = torch.stack(outputs_TD).unflatten(0, (batch, time)).to(v.dtype)
    return y_BTD, torch.stack(states_3D) if output_final_state else None


def wkv4_chunked(
    w,
    u,
    k,
    v,
    *,
    initial_state=None,
    output_final_state=False,
    cu_seqlens=None,
    chunk_length=None,
):
    """A scan on two levels, for any device: about 2 sqrt(T) steps instead of T, linear memory.

    First the sums over each chunk, all chunks at once; then a walk over chunks, which gives the
    state that enters each; then a walk over the positions of a chunk, in all chunks side by side.

    Args: as `wkv4`, and
        chunk_length: positions per chunk; None picks it from the documents' mean length.
    """
    dtype = accumulator_dtype(k)
    if chunk_length is None:
        mean_length = k.shape[1] / (1 if cu_seqlens is None else len(cu_seqlens) - 1)
        chunk_length = 1 << max(0, round(math.log2(mean_length) / 2))
    with torch.autocast(k.device.type, enabled=False):
        inputs = w.to(dtype).clamp(min=LOWEST), u.to(dtype)
        if cu_seqlens is None:
            layout = _layout_dense(k, chunk_length)
        else:
            layout = _layout_packed(k, cu_seqlens, chunk_length)
        if initial_state is None:
            state_N3D = _empty_state(len(layout.order), inputs[0])
        else:
            state_N3D = initial_state.to(dtype).index_select(0, layout.order)
        y_RCD, state_N3D = _TwoLevelScan.apply(
            *inputs,
            layout.split(k.to(dtype), -math.inf),
            layout.split(v.to(dtype), 0.0),
            state_N3D,
            layout.length_R1.to(dtype),
            layout.steps,
        )
        y = layout.join(y_RCD).to(v.dtype)
    if not output_final_state:
        return y, None
    return y, state_N3D.index_select(0, layout.order.argsort())


def _empty_state(num_documents, like):
    state_N3D = like.new_zeros(num_documents, 3, like.shape[-1])
    state_N3D[:, 2] = EMPTY_MAX
    return state_N3D


class _Layout(NamedTuple):
    """How documents lie in rows of C positions: R chunks, each of one document.

    What is past a document's end has a key of -inf, that is no weight.

    order: [N] the documents in the order of the walk, longest first: a prefix is still running.
    steps: the rows of each step of the walk over chunks, chunk n of every document that has one,
        with their number.
    length_R1: positions of each chunk that hold tokens.
    split: ([B, T, D], what to fill with) to [R, C, D].
    join: back.
    """

    order: torch.Tensor
    steps: list[tuple[slice, int]]
    length_R1: torch.Tensor
    split: Callable[[torch.Tensor, float], torch.Tensor]
    join: Callable[[torch.Tensor], torch.Tensor]


def _layout_dense(k, chunk_length):
    """Every row of the batch is one document: rows are a view, but for what is filled up."""
    batch, time, width = k.shape
    num_chunks = -(-time // chunk_length)
    missing = num_chunks * chunk_length - time
    length_BN = k.new_full((batch, num_chunks), chunk_length, dtype=torch.long)
    length_BN[:, -1] -= missing

    def split(x_BTD, fill):
        if missing:
            x_BTD = F.pad(x_BTD, (0, 0, 0, missing), value=fill)
        return x_BTD.reshape(-1, chunk_length, width)

    def join(x_RCD):
        return x_RCD.reshape(batch, -1, width)[:, :time]

    return _Layout(
        order=torch.arange(batch, device=k.device),
        steps=[(slice(n, None, num_chunks), batch) for n in range(num_chunks)],
        length_R1=length_BN.reshape(-1, 1),
        split=split,
        join=join,
    )


def _layout_packed(k, cu_seqlens, chunk_length):
    """A packed stream of documents of any lengths: rows are gathered in the order of the walk."""
    device, time = k.device, k.shape[1]
    cu_seqlens = cu_seqlens.to(device=device, dtype=torch.long)
    length_N, order_N = cu_seqlens.diff().sort(descending=True, stable=True)
    start_N = cu_seqlens[:-1][order_N]
    num_chunks_N = (-(-length_N // chunk_length)).tolist()
    steps, first_R, end_R, rows = [], [], [], 0
    count = len(num_chunks_N)
    for step in range(num_chunks_N[0]):
        while num_chunks_N[count - 1] <= step:
            count -= 1
        steps.append((slice(rows, rows + count), count))
        first_R.append(start_N[:count] + step * chunk_length)
        end_R.append((start_N + length_N)[:count])
        rows += count

    first_R1, end_R1 = torch.cat(first_R)[:, None], torch.cat(end_R)[:, None]
    index_RC = first_R1 + torch.arange(chunk_length, device=device)
    inside_RC = index_RC < end_R1
    # Positions past a document's end read token 0, and are masked.
    index_RC = torch.where(inside_RC, index_RC, 0)
    place_T = torch.empty(time, dtype=torch.long, device=device)
    place_T[index_RC[inside_RC]] = inside_RC.flatten().nonzero()[:, 0]

    def split(x_BTD, fill):
        x_RCD = x_BTD[0].index_select(0, index_RC.flatten()).unflatten(0, index_RC.shape)
        return torch.where(inside_RC[..., None], x_RCD, fill)

    def join(x_RCD):
        return x_RCD.flatten(0, 1).index_select(0, place_T)[None]

    length_R1 = (end_R1 - first_R1).clamp(max=chunk_length)
    return _Layout(order_N, steps, length_R1, split, join)


class _TwoLevelScan(torch.autograd.Function):
    """The scan in rows of chunks, forward and backward by formula.

    Inside a chunk the state is the average so far x = num/den and the log of the sum of weights
    l = max + log den. With s_t = sigmoid(u + k_t - l) and r_t = sigmoid(k_t - w - l),
        y_t = (1 - s_t) x + s_t v_t     x' = (1 - r_t) x + r_t v_t     l' = log(e^(l + w) + e^k_t)
    so that every factor lies in [0, 1], with no maximum to follow. Backwards, p and q are the
    gradients of the sums themselves, times e^l: of e^l x and of e^l. They obey
        p = (1 - r_t) p' + (1 - s_t) dy_t      q = (1 - r_t) q' - (1 - s_t) dy_t y_t
    Only the state that enters each chunk is saved; the rest is computed again.
    """

    @staticmethod
    def forward(ctx, w_D, u_D, k_RCD, v_RCD, state_N3D, length_R1, steps):
        # Sums over each chunk, in units of its own largest exponent.
        left_RC1 = _positions_left(length_R1, k_RCD)
        exponent_RCD = torch.addcmul(k_RCD, left_RC1, w_D)
        max_RD = exponent_RCD.amax(1)
        weight_RCD = exponent_RCD.sub_(max_RD[:, None]).exp_()
        sums_R2D = torch.stack([(weight_RCD * v_RCD).sum(1), weight_RCD.sum(1)], dim=1)
        del exponent_RCD, weight_RCD

        decay_RD = length_R1 * w_D
        enter_R3D = k_RCD.new_empty(len(length_R1), 3, len(w_D))
        finished = []
        for rows, count in steps:
            finished.append(state_N3D[count:])
            state_N3D = state_N3D[:count]
            enter_R3D[rows] = state_N3D
            past = state_N3D[:, 2] + decay_RD[rows]
            top = torch.maximum(past, max_RD[rows])
            sums = (past - top).exp()[:, None] * state_N3D[:, :2]
            sums.addcmul_((max_RD[rows] - top).exp()[:, None], sums_R2D[rows])
            state_N3D = torch.cat([sums, top[:, None]], dim=1)
        final_N3D = torch.cat([state_N3D, *finished[::-1]])

        y_RCD = torch.empty_like(k_RCD, memory_format=torch.contiguous_format)
        mean, log = _mean_and_log(enter_R3D)
        for c in range(k_RCD.shape[1]):
            k, v = k_RCD[:, c], v_RCD[:, c]
            gain = k - log
            y_RCD[:, c] = torch.lerp(mean, v, (gain + u_D).sigmoid_())
            mean = torch.lerp(mean, v, gain.sub_(w_D).sigmoid_())
            log = torch.logaddexp(log + w_D, k)
        ctx.steps = steps
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(w_D, u_D, k_RCD, v_RCD, length_R1, enter_R3D, final_N3D)
        return y_RCD, final_N3D

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy_RCD, dfinal_N3D):
        w_D, u_D, k_RCD, v_RCD, length_R1, enter_R3D, final_N3D = ctx.saved_tensors
        num_positions = k_RCD.shape[1]
        if dy_RCD is None:
            dy_RCD = torch.zeros_like(k_RCD)
        if dfinal_N3D is None:
            dfinal_N3D = torch.zeros_like(final_N3D)

        # The averages and gates again; and p and q at each chunk's start from its own outputs.
        mean_CRD, now_CRD, write_CRD = (
            k_RCD.new_empty(num_positions, *enter_R3D[:, 0].shape) for _ in range(3)
        )
        mean, log = _mean_and_log(enter_R3D)
        keep = torch.ones_like(mean)
        pq_R2D = torch.zeros_like(enter_R3D[:, :2])
        for c in range(num_positions):
            k, v, dy = k_RCD[:, c], v_RCD[:, c], dy_RCD[:, c]
            gain = k - log
            mean_CRD[c] = mean
            now = torch.sigmoid(gain + u_D, out=now_CRD[c])
            write = torch.sigmoid(gain.sub_(w_D), out=write_CRD[c])
            y = torch.lerp(mean, v, now)
            past = (dy - now * dy).mul_(keep)
            pq_R2D[:, 0] += past
            pq_R2D[:, 1].addcmul_(past, y, value=-1)
            keep.addcmul_(keep, write, value=-1)
            mean = torch.lerp(mean, v, write)
            log = torch.logaddexp(log + w_D, k)

        # Back over the chunks: what each one's end receives from all that follow.
        num_running = ctx.steps[-1][1]
        dlast_N2D = dfinal_N3D[:, :2] * final_N3D[:, 1:2]
        pq = dlast_N2D[:num_running]
        after_R2D = torch.empty_like(pq_R2D)
        for rows, count in reversed(ctx.steps):
            # Documents whose last chunk this is join with the gradient of their final state.
            pq = torch.cat([pq, dlast_N2D[len(pq) : count]])
            after_R2D[rows] = pq
            pq = torch.addcmul(pq_R2D[rows], keep[rows][:, None], pq)

        dstate_N3D = None
        if ctx.needs_input_grad[4]:
            num, den = enter_R3D[ctx.steps[0][0]][:, :2].unbind(1)
            unit = torch.where(den > 0, 1 / den, 0.0)
            dstate = [pq[:, 0] * unit, pq[:, 1] * unit, pq[:, 0] * num * unit + pq[:, 1]]
            dstate_N3D = dfinal_N3D.clone()
            dstate_N3D[:, 2] = 0
            dstate_N3D[: len(pq)] = torch.stack(dstate, dim=1)

        # Back over the positions.
        inside_CR1 = (_positions_left(length_R1, k_RCD) >= 0).to(k_RCD.dtype).transpose(0, 1)
        dk_RCD, dv_RCD = torch.empty_like(k_RCD), torch.empty_like(v_RCD)
        dw_RD, du_RD = torch.zeros_like(keep), torch.zeros_like(keep)
        p, q = after_R2D.unbind(1)
        p, q = p.contiguous(), q.contiguous()
        for c in reversed(range(num_positions)):
            v, dy, mean, now, write = (
                v_RCD[:, c],
                dy_RCD[:, c],
                mean_CRD[c],
                now_CRD[c],
                write_CRD[c],
            )
            y = torch.lerp(mean, v, now)
            dnow = now * dy
            dpast = dy - dnow
            dv_RCD[:, c] = torch.addcmul(dnow, write, p)
            dkey = dnow.mul_(v - y)
            du_RD += dkey
            dk_RCD[:, c] = torch.addcmul(dkey, write, torch.addcmul(q, p, v))
            p.addcmul_(p, write, value=-1)
            q.addcmul_(q, write, value=-1)
            dw_RD.addcmul_(torch.addcmul(q, p, mean), inside_CR1[c])
            p += dpast
            q.addcmul_(dpast, y, value=-1)
        # In float64: many rows, and many cancel.
        dw_D, du_D = (x.sum(0, dtype=torch.float64).to(x.dtype) for x in (dw_RD, du_RD))
        return dw_D, du_D, dk_RCD, dv_RCD, dstate_N3D, None, None


def _positions_left(length_R1, like_RCD):
    """How many tokens of the chunk come after each position [R, C, 1]; negative past its end."""
    return (length_R1 - 1 - torch.arange(like_RCD.shape[1], device=like_RCD.device))[..., None]


def _mean_and_log(state_R3D):
    """The average so far and the log of the sum of weights: 0 and -inf if there is none."""
    num, den, top = state_R3D.unbind(1)
    return torch.where(den > 0, num / den, 0.0), top + den.log()
