"""Softmax attention over a window of W keys, in time and memory linear in the length.

Child et al. 2019, https://arxiv.org/abs/1904.10509; Mistral 7B, https://arxiv.org/abs/2310.06825.
Query i of a document sees W keys, up to and including its own unless there is a delay:

    o_i = sum_j p_ij v_j,   p_ij = exp(s_ij) / Z_i   for i - delay - W < j <= i - delay
    s_ij = scale q_i^T k_j  [+ b_d, d = i - delay - j]  [+ b_i,d]
    Z_i = sum_j exp(s_ij)  [+ sum over sinks]  [+ exp(sink_logit)]

Sinks: M first keys of each document, which a query can go on to see after they left its window,
with a query of its own for them (Xiao et al. 2023, https://arxiv.org/abs/2309.17453). A sink
logit per head (as in gpt-oss), or per head and query, takes part in the softmax without a value.
b is a bias by head and distance, or by head, query and distance. There may also be a decay of each
channel by distance, s_ij = scale sum_c q_ic k_jc exp(d log_decay_c), as xPos has it (Sun et al.
2022, https://arxiv.org/abs/2212.10554).

`windowed_attention` is the function to call: it cuts the queries into blocks and gives each the
band of keys it can see. `windowed_attention_reference` is the definition, with the whole mask.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .attention_by_head import LEAST_IN_BLOCK, attend_block, takes_blocks_by_head
from .causal_attention import causal_attention, takes_flash_attention

# Queries per block: a block of C sees a band of C + W - 1 keys, so small blocks waste less of it,
# and large ones make larger matrix products.
MIN_BLOCK, MAX_BLOCK = 128, 512


class Sinks(NamedTuple):
    """First keys of each document, for queries that they left the window of.

    Attributes:
        q: [B, T, H, K], the queries, rotated for the sinks.
        k: [N, M, G, K] for N documents (N = B where nothing is packed).
        v: [N, M, G, V].
        count: [B, T], how many of its document's M sinks a query sees beside its window.
        bias: [B or 1, T, M, H], added to the scaled scores; None: nothing.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    count: torch.Tensor
    bias: torch.Tensor | None = None


def document_of_token(cu_seqlens, length):
    """The index of each token's document, [T]; documents may be empty."""
    tokens = torch.arange(length, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True)


def first_keys(length, cu_seqlens, first_key):
    """The first key that each query may see, [B or 1, T or 1]; None: all."""
    if cu_seqlens is not None:
        return cu_seqlens[document_of_token(cu_seqlens, length)][None]
    return None if first_key is None else first_key[:, None]


def visible_keys(
    num_queries, num_keys, window=None, *, cu_seqlens=None, first_key=None, delay=0, device
):
    """Which keys each query sees, [B or 1, T, S] bool; arguments as of `windowed_attention`."""
    i_T1 = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None] - delay
    j_S = torch.arange(num_keys, device=device)
    visible_BTS = ((j_S <= i_T1) & (j_S > i_T1 - (window or num_keys)))[None]
    first_BT = first_keys(num_queries, cu_seqlens, first_key)
    return visible_BTS if first_BT is None else visible_BTS & (j_S >= first_BT[..., None])


