"""Native exports fit flash-linear-attention's classes, as these are on record, and come back.

What needs fla itself, that it computes the same from them, is fla_native.py, run by hand.
"""

import json
from pathlib import Path

import pytest
import torch
from fla_models import (
    CONFIGS,
    DELTA,
    IDS,
    RECORD,
    RETNET,
    RWKV6,
    RWKV7,
    random_model,
    recorded_weights,
    shape_in_words,
)
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import zoo
from zoo.cli import main
from zoo.hub.convert import convert, convert_back
from zoo.hub.convert.format import FLA, TRANSFORMERS
from zoo.hub.convert.formats import FORMATS, native_format
from zoo.hub.export import export
from zoo.hub.folder import settings

RECORDED = json.loads(RECORD.read_text(encoding="utf-8"))["models"]
BYTE_TOKENIZER = Path(__file__).resolve().parent.parent.parent / "tokenizers" / "byte"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds a checkpoint and its native export of every config."""
    folder = tmp_path_factory.mktemp("fla")
    for name, (architecture, fields) in CONFIGS.items():
        random_model(architecture, fields).save_pretrained(folder / f"run-{name}")
        exported = export(folder / f"run-{name}", folder / name, format="native")
        assert exported.library == "flash-linear-attention's" and not exported.code
        assert exported.model_class == RECORDED[name]["class"]
    return folder


def test_every_model_is_on_record():
    assert RECORDED.keys() == CONFIGS.keys()
    assert {architecture for architecture, _ in CONFIGS.values()} == {
        f.architecture for f in FORMATS.values() if f.library is FLA
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_tensors_and_fields_are_those_of_its_class(folder, name):
    weights = load_file(folder / name / "model.safetensors")
    shapes = {n: shape_in_words(x) for n, x in weights.items()}
    expected = RECORDED[name]["shapes"]
    if RECORDED[name]["fields"]["tie_word_embeddings"]:
        # transformers' rule: of tied weights the file holds one.
        expected = {n: shape for n, shape in expected.items() if n != "lm_head.weight"}
    assert shapes == expected
    values = json.loads((folder / name / "config.json").read_text())
    assert values.pop("architectures") == [RECORDED[name]["class"]]
    assert values.pop("dtype") == "float32" and values.pop("model_type")
    assert values.items() <= RECORDED[name]["fields"].items()


@pytest.mark.parametrize("name", CONFIGS)
def test_it_converts_back_exactly(folder, name, tmp_path):
    architecture = CONFIGS[name][0]
    format = native_format(architecture)
    convert(format.name, folder / name, tmp_path / "back")
    before = load_file(folder / f"run-{name}" / "model.safetensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(x, after[n]) for n, x in before.items())
    configs = (
        zoo.MODELS[architecture].config.from_pretrained(path)
        for path in (folder / f"run-{name}", tmp_path / "back")
    )
    assert settings(next(configs)) == settings(next(configs))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_of_its_own_computes_the_same_and_goes_back(folder, name, tmp_path):
    """As its save_pretrained writes it, with all that ours does not need to say."""
    source = tmp_path / "theirs"
    source.mkdir()
    weights = recorded_weights(name)
    save_file(weights, source / "model.safetensors")
    model_type = json.loads((folder / name / "config.json").read_text())["model_type"]
    fields = RECORDED[name]["fields"] | {"model_type": model_type}
    (source / "config.json").write_text(json.dumps(fields))
    format = native_format(CONFIGS[name][0])
    convert(format.name, source, tmp_path / "ours")
    # Its logits of these weights are on record: every tensor went to its place.
    model = zoo.MODELS[CONFIGS[name][0]].causal_lm.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        logits = model(torch.tensor(IDS)).logits[0, -1]
    expected = torch.tensor(RECORDED[name]["logits"])
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    # And out again, with the same words: nothing of it was ours alone.
    convert_back(format.name, tmp_path / "ours", tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == weights.keys()
    assert all(torch.equal(x, again[n]) for n, x in weights.items())


def test_card_and_message(folder, tmp_path, capsys):
    random_model("retnet", RETNET | {"vocab_size": 264}).save_pretrained(tmp_path / "run")
    AutoTokenizer.from_pretrained(BYTE_TOKENIZER).save_pretrained(tmp_path / "run")
    arguments = ["export", str(tmp_path / "run"), str(tmp_path / "out"), "--license", "mit"]
    assert main([*arguments, "--format", "native"]) == 0
    assert "parameters, flash-linear-attention's RetNetForCausalLM\n" in capsys.readouterr().out
    for path in (tmp_path / "out", folder / "rwkv7"):
        card = ModelCard((path / "README.md").read_text())
        assert "`pip install flash-linear-attention` and `import fla`" in card.text
        snippet = card.text.partition("```python\n")[2].partition("```")[0]
        assert "import fla  #" in snippet and "trust_remote_code" not in snippet
        compile(snippet, "README.md", "exec")
        assert "fla" in card.data.tags and "$" not in card.content
    assert "`zoo convert fla-retnet SRC DST` leads back" in (
        tmp_path / "out" / "README.md"
    ).read_text().replace("\n", " ")


def test_transformers_own_class_comes_first(monkeypatch):
    assert native_format("sliding_window").library is TRANSFORMERS
    # As if fla had RWKV-4 too, before and after.
    other = FORMATS["fla-rwkv6"]._replace(architecture="rwkv4")
    for order in (("a", "hf-rwkv"), ("hf-rwkv", "a")):
        formats = {"a": other, "hf-rwkv": FORMATS["hf-rwkv"]}
        monkeypatch.setattr("zoo.hub.convert.formats.FORMATS", {n: formats[n] for n in order})
        assert native_format("rwkv4").name == "hf-rwkv"


REFUSED = [
    ("retnet", RETNET | {"rotation": "interleaved"}, "rotation is 'interleaved'.* has 'half'"),
    ("retnet", RETNET | {"normalize_retention": True}, "normalize_retention is True"),
    ("retnet", RETNET | {"decay_schedule": "log"}, "decay_schedule is 'log'"),
    ("retnet", RETNET | {"gated_mlp": False}, "gated_mlp is False: fla's RetNet has True"),
    ("retnet", RETNET | {"hidden_act": "gelu"}, "hidden_act is 'gelu': fla's RetNet has 'silu'"),
    ("retnet", RETNET | {"deepnorm": True}, "deepnorm is True: fla's RetNet has False"),
    ("retnet", RETNET | {"pre_norm": False}, "pre_norm is False"),
    ("retnet", RETNET | {"embedding_norm": True}, "embedding_norm is True"),
    ("retnet", RETNET | {"scale_embedding": True}, "scale_embedding is True"),
    ("retnet", RETNET | {"key_size": 4 * 258}, "a head of q has width 258: .* 256 at most"),
    ("rwkv6", RWKV6 | {"head_norm_eps": 64e-5}, "one epsilon for all norms"),
    ("rwkv7", RWKV7 | {"head_norm_eps": 64e-5}, "head_norm_eps is 0.00064.* head_dim"),
    ("rwkv7", RWKV7 | {"removal_eps": 1e-3}, "removal_eps is 0.001"),
    ("rwkv7", RWKV7 | {"value_size": 64}, "value_size is 64: fla's RWKV-7 has hidden_size, 32"),
    ("rwkv7", RWKV7 | {"key_size": 16, "value_size": 32}, "key_size is 16: .* has hidden_size, 32"),
    ("rwkv7", RWKV7 | {"num_hidden_layers": 1}, "num_hidden_layers is 1: .* has 2 at least"),
    ("gated_deltanet", DELTA | {"hidden_act": "gelu"}, "hidden_act is 'gelu': fla's Gated Delta"),
    ("gated_deltanet", DELTA | {"head_dim": 257}, "head_dim is 257: .* has 256 at most"),
]


@pytest.mark.parametrize(("architecture", "fields", "message"), REFUSED)
def test_what_its_class_does_not_compute_is_refused(architecture, fields, message, tmp_path):
    random_model(architecture, fields).save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=message) as error:
        export(tmp_path / "checkpoint", tmp_path / "out", format="native")
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_dropout_is_left_out_and_said(tmp_path):
    random_model("retnet", RETNET | {"dropout": 0.1}).save_pretrained(tmp_path / "checkpoint")
    exported = export(tmp_path / "checkpoint", tmp_path / "out", format="native")
    assert "left out dropout = 0.1: config.json has no field for it" in exported.notes


READ_REFUSED = [
    ({"allow_neg_eigval": True}, "a beta of up to 2 has no counterpart"),
    ({"use_gate": False}, "use_gate = false: ours has its gate"),
    ({"use_short_conv": False}, "use_short_conv = false: ours has its convolutions"),
    ({"output_gate_activation": "sigmoid"}, "output_gate_activation is swish in ours"),
    ({"attnres_block_size": 2}, "residuals by attention"),
    ({"attn": {"layers": [0], "num_heads": 2}}, "softmax attention layers"),
    ({"hidden_act": "powlu"}, "hidden_act is swish"),
    ({"expand_v": 1.3}, r"head_dim \* expand_v is whole, got 8 \* 1.3"),
    ({"conv_size": 3}, "convolution.weight is .* by the config"),
]


@pytest.mark.parametrize(("fields", "message"), READ_REFUSED)
def test_gated_deltanets_without_a_counterpart_are_refused(folder, fields, message, tmp_path):
    source = tmp_path / "theirs"
    source.mkdir()
    values = json.loads((folder / "gated-deltanet" / "config.json").read_text()) | fields
    (source / "config.json").write_text(json.dumps(values))
    (source / "model.safetensors").symlink_to(folder / "gated-deltanet" / "model.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        convert("fla-gated-deltanet", source, tmp_path / "ours")
    assert "\n" not in str(error.value)
