"""Memory layers that train on the windows of other documents, as a recipe has it."""

import json

import pytest
from transformers import AutoModelForCausalLM

from pretraining.recipe import Recipe, UsageError


def test_a_run_across_the_batch(in_process, workshop):
    text = workshop.recipe.read_text().split("[model]")[0].replace("retnet", "long_llama")
    sizes = "hidden_size = 16\nnum_hidden_layers = 2\nnum_attention_heads = 2\n"
    workshop.recipe.write_text(f"{text}\n[model]\n{sizes}segment_length = 8\n")
    short = ["--steps", "2", "--warmup_steps", "0", "--decay_steps", "0", "--eval_every", "0"]
    flops = {}
    for reach in ("3", "0"):
        result = in_process(*short, "--name", f"range-{reach}", "--cross_batch_range", reach)
        assert result.returncode == 0, result.stderr
        assert ("train on 3 windows before" in result.stdout) == (reach == "3")
        record = json.loads((workshop.folder / f"range-{reach}" / "run.json").read_text())
        flops[reach] = record["training_flops_per_token"]
        assert record["recipe"]["cross_batch_range"] == int(reach)
    assert workshop.curve("range-3")[0]["loss"] != workshop.curve("range-0")[0]["loss"]
    assert flops["3"] > flops["0"]
    # What it makes is a model like any other.
    model = AutoModelForCausalLM.from_pretrained(workshop.folder / "range-3")
    assert all(getattr(x.mixer, "cross_batch_range", None) is None for x in model.model.layers)


def test_a_model_without_a_memory(in_process, workshop):
    result = in_process("--cross_batch_range", "2", "--dry_run")
    (line,) = result.stderr.splitlines()
    assert result.returncode == 2 and "error: cross_batch_range is for" in line


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cross_batch_range": -1}, "got -1"),
        ({"cross_batch_range": 2, "replay_segment_length": 8}, "leave out one of them"),
        (
            {"cross_batch_range": 2, "carry_state": True, "packing": "documents"},
            "carry_state needs no cross_batch_range",
        ),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(UsageError, match=message):
        Recipe("x", "long_llama", sequence_length=32, **values)
