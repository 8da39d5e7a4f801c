"""Which trials a sweep needs, as they end one after the other."""

import json
import sys
from types import SimpleNamespace

import pytest

import ablating
from ablating.collecting import add_speed, curve
from ablating.planning import Plan, beyond
from ablating.sweep import read_sweep

SWEEP = """
output_dir = "{folder}"
[match]
by = "none"
[sweep]
learning_rates = [1e-3, 3e-3, 1e-2]
seeds = [1, 2]
extend_at_edge = {extend}
[recipe]
steps = 300
[tasks.text]
[models.a]
architecture = "retnet"
[models.b]
architecture = "rwkv4"
"""


@pytest.fixture
def plan(tmp_path):
    def plan(extend=1):
        path = tmp_path / "sweep.toml"
        path.write_text(SWEEP.format(folder=tmp_path, extend=extend))
        return Plan(read_sweep(path), {"text": {"a": None, "b": None}})

    return plan


def end(trial, score=None, code=0):
    """Leaves behind what a trial does that ended so."""
    trial.run_folder.mkdir(parents=True)
    line = {"kind": "held_out", "step": 1, "tokens": 1, "seconds": 1.0, "bits_per_byte": score}
    if score is not None:
        (trial.run_folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    trial.mark(code, 1.0)


def keys(trials):
    return [(t.model, t.role, t.learning_rate, t.seed) for t in trials]


def end_rates(plan, model, scores):
    for trial, score in zip([t for t in plan.open() if t.model == model], scores, strict=True):
        end(trial, score)


def test_a_model_goes_on_without_waiting_for_the_others(plan):
    plan = plan()
    rates = [1e-3, 3e-3, 1e-2]
    assert keys(plan.open()) == [(m, "select", rate, 0) for m in "ab" for rate in rates]
    end_rates(plan, "a", [2.0, 1.0, 1.5])
    report = [("a", "report", 3e-3, 1), ("a", "report", 3e-3, 2), ("a", "noise", 3e-3, 1)]
    assert keys(plan.open()) == [("b", "select", rate, 0) for rate in rates] + report
    for trial in plan.open():
        if trial.role == "noise":
            assert trial.hash not in [t.hash for t in plan.trials() if t.role == "report"]
    end_rates(plan, "b", [3.0, 2.0, 2.5])
    assert [t.role for t in plan.open()] == ["report"] * 4 + ["noise"]
    for trial in plan.open():
        end(trial, 1.0)
    assert not plan.open() and len(plan.trials()) == plan.expected() == 11
    # Nothing depends on what this process remembers.
    assert keys(Plan(plan.sweep, plan.widths).trials()) == keys(plan.trials())


def test_a_best_rate_at_the_edge_has_more_tried(plan):
    plan = plan(extend=2)
    end_rates(plan, "a", [1.0, 2.0, 3.0])
    (further,) = [t for t in plan.open() if t.role == "extend"]
    assert (further.learning_rate, further.seed) == (0.00033, 0)
    assert not any(t.role == "report" for t in plan.open())
    end(further, 0.9)
    (further,) = [t for t in plan.open() if t.role == "extend"]
    assert further.learning_rate == 0.00011
    end(further, 0.8)
    assert {t.learning_rate for t in plan.open() if t.role == "report"} == {0.00011}
    end_rates(plan, "b", [3.0, 2.0, 1.0])
    assert 0.033 in [t.learning_rate for t in plan.open()]


def test_what_diverged_or_crashed_is_not_the_best(plan):
    plan = plan(extend=0)
    first, second, third = [t for t in plan.open() if t.model == "a"]
    end(first, 2.0)
    end(second, 1.0, code=3)  # it had measured something before
    end(third, 0.5, code=1)
    assert [plan.outcome(t) for t in (second, third)] == [("diverged", None), ("failed", None)]
    assert {t.learning_rate for t in plan.open() if t.role == "report"} == {1e-3}
    plan.forget_failures()
    assert [t.learning_rate for t in plan.open() if t.model == "a"] == [1e-2]
    assert first.status() == "done" and third.status() == "waiting"
    for trial in plan.open():
        end_again = trial.run_folder.exists()
        trial.mark(143, 1.0)  # stopped by a signal, after saving: nothing is noted
        assert trial.marker() is None and (end_again or trial.status() == "waiting")


def test_nothing_more_of_a_model_that_never_worked(plan):
    plan = plan()
    for trial in plan.open():
        end(trial, code=3)
    assert not plan.open() and len(plan.trials()) == 6


def test_of_equal_scores_the_rate_in_the_middle(plan):
    plan = plan()
    end_rates(plan, "a", [1.0, 1.0, 1.0])
    assert {t.learning_rate for t in plan.open() if t.role == "report"} == {3e-3}


@pytest.mark.parametrize(
    ("rates", "best", "expected"),
    [
        ([1e-3, 3e-3, 1e-2], 3e-3, None),
        ([1e-3, 3e-3, 1e-2], 1e-2, 0.033),
        ([1e-2, 1e-3, 3e-3], 1e-3, 0.00033),
        ([1e-3], 1e-3, None),
    ],
)
def test_beyond(rates, best, expected):
    assert beyond(rates, best) == expected


def test_curves_are_short():
    lines = [{"step": n, "tokens": 2 * n, "seconds": n / 2, "loss": 1 / n} for n in range(1, 1001)]
    assert curve(lines[:3]) == [[1, 2, 0.5, 1.0], [2, 4, 1.0, 0.5], [3, 6, 1.5, 0.333333]]
    assert len(curve(lines)) == 200 and curve([]) == []
    assert [curve(lines)[n][0] for n in (0, -1)] == [1, 1000]


def test_speed_is_measured_once(plan, monkeypatch):
    def measure(architecture, fields, lengths, repeats):
        asked.append((architecture, fields))
        return [{"length": length, "repeats": repeats} for length in lengths]

    asked, sweep, said = [], plan().sweep, []
    sweep.folder.mkdir()
    module = SimpleNamespace(measure=measure)
    monkeypatch.setitem(sys.modules, "ablating.speed", module)
    monkeypatch.setattr(ablating, "speed", module, raising=False)
    sweep.speed.lengths = [16, 64]
    old = [{"length": 16}, {"length": 64}]
    models = {
        "a": {"architecture": "retnet", "fields": {"hidden_size": 8}, "speed": []},
        "b": {"architecture": "rwkv4", "fields": {}, "speed": old},
    }
    add_speed(sweep, {"models": models, "trials": []}, said.append)
    assert asked == [("retnet", {"hidden_size": 8})] and said == ["measuring a at 16, 64 tokens"]
    written = json.loads((sweep.folder / "results.json").read_text())["models"]
    assert written["a"]["speed"] == [{"length": n, "repeats": 3} for n in (16, 64)]
    assert written["b"]["speed"] == old
