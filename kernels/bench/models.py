"""Times whole models on one thread of a CPU, beside transformers' and other people's, in turns.

    make bench                                     operators (cpu.py), then this
    python kernels/bench/models.py --only rwkv7    some of ours, with Mistral
    python kernels/bench/models.py --sizes "6 x 512" --dtypes float32 --tasks "step 1,generate 1"
    python kernels/bench/models.py --compile       what torch.compile gives, for some of them
    python kernels/bench/models.py --table         README.md's tables, from results/models.json

Every architecture of ours at two sizes, in float32 and bfloat16: prefill of 1,024 tokens, decoding
after 512 by model calls (`step`) and by `generate`, for 1 and 8 texts, and a training step of 1,024
tokens (forward, loss, backward; no optimizer; bfloat16 by autocast, as recipes train). What is
compared runs in the same process in turns, and each turn's CPU time is taken; a matrix product and
a product with a vector take part, so that shares of the machine's ceilings are of the same minutes.

The file is written after every case; one that is there for this commit, machine and libraries is
not run again. The commit is the last that changed zoo/ or kernels/ outside kernels/bench.
"""

import argparse
import gc
import importlib.metadata
import json
import platform
import re
import subprocess
import time
from pathlib import Path

import torch

from zoo.kernels.bench.cpu_models import tables
from zoo.kernels.bench.cpu_models.contenders import (
    COMPILABLE,
    COMPILED,
    GROUPS,
    MISTRAL,
    PEERS,
    QUICK,
    SIZES,
)
from zoo.kernels.bench.cpu_models.measuring import Group, measure
from zoo.kernels.bench.cpu_models.peers import missing

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "models.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TASKS = tuple(tables.COLUMNS)
# Rounds of prefill, of decoding one text and eight (4 tokens each), of training, by layers.
ROUNDS = {2: (3, 3, 2, 2), 6: (4, 8, 4, 2), 12: (2, 4, 2, 2)}


