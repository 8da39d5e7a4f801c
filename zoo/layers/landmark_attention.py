"""Landmark attention as a mixer: keys that are not turned in the state, blocks to all or retrieved.

The mathematics is in zoo/layers/landmark_softmax.py, the places of tokens and landmarks in
zoo/layers/landmark_stream.py.
"""

import torch
from torch import nn
from torch.nn.functional import pad

from ..core.choice import Choice
from ..core.flops import linear_flops
from ..core.halo import last_before
from ..core.state import StateSpec, dtype_of
from ..core.window import Spans, document_spans, first_positions, gather_tokens, row_spans
from ..kernels.export_scan import without_autocast
from .landmark_softmax import attend_step_to_all, attend_to_all, attend_to_retrieved
from .landmark_stream import stream_length
from .positions import StepRotation, rotate, turned
from .softmax_attention import longer


class LandmarkAttention(nn.Module):
    """Attention to the tokens of a block, and through landmarks to those of earlier ones.

    Args:
        config: with hidden_size, num_attention_heads, num_key_value_heads, head_dim,
            attention_bias, block_length, retrieved_blocks and landmark_predicts_next.
        layer_idx: of the layer.
    """

    exchanges = True

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.num_groups, self.size = config.num_key_value_heads, config.block_length + 1
        self.scale, width, bias = self.head_dim**-0.5, config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, self.num_groups * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, self.num_groups * self.head_dim, bias=bias)
        self.out_proj = nn.Linear(self.num_heads * self.head_dim, width, bias=bias)
        self.choice = None if config.retrieved_blocks is None else Choice()

    def state_specs(self):
        """Keys, not turned, and values of all tokens and landmarks, in whole blocks."""
        spec = StateSpec((None, self.num_groups, self.head_dim), dtype=dtype_of(self.k_proj))
        return {"keys_BSGK": spec, "values_BSGV": spec}

    def flops_per_token(self, length):
        """Of its matrices, and of attention, with a token's share of the landmarks.

        A query scores the keys of what it sees, landmarks too, and weighs the values of tokens. To
        retrieve it scores all landmarks once more.
        """
        block, count = self.config.block_length, self.config.retrieved_blocks
        places = stream_length(length, block, self.config.landmark_predicts_next)
        keys = values = 0
        for index in range(-(-places // self.size)):
            queries = min(self.size, places - index * self.size)
            own = queries * (queries + 1) // 2 - (queries == self.size)
            read = index if count is None else min(index, count)
            keys += own + queries * read * self.size
            values += own + queries * read * block
            keys += 0 if count is None else queries * index
        attention = 2 * self.num_heads * self.head_dim * (keys + values) / length
        return linear_flops(self) * places / length + attention

    def forward(self, x_BSD, stream, state, query_rotation=None, key_rotation=None):
        """Mixes a stream [B, S, D]; returns it with the state after it.

        Args:
            x_BSD: tokens and landmarks.
            stream: the `LandmarkStream`.
            state: before them.
            query_rotation: (cos, sin) of their places; None: of retrieval, which turns them itself.
            key_rotation: of all places that keys may have, from 0 on; a `StepRotation` of a plain
                step: of the places up to its own.
        """
        parts = ((self.q_proj, self.num_heads), (self.k_proj, self.num_groups))
        parts += ((self.v_proj, self.num_groups),)
        q, k, v = (proj(x_BSD).unflatten(-1, (heads, self.head_dim)) for proj, heads in parts)
        if query_rotation is not None:
            q = turned(q, query_rotation)
        if isinstance(key_rotation, StepRotation):
            k_BSGK, v_BSGV = (x[:, : stream.start + 1] for x in self.extend(k, v, stream, state))
            y = attend_step_to_all(q, k_BSGK, v_BSGV, self.size, self.scale, key_rotation)
            return self.out_proj(y.to(x_BSD.dtype).flatten(2)), state
        if stream.sequence.ranks is not None:
            self.bring(k, v, stream, state)
        if stream.sequence.cu_seqlens is None:
            keys_BSGK, values_BSGV = self.extend(k, v, stream, state)
            clock_BS = stream.sequence.clock
            y = self.attend(q, keys_BSGK, values_BSGV, clock_BS, key_rotation, stream.start)
        else:
            y = self.attend_by_document(q, k, v, stream, state, key_rotation)
            if state.is_kept:
                self.keep(k, v, stream, state)
        return self.out_proj(y.flatten(2)), state

    def bring(self, k, v, stream, state):
        """A slice: keys and values of all places before it, as the state holds them."""
        held, ranks = last_before((k, v), stream.sequence), stream.sequence.ranks
        if held is None:
            return
        if ranks.cu_seqlens is None:  # rows that start here go on from nothing
            held = [torch.where(ranks.continues_N[:, None, None, None], x, 0) for x in held]
        state.keys_BSGK, state.values_BSGV = held

    def attend(self, q, k_BSGK, v_BSGV, clock_BQ, key_rotation, first=None, rows=None):
        """Attention of queries to keys by place.

        Args:
            q: [B, Q, H, K].
            k_BSGK, v_BSGV: by place.
            clock_BQ: the places of the queries.
            key_rotation: as of `forward`.
            first: the place of the first query, if all rows have the same.
            rows: [B], which rows of the batch they are; None: all, in order.
        """
        missing = -k_BSGK.shape[1] % self.size
        if missing and not torch.compiler.is_exporting():
            k_BSGK, v_BSGV = (pad(x, (0, 0, 0, 0, 0, missing)) for x in (k_BSGK, v_BSGV))
        if self.config.retrieved_blocks is None:
            k_BSGK = rotate(k_BSGK, *(x[: k_BSGK.shape[1]] for x in key_rotation))
        k, v = (self.blocks_of(x) for x in (k_BSGK, v_BSGV))
        with without_autocast(q):
            return self.attend_to_blocks(q, k, v, clock_BQ, key_rotation, first, rows)

    def attend_to_blocks(self, q, k, v, clock_BQ, key_rotation, first, rows):
        """`attend` with keys and values by block."""
        if self.config.retrieved_blocks is None:
            return attend_to_all(q, k, v, clock_BQ, self.scale, first)
        rows = torch.arange(q.shape[0], device=q.device) if rows is None else rows
        return attend_to_retrieved(
            q,
            k,
            v,
            clock_BQ,
            self.scale,
            self.config.retrieved_blocks,
            key_rotation,
            same_landmarks=self.layer_idx == 0,
            let_through=lambda chosen, clock: self.choice(chosen, lambda: (rows[:, None], clock)),
        )

    def blocks_of(self, x_BSGK):
        """Places by block, [B, M, N, ...]; by index where exporting cannot prove that M N is S."""
        if not torch.compiler.is_exporting():
            return x_BSGK.unflatten(1, (-1, self.size))
        blocks_M1 = torch.arange(x_BSGK.shape[1] // self.size, device=x_BSGK.device)[:, None]
        return x_BSGK[:, blocks_M1 * self.size + torch.arange(self.size, device=x_BSGK.device)]

    def extend(self, k, v, stream, state):
        """Keys and values by place with those of a dense pass, in the state too if it is kept."""
        results = []
        for (name, spec), x in zip(self.state_specs().items(), (k, v), strict=True):
            held = getattr(state, name)
            if held is None and not state.is_kept:
                results.append(pad(x, (0, 0, 0, 0, 0, stream.num_slots - x.shape[1])))
                continue
            x, end = x.to(spec.dtype), x.shape[1]
            is_new = held is None or held.shape[1] < stream.num_slots
            if is_new:
                more = stream.num_slots - (0 if held is None else held.shape[1])
                held = longer(held, more, x[:, :0], spec)
            in_place = (is_new or state.may_overwrite) and not torch.is_grad_enabled()
            held = held if in_place else held.clone()
            if stream.present is None:
                held[:, stream.start : stream.start + end] = x
            else:
                rows_B1 = torch.arange(x.shape[0], device=x.device)[:, None]
                clock_BS = stream.sequence.clock
                x = torch.where(stream.present[..., None, None], x, held[rows_B1, clock_BS])
                held[rows_B1, clock_BS] = x
            setattr(state, name, held)
            results.append(held)
        return results

    def keep(self, k, v, stream, state):
        """The state of rows after a packed pass."""
        spans = row_spans(stream.sequence)
        positions_BS = first_positions(spans.after, stream.num_slots)
        for (name, spec), x in zip(self.state_specs().items(), (k, v), strict=True):
            held, x = getattr(state, name), x.to(spec.dtype)
            held = self.with_room(held, stream.num_slots, spec)
            setattr(state, name, gather_tokens(x, held, positions_BS, spans))

    def with_room(self, held_BSGK, num_slots, spec):
        """A state with so many places; None stays None."""
        if held_BSGK is None or held_BSGK.shape[1] >= num_slots:
            return held_BSGK
        return longer(held_BSGK, num_slots - held_BSGK.shape[1], held_BSGK[:, :0], spec)

    def attend_by_document(self, q, k, v, stream, state, key_rotation):
        """Packed documents, those of as many blocks together."""
        sequence = stream.sequence
        spans = document_spans(sequence)
        by_count = {}
        for index, after in enumerate(spans.after.tolist()):
            by_count.setdefault((after - 1) // self.size + 1, []).append(index)
        specs, outputs, places = self.state_specs().values(), [], []
        for count, members in by_count.items():
            members = torch.tensor(members, device=q.device)
            own = Spans(*(x[members] for x in spans[:3]))
            positions_NS = first_positions(own.after, count * self.size)
            tensors = []
            for x, held, spec in zip((k, v), state.tensors().values(), specs, strict=True):
                if held is not None:
                    held = held[sequence.row_of_document[members]]
                    held = self.with_room(held, count * self.size, spec)[:, : count * self.size]
                tensors.append(gather_tokens(x, held, positions_NS, own))
            lengths_N = own.after - own.start
            steps_Q = torch.arange(int(lengths_N.max()), device=q.device)
            is_there_NQ = steps_Q < lengths_N[:, None]
            clock_NQ = own.start[:, None] + steps_Q
            clock_NQ = torch.minimum(clock_NQ, own.after[:, None] - 1)
            place_NQ = own.first[:, None] + clock_NQ - own.start[:, None]
            rows_N = sequence.row_of_document[members]
            q_NQHK = q[0, place_NQ]
            y = self.attend(q_NQHK, *tensors, clock_NQ, key_rotation, rows=rows_N)
            outputs.append(y[is_there_NQ])
            places.append(place_NQ[is_there_NQ])
        return torch.cat(outputs)[torch.cat(places).argsort()][None]
