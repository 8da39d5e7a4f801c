"""Sequence parallelism: several processes make one pass, each over a slice of every row.

Process r of R holds the columns after those of process r - 1, of any lengths (`split_batch`). The
door (`open_slice`) tells each how many tokens of its document each row has seen before its slice:
two small all-gathers. From there on a pass over a slice is a pass that goes on from a state, which
the process before has, or will have: a mixer either computes what its slice does to any state, and
all of them exchange that (`exchanges = True`), or the processes take turns (`Turns`), for what is
not linear in its state.
"""

import torch
import torch.distributed as dist

from .exchange import Exchanges
from .sequence import Sequence
from .slicing import split_batch
from .tails import tails_of_left
from .wire import TRAFFIC, settle

# More tokens than any text has.
MANY = 1 << 40


class Ranks(Exchanges):
    """How this process' slice of each row lies between the others'; as `sequence.ranks`.

    Args:
        group: the processes, in the order of the text.
        device: where the tokens are.

    Attributes:
        tokens_RB: how many tokens each process has of each row.
        start_RB: whether a document starts in them.
        own_RB: how many of them belong to the row's last document there.
        clock_RB: how many tokens of that document come before its slice.
        fewest: how many tokens everyone has of every row; `all_have_tokens`: whether any.
        anyone_keeps: whether any of them keeps the state after its slice.
        columns_before: how many columns the slices before this one have, with padding.
        left: what entered each row in the layer that ran last, by name of its state, if that is
            kept: rows without a token here go on from it.
    """

    def __init__(self, group, tokens_RB, start_RB, own_RB, clock_RB, device, anyone_keeps=False):
        super().__init__(group, device)
        self.tokens_RB, self.start_RB, self.own_RB = tokens_RB, start_RB, own_RB
        self.clock_RB, self.anyone_keeps = clock_RB, anyone_keeps
        self.fewest, self.left = int(tokens_RB.min()), {}
        self.all_have_tokens = self.fewest > 0

    def take(self, sequence):
        """Remembers which documents of the slice go on from the left, and which reach its end."""
        batch, device = sequence.shape[0], sequence.clock.device
        self.cu_seqlens = sequence.cu_seqlens
        self.longest = max(1, int(self.own_RB[self.rank].max()))
        if sequence.cu_seqlens is None:
            self.row_N = self.last_B = torch.arange(batch, device=device)
            self.length_N = torch.full((batch,), sequence.shape[1], device=device)
            goes_on_N = sequence.continues
            if goes_on_N is None:
                goes_on_N = torch.ones(batch, dtype=torch.bool, device=device)
        else:
            self.row_N, self.last_B = sequence.row_of_document, sequence.last_document
            self.length_N, goes_on_N = sequence.cu_seqlens.diff(), sequence.continues
        self.continues_N = goes_on_N & (self.rank > 0)
        self.has_tokens_B = self.last_B >= 0
        self.passes_B = ~self.start_RB[self.rank].to(device)

    def outgoing(self, final_N):
        """Of each row what its last document comes to, [B, ...]; 0 for a row without tokens."""
        x_B = final_N[self.last_B.clamp(min=0)]
        return torch.where(_like(self.has_tokens_B, x_B), x_B, 0)

    def entering(self, state_B, fill=0, name=None):
        """Of each document what it goes on from, [N, ...]; `fill` for one that starts here.

        Args: what enters each row; a number or tensor [...]; which of the layer's states it is.
        """
        if name is not None:
            self.left[name] = state_B
        x_N = state_B[self.row_N]
        return torch.where(_like(self.continues_N, x_N), x_N, fill)

    def transition(self, a_N, is_matrix=False):
        """What a slice leaves of the state that enters each row, [B, ...].

        Args:
            a_N: what each document leaves of it: factors, or matrices [N, ..., K, K].
            is_matrix: which of them.
        """
        a_B = a_N[self.last_B.clamp(min=0)]
        if is_matrix:
            nothing = torch.eye(a_B.shape[-1], dtype=a_B.dtype, device=a_B.device)
        else:
            nothing = torch.ones((), dtype=a_B.dtype, device=a_B.device)
        a_B = torch.where(_like(self.passes_B, a_B), a_B, 0)
        return torch.where(_like(self.has_tokens_B, a_B), a_B, nothing)

    def sums(self, x_BT):
        """Sums over the tokens of each document: [B, T, ...] to [N, ...]."""
        if self.cu_seqlens is None:
            return x_BT.sum(1)
        document_T = torch.repeat_interleave(
            torch.arange(len(self.length_N), device=x_BT.device), self.length_N
        )
        zeros_N = x_BT.new_zeros(len(self.length_N), *x_BT.shape[2:])
        return zeros_N.index_add(0, document_T, x_BT[0])

    def last_of_left(self, x_NX, name=None):
        """Of each document the last token before this slice, zeros where it starts; [N, ...].

        Args:
            x_NX: of each document of this slice its last token.
            name: as of `entering`.
        """
        left_B = tails_of_left(self, self.outgoing(x_NX)[:, None])[:, 0]
        return self.entering(left_B, name=name)

    def complete(self, cache):
        """Tells a cache of the columns before its slice.

        On the last process it is then the cache of a pass over whole rows.
        """
        for layer in cache.layers:
            layer.length = layer.length + self.columns_before
        if bool(self.start_RB.any()):
            cache.layers[0].is_one_document = False

    @property
    def is_first(self):
        return self.rank == 0

    @property
    def is_last(self):
        return self.rank == self.size - 1


