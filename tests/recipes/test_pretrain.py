"""Pretraining as users run it: resuming, stopping, and errors of one line."""

import dataclasses
import json
import signal
import time

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from pretraining.building import build_config, build_model, load_tokenizer, parameter_groups
from pretraining.recipe import Recipe, UsageError
from pretraining.stepping import accumulate_gradients

MODEL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def wait_for_line(path, count, process):
    """Waits until metrics.jsonl has so many lines."""
    deadline = time.monotonic() + 120
    while not path.is_file() or path.read_text().count("\n") < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def kill_all(ranks):
    """SIGKILL to the processes of a run, all at once."""
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_resumed_is_bit_identical(workshop, processes):
    options = ["--steps", "60", "--eval_every", "20", "--checkpoint_every", "10"]
    whole = workshop.run("--name", "whole", *options, processes=processes)
    assert whole.returncode == 0, whole.stderr
    killed = workshop.start_ranks("--name", "cut", *options, processes=processes)
    wait_for_line(workshop.folder / "cut" / "metrics.jsonl", 25, killed[0])
    kill_all(killed)
    seen = workshop.curve("cut")[-1]["step"]
    assert seen < 60, "the run was over before it was killed"
    resumed = workshop.run("--name", "cut", *options, "--resume", processes=processes)
    assert resumed.returncode == 0, resumed.stderr
    assert f"after step {seen // 10 * 10}" in resumed.stdout
    curve = workshop.curve("whole")
    assert [line["step"] for line in curve if line["kind"] == "train"] == list(range(1, 61))
    assert [line["step"] for line in curve if line["kind"] == "held_out"] == [20, 40, 60]
    assert workshop.curve("cut") == curve
    assert curve[-1]["bits_per_byte"] < curve[0]["bits_per_byte"] - 1
    a, b = (
        AutoModelForCausalLM.from_pretrained(workshop.folder / name).state_dict()
        for name in ("whole", "cut")
    )
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
def test_processes_share_the_same_batch(workshop):
    options = ["--model.dropout", "0", "--steps", "26"]
    alone = workshop.run(*options, "--name", "alone", "--micro_batch_size", "1")
    together = workshop.run(*options, "--name", "together", processes=2)
    assert (alone.returncode, together.returncode) == (0, 0), together.stderr
    for one, two in zip(workshop.curve("alone"), workshop.curve("together"), strict=True):
        assert one.pop("kind") == two.pop("kind")
        # Sums in another order differ in the last bit, and training amplifies that.
        assert one == pytest.approx(two, rel=1e-5 if one["step"] <= 3 else 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_saves_and_exits(workshop, processes):
    endless = ["--steps", "5000", "--checkpoint_every", "0"]
    if processes == 1:
        (process,) = workshop.start_ranks(*endless)
    else:  # the launcher's signal is one to all, so it is one
        process = workshop.launch(*endless)
    wait_for_line(workshop.folder / "tiny" / "metrics.jsonl", 30, process)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert "SIGTERM: saved step" in output, errors
    assert process.returncode not in (0, -signal.SIGTERM)
    if processes == 1:
        assert process.returncode == 128 + signal.SIGTERM
    step = int(output.split("saved step ")[1].split(";")[0])
    folder = workshop.folder / "tiny" / f"checkpoint-{step}"
    AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    lines = [line["step"] for line in workshop.curve("tiny") if line["kind"] == "train"]
    assert lines == list(range(1, step + 1))


def test_a_signal_to_one_process_is_one_to_all(workshop):
    ranks = workshop.start_ranks("--steps", "5000", "--checkpoint_every", "0", processes=2)
    wait_for_line(workshop.folder / "tiny" / "metrics.jsonl", 3, ranks[0])
    ranks[1].send_signal(signal.SIGUSR1)
    (output, errors), _ = (rank.communicate() for rank in ranks)
    assert "SIGUSR1: saved step" in output, errors
    assert [rank.returncode for rank in ranks] == [128 + signal.SIGUSR1] * 2


def test_a_run_and_what_it_leaves(workshop, monkeypatch):
    monkeypatch.setenv("DRAW", "1")
    options = ["--steps", "26", "--eval_every", "0", "--trackers", "tensorboard"]
    options += ["--sample_prompts", "def f(", "--micro_batch_size", "2", "--packing", "documents"]
    result = workshop.run(*options)
    assert result.returncode == 0, result.stderr
    assert "  | def f(" in result.stdout
    run_dir = workshop.folder / "tiny"
    names = {path.name for path in run_dir.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= names
    assert {"run.json", "metrics.jsonl", "loss.png", "checkpoint-20", "checkpoint-26"} <= names
    assert not [name for name in names if "unfinished" in name or name.endswith(".new")]
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((run_dir / "longzoo").glob("events.*"))
    record = json.loads((run_dir / "run.json").read_text())
    assert record["recipe"]["steps"] == 26 and record["corpus"]["source"] == "stdlib"
    assert len(record["corpus"]["sha256"]) == 64 and record["versions"]["torch"]
    assert (
        record["results"]["held_out_bits_per_byte"] == workshop.curve("tiny")[-1]["bits_per_byte"]
    )


def test_what_is_done_with_an_earlier_run(in_process, workshop):
    options = ["--steps", "26", "--eval_every", "0"]
    assert in_process(*options).returncode == 0
    before = workshop.curve("tiny")
    assert "continue it with --resume" in error_line(in_process(*options))
    message = error_line(in_process(*options, "--resume", "--batch_size", "8"))
    assert "was trained otherwise (batch_size: 4 -> 8)" in message
    # A finished run is finished.
    assert in_process(*options, "--resume").returncode == 0
    assert workshop.curve("tiny") == before
    assert in_process(*options, "--overwrite", "--log_every", "2").returncode == 0
    assert workshop.curve("tiny") == [line for line in before if line["step"] % 2 == 0]


def error_line(result):
    """The one line of an error, which is all there is on stderr."""
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_errors_are_one_line(workshop):
    assert "did you mean 'steps'?" in error_line(workshop.run("--step", "3"))


def recipe_with(**model):
    return Recipe("x", "retnet", model={**MODEL, **model}, loss_chunk_size=0)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe("x", "retnett"), "unknown architecture 'retnett': did you mean 'retnet'?"),
        (recipe_with(hiden_size=3), "unknown key 'model.hiden_size' for retnet: did you mean"),
        (recipe_with(hidden_size="big"), "the model table does not fit retnet"),
        (recipe_with(num_attention_heads=3), "the model table does not fit retnet"),
        (recipe_with(vocab_size=100), "model.vocab_size must be at least 259"),
    ],
)
def test_bad_models(recipe, message):
    with pytest.raises(UsageError) as error:
        build_config(recipe, load_tokenizer("tokenizers/byte"))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_bad_tokenizer(tmp_path):
    with pytest.raises(UsageError, match="no tokenizer at") as error:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)


