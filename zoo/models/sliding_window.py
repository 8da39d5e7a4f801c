"""Sliding-window attention: a Transformer that sees the last W tokens in each layer.

Mistral 7B v0.1, Jiang et al. 2023, https://arxiv.org/abs/2310.06825. Per head, with q and k turned
by RoPE (pairs (j, j + K/2), Su et al. 2021, https://arxiv.org/abs/2104.09864) and heads of keys
and values shared by groups of query heads:

    o_i = sum_j softmax_j(q_i^T k_j / sqrt(K)) v_j   over i - W < j <= i

W keys including its own, as in transformers and in the authors' later code. The paper's wording
(i - W to i) and the prefill of the authors' first code have W + 1, their decoding has W. Over L
layers a token sees L (W - 1) + 1 tokens back. The state is what the paper calls a rolling buffer:
keys (after RoPE) and values at slot position mod W. `sliding_window=None` is full attention, the
usual Transformer, whose state grows with the text.

Attention sinks (StreamingLLM, Xiao et al. 2023, https://arxiv.org/abs/2309.17453): the first
`num_sink_tokens` S tokens of a document stay visible, with positions counted inside the cache. So a
query at position p sees a sink at j from position min(p, S + W - 1). Keys in the window need only
differences of positions, so they keep their own; for the sinks alone the query is turned a second
time. That makes it a function of the text, the same in training and in generation. Biases and
decays by distance count the same way, and FIRE has that position for its query's place. LM-Infinite
(Han et al. 2023, https://arxiv.org/abs/2308.16137) is the same with one distance for all sinks that
have left the window (`sink_distance`). Sink logits (`learnable_sinks`) are those of gpt-oss: one
per head, in the softmax's denominator only.

The block is Mistral's, or GPT's: LayerNorms (`norm_type`, `norm_bias`, `embedding_norm`), an MLP
without a gate (`gated_mlp`), biases (`attention_bias`, `mlp_bias`), and projections that are cut
off (`clip_qkv`).

Weights of Mistral load through `zoo convert hf-mistral` and `zoo convert mistral-consolidated`,
those of SmolLM3, MPT, BLOOM and Falcon's models with ALiBi through `hf-smollm3`, `hf-mpt`,
`hf-bloom` and `hf-falcon`.
"""

from typing import ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin

from ..core.base import (
    ZooBlock,
    ZooConfig,
    ZooForCausalLM,
    ZooModel,
    check_activation,
    check_head_dim,
)
from ..core.heads import (
    ZooForQuestionAnswering,
    ZooForSequenceClassification,
    ZooForTokenClassification,
)
from ..layers.mlp import OWN_ACTIVATIONS, GatedMLP, PlainMLP
from ..layers.norms import rms_or_layer_norm
from ..layers.position_fields import check_position_fields, position_types, turns
from ..layers.positions import RotaryPositions, StepRotation
from ..layers.rope_extension import extended_rotation
from ..layers.softmax_attention import (
    SoftmaxPreTrainedModel,
    check_implementation,
    check_key_value_heads,
    check_window,
    fill_heads,
    softmax_layer_type,
    state_is_list_of_tokens,
)
from ..layers.softmax_mixer import softmax_mixer


