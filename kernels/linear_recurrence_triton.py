"""Triton kernels of the linear recurrence: no decay, one per head, or one per head and token.

One kernel, `_scan`, serves the output and three gradients, because with c the cumulative log decay

    out_i = sum_{j <= i} exp(c_i - c_j) (x_i . y_j) z_j          reverse: j >= i, exp(c_j - c_i)

is each of them: (x, y, z) = (q, k, v) gives o and (do, v, k) gives dq; reversed, (k, q, do) gives
dv and (v, do, q) gives dk. A program owns a slice of the columns of z and of out, so no program
adds to another's result. It walks its segment chunk by chunk with the state sum y z^T in registers:
what a chunk adds to memory traffic is x, y, z and out, and no state.

The length of a segment is the one knob. A whole document is one launch; where documents and heads
are few, `_segment_states` first computes what each segment adds to the state, `_combine` turns that
into the state which enters each, and `_scan` runs over all segments at once.

With `bonus` the state is read before the token (`STRICT`): the reader's exponent is then
c_i - g_i, and the token itself comes through the bonus.

For wide heads there is another way, in two passes: linear_recurrence_blocks_triton.py.
"""

import functools

import torch

try:  # transformers asks for every library that code from the Hub imports, but in a try
    import triton
    import triton.language as tl
except ImportError:
    raise

from .chunk_decays_triton import LOWEST, chunk_decays
from .launch_triton import (
    Config,
    check_replaceable,
    dot,
    dot_add,
    dot_precision,
    launch,
    log2_of_decay,
    num_processors,
    operator_namespace,
    padded,
    rounded,
    target_of,
)
from .linear_recurrence_blocks_triton import BLOCK_LENGTH, BLOCKS, outputs
from .linear_recurrence_walk_triton import WALKS, walk
from .operator_triton import is_traced, make_operator, narrow
from .segments_triton import count_segments, overridden, plan, segment_bounds


