"""Adaptive vocabularies in training, and a decoding step of relative attention in all its ways."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from zoo import TransformerXLConfig, TransformerXLForCausalLM

SIZES = {
    "vocab_size": 31,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 4,
    "mem_len": 6,
    "segment_length": 6,
    "zero_memory": True,
}
CLUSTERS = {
    "narrower": {"cutoffs": [5, 12, 20], "div_val": 2},
    "of one width": {"cutoffs": [5, 12]},
    "nothing tied": {"cutoffs": [5], "div_val": 4, "tie_word_embeddings": False},
}


def build(**fields):
    torch.manual_seed(0)
    model = TransformerXLForCausalLM(TransformerXLConfig(**SIZES | fields)).double()
    with torch.no_grad():
        for x in model.parameters():
            x.add_(0.2 * torch.randn_like(x))
    return model


def gradients(model):
    return {name: x.grad.clone() for name, x in model.named_parameters()}


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # losses are in float32


@pytest.mark.parametrize("fields", CLUSTERS.values(), ids=CLUSTERS)
def test_the_loss_is_that_of_all_words(fields):
    """Cluster by cluster, in chunks, without logits: the same as from log-probabilities."""
    model, ids = build(**fields), torch.randint(0, 31, (3, 17))
    labels = ids.clone()
    labels[0, :4] = -100
    labels[labels > 25] = 3  # no word of the end of the last cluster
    with torch.no_grad():
        logits = model.eval()(ids).logits
        expected = model(ids, labels=labels).loss
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(3, 17).double())
    model.train()
    for size in (1, 7, 1000):
        model.loss_chunk_size = size
        output = model(ids, labels=labels)
        assert output.logits is None
        close(output.loss, expected.to(output.loss.dtype))
    model.zero_grad()
    output.loss.backward()
    found = gradients(model)
    model.zero_grad()
    model.loss_chunk_size = None
    output = model(ids, labels=labels)
    assert output.logits.shape == (3, 17, 31)
    output.loss.backward()
    for name, x in gradients(model).items():
        close(found[name], x)


def test_the_scores_of_all_words_never_exist():
    model, ids = build(cutoffs=[3], vocab_size=5000), torch.arange(3).repeat(1, 40)
    sizes = []
    for linear in model.lm_head.words:
        linear.register_forward_hook(lambda module, x, y: sizes.append(y.shape))
    loss = model.train()(ids, labels=ids).loss
    loss.backward()
    # No target is in the second cluster: of that, no row; forward, and again in backward.
    assert sizes == [(120, 3), (0, 4997)] * 2
    assert not model.lm_head.words[1].bias.grad.any()


def test_what_is_refused():
    model, ids = build(**CLUSTERS["narrower"]), torch.arange(8)[None]
    with pytest.raises(ValueError, match="ordered by how frequent words are.* expected 31 .* 40"):
        model.resize_token_embeddings(40)
    assert model.resize_token_embeddings(31) is model.model.embed_tokens
    model.z_loss = 1e-4
    with pytest.raises(ValueError, match="z_loss is about one softmax"):
        model.train()(ids, labels=ids)
    for fields, message in (
        ({"cutoffs": [9, 4]}, "cutoffs grow"),
        ({"cutoffs": [40]}, "cutoffs grow"),
        ({"cutoffs": [4, 9], "div_val": 8}, "d_embed / div_val"),
        ({"cutoffs": [4], "tie_projs": [True]}, "an entry for each of 2 clusters"),
        ({"cutoffs": [4], "tie_projs": [False, True]}, "tie_projs ties projections"),
        ({"mem_len": 0}, "mem_len is at least 1"),
        ({"hidden_size": 15, "num_attention_heads": 3}, "hidden_size is even"),
        ({"segment_length": 0}, "segment_length is at least 1"),
    ):
        with pytest.raises(StrictDataclassError, match=message):
            TransformerXLConfig(**SIZES | fields)


class Wrapped(nn.Module):
    """A linear layer that is more than its weight, as an adapter makes it."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.weight = linear, linear.weight

    def forward(self, x):
        return self.linear(x) + x[..., : self.weight.shape[0]].sin()


@pytest.mark.parametrize("rows", [1, 3, 5])  # heads of 4: from 4 rows on, vectors of distances
@pytest.mark.parametrize("is_wrapped", [False, True])
def test_a_step_in_all_its_ways(rows, is_wrapped):
    """With matrices before the sums, or keys and values; zeros before the text, and norms."""
    model, ids = build(pre_lnorm=True, clamp_len=4).eval(), torch.randint(0, 31, (rows, 20))
    for layer in model.model.layers if is_wrapped else ():
        for name in ("k_proj", "v_proj", "r_proj"):
            setattr(layer.mixer, name, Wrapped(getattr(layer.mixer, name)))
    if is_wrapped:
        # What is no linear map gives something else for a difference: no norm before it then.
        model.config.pre_lnorm = False
    with torch.no_grad():
        expected, cache, logits = model(ids).logits, None, []
        for column in ids.split(1, dim=1):
            output = model(column, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-9, atol=1e-9)