@strict
class SlidingWindowConfig(ZooConfig):
    """Mistral's mathematics. Defaults are those of Mistral 7B v0.1 but for its size.

    Args:
        intermediate_size: MLP width; None: 3.5 times hidden_size.
        num_key_value_heads: heads of keys and values, each shared by a group of query heads; None:
            num_attention_heads.
        head_dim: width of a head; None: hidden_size / num_attention_heads.
        hidden_act: activation of the MLP: one of transformers', or "gelu_bloom".
        gated_mlp: down(act(gate x) * up x); else down(act(up x)).
        mlp_bias: biases in the MLP.
        attention_bias: biases in the projections to queries, keys and values, and the one out.
        clip_qkv: these three are cut off at plus and minus so much; None: not.
        norm_type: "rms", or "layer": LayerNorm, which takes the mean off.
        norm_bias: LayerNorms have a bias.
        embedding_norm: one more norm, on the embeddings.
        rms_norm_eps: epsilon of the norms, of either type.
        initializer_range: standard deviation of matrices and embeddings at the start.
        rope_parameters: transformers' description of RoPE: rope_theta and rope_type, one of
            default, linear, dynamic, yarn, llama3, longrope and proportional, with that one's own
            fields. For dynamic and longrope, whose angles depend on the length of the text, a token
            takes those of the text up to itself, as transformers does when it decodes token by
            token.
        max_position_embeddings: the length a model was trained for, which dynamic starts from, and
            others where rope_parameters does not say it. Else of no effect.
        position_embedding_type: how a layer knows positions, one of "rope", "alibi", "t5", "fire",
            "xpos" and None (by its causality alone), as of zoo/layers/position_bias.py; a list has
            one entry for each layer. RoPE and xPos turn by position_ids; biases, and the decay of
            xPos, count the tokens of the document.
        alibi_bias_max: of "alibi", b in the slopes 2^(-b (h + 1) / H) of the heads h of H; where H
            is no power of two, those of the power below, and every second above it.
        alibi_scaled: of "alibi", multiply what is added by attention_scale too, as Falcon does.
        alibi_rounding: of "alibi", "bfloat16": slopes, and a slope times a key's place, are rounded
            to it, as Falcon does in whatever dtype; None: not.
        relative_attention_num_buckets: of "t5", buckets of distances with a learned bias per head.
        relative_attention_max_distance: of "t5", the distance from which on all are in one bucket.
        fire_mlp_width: of "fire", hidden units of its MLP.
        fire_init_c: of "fire", c at the start.
        fire_init_length: of "fire", L.
        xpos_scale_base: of "xpos", tokens of distance that multiply a score by zeta once: pairs of
            channels (2j, 2j + 1) are turned by rope_theta, and channels decay by
            zeta_j = (2j + 0.4 K) / (1.4 K).
        attention_scale: what a score is multiplied by; None: head_dim^-1/2.
        rope_extension: of layers with "rope", how a text longer than the model was trained for is
            read, without training: {"type": "rerope", "window"}, {"type": "leaky_rerope", "window",
            "factor"}, {"type": "self_extend", "window", "group_size"}, these also with
            "log_n_length", or {"type": "dual_chunk", "chunk_size", "local_window"}; see
            zoo/layers/rope_extension.py. The weights are the same, so `from_pretrained(folder,
            rope_extension={...})` has it of any model.
        sliding_window: W, the tokens a layer sees, the current one included; None: all.
        num_sink_tokens: S, first tokens of a document that stay visible.
        sink_distance: of sinks that have left the window: "cache", places in a cache of S sinks and
            W others (StreamingLLM); or a number, the same for all of them (LM-Infinite, whose code
            has at most sliding_window).
        learnable_sinks: a logit per head in the softmax that stands for no token.
    """

    model_type = "zoo_sliding_window"
    variants: ClassVar[dict[str, dict]] = {
        "default": {"sliding_window": 16, "num_key_value_heads": 2},
        "sinks": {"sliding_window": 16, "num_key_value_heads": 2, "num_sink_tokens": 3},
        "sinks-at-a-distance": {
            "sliding_window": 16,
            "num_key_value_heads": 2,
            "num_sink_tokens": 3,
            "sink_distance": 16,
        },
        "learnable-sinks": {"sliding_window": 16, "head_dim": 10, "learnable_sinks": True},
        "full": {"sliding_window": None, "num_key_value_heads": 2},
        "alibi": {
            "sliding_window": None,
            "num_key_value_heads": 2,
            "position_embedding_type": "alibi",
        },
        "t5": {
            "sliding_window": 16,
            "num_key_value_heads": 2,
            "position_embedding_type": "t5",
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 12,
            "attention_scale": 1.0,
        },
        "fire": {
            "sliding_window": 16,
            "position_embedding_type": "fire",
            "fire_init_length": 30,
        },
        "xpos-and-none": {
            "num_hidden_layers": 2,
            "sliding_window": None,
            "num_key_value_heads": 2,
            "position_embedding_type": ["xpos", None],
            "xpos_scale_base": 32,
        },
        "gpt-block": {
            "sliding_window": None,
            "hidden_act": "gelu_bloom",
            "gated_mlp": False,
            "mlp_bias": True,
            "attention_bias": True,
            "clip_qkv": 3.0,
            "norm_type": "layer",
            "norm_bias": True,
            "embedding_norm": True,
            "tie_word_embeddings": True,
            "position_embedding_type": "alibi",
            "alibi_scaled": True,
            "alibi_rounding": "bfloat16",
        },
        "rerope": {
            "sliding_window": None,
            "num_key_value_heads": 2,
            "rope_extension": {"type": "rerope", "window": 6, "log_n_length": 16},
        },
        "leaky-rerope": {
            "sliding_window": 16,
            "rope_extension": {"type": "leaky_rerope", "window": 6, "factor": 4},
        },
        "self-extend": {
            "sliding_window": None,
            "rope_extension": {"type": "self_extend", "window": 6, "group_size": 3},
        },
        "dual-chunk": {
            "sliding_window": None,
            "num_key_value_heads": 2,
            "rope_extension": {"type": "dual_chunk", "chunk_size": 9, "local_window": 3},
        },
    }

    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    gated_mlp: bool = True
    mlp_bias: bool = False
    attention_bias: bool = False
    clip_qkv: float | int | None = None
    norm_type: Literal["rms", "layer"] = "rms"
    norm_bias: bool = False
    embedding_norm: bool = False
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    rope_parameters: dict | None = None
    max_position_embeddings: int | None = None
    position_embedding_type: str | list[str | None] | None = "rope"
    alibi_bias_max: int | float = 8
    alibi_scaled: bool = False
    alibi_rounding: Literal["bfloat16"] | None = None
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    fire_mlp_width: int = 32
    fire_init_c: float = 0.1
    fire_init_length: int = 512
    xpos_scale_base: int = 512
    attention_scale: float | int | None = None
    rope_extension: dict | None = None
    sliding_window: int | None = 4096
    num_sink_tokens: int = 0
    sink_distance: Literal["cache"] | int = "cache"
    learnable_sinks: bool = False

    def __post_init__(self, **kwargs):
        fill_heads(self)
        if self.intermediate_size is None:
            self.intermediate_size = 7 * self.hidden_size // 2
        # transformers fills the rest of it in.
        has_rope = turns(self) or bool(self.rope_parameters)
        self.rope_parameters = dict(self.rope_parameters or {})
        super().__post_init__(**kwargs)
        if not has_rope:  # and that too, where no layer has a use for it
            self.rope_parameters = None

    @property
    def layer_type(self):
        """Of every layer: with a window, or without."""
        return softmax_layer_type(self.sliding_window)

    @property
    def state_is_list_of_tokens(self):
        """As in `ZooConfig`: with full attention, where keys do not count tokens."""
        return state_is_list_of_tokens(self)

    def validate_architecture(self):
        """Checks heads, window and what the rotation needs to know."""
        super().validate_architecture()
        check_head_dim(self)
        if self.hidden_act not in OWN_ACTIVATIONS:
            check_activation("hidden_act", self.hidden_act)
        check_key_value_heads(self)
        check_window(self.sliding_window)
        if self.num_sink_tokens < 0 or (self.num_sink_tokens and self.sliding_window is None):
            raise ValueError(
                "num_sink_tokens is at least 0, and 0 without a sliding_window (where every token "
                f"stays visible), got {self.num_sink_tokens}."
            )
        self.check_sink_distance()
        if self.norm_bias and self.norm_type == "rms":
            raise ValueError("norm_bias is of norm_type 'layer': RMSNorms have none; leave it out.")
        if self.clip_qkv is not None and not self.clip_qkv > 0:
            raise ValueError(
                f"clip_qkv is above 0, got {self.clip_qkv}; None leaves projections as they are."
            )
        check_position_fields(self)

    def check_sink_distance(self):
        """Raises a ValueError for a distance without sinks, or of layers that cannot have it."""
        if self.sink_distance == "cache":
            return
        types = {*position_types(self)}
        fits = type(self.sink_distance) is int and self.sink_distance > 0
        if not fits or not self.num_sink_tokens or not types <= {"rope", "alibi", "t5", None}:
            raise ValueError(
                "sink_distance is 'cache', or a number of tokens above 0 for num_sink_tokens in "
                f"layers of rope, alibi, t5 or none, got {self.sink_distance!r}, "
                f"{self.num_sink_tokens} sinks and {self.position_embedding_type!r}."
            )


