"""Everything that wants a GPU, in parts, what is unknown first: `make gpu`.

    python kernels/bench/gpu/parts.py                  all that is not done, 600 seconds at most
    python kernels/bench/gpu/parts.py --limit 280      a second call goes on where the first stopped
    python kernels/bench/gpu/parts.py --dry-run        lists parts with budgets, and what is done
    python kernels/bench/gpu/parts.py --only RWKV      parts whose name contains RWKV
    python kernels/bench/gpu/parts.py --output OUT --cache FOLDER

Each part is a process, has a budget, and writes its file as it goes: <device>.json (operators, as
run.py writes it), <device>-tests.jsonl, -variants.json and -training.json; -parts.json says what is
done: by this device, these versions and this code of zoo/ and kernels/. Nothing is installed.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from zoo.kernels.bench.gpu import testing
from zoo.kernels.bench.gpu.running import Part, Record, run_parts
from zoo.kernels.bench.gpu.sources import ROOT

HERE = "kernels/bench/gpu"
RESULTS = ROOT / "kernels" / "bench" / "results"
PROCESSES = min(16, os.cpu_count())
OPERATORS = ("kernels/bench/run.py", f"{HERE}/cases.py", f"{HERE}/workloads.py")
OPERATORS += (f"{HERE}/timing.py", f"{HERE}/checking.py")
# Never on a GPU yet, or changed most since they were.
UNKNOWN = ("RWKV-6", "RWKV-7", "GLA", "decode", "wkv4", "LongNet", "1048576")
ARCHITECTURES = ("rwkv7", "gated_deltanet", "retnet", "rwkv6", "lightning")


def python(script, *arguments):
    return (sys.executable, script, *arguments)


def tests(name, mark, seconds, processes, what):
    """A part that runs the tests of a mark which have not passed yet with this code."""
    return Part(
        name,
        what,
        seconds,
        python(
            f"{HERE}/testing.py",
            *("--mark", mark, "--record", "{output}-tests.jsonl", "--processes", str(processes)),
        ),
        "-tests.jsonl",
        ("tests/gpu_passed.py", *testing.files()),
    )


def operators(name, seconds, arguments, what):
    """A part of run.py, which goes on with the cases that were not measured with this code."""
    given = ("--output", "{output}.json", "--seconds", "{seconds}", "--go-on", *arguments)
    given += ("--processes", str(PROCESSES))
    return Part(name, what, seconds, python(OPERATORS[0], *given), ".json", OPERATORS)


def variants():
    """A part that times all programs that a shape admits."""
    script = f"{HERE}/variants.py"
    given = ("--output", "{output}-variants.json", "--seconds", "{seconds}")
    given += ("--processes", str(PROCESSES))
    what = "wide heads and few small ones: every program that can run them, side by side"
    return Part("variants", what, 80, python(script, *given), "-variants.json", (script,))


def model(name):
    """A part that trains a model of ours and fla's with the same weights."""
    script = f"{HERE}/training.py"
    given = (name, "--output", "{output}-training.json", "--seconds", "{seconds}")
    what = "a training step of 340M parameters beside fla's model: tokens/s, MFU, memory"
    return Part(f"model {name}", what, 30, python(script, *given), "-training.json", (script,))


def parts():
    """All parts in their order."""
    only = [word for name in UNKNOWN for word in ("--only", name)]
    return [
        tests("tests", "gpu and not alone", 150, PROCESSES, "tests not yet passed"),
        tests("tests alone", "gpu and alone", 40, 0, "those that want the device to themselves"),
        operators("unknown operators", 130, only, f"beside fla: {', '.join(UNKNOWN)}"),
        variants(),
        *map(model, ARCHITECTURES),
        operators("operators", 70, (), "the other shapes, and first calls"),
    ]


def setting():
    """{"device", "versions"} of the GPU, asked in a process of its own; None without one."""
    code = (
        "import json, torch; from zoo.kernels.bench.run import versions; "
        "print(json.dumps({'device': torch.cuda.get_device_properties(0).name, "
        "'versions': versions()} if torch.cuda.is_available() else None))"
    )
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    if child.returncode:
        raise RuntimeError(f"{sys.executable} can not be asked for its GPU: {child.stderr.strip()}")
    return json.loads(child.stdout.splitlines()[-1])


def environment(cache=None, setting=None):
    """What every part needs to find: this code, the plugin of the tests, and compiled kernels.

    Args:
        cache: folder of Triton's cache, or None for the usual one.
        setting: what tests pass with, as `setting` gives it.
    """
    found = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    variables = {"PYTHONPATH": os.pathsep.join(filter(None, found)), "OMP_NUM_THREADS": "1"}
    variables |= {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    variables |= {"TRITON_CACHE_DIR": str(cache)} if cache else {}
    return variables | {testing.SETTING: json.dumps(setting, sort_keys=True)}


def slug(device):
    """A device's name as the name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def listing(chosen, record):
    """Lines about the parts, and the sum of what is not done."""
    lines, total = [], 0
    for part in chosen:
        is_done = record is not None and record.is_done(part)
        total += 0 if is_done else part.seconds
        lines.append(f"{part.seconds:5.0f} s  {part.name}: {part.what}{' (done)' * is_done}")
    return [*lines, f"{total:5.0f} s  budgets of what is not done"]


def main(arguments=None):
    """See the module docstring. The exit status: 0 if all parts are done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=float, default=600, help="seconds in all")
    parser.add_argument("--only", default="", help="parts whose name contains this")
    parser.add_argument("--again", action="store_true", help="what is done, too")
    parser.add_argument("--dry-run", action="store_true", help="list the parts, run nothing")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--cache", type=Path, help="kernels compiled by compiled_ahead.py")
    options = parser.parse_args(arguments)
    chosen = [part for part in parts() if options.only in part.name]
    if not chosen:
        names = ", ".join(part.name for part in parts())
        parser.error(f"no part's name contains {options.only!r}; there are: {names}.")
    found = setting()
    if found is None:
        if options.dry_run:
            print("\n".join(listing(chosen, None)))
            return 0
        print(f"make gpu: the torch of {sys.executable} sees no GPU", file=sys.stderr)
        return 1
    options.output.mkdir(parents=True, exist_ok=True)
    output = options.output.resolve() / slug(found["device"])
    record = Record(output.with_name(f"{output.name}-parts.json"), found)
    if options.dry_run:
        print("\n".join(listing(chosen, record)))
        return 0
    if options.cache:
        from zoo.kernels.bench.gpu.compiled_ahead import install

        print(install(options.cache))
    from zoo.kernels.bench.run import commit

    is_done = run_parts(
        chosen,
        record,
        output,
        options.limit,
        commit(),
        options.again,
        environment(options.cache and options.cache.resolve(), found),
    )
    if options.output.resolve() == RESULTS and output.with_name(f"{output.name}.json").exists():
        from zoo.kernels.bench.gpu.tables import write_readme

        write_readme()
    return 0 if is_done else 1


if __name__ == "__main__":
    sys.exit(main())
