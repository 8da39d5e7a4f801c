"""Lightning Attention-2 in its model, TransNormerLLM: linear attention with a decay per head.

Qin et al. 2024, "Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in
Large Language Models", https://arxiv.org/abs/2401.04658; the model is Qin et al. 2023,
"TransNormerLLM", https://arxiv.org/abs/2307.14995. With norm(x) = x / sqrt(mean(x^2) + eps), which
has no weight, and per head a slope s > 0:

    a = norm(x);  q = silu(W_q a),  k = silu(W_k a),  v = W_v a,  u = W_u a
    q, k = LRPE(q), LRPE(k) in the layers that have it:  [q cos(n theta), q sin(n theta)]
    o_n = sum_{m <= n} exp(-s (n - m)) (q_n . k_m) v_m                neither scaled nor normalised
    x = x + W_o (u * norm(o)),  norm over all heads
    c = norm(x);  x = x + W_down (W_gate c * W_up c)                  SGLU: no activation

The default follows the authors' released code (OpenNLPLab's TransNormerLLM for transformers), whose
weights load through `zoo convert transnormerllm`. Where it departs from the paper, this follows the
code: embeddings are multiplied with sqrt(D), and slopes are those of ALiBi, where the paper prints
another schedule (`LightningConfig.decay_schedule`).

MiniMax-Text-01 (https://arxiv.org/abs/2501.08313) has the same attention in other surroundings
(`LightningConfig.variants["minimax"]`, `zoo convert hf-minimax`): silu on the values too, a sigmoid
gate, norms with a weight, SwiGLU, and the block of zoo/layers/minimax_block.py, which makes hybrids
with softmax attention in some layers too.
"""

import functools
from typing import ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import GenerationMixin
from transformers import initialization as init
from transformers.activations import ACT2FN

from ..core.base import Constant, ZooForCausalLM, ZooModel, check_activation, in_range
from ..core.flops import linear_flops
from ..core.heads import (
    ZooForQuestionAnswering,
    ZooForSequenceClassification,
    ZooForTokenClassification,
)
from ..core.state import StateSpec
from ..layers.decay_slopes import check_slopes, log_decay
from ..layers.minimax_block import MiniMaxBlock, MiniMaxBlockConfig, MiniMaxBlockPreTrainedModel
from ..layers.mlp import GatedMLP
from ..layers.norms import WideRMSNorm
from ..layers.position_fields import position_types, turns
from ..layers.positions import RotaryPositions, StepRotation
from ..layers.rope_extension import extended_rotation
from ..layers.softmax_mixer import softmax_mixer
from ..layers.split_recurrence import linear_recurrence_of


