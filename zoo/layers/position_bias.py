"""Positions as numbers that are added to the scaled scores of softmax attention, by distance.

A query at place i of its document sees a key at place j <= i; d = i - j. Per head h of queries:

    "alibi"   -m_h d, slopes m_h that fall by powers of two (Press et al. 2021,
              https://arxiv.org/abs/2108.12409)
    "t5"      table[bucket(d), h]: a bucket for each small distance, then buckets that grow with the
              logarithm (Raffel et al. 2019, https://arxiv.org/abs/1910.10683)
    "fire"    MLP_h(log(1 + |c| d) / (log(1 + |c| max(i, |l| L)) + 1e-6)), with c and l learned and
              one hidden layer of ReLUs (FIRE, Li et al. 2023, https://arxiv.org/abs/2310.04418)

ALiBi may also be as Falcon has it: times attention_scale as the product of query and key is
(`alibi_scaled`), and rounded (`alibi_rounding`), the slope and its product with j, so that it is

              r(m_h j) - r(m_h i),   r(m j) = round(round(m) round(j))

FIRE and that alone need to know i. Distances are whole numbers and biases are formed in float32 at
least: a slope times the key's own place, which comes to the same before rounding, is off by 4.5 in
bfloat16 at the 4,095th token.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from ..core.base import Constant
from ..kernels.autograd_rules import by_formula
from ..kernels.export_scan import without_autocast
from .decay_slopes import alibi_slopes


def position_bias(config, kind):
    """The module of a layer of that type; None for types that add nothing to scores."""
    classes = {"alibi": AlibiBias, "t5": T5Bias, "fire": FireBias}
    if getattr(config, "alibi_rounding", None) is not None:
        classes["alibi"] = RoundedAlibiBias
    return classes[kind](config) if kind in classes else None


def alibi_log_decay(config):
    """What a token of distance adds to the scores of each head, -m, [H] in float64."""
    slopes = alibi_slopes(config.num_attention_heads, config.alibi_bias_max)
    return -torch.tensor(slopes, dtype=torch.float64) * alibi_factor(config)


def alibi_factor(config):
    """What a bias is multiplied by."""
    if not getattr(config, "alibi_scaled", False):
        return 1.0
    return config.attention_scale or config.head_dim**-0.5


def rounded_slopes(config):
    """The slopes in bfloat16, [H] in float64."""
    slopes = alibi_slopes(config.num_attention_heads, config.alibi_bias_max)
    return torch.tensor(slopes, dtype=torch.float64).bfloat16().double()


def t5_buckets(num_buckets, max_distance, lifted=0.0):
    """T5's bucket of each distance from 0 to max_distance, which all beyond share; in Python.

    Half of the buckets hold one distance each, the others grow with the logarithm. On a processor
    or a GPU, in whatever dtype, a distance on a boundary could fall to either side.

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
        # Called as a module, so that its weights are brought to where they are used.
        return self(distance, dtype)

    def below(self, size, dtype, device):
        """Of the distances below `size`, [H, size]."""
        return self.by_distance(torch.arange(size, device=device), dtype)


class AlibiBias(DistanceBias):
    """-m_h d, with slopes that are not learned."""

    def __init__(self, config):
        super().__init__()
        self.log_decay = Constant(functools.partial(alibi_log_decay, config))

    def forward(self, distance, dtype):
        """As of `by_distance`."""
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

    def forward(self, distance, dtype):
        """As of `by_distance`."""
        buckets_D = self.buckets(distance.device).long()
        bucket = buckets_D[distance.clamp(max=len(buckets_D) - 1)]
        return F.embedding(bucket, self.table.to(dtype)).movedim(-1, 0)


class QueryBias(nn.Module):
    """A bias that depends on the query's place in its document too."""

    def by_query(self, place, distance, dtype):
        """The bias of each head.

        Args:
            place: i of each query, 0 for a document's first, [...].
            distance: d of each query and key, [..., S], as broadcasts.
            dtype: of the result.

        Returns:
            [..., S, H].
        """
        return self(place, distance, dtype)

    def depends_on_distance_alone(self, place):
        """Whether these queries have biases that do, those of a document's first query."""
        return False

    def below(self, size, dtype, device):
        """Of a document's first query, had it keys at the distances below `size`, [H, size]."""
        place, distance = torch.zeros(1, device=device), torch.arange(size, device=device)
        return self.by_query(place, distance[None], dtype)[0].T


class RoundedAlibiBias(QueryBias):
    """m_h (j - i) in which slope, place and their product are rounded to bfloat16, as in Falcon.

    By that i - j is no longer all that counts, if places go beyond the 256 that bfloat16 tells
    apart, or a slope is no power of two. The part of the query, which a softmax does not see, keeps
    the numbers small.
    """

    def __init__(self, config):
        super().__init__()
        self.slopes = Constant(functools.partial(rounded_slopes, config))
        self.factor = alibi_factor(config)

    def forward(self, place, distance, dtype):
        """As of `by_query`."""
        own = place[..., None]
        difference = self.rounded(own - distance, dtype) - self.rounded(own, dtype)
        return difference * self.factor

    def rounded(self, place, dtype):
        """A slope times a place, [*place.shape, H]."""
        slopes_H = self.slopes(place.device).to(torch.bfloat16)
        return (place[..., None].to(torch.bfloat16) * slopes_H).to(dtype)