def gradients(batches, **options):
    recipe = recipe_with(**options)
    accelerator = Accelerator(cpu=True)
    model = build_model(recipe, build_config(recipe, load_tokenizer("tokenizers/byte")))
    model = accelerator.prepare(model)
    loss = accumulate_gradients(accelerator, model, batches)
    return loss, torch.cat([p.grad.flatten() for p in model.parameters()])


def test_accumulation_equals_one_batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (4, 33), generator=generator)
    whole = {"input_ids": ids[:, :-1], "shift_labels": ids[:, 1:].clone()}
    for row, scored in enumerate((15, 3, 9, 1)):
        whole["shift_labels"][row, scored:] = -100
    parts = [{key: tensor[i : i + 1] for key, tensor in whole.items()} for i in range(4)]
    loss, gradient = gradients([whole])
    loss_in_parts, gradient_in_parts = gradients(parts)
    assert loss_in_parts.item() == pytest.approx(loss.item(), rel=1e-6)
    assert (gradient_in_parts - gradient).norm() < 1e-6 * gradient.norm()


def test_only_matrices_decay():
    recipe = recipe_with(head_norm_weight=True)
    model = build_model(recipe, build_config(recipe, load_tokenizer("tokenizers/byte")))
    matrices, vectors = parameter_groups(model, recipe)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in vectors["params"]} == {1}
    assert min(p.ndim for p in matrices["params"]) == 2
    count = len(matrices["params"]) + len(vectors["params"])
    assert count == len(list(model.parameters()))


