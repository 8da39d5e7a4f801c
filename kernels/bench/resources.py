"""Compiles what the operators launch, for four targets and without a GPU, and checks what came out.

    make aot                                        check, and print a table
    python kernels/bench/resources.py --update      the same, and rewrite resources.json
    python kernels/bench/resources.py --only RWKV   cases whose name contains RWKV

The operators run on tensors without memory under `recording`, so the kernels, their arguments and
their configurations are those of real calls. Each is compiled ahead of time; registers, shared
memory and instructions are read from the machine code. What must hold:

    compile       it compiles
    spill         no register goes to memory
    shared        shared memory fits
    tensor core   products of bfloat16 are done by tensor cores, on sm_90 by wgmma (HGMMA) alone
    operands      sm_90: a wgmma's operands lie where its descriptors say (sass.py: a bug of the
                  assembler)
    loads         sm_90, heads a multiple of 64: what a loop loads comes asynchronously and 128
                  bits at a time
    occupancy     no fewer programs to a multiprocessor than resources.json says
    head size     each kernel has a configuration for each target and head size that fits
    launches      no more launches in a call than resources.json says
    bytes         memory traffic per token and head at most the case's limit

Triton must not interpret: TRITON_INTERPRET must not be set.
"""

import argparse
import collections
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton

from zoo.kernels.bench.aot.allowed import ALLOWED, excuse
from zoo.kernels.bench.aot.cases import CASES
from zoo.kernels.bench.aot.checks import REMEDIES, check_call, check_figures, check_head_sizes
from zoo.kernels.bench.aot.compiling import compile_job, specialise
from zoo.kernels.launch_triton import TARGETS, recording

HERE = Path(__file__).resolve().parent
TABLE = HERE / "resources.json"
# So many are compiled in less time than another process takes to import what compiles them.
FEW = 10


def collect(cases, targets=TARGETS):
    """What the cases launch: {(case's name, target): launches}."""
    found = {}
    for name, case in cases.items():
        for target in targets:
            with recording(run=False, target=target) as launches:
                case.run()
            found[name, target] = launches
    return found


def compile_all(jobs, processes=2):
    """{job: figures}, in the order of `jobs`, compiled in other processes if they are many."""
    if len(jobs) <= FEW:
        return {job: compile_job(job) for job in jobs}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(jobs) or 1), mp_context=context) as pool:
        return dict(zip(jobs, pool.map(compile_job, jobs), strict=True))


def table_of(rows):
    """Lines of a table; rows are dicts with the same keys."""
    columns = list(rows[0]) if rows else []
    width = {c: max(len(str(c)), *(len(str(row[c])) for row in rows)) for c in columns}
    lines = ["  ".join(str(c).ljust(width[c]) for c in columns)]
    lines += ["  ".join(str(row[c]).ljust(width[c]) for c in columns) for row in rows]
    return [line.rstrip() for line in lines]


def worst_row(a, b):
    """The weaker figures of two jobs with the same key, which differ in what is divisible by 16."""
    if a is None or "error" in a or "error" in b:
        return b if a is None or "error" in b else a
    return a if (a["programs"], -a["registers"]) <= (b["programs"], -b["registers"]) else b


def write_table(calls, kernels):
    """Writes resources.json, a line for each call and kernel; without what does not compile."""
    fields = ("registers", "stack", "shared", "programs")
    rows = {k: {f: row[f] for f in fields} for k, row in kernels.items() if "error" not in row}
    parts = [f'"triton": "{triton.__version__}"']
    for name, part in (("calls", calls), ("kernels", rows)):
        lines = (f"{json.dumps(key)}: {json.dumps(part[key])}" for key in sorted(part))
        parts.append(f'"{name}": {{\n' + ",\n".join(lines) + "\n}")
    TABLE.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def main(arguments=None):
    """Checks all cases; exit status 1 if there is a complaint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="rewrite resources.json")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count()))
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("Triton interprets instead of compiling: unset TRITON_INTERPRET.")
    cases = {name: case for name, case in CASES.items() if options.only in name}
    is_complete = cases.keys() == CASES.keys() and set(options.targets) == set(TARGETS)
    if options.update and not is_complete:
        parser.error("--update writes the whole table: leave out --only and --targets.")

    start = time.perf_counter()
    stored = json.loads(TABLE.read_text()) if TABLE.exists() else {"triton": triton.__version__}
    is_same_triton = stored["triton"] == triton.__version__
    old_calls, old_kernels = stored.get("calls", {}), stored.get("kernels", {})
    if options.update:
        old_calls, old_kernels = {}, {}
    elif not is_same_triton:
        old_kernels = {}

    complaints, calls, users = [], {}, collections.defaultdict(list)
    for (name, target), launches in collect(cases, options.targets).items():
        key = f"{target} {name}"
        calls[key], found = check_call(name, target, cases[name], launches, old_calls.get(key))
        complaints += found
        for launch in launches:
            job = specialise(launch, target, cases[name].is_wide)
            if name not in users[job]:
                users[job].append(name)
    figures = compile_all(list(users), options.processes)
    kernels = {}
    for job in figures:
        complaints += check_figures(job, figures[job], old_kernels.get(job.key))
        kernels[job.key] = worst_row(kernels.get(job.key), figures[job])
    complaints += check_head_sizes(
        [
            (name, job, figures[job])
            for job, names in users.items()
            for name in names
            if cases[name].must_fit
        ]
    )
    standing, excused = excuse(complaints, ALLOWED, is_complete and is_same_triton)
    report(calls, figures, standing, excused)
    print(f"{len(standing)} complaints, {len(excused)} accepted.")
    print(f"{len(figures)} kernels, {len(calls)} calls, {time.perf_counter() - start:.0f} s")
    if not is_same_triton:
        print(
            f"resources.json is of Triton {stored['triton']}, this is {triton.__version__}: "
            "occupancy was not compared."
        )
    if options.update:
        write_table(calls, kernels)
    return 1 if standing else 0


def report(calls, figures, standing, excused):
    """Prints the tables of calls and kernels, and what is wrong."""
    print("\n".join(table_of([{"call": key} | row for key, row in calls.items()])))
    print()
    rows = []
    for job, row in figures.items():
        rows.append(
            {
                "target": job.target,
                "kernel": job.name,
                "regs": row.get("registers", ""),
                "spills": row.get("spilled", ""),
                "shared": row.get("shared", ""),
                "programs": row.get("programs", ""),
                "mma": row.get("tensor_core", ""),
                "copies": row.get("wide_copies", ""),
                "waits": row.get("waits", ""),
                "s": row.get("seconds", ""),
                "configuration": job.configuration,
            }
        )
    print("\n".join(table_of(rows)))
    print()
    for reason in dict.fromkeys(reason for _, reason in excused):
        print(f"Accepted: {reason}")
        print("\n".join(f"    {c.check}: {c}" for c, why in excused if why == reason))
    for check in dict.fromkeys(complaint.check for complaint in standing):
        print(f"COMPLAINT, {check}: {REMEDIES[check]}")
        print("\n".join(f"    {c}" for c in dict.fromkeys(standing) if c.check == check))


if __name__ == "__main__":
    # Workers import this file under its own name, and their kernels as zoo.kernels.
    sys.exit(main())
