"""Attention to a segment and to the keys of earlier ones without positions, as a mixer.

Tworkowski et al. 2023, "Focused Transformer: Contrastive Training for Context Scaling",
https://arxiv.org/abs/2307.03170, as LongLLaMA's published code has it in its memory layers. With L
tokens per segment, w = n // L the segment of token n, R_p the rotation by position p, one softmax:

    s_nm = (R_{n mod L} q_n) . (R_{m mod L} k_m) / sqrt(K)    m in segment w, m <= n
    s_nm = (R_{n mod L} q_n) . k_m / sqrt(K)                  m in an earlier segment

A memory is as far away as a query's own segment is long so far, however old it is. There are no
parameters but those of attention. Options: the last C segments alone, and of the memory the k keys
with the largest scores, for each query and head. Where scores are equal the earlier key is chosen.

The choice is discontinuous: two ways to compute the same numbers may choose another key where two
scores are as close as their rounding is, and are to be compared where they chose the same.
"""

import torch

from ..core.choice import Choice
from ..core.flops import linear_flops, mean_of_segments, mean_visible
from ..core.segments import SegmentGrid
from ..core.state import StateSpec, dtype_of
from ..core.window import (
    Past,
    first_positions,
    gather_ring,
    gather_tokens,
    ring_positions,
    row_spans,
    write_common_slot,
    write_slot,
)
from ..kernels.recurrence_steps import takes_plain_step
from ..kernels.windowed_attention import Sinks, attention_step, attention_step_to_all
from .chosen_keys import attend_to_chosen, attend_to_found, choose, indices_of
from .cross_batch import attend_across_batch, most_participants, participants
from .focused_pass import FocusedPass
from .positions import rotate, turned
from .segment_attention import SegmentAttention
from .softmax_attention import longer


