"""The MLPs of most blocks: gated (Shazeer 2020, https://arxiv.org/abs/2002.05202), and plain."""

from torch import nn
from transformers.activations import ACT2FN


class GatedMLP(nn.Module):
    """down(act(gate x) * up x): SwiGLU with silu, GEGLU with gelu, SGLU without an activation.

    Args:
        config: with hidden_size, intermediate_size and hidden_act, a name in transformers' ACT2FN
            or None.
        bias: in all three.
    """

    def __init__(self, config, bias=False):
        super().__init__()
        width, size = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, size, bias=bias)
        self.up_proj = nn.Linear(width, size, bias=bias)
        self.down_proj = nn.Linear(size, width, bias=bias)
        self.act = nn.Identity() if config.hidden_act is None else ACT2FN[config.hidden_act]

    def forward(self, x_BTD):
        """[B, T, D] to the same."""
        return self.down_proj(self.act(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class PlainMLP(nn.Module):
    """down(act(up x)), the MLP of GPT and its kin.

    Args:
        config: with hidden_size, intermediate_size and hidden_act, a name in transformers' ACT2FN.
        bias: in both.
    """

    def __init__(self, config, bias=False):
        super().__init__()
        width, size = config.hidden_size, config.intermediate_size
        self.up_proj = nn.Linear(width, size, bias=bias)
        self.down_proj = nn.Linear(size, width, bias=bias)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x_BTD):
        """[B, T, D] to the same."""
        return self.down_proj(self.act(self.up_proj(x_BTD)))
