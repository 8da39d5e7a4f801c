"""RetNet: a Transformer whose attention is a retention.

Sun et al. 2023, "Retentive Network: A Successor to Transformer for Large Language Models",
https://arxiv.org/abs/2307.08621. The default follows the authors' code, torchscale's
`RetNetDecoder`; its weights load through `zoo convert torchscale-retnet`. Per head, with decay
gamma and position n inside the document (eq. 5 and section 2.3):

    q_n, k_n rotated by n theta;  S_n = gamma S_{n-1} + k_n v_n^T
    o_n = q_n^T S_n / sqrt(s_n),   s_n = sum_{i <= n} gamma^i       (section 2.1, normalisation)
    y   = W_o (swish(W_g x) * norm_head(o))

Where the code departs from the paper, this follows the code: the norm of a head is a root mean
square without mean, bias or weight, where the paper says GroupNorm; theta runs from 1 to exactly
1/10000, where RoPE stops one step short; the scale of scores sits on the keys. The code also
divides scores by their absolute row sum, outside of the gradient, in its parallel mode only. The
head norm cancels that factor but for its epsilon, and the recurrent mode has none, so there is none
here: every way of running this model equals the authors' recurrent mode. What is another model in
flash-linear-attention, whose options are here, is said in zoo/hub/convert/fla_retnet.py.
"""

import functools
import math
from typing import ClassVar, Literal, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import GenerationMixin
from transformers import initialization as init

from ..core.base import Constant, ZooConfig, ZooForCausalLM, ZooModel, check_activation, in_range
from ..core.flops import linear_flops
from ..core.heads import (
    ZooForQuestionAnswering,
    ZooForSequenceClassification,
    ZooForTokenClassification,
)
from ..core.state import StateSpec
from ..kernels.recurrence_steps import decayed_step, takes_plain_step
from ..layers.norms import WideRMSNorm
from ..layers.positions import StepRotation, rotate
from ..layers.split_recurrence import linear_recurrence_of
from ..layers.torchscale_block import MLP, TorchscaleBlock, TorchscalePreTrainedModel, deepnorm_
from ..layers.xpos import Rotation


