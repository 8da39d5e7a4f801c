"""Reads texts longer than those of training: finished trials of a sweep, each in several ways.

    python recipes/ablate.py recipes/configs/ablations/train_short.toml
    python recipes/extrapolate.py recipes/configs/test_long.toml
    python recipes/extrapolate.py recipes/configs/test_long.toml --dry_run

A way is a model of the sweep with other fields in its config (a scaled rotation, a window, a
rope_extension) and the weights that it was trained with; nothing is trained here. Measured are

- bits per byte of the same bytes, at the end of texts of each length: the loss by position;
- recall by distance: digits that stand somewhere in filler and are asked for at its end.

Each trial in each way is a file in output_dir/NAME/readings. Those that are there are not measured
again, whatever else changes in the TOML, and a study that was stopped goes on. Results.json, tables
and figures are made of all there are.
"""

import argparse
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads OpenMP

REPOSITORY = Path(__file__).resolve().parent.parent
if str(REPOSITORY) not in sys.path:  # run from a clone in which nothing is installed
    sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402

from ablating.engines import IS_LINUX, cores  # noqa: E402
from ablating.forking import die_with  # noqa: E402
from extrapolating.measuring import check  # noqa: E402
from extrapolating.panels import draw  # noqa: E402
from extrapolating.readings import readings_of  # noqa: E402
from extrapolating.study import read_study  # noqa: E402
from extrapolating.summary import RESULTS, collect, markdown, save  # noqa: E402
from pretraining.building import tokenizer_of  # noqa: E402
from pretraining.mixing import load_mixture  # noqa: E402
from pretraining.recipe import UsageError  # noqa: E402
from pretraining.run_folder import locked  # noqa: E402
from pretraining.usage import Parser, run_script  # noqa: E402

SOME_LEFT = 1
TABLES = "tables.md"
EPILOG = """\
exit status: 0 all is measured; 1 some trials of the sweep have not ended, the rest is measured;
2 something to put right, said in one line; 130 stopped by Ctrl-C

Every key of the TOML is an option too: --seeds "[1]", --ways.rope_linear.panel other, --name other.
"""


def parse(arguments):
    """The options of this script, and the words that change the study."""
    parser = Parser(
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("study", help="a TOML file")
    parser.add_argument(
        "--dry_run", "--dry-run", action="store_true", help="say what is left, measure nothing"
    )
    parser.add_argument(
        "--report", action="store_true", help="results, tables and figures of what is there"
    )
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes that measure at once"
    )
    return parser.parse_known_args(arguments)


def held_out_text(study, readings):
    """The tokens that losses are of, and the hash of their text; (None, None) without a text.

    Raises:
        UsageError: trials that were held out from different texts.
    """
    of_text = [r.trial for r in readings if r.task == study.text and not r.why_not()]
    if not of_text:
        return None, None
    recipe = of_text[0].recipe
    mixture = load_mixture(recipe, tokenizer_of(recipe), recipe.corpus_dir)
    return mixture.held_out, mixture.record["sha256"]


def measure(study, readings, workers):
    """Measures what is left, in this process or in several."""
    left = [r for r in readings if not r.is_done() and not r.why_not()]
    for reading in {r.name: r for r in left}.values():
        check(study, reading.trial, reading.way)
    held_out, _ = held_out_text(study, left)
    tasks = [(reading, held_out if reading.task == study.text else None) for reading in left]
    count = 0
    for reading, seconds in _done(tasks, workers):
        count += 1
        said = f"{reading.name} on {reading.task}, seed {reading.seed}: {seconds:.1f} s"
        print(f"{count}/{len(left)}  {said}", flush=True)


def _done(tasks, workers):
    """(reading, seconds) of each task as it ends."""
    if workers == 1:
        for reading, held_out in tasks:
            yield reading, reading.measure(held_out)
        return
    begin = os.getpid(), max(1, cores() // workers)
    # A process that has computed with threads does not stand a fork.
    with ProcessPoolExecutor(workers, get_context("spawn"), _begin, begin) as pool:
        futures = {pool.submit(reading.measure, text): reading for reading, text in tasks}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:  # what has begun ends, and is written
            pool.shutdown(cancel_futures=True)
            raise


def _begin(parent, threads):
    """Makes ready a process that measures."""
    if IS_LINUX:
        die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
    torch.set_num_threads(threads)


def start(arguments):
    """Reads the command line and does what it says; returns the exit status."""
    options, overrides = parse(arguments)
    if options.workers < 1:
        raise UsageError(f"--workers is at least 1, got {options.workers}.")
    study = read_study(options.study, overrides)
    readings = readings_of(study)
    if options.dry_run:
        for reading in readings:
            state = "measured" if reading.is_done() else reading.why_not() or "to be measured"
            print(f"{reading.task:10} {reading.name:24} seed {reading.seed}  {state}")
        return 0
    with locked(study.folder):
        if not options.report:
            measure(study, readings, options.workers)
        _, corpus = held_out_text(study, readings)
        results = collect(study, readings, corpus)
        if not any(way["trials"] for way in results["ways"].values()):
            raise UsageError(
                f"nothing is measured: no trial of {study.sweep} has ended; run recipes/ablate.py "
                "with it first."
            )
        save(study, results)
        text = markdown(results)
        (study.folder / TABLES).write_text(text, encoding="utf-8")
        paths = draw(results, study.folder)
    print(text)
    print(f"wrote {study.folder / RESULTS}, {TABLES}, {', '.join(path.name for path in paths)}")
    return SOME_LEFT if results["missing"] else 0


def main():
    """Turns what the user can put right into one line."""
    try:
        run_script(lambda arguments: sys.exit(start(arguments)))
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
