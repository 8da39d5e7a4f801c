"""The external memory of the Memorizing Transformer: keys of long ago, and queries that take a few.

Wu et al. 2022, https://arxiv.org/abs/2203.08913, as the authors' code (meliad) has it. A document
is cut into segments of S tokens, and the memory of a token is what the DB tokens before its segment
left: keys k (of length 1) and values v of each head, without gradients. Of those a query q, of
length 1 too, chooses NB by q . k, per head; with a the learned scale of the layer's attention and
o_n what the query saw of its window:

    y_n = sum_j p_j v_j,   p = softmax_j(|a| q . k_j)            over the NB chosen
    o'_n = (1 - g) o_n + g y_n,   g = sigmoid(b)                 b per head, at the start 0

Gradients reach q, a and b, and no key or value. How NB are chosen (`memory_selection`):

    columns: as in that code, "approximate top k". Token m lies in column m mod NB, and of each
        column the best is taken. A column in which nothing lies yet gives k = v = 0, which takes
        part with a score of 0. Before a document's second segment all do: y = 0, and the window's
        part is 1 - g of itself.
    exact: the NB best, or as many as there are; of none y = 0. This is the paper's text, and in no
        code of its authors.

In float64 "columns" also has what that code makes of two that are almost the same: it weighs the
tokens of a column by softmax(10^6 q . k), which is one of them but where scores lie within 10^-5.
In float32 that is a matter of rounding, and the best one is taken alone.

Departures: there the memory is written after each call, whatever its length, and S is the clock of
that; DB is a multiple of S there, here it need not be. There an empty slot is known by a key whose
sum is 0, here by counting. One memory for all rows of a batch is left out.
"""

import torch
from torch import nn
from transformers import initialization as init

from ..core.choice import Choice
from ..core.halo import last_before
from ..core.segments import SegmentGrid
from ..core.state import StateSpec
from ..core.window import ring_after, ring_positions
from ..kernels.export_scan import scan, without_autocast
from ..kernels.linear_recurrence import accumulator_dtype

# What two scores of a column are multiplied by, in the authors' code.
SHARPNESS = 1e6
# Scores that are held at a time: queries are taken in pieces beyond that.
MOST_SCORES = 1 << 26


