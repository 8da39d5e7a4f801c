"""RWKV-4: a recurrent network that trains like a Transformer.

Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era",
https://arxiv.org/abs/2305.13048. Each channel keeps an average of its values, weighted by exp(key)
and decaying with a rate of its own, w = -exp(time_decay); u = time_first is what the current token
counts in place of a decay (eq. 16):

    x_r, x_k, x_v = mix * x_t + (1 - mix) * x_{t-1}, each with its own mix
    r = sigmoid(W_r x_r),  k = W_k x_k,  v = W_v x_v
    wkv_t = (sum_{i<t} e^{(t-1-i) w + k_i} v_i + e^{u + k_t} v_t) / (the same without the v)
    y = W_o (r * wkv)

The token just before t is not decayed yet. Follows the authors' trainer (BlinkDL/RWKV-LM,
RWKV-v4neo), which departs from the paper in nothing of substance; their checkpoints load through
`zoo convert rwkv-pth`, transformers' through `zoo convert hf-rwkv`. transformers' port ignores the
attention mask, decodes batches in a wrong shape and initialises u with ones; this does not.
"""

import math
from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import GenerationMixin
from transformers import initialization as init

from ..core.base import ZooForCausalLM, scale_
from ..core.flops import linear_flops
from ..core.heads import (
    ZooForQuestionAnswering,
    ZooForSequenceClassification,
    ZooForTokenClassification,
)
from ..core.state import StateSpec
from ..kernels.linear_recurrence import accumulator_dtype
from ..kernels.recurrence_steps import takes_plain_step, wkv4_step
from ..kernels.wkv4 import EMPTY_MAX
from ..layers.split_recurrence import wkv4_of
from .rwkv import (
    ChannelMix,
    RwkvBlock,
    RwkvConfig,
    RwkvModel,
    RwkvPreTrainedModel,
    TimeMix,
    orthogonal_,
    unit_steps,
)


@strict
class RWKV4Config(RwkvConfig):
    """RWKV-4's mathematics.

    Args:
        attention_hidden_size: channels of the time mix; None: hidden_size.
        intermediate_size: width of the channel mix; None: 4 * hidden_size.
        num_attention_heads: of no effect, for tools that ask: every channel is a head of its own.
    """

    model_type = "zoo_rwkv4"
    variants: ClassVar[dict[str, dict]] = {
        "default": {},
        "wide": {"attention_hidden_size": 80, "embedding_norm": False},
    }

    num_attention_heads: int = 1
    attention_hidden_size: int | None = None

    def __post_init__(self, **kwargs):
        if self.attention_hidden_size is None:
            self.attention_hidden_size = self.hidden_size
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Checks the width of the time mix."""
        super().validate_architecture()
        if self.attention_hidden_size < 1:
            raise ValueError(
                f"attention_hidden_size is at least 1, got {self.attention_hidden_size}."
            )


class RWKV4TimeMix(TimeMix):
    """Section 3.1.2: the weighted average of each channel, gated by the receptance."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        width, size = config.hidden_size, config.attention_hidden_size
        self.mix_r = nn.Parameter(torch.empty(width))
        self.mix_k = nn.Parameter(torch.empty(width))
        self.mix_v = nn.Parameter(torch.empty(width))
        self.time_decay = nn.Parameter(torch.empty(size))
        self.time_first = nn.Parameter(torch.empty(size))
        self.r_proj = nn.Linear(width, size, bias=False)
        self.k_proj = nn.Linear(width, size, bias=False)
        self.v_proj = nn.Linear(width, size, bias=False)
        self.out_proj = nn.Linear(size, width, bias=False)

    def init_weights_of_paper(self):
        """Channels that forget at rates from e^-5 to e^3; keys, receptances and outputs zero."""
        depth, size = self.depth(), self.config.attention_hidden_size
        init.copy_(self.mix_r, self.shift_schedule(0.5))
        init.copy_(self.mix_k, self.shift_schedule())
        init.copy_(self.mix_v, self.shift_schedule() + 0.3 * depth)
        steps_D = unit_steps(size, include_end=True)
        init.copy_(self.time_decay, -5 + 8 * steps_D ** (0.7 + 1.3 * depth))
        zigzag_D = (torch.arange(size) + 1) % 3 - 1
        init.copy_(self.time_first, math.log(0.3) + 0.5 * zigzag_D)
        init.zeros_(self.r_proj.weight)
        init.zeros_(self.k_proj.weight)
        orthogonal_(self.v_proj.weight, max(1.0, size / self.config.hidden_size) ** 0.5)
        init.zeros_(self.out_proj.weight)

    def state_specs(self):
        """Numerator and denominator of the average, in units of e^max."""
        size = (self.config.attention_hidden_size,)
        average = {
            "num_ND": StateSpec(size),
            "den_ND": StateSpec(size),
            "max_ND": StateSpec(size, fill=EMPTY_MAX),
        }
        return super().state_specs() | average

    def flops_per_token(self, length):
        """Of its matrices, and of numerators and denominators, which are written and read."""
        return linear_flops(self) + 2 * 4 * self.config.attention_hidden_size

    def forward(self, x_BTD, sequence, state):
        """Mixes a sequence [B, T, D]; returns it with the state after it."""
        if state.num_ND is not None and takes_plain_step(sequence, x_BTD):
            return self.step(x_BTD, state)[:, None], state
        mix_3D = torch.stack([self.mix_r, self.mix_k, self.mix_v])
        mixed = self.shift(x_BTD, sequence, state).mix(mix_3D, of_current=True)
        r_BTD, k_BTD, v_BTD = mixed
        r_BTD, k_BTD, v_BTD = self.r_proj(r_BTD).sigmoid(), self.k_proj(k_BTD), self.v_proj(v_BTD)
        dtype = accumulator_dtype(x_BTD)
        average = state.num_ND, state.den_ND, state.max_ND
        wkv_BTD, final = wkv4_of(sequence)(
            -self.time_decay.to(dtype).exp(),
            self.time_first.to(dtype),
            k_BTD,
            v_BTD,
            initial_state=None if state.num_ND is None else torch.stack(average, dim=1),
            output_final_state=state.is_kept,
            cu_seqlens=sequence.cu_seqlens,
        )
        if state.is_kept:
            final = final.transpose(0, 1).clone(memory_format=torch.contiguous_format)
            state.num_ND, state.den_ND, state.max_ND = final
        return self.out_proj(r_BTD * wkv_BTD), state

    def step(self, x_BTD, state):
        """`forward` of one token of each row, to [B, D]; the state becomes that after it."""
        x_BD, before_BD = self.shift_step(x_BTD, state)
        r_BD = self.r_proj(torch.lerp(before_BD, x_BD, self.mix_r)).sigmoid()
        k_BD = self.k_proj(torch.lerp(before_BD, x_BD, self.mix_k))
        v_BD = self.v_proj(torch.lerp(before_BD, x_BD, self.mix_v))
        dtype = accumulator_dtype(x_BD)
        w_D, u_D = self.time_decay.to(dtype).exp().neg_(), self.time_first.to(dtype)
        average = state.num_ND, state.den_ND, state.max_ND
        wkv_BD, average = wkv4_step(w_D, u_D, k_BD, v_BD, average)
        if state.is_kept:
            state.num_ND, state.den_ND, state.max_ND = average
        return self.out_proj(r_BD * wkv_BD.to(r_BD.dtype))


