"""Runs the tests that need a GPU and have not passed yet with this code: a part of `make gpu`.

    python kernels/bench/gpu/testing.py --mark gpu --record FILE.jsonl

With pytest-xdist side by side: most of their time is compiling. tests/gpu_passed.py leaves out what
passed, and ends a process to which a test has lost the device; here another one is begun for the
tests that are left.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import time

from zoo.kernels.bench.gpu.sources import ROOT, fingerprint

LOST, NONE_LEFT = 86, 5  # exit statuses: of gpu_passed.py, and pytest's own
SETTING = "ZOO_GPU_SETTING"  # device and versions as a word: what passed, passed with them
MOST_LOST = 20  # processes; more than this is no accident of a test


def command(mark, record, call, processes, tests):
    """The words of one pytest."""
    words = [sys.executable, "-m", "pytest", "-q", "-m", mark, "-p", "gpu_passed"]
    words += ["--passed-record", str(record), "--passed-call", call]
    code = fingerprint() + os.environ.get(SETTING, "")
    words += ["--passed-sources", code, "-p", "no:cacheprovider"]
    if processes > 1 and importlib.util.find_spec("xdist"):
        words += ["-n", str(processes), "--dist", "worksteal"]
    return words + list(tests)


def files():
    """The test files that have such tests: collecting all the others takes longer than these."""
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        is_recipe = "recipes" in path.parts  # whose conftest is another
        if not is_recipe and ("_gpu" in path.name or "mark.gpu" in path.read_text()):
            found.append(str(path.relative_to(ROOT)))
    return found


def main(arguments=None):
    """See the module docstring. The exit status: 0 if none failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mark", required=True, help="as of pytest -m")
    parser.add_argument("--record", required=True, help="file of what passed")
    parser.add_argument("--processes", type=int, default=0)
    parser.add_argument("tests", nargs="*", help="files, in place of all that have such tests")
    options = parser.parse_args(arguments)
    tests = options.tests or files()
    call, was_lost = f"{time.time():.0f}", False
    for _ in range(MOST_LOST):
        words = command(options.mark, options.record, call, options.processes, tests)
        code = subprocess.run(words, cwd=ROOT).returncode
        if code != LOST:
            break
        was_lost = True
    return 0 if code in (0, NONE_LEFT) and not was_lost else 1


if __name__ == "__main__":
    sys.exit(main())
