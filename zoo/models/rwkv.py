"""What the four versions of RWKV share: token shift, blocks of time mix and channel mix, decoder.

A block is x + time_mix(norm(x)), then x + channel_mix(norm(x)); the norms are LayerNorms, and the
embeddings have one more of their own. There is no positional information: both mixes look at the
token before ("token shift"), and the recurrence knows the order. What comes before a document's
first token is zero.

Names follow the papers: r receptance, k key, v value, w decay, u bonus of the current token, g
gate. `mix_*` multiplies the current token and 1 - mix_* the previous one (RWKV-4 and 5, `time_mix`
in the authors' code); `mu_*` the other way round (RWKV-6 and 7, `time_maa` and `x_`).

The initialisation is that of the authors' trainers (BlinkDL/RWKV-LM, RWKV-v4neo and RWKV-v5).
Their schedules run over channels i of D and layers l of L; a model of one layer counts as the
first of several.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from ..core.base import ZooConfig, ZooModel, ZooPreTrainedModel
from ..core.flops import linear_flops
from ..core.state import StateSpec
from ..kernels.linear_recurrence import accumulator_dtype
from ..kernels.recurrence_steps import is_plain_step, takes_plain_step
from ..kernels.token_mix import mixed, takes_kernel, token_mix, tokens_before


@strict
class RwkvConfig(ZooConfig):
    """What the four versions have in common.

    Args:
        layer_norm_eps: epsilon of the LayerNorms.
        embedding_norm: a LayerNorm on the embeddings (`ln0`). Checkpoints that the `rwkv` package
            has prepared for inference have it in the embeddings already.
    """

    layer_norm_eps: float = 1e-5
    embedding_norm: bool = True


@strict
class RwkvHeadsConfig(RwkvConfig):
    """RWKV-5, 6 and 7: a state of one matrix per head.

    Args:
        key_size: width of r, k and the decay over all heads; None: hidden_size.
        value_size: width of v and the gate over all heads; None: key_size.
        head_size: channels of r and k in a head; None: key_size / num_attention_heads, or 64 (at
            most key_size) if that is left out too.
        num_attention_heads: None: key_size / head_size.
        head_norm_eps: epsilon of the norm of a head. The authors' is 1e-5 * 8^2: their trainer
            divides by 8 before a norm with 1e-5.
    """

    num_attention_heads: int | None = None
    key_size: int | None = None
    value_size: int | None = None
    head_size: int | None = None
    head_norm_eps: float = 64e-5

    def __post_init__(self, **kwargs):
        if self.key_size is None:
            self.key_size = self.hidden_size
        if self.value_size is None:
            self.value_size = self.key_size
        if self.head_size is None:
            heads = self.num_attention_heads
            default = min(64, self.key_size)
            self.head_size = default if heads is None else self.key_size // max(heads, 1)
        if self.num_attention_heads is None:
            self.num_attention_heads = self.key_size // max(self.head_size, 1)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Checks that widths divide into heads."""
        super().validate_architecture()
        heads = self.num_attention_heads
        if self.head_size < 1 or heads * self.head_size != self.key_size:
            raise ValueError(
                "key_size is a multiple of head_size, num_attention_heads times, "
                f"got {self.key_size} with {heads} heads of {self.head_size}; leave out "
                "num_attention_heads or head_size, or change the width."
            )
        if self.value_size < 1 or self.value_size % heads:
            raise ValueError(
                f"value_size is a multiple of num_attention_heads, got {self.value_size} with "
                f"{heads} heads; change one of them."
            )


class Shifted:
    """A text beside itself a token earlier, to be mixed.

    Args:
        x_BTD: a dense batch or a packed stream.
        sequence: its `Sequence`.
        before_ND: what came before each document's first token; None is zero.
    """

    def __init__(self, x_BTD, sequence, before_ND):
        self.x_BTD, self.before_ND, self.cu_seqlens = x_BTD, before_ND, sequence.cu_seqlens
        self.before_BTD = None
        if not takes_kernel(x_BTD):
            self.before_BTD = tokens_before(x_BTD, before_ND, sequence.cu_seqlens)

    def mix(self, mu_ND, corrections=(), of_current=False):
        """N tensors [B, T, D]; see `token_mix` (zoo/kernels/token_mix.py)."""
        if self.before_BTD is not None:
            return mixed(self.x_BTD, self.before_BTD, mu_ND, corrections, of_current)
        return token_mix(
            self.x_BTD,
            mu_ND,
            before=self.before_ND,
            corrections=corrections,
            cu_seqlens=self.cu_seqlens,
            of_current=of_current,
        )


