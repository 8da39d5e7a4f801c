"""An export for transformers' own class gives the same logits, in a process without the zoo."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import zoo
from zoo.cli import main
from zoo.hub.convert import convert
from zoo.hub.convert.formats import native_format
from zoo.hub.export import export
from zoo.hub.push import files_to_push

ROOT = Path(__file__).resolve().parent.parent.parent
SIZES = {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 256}
HEADS = SIZES | {"num_attention_heads": 4, "head_dim": 12}
MISTRAL = HEADS | {"num_key_value_heads": 2}
# GPT's block, as MPT and BLOOM have it.
GPT = SIZES | {"num_attention_heads": 4, "intermediate_size": 128, "sliding_window": None}
GPT |= {"position_embedding_type": "alibi", "gated_mlp": False, "norm_type": "layer"}
BIASES = {"mlp_bias": True, "attention_bias": True, "norm_bias": True, "embedding_norm": True}
CONFIGS = {
    "window": ("sliding_window", MISTRAL | {"sliding_window": 5}),
    "full": ("sliding_window", MISTRAL | {"sliding_window": None}),
    "tied": ("sliding_window", MISTRAL | {"tie_word_embeddings": True, "sliding_window": 5}),
    "smollm3": (
        "sliding_window",
        MISTRAL | {"position_embedding_type": ["rope", None], "sliding_window": None},
    ),
    "mpt": ("sliding_window", GPT | {"hidden_act": "gelu", "clip_qkv": 2.0}),
    "bloom": ("sliding_window", GPT | BIASES | {"hidden_act": "gelu_bloom"}),
    "falcon": (
        "sliding_window",
        GPT | {"norm_bias": True, "alibi_rounding": "bfloat16", "alibi_scaled": True},
    ),
    "rwkv4": ("rwkv4", SIZES),
    "minimax": ("lightning", HEADS | zoo.LightningConfig.variants["minimax"]),
    "hybrid": ("lightning", HEADS | zoo.LightningConfig.variants["hybrid"]),
}
CLASS_OF = {
    "sliding_window": "MistralForCausalLM",
    "rwkv4": "RwkvForCausalLM",
    "lightning": "MiniMaxForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "mpt": "MptForCausalLM",
    "bloom": "BloomForCausalLM",
    "falcon": "FalconForCausalLM",
}


def class_of(name):
    """transformers' class for one of CONFIGS."""
    return CLASS_OF.get(name) or CLASS_OF[CONFIGS[name][0]]


def save_checkpoint(folder, architecture, fields):
    """A small language model with the byte tokenizer and ways to sample. Returns the model."""
    torch.manual_seed(0)
    found = zoo.MODELS[architecture]
    model = found.causal_lm(found.config(**fields)).eval()
    with torch.no_grad():
        for p in model.parameters():
            # Away from where a model starts, so that no weight can be lost without a trace.
            p += 0.2 * torch.randn_like(p)
    model.generation_config.update(do_sample=True, temperature=0.5, eos_token_id=10)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "tokenizers" / "byte").save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("native")


@pytest.fixture(scope="module")
def models(folder):
    """Name -> the model whose export lies in that folder."""
    found = {}
    for name, (architecture, fields) in CONFIGS.items():
        # Of a run, as long as it goes.
        found[name] = save_checkpoint(folder / f"run-{name}" / "checkpoint-3", architecture, fields)
        exported = export(folder / f"run-{name}", folder / name, format="native")
        assert exported.model_class == class_of(name) and exported.code == []
    return found


@pytest.fixture(scope="module")
def elsewhere(folder, models, forks_without_zoo):
    """Token ids, and what a process that cannot import the zoo made of them: logits and more."""
    ids = torch.randint(256, (2, 23), generator=torch.Generator().manual_seed(0))
    save_file({"ids": ids}, folder / "ids.safetensors")
    script = shutil.copy(Path(__file__).parent / "native_without_zoo.py", folder)
    paths = [folder / name for name in ("ids.safetensors", "logits.safetensors", *models)]
    fork = forks_without_zoo.start(script, *paths, cwd=folder)
    output, errors = fork.communicate()
    assert fork.returncode == 0, errors
    results = json.loads(output.rpartition("RESULTS ")[2])
    return ids, load_file(folder / "logits.safetensors"), results


