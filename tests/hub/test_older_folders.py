"""Exports of every format version load, by zoo and by the code that lies in them."""

import json
import shutil
import subprocess
import sys
import tarfile

import pytest
import torch
from compat import judge, load
from freeze import FROZEN
from load_exports import ERROR, OWNER, RECORDED
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import zoo
from zoo.core.versions import FORMAT_VERSION
from zoo.hub.export import export
from zoo.hub.outline import check_weights

VERSIONS = range(1, FORMAT_VERSION + 1)


@pytest.fixture(scope="module", params=VERSIONS)
def frozen(request, tmp_path_factory):
    """The exports of one version, unpacked."""
    folder = tmp_path_factory.mktemp(f"version{request.param}")
    with tarfile.open(FROZEN / f"{request.param}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def recorded(frozen):
    return load_file(frozen / RECORDED)


def compare(model, name, recorded):
    inputs = {key: recorded[key] for key in ("input_ids", "attention_mask")}
    expected, new = recorded[f"{name}.logits"].double(), recorded[f"{name}.greedy"]
    with torch.no_grad():
        logits = model(**inputs).logits[inputs["attention_mask"].bool()]
        options = {"max_new_tokens": new.shape[1], "do_sample": False, "eos_token_id": None}
        greedy = model.generate(**inputs, **options)[:, -new.shape[1] :]
    assert (logits - expected).abs().max() <= ERROR * expected.abs().max()
    assert torch.equal(greedy, new)


def test_an_archive_of_every_version():
    assert sorted(path.name for path in FROZEN.iterdir()) == [f"{n}.tar.xz" for n in VERSIONS]
    for path in FROZEN.iterdir():
        assert path.stat().st_size <= 200_000


def test_every_model_is_there(frozen):
    # One that is new is in the archives from the next version on.
    names = {path.parent.name for path in frozen.glob("*/config.json")}
    assert names <= set(zoo.MODELS)
    assert len(names) >= 11
    for name in names:
        config = json.loads((frozen / name / "config.json").read_text())
        assert f"version{config['format_version']}" in frozen.name
        assert list((frozen / name).glob("*.py"))


@pytest.mark.parametrize("name", zoo.MODELS)
def test_by_zoo(frozen, recorded, name, tmp_path):
    if not (frozen / name).is_dir():
        pytest.skip(f"{name} was not there yet")
    check_weights(frozen / name)
    export(frozen / name, tmp_path / "exported")
    for folder in (frozen / name, tmp_path / "exported"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        assert type(model) is zoo.MODELS[name].causal_lm
        compare(model, name, recorded)


@pytest.fixture
def forked(forks_without_zoo, monkeypatch):
    """What compat.py runs is a fork that has imported transformers already."""

    def run(command, cwd, **_):
        fork = forks_without_zoo.start(*command[1:], cwd=cwd)
        output, errors = fork.communicate()
        return subprocess.CompletedProcess(command, fork.returncode, output, errors)

    monkeypatch.setattr(subprocess, "run", run)
    yield
    # Of each version under the same names, and with the same commit.
    home = forks_without_zoo.home
    shutil.rmtree(home / "modules/transformers_modules" / OWNER)
    for folder in home.glob(f"hub/models--{OWNER}--*"):
        shutil.rmtree(folder)


@pytest.mark.slow
def test_by_their_own_code(frozen, forked):
    """In a process without zoo, by name from huggingface_hub's cache."""
    result = load(sys.executable, "by-id", frozen)
    assert "models" in result, result
    assert set(result["models"]) == {path.parent.name for path in frozen.glob("*/config.json")}
    assert judge("own code", result, None) == []
