"""RWKV-5, Eagle: RWKV with a matrix for a state.

Peng et al. 2024, "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence",
https://arxiv.org/abs/2404.05892. Per head, with S a [K, V] matrix:

    x_r, x_k, x_v, x_g = mix * x_t + (1 - mix) * x_{t-1}, each with its own mix
    r = W_r x_r,  k = W_k x_k,  v = W_v x_v,  g = silu(W_g x_g)
    o_t = r_t^T (S_{t-1} + diag(u) k_t v_t^T),  S_t = diag(d) S_{t-1} + k_t v_t^T,
    d = exp(-exp(time_decay)), fixed for each channel of K
    y = W_o (norm_head(o) * g)

Follows the authors' trainer (BlinkDL/RWKV-LM, RWKV-v5, x052: what was released as Eagle). Where it
departs from the paper, this follows the code: the paper's lerp weighs the previous token with mu,
the code the current one with mix, and the norm of a head has an epsilon of 64e-5. The two versions
before it, 5.0 and 5.1, have one decay and one bonus per head, and 5.0 no gate (`gated`); they are
converted into this one. Checkpoints load through `zoo convert rwkv-pth`.
"""

from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import GenerationMixin
from transformers import initialization as init

from ..core.base import ZooForCausalLM, in_range
from ..core.flops import linear_flops
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
    RwkvBlock,
    RwkvHeadsConfig,
    RwkvModel,
    RwkvPreTrainedModel,
    TimeMix,
    init_decay_and_bonus_,
    orthogonal_,
)


