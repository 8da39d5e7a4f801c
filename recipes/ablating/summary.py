"""What a sweep found: the best rates, the scores at them, the differences to the baseline.

A pure function of results.json, which may be partial: what is not there is None, and named.
"""

import math
import re
from dataclasses import dataclass, field

from tasks import load
from tasks.definition import TRAINED, UNSCORED

from .statistics import LEVEL, Interval, holm, interval, paired

CONTROL = 0.9  # the accuracy on the easy control below which a model did not learn the task


@dataclass
class Choice:
    """The best learning rate of a model on a task, on the seed that rates are compared on.

    Attributes:
        rate: the best; None if no trial ended.
        scores: by rate, in order; of a diverged trial infinitely bad.
        edge: "lowest" or "highest" if no rate beyond it was measured, "only" if there is but one.
    """

    rate: float | None
    scores: dict
    edge: str = ""

    @property
    def diverged(self):
        """The rates that diverged."""
        return [rate for rate, score in self.scores.items() if math.isinf(score)]


@dataclass
class Entry:
    """A model on a task.

    Attributes:
        choice: of its learning rate.
        trials: those that it is reported on, done, by seed.
        missing: the seeds without one -> why.
        score: over these seeds.
        difference: to the baseline, paired by seed; None for the baseline itself.
        holm_p: of the difference, corrected for the number of models.
        control: accuracy on the easy control; None where a task has none.
        verdict: "baseline", "better", "worse", "not separable", or "no interval".
        learned: False where the control failed, None where there is none.
    """

    choice: Choice
    trials: dict
    missing: dict
    score: Interval
    difference: Interval | None = None
    holm_p: float | None = None
    control: float | None = None
    verdict: str = ""
    learned: bool | None = None


@dataclass
class Task:
    """A task of a sweep.

    Attributes:
        name: in the sweep.
        metric: "bits_per_byte" or "accuracy".
        lower_is_better: of the metric.
        length: tokens of a training example; None if no trial says it.
        entries: by model.
        noise: how far the baseline's rerun with the same seed is off; None without one.
        control_pairs: of the easy control; None without one.
        settings: of a synthetic task; {} of text.
    """

    name: str
    metric: str
    lower_is_better: bool
    length: int | None
    entries: dict = field(default_factory=dict)
    noise: float | None = None
    control_pairs: int | None = None
    settings: dict = field(default_factory=dict)

    def answers(self, figure):
        """How many answers a figure such as accuracy/pairs_8 is a share of; 0 if of none."""
        kind, _, test = figure.partition("/")
        if kind != "accuracy":
            return 0
        task = load(self.settings)
        labels_BT = task.test_batch(test or TRAINED, 0, task.test_examples)["shift_labels"]
        return int((labels_BT != UNSCORED).sum())


def score_of(trial):
    """The score of a trial that is done, None of any other."""
    score = trial.get("score")
    is_number = isinstance(score, (int, float)) and math.isfinite(score)
    return float(score) if trial["status"] == "done" and is_number else None


def best_rate(trials, lower_is_better):
    """Chooses a learning rate.

    Args:
        trials: of one model, task and seed. One that diverged is infinitely bad, one that failed
            or did not end says nothing.
        lower_is_better: of their scores. Of equal ones, as accuracies of 1 are, the rate in the
            middle of those tried is taken.
    """
    sign, bad = (-1, math.inf) if lower_is_better else (1, -math.inf)
    scores, ranked = {}, []
    trials = sorted(trials, key=lambda trial: trial["learning_rate"])
    for index, trial in enumerate(trials):
        score = bad if trial["status"] == "diverged" else score_of(trial)
        if score is not None:
            scores[trial["learning_rate"]] = score
            if math.isfinite(score):
                ranked.append((sign * score, min(index, len(trials) - 1 - index), index))
    if not ranked:
        return Choice(None, scores)
    best, rates = trials[max(ranked)[2]]["learning_rate"], list(scores)
    edges = {rates[0]: "lowest", rates[-1]: "highest"}
    return Choice(best, scores, "only" if len(rates) == 1 else edges.get(best, ""))


def of_model(results, task, model, noise=False):
    """The trials of a model on a task, without the rerun that measures noise, or that alone."""
    return [
        trial
        for trial in results["trials"]
        if (trial["task"], trial["model"]) == (task, model) and (trial["role"] == "noise") == noise
    ]


