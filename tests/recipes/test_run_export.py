"""A finished run, exported, and loaded where zoo cannot be imported."""

import os
import subprocess
import sys

import pytest

EXPORT = """
import sys
from zoo.cli import main
sys.exit(main())
"""


@pytest.mark.slow
def test_an_exported_run_continues_a_prompt(workshop, forks):
    assert workshop.run("--steps", "26", "--eval_every", "0").returncode == 0
    script = workshop.folder / "export.py"
    script.write_text(EXPORT)
    fork = forks().start(script, "export", "tiny", "exported", cwd=workshop.folder)
    _, errors = fork.communicate()
    assert fork.returncode == 0, errors
    # No fork: it must not have imported zoo.
    environment = {**os.environ, "PYTHONPATH": str(workshop.root), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, str(workshop.root / "recipes/try_export.py"), "exported", "def f("],
        cwd=workshop.folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "loaded without importing zoo" in result.stdout
    assert "\ndef f(" in result.stdout
