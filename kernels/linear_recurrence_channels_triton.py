"""Triton kernels of the linear recurrence with a decay per channel: GLA, RWKV-5 and RWKV-6.

Decay stands inside the scalar products here, sum_a q_ia exp(c_ia - c_ja) k_ja, with c the
cumulative log decay. The work is split so that only kernels without a state see it:

`_within` takes one chunk of C positions. It brings every query to the chunk's start and every key
to its end, q exp(c_i) and k exp(c_C - c_j), and computes the scores inside the chunk. `_scan` then
walks a segment with nothing but products: each chunk's decay as a whole is left, on the state.

    out_i = sum_{j <= i in the chunk} P_ij z_j + x_i S,    S <- exp(c_C) S + sum_j y_j z_j^T

(x, y, z) = (q', k', v) gives o; in reverse, (k', q', do) gives dv; without P, (do, v, k') and in
reverse (v, do, q') give what other chunks add to dq and dk. `_within_gradients` adds what the own
chunk does, and takes the gradient of the log decay, for which the two leave, for each chunk, what
its decay as a whole is to the state before it and the gradient after it.

The triangle of a chunk is covered by pairs of neighbouring blocks of W = 1, 2, 4 ... C / 2
positions, that meet at a boundary b: exp(c_i - c_j) = exp(c_i - c_b) exp(c_b - c_j), so that a pair
is one product whose factors are at most 1. Log decays are summed from b to each position by a
product with a matrix of zeros and ones: these sums are short and of one sign, so nothing is clamped
and no digits are lost, however strong the decay.

With `bonus` the state is read before the token: c_i is then the sum before i, and the diagonal of P
is q_i . bonus k_i.
"""

import torch

try:  # transformers asks for every library that code from the Hub imports, but in a try
    import triton
    import triton.language as tl
except ImportError:
    raise

from .launch_triton import (
    Config,
    constant,
    dot,
    dot_add,
    dot_precision,
    launch,
    log2_of_decay,
    padded,
    rounded,
    target_of,
)
from .operator_triton import make_operator
from .segments_triton import count_segments, overridden, plan, segment_bounds

# A decay of 0 in float32; -inf would be no number times a zero of the matrices below.
LOWEST = tl.constexpr(-200.0)


