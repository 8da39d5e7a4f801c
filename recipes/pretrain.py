"""Pretrains one architecture on text or on a synthetic task.

    accelerate launch recipes/pretrain.py recipes/configs/retnet_demo.toml --key value ... --resume

The run's folder receives the model, checkpoints, metrics.jsonl, run.json and loss.png. Everything
a step does is a function of the recipe and of the step's number, so a run continued with --resume
gives the numbers of an uninterrupted one.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import sys

# Waiting threads sleep instead of spinning, which on cores shared with others is far slower. OpenMP
# reads this when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import GradientAccumulationPlugin, str_to_bool

from pretraining.agreeing import together
from pretraining.building import build_config, build_model, tokenizer_of
from pretraining.checkpointing import MANIFEST, Checkpoint, newest_checkpoint
from pretraining.compiling import check_compiler
from pretraining.continuing import check_changes
from pretraining.costs import describe
from pretraining.full_attention import settle_full_attention
from pretraining.launching import (
    StopSignals,
    check_environment,
    check_launch,
    check_launcher,
    check_trackers,
    die_with_launcher,
    is_on,
    keep_freed_memory,
    launcher_words,
    set_cpu_threads,
)
from pretraining.lora import adapt
from pretraining.precision import (
    Precision,
    has_bf16,
    kept_precision,
    precision_of,
    product_of,
    settle,
)
from pretraining.recipe import Recipe, UsageError, describe_keys, read_recipe
from pretraining.reporting import Lasting, versions
from pretraining.run_folder import (
    check_run_dir,
    locked,
    one_line_if_full,
    read_record,
    remove_run,
)
from pretraining.sharding import check_plugin
from pretraining.slicing import check_slicing, check_walk
from pretraining.starting import config_of_source
from pretraining.training import Diverged, Run
from pretraining.usage import Parser
from zoo.hub.files import file_hash

USAGE, DIVERGED = 2, 3  # exit statuses; Python's is 1 after a crash
EPILOG = """\
exit status: 0 done; 1 crashed; 2 something to put right, said in one line; 3 diverged;
128 + n: stopped by signal n (HUP, INT, USR1, USR2, TERM) after saving, so --resume goes on

Every key of the recipe is an option too: --KEY VALUE, with its default and what it means.
"""


def parse(arguments):
    """The options of this script, and the words that change the recipe."""
    parser = Parser(
        description=__doc__.split("\n")[0],
        epilog=EPILOG + describe_keys(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", help="a TOML file")
    earlier = parser.add_mutually_exclusive_group()
    earlier.add_argument(
        "--resume",
        action="store_true",
        help="continue the run of this name from its newest whole checkpoint; there must be one",
    )
    earlier.add_argument(
        "--resume_or_start",
        "--resume-or-start",
        action="store_true",
        help="the same, or begin if there is no such run: for jobs that a scheduler restarts",
    )
    earlier.add_argument(
        "--overwrite",
        action="store_true",
        help="delete what an earlier run of this name wrote, and begin",
    )
    parser.add_argument(
        "--change_schedule",
        "--change-schedule",
        action="store_true",
        help="let --resume go on with another learning rate, schedule or gradient_clip than the "
        "steps behind had (after a divergence it may without); the change is recorded",
    )
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="print, do not train")
    return parser.parse_known_args(arguments)


def config_of(recipe):
    """The config of the recipe's model, of a run that begins."""
    tokenizer = tokenizer_of(recipe)
    if recipe.init_from:
        return config_of_source(recipe, tokenizer)[0]
    return build_config(recipe, tokenizer)


def without_memory(recipe):
    """The recipe's model on meta."""
    config = config_of(recipe)
    with torch.device("meta"):
        return build_model(recipe, config)


def dry_run(recipe):
    """Prints the resolved recipe and what it would train, without data or memory for a model."""
    model = without_memory(recipe)
    with torch.device("meta"):
        settle_full_attention(recipe, model)
        model = adapt(model, recipe)
    print(json.dumps(dataclasses.asdict(recipe), indent=1))
    print(*describe(recipe, model), sep="\n")


@dataclasses.dataclass
class Plan:
    """What is going to be done, as each process finds it for itself."""

    recipe: Recipe
    precision: Precision
    product: tuple | None
    resume: bool
    checkpoint: Checkpoint
    changes: list[str]