class SlidingWindowBlock(ZooBlock):
    """Mistral's block, or GPT's."""

    build_norm = staticmethod(rms_or_layer_norm)

    @staticmethod
    def mlp_class(config):
        """With a gate or without."""
        return (GatedMLP if config.gated_mlp else PlainMLP)(config, bias=config.mlp_bias)

    @staticmethod
    def mixer_class(config, layer_idx):
        """Attention over a window and, if the config has them, sinks."""
        return softmax_mixer(
            config,
            layer_idx,
            num_sinks=config.num_sink_tokens,
            sink_distance=None if config.sink_distance == "cache" else config.sink_distance,
            has_sink_logits=config.learnable_sinks,
            bias=config.attention_bias,
            clip_qkv=config.clip_qkv,
        )


class SlidingWindowPreTrainedModel(SoftmaxPreTrainedModel):
    """Mistral's config and layers for transformers."""

    config: SlidingWindowConfig
    _no_split_modules = ["SlidingWindowBlock"]
    _can_record_outputs = {"hidden_states": SlidingWindowBlock}

    def get_correct_attn_implementation(self, requested_attention, is_init_check=False):
        """The implementation that was asked for, if it can compute these sinks; else banded."""
        if requested_attention is not None:
            config = self.config
            sinks = config.num_sink_tokens, config.learnable_sinks
            check_implementation(requested_attention, *sinks, position_types(config))
        return super().get_correct_attn_implementation(requested_attention, is_init_check)


