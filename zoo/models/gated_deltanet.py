"""Gated DeltaNet: a memory that forgets, corrects itself at a key, and learns.

Yang, Kautz and Hatamizadeh 2024, "Gated Delta Networks: Improving Mamba2 with Delta Rule",
https://arxiv.org/abs/2412.06464. Per head, with S a [K, V] matrix and x normalised tokens:

    q, k, v = silu(conv(W_q x)), silu(conv(W_k x)), silu(conv(W_v x)),  conv over 4 tokens
    q, k of length 1: x / sqrt(|x|^2 + 1e-6);  q / sqrt(K)
    alpha_t = exp(-A softplus(W_a x_t + dt)),  beta_t = sigmoid(W_b x_t),  one of each per head
    S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T      (equation 10, transposed)
    o_t = S_t^T q_t
    y = W_o (rms_norm(o) * silu(W_g x))

alpha forgets everything at once, as Mamba-2 does; the delta rule replaces what the state holds at
k. Blocks are x + mixer(norm(x)), then x + mlp(norm(x)), with SwiGLU; there are no positions.

It is the linear layer of Qwen3-Next, where a head of q and k serves several of v
(`num_key_heads`), and of flash-linear-attention's GatedDeltaNet, whose initialisation this has.
The paper's hybrids with sliding windows are not built.
"""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
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
    in_range,
)
from ..core.flops import linear_flops, product_flops
from ..core.heads import (
    ZooForQuestionAnswering,
    ZooForSequenceClassification,
    ZooForTokenClassification,
)
from ..core.state import StateSpec
from ..kernels.linear_recurrence import accumulator_dtype
from ..kernels.recurrence_steps import gated_delta_step, takes_plain_step
from ..layers.mlp import GatedMLP
from ..layers.norms import WideRMSNorm
from ..layers.short_convolution import ShortConvolution
from ..layers.split_recurrence import delta_recurrence_of