@strict
class RWKV5Config(RwkvHeadsConfig):
    """RWKV-5's mathematics.

    Args:
        intermediate_size: width of the channel mix; None: 3.5 * hidden_size, down to the next
            multiple of 32.
        gated: the gate g; version 5.0 has none.
    """

    model_type = "zoo_rwkv5"
    variants: ClassVar[dict[str, dict]] = {
        "default": {},
        "without-gate": {"gated": False, "value_size": 96},
    }

    gated: bool = True

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = max(32, int(3.5 * self.hidden_size) // 32 * 32)
        super().__post_init__(**kwargs)


class RWKV5TimeMix(TimeMix):
    """Section 4.1.1: a recurrence whose channels forget at rates of their own, then a gate."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.head_shape = config.num_attention_heads, config.head_size
        width = config.hidden_size
        for name in ("r", "k", "v", "g") if config.gated else ("r", "k", "v"):
            self.register_parameter(f"mix_{name}", nn.Parameter(torch.empty(width)))
        self.time_decay = nn.Parameter(torch.empty(self.head_shape))
        self.bonus = nn.Parameter(torch.empty(self.head_shape))
        self.r_proj = nn.Linear(width, config.key_size, bias=False)
        self.k_proj = nn.Linear(width, config.key_size, bias=False)
        self.v_proj = nn.Linear(width, config.value_size, bias=False)
        if config.gated:
            self.gate_proj = nn.Linear(width, config.value_size, bias=False)
        self.head_norm = HeadNorm(config, layer_idx)
        self.out_proj = nn.Linear(config.value_size, width, bias=False)

    def init_weights_of_paper(self):
        """Channels that forget at rates from e^-6 to e^-1; small keys and gates, outputs zero."""
        init.copy_(self.mix_r, self.shift_schedule(0.5))
        init.copy_(self.mix_k, self.shift_schedule())
        init.copy_(self.mix_v, self.shift_schedule() + 0.3 * self.depth())
        init_decay_and_bonus_(self)
        orthogonal_(self.r_proj.weight)
        orthogonal_(self.k_proj.weight, 0.1)
        orthogonal_(self.v_proj.weight)
        if self.config.gated:
            init.copy_(self.mix_g, self.shift_schedule(0.5))
            orthogonal_(self.gate_proj.weight, 0.1)
        init.zeros_(self.out_proj.weight)

    def state_specs(self):
        """The last token, and the memory S: one [K, V] matrix per head."""
        heads, key_dim = self.head_shape
        memory = StateSpec((heads, key_dim, self.config.value_size // heads))
        return super().state_specs() | {"memory_NHKV": memory}

    def flops_per_token(self, length):
        """Of its matrices, and of the memory, which is written and read."""
        return linear_flops(self) + 4 * self.head_shape[1] * self.config.value_size

    def forward(self, x_BTD, sequence, state):
        """Mixes a sequence [B, T, D]; returns it with the state after it."""
        if takes_plain_step(sequence, x_BTD):
            return self.step(x_BTD, state)[:, None], state
        mixes = [self.mix_r, self.mix_k, self.mix_v, *([self.mix_g] if self.config.gated else [])]
        shifted = self.shift(x_BTD, sequence, state)
        r_BTD, k_BTD, v_BTD, *g_BTD = shifted.mix(torch.stack(mixes), of_current=True)
        heads, batch_and_time = self.head_shape[0], x_BTD.shape[:2]
        r_BTHK = self.r_proj(r_BTD).unflatten(-1, (heads, -1))
        k_BTHK = self.k_proj(k_BTD).unflatten(-1, (heads, -1))
        v_BTHV = self.v_proj(v_BTD).unflatten(-1, (heads, -1))
        dtype = accumulator_dtype(x_BTD)
        y_BTHV, state.memory_NHKV = linear_recurrence_of(sequence, x_BTD)(
            r_BTHK,
            k_BTHK,
            in_range(v_BTHV),
            -self.time_decay.to(dtype).exp().expand(*batch_and_time, *self.head_shape),
            bonus=self.bonus.to(dtype),
            initial_state=state.memory_NHKV,
            output_final_state=state.is_kept,
            cu_seqlens=sequence.cu_seqlens,
        )
        y_BTD = self.head_norm(y_BTHV).flatten(2).to(x_BTD.dtype)
        if self.config.gated:
            y_BTD = y_BTD * nn.functional.silu(self.gate_proj(*g_BTD))
        return self.out_proj(y_BTD), state

    def step(self, x_BTD, state):
        """`forward` of one token of each row, to [B, D]; the state becomes that after it."""
        x_BD, before_BD = self.shift_step(x_BTD, state)
        shape = len(x_BD), self.head_shape[0], -1
        r_BHK = self.r_proj(torch.lerp(before_BD, x_BD, self.mix_r)).view(shape)
        k_BHK = self.k_proj(torch.lerp(before_BD, x_BD, self.mix_k)).view(shape)
        v_BHV = self.v_proj(torch.lerp(before_BD, x_BD, self.mix_v)).view(shape)
        dtype = accumulator_dtype(x_BD)
        decay_HK1 = self.time_decay.to(dtype).exp().neg_().exp_()[..., None]
        y_B1HV, memory_NHKV = decayed_step(
            r_BHK, k_BHK, v_BHV, decay_HK1, self.bonus, state.memory_NHKV
        )
        if state.is_kept:
            state.memory_NHKV = memory_NHKV
        y_BD = self.head_norm(y_B1HV).flatten(1).to(x_BD.dtype)
        if self.config.gated:
            gate_BD = self.gate_proj(torch.lerp(before_BD, x_BD, self.mix_g))
            y_BD = y_BD * nn.functional.silu(gate_BD)
        return self.out_proj(y_BD)


class RWKV5Block(RwkvBlock):
    """RWKV-5's block."""

    mixer_class = RWKV5TimeMix


class RWKV5PreTrainedModel(RwkvPreTrainedModel):
    """RWKV-5's config, layers and initialisation for transformers."""

    config: RWKV5Config
    _no_split_modules = ["RWKV5Block"]
    _can_record_outputs = {"hidden_states": RWKV5Block}
    learning_rate_scales = {"*.mixer.time_decay": 2.0}


class RWKV5Model(RWKV5PreTrainedModel, RwkvModel):
    """RWKV-5's decoder."""

    block_class = RWKV5Block


class RWKV5ForCausalLM(RWKV5PreTrainedModel, ZooForCausalLM, GenerationMixin):
    """RWKV-5 as a language model."""

    model_class = RWKV5Model


class RWKV5ForSequenceClassification(RWKV5PreTrainedModel, ZooForSequenceClassification):
    """RWKV-5 as a classifier of texts."""

    model_class = RWKV5Model


class RWKV5ForTokenClassification(RWKV5PreTrainedModel, ZooForTokenClassification):
    """RWKV-5 as a classifier of tokens."""

    model_class = RWKV5Model


class RWKV5ForQuestionAnswering(RWKV5PreTrainedModel, ZooForQuestionAnswering):
    """RWKV-5 as a finder of answers in a text."""

    model_class = RWKV5Model


__all__ = [
    "RWKV5Config",
    "RWKV5Model",
    "RWKV5ForCausalLM",
    "RWKV5ForSequenceClassification",
    "RWKV5ForTokenClassification",
    "RWKV5ForQuestionAnswering",
]
