"""The attention of the Block-Recurrent Transformer, to tokens before and to states.

The mathematics is that of `zoo/models/block_recurrent.py`; what the states do is in
`zoo/layers/recurrent_cell.py`, what a memory adds in `zoo/layers/external_memory.py`. Over tokens
it is a sliding window that knows nothing of where windows begin: a token sees the W before it,
whatever pass they came in.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from ..core.base import Constant
from ..core.flops import linear_flops, mean_visible
from ..core.halo import last_before
from ..core.segments import SegmentGrid
from ..core.state import StateSpec, dtype_of
from ..core.window import Past, ring_after
from ..kernels.linear_recurrence import accumulator_dtype
from ..kernels.windowed_attention import attention_step, windowed_attention
from .external_memory import ExternalMemory
from .position_bias import alibi_log_decay, t5_buckets
from .recurrent_cell import RecurrentCell, look, scaled, truncated_, unit_heads

# In every softmax over a window: where it is all that is left, attention is zero.
EXTRA_LOGIT = -1000.0


def distance_buckets(window, num_buckets, max_distance):
    """T5's bucket of each distance from 1 to `window`, in one direction."""
    # With the authors' epsilon, which lifts a distance on a boundary into the bucket above.
    eps = torch.finfo(torch.float32).eps
    buckets = t5_buckets(num_buckets, max_distance, eps)
    return buckets[torch.arange(1, window + 1).clamp(max=max_distance)]


