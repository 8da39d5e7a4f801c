"""What tests of kernels share."""

import os
from pathlib import Path

import pytest
import torch
from forks import Forks
from quick_interpreter import quick_interpreter

ROOT = Path(__file__).resolve().parents[2]
# What compiles kernels, and lists them.
COMPILERS = [
    "zoo.kernels.bench.gpu.compiled_ahead",
    "zoo.kernels.bench.gpu.cases",
    "zoo.kernels.bench.gpu.checking",
    "zoo.kernels.bench.resources",
    "pytest",
]


@pytest.fixture(scope="session", autouse=True)
def a_quick_interpreter():
    """What is interpreted, is so in less than half the time."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        with quick_interpreter():
            yield
    else:
        yield


@pytest.fixture(scope="session")
def compilers():
    """Starts forks of a process in which Triton compiles, and everything is imported.

    `compilers(file, *arguments, **environment)` runs a file in one and returns what it wrote.
    """
    path = [ROOT, ROOT / "tests/kernels", ROOT / "tests/parity"]
    forks = Forks(COMPILERS, path, {"TRITON_INTERPRET": "0"})

    def run(file, *arguments, **environment):
        environment = {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT), **environment}
        fork = forks.start(file, *arguments, cwd=ROOT, env=environment)
        output, errors = fork.communicate(timeout=3600)
        assert fork.returncode == 0, (output + errors)[-5000:]
        return output

    yield run
    forks.close()


@pytest.fixture
def uninitialised_memory_is_nan():
    """torch.empty returns NaN: nothing that a kernel leaves unwritten passes a comparison."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