def last_tokens(x_BTD, sequence):
    """Each document's last token, [N, D]."""
    if sequence.cu_seqlens is None:
        return x_BTD[:, -1]
    return x_BTD[0, sequence.cu_seqlens[1:] - 1]


class Mixer(nn.Module):
    """A time mix or channel mix: something with a token shift and its state."""

    shift_name: str
    # It brings what it needs of the slices before (zoo/core/parallel.py) by itself.
    exchanges = True

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx

    def state_specs(self):
        """The last token seen."""
        return {self.shift_name: StateSpec((self.config.hidden_size,))}

    def shift(self, x_BTD, sequence, state):
        """`Shifted` from the state and into it."""
        before_ND, ranks = getattr(state, self.shift_name), sequence.ranks
        last_ND = last_tokens(x_BTD, sequence) if state.is_kept or ranks is not None else None
        if ranks is not None:
            name = self.shift_name if state.is_kept else None
            before_ND = ranks.last_of_left(last_ND, name)
        if state.is_kept:
            # A copy: a view would keep all tokens of the pass in memory.
            last_ND = last_ND.to(accumulator_dtype(last_ND))
            setattr(state, self.shift_name, last_ND.clone(memory_format=torch.contiguous_format))
        return Shifted(x_BTD, sequence, before_ND)

    def shift_step(self, x_BTD, state):
        """(one token of each row [B, D], those before them, from the state), and into the state."""
        x_BD, before_BD = x_BTD[:, 0], getattr(state, self.shift_name)
        if state.is_kept:
            setattr(state, self.shift_name, x_BD.to(accumulator_dtype(x_BD)))
        if before_BD is None:
            return x_BD, torch.zeros_like(x_BD)
        return x_BD, before_BD.to(x_BD.dtype)

    def depth(self):
        """How deep the layer lies: 0 for the first to 1 for the last."""
        return self.layer_idx / max(self.config.num_hidden_layers - 1, 1)

    def shift_schedule(self, power=1.0, depth_power=1):
        """How much of the current token each channel takes [D].

        (i / D)^(power (1 - l / L)^depth_power): in deep layers mostly the current token.
        """
        rest = 1 - self.layer_idx / self.config.num_hidden_layers
        return unit_steps(self.config.hidden_size) ** (power * rest**depth_power)


class TimeMix(Mixer):
    """What the mixers have in common; see the versions' files."""

    shift_name = "mixer_shift_ND"


class ChannelMix(Mixer):
    """The MLP of RWKV-4 and 5: squared ReLU, gated by a receptance."""

    shift_name = "mlp_shift_ND"

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        width = config.hidden_size
        self.mix_k = nn.Parameter(torch.empty(width))
        self.mix_r = nn.Parameter(torch.empty(width))
        self.k_proj = nn.Linear(width, config.intermediate_size, bias=False)
        self.v_proj = nn.Linear(config.intermediate_size, width, bias=False)
        self.r_proj = nn.Linear(width, width, bias=False)

    def init_weights_of_paper(self):
        """Nothing at first: the outputs are zero."""
        init.copy_(self.mix_k, self.shift_schedule())
        init.copy_(self.mix_r, self.shift_schedule())
        orthogonal_(self.k_proj.weight)
        init.zeros_(self.v_proj.weight)
        init.zeros_(self.r_proj.weight)

    def forward(self, x_BTD, sequence, state):
        """Mixes each token with the one before and itself; returns it with the state after."""
        if takes_plain_step(sequence, x_BTD):
            x_BD, before_BD = self.shift_step(x_BTD, state)
            k_BF = self.k_proj(torch.lerp(before_BD, x_BD, self.mix_k)).relu().square_()
            r_BD = self.r_proj(torch.lerp(before_BD, x_BD, self.mix_r)).sigmoid()
            return (r_BD * self.v_proj(k_BF))[:, None], state
        mix_2D = torch.stack([self.mix_k, self.mix_r])
        k_BTD, r_BTD = self.shift(x_BTD, sequence, state).mix(mix_2D, of_current=True)
        k_BTF, r_BTD = self.k_proj(k_BTD).relu().square(), self.r_proj(r_BTD).sigmoid()
        return r_BTD * self.v_proj(k_BTF), state