def windowed_attention_reference(
    q,
    k,
    v,
    window=None,
    *,
    scale=None,
    cu_seqlens=None,
    first_key=None,
    sinks=None,
    sink_logits=None,
    delay=0,
    distance_bias=None,
    query_bias=None,
    log_decay=None,
):
    """The definition: all scores [B, H, T, S] and a mask. As `windowed_attention`."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    length, repeats = q.shape[1], q.shape[2] // k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q_BTHK, k_BSHK, v_BSHV = (
        q.to(dtype),
        *(x.to(dtype).repeat_interleave(repeats, dim=2) for x in (k, v)),
    )
    documents = {"cu_seqlens": cu_seqlens, "first_key": first_key}
    visible_BTS = visible_keys(
        length, k.shape[1], window, **documents, delay=delay, device=q.device
    )
    i_T1 = torch.arange(k.shape[1] - length, k.shape[1], device=q.device)[:, None] - delay
    distance_TS = (i_T1 - torch.arange(k.shape[1], device=q.device)).clamp(min=0)
    if log_decay is None:
        score_BHTS = torch.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK) * scale
    else:
        score_BHTS = _decayed_scores(q_BTHK, k_BSHK, distance_TS, log_decay.to(dtype)) * scale
    if distance_bias is not None:
        last = distance_bias.shape[1] - 1
        score_BHTS = score_BHTS + distance_bias.to(dtype)[:, distance_TS.clamp(max=last)]
    if query_bias is not None:
        rows_T = torch.arange(length, device=q.device)
        score_BHTS = score_BHTS + query_bias(rows_T, distance_TS).to(dtype)
    scores = [score_BHTS.masked_fill(~visible_BTS[:, None], -torch.inf)]
    if sinks is not None:
        # [B, T, M, H, K]: each query's own document's
        k_BTMHK, v_BTMHV = (
            (x[:, None] if cu_seqlens is None else x[document_of_token(cu_seqlens, length)][None])
            .to(dtype)
            .repeat_interleave(repeats, dim=3)
            for x in (sinks.k, sinks.v)
        )
        k_BTMHK, v_BTMHV = (x.expand(-1, length, -1, -1, -1) for x in (k_BTMHK, v_BTMHV))
        score_BHTM = torch.einsum("bthk,btmhk->bhtm", sinks.q.to(dtype), k_BTMHK) * scale
        if sinks.bias is not None:
            score_BHTM = score_BHTM + sinks.bias.to(dtype).movedim(-1, 1)
        seen_BTM = torch.arange(k_BTMHK.shape[2], device=q.device) < sinks.count[..., None]
        scores.append(score_BHTM.masked_fill(~seen_BTM[:, None], -torch.inf))
    if sink_logits is not None:
        logits_BTH = sink_logits.to(dtype).expand(*q.shape[:3])
        scores.append(logits_BTH.transpose(1, 2)[..., None])
    p_BHTS = torch.cat(scores, dim=-1).softmax(-1)
    o_BTHV = torch.einsum("bhts,bshv->bthv", p_BHTS[..., : k.shape[1]], v_BSHV)
    if sinks is not None:
        p_BHTM = p_BHTS[..., k.shape[1] :][..., : v_BTMHV.shape[2]]
        o_BTHV = o_BTHV + torch.einsum("bhtm,btmhv->bthv", p_BHTM, v_BTMHV)
    return o_BTHV.to(v.dtype)


def _decayed_scores(q_BTHK, k_BSHK, distance_TS, log_decay_K):
    """sum_c q_c k_c exp(distance log_decay_c), [B, H, T, S], channel by channel."""
    score_BHTS = 0
    for q_BTH, k_BSH, log in zip(q_BTHK.unbind(-1), k_BSHK.unbind(-1), log_decay_K.unbind()):
        pair_BHTS = torch.einsum("bth,bsh->bhts", q_BTH, k_BSH)
        score_BHTS = score_BHTS + pair_BHTS * (distance_TS * log).exp()
    return score_BHTS


def windowed_attention(
    q,
    k,
    v,
    window=None,
    *,
    scale=None,
    cu_seqlens=None,
    first_key=None,
    sinks=None,
    sink_logits=None,
    delay=0,
    distance_bias=None,
    query_bias=None,
    log_decay=None,
    block_length=None,
):
    """Attention of each query to the `window` keys up to its own, or up to one before it.

    Args:
        q: [B, T, H, K]. Any float dtype; scores and sums are in float32 at least.
        k: [B, S, G, K], S >= T: the last T are the queries' own, those before them are older. G
            divides H: that many query heads share a head of keys and values.
        v: [B, S, G, V].
        window: how many keys a query sees, its own included without a delay; None: all.
        scale: of the scores; None: K^-1/2.
        cu_seqlens: [N + 1] boundaries of documents packed in one row (B = 1, S = T).
        first_key: [B], the first key of each row that is one; None: all are.
        sinks: `Sinks`; None: there are none.
        sink_logits: [H], a logit in each head's softmax that has no value, or [B, T, H], one for
            each query; None: there is none.
        delay: how many keys a query does not see, counted back from its own: 0 or, with
            sink_logits (a document's first query would have nothing to see), more.
        distance_bias: [H, window], or [H, S] without one, added to the scaled scores: entry d for
            the key d before the newest that a query sees; None: nothing.
        query_bias: (rows [..., C], d [C, S]) to a bias [B or 1, H, ..., C, S], added to the scaled
            scores: of the queries with these numbers from 0 to T - 1, and keys d before the newest
            that each sees (0 for those after it); None: nothing.
        log_decay: [K], <= 0: channel k of a score is multiplied by exp(d log_decay_k); None: no
            decay.
        block_length: queries computed at a time; None: by the window.

    Returns:
        o [B, T, H, V] in v's dtype.

    Raises:
        ValueError: shapes that do not fit, or a window without keys.
    """
    _check(q, k, v, window, cu_seqlens, first_key, sinks)
    _check_bias(q, k, window, sink_logits, delay, distance_bias)
    (length, num_heads), (num_keys, num_groups) = q.shape[1:3], k.shape[1:3]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if torch.compiler.is_exporting():
        from .windowed_attention_export import windowed_attention_exported

        return windowed_attention_exported(
            q,
            k,
            v,
            window,
            scale=scale,
            first_key=first_key,
            sinks=sinks,
            sink_logits=sink_logits,
            delay=delay,
            distance_bias=distance_bias,
            query_bias=query_bias,
            log_decay=log_decay,
            block_length=block_length or (None if window is None else _block_length(window)),
        )
    others = (first_key, sinks, sink_logits, distance_bias, query_bias, log_decay, block_length)
    if not delay and all(x is None for x in others):
        if takes_flash_attention(q, k, v, window, cu_seqlens):
            return causal_attention(q, k, v, scale, cu_seqlens, _causal_in_blocks)
    window = num_keys if window is None else window
    dtype = torch.promote_types(q.dtype, torch.float32)
    block_length = block_length or _block_length(window)
    older = num_keys - length
    sizes = [min(block_length, length - start) for start in range(0, length, block_length)]

    def grouped(x_BTHK):
        return x_BTHK.transpose(1, 2).unflatten(1, (num_groups, num_heads // num_groups))

    # Pieces of the keys that bands are put together from: a view into the whole would have a
    # gradient as long as the whole for every block, which is quadratic. Older keys are cut as well,
    # so that they leave the bands as their queries' own do.
    ragged, full = older % block_length, older // block_length
    pieces = ([ragged] if ragged else []) + [block_length] * full + sizes
    starts = [sum(pieces[:n]) for n in range(len(pieces))]
    k_pieces = k.transpose(1, 2).split(pieces, dim=2)
    v_pieces = v.transpose(1, 2).split(pieces, dim=2)
    q_blocks = grouped(q).split(sizes, dim=3)
    first_BT = first_keys(length, cu_seqlens, first_key)
    extra = _SinkBlocks(sinks, cu_seqlens, sizes, grouped, scale, dtype)
    band = bias_GRCS = None  # of the bias: with a window, blocks in the middle have the same
    decays = None if log_decay is None else _Decays(log_decay, block_length, num_keys, delay, dtype)
    logits = [None] * len(sizes)
    if sink_logits is not None:
        logits_BTH = sink_logits.to(dtype).expand(*q.shape[:3])
        logits = grouped(logits_BTH[..., None]).split(sizes, dim=3)

    outputs, low = [], 0
    for n, q_BGRCK in enumerate(q_blocks):
        own = n + len(pieces) - len(sizes)
        while starts[low] + pieces[low] <= starts[own] - delay - window + 1:
            low += 1
        k_BGSK, v_BGSV = (
            torch.cat(x[low : own + 1], dim=2).to(dtype) for x in (k_pieces, v_pieces)
        )
        i_C1 = starts[own] + torch.arange(sizes[n], device=q.device)[:, None]
        j_S = starts[low] + torch.arange(k_BGSK.shape[2], device=q.device)
        visible_BCS = ((j_S <= i_C1 - delay) & (j_S > i_C1 - delay - window))[None]
        if first_BT is not None:
            first_BC = first_BT if first_BT.shape[1] == 1 else first_BT[:, i_C1[:, 0] - older]
            visible_BCS = visible_BCS & (j_S >= first_BC[..., None])
        if distance_bias is not None:
            before, band = band, (starts[own] - delay - starts[low], sizes[n], k_BGSK.shape[2])
            if band != before:
                bias_HCS = _band_of_bias(distance_bias.to(dtype), *band)
                bias_GRCS = bias_HCS.unflatten(0, (num_groups, -1))
        elif query_bias is not None:
            rows_C = i_C1[:, 0] - older
            bias_BHCS = query_bias(rows_C, (i_C1 - delay - j_S).clamp(min=0)).to(dtype)
            bias_GRCS = bias_BHCS.unflatten(1, (num_groups, -1))
        q_BGRCK = q_BGRCK.to(dtype) * scale
        if decays is not None:
            first_distance = starts[own] - delay - starts[low]
            q_BGRCK, k_BGSK = decays.shared(q_BGRCK, k_BGSK, first_distance)
        o_BGRCV = _attend(
            q_BGRCK, k_BGSK, v_BGSV, visible_BCS, extra.block(n), logits[n], bias_GRCS
        )
        outputs.append(o_BGRCV.to(v.dtype))
    return torch.cat(outputs, dim=3).flatten(1, 2).transpose(1, 2)


def _block_length(window):
    return min(max(MIN_BLOCK, window // 4), MAX_BLOCK)


def _causal_in_blocks(q, k, v, scale):
    return windowed_attention(q, k, v, scale=scale, block_length=MAX_BLOCK)


def _band_of_bias(bias_HW, first_distance, num_queries, num_keys):
    """The bias of each query and key of a block, [H, C, S]; of no meaning outside of the window.

    The first query is that distance behind the first key. Windows into one row: its gradient is
    then a sum over windows, which a gather by distance would make one by one.
    """
    before = num_keys - 1 - first_distance
    after = first_distance + num_queries - bias_HW.shape[1]
    row_HS = torch.nn.functional.pad(bias_HW, (before, max(after, 0)))
    row_HS = row_HS[:, : num_queries + num_keys - 1]
    return row_HS.unfold(1, num_keys, 1).flip(2)


class _Decays:
    """exp(d log_decay) of a query and a key, as a factor of each: of no more than a block's length.

    Counted from the middle of the block of queries, so that neither leaves its range however long
    a text is: keys long before it have next to nothing left, as they should.
    """

    def __init__(self, log_decay, block_length, num_keys, delay, dtype):
        self.half, self.zero = block_length // 2, block_length + delay
        _check_decay(log_decay, self.half)
        # In float64, so that long distances have all their digits.
        wide = torch.float32 if log_decay.device.type == "mps" else torch.float64
        exponents_N = torch.arange(-self.zero, num_keys + block_length, device=log_decay.device)
        self.table_NK = (exponents_N[:, None] * log_decay.detach().to(wide)).exp().to(dtype)

    def shared(self, q_BGRCK, k_BGSK, first_distance):
        """Queries and keys with their factors.

        Args:
            q_BGRCK: a block of queries.
            k_BGSK: its band of keys.
            first_distance: from the first query back to the first key.
        """
        start = self.zero - self.half
        q_CK = self.table_NK[start : start + q_BGRCK.shape[3]]
        last = self.zero + self.half + first_distance
        k_SK = self.table_NK[last - k_BGSK.shape[2] + 1 : last + 1].flip(0)
        return q_BGRCK * q_CK, k_BGSK * k_SK


def _check_decay(log_decay, half):
    """Raises a ValueError if a decay leaves float32 within half a block of queries."""
    if log_decay.device.type != "cpu" or torch.compiler.is_compiling():
        return
    lowest = log_decay.min().item()
    if -lowest * half > 64:  # exp(88) is float32's largest number
        raise ValueError(
            f"log_decay is at least -{64 / half:.3g} per token, got {lowest:.3g}; nothing would be "
            "left of a score a few tokens away."
        )


def attention_step(
    q,
    k,
    v,
    visible,
    *,
    scale=None,
    sinks=None,
    sink_logits=None,
    slot_bias=None,
    log_decay=None,
    distance=None,
):
    """Attention of one query per row to the keys it is shown, in any order.

    Args:
        q: [B, 1, H, K].
        k: [B, S, G, K].
        v: [B, S, G, V].
        visible: [B, S] bool.
        scale, sinks, sink_logits: as of `windowed_attention`.
        slot_bias: [B, H, S], added to the scaled scores; None: nothing.
        log_decay: as of `windowed_attention`.
        distance: [B, S], of each key, for it.

    Returns:
        o [B, 1, H, V] in v's dtype.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    num_groups = k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def grouped(x_BTHK):
        return x_BTHK.transpose(1, 2).unflatten(1, (num_groups, -1))

    extra = _SinkBlocks(sinks, None, [1], grouped, scale, dtype).block(0)
    logits = bias_BGRCS = None
    if sink_logits is not None:
        logits = grouped(sink_logits.to(dtype).expand(*q.shape[:3])[..., None])
    if slot_bias is not None:
        bias_BGRCS = slot_bias.to(dtype).unflatten(1, (num_groups, -1))[:, :, :, None]
    k_BGSK, v_BGSV = (x.transpose(1, 2).to(dtype) for x in (k, v))
    if log_decay is not None:
        factor_BSK = (distance[..., None] * log_decay.to(dtype)).exp()
        k_BGSK = k_BGSK * factor_BSK[:, None]
    q_BGRCK = grouped(q).to(dtype) * scale
    o_BGRCV = _attend(q_BGRCK, k_BGSK, v_BGSV, visible[:, None], extra, logits, bias_BGRCS)
    return o_BGRCV.flatten(1, 2).transpose(1, 2).to(v.dtype)


def attention_step_to_all(q, k, v, scale):
    """`attention_step` to all keys alike, without gradients.

    Args: q, k, v and scale as there.

    Returns:
        o [B, 1, H, V], in float32 at least.
    """
    # In 16 bits, PyTorch's own attention of one query is slower than all in float32.
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.transpose(1, 2).to(dtype) for x in (q, k, v))
    # The queries that share keys, as queries of one head.
    rows = q.unflatten(1, (k.shape[1], -1)).squeeze(3) if q.shape[1] != k.shape[1] else q
    o = F.scaled_dot_product_attention(rows, k, v, scale=scale)
    return o.flatten(1, 2)[:, None] if rows is not q else o.transpose(1, 2)


