"""Kernels that are wrong on purpose: the checks of the other files must notice each of them."""

import faulthandler
import gc
import importlib.util
import multiprocessing
import sys
from pathlib import Path

import pytest
import test_linear_recurrence_triton as scan
import torch

from zoo.kernels import linear_recurrence_triton


def mutant(original, line, replacement, folder):
    """A copy of a module, one place of its source changed."""
    path = Path(original.__file__)
    source = path.read_text()
    assert source.count(line) == 1, f"{path.name} has {source.count(line)} times: {line}"
    copy = folder / f"mutant_{path.name}"
    copy.write_text(source.replace(line, replacement))
    # In the package, so that the imports of its neighbours work.
    name = f"zoo.kernels.{copy.stem}"
    spec = importlib.util.spec_from_file_location(name, copy)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def is_wrong(**choices):
    """The check that values and gradients are those of the definition, as one that must fail."""

    def check(module):
        return not scan.error(module.linear_recurrence_triton, **choices) < scan.FLOAT32

    return check


def leaves_its_memory(module):
    """Reading far outside is not survived, so this runs in a process of its own."""

    def check():
        faulthandler.disable()  # its death is expected, and not worth a page of traceback
        scan.check_offsets(module.forward)

    gc.collect()  # gigabytes that nobody holds any more count for a fork all the same
    process = multiprocessing.get_context("fork").Process(target=check)
    process.start()
    process.join()
    return process.exitcode != 0


MUTANTS = {
    "mask off by one": (
        "visible = r[:, None] >= r[None, :]",
        "visible = r[:, None] > r[None, :]",
        is_wrong(shape=(1, 33, 1, 16, 16)),
    ),
    "missing decay between chunks": (
        "            state *= tl.exp2(total)\n            if REVERSE:",
        "            if REVERSE:",
        is_wrong(shape=(1, 70, 1, 16, 16)),
    ),
    "stale state across documents": (
        "begin = tl.load(offsets + n)",
        "begin = tl.load(offsets + tl.maximum(n - 1, 0))",
        is_wrong(packed=True, segment=48, shape=(1, 150, 1, 16, 16)),
    ),
    "32-bit offsets": (
        "token = t + r\n        inside = token < end\n        at_a",
        "token = (t + r).to(tl.int32)\n        inside = token < end\n        at_a",
        leaves_its_memory,
    ),
    "wrong slice": (
        "rz = slice * BZ + tl.arange(0, BZ)",
        "rz = tl.arange(0, BZ)",
        is_wrong(shape=(1, 33, 1, 16, 60)),
    ),
    "missing gradient of the initial state": (
        "dv, transposed=False, leaving=left,",
        "dv, transposed=False,",
        is_wrong(shape=(1, 33, 1, 16, 16)),
    ),
    "unmasked tail": (
        "token = t + r\n        inside = token < end\n        at_a",
        "token = t + r\n        inside = token < num_tokens\n        at_a",
        is_wrong(packed=True, shape=(1, 150, 1, 16, 16)),
    ),
    "state in bfloat16": (
        "    if leaving is not None:",
        "        state = rounded(state, tl.bfloat16).to(tl.float32)\n    if leaving is not None:",
        is_wrong(shape=(1, 70, 1, 16, 16)),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_caught(name, tmp_path):
    line, replacement, is_caught = MUTANTS[name]
    # torch.empty returns NaN, except where it would fill gigabytes.
    torch.use_deterministic_algorithms(is_caught is not leaves_its_memory, warn_only=True)
    assert not is_caught(linear_recurrence_triton)
    assert is_caught(mutant(linear_recurrence_triton, line, replacement, tmp_path))
    torch.use_deterministic_algorithms(False)
