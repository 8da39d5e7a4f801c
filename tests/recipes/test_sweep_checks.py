"""Every way in which a comparison is unfair is named: the model and the fault."""

import pytest
from made_results import made_results, made_trial

from ablating import checks
from ablating.summary import summarise


def run(results):
    return {check.name: check for check in checks.run(results, summarise(results))}


def of(results, task="text", model="retnet", **values):
    """The trials of a model on a task with these values."""
    return [
        trial
        for trial in results["trials"]
        if (trial["task"], trial["model"]) == (task, model)
        and all(trial[key] == value for key, value in values.items())
    ]


def change(key, value, **which):
    """A fault: what trials say of themselves."""

    def inject(results):
        for trial in of(results, **which):
            trial[key] = value(trial[key]) if callable(value) else value

    return inject


def edge(results):
    for trial in of(results, seed=0, learning_rate=1e-2):
        trial["score"] = 0.5
    results["trials"] += [made_trial("text", "retnet", 1e-2, seed, "report") for seed in (1, 2, 3)]


def missing_seed(results):
    results["trials"] = [t for t in results["trials"] if t not in of(results, seed=2)]


def failed_control(results):
    for trial in of(results, "recall", role="report"):
        trial["held_out"][-1]["accuracy/pairs_8"] = 0.3


def larger(results):
    model = results["models"]["retnet"]
    model["parameters_without_embeddings"] = round(1.03 * 98_304)


def larger_on_a_task(results):
    task = results["models"]["retnet"]["per_task"]["recall"]
    task["parameters_without_embeddings"] = round(0.97 * 98_304)


def other_setting(results):
    for trial in of(results):
        trial["recipe"]["batch_size"] = 64


def rate_not_tried(results):
    results["trials"] = [t for t in results["trials"] if t not in of(results, learning_rate=1e-2)]


def noisy(results):
    for trial in of(results, model="transformer", role="noise"):
        trial["score"] += 0.02


def diverged_report(results):
    for trial in of(results, seed=1):
        trial |= {"status": "diverged", "score": None}


def diverged_all(results):
    for trial in of(results):
        trial |= {"status": "diverged", "score": None}


FAULTS = {
    "1% more tokens": (
        change("tokens", lambda n: n * 101 // 100),
        "same number of tokens",
        "retnet on text, 6 trials: 1% more tokens (4,136,960, not 4,096,000)",
    ),
    "another order": (
        change("order_sha256", "f" * 64, seed=1),
        "same data in the same order",
        "retnet on text at 0.003, seed 1: another one (ffffffff, not ",
    ),
    "another tokenizer": (
        change("tokenizer_sha256", "e" * 64),
        "same tokenizer",
        "retnet on text, 6 trials: another one (eeeeeeee, not ",
    ),
    "another text": (
        change("corpus_sha256", "d" * 64, seed=3),
        "same text or task",
        "retnet on text at 0.003, seed 3: another one (dddddddd, not ",
    ),
    "another setting": (
        other_setting,
        "trained alike",
        "retnet on text, 6 trials: batch_size = 64, not 32",
    ),
    "edge": (edge, "edge", "retnet on text: its best rate 0.01 is the highest tried"),
    "rate not tried": (rate_not_tried, "tried every", "retnet on text: no score at 0.01"),
    "missing seed": (missing_seed, "every seed", "retnet on text: missing seed 2 (no trial)"),
    "failed control": (
        failed_control,
        "easy control",
        "retnet did not learn recall: 0.300 on the easy control of 8 pairs",
    ),
    "3% larger": (larger, "one size", "retnet: +3.0% parameters without embeddings (101,253"),
    "3% smaller on a task": (larger_on_a_task, "one size", "retnet on recall: -3.0% parameters"),
    "failed": (
        change("status", "failed", seed=0, learning_rate=1e-3),
        "no trial crashed",
        "retnet on text at 0.001, seed 0 (trials/",
    ),
    "diverged": (diverged_report, "diverged", "retnet on text at 0.003, seed 1"),
    "all diverged": (diverged_all, "diverged", "retnet on text at 0.01, seed 0"),
    "noise": (noisy, "noise", "text: transformer run again with the same seed is off by 0.02"),
    "other threads": (
        change("cpu_threads", 2, seed=3),
        "ran alike",
        "retnet on text at 0.003, seed 3: cpu_threads 2, not 1",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault):
    inject, name, sentence = FAULTS[fault]
    results = made_results(points=1)
    assert {check.verdict for check in run(results).values()} == {checks.PASS}
    inject(results)
    (check,) = [check for title, check in run(results).items() if name in title]
    assert check.verdict == checks.FAIL
    assert any(sentence in found for found in check.found), check.found
    assert not any("rwkv7" in found for found in check.found if fault != "noise")


def test_flops_may_be_matched_instead():
    results = made_results(points=1)
    results["sweep"]["match"]["by"] = "flops"
    larger(results)
    for name, model in results["models"].items():
        model["training_flops_per_token"] = 900_000 if name == "rwkv7" else 600_000
    check = run(results)["models are of one size"]
    assert check.found == [
        "rwkv7: +50.0% training FLOPs per token (900,000; transformer has 600,000)"
    ]
    results["sweep"]["match"] = {"by": "none"}
    assert run(results)["models are of one size"].verdict == checks.NOT_CHECKED


def test_what_diverges_elsewhere_is_named_and_no_fault():
    results = made_results(points=1)
    for trial in of(results, seed=0, learning_rate=1e-2):
        trial |= {"status": "diverged", "score": None}
    check = run(results)["no trial diverged at the best rate of its model"]
    assert check.verdict == checks.PASS
    assert check.found == ["at other rates: retnet on text at 0.01, seed 0"]
    assert (
        run(results)["no best learning rate is at the edge of those tried"].verdict == checks.PASS
    )


def test_what_is_not_recorded_is_not_checked():
    results = made_results(points=1)
    for trial in results["trials"]:
        for key in ("order_sha256", "tokenizer_sha256", "device", "recipe"):
            trial[key] = None
        if trial["role"] == "noise":
            trial["status"] = "running"
    verdicts = {check.name: check.verdict for check in run(results).values()}
    unknown = [name for name, verdict in verdicts.items() if verdict == checks.NOT_CHECKED]
    parts = ("order", "tokenizer", "trained alike", "ran alike", "noise", "crashed")
    assert len(unknown) == len(parts)
    assert all(any(part in name for name in unknown) for part in parts)
    assert list(verdicts.values()).index(checks.PASS) == len(parts), "they come first"


def test_nothing_is_claimed():
    results = made_results(points=1)
    for trial in results["trials"]:
        trial["score"] = 0.5 + 0.1 * (trial["learning_rate"] != 3e-3) * (trial["task"] == "text")
    check = run(results)["noise is small beside what is claimed"]
    assert check.verdict == checks.PASS
    assert "off by 0, and no difference is claimed" in check.found[0]


def test_nothing_is_done_yet():
    results = made_results(points=1)
    results["trials"] = []
    verdicts = {check.name: check.verdict for check in run(results).values()}
    assert [name for name, verdict in verdicts.items() if verdict == checks.PASS] == [
        "models are of one size",
        "no trial crashed",
        "no trial diverged at the best rate of its model",
    ]
