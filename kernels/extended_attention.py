"""Softmax attention whose scores have other queries and keys by distance, as ReRoPE's have.

A query i and a key j at distance d = i - j take the first part p with d < reach_p(i), the last one
where there is none:

    o_i = sum_j softmax_j(scale q^p_i . k^p_j) v_j   over the keys i sees,   p = p(i, j)

The parts are the same queries and keys, turned by other angles. Near and far ones in ReRoPE (Su
2023, https://kexue.fm/archives/9708) and Self-Extend (Jin et al. 2024,
https://arxiv.org/abs/2401.01325): two parts, the first one's reach its window. The same chunk, the
one before and older ones in dual chunk attention (An et al. 2024,
https://arxiv.org/abs/2402.17463): three, of one set of keys, and reaches by a query's place in its
chunk. One softmax over all of them, so gradients are exact.

`extended_attention` is the function to call: it cuts the queries into blocks, and computes a part's
scores where a block has keys of it. `extended_attention_reference` is the definition, with all
scores of all parts. `extended_attention_step` is that of one query per row.
"""

from typing import NamedTuple

import torch

from .windowed_attention import MAX_BLOCK, MIN_BLOCK, first_keys, visible_keys
from .windowed_attention import _check as _check_documents


class Part(NamedTuple):
    """Queries and keys as they are for a range of distances.

    Attributes:
        q: [B, T, H, K].
        k: [B, S, G, K]; of a step also fewer, with their `slots`.
        reach: the distance from which on the next part begins, an int or [B or 1, T]; None: none
            does, this is the last.
        bounds: (least, most) of a reach that is a tensor.
        slots: [B, W], of a step: where the k [B, W, G, K] lie among the values, each once, all that
            are below the reach and maybe others; None: k lie as the values.
    """

    q: torch.Tensor
    k: torch.Tensor
    reach: int | torch.Tensor | None = None
    bounds: tuple[int, int] | None = None
    slots: torch.Tensor | None = None

    def limits(self, num_keys):
        """(least, most) of the reach; of the last part that of all keys."""
        if self.reach is None:
            return num_keys, num_keys
        return (self.reach, self.reach) if self.bounds is None else self.bounds

    def is_within(self, distance):
        """Which distances [B, T, S] are below the reach, bool."""
        reach = self.reach
        return distance < (reach[..., None] if torch.is_tensor(reach) else reach)


def extended_attention_reference(
    parts, v, window=None, *, scale=None, cu_seqlens=None, first_key=None
):
    """The definition: all scores [B, H, T, S] of all parts. As `extended_attention`."""
    q, num_keys, device = parts[0].q, v.shape[1], v.device
    dtype = torch.promote_types(q.dtype, torch.float32)
    length, repeats = q.shape[1], q.shape[2] // v.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    i_T1 = torch.arange(num_keys - length, num_keys, device=device)[:, None]
    distance_BTS = (i_T1 - torch.arange(num_keys, device=device))[None]
    score_BHTS = None
    for part in reversed(parts):
        k_BSHK = part.k.to(dtype).repeat_interleave(repeats, dim=2)
        part_BHTS = torch.einsum("bthk,bshk->bhts", part.q.to(dtype), k_BSHK) * scale
        if score_BHTS is not None:
            is_within_BTS = part.is_within(distance_BTS)
            part_BHTS = torch.where(is_within_BTS[:, None], part_BHTS, score_BHTS)
        score_BHTS = part_BHTS
    documents = {"cu_seqlens": cu_seqlens, "first_key": first_key}
    visible_BTS = visible_keys(length, num_keys, window, **documents, device=device)
    p_BHTS = score_BHTS.masked_fill(~visible_BTS[:, None], -torch.inf).softmax(-1)
    v_BSHV = v.to(dtype).repeat_interleave(repeats, dim=2)
    return torch.einsum("bhts,bshv->bthv", p_BHTS, v_BSHV).to(v.dtype)


