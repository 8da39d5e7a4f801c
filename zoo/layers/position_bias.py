"""Positions as numbers that are added to the scaled scores of softmax attention, by distance.

A query at place i of its document sees a key at place j <= i; d = i - j. Per head h of queries:

    "alibi"   -m_h d, slopes m_h that fall by powers of two (Press et al. 2021,
              https://arxiv.org/abs/2108.12409)
    "t5"      table[bucket(d), h]: a bucket for each small distance, then buckets that grow with the
              logarithm (Raffel et al. 2019, https://arxiv.org/abs/1910.10683)

Distances are whole numbers and biases are formed in float32 at least: a slope times the key's own
place, which comes to the same before rounding, is off by 4.5 in bfloat16 at the 4,095th token.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from ..core.base import Constant
from .decay_slopes import alibi_slopes


def position_bias(config, kind):
    """The module of a layer of that type; None for types that add nothing to scores."""
    classes = {"alibi": AlibiBias, "t5": T5Bias}
    return classes[kind](config) if kind in classes else None


def alibi_log_decay(config):
    """What a token of distance adds to the scores of each head, -m, [H] in float64."""
    slopes = alibi_slopes(config.num_attention_heads, config.alibi_bias_max)
    return -torch.tensor(slopes, dtype=torch.float64)


def t5_buckets(num_buckets, max_distance, lifted=0.0):
    """T5's bucket of each distance from 0 to max_distance, which all beyond share; in Python.

    Half of the buckets hold one distance each, the others grow with the logarithm.

    Args:
        num_buckets: how many.
        max_distance: from which on all is in the last one.
        lifted: added to the ratio of which the logarithm is taken.
    """
    exact = num_buckets // 2
    growth = (num_buckets - exact) / math.log(max_distance / exact)

    def bucket(n):
        if n < exact:
            return n
        return min(exact + int(math.log(n / exact + lifted) * growth), num_buckets - 1)

    return torch.tensor([bucket(n) for n in range(max_distance + 1)])


class DistanceBias(nn.Module):
    """A bias that depends on the distance alone."""

    def by_distance(self, distance, dtype):
        """The bias of each head at these distances, [H, *distance.shape]."""
        raise NotImplementedError

    def below(self, size, dtype, device):
        """Of the distances below `size`, [H, size]."""
        return self.by_distance(torch.arange(size, device=device), dtype)


class AlibiBias(DistanceBias):
    """-m_h d, with slopes that are not learned."""

    def __init__(self, config):
        super().__init__()
        self.log_decay = Constant(functools.partial(alibi_log_decay, config))

    def by_distance(self, distance, dtype):
        """As of `DistanceBias`."""
        slopes_H = self.log_decay(distance.device).to(dtype)
        return slopes_H.view(-1, *[1] * distance.ndim) * distance.to(dtype)


class T5Bias(DistanceBias):
    """A learned number per bucket of distances and head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        sizes = config.relative_attention_num_buckets, config.relative_attention_max_distance
        self.table = nn.Parameter(torch.empty(sizes[0], config.num_attention_heads))
        self.buckets = Constant(functools.partial(t5_buckets, *sizes))

    def init_weights_of_paper(self):
        """As T5's code does."""
        init.normal_(self.table, std=self.config.hidden_size**-0.5)

    def by_distance(self, distance, dtype):
        """As of `DistanceBias`."""
        buckets_D = self.buckets(distance.device).long()
        bucket = buckets_D[distance.clamp(max=len(buckets_D) - 1)]
        return F.embedding(bucket, self.table.to(dtype)).movedim(-1, 0)
