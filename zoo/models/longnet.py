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
    ZooPreTrainedModel,
    check_activation,
    scale_,
)
from ..core.state import SlidingStateLayer, StateSpec, dtype_of
from ..core.window import document_spans, row_spans
from ..kernels.dilated_attention import (
    Held,
    branches_of,
    dilated_attention,
    dilated_attention_step,
    hold,
    write_slots,
)
from ..layers.positions import rotate, rotation_of


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
        if self.max_position_embeddings is not None and self.max_position_embeddings < 1:
            raise ValueError(
                "max_position_embeddings is at least 1, or None without learned positions, got "
                f"{self.max_position_embeddings}."
            )
        if self.deepnorm and self.sub_norm:
            raise ValueError(
                "deepnorm and sub_norm are two ways to the same end, each with an initialisation "
                "of its own; set one of them to False."
            )


def xpos_angles(config):
    """Radians per token for each pair of channels, [K / 2] in float64."""
    return 10000 ** -(torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)


def xpos_zeta(config):
    """zeta of each pair of channels, [K / 2] in float64."""
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.float64)
    return (steps + 0.4 * config.head_dim) / (1.4 * config.head_dim)


def xpos_log_decay(config):
    """log of what a token of distance multiplies each channel of a score by, [K] in float64."""
    return xpos_zeta(config).log().repeat_interleave(2) / config.xpos_scale_base


def rescale_(config, linear):
    """Initialisation of a value or output projection, biases too: Magneto's, or deepnorm's."""
    layers = config.num_hidden_layers
    factor = math.sqrt(math.log(2 * layers)) if config.sub_norm else 1.0
    if config.deepnorm:
        factor = (8 * layers) ** -0.25
    for parameter in (linear.weight, linear.bias):
        scale_(parameter, factor)


def init_linear_(linear):
    """PyTorch's default, as torchscale leaves it."""
    bound = linear.in_features**-0.5
    init.uniform_(linear.weight, -bound, bound)
    init.uniform_(linear.bias, -bound, bound)


class DilatedAttention(nn.Module):
    """Dilated attention with xPos, a norm over all heads, and the state to go on from."""

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
        self.branches = config.segment_lengths, config.dilation_rates
        self.settings = {"offsets": config.head_offsets}
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
        dtype, (heads, head_dim) = dtype_of(self.k_proj), self.head_shape
        last = branches_of(*self.branches)[-1]
        slots = StateSpec((heads, last.first + last.count, head_dim), dtype=dtype)
        return {"keys_BHMK": slots, "values_BHMV": slots}

    def forward(self, x_BTD, sequence, state, rotation=None):
        """Mixes a sequence [B, T, D]; returns it with the state after it."""
        q_BTHK, k_BTHK, v_BTHV = (
            proj(x_BTD).unflatten(-1, self.head_shape)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rotation is not None:
            q_BTHK, k_BTHK = (rotate(x, *rotation, interleaved=True) for x in (q_BTHK, k_BTHK))
        is_step = x_BTD.shape[1] == 1 and sequence.cu_seqlens is None and state.is_kept
        run = self.run_step if is_step else self.run_pass
        attention = self.settings | {"weight_gradient": self.config.branch_weight_gradient}
        if self.log_decay is not None:
            attention["log_decay"] = self.log_decay(x_BTD.device)
        y_BTD = run(q_BTHK, k_BTHK, v_BTHV, sequence, state, attention).flatten(2)
        if self.config.sub_norm:
            y_BTD = self.inner_norm(y_BTD)
        return self.out_proj(y_BTD), state

    def run_pass(self, q_BTHK, k_BTHK, v_BTHV, sequence, state, attention):
        """Any number of tokens, dense or packed, after what the state holds."""
        held = None
        if state.keys_BHMK is not None:
            slots = state.keys_BHMK, state.values_BHMV
            count_N = document_spans(sequence).start
            held = Held(*slots, count_N, sequence.row_of_document)
        y_BTHV = dilated_attention(
            q_BTHK,
            k_BTHK,
            v_BTHV,
            *self.branches,
            cu_seqlens=sequence.cu_seqlens,
            held=held,
            **attention,
        )
        if state.is_kept:
            spans, dtype = row_spans(sequence), self.state_specs()["keys_BHMK"].dtype
            for name, x_BTHK in (("keys_BHMK", k_BTHK), ("values_BHMV", v_BTHV)):
                x_BTHK = x_BTHK if dtype is None else x_BTHK.to(dtype)
                held, where = getattr(state, name), (spans.first, spans.start, spans.after)
                slots = hold(x_BTHK, held, *self.branches, *where, **self.settings)
                setattr(state, name, slots)
        return y_BTHV

    def run_step(self, q_BTHK, k_BTHK, v_BTHV, sequence, state, attention):
        """One token per row: writes its slots, and looks at those it sees."""
        clock_B = sequence.clock[:, 0].expand(q_BTHK.shape[0])
        for name, x_BTHK in (("keys_BHMK", k_BTHK), ("values_BHMV", v_BTHV)):
            slots, spec = getattr(state, name), self.state_specs()[name]
            if slots is None:
                slots = x_BTHK.new_zeros(clock_B.shape[0], *spec.shape, dtype=spec.dtype)
            token = x_BTHK[:, 0], clock_B, *self.branches
            how = {"is_written": sequence.keep, "may_overwrite": state.may_overwrite}
            setattr(state, name, write_slots(slots, *token, **how, **self.settings))
        slots = state.keys_BHMK, state.values_BHMV
        return dilated_attention_step(q_BTHK, *slots, clock_B, *self.branches, **attention)


class FeedForward(nn.Module):
    """down(norm(act(up x))), the norm with sub_norm only."""

    def __init__(self, config):
        super().__init__()
        self.config, size = config, config.intermediate_size
        self.up_proj = nn.Linear(config.hidden_size, size)
        self.down_proj = nn.Linear(size, config.hidden_size)
        self.act = ACT2FN[config.hidden_act]
        if config.sub_norm:
            self.inner_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)

    def init_weights_of_paper(self):
        """The authors' matrices and biases."""
        for linear in (self.up_proj, self.down_proj):
            init_linear_(linear)
            rescale_(self.config, linear)

    def forward(self, x_BTD):
        """[B, T, D] to the same."""
        h_BTF = self.act(self.up_proj(x_BTD))
        return self.down_proj(self.inner_norm(h_BTF) if self.config.sub_norm else h_BTF)


