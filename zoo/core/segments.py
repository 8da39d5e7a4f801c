"""The tokens of a forward pass, laid out in the segments of their documents.

Token n of a document, counted from 0, lies in segment n // L at slot n % L. Documents of a pass may
begin in the middle of a segment (the rest of it is in the state) and end in one. `SegmentGrid` cuts
a pass into rows, one per segment, that are computed all at once, and joins them again. Nothing here
knows of padding or batches beyond what the `Sequence` says, so a document gives the same numbers
alone, padded, packed and in pieces.
"""

import torch
from torch.nn.functional import pad

from .window import document_spans


class SegmentGrid:
    """S segments of a pass, each with its keys by slot and its new tokens from the left.

    A dense batch without a state needs no look at the values of its clocks, and so no
    synchronisation with a GPU. With one it costs a look, or, while it is compiled, as many segments
    as any clock could ask for, of which the last may be empty.

    Args:
        sequence: the `Sequence` of the pass.
        length: L, tokens per segment.
        is_fresh: whether every document starts in this pass: there is no state.

    Attributes:
        document: [S], the document (row of a dense batch) of each segment.
        rank: [S], which of its document's segments in this pass it is, from 0.
        num_ranks: the largest such count.
        walk: [N], the documents in the order of `by_rank`; None when dense, in their own.
        offset: [S], the slot of its first new token.
        count: [S], how many new tokens it has.
        is_complete: [S] bool, whether the last of its slots was filled in this pass.
        width: slots that are laid out, L at most.
        num_queries: new tokens that are laid out per segment.
        most_older: P, the largest number of slots before the first new token of a segment.
    """

    def __init__(self, sequence, length, is_fresh):
        self.sequence, self.length = sequence, length
        self.spans = document_spans(sequence)
        self.is_dense, self.walk = sequence.cu_seqlens is None, None
        start_N, after_N = self.spans.start, self.spans.after
        self.first_segment = start_N // length
        device = start_N.device
        if self.is_dense:
            batch, time = sequence.shape
            first_slot = 0 if is_fresh else length - 1
            if not (is_fresh or torch.compiler.is_compiling()):
                first_slot = int((start_N % length).max())
            self.num_ranks = (first_slot + time - 1) // length + 1
            if torch.compiler.is_exporting():
                # For any length: one segment more, which is empty, as exporting takes a number that
                # is 1 for a constant; and all slots, as it proves little of a number of them.
                self.num_ranks, self.width, longest = self.num_ranks + 1, length, length
            else:
                self.width, longest = min(first_slot + time, length), time
            is_aligned, self.most_older = first_slot == 0, first_slot
            rows_S = torch.arange(batch * self.num_ranks, device=device)
            self.document, self.rank = rows_S // self.num_ranks, rows_S % self.num_ranks
            self.first_row = torch.arange(batch, device=device) * self.num_ranks
        else:
            num_N = (after_N - 1) // length - self.first_segment + 1
            self.num_ranks = int(num_N.max())
            # Slots up to the last that any document uses.
            self.width = int(torch.where(num_N > 1, length, (after_N - 1) % length + 1).max())
            longest = int((after_N - start_N).max())
            documents_N = torch.arange(len(num_N), device=device)
            self.document = documents_N.repeat_interleave(num_N)
            self.first_row = num_N.cumsum(0) - num_N
            rows_S = torch.arange(len(self.document), device=device)
            self.rank = rows_S - self.first_row[self.document]
            # A walk takes the documents with most segments first.
            self.walk = num_N.argsort(descending=True, stable=True)
            place_S = self.walk.argsort()[self.document]
            self.walk_rows = (self.rank * len(num_N) + place_S).argsort()
            self.walk_counts = self.rank.bincount().tolist()
            self.most_older = 0 if is_fresh else int((start_N % length).max())
            is_aligned = self.most_older == 0
        # Every document begins with a segment: slot q is query q.
        self.is_aligned = is_aligned
        # Exporting cannot prove how [B, T] and [S, Q] hang together, and takes both by index.
        self.is_reshaped = is_aligned and self.is_dense and not torch.compiler.is_exporting()
        self.num_queries = min(self.width, longest)
        begin_S = (self.first_segment[self.document] + self.rank) * length
        from_S = torch.maximum(begin_S, start_N[self.document])
        to_S = torch.minimum(begin_S + length, after_N[self.document])
        self.begin = begin_S
        self.offset = from_S - begin_S
        self.count = (to_S - from_S).clamp(min=0)
        self.is_complete = (self.count > 0) & (to_S == begin_S + length)

    def queries(self, x_BTHK):
        """The new tokens of each segment, from the left, [S, Q, ...]; zeros behind them."""
        if self.is_reshaped:
            return self._reshaped(x_BTHK)
        slots_Q = torch.arange(self.num_queries, device=self.offset.device)
        return self._gathered(x_BTHK, self.offset[:, None] + slots_Q)

    def keys(self, x_BTHK, held_NLHK=None):
        """Tokens by slot, [S, width, ...]: of this pass, or held before it; zeros where none is.

        Args:
            x_BTHK: those of the pass.
            held_NLHK: for each document the state by slot, [N, L, ...]; None: there is none.
        """
        if self.is_reshaped:
            return self._reshaped(x_BTHK)
        slots_L = torch.arange(self.width, device=self.offset.device)
        x_SLHK = self._gathered(x_BTHK, slots_L.expand(self.offset.shape[0], -1))
        if held_NLHK is None:
            return x_SLHK
        is_held_SL = (slots_L < self.offset[:, None]) & (self.rank == 0)[:, None]
        held_SLHK = held_NLHK[self.document, : self.width].to(x_SLHK.dtype)
        return torch.where(_like(is_held_SL, x_SLHK), held_SLHK, x_SLHK)

    def _reshaped(self, x_BTHK):
        filler = self.num_ranks * self.width - x_BTHK.shape[1]
        x_BTHK = pad(x_BTHK, (0, 0) * (x_BTHK.ndim - 2) + (0, filler)) if filler else x_BTHK
        return x_BTHK.unflatten(1, (self.num_ranks, self.width)).flatten(0, 1)

    def _gathered(self, x_BTHK, slots_SL):
        offset_S1, count_S1 = self.offset[:, None], self.count[:, None]
        is_new_SL = (slots_SL >= offset_S1) & (slots_SL < offset_S1 + count_S1)
        first_S1, start_S1 = (x[self.document][:, None] for x in self.spans[:2])
        token_SL = torch.where(is_new_SL, first_S1 + self.begin[:, None] + slots_SL - start_S1, 0)
        x_SLHK = x_BTHK.flatten(0, 1)[token_SL]
        return torch.where(_like(is_new_SL, x_SLHK), x_SLHK, 0)

    def join(self, x_SQHV):
        """The inverse of `queries`: every token of the pass from its segment, [B, T, ...]."""
        batch, time = self.sequence.shape
        if self.is_reshaped:
            return x_SQHV.unflatten(0, (batch, self.num_ranks)).flatten(1, 2)[:, :time]
        row_BT, slot_BT = self.places()
        return x_SQHV[row_BT, slot_BT - self.offset[row_BT]]

    def places(self):
        """(segment, slot) of every token of the pass."""
        clock_BT = self.sequence.clock
        if self.is_dense:
            document_BT = torch.arange(self.sequence.shape[0], device=clock_BT.device)[:, None]
        else:
            lengths_N = self.sequence.cu_seqlens.diff()
            document_BT = torch.arange(len(lengths_N), device=clock_BT.device)
            document_BT = document_BT.repeat_interleave(lengths_N)[None]
        rank_BT = clock_BT // self.length - self.first_segment[document_BT]
        return self.first_row[document_BT] + rank_BT, clock_BT % self.length

    def visible(self):
        """[S, Q, width] bool, which slots a new token sees: its own and those before it in its
        segment. None where slot q is query q: plain causal attention."""
        if self.is_aligned:
            return None
        slots_L = torch.arange(self.width, device=self.offset.device)
        own_SQ1 = self.offset[:, None, None] + slots_L[: self.num_queries, None]
        return slots_L <= own_SQ1

    def behind_older(self, x_SLHK):
        """Tokens by slot as keys of which the last belong to the queries, [S, P + Q, ...].

        Returns:
            (the keys, which of them is the first of each segment [S]; None: for all the first).
        """
        if self.is_aligned:
            return x_SLHK, None
        slots = torch.arange(self.most_older + self.num_queries, device=self.offset.device)
        slots_SP = (self.offset[:, None] - self.most_older + slots).clamp(0, self.width - 1)
        rows_S1 = torch.arange(len(self.offset), device=self.offset.device)[:, None]
        return x_SLHK[rows_S1, slots_SP], self.most_older - self.offset

    def sums_before(self, x_S):
        """For each segment the sum of x over its document's earlier ones in this pass, [S, ...]."""
        if self.is_dense:
            x_BN = x_S.unflatten(0, (self.sequence.shape[0], self.num_ranks))
            return pad(x_BN, (0, 0) * (x_S.ndim - 1) + (1, 0))[:, :-1].cumsum(1).flatten(0, 1)

        # By doubling: differences of sums over all documents would cancel.
        def earlier(x_S, step):
            moved_S = pad(x_S[:-step], (0, 0) * (x_S.ndim - 1) + (step, 0))
            return torch.where(_like(self.rank >= step, x_S), moved_S, 0)

        total_S, step = earlier(x_S, 1), 1
        while step < self.num_ranks:
            total_S, step = total_S + earlier(total_S, step), 2 * step
        return total_S

    def by_rank(self, x_S):
        """The segments in the order of a walk through all documents at once.

        Returns:
            For each rank those segments, [N', ...]: of all documents of a dense pass; of packed
            documents those that have so many, in the order of `walk`, so that each is the start of
            the one before.
        """
        if self.is_dense:
            return x_S.unflatten(0, (-1, self.num_ranks)).unbind(1)
        return x_S[self.walk_rows].split(self.walk_counts)

    def from_ranks(self, xs):
        """The inverse of `by_rank`: [S, ...]."""
        if self.is_dense:
            return torch.stack(xs, dim=1).flatten(0, 1)
        x_S = torch.cat(xs)
        return x_S[self.walk_rows.argsort()]

    def stacked(self, x_S):
        """The segments of a dense pass with an axis for their ranks, [ranks, N, ...]."""
        return x_S.unflatten(0, (self.sequence.shape[0], self.num_ranks)).transpose(0, 1)

    def unstacked(self, x_RN):
        """The inverse of `stacked`."""
        return x_RN.transpose(0, 1).flatten(0, 1)

    def last(self, x_S):
        """Of each document the value of its last segment with a token, [N, ...]."""
        last_N = (self.spans.after - 1) // self.length - self.first_segment
        return x_S[self.first_row + last_N]

    def in_walk_order(self, x_N):
        """What belongs to documents, in the order that `by_rank` has them in."""
        return x_N if self.walk is None else x_N[self.walk]

    def rows_to_documents(self, held_B):
        """A state by row as one by document, [N, ...]: zeros where a document starts."""
        if self.is_dense or held_B is None:
            return held_B  # the cache has seen to rows that start again
        held_N = held_B[self.sequence.row_of_document]
        return torch.where(_like(self.sequence.continues, held_N), held_N, 0)


def documents_to_rows(x_N, held_B, sequence):
    """A state by document as one by row: the last document's; rows without a token keep theirs.

    Args:
        x_N: after a pass.
        held_B: before it; None: there was none, which is zeros.
        sequence: the `Sequence` of the pass; of a dense one rows are documents.
    """
    if sequence.last_document is None:
        return x_N
    last_B = sequence.last_document
    x_B = x_N[last_B.clamp(min=0)]
    return torch.where(_like(last_B >= 0, x_B), x_B, 0 if held_B is None else held_B)


def _like(condition, x):
    """A condition over the first axes of x, made to broadcast over the rest."""
    return condition.reshape(*condition.shape, *[1] * (x.ndim - condition.ndim))