@strict
class RetNetConfig(ZooConfig):
    """RetNet's mathematics. Defaults are the paper's and torchscale's.

    Args:
        key_size: width of q and k over all heads; None: hidden_size.
        value_size: width of v and the gate over all heads; None: twice hidden_size.
        intermediate_size: MLP width; None: twice hidden_size.
        rms_norm_eps: epsilon of the norms.
        num_key_value_heads: fewer heads for k and v, each shared by a group of query heads
            (fla's option); None: num_attention_heads.
        decay_schedule: "power": gamma_h = 1 - 2^(-5-h) (paper section 2.3, all published weights);
            "log": 1 - exp(linspace(log 1/32, log 1/512, H)), the paper's larger language models.
        rotation: "interleaved": pairs (2j, 2j+1), angles 10000^-linspace(0, 1, K/2) (torchscale);
            "half": pairs (j, j + K/2), angles 10000^(-2j/K) (fla).
        normalize_retention: divide o_n by sqrt(s_n).
        head_norm_weight: a learned weight [V] in the norm of a head, shared by the heads (fla).
        gated_mlp: down(act(gate x) * up x), without biases; else down(norm(act(up x))) with biases
            and, unless deepnorm, a LayerNorm inside (torchscale's sub-LayerNorm).
        hidden_act: activation of the MLP.
        pre_norm: norms before mixer and MLP and after the last block; else after each residual sum.
        deepnorm: residual times (2L)^(1/4), and initialisation divided by (8L)^(1/4)
            (Wang et al. 2022). The authors use it with pre_norm=False.
        scale_embedding: embeddings times sqrt(hidden_size).
        embedding_norm: a norm on the embeddings.
        dropout: probability after the embeddings, the mixer and the MLP, in training.
        activation_dropout: probability inside the MLP, in training.
    """

    model_type = "zoo_retnet"
    variants: ClassVar[dict[str, dict]] = {
        "torchscale": {},
        "deepnorm": {
            "deepnorm": True,
            "pre_norm": False,
            "scale_embedding": True,
            "embedding_norm": True,
        },
        "plain-mlp": {"gated_mlp": False, "decay_schedule": "log"},
        "fla": {
            "rotation": "half",
            "normalize_retention": False,
            "head_norm_weight": True,
            "hidden_act": "silu",
        },
    }

    key_size: int | None = None
    value_size: int | None = None
    num_key_value_heads: int | None = None
    rms_norm_eps: float = 1e-6
    decay_schedule: Literal["power", "log"] = "power"
    rotation: Literal["interleaved", "half"] = "interleaved"
    normalize_retention: bool = True
    head_norm_weight: bool = False
    gated_mlp: bool = True
    hidden_act: str = "gelu"
    pre_norm: bool = True
    deepnorm: bool = False
    scale_embedding: bool = False
    embedding_norm: bool = False
    dropout: float = 0.0
    activation_dropout: float = 0.0

    def __post_init__(self, **kwargs):
        if self.key_size is None:
            self.key_size = self.hidden_size
        if self.value_size is None:
            self.value_size = 2 * self.hidden_size
        if self.intermediate_size is None:
            self.intermediate_size = 2 * self.hidden_size
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Checks that widths divide into heads and heads into groups."""
        super().validate_architecture()
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if self.key_size % (2 * heads) or self.value_size % heads:
            raise ValueError(
                "key_size is a multiple of 2 * num_attention_heads (rotation turns pairs) and "
                f"value_size of num_attention_heads, got {self.key_size} and {self.value_size} "
                f"with {heads} heads; change the sizes or the heads."
            )
        if groups < 1 or heads % groups:
            raise ValueError(
                "num_attention_heads is a multiple of num_key_value_heads, "
                f"got {heads} and {groups}."
            )
        check_activation("hidden_act", self.hidden_act)
        for name in ("dropout", "activation_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is a probability in [0, 1), got {getattr(self, name)}.")


def log_decay(config):
    """log gamma of each head, [H] in float64 (paper section 2.3)."""
    num_heads = config.num_attention_heads
    if config.decay_schedule == "power":
        return torch.log1p(-(2 ** (-5 - torch.arange(num_heads, dtype=torch.float64))))
    steps = torch.linspace(math.log(1 / 32), math.log(1 / 512), num_heads, dtype=torch.float64)
    return torch.log1p(-steps.exp())


class HeadRMSNorm(WideRMSNorm):
    """The norm of a head."""


class Retention(nn.Module):
    """Multi-scale retention, section 2.3: heads that forget at different rates, then a gate."""

    exchanges = True

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.num_groups = config.num_key_value_heads
        self.key_dim = config.key_size // self.num_heads
        self.value_dim = config.value_size // self.num_heads
        self.q_proj = nn.Linear(config.hidden_size, config.key_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.num_groups * self.key_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.num_groups * self.value_dim, bias=False)
        self.gate_proj = nn.Linear(config.hidden_size, config.value_size, bias=False)
        self.out_proj = nn.Linear(config.value_size, config.hidden_size, bias=False)
        self.head_norm = HeadRMSNorm(
            self.value_dim, config.rms_norm_eps, elementwise_affine=config.head_norm_weight
        )
        self.log_decay = Constant(functools.partial(log_decay, config))

    def init_weights_of_paper(self):
        """torchscale: Xavier with gain 2^-2.5, for the output 2^-1; deepnorm scales two of them."""
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.gate_proj):
            init.xavier_uniform_(projection.weight, gain=2**-2.5)
        init.xavier_uniform_(self.out_proj.weight, gain=2**-1)
        deepnorm_(self.config, self.v_proj.weight, self.out_proj.weight)

    def state_specs(self):
        """The memory S: one [K, V] matrix per head."""
        return {"memory_BHKV": StateSpec((self.num_heads, self.key_dim, self.value_dim))}

    def flops_per_token(self, length):
        """Of its matrices, and of the memory, which is written and read."""
        return linear_flops(self) + 4 * self.num_heads * self.key_dim * self.value_dim

    def project(self, x_BTD, rotation):
        """Queries, keys (rotated), values and gates, one row of each per head."""
        q_BTHK = self.q_proj(x_BTD).unflatten(-1, (self.num_heads, self.key_dim))
        k_BTHK = self.k_proj(x_BTD).unflatten(-1, (self.num_groups, self.key_dim))
        v_BTHV = self.v_proj(x_BTD).unflatten(-1, (self.num_groups, self.value_dim))
        gate_BTHV = self.gate_proj(x_BTD).unflatten(-1, (self.num_heads, self.value_dim))
        interleaved = self.config.rotation == "interleaved"
        q_BTHK = rotate(q_BTHK, *rotation, interleaved)
        k_BTHK = rotate(k_BTHK * self.key_dim**-0.5, *rotation, interleaved)
        if self.num_groups < self.num_heads:
            repeats = self.num_heads // self.num_groups
            k_BTHK, v_BTHV = (x.repeat_interleave(repeats, dim=2) for x in (k_BTHK, v_BTHV))
        return q_BTHK, k_BTHK, v_BTHV, gate_BTHV

    def normalize(self, q_BTHK, log_decay_H, clock_BT):
        """q_n / sqrt(s_n), with s_n = sum_{i <= n} gamma^i = (1 - gamma^(n+1)) / (1 - gamma).

        On the query, so that o_n is of order one when it is rounded to the model's dtype.
        """
        dtype = torch.promote_types(q_BTHK.dtype, torch.float32)
        log_decay_H = log_decay_H.to(dtype)
        count_BT = clock_BT[..., None].to(dtype) + 1
        s_BTH = torch.expm1(count_BT * log_decay_H) / torch.expm1(log_decay_H)
        return (q_BTHK * s_BTH.rsqrt()[..., None]).to(q_BTHK.dtype)

    def forward(self, x_BTD, sequence, state, rotation):
        """Mixes a sequence [B, T, D]; returns it with the state after it."""
        if isinstance(rotation, RetentionStep):
            return self.step(x_BTD, state, rotation)
        q_BTHK, k_BTHK, v_BTHV, gate_BTHV = self.project(x_BTD, rotation)
        log_decay_H = self.log_decay(x_BTD.device)
        if self.config.normalize_retention:
            q_BTHK = self.normalize(q_BTHK, log_decay_H, sequence.clock)
        y_BTHV, state.memory_BHKV = linear_recurrence_of(sequence, x_BTD, "memory_BHKV")(
            q_BTHK,
            k_BTHK,
            # The output is as large as three projections multiplied: too large for fp16's range.
            in_range(v_BTHV),
            log_decay_H,
            initial_state=state.memory_BHKV,
            output_final_state=state.is_kept,
            cu_seqlens=sequence.cu_seqlens,
        )
        y_BTHV = self.head_norm(y_BTHV).to(gate_BTHV.dtype)
        return self.out_proj((y_BTHV * nn.functional.silu(gate_BTHV)).flatten(2)), state

    def step(self, x_BTD, state, shared):
        """`forward` of one token of each row, where all layers share what its position says."""
        shape, (heads, groups) = x_BTD.shape[:2], (self.num_heads, self.num_groups)
        q_BTHK = shared.q.turn(self.q_proj(x_BTD).view(*shape, heads, self.key_dim))
        k_BTHK = shared.k.turn(self.k_proj(x_BTD).view(*shape, groups, self.key_dim))
        v_BTHV = self.v_proj(x_BTD).view(*shape, groups, self.value_dim)
        if groups < heads:
            k_BTHK, v_BTHV = (x.repeat_interleave(heads // groups, dim=2) for x in (k_BTHK, v_BTHV))
        y_BTHV, memory_BHKV = decayed_step(
            q_BTHK, k_BTHK, v_BTHV, shared.decay_H11, None, state.memory_BHKV
        )
        if state.is_kept:
            state.memory_BHKV = memory_BHKV
        y_BTHV = self.head_norm(y_BTHV.to(in_range(v_BTHV).dtype))
        gate_BTD = nn.functional.silu(self.gate_proj(x_BTD))
        return self.out_proj(y_BTHV.to(gate_BTD.dtype).view(gate_BTD.shape) * gate_BTD), state


class RetentionStep(NamedTuple):
    """What a step's position says to every layer.

    Attributes:
        q, k: the `StepRotation`s, with the scale of keys and the normalisation of queries.
        decay_H11: gamma of each head.
    """

    q: StepRotation
    k: StepRotation
    decay_H11: torch.Tensor


class RetNetBlock(TorchscaleBlock):
    """torchscale's block around retention, with dropout."""

    mixer_class = Retention
    mlp_class = MLP

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.dropout = nn.Dropout(config.dropout)

    def added(self, y_BTD):
        """What mixer and MLP add, with dropout."""
        return self.dropout(y_BTD) if self.dropout.training else y_BTD