class WindowAttention(nn.Module):
    """Attention to the W tokens before, and to states: the layer's own, or those it is given."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.window = config, config.sliding_window
        self.exchanges = not config.feedback
        self.is_recurrent = layer_idx in config.recurrent_layers
        self.reads_states = self.is_recurrent or config.feedback
        self.num_heads, width = config.num_attention_heads, config.hidden_size
        size = self.num_heads * config.head_dim
        self.q_proj = nn.Linear(width, size, bias=False)
        self.k_proj = nn.Linear(width, size, bias=False)
        self.v_proj = nn.Linear(width, size, bias=False)
        self.scale = nn.Parameter(torch.empty(self.num_heads))
        # With a memory a layer has no positions, in its window neither.
        has_memory, position_type = (
            layer_idx in config.memory_layers,
            config.position_embedding_type,
        )
        self.has_table = position_type == "t5" and not has_memory
        self.has_alibi = position_type == "alibi" and not has_memory
        self.memory = ExternalMemory(config) if has_memory else None
        if self.has_table:
            self.relative_bias = nn.Parameter(torch.empty(self.num_heads, config.num_buckets))
            sizes = self.window, config.num_buckets, config.max_distance
            self.buckets = Constant(functools.partial(distance_buckets, *sizes))
        if self.has_alibi:
            self.log_decay = Constant(functools.partial(alibi_log_decay, config))
        if self.reads_states:
            self.state_q_proj = nn.Linear(width, size, bias=False)
            self.state_scale = nn.Parameter(torch.empty(self.num_heads))
        if self.is_recurrent:
            self.cell = RecurrentCell(config)
        self.out_proj = nn.Linear((1 + self.reads_states) * size, width, bias=False)

    def init_weights_of_paper(self):
        """The authors' matrices; biases as flax initialises an embedding, by its width."""
        for name in ("q_proj", "k_proj", "v_proj", "state_q_proj", "out_proj"):
            if hasattr(self, name):
                truncated_(getattr(self, name).weight, getattr(self, name).in_features)
        if self.has_table:
            init.normal_(self.relative_bias, std=self.config.num_buckets**-0.5)
        init.ones_(self.scale)
        if self.reads_states:
            init.ones_(self.state_scale)

    def state_specs(self):
        """Keys and values of the last W tokens, of 2 W and the states in a recurrent layer.

        With a memory, its tokens' as well.

        Keys and values in the dtype of the weights, which is that of a key before it is stored.
        """
        dtype, slots = dtype_of(self.k_proj), self.window
        specs = {}
        if self.is_recurrent:
            specs["states_BMD"] = StateSpec((self.config.num_states, self.config.hidden_size))
            slots = 2 * self.window
        ring = StateSpec((slots, self.num_heads, self.config.head_dim), dtype=dtype)
        specs |= {"keys_BWHK": ring, "values_BWHV": ring}
        return specs if self.memory is None else specs | self.memory.state_specs(dtype)

    def flops_per_token(self, length):
        """Of its matrices, and of attention to the W tokens before and to states.

        The cell's part is of a window, divided by its tokens.
        """
        per_key = 4 * self.num_heads * self.config.head_dim
        keys = mean_visible(length, self.window + 1) - 1  # a token does not see itself
        if not self.is_recurrent:
            flops = linear_flops(self)
        else:
            flops = linear_flops(self) - linear_flops(self.cell)
            flops += self.cell.flops_per_window() / self.window
        keys += self.config.num_states if self.reads_states else 0
        flops += 0 if self.memory is None else self.memory.flops_per_token(length)
        return flops + per_key * keys

    def forward(self, x_BTD, sequence, state, read=None, step=None):
        """Mixes a sequence [B, T, D]; returns it with the state after it.

        Args:
            x_BTD: the tokens.
            sequence: how they lie.
            state: before them.
            read: keys [N, M, H, K] and values of the states that tokens of each document read: of
                each row, if dense. For feedback, where a document has one window in a pass.
            step: the `WindowStep` of a step, where there is one.
        """
        v_BTHV = self.v_proj(x_BTD).unflatten(-1, (self.num_heads, -1))
        dtype = v_BTHV.dtype
        unit_BTHK = unit_heads(self.q_proj(x_BTD), self.num_heads)
        q_BTHK = scaled(unit_BTHK, self.scale, dtype)
        k_BTHK = unit_heads(self.k_proj(x_BTD), self.num_heads).to(dtype)
        if self.exchanges and sequence.ranks is not None:
            self.bring(k_BTHK, v_BTHV, sequence, state)
        is_step = x_BTD.shape[1] == 1 and sequence.cu_seqlens is None
        is_step = is_step and state.keys_BWHK is not None
        is_planned = is_step and step is not None and x_BTD.device.type == "cpu"
        if is_planned:
            y_BTHV = self.attend_planned(q_BTHK, state, step)
        else:
            attend = self.attend_step if is_step else self.attend
            y_BTHV = attend(q_BTHK, k_BTHK, v_BTHV, sequence, state)
        if self.memory is not None:
            tokens = unit_BTHK, q_BTHK, k_BTHK, v_BTHV
            spec_dtype = dtype_of(self.k_proj)
            y_BTHV, state = self.memory(y_BTHV, *tokens, sequence, state, spec_dtype)
        if self.reads_states:
            q_BTHK = unit_heads(self.state_q_proj(x_BTD), self.num_heads)
            q_BTHK = scaled(q_BTHK, self.state_scale, dtype)
            if self.is_recurrent:
                tokens = q_BTHK, k_BTHK, v_BTHV
                own = step if is_planned else None
                y2_BTHV, state.states_BMD = self.cell(sequence, state, tokens, own)
            else:
                y2_BTHV = self.look_by_document(q_BTHK, *read, sequence)
            y_BTHV = torch.cat([y_BTHV, y2_BTHV], dim=2)
        if is_planned:
            for name, x_BTHK in (("keys_BWHK", k_BTHK), ("values_BWHV", v_BTHV)):
                setattr(state, name, step.write(getattr(state, name), x_BTHK, state.may_overwrite))
        elif state.is_kept:
            self.keep(k_BTHK, v_BTHV, sequence, state)
        return self.out_proj(y_BTHV.flatten(2)), state

    def bring(self, k_BTHK, v_BTHV, sequence, state):
        """A slice: keys and values of the tokens before it, as the state holds them.

        Those of the W tokens before; in a recurrent layer those of its windows, which begin before
        the slice, and of the window before.
        """
        size, window, need = self.window, self.window, ("window", lambda n: n.clamp(max=window))
        if self.is_recurrent:
            size, need = 2 * window, ("windows", lambda n: torch.minimum(n, n % window + window))
        held = last_before((k_BTHK, v_BTHV), sequence, size, need)
        if held is not None:
            state.keys_BWHK, state.values_BWHV = held
        if self.memory is not None:
            self.memory.bring(k_BTHK, v_BTHV, sequence, state, dtype_of(self.k_proj))

    def biases(self, clock_BT, dtype):
        """(bias of each distance [H, W], logit of all that precedes the document [B, T, H]).

        The zero keys and the extra logit have no values: all they do is to add to the denominator.
        """
        device = clock_BT.device
        if self.has_table:
            bias_HR = self.relative_bias.to(dtype) * self.scale.to(dtype).abs()[:, None]
            bias_HW = bias_HR[:, self.buckets(device).long()]
        elif self.has_alibi:
            distance_W = torch.arange(1, self.window + 1, device=device)
            bias_HW = self.log_decay(device).to(dtype)[:, None] * distance_W.to(dtype)
        else:
            bias_HW = torch.zeros(self.num_heads, self.window, dtype=dtype, device=device)
        extra_H1 = bias_HW.new_full((self.num_heads, 1), EXTRA_LOGIT)
        # Before token n lie n tokens, and zeros at the distances n + 1 to W.
        logits_HN = torch.cat([extra_H1, bias_HW.flip(1)], dim=1).logcumsumexp(1).flip(1)
        return bias_HW, F.embedding(clock_BT.clamp(max=self.window), logits_HN.T)

    def attend(self, q_BTHK, k_BTHK, v_BTHV, sequence, state):
        """Any number of tokens, dense or packed, after what the state holds."""
        bias_HW, logits_BTH = self.biases(sequence.clock, accumulator_dtype(q_BTHK))
        logits_BTH = logits_BTH.expand(*q_BTHK.shape[:2], -1)
        documents, past = {"cu_seqlens": sequence.cu_seqlens}, None
        if state.keys_BWHK is not None:
            past = Past(sequence, state.keys_BWHK, self.window)
            documents = {"cu_seqlens": past.cu_seqlens, "first_key": past.first_key}
            k_BTHK = past.put_before(k_BTHK, state.keys_BWHK)
            v_BTHV = past.put_before(v_BTHV, state.values_BWHV)
            q_BTHK, logits_BTH = past.pick(q_BTHK), past.pick(logits_BTH)
        y_BTHV = windowed_attention(
            q_BTHK,
            k_BTHK,
            v_BTHV,
            self.window,
            scale=1.0,
            delay=1,
            distance_bias=bias_HW,
            sink_logits=logits_BTH,
            **documents,
        )
        return y_BTHV if past is None else past.drop(y_BTHV)

    def attend_step(self, q_BTHK, k_BTHK, v_BTHV, sequence, state):
        """One token per row: looks at the slots of the tokens before it, in any order."""
        clock_B1 = sequence.clock.expand(q_BTHK.shape[0], 1)
        bias_HW, logits_BTH = self.biases(clock_B1, accumulator_dtype(q_BTHK))
        num_slots = state.keys_BWHK.shape[1]
        slots_W = torch.arange(num_slots, device=clock_B1.device)
        distance_BW = (clock_B1 - 1 - slots_W) % num_slots
        visible_BW = (distance_BW < self.window) & (distance_BW < clock_B1)
        bias_HBW = bias_HW[:, distance_BW.clamp(max=self.window - 1)]
        y_BTHV = attention_step(
            q_BTHK,
            state.keys_BWHK,
            state.values_BWHV,
            visible_BW,
            scale=1.0,
            sink_logits=logits_BTH,
            slot_bias=bias_HBW.transpose(0, 1),
        )
        if torch.is_grad_enabled():
            # A token does not see itself: a gradient of zero for what it writes.
            y_BTHV = y_BTHV + 0 * (k_BTHK + v_BTHV)
        return y_BTHV

    def attend_planned(self, q_BTHK, state, step):
        """`attend_step`, where the host knows what to look at."""
        dtype, size, bias_HC = accumulator_dtype(q_BTHK), state.keys_BWHK.shape[1], None

        def split(x_W):
            """A tensor by distance: (of what is seen, in its order; of what precedes the text)."""
            return x_W[step.distances(size)], x_W[step.count :]

        if self.has_table:
            seen_C, before_R = step.kept_for_all_layers(
                ("buckets", size), lambda: split(self.buckets(q_BTHK.device).long())
            )
            table_HN = self.relative_bias.to(dtype) * self.scale.to(dtype).abs()[:, None]
            bias_HC, rest_HR = table_HN.index_select(1, seen_C), table_HN.index_select(1, before_R)
        else:
            seen_C, before_R = step.kept_for_all_layers(
                ("distances", size), lambda: split(torch.arange(1, self.window + 1, device="cpu"))
            )
            if self.has_alibi:
                slope_H1 = self.log_decay(q_BTHK.device).to(dtype)[:, None]
                bias_HC, rest_HR = slope_H1 * seen_C, slope_H1 * before_R
            else:
                rest_HR = q_BTHK.new_zeros(self.num_heads, len(before_R), dtype=dtype)
        extra_H = rest_HR.new_full((self.num_heads,), EXTRA_LOGIT)
        if rest_HR.shape[1]:
            extra_H = torch.logaddexp(extra_H, rest_HR.logsumexp(1))
        return step.attend(q_BTHK, state.keys_BWHK, state.values_BWHV, bias_HC, extra_H)

    def keep(self, k_BTHK, v_BTHV, sequence, state):
        """Brings keys and values of the state up to date."""
        specs, may_overwrite = self.state_specs(), state.may_overwrite
        for name, x_BTHK in (("keys_BWHK", k_BTHK), ("values_BWHV", v_BTHV)):
            held_BWHK = getattr(state, name)
            held_BWHK = ring_after(x_BTHK, held_BWHK, specs[name], sequence, may_overwrite)
            setattr(state, name, held_BWHK)

    def look_by_document(self, q_BTHK, rk_NMHK, rv_NMHV, sequence):
        """Tokens look at the states of their document, of which this pass has one window."""
        if sequence.cu_seqlens is None:
            return look(q_BTHK, rk_NMHK, rv_NMHV)
        grid = SegmentGrid(sequence, self.window, is_fresh=False)
        return grid.join(look(grid.queries(q_BTHK), rk_NMHK, rv_NMHV))
