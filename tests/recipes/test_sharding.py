"""FSDP2 beside one process: the same losses, saved by all ranks, resumed by any number of them."""

import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file

from pretraining.checkpointing import SHARDS_INDEX, list_checkpoints
from pretraining.launching import check_environment
from pretraining.recipe import UsageError
from pretraining.sharding import check_plugin
from zoo.hub.export import export
from zoo.hub.folder import read_tensors

# A rate at which rounding stays rounding; one of two batches of held-out text is of one process.
SHORT = ["--learning_rate", "1e-3", "--steps", "10", "--decay_steps", "2"]
SHORT += [
    "--keep_checkpoints",
    "3",
    "--checkpoint_every",
    "4",
    "--eval_every",
    "5",
    "--eval_batch_size",
    "11",
]
SHORT += ["--sample_prompts", '["def "]', "--sample_tokens", "4"]
DEEPSPEED = Path(__file__).resolve().parents[2] / ".venv/deepspeed"
SHARDED = {"processes": 2, "config": "fsdp2.yaml"}


@pytest.fixture
def run(workshop):
    workshop.recipe.write_text(TINY.replace("dropout = 0.1", ""))

    def run(name, *arguments, **options):
        result = workshop.run("--name", name, *SHORT, *arguments, **options)
        assert result.returncode == 0, result.stderr
        return result

    return run


def figures(workshop, name):
    """Losses, bits per byte and those of an average of the weights, as metrics.jsonl has them."""
    names = ("loss", "bits_per_byte", "ema_bits_per_byte")
    lines = [[line.get(name, 0) for name in names] for line in workshop.curve(name)]
    return torch.tensor(lines, dtype=torch.float64)


def forget_after(workshop, name, step):
    """Makes a run one that was killed after a step."""
    for done, folder in list_checkpoints(workshop.folder / name):
        if done > step:
            shutil.rmtree(folder)
    (workshop.folder / name / "model.safetensors").unlink()


def test_shards_train_and_save_and_resume_as_one(workshop, run):
    average = ["--ema_decay", "0.8"]
    run("one", *average)
    run("two", *average, *["--async_checkpoints", "true"], **SHARDED)
    expected = figures(workshop, "one")
    torch.testing.assert_close(figures(workshop, "two"), expected, rtol=1e-5, atol=0)
    # The model is one safetensors file, each process wrote a shard, and export reads either.
    one, two = (load_file(workshop.folder / x / "model.safetensors") for x in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=0, atol=1e-5)
    (_, newest) = list_checkpoints(workshop.folder / "two")[-1]
    assert len(list((newest / "shards").glob("*.distcp"))) == 2
    shards = read_tensors(newest)
    assert all(shards[name].equal(x) for name, x in two.items())
    export(newest, workshop.folder / "exported")
    exported = load_file(workshop.folder / "exported/model.safetensors")
    assert all(exported[name].equal(x) for name, x in two.items())
    for name, begin in (("from shards", newest), ("from one file", workshop.folder / "exported")):
        run(name, "--init_from", str(begin), "--steps", "5", "--decay_steps", "0")
    assert figures(workshop, "from shards").equal(figures(workshop, "from one file"))
    # The same processes go on with the same numbers, others with the same but for rounding.
    for name, tolerance, options in (
        ("same", 0, SHARDED),
        ("alone", 1e-6, {}),
        ("data parallel", 1e-6, {"processes": 2}),
    ):
        shutil.copytree(workshop.folder / "two", workshop.folder / name)
        forget_after(workshop, name, 4)
        assert "after step 4" in run(name, "--resume", *average, **options).stdout
        found = figures(workshop, name)
        torch.testing.assert_close(found, figures(workshop, "two"), rtol=tolerance, atol=0)
    assert not list_checkpoints(workshop.folder / "alone")[-1][1].joinpath("shards").exists()
    # And whole checkpoints are taken up in shards.
    forget_after(workshop, "one", 4)
    run("one", "--resume", *average, **SHARDED)
    torch.testing.assert_close(figures(workshop, "one"), expected, rtol=1e-5, atol=0)
    assert expected[-1, 2] not in (0, expected[-1, 1])


OTHERS = {  # one more recurrence, and one that goes through windows within a layer
    "lightning": {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2},
    "block_recurrent": {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "recurrent_layers": [1],
        "num_states": 4,
        "sliding_window": 16,
    },
}


