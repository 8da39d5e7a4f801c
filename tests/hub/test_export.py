"""An exported folder works without the zoo, and says what it is."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import zoo
from zoo.hub.card import state_in_words
from zoo.hub.export import export, modelling_sources

ROOT = Path(__file__).resolve().parent.parent.parent
TOKENIZER = ROOT / "tokenizers" / "byte"
SIZES = {
    "vocab_size": 264,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 256,
}
COMMIT = "0123456789" * 4
RUN = {
    "recipe": {"name": "tiny", "data": "stdlib", "steps": 3, "learning_rate": 0.001},
    "command": "accelerate launch recipes/pretrain.py recipes/tiny.toml",
    "git_commit": "0123abcd",
    "corpus": {"train": {"bytes": 123456}},
    "results": {"gzip_bits_per_byte": 1.75},
}
METRICS = [
    {"kind": "held_out", "step": 1, "tokens": 1024, "bits_per_byte": 7.5},
    {"kind": "held_out", "step": 3, "tokens": 3072, "bits_per_byte": 4.25},
    {"kind": "train", "step": 3, "tokens": 3072, "bits_per_byte": 4.0},
    {"kind": "held_out", "step": 5, "tokens": 5120, "bits_per_byte": 3.5},
]


def save_checkpoint(folder, **fields):
    """A small language model with the byte tokenizer, as a run leaves it. Returns the model."""
    torch.manual_seed(0)
    model = zoo.RetNetForCausalLM(zoo.RetNetConfig(**SIZES, **fields)).eval()
    for p in model.parameters():
        # Norms away from one, so that no weight can be lost without a trace.
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.3)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def model(folder):
    run = folder / "run"
    model = save_checkpoint(run / "checkpoint-3")
    (run / "run.json").write_text(json.dumps(RUN))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in METRICS))
    export(run, folder / "tiny")
    save_checkpoint(folder / "tied-checkpoint", tie_word_embeddings=True)
    export(folder / "tied-checkpoint", folder / "tied")
    return model


@pytest.fixture(scope="module")
def elsewhere(folder, model, forks_without_zoo):
    """What happened in a process that cannot import the zoo: check -> result."""
    ids = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        reference = {
            **inputs,
            "logits": model(**inputs).logits,
            "last_hidden_state": model.model(**inputs).last_hidden_state,
            "greedy": model.generate(**inputs, **options),
            "beams": model.generate(**inputs, **options, num_beams=3),
        }
    reference = {name: x.contiguous() for name, x in reference.items()}
    save_file(reference, folder / "reference.safetensors")
    (folder / "work").mkdir()
    # What huggingface_hub keeps of a repository that it has downloaded.
    cached = forks_without_zoo.home / "hub" / "models--owner--tiny"
    shutil.copytree(folder / "tiny", cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    script = shutil.copy(Path(__file__).parent / "without_zoo.py", folder)
    paths = [folder / name for name in ("tiny", "tied", "reference.safetensors", "work")]
    fork = forks_without_zoo.start(script, *paths, cwd=folder)
    output, errors = fork.communicate()
    assert fork.returncode == 0, errors
    return json.loads(output.rpartition("RESULTS ")[2])


@pytest.mark.parametrize(
    ("check", "expected"),
    {
        "config_and_model_are_of_one_module": "transformers_modules",
        "logits": True,
        "logits_by_its_name_on_the_hub": True,
        "hidden_states": True,
        "greedy": True,
        "beams": True,
        "tokenizer": [72, 105],
        "tied": [True, False, True],
        "resized_embeddings": [5, 5, True],
        "two_folders_in_one_process": True,
        "sequence_classification": [[2, 3], True, True],
        "snippet_of_the_card": 1,
    }.items(),
)
def test_without_zoo(elsewhere, check, expected):
    assert elsewhere[check] == expected, elsewhere[check]


def test_pipeline_without_zoo(elsewhere):
    texts = elsewhere["text_generation_pipeline"]
    assert isinstance(texts, list), texts
    assert [text[: len(start)] for text, start in zip(texts, ("def f(", "x"))] == ["def f(", "x"]
    assert len(texts[1]) > 1


def test_saved_again_without_zoo(elsewhere, folder):
    same, code = elsewhere["saved_again"]
    assert same is True, elsewhere["saved_again"]
    assert code == sorted(p.name for p in (folder / "tiny").glob("*.py"))


def test_bfloat16_without_zoo(elsewhere):
    # bf16 has 8 bits; the rest is what two layers make of it.
    assert 0 < elsewhere["device_map_and_bfloat16"] < 0.05, elsewhere["device_map_and_bfloat16"]


def test_training_without_zoo(elsewhere):
    steps, loss, all_moved = elsewhere["trainer"]
    assert (steps, all_moved) == (2, True), elsewhere["trainer"]
    assert 0 < loss < 20
    losses, changed, merging_error = elsewhere["lora"]
    assert losses[1] < losses[0], elsewhere["lora"]
    assert changed > 1e-2 and merging_error < 1e-4


def test_with_zoo_it_needs_no_remote_code(folder, model):
    loaded = AutoModelForCausalLM.from_pretrained(folder / "tiny")
    assert type(loaded) is zoo.RetNetForCausalLM
    ids = torch.arange(7)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_exported_code_is_the_source(folder, model):
    found = {path.name for path in (folder / "tiny").glob("*.py")}
    assert found == set(modelling_sources(zoo.MODELS["retnet"]))
    assert {"retnet.py", "base.py", "sequence.py", "state.py", "linear_recurrence.py"} <= found
    for path in (folder / "tiny").glob("*.py"):
        (source,) = (ROOT / "zoo").glob(f"*/{path.name}")
        changed = re.sub(
            r"(?m)^(\s*from )\.\.(?:core|layers|kernels)\.(\w+ import)",
            r"\1.\2",
            source.read_text(),
        )
        assert path.read_text() == changed


def test_code_is_followed_wherever_it_is_imported(tmp_path, monkeypatch):
    files = {
        "models/model.py": "from ..core.part import (\n    a,\n)\nfrom ..kernels.op import b\n",
        "core/part.py": '"""from .nowhere import x is no import here."""\nfrom .other import c\n',
        "core/other.py": "import torch\n",
        "kernels/op.py": "try:\n    from .op_triton import d\nexcept ImportError:\n    d = None\n",
        "kernels/op_triton.py": "def f():\n    from .op_table import e\n    return e\n",
        "kernels/op_table.py": "e = 1\n",
        "core/unused.py": "",
    }
    for name, source in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    monkeypatch.setattr("inspect.getfile", lambda _: str(tmp_path / "models/model.py"))
    sources = modelling_sources(zoo.MODELS["retnet"])
    assert set(sources) == {Path(name).name for name in files} - {"unused.py"}
    flat = files["models/model.py"].replace("..core.", ".").replace("..kernels.", ".")
    assert sources["model.py"] == flat
    for line in ("from ..other import c\n", "from . import other\n", "from .core.other import c\n"):
        (tmp_path / "core/part.py").write_text(line)
        with pytest.raises(ValueError, match=r"part.py, line 1: .*`from .module import name`"):
            modelling_sources(zoo.MODELS["retnet"])


def test_state_in_words():
    assert state_in_words(1024, 0) == "1,024 bytes of state per sequence, however long the text"
    assert state_in_words(0, 2048) == "2,048 bytes of state per token of each sequence"
    assert state_in_words(7, 5) == "5 bytes of state per token of each sequence, and 7 beside"


def test_card_of_a_hybrid(tmp_path):
    config = zoo.LightningConfig(**{**SIZES, **zoo.LightningConfig.variants["hybrid"]})
    model = zoo.LightningForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "out")
    growing = model.state_size(5) - model.state_size(4)
    text = ModelCard((tmp_path / "out" / "README.md").read_text()).text
    assert f"{growing:,} bytes of state per token of each sequence, and " in text
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.layer_types[1]
        != (model.config.layer_types[0])
    )


def test_card(folder, model):
    card = ModelCard((folder / "tiny" / "README.md").read_text())
    data = card.data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.license == "apache-2.0" and {"retnet", "custom_code"} <= set(data.tags)
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value) == ("bits_per_byte", 4.25)
    assert f"{model.state_size():,} bytes" in card.text
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in card.text
    for fact in ("3,072", "4.2500", "1.7500", "123,456", "0123abcd", "0.001"):
        assert fact in card.text
    assert "More Information Needed" not in card.content and "$" not in card.content
    # A checkpoint from anywhere has no record of its training.
    card = ModelCard((folder / "tied" / "README.md").read_text())
    assert card.data.eval_results is None
    assert "without the record" in card.text


@pytest.mark.parametrize("unknown", [None, "<unk>"])
def test_the_cards_example_runs_with_a_tokenizer_that_knows_no_code(
    folder, model, tmp_path, monkeypatch, capsys, unknown
):
    """As that of a synthetic task, whose words are numbers."""
    words = {**({unknown: 0} if unknown else {}), "0": 1, "1": 2, "2": 3}
    tokenizer = Tokenizer(WordLevel(words, unk_token=unknown))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    shutil.copytree(folder / "run" / "checkpoint-3", tmp_path / "checkpoint")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown).save_pretrained(
        tmp_path / "checkpoint"
    )
    export(tmp_path / "checkpoint", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert capsys.readouterr().out.startswith("0 1 2")


def test_every_architecture_has_a_card():
    assert [name for name in zoo.MODELS if not (ROOT / "hub_cards" / f"{name}.md").is_file()] == []


def test_generation_config(folder, model, tmp_path):
    values = json.loads((folder / "tiny" / "generation_config.json").read_text())
    # From the tokenizer, where neither generation config nor config has one.
    assert [values[f"{name}_token_id"] for name in ("pad", "bos", "eos")] == [256, 257, 258]
    shutil.copytree(folder / "run" / "checkpoint-3", tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "generation_config.json"
    path.write_text(json.dumps({"do_sample": True, "temperature": 0.5, "eos_token_id": 10}))
    export(tmp_path / "checkpoint", tmp_path / "out")
    values = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (values["do_sample"], values["temperature"], values["eos_token_id"]) == (True, 0.5, 10)


def test_large_weights_are_sharded(folder, model, tmp_path):
    export(folder / "run", tmp_path / "out", max_shard_size="30KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    # And exported again, as any other checkpoint.
    export(tmp_path / "out", tmp_path / "again")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in loaded.state_dict().items())


@pytest.fixture
def checkpoint(folder, model, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(folder / "run" / "checkpoint-3", tmp_path / "checkpoint"))


def edit_config(checkpoint, **fields):
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


DAMAGES = {
    "corrupt weights": (
        lambda c: (c / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0not json"),
        "not a readable safetensors file",
    ),
    "truncated weights": (
        lambda c: os.truncate(c / "model.safetensors", 10_000),
        "not a readable safetensors file",
    ),
    "no weights": (lambda c: (c / "model.safetensors").unlink(), "expected weights"),
    "no config": (lambda c: (c / "config.json").unlink(), "config.json is missing"),
    "broken config": (lambda c: (c / "config.json").write_text("{"), "cannot be read as JSON"),
    "wrong model type": (lambda c: edit_config(c, model_type="llama"), "got 'llama'"),
    "wrong head": (
        lambda c: edit_config(c, architectures=["RetNetModel"]),
        "expected a language model",
    ),
    "another head": (
        lambda c: edit_config(c, architectures=["RetNetForSequenceClassification"]),
        r"do not fit: no score.weight, no place for lm_head.weight",
    ),
    "unknown field": (lambda c: edit_config(c, num_haeds=2), "num_haeds"),
    "wrong size": (lambda c: edit_config(c, vocab_size=300), r"\[300, 32\] by the config"),
    "missing layer": (
        lambda c: edit_config(c, num_hidden_layers=3, layer_types=None),
        "no model.lay",
    ),
    "extra layer": (
        lambda c: edit_config(c, num_hidden_layers=1, layer_types=None),
        "no place for",
    ),
    "falsely tied": (lambda c: edit_config(c, tie_word_embeddings=True), "the two differ"),
    "broken tokenizer": (
        lambda c: (c / "tokenizer.json").write_text("{"),
        "tokenizer does not load",
    ),
    "broken generation config": (
        lambda c: (c / "generation_config.json").write_text("[]"),
        "expected a JSON object",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_refused_in_one_line(checkpoint, damage, tmp_path):
    apply, message = DAMAGES[damage]
    apply(checkpoint)
    with pytest.raises(ValueError, match=message) as error:
        export(checkpoint, tmp_path / "out")
    assert "\n" not in str(error.value)
    # Nothing is left behind, not even beside it.
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_tokenizer_of_another_model_is_refused(tmp_path):
    torch.manual_seed(0)
    model = zoo.RetNetForCausalLM(zoo.RetNetConfig(**SIZES | {"vocab_size": 257}))
    model.save_pretrained(tmp_path / "checkpoint")
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="tokenizer has 259 ids, the model's vocab_size is 257"):
        export(tmp_path / "checkpoint", tmp_path / "out")


def test_nothing_is_overwritten_unasked(checkpoint, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty; choose another name, or pass --overwrite"):
        export(checkpoint, out)
    # Asked, only what is a model of ours goes.
    with pytest.raises(ValueError, match="holds no model"):
        export(checkpoint, out, overwrite=True)
    (out / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="holds a model that zoo did not write"):
        export(checkpoint, out, overwrite=True)
    (out / "config.json").unlink()
    (out / "notes.txt").rename(tmp_path / "notes.txt")
    export(checkpoint, out, max_shard_size="30KB")
    (tmp_path / "notes.txt").rename(out / "notes.txt")
    (out / "plots").mkdir()
    before = {path.name: path.stat().st_ino for path in (out, out / "notes.txt")}
    export(checkpoint, out, overwrite=True)
    assert [path.name for path in out.glob("*.safetensors*")] == ["model.safetensors"]
    assert (out / "notes.txt").read_text() == "mine" and (out / "plots").is_dir()
    assert before == {path.name: path.stat().st_ino for path in (out, out / "notes.txt")}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "out"]
    with pytest.raises(ValueError, match="contains the checkpoint itself"):
        export(checkpoint, checkpoint, overwrite=True)


def test_a_file_of_the_users_is_not_written_over(checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(checkpoint, out)
    (out / "base.py").write_text("mine")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match="holds base.py, which is not of the model there"):
        export(checkpoint, out, overwrite=True)
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    # Nor is anything lost where the disk fails half way.
    (out / "base.py").unlink()
    before.pop("base.py")
    calls, replace = [], os.replace

    def failing(source, target):
        calls.append(source)
        if len(calls) == len(before) + 2:
            raise OSError("no space left")
        replace(source, target)

    monkeypatch.setattr("os.replace", failing)
    with pytest.raises(OSError, match="no space left"):
        export(checkpoint, out, overwrite=True)
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "out"]