@strict
class LightningConfig(MiniMaxBlockConfig):
    """The mathematics of lightning attention and its block. Defaults are TransNormerLLM's.

    Args, beside those of `MiniMaxBlockConfig`:
        head_dim: channels of a head; None: hidden_size / num_attention_heads.
        intermediate_size: width of the MLP; None: 2.75 * hidden_size, as in the released models.
        rms_norm_eps: epsilon of the norms but the next.
        out_norm_eps: epsilon of the norm of the output of all heads.
        norm_weight: a learned weight in every norm (MiniMax).
        decay_schedule: the slope s of each head and layer: "transnormer" (the released
            TransNormerLLMs), "minimax" or "paper", as in zoo/layers/decay_slopes.py.
        slopes: the slopes themselves, one list of H numbers >= 0 per layer, in the schedule's
            place.
        feature_act: activation of q and k, a name in transformers' ACT2FN.
        activate_values: the same activation on v (MiniMax).
        gate: "linear" (TransNormerLLM) or "sigmoid" (MiniMax).
        lrpe_layers: indices of the layers with LRPE, the rotation by learned angles that doubles
            the width of q and k; None: the first alone, as in the released TransNormerLLMs.
        hidden_act: activation of the MLP's gate, a name in ACT2FN; None: nothing (SGLU).
        bias: biases in all linear layers of the blocks.
        scale_embedding: embeddings times sqrt(hidden_size).
        initializer_range: standard deviation of fresh weights.
    """

    model_type = "zoo_lightning"
    variants: ClassVar[dict[str, dict]] = {
        "transnormer": {},
        "minimax": {
            "norm_weight": True,
            "rms_norm_eps": 1e-5,
            "decay_schedule": "minimax",
            "activate_values": True,
            "gate": "sigmoid",
            "lrpe_layers": [],
            "hidden_act": "silu",
            "scale_embedding": False,
            "residual_of_norm": True,
            "attention_alpha": 2.0,
            "mlp_alpha": 2.0,
        },
    }
    variants["hybrid"] = variants["minimax"] | {
        "num_hidden_layers": 3,
        "softmax_layers": [1],
        "num_key_value_heads": 2,
        "softmax_beta": 0.5,
    }
    variants["hybrid-window"] = variants["hybrid"] | {
        "softmax_layers": [0, 2],
        "sliding_window": 16,
        "rope_parameters": {"partial_rotary_factor": 0.5},
    }
    variants["hybrid-rerope"] = variants["hybrid"] | {
        "rope_extension": {"type": "rerope", "window": 6, "log_n_length": 16},
    }
    variants["hybrid-alibi"] = variants["hybrid"] | {"position_embedding_type": "alibi"}
    variants["hybrid-list"] = variants["hybrid-window"] | {
        "position_embedding_type": ["t5", None, "rope"],
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 12,
        "attention_scale": 0.5,
    }

    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    out_norm_eps: float = 1e-6
    norm_weight: bool = False
    decay_schedule: Literal["transnormer", "minimax", "paper"] = "transnormer"
    slopes: list[list[float]] | None = None
    feature_act: str = "silu"
    activate_values: bool = False
    gate: Literal["linear", "sigmoid"] = "linear"
    lrpe_layers: list[int] | None = None
    hidden_act: str | None = None
    bias: bool = False
    scale_embedding: bool = True
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if self.head_dim is None:
            heads = max(self.num_attention_heads, 1)
            self.head_dim = self.hidden_size // heads if self.hidden_size % heads == 0 else 0
        if self.intermediate_size is None:
            self.intermediate_size = round(2.75 * self.hidden_size)
        if self.lrpe_layers is None:
            self.lrpe_layers = [0] if 0 not in (self.softmax_layers or []) else []
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Checks heads, layers of each kind, slopes and activations."""
        super().validate_architecture()
        if self.head_dim < 1:
            raise ValueError(
                "hidden_size is a multiple of num_attention_heads unless head_dim is given, "
                f"got {self.hidden_size}, {self.num_attention_heads} and head_dim {self.head_dim}."
            )
        self.check_layers("lrpe_layers")
        self.check_layers("softmax_layers")
        check_slopes(self)
        check_activation("feature_act", self.feature_act)
        if self.hidden_act is not None:
            check_activation("hidden_act", self.hidden_act)
        both = sorted(set(self.lrpe_layers) & set(self.softmax_layers))
        if both:
            raise ValueError(
                f"layers {both} are in lrpe_layers and in softmax_layers, which know positions in "
                "other ways; take them out of one."
            )
        self.check_softmax_layers()


class Norm(WideRMSNorm):
    """x / sqrt(mean(x^2) + eps), and a weight if the config has one."""

    def __init__(self, config, size, eps):
        super().__init__(size, eps=eps, elementwise_affine=config.norm_weight)


class LightningAttention(nn.Module):
    """Linear attention whose heads forget at fixed rates, normalised over all heads, gated."""

    exchanges = True

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.head_shape = config.num_attention_heads, config.head_dim
        width, size = config.hidden_size, config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(width, size, bias=config.bias)
        self.k_proj = nn.Linear(width, size, bias=config.bias)
        self.v_proj = nn.Linear(width, size, bias=config.bias)
        self.gate_proj = nn.Linear(width, size, bias=config.bias)
        self.out_proj = nn.Linear(size, width, bias=config.bias)
        self.out_norm = Norm(config, size, config.out_norm_eps)
        self.act = ACT2FN[config.feature_act]
        self.has_lrpe = layer_idx in config.lrpe_layers
        if self.has_lrpe:
            self.lrpe_theta = nn.Parameter(torch.empty(self.head_shape))
        self.log_decay = Constant(functools.partial(log_decay, config, layer_idx))

    def init_weights_of_paper(self):
        """Angles from 1 to nearly 1e-8 over the channels of all heads."""
        if self.has_lrpe:
            steps = torch.arange(self.lrpe_theta.numel(), dtype=torch.float64)
            theta = 10000 ** (-2 * steps / len(steps))
            init.copy_(self.lrpe_theta, theta.view(self.head_shape))

    def state_specs(self):
        """The memory S: one [K, V] matrix per head, of twice the keys where there is LRPE."""
        heads, head_dim = self.head_shape
        key_dim = head_dim * (2 if self.has_lrpe else 1)
        return {"memory_BHKV": StateSpec((heads, key_dim, head_dim))}

    def flops_per_token(self, length):
        """Of its matrices, and of the memory, which is written and read."""
        heads, head_dim = self.head_shape
        return linear_flops(self) + 4 * heads * head_dim * head_dim * (2 if self.has_lrpe else 1)

    def rotate(self, x_BTHK, positions_BT):
        """LRPE: [B, T, H, K] to [B, T, H, 2 K]; scores then see differences of positions only."""
        # A position of a million times an angle of one: too much for float32.
        wide = torch.float32 if x_BTHK.device.type == "mps" else torch.float64
        radians_BTHK = positions_BT[..., None, None] * self.lrpe_theta.to(wide)
        turned = radians_BTHK.cos().to(x_BTHK.dtype), radians_BTHK.sin().to(x_BTHK.dtype)
        return torch.cat([x_BTHK * factor for factor in turned], dim=-1)

    def forward(self, x_BTD, sequence, state):
        """Mixes a sequence [B, T, D]; returns it with the state after it."""
        q_BTHK, k_BTHK, v_BTHV = (
            projection(x_BTD).unflatten(-1, self.head_shape)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_BTHK, k_BTHK = self.act(q_BTHK), self.act(k_BTHK)
        if self.config.activate_values:
            v_BTHV = self.act(v_BTHV)
        if self.has_lrpe:
            q_BTHK = self.rotate(q_BTHK, sequence.positions)
            k_BTHK = self.rotate(k_BTHK, sequence.positions)
        y_BTHV, state.memory_BHKV = linear_recurrence_of(sequence, x_BTD, "memory_BHKV")(
            q_BTHK,
            k_BTHK,
            in_range(v_BTHV),
            self.log_decay(x_BTD.device),
            initial_state=state.memory_BHKV,
            output_final_state=state.is_kept,
            cu_seqlens=sequence.cu_seqlens,
        )
        gate_BTD = self.gate_proj(x_BTD)
        if self.config.gate == "sigmoid":
            gate_BTD = gate_BTD.sigmoid()
        return self.out_proj(gate_BTD * self.out_norm(y_BTHV.flatten(2)).to(gate_BTD.dtype)), state


class LightningBlock(MiniMaxBlock):
    """A pre-norm block; with MiniMax's options, its residual is the normalised input."""

    @staticmethod
    def mlp_class(config):
        """SGLU, or what hidden_act says."""
        return GatedMLP(config, bias=config.bias)

    @staticmethod
    def mixer_class(config, layer_idx):
        """Lightning attention, or what stands in its place in this layer."""
        if layer_idx in config.softmax_layers:
            return softmax_mixer(config, layer_idx, bias=config.bias)
        return LightningAttention(config, layer_idx)

    def build_norm(self, config):
        """The norms before attention and MLP."""
        return Norm(config, config.hidden_size, config.rms_norm_eps)


