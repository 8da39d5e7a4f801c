"""Triton kernels of `wkv4`: a scan over time on two levels, channel by channel.

Nothing here is a matrix product; memory is what limits it. A program owns a tile of one document's
tokens in a slice of channels and walks it with the state in registers; a batch has too few channels
to fill a device with whole documents. Forward, with T tokens cut into tiles of L:

    _tile_sums        each tile's sums from an empty state                   reads k, v
    _entering         document by document over its tiles: the state which
                      enters each, and the final one                         12 D T / L bytes, twice
    _outputs          each tile from the state that enters it                reads k, v, writes y

and backward, with p and q the gradients of the sums (below):

    _tile_gradients   what each tile adds to p and q; its state every
                      CHUNK tokens                                           reads k, v, dy
    _leaving          backwards over a document's tiles: the p and q that
                      reach the end of each, and the initial state's         12 D T / L bytes, twice
    _gradients        each tile, backwards                                   reads k, v, dy, writes
                                                                             dk, dv

In 2-byte dtypes that is 10 bytes per token and channel forward (the least is 6) and 18 backward
(the least is 10), beside the tiles' states. Rows that are no longer than a tile take a single
launch forward, at the least number of bytes.

Forward, the state is (num, den, max) as in `wkv4`. Backwards it is the average so far x = num/den
and the log of the sum of weights l = max + log den. With s_t = sigmoid(u + k_t - l) and
r_t = sigmoid(k_t - w - l), the weights of a token in its own output and in the next average,
    p = (1 - r_t) p' + (1 - s_t) dy_t      q = (1 - r_t) q' - (1 - s_t) dy_t y_t
are the gradients of e^l x and of e^l, times e^l.
"""

from typing import NamedTuple

import torch

try:  # transformers asks for every library that code from the Hub imports, but in a try
    import triton
    import triton.language as tl
except ImportError:
    raise

from .launch_triton import (
    LOG2E,
    Config,
    check_replaceable,
    launch,
    num_processors,
    operator_namespace,
    target_of,
)
from .operator_triton import is_traced
from .ready_triton import Passes, Ready
from .segments_triton import segment_bounds, segment_table

# The max of a state that has seen nothing, as in wkv4.py.
EMPTY_MAX = tl.constexpr(-1e38)

# The loads of `chunk` tokens are under way at once; a row of a program's slice is a line of 128
# bytes in 2-byte dtypes. A thread has two channels: `_gradients` holds a whole chunk of each in
# registers, and wider loads would take more of those than there are.
_CONFIGS = {
    "sm_80": Config(chunk=8, slice=64, num_warps=1, num_stages=1),
    "sm_90": Config(chunk=8, slice=64, num_warps=1, num_stages=1),
    "sm_100": Config(chunk=8, slice=64, num_warps=1, num_stages=1),
    "gfx942": Config(chunk=8, slice=128, num_warps=1, num_stages=1),
}
# Programs to aim at for each processor, in tiles of at least as many tokens.
_PROGRAMS = 32
_SHORTEST_TILE = 32


@triton.jit
def _key(k, at, inside, is_token):
    """A row of keys; of no weight past the end of the tile."""
    key = tl.load(k + at, mask=inside & is_token, other=0.0).to(tl.float32)
    return tl.where(is_token, key, float("-inf"))


@triton.jit
def _row(x, at, inside, is_token):
    return tl.load(x + at, mask=inside & is_token, other=0.0).to(tl.float32)


@triton.jit
def _weights_now(top, u, key):
    """(of the past, of the token) in an output, in units of the larger one."""
    bonus = u + key
    factor = tl.exp2(-tl.abs(top - bonus) * LOG2E)
    return tl.where(bonus > top, factor, 1.0), tl.where(bonus > top, 1.0, factor)


