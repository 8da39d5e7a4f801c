"""Times the operators on a GPU, beside flash-linear-attention and PyTorch's attention.

    make gpu                                            the GPU tests and more, in parts, and this
    python kernels/bench/run.py --only RWKV --minutes 4
    python kernels/bench/run.py --table                 README.md's tables and plot, from results/

What is measured, and how: README.md beside this file. Results go to results/<device>.json after
every case. Nothing is timed before it was compared with float64, and what is wrong is not timed.
"""

import argparse
import contextlib
import importlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from zoo.kernels.bench.gpu.cases import CASES, FIRST_CALL_SECONDS, FIRST_CALLS
from zoo.kernels.bench.gpu.checking import DeviceLost, calls, check_and_warm_up, first_line
from zoo.kernels.bench.gpu.failures import note
from zoo.kernels.bench.gpu.sources import fingerprint
from zoo.kernels.bench.gpu.tables import RESULTS, first_call_lines, lines_of, write_readme
from zoo.kernels.bench.gpu.timing import Cpu, Gpu, measure

HERE = Path(__file__).resolve().parent


def first_call(name, contender):
    """In a child process: seconds from nothing imported to the first gradients."""
    device = torch.device("cuda")
    torch.zeros(1, device=device)
    torch.cuda.synchronize()
    start = time.perf_counter()
    workload = CASES[name].make(device, False)
    calls(workload, "training")[contender]()
    torch.cuda.synchronize()
    print(time.perf_counter() - start)


def measure_first_call(name, contender, seconds):
    """{"seconds": ...} of `first_call` in a fresh process that has compiled nothing yet."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--first-call", name, contender]
        try:
            child = subprocess.run(
                command,
                env=os.environ | {"TRITON_CACHE_DIR": folder},
                capture_output=True,
                text=True,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {seconds:.0f} s"}
    if child.returncode:
        return {"failed": child.stderr.strip().splitlines()[-1][:200]}
    return {"seconds": round(float(child.stdout.split()[-1]), 2)}


def compile_first(cases, processes, arguments, seconds):
    """Lets child processes compile everything, the cases shared out: fla's configurations are many.

    What they compile is in Triton's cache when this process wants it. What goes wrong there will
    go wrong here, and be told.
    """
    command = [sys.executable, __file__, *arguments, "--compile"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    shares = (json.dumps(list(cases)[i::processes]) for i in range(processes))
    children = [subprocess.Popen([*command, share], **quiet) for share in shares]
    end = time.perf_counter() + seconds
    for child in children:
        try:
            child.wait(max(0.0, end - time.perf_counter()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def compile_share(device, cases, is_tiny):
    """In a child process: runs every mode of the cases once."""
    for case in cases.values():
        with contextlib.suppress(Exception):
            workload = case.make(device.device, is_tiny)
            for mode in case.modes:
                check_and_warm_up(device, workload, mode)


def versions():
    """What a result depends on, beside the device."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    found["cuda"] = torch.version.cuda or torch.version.hip
    for name, package in (("triton", "triton"), ("fla", "fla")):
        with contextlib.suppress(ImportError):
            found[name] = importlib.import_module(package).__version__
    return found


def commit():
    """The commit that is measured, "+" if there are changes on top; None outside a checkout."""

    def git(*arguments):
        command = ["git", "-c", "safe.directory=*", "-C", str(HERE), *arguments]
        with contextlib.suppress(OSError):
            return subprocess.run(command, capture_output=True, text=True).stdout.strip()
        return ""

    name = git("rev-parse", "--short", "HEAD")
    return name + "+" * bool(git("status", "--porcelain", "-uno")) if name else None


def setting_of(device):
    """What must be the same for results to stand in one file."""
    return {"device": device.name, "versions": versions()}


def results_of(output, setting):
    """What a result file holds of this device and these versions: entries by case."""
    old = json.loads(output.read_text()) if output.exists() else {}
    same = all(old.get(key) == value for key, value in setting.items())
    return old["results"] if same else {}


def not_measured(cases, output, setting):
    """({name: case} that a file does not have with this code, those of it that failed)."""
    results = results_of(output, setting)
    code, never, failed = fingerprint(), {}, {}
    for name, case in cases.items():
        entry = results.get(name, {})
        if entry.get("sources") != code or (name in FIRST_CALLS and "first call" not in entry):
            never[name] = case
        elif "failed" in entry:
            failed[name] = case
    return never, failed


