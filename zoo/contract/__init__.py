"""The contract every model keeps, as checks on any Hugging Face causal LM: `zoo contract MODEL`.

Ten points; each check compares a figure with a bound. What could not be checked here, for want of a
GPU or because the model cannot be asked, is reported as not run and never as passed.

Models of the zoo are held to every check (`run`). Of a model of others a referee asks what its
users rely on (`judge`): what its class does not offer does not apply, what nobody promises is told
apart, and a failure comes with the smallest input that shows it.
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

from . import printing
from .points_library import files, generation
from .points_numerics import initialization, low_precision
from .points_scale import constant_state, training_and_compiling
from .points_sequence import (
    no_future_leaks,
    packing_changes_nothing,
    padding_changes_nothing,
    whole_equals_pieces,
)
from .referee import DEFAULT_BUDGET, Verdicts
from .referee import judge as _judge
from .report import (
    DOES_NOT_APPLY,
    FAILED,
    NOT_PROMISED,
    NOT_RUN,
    PASSED,
    Check,
    Checks,
    Report,
    first_line,
)
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
SMALL = 10_000_000  # parameters
# With a budget: what breaks most often and takes least before what takes longest.
MOST_TELLING = (4, 1, 2, 3, 5, 10, 6, 9, 8, 7)
EXAMPLES = """examples:
  zoo contract retnet --points 1,2,3
  zoo contract models/rwkv7 --json rwkv7.json
  zoo contract MistralForCausalLM --budget 60 --markdown mistral.md
"""


def run(subject, points=None, num_tokens=DEFAULT_TOKENS, after_point=None, budget=None):
    """Checks a subject against points of the contract, every one as for a model of the zoo.

    Args:
        subject: a `Subject`.
        points: their numbers; None: all.
        num_tokens: length of the long prefill of point 7.
        after_point: called with the report and a point's number as soon as it is done.
        budget: seconds; the most telling points come first then, and what there was no time for
            is not run. None: no limit.

    Returns:
        A `Report`.
    """
    began = time.perf_counter()
    subject.deadline = None if budget is None else began + budget
    report = Report(
        subject.name,
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )
    numbers = list(points or POINTS)
    report.titles = {number: POINTS[number][0] for number in numbers}
    if budget is not None:
        numbers.sort(key=MOST_TELLING.index)
    for number in numbers:
        function = POINTS[number][1]
        checks = Checks(number)
        started = time.perf_counter()
        with checks.case(""), _quiet():
            if budget is not None:
                subject.check_time()
            function(subject, checks, **({"num_tokens": num_tokens} if number == 7 else {}))
        report.seconds[number] = time.perf_counter() - started
        report.checks += checks.found
        report.notes[number] = checks.notes
        if after_point is not None:
            after_point(report, number)
    if budget is not None:
        # As they were asked for, whatever came first.
        report.checks.sort(key=lambda check: list(report.titles).index(check.point))
    return report


def judge(subject, points=None, budget=DEFAULT_BUDGET):
    """The verdicts on a model of others, on what its users rely on.

    Args:
        subject: a `Subject`, as `find_subject` gives it.
        points: numbers of the contract's points; None: all.
        budget: seconds; None: no limit.

    Returns:
        `Verdicts`, a `Report` with the smallest input of each failure.
    """
    titles = {number: title for number, (title, _) in POINTS.items()}
    with _quiet(), _one_thread_if_small(subject):
        return _judge(subject, titles, points, budget)


@contextlib.contextmanager
def _one_thread_if_small(subject):
    """Threads that share out a tiny model wait for each other longer than they compute."""
    number = torch.get_num_threads()
    if subject.num_parameters < SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(number)


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
        help="a model of the zoo; or of others: a folder, a class of transformers such as "
        "LlamaForCausalLM, package.module:Class, or OWNER/NAME on the Hub",
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
    parser.add_argument("--markdown", metavar="FILE", help="write the verdicts there as well")
    parser.add_argument(
        "--budget",
        type=_seconds,
        metavar="SECONDS",
        help="spent on the most telling checks first; what was not run is said "
        f"(default: none for ours, {DEFAULT_BUDGET:g} for a model of others)",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="hold a model of others to every check that ours keep, promised or not",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code that lies in the folder"
    )
    arguments = parser.parse_args(argv)
    for file in filter(None, (arguments.json, arguments.markdown)):
        if not Path(file).absolute().parent.is_dir():
            print(f"zoo contract: no folder to write {file} into", file=sys.stderr)
            return 2
    try:
        with _quiet():
            subjects = _subjects(arguments)
    except (ValueError, OSError, ImportError, AttributeError) as error:
        print(f"zoo contract: {first_line(error)}", file=sys.stderr)
        return 2
    reports = [_report(subject, arguments) for subject in subjects]
    if arguments.json:
        content = json.dumps([report.as_dict() for report in reports], indent=2)
        Path(arguments.json).write_text(content + "\n")
    if arguments.markdown:
        texts = [printing.markdown(report) for report in reports]
        Path(arguments.markdown).write_text("\n".join(texts))
    return int(any(report.failed() for report in reports))


def _report(subject, arguments):
    """Checks a subject as the command line asks for, and prints what was found."""
    if not (arguments.strict or getattr(subject, "is_ours", True)):
        budget = DEFAULT_BUDGET if arguments.budget is None else arguments.budget
        report = judge(subject, arguments.points, budget)
        print(report.table() if arguments.verbose else printing.summary(report), flush=True)
        return report
    settings = {"budget": arguments.budget}
    if arguments.verbose:
        report = run(subject, arguments.points, arguments.tokens, **settings)
        print(report.table(), flush=True)
        return report
    print(f"{subject.name}: the figure nearest to its bound, of each point", flush=True)
    report = run(subject, arguments.points, arguments.tokens, _print_summary, **settings)
    print(f"{report.totals()}; --verbose prints each", flush=True)
    return report


def _print_summary(report, point):
    print(report.summary(point), flush=True)


def _seconds(text):
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds, more than 0, got {text!r}")
    return seconds


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
    "DOES_NOT_APPLY",
    "FAILED",
    "NOT_PROMISED",
    "NOT_RUN",
    "PASSED",
    "POINTS",
    "Check",
    "Checks",
    "Report",
    "Subject",
    "Verdicts",
    "find_subject",
    "judge",
    "main",
    "run",
    "variants_of",
    "zoo_subject",
]
