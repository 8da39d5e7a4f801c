"""The MLPs of most blocks: gated (Shazeer 2020, https://arxiv.org/abs/2002.05202), and plain."""

import torch
from torch import nn
from transformers.activations import ACT2FN


class BloomGELU(nn.Module):
    """x/2 (1 + tanh(0.79788456 x (1 + 0.044715 x^2))): BLOOM's, with its rounded sqrt(2/pi).

    It differs from gelu_pytorch_tanh by 3e-10.
    """

    def forward(self, x):
        """Any shape to the same."""
        return 0.5 * x * (1 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


# Beside transformers' own.
OWN_ACTIVATIONS = {"gelu_bloom": BloomGELU}


def activation(name):
    """The module of a name in transformers' ACT2FN or in `OWN_ACTIVATIONS`; None: x itself."""
    if name is None:
        return nn.Identity()
    return OWN_ACTIVATIONS[name]() if name in OWN_ACTIVATIONS else ACT2FN[name]


class GatedMLP(nn.Module):
    """down(act(gate x) * up x): SwiGLU with silu, GEGLU with gelu, SGLU without an activation.

    Args:
        config: with hidden_size, intermediate_size and hidden_act, as of `activation`.
        bias: in all three.
    """

    def __init__(self, config, bias=False):
        super().__init__()
        width, size = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, size, bias=bias)
        self.up_proj = nn.Linear(width, size, bias=bias)
        self.down_proj = nn.Linear(size, width, bias=bias)
        self.act = activation(config.hidden_act)

    def forward(self, x_BTD):
        """[B, T, D] to the same."""
        return self.down_proj(self.act(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class PlainMLP(nn.Module):
    """down(act(up x)), the MLP of GPT and its kin.

    Args:
        config: with hidden_size, intermediate_size and hidden_act, as of `activation`.
        bias: in both.
    """

    def __init__(self, config, bias=False):
        super().__init__()
        width, size = config.hidden_size, config.intermediate_size
        self.up_proj = nn.Linear(width, size, bias=bias)
        self.down_proj = nn.Linear(size, width, bias=bias)
        self.act = activation(config.hidden_act)

    def forward(self, x_BTD):
        """[B, T, D] to the same."""
        return self.down_proj(self.act(self.up_proj(x_BTD)))
