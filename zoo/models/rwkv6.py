"""RWKV-6, Finch: RWKV-5 whose token shift and decay depend on the token.

Peng et al. 2024, "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence",
https://arxiv.org/abs/2404.05892, section 4.1.2. With x' the token before x, per head:

    lerp(mu) = x + (x' - x) * mu
    mu_*(x) = mu_* + tanh(lerp(mu_x) A_*) B_*          a low-rank correction, for w, k, v, r and g
    r, k, v = W_r, W_k, W_v applied to lerp(mu_*(x));  g = silu(W_g lerp(mu_g(x)))
    d_t = exp(-exp(time_decay + tanh(lerp(mu_w(x)) A_d) B_d))
    o_t = r_t^T (S_{t-1} + diag(u) k_t v_t^T),  S_t = diag(d_t) S_{t-1} + k_t v_t^T
    y = W_o (norm_head(o) * g)

Follows the authors' trainer (BlinkDL/RWKV-LM, RWKV-v5, x060); the paper's equations are the same.
Checkpoints load through `zoo convert rwkv-pth`. flash-linear-attention's RWKV-6 has the same
equations with a head norm of epsilon 1e-5 in place of 64e-5, and may have narrower keys
(`RWKV6Config.variants["fla"]`, `zoo convert fla-rwkv6`).
"""

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
from ..kernels.recurrence_steps import decayed_step, takes_plain_step
from ..layers.split_recurrence import linear_recurrence_of
from .rwkv import (
    HeadNorm,
    Mixer,
    RwkvBlock,
    RwkvHeadsConfig,
    RwkvModel,
    RwkvPreTrainedModel,
    TimeMix,
    init_decay_and_bonus_,
    orthogonal_,
)

# The order of what is mixed, in the authors' weights and in ours.
MIXED = "wkvrg"


