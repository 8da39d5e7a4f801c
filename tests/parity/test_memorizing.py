"""The Memorizing Transformer against its authors' numbers, and against its definition."""

import pytest
import torch
from goldens import golden_folder, golden_tensors
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from ways import WAYS, run, worst

from zoo.hub.convert import FORMATS, convert
from zoo.hub.convert.format import Weights

NAME = "memorizing-meliad"


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """dtype -> the golden's model, converted."""
    folder = tmp_path_factory.mktemp("converted") / NAME
    convert("meliad", golden_folder(NAME), folder)
    return lambda dtype: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.mark.parametrize("way", WAYS)
def test_logits_and_database(load, way):
    golden = golden_tensors(NAME)
    logits, cache = run(load(torch.float64), golden["input_ids"], way)
    assert worst(logits, golden["logits_f64"]) < 1e-9
    # Of 128 tokens, the last 64; slot = number modulo 64 there, modulo 64 + 32 here.
    slots = torch.arange(64, 128) % 96
    for ours, theirs in (("keys_BMHK", "key"), ("values_BMHV", "value")):
        held = cache.layers[2].tensors[f"memory_{ours}"][:, slots]
        official = golden[f"final_{theirs}_db"].unflatten(0, (2, 4)).transpose(1, 2)
        assert worst(held, official) < 1e-12


def test_loss_and_gradients_of_the_third_call(load):
    """With the memory and the windows that the calls before it left."""
    golden, weights = golden_tensors(NAME), Weights(golden_tensors(NAME, "grads"))
    for dtype, bound in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
        model, ids = load(dtype), golden["input_ids"]
        with torch.no_grad():
            cache = model(ids[:, :64], use_cache=True).past_key_values
        logits = model(ids[:, 64:96], past_key_values=cache, use_cache=True).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 65:96].flatten())
        loss.backward()
        if dtype == torch.float64:
            assert abs(loss.item() - golden["loss_third_call_f64"].item()) < 1e-9
        official = dict(FORMATS["meliad"].read_weights(weights, model.config))
        found = dict(model.named_parameters())
        assert official.keys() == found.keys()
        for key, gradient in official.items():
            assert worst(found[key].grad, gradient, relative=True) < bound, key
    weights.finish()
