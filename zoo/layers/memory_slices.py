"""The memory of Infini-attention where several processes each have a slice of the text.

A segment that slices cut is written by the process that finishes it, to which its keys and values
come from those before. So each has whole segments, and what they do to the memory that its slice
begins with is linear in that: equation 8 adds to it. Equation 9, with z known, which equation 8
sums, maps M to A M + U: written for K more columns, which begin as the identity and whose values
are 0, the same walk that gives U gives A, and of each segment before the end what it reads.

In bytes that each process tells, per row, layer and direction: 4 G K (K + 1) with equation 8 (and a
number, whether its slice starts a document). With equation 9 z first, 4 G K, then 4 G K 2 K, of
which the gradient is half. To the next process alone go the keys and values of an unfinished
segment, of the longest at any cut, and nothing where segments end at all cuts.
"""

import torch
from torch.nn.functional import pad

from ..core.halo import last_before
from .compressive_memory import (
    feature_map,
    sums_of_segments,
    update_of,
    write_at_once,
    write_in_turn,
)


def bring_segment(tensors, sequence, length):
    """The tokens before a slice of the segments that it begins in, by slot.

    Args:
        tensors: of this slice's tokens, [B, T, ...] each; None stays None.
        sequence: the `Sequence`, a slice.
        length: L, tokens per segment.

    Returns:
        [B, L, ...] each; None for all: there are none, on the first process or for everyone.
    """
    there = [x for x in tensors if x is not None]
    brought = last_before(there, sequence, length, ("segment", lambda clock: clock % length))
    if brought is None:
        return [None] * len(tensors)
    brought = iter(brought)
    return [None if x is None else next(brought) for x in tensors]


