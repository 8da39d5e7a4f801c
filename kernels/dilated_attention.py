"""Dilated attention of LongNet: every r-th token of a segment of w, for several (w, r) at once.

Ding et al. 2023, https://arxiv.org/abs/2307.02486, sections 2.2 and 2.3, as in the authors' code
(torchscale). A branch i has segments of w_i tokens and a dilation rate r_i. Segments count from
the start of each document. Token n is at u = n mod w_i of its segment, and head h of the branch
has those with u mod r_i = offset(h, r_i). Such a token sees such tokens of its segment, up to
itself:

    s_nj = scale sum_k q_nk k_jk [exp((n - j) log_decay_k)]
    O_i = sum_j exp(s_nj) v_j / Z_i,   Z_i = sum_j exp(s_nj)
    o   = sum_i Z_i O_i / sum_i Z_i                                equations 8 to 10

over the branches that have the token in this head, 0 where none has. offset(h, r) spreads the
heads: h // ceil(H / r) in the code ("grouped"), h mod r in the paper ("modulo"). The code takes the
weights Z_i / sum Z as constants in backward; with `weight_gradient` they are not, and o is one
softmax over all that the branches see, to autograd too. log_decay is that of xPos (Sun et al. 2022,
https://arxiv.org/abs/2212.10554): a constant per channel.

`dilated_attention` is the function to call; `dilated_attention_reference` is the definition, with
masks. To go on later one needs of each branch only the selected keys and values of the segment that
is not over: sum_i ceil(w_i / r_i) slots per head, at any length. `hold` makes them after a pass,
`write_slots` after a token, `Held` hands them to the next pass, `dilated_attention_step` decodes.
"""

import functools
from typing import NamedTuple

import torch

from .attention_by_head import attend, attend_gradients, takes_blocks_by_head
from .autograd_rules import by_formula
from .dilated_branches import branches_of
from .known_calls import KnownCalls, can_be_known, form
from .linear_recurrence import accumulator_dtype, check_boundaries, choose_backend

OFFSETS = ("grouped", "modulo")
# In place of the log of no weight at all: finite, as -inf - (-inf) is not a number.
NO_WEIGHT = -1e30
# Queries at a time where attention is not fused, or has a decay.
BLOCK = 512
# With more documents than these, ragged segments are filled up, so that they share calls.
MANY_DOCUMENTS = 8


class Held(NamedTuple):
    """What a pass goes on from: selected keys and values of unfinished segments, by slot.

    Attributes:
        keys: [R, H, M, K]: slot first + c of a branch holds the token at u = c r + offset.
        values: [R, H, M, V].
        count: [N], how many tokens of each document came before the pass.
        row: [N], which of the R rows is a document's; None: the n-th.
    """

    keys: torch.Tensor
    values: torch.Tensor
    count: torch.Tensor
    row: torch.Tensor | None = None


def dilated_attention(
    q,
    k,
    v,
    segment_lengths,
    dilation_rates,
    *,
    scale=None,
    offsets="grouped",
    log_decay=None,
    cu_seqlens=None,
    held=None,
    weight_gradient=False,
    backend="auto",
):
    """Causal dilated attention of the module docstring over a batch or a packed stream.

    Args:
        q: [B, T, H, K], any float dtype. Scores and sums are in float32 at least.
        k: [B, T, H, K].
        v: [B, T, H, V].
        segment_lengths: w of each branch, in tokens.
        dilation_rates: r of each branch.
        scale: of the scores; None: K^-1/2.
        offsets: how heads are spread over offsets, "grouped" or "modulo".
        log_decay: [K], <= 0, a constant: no gradient; None: no decay.
        cu_seqlens: [N + 1] boundaries of documents packed in one row (B = 1).
        held: a `Held`; None: all documents start here.
        weight_gradient: whether the weights of the branches are differentiated.
        backend: "torch", "triton", or "auto": "triton" for tensors on a GPU where it is installed
            and they are not float64, else "torch".

    Returns:
        o [B, T, H, V] in v's dtype.

    Raises:
        ValueError: shapes that do not fit, an unknown way to spread heads, a backend that cannot.
    """
    if backend == "fla":
        raise ValueError(
            "dilated_attention: backend is one of auto, torch, triton, got 'fla', which has no "
            'such attention; use backend="auto".'
        )
    held_tensors = (None,) * 4 if held is None else (held.keys, held.values, held.count, held.row)
    key, tensors = None, (q, k, v, *held_tensors, log_decay, cu_seqlens)
    if can_be_known(q, 1.0 if scale is None else scale):
        learns = torch.is_grad_enabled()
        key = (
            (backend, tuple(segment_lengths), tuple(dilation_rates), scale, offsets, q.device),
            (q.shape, q.dtype, k.shape, k.dtype, v.shape, v.dtype),
            learns and (q.requires_grad or k.requires_grad or v.requires_grad),
            (learns, weight_gradient, held is not None and _form_of(held, learns)),
            None if log_decay is None else form(log_decay),
            None if cu_seqlens is None else form(cu_seqlens),
        )
        call = _known.prepared.get(key)
        if call is not None:
            return call(*tensors)[0]
    chosen = choose_backend("dilated_attention", backend, q)
    branches = check_arguments(
        q, k, v, segment_lengths, dilation_rates, offsets, log_decay, cu_seqlens, held
    )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if chosen == "triton" and key is not None:
        prepare = functools.partial(
            _prepare_triton, tensors, branches, scale, offsets, weight_gradient
        )
        call = _known.meet(key, prepare)
        if call is not None:
            return call(*tensors)[0]
    if chosen == "triton":
        from .dilated_attention_triton import dilated_attention_triton as run
    else:
        run = _run_torch
    return run(q, k, v, branches, scale, offsets, log_decay, cu_seqlens, held, weight_gradient)


