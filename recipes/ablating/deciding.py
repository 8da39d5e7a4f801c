"""One precision for all trials of a sweep whose recipes say "auto": only so are they comparable.

It is decided once, on the machine of the driver, before the first trial. It lies in precision.json
in the sweep's folder and in the recipe of each trial; no trial measures for itself, on whatever
machine, in whatever slot.
"""

import json
import os
from collections import Counter

import torch

from pretraining.building import build_config, tokenizer_of
from pretraining.launching import is_on
from pretraining.precision import Precision, has_bf16, measure, product_of
from pretraining.recipe import UsageError
from pretraining.reporting import write_json
from pretraining.run_folder import read_record

from .engines import threads_of
from .trials import TRIALS

DECIDED = "precision.json"
CPU = torch.device("cpu")


def read_precision(folder):
    """The `Precision` that a sweep has decided on, None if it has not.

    Raises:
        UsageError: the file is damaged.
    """
    path = folder / DECIDED
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return Precision({"fp32": "fp32", "bf16": "bf16"}[record["precision"]], record["seconds"])
    except (ValueError, KeyError, TypeError):
        raise UsageError(
            f'{path} says nothing of "fp32" or "bf16"; delete it, and the sweep takes what its '
            "trials began with, or measures."
        ) from None


def of_trials(folder):
    """The `Precision` of most trials that have begun, None if none has.

    A sweep of an earlier version has no more than these: its trials decided for themselves.
    """
    runs = (folder / TRIALS).glob("*/run")
    begun = Counter(read_record(run).get("precision") for run in runs)
    del begun[None]
    return Precision(begun.most_common(1)[0][0]) if begun else None


def decide(sweep, widths, say=print):
    """The precision of a sweep's trials whose recipes say "auto", decided now if it was not.

    Args:
        sweep: a `Sweep`, of whose folder this process holds the lock.
        widths: task -> model -> width of the MLP.
        say: prints a line.

    Returns:
        "fp32" or "bf16"; "" where no recipe says "auto", or a GPU says what it can.

    Raises:
        UsageError: what was decided cannot be read.
    """
    recipe = first_auto(sweep, widths)
    if recipe is None or sweep.engine.gpus_per_trial or not on_cpus():
        return ""
    decided = read_precision(sweep.folder)
    if decided is None:
        decided = of_trials(sweep.folder) or _measured(recipe, threads_of(sweep.engine), say)
        record = {"precision": decided.name, "seconds": decided.seconds}
        write_json(sweep.folder / DECIDED, record)
    return decided.name


def on_cpus():
    """Whether trials without GPUs run on CPUs: engines hide CUDA's devices, and no others."""
    found = torch.accelerator.current_accelerator()
    return found is None or found.type == "cuda" or is_on(os.environ.get("ACCELERATE_USE_CPU"))


def first_auto(sweep, widths):
    """The recipe of the baseline, or of another model, that says "auto" first; None: none does."""
    models = sorted(sweep.models, key=lambda name: name != sweep.sweep.baseline)
    for task in sweep.tasks:
        for model in models:
            rate, seed = sweep.sweep.learning_rates[0], sweep.sweep.select_seed
            recipe = sweep.resolve(task, model, rate, seed, widths[task][model])
            if recipe.precision == "auto":
                return recipe
    return None


def _measured(recipe, threads, say):
    if not has_bf16(CPU):
        return Precision("fp32")
    before = torch.get_num_threads()
    torch.set_num_threads(recipe.cpu_threads or threads)
    try:
        return measure(product_of(recipe, build_config(recipe, tokenizer_of(recipe)), 1), say)
    finally:
        torch.set_num_threads(before)