@triton.jit
def _weights_next(top, w, key):
    """(of the past, of the token, max) in the next state."""
    decayed = top + w
    new = tl.maximum(decayed, key)
    # The rounding of the sum above: with a decay near 1 it could outweigh the decay itself.
    rest = (top - new) + w
    factor = tl.exp2(tl.where(key > decayed, rest, key - new) * LOG2E)
    past = tl.where(key > decayed, factor, 1.0 + rest)
    now = tl.where(key > decayed, 1.0, factor)
    return past, now, new


@triton.jit
def _mean_and_log(num, den, top):
    """The average and the log of the sum of weights; 0 and EMPTY_MAX if there is none."""
    some = den > 0
    mean = tl.where(some, num / tl.where(some, den, 1.0), 0.0)
    return mean, tl.where(some, top + tl.log(tl.where(some, den, 1.0)), EMPTY_MAX)


@triton.jit
def _load_state(states, n, channel, inside, D: tl.constexpr):
    """(num, den, max) of [N, 3, D]; without weight, max is EMPTY_MAX."""
    at = states + n * 3 * D + channel
    num = tl.load(at, mask=inside, other=0.0)
    den = tl.load(at + D, mask=inside, other=0.0)
    top = tl.load(at + 2 * D, mask=inside, other=0.0)
    return num, den, tl.where(den > 0, top, EMPTY_MAX)


@triton.jit
def _store_three(states, n, channel, inside, D: tl.constexpr, first, second, third):
    at = states + n * 3 * D + channel
    tl.store(at, first, mask=inside)
    tl.store(at + D, second, mask=inside)
    tl.store(at + 2 * D, third, mask=inside)


