"""results.json: all that a sweep found, of which the report is a function."""

import json
import statistics
from dataclasses import asdict
from pathlib import Path

from pretraining.building import REPOSITORY
from pretraining.reporting import environment, write_whole
from pretraining.run_folder import read_record

from .deciding import read_precision
from .matching import models_of

RESULTS = "results.json"
POINTS = 200  # of a curve, at most
# Of run.json: what a trial was run by, and the order of what it read.
RUN_BY = ("device", "precision", "cpu_threads", "processes", "compiler", "versions", "git_commit")


def collect(plan, by_task, engine):
    """Writes results.json from what lies in the folders of the trials.

    Args:
        plan: a `Plan`.
        by_task: task -> model -> `Size`.
        engine: the name of the engine.

    Returns:
        What was written.
    """
    path = Path(plan.sweep.folder) / RESULTS
    models = models_of(plan.sweep, by_task)
    earlier = json.loads(path.read_text())["models"] if path.is_file() else {}
    for name, model in models.items():  # measured after the trials, and not by them
        before = earlier.get(name, {})
        if before.get("fields") == model["fields"]:
            model["speed"] = before["speed"]
    decided = read_precision(plan.sweep.folder)
    results = {
        "sweep": asdict(plan.sweep),
        "environment": environment(REPOSITORY),
        "engine": engine,
        "precision": asdict(decided) if decided else None,
        "models": models,
        "trials": [trial_record(trial, by_task) for trial in plan.trials()],
    }
    write_results(path, results)
    return results


def write_results(path, results):
    """Writes results.json, a trial to a line: of hundreds, one is still found, and told apart."""
    rest = json.dumps({**results, "trials": []}, indent=1)
    lines = ",\n".join(json.dumps(trial) for trial in results["trials"])
    before, _, after = rest.rpartition("[]")
    write_whole(path, f"{before}[\n{lines}\n ]{after}\n")


def add_speed(sweep, results, say=print):
    """Measures throughput and memory of each model whose figures are not there, into results.json.

    Args:
        sweep: a `Sweep`; its `speed` says at which lengths.
        results: of `collect`.
        say: prints a line.
    """
    from . import speed

    for name, model in results["models"].items():
        if [line["length"] for line in model["speed"]] != sweep.speed.lengths:
            say(f"measuring {name} at {', '.join(map(str, sweep.speed.lengths))} tokens")
            model["speed"] = speed.measure(
                model["architecture"], model["fields"], sweep.speed.lengths, sweep.speed.repeats
            )
    write_results(sweep.folder / RESULTS, results)


def trial_record(trial, by_task):
    """What results.json says of a trial, whatever has come of it."""
    run, train, held_out = read_record(trial.run_folder), trial.lines("train"), []
    for line in trial.lines("held_out"):
        held_out.append({key: value for key, value in line.items() if key != "kind"})
    last = (train or [{}])[-1]
    size = by_task[trial.task][trial.model]
    corpus = run.get("corpus", {})
    recipe = asdict(trial.recipe) | {"output_dir": str(trial.folder)}
    return {
        "hash": trial.hash,
        "task": trial.task,
        "model": trial.model,
        "learning_rate": trial.learning_rate,
        "seed": trial.seed,
        "role": trial.role,
        "status": trial.status(),
        "command": trial.command,
        "recipe": recipe,
        "tokens": last.get("tokens"),
        "seconds": last.get("seconds"),
        "tokens_per_second": _median([line["tokens_per_second"] for line in train]),
        "peak_memory": max((line["peak_memory"] for line in train), default=None),
        "training_flops_per_token": size.training_flops_per_token,
        "corpus_sha256": corpus.get("sha256"),
        "tokenizer_sha256": corpus.get("tokenizer_sha256"),
        "order_sha256": run.get("order_sha256"),
        **{key: run.get(key) for key in RUN_BY},
        "score": trial.score(),
        "curve": curve(train),
        "held_out": held_out,
    }


def _median(values):
    return statistics.median(values) if values else None


def curve(lines):
    """[step, tokens, seconds, loss] of some lines of training, the first and the last with them.

    Seconds and losses have six digits, of which a figure shows three.
    """
    count = min(POINTS, len(lines))
    places = [round(n * (len(lines) - 1) / max(count - 1, 1)) for n in range(count)]
    points = [lines[n] for n in places]
    return [
        [x["step"], x["tokens"], *(float(f"{x[key]:.6g}") for key in ("seconds", "loss"))]
        for x in points
    ]
