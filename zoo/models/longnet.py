"""LongNet: a Transformer whose attention thins out with distance.

Ding et al. 2023, https://arxiv.org/abs/2307.02486, as in the authors' code (torchscale's
`LongNetDecoder`, around which is Magneto, Wang et al. 2022, https://arxiv.org/abs/2210.06423); its
weights load through `zoo convert torchscale-longnet`. Every layer has several branches, each with
segments of w tokens of which a head sees every r-th (kernels/dilated_attention.py has the
equations). Lengths and rates that grow alike keep the cost per token constant.

    x = x + W_o LN(dilated(rotate(W_q LN x), rotate(W_k LN x), W_v LN x))
    x = x + W_2 LN(gelu(W_1 LN x))                    biases everywhere, sub-LayerNorms inside

Positions are xPos (Sun et al. 2022, https://arxiv.org/abs/2212.10554): pairs (2j, 2j + 1) turned by
n 10000^(-2j/K), and scores multiplied by zeta_j^(d/512) at distance d, zeta_j = (2j + 0.4 K) /
(1.4 K). The code can have learned absolute positions instead, or both.

Departures: the code spreads heads over offsets in groups, h // ceil(H / r), and holds the weights
of the branches constant in backward; the paper's h mod r and gradients through them are options.
Where r does not divide w the code shifts all segments but the first; here they stay in place, as
they do there if it divides. xPos centres its powers on the sequence, which overflows in float32
from 72,000 tokens; here they count from each query's neighbourhood, which is the same mathematics.
The code cannot decode past its first segment. Here a branch keeps the selected keys (after
rotation) and values of the segment that is not over, so the state is sum_i ceil(w_i / r_i) slots
per head at any length. Segments and distances count tokens, from each document's start.
"""

import functools
from typing import ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import GenerationMixin

from ..core.base import Constant, ZooConfig, ZooForCausalLM, ZooModel, check_activation
from ..core.flops import linear_flops
from ..core.heads import (
    ZooForQuestionAnswering,
    ZooForSequenceClassification,
    ZooForTokenClassification,
)
from ..core.length_limit import length_limit
from ..core.state import SlidingStateLayer, dtype_of
from ..kernels.dilated_branches import branches_of
from ..kernels.linear_recurrence import accumulator_dtype
from ..layers.dilated_slots import DilatedSlots, tokens_behind
from ..layers.positions import check_positions, rotate, rotation_of
from ..layers.torchscale_block import (
    FeedForward,
    TorchscaleBlock,
    TorchscalePreTrainedModel,
    init_linear_,
    rescale_,
)
from ..layers.xpos import xpos_angles, xpos_log_decay