@pytest.mark.parametrize("name", CONFIGS)
def test_without_zoo(elsewhere, models, name):
    ids, logits, results = elsewhere
    with torch.no_grad():
        expected = models[name](ids).logits
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        greedy = models[name].generate(ids, **options)
    # float32, in another order; their angles are float32 too.
    assert (logits[name] - expected).abs().max() / expected.abs().max() < 1e-5
    assert results[name] == {
        "class": ["transformers", class_of(name)],
        "greedy": greedy.tolist(),
        "tokens": [72, 105],
        "eos": 10,
        "printed": 1,
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_files(folder, models, name):
    kept = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    found = {path.name for path in (folder / name).iterdir()}
    assert kept <= found and not [file for file in found if file.endswith(".py")]
    values = json.loads((folder / name / "generation_config.json").read_text())
    assert (values["do_sample"], values["temperature"], values["eos_token_id"]) == (True, 0.5, 10)
    # What only the tokenizer knows.
    assert (values["bos_token_id"], values["pad_token_id"]) == (257, 256)
    assert "auto_map" not in json.loads((folder / name / "config.json").read_text())


@pytest.mark.parametrize("name", CONFIGS)
def test_it_converts_back(folder, models, name, tmp_path):
    native = native_format(CONFIGS[name][0], models[name].config)
    assert f"`zoo convert {native.name} SRC DST`" in (folder / name / "README.md").read_text()
    convert(native.name, folder / name, tmp_path / "ours")
    weights = load_file(tmp_path / "ours" / "model.safetensors")
    assert all(torch.equal(x, models[name].state_dict()[n]) for n, x in weights.items())


def test_card(folder, models):
    card = ModelCard((folder / "window" / "README.md").read_text())
    assert card.data.library_name == "transformers" and card.data.tags == ["mistral"]
    assert "trust_remote_code" not in card.text and "$" not in card.content
    assert "`MistralForCausalLM`" in card.text and "| `sliding_window` | `5` |" in card.text
    # What the format has to say goes along: it matters to whoever loads the folder.
    assert "\n- rescale_every is 0" in (folder / "rwkv4" / "README.md").read_text()


def test_options(folder, models, tmp_path, capsys):
    arguments = ["export", str(folder / "run-window"), str(tmp_path / "out"), "--format", "native"]
    more = ["--license", "mit", "--max-shard-size", "30KB"]
    assert main(arguments + more) == 0
    assert "parameters, transformers' MistralForCausalLM\n" in capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert "\nlicense: mit\n" in (tmp_path / "out" / "README.md").read_text()
    assert main(arguments + more) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert main([*arguments, "--license", "mit", "--overwrite"]) == 0
    assert not list((tmp_path / "out").glob("model-*.safetensors"))


def test_it_can_be_pushed(folder, models, tmp_path):
    files, left_out = files_to_push(folder / "window")
    assert {"README.md", "model.safetensors", "tokenizer.json"} <= set(files) and not left_out
    # Ours, with a README but without the code that it needs.
    ours = shutil.copytree(folder / "run-window" / "checkpoint-3", tmp_path / "ours")
    shutil.copy(folder / "window" / "README.md", ours)
    with pytest.raises(ValueError, match="is not an exported folder"):
        files_to_push(ours)


REFUSED = [
    ("sliding_window", {"num_sink_tokens": 2}, "num_sink_tokens is 2: transformers' model has no"),
    ("sliding_window", {"learnable_sinks": True}, "learnable_sinks is True: transformers' model"),
    ("sliding_window", {"norm_type": "layer"}, "norm_type is 'layer': transformers' model has no"),
    ("sliding_window", {"gated_mlp": False}, "gated_mlp is False: transformers' model has none"),
    ("sliding_window", {"clip_qkv": 2.0}, "clip_qkv is 2.0: transformers' model has none"),
    ("rwkv4", {"attention_hidden_size": 64}, "transformers cannot decode when they differ"),
    ("rwkv4", {"embedding_norm": False}, "transformers' model always has that norm"),
    ("lightning", {}, "norm_weight is False: transformers' model has True"),  # TransNormerLLM
    ("rwkv5", {}, "no other library has a class for rwkv5 .* transformers for .*sliding_window"),
]


@pytest.mark.parametrize(("architecture", "fields", "message"), REFUSED)
def test_what_no_class_computes_is_refused(architecture, fields, message, tmp_path):
    sizes = MISTRAL if architecture == "sliding_window" else SIZES
    if architecture in ("rwkv5", "lightning"):
        sizes = sizes | {"num_attention_heads": 2}
    save_checkpoint(tmp_path / "checkpoint", architecture, sizes | fields)
    with pytest.raises(ValueError, match=message) as error:
        export(tmp_path / "checkpoint", tmp_path / "out", format="native")
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_unknown_format(folder, models, tmp_path):
    with pytest.raises(ValueError, match="format is zoo or native, got 'onnx'"):
        export(folder / "run-window", tmp_path / "out", format="onnx")
