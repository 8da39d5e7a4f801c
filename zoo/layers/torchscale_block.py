"""What torchscale puts around its attentions: residual block, MLPs, initialisation.

https://github.com/microsoft/torchscale, from which RetNet and LongNet come. Two ways to train many
layers are options of it. Magneto (Wang et al. 2022, https://arxiv.org/abs/2210.06423): a norm
inside attention and MLP, and an initialisation to go with it. DeepNorm (Wang et al. 2022,
https://arxiv.org/abs/2203.00555): the residual stream times (2L)^(1/4), and weights divided by
(8L)^(1/4).
"""

import math

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from ..core.base import ZooBlock, ZooPreTrainedModel, scale_


class TorchscaleBlock(ZooBlock):
    """A block with torchscale's options: norms before or after, and deepnorm's residual scale."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.pre_norm = config.pre_norm
        self.alpha = (2 * config.num_hidden_layers) ** 0.25 if config.deepnorm else 1.0

    def scaled(self, x_BTD):
        """The residual stream, with deepnorm times (2L)^(1/4)."""
        return x_BTD if self.alpha == 1.0 else self.alpha * x_BTD

    def added(self, y_BTD):
        """What the output of mixer or MLP adds to the residual stream."""
        return y_BTD

    def forward(self, x_BTD, sequence, state, **inputs):
        """Returns (x_BTD, state); the state that came in is left as it was."""
        y_BTD = self.mixer_norm(x_BTD) if self.pre_norm else x_BTD
        y_BTD, state = self.mixer(y_BTD, sequence, state.copy(), **inputs)
        x_BTD = self.scaled(x_BTD) + self.added(y_BTD)
        if not self.pre_norm:
            x_BTD = self.mixer_norm(x_BTD)
        y_BTD = self.mlp(self.mlp_norm(x_BTD) if self.pre_norm else x_BTD)
        x_BTD = self.scaled(x_BTD) + self.added(y_BTD)
        return x_BTD if self.pre_norm else self.mlp_norm(x_BTD), state


class TorchscalePreTrainedModel(ZooPreTrainedModel):
    """The initialisation of embeddings and output projection."""

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        # Both have variance 1 / D.
        if isinstance(module, nn.Embedding) or module is getattr(self, "lm_head", None):
            init.normal_(module.weight, std=self.config.hidden_size**-0.5)


def deepnorm_(config, *weights):
    """Divides freshly initialised weights by (8L)^(1/4), if the config says deepnorm."""
    if config.deepnorm:
        for weight in weights:
            scale_(weight, (8 * config.num_hidden_layers) ** -0.25)


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


class MLP(nn.Module):
    """RetNet's feed-forward part: gated (torchscale's GLU, SwiGLU) or plain with a norm inside."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        width, bias = config.intermediate_size, not config.gated_mlp
        self.up_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=bias)
        if config.gated_mlp:
            self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        elif not config.deepnorm:
            self.inner_norm = nn.LayerNorm(width, eps=config.rms_norm_eps)
        self.act = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.activation_dropout)

    def init_weights_of_paper(self):
        """PyTorch's default for a linear layer, as torchscale leaves it; scaled by deepnorm."""
        for linear in self.children():
            if isinstance(linear, nn.Linear):
                init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
                if linear.bias is not None:
                    bound = linear.in_features**-0.5
                    init.uniform_(linear.bias, -bound, bound)
        # torchscale's deepnorm scales its fc1 and fc2: the activated branch and the output.
        activated = self.gate_proj if self.config.gated_mlp else self.up_proj
        deepnorm_(self.config, activated.weight, self.down_proj.weight)

    def forward(self, x_BTD):
        """[B, T, D] to the same."""
        if self.config.gated_mlp:
            h_BTF = self.act(self.gate_proj(x_BTD)) * self.up_proj(x_BTD)
        else:
            h_BTF = self.act(self.up_proj(x_BTD))
        if self.dropout.training:
            h_BTF = self.dropout(h_BTF)
        if not self.config.gated_mlp and not self.config.deepnorm:
            h_BTF = self.inner_norm(h_BTF)
        return self.down_proj(h_BTF)


class FeedForward(nn.Module):
    """LongNet's feed-forward part, down(norm(act(up x))); the norm with sub_norm only."""

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