class _SinkBlocks:
    """The sinks' scores and values for each block of queries."""

    def __init__(self, sinks, cu_seqlens, sizes, grouped, scale, dtype):
        self.sinks, self.scale, self.dtype = sinks, scale, dtype
        if sinks is None:
            return
        self.q_blocks = grouped(sinks.q).split(sizes, dim=3)
        self.counts = sinks.count.split(sizes, dim=1)
        self.biases = None if sinks.bias is None else sinks.bias.split(sizes, dim=1)
        self.documents = None
        if cu_seqlens is not None:
            self.documents = document_of_token(cu_seqlens, sum(sizes)).split(sizes)

    def block(self, n):
        """(scores [B, G, R, C, M], values [B, C or 1, M, G, V]) of block n, or None."""
        if self.sinks is None:
            return None
        k_BCMGK, v_BCMGV = (
            (x[:, None] if self.documents is None else x[self.documents[n]][None]).to(self.dtype)
            for x in (self.sinks.k, self.sinks.v)
        )
        q_BGRCK = self.q_blocks[n].to(self.dtype) * self.scale
        k_BCMGK = k_BCMGK.expand(-1, q_BGRCK.shape[3], -1, -1, -1)
        score_BGRCM = torch.einsum("bgrck,bcmgk->bgrcm", q_BGRCK, k_BCMGK)
        if self.biases is not None:
            bias_BHCM = self.biases[n].to(self.dtype).movedim(-1, 1)
            score_BGRCM = score_BGRCM + bias_BHCM.unflatten(1, q_BGRCK.shape[1:3])
        indices_M = torch.arange(k_BCMGK.shape[2], device=q_BGRCK.device)
        seen_BCM = indices_M < self.counts[n][..., None]
        score_BGRCM = score_BGRCM.masked_fill(~seen_BCM[:, None, None], -torch.inf)
        return score_BGRCM, v_BCMGV.expand(-1, q_BGRCK.shape[3], -1, -1, -1)


