"""The Memorizing Transformer against its authors' numbers, and against its definition."""

import json
import shutil

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


FACTORY = "@memory_factory.memory_on_tpu_factory"
REFUSED = [
    ({"database_size": None}, "database_size = None, which is not of the right type"),
    ({"database_size": 128}, "database_size = 64; our model computes 128"),
    ({"database_size": 60}, "memory_size is a multiple of memory_neighbors, got 60 and 8"),
    ({"memory_num_neighbors": 4}, "memory_num_neighbors = 8; our model computes 4"),
    ({"segment_length": 16}, "SEGMENT_LENGTH = 32; our model computes 16"),
    ({"memory_layer_indices": [-1]}, r"memory_layer_indices = \[-1\], by the weights .*\[2\]"),
    (("(-2,)", "(-1,)"), r"memory_layer_indices = \(3,\); our model computes \(2,\)"),
    (("for_memory_layers = True", "for_memory_layers = False"), "for_memory_layers = False"),
    ((f"= {FACTORY}", "= @memory_factory.memory_on_borg_factory"), "memory_on_borg_factory"),
    (
        ("  database_size = 64\n", "  database_size = 64\n  cross_batch_memory = True\n"),
        "cross_batch_memory = True; our model computes False",
    ),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_another_memory_is_refused_in_one_line(change, message, tmp_path):
    """Sizes that the run did not have, and kinds of memory that are another model."""
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(golden_folder(NAME) / "model.safetensors", source)
    config = json.loads((golden_folder(NAME) / "config.json").read_text())
    if isinstance(change, dict):
        config |= change
    else:
        assert change[0] in config["gin"]
        config["gin"] = config["gin"].replace(*change)
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as error:
        convert("meliad", source, tmp_path / "ours")
    assert "\n" not in str(error.value) and not (tmp_path / "ours").exists()