_known = KnownCalls()


def _form_of(held, learns):
    """What a key says about a `Held`."""
    is_differentiated = learns and (held.keys.requires_grad or held.values.requires_grad)
    return (is_differentiated, *(None if x is None else form(x) for x in held))


def _prepare_triton(tensors, branches, scale, offsets, weight_gradient):
    """What to keep for calls of this form: it returns the output in a tuple."""
    from .dilated_attention_triton import PASSES, numbers_of
    from .ready_triton import Ready, prepared_call

    numbers = numbers_of(tensors, branches, scale, offsets, weight_gradient)
    return prepared_call(PASSES, numbers, Ready(PASSES, numbers, is_kept=False))


def check_arguments(q, k, v, segment_lengths, dilation_rates, offsets, log_decay, cu_seqlens, held):
    """The `Branch`es of a call, or a ValueError. See `dilated_attention`."""

    def require(condition, message):
        if not condition:
            raise ValueError(f"dilated_attention: {message}")

    branches = branches_of(segment_lengths, dilation_rates)
    require(
        q.ndim == 4 and k.shape == q.shape and v.ndim == 4 and v.shape[:3] == q.shape[:3],
        "expected q and k [B, T, H, K] and v [B, T, H, V], got "
        f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}.",
    )
    batch, time, num_heads, key_dim = q.shape
    require(time > 0, f"there are no tokens, q is {list(q.shape)}; pass at least one.")
    require(offsets in OFFSETS, f"offsets is one of {', '.join(OFFSETS)}, got {offsets!r}.")
    if log_decay is not None:
        require(
            list(log_decay.shape) == [key_dim],
            f"log_decay is [K] = {[key_dim]}, got {list(log_decay.shape)}.",
        )
    num_documents = check_boundaries("dilated_attention", cu_seqlens, batch, time)
    if held is not None:
        slots = branches[-1].first + branches[-1].count
        for name, x, size in (("keys", held.keys, key_dim), ("values", held.values, v.shape[-1])):
            require(
                x.ndim == 4 and list(x.shape[1:]) == [num_heads, slots, size],
                f"held.{name} is [R, {num_heads}, {slots}, {size}], got {list(x.shape)}.",
            )
        for name, x in (("count", held.count), ("row", held.row)):
            require(
                x is None or list(x.shape) == [num_documents],
                f"held.{name} is [N] = {[num_documents]}, got {x if x is None else list(x.shape)}.",
            )
    return branches


def _documents(batch, time, cu_seqlens, held):
    """(First token in the flattened batch, tokens before the pass, tokens, row of what is held)."""
    if cu_seqlens is None:
        spans = [(row * time, time) for row in range(batch)]
    else:
        bounds = cu_seqlens.tolist()
        spans = [(start, end - start) for start, end in zip(bounds, bounds[1:])]
    counts, rows = [0] * len(spans), range(len(spans))
    if held is not None:
        counts = held.count.tolist()
        rows = rows if held.row is None else held.row.tolist()
    return [(first, count, n, row) for (first, n), count, row in zip(spans, counts, rows)]


