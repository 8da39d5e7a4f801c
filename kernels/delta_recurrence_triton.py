"""Triton kernels of the delta recurrence, RWKV-7's first of all: decays of every form.

The formulas and their names are those of `_DeltaScan` in delta_recurrence.py. What a chunk of C
positions does to a state is linear in it, so the work falls in two:

    `_prepare`    chunks at once: the scores, M = (I - ab)^-1 and from them the transition B^T W,
                  [K, K], the update B^T M ak v + K^T v, [K, V], and, in place of q, Q + qb W
    `_scan`       chunk after chunk, a slice of V per program with its state in registers: one
                  product for the state, one for the output

The backward pass prepares again, walks both ways at once (`_scan_states`: the states that enter the
chunks and the gradients that leave them), and then takes every gradient of every chunk at once
(`_gradients`). No program adds to another's result.

A decay between two positions is exp of the sum of the log decays between them, and that sum is a
product with a matrix of zeros and ones: nothing is subtracted, so a strong decay does not cost its
neighbours digits. Scores split at the boundaries of blocks of C/2, C/4, ... 8 positions, so every
factor there is at most 1; inside blocks of 8 the factors count from the middle and are at most
exp(4 * 20), because log decays below -20, a factor of 2e-9, count as -20.

Where no K x K matrix fits, above K = 128, delta_recurrence_walk_triton.py goes token by token.
"""

import functools
from typing import NamedTuple

import torch

try:  # transformers asks for every library that code from the Hub imports, but in a try
    import triton
    import triton.language as tl
except ImportError:
    raise

from .delta_recurrence_sizes import MAX_KERNEL_DIM
from .delta_recurrence_walk_triton import backward as walk_backward
from .delta_recurrence_walk_triton import forward as walk_forward
from .delta_recurrence_walk_triton import load_decay
from .launch_triton import (
    Config,
    check_replaceable,
    dot,
    dot_add,
    dot_precision,
    launch,
    num_processors,
    operator_namespace,
    padded,
    rounded,
    target_of,
)
from .operator_triton import is_traced, narrow, nothing, without_none
from .ready_triton import Passes, Ready
from .segments_triton import overridden

# Log decays are at least this, and blocks without a boundary this long: see above.
LOWEST = tl.constexpr(-20.0)
BLOCK = tl.constexpr(8)


