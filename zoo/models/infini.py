"""Infini-Transformer: attention inside a segment, and a memory of all segments before it.

Munkhdalai, Faruqui and Gopal 2024, "Leave No Context Behind", https://arxiv.org/abs/2404.07143.
A document is cut into segments of L tokens, counted from its own start. With sigma(x) = ELU(x) + 1,
per head, for segment s with queries, keys and values Q, K, V:

    A_local = softmax(RoPE(Q) RoPE(K)^T / sqrt(K), causal) V    positions restart in every segment
    A_mem   = sigma(Q) M_{s-1} / (sigma(Q) z_{s-1})             equation 7: read before written
    M_s     = M_{s-1} + sigma(K)^T V                            equation 8, "linear"
    M_s     = M_{s-1} + sigma(K)^T (V - sigma(K) M_{s-1} / (sigma(K) z_{s-1}))    9, "delta"
    z_s     = z_{s-1} + sum_n sigma(K_n)
    A       = sigmoid(g) A_mem + (1 - sigmoid(g)) A_local       equation 10, g learned per head

The memory sees no positions. In the first segment it is empty and reads as 0; the local part is
scaled by 1 - sigmoid(g) there too. The authors published no code; this follows their equations,
with sqrt(K), the width of a head, where equation 6 prints that of the model. Gradients flow through
the memory, as the paper trains. Around the attention is Llama's block, as in Beomi's public code,
whose weights load through `zoo convert infini-beomi`; those of lucidrains' package through
`infini-lucidrains`. What we found of its memory is in hub_cards/infini.md. The local part may have
biases by distance in the place of RoPE, or nothing (`position_embedding_type`), which is ours.
"""

from typing import ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import GenerationMixin
from transformers import initialization as init

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
from ..core.state import SlidingStateLayer, StateSpec
from ..kernels.export_scan import without_autocast
from ..layers.compressive_memory import memory_figures, recall, remember_step
from ..layers.memory_slices import SliceMemory, bring_segment
from ..layers.mlp import GatedMLP
from ..layers.norms import llama_or_gemma_norm
from ..layers.position_fields import check_position_fields, position_types, turns
from ..layers.positions import RotaryPositions, StepRotation
from ..layers.segment_attention import SegmentAttention
from ..layers.softmax_attention import check_key_value_heads, fill_heads

# Of the local part; FIRE, which counts the tokens of a document, is not for segments.
LOCAL_TYPES = ("rope", "alibi", "t5", "xpos", None)


