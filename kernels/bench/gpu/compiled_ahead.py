"""Kernels compiled here, without a GPU, into a cache that Triton finds them in on another machine.

    python kernels/bench/gpu/compiled_ahead.py FOLDER                     for this Python's Triton
    python kernels/bench/gpu/compiled_ahead.py FOLDER --wheel TRITON.whl  for another Python's
    make gpu GPU="--cache FOLDER"                                         there

Operators run on tensors without memory; of Triton everything runs but what needs a driver, which
says sm_90 in its stead. So keys are those of real calls: of the source, the arguments, the options,
ptxas' version, and all of Triton's own files, its shared library too. That is another one for each
version of Python: `--wheel` is the file that the other machine's Triton was installed from. Triton
here must be of the same version.

Beside each kernel lie the paths of its files, which `install` writes anew where they lie now.
"""

import argparse
import collections
import contextlib
import hashlib
import importlib
import itertools
import json
import math
import os
import sys
import tempfile
import time
import types
import zipfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from unittest import mock

import torch
import triton
import triton.runtime.cache
from triton.backends.compiler import GPUTarget

from zoo.kernels.bench.gpu.sources import ROOT

ABOUT = "compiled_for.json"
TESTS = ("test_gpu", "test_dilated_attention_gpu")
# These ask the device itself, or launch what the others do.
LEFT_OUT = ("compiles_whole", "capture", "fla_computes", "host", "peak_memory")


class _Driver:
    """Of a machine with one H200 on which launches do nothing."""

    def __init__(self):
        # On the instance: Triton takes one for a driver that has them.
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device=0: 0
        self.launcher_cls = lambda *_: lambda *_: None
        properties = {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}
        self.utils = types.SimpleNamespace(
            load_binary=lambda *_: (0, 0, 0, 0, 1024), get_device_properties=lambda _: properties
        )

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def key_of_triton(package=None):
    """The word that Triton has for itself.

    Args:
        package: a folder "triton" of the same version, for another Python; None: the one here.
    """
    function = getattr(triton.runtime.cache.triton_key, "__wrapped__", None)
    function = function or triton.runtime.cache.triton_key
    if package is None:
        return function()
    place = str(Path(package) / "runtime" / "cache.py")
    return types.FunctionType(
        function.__code__, {**vars(triton.runtime.cache), "__file__": place}
    )()


@contextlib.contextmanager
def compiling(folder, key):
    """Operators take tensors on the meta device for a GPU's; what they launch is compiled."""
    if triton.knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET is set: nothing would be compiled; unset it.")
    from zoo.kernels import delta_recurrence, dilated_attention, linear_recurrence, token_mix, wkv4

    with contextlib.ExitStack() as stack:
        for module in (linear_recurrence, delta_recurrence, wkv4, dilated_attention, token_mix):
            stack.enter_context(mock.patch.object(module, "choose_backend", lambda *_: "triton"))
        replace = mock.patch.object
        stack.enter_context(replace(triton.runtime.driver, "_active", _Driver()))
        stack.enter_context(replace(triton.runtime.cache, "triton_key", lambda: key))
        known = {"TRITON_CACHE_DIR": str(folder), "TRITON_STORE_BINARY_ONLY": "1"}
        stack.enter_context(mock.patch.dict(os.environ, known))
        yield


def jobs():
    """What to compile: (kind, name) pairs."""
    from zoo.kernels.bench.gpu.cases import CASES
    from zoo.kernels.bench.gpu.variants import SHAPES

    found = [("case", name) for name in CASES] + variants_of(SHAPES)
    with _tests_importable():
        return found + [("test", name) for name in tests()]


def variants_of(names):
    """Jobs of the programs that variants.py times for some shapes."""
    from zoo.kernels.bench.gpu.cases import CASES
    from zoo.kernels.bench.gpu.variants import candidates

    workloads = {name: CASES[name].make(torch.device("meta"), False) for name in names}
    return [("variant", f"{n}: {words}") for n, x in workloads.items() for words in candidates(x)]


@contextlib.contextmanager
def _tests_importable():
    folder = str(ROOT / "tests" / "kernels")
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def tests():
    """{name: a call without arguments} of the tests' functions, on tensors without memory."""
    found = {}
    for name in TESTS:
        module = importlib.import_module(name)
        for other in {module, importlib.import_module(TESTS[0])}:
            other.DEVICE, other.IS_TINY, other.Random = "meta", False, _Random
            other.in_float64 = _end
        if name != TESTS[0]:
            module.LENGTHS = [2048, 4096, 8192, 16384]
        for test, function in vars(module).items():
            is_left_out = any(word in test for word in LEFT_OUT)
            if is_left_out or not test.startswith("test_") or not callable(function):
                continue
            marks = [m for m in getattr(function, "pytestmark", []) if m.name == "parametrize"]
            for chosen in itertools.product(*(_values(mark) for mark in marks)):
                keyword = dict(itertools.chain.from_iterable(chosen))
                label = f"{name}::{test}[{', '.join(map(str, keyword.values()))}]"
                found[label] = lambda function=function, keyword=keyword: function(**keyword)
    return found


