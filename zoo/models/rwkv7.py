"""RWKV-7, Goose: RWKV with a state that corrects itself, a generalised delta rule.

Peng et al. 2025, "RWKV-7 Goose with Expressive Dynamic State Evolution",
https://arxiv.org/abs/2503.14456. With x' the token before x, per head, S a [K, V] matrix:

    x_* = x + (x' - x) * mu_*, for r, w, k, v, a and g;  r, k, v = W_r x_r, W_k x_k, W_v x_v
    d = exp(-e^(-1/2) sigmoid(w_0 + tanh(x_w A_w) B_w))          decay, between 0.545 and 1
    a = sigmoid(a_0 + x_a A_a B_a)                               in-context learning rate
    g = sigmoid(x_g A_g) B_g                                     gate
    v = v + (v_first - v) sigmoid(v_0 + x_v A_v B_v)             v_first is layer 0's v
    kk = k * k_k, of length 1 in every head;  k = k (1 + (a - 1) k_a)
    S_t = diag(d) S_{t-1} - (kk * a) kk^T S_{t-1} + k v^T,  o_t = S_t^T r
    y = W_o ((norm_head(o) + (r . (k * r_k)) v) * g)

The order matters: kk takes k as projected, the rest the k after k_a and the v after the value
residual; the state has taken in the current token when it is read; what is removed is read before
the decay. The channel mix has no receptance.

Follows the authors' trainer (BlinkDL/RWKV-LM, x070); the paper's equations are the same. The
authors keep S transposed, and their inference package rounds e^(-1/2) to 0.606531. Checkpoints load
through `zoo convert rwkv-pth`; flash-linear-attention's, whose kk is divided by sqrt(|kk|^2 + 1e-6)
and whose head norm has an epsilon of head_size * 1e-5, through `zoo convert fla-rwkv7`.
"""

import math
from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import GenerationMixin
from transformers import initialization as init

from ..core.base import ZooForCausalLM, in_range
from ..core.flops import linear_flops, product_flops
from ..core.heads import (
    ZooForQuestionAnswering,
    ZooForSequenceClassification,
    ZooForTokenClassification,
)
from ..core.state import StateSpec
from ..kernels.linear_recurrence import accumulator_dtype
from ..kernels.recurrence_steps import corrected_step, takes_plain_step
from ..layers.split_recurrence import delta_recurrence_of
from .rwkv import (
    HeadNorm,
    Mixer,
    RwkvBlock,
    RwkvHeadsConfig,
    RwkvModel,
    RwkvPreTrainedModel,
    TimeMix,
    orthogonal_,
    unit_steps,
)

# The order of what is mixed.
MIXED = "rwkvag"


