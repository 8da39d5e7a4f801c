"""License and source of weights that were converted: asked for or carried, never made up."""

import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import zoo
from zoo.cli import main
from zoo.hub.convert import convert, convert_back
from zoo.hub.export import export
from zoo.hub.origin import origin_of_checkpoint

GOLDENS = Path(__file__).resolve().parent.parent / "parity" / "goldens"
SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def make_model(folder):
    zoo.RetNetForCausalLM(zoo.RetNetConfig(**SIZES)).save_pretrained(folder)
    return folder


def card_of(checkpoint, out):
    export(checkpoint, out)
    return ModelCard((out / "README.md").read_text())


@pytest.mark.parametrize("license", ["MIT", "mit\ntags: [x]", "", "my license", "a: b", "'mit'"])
def test_a_license_is_a_name(tmp_path, license, capsys):
    make_model(tmp_path / "saved")
    arguments = ["export", str(tmp_path / "saved"), str(tmp_path / "out")]
    assert main([*arguments, "--license", license]) == 2
    captured = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"zoo: error: a license is the Hub's name of it, .*", captured)
    assert ("did you mean mit?" in captured) == (license == "MIT" or license == "'mit'")
    assert not (tmp_path / "out").exists()


def source_with(folder, card=None, **config):
    shutil.copytree(GOLDENS / "retnet-fla", folder)
    if card is not None:
        (folder / "README.md").write_text(card)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def test_the_license_of_other_peoples_weights_is_asked_for(tmp_path, capsys):
    source = source_with(tmp_path / "theirs")
    assert main(["convert", "fla-retnet", str(source), str(tmp_path / "ours")]) == 0
    capsys.readouterr()
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"zoo: error: .*which license do the weights have\? theirs, .*\n", error)
    assert not (tmp_path / "out").exists()
    # Called from Python it says nothing, rather than something false.
    card = card_of(tmp_path / "ours", tmp_path / "unsaid")
    assert "license" not in card.data.to_dict() and "does not say" in card.text
    # Weights of nobody knows where are no run's either.
    make_model(tmp_path / "saved")
    assert main(["export", str(tmp_path / "saved"), str(tmp_path / "out")]) == 2


CARD = "---\nlicense: {}\nlicense_name: n\nlicense_link: a/b\n---\n"


def test_what_the_source_says_is_carried(tmp_path, capsys):
    cached = tmp_path / "models--them--base-1.0" / "snapshots" / "12ab"
    source_with(cached, CARD.format("other"), _name_or_path="them/parent")
    assert main(["convert", "fla-retnet", str(cached), str(tmp_path / "ours")]) == 0
    assert "--license" not in capsys.readouterr().out
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "out")]) == 0
    card = ModelCard((tmp_path / "out" / "README.md").read_text())
    assert card.data.base_model == "them/base-1.0"
    assert (card.data.license, card.data.license_name, card.data.license_link) == (
        ("other", "n", "a/b")
    )
    assert "from `them/base-1.0` by `zoo convert fla-retnet`, every one bit for bit" in card.text
    assert "The weights: other (n, a/b)." in card.text
    # What the user says goes first, and is told apart from what the source says.
    more = ["--license", "mit", "--base-model", "you/it", "--overwrite"]
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "out"), *more]) == 0
    assert "them/base-1.0 says other" in " ".join(capsys.readouterr().out.split())
    data = ModelCard((tmp_path / "out" / "README.md").read_text()).data
    assert (data.license, data.base_model, data.license_name) == ("mit", "you/it", None)
    assert main(["export", str(tmp_path / "ours"), "x", "--base-model", "../x", *more[:2]]) == 2


@pytest.mark.parametrize("license", ["[mit]", "My own", "{a: b}", "'\n", "mit"])
def test_a_source_that_says_something_odd_says_nothing(tmp_path, license):
    source = source_with(tmp_path / "theirs", CARD.format(license), _name_or_path="/elsewhere/me/x")
    report = convert("fla-retnet", source, tmp_path / "ours")
    assert report.license == ("mit" if license == "mit" else None)
    origin = origin_of_checkpoint(tmp_path / "ours")
    assert (origin.base_model, origin.source) == (None, "theirs")


def test_the_origin_goes_there_and_back(tmp_path):
    source = tmp_path / "theirs"
    shutil.copytree(GOLDENS / "rwkv4-hf", source)
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    convert("hf-rwkv", source, tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "native", format="native", base_model="them/rwkv")
    convert("hf-rwkv", tmp_path / "native", tmp_path / "again")
    convert_back("hf-rwkv", tmp_path / "again", tmp_path / "back")
    convert("hf-rwkv", tmp_path / "back", tmp_path / "third")
    origin = origin_of_checkpoint(tmp_path / "third")
    assert (origin.license, origin.base_model, origin.source) == ("mit", "them/rwkv", "back")
    # A run's, too, whose license is ours to say.
    run = tmp_path / "run" / "checkpoint-4"
    run.parent.mkdir()
    (run.parent / "run.json").write_text('{"recipe": {"steps": 4}}')
    shutil.copytree(tmp_path / "ours", run)
    (run / "longzoo.json").unlink()
    convert_back("hf-rwkv", run, tmp_path / "theirs again")
    assert convert("hf-rwkv", tmp_path / "theirs again", tmp_path / "x").license == "apache-2.0"


def test_rounded_weights_are_not_called_exact(tmp_path):
    convert("fla-retnet", GOLDENS / "retnet-fla", tmp_path / "ours")
    path = tmp_path / "ours" / "longzoo.json"
    record = json.loads(path.read_text())
    record["origin"]["is_rounded"] = True
    path.write_text(json.dumps(record))
    assert "some of them rounded" in card_of(tmp_path / "ours", tmp_path / "out").text


def test_a_source_is_never_written_over(tmp_path):
    source = source_with(tmp_path / "theirs")
    with pytest.raises(ValueError, match="contains .* itself; choose a folder beside it"):
        convert("fla-retnet", source, source, overwrite=True)
    before = load_file(source / "model.safetensors")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    save_file(before, other / "model.safetensors")
    with pytest.raises(ValueError, match="holds a model that zoo did not write"):
        convert("fla-retnet", source, other, overwrite=True)
    run = make_model(tmp_path / "run")
    (run / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is a training run's \(run.json\)"):
        convert("fla-retnet", source, run, overwrite=True)