@strict
class GatedDeltaNetConfig(ZooConfig):
    """Gated DeltaNet's mathematics.

    Args:
        num_attention_heads: heads H of v, the gates and the state.
        num_key_heads: heads of q and k, each for as many of v in a row; None: one for each.
        head_dim: width K of a head of q and k; None: 3/4 hidden_size / num_attention_heads.
        value_head_dim: width V of a head of v; None: 2 head_dim.
        intermediate_size: width of the MLP; None: 8/3 hidden_size, up to a multiple of 256.
        conv_size: tokens that q, k and v see, the current one included.
        hidden_act: activation of the MLP.
        rms_norm_eps: epsilon of the norms.
        initializer_range: standard deviation of matrices and embeddings at the start.
    """

    model_type = "zoo_gated_deltanet"
    variants: ClassVar[dict[str, dict]] = {
        "default": {},
        "grouped": {"num_key_heads": 2, "head_dim": 10, "value_head_dim": 14, "conv_size": 3},
    }

    num_key_heads: int | None = None
    head_dim: int | None = None
    value_head_dim: int | None = None
    conv_size: int = 4
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if self.num_key_heads is None:
            self.num_key_heads = self.num_attention_heads
        heads = max(self.num_attention_heads, 1)
        if self.head_dim is None and 3 * self.hidden_size % (4 * heads) == 0:
            self.head_dim = 3 * self.hidden_size // (4 * heads)
        if self.value_head_dim is None and self.head_dim is not None:
            self.value_head_dim = 2 * self.head_dim
        if self.intermediate_size is None:
            self.intermediate_size = -(-8 * self.hidden_size // (3 * 256)) * 256
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Checks heads and sizes."""
        super().validate_architecture()
        heads, key_heads = self.num_attention_heads, self.num_key_heads
        if key_heads < 1 or heads % key_heads:
            raise ValueError(
                f"num_attention_heads is a multiple of num_key_heads, got {heads} and {key_heads}; "
                "change one of them."
            )
        if self.head_dim is None:
            raise ValueError(
                "3/4 of hidden_size is a multiple of num_attention_heads, got "
                f"{self.hidden_size} and {heads}; change one of them, or give head_dim."
            )
        for name, least in (("head_dim", 1), ("value_head_dim", 1), ("conv_size", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is at least {least}, got {getattr(self, name)}.")
        check_activation("hidden_act", self.hidden_act)


class GatedDeltaRule(nn.Module):
    """Section 3: the gated delta rule between short convolutions and a gate."""

    exchanges = True

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        width, heads = config.hidden_size, config.num_attention_heads
        keys = config.num_key_heads * config.head_dim
        values = heads * config.value_head_dim
        self.widths = keys, keys, values
        self.q_proj = nn.Linear(width, keys, bias=False)
        self.k_proj = nn.Linear(width, keys, bias=False)
        self.v_proj = nn.Linear(width, values, bias=False)
        self.convolution = ShortConvolution(
            sum(self.widths), config.conv_size, config.initializer_range
        )
        self.a_proj = nn.Linear(width, heads, bias=False)
        self.b_proj = nn.Linear(width, heads, bias=False)
        self.log_a = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.gate_proj = nn.Linear(width, values, bias=False)
        self.head_norm = WideRMSNorm(config.value_head_dim, eps=config.rms_norm_eps)
        self.out_proj = nn.Linear(values, width, bias=False)

    def init_weights_of_paper(self):
        """As Mamba-2: A even between 0.01 and 16, steps dt even in their logarithm up to 0.1."""
        a_H = torch.empty_like(self.log_a, dtype=torch.float32).uniform_(0.01, 16)
        init.copy_(self.log_a, a_H.log())
        log_dt_H = torch.empty_like(self.dt_bias, dtype=torch.float32)
        dt_H = log_dt_H.uniform_(math.log(0.001), math.log(0.1)).exp()
        init.copy_(self.dt_bias, dt_H.expm1().log())  # softplus of it is dt

    def state_specs(self):
        """The last tokens of q, k and v, and the memory S: one [K, V] matrix per head."""
        config = self.config
        memory = config.num_attention_heads, config.head_dim, config.value_head_dim
        return {"conv_NWD": self.convolution.state_spec(), "memory_NHKV": StateSpec(memory)}

    def flops_per_token(self, length):
        """Of its matrices, the convolution, and the memory: read at k, corrected, written, read."""
        config = self.config
        memory = 8 * config.num_attention_heads * config.head_dim * config.value_head_dim
        return linear_flops(self) + product_flops(self.convolution.weight) + memory

    def forward(self, x_BTD, sequence, state):
        """Mixes a sequence [B, T, D]; returns it with the state after it."""
        if state.memory_NHKV is not None and takes_plain_step(sequence, x_BTD):
            return self.step(x_BTD[:, 0], sequence, state)[:, None], state
        q_BTD, k_BTD, v_BTD = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        dtype = v_BTD.dtype
        qkv_BTD = torch.cat([q_BTD, k_BTD, v_BTD], dim=-1)
        before_NWD = state.conv_NWD
        if sequence.ranks is not None:
            name = "conv_NWD" if state.is_kept else None
            before_NWD = self.convolution.inputs_of_left(qkv_BTD, sequence.ranks, name)
        qkv_BTD, state.conv_NWD = self.convolution(qkv_BTD, sequence, before_NWD, state.is_kept)
        q_BTD, k_BTD, v_BTD = F.silu(qkv_BTD).split(self.widths, dim=-1)
        q_BTHK, k_BTHK = self.unit(q_BTD), self.unit(k_BTD)
        v_BTHV = v_BTD.unflatten(-1, (self.config.num_attention_heads, -1))

        wide = accumulator_dtype(x_BTD)
        step_BTH = F.softplus(self.a_proj(x_BTD).to(wide) + self.dt_bias)
        log_decay_BTH = -self.log_a.to(wide).exp() * step_BTH
        beta_BTH1 = self.b_proj(x_BTD).sigmoid()[..., None]
        y_BTHV, state.memory_NHKV = delta_recurrence_of(sequence, x_BTD)(
            q_BTHK,
            k_BTHK,
            in_range(beta_BTH1 * v_BTHV),
            log_decay_BTH,
            -(log_decay_BTH.exp()[..., None] * k_BTHK).to(dtype),
            beta_BTH1 * k_BTHK,
            scale=self.config.head_dim**-0.5,
            initial_state=state.memory_NHKV,
            output_final_state=state.is_kept,
            cu_seqlens=sequence.cu_seqlens,
        )
        y_BTD = self.head_norm(y_BTHV).flatten(2).to(dtype)
        return self.out_proj(y_BTD * F.silu(self.gate_proj(x_BTD))), state

    def step(self, x_BD, sequence, state):
        """`forward` of one token of each row, [B, D] to the same; the state becomes that after."""
        config, wide = self.config, accumulator_dtype(x_BD)
        heads, key_heads = config.num_attention_heads, config.num_key_heads
        qkv_BD = torch.cat([self.q_proj(x_BD), self.k_proj(x_BD), self.v_proj(x_BD)], dim=-1)
        before_NWD, is_kept = state.conv_NWD, state.is_kept
        qkv_B1D, conv_NWD = self.convolution(qkv_BD[:, None], sequence, before_NWD, is_kept)
        qkv_BD = F.silu(qkv_B1D[:, 0]).to(wide)
        qk_BD, v_BD = qkv_BD.split([2 * self.widths[0], self.widths[2]], dim=-1)
        qk_B2HK = qk_BD.view(len(x_BD), 2, key_heads, config.head_dim)
        norm_B2H1 = torch.linalg.vector_norm(qk_B2HK, dim=-1, keepdim=True)
        qk_B2HK = qk_B2HK * norm_B2H1.square_().add_(1e-6).rsqrt_()
        if key_heads < heads:
            qk_B2HK = qk_B2HK.repeat_interleave(heads // key_heads, dim=-2)
        q_BHK, k_BHK = qk_B2HK.unbind(1)
        step_BH = F.softplus(self.a_proj(x_BD).to(wide) + self.dt_bias)
        decay_BH = (step_BH * self.log_a.to(wide).exp()).neg_().exp_()
        beta_BH, v_BHV = self.b_proj(x_BD).sigmoid(), v_BD.view(len(x_BD), heads, -1)
        y_B1HV, memory_NHKV = gated_delta_step(
            q_BHK, k_BHK, v_BHV, decay_BH, beta_BH, state.memory_NHKV
        )
        if state.is_kept:
            state.conv_NWD, state.memory_NHKV = conv_NWD, memory_NHKV
        y_BD = self.head_norm(y_B1HV.mul_(config.head_dim**-0.5)).to(x_BD.dtype).flatten(1)
        return self.out_proj(y_BD * F.silu(self.gate_proj(x_BD)))

    def unit(self, x_BTD):
        """Vectors of length 1 [B, T, H, K], computed in float32; each for its heads of v."""
        x_BTHK = x_BTD.unflatten(-1, (self.config.num_key_heads, -1))
        wide_BTHK = x_BTHK.to(accumulator_dtype(x_BTHK))
        wide_BTHK = wide_BTHK * (wide_BTHK.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
        each = self.config.num_attention_heads // self.config.num_key_heads
        return wide_BTHK.to(x_BTHK.dtype).repeat_interleave(each, dim=-2)


class GatedDeltaNetBlock(ZooBlock):
    """Gated DeltaNet's block."""

    mixer_class = GatedDeltaRule
    mlp_class = GatedMLP


class GatedDeltaNetPreTrainedModel(ZooPreTrainedModel):
    """Gated DeltaNet's config and layers for transformers."""

    config: GatedDeltaNetConfig
    _no_split_modules = ["GatedDeltaNetBlock"]
    _can_record_outputs = {"hidden_states": GatedDeltaNetBlock}


class GatedDeltaNetModel(GatedDeltaNetPreTrainedModel, ZooModel):
    """Gated DeltaNet's decoder."""

    block_class = GatedDeltaNetBlock


class GatedDeltaNetForCausalLM(GatedDeltaNetPreTrainedModel, ZooForCausalLM, GenerationMixin):
    """Gated DeltaNet as a language model."""

    model_class = GatedDeltaNetModel


class GatedDeltaNetForSequenceClassification(
    GatedDeltaNetPreTrainedModel, ZooForSequenceClassification
):
    """Gated DeltaNet as a classifier of texts."""

    model_class = GatedDeltaNetModel


class GatedDeltaNetForTokenClassification(GatedDeltaNetPreTrainedModel, ZooForTokenClassification):
    """Gated DeltaNet as a classifier of tokens."""

    model_class = GatedDeltaNetModel


class GatedDeltaNetForQuestionAnswering(GatedDeltaNetPreTrainedModel, ZooForQuestionAnswering):
    """Gated DeltaNet as a finder of answers in a text."""

    model_class = GatedDeltaNetModel


__all__ = [
    "GatedDeltaNetConfig",
    "GatedDeltaNetModel",
    "GatedDeltaNetForCausalLM",
    "GatedDeltaNetForSequenceClassification",
    "GatedDeltaNetForTokenClassification",
    "GatedDeltaNetForQuestionAnswering",
]
