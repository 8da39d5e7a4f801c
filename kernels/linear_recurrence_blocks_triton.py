"""The linear recurrence in two passes, for states that no program can hold beside its tiles.

With K and V of 256 and more, a program of `_scan` (linear_recurrence_triton.py) holds 32 columns of
the state, so that 8 or 16 of them read the same x and y and compute the same scores. Here the walk
over a document makes states alone: `_walk` writes the state that enters each block of tokens, in
tiles as large as registers allow. Then no block waits for another: `_outputs` owns some rows of a
block, and computes, in the notation of that file,

    out_i = exp(c_i) x_i . S + sum_{j <= i} exp(c_i - c_j) (x_i . y_j) z_j

with S the state that enters the block and c, i and j its own. The length of a block weighs states
in memory, each written and read once, against scores. States are rounded as products want them:
`_scan` rounds them there too.
"""

from typing import NamedTuple

try:  # transformers asks for every library that code from the Hub imports, but in a try
    import triton
    import triton.language as tl
except ImportError:
    raise

from .chunk_decays_triton import LOWEST
from .launch_triton import dot, dot_add, launch, log2_of_decay, padded, rounded
from .segments_triton import segment_bounds

# Tokens of a block.
BLOCK_LENGTH = 256


class Blocks(NamedTuple):
    """How `_outputs` is cut and compiled.

    Attributes:
        rows: of x that a program owns; a multiple of `keys`.
        keys: rows of y and z that it reads at a time.
        slice: columns of z.
        channels: rows of a state that it reads at a time.
        num_warps, num_stages: as Triton means them.
    """

    rows: int
    keys: int
    slice: int
    channels: int
    num_warps: int
    num_stages: int


# For padded A of 256 and 512: compiled without spills, never timed (kernels/bench/wide.py).
BLOCKS = {
    "sm_90": {256: Blocks(128, 64, 128, 64, 8, 2), 512: Blocks(128, 32, 128, 64, 8, 2)},
}


