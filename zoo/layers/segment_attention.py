"""Attention inside segments of a document, as a mixer: what models of segments have in common.

A document is cut into segments of L tokens, counted from its own start; a token attends to those of
its segment up to itself, and positions restart in every segment. Infini-attention has a memory
beside it (zoo/models/infini.py), LongLLaMA (zoo/models/long_llama.py) layers with one between
layers of this alone.
"""

import functools

import torch
from torch import nn

from ..core.base import Constant
from ..core.flops import linear_flops, mean_of_segments, mean_visible
from ..core.halo import last_before
from ..core.state import StateSpec, dtype_of
from ..core.window import write_common_slot
from ..kernels.linear_recurrence import accumulator_dtype
from ..kernels.recurrence_steps import takes_plain_step
from ..kernels.windowed_attention import attention_step_to_all
from .compressive_memory import segments_of
from .position_bias import position_bias
from .position_fields import TURNED_TYPES, position_type_of
from .positions import RotaryPositions, turned
from .xpos import xpos_log_decay


class SegmentAttention(nn.Module):
    """Causal softmax attention inside each segment.

    Args:
        config: with hidden_size, num_attention_heads, num_key_value_heads, head_dim, segment_length
            and, if it has them, the fields of zoo/layers/position_fields.py.
        layer_idx: of the layer.
    """

    exchanges = True

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.num_groups = config.num_key_value_heads
        self.scale = getattr(config, "attention_scale", None)
        width, size = config.hidden_size, self.num_heads * self.head_dim
        self.q_proj = nn.Linear(width, size, bias=False)
        self.k_proj = nn.Linear(width, self.num_groups * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, self.num_groups * self.head_dim, bias=False)
        self.out_proj = nn.Linear(size, width, bias=False)
        self.position_type = position_type_of(config, layer_idx)
        self.position_bias, self.log_decay = position_bias(config, self.position_type), None
        if self.position_type == "xpos":
            self.log_decay = Constant(functools.partial(xpos_log_decay, config))

    def state_specs(self):
        """Of the unfinished segment, keys (after RoPE) and values."""
        shape = self.config.segment_length, self.num_groups, self.head_dim
        slots = StateSpec(shape, dtype=dtype_of(self.k_proj))
        return {"keys_BLHK": slots, "values_BLHV": slots}

    def flops_per_token(self, length):
        """Of its matrices, and of attention inside a segment."""
        segment = self.config.segment_length
        keys = mean_of_segments(length, segment, lambda tokens: tokens * mean_visible(tokens))
        return linear_flops(self) + 4 * self.num_heads * self.head_dim * keys

    def forward(self, x_BTD, sequence, state, rotation=None):
        """Mixes a sequence [B, T, D]; returns it with the state after it.

        Args:
            x_BTD: the tokens.
            sequence: how they lie.
            state: before them.
            rotation: (cos, sin) of each token's place in its segment, for types that turn.
        """
        slot = self.common_slot(x_BTD, sequence, state)
        if slot is not None:
            y_B1HV = self.local_step(*self.project(x_BTD), slot, state, rotation)
            return self.out_proj(y_B1HV.to(x_BTD.dtype).flatten(2)), state
        q_BTHK, k_BTHK, v_BTHV = self.project(x_BTD)
        if sequence.ranks is not None:
            need = "segment", lambda clock: clock % self.config.segment_length
            self.bring_tokens((self.turned(k_BTHK, rotation), v_BTHV), sequence, state, need)
        segments = self.segments(sequence, state)
        y_SHQV = self.attend(q_BTHK, k_BTHK, v_BTHV, segments, rotation)
        return self.out_proj(segments.join(y_SHQV.transpose(1, 2)).flatten(2)), state

    def bring_tokens(self, tensors, sequence, state, need=None):
        """A slice: what the state would hold of the slices before, into the state.

        Args:
            tensors: of this slice's tokens, what the state holds.
            sequence: the slice.
            state: an empty one, which has it afterwards.
            need: as of `last_before`.
        """
        specs = self.state_specs()
        (size,) = {spec.shape[0] for spec in specs.values()}
        brought = last_before(tensors, sequence, size, need)
        for (name, spec), x_BLHK in zip(specs.items(), brought or ()):
            dtype = spec.dtype if state.is_kept else None
            setattr(state, name, x_BLHK.to(dtype or x_BLHK.dtype))

    def segments(self, sequence, state):
        """The segments of a pass, as of `segments_of`."""
        return segments_of(sequence, self.config.segment_length, state, self.state_specs())

    def project(self, x_BTD):
        """Queries [B, T, H, K], keys and values [B, T, groups, K] of hidden states [B, T, D]."""
        return (
            self.q_proj(x_BTD).unflatten(-1, (self.num_heads, self.head_dim)),
            self.k_proj(x_BTD).unflatten(-1, (self.num_groups, self.head_dim)),
            self.v_proj(x_BTD).unflatten(-1, (self.num_groups, self.head_dim)),
        )

    def attend(self, q_BTHK, k_BTHK, v_BTHV, segments, rotation=None):
        """Attention inside the segments, [S, H, Q, V]; the state is brought up to date."""
        local = (self.turned(x, rotation) for x in (q_BTHK, k_BTHK))
        bias = None if self.position_type in ("rope", None) else self.bias
        return segments.attend(*local, v_BTHV, self.scale, bias)

    def common_slot(self, x_BTD, sequence, state):
        """Where a plain step's token comes to lie, if it is the same in all rows; else None.

        The slots before it are then filled, and nothing has to be hidden.
        """
        if not (state.is_kept and takes_plain_step(sequence, x_BTD)):
            return None
        if state.keys_BLHK is None or self.position_type not in ("rope", None):
            return None
        clock = sequence.common_clock
        return None if clock is None else clock % self.config.segment_length

    def local_step(self, q_B1HK, k_B1HK, v_B1HV, slot, state, rotation):
        """`attend` of a token in a `common_slot`, [B, 1, H, V]."""
        q_B1HK, k_B1HK = self.turned(q_B1HK, rotation), self.turned(k_B1HK, rotation)
        keys_BLHK, values_BLHV = (
            write_common_slot(held, new, slot, state.may_overwrite)
            for held, new in ((state.keys_BLHK, k_B1HK), (state.values_BLHV, v_B1HV))
        )
        state.keys_BLHK, state.values_BLHV = keys_BLHK, values_BLHV
        seen = keys_BLHK[:, : slot + 1], values_BLHV[:, : slot + 1]
        return attention_step_to_all(q_B1HK, *seen, self.scale)

    def turned(self, x_BTHK, rotation):
        """Queries or keys by their places, for types that turn; None stays None."""
        if x_BTHK is None or self.position_type not in TURNED_TYPES:
            return x_BTHK
        return turned(x_BTHK, rotation, interleaved=self.position_type == "xpos")

    def bias(self, distance, q_BTHK):
        """What distances do to scores, as `SegmentPass.attend` takes it."""
        is_step = distance.ndim == 2
        if self.log_decay is not None:
            arguments = {"log_decay": self.log_decay(distance.device)}
            return arguments | {"distance": distance} if is_step else arguments
        bias = self.position_bias.by_distance(distance, accumulator_dtype(q_BTHK))
        return {"slot_bias": bias.transpose(0, 1)} if is_step else {"distance_bias": bias}


def slot_angles(config):
    """(cos, sin) of every place in a segment, [2, L, pairs]: what `Constant` computes."""
    slots_L = torch.arange(config.segment_length)
    return torch.stack([x[0, :, 0] for x in RotaryPositions(config)(slots_L[None])])


class SlotRotation(nn.Module):
    """The rotation of each place in a segment, computed once.

    Args:
        config: with segment_length, head_dim and rope_parameters.
    """

    def __init__(self, config):
        super().__init__()
        self.angles = Constant(functools.partial(slot_angles, config))

    def forward(self, slots):
        """(cos, sin) of these places, of any shape, each [..., 1, pairs]."""
        return self.angles(slots.device)[:, slots, None].unbind()

    def table(self, device):
        """(cos, sin) of all places, each [L, 1, pairs]."""
        return self.angles(device)[:, :, None].unbind()