def extended_attention(
    parts,
    v,
    window=None,
    *,
    scale=None,
    cu_seqlens=None,
    first_key=None,
    block_length=None,
):
    """Attention of each query to the keys up to its own, in parts by distance.

    Args:
        parts: a `Part` for each range of distances, from the nearest on. Any float dtype; scores
            and sums are in float32 at least. S >= T keys: the last T are the queries' own. G
            divides H.
        v: [B, S, G, V].
        window: how many keys a query sees, its own included; None: all.
        scale: of the scores; None: K^-1/2.
        cu_seqlens: [N + 1] boundaries of documents packed in one row (B = 1, S = T).
        first_key: [B], the first key of each row that is one; None: all are.
        block_length: queries computed at a time; None: by the reach of the first parts.

    Returns:
        o [B, T, H, V] in v's dtype.

    Raises:
        ValueError: shapes that do not fit, parts without or with too many reaches.
    """
    _check(parts, v, window, cu_seqlens, first_key)
    settings = {"scale": scale, "cu_seqlens": cu_seqlens, "first_key": first_key}
    if torch.compiler.is_exporting():  # of a length that is not known yet
        return extended_attention_reference(parts, v, window, **settings)
    q, num_keys, num_groups = parts[0].q, v.shape[1], v.shape[2]
    length, num_heads, device = q.shape[1], q.shape[2], v.device
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    limits = [part.limits(num_keys) for part in parts]
    window = num_keys if window is None else window
    if block_length is None:
        block_length = min(max(MIN_BLOCK, limits[0][1] // 4), MAX_BLOCK)
    older = num_keys - length
    sizes = [min(block_length, length - start) for start in range(0, length, block_length)]
    # As in `windowed_attention`: a view into the whole would have a gradient as long as the whole.
    ragged, full = older % block_length, older // block_length
    pieces = ([ragged] if ragged else []) + [block_length] * full + sizes
    starts = [0]
    for size in pieces:
        starts.append(starts[-1] + size)

    def piece_of(key):
        """The piece a key is in; the first for one before all."""
        after = max(key, 0) - ragged
        return 0 if after < 0 else (ragged > 0) + after // block_length

    def grouped(x_BTHK):
        return x_BTHK.transpose(1, 2).unflatten(1, (num_groups, num_heads // num_groups))

    q_blocks = [grouped(part.q).split(sizes, dim=3) for part in parts]
    k_pieces = [part.k.transpose(1, 2).split(pieces, dim=2) for part in parts]
    v_pieces = v.transpose(1, 2).split(pieces, dim=2)
    first_BT = first_keys(length, cu_seqlens, first_key)

    outputs = []
    for n, size in enumerate(sizes):
        own = n + len(pieces) - len(sizes)
        newest = starts[own + 1] - 1
        low = piece_of(starts[own] - window + 1)
        i_C1 = starts[own] + torch.arange(size, device=device)[:, None]
        j_S = torch.arange(starts[low], starts[own + 1], device=device)
        in_turn, least_before = [], 0
        for part, q_block, k_piece, (least, most) in zip(parts, q_blocks, k_pieces, limits):
            # The pieces that have keys at its distances from some query of the block.
            first = max(low, piece_of(starts[own] - most + 1))
            last = piece_of(newest - least_before) + 1 if newest >= least_before else low
            least_before = least
            if first >= last:
                continue
            k_BGSK = torch.cat(k_piece[first:last], dim=2).to(dtype)
            q_BGRCK = q_block[n].to(dtype) * scale
            score_BGRCS = (q_BGRCK.flatten(2, 3) @ k_BGSK.mT).unflatten(2, q_BGRCK.shape[2:4])
            if torch.is_tensor(part.reach):
                rows = slice(n * block_length, n * block_length + size)
                part = part._replace(reach=part.reach[:, rows])
            in_turn.append((part, score_BGRCS, starts[first], starts[last]))
        score_BGRCS = _select(in_turn, (i_C1 - j_S)[None], starts[low])
        visible_BCS = ((j_S <= i_C1) & (j_S > i_C1 - window))[None]
        if first_BT is not None:
            first_BC = first_BT if first_BT.shape[1] == 1 else first_BT[:, i_C1[:, 0] - older]
            visible_BCS = visible_BCS & (j_S >= first_BC[..., None])
        p_BGRCS = score_BGRCS.masked_fill(~visible_BCS[:, None, None], -torch.inf).softmax(-1)
        v_BGSV = torch.cat(v_pieces[low : own + 1], dim=2).to(dtype)
        o_BGRCV = p_BGRCS.flatten(2, 3) @ v_BGSV
        outputs.append(o_BGRCV.unflatten(2, p_BGRCS.shape[2:4]).to(v.dtype))
    return torch.cat(outputs, dim=3).flatten(1, 2).transpose(1, 2)


def _select(in_turn, distance_BCS, start):
    """The score of each query and key from its part's, [B, G, R, C, S].

    Args:
        in_turn: (part, scores, first key, key after the last) of each, from the nearest on.
        distance_BCS: of all keys.
        start: the first of them.
    """
    cuts = sorted({bound for _, _, *bounds in in_turn for bound in bounds})
    stretches = list(zip(cuts, cuts[1:]))
    scores = []
    for _, score_BGRCS, first, last in in_turn:
        inside = [(a, b) for a, b in stretches if first <= a and b <= last]
        cut = score_BGRCS.split([b - a for a, b in inside], dim=-1)
        scores.append(dict(zip(inside, cut, strict=True)))
    selected = []
    for a, b in stretches:
        chosen = None
        for (part, *_), cut in reversed(list(zip(in_turn, scores))):
            score_BGRCS = cut.get((a, b))
            if chosen is None or score_BGRCS is None:
                chosen = score_BGRCS if chosen is None else chosen
                continue
            is_within_BCS = part.is_within(distance_BCS[..., a - start : b - start])
            chosen = torch.where(is_within_BCS[:, None, None], score_BGRCS, chosen)
        selected.append(chosen)
    return torch.cat(selected, dim=-1)


def extended_attention_step(parts, v, distance, *, scale=None):
    """Attention of one query per row to keys in any order.

    Args:
        parts: as of `extended_attention`, with T = 1; the k of the last lie as the values.
        v: [B, S, G, V].
        distance: [B, S], of each key from the query; negative: not visible.
        scale: of the scores; None: K^-1/2.

    Returns:
        o [B, 1, H, V] in v's dtype.
    """
    dtype, num_groups = torch.promote_types(parts[0].q.dtype, torch.float32), v.shape[2]
    scale = parts[0].q.shape[-1] ** -0.5 if scale is None else scale
    distance_BTS = distance[:, None]
    chosen = None
    for run in _runs(parts):
        # Of the same keys all at once: reading them is what takes the time.
        q_BGMK = torch.cat([part.q.unflatten(2, (num_groups, -1))[:, 0] for part in run], dim=2)
        score_BGMS = (q_BGMK.to(dtype) * scale) @ run[0].k.transpose(1, 2).to(dtype).mT
        scores, slots, own_BTS, own = score_BGMS.chunk(len(run), dim=2), run[0].slots, None, chosen
        if slots is not None:
            own_BTS = distance.gather(1, slots)[:, None]
            slots = slots[:, None, None].expand_as(scores[0])
            own = chosen.gather(3, slots)
        for part, score_BGRS in reversed(list(zip(run, scores))):
            if own is None:
                own = score_BGRS
                continue
            is_within_BTS = part.is_within(distance_BTS if own_BTS is None else own_BTS)
            own = torch.where(is_within_BTS[:, None], score_BGRS, own)
        chosen = own if slots is None else chosen.scatter(3, slots, own)
    p_BGRS = chosen.masked_fill(distance_BTS[:, None] < 0, -torch.inf).softmax(-1)
    o_BGRV = p_BGRS @ v.transpose(1, 2).to(dtype)
    return o_BGRV.flatten(1, 2)[:, None].to(v.dtype)


def _runs(parts):
    """Parts next to each other that have the same keys, the last first."""
    runs = []
    for part in reversed(parts):
        if runs and runs[-1][0].k is part.k:
            runs[-1].insert(0, part)
        else:
            runs.append([part])
    return runs


def _check(parts, v, window, cu_seqlens, first_key):
    _check_documents(parts[0].q, parts[0].k, v, window, cu_seqlens, first_key, None)
    for part in parts[1:]:
        if part.q.shape != parts[0].q.shape or part.k.shape != parts[0].k.shape:
            raise ValueError(
                f"all parts have q {list(parts[0].q.shape)} and k {list(parts[0].k.shape)}, got "
                f"{list(part.q.shape)} and {list(part.k.shape)}."
            )
    reaches = [part.reach for part in parts]
    if any(reach is None for reach in reaches[:-1]) or reaches[-1] is not None:
        raise ValueError("every part but the last has a reach, and that has none.")
    for part in parts[:-1]:
        if torch.is_tensor(part.reach) and part.bounds is None:
            raise ValueError("a reach that is a tensor needs its bounds, got None.")