def run(device, cases, output, deadline, is_tiny):
    """Measures the cases in their order until the deadline, and writes the file after each.

    Returns:
        Whether all of them could be measured.
    """
    record = setting_of(device)
    record["results"] = results_of(output, record)
    ceilings = device.ceilings()
    record["copy_tb_per_s"] = round(ceilings[0] / 1e12, 3)
    record["matmul_tflops"] = round(ceilings[1] / 1e12, 1)
    if "fla" not in record["versions"]:
        print("flash-linear-attention is not installed: ours alone is measured.")
    this_code = {"commit": commit(), "sources": fingerprint()}

    def write():
        unfinished = output.with_suffix(".part")
        unfinished.write_text(json.dumps(record, indent=1) + "\n")
        unfinished.replace(output)

    for name, case in cases.items():
        if time.perf_counter() > deadline:
            print(f"out of time before {name}")
            note(f"out of time before {name}")
            return False
        entry, is_lost = dict(this_code), False
        try:
            workload = case.make(device.device, is_tiny)
            for mode in case.modes:
                seconds = 0.0 if is_tiny else 2.0
                entry[mode] = measure(device, workload, mode, ceilings, seconds)
                if mode in case.targets:
                    entry[mode]["target"] = case.targets[mode]
        except DeviceLost as error:
            entry["failed"] = str(error)
            is_lost = True
        except Exception as error:  # out of memory, say: the other cases can still be measured
            entry["failed"] = first_line(error)
        workload = None
        record["results"][name] = entry
        write()
        lines = lines_of(name, entry)
        print("\n".join(lines), flush=True)
        for line in lines:
            if "not timed" in line or line == f"{name}: {entry.get('failed')}":
                note(line)
        if is_lost:
            print("The device is lost to this process: the cases after it were not measured.")
            return False
    for name in () if is_tiny else FIRST_CALLS:
        if name not in cases or time.perf_counter() > deadline:
            continue
        entry = record["results"][name]
        entry["first call"] = {
            side: measure_first_call(name, side, FIRST_CALL_SECONDS)
            for side in entry.get("training", {}).get("by", {})
            if side in ("ours", "fla")
        }
        write()
        print("\n".join(first_call_lines(name, entry)), flush=True)
    return True


def main(arguments=None):
    """Measures, tunes or writes tables; see the module's docstring.

    Returns:
        The exit status: 1 if cases were not measured.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    only = {"action": "append", "help": "cases whose name contains this, or another one given"}
    parser.add_argument("--only", **only)
    parser.add_argument("--minutes", type=float, default=8.0, help="no case starts after them")
    parser.add_argument("--seconds", type=float, help="the same, in place of --minutes")
    parser.add_argument("--go-on", action="store_true", help="not what this code was measured for")
    parser.add_argument("--table", action="store_true", help="rewrite the README's tables")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to test this script")
    parser.add_argument(
        "--output", type=Path, help="result file, in place of results/<device>.json"
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=min(8, os.cpu_count()),
        help="compile everything first, in so many (0: each case when its turn comes)",
    )
    parser.add_argument("--compile", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--first-call", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.table:
        write_readme()
        return
    if options.first_call:
        first_call(*options.first_call)
        return
    if options.device == "cpu" and not (options.smoke and options.output):
        parser.error("times on a CPU are cpu.py's; --device cpu goes with --smoke and --output.")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("this torch sees no GPU; --device cpu --smoke --output PATH tests the script.")
    seconds = 60 * options.minutes if options.seconds is None else options.seconds
    deadline = time.perf_counter() + seconds
    device = Cpu() if options.device == "cpu" else Gpu(torch.device("cuda", 0))
    words = options.only or [""]
    cases = {name: case for name, case in CASES.items() if any(word in name for word in words)}
    if not cases:
        parser.error(f"no case's name contains {words}; there are: {', '.join(CASES)}.")
    if options.compile is not None:
        compile_share(device, {name: CASES[name] for name in options.compile}, options.smoke)
        return
    slug = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")
    output = options.output or RESULTS / f"{slug}.json"
    if options.go_on:
        never, failed = not_measured(cases, output, setting_of(device))
        cases = never | failed
    if options.processes:
        given = ["--device", options.device, *["--smoke"] * options.smoke]
        given += ["--output", str(options.output)] if options.output else []
        compile_first(cases, options.processes, given, seconds / 3)
    is_whole = run(device, cases, output, deadline, options.smoke)
    left = deadline - time.perf_counter()
    if options.go_on and not is_whole and left > 1:
        remaining, _ = not_measured(cases, output, setting_of(device))
        if 0 < len(remaining) < len(never):  # the device is lost to this process alone
            again = [*(arguments or sys.argv[1:]), "--seconds", f"{left:.0f}", "--processes", "0"]
            sys.stdout.flush()
            os.execv(sys.executable, [sys.executable, __file__, *again])
    if options.output is None:
        write_readme()
    return 0 if is_whole else 1


if __name__ == "__main__":
    sys.exit(main())