@strict
class RWKV7Config(RwkvHeadsConfig):
    """RWKV-7's mathematics.

    Args:
        intermediate_size: width of the channel mix; None: 4 * hidden_size.
        decay_lora_rank: rank R of A_w, B_w; None: the authors' 1.8 sqrt(hidden_size), to the
            nearest multiple of 32 and at least 32, as all ranks.
        rate_lora_rank: of A_a, B_a; None: 1.8 sqrt(hidden_size).
        value_lora_rank: of A_v, B_v; None: 1.3 sqrt(hidden_size).
        gate_lora_rank: of A_g, B_g; None: 0.6 hidden_size^0.8.
        removal_eps: added to |kk|^2 before the root (fla: 1e-6). The authors add nothing, but
            divide by 1e-12 at least.
    """

    model_type = "zoo_rwkv7"
    variants: ClassVar[dict[str, dict]] = {
        "default": {},
        "fla": {"removal_eps": 1e-6, "value_size": 96, "rate_lora_rank": 8},
    }

    decay_lora_rank: int | None = None
    rate_lora_rank: int | None = None
    value_lora_rank: int | None = None
    gate_lora_rank: int | None = None
    removal_eps: float = 0.0

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        width = max(self.hidden_size, 1)
        suggested = {
            "decay": 1.8 * width**0.5,
            "rate": 1.8 * width**0.5,
            "value": 1.3 * width**0.5,
            "gate": 0.6 * width**0.8,
        }
        for name, rank in suggested.items():
            if getattr(self, f"{name}_lora_rank") is None:
                setattr(self, f"{name}_lora_rank", max(32, round(rank / 32) * 32))
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Checks the ranks."""
        super().validate_architecture()
        for name in ("decay", "rate", "value", "gate"):
            if getattr(self, f"{name}_lora_rank") < 1:
                rank = getattr(self, f"{name}_lora_rank")
                raise ValueError(f"{name}_lora_rank is at least 1, got {rank}.")


class LowRank(nn.Module):
    """bias + f(x A) B: a projection of low rank R.

    Args:
        activation: f; None: nothing.
        bias: whether there is one.
    """

    def __init__(self, width, rank, out_width, activation=None, bias=True):
        super().__init__()
        self.activation = activation
        self.a = nn.Parameter(torch.empty(width, rank))
        self.b = nn.Parameter(torch.empty(rank, out_width))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_width))
        else:
            self.register_parameter("bias", None)

    def init_weights_of_paper(self):
        """Nothing but the bias at first; that is for the owner to set."""
        rows, columns = self.b.shape
        init.zeros_(self.a)
        orthogonal_(self.b, 0.1 * max(1.0, rows / columns) ** 0.5)

    def forward(self, x_BTD):
        """[B, T, D] to the width of the output; of a step also [B, D]."""
        hidden_BTR = x_BTD @ self.a
        if self.activation is not None:
            hidden_BTR = self.activation(hidden_BTR)
        if self.bias is not None and x_BTD.ndim == 2 and x_BTD.dtype == accumulator_dtype(x_BTD):
            return torch.addmm(self.bias, hidden_BTR, self.b)
        y_BTD = hidden_BTR @ self.b
        # The sum in float32: what follows is a sigmoid, and a decay close to 1 has no digits left.
        return y_BTD if self.bias is None else self.bias.to(accumulator_dtype(y_BTD)) + y_BTD


class RWKV7TimeMix(TimeMix):
    """Section 4: the state forgets, removes what it holds at kk, and learns v at k."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.head_shape = config.num_attention_heads, config.head_size
        width, keys, values = config.hidden_size, config.key_size, config.value_size
        self.mu = nn.Parameter(torch.empty(len(MIXED), width))
        self.decay = LowRank(width, config.decay_lora_rank, keys, torch.tanh)
        self.rate = LowRank(width, config.rate_lora_rank, keys)
        if layer_idx > 0:
            self.residual = LowRank(width, config.value_lora_rank, values)
        self.gate = LowRank(width, config.gate_lora_rank, values, torch.sigmoid, bias=False)
        self.k_k = nn.Parameter(torch.empty(keys))
        self.k_a = nn.Parameter(torch.empty(keys))
        self.r_k = nn.Parameter(torch.empty(self.head_shape))
        self.r_proj = nn.Linear(width, keys, bias=False)
        self.k_proj = nn.Linear(width, keys, bias=False)
        self.v_proj = nn.Linear(width, values, bias=False)
        self.head_norm = HeadNorm(config, layer_idx)
        self.out_proj = nn.Linear(values, width, bias=False)

    def init_weights_of_paper(self):
        """Decays from slow to fast over the width and again over each head; outputs zero."""
        powers = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
        mus = [1 - self.shift_schedule(powers[name]) for name in MIXED]
        init.copy_(self.mu, torch.stack(mus))
        heads, key_dim = self.head_shape
        steps_D = unit_steps(heads * key_dim, include_end=True)
        zigzag_K = 2 * unit_steps(key_dim, include_end=True) - 1
        zigzag_D = (zigzag_K * zigzag_K.abs()).repeat(heads)
        decay_D = -6 + 6 * steps_D ** (1 + self.depth() ** 0.3)
        init.copy_(self.decay.bias, decay_D + 0.5 + 2.5 * zigzag_D)
        init.copy_(self.rate.bias, -0.19 + 0.3 * zigzag_D + 0.4 * (steps_D - 0.5))
        if self.layer_idx > 0:
            values_D = unit_steps(self.config.value_size, include_end=True)
            init.copy_(self.residual.bias, 0.73 - 0.4 * (values_D - 0.5))
        init.copy_(self.k_k, 0.71 - 0.1 * (steps_D - 0.5))
        init.constant_(self.k_a, 1.02)
        init.constant_(self.r_k, -0.04)
        orthogonal_(self.r_proj.weight)
        orthogonal_(self.k_proj.weight, 0.1)
        orthogonal_(self.v_proj.weight)
        init.zeros_(self.out_proj.weight)

    def state_specs(self):
        """The last token, and the memory S: one [K, V] matrix per head."""
        heads, key_dim = self.head_shape
        memory = StateSpec((heads, key_dim, self.config.value_size // heads))
        return super().state_specs() | {"memory_NHKV": memory}

    def flops_per_token(self, length):
        """Of its matrices, those of low rank too, and of the memory.

        That is read at kk, corrected there, written and read.
        """
        parts = [part for part in self.children() if isinstance(part, LowRank)]
        ranks = product_flops(*(x for part in parts for x in (part.a, part.b)))
        return linear_flops(self) + ranks + 8 * self.head_shape[1] * self.config.value_size

    def forward(self, x_BTD, sequence, state, v_first_BTD=None):
        """Mixes a sequence [B, T, D]; returns it, the state after it and the first layer's v."""
        if takes_plain_step(sequence, x_BTD):
            y_BD, v_first_BD = self.step(x_BTD, state, v_first_BTD)
            return y_BD[:, None], state, v_first_BD[:, None]
        shifted = self.shift(x_BTD, sequence, state)
        r_BTD, w_BTD, k_BTD, v_BTD, a_BTD, g_BTD = shifted.mix(self.mu)
        residual_BTD = None if v_first_BTD is None else self.residual(v_BTD)
        r_BTD, k_BTD, v_BTD = self.r_proj(r_BTD), self.k_proj(k_BTD), self.v_proj(v_BTD)
        # Not that of x: under autocast, projections are narrower than what they take.
        heads, dtype = self.head_shape[0], v_BTD.dtype
        log_decay_BTD = -math.exp(-0.5) * self.decay(w_BTD).sigmoid()
        rate_BTD = self.rate(a_BTD).sigmoid().to(dtype)
        if v_first_BTD is None:
            v_first_BTD = v_BTD
        else:
            v_BTD = torch.lerp(v_BTD, v_first_BTD, residual_BTD.sigmoid().to(dtype))
        removal_BTHK = self.unit((k_BTD * self.k_k).unflatten(-1, (heads, -1)))
        k_BTD = k_BTD * (1 + (rate_BTD - 1) * self.k_a)

        r_BTHK, k_BTHK, v_BTHV, rate_BTHK, log_decay_BTHK = (
            y_BTD.unflatten(-1, (heads, -1))
            for y_BTD in (r_BTD, k_BTD, in_range(v_BTD), rate_BTD, log_decay_BTD)
        )
        y_BTHV, state.memory_NHKV = delta_recurrence_of(sequence, x_BTD)(
            r_BTHK,
            k_BTHK,
            v_BTHV,
            log_decay_BTHK,
            -removal_BTHK,
            removal_BTHK * rate_BTHK,
            initial_state=state.memory_NHKV,
            output_final_state=state.is_kept,
            cu_seqlens=sequence.cu_seqlens,
        )
        bonus_BTH = (in_range(r_BTHK) * k_BTHK * self.r_k).sum(-1, keepdim=True)
        y_BTHV = self.head_norm(y_BTHV) + bonus_BTH * v_BTHV
        y_BTD = y_BTHV.flatten(2).to(dtype) * self.gate(g_BTD)
        return self.out_proj(y_BTD), state, v_first_BTD

    def step(self, x_BTD, state, v_first_BTD):
        """`forward` of one token of each row: (that [B, D], the first layer's v [B, D]).

        The state becomes that after it.
        """
        x_BD, before_BD = self.shift_step(x_BTD, state)
        mixed = torch.lerp(x_BD, before_BD, self.mu[:, None]).unbind()
        r_BD, w_BD, k_BD, v_BD, a_BD, g_BD = mixed
        residual_BD = None if v_first_BTD is None else self.residual(v_BD)
        r_BD, k_BD, v_BD = self.r_proj(r_BD), self.k_proj(k_BD), self.v_proj(v_BD)
        dtype, shape = v_BD.dtype, (len(x_BD), self.head_shape[0], -1)
        decay_BD = self.decay(w_BD).sigmoid().mul_(-math.exp(-0.5)).exp_()
        rate_BD = self.rate(a_BD).sigmoid().to(dtype)
        if v_first_BTD is None:
            v_first_BD = v_BD
        else:
            v_first_BD = v_first_BTD[:, 0]
            v_BD = torch.lerp(v_BD, v_first_BD, residual_BD.sigmoid().to(dtype))
        removal_BHK = self.unit((k_BD * self.k_k).view(shape))
        k_BHK = torch.addcmul(k_BD, k_BD * self.k_a, rate_BD - 1).view(shape)
        r_BHK, v_BHV = r_BD.view(shape), v_BD.view(shape)
        y_B1HV, memory_NHKV = corrected_step(
            r_BHK,
            k_BHK,
            v_BHV,
            decay_BD.view(*shape, 1),
            -removal_BHK,
            removal_BHK * rate_BD.view(shape),
            state.memory_NHKV,
        )
        if state.is_kept:
            state.memory_NHKV = memory_NHKV
        bonus_BH1 = (in_range(r_BHK) * k_BHK).mul_(self.r_k).sum(-1, keepdim=True)
        y_BHV = torch.addcmul(self.head_norm(y_B1HV)[:, 0], bonus_BH1, in_range(v_BHV))
        return self.out_proj(y_BHV.flatten(1).to(dtype) * self.gate(g_BD)), v_first_BD

    def unit(self, k_BTHK):
        """Vectors of length 1, so that a removal is one: in float32, rounded once."""
        wide_BTHK = k_BTHK.to(accumulator_dtype(k_BTHK))
        if self.config.removal_eps:
            square_BTH = wide_BTHK.square().sum(-1, keepdim=True)
            wide_BTHK = wide_BTHK * (square_BTH + self.config.removal_eps).rsqrt()
        else:
            wide_BTHK = nn.functional.normalize(wide_BTHK, dim=-1, eps=1e-12)
        return wide_BTHK.to(k_BTHK.dtype)


class RWKV7ChannelMix(Mixer):
    """Squared ReLU, without a receptance."""

    shift_name = "mlp_shift_ND"

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.mu_k = nn.Parameter(torch.empty(config.hidden_size))
        self.k_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.v_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def init_weights_of_paper(self):
        """Nothing at first: the outputs are zero."""
        init.copy_(self.mu_k, 1 - self.shift_schedule(depth_power=4))
        orthogonal_(self.k_proj.weight)
        init.zeros_(self.v_proj.weight)

    def forward(self, x_BTD, sequence, state):
        """Mixes each token with the one before and itself; returns it with the state after."""
        if takes_plain_step(sequence, x_BTD):
            x_BD, before_BD = self.shift_step(x_BTD, state)
            k_BF = self.k_proj(torch.lerp(x_BD, before_BD, self.mu_k)).relu().square_()
            return self.v_proj(k_BF)[:, None], state
        (k_BTD,) = self.shift(x_BTD, sequence, state).mix(self.mu_k[None])
        k_BTF = self.k_proj(k_BTD).relu().square()
        return self.v_proj(k_BTF), state


class RWKV7Block(RwkvBlock):
    """RWKV-7's block; the first layer's values go on to all others."""

    mixer_class = RWKV7TimeMix
    mlp_class = RWKV7ChannelMix


class RWKV7PreTrainedModel(RwkvPreTrainedModel):
    """RWKV-7's config, layers and initialisation for transformers."""

    config: RWKV7Config
    _no_split_modules = ["RWKV7Block"]
    _can_record_outputs = {"hidden_states": RWKV7Block}
    learning_rate_scales = {"*.mixer.decay.bias": 2.0}


class RWKV7Model(RWKV7PreTrainedModel, RwkvModel):
    """RWKV-7's decoder."""

    block_class = RWKV7Block


class RWKV7ForCausalLM(RWKV7PreTrainedModel, ZooForCausalLM, GenerationMixin):
    """RWKV-7 as a language model."""

    model_class = RWKV7Model


class RWKV7ForSequenceClassification(RWKV7PreTrainedModel, ZooForSequenceClassification):
    """RWKV-7 as a classifier of texts."""

    model_class = RWKV7Model


class RWKV7ForTokenClassification(RWKV7PreTrainedModel, ZooForTokenClassification):
    """RWKV-7 as a classifier of tokens."""

    model_class = RWKV7Model


class RWKV7ForQuestionAnswering(RWKV7PreTrainedModel, ZooForQuestionAnswering):
    """RWKV-7 as a finder of answers in a text."""

    model_class = RWKV7Model


__all__ = [
    "RWKV7Config",
    "RWKV7Model",
    "RWKV7ForCausalLM",
    "RWKV7ForSequenceClassification",
    "RWKV7ForTokenClassification",
    "RWKV7ForQuestionAnswering",
]
