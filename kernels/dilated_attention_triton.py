"""Triton kernels of `dilated_attention`: flash attention that strides through the tokens in place.

A program owns a tile of a segment's slots in one head of one branch. Slot c of a segment that
begins at token t is token t + c r + offset, so its keys and values are rows of memory r H apart,
each of a head's width: they are read where they lie, and no branch ever exists as a copy. Branches
run one after the other:

    _forward    softmax over the branch's keys; merges it into o [B, T, H, V] and the log of the
                denominators [B, T, H], float32, which all branches so far have made: rows of
                tokens that the branch does not have are not touched
    _queries    dq, and delta = do . O of each query, with O of the branch alone or, where the
                weights have a gradient, of all
    _keys       dk and dv, added to those of the branches before; of held slots their own

A branch takes w (K + V) T / r^2 FLOPs per head forward, three and a half times that with backward,
and moves a share of 1 / r of each tensor. Scores are in base 2. With a decay, both sides of a
product are scaled around the middle of the tile whose program it is: only keys of that tile get a
factor above 1.
"""

import torch

try:  # transformers asks for every library that code from the Hub imports, but in a try
    import triton
    import triton.language as tl
except ImportError:
    raise

from .dilated_branches import branches_of
from .launch_triton import (
    LOG2E,
    Config,
    dot,
    dot_add,
    dot_precision,
    launch,
    operator_namespace,
    padded,
    rounded,
    target_of,
)
from .operator_triton import is_traced, nothing
from .ready_triton import Passes, Ready
from .segments_triton import kept, overridden

# Tiles of `chunk` slots for the program's own, of `slice` for those it walks over, by the widest
# head: (forward, queries, keys).
_CONFIGS = {
    "sm_80": {
        64: (Config(128, 64, 8, 2), Config(64, 32, 4, 2), Config(64, 32, 8, 1)),
        128: (Config(64, 32, 8, 1), Config(32, 32, 4, 2), Config(64, 32, 8, 1)),
        256: (Config(32, 16, 8, 1), Config(32, 16, 8, 1), Config(32, 16, 8, 1)),
    },
    "sm_90": {
        64: (Config(128, 64, 8, 2), Config(128, 64, 8, 2), Config(64, 64, 8, 2)),
        128: (Config(128, 64, 8, 2), Config(64, 64, 8, 2), Config(64, 32, 8, 2)),
        256: (Config(32, 16, 8, 1), Config(32, 16, 8, 1), Config(32, 16, 8, 1)),
    },
    "sm_100": {
        64: (Config(128, 64, 8, 2), Config(128, 64, 8, 2), Config(64, 64, 8, 2)),
        128: (Config(128, 64, 8, 2), Config(128, 64, 8, 2), Config(64, 64, 8, 2)),
        256: (Config(64, 32, 8, 2), Config(32, 16, 8, 1), Config(32, 32, 8, 1)),
    },
    "gfx942": {
        64: (Config(128, 64, 4, 1), Config(128, 64, 4, 1), Config(128, 64, 4, 1)),
        128: (Config(64, 64, 4, 1), Config(64, 64, 4, 1), Config(64, 32, 4, 1)),
        256: (Config(32, 16, 4, 1), Config(32, 16, 4, 1), Config(32, 16, 4, 1)),
    },
}
# Numbers that differ from branch to branch: the same machine code for all of them. Rows are a
# head's width apart, which the code knows.
_NUMBERS = ("stride", "part_row", "T", "H", "M", "first", "w", "r", "group", "per_row", "blocks")
_OF_KEYS = tuple(name for name in _NUMBERS if name != "part_row")


@triton.jit
def _segment(table, stride, s, T, w, per_row):
    """(the token at u = 0, which may be before the pass, first and last u + 1 of new tokens, row of
    what is held)."""
    if table is None:
        row = s // per_row
        begin = (s % per_row) * w
        base = row.to(tl.int64) * T + begin
        low = 0
        high = tl.minimum(w, T - begin)
        held_row = base * 0
    else:
        base = tl.load(table + s).to(tl.int64)
        low = tl.load(table + stride + s).to(tl.int32)
        high = tl.load(table + 2 * stride + s).to(tl.int32)
        held_row = tl.load(table + 3 * stride + s).to(tl.int64)
    return base, low, high, held_row


