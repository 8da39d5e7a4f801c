"""What tests of the contract share."""

import multiprocessing
import subprocess
from multiprocessing import forkserver

import pytest

# What the contract's script imports before it loads an exported folder.
PRELOADED = ["torch", "safetensors.torch", "transformers.models.auto.modeling_auto"]
START = """
import os, sys
sys.argv[1:] = {arguments!r}
os.chdir({folder!r})
sys.stderr = open("errors", "w")
assert "zoo" not in sys.modules
"""


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory):
    """A process that has imported transformers and no zoo; others are forked from it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        # Read when transformers is imported.
        patch.setenv("HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        forkserver.ensure_running()
    return context


@pytest.fixture
def scripts_are_forked(fork_server, monkeypatch):
    """`python -c` begins where transformers is imported already: two seconds less each time."""

    def run(command, *, cwd, **_):
        _, flag, code, *arguments = command
        assert flag == "-c"
        code = START.format(arguments=arguments, folder=str(cwd)) + code
        child = fork_server.Process(target=exec, args=(code, {"__name__": "__main__"}))
        child.start()
        child.join()
        errors = (cwd / "errors").read_text() or f"it ended with {child.exitcode} and said nothing"
        return subprocess.CompletedProcess(command, child.exitcode, "", errors)

    monkeypatch.setattr(subprocess, "run", run)