def _like(condition_N, x_N):
    return condition_N.view(-1, *[1] * (x_N.ndim - 1))


def check_slice(inputs, cache, cu_seq_lens_q, seq_idx):
    """Raises a ValueError for what a pass over slices does not take.

    Args:
        inputs: the `Inputs` of the pass.
        cache: that it was given, or None.
        cu_seq_lens_q, seq_idx: as of `Sequence.open`.
    """
    if torch.compiler.is_compiling():
        raise ValueError(
            "what processes of sequence_parallel exchange depends on their texts and is not "
            "traced, got torch.compile or torch.export; run the model as it is, or set "
            "sequence_parallel to None."
        )
    if cu_seq_lens_q is not None or seq_idx is not None:
        raise ValueError(
            "with sequence_parallel, documents are told apart by position_ids that restart, "
            "got cu_seq_lens_q or seq_idx; zoo.core.parallel.split_batch makes them of these."
        )
    mask = inputs.attention_mask
    if mask is not None and mask.shape != inputs.embeds_BTD.shape[:2]:
        raise ValueError(
            "with sequence_parallel, expected attention_mask [B, T] of this slice, "
            f"{list(inputs.embeds_BTD.shape[:2])}, got {list(mask.shape)}; "
            "zoo.core.parallel.split_batch cuts it."
        )
    first = None if cache is None else cache.layers[0]
    if first is not None and (first.tensors or first.record_past or first.pending_length):
        raise ValueError(
            "a pass with sequence_parallel begins its texts, got a cache that has a state or "
            "records it; set sequence_parallel to None to go on from it, on the last process."
        )


def refuse_slices(model, what, remedy):
    """Raises a ValueError if a decoder is one of several processes, each with a slice."""
    if model.sequence_parallel is not None:
        raise ValueError(
            f"{what}, and with sequence_parallel each process has a slice of a row; {remedy}."
        )


