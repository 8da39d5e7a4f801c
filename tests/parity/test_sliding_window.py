"""Mistral against transformers: weights, converted, give its numbers, and go back."""

import json
import shutil
import warnings

import pytest
import torch
from goldens import COPIES, SHARED, golden_folder, golden_tensors
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, DynamicCache, MistralConfig, MistralForCausalLM

from zoo import SlidingWindowConfig
from zoo.hub.convert import FORMATS, convert, convert_back
from zoo.hub.convert.format import Weights
from zoo.layers.positions import RotaryPositions, rotate

NAME = "swa-mistral-hf"
# What is beyond the length a model was trained for differs by rotation, so that is short here.
ROPES = {
    "default": {"rope_theta": 500.0},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 24},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 24,
    },
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 24,
        "short_factor": [1.0 + 0.1 * i for i in range(6)],
        "long_factor": [2.0 + 0.3 * i for i in range(6)],
    },
}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """dtype -> the golden's model, converted."""
    folder = tmp_path_factory.mktemp("converted") / NAME
    convert("hf-mistral", golden_folder(NAME), folder)
    return lambda dtype: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def run(model, ids, sizes=None, **inputs):
    """Logits [B, T, vocab] of a text in pieces of these sizes."""
    cache, logits = None, []
    for piece in ids.split(sizes or ids.shape[1], dim=1):
        output = model(piece, past_key_values=cache, use_cache=True, **inputs)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def worst(ours, official, relative=False):
    difference = (ours.double() - official.double()).abs().max()
    return (difference / official.abs().max() if relative else difference).item()


@pytest.mark.parametrize("implementation", ["banded", "eager", "sdpa"])
@pytest.mark.parametrize("sizes", [None, 1, [37, 1, 5, 57]], ids=["whole", "steps", "chunks"])
def test_logits(load, implementation, sizes):
    golden = golden_tensors(NAME)
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        model = load(dtype)
        model.set_attn_implementation(implementation)
        logits = run(model, golden["input_ids"], sizes)
        assert worst(logits, golden["logits_f64"], dtype == torch.float32) < bound


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch compiles flex_attention with it")
def test_flex_attention(load):
    """Whole passes; PyTorch 2.13's own C++ for other shapes does not compile on a CPU."""
    golden = golden_tensors(NAME)
    ids, mask = golden["input_ids"], golden["attention_mask"]
    model = load(torch.float32)
    padded = run(model, ids, attention_mask=mask)
    model.set_attn_implementation("flex_attention")
    assert worst(run(model, ids), golden["logits_f64"], True) < 1e-5
    visible = mask.bool()
    found = run(model, ids, attention_mask=mask)
    assert worst(found[visible], padded[visible], True) < 1e-5


def test_left_padding(load):
    golden = golden_tensors(NAME)
    mask = golden["attention_mask"]
    logits = run(load(torch.float64), golden["input_ids"], attention_mask=mask)
    # RoPE knows differences alone, so it does not matter that theirs counted the padding.
    visible = mask.bool()
    assert worst(logits[visible], golden["leftpad_logits_f64"][visible]) < 1e-9


def test_gradients_are_the_official_ones(load):
    official = golden_tensors(NAME, "grads")
    ids = golden_tensors(NAME)["input_ids"]
    for dtype, bound in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
        model = load(dtype)
        logits = model(ids, use_cache=False).logits
        cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        weights = Weights(dict(official))
        pairs = dict(FORMATS["hf-mistral"].read_weights(weights, model.config))
        assert weights.untaken == set()
        parameters = dict(model.named_parameters())
        found = {n: worst(parameters[n].grad, g, True) for n, g in pairs.items() if g is not None}
        # The official ones are stored in float32.
        assert len(found) >= 10 and all(x < bound for x in found.values()), found


def test_copies_are_the_goldens():
    if not (SHARED / NAME).is_dir():
        pytest.skip("no whole goldens here")
    for name in (NAME, "ops-swa"):
        for path in (COPIES / name).glob("*.safetensors"):
            whole = load_file(SHARED / name / path.name)
            assert all(torch.equal(x, whole[key]) for key, x in load_file(path).items())


def official_model(tmp_path, dtype=torch.float32, rope="default", **fields):
    """transformers' Mistral of other sizes, with random weights large enough to matter."""
    sizes = {
        "vocab_size": 71,
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 12,
        "max_position_embeddings": 24,
        "sliding_window": 9,
    }
    rope_parameters = {"rope_theta": 10000.0} | ROPES[rope] | {"rope_type": rope}
    torch.manual_seed(0)
    config = MistralConfig(**sizes | {"rope_parameters": rope_parameters} | fields)
    model = MistralForCausalLM(config).to(dtype).eval()
    with torch.no_grad():
        for x in model.parameters():
            x += 0.2 * torch.randn_like(x)
    model.save_pretrained(tmp_path / "theirs")
    return model


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("window", [1, 2, 9, 1000, None])
def test_random_models_of_other_sizes(window, tied, tmp_path):
    official = official_model(tmp_path, sliding_window=window, tie_word_embeddings=tied)
    report = convert("hf-mistral", tmp_path / "theirs", tmp_path / "ours")
    assert not report.is_rounded
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    ids = torch.randint(71, (3, 50))
    expected = run(official, ids)
    assert worst(run(model, ids), expected, True) < 1e-5
    if window != 1:  # transformers' own cache of W - 1 keys cannot be empty
        assert worst(run(model, ids, 1), run(official, ids, 1), True) < 1e-5
    convert_back("hf-mistral", tmp_path / "ours", tmp_path / "back")
    theirs, back = (load_file(tmp_path / n / "model.safetensors") for n in ("theirs", "back"))
    assert theirs.keys() == back.keys() and all(torch.equal(x, back[n]) for n, x in theirs.items())
    configs = [MistralConfig.from_pretrained(tmp_path / n).to_dict() for n in ("theirs", "back")]
    for config in configs:
        del config["transformers_version"]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("rope", ROPES)