class HeadNorm(nn.GroupNorm):
    """The norm of a head: over its channels, with a weight and a bias for each channel."""

    def __init__(self, config, layer_idx):
        super().__init__(config.num_attention_heads, config.value_size, eps=config.head_norm_eps)
        self.loudness = ((layer_idx + 1) / config.num_hidden_layers) ** 0.7

    def init_weights_of_paper(self):
        """Deeper layers speak louder."""
        init.constant_(self.weight, self.loudness)
        init.zeros_(self.bias)

    def forward(self, y_BTHV):
        """[B, T, H, V] to the same, in the input's dtype, which may be wider than the weight's."""
        size = y_BTHV.shape[-2:]
        if is_plain_step(y_BTHV) and y_BTHV.dtype == self.weight.dtype:
            return super().forward(y_BTHV.reshape(-1, self.num_channels)).view(y_BTHV.shape)
        y_BTHV = nn.functional.layer_norm(y_BTHV, size[1:], eps=self.eps)
        return y_BTHV * self.weight.view(size) + self.bias.view(size)


def unit_steps(size, include_end=False):
    """i / size for each i below it [size], or i / (size - 1), in float64."""
    steps = torch.arange(size, dtype=torch.float64)
    return steps / (max(size - 1, 1) if include_end else size)


def orthogonal_(weight, gain=1.0):
    """Fills a weight with a random (semi-)orthogonal matrix times `gain`."""
    init.orthogonal_(weight, gain=gain)


def init_decay_and_bonus_(mixer):
    """The schedules of RWKV-5 and 6 over the channels of k: slow to fast decay, bonus to none."""
    depth, steps_D = mixer.depth(), unit_steps(mixer.config.key_size, include_end=True)
    decay_D = -6 + 5 * steps_D ** (0.7 + 1.3 * depth)
    init.copy_(mixer.time_decay, decay_D.view(mixer.time_decay.shape))
    zigzag_D = (torch.arange(len(steps_D)) + 1) % 3 - 1
    bonus_D = depth * (1 - steps_D) + 0.1 * zigzag_D
    init.copy_(mixer.bonus, bonus_D.view(mixer.bonus.shape))


class RwkvBlock(GradientCheckpointingLayer):
    """x + time_mix(norm(x)), then x + channel_mix(norm(x))."""

    mixer_class: type[TimeMix]
    mlp_class: type[Mixer] = ChannelMix

    def __init__(self, config, layer_idx):
        super().__init__()
        self.mixer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mixer = self.mixer_class(config, layer_idx)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = self.mlp_class(config, layer_idx)

    @property
    def exchanges(self):
        """As of `ZooModel`."""
        return self.mixer.exchanges and self.mlp.exchanges

    def state_specs(self):
        """The `StateSpec`s of both mixes by name."""
        return self.mixer.state_specs() | self.mlp.state_specs()

    def flops_per_token(self, length):
        """As of `ZooModel`."""
        return self.mixer.flops_per_token(length) + linear_flops(self.mlp)

    def forward(self, x_BTD, sequence, state, *carried):
        """Returns (x_BTD, state, what goes on to the next block); the state given stays as it is.

        `carried` is what the block before passed on, and the mixer takes and returns.
        """
        normed_BTD = self.mixer_norm(x_BTD)
        y_BTD, state, *carried = self.mixer(normed_BTD, sequence, state.copy(), *carried)
        x_BTD = x_BTD + y_BTD
        y_BTD, state = self.mlp(self.mlp_norm(x_BTD), sequence, state)
        return x_BTD + y_BTD, state, *carried


class RwkvPreTrainedModel(ZooPreTrainedModel):
    """The initialisation of what lies outside the blocks."""

    config: RwkvConfig
    _can_record_outputs = {"hidden_states": RwkvBlock}

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        # Small embeddings, which their norm scales up again: they learn fast (RWKV-4, section 4).
        if isinstance(module, nn.Embedding):
            init.uniform_(module.weight, -1e-4, 1e-4)
        elif module is getattr(self, "lm_head", None) and not self.config.tie_word_embeddings:
            rows, columns = module.weight.shape
            orthogonal_(module.weight, gain=0.5 * max(1.0, rows / columns) ** 0.5)


class RwkvModel(RwkvPreTrainedModel, ZooModel):
    """The decoder."""

    def __init__(self, config):
        super().__init__(config)
        if config.embedding_norm:
            self.embed_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            self.post_init()

    def build_norm(self, config):
        """The norm after the last block."""
        return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def embed(self, embeds_BTD, sequence):
        """The norm on the embeddings."""
        return self.embed_norm(embeds_BTD) if self.config.embedding_norm else embeds_BTD