def choose(results, task, model):
    """The `Choice` of a model's learning rate on a task."""
    seed = results["sweep"]["sweep"]["select_seed"]
    trials = [trial for trial in of_model(results, task, model) if trial["seed"] == seed]
    return best_rate(trials, not synthetic(results, task))


def synthetic(results, task):
    """The table of a synthetic task, which is scored by accuracy; {} for text, by bits per byte."""
    sweep = results["sweep"]
    return sweep["tasks"][task].get("task") or (sweep.get("recipe") or {}).get("task") or {}


def numbered(figures, prefix):
    """The figures named prefix/..., such as accuracy/pairs_8, by the number at their end."""
    found = {}
    for name, value in figures.items():
        number = re.search(r"\d+$", name)
        if name.startswith(prefix + "/") and number and value is not None:
            found[int(number[0])] = value
    return dict(sorted(found.items()))


def last_figures(trial):
    """The figures of a trial's last evaluation, {} before the first."""
    return (trial.get("held_out") or [{}])[-1]


def mean_by_number(trials, prefix):
    """The mean over trials of the figures prefix/<number>, by number, where every trial has it."""
    found = [numbered(last_figures(trial), prefix) for trial in trials]
    shared = [n for n in found[0] if all(n in one for one in found)] if found else []
    return {n: math.fsum(one[n] for one in found) / len(found) for n in shared}


def summarise(results):
    """The `Task`s of a sweep by name, with an `Entry` for each model."""
    tasks = {}
    for name in results["sweep"]["tasks"]:
        table = synthetic(results, name)
        recipes = [
            trial.get("recipe") or {} for trial in results["trials"] if trial["task"] == name
        ]
        # A trial's recipe has the settings that the sweep leaves at their defaults too.
        settings = next((r["task"] for r in recipes if r.get("task")), table)
        task = tasks[name] = Task(
            name,
            "accuracy" if table else "bits_per_byte",
            not table,
            next((r["sequence_length"] for r in recipes if "sequence_length" in r), None),
            control_pairs=settings.get("control_pairs"),
            settings=settings,
        )
        for model in results["models"]:
            task.entries[model] = _entry(results, task, model)
        _compare(results, task)
    return tasks


def _entry(results, task, model):
    choice, trials, missing = choose(results, task.name, model), {}, {}
    for seed in results["sweep"]["sweep"]["seeds"]:
        here = [
            trial
            for trial in of_model(results, task.name, model)
            if trial["seed"] == seed and trial["learning_rate"] == choice.rate
        ]
        if here and score_of(here[0]) is not None:
            trials[seed] = here[0]
        elif choice.rate is None:
            missing[seed] = "no rate chosen"
        else:
            missing[seed] = here[0]["status"] if here else "no trial"
    score = interval({seed: score_of(trial) for seed, trial in trials.items()})
    entry = Entry(choice, trials, missing, score)
    if task.control_pairs and trials:
        entry.control = mean_by_number(trials.values(), "accuracy").get(task.control_pairs)
        entry.learned = None if entry.control is None else entry.control >= CONTROL
    return entry


def _compare(results, task):
    name = results["sweep"]["sweep"]["baseline"]
    baseline, entries = task.entries[name], task.entries
    answers = task.answers(task.metric)
    for model, entry in entries.items():
        if model != name:
            entry.difference = paired(entry.score.values, baseline.score.values, answers)
    others = {model: entry.difference for model, entry in entries.items() if entry.difference}
    corrected = holm({model: difference.p for model, difference in others.items()})
    baseline.verdict = "baseline"
    for model, difference in others.items():
        entry = entries[model]
        entry.holm_p = corrected[model]
        if entry.holm_p is None:
            entry.verdict = "no interval"
        elif entry.holm_p >= 1 - LEVEL:
            entry.verdict = "not separable"
        else:
            lower = difference.mean < 0
            entry.verdict = "better" if lower == task.lower_is_better else "worse"
    for rerun in of_model(results, task.name, name, noise=True):
        first = baseline.trials.get(rerun["seed"])
        if first and score_of(rerun) is not None:
            if rerun["learning_rate"] == first["learning_rate"]:
                task.noise = abs(score_of(rerun) - score_of(first))