def _values(mark):
    """The sets of arguments of a mark, as pairs."""
    names = mark.args[0]
    names = [x.strip() for x in names.split(",")] if isinstance(names, str) else list(names)
    for value in mark.args[1]:
        yield list(zip(names, value if len(names) > 1 else [value]))


def _end(*_, **__):
    """In place of the tests' references: all that is compared with them was launched."""
    raise StopIteration("at its reference")


class _Random:
    """In place of the tests' random numbers."""

    def __init__(self, seed=0):
        pass

    def __call__(self, *shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")


def compile_job(job, folder, key):
    """Compiles what a job launches; what is wrong with it, or None."""
    from zoo.kernels.bench.gpu.cases import CASES
    from zoo.kernels.bench.gpu.checking import calls, first_line
    from zoo.kernels.bench.gpu.variants import candidates
    from zoo.kernels.segments_triton import override

    kind, name = job
    with compiling(folder, key):
        try:
            if kind == "test":
                with _tests_importable():
                    tests()[name]()
                return None
            name, _, words = name.partition(": ")
            workload = CASES[name].make(torch.device("meta"), False)
            with override(**(candidates(workload)[words] if words else {})):
                for mode in CASES[name].modes:
                    calls(workload, mode)["ours"]()
        except Exception as error:  # a test looks at values in the end, which there are none of
            return first_line(error)


def compile_all(folder, key, chosen, processes, seconds=None):
    """Compiles jobs in child processes; what went wrong, by job.

    Args:
        folder: of a cache.
        key: of a Triton, as `key_of_triton` gives it.
        chosen: jobs.
        processes: how many at a time.
        seconds: after them none is begun.
    """
    wrong, end = {}, time.monotonic() + (math.inf if seconds is None else seconds)
    with ProcessPoolExecutor(processes) as pool:
        futures = {pool.submit(_unless_late, end, job, folder, key): job for job in chosen}
        for future in as_completed(futures):
            if said := future.result():
                wrong[futures[future]] = said
    return wrong


def _unless_late(end, *arguments):
    return compile_job(*arguments) if time.monotonic() < end else "out of time"


def fill(folder, key, chosen, processes):
    """`compile_all` into a folder of its own, to be carried elsewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {"triton": triton.__version__, "key": _short(key)}
    (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
    wrong = compile_all(folder, key, chosen, processes)
    for path in folder.glob("*/*.source"):  # of no use but to read
        path.unlink()
    return wrong


def kernels(folder):
    """The folders of compiled kernels."""
    return sorted(path.parent for path in folder.glob("*/*.cubin"))


def _short(key):
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def install(folder):
    """Makes a filled folder one for this place; a line about it."""
    folder = Path(folder).resolve()
    about = json.loads((folder / ABOUT).read_text())
    for path in folder.glob("*/__grp__*"):
        names = json.loads(path.read_text())["child_paths"]
        places = {name: str(path.parent / name) for name in names}
        path.write_text(json.dumps({"child_paths": places}))
    said = f"{len(kernels(folder))} compiled kernels of triton {about['triton']}"
    if _short(key_of_triton()) == about["key"]:
        return f"{said}, which this Triton ({triton.__version__}) finds"
    return f"{said}, for another build than this ({triton.__version__}): none will be found"


def main(arguments=None):
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="to write to")
    parser.add_argument("--wheel", type=Path, help="of the other machine's Triton")
    parser.add_argument("--only", default="", help="jobs whose kind and name contain this")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        package = None
        if options.wheel:
            if f"triton-{triton.__version__}-" not in options.wheel.name:
                parser.error(f"Triton here is {triton.__version__}, that is {options.wheel.name}.")
            zipfile.ZipFile(options.wheel).extractall(place)
            package = Path(place) / "triton"
        key = key_of_triton(package)
    chosen = [job for job in jobs() if options.only in " ".join(job)]
    wrong = fill(options.folder.resolve(), key, chosen, options.processes)
    words = collections.Counter(said for (kind, _), said in wrong.items() if kind == "test")
    for (kind, name), said in wrong.items():
        if kind != "test":
            print(f"{kind} {name}: {said}")
    for said, count in words.most_common():
        print(f"{count} tests ended with: {said}")
    found = kernels(options.folder)
    size = sum(path.stat().st_size for path in options.folder.rglob("*") if path.is_file())
    print(f"{len(found)} kernels, {size / 1e6:.1f} MB, in {options.folder}")


if __name__ == "__main__":
    main()
