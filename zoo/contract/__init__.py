"""The contract every model keeps, as checks on any Hugging Face causal LM: `zoo contract MODEL`.

Ten points; each check compares a figure with a bound. What could not be checked here, for want of a
GPU or because the model cannot be asked, is reported as not run and never as passed.
"""

import argparse
import contextlib
import json
import platform
import sys
import time
import warnings
from pathlib import Path

import torch
import transformers

from zoo import MODELS

from .points_library import files, generation
from .points_numerics import initialization, low_precision
from .points_scale import constant_state, training_and_compiling
from .points_sequence import (
    no_future_leaks,
    packing_changes_nothing,
    padding_changes_nothing,
    whole_equals_pieces,
)
from .report import FAILED, NOT_RUN, PASSED, Check, Checks, Report, first_line
from .subject import Subject, find_subject, variants_of, zoo_subject

POINTS = {
    1: ("whole = in pieces = token by token", whole_equals_pieces),
    2: ("row by row = batch, with padding anywhere", padding_changes_nothing),
    3: ("packed documents = separate documents", packing_changes_nothing),
    4: ("no future leaks", no_future_leaks),
    5: ("generate and the state's own operations", generation),
    6: ("save, load, export", files),
    7: ("state of constant size", constant_state),
    8: ("checkpointing, replay, torch.compile change nothing", training_and_compiling),
    9: ("16 bits cost no more than they must", low_precision),
    10: ("everything learns, from the paper's initialisation", initialization),
}

DEFAULT_TOKENS = 1_000_000
EXAMPLES = """examples:
  zoo contract retnet --points 1,2,3
  zoo contract models/rwkv7 --json rwkv7.json
"""


def run(subject, points=None, num_tokens=DEFAULT_TOKENS, after_point=None):
    """Checks a subject against points of the contract.

    Args:
        subject: a `Subject`.
        points: their numbers; None: all.
        num_tokens: length of the long prefill of point 7.
        after_point: called with the report and a point's number as soon as it is done.

    Returns:
        A `Report`.
    """
    report = Report(
        subject.name,
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )
    for number in points or POINTS:
        report.titles[number], function = POINTS[number]
        checks = Checks(number)
        started = time.perf_counter()
        with checks.case(""), _quiet():
            function(subject, checks, **({"num_tokens": num_tokens} if number == 7 else {}))
        report.seconds[number] = time.perf_counter() - started
        report.checks += checks.found
        report.notes[number] = checks.notes
        if after_point is not None:
            after_point(report, number)
    return report


@contextlib.contextmanager
def _quiet():
    """Without the libraries' own warnings and progress bars, which would tear the table."""
    verbosity = transformers.logging.get_verbosity()
    has_bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if has_bars:
            transformers.logging.enable_progress_bar()


def main(argv=None):
    """`zoo contract`: checks a model, prints the table.

    Args:
        argv: the arguments after `zoo contract`; None: those of the process.

    Returns:
        The exit code: 1 if a check failed, 2 if there is no such model, else 0.
    """
    parser = argparse.ArgumentParser(
        prog="zoo contract",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a model of the zoo, a folder of any Hugging Face causal LM, or package.module:Class",
    )
    parser.add_argument(
        "--variant", help="of a model of the zoo; 'all' for every one (default: the first)"
    )
    parser.add_argument(
        "--points", type=_numbers, default=list(POINTS), help="such as 1,3,7 (default: all ten)"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=DEFAULT_TOKENS,
        help="length of the long prefill of point 7 (default: 1000000)",
    )
    parser.add_argument(
        "--verbose", action="store_true", help="print every check, not a line for each point"
    )
    parser.add_argument("--json", metavar="FILE", help="write every figure there as well")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code that lies in the folder"
    )
    arguments = parser.parse_args(argv)
    if arguments.json and not Path(arguments.json).absolute().parent.is_dir():
        print(f"zoo contract: no folder to write {arguments.json} into", file=sys.stderr)
        return 2
    try:
        subjects = _subjects(arguments)
    except (ValueError, OSError, ImportError, AttributeError) as error:
        print(f"zoo contract: {first_line(error)}", file=sys.stderr)
        return 2
    reports = []
    for subject in subjects:
        if arguments.verbose:
            reports.append(run(subject, arguments.points, arguments.tokens))
            print(reports[-1].table(), flush=True)
        else:
            print(f"{subject.name}: the figure nearest to its bound, of each point", flush=True)
            reports.append(run(subject, arguments.points, arguments.tokens, _print_summary))
            print(f"{reports[-1].totals()}; --verbose prints each", flush=True)
    if arguments.json:
        content = json.dumps([report.as_dict() for report in reports], indent=2)
        Path(arguments.json).write_text(content + "\n")
    return int(any(report.failed() for report in reports))


def _print_summary(report, point):
    print(report.summary(point), flush=True)


def _numbers(text):
    try:
        points = [int(number) for number in text.split(",")]
    except ValueError:
        points = []
    if not points or not set(points) <= set(POINTS):
        raise argparse.ArgumentTypeError(f"expected numbers of points 1 to 10, got {text!r}")
    return sorted(set(points))


def _subjects(arguments):
    variants = [arguments.variant]
    if arguments.variant == "all" and arguments.model in MODELS:
        variants = variants_of(arguments.model)
    return [
        find_subject(arguments.model, variant, arguments.trust_remote_code) for variant in variants
    ]


__all__ = [
    "FAILED",
    "NOT_RUN",
    "PASSED",
    "POINTS",
    "Check",
    "Checks",
    "Report",
    "Subject",
    "find_subject",
    "main",
    "run",
    "variants_of",
    "zoo_subject",
]
