"""What tests of kernels share."""

import pytest
import torch


@pytest.fixture
def uninitialised_memory_is_nan():
    """torch.empty returns NaN: nothing that a kernel leaves unwritten passes a comparison."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
