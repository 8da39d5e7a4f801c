"""Any number of tokens through a memory layer of zoo/layers/focused_attention.py.

A pass is walked by rank: the r-th segments of all its documents at once, each with the keys of
those before it, of the state and of this pass, and its own in one call of PyTorch's attention,
which is causal at the lower right. Where all documents of a pass are equally far, as they mostly
are, that needs no mask. Segments that are short are walked several at a time, with one.
"""

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from ..core.segments import SegmentGrid
from .chosen_keys import attend_to_chosen
from .held_segments import HeldSegments
from .positions import rotate

# Queries of a call where there is a mask: with more, masks would be as large as scores.
MASKED_QUERIES = 256


class FocusedPass:
    """The attention of a memory layer over a pass.

    Args:
        sequence: the `Sequence`.
        state: before the pass, with keys_BWHK and values_BWHV.
        length: L, tokens per segment.
        windows: C, how many earlier segments are seen; None: all.
        top_k: of their keys, how many each query sees; None: all.
        scale: of the scores.
        choice: the `Choice` that keys which are chosen go through; None: none are.
    """

    def __init__(self, sequence, state, length, windows, top_k, scale, choice=None):
        self.length, self.windows, self.top_k, self.scale = length, windows, top_k, scale
        self.choice, is_fresh = choice, state.keys_BWHK is None
        self.grid = grid = SegmentGrid(sequence, length, is_fresh)
        self.memory = None if is_fresh else HeldSegments(state, sequence, grid, length, windows)
        self.offsets, self.counts = grid.by_rank(grid.offset), grid.by_rank(grid.count)
        # The slot of the first new token, where it is one for all documents and known.
        self.first_slot = 0 if is_fresh else self.memory.first_slot
        self.most_keys = length * grid.num_ranks + (0 if is_fresh else self.memory.size)
        self.mask_QS = None

    def attend(self, q_BTHK, k_BTGK, v_BTGV, table):
        """Queries, turned, to keys, as they are, and values: [B, T, H, V].

        Args:
            q_BTHK, k_BTGK, v_BTGV: of the tokens.
            table: (cos, sin) of the slots of a segment, [L, 1, pairs].
        """
        grid, held = self.grid, (None, None)
        if self.memory is not None:
            held = self.memory.unfinished()
        raw_SLGK, v_SLGV = grid.keys(k_BTGK, held[0]), grid.keys(v_BTGV, held[1])
        turned_SLGK = rotate(raw_SLGK, *(x[: grid.width] for x in table))
        parts = (grid.queries(q_BTHK), turned_SLGK, raw_SLGK, v_SLGV)
        self.q, self.turned, self.raw, self.values = (grid.by_rank(x) for x in parts)
        outputs = []
        for first, count in self.runs():
            outputs += self.run(first, count).unflatten(1, (count, -1)).unbind(1)
        return grid.join(grid.from_ranks(outputs))

    def runs(self):
        """(first rank, how many) of the ranks that are walked at once: of as many documents."""
        first, most = 0, max(1, MASKED_QUERIES // self.length)
        while first < len(self.q):
            count = 1
            while first + count < len(self.q) and count < most:
                if len(self.q[first + count]) != len(self.q[first]):
                    break
                count += 1
            yield first, count
            first += count

    def run(self, first, count):
        """The outputs of some ranks, [N, count Q, H, V]."""
        num_documents = len(self.q[first])
        if self.memory is None or self.grid.is_dense or first >= (self.windows or first + 1):
            return self.run_documents(first, count, slice(num_documents), self.memory is not None)
        # Documents that go on from a state, and those that begin in this pass, have other keys.
        has_past_N = self.memory.first_segment[:num_documents] > 0
        parts = (has_past_N.nonzero()[:, 0], (~has_past_N).nonzero()[:, 0])
        ys = [
            self.run_documents(first, count, own, has_past)
            for own, has_past in zip(parts, (True, False), strict=True)
            if len(own)
        ]
        return torch.cat(ys)[torch.cat(parts).argsort()]

    def run_documents(self, first, count, documents, has_past):
        """`run` for some documents of these ranks, by their place in the walk."""
        ranks, length = range(first, first + count), self.length
        lowest = 0 if self.windows is None else max(0, first - self.windows)
        earlier = range(lowest, first + count - 1)
        q_NQHK, own_k, own_v = (
            torch.cat([x[rank][documents] for rank in ranks], dim=1)
            for x in (self.q, self.turned, self.values)
        )
        keys, values = ([x[rank][: len(self.q[first])] for rank in earlier] for x in self.pieces)
        keys, values = ([x[documents] for x in xs] for xs in (keys, values))
        numbers, is_any_NM = [rank - first for rank in earlier], None
        if has_past:
            held_k, held_v, is_any_NM = self.memory.before(first, documents)
            num_held = held_k.shape[1] // length
            keys, values = [held_k.to(q_NQHK.dtype), *keys], [held_v.to(own_v.dtype), *values]
            numbers = [*range(-first - num_held, -first), *numbers]
        far_k, far_v = (
            torch.cat(xs, dim=1) if xs else own[:, :0]
            for xs, own in ((keys, own_k), (values, own_v))
        )
        slot = self.first_slot if first == 0 else 0
        if count == 1 and slot is not None and is_any_NM is None and self.top_k is None:
            # Queries are laid out for the longest segment, and the first may have begun before.
            size = q_NQHK.shape[1]
            real = min(size, own_k.shape[1] - slot)
            y_NQHV = self.attend_causally(
                q_NQHK[:, :real],
                torch.cat([far_k, own_k[:, : slot + real]], dim=1),
                torch.cat([far_v, own_v[:, : slot + real]], dim=1),
            )
            return F.pad(y_NQHV, (0, 0, 0, 0, 0, size - real)) if real < size else y_NQHV
        seen = SeenKeys(numbers, is_any_NM, count, self, first, documents)
        outputs, size = [], q_NQHK.shape[1]
        for start in range(0, size, MASKED_QUERIES):
            rows = slice(start, min(start + MASKED_QUERIES, size))
            far_NQM, near_NQL = seen.by_queries(rows)
            if self.top_k is not None:
                own, far = (own_k, own_v, near_NQL), (far_k, far_v, far_NQM)
                options = self.top_k, self.scale, seen.through(self.choice, rows)
                y_NHQV = attend_to_chosen(q_NQHK[:, rows], own, far, *options)
            else:
                batch = max(len(far_NQM), len(near_NQL))
                masks = (x.expand(batch, -1, -1) for x in (far_NQM, near_NQL))
                mask_NQS = torch.cat([*masks], dim=-1)
                k_NSGK, v_NSGV = torch.cat([far_k, own_k], dim=1), torch.cat([far_v, own_v], dim=1)
                y_NHQV = self.softmax(q_NQHK[:, rows], k_NSGK, v_NSGV, mask_NQS[:, None])
            outputs.append(y_NHQV.transpose(1, 2))
        return torch.cat(outputs, dim=1)

    @property
    def pieces(self):
        """Keys and values of this pass as a memory has them, by rank."""
        return self.raw, self.values

    def attend_causally(self, q_NQHK, k_NSGK, v_NSGV):
        """The last keys are the queries' own, [N, Q, H, V]: no mask but on processors."""
        num_queries, num_keys = q_NQHK.shape[1], k_NSGK.shape[1]
        if num_queries == num_keys:
            return self.softmax(q_NQHK, k_NSGK, v_NSGV, is_causal=True).transpose(1, 2)
        if q_NQHK.is_cuda and not torch.compiler.is_compiling():
            bias = causal_lower_right(num_queries, num_keys)
            return self.softmax(q_NQHK, k_NSGK, v_NSGV, bias).transpose(1, 2)
        # PyTorch has no such kernel there. One mask for all calls, of which each takes a view.
        outputs, older = [], num_keys - num_queries
        for start in range(0, num_queries, MASKED_QUERIES):
            end = min(start + MASKED_QUERIES, num_queries)
            mask_QS = self.lower_right(end - start, older + end, q_NQHK)
            k_NSGK_seen, v_NSGV_seen = k_NSGK[:, : older + end], v_NSGV[:, : older + end]
            y_NHQV = self.softmax(q_NQHK[:, start:end], k_NSGK_seen, v_NSGV_seen, mask_QS)
            outputs.append(y_NHQV.transpose(1, 2))
        return torch.cat(outputs, dim=1)

    def lower_right(self, num_queries, num_keys, like):
        """What to add to scores, [Q, S]: -inf above the diagonal that ends at the lower right."""
        if self.mask_QS is None:
            columns = self.most_keys + MASKED_QUERIES
            mask_QS = like.new_full((MASKED_QUERIES, columns), -torch.inf)
            self.mask_QS = mask_QS.triu(self.most_keys + 1)
        begin = self.most_keys - (num_keys - num_queries)
        return self.mask_QS[:num_queries, begin : begin + num_keys]

    def softmax(self, q_NQHK, k_NSGK, v_NSGV, mask=None, is_causal=False):
        """PyTorch's attention, [N, H, Q, V]."""
        return F.scaled_dot_product_attention(
            q_NQHK.transpose(1, 2),
            k_NSGK.transpose(1, 2),
            v_NSGV.transpose(1, 2),
            attn_mask=mask,
            is_causal=is_causal,
            scale=self.scale,
            enable_gqa=k_NSGK.shape[2] < q_NQHK.shape[2],
        )


class SeenKeys:
    """Which keys of a memory and of their own segments the queries of a run see.

    Args:
        numbers: the segment of each L keys of the memory, counted from the run's first.
        is_any_NM: which of these are tokens; None: all.
        count: segments of the run.
        pass_: the `FocusedPass`.
        first: the run's first rank.
        documents: those of the walk that are run.
    """

    def __init__(self, numbers, is_any_NM, count, pass_, first, documents):
        self.is_any_NM, self.windows = is_any_NM, pass_.windows
        num_queries, width = pass_.q[first].shape[1], pass_.turned[first].shape[1]
        device = pass_.q[first].device
        own = torch.arange(count, device=device)
        numbers = torch.tensor(numbers, dtype=torch.long, device=device)
        self.segment_M = numbers.repeat_interleave(pass_.length)
        self.segment_Q, self.segment_L = (own.repeat_interleave(n) for n in (num_queries, width))
        self.slot_L = torch.arange(width, device=device).repeat(count)
        offsets = [pass_.offsets[first + i][documents] for i in range(count)]
        slot_Q = torch.arange(num_queries, device=device)
        self.slot_NQ = torch.cat([x[:, None] + slot_Q for x in offsets], dim=1)
        self.pass_, self.first, self.documents, self.count = pass_, first, documents, count

    def by_queries(self, rows):
        """([N or 1, Q, M] of the memory, [N, Q, L] of their own) for some queries, bool."""
        segment_Q1 = self.segment_Q[rows, None]
        far_NQM = (self.segment_M < segment_Q1)[None]
        if self.windows is not None:
            far_NQM = far_NQM & (self.segment_M >= segment_Q1 - self.windows)
        if self.is_any_NM is not None:
            far_of_state_NQM = self.is_any_NM[:, None]
            rest = far_NQM.shape[-1] - far_of_state_NQM.shape[-1]
            far_NQM = far_NQM & F.pad(far_of_state_NQM, (0, rest), value=True)
        near_NQL = self.slot_L <= self.slot_NQ[:, rows, None]
        return far_NQM, near_NQL & (self.segment_L == segment_Q1)

    def through(self, choice, rows):
        """What lets places in the memory through a `Choice`, as the numbers of their tokens."""
        grid, length = self.pass_.grid, self.pass_.length
        first_N = grid.in_walk_order(grid.first_segment)[self.documents] + self.first

        def where():
            counts = [self.pass_.counts[self.first + i][self.documents] for i in range(self.count)]
            num_queries = len(self.segment_Q) // self.count
            query_Q = torch.arange(num_queries, device=first_N.device)
            is_token_NQ = torch.cat([query_Q < x[:, None] for x in counts], dim=1)[:, rows]
            clock_NQ = (first_N[:, None] + self.segment_Q) * length + self.slot_NQ
            documents_N = torch.arange(len(grid.first_segment), device=first_N.device)
            row_N = grid.in_walk_order(documents_N)[self.documents]
            return row_N[:, None], torch.where(is_token_NQ, clock_NQ[:, rows], -1)

        def through(place_NQHk):
            oldest_N = (first_N + self.segment_M[0]) * length
            oldest_N111 = oldest_N[:, None, None, None]
            number_NQHk = torch.where(place_NQHk < 0, -1, place_NQHk + oldest_N111)
            number_NQHk = choice(number_NQHk, where)
            return torch.where(number_NQHk < 0, -1, number_NQHk - oldest_N111)

        return through
