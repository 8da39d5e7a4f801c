"""Softmax attention inside a frame: a segment of a document with tokens of memory around it.

Frames and what a clock is in them are those of zoo/core/memory_frames.py.
"""

import torch

from ..core.base import ZooBlock
from ..core.flops import linear_flops
from ..core.memory_frames import FrameSizes
from ..core.memory_walk import MEMORY
from ..core.state import StateSpec
from ..core.window import first_positions, gather_tokens, row_spans, write_slot
from .mlp import GatedMLP, PlainMLP
from .norms import rms_or_layer_norm
from .softmax_attention import SoftmaxAttention


def frame_sizes(config):
    """The `FrameSizes` of a config with segment_length, num_memory_tokens and memory.

    Tokens of memory read where they are the memory; one in the layers is read by all tokens.
    """
    number = config.num_memory_tokens
    num_reads = number if config.memory == "tokens" else 0
    return FrameSizes(config.segment_length, num_reads, number)


class FrameAttention(SoftmaxAttention):
    """Causal attention to the tokens of a frame. Its state is the unfinished one's, by place.

    Args:
        config: as of `SoftmaxAttention` and `frame_sizes`.
        layer_idx: of the layer.
        bias: in the linear layers.
    """

    exchanges = False

    def __init__(self, config, layer_idx, bias=False):
        super().__init__(config, layer_idx, bias=bias)
        self.sizes = frame_sizes(config)
        self.window = self.sizes.width  # all of a frame

    def state_specs(self):
        """Keys (turned) and values of the tokens of a frame that later ones see."""
        spec = super().state_specs()["keys_BWHK"]
        spec = StateSpec((self.sizes.slots, *spec.shape[1:]), dtype=spec.dtype)
        return {"keys_BWHK": spec, "values_BWHV": spec}

    def run_step(self, q_BTHK, k_BTHK, v_BTHV, as_sinks, sequence, state):
        """One token per row: writes its slot, and looks at all that are filled."""
        place_B = sequence.clock[:, 0].expand(q_BTHK.shape[0])
        for (name, spec), x_BTHK in zip(self.state_specs().items(), (k_BTHK, v_BTHV)):
            held_BSHK = getattr(state, name)
            if held_BSHK is None:
                held_BSHK = x_BTHK.new_zeros(place_B.shape[0], *spec.shape, dtype=spec.dtype)
            new_BHK, may_overwrite = x_BTHK[:, 0], state.may_overwrite
            written = write_slot(held_BSHK, new_BHK, place_B, sequence.keep, may_overwrite)
            setattr(state, name, written)
        slots_S = torch.arange(self.sizes.slots, device=place_B.device)
        visible_BS = slots_S <= place_B[:, None]
        return self.attend(q_BTHK, state.keys_BWHK, state.values_BWHV, visible_BS=visible_BS)

    def keep(self, k_BTHK, v_BTHV, sequence, state, as_sinks=None):
        """Brings the state up to date."""
        spans, spec = row_spans(sequence), self.state_specs()["keys_BWHK"]
        places_BS = first_positions(spans.after, self.sizes.slots)
        for name, x_BTHK in (("keys_BWHK", k_BTHK), ("values_BWHV", v_BTHV)):
            x_BTHK = x_BTHK.to(spec.dtype)
            setattr(state, name, gather_tokens(x_BTHK, getattr(state, name), places_BS, spans))


class FrameBlock(ZooBlock):
    """A block, Llama's or GPT's, whose mixer is `FrameAttention`.

    Attributes:
        memory_names: tensors of its state that go from segment to segment.
    """

    build_norm = staticmethod(rms_or_layer_norm)

    @staticmethod
    def mixer_class(config, layer_idx):
        """Attention inside a frame."""
        return FrameAttention(config, layer_idx, bias=config.attention_bias)

    @staticmethod
    def mlp_class(config):
        """With a gate or without."""
        return (GatedMLP if config.gated_mlp else PlainMLP)(config, bias=config.mlp_bias)

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.memory_specs = {}
        if config.memory == "tokens" and layer_idx == 0:
            self.memory_specs[MEMORY] = StateSpec((config.num_memory_tokens, config.hidden_size))

    @property
    def memory_names(self):
        """Tensors of the state that go from segment to segment."""
        return tuple(self.memory_specs)

    def state_specs(self):
        """Of the unfinished frame, and memory."""
        return self.mixer.state_specs() | self.memory_specs

    def flops_per_token(self, length):
        """Of all tokens of the frames a text takes, those of memory too, per token of text.

        The last segment, full or not, is not written.
        """
        sizes, mixer = self.mixer.sizes, self.mixer
        whole, rest = divmod(length - 1, sizes.length)
        widths = [sizes.width] * whole + [sizes.num_reads + rest + 1]
        seen = sum(width * (width + 1) // 2 for width in widths)
        attention = 4 * mixer.num_heads * mixer.head_dim * seen
        linear = sum(widths) * linear_flops(mixer, self.mlp)
        return (linear + attention) / length
