"""A state of past tokens: which tensors of a forward pass, and of the state before it, it holds.

A state [B, S, ...] holds one token per slot. Clocks say which: the tokens of a row's document are
numbered from 0, and slot s holds the one whose number is in `ring_positions` or `first_positions`;
slots without a token hold zeros. Rows may be at different clocks, and a stream of packed documents
may hold several of a row's, of which the last one stays.
"""

from typing import NamedTuple

import torch
from torch.nn.functional import pad

from ..kernels.autograd_rules import by_autograd_alone
from ..kernels.windowed_attention import document_of_token


class Spans(NamedTuple):
    """Where documents, or rows, lie in a forward pass.

    Attributes:
        first: [N], index of the first token in the flattened batch.
        start: [N], its number in its document: how many came before this pass.
        after: [N], the number of the token after the last.
        shortest: each has at least so many tokens in this pass, as far as shapes say.
    """

    first: torch.Tensor
    start: torch.Tensor
    after: torch.Tensor
    shortest: int = 0


def document_spans(sequence):
    """The documents of a pass: those that are packed, or each row."""
    if sequence.cu_seqlens is None:
        batch, time = sequence.shape
        start_B = sequence.clock[:, 0].expand(batch)
        first_B = torch.arange(batch, device=start_B.device) * time
        return Spans(first_B, start_B, start_B + time, time)
    first_N = sequence.cu_seqlens[:-1]
    start_N = sequence.clock[0, first_N]
    return Spans(first_N, start_N, start_N + sequence.cu_seqlens.diff())


def row_spans(sequence):
    """The last document of each row; empty, at the row's clock, for a row without tokens."""
    spans = document_spans(sequence)
    if sequence.cu_seqlens is None:
        return spans
    last_B = sequence.last_document.clamp(min=0)
    after_B = sequence.clock_after
    start_B = torch.where(sequence.last_document < 0, after_B, spans.start[last_B])
    return Spans(spans.first[last_B], start_B, after_B)


def ring_positions(after_N, size):
    """The number of the token in each slot of a ring, slot = number modulo size; [N, size].

    Negative where there is none yet.
    """
    newest_N1 = after_N[:, None] - 1
    slots_W = torch.arange(size, device=after_N.device)
    return newest_N1 - (newest_N1 - slots_W) % size


def first_positions(after_N, size):
    """The numbers of the first tokens, [N, size]; -1 where there is none yet."""
    slots_S = torch.arange(size, device=after_N.device)
    return torch.where(slots_S < after_N[:, None], slots_S, -1)


def gather_ring(x_BTHK, held_NSHK, positions_NS, spans):
    """`gather_tokens` of `ring_positions`: nothing is left of a state whose ring comes round."""
    size = positions_NS.shape[1]
    comes_round = spans.shortest >= size
    if held_NSHK is None and _begin_here(x_BTHK, spans):
        return _first_ring(x_BTHK, size)
    return gather_tokens(x_BTHK, None if comes_round else held_NSHK, positions_NS, spans)


def _begin_here(x_BTHK, spans):
    """Whether all rows are as long, and known to begin with this pass."""
    if spans.start.device.type != "cpu" or not by_autograd_alone():
        return False
    is_dense = spans.shortest == x_BTHK.shape[1] > 0 and len(spans.start) == len(x_BTHK)
    return is_dense and not spans.start.any()


def _first_ring(x_BTHK, size):
    """A ring of `size` slots after the first tokens, which lie one behind the other."""
    more = size - x_BTHK.shape[1]
    if more > 0:
        return pad(x_BTHK, (0, 0, 0, 0, 0, more))
    return x_BTHK[:, -size:].roll(x_BTHK.shape[1] % size, dims=1)


def gather_tokens(x_BTHK, held_NSHK, positions_NS, spans):
    """The tokens of these numbers, [N, S, H, K]: of this pass, or held before it in the same slot.

    Args:
        x_BTHK: the tokens of this pass.
        held_NSHK: the state before it; None: there was none.
        positions_NS: numbers of tokens; negative: none, which gives zeros.
        spans: `Spans` of the N documents or rows.
    """
    is_new_NS = positions_NS >= spans.start[:, None]
    token_NS = spans.first[:, None] + (positions_NS - spans.start[:, None]).clamp(min=0)
    x_TDK = x_BTHK.flatten(0, 1)
    new_NSHK = x_TDK[token_NS.clamp(max=x_TDK.shape[0] - 1)]
    if held_NSHK is None:
        return torch.where(is_new_NS[..., None, None], new_NSHK, 0)
    is_held_NS = (positions_NS >= 0)[..., None, None]
    new_NSHK = new_NSHK.to(held_NSHK.dtype)
    return torch.where(is_new_NS[..., None, None], new_NSHK, torch.where(is_held_NS, held_NSHK, 0))


