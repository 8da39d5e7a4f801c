"""The states that enter each block of tokens, by a walk over whole documents.

The first of the two passes of linear_recurrence_blocks_triton.py. A program owns a tile of the
state and nothing else, so the tile can be larger than where outputs are computed on the way.
"""

from typing import NamedTuple

try:  # transformers asks for every library that code from the Hub imports, but in a try
    import triton
    import triton.language as tl
except ImportError:
    raise

from .chunk_decays_triton import chunk_decays
from .launch_triton import dot_add, launch, padded, rounded
from .segments_triton import segment_bounds


class Walk(NamedTuple):
    """The same of `_walk`: a tile of the state has `tile` rows and columns; it reads `chunk` tokens
    at a time."""

    chunk: int
    tile: int
    num_warps: int
    num_stages: int


# Compiled without spills, never timed (kernels/bench/wide.py).
WALKS = {"sm_90": Walk(64, 128, 8, 3)}


@triton.jit
def _walk(
    y,
    z,
    decay,
    first,
    last,
    states,
    offsets,
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
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The state that enters each block of a document, for one head and a tile of the state.

    first, last: [documents, H, A, Z] float32, the state before a document (None: zero), and after
        it (None: not wanted). In reverse, before is after in time.
    states: [blocks, H, A, Z].
    offsets: [documents + 1] the first block of each document; None: PER_ROW each.
    """
    NUM_A: tl.constexpr = (A + BA - 1) // BA
    NUM_Z: tl.constexpr = (Z + BZ - 1) // BZ
    i = tl.program_id(0)
    h = tl.program_id(1)
    tile = i % (NUM_A * NUM_Z)
    n = (i // (NUM_A * NUM_Z)).to(tl.int64)
    if offsets is None:
        begin = n * PER_ROW
        blocks = tl.full([], PER_ROW, tl.int64)
    else:
        begin = tl.load(offsets + n)
        blocks = tl.load(offsets + n + 1) - begin
    ra = (tile // NUM_Z) * BA + tl.arange(0, BA)
    rz = (tile % NUM_Z) * BZ + tl.arange(0, BZ)
    in_a = ra < A
    in_z = rz < Z
    at_state = ra[:, None] * Z + rz[None, :]
    in_state = in_a[:, None] & in_z[None, :]
    if first is None:
        state = tl.zeros([BA, BZ], tl.float32)
    else:
        at = (n * H + h) * A * Z + at_state
        state = tl.load(first + at, mask=in_state, other=0.0).to(tl.float32)

    if blocks > 0:
        start, _ = segment_bounds(table, stride, begin, T, LENGTH, PER_ROW)
        _, end = segment_bounds(table, stride, begin + blocks - 1, T, LENGTH, PER_ROW)
        chunks = tl.cdiv(end - start, C)
        steps = chunks
        each = tl.cdiv(LENGTH, C)
        # The outermost block adds nothing that is read, unless the state after it is wanted.
        if last is None:
            steps = (blocks - 1) * each
            if REVERSE:
                steps = tl.maximum(chunks - each, 0)
        if REVERSE:
            block = begin + blocks - 1
        else:
            block = begin
        at = (block * H + h) * A * Z + at_state
        tl.store(states + at, rounded(state, states.dtype.element_ty), mask=in_state)
        r = tl.arange(0, C)
        for step in range(steps):
            if REVERSE:
                chunk = chunks - 1 - step
            else:
                chunk = step
            t = start + chunk * C
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
                    keep = tl.exp2(cum) * scale
                else:
                    keep = tl.exp2(total - cum)
                bz = rounded(bz * keep[:, None], COMPUTE)
                state *= tl.exp2(total)
            elif REVERSE:
                bz = rounded(bz.to(tl.float32) * scale, COMPUTE)
            state = dot_add(tl.trans(by), bz, state, PRECISION)
            if REVERSE:
                is_whole = (chunk % each == 0) & (chunk > 0)
                block = begin + chunk // each - 1
            else:
                is_whole = ((step + 1) % each == 0) & ((step + 1) // each < blocks)
                block = begin + (step + 1) // each
            at = (block * H + h) * A * Z + at_state
            value = rounded(state, states.dtype.element_ty)
            tl.store(states + at, value, mask=in_state & is_whole)
    if last is not None:
        tl.store(last + (n * H + h) * A * Z + at_state, state, mask=in_state)


def walk(config, plan, y, z, states, *, first, last, reverse, **shared):
    """Fills `states`, and `last` if it is given.

    Args:
        config: `Walk`.
        plan: `Plan` (segments_triton.py) whose segments are the blocks; of several, their length is
            a multiple of config.chunk.
        y, z: [B, T, H, A] and [B, T, H, Z], contiguous.
        states: [blocks, H, A, Z].
        first, last, reverse: as of `_walk`.
        shared: its other arguments.
    """
    heads, a, z_dim = y.shape[2], y.shape[-1], z.shape[-1]
    block_a, block_z = (min(config.tile, padded(size)) for size in (a, z_dim))
    tiles = -(-a // block_a) * -(-z_dim // block_z)
    launch(
        _walk,
        (tiles * plan.num_documents, heads),
        config.num_warps,
        config.num_stages,
        y=y,
        z=z,
        first=first,
        last=last,
        states=states,
        offsets=plan.offsets,
        A=a,
        Z=z_dim,
        C=config.chunk,
        BA=block_a,
        BZ=block_z,
        REVERSE=reverse,
        **shared,
    )
