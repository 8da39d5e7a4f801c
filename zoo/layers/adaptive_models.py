"""A model whose vocabulary may be adaptive: cut into clusters, the most frequent words first.

For a config with d_embed, cutoffs, div_val and tie_projs; the mathematics is that of
`zoo/layers/adaptive_softmax.py`. Without cutoffs and with words as wide as the model it is a plain
table, and a projection with a bias.
"""

import torch
from torch import nn

from ..core.base import ZooForCausalLM, ZooModel, ZooPreTrainedModel
from ..core.flops import linear_flops, product_flops
from .adaptive_softmax import AdaptiveEmbedding, AdaptiveSoftmax, cluster_widths, has_projections

# Tokens that an adaptive loss is computed over at a time.
LOSS_CHUNK = 1024


def is_adaptive(config):
    """Whether a config asks for more than one plain table."""
    return bool(config.cutoffs) or config.div_val > 1 or config.d_embed != config.hidden_size


def fill_clusters(config):
    """Sets cutoffs, d_embed and tie_projs, where they are None, to what follows from the rest."""
    config.cutoffs = list(config.cutoffs or [])
    if config.d_embed is None:
        config.d_embed = config.hidden_size
    if config.tie_projs is None:
        is_tied = config.tie_word_embeddings and has_projections(config)
        config.tie_projs = [False] + [is_tied] * len(config.cutoffs)


def check_clusters(config):
    """Raises a ValueError if clusters do not make a vocabulary."""
    bounds = [0, *config.cutoffs, config.vocab_size]
    if sorted({*bounds}) != bounds:
        raise ValueError(
            "cutoffs grow, from above 0 to below vocab_size, got "
            f"{config.cutoffs} and {config.vocab_size}."
        )
    if config.d_embed < 1 or config.div_val < 1 or cluster_widths(config)[-1] < 1:
        raise ValueError(
            "d_embed and div_val are at least 1, and so is d_embed / div_val^c of the last of "
            f"{len(bounds) - 1} clusters, got {config.d_embed} and {config.div_val}."
        )
    if len(config.tie_projs) != len(bounds) - 1:
        raise ValueError(
            f"tie_projs has an entry for each of {len(bounds) - 1} clusters, got "
            f"{len(config.tie_projs)}; leave it out to have it filled in."
        )
    if any(config.tie_projs) and not (config.tie_word_embeddings and has_projections(config)):
        raise ValueError(
            "tie_projs ties projections, which are there with div_val above 1 or a d_embed that "
            "is not hidden_size, and where tie_word_embeddings ties the words; got "
            f"{config.tie_projs}, leave it out."
        )


class AdaptivePreTrainedModel(ZooPreTrainedModel):
    """What a vocabulary of clusters cannot do."""

    def resize_token_embeddings(self, new_num_tokens=None, *args, **kwargs):
        """As in transformers, of a plain table.

        Raises:
            ValueError: the vocabulary is adaptive, and another size is asked for.
        """
        if not is_adaptive(self.config):
            return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if new_num_tokens not in (None, self.config.vocab_size):
            raise ValueError(
                "the ids of an adaptive vocabulary are ordered by how frequent words are, and new "
                f"ones would change the old ones' probabilities: expected {self.config.vocab_size} "
                f"tokens, got {new_num_tokens}; train with a larger vocab_size from the start."
            )
        return self.get_input_embeddings()


class AdaptiveModel(AdaptivePreTrainedModel, ZooModel):
    """A decoder that may begin with adaptive embeddings."""

    def build_embedding(self, config):
        """A table, or one for each cluster."""
        return AdaptiveEmbedding(config) if is_adaptive(config) else super().build_embedding(config)

    def flops_per_token(self, length):
        """As of `ZooModel`, with the projections of every cluster."""
        return super().flops_per_token(length) + linear_flops(self.embed_tokens)


class AdaptiveForCausalLM(AdaptivePreTrainedModel, ZooForCausalLM):
    """A language model that may end in an adaptive softmax.

    That computes a training step's loss cluster by cluster and returns no logits:
    `loss_chunk_size` is not None at the start.
    """

    def post_init(self):
        """What the softmax shares with the embedding, before transformers ties it."""
        if is_adaptive(self.config):
            self._tied_weights_keys = tied_names(self.config)
            self.loss_chunk_size = LOSS_CHUNK
        super().post_init()

    def build_lm_head(self, config):
        """A projection with a bias, or the adaptive softmax."""
        if is_adaptive(config):
            return AdaptiveSoftmax(config)
        return nn.Linear(config.hidden_size, config.vocab_size)

    def get_output_embeddings(self):
        """The projection onto the vocabulary; None of an adaptive one, which is no single table."""
        return None if is_adaptive(self.config) else self.lm_head

    def _training_loss(self, *args):
        if self.z_loss and is_adaptive(self.config):
            raise ValueError(
                "z_loss is about one softmax, and an adaptive one has several, whose logits are "
                f"log-probabilities: got {self.z_loss}, set it to 0."
            )
        return super()._training_loss(*args)

    def _summed_loss(self, hidden_TD, target_T):
        # Which tokens are in which cluster is not known while it is compiled.
        if not is_adaptive(self.config) or torch.compiler.is_compiling():
            return super()._summed_loss(hidden_TD, target_T)
        return self.lm_head.summed_loss(hidden_TD, target_T)

    def flops_per_token(self, length):
        """As of `ZooForCausalLM`, with the projections of an adaptive softmax."""
        flops = super().flops_per_token(length)
        if not is_adaptive(self.config):
            return flops
        return flops + product_flops(*(x.weight for x in self.lm_head.projections))


def tied_names(config):
    """Our names of the softmax's tensors that are the embedding's, to those.

    Args:
        config: with the fields of `AdaptiveEmbedding`, and tie_projs.
    """
    names = {}
    for c in range(len(config.cutoffs) + 1):
        names[f"lm_head.words.{c}.weight"] = f"model.embed_tokens.tables.{c}.weight"
        if config.tie_projs[c]:
            of_embedding = 0 if config.div_val == 1 else c
            source = f"model.embed_tokens.projections.{of_embedding}.weight"
            names[f"lm_head.projections.{c}.weight"] = source
    return names
