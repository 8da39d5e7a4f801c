"""Windows over several processes beside one process: the same figures, however weights lie."""

import json
import shutil
import time

import pytest
import torch
from conftest import TINY

import zoo
from pretraining.checkpointing import list_checkpoints
from pretraining.launching import check_environment, check_launcher
from pretraining.recipe import Recipe, UsageError
from pretraining.slicing import Share, check_slicing, check_walk, whole_rows
from pretraining.synthetic import TaskBatches
from tasks import load

# A rate at which rounding stays rounding. Of held-out text the last window is shorter.
SHORT = ["--learning_rate", "1e-3", "--steps", "8", "--decay_steps", "2", "--warmup_steps", "2"]
SHORT += ["--checkpoint_every", "3", "--keep_checkpoints", "9", "--eval_every", "0"]
MEASURED = ["--eval_positions", "4", "--eval_lengths", "[3, 16]", "--eval_contexts", "[2, 20]"]
MEASURED += ["--sample_prompts", '["def "]', "--sample_tokens", "4", "--ema_decay", "0.8"]
RECOMPUTED = ["--gradient_checkpointing", "true"]
FSDP, DDP = "fsdp2.yaml", None

# Of each kind of mixer one, and how four processes run it: to a window, weights, recomputing.
MODELS = {
    "retnet": ("", 4, FSDP, True),
    "rwkv7": ("", 2, DDP, True),
    "sliding_window": ("sliding_window = 12\n", 2, FSDP, True),
    "block_recurrent": (
        "recurrent_layers = [1]\nnum_states = 4\nsliding_window = 8\n",
        2,
        FSDP,
        False,
    ),
    "rmt": ("segment_length = 6\nnum_memory_tokens = 2\n", 4, DDP, False),
}


@pytest.fixture
def run(workshop):
    def run(name, *arguments, **options):
        result = workshop.run("--name", name, *SHORT, *arguments, **options)
        assert result.returncode == 0, result.stderr
        return result

    return run


def write_recipe(workshop, architecture, fields=""):
    text = TINY.replace("dropout = 0.1\n", fields).replace("retnet", architecture)
    text = text.replace("eval_bytes = 1000", "eval_bytes = 500")
    workshop.recipe.write_text(text)


def four(size, config=None):
    """Options of four processes, so many to a window."""
    return ["--sequence_parallel", str(size)], {"processes": 4, "config": config}


def of_kind(workshop, name, kind):
    """The figures of a run's lines of one kind, [lines, figures] with their names."""
    lines = [line for line in workshop.curve(name) if line["kind"] == kind]
    names = sorted(name for name in lines[0] if name not in ("kind", "step", "tokens"))
    assert all(names == sorted(set(line) - {"kind", "step", "tokens"}) for line in lines)
    return names, torch.tensor([[line[name] for name in names] for line in lines]).double()


