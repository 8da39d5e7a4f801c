"""Adapters on the weights of another model: what is trained, saved, continued and refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import zoo
from pretraining import starting
from pretraining.building import load_tokenizer
from scoring.models import load_subject
from zoo.hub.adapters import has_adapter, merge
from zoo.hub.export import export
from zoo.hub.origin import origin_of_checkpoint

OPTIONS = ["--warmup_steps", "0", "--schedule", "constant", "--eval_every", "0", "--steps", "6"]
OPTIONS += ["--checkpoint_every", "3", "--model.dropout", "0"]


def with_adapter(base, folder):
    """A model with the adapter in a folder, by peft, which takes two seconds to import."""
    from peft import PeftModel

    return PeftModel.from_pretrained(base, folder).eval()


@pytest.fixture
def source(workshop):
    """A RetNet to adapt, as an export is: weights, config and tokenizer."""
    torch.manual_seed(3)
    config = zoo.RetNetConfig(
        vocab_size=259, hidden_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    folder = workshop.folder / "source"
    zoo.RetNetForCausalLM(config).save_pretrained(folder)
    load_tokenizer("tokenizers/byte").save_pretrained(folder)
    text = workshop.recipe.read_text().split("[model]")[0]
    workshop.recipe.write_text(f'{text}\ninit_from = "{folder}"\n[lora]\nrank = 4\n')
    return folder


def state_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def error_line(result):
    assert result.returncode == 2, result.stdout + result.stderr
    (line,) = result.stderr.splitlines()
    return line


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_the_mixers_are_adapted_and_merged(in_process, workshop, source, monkeypatch):
    """The weights are of the Hub here, as its cache has them."""
    cached = workshop.folder / "models--me--retnet" / "snapshots" / "0123abc"
    shutil.copytree(source, cached)
    monkeypatch.setattr(starting, "hub_answers", lambda name, kind: True)
    monkeypatch.setattr(starting, "snapshot_download", lambda name, **options: str(cached))
    result = in_process(*OPTIONS, "--init_from", "me/retnet")
    assert result.returncode == 0, result.stderr
    run_dir = workshop.folder / "tiny"
    before, after = state_of(source), state_of(run_dir)
    linear = {n for n in before if ".mixer." in n and n.endswith("proj.weight")}
    assert changed(before, after) == linear and len(linear) == 10
    base = AutoModelForCausalLM.from_pretrained(source)
    adapted = with_adapter(base, run_dir / "adapter")
    ids = torch.arange(40)[None]
    merged = AutoModelForCausalLM.from_pretrained(run_dir).eval()
    # float32: products of two matrices in place of their sum.
    torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-5)
    trained = sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n)
    assert f"{trained:,} trained" in result.stdout
    record = json.loads((run_dir / "run.json").read_text())
    assert record["trained_parameters"] == trained
    assert "adapter/adapter_model.safetensors" in record["files"]
    said = json.loads((run_dir / "adapter" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == "me/retnet"
    begun = record["init_from"]
    assert (begun["revision"], begun["base_model"]) == ("0123abc", "me/retnet")
    assert origin_of_checkpoint(run_dir).base_model == "me/retnet"
    names = {path.name for path in (run_dir / "checkpoint-6").rglob("*")}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names


def test_resumed_is_bit_identical(in_process, workshop, source):
    options = [*OPTIONS, "--lora.dropout", "0.2", "--lora.train_embeddings_and_norms", "true"]
    assert in_process(*options, "--name", "whole").returncode == 0
    shutil.copytree(workshop.folder / "whole", workshop.folder / "tiny")
    shutil.rmtree(workshop.folder / "tiny" / "checkpoint-6")
    result = in_process(*options, "--resume")
    assert "after step 3" in result.stdout and result.returncode == 0, result.stderr
    assert workshop.curve("tiny") == workshop.curve("whole")
    whole, resumed = state_of(workshop.folder / "whole"), state_of(workshop.folder / "tiny")
    assert changed(whole, resumed) == set()
    trained = changed(state_of(source), whole)
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= trained
    assert "lm_head.weight" not in trained and not any(".mlp." in name for name in trained)
    # The weights below are needed again, and the same ones.
    shutil.rmtree(workshop.folder / "tiny" / "checkpoint-6")
    zoo.RetNetForCausalLM.from_pretrained(workshop.folder / "whole").save_pretrained(source)
    assert "are others than those that the adapter" in error_line(in_process(*options, "--resume"))
    shutil.rmtree(source)
    assert "no such folder" in error_line(in_process(*options, "--resume"))


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [("sliding_window", {"sliding_window": 8}), ("gated_deltanet", {})],
)
def test_embeddings_norms_and_more_are_trained_whole(in_process, workshop, architecture, fields):
    """Continued bit by bit, taken up by peft, merged and exported; tied embeddings stay so."""
    torch.manual_seed(3)
    sizes = {"vocab_size": 259, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    kind = zoo.MODELS[architecture]
    base = kind.causal_lm(kind.config(**sizes, **fields, tie_word_embeddings=True))
    source, run_dir = workshop.folder / "source", workshop.folder / "tiny"
    base.save_pretrained(source)
    table = 'train_embeddings_and_norms = true\nmodules_to_save = ["lm_head", "1.mlp"]\n'
    text = workshop.recipe.read_text().split("[model]")[0].replace("retnet", architecture)
    workshop.recipe.write_text(f'{text}\ninit_from = "{source}"\n[lora]\nrank = 4\n{table}')
    options = OPTIONS[: OPTIONS.index("--model.dropout")]
    result = in_process(*options)
    assert result.returncode == 0, result.stderr
    whole, curve = load_file(run_dir / "model.safetensors"), workshop.curve("tiny")
    trained = changed(load_file(source / "model.safetensors"), whole)
    mixed = {name for name in whole if ".mixer." in name and "proj" in name}
    plain = {
        name for name in whole if "norm." in name or "embed" in name or "layers.1.mlp." in name
    }
    assert trained == mixed | plain and "lm_head.weight" not in whole
    shutil.rmtree(run_dir / "checkpoint-6")
    (run_dir / "model.safetensors").unlink()
    resumed = in_process(*options, "--resume")
    assert "after step 3" in resumed.stdout, resumed.stderr
    assert workshop.curve("tiny") == curve
    assert not changed(whole, load_file(run_dir / "model.safetensors"))
    merged = AutoModelForCausalLM.from_pretrained(run_dir).eval()
    assert merged.lm_head.weight is merged.get_input_embeddings().weight
    ids = torch.arange(40)[None]
    adapted = with_adapter(base, run_dir / "adapter")
    # float32: products of two matrices in place of their sum.
    torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-5)
    export(run_dir / "checkpoint-6", workshop.folder / "exported")
    exported = load_file(workshop.folder / "exported" / "model.safetensors")
    assert exported.keys() == whole.keys() and not changed(whole, exported)
    # What is trained whole counts once, with what was there before and the adapters.
    record = json.loads((run_dir / "run.json").read_text())
    adapters = sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
    frozen = sum(x.numel() for name, x in whole.items() if "layers.0.mlp." in name or name in mixed)
    expected = 3 * (merged.flops_per_token(32) + 2 * adapters) - 2 * frozen
    assert record["training_flops_per_token"] == expected


def test_what_is_refused(in_process, workshop, source):
    for options, said in (
        (["--lora.rnk", "4"], "unknown key 'lora.rnk': did you mean 'rank'?"),
        (["--lora.rank", "0"], "lora.rank is at least 1"),
        (["--lora.alpha", "'a'"], "lora.alpha is of type float"),
        (["--lora.target_modules", "['nothing']"], "[lora]: Target modules"),
        (["--lora.modules_to_save", "['nrm']"], "no module's name ends in 'nrm': did you mean"),
        (["--lora.modules_to_save", "['']"], "no module's name ends in ''"),
        (["--lora.modules_to_save", "[3]"], "lora.modules_to_save is a list of strings"),
        (
            ["--lora.target_modules", "['q_proj']", "--lora.modules_to_save", "['mixer']"],
            "both say model.layers.0.mixer.q_proj, which is trained either",
        ),
        (["--init_from", ""], "say which with init_from"),
        (["--ema_decay", "0.9"], "ema_decay averages whole models"),
    ):
        assert said in error_line(in_process(*OPTIONS, *options))


def test_a_dry_run_counts_what_is_trained(in_process, source):
    result = in_process(*OPTIONS, "--dry_run")
    assert result.returncode == 0, result.stderr
    parameters, *_, memory = result.stdout.splitlines()[-5:]
    # Of 10 matrices, 5 per layer: rank 4 times inputs and outputs.
    trained = 2 * 4 * (4 * 16 + 16 + 16 + 32 + 32 + 32 + 16)
    assert parameters.endswith(f", {trained:,} trained")
    assert f"gradients {4 * trained / 1000:.3g} kB" in memory


@pytest.mark.parametrize("more", ["false", "true"])
def test_a_checkpoint_is_exported_and_begun_with(in_process, workshop, source, more):
    """It holds the adapter alone; whoever reads its weights gets those of the merged model."""
    trained = ["--lora.train_embeddings_and_norms", more]
    assert in_process(*OPTIONS, *trained).returncode == 0
    run_dir = workshop.folder / "tiny"
    checkpoint, out = run_dir / "checkpoint-6", workshop.folder / "exported"
    export(checkpoint, out)
    merged = load_file(run_dir / "model.safetensors")
    found = load_file(out / "model.safetensors")
    assert found.keys() == merged.keys() and not changed(merged, found)
    assert not changed(merged, load_subject(str(checkpoint), "cpu").model.state_dict())
    begun = ["--name", "begun", "--init_from", str(checkpoint), "--lora", "{}", "--steps", "1"]
    assert in_process(*OPTIONS, *begun).returncode == 0
    whole = ["--name", "whole", "--init_from", str(run_dir), "--lora", "{}", "--steps", "1"]
    assert in_process(*OPTIONS, *whole).returncode == 0
    assert workshop.curve("begun") == workshop.curve("whole")


def test_an_adapter_is_merged_with_its_own_weights_or_not_at_all(in_process, workshop, source):
    assert in_process(*OPTIONS).returncode == 0
    checkpoint, out = workshop.folder / "tiny/checkpoint-6", workshop.folder / "exported"
    weights = source / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.0.mixer.q_proj.weight"
    save_file({**tensors, name: tensors[name] + 1}, weights)
    with pytest.raises(ValueError, match="model.safetensors is not the file that it was trained"):
        export(checkpoint, out)
    source.rename(workshop.folder / "elsewhere")
    with pytest.raises(ValueError, match=f"on the weights of {source}, which is no folder here"):
        export(checkpoint, out)
    assert not out.exists()


def test_a_whole_model_is_not_taken_for_an_adapter(tmp_path):
    """A run's folder has both, and large weights lie in several files."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_model.safetensors").touch()
    assert has_adapter(tmp_path)
    for name in ("model.safetensors", "model.safetensors.index.json"):
        (tmp_path / name).touch()
        assert not has_adapter(tmp_path)
        (tmp_path / name).unlink()


def test_an_adapter_that_is_no_plain_one_is_not_merged():
    x = torch.ones(2, 2)
    names = [f"base_model.model.q_proj.lora_{part}.weight" for part in "AB"]
    adapter, config = dict.fromkeys(names, x), {"peft_type": "LORA", "r": 4, "lora_alpha": 2}
    merged = merge({"q_proj.weight": x}, adapter, config, "here")
    assert merged["q_proj.weight"].equal(x + 2 * x * 2 / 4)
    for other in ({"use_dora": True}, {"rank_pattern": {"q": 1}}, {"peft_type": "IA3"}):
        with pytest.raises(ValueError, match="expected a plain LoRA adapter, got .* merge_and_unl"):
            merge({"q_proj.weight": x}, adapter, config | other, "here")
    with pytest.raises(ValueError, match="has no place"):
        merge({"k_proj.weight": x}, adapter, config, "here")