@triton.jit
def _scan(
    x,
    y,
    z,
    out,
    weight,
    row_dot,
    decay,
    bonus,
    entering,
    leaving,
    table,
    stride,
    scale,
    num_tokens,
    T,
    LENGTH,
    PER_ROW,
    H: tl.constexpr,
    A: tl.constexpr,
    Z: tl.constexpr,
    BLOCK_A: tl.constexpr,
    C: tl.constexpr,
    BZ: tl.constexpr,
    DECAY: tl.constexpr,
    REVERSE: tl.constexpr,
    STRICT: tl.constexpr,
    BONUS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PAIRS_ONCE: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out of the module docstring for one segment, head and slice of Z.

    x, y: [tokens, H, A]; z, out: [tokens, H, Z].
    weight, row_dot: [tokens, H, Z] and [slices, tokens, H], or None: row sums of weight * out, from
        which the gradient of the decay follows; without the bonus.
    decay: [H] (DECAY 1) or [tokens, H] (2) natural logs, or None (0).
    bonus: [H, K] or None. BONUS 1: K is A, the weight is inside x . y. 2: K is Z.
    entering, leaving: states [segments, H, A, Z] float32 or None; TRANSPOSED: [segments, H, Z, A].
    scale: multiplies out; in reverse the state too, which then is a gradient of the state.
    PAIRS_ONCE: keep the factors between the positions of a chunk, which with one decay for all
        tokens are those of every chunk; else make them again, which takes fewer registers.
    COMPUTE: dtype of the factors in a product.
    """
    NUM_SLICES: tl.constexpr = (Z + BZ - 1) // BZ
    i = tl.program_id(0)
    h = tl.program_id(1)
    slice = i % NUM_SLICES
    s = (i // NUM_SLICES).to(tl.int64)
    start, end = segment_bounds(table, stride, s, T, LENGTH, PER_ROW)

    r = tl.arange(0, C)
    ra = tl.arange(0, BLOCK_A)
    rz = slice * BZ + tl.arange(0, BZ)
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
    if BONUS == 1:
        u = tl.load(bonus + h * A + ra, mask=in_a, other=0.0).to(tl.float32)
    if BONUS == 2:
        u = tl.load(bonus + h * Z + rz, mask=in_z, other=0.0).to(tl.float32)

    if REVERSE:
        visible = r[:, None] <= r[None, :]
    else:
        visible = r[:, None] >= r[None, :]
    if STRICT:
        visible = visible & (r[:, None] != r[None, :])
    if DECAY == 1 and PAIRS_ONCE:
        own = log2_of_decay(tl.load(decay + h), LOWEST)
        if REVERSE:
            distance = r[None, :] - r[:, None]
        else:
            distance = r[:, None] - r[None, :]
        if STRICT:
            distance -= 1
        pairs = tl.exp2(tl.where(visible, own * distance.to(tl.float32), float("-inf")))

    num_chunks = tl.cdiv(end - start, C)
    for n in range(num_chunks):
        if REVERSE:
            t = start + (num_chunks - 1 - n) * C
        else:
            t = start + n * C
        token = t + r
        inside = token < end
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

        scores = dot(bx, tl.trans(by), PRECISION)
        result = dot(bx, rounded(state, COMPUTE), PRECISION)
        if DECAY > 0:
            count = tl.minimum(end - t, C).to(tl.int32)
            cum, own_C, total = chunk_decays(decay, token, inside, count, h, H, C, DECAY)
            read = cum - own_C if STRICT else cum
            if DECAY == 2 or not PAIRS_ONCE:
                if REVERSE:
                    exponent = read[None, :] - cum[:, None]
                else:
                    exponent = read[:, None] - cum[None, :]
                pairs = tl.exp2(tl.where(visible, exponent, float("-inf")))
            to_end = tl.exp2(total - cum)
            from_start = tl.exp2(read)
            if REVERSE:
                result *= to_end[:, None]
                keep = from_start
            else:
                result *= from_start[:, None]
                keep = to_end
            scores *= pairs
        else:
            scores = tl.where(visible, scores, 0.0)
        if REVERSE:
            scores *= scale
        result = dot_add(rounded(scores, COMPUTE), bz, result, PRECISION)
        if not REVERSE:
            result *= scale

        if row_dot is not None:
            bw = tl.load(weight + at_z, mask=mask_z, other=0.0).to(tl.float32)
            at_dot = (slice * num_tokens + token) * H + h
            tl.store(row_dot + at_dot, tl.sum(bw * result, 1), mask=inside)
        if BONUS > 0:
            product = bx.to(tl.float32) * by.to(tl.float32)
            if BONUS == 1:
                product *= u[None, :]
            token_BZ = (tl.sum(product, 1) * scale)[:, None] * bz.to(tl.float32)
            if BONUS == 2:
                token_BZ *= u[None, :]
            result += token_BZ
        tl.store(out + at_z, rounded(result, out.dtype.element_ty), mask=mask_z)

        if DECAY > 0:
            state *= tl.exp2(total)
            if REVERSE:
                keep *= scale
            bz = rounded(bz * keep[:, None], COMPUTE)
        elif REVERSE:
            bz = rounded(bz.to(tl.float32) * scale, COMPUTE)
        state = dot_add(tl.trans(by), bz, state, PRECISION)
    if leaving is not None:
        tl.store(leaving + at_state, state, mask=in_state)


@triton.jit
def _scan_gradients(
    q,
    k,
    v,
    do,
    dq,
    dk,
    dv,
    decay,
    entering,
    later,
    leaving,
    table,
    stride,
    scale,
    num_tokens,
    T,
    LENGTH,
    PER_ROW,
    H: tl.constexpr,
    A: tl.constexpr,
    BLOCK_A: tl.constexpr,
    C: tl.constexpr,
    BZ: tl.constexpr,
    DECAY: tl.constexpr,
    PAIRS_ONCE: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The three uses of `_scan` in a backward pass side by side, K = V, without bonus.

    entering, later: the states of forward and reverse. leaving: the state's gradient, or None.
    """
    use = tl.program_id(2)
    if use == 0:
        _scan(
            do,
            v,
            k,
            dq,
            None,
            None,
            decay,
            None,
            entering,
            None,
            table,
            stride,
            scale,
            num_tokens,
            T,
            LENGTH,
            PER_ROW,
            H,
            A,
            A,
            BLOCK_A,
            C,
            BZ,
            DECAY,
            False,
            False,
            0,
            True,
            PAIRS_ONCE,
            COMPUTE,
            PRECISION,
        )
    elif use == 1:
        _scan(
            k,
            q,
            do,
            dv,
            None,
            None,
            decay,
            None,
            later,
            leaving,
            table,
            stride,
            scale,
            num_tokens,
            T,
            LENGTH,
            PER_ROW,
            H,
            A,
            A,
            BLOCK_A,
            C,
            BZ,
            DECAY,
            True,
            False,
            0,
            False,
            PAIRS_ONCE,
            COMPUTE,
            PRECISION,
        )
    else:
        _scan(
            v,
            do,
            q,
            dk,
            None,
            None,
            decay,
            None,
            later,
            None,
            table,
            stride,
            scale,
            num_tokens,
            T,
            LENGTH,
            PER_ROW,
            H,
            A,
            A,
            BLOCK_A,
            C,
            BZ,
            DECAY,
            True,
            False,
            0,
            True,
            PAIRS_ONCE,
            COMPUTE,
            PRECISION,
        )


@triton.jit
def _segment_states(
    y,
    z,
    decay,
    states,
    decays,
    table,
    stride,
    scale,
    T,
    LENGTH,
    PER_ROW,
    H: tl.constexpr,
    A: tl.constexpr,
    Z: tl.constexpr,
    C: tl.constexpr,
    BA: tl.constexpr,
    BZ: tl.constexpr,
    DECAY: tl.constexpr,
    REVERSE: tl.constexpr,
    STRICT: tl.constexpr,
    SKIP_OUTERMOST: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What a segment adds to the state that passes through it, and its whole log decay.

    Forward: sum_j exp(c_end - c_j) y_j z_j^T. Reverse, a gradient that flows to the segment's
    start: scale sum_i exp(c_i) y_i z_i^T.

    states: [segments, H, A, Z] float32. decays: [segments, H] base-2 logs, or None without decay.
    SKIP_OUTERMOST: leave out a document's last segment (first in reverse): nobody reads it.
    """
    NUM_A: tl.constexpr = (A + BA - 1) // BA
    NUM_Z: tl.constexpr = (Z + BZ - 1) // BZ
    i = tl.program_id(0)
    h = tl.program_id(1)
    tile = i % (NUM_A * NUM_Z)
    s = (i // (NUM_A * NUM_Z)).to(tl.int64)
    start, end = segment_bounds(table, stride, s, T, LENGTH, PER_ROW)
    if SKIP_OUTERMOST:
        if table is None:
            if REVERSE:
                is_outermost = s % PER_ROW == 0
            else:
                is_outermost = s % PER_ROW == PER_ROW - 1
        else:
            if REVERSE:
                is_outermost = start == tl.load(table + 2 * stride + s)
            else:
                is_outermost = end == tl.load(table + 3 * stride + s)
        if is_outermost:
            return

    r = tl.arange(0, C)
    ra = (tile // NUM_Z) * BA + tl.arange(0, BA)
    rz = (tile % NUM_Z) * BZ + tl.arange(0, BZ)
    in_a = ra < A
    in_z = rz < Z
    state = tl.zeros([BA, BZ], tl.float32)
    passed = 0.0
    num_chunks = tl.cdiv(end - start, C)
    for n in range(num_chunks):
        if REVERSE:
            t = start + (num_chunks - 1 - n) * C
        else:
            t = start + n * C
        token = t + r
        inside = token < end
        if A % BA == 0:
            mask_a = inside[:, None]
        else:
            mask_a = inside[:, None] & in_a[None, :]
        if Z % BZ == 0:
            mask_z = inside[:, None]
        else:
            mask_z = inside[:, None] & in_z[None, :]
        at_a = (token * H + h)[:, None] * A + ra[None, :]
        at_z = (token * H + h)[:, None] * Z + rz[None, :]
        by = tl.load(y + at_a, mask=mask_a, other=0.0).to(COMPUTE)
        bz = tl.load(z + at_z, mask=mask_z, other=0.0).to(COMPUTE)
        if DECAY > 0:
            count = tl.minimum(end - t, C).to(tl.int32)
            cum, own_C, total = chunk_decays(decay, token, inside, count, h, H, C, DECAY)
            if REVERSE:
                keep = tl.exp2(cum - own_C if STRICT else cum) * scale
            else:
                keep = tl.exp2(total - cum)
            bz = rounded(bz * keep[:, None], COMPUTE)
            state *= tl.exp2(total)
            passed += total
        elif REVERSE:
            bz = rounded(bz.to(tl.float32) * scale, COMPUTE)
        state = dot_add(tl.trans(by), bz, state, PRECISION)
    at_state = (s * H + h) * A * Z + ra[:, None] * Z + rz[None, :]
    tl.store(states + at_state, state, mask=in_a[:, None] & in_z[None, :])
    if decays is not None:
        if tile == 0:
            tl.store(decays + s * H + h, passed)


@triton.jit
def _combine(
    states,
    decays,
    first,
    last,
    offsets,
    PER_ROW,
    H: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """In place: what each segment adds becomes the state that enters it.

    states: [segments, H, SIZE]. decays: [segments, H] base-2 logs or None.
    first, last: [documents, H, SIZE], the state before a document (None: zero), and after it
        (None: not wanted). In reverse, before is after in time.
    """
    BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    i = tl.program_id(0)
    h = tl.program_id(1)
    n = (i // BLOCKS).to(tl.int64)
    r = (i % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    mask = r < SIZE
    if offsets is None:
        begin = n * PER_ROW
        count = PER_ROW
    else:
        begin = tl.load(offsets + n)
        count = tl.load(offsets + n + 1) - begin
    if first is None:
        state = tl.zeros([BLOCK], tl.float32)
    else:
        state = tl.load(first + (n * H + h) * SIZE + r, mask=mask, other=0.0).to(tl.float32)
    for j in range(count):
        if REVERSE:
            s = begin + count - 1 - j
        else:
            s = begin + j
        at = states + (s * H + h) * SIZE + r
        # The outermost segment adds nothing that is read, unless the state after it is wanted.
        is_read = (j < count - 1) | (last is not None)
        added = tl.load(at, mask=mask & is_read, other=0.0)
        tl.store(at, state, mask=mask)
        if decays is not None:
            state *= tl.exp2(tl.load(decays + s * H + h, mask=is_read, other=0.0))
        state += added
    if last is not None:
        tl.store(last + (n * H + h) * SIZE + r, state, mask=mask)


@triton.jit
def _step(
    q,
    k,
    v,
    o,
    decay,
    bonus,
    before,
    after,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
):
    """One token of one row and head, a slice of V. DECAY 3: [rows, H, K] natural logs.

    before, after: [rows, H, K, V], which may be the same tensor; before None: zero.
    """
    NUM_SLICES: tl.constexpr = (V + BV - 1) // BV
    i = tl.program_id(0)
    row = (i // NUM_SLICES).to(tl.int64) * H + tl.program_id(1)
    rk = tl.arange(0, BLOCK_K)
    rv = (i % NUM_SLICES) * BV + tl.arange(0, BV)
    in_k = rk < K
    in_v = rv < V
    bq = tl.load(q + row * K + rk, mask=in_k, other=0.0).to(tl.float32)
    bk = tl.load(k + row * K + rk, mask=in_k, other=0.0).to(tl.float32)
    bv = tl.load(v + row * V + rv, mask=in_v, other=0.0).to(tl.float32)
    at = row * K * V + rk[:, None] * V + rv[None, :]
    mask = in_k[:, None] & in_v[None, :]
    if before is None:
        state = tl.zeros([BLOCK_K, BV], tl.float32)
    else:
        state = tl.load(before + at, mask=mask, other=0.0).to(tl.float32)
    token = bk[:, None] * bv[None, :]
    if bonus is not None:
        u = tl.load(bonus + tl.program_id(1) * K + rk, mask=in_k, other=0.0).to(tl.float32)
        read = state + u[:, None] * token
    if DECAY == 1:
        state *= tl.exp2(log2_of_decay(tl.load(decay + tl.program_id(1)), float("-inf")))
    if DECAY == 2:
        state *= tl.exp2(log2_of_decay(tl.load(decay + row), float("-inf")))
    if DECAY == 3:
        log = tl.load(decay + row * K + rk, mask=in_k, other=0.0)
        state *= tl.exp2(log2_of_decay(log, float("-inf")))[:, None]
    state += token
    if bonus is None:
        read = state
    result = tl.sum(bq[:, None] * read, 0) * scale
    tl.store(o + row * V + rv, rounded(result, o.dtype.element_ty), mask=in_v)
    if after is not None:
        tl.store(after + at, state, mask=mask)


# (chunk, slice, warps, stages) of `_scan` for padded A = 64 or less, 128, 256, 512; by target, bits
# of the factors and variant. Chosen by compiling: no spills, and then as many programs on a
# processor as that allows (kernels/bench/resources.py); measured on an H100 for 64 to 256
# (kernels/bench/LOG.md). On sm_90 512 has chunks of 32: those of 64 are miscompiled
# (kernels/bench/sass.py).
_SCAN = {
    ("sm_80", 16, "constant"): ((64, 32, 4, 2), (64, 32, 4, 2), (32, 32, 8, 2), (16, 16, 8, 1)),
    ("sm_80", 16, "gates"): ((64, 32, 4, 2), (64, 32, 4, 2), (32, 32, 8, 2), (16, 16, 8, 1)),
    ("sm_80", 16, "bonus"): ((64, 32, 4, 2), (32, 32, 8, 2), (16, 16, 8, 1), (16, 16, 8, 1)),
    ("sm_90", 16, "constant"): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2), (32, 16, 8, 2)),
    ("sm_90", 16, "gates"): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2), (32, 16, 8, 2)),
    ("sm_90", 16, "bonus"): ((64, 32, 4, 2), (64, 32, 8, 2), (16, 16, 8, 1), (16, 16, 8, 1)),
    ("sm_100", 16, "constant"): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2), (16, 16, 8, 1)),
    ("sm_100", 16, "gates"): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 8, 2), (16, 16, 8, 1)),
    ("sm_100", 16, "bonus"): ((64, 32, 4, 2), (64, 32, 4, 2), (16, 16, 8, 1), (16, 16, 8, 1)),
    ("gfx942", 16, "constant"): ((64, 64, 4, 2), (64, 64, 4, 2), (32, 32, 4, 2), (32, 16, 4, 1)),
    ("gfx942", 16, "gates"): ((64, 64, 4, 2), (64, 64, 4, 2), (32, 32, 4, 2), (32, 16, 4, 1)),
    ("gfx942", 16, "bonus"): ((64, 64, 4, 2), (64, 32, 4, 2), (16, 16, 4, 1), (16, 16, 4, 1)),
    ("sm_80", 32, None): ((32, 32, 4, 2), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    ("sm_90", 32, None): ((32, 32, 4, 2), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    ("sm_100", 32, None): ((32, 16, 8, 2), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    ("gfx942", 32, None): ((32, 32, 4, 2), (32, 16, 4, 2), (16, 16, 4, 1), (16, 16, 4, 1)),
}
# Programs of `_scan_gradients` that share a processor, by target and padded K.
_AT_ONCE = {("sm_90", 64): 2, ("sm_90", 128): 1, ("sm_100", 64): 2}
_AT_ONCE |= {("gfx942", 64): 1, ("gfx942", 128): 1}
# The configurations of `_segment_states`, whose tiles do not grow with the head.
_STATES = {16: Config(64, 64, 4, 3), 32: Config(32, 32, 4, 2)}


def _scan_config(target, dtype, a, z, decay, has_bonus):
    """The shipped `Config` of `_scan`: see kernels/bench/resources.json for what each takes."""
    if "scan" in overridden:
        return overridden["scan"]
    return _shipped(target, dtype, a, z, decay, has_bonus)


@functools.cache
def _shipped(target, dtype, a, z, decay, has_bonus):
    column = max(64, padded(a)).bit_length() - 7
    if column > 3:
        raise ValueError(
            "linear_recurrence: the Triton kernels take heads of up to 512 channels, "
            f'got {a}; use backend="torch".'
        )
    if dtype != torch.bfloat16:
        key = target, 32, None
    else:
        key = target, 16, "bonus" if has_bonus else "gates" if decay == 2 else "constant"
    config = Config(*_SCAN[key][column])
    return config._replace(slice=min(config.slice, padded(z)))


def _states_config(dtype):
    return overridden.get("states", _STATES[16 if dtype == torch.bfloat16 else 32])


_COMPUTE = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float32, torch.float32: tl.float32}


class _Call:
    """What every launch of a call shares: the plan, the decay's form, precision, configurations."""

    def __init__(self, q, v, log_decay, bonus, cu_seqlens, scale, in_blocks=False):
        self.batch, self.time, self.heads, self.key_dim = q.shape
        self.value_dim = v.shape[-1]
        self.log_decay, self.bonus, self.scale = log_decay, bonus, scale
        self.decay = 0 if log_decay is None else 1 if log_decay.ndim == 1 else 2
        self.dtype, self.device = q.dtype, q.device
        self.target = target_of(q.device)
        # An interpreter runs one program after the other.
        self.processors = 0 if q.device.type == "cpu" else num_processors(q.device)
        # Forward and backward must make the same plan.
        slices = num_slices(q, v, log_decay, bonus)
        length = None
        if in_blocks:
            self.walk_config = overridden.get("walk") or WALKS[self.target]
            length = overridden.get("segment", BLOCK_LENGTH)
            chunk = self.walk_config.chunk
            length = min(self.time, -(-length // chunk) * chunk)
        programs = self.heads * slices
        self.plan = plan(self.batch, self.time, programs, cu_seqlens, q.device, length)

    def new_state(self):
        """An uninitialised state of each document [N, H, K, V]."""
        shape = self.plan.num_documents, self.heads, self.key_dim, self.value_dim
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def _config(self, a, z, exact=False):
        dtype = torch.float32 if exact else self.dtype
        return _scan_config(self.target, dtype, a, z, self.decay, self.bonus is not None)

    def _shared(self, exact=False):
        """Arguments that all kernels over segments take; exact: factors in float32."""
        cut = self.plan
        return {
            "table": cut.table,
            "stride": cut.stride,
            "scale": self.scale,
            "T": cut.time,
            "LENGTH": cut.length,
            "PER_ROW": cut.per_row,
            "H": self.heads,
            "DECAY": self.decay,
            "STRICT": self.bonus is not None,
            "COMPUTE": tl.float32 if exact else _COMPUTE[self.dtype],
            "PRECISION": dot_precision(torch.float32 if exact else self.dtype, self.target),
        }

    def scan(self, x, y, z, out, *, reverse, transposed, entering, leaving=None, weight=None):
        """One use of `_scan`; with `weight`, returns the row sums of weight * out [B, T, H].

        These cancel in the gradient of a decay, so what they are made of is not rounded to 16 bits:
        that would leave a tenth of the gradient wrong.
        """
        a, z_dim = x.shape[-1], z.shape[-1]
        config = self._config(a, z_dim, weight is not None)
        config = self._narrowed(config, z_dim)
        slices = -(-z_dim // config.slice)
        row_dot = None
        if weight is not None:
            row_dot = torch.empty(slices, *x.shape[:3], dtype=torch.float32, device=self.device)
        bonus = 0 if self.bonus is None else 2 if transposed else 1
        launch(
            _scan,
            (slices * self.plan.num_segments, self.heads),
            config.num_warps,
            config.num_stages,
            x=x,
            y=y,
            z=z,
            out=out,
            weight=weight,
            row_dot=row_dot,
            decay=self.log_decay,
            bonus=self.bonus,
            entering=entering,
            leaving=leaving,
            num_tokens=self.batch * self.time,
            A=a,
            Z=z_dim,
            BLOCK_A=padded(a),
            C=config.chunk,
            BZ=config.slice,
            REVERSE=reverse,
            BONUS=bonus,
            TRANSPOSED=transposed,
            PAIRS_ONCE=self._has_pairs_once(a),
            **self._shared(exact=weight is not None),
        )
        return None if row_dot is None else row_dot.sum(0)

    def _has_pairs_once(self, a):
        return self.target != "sm_80" and padded(a) != 256

    def _is_small(self):
        """Whether other slices, and three uses in one launch, are among what was compiled."""
        widest = max(padded(self.key_dim), padded(self.value_dim))
        plain = self.dtype == torch.bfloat16 and self.decay < 2 and self.bonus is None
        return plain and widest <= 128

    def _programs(self, config, z_dim, uses=1):
        return uses * self.plan.num_segments * self.heads * -(-z_dim // config.slice)

    def _narrowed(self, config, z_dim, uses=1):
        """Slices as narrow as leave each program a processor that has no other.

        Then every processor multiplies less, and reads no more.
        """
        if "scan" in overridden or not self._is_small():
            return config
        while config.slice > 16 and 2 * self._programs(config, z_dim, uses) <= self.processors:
            config = config._replace(slice=config.slice // 2)
        return config

    def fits_at_once(self):
        """Whether the three uses of `_scan` in a backward pass all run at the same time.

        One after the other they would leave most of the device idle. A program takes the shared
        memory of all three: on sm_90 two of 64 channels share a processor, one of 128 has it.
        """
        if self.key_dim != self.value_dim or self.bonus is not None:
            return False
        if "at_once" in overridden:
            return overridden["at_once"]
        if not self._is_small():
            return False
        width = padded(self.key_dim)
        programs = self._programs(self._config(width, width), self.key_dim, 3)
        return programs <= self.processors * _AT_ONCE.get((self.target, max(64, width)), 0)

    def scan_gradients(self, q, k, v, do, dq, dk, dv, *, entering, later, leaving):
        """Fills dq, dk, dv and, if it is given, `leaving` in one launch."""
        a = self.key_dim
        config = self._narrowed(self._config(a, a), a, 3)
        shared = self._shared()
        del shared["STRICT"]
        launch(
            _scan_gradients,
            (-(-a // config.slice) * self.plan.num_segments, self.heads, 3),
            config.num_warps,
            config.num_stages,
            q=q,
            k=k,
            v=v,
            do=do,
            dq=dq,
            dk=dk,
            dv=dv,
            decay=self.log_decay,
            entering=entering,
            later=later,
            leaving=leaving,
            num_tokens=self.batch * self.time,
            A=a,
            BLOCK_A=padded(a),
            C=config.chunk,
            BZ=config.slice,
            PAIRS_ONCE=self._has_pairs_once(a),
            **shared,
        )

    def states(self, y, z, *, reverse, first, last, exact=False):
        """The state that enters each segment [segments, H, K, V]; fills `last`, if it is given."""
        a, z_dim = y.shape[-1], z.shape[-1]
        config = _states_config(torch.float32 if exact else self.dtype)
        block_a, block_z = (min(config.slice, padded(x)) for x in (a, z_dim))
        cut, heads = self.plan, self.heads

        def empty(*shape):
            return torch.empty(shape, dtype=torch.float32, device=self.device)

        states = empty(cut.num_segments, heads, a, z_dim)
        decays = empty(cut.num_segments, heads) if self.decay else None
        launch(
            _segment_states,
            (-(-a // block_a) * -(-z_dim // block_z) * cut.num_segments, heads),
            config.num_warps,
            config.num_stages,
            y=y,
            z=z,
            decay=self.log_decay,
            states=states,
            decays=decays,
            A=a,
            Z=z_dim,
            C=config.chunk,
            BA=block_a,
            BZ=block_z,
            REVERSE=reverse,
            SKIP_OUTERMOST=last is None,
            **self._shared(exact),
        )
        launch(
            _combine,
            (-(-a * z_dim // 1024) * cut.num_documents, heads),
            4,
            1,
            states=states,
            decays=decays,
            first=first,
            last=last,
            offsets=cut.offsets,
            PER_ROW=cut.per_row,
            H=heads,
            SIZE=a * z_dim,
            BLOCK=1024,
            REVERSE=reverse,
        )
        return states

    def block_states(self, y, z, *, reverse, first, last):
        """As `states`, of each block and in the dtype of products."""
        if not self.plan.is_cut and last is None:
            return first
        dtype = torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32
        shape = self.plan.num_segments, self.heads, y.shape[-1], z.shape[-1]
        states = torch.empty(shape, dtype=dtype, device=self.device)
        walk(
            self.walk_config,
            self.plan,
            y,
            z,
            states,
            decay=self.log_decay,
            first=first,
            last=last,
            reverse=reverse,
            **self._without_strict(),
        )
        return states

    def outputs(self, x, y, z, out, *, reverse, transposed, entering):
        """As `scan`, for rows of blocks."""
        table = BLOCKS[self.target] if overridden["blocks"] is True else dict(overridden["blocks"])
        config = table[max(256, padded(x.shape[-1]))]
        outputs(
            config,
            self.plan,
            x,
            y,
            z,
            out,
            decay=self.log_decay,
            entering=entering,
            reverse=reverse,
            transposed=transposed,
            **self._without_strict(),
        )

    def _without_strict(self):
        shared = self._shared() | {"PER_ROW": max(1, self.plan.per_row)}
        del shared["STRICT"]
        return shared


def forward(q, k, v, log_decay, bonus, initial_state, cu_seqlens, scale, output_final_state):
    """Raw forward pass on contiguous tensors of one dtype; no autograd.

    Returns:
        (o, final state or None, the state that enters each segment): the last one is None where
        every document is one segment.
    """
    in_blocks = goes_in_blocks(q, bonus)
    call = _Call(q, v, log_decay, bonus, cu_seqlens, scale, in_blocks)
    o = torch.empty_like(v)
    final = call.new_state() if output_final_state else None
    entering = None
    if in_blocks:
        states = call.block_states(k, v, reverse=False, first=initial_state, last=final)
        call.outputs(q, k, v, o, reverse=False, transposed=False, entering=states)
        return o, final, None
    if call.plan.is_cut:
        entering = call.states(k, v, reverse=False, first=initial_state, last=final)
        call.scan(q, k, v, o, reverse=False, transposed=False, entering=entering)
    else:
        ends = {"entering": initial_state, "leaving": final}
        call.scan(q, k, v, o, reverse=False, transposed=False, **ends)
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
    # Row sums for the gradient of a decay want factors that are not rounded: see `_Call.scan`.
    in_blocks = goes_in_blocks(q, bonus) and not decay_gradient
    call = _Call(q, v, log_decay, bonus, cu_seqlens, scale, in_blocks)
    dq, dk, dv = map(torch.empty_like, (q, k, v))
    dlog_decay = dbonus = None
    dinitial = call.new_state() if initial_gradient else None
    if in_blocks:
        # Made again: they are a quarter of what is held for the backward pass otherwise.
        ahead = call.block_states(k, v, reverse=False, first=initial_state, last=None)
        later = call.block_states(q, do, reverse=True, first=dfinal, last=dinitial)
        call.outputs(do, v, k, dq, reverse=False, transposed=True, entering=ahead)
        call.outputs(k, q, do, dv, reverse=True, transposed=False, entering=later)
        call.outputs(v, do, q, dk, reverse=True, transposed=True, entering=later)
        return dq, dk, dv, None, None, dinitial
    # The states again, from factors that are not rounded, where a gradient hangs on them.
    final = torch.empty_like(dfinal) if decay_gradient and dfinal is not None else None
    exact = {"exact": decay_gradient}
    left, right = dinitial, final
    if call.plan.is_cut:
        later = call.states(q, do, reverse=True, first=dfinal, last=dinitial, **exact)
        if decay_gradient:
            entering = call.states(k, v, reverse=False, first=initial_state, last=final, **exact)
        left = right = None
    else:
        entering, later = initial_state, dfinal
    if not decay_gradient and call.fits_at_once():
        states = {"entering": entering, "later": later, "leaving": left}
        call.scan_gradients(q, k, v, do, dq, dk, dv, **states)
        return dq, dk, dv, None, None, dinitial
    ahead = {"reverse": False, "entering": entering}
    back = {"reverse": True, "entering": later}
    weights = (q, k) if decay_gradient else (None, None)
    q_dot = call.scan(do, v, k, dq, transposed=True, leaving=right, weight=weights[0], **ahead)
    call.scan(k, q, do, dv, transposed=False, leaving=left, **back)
    k_dot = call.scan(v, do, q, dk, transposed=True, weight=weights[1], **back)
    if decay_gradient:
        dlog_decay = _decay_gradient(q_dot, k_dot, bonus, final, dfinal, cu_seqlens)
        if log_decay.ndim == 1:
            dlog_decay = dlog_decay.sum((0, 1))
        dlog_decay = dlog_decay.to(log_decay.dtype)
    if bonus is not None:
        read_BTH1 = (do.float() * v).sum(-1, keepdim=True) * scale
        dbonus = (read_BTH1 * q * k).sum((0, 1)).to(bonus.dtype)
    return dq, dk, dv, dlog_decay, dbonus, dinitial


def _decay_gradient(q_dot_BTH, k_dot_BTH, bonus, final, dfinal, cu_seqlens):
    """Gradient of each log decay [B, T, H]: q . dq - k . dk, over the document's later tokens.

    A read before the token (bonus) does not see the token's own decay. The final state is one more
    reader. In float64: many cancel.
    """
    reads_BTH = q_dot_BTH.double()
    change_BTH = reads_BTH - k_dot_BTH
    cum_BTH = change_BTH.cumsum(1)
    if cu_seqlens is None:
        end_BTH = cum_BTH[:, -1:]
    else:
        bounds = cu_seqlens.long()
        token_T = torch.arange(change_BTH.shape[1], device=bounds.device)
        document_T = torch.searchsorted(bounds, token_T, right=True) - 1
        end_BTH = cum_BTH[:, bounds[document_T + 1] - 1]
    gradient_BTH = end_BTH - cum_BTH + change_BTH
    if bonus is not None:
        gradient_BTH = gradient_BTH - reads_BTH
    if dfinal is not None:
        last_NH = (final.double() * dfinal).sum((-1, -2))
        last_BTH = last_NH[:, None] if cu_seqlens is None else last_NH[document_T][None]
        gradient_BTH = gradient_BTH + last_BTH
    return gradient_BTH.float()


def num_slices(q, v, log_decay, bonus):
    """Slices of V that the output is computed in."""
    decay = 0 if log_decay is None else 1 if log_decay.ndim == 1 else 2
    target, value_dim = target_of(q.device), v.shape[-1]
    config = _scan_config(target, q.dtype, q.shape[-1], value_dim, decay, bonus is not None)
    return -(-value_dim // config.slice)


def goes_in_blocks(q, bonus):
    """Whether there are two passes. None does unless it is chosen: no GPU has timed them yet."""
    chosen = overridden.get("blocks")
    is_compiled = q.dtype == torch.bfloat16 and target_of(q.device) in BLOCKS
    is_compiled |= chosen is not True
    return bool(chosen) and is_compiled and bonus is None


def num_kept(q, v, log_decay, bonus, cu_seqlens):
    """How many segments' states the forward pass returns."""
    if goes_in_blocks(q, bonus):
        return 0
    programs = q.shape[2] * num_slices(q, v, log_decay, bonus)
    return count_segments(q.shape[0], q.shape[1], programs, cu_seqlens, q.device)


linear_recurrence_triton, _forward_operator, _backward_operator, PASSES = make_operator(
    __name__, forward, backward, num_kept
)


def linear_recurrence_step(
    q, k, v, log_decay=None, *, bonus=None, scale=1.0, state=None, in_place=False
):
    """One token for each row in a single launch, for decoding; no gradients.

    Args:
        q, k: [B, 1, H, K]; v: [B, 1, H, V].
        log_decay: None, [H], [B, 1, H] or [B, 1, H, K].
        bonus, scale: as in `linear_recurrence`.
        state: [B, H, K, V] float32, contiguous; None is zero.
        in_place: whether the new state replaces `state`, which a captured CUDA graph needs.

    Returns:
        (o [B, 1, H, V], the state after the token).

    Raises:
        ValueError: `in_place` without a contiguous float32 state to replace.
    """
    inputs = (x.contiguous() for x in (q, k, v))
    log_decay, bonus = (None if x is None else narrow(x) for x in (log_decay, bonus))
    if not in_place:
        state = None if state is None else state.float().contiguous()
        run = _step_operator if is_traced(q) else _run_step
        return run(*inputs, log_decay, bonus, state, float(scale))
    check_replaceable("linear_recurrence_step", state)
    return _run_step(*inputs, log_decay, bonus, state, float(scale), state)


def _run_step(q, k, v, log_decay, bonus, before, scale, after=None):
    batch, _, heads, key_dim = q.shape
    value_dim = v.shape[-1]
    if after is None:
        after = q.new_empty((batch, heads, key_dim, value_dim), dtype=torch.float32)
    o = torch.empty_like(v)
    block_k = padded(key_dim)
    # A tile of the state that fits into the registers of four warps.
    slice = min(padded(value_dim), max(16, 4096 // block_k))
    forms = {0: 0, 1: 1, 3: 2, 4: 3}
    launch(
        _step,
        (batch * -(-value_dim // slice), heads),
        4,
        1,
        q=q,
        k=k,
        v=v,
        o=o,
        decay=log_decay,
        bonus=bonus,
        before=before,
        after=after,
        scale=scale,
        H=heads,
        K=key_dim,
        V=value_dim,
        BLOCK_K=block_k,
        BV=slice,
        DECAY=forms[0 if log_decay is None else log_decay.ndim],
    )
    return o, after


@torch.library.custom_op(f"{operator_namespace(__name__)}::step", mutates_args=())
def _step_operator(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | None,
    bonus: torch.Tensor | None,
    state: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _run_step(q, k, v, log_decay, bonus, state, scale)


@_step_operator.register_fake
def _(q, k, v, log_decay, bonus, state, scale):
    after = q.new_empty((q.shape[0], q.shape[2], q.shape[3], v.shape[3]), dtype=torch.float32)
    return torch.empty_like(v), after
