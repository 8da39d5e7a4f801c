"""What tests of several processes share."""

import pytest
from processes import Processes


@pytest.fixture(scope="session")
def processes():
    """Forks that have imported PyTorch and the zoo."""
    processes = Processes()
    yield processes
    processes.close()
