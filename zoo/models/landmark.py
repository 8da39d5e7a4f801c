"""Landmark attention: a Transformer that finds blocks of its past by a token that stands for each.

Mohtashami and Jaggi 2023, "Landmark Attention: Random-Access Infinite Context Length for
Transformers", https://arxiv.org/abs/2305.16300. After every `block_length` tokens of a document
comes a landmark, a token that the model puts in by itself. A query sees the tokens of its own
block, and those of earlier blocks through their landmarks, by a grouped softmax
(zoo/layers/landmark_softmax.py). Positions (RoPE) count tokens and landmarks from a document's own
start; position_ids say where documents begin, and no more.

A model trains with all earlier blocks (`retrieved_blocks=None`). With a number K of them, every
query of every head reads the K blocks whose landmarks it scores highest, at places close by (the
paper's stingy positions), with the same weights: `from_pretrained(folder, retrieved_blocks=4)`.
What is chosen is a matter of order among scores: rounding may change it where two are close, so
that whole texts and pieces, or 16 and 32 bits, agree where they choose alike. In the first layer
the landmarks of all blocks are one embedding, and the scores of old ones are the same; of those,
the first are read.

The state grows with the text: keys, not turned, and values of all tokens and landmarks, in whole
blocks, 2 (F + 1) ceil(S / (F + 1)) G K numbers per layer for the S = n + (n - 1) // F places of n
tokens. A step of decoding scores all landmarks, and reads K + 1 blocks.

The block is Llama's, or GPT's, as in `SlidingWindowConfig`. Public weights load through `zoo
convert landmark-llama` and `landmark-gpt`.
"""

from typing import ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.output_capturing import capture_outputs

from ..core.base import (
    ZooBlock,
    ZooConfig,
    ZooModel,
    ZooPreTrainedModel,
    check_activation,
    check_head_dim,
)
from ..core.flops import linear_flops
from ..core.heads import (
    ZooForQuestionAnswering,
    ZooForSequenceClassification,
    ZooForTokenClassification,
)
from ..core.state import GrowingStateLayer
from ..kernels.recurrence_steps import takes_plain_step
from ..layers.landmark_attention import LandmarkAttention
from ..layers.landmark_stream import LandmarkStream, stream_length
from ..layers.landmark_targets import ForCausalLMWithLandmarks, OutputWithOwnStates
from ..layers.mlp import OWN_ACTIVATIONS, GatedMLP, PlainMLP
from ..layers.norms import rms_or_layer_norm
from ..layers.positions import RotaryPositions, StepRotation, check_rope_parameters
from ..layers.softmax_attention import check_key_value_heads, fill_heads


