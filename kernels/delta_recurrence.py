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

import torch
import torch.nn.functional as F

from .linear_recurrence import (
    BACKENDS,
    _walk_dense,
    _walk_packed,
    accumulator_dtype,
    check_arguments,
)

# Positions per chunk, a power of two. The work per token inside a chunk grows as C (K + V), that of
# the loop over chunks as K K V / C; for heads of 64 this is the fastest of 16, 32 and 64.
CHUNK_LENGTH = 32


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
        backend: "torch" or "auto" (which is "torch": there are no other kernels in this version).

    Returns:
        (o, final_state): o is [B, T, H, V] in v's dtype; final_state is [N, H, K, V], in float32 or
        in float64 if the inputs are, or None unless asked for.

    Raises:
        ValueError: shapes that do not fit, no tokens, a positive log decay, an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(
            f"delta_recurrence: backend is one of {', '.join(BACKENDS)}, got {backend!r}; "
            "this version has the PyTorch path only."
        )
    check_arguments("delta_recurrence", q, k, v, log_decay, None, initial_state, cu_seqlens)
    for name, x in (("a", a), ("b", b)):
        if x.shape != q.shape:
            raise ValueError(
                f"delta_recurrence: {name} has the shape of q {list(q.shape)}, got {list(x.shape)}."
            )
    return delta_recurrence_chunked(
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
    The first line is a unit lower triangular system: u = u0 + W S (the WY form). With it the chunk
    is linear in S, S' = M S + P, and that product is all that the loop over chunks does; the rest
    is done for all chunks of all documents at once. Memory grows linearly with T.

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
    scores, a_NHCK, q_NHCK, b_NHCK, k_NHCK, decay_NHK = _scores(
        a_NHCK, q_NHCK, b_NHCK, k_NHCK, gates
    )
    ab_NHCC, ak_NHCC, qb_NHCC, qk_NHCC = scores
    right = torch.cat([ak_NHCC @ v_NHCV, a_NHCK], dim=-1)
    right = torch.linalg.solve_triangular(-ab_NHCC, right, upper=False, unitriangular=True)
    u_NHCV, w_NHCK = right.split([v_NHCV.shape[-1], a_NHCK.shape[-1]], dim=-1)

    transition_NHKK = b_NHCK.mT @ w_NHCK
    transition_NHKK.diagonal(dim1=-2, dim2=-1).add_(1 if decay_NHK is None else decay_NHK)
    update_NHKV = b_NHCK.mT @ u_NHCV + k_NHCK.mT @ v_NHCV
    entering, finished = [], []
    # One split and one concatenation: slicing inside the loop would make backward quadratic in T.
    steps = (transition_NHKK.split(layout.counts), update_NHKV.split(layout.counts), layout.counts)
    for transition, update, count in zip(*steps, strict=True):
        finished.append(state_NHKV[count:])
        state_NHKV = state_NHKV[:count]
        entering.append(state_NHKV)
        state_NHKV = transition @ state_NHKV + update

    o_NHCV = qb_NHCC @ u_NHCV + qk_NHCC @ v_NHCV
    o_NHCV = o_NHCV + (q_NHCK + qb_NHCC @ w_NHCK) @ torch.cat(entering)
    # Documents leave the walk shortest first.
    return o_NHCV, torch.cat([state_NHKV, *finished[::-1]])


def _scores(a_NHCK, q_NHCK, b_NHCK, k_NHCK, gates):
    """What position i reads of position j, and the factors to and from the chunk's ends.

    Blocks of one position grow to the whole chunk by doubling. At every size, readers (a and q)
    carry the decay since their block began, a without and q with its own position's; writers (b and
    k) the decay until it ends. Two neighbours then meet in one product: the later one's readers
    with the earlier one's writers. No quotient of decays is ever taken, so none can overflow.

    Returns:
        scores: (ab, ak, qb, qk), each [N, H, C, C]; those of a without the diagonal.
        a, q: with the decay since the chunk began, [N, H, C, K].
        b, k: with the decay until the chunk ends.
        decay: over the chunk, [N, H, 1 or K]; None if there is none.
    """
    length = q_NHCK.shape[2]
    # [N, H, C, 2, K], so that a block of any size is a matrix of 2 size rows, without a copy.
    readers = torch.stack([a_NHCK, q_NHCK if gates is None else q_NHCK * gates.exp()], dim=3)
    writers = torch.stack([b_NHCK, k_NHCK], dim=3)
    decay = None
    if gates is None:
        scores = readers.flatten(2, 3) @ writers.flatten(2, 3).mT
    else:
        # [N, H, blocks, 2 size, 2 size], and decays [N, H, blocks, K].
        decay = gates.exp()
        own = (q_NHCK[:, :, :, None] * writers).sum(-1)
        scores = torch.stack([torch.zeros_like(own), own], dim=3)
        for size in (1 << n for n in range(length.bit_length() - 1)):
            first, second = decay.unflatten(2, (-1, 2)).unbind(3)
            readers = readers.unflatten(2, (-1, 2, size))
            writers = writers.unflatten(2, (-1, 2, size))
            meet = readers[:, :, :, 1].flatten(3, 4) @ writers[:, :, :, 0].flatten(3, 4).mT
            early, late = scores.unflatten(2, (-1, 2)).unbind(3)
            scores = torch.cat(
                [F.pad(early, (0, 2 * size)), torch.cat([meet, late], dim=-1)], dim=-2
            )
            one = torch.ones_like(first)
            since = torch.stack([one, first], dim=3)[:, :, :, :, None, None]
            until = torch.stack([second, one], dim=3)[:, :, :, :, None, None]
            readers = (readers * since).flatten(2, 4)
            writers = (writers * until).flatten(2, 4)
            decay = first * second
        decay = decay[:, :, 0]
    scores = scores.reshape(*q_NHCK.shape[:2], length, 2, length, 2)
    ab, ak, qb, qk = (scores[:, :, :, i, :, j] for i in (0, 1) for j in (0, 1))
    scores = ab.tril(-1), ak.tril(-1), qb.tril(), qk.tril()
    return scores, *readers.unbind(3), *writers.unbind(3), decay