class LightningPreTrainedModel(MiniMaxBlockPreTrainedModel):
    """The config, layers and initialisation for transformers."""

    config: LightningConfig
    _no_split_modules = ["LightningBlock"]
    _can_record_outputs = {"hidden_states": LightningBlock}


class LightningModel(LightningPreTrainedModel, ZooModel):
    """The decoder."""

    block_class = LightningBlock

    def __init__(self, config):
        super().__init__(config)
        has_rotation = config.softmax_layers and turns(config)
        self.rotation = RotaryPositions(config) if has_rotation else None
        self.post_init()

    def mixer_inputs(self, x_BTD, sequence):
        """The rotation of each position, for the layers with softmax attention."""
        if self.rotation is None:
            return {}
        extension = self.config.rope_extension
        if extension is not None:
            return {"rotation": extended_rotation(self.rotation, extension, sequence.clock)}
        rotation = self.rotation(sequence.positions)
        if "xpos" not in position_types(self.config):
            rotation = StepRotation.if_step(rotation, sequence, x_BTD)
        return {"rotation": rotation}

    def build_norm(self, config):
        """The norm after the last block."""
        return Norm(config, config.hidden_size, config.rms_norm_eps)

    def embed(self, embeds_BTD, sequence):
        """The scale of the embeddings."""
        scale = self.config.hidden_size**0.5 if self.config.scale_embedding else 1.0
        return embeds_BTD * scale


class LightningForCausalLM(LightningPreTrainedModel, ZooForCausalLM, GenerationMixin):
    """TransNormerLLM as a language model."""

    model_class = LightningModel


class LightningForSequenceClassification(LightningPreTrainedModel, ZooForSequenceClassification):
    """TransNormerLLM as a classifier of texts."""

    model_class = LightningModel


class LightningForTokenClassification(LightningPreTrainedModel, ZooForTokenClassification):
    """TransNormerLLM as a classifier of tokens."""

    model_class = LightningModel


class LightningForQuestionAnswering(LightningPreTrainedModel, ZooForQuestionAnswering):
    """TransNormerLLM as a finder of answers in a text."""

    model_class = LightningModel


__all__ = [
    "LightningConfig",
    "LightningModel",
    "LightningForCausalLM",
    "LightningForSequenceClassification",
    "LightningForTokenClassification",
    "LightningForQuestionAnswering",
]