class RWKV4ChannelMix(ChannelMix):
    """The channel mix, initialised as this version's trainer does."""

    def init_weights_of_paper(self):
        """As later, but tall matrices are scaled to keep the variance of what they are given."""
        super().init_weights_of_paper()
        rows, columns = self.k_proj.weight.shape
        scale_(self.k_proj.weight, max(1.0, rows / columns) ** 0.5)


class RWKV4Block(RwkvBlock):
    """RWKV-4's block."""

    mixer_class = RWKV4TimeMix
    mlp_class = RWKV4ChannelMix


class RWKV4PreTrainedModel(RwkvPreTrainedModel):
    """RWKV-4's config, layers and initialisation for transformers."""

    config: RWKV4Config
    _no_split_modules = ["RWKV4Block"]
    _can_record_outputs = {"hidden_states": RWKV4Block}
    learning_rate_scales = {"*.mixer.time_decay": 2.0, "*.mixer.time_first": 3.0}


class RWKV4Model(RWKV4PreTrainedModel, RwkvModel):
    """RWKV-4's decoder."""

    block_class = RWKV4Block


class RWKV4ForCausalLM(RWKV4PreTrainedModel, ZooForCausalLM, GenerationMixin):
    """RWKV-4 as a language model."""

    model_class = RWKV4Model


class RWKV4ForSequenceClassification(RWKV4PreTrainedModel, ZooForSequenceClassification):
    """RWKV-4 as a classifier of texts."""

    model_class = RWKV4Model


class RWKV4ForTokenClassification(RWKV4PreTrainedModel, ZooForTokenClassification):
    """RWKV-4 as a classifier of tokens."""

    model_class = RWKV4Model


class RWKV4ForQuestionAnswering(RWKV4PreTrainedModel, ZooForQuestionAnswering):
    """RWKV-4 as a finder of answers in a text."""

    model_class = RWKV4Model


__all__ = [
    "RWKV4Config",
    "RWKV4Model",
    "RWKV4ForCausalLM",
    "RWKV4ForSequenceClassification",
    "RWKV4ForTokenClassification",
    "RWKV4ForQuestionAnswering",
]