class LongNetBlock(ZooBlock):
    """A block with torchscale's options: norms before or after, and deepnorm's residual scale."""

    mixer_class = DilatedAttention
    mlp_class = FeedForward

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.pre_norm = config.pre_norm
        self.alpha = (2 * config.num_hidden_layers) ** 0.25 if config.deepnorm else 1.0

    def build_norm(self, config):
        """The norm before attention and MLP, or after."""
        return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x_BTD, sequence, state, **inputs):
        """Returns (x_BTD, state); the state that came in is left as it was."""
        y_BTD = self.mixer_norm(x_BTD) if self.pre_norm else x_BTD
        y_BTD, state = self.mixer(y_BTD, sequence, state.copy(), **inputs)
        x_BTD = self.alpha * x_BTD + y_BTD
        if self.pre_norm:
            return self.alpha * x_BTD + self.mlp(self.mlp_norm(x_BTD)), state
        x_BTD = self.mixer_norm(x_BTD)
        return self.mlp_norm(self.alpha * x_BTD + self.mlp(x_BTD)), state


class LongNetPreTrainedModel(ZooPreTrainedModel):
    """LongNet's config, layers and initialisation for transformers."""

    config: LongNetConfig
    _no_split_modules = ["LongNetBlock"]
    _can_record_outputs = {"hidden_states": LongNetBlock}

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        # torchscale: embeddings and output projection have variance 1 / D.
        if isinstance(module, nn.Embedding) or module is getattr(self, "lm_head", None):
            init.normal_(module.weight, std=self.config.hidden_size**-0.5)


class LongNetModel(LongNetPreTrainedModel, ZooModel):
    """LongNet's decoder."""

    block_class = LongNetBlock

    def __init__(self, config):
        super().__init__(config)
        if config.xpos:
            self.angle = Constant(functools.partial(xpos_angles, config))
        if config.max_position_embeddings is not None:
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
        if self.config.max_position_embeddings is not None:
            positions_BT = sequence.unpack(sequence.positions)
            self.check_positions(positions_BT)
            embeds_BTD = embeds_BTD + self.embed_positions(positions_BT)
        return self.embed_norm(embeds_BTD) if self.config.embedding_norm else embeds_BTD

    def check_positions(self, positions_BT):
        """Raises a ValueError for positions that the table does not have."""
        length = self.config.max_position_embeddings
        if torch.compiler.is_compiling():
            return
        fits = (positions_BT < length).all()
        if positions_BT.device.type != "cpu":
            torch._assert_async(fits)  # reading the value would stall the host
        elif not fits:
            raise ValueError(
                f"learned positions end at max_position_embeddings = {length}, got position "
                f"{int(positions_BT.max())}; shorten the text, or train with a larger table."
            )

    def mixer_inputs(self, x_BTD, sequence):
        """The rotation of each position, the same in all layers."""
        if not self.config.xpos:
            return {}
        return {"rotation": rotation_of(sequence.positions, self.angle(x_BTD.device))}


class LongNetForCausalLM(LongNetPreTrainedModel, ZooForCausalLM, GenerationMixin):
    """LongNet as a language model."""

    model_class = LongNetModel

    def visible_tokens(self, length):
        """Of so many tokens, those the last one's logits depend on, [length] bool."""
        config, tokens_T = self.config, torch.arange(length)
        seen_T = tokens_T == length - 1
        for _ in range(config.num_hidden_layers):
            before_T = seen_T.clone()
            for branch in branches_of(config.segment_lengths, config.dilation_rates):
                segment_T, u_T = tokens_T // branch.length, tokens_T % branch.length
                heads = config.num_attention_heads
                for offset in branch.offsets(heads, config.head_offsets, "cpu").unique():
                    has_T = u_T % branch.rate == offset
                    # In each segment all up to the last that was seen from above.
                    last_T = torch.where(has_T & before_T, tokens_T, -1)
                    last_N = torch.full((int(segment_T[-1]) + 1,), -1)
                    last_N = last_N.scatter_reduce(0, segment_T, last_T, "amax")
                    seen_T = seen_T | (has_T & (tokens_T <= last_N[segment_T]))
        return seen_T


class LongNetForSequenceClassification(LongNetPreTrainedModel, ZooForSequenceClassification):
    """LongNet as a classifier."""

    model_class = LongNetModel


__all__ = [
    "LongNetConfig",
    "LongNetModel",
    "LongNetForCausalLM",
    "LongNetForSequenceClassification",
]
