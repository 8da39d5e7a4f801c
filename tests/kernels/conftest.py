"""What tests of kernels share."""

import os

import pytest
import torch
from quick_interpreter import quick_interpreter


@pytest.fixture(scope="session", autouse=True)
def a_quick_interpreter():
    """What is interpreted, is so in less than half the time."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        with quick_interpreter():
            yield
    else:
        yield


@pytest.fixture
def uninitialised_memory_is_nan():
    """torch.empty returns NaN: nothing that a kernel leaves unwritten passes a comparison."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
