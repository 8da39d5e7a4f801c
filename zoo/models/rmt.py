"""Recurrent Memory Transformer: tokens of memory that each segment of a text hands to the next.

Bulatov, Kuratov and Burtsev 2022, https://arxiv.org/abs/2207.06881, in the form of its authors'
current code (Bulatov et al. 2023, https://arxiv.org/abs/2304.11062), which has any decoder inside.
A document is cut into segments of L tokens, counted from its own start. With m vectors of memory,
memory_0 being learned, a segment x is

    [.., x', memory_{s+1}] = norm(decoder([memory_s; x; memory_s]))

causal over all of it, positions 0 to 2 m + L - 1 in every segment, and logits are those of x'. The
same vectors stand in front, where all of the segment reads them, and behind, where they see it all
and become what the next segment reads. Gradients go through all segments, as there (the code's
truncation has no effect); segment replay (zoo/core/replay.py) has room for that. Without a
curriculum over the number of segments such a memory is hardly learned: see hub_cards/rmt.md.

A segment is written when its text goes on, before the next token: nobody sees that (logits do not
depend on the tokens behind), and the last segment, full or not, is never written. The authors'
`generate` instead writes once, before all new tokens, and their batches cut segments of columns,
padding included; here both follow from the definition.

A step of decoding costs one token; the one that begins a segment 2 m + 1, of rows that do so alone.
Compiled, a step is one graph that cannot look at clocks (point 8 of the contract asks for a whole
one), and runs the 2 m + 1 at every token.

`memory="associative"` is ARMT (Rodkin et al. 2024, https://arxiv.org/abs/2407.04841): every layer
has a memory of its own, which m learned tokens behind the segment write, and nothing is in front;
see zoo/layers/associative_memory.py. The code's other option, keys of the segment before, is left
out.

Around the attention is Llama's block, or GPT-2's by the fields `SlidingWindowConfig` has for it and
`position_embedding_type="learned"`. The authors' weights around GPT-2 load through `zoo convert
rmt-hf-gpt2` and `armt-hf-gpt2`. The first code of the paper, in Transformer-XL's block, where
tokens of memory see each other in both directions, is an option of zoo/models/transformer_xl.py.
"""

from typing import ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import GenerationMixin
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ..core.base import ZooConfig, ZooForCausalLM, ZooModel, check_activation, check_head_dim
from ..core.heads import (
    ZooForQuestionAnswering,
    ZooForSequenceClassification,
    ZooForTokenClassification,
)
from ..core.memory_walk import MemoryTokens, MemoryWalk, walked
from ..core.segment_passes import Joined
from ..core.state import SlidingStateLayer
from ..layers.associative_memory import AssociativeBlock
from ..layers.frame_attention import FrameBlock, frame_sizes
from ..layers.norms import rms_or_layer_norm
from ..layers.positions import RotaryPositions, StepRotation, check_rope_parameters
from ..layers.softmax_attention import SoftmaxPreTrainedModel, check_key_value_heads, fill_heads

# Fields about memory "associative" alone, and their defaults.
ASSOCIATIVE_FIELDS = {"dpfp_order": 3, "memory_correction": True}
_SMALL = {"segment_length": 16, "num_memory_tokens": 3, "num_key_value_heads": 2}