@strict
class LandmarkConfig(ZooConfig):
    """The mathematics of landmark attention in a block like Llama's, or GPT's.

    Args:
        intermediate_size: MLP width; None: 4 times hidden_size.
        num_key_value_heads: heads of keys and values, each shared by a group of query heads; None:
            num_attention_heads, as in the paper.
        head_dim: width of a head; None: hidden_size / num_attention_heads.
        hidden_act, gated_mlp, mlp_bias, attention_bias, norm_type, norm_bias, rms_norm_eps: of the
            block, as in `SlidingWindowConfig`.
        initializer_range: standard deviation of matrices and embeddings at the start.
        rope_parameters: as in `SlidingWindowConfig`, but for dynamic and longrope, whose angles
            depend on the length of a text: keys are seen from many places.
        max_position_embeddings: as in `SlidingWindowConfig`.
        block_length: F, tokens per block without their landmark.
        retrieved_blocks: K, earlier blocks that a query of a head reads; None: all, as in training.
        landmark_token_id: the token whose embedding a landmark has; None: the last one. In a text
            it is a token like others, and starts no block.
        landmark_predicts_next: whether the token after a block is predicted from its landmark,
            which is then run with the block's last token; else from that last token, and the
            landmark is run when the next block begins.
    """

    model_type = "zoo_landmark"
    layer_type: ClassVar[str] = GrowingStateLayer._layer_type
    variants: ClassVar[dict[str, dict]] = {
        "default": {"block_length": 8, "num_key_value_heads": 2},
        "retrieval": {
            "block_length": 8,
            "retrieved_blocks": 2,
            "landmark_predicts_next": True,
            "hidden_act": "gelu",
            "gated_mlp": False,
            "norm_type": "layer",
            "tie_word_embeddings": True,
        },
    }

    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    gated_mlp: bool = True
    mlp_bias: bool = False
    attention_bias: bool = False
    norm_type: Literal["rms", "layer"] = "rms"
    norm_bias: bool = False
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    rope_parameters: dict | None = None
    max_position_embeddings: int | None = None
    block_length: int = 63
    retrieved_blocks: int | None = None
    landmark_token_id: int | None = None
    landmark_predicts_next: bool = False

    def __post_init__(self, **kwargs):
        fill_heads(self)
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.landmark_token_id is None:
            self.landmark_token_id = self.vocab_size - 1
        # transformers fills the rest of it in.
        self.rope_parameters = dict(self.rope_parameters or {})
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Checks heads, blocks and what the rotation needs to know."""
        super().validate_architecture()
        check_head_dim(self)
        check_key_value_heads(self)
        if self.hidden_act not in OWN_ACTIVATIONS:
            check_activation("hidden_act", self.hidden_act)
        if self.norm_bias and self.norm_type == "rms":
            raise ValueError("norm_bias is of norm_type 'layer': RMSNorms have none; leave it out.")
        if self.block_length < 1:
            raise ValueError(f"block_length is at least 1, got {self.block_length}.")
        if self.retrieved_blocks is not None and self.retrieved_blocks < 1:
            raise ValueError(
                f"retrieved_blocks is at least 1, got {self.retrieved_blocks}; None reads all."
            )
        if not 0 <= self.landmark_token_id < self.vocab_size:
            raise ValueError(
                f"landmark_token_id is below vocab_size {self.vocab_size}, got "
                f"{self.landmark_token_id}; change one of them, or leave landmark_token_id out."
            )
        if self.landmark_token_id == self.pad_token_id:
            raise ValueError(
                "landmark_token_id has an embedding of its own, got that of pad_token_id, "
                f"{self.pad_token_id}, which is not trained; change one of them."
            )
        check_rope_parameters(self)
        rope_type = self.rope_parameters["rope_type"]
        if rope_type in ("dynamic", "longrope"):
            raise ValueError(
                "rope_parameters of landmark attention have angles that do not depend on a text's "
                f"length, got rope_type {rope_type!r}; take default, linear, yarn or llama3."
            )


class LandmarkBlock(ZooBlock):
    """Llama's block, or GPT's, around landmark attention."""

    mixer_class = LandmarkAttention
    build_norm = staticmethod(rms_or_layer_norm)

    @staticmethod
    def mlp_class(config):
        """With a gate or without."""
        return (GatedMLP if config.gated_mlp else PlainMLP)(config, bias=config.mlp_bias)

    def flops_per_token(self, length):
        """As of `ZooModel`: landmarks go through the MLP too."""
        config = self.mixer.config
        places = stream_length(length, config.block_length, config.landmark_predicts_next)
        return self.mixer.flops_per_token(length) + linear_flops(self.mlp) * places / length

    def forward(self, x_BTD, sequence, state, landmarks_BLD, stream, **inputs):
        """Returns (x_BTD, state, landmarks_BLD)."""
        x_BSD = stream.join(x_BTD, landmarks_BLD)
        x_BSD, state = super().forward(x_BSD, stream, state, **inputs)
        x_BTD, landmarks_BLD = stream.split(x_BSD)
        return x_BTD, state, landmarks_BLD


class LandmarkPreTrainedModel(ZooPreTrainedModel):
    """The config and layers for transformers."""

    config: LandmarkConfig
    _no_split_modules = ["LandmarkBlock"]
    _can_record_outputs = {"hidden_states": LandmarkBlock}
    # To transformers a full graph goes with a cache of one size, and `generate` compiles by itself.
    _can_compile_fullgraph = False

    def state_size(self, num_tokens=None):
        """As in `ZooPreTrainedModel`: of the whole blocks that tokens and landmarks take."""
        if num_tokens is not None:
            config = self.config
            size = config.block_length + 1
            places = stream_length(num_tokens, size - 1, config.landmark_predicts_next)
            num_tokens = -(-places // size) * size
        return super().state_size(num_tokens)


class LandmarkModel(LandmarkPreTrainedModel, ZooModel):
    """The decoder."""

    block_class = LandmarkBlock
    build_norm = staticmethod(rms_or_layer_norm)
    token_outputs = ("last_hidden_state", "own_states", "ends_block")

    def __init__(self, config):
        super().__init__(config)
        self.rotation = RotaryPositions(config)
        self.known_places = None  # a `StepRotation`, [places, 1, K]
        self.post_init()

    def step_rotations(self, stream, x_B1D):
        """`rotations` of a single token, no landmark beside it, at one place in all rows.

        Those of the places before it are kept for the next one.
        """
        known, dtype = self.known_places, torch.promote_types(x_B1D.dtype, torch.float32)
        if known is None or len(known.cos) < stream.num_slots or known.cos.dtype != dtype:
            places_S = torch.arange(2 * stream.num_slots, device=x_B1D.device)
            rotation = (x[0] for x in self.rotation(places_S[None]))
            self.known_places = known = StepRotation.of(rotation, x_B1D)
        keys = known.rows(slice(0, stream.start + 1))
        return {"key_rotation": keys, "query_rotation": keys.rows(slice(stream.start, None))}

    def rotations(self, stream):
        """Of queries, unless blocks are retrieved, and of all places that keys may have."""
        count, clock_BS = self.config.retrieved_blocks, stream.sequence.clock
        size = self.config.block_length + 1
        num_blocks = -(-stream.num_slots // size) if count is None else count + 2
        places_S = torch.arange(num_blocks * size, device=clock_BS.device)
        inputs = {"key_rotation": tuple(x[0] for x in self.rotation(places_S[None]))}
        if count is None:
            inputs["query_rotation"] = self.rotation(clock_BS)
        return inputs

    @capture_outputs
    def _run_blocks(self, x_BTD, sequence, cache, inputs, returns_own_states=False, **kwargs):
        config, num_slots = self.config, None
        if cache is not None and cache.layers[0].tensors:
            num_slots = cache.layers[0].tensors["keys_BSGK"].shape[1]
        length, at_once = config.block_length, config.landmark_predicts_next
        if sequence.ranks is not None and not sequence.ranks.is_first:
            num_slots = 0
        stream = LandmarkStream(sequence, length, at_once, num_slots)
        if sequence.ranks is not None:
            stream.join_slices(sequence.ranks)
        is_step = config.retrieved_blocks is None and takes_plain_step(stream.sequence, x_BTD)
        if is_step and num_slots and stream.is_one_token:
            shared = self.step_rotations(stream, x_BTD) | {"stream": stream}
        else:
            shared = self.rotations(stream) | {"stream": stream}
        ids_BL = stream.landmark_ids(config.landmark_token_id)
        landmarks_BLD = self.embed_tokens(ids_BL).to(x_BTD.dtype)
        x_BTD, landmarks_BLD = self._run_layers(
            x_BTD, sequence, cache, inputs, shared, (landmarks_BLD,)
        )
        hidden_BTD = self.norm(stream.predicting(x_BTD, landmarks_BLD))
        if not returns_own_states:
            return BaseModelOutputWithPast(last_hidden_state=hidden_BTD)
        return OutputWithOwnStates(
            last_hidden_state=hidden_BTD,
            own_states=self.norm(x_BTD),
            ends_block=stream.ends_block.expand(x_BTD.shape[:2])[..., None],
        )


class LandmarkForCausalLM(LandmarkPreTrainedModel, ForCausalLMWithLandmarks, GenerationMixin):
    """A Transformer with landmark attention as a language model."""

    model_class = LandmarkModel

    def visible_tokens(self, length):
        """Of so many tokens, those the last one's logits depend on, [length] bool.

        With retrieval those of its own block in any case; `choosable_tokens` may be read.
        """
        tokens_T, block = torch.arange(length), self.config.block_length
        if self.config.retrieved_blocks is None:
            return self.choosable_tokens(length)
        return tokens_T // block == (length - 1) // block

    def choosable_tokens(self, length):
        """Of so many tokens, those the last one's logits may depend on, [length] bool."""
        return torch.ones(length, dtype=torch.bool)


class LandmarkForSequenceClassification(LandmarkPreTrainedModel, ZooForSequenceClassification):
    """A Transformer with landmark attention as a classifier of texts."""

    model_class = LandmarkModel


class LandmarkForTokenClassification(LandmarkPreTrainedModel, ZooForTokenClassification):
    """A Transformer with landmark attention as a classifier of tokens."""

    model_class = LandmarkModel


class LandmarkForQuestionAnswering(LandmarkPreTrainedModel, ZooForQuestionAnswering):
    """A Transformer with landmark attention as a finder of answers in a text."""

    model_class = LandmarkModel


__all__ = [
    "LandmarkConfig",
    "LandmarkModel",
    "LandmarkForCausalLM",
    "LandmarkForSequenceClassification",
    "LandmarkForTokenClassification",
    "LandmarkForQuestionAnswering",
]