def dilated_attention_reference(
    q,
    k,
    v,
    segment_lengths,
    dilation_rates,
    *,
    scale=None,
    offsets="grouped",
    log_decay=None,
    cu_seqlens=None,
    held=None,
    weight_gradient=False,
):
    """The definition: for each document and branch all scores and a mask. Quadratic.

    As `dilated_attention`; in float64 if q is, else in float32.
    """
    branches = check_arguments(
        q, k, v, segment_lengths, dilation_rates, offsets, log_decay, cu_seqlens, held
    )
    dtype, (batch, time, num_heads, key_dim) = accumulator_dtype(q), q.shape
    scale = key_dim**-0.5 if scale is None else scale
    q_THK, k_THK, v_THV = (x.to(dtype).flatten(0, 1) for x in (q, k, v))
    outputs = []
    for first, count, length, row in _documents(batch, time, cu_seqlens, held):
        own = slice(first, first + length)
        i_T = torch.arange(count, count + length, device=q.device)
        j_S = torch.arange(count + length, device=q.device)
        sums, logs = [], []
        for branch in branches:
            offset_H = branch.offsets(num_heads, offsets, q.device)
            k_SHK, v_SHV = (
                _with_held(x[own], None if held is None else slots[row], branch, count, offset_H)
                for x, slots in zip((k_THK, v_THV), held[:2] if held else (None, None))
            )
            score_HTS = _scores(q_THK[own], k_SHK, i_T, j_S, scale, log_decay).to(dtype)
            has_HT, has_HS = (
                x % branch.length % branch.rate == offset_H[:, None] for x in (i_T, j_S)
            )
            visible_TS = j_S <= i_T[:, None]
            visible_TS = visible_TS & (j_S // branch.length == i_T[:, None] // branch.length)
            visible_HTS = visible_TS & has_HT[..., None] & has_HS[:, None]
            score_HTS = score_HTS.masked_fill(~visible_HTS, NO_WEIGHT)
            logs.append(score_HTS.logsumexp(-1))
            o_HTV = score_HTS.softmax(-1) @ v_SHV.transpose(0, 1)
            sums.append(torch.where(has_HT[..., None], o_HTV, 0))
        o_HTV = _merged(sums, logs, weight_gradient)
        outputs.append(o_HTV.transpose(0, 1))
    return torch.cat(outputs).unflatten(0, (batch, time)).to(v.dtype)


def _merged(outputs, logs, weight_gradient):
    """Equation 10: outputs [..., V] of the branches, weighted by their softmaxes' denominators.

    Args:
        outputs: of each branch.
        logs: of its denominators, [...].
        weight_gradient: as of `dilated_attention`.
    """
    logs = torch.stack(logs, dim=-1)
    weights = (logs if weight_gradient else logs.detach()).softmax(-1)
    return (torch.stack(outputs, dim=-1) * weights.unsqueeze(-2)).sum(-1)


def _with_held(x_THK, held_HMK, branch, count, offset_H):
    """Tokens of a document from its first on, as far as a branch knows those before the pass."""
    x_SHK = torch.cat([x_THK.new_zeros(count, *x_THK.shape[1:]), x_THK])
    if held_HMK is None:
        return x_SHK
    u_HC = torch.arange(branch.count, device=x_THK.device) * branch.rate + offset_H[:, None]
    number_HC = count // branch.length * branch.length + u_HC
    head, slot = ((number_HC < count) & (u_HC < branch.length)).nonzero().T
    held_SHK = torch.zeros_like(x_SHK)
    held_SHK[number_HC[head, slot], head] = held_HMK[head, branch.first + slot].to(x_SHK.dtype)
    return x_SHK + held_SHK


def _scores(q_THK, k_SHK, i_T, j_S, scale, log_decay):
    if log_decay is None:
        return torch.einsum("thk,shk->hts", q_THK, k_SHK) * scale
    distance_TS = (i_T[:, None] - j_S).clamp(min=0).to(q_THK.dtype)
    decay_TSK = (distance_TS[..., None] * log_decay.to(q_THK.dtype)).exp()
    return torch.einsum("thk,shk,tsk->hts", q_THK, k_SHK, decay_TSK) * scale


class _Piece(NamedTuple):
    """Segments of a branch that are computed in one call, S of them, each with slots in order.

    Attributes:
        query: [S, H, C] rows among all tokens' heads; the one after the last where there is none.
        key: [S, H, C'] rows, on past all tokens into what is held.
        first: the slot of the first query; keys are from slot 0.
        rate: r.
    """

    query: torch.Tensor
    key: torch.Tensor
    first: int
    rate: int


def _pieces(documents, num_tokens, num_heads, branches, offsets, device):
    """The pass as pieces: all full segments of a branch in one, others by their length."""
    num_slots = branches[-1].first + branches[-1].count
    heads_H1 = torch.arange(num_heads, device=device)[:, None]
    for branch in branches:
        groups, (w, r) = {}, branch[:2]
        for first, start, length, row in documents:
            for segment in range(start // w, -(-(start + length) // w) if length else 0):
                begin = segment * w
                low = max(start - begin, 0)
                high = min(start + length - begin, w)
                size = -(-high // r) - low // r
                if len(documents) > MANY_DOCUMENTS and high < w:
                    size = _rounded_up(size)
                group = groups.setdefault((low // r, size), [])
                group.append((first + begin - start, low, high, row))
        offset_H1 = branch.offsets(num_heads, offsets, device)[:, None]
        for (slot, size), members in groups.items():
            begin_S, low_S, high_S, row_S = torch.tensor(members, device=device).T[..., None, None]
            u_HC = torch.arange(slot + size, device=device) * r + offset_H1
            # A slot without a token takes another token, which only a query without one sees.
            token_SHC = begin_S + torch.minimum(torch.maximum(u_HC, low_S), high_S - 1)
            key_SHC = token_SHC * num_heads + heads_H1
            query_SHC, u_HQ = key_SHC[..., slot:], u_HC[:, slot:]
            is_query = (u_HQ >= low_S) & (u_HQ < high_S)
            query_SHC = torch.where(is_query, query_SHC, num_tokens * num_heads)
            if slot or any(low for _, low, _, _ in members):
                held_SHC = (row_S * num_heads + heads_H1) * num_slots + branch.first
                held_SHC = held_SHC + torch.arange(slot + size, device=device)
                key_SHC = torch.where(u_HC < low_S, num_tokens * num_heads + held_SHC, key_SHC)
            yield _Piece(query_SHC, key_SHC, slot, r)


def _rounded_up(size):
    """To one of four lengths per power of two, from 32 on."""
    step = 1 << max((size - 1).bit_length() - 2, 5)
    return -(-size // step) * step


def _run_torch(q, k, v, branches, scale, offsets, log_decay, cu_seqlens, held, weight_gradient):
    """Gather, attention of all segments alike in one call, scatter: linear in the length."""
    if torch.compiler.is_exporting():
        from .dilated_attention_export import dilated_attention_exported

        if held is not None:
            raise ValueError(
                "dilated_attention: a program that is exported starts with a document's first "
                f"token or takes one at a time, got {q.shape[1]} tokens after others."
            )
        return dilated_attention_exported(
            q, k, v, branches, scale, offsets, log_decay, weight_gradient
        )
    dtype = accumulator_dtype(q)
    if log_decay is not None:
        log_decay = log_decay.detach().to(dtype)
        _check_range(branches, log_decay)
    documents = tuple(_documents(*q.shape[:2], cu_seqlens, held))
    tensors = [q, k, v, *(held[:2] if held else (None, None))]
    with torch.autocast(q.device.type, enabled=False):
        o = _DilatedAttention.apply(
            *(None if x is None else x.to(dtype) for x in tensors),
            log_decay,
            documents,
            tuple(branches),
            scale,
            offsets,
            weight_gradient,
        )
    return o.to(v.dtype)


def _check_range(branches, log_decay):
    """Raises a ValueError if a decay leaves float32 within a block of queries."""
    if log_decay.device.type != "cpu" or torch.compiler.is_compiling():
        return
    lowest = log_decay.min().item()
    for branch in branches:
        reach = min(_block_size(branch.rate), branch.count) * branch.rate / 2
        if -lowest * reach > 80:  # exp(80) is near float32's largest number
            raise ValueError(
                f"dilated_attention: a log_decay of {lowest:.3g} per token is too strong for a "
                f"dilation rate of {branch.rate}: no score is left between selected tokens. Use a "
                "smaller rate, or no decay."
            )


def _block_size(rate):
    """Queries at a time under a decay: fewer tokens than it takes for one to overflow."""
    return min(max(4096 // rate, 16), BLOCK)


class _DilatedAttention(torch.autograd.Function):
    """Branches apart, and their sum weighted by what each softmax had in its denominator."""

    @staticmethod
    def forward(
        ctx,
        q,
        k,
        v,
        held_keys,
        held_values,
        log_decay,
        documents,
        branches,
        scale,
        offsets,
        weight_gradient,
    ):
        batch, time, num_heads, _ = q.shape
        tables = _tables(q, k, v, held_keys, held_values)
        # One more row, for queries that are none.
        rows = batch * time * num_heads + 1
        log_R = q.new_full((rows,), NO_WEIGHT)
        o_RV = q.new_zeros(rows, tables[2].shape[-1])
        pieces = list(_pieces(documents, batch * time, num_heads, branches, offsets, q.device))
        parts = []
        for piece in pieces:
            o_SHCV, log_SHC = _attend(piece, *_gathered(tables, piece), scale, log_decay)
            parts.append((o_SHCV, log_SHC))
            log_R[piece.query] = torch.logaddexp(log_R[piece.query], log_SHC)
        log_R[-1] = -NO_WEIGHT  # whatever those would see, they see nothing of it
        for piece, (o_SHCV, log_SHC) in zip(pieces, parts):
            weight_SHC1 = (log_SHC - log_R[piece.query]).exp()[..., None]
            o_RV.index_add_(0, piece.query.flatten(), (weight_SHC1 * o_SHCV).flatten(0, 2))
        ctx.pieces = [piece[2:] for piece in pieces]
        ctx.scale, ctx.weight_gradient = scale, weight_gradient
        # The gradient of a softmax needs its own output; with that of all branches in its place it
        # is that of one softmax over all.
        outputs = [] if weight_gradient else [o for o, _ in parts]
        inputs = q, k, v, held_keys, held_values, log_decay, o_RV, log_R
        ctx.save_for_backward(*inputs, *(x for piece in pieces for x in piece[:2]), *outputs)
        return o_RV[:-1, : v.shape[-1]].reshape(v.shape)

    @staticmethod
    @by_formula
    def backward(ctx, grad_o):
        q, k, v, held_keys, held_values, log_decay, o_RV, log_R, *rest = ctx.saved_tensors
        inputs, count = (q, k, v, held_keys, held_values), len(ctx.pieces)
        tables = _tables(*inputs)
        width = tables[2].shape[-1] - grad_o.shape[-1]
        grad_RV = torch.nn.functional.pad(grad_o.flatten(0, 2), (0, width, 0, 1))
        # The last row is of queries that are none.
        totals = [torch.zeros_like(o_RV), *(torch.zeros_like(x) for x in tables[1:])]
        for n, numbers in enumerate(ctx.pieces):
            piece = _Piece(rest[2 * n], rest[2 * n + 1], *numbers)
            o_SHCV = o_RV[piece.query] if ctx.weight_gradient else rest[2 * count + n]
            softmax = grad_RV[piece.query], o_SHCV, log_R[piece.query]
            grads = _attend_backward(
                piece, *_gathered(tables, piece), *softmax, ctx.scale, log_decay
            )
            indices = piece.query, piece.key, piece.key
            for total, grad, index in zip(totals, grads, indices):
                total.index_add_(0, index.flatten(), grad.flatten(0, 2))
        tokens, grads = len(o_RV) - 1, []
        for total, x in zip(totals, inputs):
            grads.append(total[:tokens, : x.shape[-1]].reshape(x.shape))
        for total, x in zip(totals[1:], inputs[3:]):
            rows = None if x is None else total[tokens:, : x.shape[-1]].reshape(x.shape)
            grads.append(rows)
        return *grads, *[None] * 6


def _tables(q, k, v, held_keys, held_values):
    """Rows of all tokens' heads, those that are held behind; K and V filled up to one width."""
    width = max(q.shape[-1], v.shape[-1])
    pairs = (q, None), (k, held_keys), (v, held_values)
    tables = []
    for x, held in pairs:
        x_RK = x.flatten(0, 2)
        if held is not None:
            x_RK = torch.cat([x_RK, held.flatten(0, 2)])
        if x.shape[-1] < width:
            x_RK = torch.nn.functional.pad(x_RK, (0, width - x.shape[-1]))
        tables.append(x_RK)
    return tables


def _gathered(tables, piece):
    """q [S, H, C, K], k and v of a piece. A query that is none takes any row: the last."""
    q_RK, k_RK, v_RV = tables
    return q_RK[piece.query.clamp(max=len(q_RK) - 1)], k_RK[piece.key], v_RV[piece.key]


def _attend(piece, q_SHCK, k_SHCK, v_SHCV, scale, log_decay):
    """(o [S, H, C, V], log of the denominators [S, H, C]) of causal attention, slot by slot."""
    outputs = []
    for part, size, factors in _blocks(piece, q_SHCK, log_decay):
        q, k = _times(factors, q_SHCK[:, :, part], k_SHCK[:, :, :size])
        outputs.append(_softmax_attention(q, k, v_SHCV[:, :, :size], scale))
    if len(outputs) == 1:
        return outputs[0]
    return tuple(torch.cat(x, dim=2) for x in zip(*outputs))


def _attend_backward(piece, q_SHCK, k_SHCK, v_SHCV, grad_SHCV, o_SHCV, log_SHC, scale, log_decay):
    """Gradients of q, k and v, given outputs and denominators."""
    totals = torch.empty_like(q_SHCK), torch.zeros_like(k_SHCK), torch.zeros_like(v_SHCV)
    for part, size, factors in _blocks(piece, q_SHCK, log_decay):
        q, k = _times(factors, q_SHCK[:, :, part], k_SHCK[:, :, :size])
        softmax = (x[:, :, part] for x in (grad_SHCV, o_SHCV, log_SHC))
        dq, dk, dv = _softmax_attention_backward(q, k, v_SHCV[:, :, :size], *softmax, scale)
        dq, dk = _times(factors, dq, dk)
        totals[0][:, :, part] = dq
        totals[1][:, :, :size] += dk
        totals[2][:, :, :size] += dv
    return totals


def _blocks(piece, q_SHCK, log_decay):
    """(slice of the queries, how many keys they see, factors on both).

    All queries at once, unless there is a decay: that is split between q and k around the middle
    of a block, so that only keys of the same block get a factor above 1.
    """
    count, first, rate = q_SHCK.shape[2], piece.first, piece.rate
    if log_decay is None:
        yield slice(None), first + count, None
        return
    block = _block_size(rate)
    for start in range(0, count, block):
        end = min(start + block, count)
        steps = torch.arange(first + end, device=q_SHCK.device) - first - (start + end) // 2
        exponent_CK = steps[:, None] * (rate * log_decay)
        factors = exponent_CK[first + start :].exp(), (-exponent_CK).exp()
        yield slice(start, end), first + end, factors


def _times(factors, q_SHCK, k_SHCK):
    if factors is None:
        return q_SHCK, k_SHCK
    # Heads filled up to a wider V have no decay there, nor anything else.
    pad = q_SHCK.shape[-1] - factors[0].shape[-1]
    q_CK, k_CK = (torch.nn.functional.pad(x, (0, pad)) for x in factors)
    return q_SHCK * q_CK, k_SHCK * k_CK


def _mask(q_SHCK, k_SHCK):
    """0 where a key is seen, else -inf, [C, C']: queries are the last of as many slots."""
    num_queries, num_keys = q_SHCK.shape[2], k_SHCK.shape[2]
    mask_CC = q_SHCK.new_full((num_queries, num_keys), -torch.inf)
    return mask_CC.triu(num_keys - num_queries + 1)


def _fused_mask(q_SHCK, k_SHCK):
    """(whether attention is plainly causal, else its mask)."""
    is_square = q_SHCK.shape[2] == k_SHCK.shape[2]
    return is_square, None if is_square else _mask(q_SHCK, k_SHCK)


def _is_fused(x):
    """Whether PyTorch has a fused attention for a tensor that also tells the denominators."""
    return x.device.type == "cpu"


def _softmax_attention(q, k, v, scale):
    """PyTorch's fused attention on a CPU, with its logarithms; elsewhere written out, in blocks."""
    if takes_blocks_by_head(q, k, v, q.shape[2], k.shape[2]):
        inputs = [x.flatten(0, 1).contiguous() for x in (q * scale, k, v)]
        found = attend(*inputs, is_causal=True, wants_log=True)
        return tuple(x.unflatten(0, q.shape[:2]) for x in found)
    if _is_fused(q):
        is_causal, mask = _fused_mask(q, k)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale
        )
    outputs = []
    for _, score_SHCC in _score_blocks(q, k, scale):
        outputs.append((score_SHCC.softmax(-1) @ v, score_SHCC.logsumexp(-1)))
    return tuple(torch.cat(x, dim=2) for x in zip(*outputs))


def _softmax_attention_backward(q, k, v, grad_o, o, log, scale):
    if takes_blocks_by_head(q, k, v, q.shape[2], k.shape[2]):
        inputs = [x.flatten(0, 1).contiguous() for x in (q * scale, k, v, o, grad_o)]
        found = attend_gradients(*inputs, is_causal=True, log_NT=log.flatten(0, 1))
        dq, dk, dv = (x.unflatten(0, q.shape[:2]) for x in found)
        return dq * scale, dk, dv
    if _is_fused(q):
        is_causal, mask = _fused_mask(q, k)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_o, q, k, v, o, log, 0.0, is_causal, attn_mask=mask, scale=scale
        )
    dq, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
    sizes = {"split_size": BLOCK, "dim": 2}
    softmax = (x.split(**sizes) for x in (grad_o, o, log))
    blocks = zip(_score_blocks(q, k, scale), *softmax, strict=True)
    for (q_SHCK, score_SHCC), grad_SHCV, o_SHCV, log_SHC in blocks:
        p_SHCC = (score_SHCC - log_SHC[..., None]).exp()
        dv += p_SHCC.mT @ grad_SHCV
        delta_SHC1 = (grad_SHCV * o_SHCV).sum(-1, keepdim=True)
        dscore_SHCC = p_SHCC * (grad_SHCV @ v.mT - delta_SHC1) * scale
        dq.append(dscore_SHCC @ k)
        dk += dscore_SHCC.mT @ q_SHCK
    return torch.cat(dq, dim=2), dk, dv


def _score_blocks(q, k, scale):
    """(queries, scores) of `BLOCK` queries at a time; -inf where a key is not seen."""
    for q_SHCK, mask_CC in zip(q.split(BLOCK, dim=2), _mask(q, k).split(BLOCK)):
        yield q_SHCK, q_SHCK @ k.mT * scale + mask_CC


def dilated_attention_step(
    q,
    keys,
    values,
    clock,
    segment_lengths,
    dilation_rates,
    *,
    scale=None,
    offsets="grouped",
    log_decay=None,
    weight_gradient=False,
):
    """Attention of one token per row to the slots, after `write_slots` has written it.

    Args:
        q: [B, 1, H, K].
        keys: [B, H, M, K].
        values: [B, H, M, V].
        clock: [B], the token's number in its document, from 0.
        segment_lengths, dilation_rates, scale, offsets, log_decay, weight_gradient: as of
            `dilated_attention`.

    Returns:
        o [B, 1, H, V] in q's dtype.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    branches = branches_of(segment_lengths, dilation_rates)
    with torch.autocast(q.device.type, enabled=False):
        return _step(q, keys, values, clock, branches, scale, offsets, log_decay, weight_gradient)


def _step(q, keys, values, clock, branches, scale, offsets, log_decay, weight_gradient):
    dtype, (batch, _, num_heads, _) = accumulator_dtype(q), q.shape
    q_BHK = q[:, 0].to(dtype) * scale
    rows_B1 = torch.arange(batch, device=q.device)[:, None]
    outputs, logs = [], []
    for branch in branches:
        u_B = clock % branch.length
        slot_B1, offset_B1 = (u_B // branch.rate)[:, None], (u_B % branch.rate)[:, None]
        # Only the heads with this token's offset take part: as many for every token.
        members_G = torch.arange(branch.group_size(num_heads), device=q.device)
        head_BG = offset_B1 * len(members_G) + members_G
        if offsets == "modulo":
            head_BG = offset_B1 + members_G * branch.rate
        has_BG, own_BG = head_BG < num_heads, head_BG.clamp(max=num_heads - 1)
        slots = slice(branch.first, branch.first + branch.count)
        k_BGCK, v_BGCV = (x[:, :, slots][rows_B1, own_BG].to(dtype) for x in (keys, values))
        steps_BC = slot_B1 - torch.arange(branch.count, device=q.device)
        if log_decay is not None:
            distance_BC1 = (steps_BC.clamp(min=0) * branch.rate)[..., None].to(dtype)
            k_BGCK = k_BGCK * (distance_BC1 * log_decay.to(dtype)).exp()[:, None]
        score_BGC = torch.einsum("bgk,bgck->bgc", q_BHK[rows_B1, own_BG], k_BGCK)
        score_BGC = score_BGC.masked_fill((steps_BC < 0)[:, None], NO_WEIGHT)
        o_BGV = torch.einsum("bgc,bgcv->bgv", score_BGC.softmax(-1), v_BGCV)
        # Members that are no heads go to one more, which is dropped.
        to_BG = torch.where(has_BG, own_BG, num_heads)
        log_BH = score_BGC.new_full((batch, num_heads + 1), NO_WEIGHT)
        logs.append(log_BH.scatter(1, to_BG, score_BGC.logsumexp(-1))[:, :-1])
        o_BHV = o_BGV.new_zeros(batch, num_heads + 1, o_BGV.shape[-1])
        to_BGV = to_BG[..., None].expand_as(o_BGV)
        outputs.append(o_BHV.scatter(1, to_BGV, o_BGV)[:, :-1])
    o_BHV = _merged(outputs, logs, weight_gradient)
    return o_BHV[:, None].to(q.dtype)


def write_slots(
    held,
    new,
    clock,
    segment_lengths,
    dilation_rates,
    *,
    offsets="grouped",
    is_written=None,
    may_overwrite=False,
):
    """The slots with one more token of each row; a copy unless they may be overwritten.

    Args:
        held: [B, H, M, K].
        new: [B, H, K], a token's keys or values.
        clock: [B], its number in its document, from 0.
        segment_lengths, dilation_rates, offsets: as of `dilated_attention`.
        is_written: [B] bool, which rows have such a token; None: all.
        may_overwrite: whether to write into `held` itself.
    """
    batch, num_heads = new.shape[:2]
    branches = branches_of(segment_lengths, dilation_rates)
    slots, selected = [], []
    for branch in branches:
        u_B1 = (clock % branch.length)[:, None]
        slots.append((branch.first + u_B1 // branch.rate).expand(-1, num_heads))
        selected.append(u_B1 % branch.rate == branch.offsets(num_heads, offsets, new.device))
    slot_BHI, selected_BHI = torch.stack(slots, dim=-1), torch.stack(selected, dim=-1)
    if is_written is not None:
        selected_BHI = selected_BHI & is_written[:, None, None]
    rows_B11 = torch.arange(batch, device=new.device)[:, None, None]
    heads_H1 = torch.arange(num_heads, device=new.device)[:, None]
    old_BHIK = held[rows_B11, heads_H1, slot_BHI]
    new_BHIK = new[:, :, None].to(held.dtype)
    if not may_overwrite:
        held = held.clone()
    held[rows_B11, heads_H1, slot_BHI] = torch.where(selected_BHI[..., None], new_BHIK, old_BHIK)
    return held


def hold(x, held, segment_lengths, dilation_rates, first, start, after, *, offsets="grouped"):
    """The slots after a pass, [R, H, M, K]: what `write_slots` leaves, token by token.

    So behind the newest token of a segment lie those of the segment before, until they are
    overwritten; zeros where there is none.

    Args:
        x: [B, T, H, K], keys or values of the pass.
        held: [R, H, M, K], the slots before it; None: there were none.
        segment_lengths, dilation_rates, offsets: as of `dilated_attention`.
        first: [R], where a row's document begins in the flattened batch.
        start: [R], how many of its tokens came before the pass.
        after: [R], how many there are after it.
    """
    x_TK, num_heads = x.flatten(0, 2), x.shape[2]
    heads_H1 = torch.arange(num_heads, device=x.device)[:, None]
    pieces = []
    for branch in branches_of(segment_lengths, dilation_rates):
        offset_H1 = branch.offsets(num_heads, offsets, x.device)[:, None]
        u_HC = torch.arange(branch.count, device=x.device) * branch.rate + offset_H1
        newest_R11, start_R11 = (n[:, None, None] for n in (after - 1, start))
        number_RHC = newest_R11 - (newest_R11 - u_HC) % branch.length
        number_RHC = torch.where(u_HC < branch.length, number_RHC, -1)
        token_RHC = first[:, None, None] + (number_RHC - start_R11).clamp(min=0)
        row_RHC = token_RHC * num_heads + heads_H1
        new_RHCK = x_TK[row_RHC.clamp(max=len(x_TK) - 1)]
        if held is None:
            old_RHCK = 0
        else:
            old_RHCK = held[:, :, branch.first : branch.first + branch.count]
            new_RHCK = new_RHCK.to(held.dtype)
            old_RHCK = torch.where((number_RHC >= 0)[..., None], old_RHCK, 0)
        is_new_RHC = (number_RHC >= start_R11) & (number_RHC >= 0)
        pieces.append(torch.where(is_new_RHC[..., None], new_RHCK, old_RHCK))
    return torch.cat(pieces, dim=2)