@triton.jit
def _chunk_bounds(slot, cu_seqlens, T, N, C: tl.constexpr):
    """(first token, tokens) of a chunk; tokens <= 0 where there is none.

    Chunks never hold tokens of two documents. Those of document n begin at slot
    cu_seqlens[n] // C + n, which leaves room for its last one, without a sum over documents.
    """
    if cu_seqlens is None:
        per_row = (T + C - 1) // C
        row = slot // per_row
        start = row * T + (slot % per_row) * C
        end = (row + 1) * T
    else:
        low = slot * 0
        high = low + N
        while high - low > 1:
            middle = (low + high) // 2
            is_before = tl.load(cu_seqlens + middle).to(tl.int64) // C + middle <= slot
            low = tl.where(is_before, middle, low)
            high = tl.where(is_before, high, middle)
        first = tl.load(cu_seqlens + low).to(tl.int64)
        start = first + (slot - first // C - low) * C
        end = tl.load(cu_seqlens + low + 1).to(tl.int64)
    return start, tl.minimum(end - start, C).to(tl.int32)


@triton.jit
def _document_bounds(n, cu_seqlens, T, C: tl.constexpr):
    """(first token, tokens, first slot) of a document."""
    if cu_seqlens is None:
        start = n * T
        end = start + T
        slot = n * ((T + C - 1) // C)
    else:
        start = tl.load(cu_seqlens + n).to(tl.int64)
        end = tl.load(cu_seqlens + n + 1).to(tl.int64)
        slot = start // C + n
    return start, end - start, slot


@triton.jit
def _load_gates(
    log_decay, token, channel, mask, h, H: tl.constexpr, K: tl.constexpr, DECAY: tl.constexpr
):
    """Log decays of a chunk, one per channel; 0 outside. token, channel: column and row, or so."""
    if DECAY == 1:
        gates = tl.where(mask, tl.load(log_decay + h).to(tl.float32), 0.0)
    elif DECAY == 2:
        own = tl.load(log_decay + token * H + h + channel * 0, mask=mask, other=0.0)
        gates = own.to(tl.float32)
    else:
        own = tl.load(log_decay + (token * H + h) * K + channel, mask=mask, other=0.0)
        gates = own.to(tl.float32)
    # A positive log decay is no decay. The host does not look at values, so this shows it.
    gates = tl.where(gates <= 0, tl.maximum(gates, LOWEST), float("nan"))
    # bfloat16 in, bfloat16 out: sums of it are as exact, in products that are faster.
    if log_decay.dtype.element_ty == tl.bfloat16:
        gates = gates.to(tl.bfloat16)
    return gates


@triton.jit
def _sums(x, y, OPERAND: tl.constexpr, EXACT: tl.constexpr):
    """x @ y, one of them log decays, the other -1, 0 and 1, to float32's precision or near it.

    With operands in bfloat16, float32 gates are a sum of two bfloat16: 16 bits, two fast products.
    """
    # Signs by way of float32: the interpreter knows no direct way from an integer to bfloat16.
    x_float, y_float = x.to(tl.float32), y.to(tl.float32)
    if OPERAND == tl.bfloat16:
        x_high, y_high = x_float.to(tl.bfloat16), y_float.to(tl.bfloat16)
        sums = dot(x_high, y_high, EXACT)
        if x.dtype == tl.float32:
            x_low = (x_float - x_high.to(tl.float32)).to(tl.bfloat16)
            sums = dot_add(x_low, y_high, sums, EXACT)
        if y.dtype == tl.float32:
            y_low = (y_float - y_high.to(tl.float32)).to(tl.bfloat16)
            sums = dot_add(x_high, y_low, sums, EXACT)
    else:
        sums = dot(x_float, y_float, EXACT)
    return sums


@triton.jit
def _between(i, t, W: tl.constexpr, IS_INNER: tl.constexpr):
    """Which log decays add up to the exponent of position i: 1, 0 or -1 for each t.

    Blocks of W positions come in pairs. In the later one a reader counts from the block's first
    position to its own, in the earlier one a writer from the next position to the block's end.
    Inner blocks have no partner: both count from the middle, a writer with the sign changed.
    """
    same = i // W == t // W
    if IS_INNER:
        is_second = t % W >= W // 2
        after = same & is_second & (t <= i)
        before = same & (t % W < W // 2) & (t > i)
        signs = after.to(tl.int8) - before.to(tl.int8)
    else:
        is_late = (i // W) % 2 == 1
        signs = (same & (is_late == (t <= i))).to(tl.int8)
    return signs


@triton.jit
def _factors(
    gates, W: tl.constexpr, IS_INNER: tl.constexpr, OPERAND: tl.constexpr, EXACT: tl.constexpr
):
    """Decays of a, q (readers) and of b and k (writers) to the boundary of their pair [C, K]."""
    C: tl.constexpr = gates.shape[0]
    r = tl.arange(0, C)
    signs = _between(r[:, None], r[None, :], W, IS_INNER)
    exponent = _sums(signs, gates, OPERAND, EXACT)
    # a reads before its own position decays.
    earlier = exponent - gates.to(tl.float32)
    if IS_INNER:
        of_a, of_q, of_writer = tl.exp(earlier), tl.exp(exponent), tl.exp(-exponent)
    else:
        is_late = ((r // W) % 2 == 1)[:, None]
        factor = tl.exp(exponent)
        of_q = tl.where(is_late, factor, 0.0)
        of_writer = tl.where(is_late, 0.0, factor)
        of_a = tl.where(is_late, tl.exp(tl.where(is_late, earlier, 0.0)), 0.0)
    return of_a, of_q, of_writer


@triton.jit
def _to_the_ends(gates, OPERAND: tl.constexpr, EXACT: tl.constexpr):
    """Log decays since the chunk began, as a and as q read, and until it ends [C, K]."""
    C: tl.constexpr = gates.shape[0]
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    since = _sums((j <= i).to(tl.int8), gates, OPERAND, EXACT)
    until = _sums((j > i).to(tl.int8), gates, OPERAND, EXACT)
    return since - gates.to(tl.float32), since, until


@triton.jit
def _scaled(x, factor, OPERAND: tl.constexpr):
    return rounded(x.to(tl.float32) * factor, OPERAND)


@triton.jit
def _pairs(i, j, W: tl.constexpr, IS_INNER: tl.constexpr):
    """Where a level's scores are, but for the order of i and j inside an inner block."""
    if IS_INNER:
        where = i // W == j // W
    else:
        where = (i // (2 * W) == j // (2 * W)) & (i // W != j // W)
    return where


@triton.jit
def _score_level(
    a,
    q,
    b,
    k,
    gates,
    ab,
    ak,
    qb,
    qk,
    W: tl.constexpr,
    IS_INNER: tl.constexpr,
    OPERAND: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds the scores of one size of blocks."""
    C: tl.constexpr = a.shape[0]
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    of_a, of_q, of_writer = _factors(gates, W, IS_INNER, OPERAND, EXACT)
    a, q = _scaled(a, of_a, OPERAND), _scaled(q, of_q, OPERAND)
    b, k = tl.trans(_scaled(b, of_writer, OPERAND)), tl.trans(_scaled(k, of_writer, OPERAND))
    where = _pairs(i, j, W, IS_INNER)
    of_a, of_q = where & (j < i), where & (j <= i)
    ab += tl.where(of_a, dot(a, b, PRECISION), 0.0)
    ak += tl.where(of_a, dot(a, k, PRECISION), 0.0)
    qb += tl.where(of_q, dot(q, b, PRECISION), 0.0)
    qk += tl.where(of_q, dot(q, k, PRECISION), 0.0)
    return ab, ak, qb, qk


@triton.jit
def _inverse(ab, LOG_C: tl.constexpr, PRECISION: tl.constexpr):
    """(I - ab)^-1, of diagonal blocks that double: the corner below them is theirs, ab, theirs."""
    C: tl.constexpr = ab.shape[0]
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    inverse = tl.where(i // 2 == j // 2, ab, 0.0) + tl.where(i == j, 1.0, 0.0)
    for n in tl.static_range(1, LOG_C):
        corner = tl.where((i >> (n + 1) == j >> (n + 1)) & (i >> n != j >> n), ab, 0.0)
        inverse = dot_add(dot(inverse, corner, PRECISION), inverse, inverse, PRECISION)
    return inverse


@triton.jit
def _prepare(
    q,
    k,
    v,
    log_decay,
    a,
    b,
    cu_seqlens,
    decays,
    transitions,
    updates,
    reads,
    o,
    scores,
    scale,
    T,
    N,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    LOG_C: tl.constexpr,
    LEVELS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    OPERAND: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    LOOSE: tl.constexpr,
):
    """What each chunk does to the state that enters it, for one head.

    decays: [slots, H, K]; transitions, without the decay: [slots, H, K, K]; updates:
    [slots, H, K, V]; reads: Q + qb W, scaled, [tokens, H, K].
    o: receives the outputs of a zero state; None to leave out.
    scores: receives M, ak, qb, qk [slots, H, 4, C, C] for `_gradients`; None to leave out.
    """
    slot = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    start, count = _chunk_bounds(slot, cu_seqlens, T, N, C)
    if count <= 0:
        return
    r, rk = tl.arange(0, C), tl.arange(0, BK)
    i, j = r[:, None], r[None, :]
    row = (start + r) * H + h
    inside, in_k = r < count, rk < K
    at_ck, mask_ck = row[:, None] * K + rk[None, :], inside[:, None] & in_k[None, :]
    at_kc, mask_kc = row[None, :] * K + rk[:, None], inside[None, :] & in_k[:, None]

    ba = tl.load(a + at_ck, mask=mask_ck, other=0.0).to(OPERAND)
    bq = tl.load(q + at_ck, mask=mask_ck, other=0.0).to(OPERAND)
    bb = tl.load(b + at_ck, mask=mask_ck, other=0.0).to(OPERAND)
    bk = tl.load(k + at_ck, mask=mask_ck, other=0.0).to(OPERAND)
    if DECAY == 0:
        b_ck, k_ck = tl.trans(bb), tl.trans(bk)
        ab = tl.where(j < i, dot(ba, b_ck, PRECISION), 0.0)
        ak = tl.where(j < i, dot(ba, k_ck, PRECISION), 0.0)
        qb = tl.where(j <= i, dot(bq, b_ck, PRECISION), 0.0)
        qk = tl.where(j <= i, dot(bq, k_ck, PRECISION), 0.0)
    else:
        token = start + r
        gates = _load_gates(log_decay, token[:, None], rk[None, :], mask_ck, h, H, K, DECAY)
        ab = tl.zeros([C, C], tl.float32)
        ak = tl.zeros([C, C], tl.float32)
        qb = tl.zeros([C, C], tl.float32)
        qk = tl.zeros([C, C], tl.float32)
        for n in tl.static_range(LEVELS):
            ab, ak, qb, qk = _score_level(
                ba, bq, bb, bk, gates, ab, ak, qb, qk,
                C >> (n + 1), False, OPERAND, EXACT, PRECISION,
            )  # fmt: skip
        ab, ak, qb, qk = _score_level(
            ba, bq, bb, bk, gates, ab, ak, qb, qk, BLOCK, True, OPERAND, EXACT, PRECISION
        )
        since = _sums((j <= i).to(tl.int8), gates, OPERAND, EXACT)
        bq = _scaled(bq, tl.exp(since), OPERAND)
        ba = _scaled(ba, tl.exp(since - gates.to(tl.float32)), OPERAND)

    inverse = rounded(_inverse(ab, LOG_C, LOOSE), OPERAND)
    ak, qb = rounded(ak, OPERAND), rounded(qb, OPERAND)
    if scores is not None:
        at = scores + ((slot * H + h) * 4 * C + i) * C + j
        tl.store(at, inverse)
        tl.store(at + C * C, ak)
        tl.store(at + 2 * C * C, qb)
        tl.store(at + 3 * C * C, rounded(qk, OPERAND))
    # What v becomes through M ak.
    through = rounded(dot(inverse, ak, PRECISION), OPERAND)

    # The writers once more, as the products with the state want them: [K, C].
    written_b = tl.load(b + at_kc, mask=mask_kc, other=0.0).to(OPERAND)
    written_k = tl.load(k + at_kc, mask=mask_kc, other=0.0).to(OPERAND)
    if DECAY != 0:
        gates = _load_gates(log_decay, token[None, :], rk[:, None], mask_kc, h, H, K, DECAY)
        until = tl.exp(_sums(gates, (i > j).to(tl.int8), OPERAND, EXACT))
        written_b = _scaled(written_b, until, OPERAND)
        written_k = _scaled(written_k, until, OPERAND)
        decay = tl.exp(tl.sum(gates.to(tl.float32), 1))
        tl.store(decays + (slot * H + h) * K + rk, decay, mask=in_k)

    to_state = rounded(dot_add(written_b, through, written_k.to(tl.float32), PRECISION), OPERAND)
    to_output = rounded(dot_add(qb, through, qk, PRECISION), OPERAND)
    for first in range(0, V, BV):
        rv = first + tl.arange(0, BV)
        in_v = rv < V
        at_cv, mask_cv = row[:, None] * V + rv[None, :], inside[:, None] & in_v[None, :]
        bv = tl.load(v + at_cv, mask=mask_cv, other=0.0).to(OPERAND)
        update = dot(to_state, bv, PRECISION)
        at_kv = (slot * H + h) * K * V + rk[:, None] * V + rv[None, :]
        mask_kv = in_k[:, None] & in_v[None, :]
        tl.store(updates + at_kv, rounded(update, updates.dtype.element_ty), mask=mask_kv)
        if o is not None:
            output = dot(to_output, bv, PRECISION) * scale
            tl.store(o + at_cv, rounded(output, o.dtype.element_ty), mask=mask_cv)

    w = rounded(dot(inverse, ba, PRECISION), OPERAND)
    transition = dot(written_b, w, PRECISION)
    at_kk = (slot * H + h) * K * K + rk[:, None] * K + rk[None, :]
    mask_kk = in_k[:, None] & in_k[None, :]
    tl.store(transitions + at_kk, rounded(transition, transitions.dtype.element_ty), mask=mask_kk)
    # Last on purpose: Triton lays out all products of a kernel as its last one, and this is as wide
    # as K.
    read = dot_add(qb, w, bq.to(tl.float32), PRECISION) * scale
    tl.store(reads + at_ck, rounded(read, reads.dtype.element_ty), mask=mask_ck)


@triton.jit
def _scan(
    cu_seqlens,
    decays,
    transitions,
    updates,
    reads,
    o,
    do,
    states,
    outer,
    last,
    T,
    n,
    h,
    first_v,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """One document, one head, a slice of V: from `outer` (None: zero) to `last` (None: nowhere).

    Forward, o gains what the states give; None: no outputs. REVERSE: the state is the gradient of
    the state, and in place of updates it gains reads^T do.
    states: receives what each chunk starts from [slots, H, K, V]; None: nowhere.
    """
    rk, rv, r = tl.arange(0, BK), first_v + tl.arange(0, BV), tl.arange(0, C)
    in_k, in_v = rk < K, rv < V
    at_kk, mask_kk = rk[:, None] * K + rk[None, :], in_k[:, None] & in_k[None, :]
    at_kv, mask_kv = rk[:, None] * V + rv[None, :], in_k[:, None] & in_v[None, :]
    start, length, first_slot = _document_bounds(n, cu_seqlens, T, C)
    num_chunks = ((length + C - 1) // C).to(tl.int32)
    state = tl.zeros([BK, BV], tl.float32)
    if outer is not None:
        state += tl.load(outer + (n * H + h) * K * V + at_kv, mask=mask_kv, other=0.0)
    for step in tl.range(0, num_chunks, num_stages=STAGES):
        chunk = num_chunks - 1 - step if REVERSE else step
        slot = (first_slot + chunk) * H + h
        inside = chunk * C + r < length
        row = (start + chunk * C + r) * H + h
        at_cv, mask_cv = row[:, None] * V + rv[None, :], inside[:, None] & in_v[None, :]
        entering = rounded(state, OPERAND)
        if states is not None:
            tl.store(states + slot * K * V + at_kv, entering, mask=mask_kv)
        transition = tl.load(transitions + slot * K * K + at_kk, mask=mask_kk, other=0.0)
        if REVERSE or o is not None:
            at_ck, mask_ck = row[:, None] * K + rk[None, :], inside[:, None] & in_k[None, :]
            read = tl.load(reads + at_ck, mask=mask_ck, other=0.0)
        if DECAY != 0:
            decay = tl.load(decays + slot * K + rk, mask=in_k, other=0.0)
            state *= decay[:, None]
        if REVERSE:
            back = tl.load(do + at_cv, mask=mask_cv, other=0.0).to(OPERAND)
            state = dot_add(tl.trans(transition), entering, state, PRECISION)
            state = dot_add(tl.trans(read), back, state, PRECISION)
        else:
            if o is not None:
                output = tl.load(o + at_cv, mask=mask_cv, other=0.0).to(tl.float32)
                output = dot_add(read, entering, output, PRECISION)
                tl.store(o + at_cv, rounded(output, o.dtype.element_ty), mask=mask_cv)
            update = tl.load(updates + slot * K * V + at_kv, mask=mask_kv, other=0.0)
            state = dot_add(transition, entering, state + update.to(tl.float32), PRECISION)
    if last is not None:
        tl.store(last + (n * H + h) * K * V + at_kv, state, mask=mask_kv)


@triton.jit
def _scan_outputs(
    cu_seqlens,
    decays,
    transitions,
    updates,
    reads,
    o,
    initial,
    final,
    T,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The forward pass after `_prepare`."""
    NUM_SLICES: tl.constexpr = (V + BV - 1) // BV
    n = (tl.program_id(0) // NUM_SLICES).to(tl.int64)
    first_v = (tl.program_id(0) % NUM_SLICES) * BV
    _scan(
        cu_seqlens, decays, transitions, updates, reads, o, None, None, initial, final,
        T, n, tl.program_id(1), first_v,
        H, K, V, C, BK, BV, DECAY, OPERAND, PRECISION, STAGES, False,
    )  # fmt: skip


@triton.jit
def _scan_states(
    cu_seqlens,
    decays,
    transitions,
    updates,
    reads,
    do,
    initial,
    dfinal,
    entering,
    dleaving,
    dinitial,
    T,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Both walks of the backward pass: entering states, and the gradients of the leaving ones."""
    NUM_SLICES: tl.constexpr = (V + BV - 1) // BV
    n = (tl.program_id(0) // NUM_SLICES).to(tl.int64)
    first_v = (tl.program_id(0) % NUM_SLICES) * BV
    if tl.program_id(2) == 0:
        _scan(
            cu_seqlens, decays, transitions, updates, reads, None, None, entering, initial, None,
            T, n, tl.program_id(1), first_v,
            H, K, V, C, BK, BV, DECAY, OPERAND, PRECISION, STAGES, False,
        )  # fmt: skip
    else:
        _scan(
            cu_seqlens, decays, transitions, updates, reads, None, do, dleaving, dfinal, dinitial,
            T, n, tl.program_id(1), first_v,
            H, K, V, C, BK, BV, DECAY, OPERAND, PRECISION, STAGES, True,
        )  # fmt: skip


@triton.jit
def _gradient_level(
    a,
    q,
    b,
    k,
    gates,
    by_read,
    by_written,
    da,
    dq,
    db,
    dk,
    dgates,
    W: tl.constexpr,
    IS_INNER: tl.constexpr,
    OPERAND: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    LOOSE: tl.constexpr,
):
    """Adds what goes through the scores of one size of blocks, between different positions.

    by_read: gradients of ab, ak, qb, qk [C, C]; by_written: their transposes.
    """
    C: tl.constexpr = a.shape[0]
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    of_a, of_q, of_writer = _factors(gates, W, IS_INNER, OPERAND, EXACT)
    scaled_a, scaled_q = _scaled(a, of_a, OPERAND), _scaled(q, of_q, OPERAND)
    scaled_b, scaled_k = _scaled(b, of_writer, OPERAND), _scaled(k, of_writer, OPERAND)
    where = _pairs(i, j, W, IS_INNER)
    dab, dak, dqb, dqk = by_read
    strict = where & (j < i)
    dab, dak = tl.where(strict, dab, 0.0), tl.where(strict, dak, 0.0)
    dqb, dqk = tl.where(strict, dqb, 0.0), tl.where(strict, dqk, 0.0)
    to_a = dot(rounded(dab, OPERAND), scaled_b, PRECISION)
    to_a = dot_add(rounded(dak, OPERAND), scaled_k, to_a, PRECISION) * of_a
    to_q = dot(rounded(dqb, OPERAND), scaled_b, PRECISION)
    to_q = dot_add(rounded(dqk, OPERAND), scaled_k, to_q, PRECISION) * of_q
    dba, dka, dbq, dkq = by_written
    strict = where & (i < j)
    dba, dka = tl.where(strict, dba, 0.0), tl.where(strict, dka, 0.0)
    dbq, dkq = tl.where(strict, dbq, 0.0), tl.where(strict, dkq, 0.0)
    to_b = dot(rounded(dba, OPERAND), scaled_a, PRECISION)
    to_b = dot_add(rounded(dbq, OPERAND), scaled_q, to_b, PRECISION) * of_writer
    to_k = dot(rounded(dka, OPERAND), scaled_a, PRECISION)
    to_k = dot_add(rounded(dkq, OPERAND), scaled_q, to_k, PRECISION) * of_writer
    from_a = a.to(tl.float32) * to_a
    of_readers = from_a + q.to(tl.float32) * to_q
    of_writers = b.to(tl.float32) * to_b + k.to(tl.float32) * to_k
    exponent = of_readers - of_writers if IS_INNER else of_readers + of_writers
    signs = _between(j, i, W, IS_INNER).to(tl.float32)
    dgates = dot_add(signs, exponent, dgates - from_a, LOOSE)
    return da + to_a, dq + to_q, db + to_b, dk + to_k, dgates


@triton.jit
def _gradients(
    q,
    k,
    v,
    log_decay,
    a,
    b,
    cu_seqlens,
    do,
    decays,
    scores,
    entering,
    dleaving,
    dq,
    dk,
    dv,
    dlog_decay,
    da,
    db,
    scale,
    T,
    N,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    OPERAND: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    LOOSE: tl.constexpr,
):
    """Every gradient of one chunk and head, from the states on either side.

    dlog_decay: [tokens, H, K], or [tokens, H] for a decay per token or head; None to leave out.
    """
    slot = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    start, count = _chunk_bounds(slot, cu_seqlens, T, N, C)
    if count <= 0:
        return
    r, rk = tl.arange(0, C), tl.arange(0, BK)
    i, j = r[:, None], r[None, :]
    row = (start + r) * H + h
    inside, in_k = r < count, rk < K
    at_ck, mask_ck = row[:, None] * K + rk[None, :], inside[:, None] & in_k[None, :]
    ba = tl.load(a + at_ck, mask=mask_ck, other=0.0).to(OPERAND)
    bq = tl.load(q + at_ck, mask=mask_ck, other=0.0).to(OPERAND)
    bb = tl.load(b + at_ck, mask=mask_ck, other=0.0).to(OPERAND)
    bk = tl.load(k + at_ck, mask=mask_ck, other=0.0).to(OPERAND)
    outer_a, outer_b, outer_k = ba, bb, bk
    if DECAY != 0:
        gates = _load_gates(log_decay, (start + r)[:, None], rk[None, :], mask_ck, h, H, K, DECAY)
        before, _, until = _to_the_ends(gates, OPERAND, EXACT)
        outer_a = _scaled(ba, tl.exp(before), OPERAND)
        outer_b = _scaled(bb, tl.exp(until), OPERAND)
        outer_k = _scaled(bk, tl.exp(until), OPERAND)

    at = scores + ((slot * H + h) * 4 * C + i) * C + j
    inverse, ak = tl.load(at), tl.load(at + C * C)
    qb, qk = tl.load(at + 2 * C * C), tl.load(at + 3 * C * C)
    dab = tl.zeros([C, C], tl.float32)
    dak = tl.zeros([C, C], tl.float32)
    dqb = tl.zeros([C, C], tl.float32)
    dqk = tl.zeros([C, C], tl.float32)
    # The transposes come from products of their own: an accumulator is never transposed.
    dba = tl.zeros([C, C], tl.float32)
    dka = tl.zeros([C, C], tl.float32)
    dbq = tl.zeros([C, C], tl.float32)
    dkq = tl.zeros([C, C], tl.float32)
    to_a = tl.zeros([C, BK], tl.float32)
    to_q = tl.zeros([C, BK], tl.float32)
    to_b = tl.zeros([C, BK], tl.float32)
    to_k = tl.zeros([C, BK], tl.float32)
    kept = tl.zeros([BK], tl.float32)
    for first in range(0, V, BV):
        rv = first + tl.arange(0, BV)
        in_v = rv < V
        at_cv, mask_cv = row[:, None] * V + rv[None, :], inside[:, None] & in_v[None, :]
        at_kv = (slot * H + h) * K * V + rk[:, None] * V + rv[None, :]
        mask_kv = in_k[:, None] & in_v[None, :]
        bv = tl.load(v + at_cv, mask=mask_cv, other=0.0).to(OPERAND)
        back = tl.load(do + at_cv, mask=mask_cv, other=0.0).to(tl.float32) * scale
        back = rounded(back, OPERAND)
        state = tl.load(entering + at_kv, mask=mask_kv, other=0.0)
        dstate = tl.load(dleaving + at_kv, mask=mask_kv, other=0.0)

        u = dot_add(ak, bv, dot(outer_a, state, PRECISION), PRECISION)
        u = rounded(dot(inverse, rounded(u, OPERAND), PRECISION), OPERAND)
        dr = dot_add(tl.trans(qb), back, dot(outer_b, dstate, PRECISION), PRECISION)
        dr = rounded(dot(tl.trans(inverse), rounded(dr, OPERAND), PRECISION), OPERAND)
        to_v = dot_add(tl.trans(qk), back, dot(outer_k, dstate, PRECISION), PRECISION)
        to_v = dot_add(tl.trans(ak), dr, to_v, PRECISION)
        tl.store(dv + at_cv, rounded(to_v, dv.dtype.element_ty), mask=mask_cv)

        dab = dot_add(dr, tl.trans(u), dab, PRECISION)
        dak = dot_add(dr, tl.trans(bv), dak, PRECISION)
        dqb = dot_add(back, tl.trans(u), dqb, PRECISION)
        dqk = dot_add(back, tl.trans(bv), dqk, PRECISION)
        dba = dot_add(u, tl.trans(dr), dba, PRECISION)
        dka = dot_add(bv, tl.trans(dr), dka, PRECISION)
        dbq = dot_add(u, tl.trans(back), dbq, PRECISION)
        dkq = dot_add(bv, tl.trans(back), dkq, PRECISION)
        to_a = dot_add(dr, tl.trans(state), to_a, PRECISION)
        to_q = dot_add(back, tl.trans(state), to_q, PRECISION)
        to_b = dot_add(u, tl.trans(dstate), to_b, PRECISION)
        to_k = dot_add(bv, tl.trans(dstate), to_k, PRECISION)
        kept += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1)

    if DECAY == 0:
        dab = rounded(tl.where(j < i, dab, 0.0), OPERAND)
        dak = rounded(tl.where(j < i, dak, 0.0), OPERAND)
        dqb = rounded(tl.where(j <= i, dqb, 0.0), OPERAND)
        dqk = rounded(tl.where(j <= i, dqk, 0.0), OPERAND)
        dba = rounded(tl.where(i < j, dba, 0.0), OPERAND)
        dka = rounded(tl.where(i < j, dka, 0.0), OPERAND)
        dbq = rounded(tl.where(i <= j, dbq, 0.0), OPERAND)
        dkq = rounded(tl.where(i <= j, dkq, 0.0), OPERAND)
        to_a = dot_add(dak, bk, dot_add(dab, bb, to_a, PRECISION), PRECISION)
        to_q = dot_add(dqk, bk, dot_add(dqb, bb, to_q, PRECISION), PRECISION)
        to_b = dot_add(dbq, bq, dot_add(dba, ba, to_b, PRECISION), PRECISION)
        to_k = dot_add(dkq, bq, dot_add(dka, ba, to_k, PRECISION), PRECISION)
    else:
        # Once more: held during the loop, gates and exponents would not fit into registers.
        gates = _load_gates(log_decay, (start + r)[:, None], rk[None, :], mask_ck, h, H, K, DECAY)
        before, since, until = _to_the_ends(gates, OPERAND, EXACT)
        to_a *= tl.exp(before)
        to_q *= tl.exp(since)
        to_b *= tl.exp(until)
        to_k *= tl.exp(until)
        from_a = ba.to(tl.float32) * to_a
        of_readers = from_a + bq.to(tl.float32) * to_q
        of_writers = bb.to(tl.float32) * to_b + bk.to(tl.float32) * to_k
        decay = tl.load(decays + (slot * H + h) * K + rk, mask=in_k, other=0.0)
        dgates = tl.zeros([C, BK], tl.float32) + (kept * decay)[None, :] - from_a
        dgates = dot_add((j >= i).to(tl.float32), of_readers, dgates, LOOSE)
        dgates = dot_add((j < i).to(tl.float32), of_writers, dgates, LOOSE)
        # What q reads of its own position has seen no decay, and must not leave a remainder there.
        own_b = tl.sum(tl.where(i == j, dqb, 0.0), 1)[:, None]
        own_k = tl.sum(tl.where(i == j, dqk, 0.0), 1)[:, None]
        to_q += own_b * bb.to(tl.float32) + own_k * bk.to(tl.float32)
        to_b += own_b * bq.to(tl.float32)
        to_k += own_k * bq.to(tl.float32)
        for n in tl.static_range(LEVELS):
            to_a, to_q, to_b, to_k, dgates = _gradient_level(
                ba, bq, bb, bk, gates, (dab, dak, dqb, dqk), (dba, dka, dbq, dkq),
                to_a, to_q, to_b, to_k, dgates,
                C >> (n + 1), False, OPERAND, EXACT, PRECISION, LOOSE,
            )  # fmt: skip
        to_a, to_q, to_b, to_k, dgates = _gradient_level(
            ba, bq, bb, bk, gates, (dab, dak, dqb, dqk), (dba, dka, dbq, dkq),
            to_a, to_q, to_b, to_k, dgates,
            BLOCK, True, OPERAND, EXACT, PRECISION, LOOSE,
        )  # fmt: skip
        if dlog_decay is not None:
            to_decay = dlog_decay.dtype.element_ty
            if DECAY == 3:
                tl.store(dlog_decay + at_ck, rounded(dgates, to_decay), mask=mask_ck)
            else:
                dgates = tl.sum(tl.where(in_k[None, :], dgates, 0.0), 1)
                tl.store(dlog_decay + row, rounded(dgates, to_decay), mask=inside)
    tl.store(da + at_ck, rounded(to_a, da.dtype.element_ty), mask=mask_ck)
    tl.store(dq + at_ck, rounded(to_q, dq.dtype.element_ty), mask=mask_ck)
    tl.store(db + at_ck, rounded(to_b, db.dtype.element_ty), mask=mask_ck)
    tl.store(dk + at_ck, rounded(to_k, dk.dtype.element_ty), mask=mask_ck)


@triton.jit
def _step(
    q,
    k,
    v,
    log_decay,
    a,
    b,
    o,
    before,
    after,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
):
    """One token of one row and head, a slice of V. before (None: zero) may be after."""
    NUM_SLICES: tl.constexpr = (V + BV - 1) // BV
    h = tl.program_id(1)
    row = (tl.program_id(0) // NUM_SLICES).to(tl.int64) * H + h
    rk, rv = tl.arange(0, BK), (tl.program_id(0) % NUM_SLICES) * BV + tl.arange(0, BV)
    in_k, in_v = rk < K, rv < V
    at = row * K * V + rk[:, None] * V + rv[None, :]
    mask = in_k[:, None] & in_v[None, :]
    bv = tl.load(v + row * V + rv, mask=in_v, other=0.0).to(tl.float32)
    bk = tl.load(k + row * K + rk, mask=in_k, other=0.0).to(tl.float32)
    state = bk[:, None] * bv[None, :]
    if before is not None:
        ba = tl.load(a + row * K + rk, mask=in_k, other=0.0).to(tl.float32)
        bb = tl.load(b + row * K + rk, mask=in_k, other=0.0).to(tl.float32)
        held = tl.load(before + at, mask=mask, other=0.0)
        state += bb[:, None] * tl.sum(ba[:, None] * held, 0)[None, :]
        if DECAY != 0:
            held *= load_decay(log_decay, row, h, rk, K, DECAY)[:, None]
        state += held
    bq = tl.load(q + row * K + rk, mask=in_k, other=0.0).to(tl.float32)
    output = tl.sum(bq[:, None] * state, 0) * scale
    tl.store(o + row * V + rv, rounded(output, o.dtype.element_ty), mask=in_v)
    tl.store(after + at, state, mask=mask)


class _Configs(NamedTuple):
    """The configurations of one call; `chunk` is the same in all, `slice` is of V.

    Attributes:
        prepare, scan, gradients: of `_prepare`, of both scans, of `_gradients`.
    """

    prepare: Config
    scan: Config
    gradients: Config


# By (target, bits of the operands, padded K). Chosen by compiling: at most two registers spill in
# bfloat16; float32 with K = 128 spills more, and its transitions do not fit into gfx942 at all.
# What has no entry here walks token by token.
# Chunks of 16 move more bytes of states than chunks of 32, whose tiles spill.
_CONFIGS = {}
for _target in ("sm_80", "sm_90", "sm_100", "gfx942"):
    for _block_k in (16, 32, 64, 128):
        _is_wide, _is_amd = _block_k == 128, _target == "gfx942"
        # Wavefronts of gfx942 are twice as wide.
        _warps = 8 if _is_wide and not _is_amd else 4
        _slice = 16 if _is_wide and _target == "sm_80" else 32
        _CONFIGS[_target, 16, _block_k] = _Configs(
            Config(16, 128, _warps, 1), Config(16, 32, _warps, 2), Config(16, _slice, _warps, 1)
        )
        if not (_is_wide and _is_amd):
            _CONFIGS[_target, 32, _block_k] = _Configs(
                Config(16, 32, _warps, 1),
                Config(16, 32, _warps, 2),
                Config(16, 16, 4 if _is_amd else 8, 1),
            )


def _configs_of(q):
    """The configurations of the chunk kernels; None where the walk by token takes their place."""
    bits, block_k = 16 if q.dtype == torch.bfloat16 else 32, padded(q.shape[-1])
    shipped = _CONFIGS.get((target_of(q.device), bits, block_k))
    return shipped and overridden.get("delta_recurrence", shipped)


class _Call:
    """What the launches of one call of the chunk kernels share."""

    def __init__(self, q, v, log_decay, cu_seqlens, scale):
        batch, time, self.heads, self.key_dim = q.shape
        self.value_dim = v.shape[-1]
        self.device, self.dtype, self.log_decay, self.scale = q.device, q.dtype, log_decay, scale
        self.cu_seqlens, self.time = cu_seqlens, time
        target = target_of(q.device)
        is_bfloat16 = q.dtype == torch.bfloat16
        self.operand = torch.bfloat16 if is_bfloat16 else torch.float32
        self.block_k = padded(self.key_dim)
        self.configs = _configs_of(q)
        self.chunk = self.configs.prepare.chunk
        if cu_seqlens is None:
            self.num_documents = batch
            self.num_slots = batch * -(-time // self.chunk)
        else:
            self.num_documents = len(cu_seqlens) - 1
            self.num_slots = time // self.chunk + self.num_documents
        precision = dot_precision(q.dtype, target)
        self.precisions = {
            "EXACT": dot_precision(torch.float32, target),
            "PRECISION": precision,
            # The operands' own rounding is coarser than tf32.
            "LOOSE": precision if not is_bfloat16 else dot_precision(torch.float16, target),
        }

    def empty(self, *shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _shared(self):
        return {
            "cu_seqlens": self.cu_seqlens,
            "T": self.time,
            "H": self.heads,
            "K": self.key_dim,
            "V": self.value_dim,
            "C": self.chunk,
            "BK": self.block_k,
            "DECAY": 0 if self.log_decay is None else {1: 1, 3: 2, 4: 3}[self.log_decay.ndim],
            "OPERAND": getattr(tl, str(self.operand).removeprefix("torch.")),
        }

    def _of_chunks(self):
        return {
            "log_decay": self.log_decay,
            "scale": self.scale,
            "N": self.num_documents,
            "LEVELS": (self.chunk // BLOCK.value).bit_length() - 1,
            **self.precisions,
        }

    def prepare(self, q, k, v, a, b, *, o=None, scores=None):
        """Launches `_prepare`; returns decays, transitions, updates and reads."""
        config = self.configs.prepare
        slots = self.num_slots, self.heads
        prepared = {
            "decays": None if self.log_decay is None else self.empty(*slots, self.key_dim),
            "transitions": self.empty(*slots, self.key_dim, self.key_dim, dtype=self.operand),
            "updates": self.empty(*slots, self.key_dim, self.value_dim, dtype=self.operand),
            "reads": self.empty(*q.shape, dtype=self.operand),
        }
        launch(
            _prepare,
            slots,
            config.num_warps,
            config.num_stages,
            q=q,
            k=k,
            v=v,
            a=a,
            b=b,
            o=o,
            scores=scores,
            LOG_C=self.chunk.bit_length() - 1,
            BV=min(config.slice, padded(self.value_dim)),
            **prepared,
            **self._of_chunks(),
            **self._shared(),
        )
        return prepared

    def scan(self, kernel, num_walks, **arguments):
        """Launches a scan, in slices narrow enough to give every processor a program."""
        config = self.configs.scan
        slice, walks = min(config.slice, padded(self.value_dim)), self.num_documents * self.heads
        while slice > 16 and walks * num_walks * -(-self.value_dim // slice) < num_processors(
            self.device
        ):
            slice //= 2
        grid = self.num_documents * -(-self.value_dim // slice), self.heads, num_walks
        launch(
            kernel,
            grid,
            config.num_warps,
            config.num_stages,
            BV=slice,
            STAGES=config.num_stages,
            PRECISION=self.precisions["PRECISION"],
            **arguments,
            **self._shared(),
        )

    def gradients(self, **arguments):
        """Launches `_gradients`."""
        config = self.configs.gradients
        launch(
            _gradients,
            (self.num_slots, self.heads),
            config.num_warps,
            config.num_stages,
            BV=min(config.slice, padded(self.value_dim)),
            **arguments,
            **self._of_chunks(),
            **self._shared(),
        )


def forward(q, k, v, log_decay, a, b, initial_state, cu_seqlens, scale, output_final_state):
    """Raw forward pass on contiguous tensors of one dtype; no autograd.

    Returns:
        (o, final state or None).
    """
    if _configs_of(q) is None:
        return walk_forward(
            q, k, v, log_decay, a, b, initial_state, cu_seqlens, scale, output_final_state
        )
    call = _Call(q, v, log_decay, cu_seqlens, scale)
    o, final = torch.empty_like(v), None
    if output_final_state:
        final = call.empty(call.num_documents, call.heads, call.key_dim, call.value_dim)
    prepared = call.prepare(q, k, v, a, b, o=o)
    call.scan(
        _scan_outputs,
        1,
        o=o,
        initial=initial_state,
        final=final,
        **prepared,
    )
    return o, final


def backward(
    q,
    k,
    v,
    log_decay,
    a,
    b,
    initial_state,
    cu_seqlens,
    do,
    dfinal,
    scale,
    decay_gradient,
    initial_gradient,
):
    """Raw backward pass: (dq, dk, dv, dlog_decay, da, db, dinitial), empty where not asked for."""
    if _configs_of(q) is None:
        return walk_backward(
            q,
            k,
            v,
            log_decay,
            a,
            b,
            initial_state,
            cu_seqlens,
            do,
            dfinal,
            scale,
            decay_gradient,
            initial_gradient,
        )
    call = _Call(q, v, log_decay, cu_seqlens, scale)
    slots, chunk = (call.num_slots, call.heads), call.chunk
    scores = call.empty(*slots, 4, chunk, chunk, dtype=call.operand)
    prepared = call.prepare(q, k, v, a, b, scores=scores)
    shape = call.key_dim, call.value_dim
    dinitial, dlog_decay = nothing(q), nothing(q)
    if initial_gradient:
        dinitial = call.empty(call.num_documents, call.heads, *shape)
    if decay_gradient:
        # A decay per head gathers what its tokens say.
        is_per_head = log_decay.ndim == 1
        like = call.empty(*q.shape[:3]) if is_per_head else torch.empty_like(log_decay)
        dlog_decay = like
    entering, dleaving = (call.empty(*slots, *shape, dtype=call.operand) for _ in range(2))
    call.scan(
        _scan_states,
        2,
        do=do,
        initial=initial_state,
        dfinal=dfinal,
        entering=entering,
        dleaving=dleaving,
        dinitial=dinitial if initial_gradient else None,
        **prepared,
    )
    dq, dk, dv, da, db = map(torch.empty_like, (q, k, v, a, b))
    call.gradients(
        q=q,
        k=k,
        v=v,
        a=a,
        b=b,
        do=do,
        decays=prepared["decays"],
        scores=scores,
        entering=entering,
        dleaving=dleaving,
        dq=dq,
        dk=dk,
        dv=dv,
        dlog_decay=dlog_decay if decay_gradient else None,
        da=da,
        db=db,
    )
    if decay_gradient and log_decay.ndim == 1:
        dlog_decay = dlog_decay.sum((0, 1)).to(log_decay.dtype)
    return dq, dk, dv, dlog_decay, da, db, dinitial


_NAMESPACE = operator_namespace(__name__)
# What both operators begin with, as PyTorch writes it.
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor a, Tensor b, Tensor? initial_state, "
    "Tensor? cu_seqlens"
)


@torch.library.custom_op(
    f"{_NAMESPACE}::forward",
    mutates_args=(),
    schema=f"({_INPUTS}, float scale, bool output_final_state) -> (Tensor, Tensor)",
)
def _forward_operator(q, *others):
    return without_none(q, forward(q, *others))


@_forward_operator.register_fake
def _(q, k, v, log_decay, a, b, initial_state, cu_seqlens, scale, output_final_state):
    batch, _, heads, key_dim = q.shape
    num_documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
    state = (num_documents, heads, key_dim, v.shape[-1]) if output_final_state else 0
    return torch.empty_like(v), q.new_empty(state, dtype=torch.float32)


_backward_operator = torch.library.custom_op(
    f"{_NAMESPACE}::backward",
    backward,
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor do, Tensor? dfinal, float scale, bool decay_gradient, "
    "bool initial_gradient) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_backward_operator.register_fake
def _(q, k, v, log_decay, a, b, initial_state, cu_seqlens, *others):
    *_, decay_gradient, initial_gradient = others
    batch, _, heads, key_dim = q.shape
    num_documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
    state = (num_documents, heads, key_dim, v.shape[-1]) if initial_gradient else 0
    return (
        *map(torch.empty_like, (q, k, v)),
        torch.empty_like(log_decay) if decay_gradient else nothing(q),
        *map(torch.empty_like, (a, b)),
        q.new_empty(state, dtype=torch.float32),
    )


def _setup_context(ctx, inputs, output):
    *tensors, scale, _ = inputs
    ctx.scale = scale
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward(ctx, do, dfinal):
    *tensors, cu_seqlens = ctx.saved_tensors
    do = torch.zeros_like(tensors[2]) if do is None else do.contiguous()
    decay_gradient, initial_gradient = ctx.needs_input_grad[3], ctx.needs_input_grad[6]
    dq, dk, dv, dlog_decay, da, db, dinitial = _backward_operator(
        *tensors,
        cu_seqlens,
        do,
        None if dfinal is None else dfinal.contiguous(),
        ctx.scale,
        decay_gradient,
        initial_gradient,
    )
    return (
        dq,
        dk,
        dv,
        dlog_decay if decay_gradient else None,
        da,
        db,
        dinitial if initial_gradient else None,
        None,
        None,
        None,
    )


_forward_operator.register_autograd(_backward, setup_context=_setup_context)


def delta_recurrence_triton(
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
    """The recurrence on a GPU; arguments and results as `delta_recurrence`, checked by it.

    Tensors of different dtypes are computed in the widest, in float32 or narrower.

    Raises:
        ValueError: K above 512, or V where no chunk kernel fits.
    """
    tensors = q, k, v, log_decay, a, b, initial_state, cu_seqlens
    numbers = float(scale), output_final_state
    if not is_traced(q):
        return Ready(PASSES, numbers, is_kept=False)(*tensors)
    o, final = _forward_operator(*_prepared(*tensors), *numbers)
    return o.to(v.dtype), final if output_final_state else None


def _prepared(q, k, v, log_decay, a, b, initial_state, cu_seqlens):
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in (q, k, v, a, b)))
    dtype = torch.float32 if dtype == torch.float64 else dtype
    q, k, v, a, b = (x.to(dtype).contiguous() for x in (q, k, v, a, b))
    if log_decay is not None:
        log_decay = narrow(log_decay)
    if initial_state is not None:
        initial_state = initial_state.float().contiguous()
    return q, k, v, log_decay, a, b, initial_state, cu_seqlens


PASSES = Passes(
    prepare=_prepared,
    forward=forward,
    backward=backward,
    outputs=2,
    values=2,
    saved=slice(0, 0),
    ask=lambda numbers, wanted: (numbers[0], wanted[3], wanted[6]),
)


def delta_recurrence_step(q, k, v, log_decay, a, b, *, scale=1.0, state=None, in_place=False):
    """One token for each row in a single launch, for decoding; no gradients.

    Args:
        q, k, a, b: [B, 1, H, K]; v: [B, 1, H, V].
        log_decay: None, [H], [B, 1, H] or [B, 1, H, K].
        scale: as in `delta_recurrence`.
        state: [B, H, K, V] float32, contiguous; None is zero.
        in_place: whether the new state replaces `state`, which a captured CUDA graph needs.

    Returns:
        (o [B, 1, H, V], the state after the token).

    Raises:
        ValueError: `in_place` without a contiguous float32 state to replace; K above 512.
    """
    if q.shape[-1] > MAX_KERNEL_DIM:
        raise ValueError(
            f"delta_recurrence_step: the kernel takes K up to {MAX_KERNEL_DIM}, got "
            f'{q.shape[-1]}; use delta_recurrence with backend="torch".'
        )
    q, k, v, a, b = (x.contiguous() for x in (q, k, v, a, b))
    log_decay = None if log_decay is None else narrow(log_decay)
    if not in_place:
        state = None if state is None else state.float().contiguous()
        run = _step_operator if is_traced(q) else _run_fresh_step
        return run(q, k, v, log_decay, a, b, state, float(scale))
    check_replaceable("delta_recurrence_step", state)
    return _run_step(q, k, v, log_decay, a, b, state, float(scale), state), state


def _run_step(q, k, v, log_decay, a, b, before, scale, after):
    batch, _, heads, key_dim = q.shape
    value_dim = v.shape[-1]
    o = torch.empty_like(v)
    block_k = padded(key_dim)
    # A tile of the state that fits into the registers of four warps.
    slice = min(padded(value_dim), max(16, 4096 // block_k))
    launch(
        _step,
        (batch * -(-value_dim // slice), heads),
        4,
        1,
        q=q,
        k=k,
        v=v,
        log_decay=log_decay,
        a=a,
        b=b,
        o=o,
        before=before,
        after=after,
        scale=scale,
        H=heads,
        K=key_dim,
        V=value_dim,
        BK=block_k,
        BV=slice,
        DECAY=0 if log_decay is None else {1: 1, 3: 2, 4: 3}[log_decay.ndim],
    )
    return o


def _run_fresh_step(q, k, v, log_decay, a, b, before, scale):
    after = q.new_empty((q.shape[0], q.shape[2], q.shape[3], v.shape[3]), dtype=torch.float32)
    return _run_step(q, k, v, log_decay, a, b, before, scale, after), after


@torch.library.custom_op(f"{_NAMESPACE}::step", mutates_args=())
def _step_operator(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    state: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _run_fresh_step(q, k, v, log_decay, a, b, state, scale)


@_step_operator.register_fake
def _(q, k, v, log_decay, a, b, state, scale):
    after = q.new_empty((q.shape[0], q.shape[2], q.shape[3], v.shape[3]), dtype=torch.float32)
    return torch.empty_like(v), after
