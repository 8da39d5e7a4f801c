"""The segments before a pass that a state holds, as keys that its queries see."""

import torch


class HeldSegments:
    """What a state holds of the documents of a pass, in the order of the grid's walk.

    Args:
        state: keys_BWHK and values_BWHV, one slot per token, or a ring of C + 1 segments.
        sequence: the `Sequence` of the pass.
        grid: its `SegmentGrid`.
        length: L.
        windows: C; None: there is a slot for every token.
    """

    def __init__(self, state, sequence, grid, length, windows):
        self.held = state.keys_BWHK, state.values_BWHV
        self.length, self.windows, self.grid = length, windows, grid
        self.size = state.keys_BWHK.shape[1]
        rows_N = sequence.row_of_document
        if rows_N is None:
            rows_N = torch.arange(sequence.shape[0], device=grid.first_segment.device)
        self.rows_of_documents = rows_N
        self.rows = grid.in_walk_order(rows_N)
        self.first_segment = grid.in_walk_order(grid.first_segment)
        self.first_slot, self.most, self.least = None, self.size // length, 0
        if not torch.compiler.is_compiling():
            start_N = grid.spans.start
            lowest, highest = (int(x) for x in (start_N.min(), start_N.max()))
            self.first_slot = lowest % length if lowest == highest else None
            self.least, self.most = lowest // length, highest // length

    def slots(self, numbers):
        """Where tokens of these numbers lie."""
        if self.windows is not None:
            return numbers % self.size
        return numbers.clamp(0, self.size - 1)

    def unfinished(self):
        """By document and slot, the segment that each document of the pass is in, [N, L, ...]."""
        begin_N1 = self.grid.first_segment[:, None] * self.length
        slots_L = torch.arange(self.length, device=begin_N1.device)
        places_NL = self.rows_of_documents[:, None], self.slots(begin_N1 + slots_L)
        return tuple(x[places_NL] for x in self.held)

    def before(self, rank, documents):
        """The last segments before the pass that segments of a rank, or later ones, see.

        Args:
            rank: of the segments.
            documents: which of the walk.

        Returns:
            (keys, values, which of them are tokens [N, M] bool; None: all).
        """
        count = self.most
        if self.windows is not None:
            count = max(0, min(count, self.windows - rank))
        first_N, rows_N = self.first_segment[documents], self.rows[documents]
        if self.least == self.most and self.windows is None and self.grid.is_dense:
            return (*(x[:, : count * self.length] for x in self.held), None)
        tokens_M = torch.arange(-count * self.length, 0, device=first_N.device)
        numbers_NM = first_N[:, None] * self.length + tokens_M
        held = (x[rows_N[:, None], self.slots(numbers_NM)] for x in self.held)
        # Documents that begin in this pass have none, and are not asked for here in a stream.
        is_any_NM = None if count <= self.least else numbers_NM >= 0
        return (*held, is_any_NM)
