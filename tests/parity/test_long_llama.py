"""LongLLaMA against the authors' code: a model, the way its weights come and go, and crossbatch."""

import json
import shutil

import pytest
import torch
from goldens import golden_folder, golden_tensors
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from ways import gradients, run, worst

from zoo import LongLlamaConfig
from zoo.hub.convert import FORMATS, convert, convert_back
from zoo.hub.convert.format import Weights
from zoo.layers.cross_batch import attend_across_batch, participants
from zoo.layers.positions import rotate, rotation_of

GOLDEN, CROSSBATCH = "longllama", "ops-fot-crossbatch"
# As of WAYS, with pieces for 44 tokens in windows of 12, of which one ends with a window.
WAYS = {"whole": (44,), "pieces": (1, 7, 16, 3, 17), "token by token": (1,) * 44}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A folder as the authors' code saves it."""
    folder = tmp_path_factory.mktemp("golden") / "theirs"
    shutil.copytree(golden_folder(GOLDEN), folder)
    values = json.loads((folder / "config.json").read_text())
    values |= {"model_type": "longllama", "torch_attention": True}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def load(theirs):
    """dtype -> the golden's model, converted."""
    convert("longllama", theirs, theirs.parent / "ours")

    def load(dtype):
        folder = theirs.parent / "ours"
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    return load


def in_pieces(model, ids, sizes):
    """(logits, cache) of a text in pieces; None: all columns are behind five of padding."""
    if sizes is None:
        return run(model, ids, "left padding")
    cache, logits = None, []
    for piece in ids.split(list(sizes), dim=1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, dim=1), cache


@pytest.mark.parametrize("way", [*WAYS, "left padding"])
@torch.no_grad()
def test_logits_memory_and_what_follows(load, way):
    golden, sizes = golden_tensors(GOLDEN), WAYS.get(way)
    model = load(torch.float64)
    logits, cache = in_pieces(model, golden["input_ids"], sizes)
    assert worst(logits, golden["logits_f64"]) < 1e-9
    held = cache.layers[1].tensors
    for name in ("keys_BWHK", "values_BWHV"):
        official = golden[f"memory_{name.split('_')[0]}_layer1_f64"]
        assert worst(held[name][:, :36].transpose(1, 2), official) < 1e-9
    following = []  # into the next window
    for column in golden["decode_ids"].split(1, dim=1):
        output = model(column, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        following.append(output.logits)
    assert worst(torch.cat(following, dim=1), golden["decode_logits_f64"]) < 1e-9
    logits, _ = in_pieces(load(torch.float32), golden["input_ids"], sizes)
    assert worst(logits, golden["logits_f64"], relative=True) < 1e-5


def test_loss_and_gradients(load):
    golden, official = golden_tensors(GOLDEN), Weights(golden_tensors(GOLDEN, "grads"))
    model, ids = load(torch.float64), golden["input_ids"]
    assert abs(model(ids, labels=ids).loss - golden["loss_f64"]) < 1e-6  # in float32 at best
    ours = gradients(model, ids)
    pairs = dict(FORMATS["longllama"].read_weights(official, model.config))
    assert official.untaken == set() and pairs.keys() == ours.keys()
    for name, gradient in pairs.items():
        assert worst(ours[name], gradient, relative=True) < 1e-5, name


def test_there_and_back(theirs, load, tmp_path):
    load(torch.float64)
    report = convert_back("longllama", theirs.parent / "ours", tmp_path / "back")
    assert any("multiple of 12 tokens" in note for note in report.notes)
    before, after = (
        json.loads((x / "config.json").read_text()) for x in (theirs, tmp_path / "back")
    )
    for name in ("mem_dtype", "last_context_length", "torch_attention"):
        before.pop(name)
    assert {name: after[name] for name in before} == before
    tensors = [load_file(x / "model.safetensors") for x in (theirs, tmp_path / "back")]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(x, tensors[1][name]) for name, x in tensors[0].items())


REFUSED = {
    "mem_positionals": (False, "mem_positionals"),
    "rope_scaling": ({"type": "linear", "factor": 2.0}, "rope_scaling"),
    "num_key_value_heads": (2, "does not obey"),
    "attention_bias": (True, "no biases"),
    "mem_layers": ([1, 4], "memory_layers"),
    "mem_top_k": (8, "mem_top_k"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_another_model_is_refused(theirs, tmp_path, name):
    value, message = REFUSED[name]
    shutil.copytree(theirs, tmp_path / "theirs")
    values = json.loads((theirs / "config.json").read_text()) | {name: value}
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(values))
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        convert("longllama", tmp_path / "theirs", tmp_path / "ours")


WITHOUT_NAME = {
    "memory_windows": {"memory_windows": 2},
    "memory_top_k": {"memory_top_k": 4},
    "num_key_value_heads": {"num_key_value_heads": 2},
    "head_dim": {"head_dim": 10},
    "rope_parameters": {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
}


@pytest.mark.parametrize("name", WITHOUT_NAME)
def test_what_theirs_has_not_is_refused(name):
    config = LongLlamaConfig(hidden_size=32, num_attention_heads=4, **WITHOUT_NAME[name])
    with pytest.raises(ValueError, match=name):
        FORMATS["longllama"].write_config(config)


CASES = {
    "range1_step_pack2": (1, True, 2),
    "range2_step_pack2": (2, True, 2),
    "range2_full_pack2": (2, False, 2),
    "range3_step_pack4": (3, True, 4),
}


@pytest.mark.parametrize("case", CASES)
def test_crossbatch(case):
    golden, (reach, stepping, packing) = golden_tensors(CROSSBATCH), CASES[case]
    leaves = [golden[f"{name}_BTHK"].clone().requires_grad_() for name in "qkv"]
    q, k, v = leaves
    windows, length, _, size = q.shape
    angles = 10000.0 ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    rotation = rotation_of(torch.arange(length)[None], angles)
    turned_q, turned_k = (rotate(x, *rotation, interleaved=True) for x in (q, k))
    place = torch.arange(windows)
    count = participants(place % packing, torch.full_like(place, packing), reach, stepping)
    full = torch.full_like(place, length)
    o = attend_across_batch(turned_q, turned_k, k, v, full, count).transpose(1, 2)
    assert worst(o, golden[case]) < 1e-9
    found = torch.autograd.grad((o * golden["do_BTHK"]).sum(), leaves)
    for name, gradient in zip("qkv", found, strict=True):
        assert worst(gradient, golden[f"{case}_d{name}"]) < 1e-9, name


def test_participants():
    """Two documents of four windows: the more, the later; all; and of one window each."""
    rank, four, one = torch.arange(8) % 4, torch.full((8,), 4), torch.ones(8, dtype=torch.long)
    assert participants(rank, four, 3).tolist() == [1, 2, 3, 4, 1, 3, 4, 4]
    assert participants(rank, four, 1).tolist() == [1, 2, 2, 2, 1, 2, 2, 2]
    assert participants(rank, four, 3, stepping=False).tolist() == [1, 2, 3, 4, 4, 4, 4, 4]
    assert participants(0 * rank, one, 2).tolist() == [1, 2, 3, 3, 3, 3, 3, 3]
