"""Norms that are neither PyTorch's RMSNorm nor its LayerNorm, and choices between norms."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init


class WideRMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps), and a weight if it has one.

    In the dtype of its input, which may be wider than the weight's.
    """

    def forward(self, x):
        """[..., size] to the same."""
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class GemmaNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) (1 + weight)."""

    def init_weights_of_paper(self):
        """The weight at 0."""
        init.zeros_(self.weight)

    def forward(self, x_BTD):
        """[B, T, D] to the same; in float32 at least, as 16 bits would round 1 + weight."""
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        weight = 1 + self.weight.to(dtype)
        normed_BTD = F.rms_norm(x_BTD.to(dtype), self.normalized_shape, weight, self.eps)
        return normed_BTD.to(x_BTD.dtype)


def llama_or_gemma_norm(config):
    """An RMSNorm of a config's hidden_size and rms_norm_eps; Gemma's if it has norm_adds_one."""
    norm_class = GemmaNorm if config.norm_adds_one else nn.RMSNorm
    return norm_class(config.hidden_size, eps=config.rms_norm_eps)


def rms_or_layer_norm(config):
    """The norm of a config's norm_type, "rms" or "layer", with a bias if it has norm_bias."""
    if config.norm_type == "rms":
        return nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps, bias=config.norm_bias)