def mean_remembered(length, segment, size):
    """Tokens in the memory of a token, on average over a text of so many."""
    whole, rest = divmod(length, segment)
    growing = min(whole, -(-size // segment))  # segments whose memory is not full
    total = segment * segment * growing * (growing - 1) // 2 + segment * size * (whole - growing)
    return (total + rest * min(whole * segment, size)) / length


class ExternalMemory(nn.Module):
    """What the tokens of long ago add to a layer's attention.

    Args:
        config: of a Block-Recurrent Transformer with `memory_layers`.
    """

    def __init__(self, config):
        super().__init__()
        self.size, self.segment = config.memory_size, config.memory_segment_length
        self.neighbors, self.has_columns = (
            config.memory_neighbors,
            config.memory_selection == "columns",
        )
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        # A ring: the memory of a segment and, behind it, the segment itself, which comes into it
        # when it is over. Columns come round with it.
        rows = self.neighbors if self.has_columns else 1
        self.num_slots = -(-(self.size + self.segment) // rows) * rows
        self.gate = nn.Parameter(torch.empty(self.heads))
        self.choice = Choice()

    def init_weights_of_paper(self):
        """Half of the window, half of the memory."""
        init.zeros_(self.gate)

    def state_specs(self, dtype):
        """Keys and values of the last DB + S tokens (and up to a multiple of NB), in this dtype."""
        ring = StateSpec((self.num_slots, self.heads, self.head_dim), dtype=dtype)
        return {"memory_keys_BMHK": ring, "memory_values_BMHV": ring}

    def flops_per_token(self, length):
        """Of the search through all keys of the memory, and of attention to what it finds."""
        searched = mean_remembered(length, self.segment, self.size)
        return self.heads * self.head_dim * (2 * searched + 4 * self.neighbors)

    def forward(self, y_BTHV, q_BTHK, scaled_BTHK, k_BTHK, v_BTHV, sequence, state, dtype):
        """What queries saw of their window and what they recall, mixed: ([B, T, H, V], state).

        Args:
            y_BTHV: what they saw of their window.
            q_BTHK: the queries, of length 1.
            scaled_BTHK: the same times |a|.
            k_BTHK: keys of the tokens.
            v_BTHV: their values.
            sequence: how they lie.
            state: before them; its memory is brought up to date if it is kept.
            dtype: that of `state_specs`.
        """
        specs, q_BTHK = self.state_specs(dtype), q_BTHK.detach()
        k_BTHK, v_BTHV = (x_BTHK.detach().to(dtype) for x_BTHK in (k_BTHK, v_BTHV))
        tokens = q_BTHK, scaled_BTHK, k_BTHK, v_BTHV
        is_step = y_BTHV.shape[1] == 1 and sequence.cu_seqlens is None
        if is_step and state.memory_keys_BMHK is not None:
            recalled_BTHV = self.recall_step(q_BTHK, scaled_BTHK, sequence, state)
        else:
            recalled_BTHV = self.recall_pass(tokens, sequence, state)
        if state.is_kept:
            for (name, spec), x_BTHK in zip(specs.items(), (k_BTHK, v_BTHV)):
                held_BMHK = getattr(state, name)
                may_overwrite = state.may_overwrite
                setattr(state, name, ring_after(x_BTHK, held_BMHK, spec, sequence, may_overwrite))
        dtype = recalled_BTHV.dtype
        g_H1 = self.gate.to(dtype).sigmoid()[:, None]
        mixed_BTHV = (1 - g_H1) * y_BTHV.to(dtype) + g_H1 * recalled_BTHV
        # As a result, as of a mixer: whoever moves weights hands a module copies of its arguments.
        return mixed_BTHV.to(y_BTHV.dtype), state

    def bring(self, k_BTHK, v_BTHV, sequence, state, dtype):
        """A slice: the memory of the segments that it begins in, and what they have so far.

        Args:
            k_BTHK, v_BTHV: of its tokens.
            sequence: the slice.
            state: an empty one, which has it afterwards.
            dtype: that of `state_specs`.
        """
        segment, size = self.segment, self.size
        need = "memory", lambda clock: torch.minimum(clock, clock % segment + size)
        tokens = [x_BTHK.detach().to(dtype) for x_BTHK in (k_BTHK, v_BTHV)]
        held = last_before(tokens, sequence, self.num_slots, need, has_gradients=False)
        if held is not None:
            state.memory_keys_BMHK, state.memory_values_BMHV = held

    def recall_step(self, q_B1HK, scaled_B1HK, sequence, state):
        """One token per row, from the state as it is."""
        clock_B = sequence.clock[:, 0].expand(q_B1HK.shape[0])
        rows_B1 = torch.arange(clock_B.shape[0], device=clock_B.device)[:, None]
        return self.recall(
            q_B1HK,
            scaled_B1HK,
            state.memory_keys_BMHK,
            state.memory_values_BMHV,
            clock_B // self.segment * self.segment,
            lambda: (rows_B1, clock_B[:, None]),
        )

    def recall_pass(self, tokens, sequence, state):
        """Any number of tokens: segment after segment, of all documents at once."""
        grid = SegmentGrid(sequence, self.segment, is_fresh=state.memory_keys_BMHK is None)
        rings = []
        for x_BTHK, held_BMHK in zip(
            tokens[2:], (state.memory_keys_BMHK, state.memory_values_BMHV)
        ):
            held_NMHK = grid.rows_to_documents(held_BMHK)
            if held_NMHK is None:
                num_documents, shape = grid.first_row.shape[0], (self.num_slots, *x_BTHK.shape[2:])
                held_NMHK = x_BTHK.new_zeros(num_documents, *shape)
            rings.append(grid.in_walk_order(held_NMHK))
        parts = [*map(grid.queries, tokens), grid.document, grid.begin, grid.offset, grid.count]
        if torch.compiler.is_exporting():
            _, (y_RNQHV,) = scan(self.recall_and_write, tuple(rings), *map(grid.stacked, parts))
            return grid.join(grid.unstacked(y_RNQHV))
        recalled = []
        for segment in zip(*map(grid.by_rank, parts)):
            # Documents that have no segment of this rank are the last ones.
            rings = [x_NMHK[: segment[0].shape[0]] for x_NMHK in rings]
            is_last = len(recalled) + 1 == grid.num_ranks
            rings, (y_NQHV,) = self.recall_and_write(rings, *segment, is_last=is_last)
            recalled.append(y_NQHV)
        return grid.join(grid.from_ranks(recalled))

    def recall_and_write(
        self,
        rings,
        q_NQHK,
        scaled_NQHK,
        k_NQHK,
        v_NQHV,
        document_N,
        begin_N,
        offset_N,
        count_N,
        is_last=False,
    ):
        """A segment of each document: what its tokens recall, and the rings with them written.

        Args:
            rings: keys and values of the tokens before it, [N, M, H, K] each.
            q_NQHK, scaled_NQHK, k_NQHK, v_NQHV: of its tokens of this pass.
            document_N: which document it is of.
            begin_N, offset_N, count_N: the number of its first token, and which of its tokens are
                in this pass.
            is_last: whether nobody reads the rings any more.

        Returns:
            (the rings, (what is recalled [N, Q, H, V],)).
        """

        def where():
            own_Q = torch.arange(q_NQHK.shape[1], device=begin_N.device)
            clock_NQ = (begin_N + offset_N)[:, None] + own_Q
            return document_N[:, None], torch.where(own_Q < count_N[:, None], clock_NQ, -1)

        y_NQHV = self.recall(q_NQHK, scaled_NQHK, *rings, begin_N, where)
        if is_last:
            return rings, (y_NQHV,)
        number_NM = ring_positions(begin_N + self.segment, self.num_slots)
        own_NM = number_NM - (begin_N + offset_N)[:, None]
        is_new_NM11 = ((own_NM >= 0) & (own_NM < count_N[:, None]))[..., None, None]
        own_NM = own_NM.clamp(0, q_NQHK.shape[1] - 1)
        row_N1 = torch.arange(begin_N.shape[0], device=begin_N.device)[:, None]
        written = (
            torch.where(is_new_NM11, x_NQHK[row_N1, own_NM].to(ring_NMHK.dtype), ring_NMHK)
            for x_NQHK, ring_NMHK in zip((k_NQHK, v_NQHV), rings)
        )
        return tuple(written), (y_NQHV,)

    def recall(self, q_NQHK, scaled_NQHK, keys_NMHK, values_NMHV, begin_N, where):
        """What queries of one segment each recall, [N, Q, H, V] in float32 at least.

        Args:
            q_NQHK: of length 1.
            scaled_NQHK: times |a|.
            keys_NMHK: of the memory, in the ring's slots; those of other tokens are not looked at.
            values_NMHV: theirs.
            begin_N: the number of the segment's first token.
            where: of the queries, as of `Choice`.
        """
        dtype, (batch, length) = accumulator_dtype(scaled_NQHK), q_NQHK.shape[:2]
        number_NM = ring_positions(begin_N, self.num_slots)
        is_seen_NM = number_NM >= (begin_N - self.size).clamp(min=0)[:, None]
        keys_NHMK, values_NHMV = (x.transpose(1, 2).to(dtype) for x in (keys_NMHK, values_NMHV))
        piece = length
        if not torch.compiler.is_exporting():
            piece = max(1, MOST_SCORES // (batch * self.heads * self.num_slots))
        recalled = []
        # Scores rounded to 16 bits would be the same for many.
        with without_autocast(q_NQHK):
            for part in map(slice, range(0, length, piece), range(piece, length + piece, piece)):
                y_NHQV = self.recall_part(
                    q_NQHK[:, part].to(dtype).transpose(1, 2),
                    scaled_NQHK[:, part].to(dtype).transpose(1, 2),
                    keys_NHMK,
                    values_NHMV,
                    is_seen_NM,
                    lambda part=part: [x[:, part] for x in torch.broadcast_tensors(*where())],
                )
                recalled.append(y_NHQV.transpose(1, 2))
        return recalled[0] if len(recalled) == 1 else torch.cat(recalled, dim=1)

    def recall_part(self, q_NHQK, scaled_NHQK, keys_NHMK, values_NHMV, is_seen_NM, where):
        """`recall` of as many queries as there is room for, heads first."""
        scores_NHQM = q_NHQK @ keys_NHMK.mT
        scores_NHQM = scores_NHQM.masked_fill(~is_seen_NM[:, None, None], -torch.inf)
        slot_NHQJ = self.choice(self.best(scores_NHQM).transpose(1, 2), where).transpose(1, 2)
        k_NHQJK, v_NHQJV = _taken(keys_NHMK, slot_NHQJ), _taken(values_NHMV, slot_NHQJ)
        if self.has_columns and q_NHQK.dtype == torch.float64:
            second_NHQJ, share_NHQJ1 = self.runners_up(scores_NHQM, slot_NHQJ)
            k_NHQJK = k_NHQJK.lerp(_taken(keys_NHMK, second_NHQJ), share_NHQJ1)
            v_NHQJV = v_NHQJV.lerp(_taken(values_NHMV, second_NHQJ), share_NHQJ1)
        weight_NHQ1J = scaled_NHQK[..., None, :] @ k_NHQJK.mT
        if not self.has_columns:
            lowest = torch.finfo(weight_NHQ1J.dtype).min
            weight_NHQ1J = weight_NHQ1J.masked_fill((slot_NHQJ < 0)[..., None, :], lowest)
        return (weight_NHQ1J.softmax(-1) @ v_NHQJV)[..., 0, :]

    def best(self, scores_NHQM):
        """The chosen slots, [N, H, Q, J]; -1 where there is no token."""
        if not self.has_columns:
            best_NHQJ, slot_NHQJ = scores_NHQM.topk(self.neighbors, dim=-1)
        else:
            best_NHQJ, row_NHQJ = scores_NHQM.unflatten(-1, (-1, self.neighbors)).max(-2)
            column_J = torch.arange(self.neighbors, device=scores_NHQM.device)
            slot_NHQJ = row_NHQJ * self.neighbors + column_J
        return torch.where(best_NHQJ == -torch.inf, -1, slot_NHQJ)

    def runners_up(self, scores_NHQM, slot_NHQJ):
        """The second best of each column, [N, H, Q, J], and its share, [N, H, Q, J, 1]."""
        row_NHQ1J = (slot_NHQJ.clamp(min=0) // self.neighbors)[..., None, :]
        scores_NHQRJ = scores_NHQM.unflatten(-1, (-1, self.neighbors))
        best_NHQJ = scores_NHQRJ.gather(-2, row_NHQ1J)[..., 0, :]
        second_NHQJ, row_NHQJ = scores_NHQRJ.scatter(-2, row_NHQ1J, -torch.inf).max(-2)
        column_J = torch.arange(self.neighbors, device=scores_NHQM.device)
        share_NHQJ = (SHARPNESS * (second_NHQJ - best_NHQJ)).sigmoid()
        share_NHQJ = torch.where(second_NHQJ == -torch.inf, 0, share_NHQJ)
        return row_NHQJ * self.neighbors + column_J, share_NHQJ[..., None]


def _taken(x_NHMK, slot_NHQJ):
    """Those of these slots, [N, H, Q, J, K]; zeros where the slot is negative."""
    index_NHC1 = slot_NHQJ.clamp(min=0).flatten(2)[..., None]
    taken_NHCK = x_NHMK.gather(2, index_NHC1.expand(-1, -1, -1, x_NHMK.shape[-1]))
    taken_NHQJK = taken_NHCK.unflatten(2, slot_NHQJ.shape[2:])
    return taken_NHQJK.masked_fill((slot_NHQJ < 0)[..., None], 0)
