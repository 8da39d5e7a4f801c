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

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .autograd_rules import by_formula
from .known_calls import KnownCalls, can_be_known, form
from .linear_recurrence import (
    accumulator_dtype,
    check_boundaries,
    check_not_positive,
    choose_backend,
)
from .recurrence_steps import is_plain_step, wkv4_step

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
    key, tensors = None, (w, u, k, v, initial_state, cu_seqlens)
    if can_be_known(k):
        key = (
            (backend, output_final_state, torch.is_grad_enabled(), k.device),
            (w.shape, w.dtype, u.shape, u.dtype, k.shape, k.dtype, v.shape, v.dtype),
            None if initial_state is None else form(initial_state),
            None if cu_seqlens is None else form(cu_seqlens),
        )
        call = _known.prepared.get(key)
        if call is not None:
            return call(*tensors)
    chosen = choose_backend("wkv4", backend, k)
    check_arguments(w, u, k, v, initial_state, cu_seqlens)
    if chosen == "triton" and key is not None:
        call = _known.meet(key, functools.partial(_prepare_triton, tensors, output_final_state))
        if call is not None:
            return call(*tensors)
    run = _run_triton if chosen == "triton" else _run_torch
    return run(
        w,
        u,
        k,
        v,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )


_known = KnownCalls()


def _run_torch(w, u, k, v, **keyword):
    """Chunks one after the other; in a program that is being exported, in operators alone."""
    if is_plain_step(k, keyword["cu_seqlens"]):
        state_N3D, dtype = keyword["initial_state"], accumulator_dtype(k)
        if state_N3D is None:
            state_N3D = _empty_state(k.shape[0], w.to(dtype))
        before = state_N3D.to(dtype).unbind(1)
        y, after = wkv4_step(w.to(dtype), u.to(dtype), k[:, 0], v[:, 0], before)
        after = torch.stack(after, dim=1) if keyword["output_final_state"] else None
        return y.to(v.dtype)[:, None], after
    if torch.compiler.is_exporting():
        from .wkv4_export import wkv4_exported

        return wkv4_exported(w, u, k, v, **keyword)
    return wkv4_chunked(w, u, k, v, **keyword)


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


