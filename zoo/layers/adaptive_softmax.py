"""Adaptive embeddings and softmax: frequent words get wide vectors, rare ones narrow ones.

Baevski and Auli 2019, https://arxiv.org/abs/1809.10853; Grave et al. 2017,
https://arxiv.org/abs/1609.04309; as Transformer-XL has them. Ids are cut into clusters, the most
frequent words first: `cutoffs` are the first ids of the others, cluster c has vectors of
d_embed / div_val^c numbers, and a projection brings them to the width of the model:

    x         = P_c E_c[id - start_c]                                     id of cluster c
    log p_0   = log_softmax([h P_0 E_0^T + b_0, h P_0 C^T + b_C])
    log p(id) = log p_0[id]                                               of cluster 0
    log p(id) = log p_0[c] + log_softmax(h P_c E_c^T + b_c)[id - start_c]    of another

p_0 has the words of cluster 0 and one entry, a row of C, for each other cluster. E and P of the
softmax may be those of the embedding. The loss needs the softmax of a cluster only for tokens that
are in it, so that all the words' scores never exist in training.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from ..kernels.linear_recurrence import accumulator_dtype

# Of projections at the start, in the code of Transformer-XL's authors.
PROJECTION_STD = 0.01
IGNORED = -100


def cluster_bounds(config):
    """[0, cutoffs, vocab_size]."""
    return [0, *config.cutoffs, config.vocab_size]


def cluster_widths(config):
    """Numbers in a word's vector, by cluster."""
    return [config.d_embed // config.div_val**c for c in range(len(config.cutoffs) + 1)]


def has_projections(config):
    """Whether vectors of words are of another width than the model, or may be."""
    return config.div_val > 1 or config.d_embed != config.hidden_size


class Projection(nn.Module):
    """A matrix [D, D_c] that brings a state to the width of a cluster: the embedding's, transposed.

    Args:
        width: D.
        size: D_c.
    """

    def __init__(self, width, size):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, size))

    def init_weights_of_paper(self):
        """As of the embedding's."""
        init.normal_(self.weight, std=PROJECTION_STD)

    def forward(self, x_BTD):
        """[..., D] to [..., D_c]."""
        return x_BTD @ self.weight.to(x_BTD.dtype)


class AdaptiveEmbedding(nn.Module):
    """Vectors of words, cluster by cluster, brought to the width of the model.

    Args:
        config: with vocab_size, hidden_size, d_embed, cutoffs and div_val.
    """

    def __init__(self, config):
        super().__init__()
        self.bounds, widths = cluster_bounds(config), cluster_widths(config)
        sizes = [after - start for start, after in zip(self.bounds, self.bounds[1:])]
        self.tables = nn.ModuleList(map(nn.Embedding, sizes, widths))
        if config.div_val == 1:  # of one width: one projection for all
            widths = widths[:1]
        projected = widths if has_projections(config) else []
        self.projections = nn.ModuleList(
            nn.Linear(size, config.hidden_size, bias=False) for size in projected
        )

    def init_weights_of_paper(self):
        """Projections; tables as transformers does for any embedding."""
        for projection in self.projections:
            init.normal_(projection.weight, std=PROJECTION_STD)

    def forward(self, ids_BT):
        """Ids [B, T] to vectors [B, T, D].

        Every cluster for every token, so that shapes do not depend on values.
        """
        x_BTD = None
        for c, table in enumerate(self.tables):
            own_BT = ids_BT - self.bounds[c]
            x_BTE = table(own_BT.clamp(0, table.num_embeddings - 1))
            if len(self.projections):
                x_BTE = self.projections[min(c, len(self.projections) - 1)](x_BTE)
            x_BTD = x_BTE if c == 0 else torch.where((own_BT >= 0)[..., None], x_BTE, x_BTD)
        return x_BTD


class AdaptiveSoftmax(nn.Module):
    """Log-probabilities of words, cluster by cluster.

    Args:
        config: as of `AdaptiveEmbedding`.
    """

    def __init__(self, config):
        super().__init__()
        self.bounds, widths = cluster_bounds(config), cluster_widths(config)
        sizes = [after - start for start, after in zip(self.bounds, self.bounds[1:])]
        self.words = nn.ModuleList(map(nn.Linear, widths, sizes))
        self.clusters = nn.Linear(widths[0], len(sizes) - 1) if len(sizes) > 1 else None
        projected = widths if has_projections(config) else []
        self.projections = nn.ModuleList(Projection(config.hidden_size, x) for x in projected)

    def scores(self, hidden_TD, cluster):
        """Logits of a cluster's words, [T, size]; of the first with one for each other cluster."""
        if len(self.projections):
            hidden_TD = self.projections[cluster](hidden_TD)
        logits = self.words[cluster](hidden_TD)
        if cluster == 0 and self.clusters is not None:
            logits = torch.cat([logits, self.clusters(hidden_TD)], dim=-1)
        return logits.to(accumulator_dtype(logits))

    def forward(self, hidden_BTD):
        """Log-probabilities of all words, [..., vocab_size]."""
        size = self.bounds[1]
        head = self.scores(hidden_BTD, 0).log_softmax(-1)
        parts = [head[..., :size]]
        for c in range(1, len(self.words)):
            tail = self.scores(hidden_BTD, c).log_softmax(-1)
            parts.append(head[..., size + c - 1, None] + tail)
        return torch.cat(parts, dim=-1).to(hidden_BTD.dtype)

    def summed_loss(self, hidden_TD, target_T):
        """The sum of -log p over targets [T] that are not -100."""
        size = self.bounds[1]
        in_head_T = target_T
        for c in range(1, len(self.words)):
            in_head_T = torch.where(target_T >= self.bounds[c], size + c - 1, in_head_T)
        loss = _cross_entropy(self.scores(hidden_TD, 0), in_head_T)
        for c in range(1, len(self.words)):
            start, after = self.bounds[c : c + 2]
            # Without such a token an empty sum: a gradient of zero, which training on several
            # devices waits for.
            own_N = ((target_T >= start) & (target_T < after)).nonzero()[:, 0]
            own_logits = self.scores(hidden_TD[own_N], c)
            loss = loss + _cross_entropy(own_logits, target_T[own_N] - start)
        return loss


def _cross_entropy(logits, target):
    return F.cross_entropy(logits, target, ignore_index=IGNORED, reduction="sum")