def make_plan(options, overrides, environ, held):
    """Reads and checks what this process was given.

    Args:
        options: of this script.
        overrides: words that change the recipe.
        environ: environment variables.
        held: an exit stack, which takes the lock of the run's folder in the main process.

    Returns:
        A `Plan`, and what has to be the same in all processes.

    Raises:
        UsageError: something does not fit.
    """
    state = PartialState()
    recipe = read_recipe(options.recipe, overrides)
    check_slicing(recipe, state.num_processes, environ)
    check_compiler(environ, state.device)
    recipe.windows_per_process(state.num_processes)
    if recipe.sequence_parallel > 1 and is_on(environ.get("ACCELERATE_USE_FSDP")):
        check_walk(recipe, without_memory(recipe))
    check_trackers(recipe.trackers)
    resume = check_run_dir(
        recipe.run_dir,
        resume=options.resume or options.resume_or_start,
        start=not options.resume,
        overwrite=options.overwrite,
    )
    if state.is_main_process:
        held.enter_context(locked(recipe.run_dir))
    checkpoint = newest_checkpoint(recipe.run_dir) if resume else Checkpoint()
    kept = kept_precision(recipe.run_dir, checkpoint.manifest, state.device) if resume else None
    launched = environ.get("ACCELERATE_MIXED_PRECISION", "")
    precision = precision_of(recipe.precision, state.device, launched, kept)
    product = None
    if not precision.name:
        product = product_of(recipe, config_of(recipe), state.num_processes)
    changes, found = [], "none"
    if checkpoint.folder:
        diverged = read_record(recipe.run_dir).get("diverged") or []
        changes = check_changes(
            checkpoint, recipe, diverged, options.change_schedule, kept and kept.name
        )
        found = f"step {checkpoint.step}, {file_hash(checkpoint.folder / MANIFEST)[:8]}"
    # Where files are may differ from machine to machine; what is in them may not.
    places = ("output_dir", "cache_dir", "data", "sources", "tokenizer", "init_from")
    values = {**dataclasses.asdict(recipe), "precision": precision.name}
    facts = {
        "recipe": {key: value for key, value in values.items() if key not in places},
        "checkpoint": found,
        "versions": {name: x for name, x in versions().items() if name != "python"},
    }
    return Plan(recipe, precision, product, resume, checkpoint, changes), facts


def start(arguments):
    """Reads the command line and trains; returns the exit status."""
    options, overrides = parse(arguments)
    if options.dry_run:
        dry_run(read_recipe(options.recipe, overrides))
        return 0
    environ = dict(os.environ)  # accelerate adds to it
    check_environment(environ)
    check_launcher(launcher_words(environ))
    on_cpu = not torch.accelerator.is_available() or str_to_bool(
        environ.get("ACCELERATE_USE_CPU") or "no"
    )
    processes = PartialState(cpu=bool(on_cpu)).num_processes
    check_launch(environ, processes, shlex.join([sys.argv[0], *arguments]))
    die_with_launcher(environ)
    if on_cpu:
        keep_freed_memory(environ)
    with contextlib.ExitStack() as held:
        plan = together(make_plan, options, overrides, environ, held)
        threads = set_cpu_threads(plan.recipe.cpu_threads, environ)
        state = PartialState()
        plan.precision = settle(plan.precision, plan.product, state.device, state.is_main_process)
        return train(plan, bool(on_cpu), threads, options, environ)


def train(plan, on_cpu, threads, options, environ):
    """Trains as planned; returns the exit status."""
    recipe = plan.recipe
    zero = is_on(environ.get("ACCELERATE_USE_DEEPSPEED"))
    tf32 = torch.backends.cuda.matmul.allow_tf32
    accelerator = Accelerator(
        cpu=on_cpu,
        # DeepSpeed would keep the weights themselves in 16 bits.
        mixed_precision="bf16" if plan.precision.name == "bf16" and not zero else "no",
        # accelerate would divide each gradient by what the launcher says here.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with=recipe.trackers or None,
        project_dir=str(recipe.run_dir),
    )
    torch.backends.cuda.matmul.allow_tf32 = tf32  # accelerate allows it where it compiles
    check_plugin(environ, accelerator, recipe)
    run = Run(recipe, accelerator, threads, plan.checkpoint, plan.changes, plan.precision)
    if plan.checkpoint.folder:
        accelerator.print(f"Continuing from {plan.checkpoint.folder} after step {run.step}")
        before = plan.checkpoint.manifest["recipe"].get("sequence_parallel", 1)
        if before != recipe.sequence_parallel:
            now = recipe.sequence_parallel
            accelerator.print(f"From here on sequence_parallel: {before} -> {now}")
        for change in plan.changes:
            accelerator.print(f"From here on {change}")
        if plan.precision.name == "bf16" and not has_bf16(accelerator.device):
            accelerator.print("The run began in bf16, which this device emulates: that is slow")
    elif plan.resume:
        accelerator.print("Continuing from the beginning: no checkpoint was written yet")
    if options.overwrite and accelerator.is_main_process:
        remove_run(recipe.run_dir)
    with one_line_if_full(recipe.run_dir, accelerator.is_main_process):
        stopped_by = run.train(StopSignals())
        if not stopped_by:
            run.finish()
            return 0
    accelerator.print(f"{stopped_by.name}: saved step {run.step}; continue with --resume")
    accelerator.end_training()
    return 128 + stopped_by


def main():
    """Turns what the user can put right into one line."""
    sys.stdout, sys.stderr = Lasting(sys.stdout), Lasting(sys.stderr)
    try:
        status = start(sys.argv[1:])
    except (UsageError, Diverged) as error:
        # Once on each machine.
        if os.environ.get("LOCAL_RANK", "0") in ("0", "-1"):
            print(f"error: {error}", file=sys.stderr)
        status = USAGE if isinstance(error, UsageError) else DIVERGED
    sys.exit(status)


if __name__ == "__main__":
    main()