def _attend(q_BGRCK, k_BGSK, v_BGSV, visible_BCS, extra, logits_BGRC1, bias):
    """Softmax attention of a block of queries, already scaled, in its accumulators' dtype."""
    shape = q_BGRCK.shape[2:4]
    if extra is None and not torch.is_grad_enabled():
        sizes = shape[0] * shape[1], k_BGSK.shape[2], LEAST_IN_BLOCK
        if takes_blocks_by_head(q_BGRCK, k_BGSK, v_BGSV, *sizes):
            return attend_block(q_BGRCK, k_BGSK, v_BGSV, visible_BCS, logits_BGRC1, bias)
    score_BGRCS = (q_BGRCK.flatten(2, 3) @ k_BGSK.mT).unflatten(2, shape)
    if bias is not None:
        score_BGRCS = score_BGRCS + bias
    score_BGRCS = score_BGRCS.masked_fill(~visible_BCS[:, None, None], -torch.inf)
    size = score_BGRCS.shape[-1]
    scores = [score_BGRCS]
    if extra is not None:
        scores.append(extra[0])
    if logits_BGRC1 is not None:
        scores.append(logits_BGRC1)
    p_BGRCS = (torch.cat(scores, dim=-1) if len(scores) > 1 else score_BGRCS).softmax(-1)
    of_keys_BGRCS = p_BGRCS[..., :size] if len(scores) > 1 else p_BGRCS
    o_BGRCV = (of_keys_BGRCS.flatten(2, 3) @ v_BGSV).unflatten(2, shape)
    if extra is not None:
        p_BGRCM = p_BGRCS[..., size : size + extra[0].shape[-1]]
        o_BGRCV = o_BGRCV + torch.einsum("bgrcm,bcmgv->bgrcv", p_BGRCM, extra[1])
    return o_BGRCV


