"""The checks that a fair comparison passes, each in words, from results.json alone."""

from dataclasses import dataclass

from . import alike
from .alike import trial_name
from .summary import CONTROL, of_model

PASS, FAIL, NOT_CHECKED = "pass", "fail", "not checked"
CLOSE = 0.01  # how far a matched model may be from the reference
SMALL = 1 / 3  # of the smallest difference that is claimed, which noise has to be below


@dataclass
class Check:
    """One check.

    Attributes:
        name: what is checked, in words.
        verdict: PASS, FAIL or NOT_CHECKED.
        found: sentences; where it failed, each names the model or the trial that it is about.
    """

    name: str
    verdict: str
    found: list


def run(results, tasks):
    """All checks, those that failed first, those that were not made next.

    Args:
        results: of results.json.
        tasks: what `summarise` made of it.
    """
    found = {
        "every model trains on the same number of tokens": alike.same_tokens(results),
        "with the same seed, every trial reads the same data in the same order": (
            alike.same_order(results)
        ),
        "every trial has the same tokenizer": alike.same_text(results, "tokenizer_sha256"),
        "every trial reads the same text or task": alike.same_text(results, "corpus_sha256"),
        "models are trained alike but for their own fields and rates": alike.same_recipe(results),
        "models are of one size": _matched(results),
        "every model has tried every learning rate": _rates_tried(results),
        "no best learning rate is at the edge of those tried": _not_at_edge(tasks),
        "every model is reported on every seed": _seeds(tasks),
        "no trial crashed": _failed(results),
        "no trial diverged at the best rate of its model": _diverged(results, tasks),
        f"every model learned the easy control (accuracy {CONTROL:g} or more)": _controls(tasks),
        "noise is small beside what is claimed": _noise(results, tasks),
        "every trial ran alike: device, precision, threads, versions": alike.same_place(results),
    }
    made = []
    for name, (wrong, missing, right) in found.items():
        verdict = FAIL if wrong else NOT_CHECKED if missing else PASS
        made.append(Check(name, verdict, [*wrong, *missing] or [right]))
    order = [FAIL, NOT_CHECKED, PASS]
    return sorted(made, key=lambda check: order.index(check.verdict))


def _matched(results):
    match = results["sweep"].get("match") or {}
    by, reference = match.get("by", "none"), match.get("reference")
    if by == "none":
        return [], ["[match] says none: sizes differ"], ""
    key, what = {
        "parameters": ("parameters_without_embeddings", "parameters without embeddings"),
        "flops": ("training_flops_per_token", "training FLOPs per token"),
    }[by]
    wrong, missing, largest = [], [], 0.0
    target = results["models"][reference]
    for model, values in results["models"].items():
        pairs = {model: (values.get(key), target.get(key))}
        for task in results["sweep"]["tasks"]:
            of_task = [(x.get("per_task") or {}).get(task, {}).get(key) for x in (values, target)]
            # Most models have the same matrices in every task: said once.
            if tuple(of_task) != pairs[model]:
                pairs[f"{model} on {task}"] = tuple(of_task)
        known = {where: pair for where, pair in pairs.items() if None not in pair}
        if not known:
            missing.append(f"{model}: its {what} are not there")
        for where, (found, wanted) in known.items():
            off = found / wanted - 1
            largest = max(largest, abs(off))
            if abs(off) > CLOSE:
                wrong.append(
                    f"{where}: {off:+.1%} {what} ({found:,.0f}; {reference} has {wanted:,.0f})"
                )
    return wrong, missing, f"{what} are within {largest:.2%} of {reference}'s"


def _rates_tried(results):
    sweep, wrong, count = results["sweep"]["sweep"], [], 0
    for task in results["sweep"]["tasks"]:
        for model in results["models"]:
            ended = {
                trial["learning_rate"]
                for trial in of_model(results, task, model)
                if trial["seed"] == sweep["select_seed"] and trial["status"] in ("done", "diverged")
            }
            count += len(ended)
            lacking = [f"{rate:g}" for rate in sweep["learning_rates"] if rate not in ended]
            if lacking:
                wrong.append(f"{model} on {task}: no score at {', '.join(lacking)}")
    return wrong, [], f"{count} trials, with what was tried beyond the grid"


def _not_at_edge(tasks):
    wrong, missing = [], []
    for task, model, entry in _entries(tasks):
        choice = entry.choice
        if choice.rate is None:
            missing.append(f"{model} on {task.name}: no rate has a score")
        elif choice.edge:
            which = "the only one" if choice.edge == "only" else f"the {choice.edge}"
            wrong.append(f"{model} on {task.name}: its best rate {choice.rate:g} is {which} tried")
    return wrong, missing, "a lower and a higher one was tried and is worse, for every model"


def _seeds(tasks):
    wrong, count = [], 0
    for task, model, entry in _entries(tasks):
        count += len(entry.trials)
        for why in dict.fromkeys(entry.missing.values()):
            seeds = ", ".join(str(seed) for seed, w in entry.missing.items() if w == why)
            wrong.append(f"{model} on {task.name}: missing seed {seeds} ({why})")
    return wrong, [], f"{count} trials"


def _failed(results):
    wrong, missing = [], []
    for trial in results["trials"]:
        if trial["status"] == "failed":
            wrong.append(f"{trial_name(trial)} (trials/{trial['hash']}/log.txt)")
        elif trial["status"] not in ("done", "diverged"):
            missing.append(f"{trial_name(trial)}: {trial['status']}")
    return wrong, missing, f"{len(results['trials'])} trials ended"


def _diverged(results, tasks):
    chosen = {(task.name, model): entry.choice.rate for task, model, entry in _entries(tasks)}
    wrong, others = [], []
    for trial in results["trials"]:
        if trial["status"] == "diverged":
            best = chosen[trial["task"], trial["model"]]
            at_best = best in (trial["learning_rate"], None)  # None: all diverged
            (wrong if at_best else others).append(trial_name(trial))
    return wrong, [], "at other rates: " + ("; ".join(others) if others else "none either")


def _controls(tasks):
    wrong, missing, found = [], [], []
    for task, model, entry in _entries(tasks):
        if not task.control_pairs:
            continue
        if entry.control is None:
            missing.append(f"{model} on {task.name}: the control was not measured")
            continue
        found.append(entry.control)
        if not entry.learned:
            wrong.append(
                f"{model} did not learn {task.name}: {entry.control:.3f} on the easy control of "
                f"{task.control_pairs} pairs, so its accuracy says nothing about its state"
            )
    return wrong, missing, f"the lowest is {min(found):.3f}" if found else "no task has one"


def _noise(results, tasks):
    baseline = results["sweep"]["sweep"]["baseline"]
    wrong, missing, right = [], [], []
    for task in tasks.values():
        claimed = {
            model: abs(entry.difference.mean)
            for model, entry in task.entries.items()
            if entry.verdict in ("better", "worse")
        }
        if task.noise is None:
            missing.append(f"{task.name}: {baseline} was not run again with the same seed")
            continue
        floor = f"{task.name}: {baseline} run again with the same seed is off by {task.noise:.2g}"
        wrong += [
            f"{floor}; {model} is said to differ by {value:.2g}"
            for model, value in claimed.items()
            if task.noise > SMALL * value
        ]
        least = f"the smallest difference claimed is {min(claimed.values()):.2g}" if claimed else ""
        right.append(f"{floor}, and {least or 'no difference is claimed'}")
    return wrong, missing, "; ".join(right)


def _entries(tasks):
    return [
        (task, model, entry) for task in tasks.values() for model, entry in task.entries.items()
    ]