@triton.jit
def _chunk_of(slot, table, stride, num_segments, steps, T, LENGTH, PER_ROW, C: tl.constexpr):
    """First token and end of the chunk in a slot; an empty slot ends where it starts, or before.

    Chunk n of segment s, which starts at token t, has slot t // C + s + n: each its own, by
    arithmetic alone. The segment is found by bisection, in `steps` steps.
    """
    low = tl.full([], 0, tl.int64)
    high = low + num_segments
    for _ in range(steps):
        middle = (low + high) // 2
        start, end = segment_bounds(table, stride, middle, T, LENGTH, PER_ROW)
        is_later = start // C + middle > slot
        high = tl.where(is_later, middle, high)
        low = tl.where(is_later, low, middle)
    start, end = segment_bounds(table, stride, low, T, LENGTH, PER_ROW)
    t = start + (slot - start // C - low) * C
    return t, tl.minimum(t + C, end)


@triton.jit
def _split(x, COMPUTE: tl.constexpr):
    """x as a sum of numbers of the dtype that products take: two of bfloat16, or one."""
    high = rounded(x, COMPUTE)
    low = high
    if COMPUTE == tl.bfloat16:
        low = rounded(x - high.to(tl.float32), COMPUTE)
    return high, low


@triton.jit
def _reach(reaches, n, C: tl.constexpr):
    """Matrix n of `_reaches`: row i picks the positions that decay between i and a boundary."""
    r = tl.arange(0, C)
    return tl.load(reaches + (n * C + r[:, None]) * C + r[None, :])


@triton.jit
def _factors(reach, high, low, PRECISION: tl.constexpr):
    """Decay [C, K] from each row to its boundary, from log decays that were split."""
    sums = dot(reach, high, PRECISION)
    if high.dtype == tl.bfloat16:
        sums = dot_add(reach, low, sums, PRECISION)
    return tl.exp2(sums)


@triton.jit
def _is_in_pair(level, C: tl.constexpr):
    """Whether the blocks of a row and a column make a pair [C, C]."""
    block = tl.arange(0, C) >> level
    return (block ^ 1)[:, None] == block[None, :]


@triton.jit
def _within(
    q,
    k,
    decay,
    bonus,
    q_start,
    k_end,
    scores,
    whole,
    reaches,
    table,
    stride,
    num_segments,
    steps,
    scale,
    T,
    LENGTH,
    PER_ROW,
    H: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    STRICT: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    GATE_PRECISION: tl.constexpr,
):
    """Scores of one chunk and head, queries at its start and keys at its end.

    q, k, q_start, k_end: [tokens, H, K]. decay: [tokens, H, K] natural logs. bonus: [H, K] or None.
    scores: [tokens, H, C], row i over the positions of its chunk.
    whole: [slots, H, K] float32, the decay of the whole chunk.
    reaches: as `_reaches` returns. C is 2 ** LEVELS.
    """
    slot = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    t, end = _chunk_of(slot, table, stride, num_segments, steps, T, LENGTH, PER_ROW, C)
    if t >= end:
        return
    r = tl.arange(0, C)
    token = t + r
    inside = token < end
    pairs = tl.zeros([C, C], tl.float32)
    own = tl.zeros([C], tl.float32)
    for b in range((K + BK - 1) // BK):
        rk = b * BK + tl.arange(0, BK)
        in_k = rk < K
        at = (token * H + h)[:, None] * K + rk[None, :]
        if K % BK == 0:
            mask = inside[:, None]
        else:
            mask = inside[:, None] & in_k[None, :]
        bq = tl.load(q + at, mask=mask, other=0.0)
        bk = tl.load(k + at, mask=mask, other=0.0)
        log = log2_of_decay(tl.load(decay + at, mask=mask, other=0.0), LOWEST)
        high, low = _split(log, COMPUTE)
        total = tl.exp2(tl.sum(log, 0))
        tl.store(whole + (slot * H + h) * K + rk, total, mask=in_k)
        from_start = _factors(_reach(reaches, LEVELS, C), high, low, GATE_PRECISION)
        result = bq.to(tl.float32) * scale * from_start
        tl.store(q_start + at, rounded(result, COMPUTE), mask=mask)
        to_end = _factors(_reach(reaches, LEVELS + 1, C), high, low, GATE_PRECISION)
        tl.store(k_end + at, rounded(bk.to(tl.float32) * to_end, COMPUTE), mask=mask)
        for level in range(LEVELS):
            is_later = ((r >> level) & 1)[:, None] == 1
            factor = _factors(_reach(reaches, level, C), high, low, GATE_PRECISION)
            mixed = rounded(tl.where(is_later, bq, bk).to(tl.float32) * factor, COMPUTE)
            is_pair = is_later & _is_in_pair(level, C)
            pairs += tl.where(is_pair, dot(mixed, tl.trans(mixed), PRECISION), 0.0)
        weighted = bq.to(tl.float32)
        if STRICT:
            u = tl.load(bonus + h * K + rk, mask=in_k, other=0.0).to(tl.float32)
            weighted *= u[None, :]
        own += tl.sum(weighted * bk.to(tl.float32), 1)
    pairs = tl.where(r[:, None] == r[None, :], own[:, None], pairs) * scale
    at_scores = (token * H + h)[:, None] * C + r[None, :]
    tl.store(scores + at_scores, rounded(pairs, COMPUTE), mask=inside[:, None])


@triton.jit
def _scan(
    x,
    y,
    z,
    out,
    scores,
    whole,
    entering,
    leaving,
    states,
    passed,
    table,
    stride,
    T,
    LENGTH,
    PER_ROW,
    H: tl.constexpr,
    A: tl.constexpr,
    Z: tl.constexpr,
    BLOCK_A: tl.constexpr,
    C: tl.constexpr,
    BZ: tl.constexpr,
    REVERSE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out of the module docstring for one segment, head and slice of Z.

    x, y: [tokens, H, A]; z, out: [tokens, H, Z]; scores: [tokens, H, C] or None.
    whole: [slots, H, K]; K is A, or Z where TRANSPOSED.
    entering, leaving: states [segments, H, A, Z] float32 or None; TRANSPOSED: [segments, H, Z, A].
    states: [slots, H, A, Z] or None, the state before each chunk: forward, written.
    passed: in reverse, [slots, H, Z] float32 or None, what the chunk's decay as a whole is to those
        states and the gradient after it.
    """
    NUM_SLICES: tl.constexpr = (Z + BZ - 1) // BZ
    i = tl.program_id(0)
    h = tl.program_id(1)
    s = (i // NUM_SLICES).to(tl.int64)
    start, end = segment_bounds(table, stride, s, T, LENGTH, PER_ROW)
    r = tl.arange(0, C)
    ra = tl.arange(0, BLOCK_A)
    rz = (i % NUM_SLICES) * BZ + tl.arange(0, BZ)
    in_a = ra < A
    in_z = rz < Z
    if TRANSPOSED:
        at_state = (s * H + h) * A * Z + rz[None, :] * A + ra[:, None]
    else:
        at_state = (s * H + h) * A * Z + ra[:, None] * Z + rz[None, :]
    in_state = in_a[:, None] & in_z[None, :]
    if entering is None:
        state = tl.zeros([BLOCK_A, BZ], tl.float32)
    else:
        state = tl.load(entering + at_state, mask=in_state, other=0.0).to(tl.float32)

    num_chunks = tl.cdiv(end - start, C)
    for n in range(num_chunks):
        if REVERSE:
            chunk = num_chunks - 1 - n
        else:
            chunk = n
        token = start + chunk * C + r
        inside = token < end
        slot = start // C + s + chunk
        at_a = (token * H + h)[:, None] * A + ra[None, :]
        at_z = (token * H + h)[:, None] * Z + rz[None, :]
        if A == BLOCK_A:
            mask_a = inside[:, None]
        else:
            mask_a = inside[:, None] & in_a[None, :]
        if Z % BZ == 0:
            mask_z = inside[:, None]
        else:
            mask_z = inside[:, None] & in_z[None, :]
        bx = tl.load(x + at_a, mask=mask_a, other=0.0).to(COMPUTE)
        by = tl.load(y + at_a, mask=mask_a, other=0.0).to(COMPUTE)
        bz = tl.load(z + at_z, mask=mask_z, other=0.0).to(COMPUTE)
        if states is not None:
            at_chunk = ((slot * H + h) * A + ra[:, None]) * Z + rz[None, :]
            if REVERSE:
                # Needed last: it arrives while the products run.
                before = tl.load(states + at_chunk, mask=in_state, other=0.0)
        result = dot(bx, rounded(state, COMPUTE), PRECISION)
        if scores is not None:
            at_scores = (token * H + h)[:, None] * C + r[None, :]
            pairs = tl.load(scores + at_scores, mask=inside[:, None], other=0.0)
            if REVERSE:
                pairs = tl.trans(pairs)
            result = dot_add(pairs, bz, result, PRECISION)
        tl.store(out + at_z, rounded(result, out.dtype.element_ty), mask=mask_z)
        if states is not None:
            if REVERSE:
                product = tl.sum(before.to(tl.float32) * state, 0)
            else:
                tl.store(states + at_chunk, rounded(state, states.dtype.element_ty), mask=in_state)
        if TRANSPOSED:
            kept = tl.load(whole + (slot * H + h) * Z + rz, mask=in_z, other=0.0)
            state *= kept[None, :]
            if passed is not None:
                tl.store(passed + (slot * H + h) * Z + rz, product * kept, mask=in_z)
        else:
            state *= tl.load(whole + (slot * H + h) * A + ra, mask=in_a, other=0.0)[:, None]
        state = dot_add(tl.trans(by), bz, state, PRECISION)
    if leaving is not None:
        tl.store(leaving + at_state, state, mask=in_state)


@triton.jit
def _segment_states(
    y,
    z,
    whole,
    states,
    decays,
    table,
    stride,
    T,
    LENGTH,
    PER_ROW,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    REVERSE: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What a segment adds to the state (in reverse: its gradient) that passes through it.

    y: [tokens, H, K]; z: [tokens, H, V]; whole: [slots, H, K].
    states: [segments, H, K, V] float32. decays: [segments, H, K], of the whole segment.
    """
    NUM_V: tl.constexpr = (V + BV - 1) // BV
    NUM_TILES: tl.constexpr = (K + BK - 1) // BK * NUM_V
    i = tl.program_id(0)
    h = tl.program_id(1)
    tile = i % NUM_TILES
    s = (i // NUM_TILES).to(tl.int64)
    start, end = segment_bounds(table, stride, s, T, LENGTH, PER_ROW)
    r = tl.arange(0, C)
    rk = (tile // NUM_V) * BK + tl.arange(0, BK)
    rv = (tile % NUM_V) * BV + tl.arange(0, BV)
    in_k = rk < K
    in_v = rv < V
    state = tl.zeros([BK, BV], tl.float32)
    passed = tl.full([BK], 1.0, tl.float32)
    num_chunks = tl.cdiv(end - start, C)
    for n in range(num_chunks):
        if REVERSE:
            chunk = num_chunks - 1 - n
        else:
            chunk = n
        token = start + chunk * C + r
        inside = token < end
        at_k = (token * H + h)[:, None] * K + rk[None, :]
        at_v = (token * H + h)[:, None] * V + rv[None, :]
        by = tl.load(y + at_k, mask=inside[:, None] & in_k[None, :], other=0.0).to(COMPUTE)
        bz = tl.load(z + at_v, mask=inside[:, None] & in_v[None, :], other=0.0).to(COMPUTE)
        slot = start // C + s + chunk
        kept = tl.load(whole + (slot * H + h) * K + rk, mask=in_k, other=0.0)
        passed *= kept
        state = dot_add(tl.trans(by), bz, state * kept[:, None], PRECISION)
    at_state = (s * H + h) * K * V + rk[:, None] * V + rv[None, :]
    tl.store(states + at_state, state, mask=in_k[:, None] & in_v[None, :])
    if tile % NUM_V == 0:
        tl.store(decays + (s * H + h) * K + rk, passed, mask=in_k)


@triton.jit
def _combine(
    states,
    decays,
    first,
    last,
    offsets,
    PER_ROW,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """In place: what each segment adds becomes the state that enters it.

    states: [segments, H, K, V]. decays: [segments, H, K].
    first, last: [documents, H, K, V], the state before a document (None: zero), and after it
        (None: not wanted). In reverse, before is after in time.
    """
    BLOCKS: tl.constexpr = (K * V + BLOCK - 1) // BLOCK
    i = tl.program_id(0)
    h = tl.program_id(1)
    n = (i // BLOCKS).to(tl.int64)
    r = (i % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    mask = r < K * V
    if offsets is None:
        begin = n * PER_ROW
        count = begin - begin + PER_ROW
    else:
        begin = tl.load(offsets + n).to(tl.int64)
        count = tl.load(offsets + n + 1).to(tl.int64) - begin
    if first is None:
        state = tl.zeros([BLOCK], tl.float32)
    else:
        state = tl.load(first + (n * H + h) * K * V + r, mask=mask, other=0.0).to(tl.float32)
    for j in range(count):
        if REVERSE:
            s = begin + count - 1 - j
        else:
            s = begin + j
        at = states + (s * H + h) * K * V + r
        added = tl.load(at, mask=mask, other=0.0)
        tl.store(at, state, mask=mask)
        state = state * tl.load(decays + (s * H + h) * K + r // V, mask=mask, other=0.0) + added
    if last is not None:
        tl.store(last + (n * H + h) * K * V + r, state, mask=mask)


@triton.jit
def _within_gradients(
    q,
    k,
    v,
    do,
    decay,
    bonus,
    dq_other,
    dk_other,
    passed,
    dq,
    dk,
    ddecay,
    dbonus,
    reaches,
    table,
    stride,
    num_segments,
    steps,
    scale,
    T,
    LENGTH,
    PER_ROW,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    STRICT: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    GATE_PRECISION: tl.constexpr,
):
    """Gradients of one chunk and head for a block of K.

    q, k, decay, dq, dk: [tokens, H, K]; v, do: [tokens, H, V].
    dq_other, dk_other: [tokens, H, K] float32, what other chunks add, at the chunk's start and end.
    ddecay: [tokens, H, K] or None; passed: as in `_scan`.
    dbonus: [slots, H, K] float32, this chunk's part; None without bonus.
    """
    NUM_K: tl.constexpr = (K + BK - 1) // BK
    i = tl.program_id(0)
    h = tl.program_id(1)
    slot = (i // NUM_K).to(tl.int64)
    t, end = _chunk_of(slot, table, stride, num_segments, steps, T, LENGTH, PER_ROW, C)
    rk = (i % NUM_K) * BK + tl.arange(0, BK)
    in_k = rk < K
    at_slot = (slot * H + h) * K + rk
    if t >= end:
        if STRICT:
            # A sum over all slots follows.
            tl.store(dbonus + at_slot, tl.zeros([BK], tl.float32), mask=in_k)
        return
    r = tl.arange(0, C)
    token = t + r
    inside = token < end

    # do_i . v_j below the diagonal, v_i . do_j above it: what a query asks of its keys, and what a
    # key asks of its queries.
    asked = tl.zeros([C, C], tl.float32)
    mirrored = tl.zeros([C, C], tl.float32)
    for b in range((V + BV - 1) // BV):
        rv = b * BV + tl.arange(0, BV)
        at_v = (token * H + h)[:, None] * V + rv[None, :]
        mask_v = inside[:, None] & (rv < V)[None, :]
        bdo = tl.load(do + at_v, mask=mask_v, other=0.0).to(COMPUTE)
        bv = tl.load(v + at_v, mask=mask_v, other=0.0).to(COMPUTE)
        asked = dot_add(bdo, tl.trans(bv), asked, PRECISION)
        mirrored = dot_add(bv, tl.trans(bdo), mirrored, PRECISION)
    own = tl.sum(tl.where(r[:, None] == r[None, :], asked, 0.0), 1)[:, None]
    asked = rounded(tl.where(r[:, None] < r[None, :], mirrored, asked), COMPUTE)

    at = (token * H + h)[:, None] * K + rk[None, :]
    if K % BK == 0:
        mask = inside[:, None]
    else:
        mask = inside[:, None] & in_k[None, :]
    bq = tl.load(q + at, mask=mask, other=0.0)
    bk = tl.load(k + at, mask=mask, other=0.0)
    log = log2_of_decay(tl.load(decay + at, mask=mask, other=0.0), LOWEST)
    high, low = _split(log, COMPUTE)
    # From here on queries and their gradients are those of scale * q. A log decay gets the gradient
    # of each sum that it is part of. (q dq - k dk, summed over later tokens, would be the same, but
    # what pairs of later tokens contribute would have to cancel; of rounded factors it does not.)
    bdq = tl.zeros([C, BK], tl.float32)
    bdk = tl.zeros([C, BK], tl.float32)
    if ddecay is not None:
        dlog = tl.zeros([C, BK], tl.float32)
    for level in range(LEVELS):
        is_later = ((r >> level) & 1)[:, None] == 1
        reach = _reach(reaches, level, C)
        factor = _factors(reach, high, low, GATE_PRECISION)
        mixed = tl.where(is_later, bq, bk).to(tl.float32) * factor
        mixed = rounded(mixed * tl.where(is_later, scale, 1.0), COMPUTE)
        answer = dot(tl.where(_is_in_pair(level, C), asked, 0.0), mixed, PRECISION)
        if ddecay is not None:
            of_sums = rounded(mixed.to(tl.float32) * answer, COMPUTE)
            dlog = dot_add(tl.trans(reach), of_sums, dlog, GATE_PRECISION)
        answer *= factor
        bdq += tl.where(is_later, answer, 0.0)
        bdk += tl.where(is_later, 0.0, answer)
    # The same through other chunks.
    reach = _reach(reaches, LEVELS, C)
    answer = tl.load(dq_other + at, mask=mask, other=0.0)
    answer *= _factors(reach, high, low, GATE_PRECISION)
    bq = bq.to(tl.float32) * scale
    bdq += answer
    if ddecay is not None:
        dlog = dot_add(tl.trans(reach), rounded(bq * answer, COMPUTE), dlog, GATE_PRECISION)
    reach = _reach(reaches, LEVELS + 1, C)
    answer = tl.load(dk_other + at, mask=mask, other=0.0)
    answer *= _factors(reach, high, low, GATE_PRECISION)
    bk = bk.to(tl.float32)
    bdk += answer
    if ddecay is not None:
        dlog = dot_add(tl.trans(reach), rounded(bk * answer, COMPUTE), dlog, GATE_PRECISION)
        dlog += tl.load(passed + at_slot, mask=in_k, other=0.0)[None, :]
        tl.store(ddecay + at, rounded(dlog, ddecay.dtype.element_ty), mask=mask)
    # The diagonal, which does not decay.
    if STRICT:
        u = tl.load(bonus + h * K + rk, mask=in_k, other=0.0).to(tl.float32)[None, :]
        tl.store(dbonus + at_slot, tl.sum(own * bq * bk, 0), mask=in_k)
        bdq += own * u * bk
        bdk += own * u * bq
    else:
        bdq += own * bk
        bdk += own * bq
    tl.store(dq + at, rounded(bdq * scale, dq.dtype.element_ty), mask=mask)
    tl.store(dk + at, rounded(bdk, dk.dtype.element_ty), mask=mask)


# (target, bits of the inputs, padded width): Config, whose slice is of K. The width is K, of the
# scan that of the side which is not sliced. Chosen by compiling: no spills, and as many programs on
# a processor as that allows. The instructions of sm_80 take 32 rows as well as 64. (In float32 the
# scan of 256 columns and more does spill: three products stand for one.)
_WITHIN, _GRADIENTS, _STATES, _SCAN = {}, {}, {}, {}
for _target in ("sm_80", "sm_90", "sm_100", "gfx942"):
    _WITHIN[_target, 16] = {64: Config(64, 64, 4, 2)}
    _GRADIENTS[_target, 16] = {64: Config(64, 32, 4, 2)}
    _STATES[_target, 16] = {64: Config(64, 64, 4, 3)}
    _SCAN[_target, 16] = {
        64: Config(64, 64, 4, 2),
        128: Config(64, 64, 4, 2),
        256: Config(64, 32, 4, 2),
        512: Config(64, 16, 8, 1),
    }
    _WITHIN[_target, 32] = {64: Config(32, 32, 4, 2)}
    _GRADIENTS[_target, 32] = {64: Config(32, 16, 4, 2)}
    _STATES[_target, 32] = {64: Config(32, 32, 4, 2)}
    _SCAN[_target, 32] = {
        64: Config(32, 32, 4, 2),
        128: Config(32, 16, 8, 2),
        256: Config(32, 16, 8, 2),
        512: Config(32, 16, 8, 1),
    }
_WITHIN["sm_100", 16][128] = Config(64, 64, 8, 2)
_GRADIENTS["sm_100", 16] = {64: Config(64, 64, 8, 2)}
_SCAN["sm_100", 16][128] = Config(64, 32, 4, 2)
_SCAN["sm_100", 16][256] = Config(64, 16, 4, 2)
_SCAN["sm_100", 32][64] = Config(32, 16, 4, 2)
# 64 KB of shared memory hold one stage.
_SCAN["gfx942", 16][256] = Config(64, 32, 4, 1)
_WITHIN["sm_80", 16] = {64: Config(32, 64, 4, 2), 128: Config(32, 32, 4, 2)}
_GRADIENTS["sm_80", 16] = {64: Config(32, 64, 4, 2), 128: Config(32, 16, 4, 2)}
_SCAN["sm_80", 16] = {
    64: Config(32, 64, 4, 2),
    128: Config(32, 32, 4, 2),
    256: Config(32, 16, 4, 2),
    512: Config(32, 16, 8, 1),
}


def _config(table, name, target, dtype, width):
    """The shipped `Config` of a kernel: see kernels/bench/resources.json for what each takes."""
    if name in overridden:
        return overridden[name]
    by_width = table[target, 16 if dtype == torch.bfloat16 else 32]
    return by_width[min(max(64, padded(width)), max(by_width))]


def _scan_config(target, dtype, a, z):
    config = _config(_SCAN, "channels_scan", target, dtype, a)
    return config._replace(slice=min(config.slice, padded(z)))


def _tile(config, size):
    return min(config.slice, padded(size))


_COMPUTE = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float32, torch.float32: tl.float32}


_kept_reaches = {}


def _reaches(chunk, strict, dtype, device):
    """Between which positions of a chunk decay counts, as matrices of zeros and ones.

    For each width W = 1, 2 ... C / 2 from a row to the boundary of its pair of blocks of W; then
    from the chunk's start to a row that reads, and from a row to the chunk's end.

    Returns:
        [log2 C + 2, C, C] in the dtype; kept, so that calls build nothing.
    """
    key = chunk, strict, dtype, device
    if key in _kept_reaches:
        return _kept_reaches[key]
    row = torch.arange(chunk, device=device)
    read = row - 1 if strict else row
    reaches = []
    for level in range(chunk.bit_length() - 1):
        start = row >> level << level
        is_later = (row >> level) % 2 == 1
        first = torch.where(is_later, start, row + 1)
        reaches.append((first, torch.where(is_later, read, start + 2**level - 1)))
    reaches += [(0 * row, read), (row + 1, 0 * row + chunk)]
    matrices = [(row >= first[:, None]) & (row <= last[:, None]) for first, last in reaches]
    result = torch.stack(matrices).to(dtype)
    capturing = result.is_cuda and torch.cuda.is_current_stream_capturing()
    # In a captured graph nothing is filled before it runs; tensors without values are others'.
    if not capturing and type(result) is torch.Tensor:
        _kept_reaches[key] = result
    return result


class _Call:
    """What the launches of a forward or a backward pass share, and what `_within` computes."""

    def __init__(self, q, k, v, log_decay, bonus, cu_seqlens, scale):
        self.batch, self.time, self.heads, self.key_dim = q.shape
        self.value_dim = v.shape[-1]
        self.q, self.k, self.v, self.log_decay, self.bonus = q, k, v, log_decay, bonus
        self.cu_seqlens, self.scale = cu_seqlens, scale
        self.dtype, self.device, self.target = q.dtype, q.device, target_of(q.device)
        # Forward and backward must make the same plan.
        slices = -(-self.value_dim // _scan_config(self.target, self.dtype, *self.widths).slice)
        self.plan = plan(self.batch, self.time, self.heads * slices, cu_seqlens, q.device)
        within = _config(_WITHIN, "channels_within", self.target, self.dtype, self.key_dim)
        self.chunk = within.chunk
        self.num_slots = self.batch * self.time // self.chunk + self.plan.num_segments

        stored = torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32
        self.q_start = torch.empty_like(q, dtype=stored)
        self.k_end = torch.empty_like(k, dtype=stored)
        self.scores = q.new_empty((*q.shape[:3], self.chunk), dtype=stored)
        strict = bonus is not None
        self.reaches = constant(_reaches, self.chunk, strict, stored, self.device)
        self.whole = self.empty(self.num_slots, self.heads, self.key_dim)
        launch(
            _within,
            (self.num_slots, self.heads),
            within.num_warps,
            within.num_stages,
            q=q,
            k=k,
            decay=log_decay,
            bonus=bonus,
            q_start=self.q_start,
            k_end=self.k_end,
            scores=self.scores,
            whole=self.whole,
            K=self.key_dim,
            BK=_tile(within, self.key_dim),
            **self._of_chunks(),
            **self._of_levels(),
        )

    @property
    def widths(self):
        """K and V."""
        return self.key_dim, self.value_dim

    def empty(self, *shape):
        """A float32 tensor on the device of the call."""
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def empty_states(self):
        """One state for each document."""
        return self.empty(self.plan.num_documents, self.heads, *self.widths)

    def _of_segments(self):
        """Arguments of kernels whose programs find segments."""
        cut = self.plan
        return {
            "table": cut.table,
            "stride": cut.stride,
            "T": cut.time,
            "LENGTH": cut.length,
            "PER_ROW": cut.per_row,
            "H": self.heads,
            "C": self.chunk,
        }

    def _of_chunks(self):
        """Arguments of kernels whose programs find chunks."""
        count = self.plan.num_segments
        return self._of_segments() | {"num_segments": count, "steps": count.bit_length()}

    def _of_products(self):
        return {
            "COMPUTE": _COMPUTE[self.dtype],
            "PRECISION": dot_precision(self.dtype, self.target),
        }

    def _of_levels(self):
        return self._of_products() | {
            "scale": self.scale,
            "reaches": self.reaches,
            "LEVELS": self.chunk.bit_length() - 1,
            "STRICT": self.bonus is not None,
            "GATE_PRECISION": dot_precision(torch.float32, self.target),
        }

    def scan(
        self, x, y, z, out, *, reverse, transposed, entering, leaving=None, states=None, passed=None
    ):
        """One use of `_scan`; the scores take part where the state is not transposed."""
        a, z_dim = x.shape[-1], z.shape[-1]
        config = _scan_config(self.target, self.dtype, a, z_dim)
        launch(
            _scan,
            (-(-z_dim // config.slice) * self.plan.num_segments, self.heads),
            config.num_warps,
            config.num_stages,
            x=x,
            y=y,
            z=z,
            out=out,
            scores=None if transposed else self.scores,
            whole=self.whole,
            entering=entering,
            leaving=leaving,
            states=states,
            passed=passed,
            A=a,
            Z=z_dim,
            BLOCK_A=padded(a),
            BZ=config.slice,
            REVERSE=reverse,
            TRANSPOSED=transposed,
            **self._of_segments(),
            **self._of_products(),
        )

    def states(self, y, z, *, reverse, first, last):
        """The state that enters each segment [segments, H, K, V]; fills `last`, if it is given."""
        config = _config(_STATES, "channels_states", self.target, self.dtype, self.key_dim)
        block_k, block_v = (_tile(config, x) for x in self.widths)
        tiles = -(-self.key_dim // block_k) * -(-self.value_dim // block_v)
        cut = self.plan
        states = self.empty(cut.num_segments, self.heads, *self.widths)
        decays = self.empty(cut.num_segments, self.heads, self.key_dim)
        launch(
            _segment_states,
            (tiles * cut.num_segments, self.heads),
            config.num_warps,
            config.num_stages,
            y=y,
            z=z,
            whole=self.whole,
            states=states,
            decays=decays,
            K=self.key_dim,
            V=self.value_dim,
            BK=block_k,
            BV=block_v,
            REVERSE=reverse,
            **self._of_segments(),
            **self._of_products(),
        )
        launch(
            _combine,
            (-(-self.key_dim * self.value_dim // 1024) * cut.num_documents, self.heads),
            4,
            1,
            states=states,
            decays=decays,
            first=first,
            last=last,
            offsets=cut.offsets,
            PER_ROW=cut.per_row,
            H=self.heads,
            K=self.key_dim,
            V=self.value_dim,
            BLOCK=1024,
            REVERSE=reverse,
        )
        return states

    def gradients(self, do, dq_other, dk_other, passed):
        """(dq, dk, dlog_decay, dbonus), the last two None where there are none."""
        config = _config(_GRADIENTS, "channels_gradients", self.target, self.dtype, self.key_dim)
        block_k, block_v = (_tile(config, x) for x in self.widths)
        num_k = -(-self.key_dim // block_k)
        dq, dk = torch.empty_like(self.q), torch.empty_like(self.k)
        dlog_decay = None if passed is None else torch.empty_like(self.log_decay)
        dbonus = None if self.bonus is None else torch.empty_like(self.whole)
        launch(
            _within_gradients,
            (num_k * self.num_slots, self.heads),
            config.num_warps,
            config.num_stages,
            q=self.q,
            k=self.k,
            v=self.v,
            do=do,
            decay=self.log_decay,
            bonus=self.bonus,
            dq_other=dq_other,
            dk_other=dk_other,
            passed=passed,
            dq=dq,
            dk=dk,
            ddecay=dlog_decay,
            dbonus=dbonus,
            K=self.key_dim,
            V=self.value_dim,
            BK=block_k,
            BV=block_v,
            **self._of_chunks(),
            **self._of_levels(),
        )
        if self.bonus is not None:
            dbonus = dbonus.sum(0).to(self.bonus.dtype)
        return dq, dk, dlog_decay, dbonus


def forward(q, k, v, log_decay, bonus, initial_state, cu_seqlens, scale, output_final_state):
    """Raw forward pass on contiguous tensors, q, k and v of one dtype; no autograd.

    Returns:
        (o, final state or None, the state that enters each segment): the last one is None where
        every document is one segment.
    """
    call = _Call(q, k, v, log_decay, bonus, cu_seqlens, scale)
    o = torch.empty_like(v)
    final = call.empty_states() if output_final_state else None
    entering, ends = None, {"entering": initial_state, "leaving": final}
    if call.plan.is_cut:
        entering = call.states(call.k_end, v, reverse=False, first=initial_state, last=final)
        ends = {"entering": entering}
    call.scan(call.q_start, call.k_end, v, o, reverse=False, transposed=False, **ends)
    return o, final, entering


def backward(
    q,
    k,
    v,
    log_decay,
    bonus,
    initial_state,
    cu_seqlens,
    entering,
    do,
    dfinal,
    scale,
    decay_gradient,
    initial_gradient,
):
    """Raw backward pass: (dq, dk, dv, dlog_decay, dbonus, dinitial), None where not asked for."""
    call = _Call(q, k, v, log_decay, bonus, cu_seqlens, scale)
    dv = torch.empty_like(v)
    dq_other, dk_other = (torch.empty_like(q, dtype=torch.float32) for _ in range(2))
    dinitial = call.empty_states() if initial_gradient else None
    states = passed = None
    if decay_gradient:
        shape = call.num_slots, call.heads, call.value_dim, call.key_dim
        states = torch.empty(shape, dtype=call.scores.dtype, device=call.device)
        passed = torch.empty_like(call.whole)
    ahead = {"reverse": False, "entering": initial_state}
    back = {"reverse": True, "entering": dfinal}
    leaving = dinitial
    if call.plan.is_cut:
        ahead["entering"] = entering
        back["entering"] = call.states(call.q_start, do, reverse=True, first=dfinal, last=dinitial)
        leaving = None
    call.scan(do, v, call.k_end, dq_other, transposed=True, states=states, **ahead)
    call.scan(call.k_end, call.q_start, do, dv, transposed=False, leaving=leaving, **back)
    call.scan(v, do, call.q_start, dk_other, transposed=True, states=states, passed=passed, **back)
    dq, dk, dlog_decay, dbonus = call.gradients(do, dq_other, dk_other, passed)
    return dq, dk, dv, dlog_decay, dbonus, dinitial


def num_slices(q, v, log_decay, bonus):
    """Slices of V that the output is computed in."""
    config = _scan_config(target_of(q.device), q.dtype, q.shape[-1], v.shape[-1])
    return -(-v.shape[-1] // config.slice)


def num_kept(q, v, log_decay, bonus, cu_seqlens):
    """How many segments' states the forward pass returns."""
    programs = q.shape[2] * num_slices(q, v, log_decay, bonus)
    return count_segments(q.shape[0], q.shape[1], programs, cu_seqlens, q.device)


linear_recurrence_channels_triton, _forward_operator, _backward_operator, PASSES = make_operator(
    __name__, forward, backward, num_kept
)