def _check(q, k, v, window, cu_seqlens, first_key, sinks):
    (batch, length, num_heads, _), (num_keys, num_groups) = q.shape, k.shape[1:3]
    if k.shape[0] != batch or k.shape[:3] != v.shape[:3] or k.shape[3] != q.shape[3]:
        raise ValueError(
            "expected q [B, T, H, K], k [B, S, G, K] and v [B, S, G, V], got "
            f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}."
        )
    if num_keys < length or num_heads % num_groups:
        raise ValueError(
            f"S is at least T and G divides H, got S = {num_keys}, T = {length}, G = {num_groups}, "
            f"H = {num_heads}; the last T keys are the queries' own."
        )
    if window is not None and window < 1:
        raise ValueError(f"window is at least 1, the query's own key, got {window}.")
    if cu_seqlens is not None and (batch != 1 or num_keys != length or first_key is not None):
        raise ValueError(
            "packed documents lie in one row (B = 1) with their own keys (S = T) and without "
            f"first_key, got B = {batch}, S = {num_keys}, T = {length}; put older keys into the "
            "documents, with queries of any value."
        )
    if sinks is not None and sinks.q.shape != q.shape:
        raise ValueError(f"sinks.q is {list(q.shape)} as q, got {list(sinks.q.shape)}.")


def _check_bias(q, k, window, sink_logits, delay, distance_bias):
    num_heads = q.shape[2]
    shape = None if sink_logits is None else (num_heads,) if sink_logits.ndim == 1 else q.shape[:3]
    if sink_logits is not None and sink_logits.shape != shape:
        raise ValueError(
            f"sink_logits is [H] or [B, T, H], {[num_heads]} or {list(q.shape[:3])}, got "
            f"{list(sink_logits.shape)}."
        )
    if delay < 0 or (delay and sink_logits is None):
        raise ValueError(
            f"delay is 0, or more with sink_logits for queries that see no key, got {delay} "
            f"{'without' if sink_logits is None else 'with'} sink_logits."
        )
    size = k.shape[1] if window is None else window
    if distance_bias is not None and distance_bias.shape != (num_heads, size):
        raise ValueError(
            f"distance_bias is [H, window], or [H, S] without one, [{num_heads}, {size}], got "
            f"{list(distance_bias.shape)}."
        )
