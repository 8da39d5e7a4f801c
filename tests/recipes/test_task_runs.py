"""Runs on a synthetic task: resumed, shared by processes, measured, by every architecture."""

import json
import shutil

import pytest
import torch
from test_pretrain import error_line
from transformers import AutoModelForCausalLM, AutoTokenizer

import zoo
from pretraining.building import build_config, build_model, tokenizer_of
from pretraining.recipe import Recipe, read_recipe
from pretraining.reporting import read_metrics
from pretraining.stepping import order_hash
from pretraining.synthetic import TaskBatches, sum_stacked
from tasks import load

RECALL = {"name": "recall", "keys": 8, "values": 8, "pairs": 4, "test_pairs": [2, 8]}
RECALL |= {"control_pairs": 0, "test_examples": 20}
RECIPE = """
architecture = "retnet"
batch_size = 8
steps = 24
warmup_steps = 4
decay_steps = 4
learning_rate = 1e-2
precision = "fp32"
cpu_threads = 1
eval_every = 0
eval_batch_size = 8
log_every = 4
checkpoint_every = 8

[task]
name = "recall"
keys = 8
values = 8
pairs = 4
test_pairs = [2, 8]
control_pairs = 0
test_examples = 20

[model]
hidden_size = 16
num_hidden_layers = 1
num_attention_heads = 2
"""


@pytest.fixture
def on_a_task(workshop):
    """Makes the workshop's recipe one with a task."""
    workshop.recipe.write_text(RECIPE)
    return workshop


def test_a_run_on_a_task(on_a_task, in_process):
    options = ["--name", "whole", "--ema_decay", "0.5", "--model.dropout", "0.1"]
    whole = in_process(*options, DRAW="1")
    assert whole.returncode == 0, whole.stderr
    run_dir, curve = on_a_task.folder / "whole", on_a_task.curve("whole")
    last = curve[-1]
    assert {"accuracy", "nats", "accuracy/pairs_2", "accuracy/pairs_8", "ema_accuracy"} <= {*last}
    assert not any("bits_per_byte" in line for line in curve)
    lines, damaged = read_metrics(run_dir / "metrics.jsonl")
    assert len(lines) == len(curve) == 7 and not damaged
    assert f"whole: accuracy {last['accuracy']:.4f}; {24 * 8 * 8:,} tokens in" in whole.stdout
    record = json.loads((run_dir / "run.json").read_text())
    assert record["results"]["held_out_accuracy"] == last["accuracy"]
    assert record["recipe"]["task"] == load(RECALL).table() and not record["recipe"]["data"]
    assert record["corpus"]["sha256"] == load(RECALL).sha256 and len(record["order_sha256"]) == 64
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    # Stopped after step 16 and continued, it is the same.
    shutil.copytree(run_dir, on_a_task.folder / "cut")
    for path in ("checkpoint-24", "model.safetensors"):
        path = on_a_task.folder / "cut" / path
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    options = ["--name", "cut", "--ema_decay", "0.5", "--model.dropout", "0.1", "--resume"]
    assert in_process(*options).returncode == 0
    assert on_a_task.curve("cut") == curve
    models = [AutoModelForCausalLM.from_pretrained(on_a_task.folder / x) for x in ("whole", "cut")]
    for one, other in zip(*(model.state_dict().values() for model in models)):
        assert torch.equal(one, other)
    tokenizer = AutoTokenizer.from_pretrained(run_dir)
    assert tokenizer("16 0 3")["input_ids"] == [16, 0, 3] and len(tokenizer) == 17
    assert tokenizer.decode([5, 16]) == "5 16"
    assert "task: " in error_line(in_process(*options, "--task.pairs", "5"))


