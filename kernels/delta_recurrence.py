"""Delta recurrence: a matrix state that decays, corrects itself along one direction, and learns.

    u_t = S_{t-1}^T a_t                                             what the state holds at a_t: [V]
    S_t = diag(exp(log_decay_t)) S_{t-1} + b_t u_t^T + k_t v_t^T    S is [K, V], diag acts on K
    o_t = scale * S_t^T q_t                                         read after the token

The transition is diag(exp(log_decay_t)) + b_t a_t^T, from the left: `a` *reads* the state along the
key axis, before it decays, and `b` says where on the key axis what was read is *written* back.
With a = -b it is removed; `k` and `v` then add. Special cases, with w the natural log of a decay:

    RWKV-7 (Peng et al. 2025, https://arxiv.org/abs/2503.14456): q = r, log_decay = w, and with the
        unit vectors kk and in-context learning rates iclr, a = -kk and b = kk * iclr:
        S_t = diag(exp(w)) S_{t-1} - (kk * iclr) kk^T S_{t-1} + k v^T
        The authors write the state transposed, S^T [V, K]: S^T diag(exp(w)) + (S^T a) b^T + v k^T.
    Delta rule (Schlag et al. 2021, https://arxiv.org/abs/2102.11174; DeltaNet), with learning rates
        beta: log_decay = None, a = -k, b = beta * k, and beta * v in v's place:
        S_t = S_{t-1} + beta k (v - S_{t-1}^T k)^T
    Gated delta rule (Yang et al. 2024, https://arxiv.org/abs/2412.06464): log_decay [B, T, H] = w,
        a = -exp(w) * k, the rest as above: S_t = exp(w) (I - beta k k^T) S_{t-1} + beta k v^T
    a = 0 or b = 0: `linear_recurrence` without bonus.

Call `delta_recurrence`. `delta_recurrence_reference` is the definition, one step at a time;
`delta_recurrence_chunked` gives the same numbers in matrix products over chunks of positions.
Decays only appear as products of numbers between 0 and 1, so any decay stays finite: there is no
bound on how strong it is, -inf (forget everything) included.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .autograd_rules import by_formula
from .delta_recurrence_sizes import CHUNK_LENGTH, MAX_KERNEL_DIM
from .known_calls import KnownCalls, can_be_known, form
from .linear_recurrence import (
    _walk_dense,
    _walk_packed,
    accumulator_dtype,
    check_arguments,
    choose_backend,
)
from .recurrence_steps import delta_recurrence_step, is_plain_step


def delta_recurrence(
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
    backend="auto",
):
    """Runs the delta recurrence of the module docstring over a batch or a packed stream.

    Args:
        q: queries [B, T, H, K], any float dtype.
        k: keys [B, T, H, K].
        v: values [B, T, H, V].
        log_decay: natural log of the decay, <= 0: None (no decay), [H], [B, T, H] or [B, T, H, K].
        a: what the previous state is read with [B, T, H, K].
        b: where that is written [B, T, H, K]. Nothing here normalises a and b: for a state that
            does not grow, keep the transition diag(exp(log_decay)) + b a^T a contraction.
        scale: factor on the output.
        initial_state: [N, H, K, V], the state before the first token; None is zero. N is B, or the
            number of documents with `cu_seqlens`.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: document boundaries in a packed stream, [N + 1] integers from 0 to T, as in
            FlashAttention; B must be 1. Documents may be empty. None: one document per row.
        backend: "torch", "triton", "fla" (flash-linear-attention), or "auto": "triton" for tensors
            on a GPU where it is installed, they are not float64 and K and V are at most 512, else
            "torch". What is asked for is done or refused. The kernels read log decays below -20 as
            -20, those for K above 128 as they are.

    Returns:
        (o, final_state): o is [B, T, H, V] in v's dtype; final_state is [N, H, K, V], in float32 or
        in float64 if the inputs are, or None unless asked for.

    Raises:
        ValueError: shapes that do not fit, no tokens, a positive log decay, an unknown backend or
            one that cannot run this call.
    """
    key, tensors = None, (q, k, v, log_decay, a, b, initial_state, cu_seqlens)
    if can_be_known(q, scale):
        key = (
            (backend, scale, output_final_state, torch.is_grad_enabled(), q.device),
            (q.shape, q.dtype, k.shape, k.dtype, v.shape, v.dtype),
            (a.shape, a.dtype, b.shape, b.dtype),
            None if log_decay is None else form(log_decay),
            None if initial_state is None else form(initial_state),
            None if cu_seqlens is None else form(cu_seqlens),
        )
        call = _known.prepared.get(key)
        if call is not None:
            return call(*tensors)
    chosen = choose_backend("delta_recurrence", backend, q)
    if backend == "auto" and max(q.shape[-1], v.shape[-1]) > MAX_KERNEL_DIM:
        chosen = "torch"
    check_arguments("delta_recurrence", q, k, v, log_decay, None, initial_state, cu_seqlens, chosen)
    for name, x in (("a", a), ("b", b)):
        if x.shape != q.shape:
            raise ValueError(
                f"delta_recurrence: {name} has the shape of q {list(q.shape)}, got {list(x.shape)}."
            )
    keyword = {
        "scale": scale,
        "initial_state": initial_state,
        "output_final_state": output_final_state,
        "cu_seqlens": cu_seqlens,
    }
    if chosen == "triton" and key is not None:
        prepare = functools.partial(_prepare_triton, tensors, scale, output_final_state)
        call = _known.meet(key, prepare)
        if call is not None:
            return call(*tensors)
    run = {"torch": _run_torch, "triton": _run_triton, "fla": _run_fla}[chosen]
    return run(q, k, v, log_decay, a, b, **keyword)


_known = KnownCalls()


def _run_torch(q, k, v, log_decay, a, b, **keyword):
    """Chunks one after the other; in a program that is being exported, in operators alone."""
    if is_plain_step(q, keyword["cu_seqlens"]):
        return delta_recurrence_step(q, k, v, log_decay, a, b, **keyword)
    if torch.compiler.is_exporting():
        from .delta_recurrence_export import delta_recurrence_exported

        return delta_recurrence_exported(q, k, v, log_decay, a, b, **keyword)
    return delta_recurrence_chunked(q, k, v, log_decay, a, b, **keyword)


def _run_triton(q, k, v, log_decay, a, b, **keyword):
    """The kernels; a step of its own for one token without gradients."""
    from .delta_recurrence_triton import delta_recurrence_step, delta_recurrence_triton

    inputs = (q, k, v, log_decay, a, b, keyword["initial_state"])
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    if q.shape[1] == 1 and keyword["cu_seqlens"] is None and not learns:
        scale, state = keyword["scale"], keyword["initial_state"]
        o, state = delta_recurrence_step(q, k, v, log_decay, a, b, scale=scale, state=state)
        return o, state if keyword["output_final_state"] else None
    return delta_recurrence_triton(q, k, v, log_decay, a, b, **keyword)


def _prepare_triton(tensors, scale, output_final_state):
    """What to keep for calls of this form; None for one token with gradients, or without."""
    from .delta_recurrence_triton import PASSES
    from .ready_triton import prepared_call

    def run(q, k, v, log_decay, a, b, initial_state, cu_seqlens):
        return _run_triton(
            q,
            k,
            v,
            log_decay,
            a,
            b,
            scale=scale,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
        )

    if tensors[0].shape[1] == 1 and torch.is_grad_enabled():
        return None
    return prepared_call(PASSES, (float(scale), output_final_state), run)


def _run_fla(q, k, v, log_decay, a, b, **keyword):
    from .fla_backend import delta_recurrence_fla

    return delta_recurrence_fla(q, k, v, log_decay, a, b, **keyword)


def delta_recurrence_reference(
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
    """The definition, one step at a time. Same arguments and results as `delta_recurrence`.

    Runs in float64 if the inputs are, else in float32. Differentiable by autograd; slow.
    """
    q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK = (x.to(accumulator_dtype(q)) for x in (q, k, v, a, b))
    batch, time, heads, key_dim = q.shape
    value_dim = v.shape[-1]
    if log_decay is None:
        log_decay = q_BTHK.new_zeros(heads)
    if log_decay.ndim == 1:
        log_decay = log_decay.expand(batch, time, heads)
    if log_decay.ndim == 3:
        log_decay = log_decay[..., None]
    decay_BTHK = log_decay.to(q_BTHK.dtype).exp().expand(batch, time, heads, key_dim)

    if cu_seqlens is None:
        documents = [(row, 0, time) for row in range(batch)]
    else:
        bounds = cu_seqlens.tolist()
        documents = [(0, start, end) for start, end in zip(bounds, bounds[1:], strict=False)]

    outputs_THV, states_HKV = [], []
    for n, (row, start, end) in enumerate(documents):
        if initial_state is None:
            state_HKV = q_BTHK.new_zeros(heads, key_dim, value_dim)
        else:
            state_HKV = initial_state[n].to(q_BTHK.dtype)
        for t in range(start, end):
            held_HV = (a_BTHK[row, t, :, :, None] * state_HKV).sum(-2)
            state_HKV = (
                decay_BTHK[row, t, :, :, None] * state_HKV
                + b_BTHK[row, t, :, :, None] * held_HV[:, None, :]
                + k_BTHK[row, t, :, :, None] * v_BTHV[row, t, :, None, :]
            )
            outputs_THV.append(scale * (q_BTHK[row, t, :, :, None] * state_HKV).sum(-2))
        states_HKV.append(state_HKV)
    o_BTHV = torch.stack(outputs_THV).unflatten(0, (batch, time)).to(v.dtype)
    return o_BTHV, torch.stack(states_HKV) if output_final_state else None


def delta_recurrence_chunked(
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
    chunk_length=None,
):
    """The recurrence as matrix products over chunks of positions, for any device.

    Inside a chunk that S enters, with d(j, i) the product of the decays of positions j + 1 to i:
        u_i = d(0, i-1) a_i^T S + sum_{j < i} (a_i d(j, i-1) b_j) u_j + (a_i d(j, i-1) k_j) v_j
        o_i = d(0, i) q_i^T S  + sum_{j <= i} (q_i d(j, i) b_j) u_j   + (q_i d(j, i) k_j) v_j
    The first line is a unit lower triangular system. What it needs of S, and what u and v then make
    of S, is all that the loop over chunks does; the rest is done for all chunks of all documents at
    once. Memory grows linearly with T.

    Args: as `delta_recurrence`, and
        chunk_length: positions per chunk, a power of two; None: `CHUNK_LENGTH`, or less for short
            documents.
    """
    dtype = accumulator_dtype(q)
    batch, time, heads = q.shape[:3]
    if chunk_length is None:
        # A chunk belongs to one document: short ones in wide chunks would be mostly padding.
        mean_length = time if cu_seqlens is None else time / (len(cu_seqlens) - 1)
        chunk_length = min(CHUNK_LENGTH, 1 << max(0, int(mean_length - 1)).bit_length())
    if chunk_length.bit_count() != 1:
        raise ValueError(f"delta_recurrence: chunk_length is a power of two, got {chunk_length}.")

    # Autocast would round the carried state to 16 bits in the products below.
    with torch.autocast(q.device.type, enabled=False):
        # The walks carry three tensors; `_walk` takes the second one apart.
        kab = torch.cat([x.to(dtype) for x in (k, a, b)], dim=-1)
        inputs = [q.to(dtype) * scale if scale != 1.0 else q.to(dtype), kab, v.to(dtype)]
        if log_decay is not None:
            log_decay = log_decay.to(dtype)
            if log_decay.ndim == 1:
                log_decay = log_decay.expand(batch, time, heads)
        state = None if initial_state is None else initial_state.to(dtype)
        if cu_seqlens is not None:
            o, state = _walk_packed(_walk, inputs, log_decay, state, cu_seqlens, chunk_length)
        else:
            if state is None:
                state = inputs[0].new_zeros(batch, heads, q.shape[-1], v.shape[-1])
            # Zeros at the end leave the state as it is: decay 1, nothing written.
            if rest := -time % chunk_length:
                inputs = [F.pad(x, (0, 0, 0, 0, 0, rest)) for x in inputs]
                if log_decay is not None:
                    log_decay = F.pad(log_decay, (0, 0) * (log_decay.ndim - 2) + (0, rest))
            o, state = _walk_dense(_walk, inputs, log_decay, state, chunk_length)
            o = o[:, :time]
    return o.to(v.dtype), state if output_final_state else None


def _walk(q_NHCK, kab_NHCX, v_NHCV, gates, state_NHKV, layout):
    """Outputs of all chunks and the states after the last ones.

    Args:
        kab_NHCX: k, a and b side by side.
        gates: None or log decays [N, H, C, 1 or K].
        layout: whose counts say how many documents take part in each step of the walk.
    """
    k_NHCK, a_NHCK, b_NHCK = kab_NHCX.chunk(3, dim=-1)
    # Two readers and two writers per position, [N, H, C, 2, K]: a block of any number of positions
    # is then a matrix without a copy.
    readers = torch.stack([a_NHCK, q_NHCK], dim=3)
    writers = torch.stack([b_NHCK, k_NHCK], dim=3)
    return _DeltaScan.apply(readers, writers, v_NHCV, gates, state_NHKV, layout.counts)


class _DeltaScan(torch.autograd.Function):
    """The walk over chunks, with its gradients by formula.

    For a chunk that S enters and S' leaves, let A and Q be a and q with the decay since the chunk
    began, B and K be b and k with the decay until it ends, d the decay over it, ab, ak, qb and qk
    the scores, and M = (I - ab)^-1. Then

        U  = M (A S + ak v)
        o  = Q S + qb U + qk v
        S' = d S + B^T U + K^T v

    and against the direction of time, with dS' the gradient that comes from later chunks,

        dR = M^T (B dS' + qb^T do)           dS = d dS' + A^T dR + Q^T do
        dv = qk^T do + K dS' + ak^T dR
        dA = dR S^T              dQ = do S^T     dB = U dS'^T     dK = v dS'^T
        d(ab) = dR U^T           d(ak) = dR v^T  d(qb) = do U^T   d(qk) = do v^T

    Only U and S, and dR and dS, need a loop. `_scores_gradient` goes on from the last two lines.
    """

    @staticmethod
    def forward(ctx, readers, writers, v_NHCV, gates, state_NHKV, counts):
        # Without gradients, nobody looks at these again.
        chunk = _solve(readers, writers, gates, is_last=not any(ctx.needs_input_grad))
        written = torch.stack([v_NHCV, v_NHCV], dim=3)
        entering, finished = [], []
        steps = (chunk.ak @ v_NHCV, chunk.a, chunk.inverse, chunk.writers.mT, written)
        decays = _split(chunk.decay, counts)
        for *step, d, count in zip(*(x.split(counts) for x in steps), decays, counts, strict=True):
            finished.append(state_NHKV[count:])
            state_NHKV = state_NHKV[:count]
            entering.append(state_NHKV)
            state_NHKV = _step(*step, d, state_NHKV)
        entering_NHKV, written = torch.cat(entering), written.flatten(2, 3)
        o_NHCV = chunk.q_scores @ written
        o_NHCV += chunk.q @ entering_NHKV
        ctx.counts = counts
        ctx.save_for_backward(readers, writers, v_NHCV, gates, entering_NHKV)
        # Documents leave the walk shortest first.
        return o_NHCV, torch.cat([state_NHKV, *finished[::-1]])

    @staticmethod
    @by_formula
    def backward(ctx, do_NHCV, dfinal):
        readers, writers, v_NHCV, gates, state_NHKV = ctx.saved_tensors
        counts, levels = ctx.counts, []
        chunk = _solve(readers, writers, gates, levels)
        read = torch.stack([do_NHCV, do_NHCV], dim=3)
        leaving, dstate = [], dfinal[: counts[-1]]
        steps = (chunk.qb.mT @ do_NHCV, chunk.b, chunk.inverse.mT, chunk.readers.mT, read)
        decays = _split(chunk.decay, counts)
        steps = list(zip(*(x.split(counts) for x in steps), decays, counts, strict=True))
        for *step, d, count in reversed(steps):
            # Documents whose last chunk this is join with the gradient of their final state.
            if count > dstate.shape[0]:
                dstate = torch.cat([dstate, dfinal[dstate.shape[0] : count]])
            leaving.append(dstate)
            dstate = _step(*step, d, dstate)
        dinitial = torch.cat([dstate, dfinal[dstate.shape[0] :]])
        dstate_NHKV = torch.cat(leaving[::-1])

        dv_NHCV = chunk.k @ dstate_NHKV
        dv_NHCV += chunk.qk.mT @ do_NHCV
        dv_NHCV += chunk.ak.mT @ read[:, :, :, 0]
        u_NHCV = chunk.inverse @ (chunk.a @ state_NHKV).add_(chunk.ak @ v_NHCV)
        # As the readers and writers are laid out, all the others are three products.
        read, written = read.flatten(2, 3), torch.stack([u_NHCV, v_NHCV], dim=3).flatten(2, 3)
        dreaders = (read @ state_NHKV.mT).view_as(readers)
        dwriters = (written @ dstate_NHKV.mT).view_as(writers)
        dscores = read @ written.mT
        dgates = None
        if gates is None:
            dscores = dscores.where(_visible(readers.shape[2], dscores.device), 0)
            dreaders += (dscores @ writers.flatten(2, 3)).view_as(readers)
            dwriters += (dscores.mT @ readers.flatten(2, 3)).view_as(writers)
        else:
            dtotal = (state_NHKV * dstate_NHKV).sum(-1).mul_(chunk.decay)
            if gates.shape[-1] == 1:
                dtotal = dtotal.sum(-1, keepdim=True)
            dgates = _scores_gradient(
                readers, writers, gates, levels, dscores, dreaders, dwriters, dtotal
            )
        return dreaders, dwriters, dv_NHCV, dgates, dinitial, None


class _Chunk(NamedTuple):
    """What the formulas of `_DeltaScan` are about, by their names; `inverse` is M.

    ak, qb, qk and inverse are [N, H, C, C]; a, q, b and k [N, H, C, K]; decay [N, H, 1 or K]. And
    position by position readers, A and Q, and writers, B and K, [N, H, 2 C, K], and q_scores, qb
    and qk, [N, H, C, 2 C].
    """

    ak: torch.Tensor
    qb: torch.Tensor
    qk: torch.Tensor
    a: torch.Tensor
    q: torch.Tensor
    b: torch.Tensor
    k: torch.Tensor
    decay: torch.Tensor | None
    inverse: torch.Tensor
    readers: torch.Tensor
    writers: torch.Tensor
    q_scores: torch.Tensor


def _solve(readers, writers, gates, levels=None, is_last=False):
    """The `_Chunk` of all chunks; arguments as `_scores`."""
    scores, readers, writers, decay = _scores(readers, writers, gates, levels, is_last)
    length = readers.shape[2]
    rows = scores.unflatten(-2, (length, 2))
    by_pair = rows.unflatten(-1, (length, 2))
    ab, ak, qb, qk = (by_pair[:, :, :, i, :, j] for i in (0, 1) for j in (0, 1))
    one = torch.eye(length, dtype=ab.dtype, device=ab.device)
    inverse = torch.linalg.solve_triangular(one - ab, one, upper=False, unitriangular=True)
    vectors = *readers.unbind(3), *writers.unbind(3)
    pairs = readers.flatten(2, 3), writers.flatten(2, 3), rows[:, :, :, 1]
    return _Chunk(ak, qb, qk, *vectors, decay, inverse, *pairs)


def _split(decay, counts):
    """Decays over chunks [N, H, 1 or K] by step, as a factor of states; None is none."""
    return [None] * len(counts) if decay is None else decay[..., None].split(counts)


def _step(given_NHCV, into_NHCK, inverse, back, pair, decay, state_NHKV):
    """A chunk's part of the walk: decay S + back [x, y], x = inverse (given + into S).

    Args:
        pair: x and y, [N, H, C, 2, V]; x is written into it.
    """
    shape = state_NHKV.shape[:2]
    given, into, inverse, back, state = (
        x.flatten(0, 1) for x in (given_NHCV, into_NHCK, inverse, back, state_NHKV)
    )
    pair[:, :, :, 0] = (inverse @ torch.baddbmm(given, into, state)).unflatten(0, shape)
    state_NHKV = state_NHKV.clone() if decay is None else state_NHKV * decay
    state_NHKV.flatten(0, 1).baddbmm_(back, pair.flatten(2, 3).flatten(0, 1))
    return state_NHKV


def _scores(readers, writers, gates, levels=None, is_last=False):
    """What position i reads of position j, and the factors to and from the chunk's ends.

    Blocks of one position grow to the whole chunk by doubling. At every size, readers (a and q)
    carry the decay since their block began, a without and q with its own position's; writers (b and
    k) the decay until it ends. Two neighbours then meet in one product: the later one's readers
    with the earlier one's writers. No quotient of decays is ever taken, so none can overflow.

    Args:
        readers, writers: a and q, b and k [N, H, C, 2, K].
        gates: None or log decays [N, H, C, 1 or K].
        levels: a list that receives what `_scores_gradient` needs, from small blocks to large.
        is_last: whether readers and writers may be overwritten.

    Returns:
        scores: [N, H, 2 C, 2 C], a before q and b before k at every position; what is not visible
            is 0: a reads earlier positions, q its own too.
        readers: with the decay since the chunk began.
        writers: with the decay until the chunk ends.
        decay: over the chunk, [N, H, 1 or K]; None if there is none.
    """
    length = readers.shape[2]
    if gates is None:
        scores = readers.flatten(2, 3) @ writers.flatten(2, 3).mT
        return scores.where(_visible(length, scores.device), 0), readers, writers, None
    decay = gates.exp()
    scores = readers.new_zeros(*readers.shape[:2], 2 * length, 2 * length)
    own = (readers[:, :, :, 1:] * writers).sum(-1)
    _diagonal_blocks(scores, length)[:, :, 1].copy_(own.movedim(2, -1))
    if not is_last:
        readers, writers = readers.clone(), writers.clone()
    readers[:, :, :, 1] *= decay
    for size in (1 << n for n in range(length.bit_length() - 1)):
        first, second = decay.unflatten(2, (-1, 2)).unbind(3)
        late = readers.unflatten(2, (-1, 2, size))[:, :, :, 1]
        early = writers.unflatten(2, (-1, 2, size))[:, :, :, 0]
        rows, columns = late.flatten(3, 4), early.flatten(3, 4)
        meet = rows @ columns.mT
        corner = _diagonal_blocks(scores, length // (2 * size))[:, :, 2 * size :, : 2 * size]
        corner.copy_(meet.movedim(2, -1))
        if levels is not None:
            levels.append((rows.clone(), columns.clone(), first, second))
        late *= first[:, :, :, None, None]
        early *= second[:, :, :, None, None]
        decay = first * second
    return scores, readers, writers, decay[:, :, 0]


def _scores_gradient(readers, writers, gates, levels, dscores, dreaders, dwriters, dtotal):
    """From the gradients of what `_scores` returns to those of its arguments.

    The steps of `_scores` backwards: blocks are halved. A block's log decay has as its gradient
    that of the block it is a half of, and what the other half's factors add; nothing is subtracted,
    so nothing cancels.

    Args:
        levels: as `_scores` left them.
        dreaders, dwriters: become the gradients of readers and writers, in place.
        dtotal: gradient of the log decay over the chunk [N, H, 1 or K].

    Returns:
        that of the gates.
    """
    length, is_scalar = readers.shape[2], gates.shape[-1] == 1
    dtotal = dtotal[:, :, None]
    for size in (1 << n for n in reversed(range(length.bit_length() - 1))):
        rows, columns, first, second = levels.pop()
        dlate = dreaders.unflatten(2, (-1, 2, size))[:, :, :, 1]
        dearly = dwriters.unflatten(2, (-1, 2, size))[:, :, :, 0]
        dlate *= first[:, :, :, None, None]
        dearly *= second[:, :, :, None, None]
        drows, dcolumns = dlate.flatten(3, 4), dearly.flatten(3, 4)
        through = [(x * dx).sum(3) for x, dx in ((rows, drows), (columns, dcolumns))]
        if is_scalar:
            through = [x.sum(-1, keepdim=True) for x in through]
        dtotal = (dtotal[:, :, :, None] + torch.stack(through, dim=3)).flatten(2, 3)
        corner = _diagonal_blocks(dscores, length // (2 * size))[:, :, 2 * size :, : 2 * size]
        meet = corner.movedim(-1, 2).contiguous()
        drows += meet @ columns
        dcolumns += meet.mT @ rows
    dq = dreaders[:, :, :, 1]
    dq *= gates.exp()
    through = readers[:, :, :, 1] * dq
    dgates = dtotal + (through.sum(-1, keepdim=True) if is_scalar else through)
    own = _diagonal_blocks(dscores, length)[:, :, 1].movedim(-1, 2)[..., None]
    dq += (own * writers).sum(3)
    dwriters += own * readers[:, :, :, 1:]
    return dgates


def _diagonal_blocks(x_NHCC, count):
    """The square blocks on the diagonal, [N, H, size, size, count], as a view."""
    size = x_NHCC.shape[-1] // count
    blocks = x_NHCC.unflatten(-1, (count, size)).unflatten(-3, (count, size))
    return blocks.diagonal(dim1=-4, dim2=-2)


def _visible(length, device):
    """Which writers a reader sees, [2 C, 2 C]: a those of earlier positions, q its own too."""
    ones_CC = torch.ones(length, length, dtype=torch.bool, device=device)
    visible = torch.stack([ones_CC.tril(-1), ones_CC.tril()], dim=1).flatten(0, 1)
    return visible.repeat_interleave(2, dim=-1)
