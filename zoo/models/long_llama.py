"""LongLLaMA, the Focused Transformer: some layers see the keys of all earlier windows, as they are.

Tworkowski et al. 2023, "Focused Transformer: Contrastive Training for Context Scaling",
https://arxiv.org/abs/2307.03170. A document is cut into windows of L tokens, counted from its own
start. All layers attend inside a window, with RoPE at positions that restart in each; those with a
memory do so, in the same softmax, to the keys of all earlier windows too, which are not turned
(zoo/layers/focused_attention.py). A memory's distance does not grow with the text: a model goes on
finding what is many times further back than anything it was trained on.

The architecture has no parameters of its own: it is Llama's, and the published weights
(syzymon/long_llama_3b and others) load through `zoo convert longllama`. Their code cuts a prompt
into windows from its end, so that what it computes depends on how long that is and on padding; this
counts them from the text's start, which equals their code where its cut is the same.

Options of ours: the last C windows alone (`memory_windows`), which makes the state constant, and
the keys with the largest scores alone (`memory_top_k`), as the paper has it and the published code
does not. The choice of these is discontinuous: whole and pieces, or 16 bits and 32, may choose
otherwise where two scores are as close as their rounding is, and agree where they choose the same.
Training as in the paper, with windows of other documents as negatives, is an option of the layers:
`train_across_batch` of zoo/layers/cross_batch.py.
"""

from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin

from ..core.base import (
    ZooBlock,
    ZooConfig,
    ZooForCausalLM,
    ZooModel,
    ZooPreTrainedModel,
    check_activation,
    check_head_dim,
)
from ..core.heads import (
    ZooForQuestionAnswering,
    ZooForSequenceClassification,
    ZooForTokenClassification,
)
from ..core.state import GrowingStateLayer, SlidingStateLayer
from ..layers.focused_attention import FocusedAttention
from ..layers.mlp import GatedMLP
from ..layers.positions import StepRotation, check_rope_parameters
from ..layers.segment_attention import SegmentAttention, SlotRotation
from ..layers.softmax_attention import check_key_value_heads, fill_heads