class FocusedAttention(SegmentAttention):
    """Attention to a segment and to the raw keys of earlier ones. State: raw keys, and values.

    Args:
        config: as of `SegmentAttention`, with memory_windows and memory_top_k.
        layer_idx: of the layer.

    Attributes:
        cross_batch_range, cross_batch_stepping: how to train, not part of a model: see
            `train_across_batch` of zoo/layers/cross_batch.py.
        index: what finds the keys of a decoding step in the place of exact search; how to run, not
            part of a model: see zoo/kernels/faiss_backend.py.
    """

    cross_batch_range = None
    cross_batch_stepping = True
    index = None

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.length, self.layer_idx = config.segment_length, layer_idx
        self.windows, self.top_k = config.memory_windows, config.memory_top_k
        self.scale = self.head_dim**-0.5
        self.choice = None if self.top_k is None else Choice()

    def state_specs(self):
        """Keys as they are and values, one per token, or in a ring of C + 1 segments."""
        size = None if self.windows is None else (self.windows + 1) * self.length
        spec = StateSpec((size, self.num_groups, self.head_dim), dtype=dtype_of(self.k_proj))
        return {"keys_BWHK": spec, "values_BWHV": spec}

    def flops_per_token(self, length):
        """Of its matrices, of scores of all keys that are seen, and of the values of the chosen.

        Where it trains across the batch, of as many windows as there are for most texts.
        """
        near = mean_of_segments(length, self.length, lambda tokens: tokens * mean_visible(tokens))
        whole, rest = divmod(length, self.length)
        most = whole + 1 if self.windows is None else self.windows
        seen = [min(window, most) * self.length for window in range(whole + 1)]
        chosen = [count if self.top_k is None else min(count, self.top_k) for count in seen]
        if self.training and self.cross_batch_range is not None:
            ranks = torch.arange(whole + 1, device="cpu")
            num_windows = torch.full_like(ranks, whole + (rest > 0))
            options = self.cross_batch_range, self.cross_batch_stepping
            windows = most_participants(ranks, num_windows, *options) - 1
            seen = chosen = [count * self.length for count in windows.tolist()]
        far = [(self.length * sum(x[:-1]) + rest * x[-1]) / length for x in (seen, chosen)]
        per_key = 2 * self.num_heads * self.head_dim
        return linear_flops(self) + per_key * (2 * near + sum(far))

    def forward(self, x_BTD, sequence, state, rotation, table):
        """Mixes a sequence [B, T, D]; returns it with the state after it.

        Args:
            x_BTD: the tokens.
            sequence: how they lie.
            state: before them.
            rotation: (cos, sin) of each token's place in its segment.
            table: (cos, sin) of every place in a segment.
        """
        q_BTHK, k_BTHK, v_BTHV = self.project(x_BTD)
        q_BTHK = turned(q_BTHK, rotation)
        slot = self.common_slot(x_BTD, sequence, state)
        if slot is not None and self.memory_is_first(sequence.common_clock - slot):
            begin = sequence.common_clock - slot
            y_BTHV = self.plain_step(q_BTHK, k_BTHK, v_BTHV, begin, slot, state, table)
            return self.out_proj(y_BTHV.to(x_BTD.dtype).flatten(2)), state
        is_step = x_BTD.shape[1] == 1 and sequence.cu_seqlens is None and state.is_kept
        is_step = is_step and sequence.ranks is None
        run = self.run_step if is_step else self.run_pass
        if self.training and self.cross_batch_range is not None:
            run = self.run_across_batch
        elif torch.compiler.is_exporting() and not is_step:
            run = self.run_definition
        y_BTHV = run(q_BTHK, k_BTHK, v_BTHV, sequence, state, table)
        return self.out_proj(y_BTHV.flatten(2)), state

    def common_slot(self, x_BTD, sequence, state):
        """As of `SegmentAttention`, of which this has another state."""
        if not (state.is_kept and takes_plain_step(sequence, x_BTD)) or state.keys_BWHK is None:
            return None
        clock = sequence.common_clock
        return None if clock is None else clock % self.length

    def memory_is_first(self, begin):
        """Whether a segment that begins there looks at all that the state holds before it."""
        return self.top_k is None and (self.windows is None or begin <= self.windows * self.length)

    def plain_step(self, q_B1HK, k_B1HK, v_B1HV, begin, slot, state, table):
        """`run_step` in a `common_slot` of a segment that begins at `begin` in all rows."""
        clock = begin + slot
        for name, x_B1HK in (("keys_BWHK", k_B1HK), ("values_BWHV", v_B1HV)):
            held_BWHK = getattr(state, name)
            if self.windows is None:
                held_BWHK = torch.cat([held_BWHK[:, :clock], x_B1HK.to(held_BWHK.dtype)], dim=1)
            else:
                place = clock % held_BWHK.shape[1]
                held_BWHK = write_common_slot(held_BWHK, x_B1HK, place, state.may_overwrite)
            setattr(state, name, held_BWHK)
        (keys_BSHK, own_k_BLHK), (values_BSHV, own_v_BLHV) = (
            x[:, : clock + 1].split([begin, slot + 1], dim=1)
            for x in (state.keys_BWHK, state.values_BWHV)
        )
        own_k_BLHK = rotate(own_k_BLHK, *(x[: slot + 1] for x in table))
        if begin == 0:
            return attention_step_to_all(q_B1HK, own_k_BLHK, own_v_BLHV, self.scale)
        device = q_B1HK.device
        count_B1 = torch.full((len(q_B1HK), 1), slot + 1, device=device)
        own = Sinks(q_B1HK, own_k_BLHK, own_v_BLHV, count_B1)
        far_BS = torch.ones(keys_BSHK.shape[:2], dtype=torch.bool, device=device)
        return attention_step(q_B1HK, keys_BSHK, values_BSHV, far_BS, scale=self.scale, sinks=own)

    def run_pass(self, q_BTHK, k_BTHK, v_BTHV, sequence, state, table):
        """Any number of tokens, dense or packed."""
        if sequence.ranks is not None:
            need = None if self.windows is None else ("windows", self.num_seen)
            self.bring_tokens((k_BTHK, v_BTHV), sequence, state, need)
        options = self.length, self.windows, self.top_k, self.scale, self.choice
        y_BTHV = FocusedPass(sequence, state, *options).attend(q_BTHK, k_BTHK, v_BTHV, table)
        self.keep(k_BTHK, v_BTHV, sequence, state)
        return y_BTHV

    def num_seen(self, clock):
        """Of the tokens before one at this clock, how many of the last it sees, or its segment."""
        return torch.minimum(clock, self.windows * self.length + clock % self.length)

    def run_step(self, q_BTHK, k_BTHK, v_BTHV, sequence, state, table):
        """One token per row: writes its slot, and looks at its segment and at the memory."""
        clock_B = sequence.clock[:, 0].expand(q_BTHK.shape[0])
        self.write(k_BTHK, v_BTHV, clock_B, sequence, state)
        keys_BWHK, values_BWHV = state.keys_BWHK, state.values_BWHV
        size, device = keys_BWHK.shape[1], clock_B.device
        slots_L = torch.arange(self.length, device=device)
        rows_B1 = torch.arange(q_BTHK.shape[0], device=device)[:, None]
        begin_B = clock_B // self.length * self.length
        place_BL = begin_B[:, None] + slots_L
        place_BL = place_BL.clamp(max=size - 1) if self.windows is None else place_BL % size
        own_k_BLHK = rotate(keys_BWHK[rows_B1, place_BL], *table)
        own_v_BLHV = values_BWHV[rows_B1, place_BL]
        count_B1 = (clock_B - begin_B + 1)[:, None]
        if self.windows is None:
            far_BW = torch.arange(size, device=device) < begin_B[:, None]
        else:
            number_BW = ring_positions(clock_B + 1, size)
            oldest_B = (begin_B - self.windows * self.length).clamp(min=0)
            far_BW = (number_BW >= oldest_B[:, None]) & (number_BW < begin_B[:, None])
        memory = keys_BWHK, values_BWHV
        if self.top_k is None:
            # The state is read where it lies; the keys of the query's own segment, turned, are few.
            own = Sinks(q_BTHK, own_k_BLHK, own_v_BLHV, count_B1)
            return attention_step(q_BTHK, *memory, far_BW, scale=self.scale, sinks=own)
        own = own_k_BLHK, own_v_BLHV, slots_L < count_B1
        if self.index is not None:
            place_BHk = self.index.find(self, q_BTHK, keys_BWHK, begin_B)
        else:
            place_BHk = self.search(q_BTHK, keys_BWHK, far_BW)
        number_BHk = place_BHk
        if self.windows is not None:
            number_B1W = number_BW[:, None].expand(-1, self.num_heads, -1)
            number_BHk = number_B1W.gather(-1, place_BHk.clamp(min=0))
            number_BHk = torch.where(place_BHk < 0, -1, number_BHk)
        number_BTHk = self.choice(number_BHk[:, None], lambda: (rows_B1, clock_B[:, None]))
        place_BHk = torch.where(number_BTHk < 0, -1, number_BTHk % size)[:, 0]
        return attend_to_found(q_BTHK, own, memory, place_BHk, self.scale)

    def search(self, q_BTHK, k_BSHK, seen_BS):
        """Where the keys with the largest scores of a step are, as `attend_to_found` takes it."""
        dtype = torch.promote_types(q_BTHK.dtype, torch.float32)
        with torch.no_grad():
            q_BGRK = q_BTHK[:, 0].to(dtype).unflatten(1, (self.num_groups, -1)) * self.scale
            score_BGRS = q_BGRK @ k_BSHK.to(dtype).permute(0, 2, 3, 1)
            score_BHS = score_BGRS.flatten(1, 2).masked_fill(~seen_BS[:, None], -torch.inf)
            return indices_of(choose(score_BHS, self.top_k), self.top_k)

    def run_across_batch(self, q_BTHK, k_BTHK, v_BTHV, sequence, state, table):
        """`run_pass` where windows of other documents are seen too."""
        if state.keys_BWHK is not None or sequence.ranks is not None:
            before = "a state of tokens before these" if sequence.ranks is None else "slices"
            raise ValueError(
                f"training with cross_batch_range takes whole texts, got {before}; pass none, "
                "call model.eval(), or train_across_batch(model, None)."
            )
        grid = SegmentGrid(sequence, self.length, is_fresh=True)
        raw_SLHK, v_SLHV = grid.keys(k_BTHK), grid.keys(v_BTHV)
        turned_SLHK = rotate(raw_SLHK, *(x[: grid.width] for x in table))
        num_S = torch.bincount(grid.document)[grid.document]
        seen_S = participants(grid.rank, num_S, self.cross_batch_range, self.cross_batch_stepping)
        keys = turned_SLHK, raw_SLHK, v_SLHV
        y_SHQV = attend_across_batch(grid.queries(q_BTHK), *keys, grid.count, seen_S, self.scale)
        self.keep(k_BTHK, v_BTHV, sequence, state)
        return grid.join(y_SHQV.transpose(1, 2))

    def run_definition(self, q_BTHK, k_BTHK, v_BTHV, sequence, state, table):
        """`run_pass` of rows with all scores and a mask: what a program of any length can hold."""
        q_clock_BT = key_clock_BS = sequence.clock.expand(q_BTHK.shape[0], -1)
        keys_BSHK, values_BSHV = k_BTHK, v_BTHV
        if state.keys_BWHK is not None:
            size = state.keys_BWHK.shape[1]
            past = Past(sequence, state.keys_BWHK, size)
            keys_BSHK = past.put_before(k_BTHK, state.keys_BWHK)
            values_BSHV = past.put_before(v_BTHV, state.values_BWHV)
            before_BS = q_clock_BT[:, :1] + torch.arange(-size, 0, device=q_BTHK.device)
            key_clock_BS = torch.cat([before_BS, q_clock_BT], dim=1)
        turned_BSHK = rotate(keys_BSHK, *(x[key_clock_BS % self.length] for x in table))
        key_B1S, query_BT1 = key_clock_BS[:, None], q_clock_BT[..., None]
        segment_B1S, segment_BT1 = key_B1S // self.length, query_BT1 // self.length
        near_BTS = (segment_B1S == segment_BT1) & (key_B1S <= query_BT1)
        far_BTS = (segment_B1S < segment_BT1) & (key_B1S >= 0)
        if self.windows is not None:
            far_BTS = far_BTS & (segment_B1S >= segment_BT1 - self.windows)
        own, memory = (turned_BSHK, values_BSHV, near_BTS), (keys_BSHK, values_BSHV, far_BTS)
        y_BHTV = attend_to_chosen(q_BTHK, own, memory, self.top_k, self.scale)
        self.keep(k_BTHK, v_BTHV, sequence, state)
        return y_BHTV.transpose(1, 2)

    def write(self, k_BTHK, v_BTHV, clock_B, sequence, state):
        """Brings the state up to date after a single step."""
        for (name, spec), x_BTHK in zip(self.state_specs().items(), (k_BTHK, v_BTHV), strict=True):
            held_BWHK, may_overwrite = getattr(state, name), state.may_overwrite
            if self.windows is None:
                held_BWHK, slot_B = longer(held_BWHK, 1, x_BTHK, spec), clock_B
            else:
                slot_B = clock_B % spec.shape[0]
                if held_BWHK is None:
                    shape = x_BTHK.shape[0], *spec.shape
                    held_BWHK = x_BTHK.new_zeros(shape, dtype=spec.dtype)
            held = write_slot(held_BWHK, x_BTHK[:, 0], slot_B, sequence.keep, may_overwrite)
            setattr(state, name, held)

    def keep(self, k_BTHK, v_BTHV, sequence, state):
        """Brings the state up to date after a pass, if anybody will read it."""
        if not state.is_kept:
            return
        spans = row_spans(sequence)
        more = 0
        if self.windows is None and sequence.cu_seqlens is None:
            more = sequence.shape[1]
        elif self.windows is None:
            held = 0 if state.keys_BWHK is None else state.keys_BWHK.shape[1]
            more = max(0, int(sequence.clock_after.max()) - held)
        for (name, spec), x_BTHK in zip(self.state_specs().items(), (k_BTHK, v_BTHV), strict=True):
            held_BWHK, x_BTHK = getattr(state, name), x_BTHK.to(spec.dtype)
            if self.windows is None:
                empty_BTHK = x_BTHK.new_zeros(sequence.shape[0], 0, *x_BTHK.shape[2:])
                held_BWHK = longer(held_BWHK, more, empty_BTHK, spec)
                positions_BW = first_positions(spans.after, held_BWHK.shape[1])
                after_BWHK = gather_tokens(x_BTHK, held_BWHK, positions_BW, spans)
            else:
                positions_BW = ring_positions(spans.after, spec.shape[0])
                after_BWHK = gather_ring(x_BTHK, held_BWHK, positions_BW, spans)
            setattr(state, name, after_BWHK)
