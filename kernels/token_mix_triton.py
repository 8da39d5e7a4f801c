"""Token shift and mix in one kernel for each direction (token_mix.py has the equations).

Forward a program takes a tile of tokens and channels: the tokens, those before, and all streams of
them. Backward a token's gradient comes from its own streams and from those of the next token:

    dx_t = sum_n (1 - w_n,t) dy_n,t + w_n,t+1 dy_n,t+1      dw_n,t = dy_n,t (x_t-1 - x_t)

so rows of a tile are read once more, one further, which caches have. dmu is the sum of dw over all
tokens: each program sums those of its own, and the shares are added up at the end.

Each operand moves once: 1 + N rows of D numbers forward, 2 + N backward, and 2 N more with
corrections; PyTorch's operations move 4 + 3 N and 10 + 16 N.
"""

import functools

import torch

try:  # transformers asks for every library that code from the Hub imports, but in a try
    import triton
    import triton.language as tl
except ImportError:
    raise

from .launch_triton import launch, num_processors, padded, rounded
from .ready_triton import Passes, Ready, prepared_call
from .token_mix import MOST_STREAMS

# Rows and the most columns of a tile: 16 numbers of each operand to a thread of four warps.
ROWS, COLUMNS, WARPS = 8, 256, 4
# Programs of the backward pass for each multiprocessor, and the fewest rows that one sums.
PROGRAMS, FEWEST_ROWS = 8, 32
# What its sums over tokens have room for.
_STREAMS = tl.constexpr(8)


@triton.jit
def _start(token, cu_seqlens, T, documents, LOG_DOCUMENTS: tl.constexpr):
    """(which document tokens belong to, whether they are its first)."""
    if cu_seqlens is None:
        document = token // T
        is_first = token == document * T
    else:
        document = token * 0
        for n in tl.static_range(LOG_DOCUMENTS):
            later = document + (1 << (LOG_DOCUMENTS - 1 - n))
            start = tl.load(cu_seqlens + later, later < documents, other=0)
            document = tl.where((later < documents) & (start <= token), later, document)
        is_first = tl.load(cu_seqlens + document) == token
    return document, is_first


@triton.jit
def _change(x, before, cells, column, inside, document, is_first, D: tl.constexpr):
    """(tokens, how those before differ from them), in float32."""
    is_first = is_first[:, None]
    now = tl.load(x + cells, inside, other=0.0).to(tl.float32)
    last = tl.load(x + cells - D, inside & (is_first == 0), other=0.0).to(tl.float32)
    if before is not None:
        place = document[:, None] * D + column[None, :]
        last += tl.load(before + place, inside & is_first, other=0.0).to(tl.float32)
    return now, last - now


@triton.jit
def _weight(mu, c, n: tl.constexpr, cells, column, inside, D: tl.constexpr, CURRENT: tl.constexpr):
    """How much a stream takes of the token before, in float32."""
    weight = tl.load(mu + n * D + column, column < D, other=0.0).to(tl.float32)[None, :]
    if CURRENT:
        weight = 1 - weight
    if c is not None:
        weight += tl.load(c + cells, inside, other=0.0).to(tl.float32)
    return weight


