"""RWKV-6 under the names of its repositories on the Hub: the authors' file, and back, exactly."""

import json

import pytest
import torch
from fla_models import random_model
from rwkv_files import HF_CONFIG, WIDTH, hf_name, hf_shapes, random_weights
from safetensors.torch import load_file, save_file

from zoo.hub.convert import convert, convert_back
from zoo.hub.convert.rwkv6_hf import fixed_sizes
from zoo.models.rwkv6 import RWKV6Config

SIZES = {"vocab_size": 67, "hidden_size": 32, "num_hidden_layers": 2, "head_size": 16}
SIZES |= fixed_sizes(32)


def write(folder, weights, fields=()):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(HF_CONFIG | dict(fields)))
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture
def source(tmp_path):
    """The authors' weights under both names."""
    weights = random_weights(hf_shapes())
    save_file(weights, tmp_path / "authors.safetensors")
    return write(tmp_path / "there", {hf_name(n): x for n, x in weights.items()})


def test_it_is_the_authors_model(source, tmp_path):
    convert("rwkv-pth", tmp_path / "authors.safetensors", tmp_path / "expected")
    convert("rwkv6-hf", source, tmp_path / "ours")
    expected, ours = (
        load_file(tmp_path / name / "model.safetensors") for name in ("expected", "ours")
    )
    assert expected.keys() == ours.keys()
    assert all(torch.equal(x, ours[n]) for n, x in expected.items())
    configs = [
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("expected", "ours")
    ]
    differing = {n for n, x in configs[0].items() if configs[1][n] != x}
    assert differing == {"bos_token_id", "eos_token_id"}  # the authors' file has no config


def test_what_is_written_is_what_lies_there(source, tmp_path):
    convert("rwkv6-hf", source, tmp_path / "ours")
    report = convert_back("rwkv6-hf", tmp_path / "ours", tmp_path / "back")
    weights, back = (load_file(path / "model.safetensors") for path in (source, tmp_path / "back"))
    assert weights.keys() == back.keys()
    for name, x in weights.items():
        assert torch.equal(x, back[name]), name  # shapes too
    fields = json.loads((tmp_path / "back" / "config.json").read_text())
    width = int(3.5 * WIDTH) // 32 * 32
    changed = {"rescale_every": 0, "intermediate_size": width, "dtype": "float32"}
    expected = {n: v for n, v in HF_CONFIG.items() if n not in ("auto_map", "num_attention_heads")}
    assert fields == expected | changed | {"pad_token_id": None}
    assert report.notes == ["rescale_every is 0, which is exact; set it to 6 if float16 overflows"]


def test_reading_says_what_was_left_out(source, tmp_path):
    notes = " ".join(convert("rwkv6-hf", source, tmp_path / "ours").notes)
    assert "left out rescale_every = 6" in notes and "num_attention_heads = 64" in notes


NOTED = {
    "head_norm_eps": (1e-5, "llama.cpp has a head_size_divisor of 8, whatever the config says"),
    "tie_word_embeddings": (True, "llama.cpp does not load a model of tied embeddings"),
}


@pytest.mark.parametrize("name", NOTED)
def test_what_llama_cpp_does_not_run_is_said(name, tmp_path):
    value, note = NOTED[name]
    random_model("rwkv6", SIZES | {name: value}).save_pretrained(tmp_path / "ours")
    assert note in convert_back("rwkv6-hf", tmp_path / "ours", tmp_path / "there").notes
    convert("rwkv6-hf", tmp_path / "there", tmp_path / "back")
    config = RWKV6Config.from_pretrained(tmp_path / "back")
    assert getattr(config, name) == pytest.approx(value, rel=1e-12)


NOT_THERE = [
    ({"mix_lora_rank": 8}, "mix_lora_rank is 8: Rwkv6ForCausalLM has 32, whatever its config says"),
    ({"decay_lora_rank": 8}, "decay_lora_rank is 8: Rwkv6ForCausalLM has 64"),
    ({"intermediate_size": 64}, "intermediate_size is 64: Rwkv6ForCausalLM has 96"),
    ({"key_size": 16, "value_size": 32}, "key_size is 16: Rwkv6ForCausalLM has 32"),
    ({"value_size": 64}, "value_size is 64: Rwkv6ForCausalLM has 32"),
    ({"embedding_norm": False}, "embedding_norm is False: Rwkv6ForCausalLM has True"),
    ({"layer_norm_eps": 1e-6}, "layer_norm_eps is 1e-06: Rwkv6ForCausalLM has 1e-05"),
]


@pytest.mark.parametrize(("fields", "message"), NOT_THERE)
def test_what_the_class_does_not_have_is_refused(fields, message, tmp_path):
    random_model("rwkv6", SIZES | fields).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=message) as error:
        convert_back("rwkv6-hf", tmp_path / "ours", tmp_path / "there")
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["ours"]


NOT_READ = [
    ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon = 1e-06: the last norm there has 1e-05"),
    ({"attention_hidden_size": 96}, "attention_hidden_size = 96, hidden_size = 48"),
    ({"intermediate_size": 64}, r"k_proj.weight is \[64, 48\] by the config, \[160, 48\]"),
    ({"head_size": 48}, "bonus is .* by the config"),
]


@pytest.mark.parametrize(("fields", "message"), NOT_READ)
def test_what_does_not_fit_is_refused(fields, message, tmp_path):
    weights = {hf_name(n): x for n, x in random_weights(hf_shapes()).items()}
    write(tmp_path / "there", weights, fields)
    with pytest.raises(ValueError, match=message) as error:
        convert("rwkv6-hf", tmp_path / "there", tmp_path / "ours")
    assert "\n" not in str(error.value)
