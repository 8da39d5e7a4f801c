"""Pretrains one architecture on text.

    accelerate launch recipes/pretrain.py recipes/retnet_demo.toml [--key value ...] [--resume]

The run's folder receives the model, checkpoints, metrics.jsonl, run.json and loss.png. Everything
a step does is a function of the recipe and of the step's number, so a run continued with --resume
gives the numbers of an uninterrupted one.
"""

import argparse
import dataclasses
import json
import os
import shlex
import shutil
import sys

# Waiting threads sleep instead of spinning, which on cores shared with others is far slower. OpenMP
# reads this when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from accelerate import Accelerator, PartialState

from building import build_config, build_model, load_tokenizer
from checkpointing import list_checkpoints
from launching import (
    check_launch,
    check_trackers,
    die_with_launcher,
    precision_of,
    set_cpu_threads,
)
from recipe import Recipe, UsageError, read_recipe
from training import Diverged, Run


def check_run_dir(recipe, resume, overwrite):
    """Keeps a run from being overwritten by accident.

    Raises:
        UsageError: the folder holds checkpoints, and nothing says what is to happen with them.
    """
    if list_checkpoints(recipe.run_dir) and not (resume or overwrite):
        raise UsageError(
            f"{recipe.run_dir} holds a run; continue it with --resume, replace it with "
            "--overwrite, or choose another --name."
        )


def dry_run(recipe):
    """Prints the resolved recipe and what it would train, without data or memory for a model."""
    with torch.device("meta"):
        model = build_model(recipe, build_config(recipe, load_tokenizer(recipe.tokenizer)))
    parameters = sum(p.numel() for p in model.parameters())
    tokens = recipe.steps * recipe.batch_size * recipe.sequence_length
    print(json.dumps(dataclasses.asdict(recipe), indent=1))
    print(f"{parameters:,} parameters, {tokens:,} tokens ({tokens / parameters:.1f} per parameter)")


def start(arguments):
    """Reads the command line and trains; returns the exit status."""
    fields = ", ".join(field.name for field in dataclasses.fields(Recipe))
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog=f"Any key of the recipe is also --key value, and --model.key value: {fields}",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", help="a TOML file")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint")
    parser.add_argument(
        "--overwrite", action="store_true", help="delete an earlier run of this name"
    )
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="print, do not train")
    options, overrides = parser.parse_known_args(arguments)
    recipe = read_recipe(options.recipe, overrides)
    if options.dry_run:
        dry_run(recipe)
        return 0

    environ = dict(os.environ)  # accelerate adds to it
    on_cpu = not torch.accelerator.is_available()
    processes = PartialState(cpu=on_cpu).num_processes
    check_launch(environ, processes, shlex.join(["recipes/pretrain.py", *arguments]))
    check_trackers(recipe.trackers)
    check_run_dir(recipe, options.resume, options.overwrite)
    die_with_launcher(environ)
    threads = set_cpu_threads(recipe.cpu_threads, environ)
    precision = precision_of(recipe.precision, PartialState().device)
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision="bf16" if precision == "bf16" else "no",
        log_with=recipe.trackers or None,
        project_dir=str(recipe.run_dir),
    )
    accelerator.wait_for_everyone()
    if options.overwrite and accelerator.is_main_process and not options.resume:
        shutil.rmtree(recipe.run_dir, ignore_errors=True)
    run = Run(recipe, accelerator, threads, options.resume)
    stopped_by = run.train()
    if stopped_by:
        accelerator.print(f"{stopped_by.name}: saved step {run.step}; continue with --resume")
        accelerator.end_training()
        return 128 + stopped_by
    run.finish()
    return 0


def main():
    """Turns what the user can put right into one line."""
    try:
        status = start(sys.argv[1:])
    except (UsageError, Diverged) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        status = 2 if isinstance(error, UsageError) else 1
    sys.exit(status)


if __name__ == "__main__":
    main()