FIRE_EPSILON = 1e-6
# Of tokens, whose hidden units exist together: 1 MB and 128 MB for 32 of them.
PAIRS_ON_A_CPU, PAIRS_ELSEWHERE = 2**13, 2**20


class FireBias(QueryBias):
    """A learned function of log distance, as a share of the largest one that a query can have."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        width, heads = config.fire_mlp_width, config.num_attention_heads
        # Of one number each, not scalars, which could not be cut in shards.
        self.c = nn.Parameter(torch.empty(1))
        self.length_factor = nn.Parameter(torch.empty(1))
        self.up_weight = nn.Parameter(torch.empty(width))
        self.up_bias = nn.Parameter(torch.empty(width))
        self.down_weight = nn.Parameter(torch.empty(heads, width))
        self.down_bias = nn.Parameter(torch.empty(heads))

    def init_weights_of_paper(self):
        """The paper's c and l; the MLP as PyTorch's linear layers are by default."""
        init.constant_(self.c, self.config.fire_init_c)
        init.ones_(self.length_factor)
        for layer, fan_in in (("up", 1), ("down", self.config.fire_mlp_width)):
            for name in ("weight", "bias"):
                init.uniform_(getattr(self, f"{layer}_{name}"), -(fan_in**-0.5), fan_in**-0.5)

    def threshold(self, dtype):
        """|l| L: up to which place a query's distances are shares of the same, [1]."""
        return (self.length_factor.to(dtype) * self.config.fire_init_length).abs()

    def depends_on_distance_alone(self, place):
        """As of `QueryBias`. Not asked of values that are not known yet."""
        if torch.compiler.is_compiling() or place.is_meta or self.length_factor.is_meta:
            return False
        dtype = torch.promote_types(self.length_factor.dtype, torch.float32)
        return bool((place.max() < self.threshold(dtype)).all())

    def forward(self, place, distance, dtype):
        """As of `by_query`."""
        c = self.c.to(dtype).abs()
        largest = torch.maximum(place.to(dtype), self.threshold(dtype))
        share = torch.log1p(c * distance.to(dtype))
        share = share / (torch.log1p(c * largest) + FIRE_EPSILON)[..., None]
        layers = self.up_weight, self.up_bias, self.down_weight, self.down_bias
        layers = [x.to(dtype) for x in layers]
        if torch.compiler.is_exporting():
            return _unit_by_unit(share, *layers)
        with without_autocast(share):
            return _MLPOfOne.apply(share, *layers)


def _unit_by_unit(x, up_weight, up_bias, down_weight, down_bias):
    """`_MLPOfOne` in plain operators of PyTorch, without all hidden units at once."""
    y = down_bias
    for unit, (weight, bias) in enumerate(zip(up_weight, up_bias)):
        y = y + torch.relu(x * weight + bias)[..., None] * down_weight[:, unit]
    return y


class _MLPOfOne(torch.autograd.Function):
    """down relu(up x) of single numbers x, [...] to [..., H].

    The hidden units of all pairs of tokens would take more memory than all the rest: they exist a
    part at a time, and once more in the backward pass.
    """

    @staticmethod
    def forward(ctx, x, up_weight, up_bias, down_weight, down_bias):
        ctx.save_for_backward(x, up_weight, up_bias, down_weight)
        down_FH = down_weight.T
        y = [
            torch.addmm(down_bias, torch.addcmul(up_bias, part, up_weight).relu_(), down_FH)
            for part in _parts(x.reshape(-1, 1))
        ]
        return torch.cat(y).unflatten(0, x.shape)

    @staticmethod
    @by_formula
    def backward(ctx, grad):
        x, up_weight, up_bias, down_weight = ctx.saved_tensors
        sums = [torch.zeros_like(w) for w in (up_weight, up_bias, down_weight)]
        sums, grad_x = [*sums, grad.new_zeros(grad.shape[-1])], []
        grad_parts = _parts(grad.reshape(-1, grad.shape[-1]))
        for part, grad_part in zip(_parts(x.reshape(-1, 1)), grad_parts):
            hidden = torch.addcmul(up_bias, part, up_weight).relu_()
            grad_hidden = (grad_part @ down_weight) * (hidden > 0)
            grad_x.append(grad_hidden @ up_weight)
            sums[0] += part.T[0] @ grad_hidden
            sums[1] += grad_hidden.sum(0)
            sums[2] += grad_part.T @ hidden
            sums[3] += grad_part.sum(0)
        return torch.cat(grad_x).view_as(x), *sums


def _parts(x):
    """As many rows at a time as have their hidden units near the processor; elsewhere, more."""
    is_near = x.device.type == "cpu" and not torch.compiler.is_compiling()
    return x.split(PAIRS_ON_A_CPU if is_near else PAIRS_ELSEWHERE)
