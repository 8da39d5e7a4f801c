"""A finished run, exported, and loaded where zoo cannot be imported."""

import pytest

EXPORT = """
import sys
from zoo.cli import main
sys.exit(main())
"""


@pytest.mark.slow
def test_an_exported_run_continues_a_prompt(workshop, forks, forks_without_zoo):
    assert workshop.run("--steps", "26", "--eval_every", "0").returncode == 0
    script = workshop.folder / "export.py"
    script.write_text(EXPORT)
    fork = forks().start(script, "export", "tiny", "exported", cwd=workshop.folder)
    _, errors = fork.communicate()
    assert fork.returncode == 0, errors
    script = workshop.root / "recipes/try_export.py"
    fork = forks_without_zoo.start(script, "exported", "def f(", cwd=workshop.folder)
    output, errors = fork.communicate()
    assert fork.returncode == 0, errors
    assert "loaded without importing zoo" in output
    assert "\ndef f(" in output
