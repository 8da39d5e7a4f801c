"""transformers' Trainer on all models, in the library and as exported folders."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trainer_runs import check

import zoo
from zoo.contract.subject import zoo_subject
from zoo.hub.export import export

SCRIPT = Path(__file__).with_name("trainer_runs.py")


@pytest.mark.parametrize("name", zoo.MODELS)
def test_trainer(name, tmp_path):
    subject = zoo_subject(name)
    check(lambda: subject.model(torch.float32), tmp_path)


@pytest.mark.slow
def test_trainer_on_exported_folders(tmp_path):
    folders = []
    for name in zoo.MODELS:
        zoo_subject(name).model(torch.float32).save_pretrained(tmp_path / "saved" / name)
        folders.append(tmp_path / "exported" / name)
        export(tmp_path / "saved" / name, folders[-1], license="apache-2.0")
    result = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path / "scratch"), *map(str, folders)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    lines = [line for line in result.stdout.splitlines() if line.startswith("exported ")]
    assert lines == [f"exported {name} ok" for name in zoo.MODELS]