def device():
    """The processor's name, and its instructions for matrix products."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
        name = found[1] if found else name
    has = torch.cpu.get_capabilities()
    wanted = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16", "sve", "bf16")
    return ", ".join([name, *(x for x in wanted if has.get(x))])


def versions():
    """Of what a result depends on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("transformers", "rwkv", "llama-cpp-python"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit():
    """The last commit that changed what is measured, "+" with changes on top; None outside git."""
    watched = ["--", "zoo", "kernels", ":(exclude)kernels/bench"]

    def git(*arguments):
        command = ["git", "-c", "safe.directory=*", "-C", str(HERE.parents[1]), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    try:
        name = git("log", "-1", "--format=%h", *watched)
        return name + "+" * bool(git("status", "--porcelain", "-uno", *watched)) if name else None
    except OSError:
        return None


def run(options, output, sizes):
    """Measures what is asked for and not there yet; writes the file after each case."""
    record = {"device": device(), "versions": versions(), "models": {}, "cases": {}}
    if output and output.exists():
        old = json.loads(output.read_text())
        if all(old[name] == record[name] for name in ("device", "versions")):
            record = old
    this_commit, started = commit(), time.process_time()
    for size_name, size in sizes.items():
        for group, names in chosen(options.only, options.compile).items():
            for name, task, entry in cases_of(
                options, record, this_commit, (size_name, size), (group, [MISTRAL, *names])
            ):
                write(record, output)
                tell(name, task, entry, time.process_time() - started)
            gc.collect()  # the next group's models take this one's room


def cases_of(options, record, this_commit, named_size, named_group):
    """Measures a group's cases at a size, and yields (name, task, entry) after each.

    What holds the models is this generator's, so that they go with it.
    """
    size_name, size = named_size
    group, names = named_group
    models = Group(size, names)
    for dtype_name, task in orders(options.dtypes, options.tasks):
        name = tables.key(size_name, dtype_name, task, group)
        old = record["cases"].get(name, {})
        old = old if old.get("commit") == this_commit else {"by": {}, "asked": []}
        is_there = set(models.names) <= set(old["asked"])
        if is_there and not options.again:
            continue
        dtype = DTYPES[dtype_name]
        # Weights stay float32 while a model trains: autocast rounds them.
        contenders = models.contenders(torch.float32 if task == "training" else dtype, task)
        kinds = dict(zip(("prefill", "1", "8", "training"), ROUNDS[size.layers]))
        entry = measure(task, contenders, dtype, options.rounds * kinds[task.split()[-1]])
        entry["by"] |= {x: {"failed": why} for x, why in models.broken.items()}
        asked = [*old["asked"], *(x for x in models.names if x not in old["asked"])]
        entry |= {"commit": this_commit, "asked": asked, "by": old["by"] | entry["by"]}
        record["cases"][name] = entry
        for x in contenders.values():
            of_model = {"parameters": x.parameters, "mlp": x.mlp}
            record["models"][f"{size_name}, {x.name}"] = of_model
        yield name, task, entry


def orders(dtypes, tasks):
    """(dtype, task) in an order that moves weights once: training while they are float32."""
    own = [("float32", task) for task in tasks if "float32" in dtypes]
    own += [("bfloat16", "training")] if "bfloat16" in dtypes and "training" in tasks else []
    return own + [("bfloat16", x) for x in tasks if "bfloat16" in dtypes and x != "training"]


def chosen(only, is_compiled):
    """The groups, of those names alone if there are any; peers that are missing are told."""
    if is_compiled:
        names = [x for x in COMPILABLE if not only or x in only]
        return {"compiled": [y for x in names for y in (x, x + COMPILED) if y != MISTRAL]}
    found = {}
    for group, names in GROUPS.items():
        names = [x for x in names + PEERS[group] if not only or x in only]
        for name in [x for x in names if x in PEERS[group]]:
            why = missing(name)
            if why:
                print(why)
                names.remove(name)
        if names:
            found[group] = names
    return found


def write(record, output):
    if output:
        unfinished = output.with_suffix(".part")
        unfinished.write_text(json.dumps(record, indent=1) + "\n")
        unfinished.replace(output)


def tell(name, task, entry, spent):
    """A line for each contender."""
    print(f"{name} ({spent:.0f} s so far)", flush=True)
    heading, unit = tables.COLUMNS[task]
    for who, x in entry["by"].items():
        said = (
            x.get("failed") or f"{tables.digits(x['seconds'] * unit):>7} {heading.split(', ')[1]}"
        )
        said += f", {x['ratio']:.2f}x as fast as Mistral" if "ratio" in x else ""
        said += f", {x['share']:.0%} of the ceiling" if "share" in x else ""
        print(f"  {who:22} {said}", flush=True)


def main(arguments=None):
    """Measures, or writes the tables; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])

    def some(known):
        def read(text):
            names = [x.strip() for x in text.split(",") if x.strip()]
            for name in names:
                if name not in known:
                    raise argparse.ArgumentTypeError(
                        f"expected some of {', '.join(known)}, got {name!r}"
                    )
            return names

        return read

    names = [x for group in (GROUPS, PEERS) for found in group.values() for x in found]
    names.append(MISTRAL)
    parser.add_argument("--only", type=some(names), default=[], help="contenders beside Mistral")
    parser.add_argument("--sizes", type=some(list(SIZES)), default=list(SIZES))
    parser.add_argument("--dtypes", type=some(list(DTYPES)), default=list(DTYPES))
    parser.add_argument("--tasks", type=some(TASKS), default=list(TASKS))
    parser.add_argument("--again", action="store_true", help="measure what is there, too")
    parser.add_argument("--compile", action="store_true", help="what torch.compile gives some")
    parser.add_argument("--rounds", type=int, default=1, help="so many times the samples")
    parser.add_argument("--quick", action="store_true", help="tiny models, to test this script")
    parser.add_argument("--table", action="store_true", help="rewrite README.md's tables alone")
    parser.add_argument("--output", type=Path, help="result file (default: results/models.json)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    output = options.output or (None if options.quick else RESULTS)
    if not options.table:
        run(options, output, QUICK if options.quick else {x: SIZES[x] for x in options.sizes})
    if output == RESULTS and RESULTS.exists():
        text = tables.README.read_text()
        tables.README.write_text(tables.with_tables(text, json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
