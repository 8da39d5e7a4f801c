"""What a run says of its cost, and held-out loss by position and at other lengths."""

import json
import math

import pytest
import torch

import zoo
from pretraining import costs
from pretraining.recipe import Recipe, UsageError

OPTIONS = ["--steps", "26", "--eval_every", "0", "--checkpoint_every", "0"]


def test_a_dry_run_says_what_it_would_take(in_process):
    result = in_process("--dry_run", "--ema_decay", "0.9")
    assert result.returncode == 0, result.stderr
    model = zoo.RetNetForCausalLM(
        zoo.RetNetConfig(vocab_size=259, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    )
    count = sum(p.numel() for p in model.parameters())
    parameters, tokens, flops, state, memory = result.stdout.splitlines()[-5:]
    assert parameters == f"{count:,} parameters, {count - 259 * 16:,} without embeddings"
    assert tokens == f"{120 * 4 * 32:,} tokens ({120 * 4 * 32 / count:.1f} per parameter)"
    per_token = model.flops_per_token(32)
    assert f"{per_token / 1000:.3g} kFLOPs per token forward" in flops
    assert f"{3 * per_token / 1000:.3g} kFLOPs in training" in flops
    assert state == f"{model.state_size(32):,} bytes of state per sequence, after 32 tokens"
    kilobytes = 4 * count / 1000
    assert f"parameters {kilobytes:.3g} kB, gradients {kilobytes:.3g} kB" in memory
    assert f"optimizer {2 * kilobytes:.3g} kB, average {kilobytes:.3g} kB" in memory


def test_lines_of_training_say_memory_and_use(in_process, workshop):
    """Longer windows take more, where there is attention."""
    text = workshop.recipe.read_text().replace('"retnet"', '"sliding_window"')
    workshop.recipe.write_text(text.replace("dropout = 0.1", ""))
    shorter = ["--context_schedule", "[[0, 16], [10, 32]]"]
    assert in_process(*OPTIONS, *shorter, "--peak_flops", "1e12").returncode == 0
    lines = [json.loads(x) for x in open(workshop.folder / "tiny" / "metrics.jsonl")]
    record = json.loads((workshop.folder / "tiny" / "run.json").read_text())
    assert record["peak_memory_is"] == "resident memory of the process"
    config = zoo.SlidingWindowConfig(
        vocab_size=259, hidden_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = zoo.SlidingWindowForCausalLM(config)
    assert record["training_flops_per_token"] == 3 * model.flops_per_token(32)
    for line in lines[:-1]:
        flops = 3 * model.flops_per_token(16 if line["step"] <= 10 else 32)
        assert line["mfu"] == pytest.approx(flops * line["tokens_per_second"] / 1e12)
        assert 10**8 < line["peak_memory"] < 10**12


def test_no_use_of_an_unknown_device(in_process, workshop, monkeypatch):
    assert in_process(*OPTIONS).returncode == 0
    assert not any("mfu" in line for line in workshop.curve("tiny"))
    name, cuda, recipe = [""], torch.device("cuda"), Recipe("x", "retnet")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name[0])
    for name[0], peak in (
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA L40S", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ):
        assert costs.peak_flops(recipe, cuda, "bf16") == peak
        assert costs.peak_flops(recipe, cuda, "fp32") is None


def test_loss_by_position_and_length(in_process, workshop):
    options = [*OPTIONS, "--eval_positions", "4", "--eval_lengths", "[8, 32, 64]"]
    options += ["--context_schedule", "[[0, 16]]"]
    result = in_process(*options)
    assert result.returncode == 0, result.stderr
    line = workshop.curve("tiny")[-1]
    names = [f"nats_at/{first}-{first + 7}" for first in (0, 8, 16, 24)]
    assert [name for name in line if name.startswith("nats_at")] == names
    nats = [line[name] for name in names]
    assert nats[0] == max(nats)
    # Every byte of the text is in one of the parts, and nearly the same number in each.
    corpus = json.loads((workshop.folder / "tiny" / "run.json").read_text())["corpus"]["held_out"]
    bits = sum(nats) / 4 / math.log(2) * (corpus["tokens"] - 1) / corpus["bytes"]
    assert bits == pytest.approx(line["bits_per_byte"], rel=1e-2)
    assert line["bits_per_byte_at/8"] > line["bits_per_byte"]
    assert line["bits_per_byte_at/32"] == line["bits_per_byte"]
    assert line["bits_per_byte_at/64"] != line["bits_per_byte"]


def test_what_is_refused(in_process, workshop):
    with pytest.raises(UsageError, match="eval_lengths are numbers of tokens"):
        Recipe("x", "retnet", eval_lengths=[0])
    with pytest.raises(UsageError, match="eval_positions are parts of a window"):
        Recipe("x", "retnet", sequence_length=8, eval_positions=9)
    text = workshop.recipe.read_text().replace('"retnet"', '"longnet"')
    fields = "segment_lengths = [16]\ndilation_rates = [1]\nmax_position_embeddings = 32\n"
    workshop.recipe.write_text(text.replace("dropout = 0.1", fields))
    result = in_process("--eval_lengths", "64")
    assert result.returncode == 2
    assert "eval_lengths are at most 32" in result.stderr
