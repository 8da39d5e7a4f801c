"""Conversion is exact, takes every file layout, and refuses what would be another model."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from zoo.hub.convert import FORMATS, convert

ROOT = Path(__file__).resolve().parent.parent.parent
GOLDENS = ROOT / "tests" / "parity" / "goldens"
GOLDEN_OF = {"torchscale-retnet": "retnet-torchscale", "fla-retnet": "retnet-fla"}


@pytest.fixture(params=GOLDEN_OF)
def format(request):
    return request.param


@pytest.fixture
def source(format, tmp_path):
    """A copy of a foreign checkpoint, to rearrange."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(GOLDENS / GOLDEN_OF[format] / name, folder / name)
    return folder


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def replace_weights(folder, tensors):
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def expected(format, source, tmp_path):
    """The converted weights."""
    convert(format, source, tmp_path / "expected")
    return weights_of(tmp_path / "expected")


def assert_same(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, x in tensors.items():
        assert x.dtype == expected[name].dtype and torch.equal(x, expected[name]), name


def test_values_are_kept_exactly(source, expected):
    def values(tensors):
        return sorted(x.double().sum().item() for x in tensors.values())

    constants = ("angle", "decay")
    foreign = {n: x for n, x in weights_of(source).items() if not n.endswith(constants)}
    assert values(foreign) == values(expected)


def shard(folder, ending):
    tensors = list(weights_of(folder).items())
    (folder / "model.safetensors").unlink()
    stem = "model" if ending == ".safetensors" else "pytorch_model"
    weight_map = {}
    for i in range(3):
        name = f"{stem}-{i + 1:05}-of-00003{ending}"
        part = dict(tensors[i::3])
        save_file(part, folder / name) if stem == "model" else torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / f"{stem}{ending}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def as_pickle(name, wrap=lambda tensors: tensors):
    def rearrange(folder):
        torch.save(wrap(weights_of(folder)), folder / name)
        (folder / "model.safetensors").unlink()

    return rearrange


def transpose(x):
    return x.mT.contiguous().mT if x.ndim > 1 else x


LAYOUTS = {
    "sharded safetensors": lambda folder: shard(folder, ".safetensors"),
    "sharded pickles": lambda folder: shard(folder, ".bin"),
    "bin": as_pickle("pytorch_model.bin"),
    "pt of any name": as_pickle("checkpoint_best.pt"),
    "inside of a trainer's file": as_pickle("x.pth", lambda t: {"model": t, "step": 3}),
    "with a trainer's other files": lambda folder: torch.save({"lr": 1}, folder / "optimizer.pt"),
    "transposed in memory": as_pickle("a.bin", lambda t: {n: transpose(x) for n, x in t.items()}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_files(format, source, expected, layout, tmp_path):
    LAYOUTS[layout](source)
    convert(format, source, tmp_path / "ours")
    assert_same(weights_of(tmp_path / "ours"), expected)


def test_a_file_with_its_config_beside_it(format, source, expected, tmp_path):
    shutil.copyfile(source / "model.safetensors", source / "another.safetensors")
    convert(format, source / "another.safetensors", tmp_path / "ours")
    assert_same(weights_of(tmp_path / "ours"), expected)


@pytest.mark.parametrize("format", ["torchscale-retnet"])
@pytest.mark.parametrize("prefix", ["decoder.", "model."])
def test_names_of_fairseq_and_of_the_port(source, format, expected, prefix, tmp_path):
    tensors = {prefix + name: x for name, x in weights_of(source).items()}
    if prefix == "model.":
        tensors["lm_head.weight"] = tensors.pop("model.output_projection.weight")
    else:
        tensors["decoder.version"] = torch.tensor([3.0])
    replace_weights(source, tensors)
    convert(format, source, tmp_path / "ours")
    assert_same(weights_of(tmp_path / "ours"), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_stay(format, source, expected, dtype, tmp_path):
    replace_weights(source, {name: x.to(dtype) for name, x in weights_of(source).items()})
    report = convert(format, source, tmp_path / "ours")
    assert report.dtype == dtype
    assert_same(weights_of(tmp_path / "ours"), {n: x.to(dtype) for n, x in expected.items()})
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "ours").dtype == dtype


def test_mixed_dtypes_become_the_one_that_holds_all(format, source, tmp_path):
    tensors = {name: x.bfloat16() for name, x in weights_of(source).items()}
    for name, x in tensors.items():
        tensors[name] = x.float() if "norm" in name else x
    replace_weights(source, tensors)
    report = convert(format, source, tmp_path / "ours")
    assert report.dtype == torch.float32


def test_tokenizer_and_generation_config_come_along(format, source, tmp_path):
    replace_weights(source, widen(weights_of(source), 260))
    edit_config(source, vocab_size=260)
    AutoTokenizer.from_pretrained(ROOT / "tokenizers" / "byte").save_pretrained(source)
    (source / "generation_config.json").write_text('{"eos_token_id": 258}')
    convert(format, source, tmp_path / "ours")
    assert AutoTokenizer.from_pretrained(tmp_path / "ours")("Hi")["input_ids"] == [72, 105]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert model.generation_config.eos_token_id == 258


def widen(tensors, vocab_size):
    """Embedding and output projection with rows for more tokens."""
    rows = {"embed", "embeddings", "embed_tokens", "output_projection", "lm_head"}
    return {
        name: torch.nn.functional.pad(x, (0, 0, 0, vocab_size - len(x)))
        if rows & set(name.split("."))
        else x
        for name, x in tensors.items()
    }


def test_report_says_what_was_left_out(source, format, tmp_path):
    fields = {"torchscale-retnet": {"drop_path_rate": 0.1}, "fla-retnet": {"use_l2warp": True}}
    edit_config(source, **fields[format], torch_dtype="float32", temperature=0.7)
    report = convert(format, source, tmp_path / "ours")
    (name,) = fields[format]
    assert [note for note in report.notes if f"{name} = {fields[format][name]}" in note]
    assert not [note for note in report.notes if "temperature" in note]
    assert report.num_parameters == sum(x.numel() for x in weights_of(tmp_path / "ours").values())


class RunsCode:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickles_run_no_code(format, source, tmp_path):
    as_pickle("a.bin", lambda t: t | {"x": RunsCode(tmp_path / "ran")})(source)
    with pytest.raises(ValueError, match="holds more than tensors") as error:
        convert(format, source, tmp_path / "ours")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def drop(name):
    return lambda folder: replace_weights(
        folder, {n: x for n, x in weights_of(folder).items() if n != name}
    )


def add(name, x):
    return lambda folder: replace_weights(folder, weights_of(folder) | {name: x})


def config(**fields):
    return lambda folder: edit_config(folder, **fields)


def without_config(folder):
    (folder / "config.json").unlink()


def two_files(folder):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    shutil.copyfile(folder / "a.safetensors", folder / "b.safetensors")


def missing_shard(folder):
    shard(folder, ".safetensors")
    (folder / "model-00002-of-00003.safetensors").unlink()


def shard_elsewhere(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"x": "../other/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def larger_tokenizer(folder):
    AutoTokenizer.from_pretrained(ROOT / "tokenizers" / "byte").save_pretrained(folder)


TS, FLA = GOLDEN_OF
REFUSED = [
    (TS, drop("layers.1.ffn.gate.weight"), "have no layers.1.ffn.gate.weight"),
    (TS, drop("output_projection.weight"), "have no output_projection.weight"),
    (TS, add("layers.0.extra", torch.zeros(2)), "nothing uses layers.0.extra"),
    (TS, add("layers.3.ffn.fc1.weight", torch.zeros(2)), "nothing uses layers.3.ffn.fc1.weight"),
    (
        TS,
        add("embed_tokens.weight", torch.zeros(100, 64)),
        r"\[113, 64\] by the config, \[100, 64\]",
    ),
    (TS, add("layer_norm.weight", torch.ones(64, dtype=torch.int8)), "torch.int8, not a float"),
    (TS, add("retnet_rel_pos.decay", torch.full((4,), -0.1)), "retnet_rel_pos.decay is .*-0.1"),
    (TS, add("retnet_rel_pos.angle", torch.ones(16)), "retnet_rel_pos.angle is"),
    (TS, config(use_lm_decay=True), "retnet_rel_pos.decay is"),
    (TS, config(share_decoder_input_output_embed=True), "the two differ"),
    (TS, config(moe_freq=2), "mixtures of experts"),
    (TS, config(no_output_layer=True), "output projection"),
    (TS, config(activation_fn="tanh"), "activation_fn is one of gelu, relu, swish, got 'tanh'"),
    (TS, config(use_glu=False, subln=False), "a plain MLP without a norm inside"),
    (TS, config(use_glu=False, use_ffn_rms_norm=True), "use_ffn_rms_norm"),
    (TS, config(decoder_retention_heads=5), "num_attention_heads"),
    (TS, config(sparse_rate=0.5), "does not know: sparse_rate = 0.5"),
    (TS, config(decoder_layers="three"), "num_hidden_layers"),
    (
        FLA,
        drop("model.layers.1.attn.g_norm_swish_gate.weight"),
        "have no model.layers.1.attn.g_norm",
    ),
    (FLA, drop("lm_head.weight"), "have no lm_head.weight"),
    (FLA, add("model.layers.0.attn.q_conv1d.weight", torch.zeros(2)), "nothing uses .*q_conv1d"),
    (FLA, config(expand_v=1.0), r"\[64, 64\] by the config, \[128, 64\]"),
    (FLA, config(expand_k=0.33), r"hidden_size \* expand_k is whole"),
    (FLA, config(feature_map="relu"), "a feature map"),
    (FLA, config(use_short_conv=True), "short convolutions"),
    (FLA, config(attn={"layers": [1], "num_heads": 2}), "softmax attention layers"),
    (FLA, config(attnres_block_size=2), "residuals by attention"),
    (FLA, config(use_output_gate=False), "our retention has its gate"),
    (FLA, config(hidden_act="gelu"), "hidden_act is swish in fla's RetNet, got 'gelu'"),
    (FLA, config(hidden_size="64"), "hidden_size = '64', which is not of the right type"),
    (FLA, config(pad_token_id=200), "pad_token_id"),
    (
        FLA,
        config(model_type="gla"),
        "fla-retnet expects model_type 'retnet'.* got model_type 'gla'",
    ),
    (FLA, config(model_type="zoo_retnet"), "already a checkpoint of ours"),
    (FLA, lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "not a readable safetensors"),
    (FLA, lambda f: (f / "model.safetensors").unlink(), "expected weights"),
    (FLA, lambda f: (f / "config.json").write_text("[1]"), "expected a JSON object, got list"),
    (FLA, without_config, "config.json is missing"),
    (FLA, two_files, r"several weight files \(a.safetensors, b.safetensors\)"),
    (FLA, missing_shard, "00002-of-00003.safetensors is missing"),
    (FLA, shard_elsewhere, "outside of its folder"),
    (FLA, larger_tokenizer, "tokenizer has 259 ids, the model's vocab_size is 97"),
]


@pytest.mark.parametrize(("format", "damage", "message"), REFUSED)
def test_refused_in_one_line(format, source, damage, message, tmp_path):
    damage(source)
    with pytest.raises(ValueError, match=message) as error:
        convert(format, source, tmp_path / "ours")
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_the_other_format_is_named(source, format, tmp_path):
    (other,) = GOLDEN_OF.keys() - {format}
    with pytest.raises(ValueError, match=f"this looks like {format}"):
        convert(other, source, tmp_path / "ours")


def test_unknown_format_names_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="did you mean fla-retnet"):
        convert("fla-retent", tmp_path, tmp_path / "ours")
    with pytest.raises(ValueError, match=", ".join(FORMATS)):
        convert("gguf", tmp_path, tmp_path / "ours")