@triton.jit
def _outputs(
    x,
    y,
    z,
    out,
    decay,
    entering,
    table,
    stride,
    scale,
    T,
    LENGTH,
    PER_ROW,
    TILES,
    H: tl.constexpr,
    A: tl.constexpr,
    Z: tl.constexpr,
    BLOCK_A: tl.constexpr,
    SPAN: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    BA: tl.constexpr,
    BZ: tl.constexpr,
    DECAY: tl.constexpr,
    REVERSE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out of the module docstring for R rows of a block, one head and slice of Z.

    x, y: [tokens, H, A]; z, out: [tokens, H, Z]; decay, scale: as of `_scan`.
    entering: [blocks, H, A, Z] or None; TRANSPOSED: [blocks, H, Z, A].
    TILES: of R rows, in a block. SPAN: LENGTH or more, a power of two.
    """
    NUM_SLICES: tl.constexpr = (Z + BZ - 1) // BZ
    i = tl.program_id(0)
    h = tl.program_id(1)
    slice = i % NUM_SLICES
    first = ((i // NUM_SLICES) % TILES) * R
    s = (i // NUM_SLICES // TILES).to(tl.int64)
    start, end = segment_bounds(table, stride, s, T, LENGTH, PER_ROW)
    count = (end - start).to(tl.int32)
    if first >= count:
        return

    row = first + tl.arange(0, R)
    token = start + row
    inside = row < count
    rz = slice * BZ + tl.arange(0, BZ)
    in_z = rz < Z
    # Logs of what the state that enters has decayed by at each row.
    if DECAY == 1:
        own = log2_of_decay(tl.load(decay + h), LOWEST)
        if REVERSE:
            passed = own * (count - row - 1).to(tl.float32)
        else:
            passed = own * (row + 1).to(tl.float32)
    if DECAY == 2:
        gate_R = tl.load(decay + token * H + h, mask=inside, other=0.0)
        gate_R = log2_of_decay(gate_R, LOWEST)
        span = tl.arange(0, SPAN)
        gates = tl.load(decay + (start + span) * H + h, mask=span < count, other=0.0)
        gates = log2_of_decay(gates, LOWEST)
        passed = tl.cumsum(gate_R, 0)
        if REVERSE:
            # Sums of what is never positive: the least is all, to the last digit.
            passed = tl.min(passed, 0) - passed
            passed += tl.sum(tl.where(span >= first + R, gates, 0.0), 0)
        else:
            passed += tl.sum(tl.where(span < first, gates, 0.0), 0)

    result = tl.zeros([R, BZ], tl.float32)
    if entering is not None:
        for a in range(0, A, BA):
            ra = a + tl.arange(0, BA)
            if A % BA == 0:
                mask_a = inside[:, None]
            else:
                mask_a = inside[:, None] & (ra < A)[None, :]
            if TRANSPOSED:
                at_state = (s * H + h) * A * Z + rz[None, :] * A + ra[:, None]
            else:
                at_state = (s * H + h) * A * Z + ra[:, None] * Z + rz[None, :]
            in_state = (ra < A)[:, None] & in_z[None, :]
            at_x = (token * H + h)[:, None] * A + ra[None, :]
            bx = tl.load(x + at_x, mask=mask_a, other=0.0).to(COMPUTE)
            state = tl.load(entering + at_state, mask=in_state, other=0.0)
            result = dot_add(bx, rounded(state, COMPUTE), result, PRECISION)
        if DECAY > 0:
            result *= tl.exp2(passed)[:, None]

    ra = tl.arange(0, BLOCK_A)
    in_a = ra < A
    at_x = (token * H + h)[:, None] * A + ra[None, :]
    if A == BLOCK_A:
        mask_x = inside[:, None]
    else:
        mask_x = inside[:, None] & in_a[None, :]
    bx = tl.load(x + at_x, mask=mask_x, other=0.0).to(COMPUTE)
    r = tl.arange(0, C)
    if REVERSE:
        low, high = first // C, tl.cdiv(count, C)
    else:
        low, high = 0, tl.cdiv(tl.minimum(first + R, count), C)
    for n in range(low, high):
        key = n * C + r
        other = start + key
        is_key = key < count
        if A == BLOCK_A:
            mask_y = is_key[:, None]
        else:
            mask_y = is_key[:, None] & in_a[None, :]
        if Z % BZ == 0:
            mask_z = is_key[:, None]
        else:
            mask_z = is_key[:, None] & in_z[None, :]
        at_y = (other * H + h)[:, None] * A + ra[None, :]
        at_z = (other * H + h)[:, None] * Z + rz[None, :]
        by = tl.load(y + at_y, mask=mask_y, other=0.0).to(COMPUTE)
        bz = tl.load(z + at_z, mask=mask_z, other=0.0).to(COMPUTE)
        scores = dot(bx, tl.trans(by), PRECISION)
        if REVERSE:
            visible = row[:, None] <= key[None, :]
        else:
            visible = row[:, None] >= key[None, :]
        if DECAY == 0:
            scores = tl.where(visible, scores, 0.0)
        else:
            if DECAY == 1:
                exponent = own * tl.abs(row[:, None] - key[None, :]).to(tl.float32)
            else:
                # Rows and keys from where both begin, so that close ones differ by short sums.
                gate_C = tl.load(decay + other * H + h, mask=is_key, other=0.0)
                to_key = tl.cumsum(log2_of_decay(gate_C, LOWEST), 0)
                from_here = tl.where(row >= n * C, gate_R, 0.0)
                to_row = tl.cumsum(from_here, 0)
                if REVERSE:
                    before = gate_R - from_here
                    rest = tl.cumsum(before, 0)
                    rest = tl.min(rest, 0) - rest
                    between = tl.where((span >= first + R) & (span < n * C), gates, 0.0)
                    to_key += tl.sum(between, 0)
                    to_row = tl.where(row < n * C, rest, -to_row)
                    exponent = to_row[:, None] + to_key[None, :]
                else:
                    between = tl.where((span >= n * C) & (span < first), gates, 0.0)
                    to_key -= tl.sum(between, 0)
                    exponent = to_row[:, None] - to_key[None, :]
            scores *= tl.exp2(tl.where(visible, exponent, float("-inf")))
        if REVERSE:
            scores *= scale
        result = dot_add(rounded(scores, COMPUTE), bz, result, PRECISION)
    if not REVERSE:
        result *= scale
    at_out = (token * H + h)[:, None] * Z + rz[None, :]
    mask_out = inside[:, None] & in_z[None, :]
    tl.store(out + at_out, rounded(result, out.dtype.element_ty), mask=mask_out)


def outputs(config, plan, x, y, z, out, *, entering, reverse, transposed, **shared):
    """Fills `out`.

    Args:
        config: `Blocks`.
        plan: `Plan` (segments_triton.py) whose segments are the blocks.
        x, y, z, out, entering, transposed: as of `_outputs`, contiguous.
        shared: its other arguments.
    """
    heads, a, z_dim = x.shape[2], x.shape[-1], z.shape[-1]
    width = min(config.slice, padded(z_dim))
    tiles = -(-plan.length // config.rows)
    launch(
        _outputs,
        (-(-z_dim // width) * tiles * plan.num_segments, heads),
        config.num_warps,
        config.num_stages,
        x=x,
        y=y,
        z=z,
        out=out,
        entering=entering,
        TILES=tiles,
        A=a,
        Z=z_dim,
        BLOCK_A=padded(a),
        SPAN=padded(plan.length),
        R=config.rows,
        C=config.keys,
        BA=min(config.channels, padded(a)),
        BZ=width,
        REVERSE=reverse,
        TRANSPOSED=transposed,
        **shared,
    )