def test_rotations_are_transformers(rope, tmp_path):
    """Token by token, where transformers' angles too depend on the text so far alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        official = official_model(tmp_path, rope=rope, sliding_window=40)
    convert("hf-mistral", tmp_path / "theirs", tmp_path / "ours")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    ids = torch.randint(71, (2, 60))
    expected = run(official, ids, 1)
    for sizes in (None, 1, [7, 30, 23]):
        # Their angles are in float32.
        assert worst(run(model, ids, sizes), expected, True) < 2e-5
    other = json.loads((tmp_path / "ours" / "config.json").read_text())
    other["rope_parameters"] = {"rope_type": "default", "rope_theta": 9e3}
    (tmp_path / "ours" / "config.json").write_text(json.dumps(other))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert worst(run(model, ids), expected, True) > 1e-3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layers of several layer_types"),
        ({"rope_parameters": {"rope_type": "su"}}, "is one of default, linear"),
        ({"num_key_value_heads": 4}, "multiple of num_key_value_heads"),
        ({"attention_bias": True}, "does not know: attention_bias"),
    ],
)
def test_refused(fields, message, tmp_path):
    official_model(tmp_path)
    path = tmp_path / "theirs" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ValueError, match=message):
        convert("hf-mistral", tmp_path / "theirs", tmp_path / "ours")


@pytest.mark.parametrize("sinks", [{"num_sink_tokens": 2}, {"learnable_sinks": True}])
def test_sinks_do_not_go_back(sinks, tmp_path):
    official_model(tmp_path)
    convert("hf-mistral", tmp_path / "theirs", tmp_path / "ours")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", **sinks)
    model.save_pretrained(tmp_path / "sinks")
    with pytest.raises(ValueError, match="transformers' model has none"):
        convert_back("hf-mistral", tmp_path / "sinks", tmp_path / "back")
    with pytest.raises(ValueError, match="use 'banded'"):
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"position_embedding_type": "alibi", "rope_parameters": None}, "'alibi': transformers'"),
        ({"position_embedding_type": ["rope", None]}, "position_embedding_type is .'rope', None."),
        ({"attention_scale": 1.0}, "attention_scale is 1.0: transformers' model has none"),
    ],
)
def test_other_positions_do_not_go_back(fields, message, tmp_path):
    official_model(tmp_path)
    convert("hf-mistral", tmp_path / "theirs", tmp_path / "ours")
    path = tmp_path / "ours" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ValueError, match=message):
        convert_back("hf-mistral", tmp_path / "ours", tmp_path / "back")


def test_old_fields_of_transformers_4(tmp_path):
    official = official_model(tmp_path, rope="linear")
    path = tmp_path / "theirs" / "config.json"
    fields = json.loads(path.read_text())
    del fields["rope_parameters"]
    fields |= {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 3.0}}
    path.write_text(json.dumps(fields))
    convert("hf-mistral", tmp_path / "theirs", tmp_path / "ours")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    ids = torch.randint(71, (2, 30))
    assert worst(run(model, ids), run(official, ids), True) < 1e-5


@torch.no_grad()
def test_a_step_copies_nothing(load):
    """One token writes its slot into the tensors that the cache had, where nobody else looks."""
    model, ids = load(torch.float32), golden_tensors(NAME)["input_ids"]
    cache = model(ids[:, :30], use_cache=True).past_key_values
    addresses = [x.data_ptr() for layer in cache.layers for x in layer.tensors.values()]
    for token in ids[:, 30:60].split(1, dim=1):
        model(token, past_key_values=cache)
    after = [x.data_ptr() for layer in cache.layers for x in layer.tensors.values()]
    assert after == addresses
    recorded = DynamicCache(config=model.config)
    recorded.activate_past_recording()
    model(ids[:, :30], past_key_values=recorded)
    before = {name: x.clone() for name, x in recorded.layers[0].tensors.items()}
    kept = dict(recorded.layers[0].tensors)
    model(ids[:, 30:31], past_key_values=recorded)
    assert all(torch.equal(kept[name], x) for name, x in before.items())


def test_partial_rotation():
    """The first channels turn as a narrower head's would, by its angles; the rest stay."""
    sizes = {"hidden_size": 40, "num_attention_heads": 2, "sliding_window": 9}
    whole = SlidingWindowConfig(**sizes, head_dim=12)
    partial = {"rope_parameters": {"partial_rotary_factor": 0.6}}
    positions, x = torch.arange(30)[None], torch.randn(1, 30, 2, 20, dtype=torch.float64)
    rotation = RotaryPositions(SlidingWindowConfig(**sizes, head_dim=20, **partial))(positions)
    turned = rotate(x, *rotation)
    expected = rotate(x[..., :12], *RotaryPositions(whole)(positions))
    assert torch.equal(turned[..., 12:], x[..., 12:])
    assert worst(turned[..., :12], expected) < 1e-12