@triton.jit
def _forward(
    x,
    mu,
    before,
    cu_seqlens,
    c0,
    c1,
    c2,
    c3,
    c4,
    c5,
    y0,
    y1,
    y2,
    y3,
    y4,
    y5,
    T,
    tokens,
    documents,
    LOG_DOCUMENTS: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    CURRENT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (token < tokens)[:, None] & (column < D)[None, :]
    cells = token[:, None] * D + column[None, :]
    document, is_first = _start(token, cu_seqlens, T, documents, LOG_DOCUMENTS)
    now, change = _change(x, before, cells, column, inside, document, is_first, D)
    for n in tl.static_range(N):
        c = (c0, c1, c2, c3, c4, c5)[n]
        y = (y0, y1, y2, y3, y4, y5)[n]
        mixed = now + _weight(mu, c, n, cells, column, inside, D, CURRENT) * change
        tl.store(y + cells, rounded(mixed, y.dtype.element_ty), inside)


@triton.jit
def _backward(
    x,
    mu,
    before,
    cu_seqlens,
    c0,
    c1,
    c2,
    c3,
    c4,
    c5,
    dy0,
    dy1,
    dy2,
    dy3,
    dy4,
    dy5,
    dx,
    dmu,
    dbefore,
    dc0,
    dc1,
    dc2,
    dc3,
    dc4,
    dc5,
    T,
    tokens,
    documents,
    LENGTH,
    LOG_DOCUMENTS: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    CURRENT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * LENGTH
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    stream = tl.arange(0, _STREAMS)
    sums = tl.zeros([_STREAMS, COLUMNS], tl.float32)
    for start in range(0, LENGTH, ROWS):
        token = first + start + tl.arange(0, ROWS)
        inside = (token < tokens)[:, None] & (column < D)[None, :]
        cells = token[:, None] * D + column[None, :]
        document, is_first = _start(token, cu_seqlens, T, documents, LOG_DOCUMENTS)
        _, change = _change(x, before, cells, column, inside, document, is_first, D)
        _, ends = _start(token + 1, cu_seqlens, T, documents, LOG_DOCUMENTS)
        goes_on = (token + 1 < tokens) & (ends == 0)
        goes_on = goes_on[:, None] & (column < D)[None, :]
        own = tl.zeros([ROWS, COLUMNS], tl.float32)
        given = tl.zeros([ROWS, COLUMNS], tl.float32)
        for n in tl.static_range(N):
            c = (c0, c1, c2, c3, c4, c5)[n]
            dy = (dy0, dy1, dy2, dy3, dy4, dy5)[n]
            if dy is not None:
                weight = _weight(mu, c, n, cells, column, inside, D, CURRENT)
                grad = tl.load(dy + cells, inside, other=0.0).to(tl.float32)
                own += (1 - weight) * grad
                given += weight * grad
                weight = _weight(mu, c, n, cells + D, column, goes_on, D, CURRENT)
                own += weight * tl.load(dy + cells + D, goes_on, other=0.0).to(tl.float32)
                grad *= change
                if c is not None:
                    dc = (dc0, dc1, dc2, dc3, dc4, dc5)[n]
                    tl.store(dc + cells, rounded(grad, dc.dtype.element_ty), inside)
                if CURRENT:
                    grad = -grad
                sums += tl.where((stream == n)[:, None], tl.sum(grad, 0)[None, :], 0.0)
        tl.store(dx + cells, rounded(own, dx.dtype.element_ty), inside)
        if dbefore is not None:
            place = document[:, None] * D + column[None, :]
            tl.store(dbefore + place, given, inside & is_first[:, None])
    place = (tl.program_id(0) * N + stream)[:, None] * D + column[None, :]
    tl.store(dmu + place, sums, (stream < N)[:, None] & (column < D)[None, :])


def _arguments(x, mu, before, cu_seqlens, corrections, of_current):
    """What both kernels are given."""
    batch, time, width = x.shape
    documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
    return {
        "x": x,
        "mu": mu,
        "before": before,
        "cu_seqlens": cu_seqlens,
        **_numbered("c", corrections),
        "T": time,
        "tokens": batch * time,
        "documents": documents,
        "LOG_DOCUMENTS": 0 if cu_seqlens is None else max(documents - 1, 0).bit_length(),
        "N": len(mu),
        "D": width,
        "CURRENT": of_current,
        "ROWS": ROWS,
        "COLUMNS": min(COLUMNS, padded(width)),
    }


def _numbered(name, tensors):
    """{name0: ..., name5: ...}, None for those that there are not."""
    tensors = [*tensors, *[None] * (MOST_STREAMS - len(tensors))]
    return {f"{name}{n}": x for n, x in enumerate(tensors)}


def forward(x, mu, before, cu_seqlens, *others):
    """The streams; `others` are the corrections and `of_current`. Tensors are contiguous."""
    *corrections, of_current = others
    arguments = _arguments(x, mu, before, cu_seqlens, corrections, of_current)
    streams = [torch.empty_like(x) for _ in range(len(mu))]
    grid = -(-arguments["tokens"] // ROWS), -(-arguments["D"] // arguments["COLUMNS"])
    launch(_forward, grid, WARPS, 1, **arguments, **_numbered("y", streams))
    return tuple(streams)


def backward(x, mu, before, cu_seqlens, *others):
    """(dx, dmu, dbefore, None, *dcorrections).

    Args:
        x, mu, before, cu_seqlens: as of `forward`.
        others: the corrections, N gradients of the streams, None where there is none, `of_current`.
    """
    *others, of_current = others
    corrections, gradients = others[: -len(mu)], others[-len(mu) :]
    arguments = _arguments(x, mu, before, cu_seqlens, corrections, of_current)
    tokens, columns = arguments["tokens"], -(-arguments["D"] // arguments["COLUMNS"])
    wanted = max(1, PROGRAMS * num_processors(x.device) // columns)
    length = max(FEWEST_ROWS, -(-tokens // (wanted * ROWS)) * ROWS)
    programs = -(-tokens // length)
    dx, dmu = torch.empty_like(x), x.new_empty(programs, *mu.shape, dtype=torch.float32)
    dbefore = None if before is None else torch.empty_like(before, dtype=torch.float32)
    dcorrections = [
        torch.zeros_like(c) if grad is None else torch.empty_like(c)
        for c, grad in zip(corrections, gradients)
    ]
    launch(
        _backward,
        (programs, columns),
        WARPS,
        1,
        **arguments,
        **_numbered("dy", gradients),
        dx=dx,
        dmu=dmu,
        dbefore=dbefore,
        **_numbered("dc", dcorrections),
        LENGTH=length,
    )
    return dx, dmu.sum(0).to(mu.dtype), dbefore, None, *dcorrections


def _prepared(x, mu, before, cu_seqlens, *corrections):
    if before is not None:
        before = before.to(x.dtype).contiguous()
    corrections = (c.contiguous() for c in corrections)
    return x.contiguous(), mu.contiguous(), before, cu_seqlens, *corrections


@functools.cache
def _passes(streams):
    return Passes(
        prepare=_prepared,
        forward=forward,
        backward=backward,
        outputs=streams,
        values=0,
        saved=slice(0, 0),
        ask=lambda numbers, wanted: numbers,
    )


def token_mix_triton(x, mu, *tensors, of_current):
    """`token_mix` on a GPU; its tensors in their order, checked by it."""
    return Ready(_passes(len(mu)), (of_current,), is_kept=False)(x, mu, *tensors)


def prepare(streams, of_current):
    """What to keep for calls of one form."""

    def run(*tensors):
        return token_mix_triton(*tensors, of_current=of_current)

    return prepared_call(_passes(streams), (of_current,), run)