@triton.jit
def _offset(h, r, group, MODULO: tl.constexpr):
    return h % r if MODULO else h // group


@triton.jit
def _tokens(x, base, u, inside, h, H, D: tl.constexpr, BD: tl.constexpr):
    """Rows of x [tokens, H, D]; zeros where a slot has no such token."""
    d = tl.arange(0, BD)
    at = ((base + u) * H + h)[:, None] * D + d[None, :]
    return tl.load(x + at, mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _slots(
    x, held, base, u, c, low, high, h, H, held_row, first, M, D: tl.constexpr, BD: tl.constexpr
):
    """Keys or values of slots: new tokens, and before those what is held."""
    rows = _tokens(x, base, u, (u >= low) & (u < high), h, H, D, BD)
    if held is not None:
        d = tl.arange(0, BD)
        at = ((held_row * H + h) * M + first + c)[:, None] * D + d[None, :]
        inside = ((u < low) & (u < high))[:, None] & (d < D)[None, :]
        rows += tl.load(held + at, mask=inside, other=0.0)
    return rows


@triton.jit
def _add_to_tokens(total, sums, base, u, inside, h, H, D: tl.constexpr, BD: tl.constexpr):
    """Adds to rows of a sum of gradients [tokens, H, D], float32: branches come one by one."""
    d = tl.arange(0, BD)
    at = ((base + u) * H + h)[:, None] * D + d[None, :]
    inside = inside[:, None] & (d < D)[None, :]
    tl.store(total + at, tl.load(total + at, mask=inside, other=0.0) + sums, mask=inside)


@triton.jit
def _add_to_slots(
    total,
    held,
    sums,
    base,
    u,
    c,
    low,
    high,
    h,
    H,
    held_row,
    first,
    M,
    D: tl.constexpr,
    BD: tl.constexpr,
):
    """The gradient of `_slots`: added for tokens, stored for what is held, which one branch has."""
    _add_to_tokens(total, sums, base, u, (u >= low) & (u < high), h, H, D, BD)
    if held is not None:
        d = tl.arange(0, BD)
        at = ((held_row * H + h) * M + first + c)[:, None] * D + d[None, :]
        tl.store(held + at, sums, mask=((u < low) & (u < high))[:, None] & (d < D)[None, :])


@triton.jit
def _factor(log_decay, steps, K: tl.constexpr, BK: tl.constexpr):
    """exp(steps log_decay) of each slot and channel."""
    d = tl.arange(0, BK)
    rate = tl.load(log_decay + d, mask=d < K, other=0.0).to(tl.float32) * LOG2E
    return tl.exp2(steps.to(tl.float32)[:, None] * rate[None, :])


@triton.jit
def _scaled(x, log_decay, steps, COMPUTE: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    if log_decay is not None:
        x = rounded(x.to(tl.float32) * _factor(log_decay, steps, K, BK), COMPUTE)
    return x.to(COMPUTE)


@triton.jit(do_not_specialize=_NUMBERS)
def _forward(
    q,
    k,
    v,
    held_k,
    held_v,
    log_decay,
    o,
    log,
    part,
    table,
    stride,
    part_row,
    T,
    H,
    M,
    first,
    w,
    r,
    group,
    per_row,
    blocks,
    scale,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    MODULO: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    s = tl.program_id(0) // blocks
    c0 = (tl.program_id(0) % blocks) * BM
    h = tl.program_id(1)
    base, low, high, held_row = _segment(table, stride, s, T, w, per_row)
    offset = _offset(h, r, group, MODULO)
    c_q = c0 + tl.arange(0, BM)
    u_q = c_q * r + offset
    is_query = (u_q >= low) & (u_q < high)
    if (c0 * r + offset < high) & ((c0 + BM - 1) * r + offset >= low):
        anchor = c0 + BM // 2
        queries = _tokens(q, base, u_q, is_query, h, H, K, BK)
        queries = _scaled(queries, log_decay, (c_q - anchor) * r, COMPUTE, K, BK)
        top = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        sums = tl.zeros([BM, BV], tl.float32)
        end = tl.minimum(c0 + BM, (high - offset + r - 1) // r)
        for n in range(0, end, BN):
            c_k = n + tl.arange(0, BN)
            u_k = c_k * r + offset
            keys = _slots(k, held_k, base, u_k, c_k, low, high, h, H, held_row, first, M, K, BK)
            keys = _scaled(keys, log_decay, (anchor - c_k) * r, COMPUTE, K, BK)
            score = dot(queries, tl.trans(keys), PRECISION) * (scale * LOG2E)
            visible = (c_k[None, :] <= c_q[:, None]) & (u_k < high)[None, :]
            score = tl.where(visible, score, float("-inf"))
            new = tl.maximum(top, tl.max(score, 1))
            p = tl.exp2(score - new[:, None])
            before = tl.exp2(top - new)
            values = _slots(v, held_v, base, u_k, c_k, low, high, h, H, held_row, first, M, V, BV)
            total = total * before + tl.sum(p, 1)
            sums *= before[:, None]
            sums = dot_add(rounded(p, COMPUTE), values.to(COMPUTE), sums, PRECISION)
            top = new
        sums /= total[:, None]
        own = top + tl.log2(total)
        token = base + u_q
        d = tl.arange(0, BV)
        inside = is_query[:, None] & (d < V)[None, :]
        if part is not None:
            # A row for each token of the branch: r tokens lie between two of a segment.
            at = ((part_row + token // r + s) * H + h)[:, None] * V + d[None, :]
            tl.store(part + at, rounded(sums, part.dtype.element_ty), mask=inside)
        others = tl.load(log + token * H + h, mask=is_query, other=float("-inf"))
        larger = tl.maximum(own, others)
        both = larger + tl.log2(tl.exp2(own - larger) + tl.exp2(others - larger))
        at = (token * H + h)[:, None] * V + d[None, :]
        merged = tl.load(o + at, mask=inside, other=0.0) * tl.exp2(others - both)[:, None]
        merged += sums * tl.exp2(own - both)[:, None]
        tl.store(o + at, merged, mask=inside)
        tl.store(log + token * H + h, both, mask=is_query)


@triton.jit(do_not_specialize=_NUMBERS)
def _queries(
    q,
    k,
    v,
    held_k,
    held_v,
    log_decay,
    o,
    log,
    part,
    do,
    delta,
    dq,
    table,
    stride,
    part_row,
    T,
    H,
    M,
    first,
    w,
    r,
    group,
    per_row,
    blocks,
    scale,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    MODULO: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    s = tl.program_id(0) // blocks
    c0 = (tl.program_id(0) % blocks) * BM
    h = tl.program_id(1)
    base, low, high, held_row = _segment(table, stride, s, T, w, per_row)
    offset = _offset(h, r, group, MODULO)
    c_q = c0 + tl.arange(0, BM)
    u_q = c_q * r + offset
    is_query = (u_q >= low) & (u_q < high)
    if (c0 * r + offset < high) & ((c0 + BM - 1) * r + offset >= low):
        anchor = c0 + BM // 2
        token = base + u_q
        queries = _tokens(q, base, u_q, is_query, h, H, K, BK)
        queries = _scaled(queries, log_decay, (c_q - anchor) * r, COMPUTE, K, BK)
        grads = _tokens(do, base, u_q, is_query, h, H, V, BV)
        if part is None:
            outputs = _tokens(o, base, u_q, is_query, h, H, V, BV)
        else:
            d = tl.arange(0, BV)
            at = ((part_row + token // r + s) * H + h)[:, None] * V + d[None, :]
            inside = is_query[:, None] & (d < V)[None, :]
            outputs = tl.load(part + at, mask=inside, other=0.0)
        own = tl.sum(grads.to(tl.float32) * outputs.to(tl.float32), 1)
        tl.store(delta + token * H + h, own, mask=is_query)
        total = tl.load(log + token * H + h, mask=is_query, other=float("inf"))
        grads = grads.to(COMPUTE)
        sums = tl.zeros([BM, BK], tl.float32)
        end = tl.minimum(c0 + BM, (high - offset + r - 1) // r)
        for n in range(0, end, BN):
            c_k = n + tl.arange(0, BN)
            u_k = c_k * r + offset
            keys = _slots(k, held_k, base, u_k, c_k, low, high, h, H, held_row, first, M, K, BK)
            keys = _scaled(keys, log_decay, (anchor - c_k) * r, COMPUTE, K, BK)
            values = _slots(v, held_v, base, u_k, c_k, low, high, h, H, held_row, first, M, V, BV)
            score = dot(queries, tl.trans(keys), PRECISION) * (scale * LOG2E)
            visible = (c_k[None, :] <= c_q[:, None]) & (u_k < high)[None, :]
            p = tl.exp2(tl.where(visible, score, float("-inf")) - total[:, None])
            dp = dot(grads, tl.trans(values.to(COMPUTE)), PRECISION)
            dscore = p * (dp - own[:, None])
            sums = dot_add(rounded(dscore, COMPUTE), keys, sums, PRECISION)
        sums *= scale
        if log_decay is not None:
            sums *= _factor(log_decay, (c_q - anchor) * r, K, BK)
        _add_to_tokens(dq, sums, base, u_q, is_query, h, H, K, BK)


@triton.jit(do_not_specialize=_OF_KEYS)
def _keys(
    q,
    k,
    v,
    held_k,
    held_v,
    log_decay,
    log,
    do,
    delta,
    dk,
    dv,
    dheld_k,
    dheld_v,
    table,
    stride,
    T,
    H,
    M,
    first,
    w,
    r,
    group,
    per_row,
    blocks,
    scale,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    MODULO: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    s = tl.program_id(0) // blocks
    c0 = (tl.program_id(0) % blocks) * BM
    h = tl.program_id(1)
    base, low, high, held_row = _segment(table, stride, s, T, w, per_row)
    offset = _offset(h, r, group, MODULO)
    c_k = c0 + tl.arange(0, BM)
    u_k = c_k * r + offset
    if (c0 * r + offset < high) & (low < high):
        anchor = c0 + BM // 2
        keys = _slots(k, held_k, base, u_k, c_k, low, high, h, H, held_row, first, M, K, BK)
        keys = _scaled(keys, log_decay, (anchor - c_k) * r, COMPUTE, K, BK)
        values = _slots(v, held_v, base, u_k, c_k, low, high, h, H, held_row, first, M, V, BV)
        values = values.to(COMPUTE)
        key_sums = tl.zeros([BM, BK], tl.float32)
        value_sums = tl.zeros([BM, BV], tl.float32)
        # The first query that is one and sees any of these.
        start = tl.maximum(c0, low // r) // BN * BN
        for n in range(start, (high - offset + r - 1) // r, BN):
            c_q = n + tl.arange(0, BN)
            u_q = c_q * r + offset
            is_query = (u_q >= low) & (u_q < high)
            queries = _tokens(q, base, u_q, is_query, h, H, K, BK)
            queries = _scaled(queries, log_decay, (c_q - anchor) * r, COMPUTE, K, BK)
            grads = _tokens(do, base, u_q, is_query, h, H, V, BV).to(COMPUTE)
            at = (base + u_q) * H + h
            total = tl.load(log + at, mask=is_query, other=float("inf"))
            own = tl.load(delta + at, mask=is_query, other=0.0)
            score = dot(keys, tl.trans(queries), PRECISION) * (scale * LOG2E)
            visible = (c_k[:, None] <= c_q[None, :]) & is_query[None, :]
            p = tl.exp2(tl.where(visible, score, float("-inf")) - total[None, :])
            value_sums = dot_add(rounded(p, COMPUTE), grads, value_sums, PRECISION)
            dp = dot(values, tl.trans(grads), PRECISION)
            dscore = p * (dp - own[None, :])
            key_sums = dot_add(rounded(dscore, COMPUTE), queries, key_sums, PRECISION)
        key_sums *= scale
        if log_decay is not None:
            key_sums *= _factor(log_decay, (anchor - c_k) * r, K, BK)
        _add_to_slots(
            dk, dheld_k, key_sums, base, u_k, c_k, low, high, h, H, held_row, first, M, K, BK
        )
        _add_to_slots(
            dv, dheld_v, value_sums, base, u_k, c_k, low, high, h, H, held_row, first, M, V, BV
        )


def _count_segments(length, batch, time, count, cu_seqlens):
    """How many segments of a branch there can be; with a table an upper bound."""
    if cu_seqlens is None and count is None:
        return batch * -(-time // length)
    num_documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
    # One that is not full at a document's end and, where it goes on, one at its beginning.
    return batch * time // length + num_documents * (1 if count is None else 2)


def _tables(count, row, cu_seqlens, lengths, batch, time):
    """For each branch [4, segments] as `_segment` reads it; no value is read on the host."""
    return [_table(count, row, cu_seqlens, length, batch, time) for length in lengths]


def _table(count, row, cu_seqlens, length, batch, time):
    num_segments = _count_segments(length, batch, time, count, cu_seqlens)
    device = (count if cu_seqlens is None else cu_seqlens).device
    if cu_seqlens is None:
        first_N = torch.arange(batch, device=device) * time
        size_N = torch.full_like(first_N, time)
    else:
        first_N, size_N = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    start_N = torch.zeros_like(first_N) if count is None else count.long()
    row_N = torch.arange(len(first_N), device=device) if row is None else row.long()
    skipped_N = start_N // length
    num_N = torch.where(size_N > 0, (start_N + size_N - 1) // length - skipped_N + 1, 0)
    ends_N = num_N.cumsum(0)
    segment_S = torch.arange(num_segments, device=device)
    document_S = torch.searchsorted(ends_N, segment_S, right=True).clamp(max=len(ends_N) - 1)
    rank_S = segment_S - (ends_N - num_N)[document_S]
    begin_S = (skipped_N[document_S] + rank_S) * length
    low_S = (start_N[document_S] - begin_S).clamp(min=0)
    high_S = ((start_N + size_N)[document_S] - begin_S).clamp(max=length)
    # Those after the last have no tokens.
    high_S = torch.where(segment_S < ends_N[-1], high_S, 0)
    base_S = (first_N - start_N)[document_S] + begin_S
    return torch.stack([base_S, low_S, high_S, row_N[document_S]])


def _config(index, q, v, rate, has_decay):
    target = target_of(q.device)
    width = max(padded(q.shape[-1]), padded(v.shape[-1]), 64)
    sizes = overridden.get("dilated_attention", _CONFIGS[target])
    if width not in sizes:
        raise ValueError(
            f"dilated_attention: backend 'triton' takes heads up to {max(sizes)} wide, got "
            f'K = {q.shape[-1]} and V = {v.shape[-1]}; use backend="torch".'
        )
    config = sizes[width][index]
    if q.dtype != torch.bfloat16:  # twice as wide, and both parts of a factor in registers
        config = config._replace(chunk=max(config.chunk // 2, 16), slice=max(config.slice // 2, 16))
    if has_decay:
        # Fewer tokens than it takes for a decay to overflow.
        config = config._replace(
            chunk=min(config.chunk, max(16, 4096 // triton.next_power_of_2(rate)))
        )
    return config


def _launches(index, inputs, lengths, rates, scale, modulo):
    """(kernel's arguments, grid, `Config`) of each branch."""
    q, k, v, held_k, held_v, count, row, log_decay, cu_seqlens = inputs
    (batch, time, num_heads, key_dim), value_dim = q.shape, v.shape[-1]
    tables, part_row = [None] * len(lengths), 0
    if count is not None or cu_seqlens is not None:
        tables = kept(_tables, (count, row, cu_seqlens), (tuple(lengths), batch, time))
    for table, branch in zip(tables, branches_of(lengths, rates), strict=True):
        length, rate = branch.length, branch.rate
        num_segments = _count_segments(length, batch, time, count, cu_seqlens)
        config = _config(index, q, v, rate, log_decay is not None)
        reach = length if count is not None else min(length, time)
        blocks = -(-reach // (rate * config.chunk))
        compute = tl.bfloat16 if q.dtype == torch.bfloat16 else tl.float32
        arguments = {
            "q": q,
            "k": k,
            "v": v,
            "held_k": held_k,
            "held_v": held_v,
            "log_decay": log_decay,
            "table": table,
            "stride": num_segments,
            "part_row": part_row,
            "T": time,
            "H": num_heads,
            "M": 0 if held_k is None else held_k.shape[2],
            "first": branch.first,
            "w": length,
            "r": rate,
            "group": -(-num_heads // rate),
            "per_row": -(-time // length),
            "blocks": blocks,
            "scale": scale,
            "K": key_dim,
            "V": value_dim,
            "BK": padded(key_dim),
            "BV": padded(value_dim),
            "BM": config.chunk,
            "BN": config.slice,
            "MODULO": modulo,
            "COMPUTE": compute,
            "PRECISION": dot_precision(q.dtype, target_of(q.device)),
        }
        yield arguments, (num_segments * blocks, num_heads), config
        part_row += batch * time // rate + 1 + num_segments


def _num_part_rows(q, count, cu_seqlens, lengths, rates):
    batch, time = q.shape[:2]
    return sum(
        batch * time // rate + 1 + _count_segments(length, batch, time, count, cu_seqlens)
        for length, rate in zip(lengths, rates, strict=True)
    )


def forward(
    q, k, v, held_k, held_v, count, row, log_decay, cu_seqlens, lengths, rates, scale, modulo, parts
):
    """(o, log2 of its denominators [B, T, H], outputs of the branches' own if `parts`).

    Args:
        q, k, v: contiguous, of one dtype.
        held_k, held_v, count, row: of `Held`, all or none but for row.
        log_decay, cu_seqlens: as of `dilated_attention`.
        lengths, rates: of the branches.
        scale: of the scores.
        modulo: whether offsets are "modulo".
        parts: whether backward needs the branches' own outputs.
    """
    inputs = q, k, v, held_k, held_v, count, row, log_decay, cu_seqlens
    num_heads, value_dim = q.shape[2], v.shape[-1]
    o = torch.zeros_like(v, dtype=torch.float32)
    log = q.new_full(q.shape[:3], float("-inf"), dtype=torch.float32)
    part = None
    if parts:
        rows = _num_part_rows(q, count, cu_seqlens, lengths, rates)
        part = v.new_empty(rows, num_heads, value_dim)
    for arguments, grid, config in _launches(0, inputs, lengths, rates, scale, modulo):
        launch(
            _forward,
            grid,
            config.num_warps,
            config.num_stages,
            o=o,
            log=log,
            part=part,
            **arguments,
        )
    return o.to(v.dtype), log, nothing(q) if part is None else part


def backward(
    q,
    k,
    v,
    held_k,
    held_v,
    count,
    row,
    log_decay,
    cu_seqlens,
    o,
    log,
    part,
    do,
    lengths,
    rates,
    scale,
    modulo,
    parts,
):
    """(dq, dk, dv, dheld_k, dheld_v); arguments as of `forward`, and its results."""
    inputs = q, k, v, held_k, held_v, count, row, log_decay, cu_seqlens
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
    dheld = [nothing(q), nothing(q)]
    if held_k is not None:
        dheld = [torch.zeros_like(x, dtype=torch.float32) for x in (held_k, held_v)]
    delta = torch.empty_like(log)
    of_queries = _launches(1, inputs, lengths, rates, scale, modulo)
    of_keys = _launches(2, inputs, lengths, rates, scale, modulo)
    part = part if parts else None
    for queries, keys in zip(of_queries, of_keys, strict=True):
        arguments, grid, config = queries
        launch(
            _queries,
            grid,
            config.num_warps,
            config.num_stages,
            o=o,
            log=log,
            part=part,
            do=do,
            delta=delta,
            dq=dq,
            **arguments,
        )
        arguments, grid, config = keys
        del arguments["part_row"]
        launch(
            _keys,
            grid,
            config.num_warps,
            config.num_stages,
            log=log,
            do=do,
            delta=delta,
            dk=dk,
            dv=dv,
            dheld_k=dheld[0] if held_k is not None else None,
            dheld_v=dheld[1] if held_k is not None else None,
            **arguments,
        )
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), *dheld


_NAMESPACE = operator_namespace(__name__)
# What both operators begin and end with, as PyTorch writes it.
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? held_k, Tensor? held_v, Tensor? count, Tensor? row, "
    "Tensor? log_decay, Tensor? cu_seqlens"
)
_SETTINGS = "SymInt[] lengths, SymInt[] rates, float scale, bool modulo, bool parts"

forward_operator = torch.library.custom_op(
    f"{_NAMESPACE}::forward",
    forward,
    mutates_args=(),
    schema=f"({_INPUTS}, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
)


@forward_operator.register_fake
def _(
    q, k, v, held_k, held_v, count, row, log_decay, cu_seqlens, lengths, rates, scale, modulo, parts
):
    part = nothing(q)
    if parts:
        rows = _num_part_rows(q, count, cu_seqlens, lengths, rates)
        part = v.new_empty(rows, q.shape[2], v.shape[-1])
    return torch.empty_like(v), q.new_empty(q.shape[:3], dtype=torch.float32), part


backward_operator = torch.library.custom_op(
    f"{_NAMESPACE}::backward",
    backward,
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor o, Tensor log, Tensor part, Tensor do, {_SETTINGS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@backward_operator.register_fake
def _(q, k, v, held_k, held_v, *others):
    held = (
        nothing(q) if x is None else torch.empty_like(x, dtype=torch.float32)
        for x in (held_k, held_v)
    )
    return *map(torch.empty_like, (q, k, v)), *held


def _setup_context(ctx, inputs, output):
    ctx.numbers = inputs[9:]
    ctx.save_for_backward(*inputs[:9], *output)


def _gradients(ctx, do, dlog, dpart):
    grads = backward_operator(*ctx.saved_tensors, do.contiguous(), *ctx.numbers)
    grads = (x if wanted else None for x, wanted in zip(grads, ctx.needs_input_grad[:5]))
    return *grads, *[None] * 9


forward_operator.register_autograd(_gradients, setup_context=_setup_context)


def _prepared(q, k, v, held_k, held_v, count, row, log_decay, cu_seqlens):
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    inputs = [None if x is None else x.to(dtype).contiguous() for x in (q, k, v, held_k, held_v)]
    if log_decay is not None:
        log_decay = log_decay.detach().float().contiguous()
    return *inputs, count, row, log_decay, cu_seqlens


PASSES = Passes(
    prepare=_prepared,
    forward=forward,
    backward=backward,
    outputs=1,
    values=2,
    saved=slice(0, 3),
    ask=lambda numbers, wanted: numbers,
)


def numbers_of(tensors, branches, scale, offsets, weight_gradient):
    """The last arguments of both passes.

    Args: the tensors of the call, in the order of `forward`; the rest as of `dilated_attention`.
    """
    lengths, rates = ([branch[n] for branch in branches] for n in (0, 1))
    is_differentiated = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in tensors[:5]
    )
    parts = is_differentiated and not weight_gradient
    return lengths, rates, float(scale), offsets == "modulo", parts


def dilated_attention_triton(
    q, k, v, branches, scale, offsets, log_decay, cu_seqlens, held, weight_gradient
):
    """`dilated_attention` on a GPU; arguments are checked by it, and `Branch`es for lengths."""
    held = [None] * 4 if held is None else [held.keys, held.values, held.count, held.row]
    tensors = q, k, v, *held, log_decay, cu_seqlens
    numbers = numbers_of(tensors, branches, scale, offsets, weight_gradient)
    if is_traced(q):
        return forward_operator(*_prepared(*tensors), *numbers)[0].to(v.dtype)
    return Ready(PASSES, numbers, is_kept=False)(*tensors)[0]