@strict
class InfiniConfig(ZooConfig):
    """The mathematics of Infini-attention in a block like Llama's.

    Args:
        intermediate_size: MLP width; None: 4 times hidden_size, as in the paper.
        num_key_value_heads: heads of keys, values and memory, each shared by a group of query
            heads; None: num_attention_heads.
        head_dim: width of a head; None: hidden_size / num_attention_heads.
        segment_length: L, tokens per segment.
        memory_update: "linear" (equation 8), "delta" (equation 9), or "none": local attention
            alone, the same model with the memory off.
        gates_first_segment: whether the local part is scaled by 1 - sigmoid(g) while the memory is
            still empty; the paper does not exempt it, lucidrains' package does.
        learned_update: scale what a token writes by a learned 1 - sigmoid(w . x) per head, an
            addition of lucidrains' package.
        gate_init: g at the start. 0, an even mixture, in Beomi's code.
        hidden_act: activation of the MLP's gate.
        mlp_bias: biases in the MLP.
        lm_head_bias: a bias on the logits.
        rms_norm_eps: epsilon of the norms.
        norm_adds_one: norms multiply with 1 + weight (Gemma).
        scale_embedding: embeddings times sqrt(hidden_size) (Gemma).
        rope_parameters: as in `SlidingWindowConfig`; positions count from the start of a segment.
        max_position_embeddings: as in `SlidingWindowConfig`.
        position_embedding_type: of the local part, as in `SlidingWindowConfig` but for "fire"; a
            list has one entry for each layer. Distances are inside a segment.
        alibi_bias_max, relative_attention_num_buckets, relative_attention_max_distance,
            xpos_scale_base: as there.
        attention_scale: of the local part, as there.
        initializer_range: standard deviation of matrices and embeddings at the start.
    """

    model_type = "zoo_infini"
    layer_type: ClassVar[str] = SlidingStateLayer._layer_type
    variants: ClassVar[dict[str, dict]] = {
        "linear": {"segment_length": 16, "num_key_value_heads": 2},
        "delta": {"segment_length": 16, "memory_update": "delta"},
        "none": {"segment_length": 16, "memory_update": "none"},
        "lucidrains": {
            "segment_length": 16,
            "memory_update": "delta",
            "gates_first_segment": False,
            "learned_update": True,
            "gate_init": -10.0,
            "hidden_act": "gelu",
            "mlp_bias": True,
            "lm_head_bias": True,
        },
        "gemma": {
            "segment_length": 16,
            "num_key_value_heads": 1,
            "head_dim": 20,
            "hidden_act": "gelu_pytorch_tanh",
            "norm_adds_one": True,
            "scale_embedding": True,
            "tie_word_embeddings": True,
        },
        "alibi": {
            "segment_length": 16,
            "num_key_value_heads": 2,
            "position_embedding_type": "alibi",
        },
        "t5-and-none": {
            "segment_length": 16,
            "memory_update": "delta",
            "num_hidden_layers": 2,
            "position_embedding_type": ["t5", None],
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 12,
            "attention_scale": 0.5,
        },
    }

    num_key_value_heads: int | None = None
    head_dim: int | None = None
    segment_length: int = 2048
    memory_update: Literal["linear", "delta", "none"] = "linear"
    gates_first_segment: bool = True
    learned_update: bool = False
    gate_init: float = 0.0
    hidden_act: str = "silu"
    mlp_bias: bool = False
    lm_head_bias: bool = False
    rms_norm_eps: float = 1e-6
    norm_adds_one: bool = False
    scale_embedding: bool = False
    rope_parameters: dict | None = None
    max_position_embeddings: int | None = None
    position_embedding_type: str | list[str | None] | None = "rope"
    alibi_bias_max: int | float = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    xpos_scale_base: int = 512
    attention_scale: float | int | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        fill_heads(self)
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        has_rope = turns(self) or bool(self.rope_parameters)
        # transformers fills the rest of it in.
        self.rope_parameters = dict(self.rope_parameters or {})
        super().__post_init__(**kwargs)
        if not has_rope:  # and that too, where no layer has a use for it
            self.rope_parameters = None

    def validate_architecture(self):
        """Checks heads, segment and what the rotation needs to know."""
        super().validate_architecture()
        check_head_dim(self)
        if self.segment_length < 1:
            raise ValueError(f"segment_length is at least 1, got {self.segment_length}.")
        if self.memory_update == "none" and (self.learned_update or not self.gates_first_segment):
            raise ValueError(
                "learned_update and gates_first_segment are about the memory, and memory_update is "
                "'none'; leave them out."
            )
        check_activation("hidden_act", self.hidden_act)
        check_key_value_heads(self)
        check_position_fields(self, LOCAL_TYPES)