class SlidingWindowModel(SlidingWindowPreTrainedModel, ZooModel):
    """Mistral's decoder."""

    block_class = SlidingWindowBlock
    build_norm = staticmethod(rms_or_layer_norm)

    def __init__(self, config):
        super().__init__(config)
        if config.embedding_norm:
            self.embed_norm = rms_or_layer_norm(config)
        self.rotation = RotaryPositions(config) if turns(config) else None
        self.post_init()

    def embed(self, embeds_BTD, sequence):
        """The norm on the embeddings."""
        return self.embed_norm(embeds_BTD) if self.config.embedding_norm else embeds_BTD

    def mixer_inputs(self, x_BTD, sequence):
        """The rotation of each position, and that of a query for the sinks, for layers that turn.

        A query's distance to a sink stops growing when the cache is full of S sinks and W others.
        """
        if self.rotation is None:
            return {}
        extension = self.config.rope_extension
        if extension is not None:
            return {"rotation": extended_rotation(self.rotation, extension, sequence.clock)}
        rotation = self.rotation(sequence.positions)
        if "xpos" not in position_types(self.config):
            rotation = StepRotation.if_step(rotation, sequence, x_BTD)
        inputs = {"rotation": rotation}
        if self.config.sink_distance != "cache":
            place_B1 = torch.full_like(sequence.positions[:, :1], self.config.sink_distance)
            inputs["sink_rotation"] = self.rotation(place_B1)
        elif self.config.num_sink_tokens:
            largest = self.config.num_sink_tokens + self.config.sliding_window - 1
            excess_BT = (sequence.clock - largest).clamp(min=0)
            inputs["sink_rotation"] = self.rotation(sequence.positions - excess_BT)
        return inputs


class SlidingWindowForCausalLM(SlidingWindowPreTrainedModel, ZooForCausalLM, GenerationMixin):
    """A sliding-window Transformer as a language model."""

    model_class = SlidingWindowModel

    def visible_tokens(self, length):
        """Of so many tokens, those the last one's logits depend on, [length] bool."""
        config, tokens_T = self.config, torch.arange(length)
        if config.sliding_window is None:
            return tokens_T >= 0
        reach = config.num_hidden_layers * (config.sliding_window - 1) + 1
        return (tokens_T >= length - reach) | (tokens_T < config.num_sink_tokens)


class SlidingWindowForSequenceClassification(
    SlidingWindowPreTrainedModel, ZooForSequenceClassification
):
    """A sliding-window Transformer as a classifier of texts."""

    model_class = SlidingWindowModel


class SlidingWindowForTokenClassification(SlidingWindowPreTrainedModel, ZooForTokenClassification):
    """A sliding-window Transformer as a classifier of tokens."""

    model_class = SlidingWindowModel


class SlidingWindowForQuestionAnswering(SlidingWindowPreTrainedModel, ZooForQuestionAnswering):
    """A sliding-window Transformer as a finder of answers in a text."""

    model_class = SlidingWindowModel


__all__ = [
    "SlidingWindowConfig",
    "SlidingWindowModel",
    "SlidingWindowForCausalLM",
    "SlidingWindowForSequenceClassification",
    "SlidingWindowForTokenClassification",
    "SlidingWindowForQuestionAnswering",
]
