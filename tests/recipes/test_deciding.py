"""All trials of a sweep train in one precision, which is decided once."""

import json

import pytest
import torch

from ablating import deciding
from ablating.deciding import DECIDED, decide
from ablating.planning import Plan
from ablating.sweep import read_sweep
from pretraining import precision
from pretraining.recipe import UsageError, read_recipe

SWEEP = """
output_dir = "{folder}"
[match]
by = "none"
[sweep]
learning_rates = [1e-3]
seeds = [1]
[recipe]
steps = 300
[tasks.text]
[models.a]
architecture = "retnet"
precision = "fp32"
[models.b]
architecture = "rwkv4"
[models.c]
architecture = "rwkv5"
fields = {{ hidden_size = 64 }}
"""
WIDTHS = {"text": dict.fromkeys("abc")}
FAST, SLOW = {"fp32": 0.02, "bf16": 0.008}, {"fp32": 0.02, "bf16": 0.026}


@pytest.fixture
def timed(monkeypatch):
    """`timed(seconds)`: what a product takes from now on; () raises where one is timed."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"bf16": True}, raising=False)

    def takes(seconds=None):
        def time_product(*product):
            assert seconds, "nothing is to be measured here"
            return dict(seconds)

        monkeypatch.setattr(precision, "time_product", time_product)

    return takes


@pytest.fixture
def sweep(tmp_path):
    path = tmp_path / "sweep.toml"
    path.write_text(SWEEP.format(folder=tmp_path))
    sweep = read_sweep(path)
    sweep.folder.mkdir()
    return sweep


def written(plan):
    """model -> the precision in the recipe that a trial of it is started with."""
    found = {}
    for trial in plan.trials():
        trial.write_recipe()
        found[trial.model] = read_recipe(trial.recipe_file).precision
    return found


def test_one_for_all_trials(timed, sweep):
    """Of recipes that leave it open; whoever goes on with the sweep, on whatever machine."""
    plan = Plan(sweep, WIDTHS)
    names = [trial.hash for trial in plan.trials()]
    timed(FAST)
    plan.precision = decide(sweep, WIDTHS)
    assert written(plan) == {"a": "fp32", "b": "bf16", "c": "bf16"}
    assert json.loads((sweep.folder / DECIDED).read_text()) == {
        "precision": "bf16",
        "seconds": FAST,
    }
    timed(SLOW)
    plan.precision = decide(sweep, WIDTHS)
    assert written(plan) == {"a": "fp32", "b": "bf16", "c": "bf16"}
    assert [trial.hash for trial in plan.trials()] == names  # what has ended does not run again


def begin(plan, model, name):
    """Leaves behind what a trial does that has begun."""
    (trial,) = (trial for trial in plan.trials() if trial.model == model)
    trial.run_folder.mkdir(parents=True)
    (trial.run_folder / "run.json").write_text(json.dumps({"precision": name}))


def test_a_sweep_of_an_earlier_version(timed, sweep):
    """Its trials said "auto" and decided; those that are left do as they did."""
    plan = Plan(sweep, WIDTHS)
    begin(plan, "b", "bf16")
    timed(SLOW)
    plan.precision = decide(sweep, WIDTHS)
    assert written(plan) == {"a": "fp32", "b": "bf16", "c": "bf16"}


def test_a_trial_that_has_begun_goes_on_as_it_was(timed, sweep):
    timed(SLOW)
    plan = Plan(sweep, WIDTHS, decide(sweep, WIDTHS))
    begin(plan, "c", "bf16")
    assert written(plan) == {"a": "fp32", "b": "fp32", "c": "bf16"}


def test_what_needs_no_decision(timed, sweep, monkeypatch):
    """What recipes say, and what has GPUs or another accelerator, which say what they can."""
    timed()
    sweep.engine.gpus_per_trial = 1
    assert decide(sweep, WIDTHS) == ""
    assert written(Plan(sweep, WIDTHS, ""))["b"] == "auto"
    sweep.engine.gpus_per_trial = 0
    with monkeypatch.context() as patch:
        other = torch.device("mps")
        patch.setattr(torch.accelerator, "current_accelerator", lambda: other)
        patch.delenv("ACCELERATE_USE_CPU", raising=False)
        assert decide(sweep, WIDTHS) == ""
    for model in sweep.models.values():
        model["precision"] = "fp32"
    assert decide(sweep, WIDTHS) == ""
    assert not (sweep.folder / DECIDED).exists()


def test_it_is_timed_with_the_threads_of_a_trial(timed, sweep, monkeypatch):
    seen = []
    timed(FAST)
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    monkeypatch.setattr(deciding, "threads_of", lambda engine: 5)
    decide(sweep, WIDTHS)
    assert seen == [5, torch.get_num_threads()]


def test_a_cpu_without_bf16_measures_nothing(timed, sweep, monkeypatch):
    timed()
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    assert decide(sweep, WIDTHS) == "fp32"


def test_a_decision_that_cannot_be_read(sweep):
    (sweep.folder / DECIDED).write_text('{"precision": "fp8", "seconds": {}}')
    with pytest.raises(UsageError, match="delete it, and the sweep takes") as error:
        decide(sweep, WIDTHS)
    assert "\n" not in str(error.value)