class InfiniAttention(SegmentAttention):
    """Causal attention in the segment and a compressive memory, mixed by a gate per head.

    Attributes:
        detaches_memory: whether gradients stop at segments' ends, as in Beomi's code. How to train,
            not part of the model: set it on the instance.
    """

    detaches_memory = False
    exchanges = True

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.layer_idx = layer_idx
        self.has_memory = config.memory_update != "none"
        if self.has_memory:
            self.gate = nn.Parameter(torch.empty(self.num_heads))
        if config.learned_update:
            self.update_proj = nn.Linear(config.hidden_size, self.num_groups, bias=False)

    def init_weights_of_paper(self):
        """The gate; matrices as transformers does for any linear layer."""
        if self.has_memory:
            init.constant_(self.gate, self.config.gate_init)

    def state_specs(self):
        """As of `SegmentAttention`, the memory, and the sums of the unfinished segment."""
        specs = super().state_specs()
        if self.has_memory:
            memory = StateSpec((self.num_groups, self.head_dim, self.head_dim + 1))
            specs |= {"memory_BHKV": memory, "partial_BHKV": memory}
        return specs

    def flops_per_token(self, length):
        """As of `SegmentAttention`, and of the memory.

        A head's query reads that, a key writes it, and with equation 9 reads it before.
        """
        update, size = self.config.memory_update, self.head_dim
        times = {"none": 0, "linear": self.num_heads + self.num_groups}
        times["delta"] = times["linear"] + self.num_groups
        return super().flops_per_token(length) + 2 * times[update] * size * (size + 1)

    def forward(self, x_BTD, sequence, state, rotation=None, table=None):
        """Mixes a sequence [B, T, D]; returns it with the state after it.

        Args:
            x_BTD: the tokens.
            sequence: how they lie.
            state: before them.
            rotation: (cos, sin) of each token's place in its segment, for types that turn.
            table: the same of every place, in a slice.
        """
        slot = self.common_slot(x_BTD, sequence, state)
        if slot is not None:
            y_B1HV = self.step(x_BTD, sequence.common_clock, slot, state, rotation)
            return self.out_proj(y_B1HV.to(x_BTD.dtype).flatten(2)), state
        q_BTHK, k_BTHK, v_BTHV = self.project(x_BTD)
        strength_BTH = None
        if self.config.learned_update:
            strength_BTH = 1 - self.update_proj(x_BTD).sigmoid()
        tokens, held = (k_BTHK, v_BTHV, strength_BTH), None
        if sequence.ranks is not None:
            held = self.bring_segments(*tokens, sequence, state, table)
        segments, memory_update = self.segments(sequence, state), self.config.memory_update
        y_SHQV = self.attend(q_BTHK, k_BTHK, v_BTHV, segments, rotation)
        if self.has_memory:
            memory = segments if held is None else SliceMemory(segments, held, self.layer_idx)
            with without_autocast(q_BTHK):
                memory_SHKV = memory.remember(k_BTHK, v_BTHV, memory_update, strength_BTH)
                if self.detaches_memory:
                    memory_SHKV = memory_SHKV.detach()
                recalled_SHQV = recall(segments.queries(q_BTHK), memory_SHKV)
            y_SHQV = self.mix(recalled_SHQV, y_SHQV, segments.is_first)
        y_BTHV = segments.join(y_SHQV.transpose(1, 2))
        if strength_BTH is not None and torch.is_grad_enabled():
            # Where no segment is read again, a gradient of zero: training on several devices waits
            # for one of every parameter.
            y_BTHV = y_BTHV + 0 * strength_BTH.sum().to(y_BTHV.dtype)
        return self.out_proj(y_BTHV.flatten(2)), state

    def step(self, x_B1D, clock, slot, state, rotation):
        """One token of each row, at the same clock and in the same slot; [B, 1, H, V]."""
        config, (q_B1HK, k_B1HK, v_B1HV) = self.config, self.project(x_B1D)
        y_B1HV = self.local_step(q_B1HK, k_B1HK, v_B1HV, slot, state, rotation)
        if not self.has_memory:
            return y_B1HV
        strength_B1H = None
        if config.learned_update:
            strength_B1H = 1 - self.update_proj(x_B1D).sigmoid()
        recalled_B1HV, state.memory_BHKV, state.partial_BHKV = remember_step(
            q_B1HK,
            k_B1HK,
            v_B1HV,
            state.memory_BHKV,
            state.partial_BHKV,
            slot == config.segment_length - 1,
            config.memory_update == "delta",
            strength_B1H,
        )
        share_H1 = self.gate.sigmoid()[:, None].to(y_B1HV.dtype)
        if clock < config.segment_length and not config.gates_first_segment:
            return torch.addcmul(y_B1HV, recalled_B1HV, share_H1)
        return torch.lerp(y_B1HV, recalled_B1HV, share_H1)

    def bring_segments(self, k_BTHK, v_BTHV, strength_BTH, sequence, state, table):
        """A slice: the unfinished segments before it, as the state holds them and as written.

        Returns:
            As of `bring_segment`, of keys without positions, values and strengths.
        """
        if not self.has_memory:
            strength_BTH = None
        elif strength_BTH is not None:
            strength_BTH = strength_BTH[..., None]
        tokens = k_BTHK, v_BTHV, strength_BTH
        held = bring_segment(tokens, sequence, self.config.segment_length)
        state.keys_BLHK, state.values_BLHV = self.turned(held[0], table), held[1]
        return held

    def mix(self, recalled_SHQV, local_SHQV, is_first_S):
        """Equation 10."""
        share_H11 = self.gate.sigmoid()[:, None, None].to(recalled_SHQV.dtype)
        kept_H11 = 1 - share_H11
        if not self.config.gates_first_segment:
            kept_H11 = torch.where(is_first_S, 1.0, kept_H11)
        mixed_SHQV = share_H11 * recalled_SHQV + kept_H11 * local_SHQV
        return mixed_SHQV.to(local_SHQV.dtype)


