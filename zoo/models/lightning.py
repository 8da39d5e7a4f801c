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
gate, norms with a weight, SwiGLU, and a residual stream of normalised inputs,
alpha norm(x) + beta f(norm(x)). There every eighth layer has softmax attention instead, which is
that of `zoo/models/sliding_window.py`: `softmax_layers` makes such hybrids, whose state grows with
the text unless `sliding_window` bounds it.
"""

import functools
import math
from typing import ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import GenerationMixin
from transformers import initialization as init
from transformers.activations import ACT2FN

from ..core.base import (
    Constant,
    ZooBlock,
    ZooConfig,
    ZooForCausalLM,
    ZooForSequenceClassification,
    ZooModel,
    check_activation,
    in_range,
)
from ..core.state import StateSpec
from ..kernels.linear_recurrence import linear_recurrence
from ..layers.mlp import GatedMLP
from ..layers.positions import RotaryPositions, check_rope_parameters
from ..layers.softmax_attention import (
    OUR_IMPLEMENTATIONS,
    SoftmaxAttention,
    SoftmaxPreTrainedModel,
    check_key_value_heads,
    check_window,
    softmax_layer_type,
)


@strict
class LightningConfig(ZooConfig):
    """The mathematics of lightning attention and its block. Defaults are TransNormerLLM's.

    Args:
        head_dim: channels of a head; None: hidden_size / num_attention_heads.
        intermediate_size: width of the MLP; None: 2.75 * hidden_size, as in the released models.
        rms_norm_eps: epsilon of the norms but the next.
        out_norm_eps: epsilon of the norm of the output of all heads.
        norm_weight: a learned weight in every norm (MiniMax).
        decay_schedule: the slope s of head h of H, counted from 0, in layer l of L:
            "transnormer": ALiBi's slopes, 2^(-8 (h + 1) / H) where H is a power of two and between
                those of the nearest powers elsewhere, times 1 - l / (L - 1) + 1e-5. The released
                TransNormerLLMs.
            "minimax": 2^(-8 (h + 1) / H), whatever H, times 1 - l / (L - 1 + 1e-5) + 1e-5.
                MiniMax-Text-01 and M1.
            "paper": (8 h / H) (1 - l / L), which leaves head 0 without a decay. What the
                TransNormerLLM paper prints, and fla's `lightning_attn`.
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
        residual_of_norm: the residual stream goes on from the normalised input (MiniMax).
        attention_alpha: factor on the residual stream where lightning attention is added.
        attention_beta: factor on what lightning attention adds.
        mlp_alpha: factor on the residual stream where the MLP is added.
        mlp_beta: factor on what the MLP adds.
        softmax_layers: indices of the layers with softmax attention instead; MiniMax-Text-01 has
            every eighth, list(range(7, 80, 8)). The fields below are theirs, and None without them.
        softmax_alpha: factor on the residual stream where softmax attention is added; None:
            attention_alpha.
        softmax_beta: factor on what softmax attention adds; None: attention_beta.
        num_key_value_heads: heads of keys and values; None: num_attention_heads.
        rope_parameters: as in `SlidingWindowConfig`; MiniMax-Text-01 turns half of each head:
            {"rope_theta": 10e6, "partial_rotary_factor": 0.5}.
        max_position_embeddings: as in `SlidingWindowConfig`.
        sliding_window: tokens softmax attention sees, the current one included; None: all.
        initializer_range: standard deviation of fresh weights.
    """

    model_type = "zoo_lightning"
    hybrids: ClassVar[str] = "leave them out, and name the layers with softmax in softmax_layers."
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
    residual_of_norm: bool = False
    attention_alpha: float = 1.0
    attention_beta: float = 1.0
    mlp_alpha: float = 1.0
    mlp_beta: float = 1.0
    softmax_layers: list[int] | None = None
    softmax_alpha: float | None = None
    softmax_beta: float | None = None
    num_key_value_heads: int | None = None
    rope_parameters: dict | None = None
    max_position_embeddings: int | None = None
    sliding_window: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if self.head_dim is None:
            heads = max(self.num_attention_heads, 1)
            self.head_dim = self.hidden_size // heads if self.hidden_size % heads == 0 else 0
        if self.intermediate_size is None:
            self.intermediate_size = round(2.75 * self.hidden_size)
        if self.softmax_layers is None:
            self.softmax_layers = []
        if self.lrpe_layers is None:
            self.lrpe_layers = [0] if 0 not in self.softmax_layers else []
        if self.softmax_layers:
            if self.num_key_value_heads is None:
                self.num_key_value_heads = self.num_attention_heads
            if self.softmax_alpha is None:
                self.softmax_alpha = self.attention_alpha
            if self.softmax_beta is None:
                self.softmax_beta = self.attention_beta
            # transformers fills the rest of it in.
            self.rope_parameters = dict(self.rope_parameters or {})
        has_rope = self.rope_parameters is not None
        super().__post_init__(**kwargs)
        if not has_rope:  # transformers fills that in too
            self.rope_parameters = None

    def to_dict(self):
        """As in `ZooConfig`; what only softmax layers have stays out where it says nothing.

        Other libraries count on a number of key heads that is there to be one.
        """
        values = super().to_dict()
        return {n: x for n, x in values.items() if x is not None or n not in SOFTMAX_FIELDS}

    @property
    def layer_types(self):
        """As in `ZooConfig`; those of `softmax_layers` have a cache of another kind."""
        softmax = softmax_layer_type(self.sliding_window)
        layers = range(self.num_hidden_layers)
        return [softmax if i in self.softmax_layers else self.layer_type for i in layers]

    @layer_types.setter
    def layer_types(self, value):
        ZooConfig.layer_types.fset(self, value)

    def validate_architecture(self):
        """Checks heads, layers with LRPE, slopes and activations."""
        super().validate_architecture()
        if self.head_dim < 1:
            raise ValueError(
                "hidden_size is a multiple of num_attention_heads unless head_dim is given, "
                f"got {self.hidden_size}, {self.num_attention_heads} and head_dim {self.head_dim}."
            )
        layers, heads = self.num_hidden_layers, self.num_attention_heads
        for name in ("lrpe_layers", "softmax_layers"):
            if not all(0 <= layer < layers for layer in getattr(self, name)):
                raise ValueError(
                    f"{name} are indices from 0 to {layers - 1}, got {getattr(self, name)}."
                )
        if self.slopes is not None:
            sizes = [len(row) for row in self.slopes]
            if sizes != [heads] * layers or min(map(min, self.slopes)) < 0:
                raise ValueError(
                    f"slopes are {heads} numbers >= 0 for each of {layers} layers, got lists of "
                    f"{sizes} with a minimum of {min(map(min, self.slopes), default=None)}."
                )
        for name in ("feature_act", "hidden_act"):
            value = getattr(self, name)
            if (name, value) != ("hidden_act", None):
                check_activation(name, value)
        self._validate_softmax_layers()

    def _validate_softmax_layers(self):
        both = sorted(set(self.lrpe_layers) & set(self.softmax_layers))
        if both:
            raise ValueError(
                f"layers {both} are in lrpe_layers and in softmax_layers, which have RoPE; take "
                "them out of one."
            )
        if not self.softmax_layers:
            set_fields = [name for name in SOFTMAX_FIELDS if getattr(self, name) is not None]
            if set_fields:
                raise ValueError(
                    f"{', '.join(set_fields)}: for layers with softmax attention, got no "
                    "softmax_layers; name those layers, or leave this out."
                )
            return
        check_key_value_heads(self)
        check_window(self.sliding_window)
        check_rope_parameters(self)


SOFTMAX_FIELDS = (
    "softmax_alpha",
    "softmax_beta",
    "num_key_value_heads",
    "rope_parameters",
    "max_position_embeddings",
    "sliding_window",
)


def alibi_slopes(num_heads):
    """2^(-8 (h + 1) / H) for H a power of two; else the power below, then every second above it."""
    power = 2 ** int(math.log2(num_heads))
    slopes = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    between = [2 ** (-8 * (h + 1) / (2 * power)) for h in range(0, 2 * power, 2)]
    return slopes + between[: num_heads - power]


def log_decay(config, layer_idx):
    """-slope of each head of a layer, [H] in float64; see `LightningConfig.decay_schedule`."""
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    if config.slopes is not None:
        slopes = config.slopes[layer_idx]
    elif config.decay_schedule == "paper":
        slopes = [8 * h / heads * (1 - layer_idx / layers) for h in range(heads)]
    elif config.decay_schedule == "minimax":
        depth = layer_idx / (layers - 1 + 1e-5)
        slopes = [2 ** (-8 * (h + 1) / heads) * (1 - depth + 1e-5) for h in range(heads)]
    else:
        depth = layer_idx / max(layers - 1, 1)  # theirs divides by 0 where there is one layer
        slopes = [slope * (1 - depth + 1e-5) for slope in alibi_slopes(heads)]
    return -torch.tensor(slopes, dtype=torch.float64)


class Norm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps), and a weight if the config has one.

    In the dtype of its input, which may be wider than the weight's.
    """

    def __init__(self, config, size, eps):
        super().__init__(size, eps=eps, elementwise_affine=config.norm_weight)

    def forward(self, x_BTD):
        """[B, T, D] to the same."""
        weight = None if self.weight is None else self.weight.to(x_BTD.dtype)
        return nn.functional.rms_norm(x_BTD, self.normalized_shape, weight, self.eps)