def write_slot(held_BSHK, new_BHK, slot_B, is_written_B, may_overwrite):
    """A state with one slot of each row written; a copy unless it may be overwritten.

    Args:
        held_BSHK: the state.
        new_BHK: a token per row.
        slot_B: where it goes.
        is_written_B: which rows are written; None: all.
        may_overwrite: whether to write into the state itself.
    """
    rows_B = torch.arange(slot_B.shape[0], device=slot_B.device)
    new_BHK = new_BHK.to(held_BSHK.dtype)
    if is_written_B is not None:
        new_BHK = torch.where(is_written_B[:, None, None], new_BHK, held_BSHK[rows_B, slot_B])
    if not may_overwrite:
        held_BSHK = held_BSHK.clone()
    held_BSHK[rows_B, slot_B] = new_BHK
    return held_BSHK


def write_common_slot(held_BSHK, new_B1HK, slot, may_overwrite):
    """`write_slot` of one slot, a number, in all rows."""
    if not may_overwrite:
        held_BSHK = held_BSHK.clone()
    held_BSHK.narrow(1, slot, 1).copy_(new_B1HK)
    return held_BSHK


def ring_after(x_BTHK, held_BSHK, spec, sequence, may_overwrite):
    """A ring of the last tokens after a pass or a single step, [B, S, H, K].

    Args:
        x_BTHK: the tokens of the pass.
        held_BSHK: the ring before it; None: there was none.
        spec: its `StateSpec`.
        sequence: the `Sequence` of the pass.
        may_overwrite: whether a step may write into the ring itself.
    """
    size, x_BTHK = spec.shape[0], x_BTHK.to(spec.dtype)
    if held_BSHK is not None:  # what a slice was brought is as the tokens are
        held_BSHK = held_BSHK.to(spec.dtype)
    if x_BTHK.shape[1] > 1 or sequence.cu_seqlens is not None:
        spans = row_spans(sequence)
        return gather_ring(x_BTHK, held_BSHK, ring_positions(spans.after, size), spans)
    batch = x_BTHK.shape[0]
    slot_B = sequence.clock[:, 0].expand(batch) % size
    if held_BSHK is None:
        held_BSHK = x_BTHK.new_zeros(batch, *spec.shape)
    return write_slot(held_BSHK, x_BTHK[:, 0], slot_B, sequence.keep, may_overwrite)


class Past:
    """The last tokens that a state holds, to be put before those of a pass.

    In a dense pass they come first in each row, as many in each, and `first_key` [B] says where the
    row's own begin. In a stream each document gets as many as it has, and `cu_seqlens` bounds what
    comes of it; `pick` repeats some tokens of the pass in their places, and `drop` takes these out.

    Args:
        sequence: the `Sequence`.
        held_BSHK: a state in a ring.
        size: how many tokens at most.
    """

    def __init__(self, sequence, held_BSHK, size):
        self.first_key, self.cu_seqlens, self.own = None, sequence.cu_seqlens, None
        spans, slots = document_spans(sequence), held_BSHK.shape[1]
        if sequence.cu_seqlens is None:
            numbers_P = torch.arange(-size, 0, device=held_BSHK.device)
            self.slots = (spans.start[:, None] + numbers_P) % slots
            self.rows = torch.arange(spans.start.shape[0], device=held_BSHK.device)[:, None]
            self.first_key = (size - spans.start).clamp(min=0)
            return
        num_past_N = spans.start.clamp(max=size)
        lengths_N = sequence.cu_seqlens.diff() + num_past_N
        self.cu_seqlens = torch.nn.functional.pad(lengths_N.cumsum(0), (1, 0))
        total = int(self.cu_seqlens[-1])
        document_T = document_of_token(self.cu_seqlens, total)
        offset_T = torch.arange(total, device=held_BSHK.device) - self.cu_seqlens[document_T]
        offset_T = offset_T - num_past_N[document_T]
        self.is_past = offset_T < 0
        self.own = (~self.is_past).nonzero()[:, 0]
        self.token = spans.first[document_T] + offset_T.clamp(min=0)
        self.rows = sequence.row_of_document[document_T]
        self.slots = (spans.start[document_T] + offset_T) % slots

    def put_before(self, x_BTHK, held_BSHK):
        """The pass's tokens with those of the state before them."""
        past_BPHK = held_BSHK[self.rows, self.slots]
        if self.own is None:
            return torch.cat([past_BPHK, x_BTHK], dim=1)
        return torch.where(self.is_past[:, None, None], past_BPHK, x_BTHK[0, self.token])[None]

    def pick(self, x_BTHK):
        """Tokens of the pass in all places of the stream; those of the past are of no meaning."""
        return x_BTHK if self.own is None else x_BTHK[:, self.token]

    def drop(self, x_BTHK):
        """Only the places of the pass's own tokens."""
        return x_BTHK if self.own is None else x_BTHK[:, self.own]