class InfiniBlock(ZooBlock):
    """Llama's block around Infini-attention."""

    mixer_class = InfiniAttention
    build_norm = staticmethod(llama_or_gemma_norm)

    @staticmethod
    def mlp_class(config):
        """SwiGLU, or what hidden_act says."""
        return GatedMLP(config, bias=config.mlp_bias)


class InfiniPreTrainedModel(ZooPreTrainedModel):
    """The config and layers for transformers."""

    config: InfiniConfig
    _no_split_modules = ["InfiniBlock"]
    _can_record_outputs = {"hidden_states": InfiniBlock}


class InfiniModel(InfiniPreTrainedModel, ZooModel):
    """The decoder."""

    block_class = InfiniBlock
    build_norm = staticmethod(llama_or_gemma_norm)

    def __init__(self, config):
        super().__init__(config)
        self.rotation = RotaryPositions(config) if turns(config) else None
        self.post_init()

    def mixer_inputs(self, x_BTD, sequence):
        """The rotation of each token by its place in its segment."""
        if self.rotation is None:
            return {}
        length = self.config.segment_length
        rotation = self.rotation(sequence.clock % length)
        if "xpos" not in position_types(self.config):
            rotation = StepRotation.if_step(rotation, sequence, x_BTD)
        inputs = {"rotation": rotation}
        if sequence.ranks is not None:
            slots_L = torch.arange(length, device=x_BTD.device)
            inputs["table"] = self.rotation(slots_L[None])
        return inputs

    def embed(self, embeds_BTD, sequence):
        """The scale of the embeddings."""
        return embeds_BTD * (self.config.hidden_size**0.5 if self.config.scale_embedding else 1.0)


class InfiniForCausalLM(InfiniPreTrainedModel, ZooForCausalLM, GenerationMixin):
    """Infini-Transformer as a language model."""

    model_class = InfiniModel

    def __init__(self, config):
        super().__init__(config)
        if config.lm_head_bias:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
            self.post_init()

    def visible_tokens(self, length):
        """Of so many tokens, those the last one's logits depend on, [length] bool."""
        segment = self.config.segment_length
        begin = (length - 1) // segment * segment if self.config.memory_update == "none" else 0
        return torch.arange(length) >= begin

    @torch.no_grad()
    def diagnostics(self, past_key_values=None):
        """What to watch in training: the memory's share in each layer, and how full it is.

        Args:
            past_key_values: a cache after some text; None: gates alone.

        Returns:
            As of `memory_figures`; {} without a memory.
        """
        if self.config.memory_update == "none":
            return {}
        gates = [layer.mixer.gate for layer in self.model.layers]
        # Weights in shards (FSDP2) are gathered, from all processes.
        gates = [getattr(gate, "full_tensor", lambda gate=gate: gate)() for gate in gates]
        return memory_figures(gates, past_key_values)


class InfiniForSequenceClassification(InfiniPreTrainedModel, ZooForSequenceClassification):
    """Infini-Transformer as a classifier of texts."""

    model_class = InfiniModel


class InfiniForTokenClassification(InfiniPreTrainedModel, ZooForTokenClassification):
    """Infini-Transformer as a classifier of tokens."""

    model_class = InfiniModel


class InfiniForQuestionAnswering(InfiniPreTrainedModel, ZooForQuestionAnswering):
    """Infini-Transformer as a finder of answers in a text."""

    model_class = InfiniModel


__all__ = [
    "InfiniConfig",
    "InfiniModel",
    "InfiniForCausalLM",
    "InfiniForSequenceClassification",
    "InfiniForTokenClassification",
    "InfiniForQuestionAnswering",
]
