"""What tests of kernels share."""

import pytest
import torch
from triton.runtime import interpreter


@pytest.fixture(scope="session", autouse=True)
def a_quick_interpreter():
    """Triton's interpreter, which prepares its language once a launch, not in each helper's call.

    It goes through every function of `triton.language` at each call of a jitted helper, to replace
    what the launch has replaced already: 40% of the time of these tests.
    """
    prepare, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    prepared = set()

    def prepare_once(function):
        module = function.__globals__["__name__"]
        if module in prepared:
            return interpreter._LangPatchScope()
        prepared.add(module)
        return prepare(function)

    def launch_unprepared(self, *args, **kwargs):
        prepared.clear()
        return launch(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", prepare_once)
        patch.setattr(interpreter.GridExecutor, "__call__", launch_unprepared)
        yield


@pytest.fixture
def uninitialised_memory_is_nan():
    """torch.empty returns NaN: nothing that a kernel leaves unwritten passes a comparison."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