@triton.jit
def _program(D: tl.constexpr, SLICE: tl.constexpr):
    """(tile or document, channels, which of them there are) of a program, in int64."""
    SLICES: tl.constexpr = (D + SLICE - 1) // SLICE
    i = tl.program_id(0)
    channel = (i % SLICES).to(tl.int64) * SLICE + tl.arange(0, SLICE)
    if D % SLICE == 0:
        inside = tl.full([SLICE], True, tl.int1)
    else:
        inside = channel < D
    return (i // SLICES).to(tl.int64), channel, inside


@triton.jit
def _tiles_of(offsets, n, PER_ROW):
    """The first tile of document n, and the end of its tiles."""
    if offsets is None:
        first = n * PER_ROW
        end = first + PER_ROW
    else:
        first = tl.load(offsets + n)
        end = tl.load(offsets + n + 1)
    return first, end


@triton.jit
def _tile_sums(
    w,
    k,
    v,
    sums,
    table,
    stride,
    T,
    LENGTH,
    PER_ROW,
    D: tl.constexpr,
    SLICE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """sums [tiles, 3, D]: (num, den, max) of each tile from an empty state. k, v: [tokens, D]."""
    tile, channel, inside = _program(D, SLICE)
    start, end = segment_bounds(table, stride, tile, T, LENGTH, PER_ROW)
    decay = tl.load(w + channel, mask=inside, other=0.0).to(tl.float32)
    num = tl.zeros([SLICE], tl.float32)
    den = tl.zeros([SLICE], tl.float32)
    top = tl.full([SLICE], EMPTY_MAX, tl.float32)
    for first in range(start, end, CHUNK):
        count = (end - first).to(tl.int32)
        origin = first * D + channel
        keys = ()
        values = ()
        for i in tl.static_range(CHUNK):
            at = origin + i * D
            keys = keys + (_key(k, at, inside, i < count),)
            values = values + (_row(v, at, inside, i < count),)
        for i in tl.static_range(CHUNK):
            step = tl.where(i < count, decay, 0.0)
            past, now, top = _weights_next(top, step, keys[i])
            num = past * num + now * values[i]
            den = past * den + now
    _store_three(sums, tile, channel, inside, D, num, den, top)


@triton.jit
def _entering(
    w,
    initial,
    sums,
    final,
    table,
    offsets,
    stride,
    T,
    LENGTH,
    PER_ROW,
    D: tl.constexpr,
    SLICE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One document's states: in place of each tile's sums what enters it; and the final one.

    sums: [tiles, 3, D]; initial, final: [N, 3, D].
    """
    n, channel, inside = _program(D, SLICE)
    first_tile, end_tile = _tiles_of(offsets, n, PER_ROW)
    decay = tl.load(w + channel, mask=inside, other=0.0).to(tl.float32)
    if initial is None:
        num = tl.zeros([SLICE], tl.float32)
        den = tl.zeros([SLICE], tl.float32)
        top = tl.full([SLICE], EMPTY_MAX, tl.float32)
    else:
        num, den, top = _load_state(initial, n, channel, inside, D)
    for first in range(first_tile, end_tile, CHUNK):
        nums = ()
        dens = ()
        tops = ()
        decays = ()
        for i in tl.static_range(CHUNK):
            # Past the last tile, the last one again; not taken in below.
            tile = tl.minimum(first + i, end_tile - 1)
            start, end = segment_bounds(table, stride, tile, T, LENGTH, PER_ROW)
            tile_num, tile_den, tile_top = _load_state(sums, tile, channel, inside, D)
            nums = nums + (tile_num,)
            dens = dens + (tile_den,)
            tops = tops + (tile_top,)
            decays = decays + (decay * (end - start).to(tl.float32),)
        count = (end_tile - first).to(tl.int32)
        for i in tl.static_range(CHUNK):
            is_tile = i < count
            _store_three(sums, first + i, channel, inside & is_tile, D, num, den, top)
            past, now, new = _weights_next(top, decays[i], tops[i])
            num = tl.where(is_tile, past * num + now * nums[i], num)
            den = tl.where(is_tile, past * den + now * dens[i], den)
            top = tl.where(is_tile, new, top)
    if initial is not None:
        # A document without tokens leaves its state as it was, whatever its units.
        if end_tile == first_tile:
            top = tl.load(initial + (n * 3 + 2) * D + channel, mask=inside, other=0.0)
    _store_three(final, n, channel, inside, D, num, den, top)


@triton.jit
def _outputs(
    w,
    u,
    k,
    v,
    y,
    initial,
    entering,
    final,
    table,
    stride,
    T,
    LENGTH,
    PER_ROW,
    D: tl.constexpr,
    SLICE: tl.constexpr,
    CHUNK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """y [tokens, D] of a tile, from the state that enters it [tiles, 3, D].

    WHOLE: tiles are documents; their states enter from `initial` [N, 3, D] or None and leave to
    `final`, and `entering` is written.
    """
    tile, channel, inside = _program(D, SLICE)
    start, end = segment_bounds(table, stride, tile, T, LENGTH, PER_ROW)
    decay = tl.load(w + channel, mask=inside, other=0.0).to(tl.float32)
    bonus = tl.load(u + channel, mask=inside, other=0.0).to(tl.float32)
    if not WHOLE:
        num, den, top = _load_state(entering, tile, channel, inside, D)
    else:
        if initial is None:
            num = tl.zeros([SLICE], tl.float32)
            den = tl.zeros([SLICE], tl.float32)
            top = tl.full([SLICE], EMPTY_MAX, tl.float32)
        else:
            num, den, top = _load_state(initial, tile, channel, inside, D)
        _store_three(entering, tile, channel, inside, D, num, den, top)
    for first in range(start, end, CHUNK):
        count = (end - first).to(tl.int32)
        origin = first * D + channel
        keys = ()
        values = ()
        for i in tl.static_range(CHUNK):
            at = origin + i * D
            keys = keys + (_key(k, at, inside, i < count),)
            values = values + (_row(v, at, inside, i < count),)
        for i in tl.static_range(CHUNK):
            is_token = i < count
            past, now = _weights_now(top, bonus, keys[i])
            out = (past * num + now * values[i]) / (past * den + now)
            at = origin + i * D
            tl.store(y + at, out.to(y.dtype.element_ty), mask=inside & is_token)
            step = tl.where(is_token, decay, 0.0)
            past, now, top = _weights_next(top, step, keys[i])
            num = past * num + now * values[i]
            den = past * den + now
    if WHOLE:
        _store_three(final, tile, channel, inside, D, num, den, top)


@triton.jit
def _tile_gradients(
    w,
    u,
    k,
    v,
    dy,
    entering,
    parts,
    chunk_states,
    table,
    stride,
    T,
    LENGTH,
    PER_ROW,
    D: tl.constexpr,
    SLICE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """What a tile adds to p and q of the module docstring, and the state every CHUNK tokens.

    parts: [tiles, 3, D]: p and q at the tile's start if they are 0 at its end, and the factor on
        those at its end.
    chunk_states: [chunks, 2, D]: average and log of the sum of weights. A tile's chunks begin at
        start // CHUNK + tile, so that no two tiles share one wherever they start.
    """
    tile, channel, inside = _program(D, SLICE)
    start, end = segment_bounds(table, stride, tile, T, LENGTH, PER_ROW)
    decay = tl.load(w + channel, mask=inside, other=0.0).to(tl.float32)
    bonus = tl.load(u + channel, mask=inside, other=0.0).to(tl.float32)
    num, den, top = _load_state(entering, tile, channel, inside, D)
    num, top = _mean_and_log(num, den, top)
    den = tl.full([SLICE], 1.0, tl.float32)
    # What is left of the entering sums, in units of e^max; they are 1 at first.
    left = den
    p = tl.zeros([SLICE], tl.float32)
    q = tl.zeros([SLICE], tl.float32)
    slot = start // CHUNK + tile
    for first in range(start, end, CHUNK):
        state = chunk_states + slot * 2 * D + channel
        tl.store(state, num / den, mask=inside)
        tl.store(state + D, top + tl.log(den), mask=inside)
        slot += 1
        count = (end - first).to(tl.int32)
        origin = first * D + channel
        keys = ()
        values = ()
        grads = ()
        for i in tl.static_range(CHUNK):
            at = origin + i * D
            keys = keys + (_key(k, at, inside, i < count),)
            values = values + (_row(v, at, inside, i < count),)
            grads = grads + (_row(dy, at, inside, i < count),)
        for i in tl.static_range(CHUNK):
            past, now = _weights_now(top, bonus, keys[i])
            unit = 1.0 / (past * den + now)
            out = (past * num + now * values[i]) * unit
            dpast = left * past * unit * grads[i]
            p += dpast
            q -= dpast * out
            step = tl.where(i < count, decay, 0.0)
            past, now, top = _weights_next(top, step, keys[i])
            num = past * num + now * values[i]
            den = past * den + now
            left *= past
    _store_three(parts, tile, channel, inside, D, p, q, left / den)


@triton.jit
def _leaving(
    initial,
    final,
    dfinal,
    parts,
    dinitial,
    offsets,
    PER_ROW,
    D: tl.constexpr,
    SLICE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One document's p and q: in place of each tile's parts what reaches its end; and dinitial.

    initial, final and their gradients: [N, 3, D]; dfinal may be None; without initial there is no
    dinitial. The max of a final state is a constant, that of an initial state is not.
    """
    n, channel, inside = _program(D, SLICE)
    first_tile, end_tile = _tiles_of(offsets, n, PER_ROW)
    at = n * 3 * D + channel
    dnum = tl.zeros([SLICE], tl.float32)
    dden = tl.zeros([SLICE], tl.float32)
    den = tl.load(final + at + D, mask=inside, other=0.0)
    if dfinal is not None:
        dnum = tl.load(dfinal + at, mask=inside, other=0.0)
        dden = tl.load(dfinal + at + D, mask=inside, other=0.0)
    p = dnum * den
    q = dden * den
    for first in range(0, end_tile - first_tile, CHUNK):
        last = end_tile - 1 - first
        count = (end_tile - first_tile - first).to(tl.int32)
        ps = ()
        qs = ()
        keeps = ()
        for i in tl.static_range(CHUNK):
            at_tile = parts + tl.maximum(last - i, first_tile) * 3 * D + channel
            ps = ps + (tl.load(at_tile, mask=inside, other=0.0),)
            qs = qs + (tl.load(at_tile + D, mask=inside, other=0.0),)
            keeps = keeps + (tl.load(at_tile + 2 * D, mask=inside, other=0.0),)
        for i in tl.static_range(CHUNK):
            is_tile = i < count
            at_tile = parts + (last - i) * 3 * D + channel
            tl.store(at_tile, p, mask=inside & is_tile)
            tl.store(at_tile + D, q, mask=inside & is_tile)
            p = tl.where(is_tile, ps[i] + keeps[i] * p, p)
            q = tl.where(is_tile, qs[i] + keeps[i] * q, q)
    if initial is not None:
        num = tl.load(initial + at, mask=inside, other=0.0)
        den = tl.load(initial + at + D, mask=inside, other=0.0)
        some = den > 0
        unit = tl.where(some, 1.0 / tl.where(some, den, 1.0), 0.0)
        is_empty = end_tile == first_tile
        _store_three(
            dinitial,
            n,
            channel,
            inside,
            D,
            tl.where(is_empty, dnum, p * unit),
            tl.where(is_empty, dden, q * unit),
            tl.where(is_empty, 0.0, p * num * unit + q),
        )


@triton.jit
def _gradients(
    w,
    u,
    k,
    v,
    dy,
    leaving,
    chunk_states,
    dk,
    dv,
    dw,
    du,
    table,
    stride,
    T,
    LENGTH,
    PER_ROW,
    D: tl.constexpr,
    SLICE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """dk, dv [tokens, D] of a tile, and its share of dw, du [tiles, D].

    leaving: [tiles, 3, D]: p and q at the end of each tile, and what is not read.
    chunk_states: as in `_tile_gradients`.
    """
    tile, channel, inside = _program(D, SLICE)
    start, end = segment_bounds(table, stride, tile, T, LENGTH, PER_ROW)
    decay = tl.load(w + channel, mask=inside, other=0.0).to(tl.float32)
    bonus = tl.load(u + channel, mask=inside, other=0.0).to(tl.float32)
    arriving = leaving + tile * 3 * D + channel
    p = tl.load(arriving, mask=inside, other=0.0)
    q = tl.load(arriving + D, mask=inside, other=0.0)
    dw_sum = tl.zeros([SLICE], tl.float32)
    du_sum = tl.zeros([SLICE], tl.float32)
    num_chunks = tl.cdiv(end - start, CHUNK)
    for n in range(num_chunks):
        chunk = num_chunks - 1 - n
        first = start + chunk * CHUNK
        count = (end - first).to(tl.int32)
        origin = first * D + channel
        state = chunk_states + (start // CHUNK + tile + chunk) * 2 * D + channel
        mean = tl.load(state, mask=inside, other=0.0)
        top = tl.load(state + D, mask=inside, other=0.0)
        den = tl.full([SLICE], 1.0, tl.float32)
        keys = ()
        values = ()
        grads = ()
        for i in tl.static_range(CHUNK):
            at = origin + i * D
            keys = keys + (_key(k, at, inside, i < count),)
            values = values + (_row(v, at, inside, i < count),)
            grads = grads + (_row(dy, at, inside, i < count),)
        means = ()
        shares = ()
        writes = ()
        for i in tl.static_range(CHUNK):
            means = means + (mean,)
            past, now = _weights_now(top, bonus, keys[i])
            shares = shares + (now / (past * den + now),)
            step = tl.where(i < count, decay, 0.0)
            past, now, top = _weights_next(top, step, keys[i])
            den = past * den + now
            write = now / den
            writes = writes + (write,)
            mean += write * (values[i] - mean)
        for i in tl.static_range(CHUNK - 1, -1, -1):
            is_token = i < count
            out = means[i] + shares[i] * (values[i] - means[i])
            dnow = shares[i] * grads[i]
            dpast = grads[i] - dnow
            dkey = dnow * (values[i] - out)
            du_sum += dkey
            at = origin + i * D
            dvalue = dnow + writes[i] * p
            tl.store(dv + at, dvalue.to(dv.dtype.element_ty), mask=inside & is_token)
            dkey += writes[i] * (p * values[i] + q)
            tl.store(dk + at, dkey.to(dk.dtype.element_ty), mask=inside & is_token)
            p -= writes[i] * p
            q -= writes[i] * q
            dw_sum += tl.where(is_token, p * means[i] + q, 0.0)
            p += dpast
            q -= dpast * out
    tl.store(dw + tile * D + channel, dw_sum, mask=inside)
    tl.store(du + tile * D + channel, du_sum, mask=inside)


@triton.jit
def _step(w, u, k, v, y, before, after, D: tl.constexpr, SLICE: tl.constexpr):
    """One token of each row: y [B, D]; states before and after it [B, 3, D], or before is None."""
    n, channel, inside = _program(D, SLICE)
    decay = tl.load(w + channel, mask=inside, other=0.0).to(tl.float32)
    bonus = tl.load(u + channel, mask=inside, other=0.0).to(tl.float32)
    at = n * D + channel
    key = tl.load(k + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(v + at, mask=inside, other=0.0).to(tl.float32)
    if before is None:
        num = tl.zeros([SLICE], tl.float32)
        den = tl.zeros([SLICE], tl.float32)
        top = tl.full([SLICE], EMPTY_MAX, tl.float32)
    else:
        num, den, top = _load_state(before, n, channel, inside, D)
    past, now = _weights_now(top, bonus, key)
    out = (past * num + now * value) / (past * den + now)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)
    past, now, top = _weights_next(top, decay, key)
    num = past * num + now * value
    den = past * den + now
    _store_three(after, n, channel, inside, D, num, den, top)


class _Tiles(NamedTuple):
    """How the tokens of a call are cut, and the arguments which say so to every kernel.

    Attributes:
        config: how the kernels are cut and compiled.
        count: tiles; with `cu_seqlens` an upper bound, the rest are empty.
        documents: N.
        whole: whether each document is one tile.
        arguments: of kernels that walk tiles.
        offsets: [N + 1] the first tile of each document, or None: PER_ROW of them.
    """

    config: Config
    count: int
    documents: int
    whole: bool
    arguments: dict
    offsets: torch.Tensor | None

    def launch(self, kernel, programs, **arguments):
        """Runs a kernel for `programs` tiles or documents, in all slices of channels."""
        config = self.config
        launch(
            kernel,
            (programs * -(-arguments["D"] // config.slice),),
            config.num_warps,
            config.num_stages,
            **arguments,
            SLICE=config.slice,
            CHUNK=config.chunk,
        )


def _tile_length(config, k):
    """Tokens per tile, so that there are enough programs: from shapes alone."""
    batch, time, width = k.shape
    programs = _PROGRAMS * num_processors(k.device) // -(-width // config.slice)
    length = -(-batch * time // max(1, programs))
    return max(_SHORTEST_TILE, -(-length // config.chunk) * config.chunk)


def _count_tiles(config, k, cu_seqlens):
    """(tiles, whether each document is one, documents)."""
    batch, time, _ = k.shape
    length = _tile_length(config, k)
    if cu_seqlens is None:
        per_row = -(-time // length)
        return batch * per_row, per_row == 1, batch
    documents = len(cu_seqlens) - 1
    return time // length + documents, False, documents


def _cut(k, cu_seqlens):
    time = k.shape[1]
    config = _CONFIGS[target_of(k.device)]
    length = _tile_length(config, k)
    count, whole, documents = _count_tiles(config, k, cu_seqlens)
    table = offsets = None
    if cu_seqlens is not None:
        table, offsets = segment_table(cu_seqlens, time, length)
    arguments = {
        "table": table,
        "stride": count,
        "T": time,
        "LENGTH": length,
        "PER_ROW": count // documents,
    }
    return _Tiles(config, count, documents, whole, arguments, offsets)


def forward(w, u, k, v, initial_state, cu_seqlens):
    """(y [B, T, D], final state [N, 3, D], states that enter the tiles [tiles, 3, D]).

    Arguments as in `wkv4`, contiguous, the state in float32.
    """
    width = k.shape[-1]
    tiles = _cut(k, cu_seqlens)
    y = torch.empty_like(v)
    final = k.new_empty((tiles.documents, 3, width), dtype=torch.float32)
    entering = k.new_empty((tiles.count, 3, width), dtype=torch.float32)
    if not tiles.whole:
        tiles.launch(
            _tile_sums, tiles.count, w=w, k=k, v=v, sums=entering, D=width, **tiles.arguments
        )
        tiles.launch(
            _entering,
            tiles.documents,
            w=w,
            initial=initial_state,
            sums=entering,
            final=final,
            offsets=tiles.offsets,
            D=width,
            **tiles.arguments,
        )
    tiles.launch(
        _outputs,
        tiles.count,
        w=w,
        u=u,
        k=k,
        v=v,
        y=y,
        initial=initial_state if tiles.whole else None,
        entering=entering,
        final=final if tiles.whole else None,
        WHOLE=tiles.whole,
        D=width,
        **tiles.arguments,
    )
    return y, final, entering


def backward(w, u, k, v, initial_state, cu_seqlens, final, entering, dy, dfinal):
    """Gradients of w, u, k, v and, if there is one, the initial state (else of no elements).

    Arguments as in `forward`, its results and their gradients; dfinal may be None.
    """
    width = k.shape[-1]
    tiles = _cut(k, cu_seqlens)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    dinitial = k.new_empty(0 if initial_state is None else final.shape, dtype=torch.float32)
    parts = torch.empty_like(entering)
    shares = [k.new_empty((tiles.count, width), dtype=torch.float32) for _ in range(2)]
    num_chunks = k.shape[0] * k.shape[1] // tiles.config.chunk + tiles.count
    chunk_states = k.new_empty((num_chunks, 2, width), dtype=torch.float32)
    inputs = {"w": w, "u": u, "k": k, "v": v, "dy": dy, "D": width}
    tiles.launch(
        _tile_gradients,
        tiles.count,
        entering=entering,
        parts=parts,
        chunk_states=chunk_states,
        **inputs,
        **tiles.arguments,
    )
    tiles.launch(
        _leaving,
        tiles.documents,
        initial=initial_state,
        final=final,
        dfinal=dfinal,
        parts=parts,
        dinitial=None if initial_state is None else dinitial,
        offsets=tiles.offsets,
        PER_ROW=tiles.arguments["PER_ROW"],
        D=width,
    )
    tiles.launch(
        _gradients,
        tiles.count,
        leaving=parts,
        chunk_states=chunk_states,
        dk=dk,
        dv=dv,
        dw=shares[0],
        du=shares[1],
        **inputs,
        **tiles.arguments,
    )
    # In float64: many tiles, and many cancel.
    dw, du = (
        x.sum(0, dtype=torch.float64).to(like.dtype) for x, like in zip(shares, (w, u), strict=True)
    )
    return dw, du, dk, dv, dinitial


_NAMESPACE = operator_namespace(__name__)
# What both operators begin with, as PyTorch writes it.
_INPUTS = "Tensor w, Tensor u, Tensor k, Tensor v, Tensor? initial_state, Tensor? cu_seqlens"

_forward_operator = torch.library.custom_op(
    f"{_NAMESPACE}::forward",
    forward,
    mutates_args=(),
    schema=f"({_INPUTS}) -> (Tensor, Tensor, Tensor)",
)


@_forward_operator.register_fake
def _(w, u, k, v, initial_state, cu_seqlens):
    config = _CONFIGS[target_of(k.device)]
    count, _, documents = _count_tiles(config, k, cu_seqlens)
    states = (k.new_empty((n, 3, k.shape[-1]), dtype=torch.float32) for n in (documents, count))
    return torch.empty_like(v), *states


_backward_operator = torch.library.custom_op(
    f"{_NAMESPACE}::backward",
    backward,
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor final, Tensor entering, Tensor dy, Tensor? dfinal) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_backward_operator.register_fake
def _(w, u, k, v, initial_state, cu_seqlens, final, *others):
    dinitial = k.new_empty(0 if initial_state is None else final.shape, dtype=torch.float32)
    return *(torch.empty_like(x) for x in (w, u, k, v)), dinitial


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output[1:])


def _backward(ctx, dy, dfinal, _):
    *inputs, final, entering = ctx.saved_tensors
    initial_state = inputs[4]
    dy = torch.zeros_like(inputs[3]) if dy is None else dy.contiguous()
    dfinal = None if dfinal is None else dfinal.contiguous()
    *gradients, dinitial = _backward_operator(*inputs, final, entering, dy, dfinal)
    return *gradients, None if initial_state is None else dinitial, None


_forward_operator.register_autograd(_backward, setup_context=_setup_context)


def wkv4_triton(w, u, k, v, *, initial_state=None, output_final_state=False, cu_seqlens=None):
    """`wkv4` on a GPU; arguments and results as there, checked by it."""
    tensors = w, u, k, v, initial_state, cu_seqlens
    if not is_traced(k):
        return Ready(PASSES, (output_final_state,), is_kept=False)(*tensors)
    y, final, _ = _forward_operator(*_prepared(*tensors))
    return y, final if output_final_state else None


def _prepared(w, u, k, v, initial_state, cu_seqlens):
    w, u, k, v = (x.contiguous() for x in (w, u, k, v))
    if initial_state is not None:
        initial_state = initial_state.float().contiguous()
    return w, u, k, v, initial_state, cu_seqlens


def _forward_as_asked(*tensors):
    """`forward` with one more argument and result: the final state, None where not asked for."""
    *tensors, output_final_state = tensors
    y, final, entering = forward(*tensors)
    return y, final if output_final_state else None, final, entering


PASSES = Passes(
    prepare=_prepared,
    forward=_forward_as_asked,
    backward=backward,
    outputs=2,
    values=3,
    saved=slice(2, 4),
    ask=lambda numbers, wanted: (),
)


def wkv4_step(w, u, k, v, *, state=None, in_place=False):
    """One token for each row in a single launch, for decoding; no gradients.

    Args:
        w, u: as in `wkv4`.
        k, v: [B, 1, D].
        state: (num, den, max) [B, 3, D] float32, contiguous; None is empty.
        in_place: whether the new state replaces `state`, which a captured CUDA graph needs.

    Returns:
        (y [B, 1, D], the state after the token).

    Raises:
        ValueError: `in_place` without a contiguous float32 state to replace.
    """
    inputs = (x.contiguous() for x in (w, u, k, v))
    if not in_place:
        state = None if state is None else state.float().contiguous()
        run = _step_operator if is_traced(k) else _run_fresh_step
        return run(*inputs, state)
    check_replaceable("wkv4_step", state)
    return _run_step(*inputs, state, state), state


def _run_step(w, u, k, v, before, after):
    batch, _, width = k.shape
    config = _CONFIGS[target_of(k.device)]
    y = torch.empty_like(v)
    launch(
        _step,
        (batch * -(-width // config.slice),),
        config.num_warps,
        config.num_stages,
        w=w,
        u=u,
        k=k,
        v=v,
        y=y,
        before=before,
        after=after,
        D=width,
        SLICE=config.slice,
    )
    return y


def _run_fresh_step(w, u, k, v, before):
    after = k.new_empty((k.shape[0], 3, k.shape[-1]), dtype=torch.float32)
    return _run_step(w, u, k, v, before, after), after


@torch.library.custom_op(f"{_NAMESPACE}::step", mutates_args=())
def _step_operator(
    w: torch.Tensor,
    u: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _run_fresh_step(w, u, k, v, state)


@_step_operator.register_fake
def _(w, u, k, v, state):
    return torch.empty_like(v), k.new_empty((k.shape[0], 3, k.shape[-1]), dtype=torch.float32)
