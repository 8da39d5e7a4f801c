"""What other libraries make of an exported folder, where they are installed: tests/ecosystem.py.

By hand, that script goes through every architecture, and two libraries that are too large for here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
APART = Path(os.environ.get("ECOSYSTEM_LIBRARIES", ROOT / ".venv"))
NEEDS = {"trl_sft": "trl", "trl_packed": "trl", "torchao": "torchao", "quanto": "quanto"}
LIBRARIES = [
    "pipelines",
    "trainer",
    "trl_sft",
    "trl_packed",
    "peft",
    "torchao",
    "quanto",
    "accelerate_dispatch",
    "torch_export",
]


def is_installed(library):
    folder = NEEDS.get(library)
    return folder is None or (APART / folder).is_dir()


@pytest.mark.slow
def test_exported_folder():
    """One process for all of them, with a state of matrices and a window of the last tokens."""
    name, chosen = "gated_deltanet", [x for x in LIBRARIES if is_installed(x)]
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "ecosystem.py")]
    result = subprocess.run(
        [*command, "--only", name, "--libraries", ",".join(chosen)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert result.stdout, result.stderr[-3000:]
    assert json.loads(result.stdout.splitlines()[-1]) == {name: dict.fromkeys(chosen, "ok")}
    missing = sorted({NEEDS[x] for x in LIBRARIES if x not in chosen})
    if missing:
        pytest.skip(f"all but {', '.join(missing)}, not installed; `make` does it")