@strict
class LongLlamaConfig(ZooConfig):
    """The mathematics of LongLLaMA in Llama's block.

    Args:
        intermediate_size: MLP width; None: 4 times hidden_size.
        num_key_value_heads: heads of keys and values, each shared by a group of query heads; None:
            num_attention_heads.
        head_dim: width of a head; None: hidden_size / num_attention_heads.
        segment_length: L, tokens per window (max_position_embeddings of the published models).
        memory_layers: indices of the layers with a memory; None: one, in the middle.
        memory_windows: C, how many earlier windows a memory keeps; None: all, and the state grows.
        memory_top_k: of a memory's keys, how many each query and head sees; None: all.
        hidden_act: activation of the MLP's gate.
        rms_norm_eps: epsilon of the norms.
        rope_parameters: as in `SlidingWindowConfig`; positions count from the start of a window.
        max_position_embeddings: as in `SlidingWindowConfig`.
        initializer_range: standard deviation of matrices and embeddings at the start.
    """

    model_type = "zoo_long_llama"
    hybrids: ClassVar[str] = (
        "leave them out, and name the layers with a memory in memory_layers; "
        "LightningConfig(softmax_layers=...) has layers of attention and of linear attention."
    )
    variants: ClassVar[dict[str, dict]] = {
        "default": {
            "segment_length": 16,
            "num_key_value_heads": 2,
            "num_hidden_layers": 2,
            "memory_layers": [1],
        },
        "windows": {
            "segment_length": 16,
            "num_hidden_layers": 2,
            "memory_layers": [0, 1],
            "memory_windows": 2,
        },
        "top-k": {
            "segment_length": 16,
            "num_key_value_heads": 2,
            "num_hidden_layers": 2,
            "memory_layers": [1],
            "memory_top_k": 5,
        },
    }

    num_key_value_heads: int | None = None
    head_dim: int | None = None
    segment_length: int = 2048
    memory_layers: list[int] | None = None
    memory_windows: int | None = None
    memory_top_k: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_parameters: dict | None = None
    max_position_embeddings: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        fill_heads(self)
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.memory_layers is None:
            self.memory_layers = [self.num_hidden_layers // 2]
        # transformers fills the rest of it in.
        self.rope_parameters = dict(self.rope_parameters or {})
        super().__post_init__(**kwargs)

    @property
    def layer_types(self):
        """As in `ZooConfig`; a memory of all windows grows."""
        grows = self.memory_layers if self.memory_windows is None else []
        return [
            (GrowingStateLayer if layer in grows else SlidingStateLayer)._layer_type
            for layer in range(self.num_hidden_layers)
        ]

    @layer_types.setter
    def layer_types(self, value):
        ZooConfig.layer_types.fset(self, value)

    def validate_architecture(self):
        """Checks heads, windows, layers with a memory and what the rotation needs to know."""
        super().validate_architecture()
        check_head_dim(self)
        check_activation("hidden_act", self.hidden_act)
        check_key_value_heads(self)
        check_rope_parameters(self)
        for name in ("segment_length", "memory_windows", "memory_top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                hint = "" if name == "segment_length" else "; None is all of the memory"
                raise ValueError(f"{name} is at least 1, got {value}{hint}.")
        layers, count = self.memory_layers, self.num_hidden_layers
        if len({*layers}) < len(layers) or not all(0 <= layer < count for layer in layers):
            raise ValueError(
                f"memory_layers are different numbers from 0 to {count - 1}, got {layers}."
            )
        if not layers and (self.memory_windows or self.memory_top_k):
            raise ValueError(
                "memory_windows and memory_top_k are about layers with a memory, and memory_layers "
                "is []; leave them out."
            )


class LongLlamaBlock(ZooBlock):
    """Llama's block."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.has_memory = layer_idx in config.memory_layers

    @staticmethod
    def mixer_class(config, layer_idx):
        """With a memory, or without."""
        has_memory = layer_idx in config.memory_layers
        return (FocusedAttention if has_memory else SegmentAttention)(config, layer_idx)

    @staticmethod
    def mlp_class(config):
        """SwiGLU, or what hidden_act says."""
        return GatedMLP(config)

    def forward(self, x_BTD, sequence, state, rotation, table):
        """As of `ZooBlock`; the places of a whole window are for layers with a memory."""
        inputs = {"table": table} if self.has_memory else {}
        return super().forward(x_BTD, sequence, state, rotation=rotation, **inputs)


class LongLlamaPreTrainedModel(ZooPreTrainedModel):
    """The config and layers for transformers."""

    config: LongLlamaConfig
    _no_split_modules = ["LongLlamaBlock"]
    _can_record_outputs = {"hidden_states": LongLlamaBlock}
    # To transformers a full graph goes with a cache of one size, and `generate` compiles by itself.
    _can_compile_fullgraph = False


class LongLlamaModel(LongLlamaPreTrainedModel, ZooModel):
    """The decoder."""

    block_class = LongLlamaBlock

    def __init__(self, config):
        super().__init__(config)
        self.rotation = SlotRotation(config)
        self.post_init()

    def mixer_inputs(self, x_BTD, sequence):
        """The rotation of each token by its place in its window, and that of every place."""
        rotation = self.rotation(sequence.clock % self.config.segment_length)
        rotation = StepRotation.if_step(rotation, sequence, x_BTD)
        return {"rotation": rotation, "table": self.rotation.table(x_BTD.device)}


class LongLlamaForCausalLM(LongLlamaPreTrainedModel, ZooForCausalLM, GenerationMixin):
    """LongLLaMA as a language model."""

    model_class = LongLlamaModel

    def visible_tokens(self, length):
        """Of so many tokens, those the last one's logits depend on, [length] bool.

        With memory_top_k those they depend on in any case; `choosable_tokens` may be chosen.
        """
        segment = self.config.segment_length
        begin = (length - 1) // segment * segment
        if self.config.memory_top_k is None:
            return self.choosable_tokens(length)
        return torch.arange(length) >= begin

    def choosable_tokens(self, length):
        """Of so many tokens, those the last one's logits may depend on, [length] bool."""
        config, layers = self.config, len(self.config.memory_layers)
        window = (length - 1) // config.segment_length
        reach = window if config.memory_windows is None else layers * config.memory_windows
        first = max(0, window - (reach if layers else 0))
        return torch.arange(length) >= first * config.segment_length


class LongLlamaForSequenceClassification(LongLlamaPreTrainedModel, ZooForSequenceClassification):
    """LongLLaMA as a classifier of texts."""

    model_class = LongLlamaModel


class LongLlamaForTokenClassification(LongLlamaPreTrainedModel, ZooForTokenClassification):
    """LongLLaMA as a classifier of tokens."""

    model_class = LongLlamaModel


class LongLlamaForQuestionAnswering(LongLlamaPreTrainedModel, ZooForQuestionAnswering):
    """LongLLaMA as a finder of answers in a text."""

    model_class = LongLlamaModel


__all__ = [
    "LongLlamaConfig",
    "LongLlamaModel",
    "LongLlamaForCausalLM",
    "LongLlamaForSequenceClassification",
    "LongLlamaForTokenClassification",
    "LongLlamaForQuestionAnswering",
]