@strict
class RmtConfig(ZooConfig):
    """The mathematics of a Recurrent Memory Transformer.

    Args:
        intermediate_size: MLP width; None: 3.5 times hidden_size.
        num_key_value_heads: heads of keys and values, each shared by a group of query heads; None:
            num_attention_heads.
        head_dim: width of a head; None: hidden_size / num_attention_heads.
        segment_length: L, tokens of text per segment.
        num_memory_tokens: m.
        memory: "tokens", RMT, or "associative", ARMT.
        memory_size: of "associative", width of its queries and keys before their features; None:
            64 of "associative".
        dpfp_order: of "associative", nu of these features.
        memory_correction: of "associative", whether its normaliser leaves out what it has already.
        hidden_act, gated_mlp, mlp_bias, attention_bias, norm_type, norm_bias, rms_norm_eps,
            rope_parameters, max_position_embeddings, initializer_range: as in
            `SlidingWindowConfig`. Positions are those in a segment with its memory.
        position_embedding_type: "rope", "learned" (a table, added to what goes into the first
            layer) or None (by causality alone).
        num_positions: of "learned", rows of the table: those of text and memory, at least.
        memory_at_table_end: of "learned" and "associative", tokens that write have the last rows
            of the table (the code's wrap_pos), else those behind the segment.
    """

    model_type = "zoo_rmt"
    layer_type: ClassVar[str] = SlidingStateLayer._layer_type
    variants: ClassVar[dict[str, dict]] = {
        "default": _SMALL,
        "associative": _SMALL | {"memory": "associative", "memory_size": 4},
        "gpt-block": {
            "segment_length": 13,
            "num_memory_tokens": 2,
            "memory": "associative",
            "memory_size": 5,
            "dpfp_order": 2,
            "memory_correction": False,
            "hidden_act": "gelu_new",
            "gated_mlp": False,
            "mlp_bias": True,
            "attention_bias": True,
            "norm_type": "layer",
            "norm_bias": True,
            "position_embedding_type": "learned",
            "num_positions": 17,
            "memory_at_table_end": True,
            "tie_word_embeddings": True,
        },
    }

    num_key_value_heads: int | None = None
    head_dim: int | None = None
    segment_length: int = 512
    num_memory_tokens: int = 16
    memory: Literal["tokens", "associative"] = "tokens"
    memory_size: int | None = None
    dpfp_order: int = 3
    memory_correction: bool = True
    hidden_act: str = "silu"
    gated_mlp: bool = True
    mlp_bias: bool = False
    attention_bias: bool = False
    norm_type: Literal["rms", "layer"] = "rms"
    norm_bias: bool = False
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    rope_parameters: dict | None = None
    max_position_embeddings: int | None = None
    position_embedding_type: Literal["rope", "learned"] | None = "rope"
    num_positions: int | None = None
    memory_at_table_end: bool = False

    def __post_init__(self, **kwargs):
        fill_heads(self)
        if self.intermediate_size is None:
            self.intermediate_size = 7 * self.hidden_size // 2
        if self.memory_size is None and self.memory == "associative":
            self.memory_size = 64
        has_rope = self.position_embedding_type == "rope" or bool(self.rope_parameters)
        self.rope_parameters = dict(self.rope_parameters or {})
        super().__post_init__(**kwargs)
        if not has_rope:
            self.rope_parameters = None

    def validate_architecture(self):
        """Checks heads, segments, memory and positions."""
        super().validate_architecture()
        check_head_dim(self)
        check_activation("hidden_act", self.hidden_act)
        check_key_value_heads(self)
        for name in ("segment_length", "num_memory_tokens", "dpfp_order"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, got {getattr(self, name)}.")
        if self.norm_bias and self.norm_type == "rms":
            raise ValueError("norm_bias is of norm_type 'layer': RMSNorms have none; leave it out.")
        self.check_memory()
        self.check_position_fields()

    def check_memory(self):
        """Raises a ValueError for fields of a memory that is not there."""
        if self.memory == "associative":
            if self.memory_size < 1:
                raise ValueError(f"memory_size is at least 1, got {self.memory_size}.")
            return
        for name, default in {"memory_size": None, **ASSOCIATIVE_FIELDS}.items():
            if getattr(self, name) != default:
                raise ValueError(
                    f"{name} is about memory 'associative', got {getattr(self, name)} and "
                    f"{self.memory!r}; leave it out."
                )

    def check_position_fields(self):
        """Raises a ValueError if a segment with its memory has no positions."""
        is_learned = self.position_embedding_type == "learned"
        if self.memory_at_table_end and not (is_learned and self.memory == "associative"):
            raise ValueError(
                "memory_at_table_end is of position_embedding_type 'learned' and memory "
                f"'associative', got {self.position_embedding_type!r} and {self.memory!r}."
            )
        width = frame_sizes(self).width
        if is_learned and (self.num_positions is None or self.num_positions < width):
            raise ValueError(
                f"num_positions is at least {width}, for a segment of {self.segment_length} and "
                f"its memory, got {self.num_positions}."
            )
        if not is_learned and self.num_positions is not None:
            raise ValueError(
                f"num_positions is of position_embedding_type 'learned', got {self.num_positions} "
                f"and {self.position_embedding_type!r}; leave it out."
            )
        if self.position_embedding_type == "rope":
            if self.rope_parameters is None:
                raise ValueError(
                    "position_embedding_type 'rope' turns by rope_parameters, got None; pass them "
                    "too, as {'rope_type': 'default', 'rope_theta': 10000.0}."
                )
            check_rope_parameters(self)
        elif self.rope_parameters:
            raise ValueError(
                "rope_parameters are of position_embedding_type 'rope', got "
                f"{self.position_embedding_type!r}; leave them out."
            )


class RmtPreTrainedModel(SoftmaxPreTrainedModel):
    """Its config and layers for transformers."""

    config: RmtConfig
    _no_split_modules = ["FrameBlock", "AssociativeBlock"]
    _can_record_outputs = {"hidden_states": OutputRecorder(Joined, index=0)}


class RmtModel(RmtPreTrainedModel, ZooModel):
    """The decoder."""

    build_norm = staticmethod(rms_or_layer_norm)
    walks_segments = True

    def __init__(self, config):
        is_associative = config.memory == "associative"
        self.block_class = AssociativeBlock if is_associative else FrameBlock
        super().__init__(config)
        self.memory, self.joined = MemoryTokens(config), Joined()
        self.rotation = self.embed_positions = None
        if config.position_embedding_type == "rope":
            self.rotation = RotaryPositions(config)
        elif config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.num_positions, config.hidden_size)
        self.post_init()

    def enter(self, h_BTD, own):
        """Tokens of a frame as they go into the first layer, and what all layers get."""
        if self.rotation is not None:
            rotation = self.rotation(own.positions)
            return h_BTD, {"rotation": StepRotation.if_step(rotation, own, h_BTD)}
        if self.embed_positions is None:
            return h_BTD, {}
        place_BT, config = own.positions, self.config
        if config.memory_at_table_end:
            sizes = frame_sizes(config)
            is_text_BT = place_BT < sizes.slots
            place_BT = torch.where(
                is_text_BT, place_BT, place_BT + config.num_positions - sizes.width
            )
        return h_BTD + self.embed_positions(place_BT), {}

    @capture_outputs
    def _run_blocks(self, x_BTD, sequence, cache, inputs, **kwargs):
        leave = self.norm if self.config.memory == "tokens" else None
        if leave is None:  # gradients go from segment to segment through states
            self._check_checkpointing()
        walk = MemoryWalk(self.layers, self.memory, self.enter, leave, frame_sizes(self.config))
        return walked(self, walk, x_BTD, sequence, cache, inputs, **kwargs)


class RmtForCausalLM(RmtPreTrainedModel, ZooForCausalLM, GenerationMixin):
    """A Recurrent Memory Transformer as a language model."""

    model_class = RmtModel

    def visible_tokens(self, length):
        """Of so many tokens, those the last one's logits depend on, [length] bool: all of them."""
        return torch.ones(length, dtype=torch.bool)


class RmtForSequenceClassification(RmtPreTrainedModel, ZooForSequenceClassification):
    """A Recurrent Memory Transformer as a classifier of texts."""

    model_class = RmtModel


class RmtForTokenClassification(RmtPreTrainedModel, ZooForTokenClassification):
    """A Recurrent Memory Transformer as a classifier of tokens."""

    model_class = RmtModel


class RmtForQuestionAnswering(RmtPreTrainedModel, ZooForQuestionAnswering):
    """A Recurrent Memory Transformer as a finder of answers in a text."""

    model_class = RmtModel


__all__ = [
    "RmtConfig",
    "RmtModel",
    "RmtForCausalLM",
    "RmtForSequenceClassification",
    "RmtForTokenClassification",
    "RmtForQuestionAnswering",
]
