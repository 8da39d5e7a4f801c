"""Tokens of the slices before a slice, which a layer sees as if a state held them.

A pass that several processes make (zoo/core/parallel.py) has the tokens of a document in several of
them. What a state holds of past tokens (zoo/core/window.py) does not depend on what these make of
one another, so each process has its part of it at once, and hands it on: to the next process where
nobody needs more than that one has, as where slices are as long as a window; else to all.

The door told all processes where all documents are, so that all know which it is.
"""

import torch

from .window import first_positions, gather_tokens, ring_positions, row_spans


def hops_to(ranks, need_RB):
    """How many slices back the tokens lie that anyone needs.

    Args:
        ranks: the `Ranks`.
        need_RB: how many of the tokens just before its slice each process needs, of the document
            that goes on in it.
    """
    found_RB, hops = torch.zeros_like(need_RB), 0
    while bool((found_RB < need_RB).any()):
        hops += 1
        found_RB[hops:] += ranks.own_RB[:-hops]
    return hops


def last_before(tensors, sequence, size=None, need=None, has_gradients=True):
    """The last tokens before a slice, of the document that goes on in it, in a ring.

    In bytes, per direction: those of B (W - 1) tokens to the next process where slices have as
    many, else to all, or of as many as the longest part of a document in a slice has. One token
    more, which none of the slice sees, if somebody keeps the state.

    Args:
        tensors: of the tokens of this slice, each [B, T, ...] or packed [1, total, ...].
        sequence: the `Sequence`, a slice.
        size: W, slots of the ring; None: all tokens, each in the slot of its number.
        need: which of the W a slice sees, if not all but the oldest: (a name, a function of
            clock_RB, tokens of each row's document before each slice, to how many of the last).
        has_gradients: whether the tokens want any.

    Returns:
        [B, W, ...] for each tensor; zeros where there is no token. None: there are no tokens before
        the slice; always so on the first process.
    """
    ranks = sequence.ranks
    need_name, need_of = need or (None, None)
    name = "last before", size, need_name
    if name not in ranks.kept:
        ranks.kept[name] = _plan(sequence, size, need_of)
    hops, own_BL, index_BW, is_there_BW = ranks.kept[name]
    if not hops:
        return None
    spans = row_spans(sequence)
    own = [gather_tokens(x, None, own_BL, spans) for x in tensors]
    if hops == 1:
        arrived = ranks.from_left(*own) if has_gradients else ranks.wire.shift(own, 1)
    else:
        gather = ranks.gathered if has_gradients else ranks.wire.all_gather
        arrived = [gather(x) for x in own]
        arrived = [(x if has_gradients else torch.stack(x))[: ranks.rank] for x in arrived]
        arrived = [x.transpose(0, 1).flatten(1, 2) for x in arrived]
    if index_BW is None:
        return None
    rows_B1 = torch.arange(index_BW.shape[0], device=index_BW.device)[:, None]
    rings = []
    for x_BPK in arrived:
        x_BWK = x_BPK[rows_B1, index_BW]
        rings.append(torch.where(_like(is_there_BW, x_BWK), x_BWK, 0))
    return rings


def _plan(sequence, size, need_of):
    """What `last_before` does in all layers alike.

    Returns:
        (hops, numbers of the tokens that others get [B, L], where in what arrives each slot's token
        is [B, W], whether it is there [B, W]); the last two None: nothing is.
    """
    ranks, device = sequence.ranks, sequence.clock.device
    need_RB = ranks.clock_RB
    if size is not None and (ranks.anyone_keeps or need_of is None):
        need_RB = need_RB.clamp(max=size - (not ranks.anyone_keeps))
    elif need_of is not None:
        need_RB = need_of(need_RB)
    hops = hops_to(ranks, need_RB)
    if not hops:
        return 0, None, None, None
    length = min(int(ranks.own_RB[:-1].max()), int(need_RB.max()))
    after_B = row_spans(sequence).after
    own_BL = after_B[:, None] + torch.arange(-length, 0, device=device)
    clock_B = ranks.clock_RB[ranks.rank].to(device)
    num_slots = int(clock_B.max()) if size is None else size
    if ranks.is_first or not num_slots:
        return hops, own_BL, None, None
    if size is None:
        number_BW = first_positions(clock_B, num_slots)
    else:
        number_BW = ring_positions(clock_B, num_slots)
    index_BW, is_there_BW = torch.zeros_like(number_BW), torch.zeros_like(number_BW, dtype=bool)
    first = ranks.rank - 1 if hops == 1 else 0
    for rank in range(first, ranks.rank):
        after_B1, start_B1 = span_of(ranks, rank, device)
        oldest_B1 = torch.maximum(start_B1, after_B1 - length)
        is_of_BW = (number_BW >= oldest_B1) & (number_BW < after_B1)
        place_BW = (rank - first + 1) * length + number_BW - after_B1
        index_BW = torch.where(is_of_BW, place_BW, index_BW)
        is_there_BW = is_there_BW | is_of_BW
    if sequence.continues is not None and sequence.cu_seqlens is None:
        is_there_BW = is_there_BW & sequence.continues[:, None]
    return hops, own_BL, index_BW, is_there_BW


def span_of(ranks, rank, device):
    """The numbers of a process' tokens, of each row's last document there: (after, start), [B, 1].

    A process after it, into which that document goes on, finds its tokens by these; what another
    document has under the same numbers, a process between them has too.
    """
    after_B = ranks.clock_RB[rank + 1]
    start_B = after_B - ranks.own_RB[rank]
    return after_B[:, None].to(device), start_B[:, None].to(device)


def first_before(tensors, sequence, count):
    """The first tokens of the document that goes on in a slice, as far as they are before it.

    In bytes, per direction: those of B S tokens, from each process to all.

    Args:
        tensors: of the tokens of this slice, of one shape and dtype, as of `last_before`.
        sequence: the `Sequence`, a slice.
        count: S, how many.

    Returns:
        [B, S, ...] for each tensor; zeros where there is no token. None on the first process, and
        if no document goes on anywhere.
    """
    ranks, spans = sequence.ranks, row_spans(sequence)
    if not bool((ranks.clock_RB > 0).any()):
        return None
    numbers_BS = first_positions(spans.after, count)
    own = torch.stack([gather_tokens(x, None, numbers_BS, spans) for x in tensors])
    every_RNBSK = ranks.gathered(own)
    if ranks.is_first:
        return None
    clock_B, found_NBSK = ranks.clock_RB[ranks.rank].to(spans.after.device), torch.zeros_like(own)
    number_BS = first_positions(clock_B, count)
    for rank in range(ranks.rank):
        after_B1, start_B1 = span_of(ranks, rank, number_BS.device)
        is_of_BS = (number_BS >= start_B1) & (number_BS >= 0) & (number_BS < after_B1)
        found_NBSK = torch.where(_like(is_of_BS, own[0]), every_RNBSK[rank], found_NBSK)
    return list(found_NBSK)


def _like(condition_BS, x_BSK):
    return condition_BS.view(*condition_BS.shape, *[1] * (x_BSK.ndim - condition_BS.ndim))
