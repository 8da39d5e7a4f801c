"""MiniMax-Text-01's block, https://arxiv.org/abs/2501.08313: factors, and layers of two kinds.

The residual stream may go on from the normalised input, alpha norm(x) + beta f(norm(x)). Some
layers, there every eighth, have softmax attention in the mixer's place, which is that of
`zoo/models/sliding_window.py`: the state of such a hybrid grows with the text unless
`sliding_window` bounds it.
"""

from typing import ClassVar

from huggingface_hub.dataclasses import strict

from ..core.base import ZooBlock, ZooConfig
from .position_fields import POSITION_FIELDS, check_position_fields, position_types, turns
from .softmax_attention import (
    OUR_IMPLEMENTATIONS,
    SoftmaxPreTrainedModel,
    check_implementation,
    check_key_value_heads,
    check_window,
    softmax_layer_type,
    state_is_list_of_tokens,
)

SOFTMAX_FIELDS = (
    "softmax_alpha",
    "softmax_beta",
    "num_key_value_heads",
    "rope_parameters",
    "max_position_embeddings",
    "sliding_window",
    "attention_scale",
    "rope_extension",
)
# Those that are not None without softmax layers, but quiet: they have their defaults.
QUIET_FIELDS = {"position_embedding_type": "rope"} | {
    name: default for name, (_, default) in POSITION_FIELDS.items()
}


@strict
class MiniMaxBlockConfig(ZooConfig):
    """The fields of MiniMax's block, for architectures that can have it.

    Args:
        residual_of_norm: the residual stream goes on from the normalised input (MiniMax).
        attention_alpha: factor on the residual stream where the mixer's output is added.
        attention_beta: factor on the mixer's output.
        mlp_alpha: factor on the residual stream where the MLP is added.
        mlp_beta: factor on what the MLP adds.
        softmax_layers: indices of the layers with softmax attention instead; MiniMax-Text-01 has
            every eighth, list(range(7, 80, 8)). The fields below are theirs, and without them None
            or as they are by default.
        softmax_alpha: factor on the residual stream where softmax attention is added; None:
            attention_alpha.
        softmax_beta: factor on what softmax attention adds; None: attention_beta.
        num_key_value_heads: heads of keys and values; None: num_attention_heads.
        rope_parameters: as in `SlidingWindowConfig`; MiniMax-Text-01 turns half of each head:
            {"rope_theta": 10e6, "partial_rotary_factor": 0.5}.
        max_position_embeddings: as in `SlidingWindowConfig`.
        sliding_window: tokens softmax attention sees, the current one included; None: all.
        position_embedding_type: as in `SlidingWindowConfig`; a list has one entry for each layer of
            the model, None for those without softmax attention.
        alibi_bias_max, relative_attention_num_buckets, relative_attention_max_distance,
            fire_mlp_width, fire_init_c, fire_init_length, xpos_scale_base, attention_scale,
            rope_extension: as there.
    """

    hybrids: ClassVar[str] = "leave them out, and name the layers with softmax in softmax_layers."

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
    position_embedding_type: str | list[str | None] | None = "rope"
    alibi_bias_max: int | float = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    fire_mlp_width: int = 32
    fire_init_c: float = 0.1
    fire_init_length: int = 512
    xpos_scale_base: int = 512
    attention_scale: float | int | None = None
    rope_extension: dict | None = None

    def __post_init__(self, **kwargs):
        if self.softmax_layers is None:
            self.softmax_layers = []
        if self.softmax_layers:
            if self.num_key_value_heads is None:
                self.num_key_value_heads = self.num_attention_heads
            if self.softmax_alpha is None:
                self.softmax_alpha = self.attention_alpha
            if self.softmax_beta is None:
                self.softmax_beta = self.attention_beta
            has_rope = turns(self) or bool(self.rope_parameters)
            # transformers fills the rest of it in.
            self.rope_parameters = dict(self.rope_parameters or {})
        else:
            has_rope = self.rope_parameters is not None
        super().__post_init__(**kwargs)
        if not has_rope:  # transformers fills that in too
            self.rope_parameters = None

    def to_dict(self):
        """As in `ZooConfig`; what only softmax layers have stays out where it says nothing.

        Other libraries count on a number of key heads that is there to be one.
        """
        values = super().to_dict()
        quiet = {} if self.softmax_layers else QUIET_FIELDS
        return {
            name: x
            for name, x in values.items()
            if name not in quiet and (x is not None or name not in SOFTMAX_FIELDS)
        }

    @property
    def layer_types(self):
        """As in `ZooConfig`; those of `softmax_layers` have a cache of another kind."""
        softmax = softmax_layer_type(self.sliding_window)
        layers = range(self.num_hidden_layers)
        return [softmax if i in self.softmax_layers else self.layer_type for i in layers]

    @property
    def state_is_list_of_tokens(self):
        """As in `ZooConfig`: where all layers have softmax attention."""
        is_softmax = {*range(self.num_hidden_layers)} <= {*self.softmax_layers}
        return is_softmax and state_is_list_of_tokens(self)

    @layer_types.setter
    def layer_types(self, value):
        ZooConfig.layer_types.fset(self, value)

    def check_layers(self, name):
        """Raises a ValueError if a field does not hold indices of layers."""
        layers, indices = self.num_hidden_layers, getattr(self, name)
        if not all(0 <= layer < layers for layer in indices):
            raise ValueError(f"{name} are indices from 0 to {layers - 1}, got {indices}.")

    def check_softmax_layers(self):
        """Raises a ValueError if softmax attention cannot be built, or has fields but no layer."""
        if not self.softmax_layers:
            quiet = dict.fromkeys(SOFTMAX_FIELDS) | QUIET_FIELDS
            set_fields = [n for n, x in quiet.items() if getattr(self, n, x) != x]
            if set_fields:
                raise ValueError(
                    f"{', '.join(set_fields)}: for layers with softmax attention, got no "
                    "softmax_layers; name those layers, or leave this out."
                )
            return
        check_key_value_heads(self)
        check_window(self.sliding_window)
        check_position_fields(self, layers=self.softmax_layers)


class MiniMaxBlock(ZooBlock):
    """A pre-norm block; with MiniMax's options, its residual is the normalised input."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.config = config
        self.is_softmax = layer_idx in config.softmax_layers
        self.alpha, self.beta = config.attention_alpha, config.attention_beta
        if self.is_softmax:
            self.alpha, self.beta = config.softmax_alpha, config.softmax_beta

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


class MiniMaxBlockPreTrainedModel(SoftmaxPreTrainedModel):
    """What transformers is told of a model that may have layers with softmax attention."""

    def post_init(self):
        """What transformers does when all modules are there."""
        super().post_init()
        if not self.config.softmax_layers:
            self._supports_sdpa = self._supports_flash_attn = self._supports_flex_attn = False

    def get_correct_attn_implementation(self, requested_attention, is_init_check=False):
        """The implementation of softmax attention that was asked for, if there is any."""
        ours = (None, *OUR_IMPLEMENTATIONS)
        if not self.config.softmax_layers and requested_attention not in ours:
            raise ValueError(
                "attn_implementation is about layers with softmax attention, got "
                f"{requested_attention!r} and no softmax_layers; leave it out."
            )
        if requested_attention is not None:
            types = position_types(self.config)
            types = [types[layer] for layer in self.config.softmax_layers]
            check_implementation(requested_attention, 0, False, types)
        return super().get_correct_attn_implementation(requested_attention, is_init_check)