class RetNetPreTrainedModel(TorchscalePreTrainedModel):
    """RetNet's config, layers and initialisation for transformers."""

    config: RetNetConfig
    _no_split_modules = ["RetNetBlock"]
    _can_record_outputs = {"hidden_states": RetNetBlock}


class RetNetModel(RetNetPreTrainedModel, ZooModel):
    """RetNet's decoder."""

    block_class = RetNetBlock

    def __init__(self, config):
        super().__init__(config)
        self.rotation = Rotation(config)
        self.dropout = nn.Dropout(config.dropout)
        if config.embedding_norm:
            self.embed_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

    def build_norm(self, config):
        """Post-norm blocks end in a norm of their own."""
        return super().build_norm(config) if config.pre_norm else nn.Identity()

    def embed(self, embeds_BTD, sequence):
        """Scale, norm and dropout on the embeddings."""
        if self.config.scale_embedding:
            embeds_BTD = embeds_BTD * self.config.hidden_size**0.5
        if self.config.embedding_norm:
            embeds_BTD = self.embed_norm(embeds_BTD)
        return self.dropout(embeds_BTD) if self.dropout.training else embeds_BTD

    def mixer_inputs(self, x_BTD, sequence):
        """The rotation of each position, the same in all layers."""
        rotation = self.rotation(sequence.positions)
        if not takes_plain_step(sequence, x_BTD):
            return {"rotation": rotation}
        mixer, interleaved = self.layers[0].mixer, self.config.rotation == "interleaved"
        q = StepRotation.of(rotation, x_BTD, interleaved)
        k, device = q.times(mixer.key_dim**-0.5), x_BTD.device
        log_decay_H = mixer.log_decay(device).to(device)
        if self.config.normalize_retention:
            one_B1H1 = q.cos.new_ones(len(sequence.clock), 1, mixer.num_heads, 1)
            q = q.times(mixer.normalize(one_B1H1, log_decay_H, sequence.clock))
        decay_H11 = log_decay_H.to(q.cos.dtype).exp()[:, None, None]
        return {"rotation": RetentionStep(q, k, decay_H11)}


class RetNetForCausalLM(RetNetPreTrainedModel, ZooForCausalLM, GenerationMixin):
    """RetNet as a language model."""

    model_class = RetNetModel


class RetNetForSequenceClassification(RetNetPreTrainedModel, ZooForSequenceClassification):
    """RetNet as a classifier of texts."""

    model_class = RetNetModel


class RetNetForTokenClassification(RetNetPreTrainedModel, ZooForTokenClassification):
    """RetNet as a classifier of tokens."""

    model_class = RetNetModel


class RetNetForQuestionAnswering(RetNetPreTrainedModel, ZooForQuestionAnswering):
    """RetNet as a finder of answers in a text."""

    model_class = RetNetModel


__all__ = [
    "RetNetConfig",
    "RetNetModel",
    "RetNetForCausalLM",
    "RetNetForSequenceClassification",
    "RetNetForTokenClassification",
    "RetNetForQuestionAnswering",
]
