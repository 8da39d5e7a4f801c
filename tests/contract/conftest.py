"""What tests of the contract share."""

import subprocess

import pytest
from forks import Forks

# What the contract's script imports before it loads an exported folder, and what transformers does
# as soon as a folder's code asks for a PreTrainedModel.
IMPORTED = [
    "torch",
    "safetensors.torch",
    "transformers.models.auto.modeling_auto",
    "transformers.modeling_utils",
    "transformers.generation.utils",
]


@pytest.fixture(scope="session")
def forks_without_zoo(tmp_path_factory):
    """Forks that have imported transformers and no zoo."""
    # Read when transformers is imported.
    modules = {"HF_MODULES_CACHE": str(tmp_path_factory.mktemp("modules"))}
    forks = Forks(IMPORTED, env=modules | {"HF_HUB_OFFLINE": "1"})
    yield forks
    forks.close()


@pytest.fixture
def scripts_are_forked(forks_without_zoo, monkeypatch):
    """`python -c` begins where transformers is imported already: two seconds less each time."""

    def run(command, *, cwd, **_):
        _, flag, code, *arguments = command
        assert flag == "-c"
        script = cwd / "script.py"
        script.write_text("import sys\nassert 'zoo' not in sys.modules\n" + code)
        fork = forks_without_zoo.start(script, *arguments, cwd=cwd)
        output, errors = fork.communicate()
        errors = errors or f"it ended with {fork.returncode} and said nothing"
        return subprocess.CompletedProcess(command, fork.returncode, output, errors)

    monkeypatch.setattr(subprocess, "run", run)