class LightningAttention(nn.Module):
    """Linear attention whose heads forget at fixed rates, normalised over all heads, gated."""

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
        y_BTHV, state.memory_BHKV = linear_recurrence(
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


class LightningBlock(ZooBlock):
    """A pre-norm block; with MiniMax's options, its residual is the normalised input."""

    @staticmethod
    def mlp_class(config):
        """SGLU, or what hidden_act says."""
        return GatedMLP(config, bias=config.bias)

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.config = config
        self.is_softmax = layer_idx in config.softmax_layers
        self.alpha, self.beta = config.attention_alpha, config.attention_beta
        if self.is_softmax:
            self.alpha, self.beta = config.softmax_alpha, config.softmax_beta

    @staticmethod
    def mixer_class(config, layer_idx):
        """Lightning attention, or what stands in its place in this layer."""
        if layer_idx in config.softmax_layers:
            return SoftmaxAttention(config, layer_idx, bias=config.bias)
        return LightningAttention(config, layer_idx)

    def build_norm(self, config):
        """The norms before attention and MLP."""
        return Norm(config, config.hidden_size, config.rms_norm_eps)

    def forward(self, x_BTD, sequence, state, rotation=None):
        """Returns (x_BTD, state); the state that came in is left as it was."""
        config = self.config
        normed_BTD = self.mixer_norm(x_BTD)
        inputs = {"rotation": rotation} if self.is_softmax else {}
        y_BTD, state = self.mixer(normed_BTD, sequence, state.copy(), **inputs)
        x_BTD = normed_BTD if config.residual_of_norm else x_BTD
        x_BTD = self.alpha * x_BTD + self.beta * y_BTD
        normed_BTD = self.mlp_norm(x_BTD)
        x_BTD = normed_BTD if config.residual_of_norm else x_BTD
        return config.mlp_alpha * x_BTD + config.mlp_beta * self.mlp(normed_BTD), state


class LightningPreTrainedModel(SoftmaxPreTrainedModel):
    """The config, layers and initialisation for transformers."""

    config: LightningConfig
    _no_split_modules = ["LightningBlock"]
    _can_record_outputs = {"hidden_states": LightningBlock}

    def get_correct_attn_implementation(self, requested_attention, is_init_check=False):
        """The implementation of softmax attention that was asked for, if there is any."""
        ours = (None, *OUR_IMPLEMENTATIONS)
        if not self.config.softmax_layers and requested_attention not in ours:
            raise ValueError(
                "attn_implementation is about layers with softmax attention, got "
                f"{requested_attention!r} and no softmax_layers; leave it out."
            )
        return super().get_correct_attn_implementation(requested_attention, is_init_check)


class LightningModel(LightningPreTrainedModel, ZooModel):
    """The decoder."""

    block_class = LightningBlock

    def __init__(self, config):
        super().__init__(config)
        self.rotation = RotaryPositions(config) if config.softmax_layers else None
        self.post_init()

    def mixer_inputs(self, x_BTD, sequence):
        """The rotation of each position, for the layers with softmax attention."""
        return {"rotation": self.rotation(sequence.positions)} if self.rotation else {}

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
    """TransNormerLLM as a classifier."""

    model_class = LightningModel


__all__ = [
    "LightningConfig",
    "LightningModel",
    "LightningForCausalLM",
    "LightningForSequenceClassification",
]
