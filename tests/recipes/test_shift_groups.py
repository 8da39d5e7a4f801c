"""Full attention that trains in groups (LongLoRA), as a recipe has it."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import zoo
from pretraining.building import load_tokenizer
from pretraining.recipe import Recipe, UsageError

SHORT = ["--steps", "6", "--warmup_steps", "0", "--decay_steps", "2", "--checkpoint_every", "3"]
SHORT += ["--eval_every", "0"]


@pytest.fixture
def longlora(workshop):
    """A recipe that adapts a small Transformer to windows four times as long."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 259, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    source = workshop.folder / "source"
    config = zoo.SlidingWindowConfig(**sizes, sliding_window=None)
    zoo.SlidingWindowForCausalLM(config).save_pretrained(source)
    load_tokenizer("tokenizers/byte").save_pretrained(source)
    text = workshop.recipe.read_text().split("[model]")[0].replace("retnet", "sliding_window")
    table = "[lora]\nrank = 4\ntrain_embeddings_and_norms = true\n"
    table += '[model.rope_parameters]\nrope_type = "linear"\nfactor = 4.0\n'
    workshop.recipe.write_text(
        f'{text}\nattention_shift_groups = 8\ninit_from = "{source}"\n{table}'
    )


def test_longlora_is_resumed_bit_by_bit(in_process, workshop, longlora):
    result = in_process(*SHORT)
    assert result.returncode == 0, result.stderr
    assert "Full attention trains in groups of 8 tokens" in result.stdout
    curve, run_dir = workshop.curve("tiny"), workshop.folder / "tiny"
    record = json.loads((run_dir / "run.json").read_text())
    assert record["recipe"]["attention_shift_groups"] == 8
    config = json.loads((run_dir / "config.json").read_text())
    assert "group" not in json.dumps(config) and config["rope_parameters"]["factor"] == 4.0
    shutil.rmtree(run_dir / "checkpoint-6")
    (run_dir / "model.safetensors").unlink()
    resumed = in_process(*SHORT, "--resume")
    assert "after step 3" in resumed.stdout and workshop.curve("tiny") == curve, resumed.stderr
    other = in_process(*SHORT, "--resume", "--attention_shift_groups", "16")
    assert other.returncode == 2 and "attention_shift_groups: 8 -> 16" in other.stderr
    options = [*SHORT, "--name", "full", "--attention_shift_groups", "0", "--steps", "2"]
    assert in_process(*options).returncode == 0
    assert workshop.curve("full")[0]["loss"] != curve[0]["loss"]
    flops = json.loads((workshop.folder / "full" / "run.json").read_text())
    assert record["training_flops_per_token"] < flops["training_flops_per_token"]
    # What was trained in groups is a Transformer with full attention.
    model = AutoModelForCausalLM.from_pretrained(run_dir)
    assert all(layer.mixer.shift_groups is None for layer in model.model.layers)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"attention_shift_groups": 32},
            "parts of a window of 32 tokens, got 32; take a quarter, 8",
        ),
        ({"attention_shift_groups": -1}, "got -1"),
        ({"attention_shift_groups": 8, "replay_segment_length": 8}, "leave out one of them"),
        (
            {"attention_shift_groups": 8, "carry_state": True, "packing": "documents"},
            "carry_state needs no attention_shift_groups",
        ),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(UsageError, match=message):
        Recipe("x", "sliding_window", sequence_length=32, **values)


def test_models_without_full_attention(in_process, workshop):
    workshop.recipe.write_text(workshop.recipe.read_text().replace("dropout = 0.1", ""))
    groups = ["--attention_shift_groups", "8", "--dry_run"]
    for options, said in (
        (["--architecture", "retnet"], "got a model with no softmax attention; use"),
        (["--architecture", "sliding_window"], "got a model with a window of 4096 tokens; use"),
    ):
        result = in_process(*options, *groups)
        (line,) = result.stderr.splitlines()
        assert result.returncode == 2 and "error: attention_shift_groups: groups are for" in line
        assert said in line
    full = ["--architecture", "sliding_window", "--model.sliding_window", "none"]
    result = in_process(*full, *groups)
    assert result.returncode == 0 and '"attention_shift_groups": 8' in result.stdout, result.stderr