@strict
class LongNetConfig(ZooConfig):
    """LongNet's mathematics. Defaults are those of torchscale, with the paper's positions.

    Args:
        intermediate_size: MLP width; None: 4 times hidden_size.
        segment_lengths: w of each branch, in tokens; the paper's are here.
        dilation_rates: r of each branch.
        head_offsets: the first position in a segment that head h of H sees: "grouped",
            h // ceil(H / r), in the code; "modulo", h mod r, in the paper.
        branch_weight_gradient: differentiate the weights of the branches. The code does not; the
            forward pass is the same.
        xpos: rotation and decay by distance.
        xpos_scale_base: tokens of distance that multiply a score by zeta once.
        max_position_embeddings: rows of a table of learned positions, added to the embeddings; a
            text cannot be longer. None: there is no such table.
        hidden_act: activation of the MLP.
        layer_norm_eps: epsilon of the norms.
        sub_norm: a LayerNorm before the output projections of attention and MLP (Magneto).
        pre_norm: norms before attention and MLP and after the last block; else after each residual
            sum.
        deepnorm: residual times (2L)^(1/4), and initialisation divided by (8L)^(1/4)
            (Wang et al. 2022). The authors use it without sub_norm.
        scale_embedding: embeddings times sqrt(hidden_size).
        embedding_norm: a norm on the embeddings.
    """

    model_type = "zoo_longnet"
    layer_type: ClassVar[str] = SlidingStateLayer._layer_type
    variants: ClassVar[dict[str, dict]] = {
        "xpos": {"segment_lengths": [16, 32, 64], "dilation_rates": [1, 2, 4]},
        "learned-positions": {
            "segment_lengths": [16, 32, 64],
            "dilation_rates": [1, 2, 4],
            "xpos": False,
            "max_position_embeddings": 20_480,
        },
        # Heads and lengths that rates do not divide, and tokens that no branch has.
        "modulo": {
            "segment_lengths": [13, 40],
            "dilation_rates": [2, 3],
            "head_offsets": "modulo",
            "branch_weight_gradient": True,
        },
        "deepnorm": {
            "segment_lengths": [16, 40],
            "dilation_rates": [1, 3],
            "sub_norm": False,
            "pre_norm": False,
            "deepnorm": True,
            "scale_embedding": True,
            "embedding_norm": True,
        },
    }

    segment_lengths: list[int] | None = None
    dilation_rates: list[int] | None = None
    head_offsets: Literal["grouped", "modulo"] = "grouped"
    branch_weight_gradient: bool = False
    xpos: bool = True
    xpos_scale_base: int = 512
    max_position_embeddings: int | None = None
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    sub_norm: bool = True
    pre_norm: bool = True
    deepnorm: bool = False
    scale_embedding: bool = False
    embedding_norm: bool = False

    def __post_init__(self, **kwargs):
        if self.segment_lengths is None and self.dilation_rates is None:
            self.segment_lengths = [2048, 4096, 8192, 16384, 32768]
            self.dilation_rates = [1, 2, 4, 6, 12]
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        super().__post_init__(**kwargs)

    @property
    def head_dim(self):
        """Width of a head."""
        return self.hidden_size // self.num_attention_heads

    def validate_architecture(self):
        """Checks heads, branches and positions."""
        super().validate_architecture()
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                "hidden_size is a multiple of num_attention_heads, got "
                f"{self.hidden_size} and {self.num_attention_heads}; change one of them."
            )
        check_activation("hidden_act", self.hidden_act)
        branches_of(self.segment_lengths or [], self.dilation_rates or [])
        if self.xpos and self.head_dim % 2:
            raise ValueError(f"head_dim is even (xPos turns pairs), got {self.head_dim}.")
        if self.xpos_scale_base < 1:
            raise ValueError(f"xpos_scale_base is at least 1, got {self.xpos_scale_base}.")
        limit = length_limit(self)
        if limit is not None and limit < 1:
            raise ValueError(
                "max_position_embeddings is at least 1, or None without learned positions, got "
                f"{limit}."
            )
        if self.deepnorm and self.sub_norm:
            raise ValueError(
                "deepnorm and sub_norm are two ways to the same end, each with an initialisation "
                "of its own; set one of them to False."
            )