def _prepare_triton(tensors, output_final_state):
    """What to keep for calls of this form; None for one token with gradients, or without."""
    from .ready_triton import prepared_call
    from .wkv4_triton import PASSES

    def run(w, u, k, v, initial_state, cu_seqlens):
        return _run_triton(
            w,
            u,
            k,
            v,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
        )

    if tensors[2].shape[1] == 1 and torch.is_grad_enabled():
        return None
    return prepared_call(PASSES, (output_final_state,), run)


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

    Of documents longer than 1,024 tokens T / 32 + 32 steps, which are faster than fewer.

    First the sums over each chunk, all chunks at once; then a walk over chunks, which gives the
    state that enters each; then a walk over the positions of a chunk, in all chunks side by side.

    Args: as `wkv4`, and
        chunk_length: positions per chunk; None picks it from the documents' mean length.
    """
    dtype = accumulator_dtype(k)
    num_documents = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if chunk_length is None:
        mean_length = k.shape[0] * k.shape[1] / num_documents
        # The root of the length makes the fewest steps; longer chunks than 32 do not pay for them.
        chunk_length = min(32, 1 << max(0, round(math.log2(mean_length) / 2)))
    with torch.autocast(k.device.type, enabled=False):
        inputs = w.to(dtype).clamp(min=LOWEST), u.to(dtype)
        if cu_seqlens is None:
            layout = _layout_dense(k, chunk_length)
        else:
            layout = _layout_packed(k, cu_seqlens, chunk_length)
        if initial_state is None:
            state_N3D = _empty_state(num_documents, inputs[0])
        elif layout.order is None:
            state_N3D = initial_state.to(dtype)
        else:
            state_N3D = initial_state.to(dtype).index_select(0, layout.order)
        y_RCD, state_N3D = _TwoLevelScan.apply(
            *inputs,
            layout.split(k.to(dtype), -math.inf),
            layout.split(v.to(dtype), 0.0),
            state_N3D,
            layout._replace(length_R1=layout.length_R1.to(dtype)),
        )
        y = layout.join(y_RCD).to(v.dtype)
    if not output_final_state:
        return y, None
    if layout.order is not None:
        state_N3D = state_N3D.index_select(0, layout.order.argsort())
    return y, state_N3D


def _empty_state(num_documents, like):
    state_N3D = like.new_zeros(num_documents, 3, like.shape[-1])
    state_N3D[:, 2] = EMPTY_MAX
    return state_N3D


class _Layout(NamedTuple):
    """How documents lie in rows of C positions: R chunks, each of one document.

    What is past a document's end has a key of -inf, that is no weight.

    order: [N] the documents in the order of the walk, longest first: a prefix is still running.
        None: as they come, for they end together.
    counts: documents in each step of the walk over chunks: those that have a chunk n.
    walk: [R, ...] to what each step meets, [count, ...] each.
    gather: back.
    length_R1: positions of each chunk that hold tokens.
    split: ([B, T, D], what to fill with) to [R, C, D].
    join: back.
    """

    order: torch.Tensor | None
    counts: list[int]
    walk: Callable[[torch.Tensor], Sequence[torch.Tensor]]
    gather: Callable[[Sequence[torch.Tensor]], torch.Tensor]
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

    def walk(x_R):
        return x_R.unflatten(0, (batch, num_chunks)).unbind(1)

    def gather(steps):
        return torch.stack(steps, dim=1).flatten(0, 1)

    def split(x_BTD, fill):
        if missing:
            x_BTD = F.pad(x_BTD, (0, 0, 0, missing), value=fill)
        return x_BTD.reshape(-1, chunk_length, width)

    def join(x_RCD):
        return x_RCD.reshape(batch, -1, width)[:, :time]

    return _Layout(
        order=None,
        counts=[batch] * num_chunks,
        walk=walk,
        gather=gather,
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
    first_R, end_R = [], []
    count = len(num_chunks_N)
    for step in range(num_chunks_N[0]):
        while num_chunks_N[count - 1] <= step:
            count -= 1
        first_R.append(start_N[:count] + step * chunk_length)
        end_R.append((start_N + length_N)[:count])
    counts = [first.shape[0] for first in first_R]

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

    def walk(x_R):
        return x_R.split(counts)

    length_R1 = (end_R1 - first_R1).clamp(max=chunk_length)
    return _Layout(order_N, counts, walk, torch.cat, length_R1, split, join)


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
    def forward(ctx, w_D, u_D, k_RCD, v_RCD, state_N3D, layout):
        counts, walk, gather, length_R1 = (
            layout.counts,
            layout.walk,
            layout.gather,
            layout.length_R1,
        )

        def entering(first, left):
            """What leaves the steps enters the next, where a document goes on [R, ...]."""
            return gather([first, *map(_first, left, counts[1:])])

        # Sums over each chunk, in units of its own largest exponent.
        left_RC1 = _positions_left(length_R1, k_RCD)
        exponent_RCD = torch.addcmul(k_RCD, left_RC1, w_D)
        max_RD = exponent_RCD.amax(1)
        weight_RCD = exponent_RCD.sub_(max_RD[:, None]).exp_()
        sums_R2D = torch.stack([(weight_RCD * v_RCD).sum(1), weight_RCD.sum(1)], dim=1)
        del exponent_RCD, weight_RCD

        # What leaves each chunk and enters the next: first the exponents of its units, one maximum
        # after the other; then, in one piece, what follows from them; then the sums.
        decay_RD = length_R1 * w_D
        running_N3D = state_N3D[: counts[0]]
        top, tops = running_N3D[:, 2], []
        for count, decay, largest in zip(counts, walk(decay_RD), walk(max_RD)):
            top = torch.maximum(_first(top, count) + decay, largest)
            tops.append(top)
        enter_RD, left_RD = entering(running_N3D[:, 2], tops), gather(tops)
        keep_R1D = (enter_RD + decay_RD).sub_(left_RD).exp_()[:, None]
        sums_R2D *= (max_RD - left_RD).exp_()[:, None]
        sums, all_sums = running_N3D[:, :2], []
        for count, keep, own in zip(counts, walk(keep_R1D), walk(sums_R2D)):
            sums = torch.addcmul(own, keep, _first(sums, count))
            all_sums.append(sums)
        enter_R2D = entering(running_N3D[:, :2], all_sums)
        enter_R3D = torch.cat([enter_R2D, enter_RD[:, None]], dim=1)
        # A document's final state is what leaves its last chunk, or what came if it is empty.
        ends = [
            torch.cat([sums[after:], top[after:, None]], dim=1)
            for sums, top, count, after in zip(all_sums, tops, counts, [*counts[1:], 0])
            if count > after
        ]
        final_N3D = torch.cat([*ends[::-1], state_N3D[counts[0] :]])

        y_RCD = torch.empty_like(k_RCD, memory_format=torch.contiguous_format)
        mean, log = _mean_and_log(enter_R3D)
        for k, v, y in _blocks(k_RCD, v_RCD, y_RCD):
            means, now, _, mean, log = _averages(k, v, w_D, u_D, mean, log)
            y.copy_(torch.lerp(means, v, now))
        ctx.layout = layout
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(w_D, u_D, k_RCD, v_RCD, enter_R3D, final_N3D)
        return y_RCD, final_N3D

    @staticmethod
    @by_formula
    def backward(ctx, dy_RCD, dfinal_N3D):
        w_D, u_D, k_RCD, v_RCD, enter_R3D, final_N3D = ctx.saved_tensors
        layout = ctx.layout
        counts, walk = layout.counts, layout.walk
        if dy_RCD is None:
            dy_RCD = torch.zeros_like(k_RCD)
        if dfinal_N3D is None:
            dfinal_N3D = torch.zeros_like(final_N3D)

        # The averages and gates again; and p and q at each chunk's start from its own outputs.
        mean, log = _mean_and_log(enter_R3D)
        keep = torch.ones_like(mean)
        pq_R2D = torch.zeros_like(enter_R3D[:, :2])
        p, q = pq_R2D.unbind(1)
        averages = []
        for k, v, dy in _blocks(k_RCD, v_RCD, dy_RCD):
            means, now, write, mean, log = _averages(k, v, w_D, u_D, mean, log)
            averages.append((means, now, write))
            kept, keep = _values(keep, _without, write)
            past = (dy - now * dy).mul_(kept)
            _add_positions(p, past)
            _add_positions(q, past.mul_(torch.lerp(means, v, now)), -1)

        # Back over the chunks: what each one's end receives from all that follow. Documents whose
        # last chunk it is join with the gradient of their final state.
        dlast_N2D = dfinal_N3D[:, :2] * final_N3D[:, 1:2]
        pq, after = dlast_N2D[:0], []
        steps = list(zip([*counts[1:], 0], counts, walk(pq_R2D), walk(keep[:, None])))
        for later, count, own, kept in reversed(steps):
            if count > later:
                pq = torch.cat([pq, dlast_N2D[later:count]])
            after.append(pq)
            pq = torch.addcmul(own, kept, pq)
        after_R2D = layout.gather(after[::-1])

        dstate_N3D = None
        if ctx.needs_input_grad[4]:
            num, den = walk(enter_R3D)[0][:, :2].unbind(1)
            unit = torch.where(den > 0, 1 / den, 0.0)
            dstate = [pq[:, 0] * unit, pq[:, 1] * unit, pq[:, 0] * num * unit + pq[:, 1]]
            dstate_N3D = dfinal_N3D.clone()
            dstate_N3D[:, 2] = 0
            dstate_N3D[: pq.shape[0]] = torch.stack(dstate, dim=1)

        # Back over the positions.
        inside_RC1 = (_positions_left(layout.length_R1, k_RCD) >= 0).to(k_RCD.dtype)
        dk_RCD, dv_RCD = torch.empty_like(k_RCD), torch.empty_like(v_RCD)
        dw_RD, du_RD = torch.zeros_like(keep), torch.zeros_like(keep)
        pq = torch.stack([after_R2D[:, 0], -after_R2D[:, 1]])  # of q the negative
        blocks = _blocks(v_RCD, dy_RCD, inside_RC1, dk_RCD, dv_RCD)
        for (v, dy, inside, dk, dv), (means, now, write) in reversed(list(zip(blocks, averages))):
            dnow = now * dy
            y = torch.lerp(means, v, now)
            dpast = dy - dnow
            added = torch.stack([dpast, dpast * y], dim=1)
            hold = 1 - write
            pqs, pq = _values(pq, _kept_and_added, hold[:, None], added, reverse=True)
            p, minus_q = pqs.unbind(1)
            dv.copy_(torch.addcmul(dnow, write, p))
            dkey = dnow.mul_(v - y)
            _add_positions(du_RD, dkey)
            dwrite = torch.addcmul(minus_q, p, v, value=-1)
            dk.copy_(torch.addcmul(dkey, write, dwrite, value=-1))
            dmean = torch.addcmul(minus_q, p, means, value=-1)
            _add_positions(dw_RD, dmean.mul_(hold).mul_(inside), -1)
        # In float64: many rows, and many cancel.
        dw_D, du_D = (x.sum(0, dtype=torch.float64).to(x.dtype) for x in (dw_RD, du_RD))
        return dw_D, du_D, dk_RCD, dv_RCD, dstate_N3D, None


def _positions_left(length_R1, like_RCD):
    """How many tokens of the chunk come after each position [R, C, 1]; negative past its end."""
    return (length_R1 - 1 - torch.arange(like_RCD.shape[1], device=like_RCD.device))[..., None]


def _mean_and_log(state_R3D):
    """The average so far and the log of the sum of weights: 0 and -inf if there is none."""
    num, den, top = state_R3D.unbind(1)
    return torch.where(den > 0, num / den, 0.0), top + den.log()


def _first(x, count):
    """The first rows of a tensor, without the cost of a view of all of them."""
    return x if x.shape[0] == count else x[:count]


# Elements of a block, of which a dozen arrays are worked on at once: they stay near the processor.
# With fewer positions than eight, starting a block costs what it saves: then they come one by one.
_BLOCK, _FEWEST = 1 << 17, 8


def _blocks(*x_RCX):
    """Groups of positions, [positions, R, ...] of each argument.

    What does not hang on the position before is calculated for a block at a time, in few and larger
    operations: for short sequences starting an operation costs more than its work.
    """
    num_rows, _, width = x_RCX[0].shape
    size = _BLOCK // (num_rows * width)
    size = size if size >= _FEWEST else 1
    return zip(*(x.transpose(0, 1).split(size) for x in x_RCX))


def _values(start, step, *parts, reverse=False):
    """A recursion: (the value that each position meets [positions, ...], what it ends with [...]).

    Args:
        start: the first position's; in reverse, the last one's.
        step: (value, *part of the position, out=) to the value that the next position meets.
        parts: [positions, ...] each.
    """
    count = parts[0].shape[0]
    if count == 1:
        return start[None], step(start, *(x[0] for x in parts), out=None)
    met = start.new_empty(count, *start.shape)
    places, *parts = (x.unbind()[:: -1 if reverse else 1] for x in (met, *parts))
    here = places[0].copy_(start)
    for place, *part in zip([*places[1:], None], *parts):
        here = step(here, *part, out=place)
    return met, here


def _add_positions(total_RD, x, factor=1):
    """Adds the values of all positions of a block, times a factor."""
    total_RD.add_(x[0] if x.shape[0] == 1 else x.sum(0), alpha=factor)


def _without(value, write, *, out):
    return torch.addcmul(value, value, write, value=-1, out=out)


def _kept_and_added(value, keep, added, *, out):
    return torch.addcmul(added, keep, value, out=out)


def _averages(k, v, w_D, u_D, mean_RD, log_RD):
    """(x before each position of a block, s and r there, x and l after it): see the class."""

    def log_of_sum(log, k, *, out):
        return torch.logaddexp(log + w_D, k, out=out)

    logs, log_RD = _values(log_RD, log_of_sum, k)
    gain = k - logs
    now = (gain + u_D).sigmoid_()
    write = gain.sub_(w_D).sigmoid_()
    means, mean_RD = _values(mean_RD, torch.lerp, v, write)
    return means, now, write, mean_RD, log_RD
