"""Compares architectures: trains all on each task, tuned alike, and reports what differs.

    python recipes/ablate.py recipes/configs/ablations/smoke.toml
    python recipes/ablate.py recipes/configs/ablations/smoke.toml --dry_run
    python recipes/ablate.py list recipes/configs/ablations/smoke.toml
    python recipes/ablate.py report runs/ablations/smoke

Every trial is a command of pretrain.py in a folder of its own. Trials that have ended never run
again, interrupted ones go on, and a changed TOML takes over every trial whose recipe is the same.
"""

import argparse
import contextlib
import os
import sys
from pathlib import Path

# Waiting threads sleep instead of spinning. OpenMP reads this when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

REPOSITORY = Path(__file__).resolve().parent.parent
if str(REPOSITORY) not in sys.path:  # run from a clone in which nothing is installed
    sys.path.insert(0, str(REPOSITORY))

from ablating import report  # noqa: E402
from ablating.collecting import RESULTS, add_speed, collect  # noqa: E402
from ablating.deciding import decide  # noqa: E402
from ablating.driving import drive  # noqa: E402
from ablating.engines import engine_named  # noqa: E402
from ablating.listing import list_models, list_trials  # noqa: E402
from ablating.matching import sizes, widths  # noqa: E402
from ablating.planning import Plan  # noqa: E402
from ablating.sweep import read_sweep  # noqa: E402
from pretraining.recipe import UsageError  # noqa: E402
from pretraining.reporting import Lasting  # noqa: E402
from pretraining.run_folder import locked  # noqa: E402
from pretraining.usage import Parser  # noqa: E402

ACTIONS = ("run", "report", "list")
USAGE, SOME_LEFT = 2, 1
EPILOG = """\
exit status: 0 done; 1 some trials crashed or were stopped; 2 something to put right, said in one
line; 128 + n: stopped by signal n, after the trials had saved

Every key of the TOML is an option too: --sweep.seeds "[1, 2]", --recipe.steps 20, --name other.
"""


def parse(arguments):
    """The options of this script, and the words that change the sweep."""
    parser = Parser(
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "action", choices=ACTIONS, help="run trains and reports; it may be left out"
    )
    parser.add_argument("sweep", help="a TOML file; to report, also the folder of a sweep")
    parser.add_argument(
        "--engine",
        choices=("local", "slurm", "ray"),
        default="local",
        help="slots on this machine, jobs of Slurm (pip install submitit), tasks of a Ray cluster "
        "(pip install ray)",
    )
    parser.add_argument(
        "--retry_failed", "--retry-failed", action="store_true", help="run crashed trials again"
    )
    parser.add_argument(
        "--dry_run", "--dry-run", action="store_true", help="print models and trials, train nothing"
    )
    if arguments and arguments[0] not in (*ACTIONS, "-h", "--help"):
        arguments = ["run", *arguments]
    return parser.parse_known_args(arguments)


def plan_of(sweep):
    """The plan of a sweep, and the sizes of its models by task."""
    found = {task: widths(sweep, task) for task in sweep.tasks}
    return Plan(sweep, found), {task: sizes(sweep, task, found[task]) for task in sweep.tasks}


def start(arguments):
    """Reads the command line and does what it says; returns the exit status."""
    options, overrides = parse(arguments)
    folder = Path(options.sweep)
    if options.action == "report" and folder.is_dir():
        if not (folder / RESULTS).is_file():
            raise UsageError(f"{folder} holds no {RESULTS}; give a sweep's folder or its TOML.")
        report.write(folder)
        return 0
    sweep = read_sweep(options.sweep, overrides)
    if options.action == "run" and not options.dry_run:
        return run(sweep, options)
    plan, by_task = plan_of(sweep)
    if options.dry_run:
        print(*list_models(sweep, by_task), *list_trials(plan), sep="\n")
        return 0
    if options.action == "list":
        print(*list_trials(plan), sep="\n")
        return 0
    collect(plan, by_task, options.engine)
    report.write(sweep.folder)
    return 0


def run(sweep, options):
    """Runs all trials that are left, and reports; returns the exit status."""
    with contextlib.closing(engine_named(options.engine, sweep)) as engine, locked(sweep.folder):
        plan, by_task = plan_of(sweep)
        if options.retry_failed:
            plan.forget_failures()
        plan.precision = decide(sweep, plan.widths)
        print(*list_models(sweep, by_task), sep="\n", flush=True)
        stopped_by = drive(plan, engine)
    results = collect(plan, by_task, options.engine)
    if stopped_by:
        print(f"{stopped_by.name}: the same command goes on from here")
        return 128 + stopped_by
    if sweep.speed.lengths:
        add_speed(sweep, results)
    report.write(sweep.folder)
    print(f"wrote {sweep.folder / RESULTS}")
    failed = sum(trial.status() == "failed" for trial in plan.trials())
    if failed:
        print(f"{failed} trials crashed; --retry_failed runs them again")
    stopped = len(plan.open())
    if stopped:
        print(f"{stopped} trials were stopped by a signal; the same command goes on with them")
    return SOME_LEFT if failed or stopped else 0


def main():
    """Turns what the user can put right into one line."""
    sys.stdout, sys.stderr = Lasting(sys.stdout), Lasting(sys.stderr)
    try:
        status = start(sys.argv[1:])
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        status = USAGE
    sys.exit(status)


if __name__ == "__main__":
    main()
