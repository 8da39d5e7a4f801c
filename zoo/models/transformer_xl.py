"""Transformer-XL: attention to the own segment and to a memory of the tokens before it.

Dai et al. 2019, https://arxiv.org/abs/1901.02860, as its authors' PyTorch code has it. Per head, d
= i - j tokens from a key back to the query's own, u and t learned [H, K]:

    s_ij = ((q_i + u) . k_j + (q_i + t) . r_d) / sqrt(K)
    r_d  = W_r [sin(d w), cos(d w)],  w_j = 10000^(-2j / D), d at most clamp_len if that is above 0
    o_i  = softmax_j(s_ij) v_j

Which keys a token sees is one of two things. With `same_length`, as the authors evaluate and all
published models run, the last mem_len tokens, its own included: nothing knows of segments. Without,
as they train, its own segment up to itself and the mem_len tokens before that, so that the last
token of a segment sees more than the first. Segments have `segment_length` tokens, counted from a
document's own start. In both, no gradient goes through the hidden states of earlier segments, as
the authors train (`detaches_memory` of the mixer).

Blocks are post-norm (LayerNorm after the residual sum; `pre_lnorm`: before), with biases in the MLP
alone, and no norm is last. Embeddings are scaled by sqrt(D), and the output projection is the
embedding, unscaled, with a bias. `cutoffs` and `div_val` make both adaptive
(zoo/layers/adaptive_softmax.py): logits are then log-probabilities, as in the class that
transformers had.

`zero_memory`: before a text lie mem_len zero vectors, which are not masked. The authors' TensorFlow
code, from which all published weights come, and transformers began so; their PyTorch code begins
with nothing. A zero vector has a zero key and value, but a place: it adds exp((q + t) . r_d /
sqrt(K)) to the denominator.

`num_memory_tokens` makes the Recurrent Memory Transformer of that paper's own experiments (Bulatov
et al. 2022, https://arxiv.org/abs/2207.06881) of it: zoo/layers/relative_frames.py.

The cache holds each layer's inputs, as the authors' does: half of what keys and values would be.
`BlockRecurrentConfig(num_states=0)` is another model, meliad's baseline "Slide". Weights load
through `zoo convert transformer-xl`, `transfo-xl-hf` and `rmt-lmrmt`.
"""

import functools
from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import GenerationMixin
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ..core.base import Constant, ZooConfig, check_head_dim
from ..core.heads import (
    ZooForQuestionAnswering,
    ZooForSequenceClassification,
    ZooForTokenClassification,
)
from ..core.memory_walk import MemoryTokens, walked
from ..core.segment_passes import Joined
from ..core.state import SlidingStateLayer
from ..kernels.recurrence_steps import takes_plain_step
from ..layers.adaptive_models import (
    AdaptiveForCausalLM,
    AdaptiveModel,
    AdaptivePreTrainedModel,
    check_clusters,
    fill_clusters,
)
from ..layers.relative_attention import QueryBiases
from ..layers.relative_frames import (
    TransformerXLFrameBlock,
    check_memory_tokens,
    frame_walk,
    reach_in_frame,
)
from ..layers.relative_scores import sinusoids
from ..layers.transformer_xl_block import TransformerXLBlock

_SMALL = {"mem_len": 16, "segment_length": 16}


