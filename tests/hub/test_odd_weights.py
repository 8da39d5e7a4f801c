"""Weights that cannot be computed with as they are, and models that are not here: one line each."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import zoo
from zoo.cli import main

GOLDEN = Path(__file__).resolve().parent.parent / "parity" / "goldens" / "retnet-fla"
SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def foreign(folder):
    """A checkpoint of somebody else's, to change."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(GOLDEN / name, folder / name)
    return folder


def quantised(x):
    return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)


ODD = {
    "float8": (lambda x: x.to(torch.float8_e4m3fn), "quantised (float8_e4m3fn)"),
    "float8 of another kind": (lambda x: x.to(torch.float8_e5m2), "quantised (float8_e5m2)"),
    "complex": (lambda x: x.to(torch.complex64), "complex (complex64)"),
    "int8": (lambda x: x.to(torch.int8), "is torch.int8, not a float (quantised?)"),
    "meta": (lambda x: x.to("meta"), "on the meta device, so it has no values"),
    "sparse": (lambda x: x.to_sparse(), "sparse or nested (sparse_coo)"),
    "sparse rows": (lambda x: x.to_sparse_csr(), "sparse or nested (sparse_csr)"),
    "quantised": (quantised, "quantised (qint8)"),
}
IN_SAFETENSORS = ("float8", "float8 of another kind", "complex", "int8")
CASES = [(kind, "pytorch_model.bin") for kind in ODD]
CASES += [(kind, "model.safetensors") for kind in IN_SAFETENSORS]


@pytest.mark.filterwarnings("ignore")  # torch's own, on what is deprecated or in beta
@pytest.mark.parametrize("verb", ["convert", "export"])
@pytest.mark.parametrize(("kind", "file"), CASES)
def test_odd_tensors(tmp_path, capsys, verb, kind, file):
    change, message = ODD[kind]
    if verb == "convert":
        folder, start = foreign(tmp_path / "theirs"), ["convert", "fla-retnet"]
    else:
        folder, start = tmp_path / "ours", ["export", "--license", "mit"]
        zoo.RetNetForCausalLM(zoo.RetNetConfig(**SIZES)).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("k_proj.weight"))
    tensors[name] = change(tensors[name])
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / file) if "safe" in file else torch.save(tensors, folder / file)
    assert main([*start, str(folder), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"zoo: error: {folder}") and message in error and "k_proj" in error
    assert not (tmp_path / "out").exists()


def test_a_dtype_that_torch_has_not(tmp_path, capsys):
    header = json.dumps({"x": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    foreign(tmp_path / "theirs")
    content = len(header).to_bytes(8, "little") + header + bytes(3)
    (tmp_path / "theirs" / "model.safetensors").write_bytes(content)
    assert main(["convert", "fla-retnet", str(tmp_path / "theirs"), str(tmp_path / "out")]) == 2
    assert "F6_E2M3); save the weights as plain floats." in capsys.readouterr().err


def test_a_quantised_checkpoint_of_ours(tmp_path, capsys):
    zoo.RetNetForCausalLM(zoo.RetNetConfig(**SIZES)).save_pretrained(tmp_path / "ours")
    path = tmp_path / "ours" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"a": 1}}))
    for arguments in (["export", "--license", "mit"], ["convert", "hf-rwkv", "--reverse"]):
        assert main([*arguments, str(tmp_path / "ours"), str(tmp_path / "out")]) == 2
        assert "the weights are quantised; give the" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "ID", "out", "--license", "mit"],
        ["export", "ID", "out"],
        ["convert", "hf-mistral", "ID", "out"],
        ["convert", "hf-mistral", "--reverse", "ID", "out"],
        ["info", "ID"],
        ["push", "ID", "me/tiny"],
    ],
)
def test_a_name_on_the_hub_where_a_folder_is_expected(arguments, tmp_path, capsys, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    name = "mistralai/Mistral-7B-v0.1"
    assert main([name if word == "ID" else word for word in arguments]) == 2
    error = capsys.readouterr().err
    # What is pushed lies here; all else may come from there.
    expected = f"{name} is not here, and HF_HUB_OFFLINE is set; .*"
    if arguments[0] == "push":
        expected = rf"{name}: no such folder; .*: hf download {name} --local-dir Mistral-7B-v0\.1\."
    assert re.fullmatch(f"zoo: error: {expected}\n", error)
    assert list((tmp_path / "here").iterdir()) == []
