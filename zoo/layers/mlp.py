"""The gated MLP of most blocks (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

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