@strict
class RWKV6Config(RwkvHeadsConfig):
    """RWKV-6's mathematics.

    Args:
        intermediate_size: width of the channel mix; None: 3.5 * hidden_size, down to the next
            multiple of 32.
        mix_lora_rank: rank of each of the five corrections of the token shift. The released
            models have 32, 64 from a hidden_size of 4096 on.
        decay_lora_rank: rank of the decay's dependence on the token; 64, or 128 from 4096 on.
    """

    model_type = "zoo_rwkv6"
    variants: ClassVar[dict[str, dict]] = {
        "default": {},
        "fla": {"head_norm_eps": 1e-5, "key_size": 32, "mix_lora_rank": 8, "decay_lora_rank": 12},
    }

    mix_lora_rank: int = 32
    decay_lora_rank: int = 64

    def __post_init__(self, **kwargs):
        if self.value_size is None:
            self.value_size = self.hidden_size
        if self.intermediate_size is None:
            self.intermediate_size = max(32, int(3.5 * self.hidden_size) // 32 * 32)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Checks the ranks."""
        super().validate_architecture()
        for name in ("mix_lora_rank", "decay_lora_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, got {getattr(self, name)}.")


class RWKV6TimeMix(TimeMix):
    """Section 4.1.2: what each token mixes, and how fast it forgets, it decides itself."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.head_shape = config.num_attention_heads, config.head_size
        width, keys, values = config.hidden_size, config.key_size, config.value_size
        self.mu_x = nn.Parameter(torch.empty(width))
        self.mu = nn.Parameter(torch.empty(len(MIXED), width))
        self.mix_lora_a = nn.Parameter(torch.empty(width, len(MIXED) * config.mix_lora_rank))
        self.mix_lora_b = nn.Parameter(torch.empty(len(MIXED), config.mix_lora_rank, width))
        self.time_decay = nn.Parameter(torch.empty(keys))
        self.decay_lora_a = nn.Parameter(torch.empty(width, config.decay_lora_rank))
        self.decay_lora_b = nn.Parameter(torch.empty(config.decay_lora_rank, keys))
        self.bonus = nn.Parameter(torch.empty(self.head_shape))
        self.r_proj = nn.Linear(width, keys, bias=False)
        self.k_proj = nn.Linear(width, keys, bias=False)
        self.v_proj = nn.Linear(width, values, bias=False)
        self.gate_proj = nn.Linear(width, values, bias=False)
        self.head_norm = HeadNorm(config, layer_idx)
        self.out_proj = nn.Linear(values, width, bias=False)

    def init_weights_of_paper(self):
        """RWKV-5 at first: the corrections are zero."""
        current = self.shift_schedule()
        init.copy_(self.mu_x, 1 - current)
        schedules = {
            "w": current,
            "k": current,
            "v": current + 0.3 * self.depth(),
            "r": self.shift_schedule(0.5),
            "g": self.shift_schedule(0.5),
        }
        init.copy_(self.mu, 1 - torch.stack([schedules[name] for name in MIXED]))
        for a, b in ((self.mix_lora_a, self.mix_lora_b), (self.decay_lora_a, self.decay_lora_b)):
            init.zeros_(a)
            init.uniform_(b, -0.01, 0.01)
        init_decay_and_bonus_(self)
        orthogonal_(self.r_proj.weight)
        orthogonal_(self.k_proj.weight, 0.1)
        orthogonal_(self.v_proj.weight)
        orthogonal_(self.gate_proj.weight, 0.1)
        init.zeros_(self.out_proj.weight)

    def state_specs(self):
        """The last token, and the memory S: one [K, V] matrix per head."""
        heads, key_dim = self.head_shape
        memory = StateSpec((heads, key_dim, self.config.value_size // heads))
        return super().state_specs() | {"memory_NHKV": memory}

    def flops_per_token(self, length):
        """Of its matrices, those of low rank too, and of the memory, which is written and read."""
        ranks = self.mix_lora_a, self.mix_lora_b, self.decay_lora_a, self.decay_lora_b
        memory = 4 * self.head_shape[1] * self.config.value_size
        return linear_flops(self) + product_flops(*ranks) + memory

    def mix(self, shifted):
        """Each token with as much of the one before as it asks for: w, k, v, r, g."""
        (mixed_BTD,) = shifted.mix(self.mu_x[None])
        ask_BTR = (mixed_BTD @ self.mix_lora_a).tanh().unflatten(-1, (len(MIXED), -1))
        asked = [ask_BTR[:, :, i] @ self.mix_lora_b[i] for i in range(len(MIXED))]
        return shifted.mix(self.mu, asked)

    def forward(self, x_BTD, sequence, state):
        """Mixes a sequence [B, T, D]; returns it with the state after it."""
        if takes_plain_step(sequence, x_BTD):
            return self.step(x_BTD, state)[:, None], state
        shifted = self.shift(x_BTD, sequence, state)
        w_BTD, k_BTD, v_BTD, r_BTD, g_BTD = self.mix(shifted)
        heads, dtype = self.head_shape[0], accumulator_dtype(x_BTD)
        # The sum in float32: in bfloat16, exp of it would be off by percents.
        w_BTD = self.time_decay.to(dtype) + (w_BTD @ self.decay_lora_a).tanh() @ self.decay_lora_b
        y_BTHV, state.memory_NHKV = linear_recurrence_of(sequence, x_BTD)(
            self.r_proj(r_BTD).unflatten(-1, (heads, -1)),
            self.k_proj(k_BTD).unflatten(-1, (heads, -1)),
            in_range(self.v_proj(v_BTD)).unflatten(-1, (heads, -1)),
            -w_BTD.exp().unflatten(-1, (heads, -1)),
            bonus=self.bonus.to(dtype),
            initial_state=state.memory_NHKV,
            output_final_state=state.is_kept,
            cu_seqlens=sequence.cu_seqlens,
        )
        y_BTD = self.head_norm(y_BTHV).flatten(2).to(x_BTD.dtype)
        return self.out_proj(y_BTD * nn.functional.silu(self.gate_proj(g_BTD))), state

    def step(self, x_BTD, state):
        """`forward` of one token of each row, to [B, D]; the state becomes that after it."""
        x_BD, before_BD = self.shift_step(x_BTD, state)
        dtype, shape = accumulator_dtype(x_BD), (len(x_BD), self.head_shape[0], -1)
        ask_BR = (torch.lerp(x_BD, before_BD, self.mu_x) @ self.mix_lora_a).tanh_()
        ask_5BR = ask_BR.view(len(x_BD), len(MIXED), -1).transpose(0, 1)
        mu_5BD = torch.baddbmm(self.mu[:, None], ask_5BR, self.mix_lora_b)
        mixed = torch.addcmul(x_BD, before_BD - x_BD, mu_5BD).unbind()
        w_BD, k_BD, v_BD, r_BD, g_BD = mixed
        w_BD = self.time_decay.to(dtype) + (w_BD @ self.decay_lora_a).tanh_() @ self.decay_lora_b
        y_B1HV, memory_NHKV = decayed_step(
            self.r_proj(r_BD).view(shape),
            self.k_proj(k_BD).view(shape),
            self.v_proj(v_BD).view(shape),
            w_BD.exp_().neg_().exp_().view(*shape, 1),
            self.bonus,
            state.memory_NHKV,
        )
        if state.is_kept:
            state.memory_NHKV = memory_NHKV
        y_BD = self.head_norm(y_B1HV).flatten(1).to(x_BD.dtype)
        return self.out_proj(y_BD * nn.functional.silu(self.gate_proj(g_BD)))


class RWKV6ChannelMix(Mixer):
    """RWKV-4's channel mix, with mu on the previous token."""

    shift_name = "mlp_shift_ND"

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        width = config.hidden_size
        self.mu_k = nn.Parameter(torch.empty(width))
        self.mu_r = nn.Parameter(torch.empty(width))
        self.k_proj = nn.Linear(width, config.intermediate_size, bias=False)
        self.v_proj = nn.Linear(config.intermediate_size, width, bias=False)
        self.r_proj = nn.Linear(width, width, bias=False)

    def init_weights_of_paper(self):
        """Nothing at first: the outputs are zero. In deep layers, mostly the current token."""
        current = self.shift_schedule(depth_power=3)
        init.copy_(self.mu_k, 1 - current)
        init.copy_(self.mu_r, 1 - current)
        orthogonal_(self.k_proj.weight)
        init.zeros_(self.v_proj.weight)
        init.zeros_(self.r_proj.weight)

    def forward(self, x_BTD, sequence, state):
        """Mixes each token with the one before and itself; returns it with the state after."""
        if takes_plain_step(sequence, x_BTD):
            x_BD, before_BD = self.shift_step(x_BTD, state)
            k_BF = self.k_proj(torch.lerp(x_BD, before_BD, self.mu_k)).relu().square_()
            r_BD = self.r_proj(torch.lerp(x_BD, before_BD, self.mu_r)).sigmoid()
            return (r_BD * self.v_proj(k_BF))[:, None], state
        mu_2D = torch.stack([self.mu_k, self.mu_r])
        k_BTD, r_BTD = self.shift(x_BTD, sequence, state).mix(mu_2D)
        k_BTF, r_BTD = self.k_proj(k_BTD).relu().square(), self.r_proj(r_BTD).sigmoid()
        return r_BTD * self.v_proj(k_BTF), state


class RWKV6Block(RwkvBlock):
    """RWKV-6's block."""

    mixer_class = RWKV6TimeMix
    mlp_class = RWKV6ChannelMix


class RWKV6PreTrainedModel(RwkvPreTrainedModel):
    """RWKV-6's config, layers and initialisation for transformers."""

    config: RWKV6Config
    _no_split_modules = ["RWKV6Block"]
    _can_record_outputs = {"hidden_states": RWKV6Block}
    learning_rate_scales = {"*.mixer.time_decay": 2.0}


class RWKV6Model(RWKV6PreTrainedModel, RwkvModel):
    """RWKV-6's decoder."""

    block_class = RWKV6Block


class RWKV6ForCausalLM(RWKV6PreTrainedModel, ZooForCausalLM, GenerationMixin):
    """RWKV-6 as a language model."""

    model_class = RWKV6Model


class RWKV6ForSequenceClassification(RWKV6PreTrainedModel, ZooForSequenceClassification):
    """RWKV-6 as a classifier of texts."""

    model_class = RWKV6Model


class RWKV6ForTokenClassification(RWKV6PreTrainedModel, ZooForTokenClassification):
    """RWKV-6 as a classifier of tokens."""

    model_class = RWKV6Model


class RWKV6ForQuestionAnswering(RWKV6PreTrainedModel, ZooForQuestionAnswering):
    """RWKV-6 as a finder of answers in a text."""

    model_class = RWKV6Model


__all__ = [
    "RWKV6Config",
    "RWKV6Model",
    "RWKV6ForCausalLM",
    "RWKV6ForSequenceClassification",
    "RWKV6ForTokenClassification",
    "RWKV6ForQuestionAnswering",
]