@pytest.mark.parametrize("architecture", OTHERS)
def test_other_architectures(workshop, run, architecture):
    """As RetNet above; scale_table.py does all of it for all of them."""
    recipe = TINY.split("[model]")[0].replace("retnet", architecture) + "[model]\n"
    recipe += "".join(f"{key} = {value}\n" for key, value in OTHERS[architecture].items())
    workshop.recipe.write_text(recipe)
    run("one")
    expected = figures(workshop, "one")
    if DEEPSPEED.is_dir() and architecture == "block_recurrent":
        # The last held-out text of one process has fewer windows, for which the other waited.
        run("zero", processes=2, config="zero3_offload.yaml")
        torch.testing.assert_close(figures(workshop, "zero"), expected, rtol=1e-5, atol=0)
    four = {"processes": 4, "config": "fsdp2.yaml"}
    run("four", "--gradient_checkpointing", "true", **four)
    torch.testing.assert_close(figures(workshop, "four"), expected, rtol=1e-5, atol=0)
    forget_after(workshop, "four", 4)
    assert "after step 4" in run("four", "--resume", processes=2).stdout
    torch.testing.assert_close(figures(workshop, "four"), expected, rtol=1e-5, atol=0)


def test_recomputed_compiled_and_in_bf16(workshop, run):
    """All as whole models do: in bf16 weights stay in float32, and autocast chooses what is not."""
    run("fp32")
    compiled = {**SHARDED, "env": {"ACCELERATE_DYNAMO_BACKEND": "EAGER"}}
    result = run("recomputed", "--gradient_checkpointing", "true", **compiled)
    assert "compiled by eager" in result.stdout
    run("one", "--precision", "bf16")
    run("two", "--precision", "bf16", **SHARDED)
    found = [figures(workshop, name) for name in ("fp32", "recomputed", "one", "two")]
    exact, recomputed, one, two = found
    torch.testing.assert_close(recomputed, exact, rtol=1e-5, atol=0)
    # Each is off by its own rounding: no more by shards than without.
    assert (two - exact).abs().mean() <= 1.5 * (one - exact).abs().mean()
    weights = load_file(workshop.folder / "two/model.safetensors")
    assert {x.dtype for x in weights.values()} == {torch.float32}
    assert any((x != x.bfloat16()).any() for x in weights.values())


def test_killed_while_shards_are_written(workshop, run):
    run("whole", **SHARDED)
    ranks = workshop.start_ranks("--name", "killed", *SHORT, **SHARDED)
    while not list(workshop.folder.glob("killed/checkpoint-8.unfinished/shards")):
        time.sleep(0.001)
        assert ranks[0].poll() is None
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.communicate()
    done = [step for step, _ in list_checkpoints(workshop.folder / "killed")]
    assert done and done[-1] in (4, 8)
    run("killed", "--resume", **SHARDED)
    assert figures(workshop, "killed").equal(figures(workshop, "whole"))


def test_an_index_that_runs_code_is_not_opened(tmp_path):
    """As pickles may; export opens checkpoints of other people."""

    class Evil:
        def __reduce__(self):
            return print, ("run",)

    (tmp_path / "shards").mkdir()
    torch.serialization.pickle.dump(Evil(), open(tmp_path / SHARDS_INDEX, "wb"))
    with pytest.raises(ValueError, match=r"damaged or incomplete \(its index names builtins.print"):
        read_tensors(tmp_path)


def test_what_accelerate_would_ignore_is_said(in_process, workshop):
    result = in_process(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    assert result.returncode == 2
    assert "which accelerate ignores on 1 x cpu" in result.stderr
    assert not (workshop.folder / "tiny").exists()
    with pytest.raises(UsageError, match="the first version of FSDP"):
        check_environment({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"})


def test_segments_are_not_replayed_in_shards():
    accelerator = SimpleNamespace(is_fsdp2=True)
    check_plugin({}, accelerator, SimpleNamespace(replay_segment_length=0))
    with pytest.raises(UsageError, match="FSDP has taken their weights away"):
        check_plugin({}, accelerator, SimpleNamespace(replay_segment_length=8))


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero2.yaml", "zero3_offload.yaml"])
def test_deepspeed(workshop, run, config):
    """Its checkpoints are those of any run: taken up by one process, and of one process by it."""
    if not DEEPSPEED.is_dir():
        pytest.skip("DeepSpeed is not installed; `make` does it")
    zero = {"processes": 2, "config": config}
    run("one")
    run("two", "--micro_batch_size", "1", **zero)
    expected = figures(workshop, "one")
    torch.testing.assert_close(figures(workshop, "two"), expected, rtol=1e-5, atol=0)
    one, two = (load_file(workshop.folder / x / "model.safetensors") for x in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=0, atol=1e-5)
    shutil.copytree(workshop.folder / "two", workshop.folder / "alone")
    # How its state is put together is tested with either, how it is taken up with the one in parts.
    ways = [("alone", {}), ("one", zero)] + [("two", zero)] * (config == "zero3_offload.yaml")
    for name, options in ways:
        forget_after(workshop, name, 4)
        assert "after step 4" in run(name, "--resume", **options).stdout
        torch.testing.assert_close(figures(workshop, name), expected, rtol=1e-5, atol=0)