def open_slice(group, shape, device, attention_mask=None, position_ids=None, is_kept=False):
    """The door: a slice of every row, as a `Sequence` with the `Ranks` that it is one of.

    Args:
        group: the processes, in the order of the text.
        shape: (B, T) of this slice; B is the same for all, T need not be.
        device: where the tokens are.
        attention_mask: [B, T], 0 where there is padding, also everywhere; None: no padding.
        position_ids: [B or 1, T]; a position that does not grow starts a new document, also from
            one slice to the next. For all processes or for none.
        is_kept: whether this process keeps the state after its slice.

    Raises:
        ValueError: shapes that do not fit; rows or positions that some have and others have not.
    """
    row = _row_of_door(shape, device, attention_mask, position_ids)
    own = torch.tensor([*shape, position_ids is not None, is_kept], device=device)
    sizes_RX = _told(group, own)
    settle(group)  # who is at this door has received all that was sent before it
    rows_R, columns_R, has_positions_R, is_kept_R = sizes_RX.unbind(1)
    if rows_R.unique().numel() > 1:
        raise ValueError(
            "expected a slice of the same rows from each process of sequence_parallel, got "
            f"{rows_R.tolist()} of them; cut one batch with zoo.core.parallel.split_batch."
        )
    if has_positions_R.unique().numel() > 1:
        raise ValueError(
            "expected position_ids of all processes or of none, got them of "
            f"{int(has_positions_R.sum())} of {len(rows_R)}; pass them everywhere."
        )
    tokens_RB, start_RB, own_RB, first_RB, last_RB = _told(group, row).unbind(1)
    has_RB, start_RB = tokens_RB > 0, start_RB > 0
    clock_B, before_B = torch.zeros_like(tokens_RB[0]), torch.full_like(tokens_RB[0], -1)
    clocks, befores, starts = [], [], []
    for rank in range(len(rows_R)):
        clocks.append(clock_B)
        befores.append(before_B)
        starts.append(start_RB[rank] | (has_RB[rank] & (first_RB[rank] <= before_B)))
        if position_ids is None:
            starts[rank] = start_RB[rank]
        clock_B = torch.where(starts[rank], own_RB[rank], clock_B + own_RB[rank])
        before_B = torch.where(has_RB[rank], last_RB[rank], before_B)
    told = tokens_RB, torch.stack(starts), own_RB, torch.stack(clocks)
    ranks = Ranks(group, *told, device, anyone_keeps=bool(is_kept_R.any()))
    ranks.columns_before = int(columns_R[: ranks.rank].sum())
    clock_B = None if ranks.is_first else ranks.clock_RB[ranks.rank]
    if not has_RB[ranks.rank].any():
        sequence = Sequence.without_tokens(shape, device, clock_B)
    else:
        before_B = None if position_ids is None else befores[ranks.rank]
        sequence = Sequence.open(
            shape,
            device,
            attention_mask,
            position_ids,
            clock_before=clock_B,
            is_slice=True,
            position_before=before_B,
        )
    sequence.ranks = ranks
    ranks.take(sequence)
    return sequence


def _told(group, x):
    """Everyone's numbers, [R, ...]."""
    every = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, x, group=group)
    TRAFFIC["door"] += x.nbytes
    return torch.stack(every)


def _row_of_door(shape, device, attention_mask, position_ids):
    """What the others have to know of this slice, [5, B] int64; see `open_slice`."""
    batch = shape[0]
    zeros_B = torch.zeros(batch, dtype=torch.int64, device=device)
    columns = [zeros_B] * 5
    if attention_mask is not None and not bool((attention_mask[:, -shape[1] :] != 0).any()):
        return torch.stack(columns)
    # As if all of it went on from texts longer than any: what has not restarted is as long still.
    sequence = Sequence.open(
        shape,
        device,
        attention_mask,
        position_ids,
        clock_before=zeros_B + MANY,
        is_slice=True,
        position_before=zeros_B - 1,
    )
    after_B = sequence.clock_after.expand(batch)
    columns[1] = (after_B < MANY).long()
    columns[2] = torch.where(after_B < MANY, after_B, after_B - MANY)
    if sequence.cu_seqlens is None:
        columns[0] = zeros_B + shape[1]
        ends = [sequence.positions[:, column].expand(batch) for column in (0, -1)]
    else:
        row_N, length_N = sequence.row_of_document, sequence.cu_seqlens.diff()
        columns[0] = zeros_B.index_add(0, row_N, length_N)
        after_B, last = columns[0].cumsum(0), int(columns[0].sum()) - 1
        ends = [
            sequence.positions[0, index_B.clamp(0, last)]  # a row without tokens says nothing
            for index_B in (after_B - columns[0], after_B - 1)
        ]
    columns[3:5] = ends
    return torch.stack(columns)


__all__ = ["Ranks", "check_slice", "open_slice", "refuse_slices", "split_batch"]