def test_processes_share_a_task(on_a_task, in_process):
    options = ["--steps", "8"]
    assert in_process("--name", "one", *options).returncode == 0
    two = on_a_task.run("--name", "two", *options, processes=2)
    assert two.returncode == 0, two.stderr
    for one, other in zip(on_a_task.curve("one"), on_a_task.curve("two"), strict=True):
        assert one.pop("kind") == other.pop("kind")
        # Sums in another order differ in the last bit.
        assert one == pytest.approx(other, rel=1e-5)
    records = [json.loads((on_a_task.folder / x / "run.json").read_text()) for x in ("one", "two")]
    assert records[0]["order_sha256"] == records[1]["order_sha256"]


FIELDS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize("name", [*zoo.MODELS, "transformer"])
def test_every_architecture_takes_stacked_ids(name, tmp_path):
    """Two ids in a place are the sum of their embeddings, gradients too."""
    fields = {**FIELDS, "sliding_window": "none"} if name == "transformer" else FIELDS
    architecture = "sliding_window" if name == "transformer" else name
    path = tmp_path / "x.toml"
    path.write_text(f"architecture = {architecture!r}\nloss_chunk_size = 0\nbatch_size = 4\n")
    recipe = read_recipe(path, [f"--task={_toml(RECALL)}", f"--model={_toml(fields)}"])
    config = build_config(recipe, tokenizer_of(recipe))
    assert name != "transformer" or config.sliding_window is None
    model = build_model(recipe, config)
    batch = TaskBatches(recipe, load(RECALL)).batch(0, 0, 0, 1, 4)
    labels = {"labels": batch["shift_labels"], "shift_labels": batch["shift_labels"]}
    embeds = model.get_input_embeddings()(batch["input_ids"]).sum(-2)
    expected = model(inputs_embeds=embeds, **labels, use_cache=False).loss
    expected.backward()
    weight = model.get_input_embeddings().weight
    gradient, weight.grad = weight.grad, None
    sum_stacked(model)
    loss = model(batch["input_ids"], **labels, use_cache=False).loss
    loss.backward()
    assert torch.equal(loss, expected) and torch.equal(weight.grad, gradient)
    assert gradient[0].any() and torch.isfinite(gradient).all()


def _toml(table):
    return "{" + ", ".join(f"{key} = {json.dumps(value)}" for key, value in table.items()) + "}"


def test_another_order_shows():
    task = load(RECALL)
    recipe = Recipe("x", "retnet", task=RECALL, data="", tokenizer="", sequence_length=0, steps=500)
    other = Recipe(**{**vars(recipe), "seed": 1})
    longer = Recipe(**{**vars(recipe), "steps": 501})
    hashes = [order_hash(TaskBatches(x, task), x) for x in (recipe, recipe, other, longer)]
    assert hashes[0] == hashes[1] and len({*hashes}) == 3
    streamed = Recipe("x", "retnet", streaming=True)
    assert order_hash(None, streamed) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "stdlib"], "data is about text, and [task] is in the place of text"),
        (["--tokenizer", "tokenizers/byte"], "tokenizer is about text"),
        (["--packing", "documents"], "packing is about text"),
        (["--carry_state", "true"], "carry_state is about text"),
        (["--streaming", "true"], "streaming is about text"),
        (["--sources", "{name = 'a', data = 'b'}"], "sources is about text"),
        (["--eval_lengths", "64"], "eval_lengths is about text"),
        (["--sample_prompts", "1 2"], "sample_prompts is about text"),
        (["--sequence_length", "16"], "whose examples have 8 tokens, got 16; leave it out"),
        (["--task.pair", "3"], "did you mean 'pairs'?"),
        (["--model.vocab_size", "3"], "at least 17, the size of the tokenizer of the task, got 3"),
        (["--architecture", "block_recurrent", "--task.test_pairs", "[2]"], None),
    ],
)
def test_what_does_not_go_with_a_task(on_a_task, in_process, words, message):
    result = in_process("--dry_run", *words)
    if message is None:
        assert result.returncode == 0, result.stderr
    else:
        assert message in error_line(result)
