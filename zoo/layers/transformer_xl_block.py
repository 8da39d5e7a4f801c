"""Transformer-XL's block: norms after the sums, or before what is summed.

The mathematics is that of `zoo/models/transformer_xl.py`.
"""

from torch import nn
from transformers import initialization as init

from ..core.base import ZooBlock
from .mlp import PlainMLP
from .relative_attention import RelativeAttention


class NoisyLayerNorm(nn.LayerNorm):
    """A LayerNorm whose weight begins around 1."""

    def __init__(self, config):
        super().__init__(config.hidden_size, eps=config.layer_norm_epsilon)
        self.std = config.initializer_range

    def init_weights_of_paper(self):
        """As the authors' code; the bias at 0."""
        init.normal_(self.weight, mean=1.0, std=self.std)


class RelativeBlock(ZooBlock):
    """Attention and MLP, each with its residual sum and its norm."""

    build_norm = staticmethod(NoisyLayerNorm)

    @staticmethod
    def mlp_class(config):
        """ReLU, with biases."""
        return PlainMLP(config, bias=True)

    def forward(self, x_BTD, sequence, state, **inputs):
        """As of `ZooBlock`."""
        config = self.mixer.config
        if config.pre_lnorm:
            inputs["norm"] = self.mixer_norm
            if config.zero_memory:
                # Its bias, which is in place only while the norm itself is called.
                inputs["nothing_D"] = self.mixer_norm(x_BTD.new_zeros(x_BTD.shape[-1]))
        y_BTD, state = self.mixer(x_BTD, sequence, state.copy(), **inputs)
        x_BTD = x_BTD + y_BTD
        if config.pre_lnorm:
            return x_BTD + self.mlp(self.mlp_norm(x_BTD)), state
        x_BTD = self.mixer_norm(x_BTD)
        return self.mlp_norm(x_BTD + self.mlp(x_BTD)), state


class TransformerXLBlock(RelativeBlock):
    """The block without tokens of memory."""

    mixer_class = RelativeAttention