def assert_same(workshop, name, expected, rtol):
    for kind in ("train", "held_out"):
        (names, found), (others, wanted) = (
            of_kind(workshop, who, kind) for who in (name, expected)
        )
        assert names == others and len(found)
        torch.testing.assert_close(found, wanted, rtol=rtol, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", MODELS)
def test_slices_train_as_one(workshop, run, architecture):
    """What is trained and measured: in float32, to what another order of sums does to it."""
    fields, size, config, recomputes = MODELS[architecture]
    write_recipe(workshop, architecture, fields)
    arguments, options = four(size, config)
    run("one", *MEASURED)
    result = run("four", *arguments, *MEASURED, *RECOMPUTED * recomputes, **options)
    assert f"4 x cpu ({size} to a window)" in result.stdout
    assert_same(workshop, "four", "one", 1e-5)
    assert len(of_kind(workshop, "one", "train")[1]) == 8


@pytest.mark.slow
def test_the_same_weights_measured(workshop, run):
    """Of the same weights all figures are the same, to rounding; windows of 3 tokens among them."""
    write_recipe(workshop, "retnet")
    run("one", *MEASURED)
    shutil.copytree(workshop.folder / "one", workshop.folder / "four")
    lines = (workshop.folder / "four/metrics.jsonl").read_text().splitlines(keepends=True)
    (workshop.folder / "four/metrics.jsonl").write_text("".join(lines[:-1]))
    arguments, options = four(4)
    result = run("four", "--resume", *arguments, *MEASURED, **options)
    assert "From here on sequence_parallel: 1 -> 4" in result.stdout
    assert "step 8: held-out" in result.stdout and "| def" in result.stdout
    assert_same(workshop, "four", "one", 1e-6)


@pytest.mark.slow
def test_processes_without_targets(workshop, run):
    """An example's answers lie at its end, and the first of four slices has none."""
    table = {"name": "copy", "tokens": 8, "test_tokens": [1], "test_examples": 8}
    recipe = Recipe("x", "retnet", task=table, data="", tokenizer="", sequence_length=0)
    batch = TaskBatches(recipe, load(table)).batch(0, 0, 0, 1, 4)
    counts = [(Share(0, 1, n, 4).cut(batch)["shift_labels"] != -100).sum() for n in range(4)]
    assert counts[0] == 0 < counts[3]
    write_recipe(workshop, "retnet")
    lines = workshop.recipe.read_text().splitlines(keepends=True)
    of_text = ("sequence_length", "eval_bytes")
    workshop.recipe.write_text("".join(line for line in lines if not line.startswith(of_text)))
    toml = ", ".join(f"{key} = {json.dumps(value)}" for key, value in table.items())
    task, (arguments, options) = ["--task", f"{{{toml}}}"], four(4)
    run("one", *task)
    run("four", *arguments, *task, **options)
    assert_same(workshop, "four", "one", 1e-5)


@pytest.mark.slow
def test_killed_and_resumed(workshop, run):
    """Bit for bit by the same processes; by one that has whole windows, but for rounding."""
    write_recipe(workshop, "retnet")
    arguments, options = four(2)
    run("whole", *arguments, **options)
    ranks = workshop.start_ranks("--name", "killed", *SHORT, *arguments, **options)
    deadline = time.monotonic() + 120
    while not (done := list_checkpoints(workshop.folder / "killed")):
        time.sleep(0.001)
        assert ranks[0].poll() is None and time.monotonic() < deadline
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.communicate()
    assert done[-1][0] < 8
    shutil.copytree(workshop.folder / "killed", workshop.folder / "alone")
    run("killed", "--resume", *arguments, **options)
    assert workshop.curve("killed") == workshop.curve("whole")
    record = json.loads((workshop.folder / "killed/run.json").read_text())
    assert record["recipe"]["sequence_parallel"] == 2 and record["processes"] == 4
    assert "From here on sequence_parallel: 2 -> 1" in run("alone", "--resume").stdout
    assert_same(workshop, "alone", "whole", 1e-5)


def test_a_share_of_a_batch():
    ids = torch.arange(2 * 10).view(2, 10)
    batch = {"input_ids": ids, "shift_labels": ids + 1, "position_ids": ids % 10}
    shares = [Share(0, 1, place, 4) for place in range(4)]
    parts = [share.cut(batch) for share in shares]
    for name, x in batch.items():
        assert torch.cat([part[name] for part in parts], 1).equal(x)
        for share, part in zip(shares, parts):
            assert part[name].equal(x[:, slice(*share.bounds(10))])
    # A row of fewer tokens than processes is padded, and padding is not scored.
    short = {"input_ids": ids[:, :3, None].expand(-1, -1, 2), "shift_labels": ids[:, :3]}
    parts = [share.cut(short) for share in shares]
    assert [int(part["attention_mask"].sum()) for part in parts] == [2, 2, 2, 0]
    assert [part["input_ids"].shape for part in parts] == [(2, 1, 2)] * 4
    assert (parts[3]["shift_labels"] == -100).all() and parts[2]["shift_labels"].equal(ids[:, 2:3])
    assert Share(1, 2).cut(batch) is batch


def test_whole_rows_for_a_while():
    model = zoo.RetNetForCausalLM(
        zoo.RetNetConfig(hidden_size=16, num_hidden_layers=1, vocab_size=9)
    )
    model.model.sequence_parallel = "a group"
    with pytest.raises(KeyError), whole_rows(model):
        assert model.model.sequence_parallel is None
        raise KeyError
    assert model.model.sequence_parallel == "a group"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sequence_parallel": 0}, "sequence_parallel must be positive, got 0"),
        ({"replay_segment_length": 8}, "with replay_segment_length, which cuts a text in time"),
        ({"carry_state": True, "packing": "documents"}, "got it with carry_state"),
        ({"attention_shift_groups": 8}, "got it with attention_shift_groups"),
        ({"cross_batch_range": 1}, "got it with cross_batch_range"),
        ({"sequence_length": 3}, "= 4 wants texts of at least as many tokens, got 3"),
        ({"sequence_length": 8, "context_schedule": [[0, 2], [5, 8]]}, "as many tokens, got 2"),
    ],
)
def test_recipes_that_do_not_fit(values, message):
    with pytest.raises(UsageError, match=message) as error:
        Recipe("x", "retnet", **{"sequence_parallel": 4, **values})
    assert "\n" not in str(error.value)