@strict
class TransformerXLConfig(ZooConfig):
    """The mathematics of Transformer-XL.

    Args:
        intermediate_size: MLP width; None: four times hidden_size.
        head_dim: width of a head; None: hidden_size / num_attention_heads.
        mem_len: with same_length how many tokens a token sees, its own included; without, how many
            before its segment.
        same_length: whether every token sees as many.
        segment_length: L, tokens of a segment: without same_length what a token sees depends on it,
            and in both where gradients stop.
        clamp_len: distances from this on count as this; 0 or less: none do.
        zero_memory: whether zero vectors lie before a text.
        num_memory_tokens: m, of the Recurrent Memory Transformer; 0: it is none.
        read_memory_from_cache: whether tokens of memory, too, see the mem_len tokens before a
            segment.
        untie_r: whether each layer has its own u and t.
        pre_lnorm: norms before mixer and MLP instead of after the sums.
        d_embed: width of the first cluster's words; None: hidden_size.
        cutoffs: first ids of the clusters after the first; none: one plain table.
        div_val: each cluster's words are that many times narrower than the one's before.
        tie_projs: for each cluster, whether its projection in the softmax is the embedding's; None:
            for all but the first.
        layer_norm_epsilon: epsilon of the norms.
        initializer_range: standard deviation of weights at the start; norms' are around 1.
    """

    model_type = "zoo_transformer_xl"
    layer_type: ClassVar[str] = SlidingStateLayer._layer_type
    hidden_act: ClassVar[str] = "relu"  # of the MLP
    variants: ClassVar[dict[str, dict]] = {
        "default": _SMALL,
        "segments": {
            "mem_len": 12,
            "segment_length": 16,
            "same_length": False,
            "clamp_len": 10,
            "pre_lnorm": True,
            "zero_memory": True,
            "head_dim": 12,
            "untie_r": False,
        },
        "adaptive": _SMALL
        | {"zero_memory": True, "clamp_len": 9, "cutoffs": [12, 45], "div_val": 2},
        "memory-tokens": {"mem_len": 10, "segment_length": 16, "same_length": False}
        | {"num_memory_tokens": 3, "read_memory_from_cache": True},
    }

    head_dim: int | None = None
    mem_len: int = 512
    same_length: bool = True
    segment_length: int = 512
    clamp_len: int = -1
    zero_memory: bool = False
    num_memory_tokens: int = 0
    read_memory_from_cache: bool = False
    untie_r: bool = True
    pre_lnorm: bool = False
    d_embed: int | None = None
    cutoffs: list[int] | None = None
    div_val: int = 1
    tie_projs: list[bool] | None = None
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.head_dim is None and self.hidden_size % self.num_attention_heads == 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        fill_clusters(self)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Checks heads, memory, segments and clusters."""
        super().validate_architecture()
        check_head_dim(self)
        if self.hidden_size % 2:
            raise ValueError(
                "hidden_size is even, as half of a distance's vector are sines and half cosines, "
                f"got {self.hidden_size}."
            )
        least = 1 if self.same_length or self.zero_memory else 0
        if self.mem_len < least:
            raise ValueError(
                f"mem_len is at least {least}, got {self.mem_len}; a token counts itself with "
                "same_length, and without it 0 is no memory, of which none can be zero."
            )
        if self.segment_length < 1:
            raise ValueError(f"segment_length is at least 1 token, got {self.segment_length}.")
        check_memory_tokens(self)
        check_clusters(self)

    @property
    def frame_width(self):
        """Tokens of a segment, those of memory included."""
        return self.segment_length + 2 * self.num_memory_tokens

    @property
    def num_slots(self):
        """How many tokens a token sees at most, its own included."""
        return self.mem_len + (0 if self.same_length else self.frame_width)

    @property
    def num_distances(self):
        """How many of them are at distances that differ, as far as scores know."""
        return min(self.num_slots, self.clamp_len + 1) if self.clamp_len > 0 else self.num_slots

    @property
    def zeros_end(self):
        """The clock from which on no token sees zeros before a text."""
        if self.same_length:
            return self.mem_len - 1
        return -(-self.mem_len // self.segment_length) * self.segment_length

    def reach(self, clock):
        """The largest distance that tokens at these clocks see."""
        if self.same_length:
            return self.mem_len - 1
        return reach_in_frame(self, clock)


class TransformerXLPreTrainedModel(AdaptivePreTrainedModel):
    """The config and layers for transformers."""

    config: TransformerXLConfig
    _no_split_modules = ["TransformerXLBlock", "TransformerXLFrameBlock"]
    # transformers keeps this by class, so it has to hold with tokens of memory and without.
    _can_record_outputs = {
        "hidden_states": [
            OutputRecorder(TransformerXLBlock, index=0),
            OutputRecorder(Joined, index=0),
        ]
    }


class TransformerXLModel(TransformerXLPreTrainedModel, AdaptiveModel):
    """The decoder."""

    block_class = TransformerXLBlock

    def __init__(self, config):
        if config.num_memory_tokens:
            self.block_class = TransformerXLFrameBlock
        super().__init__(config)
        self.joined, self.memory = Joined(), None
        self.walks_segments = bool(config.num_memory_tokens)
        if config.num_memory_tokens:  # of the variance that norms leave of them
            self.memory = MemoryTokens(config, std=1.0)
        count = functools.partial(sinusoids, config.hidden_size, config.num_distances)
        self.sinusoids = Constant(count)
        self.query_biases = None if config.untie_r else QueryBiases(config)
        self.post_init()

    def build_norm(self, config):
        """No norm is last."""
        return nn.Identity()

    def embed(self, embeds_BTD, sequence):
        """The scale of the embeddings."""
        return embeds_BTD * self.config.hidden_size**0.5

    def mixer_inputs(self, x_BTD, sequence):
        """The sinusoids, and u and t where layers share them."""
        sinusoids_ED = self.sinusoids(x_BTD.device)
        is_step = not self.config.zero_memory and takes_plain_step(sequence, x_BTD)
        if is_step and sequence.common_clock is not None:
            # No key is farther away.
            sinusoids_ED = sinusoids_ED[: sequence.common_clock + 1]
        inputs = {"sinusoids_ED": sinusoids_ED.to(x_BTD.dtype)}
        if not self.config.untie_r:
            inputs["biases"] = self.query_biases()
        return inputs

    def _run_blocks(self, *args, **kwargs):
        run = self._run_frames if self.memory is not None else super()._run_blocks
        return run(*args, **kwargs)

    @capture_outputs
    def _run_frames(self, x_BTD, sequence, cache, inputs, **kwargs):
        """The stack segment by segment, with tokens of memory around each."""
        if not all(layer.mixer.detaches_memory for layer in self.layers):
            self._check_checkpointing()  # gradients go from segment to segment through states
        return walked(self, frame_walk(self), x_BTD, sequence, cache, inputs, **kwargs)


class TransformerXLForCausalLM(TransformerXLPreTrainedModel, AdaptiveForCausalLM, GenerationMixin):
    """Transformer-XL as a language model."""

    model_class = TransformerXLModel

    def visible_tokens(self, length):
        """Of so many tokens, those the last one's logits depend on, [length] bool."""
        if self.config.num_memory_tokens:  # all of them, through memory
            return torch.ones(length, dtype=torch.bool)
        begin = length - 1
        for _ in range(self.config.num_hidden_layers):
            begin = max(begin - self.config.reach(begin), 0)
        return torch.arange(length) >= begin


class TransformerXLForSequenceClassification(
    TransformerXLPreTrainedModel, ZooForSequenceClassification
):
    """Transformer-XL as a classifier of texts."""

    model_class = TransformerXLModel


class TransformerXLForTokenClassification(TransformerXLPreTrainedModel, ZooForTokenClassification):
    """Transformer-XL as a classifier of tokens."""

    model_class = TransformerXLModel


class TransformerXLForQuestionAnswering(TransformerXLPreTrainedModel, ZooForQuestionAnswering):
    """Transformer-XL as a finder of answers in a text."""

    model_class = TransformerXLModel


__all__ = [
    "TransformerXLConfig",
    "TransformerXLModel",
    "TransformerXLForCausalLM",
    "TransformerXLForSequenceClassification",
    "TransformerXLForTokenClassification",
    "TransformerXLForQuestionAnswering",
]