def test_rates_of_a_recipe():
    """Its own factors come before the model's; a name that matches nothing is refused."""
    scales = {"*.mixer.gate": 10.0, "*norm.weight": 0.5}
    recipe = Recipe(
        name="x", architecture="infini", model=MODEL, learning_rate_scales=scales, steps=300
    )
    model = build_model(recipe, build_config(recipe, load_tokenizer("tokenizers/byte")))
    rates = {id(p): g["lr"] for g in parameter_groups(model, recipe) for p in g["params"]}
    named = dict(model.named_parameters())
    assert rates[id(named["model.layers.0.mixer.gate"])] == 10 * recipe.learning_rate
    assert rates[id(named["model.norm.weight"])] == 0.5 * recipe.learning_rate
    assert rates[id(named["model.layers.0.mixer.q_proj.weight"])] == recipe.learning_rate
    gates = [g for g in parameter_groups(model, recipe) if g["lr_scale"] == 10]
    assert [g["weight_decay"] for g in gates] == [0.0]
    with pytest.raises(UsageError, match="no trained parameter is called 'gates'"):
        parameter_groups(model, dataclasses.replace(recipe, learning_rate_scales={"gates": 2.0}))


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_segment_replay_trains_the_same(in_process, workshop, processes):
    text = workshop.recipe.read_text().replace("dropout = 0.1", "")
    workshop.recipe.write_text(text)
    short = ["--steps", "30", "--decay_steps", "5", "--eval_every", "0", "--checkpoint_every", "0"]
    short += ["--learning_rate", "1e-3"]  # at a high one, rounding grows from step to step
    curves = []
    for name, segment in (("whole", "0"), ("replayed", "12")):
        options = ["--name", name, "--replay_segment_length", segment, *short]
        run = in_process(*options) if processes == 1 else workshop.run(*options, processes=2)
        assert run.returncode == 0, run.stderr
        curves.append([line for line in workshop.curve(name) if line["kind"] == "train"])
    assert len(curves[0]) == 30
    for whole, replayed in zip(*curves, strict=True):
        # float32, with sums in another order.
        assert replayed["loss"] == pytest.approx(whole["loss"], rel=1e-5)
        assert replayed["gradient_norm"] == pytest.approx(whole["gradient_norm"], rel=1e-3)


def test_what_an_architecture_wants_watched(in_process, workshop):
    text = workshop.recipe.read_text().replace('"retnet"', '"infini"')
    workshop.recipe.write_text(text.replace("dropout = 0.1", "segment_length = 8"))
    run = in_process("--steps", "25", "--decay_steps", "5", "--eval_every", "20", "--name", "a")
    assert run.returncode == 0, run.stderr
    train = [line for line in workshop.curve("a") if line["kind"] == "train"]
    held_out = [line for line in workshop.curve("a") if line["kind"] == "held_out"]
    assert all(0 < line["gate/least"] <= line["gate/largest"] < 1 for line in train)
    assert train[0]["gate/mean"] != train[-1]["gate/mean"]
    assert held_out[-1]["memory_norm/layer_1"] > 0


def test_parameters_learn_at_the_models_rates(in_process, workshop):
    """RWKV-4's decays twice as fast, its bonus three times, through every step and a resumption."""
    text = workshop.recipe.read_text().replace('"retnet"', '"rwkv4"').replace("dropout = 0.1", "")
    workshop.recipe.write_text(text)
    sizes = ["--checkpoint_every", "20", "--eval_every", "0", "--decay_steps", "10"]
    first = in_process("--name", "a", "--steps", "40", *sizes)
    assert first.returncode == 0, first.stderr
    states = {}
    for step in (20, 40):
        folder = workshop.folder / "a" / f"checkpoint-{step}"
        state = torch.load(folder / "training_state.pt", weights_only=True)["optimizer"]
        states[step] = {
            name: group["lr"] for group in state["param_groups"] for name in group["params"]
        }
    for rates in states.values():
        base = rates["model.layers.0.mixer.k_proj.weight"]
        scales = {name: rate / base for name, rate in rates.items()}
        faster = {name: x for name, x in scales.items() if x != pytest.approx(1)}
        assert faster == pytest.approx(
            {
                f"model.layers.{layer}.mixer.{name}": scale
                for layer in range(2)
                for name, scale in (("time_decay", 2), ("time_first", 3))
            }
        )
    assert states[20] != states[40]