def test_launches_that_do_not_fit(in_process, workshop):
    recipe = Recipe("x", "retnet", sequence_parallel=4, batch_size=12)
    check_slicing(recipe, 8, {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_DYNAMO_BACKEND": "no"})
    assert recipe.windows_per_process(8) == (6, 1)
    with pytest.raises(UsageError, match="micro_batch_size x processes / sequence_parallel"):
        recipe.windows_per_process(32)
    for processes, environ, message in (
        (6, {}, "a multiple of 4 processes, got 6; launch with --num_processes 8"),
        (4, {"ACCELERATE_USE_DEEPSPEED": "true"}, "was not tried with DeepSpeed"),
        (4, {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "--dynamo_backend inductor"),
    ):
        with pytest.raises(UsageError, match=message):
            check_slicing(recipe, processes, environ)
    result = in_process("--sequence_parallel", "2")
    (line,) = result.stderr.splitlines()
    assert result.returncode == 2 and "wants a multiple of 2 processes, got 1" in line
    assert not (workshop.folder / "tiny").exists()


def test_walks_in_shards_are_refused():
    sizes = {"vocab_size": 9, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    block = {**sizes, "recurrent_layers": [1], "num_states": 4}
    memory = {**sizes, "num_memory_tokens": 2, "same_length": False, "zero_memory": False}
    feedback = {**block, "feedback": True}
    walkers = [("rmt", sizes), ("transformer_xl", memory), ("block_recurrent", feedback)]
    for name, fields in (*walkers, ("retnet", sizes), ("block_recurrent", block)):
        with torch.device("meta"):
            model = zoo.MODELS[name].causal_lm(zoo.MODELS[name].config(**fields))
        if (name, fields) in walkers:
            with pytest.raises(UsageError, match=f"this {name} walks all its layers"):
                check_walk(Recipe("x", name, sequence_parallel=2), model)
        else:
            check_walk(Recipe("x", name, sequence_parallel=2), model)


def test_the_launchers_own_flags_name_the_key():
    """With --use_parallelism_config accelerate says so; without, it leaves the others out."""
    with pytest.raises(UsageError, match="or --sequence_parallel N for one text over N processes"):
        check_environment({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"})
    launch = ["accelerate", "launch", "--num_processes", "4", "x.py", "--sequence_parallel", "4"]
    check_launcher(launch)
    for word in ("--parallelism_config_cp_size=4", "--parallelism-config-sp-size"):
        with pytest.raises(UsageError, match=f"got {word.split('=')[0]}.*--sequence_parallel N"):
            check_launcher([*launch[:2], word, *launch[2:]])
