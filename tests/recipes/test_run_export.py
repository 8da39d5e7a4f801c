"""A finished run, exported, and loaded where zoo cannot be imported."""

import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_an_exported_run_continues_a_prompt(workshop):
    assert workshop.run("--steps", "26", "--eval_every", "0").returncode == 0
    environment = {**os.environ, "PYTHONPATH": str(workshop.root), "OMP_NUM_THREADS": "1"}
    export = "import sys; from zoo.cli import main; sys.exit(main())"
    commands = [
        [sys.executable, "-c", export, "export", "tiny", "exported"],
        [sys.executable, str(workshop.root / "recipes/try_export.py"), "exported", "def f("],
    ]
    for command in commands:
        result = subprocess.run(
            command, cwd=workshop.folder, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
    assert "loaded without importing zoo" in result.stdout
    assert "\ndef f(" in result.stdout
