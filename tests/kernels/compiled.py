"""`make aot`, but a kernel that has not changed since is not compiled again.

    python tests/kernels/compiled.py            check all, compile what is not in compiled.json
    python tests/kernels/compiled.py --write    the same, and bring compiled.json up to date

compiled.json holds what resources.py read from the machine code of each compilation, by a hash of
all that goes into it: Triton's version, the kernel's source with that of every function it calls,
the argument types and constants, the target, and the code that reads the figures. With the same
hash the compiler would say the same again, which it is asked about a few of them each time.
"""

import functools
import hashlib
import importlib
import inspect
import json
import sys
from pathlib import Path

import triton
from triton.compiler import ASTSource

from zoo.kernels.bench import resources, sass
from zoo.kernels.bench.aot import compiling, devices, reading

FILE = Path(__file__).with_suffix(".json")
# Of so many known compilations one is done again.
SAMPLED = 80


@functools.cache
def readers():
    """What compiles a kernel and turns machine code into figures, as text."""
    parts = compiling.compile_job, reading.read_amd, reading.read_sass, reading.read_loads
    parts += devices.occupancy, sass
    return "".join(map(inspect.getsource, parts)) + repr(devices.DEVICES)


def key_of(job):
    """A hash of all that the figures of a `Job` depend on."""
    module, name = job.kernel.split(":")
    kernel = getattr(importlib.import_module(module), name)
    source = ASTSource(kernel, dict(job.signature), dict(job.constants)).hash()
    parts = (source, job._replace(is_wide=None), triton.__version__, readers())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def compile_changed(jobs, processes, compile_all=resources.compile_all):
    """As `resources.compile_all`, with the figures in compiled.json for what has not changed."""
    stored = json.loads(FILE.read_text()) if FILE.exists() else {}
    keys = {job: key_of(job) for job in jobs}
    known = sorted((job for job in jobs if keys[job] in stored), key=keys.get)
    changed = [job for job in jobs if keys[job] not in stored]
    found = compile_all(changed + known[::SAMPLED], processes)
    for job in known[::SAMPLED]:
        again = {name: x for name, x in found[job].items() if name != "seconds"}
        if again != stored[keys[job]]:
            raise SystemExit(
                f"{FILE.name} is not what the compiler says: {job.key}: expected "
                f"{stored[keys[job]]}, got {again}; delete it, run `{sys.argv[0]} --write`."
            )
    figures = {job: found.get(job) or stored[keys[job]] for job in jobs}
    print(f"compiled: {len(changed)} that changed, {len(known[::SAMPLED])} of {len(known)} again")
    if "--write" in sys.argv:
        rows = {keys[job]: figures[job] for job in jobs}
        for row in rows.values():
            row.pop("seconds", None)
        lines = (f"{json.dumps(key)}: {json.dumps(rows[key])}" for key in sorted(rows))
        FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return figures


if __name__ == "__main__":
    resources.compile_all = compile_changed
    sys.exit(resources.main([]))