class DilatedAttention(nn.Module):
    """Dilated attention with xPos, a norm over all heads, and the state to go on from."""

    exchanges = True

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, width = config, config.hidden_size
        self.head_shape = config.num_attention_heads, config.head_dim
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        if config.sub_norm:
            self.inner_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.slots = DilatedSlots(config)
        self.log_decay = None
        if config.xpos:
            self.log_decay = Constant(functools.partial(xpos_log_decay, config))

    def init_weights_of_paper(self):
        """The authors' matrices and biases."""
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            init_linear_(linear)
        rescale_(self.config, self.v_proj)
        rescale_(self.config, self.out_proj)

    def state_specs(self):
        """Keys and values of selected tokens, in the dtype of the weights."""
        return self.slots.state_specs(dtype_of(self.k_proj))

    def flops_per_token(self, length):
        """Of its matrices, and of attention to the keys that heads select."""
        keys = self.slots.mean_keys(length)
        return linear_flops(self) + 4 * self.config.head_dim * keys

    def forward(self, x_BTD, sequence, state, rotation=None, plan=None):
        """Mixes a sequence [B, T, D]; returns it with the state after it."""
        q_BTHK, k_BTHK, v_BTHV = (
            proj(x_BTD).unflatten(-1, self.head_shape)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        # In layers on other devices tensors alone know the clocks.
        if plan is not None and not (state.is_kept and x_BTD.device.type == "cpu"):
            plan = None
        how = {"weight_gradient": self.config.branch_weight_gradient}
        if plan is not None and plan.turn is not None:
            q_BTHK, k_BTHK = plan.turned(q_BTHK), plan.turned(k_BTHK)
        elif rotation is not None:
            q_BTHK, k_BTHK = (rotate(x, *rotation, interleaved=True) for x in (q_BTHK, k_BTHK))
        if plan is None and self.log_decay is not None:
            how["log_decay"] = self.log_decay(x_BTD.device)
        dtype = dtype_of(self.k_proj)
        y_BTHV = self.slots.attend(q_BTHK, k_BTHK, v_BTHV, sequence, state, dtype, plan, **how)
        y_BTD = y_BTHV.flatten(2)
        if self.config.sub_norm:
            y_BTD = self.inner_norm(y_BTD)
        return self.out_proj(y_BTD), state


class LongNetBlock(TorchscaleBlock):
    """torchscale's block around dilated attention."""

    mixer_class = DilatedAttention
    mlp_class = FeedForward

    def build_norm(self, config):
        """The norm before attention and MLP, or after."""
        return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class LongNetPreTrainedModel(TorchscalePreTrainedModel):
    """LongNet's config, layers and initialisation for transformers."""

    config: LongNetConfig
    _no_split_modules = ["LongNetBlock"]
    _can_record_outputs = {"hidden_states": LongNetBlock}


class LongNetModel(LongNetPreTrainedModel, ZooModel):
    """LongNet's decoder."""

    block_class = LongNetBlock

    def __init__(self, config):
        super().__init__(config)
        log_decay = functools.partial(xpos_log_decay, config) if config.xpos else None
        self.slots = DilatedSlots(config, log_decay)
        if config.xpos:
            self.angle = Constant(functools.partial(xpos_angles, config))
        if length_limit(config) is not None:
            sizes = config.max_position_embeddings, config.hidden_size
            self.embed_positions = nn.Embedding(*sizes)
        if config.embedding_norm:
            self.embed_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def build_norm(self, config):
        """Post-norm blocks end in a norm of their own."""
        if not config.pre_norm:
            return nn.Identity()
        return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def embed(self, embeds_BTD, sequence):
        """Scale, learned positions and norm on the embeddings."""
        if self.config.scale_embedding:
            embeds_BTD = embeds_BTD * self.config.hidden_size**0.5
        if length_limit(self.config) is not None:
            positions_BT = sequence.unpack(sequence.positions)
            check_positions(positions_BT, self.config.max_position_embeddings)
            embeds_BTD = embeds_BTD + self.embed_positions(positions_BT)
        return self.embed_norm(embeds_BTD) if self.config.embedding_norm else embeds_BTD

    def mixer_inputs(self, x_BTD, sequence):
        """The rotation of each position and what a token sees, the same in all layers."""
        dtype = accumulator_dtype(x_BTD)
        inputs = {"plan": self.slots.plan(sequence, dtype)}
        if self.config.xpos:
            rotation = rotation_of(sequence.positions, self.angle(x_BTD.device))
            inputs["rotation"] = cos_BTHK, sin_BTHK = tuple(x.to(dtype) for x in rotation)
            if inputs["plan"] is not None:
                inputs["plan"].turn = torch.complex(cos_BTHK, sin_BTHK)
        return inputs


class LongNetForCausalLM(LongNetPreTrainedModel, ZooForCausalLM, GenerationMixin):
    """LongNet as a language model."""

    model_class = LongNetModel

    def visible_tokens(self, length):
        """Of so many tokens, those the last one's logits depend on, [length] bool."""
        return tokens_behind(self.config, length)


class LongNetForSequenceClassification(LongNetPreTrainedModel, ZooForSequenceClassification):
    """LongNet as a classifier of texts."""

    model_class = LongNetModel


class LongNetForTokenClassification(LongNetPreTrainedModel, ZooForTokenClassification):
    """LongNet as a classifier of tokens."""

    model_class = LongNetModel


class LongNetForQuestionAnswering(LongNetPreTrainedModel, ZooForQuestionAnswering):
    """LongNet as a finder of answers in a text."""

    model_class = LongNetModel


__all__ = [
    "LongNetConfig",
    "LongNetModel",
    "LongNetForCausalLM",
    "LongNetForSequenceClassification",
    "LongNetForTokenClassification",
    "LongNetForQuestionAnswering",
]
