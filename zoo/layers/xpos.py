"""xPos: rotations of queries and keys, and scores that decay with distance.

Sun et al. 2022, https://arxiv.org/abs/2212.10554. LongNet and softmax attention have both; RetNet
has the rotation alone, as its decay is that of the retention.
"""

import functools
import math

import torch
from torch import nn

from ..core.base import Constant
from .positions import rotation_of


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


def xpos_steepest(config):
    """-log of what a token of distance multiplies the first pair by: no other decays as fast."""
    return math.log(1.4 / 0.4) / config.xpos_scale_base


class Rotation(nn.Module):
    """RetNet's rotation: xPos without its decay (section 2.1, eq. 3 there)."""

    def __init__(self, config):
        super().__init__()
        self.angle = Constant(functools.partial(self.angles, config))

    @staticmethod
    def angles(config):
        """Radians per position for each pair of channels, [K / 2] in float64."""
        key_dim = config.key_size // config.num_attention_heads
        if config.rotation == "interleaved":
            return 10000 ** -torch.linspace(0, 1, key_dim // 2, dtype=torch.float64)
        return 10000 ** -(torch.arange(0, key_dim, 2, dtype=torch.float64) / key_dim)

    def forward(self, positions_BT):
        """(cos, sin) of each position, [B, T, 1, K / 2]."""
        return rotation_of(positions_BT, self.angle(positions_BT.device))
