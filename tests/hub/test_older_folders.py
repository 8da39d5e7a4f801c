"""Exports of every format version load, by zoo and by the code that lies in them."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from freeze import FROZEN
from load_exports import RECORDED
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import zoo
from zoo.core.versions import FORMAT_VERSION
from zoo.hub.export import export
from zoo.hub.outline import check_weights

# The recorded logits are rounded to float32: half of 2^-23 of each. What two builds of PyTorch
# differ by in float64 is a millionth of that.
ERROR = 2**-24 * 1.001
VERSIONS = range(1, FORMAT_VERSION + 1)
HERE = Path(__file__).resolve().parent


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


@pytest.mark.slow
def test_by_their_own_code(frozen, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        [sys.executable, HERE / "load_exports.py", "bare", frozen],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    models = json.loads(result.stdout.splitlines()[-1])["models"]
    assert set(models) == {path.parent.name for path in frozen.glob("*/config.json")}
    for name, model in models.items():
        assert model["error"] <= ERROR, name
        assert model["greedy"] and model["again"], name
