"""Intervals, Holm's correction, and what a sweep's results are summed up to."""

import itertools
import math

import numpy as np
import pytest
from made_results import BEST, MODELS, made_results

from ablating.statistics import holm, interval, paired, t_inside, t_quantile
from ablating.summary import best_rate, choose, summarise

# Two-sided quantiles of Student's distribution: (level, degrees of freedom) -> t.
TABLE = {
    (0.95, 1): 12.7062047364,
    (0.95, 2): 4.3026527300,
    (0.95, 3): 3.1824463053,
    (0.95, 4): 2.7764451052,
    (0.95, 5): 2.5705818356,
    (0.95, 10): 2.2281388520,
    (0.95, 30): 2.0422724563,
    (0.95, 100): 1.9839715185,
    (0.99, 1): 63.6567411629,
    (0.99, 2): 9.9248432009,
    (0.99, 5): 4.0321429836,
}


@pytest.mark.parametrize("level, freedom", TABLE)
def test_quantiles_are_those_of_the_table(level, freedom):
    assert t_quantile(level, freedom) == pytest.approx(TABLE[level, freedom], rel=1e-9)
    assert t_inside(TABLE[level, freedom], freedom) == pytest.approx(level, abs=1e-10)
    assert t_inside(-1.0, freedom) == t_inside(1.0, freedom)


def test_the_interval_covers_what_it_says_and_a_bootstrap_would_not():
    draws = np.random.default_rng(0).normal(0.3, 0.02, (4000, 3))
    covered = 0
    for draw in draws.tolist():
        found = interval(dict(enumerate(draw)))
        covered += abs(found.mean - 0.3) <= found.half
        assert (found.half < abs(found.mean)) == (found.p < 0.05)
    assert 0.935 < covered / len(draws) < 0.965
    # All 27 resamples, each as likely: their percentiles are the bootstrap's without its noise.
    again = draws[:, list(itertools.product(range(3), repeat=3))].mean(2)
    low, high = np.quantile(again, [0.025, 0.975], axis=1, method="inverted_cdf")
    assert 0.72 < np.mean((low <= 0.3) & (0.3 <= high)) < 0.78


def test_what_a_seed_does_to_both_cancels():
    baseline = {1: 2.0, 2: 2.5, 3: 1.5}
    found = paired({1: 2.11, 2: 2.6, 3: 1.59, 4: 9.0}, baseline)
    assert found.mean == pytest.approx(0.1)
    assert found.half == pytest.approx(4.302653 * 0.01 / math.sqrt(3), rel=1e-6)
    assert list(found.values) == [1, 2, 3]
    assert paired({1: 2.0}, baseline).half is None
    assert paired({4: 2.0}, baseline).mean is None
    alike = paired({1: 2.0, 2: 2.5}, baseline)
    assert (alike.half, alike.p) == (0, 1)


def test_one_answer_more_is_no_difference():
    """Three seeds that all miss the same one of 4,096 answers are not worse than perfect ones."""
    perfect = {1: 1.0, 2: 1.0, 3: 1.0}
    alike = dict.fromkeys(perfect, 1 - 1 / 4096)
    assert paired(alike, perfect).p == 0
    found = paired(alike, perfect, answers=4096)
    assert found.p == pytest.approx(0.3172, abs=1e-3)  # one standard error: P(|z| > 1)
    assert found.half == pytest.approx(1.96 / 4096, rel=1e-3)
    # Where answers are many and models differ, seeds decide as before.
    far = {1: 0.70, 2: 0.71, 3: 0.72}
    assert vars(paired(far, perfect, answers=4096)) == vars(paired(far, perfect))


def test_answers_are_those_that_a_test_scores():
    task = summarise(made_results())["recall"]
    assert [task.answers(x) for x in ("accuracy", "accuracy/pairs_32", "nats")] == [
        256 * 16,
        256 * 32,
        0,
    ]


def test_holm():
    # Worked by hand: 4 x 0.005, 3 x 0.01, 2 x 0.03, and the last is no smaller.
    found = holm({"a": 0.01, "b": 0.04, "none": None, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "none": None, "c": 0.06, "d": 0.02})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_the_rate_is_chosen_on_its_own_seed():
    results = made_results()
    for trial in results["trials"]:
        if trial["role"] == "report":
            trial["learning_rate"], trial["score"] = 1e-2, -1.0
    assert choose(results, "text", "retnet").rate == BEST


def trials(**scores):
    """Trials by rate; None: diverged, "failed": crashed."""
    statuses = {None: "diverged", "failed": "failed"}
    return [
        {
            "learning_rate": float(rate[1:]),
            "status": statuses.get(score, "done"),
            "score": None if score in statuses else score,
        }
        for rate, score in scores.items()
    ]


@pytest.mark.parametrize(
    "scores, lower, rate, edge",
    [
        ({"r1": 2.0, "r2": 1.0, "r3": 3.0}, True, 2, ""),
        ({"r1": 2.0, "r2": 1.0, "r3": 3.0}, False, 3, "highest"),
        ({"r3": 3.0, "r2": 2.0, "r1": 1.0}, True, 1, "lowest"),
        ({"r1": 2.0, "r2": 1.0, "r3": None}, True, 2, ""),  # what diverges was tried
        ({"r1": 2.0, "r2": 1.0, "r3": None}, False, 1, "lowest"),
        ({"r1": 2.0, "r2": 1.0, "r3": "failed"}, True, 2, "highest"),  # what crashed says nothing
        ({"r1": 1.0}, True, 1, "only"),
        ({"r1": 1.0, "r2": 1.0, "r3": 1.0}, False, 2, ""),
        ({"r1": 1.0, "r2": 1.0, "r3": 0.5}, False, 2, ""),
        ({"r1": None, "r2": "failed"}, True, None, ""),
    ],
)
def test_the_best_rate(scores, lower, rate, edge):
    found = best_rate(trials(**scores), lower)
    assert (found.rate, found.edge) == (rate, edge)
    assert found.diverged == [float(r[1:]) for r, score in scores.items() if score is None]


def test_true_effects_are_found():
    tasks = summarise(made_results(MODELS))
    for name, (effect, _, control, *_) in MODELS.items():
        entry = tasks["text"].entries[name]
        if name == "transformer":
            assert entry.verdict == "baseline" and entry.difference is None
            continue
        assert abs(entry.difference.mean - effect) < entry.difference.half
        # With three seeds and a spread of 0.004 Holm over twelve separates 0.05 and more.
        if abs(effect) >= 0.05:
            assert entry.verdict == ("worse" if effect > 0 else "better")
        assert tasks["recall"].entries[name].learned == (control > 0.9)
    assert tasks["text"].entries["infini"].verdict == "not separable"
    assert tasks["recall"].entries["window"].verdict == "worse"
    assert tasks["text"].noise == pytest.approx(1e-5)


def test_missing_seeds_are_named_and_the_rest_is_used():
    results = made_results()
    entry = summarise(results)["text"].entries["retnet"]
    gone = {2: "failed", 3: "diverged"}
    for trial in results["trials"]:
        if (trial["task"], trial["model"]) == ("text", "retnet") and trial["seed"] in gone:
            trial["status"], trial["score"] = gone[trial["seed"]], None
    left = summarise(results)["text"].entries["retnet"]
    assert left.missing == gone and list(left.trials) == [1]
    assert left.score.mean == entry.score.values[1] and left.score.half is None
    assert left.verdict == "no interval"
    results["trials"] = [trial for trial in results["trials"] if trial["role"] != "report"]
    assert summarise(results)["text"].entries["retnet"].missing[1] == "no trial"