class SliceMemory:
    """What `SegmentPass.remember` does, for a slice.

    Args:
        segments: the `SegmentPass`.
        held: keys without positions, values and strengths of the unfinished segments, as of
            `bring_segment`.
        name: of the layer; one that is run again in backward exchanges nothing a second time.
    """

    def __init__(self, segments, held, name):
        self.segments, self.held, self.name = segments, held, name
        sequence, length = segments.sequence, segments.length
        self.ranks, self.grid = sequence.ranks, segments.grid
        clock_B = self.ranks.clock_RB[self.ranks.rank]
        if sequence.cu_seqlens is None:
            # Rows are documents, and those that start here go on from nothing.
            clock_B = torch.where(self.ranks.continues_N, clock_B, 0)
        self.count_B, self.has_memory_B = clock_B % length, clock_B >= length

    def remember(self, k_BTHK, v_BTHV, update, strength_BTH=None):
        """As of `SegmentPass.remember`."""
        tokens = self.segments.written(k_BTHK, v_BTHV, strength_BTH)
        run = {"linear": self.linear, "delta": self.delta}[update]
        memory_SHKV, after_N, partial_N = run(tokens, self.held_tokens(tokens[0].dtype))
        self.segments.keep(after_N, partial_N)
        return memory_SHKV

    def held_tokens(self, dtype):
        """What the unfinished segments write, by row, as of `SegmentPass.written`; or None."""
        k_BLHK, v_BLHV, strength_BLH1 = self.held
        if k_BLHK is None:
            return None
        slots_L = torch.arange(k_BLHK.shape[1], device=k_BLHK.device)
        is_held_BL = slots_L < self.count_B[:, None]
        k_BHLK = feature_map(k_BLHK).transpose(1, 2)
        k_BHLK = torch.where(is_held_BL[:, None, :, None], k_BHLK, 0)
        strength_BHL1 = None
        if strength_BLH1 is not None:
            strength_BHL1 = strength_BLH1.transpose(1, 2).to(dtype)
        return k_BHLK, v_BLHV.transpose(1, 2).to(dtype), strength_BHL1

    def linear(self, tokens, held):
        """Equation 8: (the memory each segment reads, of each document after, its partial sums)."""
        nothing_N = self.segments.empty(tokens[0])
        partial_B = None if held is None else update_of(*held[:2], strength_SHQ1=held[2])
        partial_N = nothing_N if held is None else self.grid.rows_to_documents(partial_B)
        written = write_at_once(*tokens, nothing_N, partial_N, self.grid)
        memory_SHKV, after_N, partial_N = written
        memory_B = self.sum_of_left(after_N, "memory")
        memory_N = self.grid.rows_to_documents(memory_B)
        self.begin_with(memory_B, partial_B)
        return memory_SHKV + memory_N[self.grid.document], after_N + memory_N, partial_N

    def delta(self, tokens, held):
        """Equation 9, as `linear`."""
        (k_SHQK, v_SHQV, strength_SHQ1), grid = tokens, self.grid
        sizes = v_SHQV.shape[-1], k_SHQK.shape[-1], 1
        columns_B = self.columns(self.z_of_left(k_SHQK, held), sizes[0])
        columns_N, partial_B = grid.rows_to_documents(columns_B), torch.zeros_like(columns_B)
        if held is not None:
            k_BHLK, v_BHLV, strength_BHL1 = held
            partial_B = update_of(k_BHLK, pad(v_BHLV, (0, sizes[1])), columns_B, strength_BHL1)
        partial_N = grid.rows_to_documents(partial_B)
        tokens = k_SHQK, pad(v_SHQV, (0, sizes[1])), strength_SHQ1
        written = write_in_turn(*tokens, columns_N, partial_N, grid)
        u_N, a_N, _ = written[1].split(sizes, -1)
        ranks = self.ranks
        a_B, u_B = ranks.transition(a_N, is_matrix=True), ranks.outgoing(u_N)
        memory_B = self.where_there(ranks.affine(a_B, u_B, (self.name, "memory")))
        memory_N = grid.rows_to_documents(memory_B)

        def put_in(columns, memory):
            u, a, z = columns.split(sizes, -1)
            return torch.cat([u + a @ memory, z], -1)

        self.begin_with(put_in(columns_B, memory_B), put_in(partial_B, memory_B))
        memory_SHKV = put_in(written[0], memory_N[grid.document])
        return memory_SHKV, put_in(written[1], memory_N), put_in(written[2], memory_N)

    def z_of_left(self, k_SHQK, held):
        """z of each row before this slice, [B, H, K, 1]."""
        nothing_N = self.segments.empty(k_SHQK)[..., :1]
        partial_N = nothing_N
        if held is not None:
            partial_N = self.grid.rows_to_documents(held[0].sum(2)[..., None])
        z_SHK1 = k_SHQK.sum(2)[..., None]
        return self.sum_of_left(sums_of_segments(z_SHK1, nothing_N, partial_N, self.grid)[1], "z")

    def columns(self, z_BHK1, value_dim):
        """What the walk begins with: no values, the identity, and z; [B, H, K, V + K + 1].

        Without a memory there is nothing to map, and the identity would be divided by a z of 0.
        """
        batch, heads, key_dim, _ = z_BHK1.shape
        identity_KK = torch.eye(key_dim, dtype=z_BHK1.dtype, device=z_BHK1.device)
        identity_BHKK = self.where_there(identity_KK.expand(batch, heads, -1, -1))
        zeros_BHKV = z_BHK1.new_zeros(batch, heads, key_dim, value_dim)
        return torch.cat([zeros_BHKV, identity_BHKK, z_BHK1], -1)

    def sum_of_left(self, sums_N, name):
        """Of each row what documents came to before this slice, [B, ...]; 0 where none goes on."""
        ranks = self.ranks
        a_B = ranks.transition(sums_N.new_ones(sums_N.shape[0], 1, 1, 1))
        return self.where_there(ranks.affine(a_B, ranks.outgoing(sums_N), (self.name, name)))

    def where_there(self, x_B):
        """0 for rows whose document has no whole segment before this slice."""
        return torch.where(self.has_memory_B[:, None, None, None], x_B, 0)

    def begin_with(self, memory_B, partial_B):
        """What the state of rows without tokens stays."""
        state = self.segments.state
        state.memory_BHKV, state.partial_BHKV = memory_B, partial_B
