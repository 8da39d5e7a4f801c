"""The `zoo` command: what it prints, and one line for whatever goes wrong."""

import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import zoo
from zoo.cli import _parser, main
from zoo.hub.convert import FORMATS

GOLDENS = Path(__file__).resolve().parent.parent / "parity" / "goldens"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder that the two commands wrote."""
    folder = tmp_path_factory.mktemp("cli")
    ours, out = folder / "ours", folder / "tiny"
    assert main(["convert", "fla-retnet", str(GOLDENS / "retnet-fla"), str(ours)]) == 0
    assert main(["export", str(ours), str(out), "--license", "mit"]) == 0
    return out


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(
        re.search(rf"(?m)^ +{name} ", text) for name in "contract convert export info push".split()
    )


def test_convert_lists_formats(capsys):
    assert main(["convert", "--list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == list(FORMATS) and "rwkv-pth" in names


def test_convert_reports(tmp_path, capsys):
    source = GOLDENS / "retnet-torchscale"
    assert main(["convert", "torchscale-retnet", str(source), str(tmp_path / "ours")]) == 0
    captured = capsys.readouterr().out
    lines = captured.splitlines()
    assert "168,512 parameters in 33 tensors, float32, exactly as in" in lines[0]
    assert any("left out recurrent_chunk_size = 16" in line for line in lines[1:])
    assert max(len(line) for line in lines[1:] if not line.startswith("  zoo ")) <= 100
    assert re.fullmatch(r"  zoo export \S+/ours OUT --license ID    # .*", lines[-2])
    assert (
        "  a tokenizer, as none came along: make one" in captured and "save_pretrained" in captured
    )


def test_convert_there_and_back(tmp_path, capsys):
    source, ours, back = GOLDENS / "rwkv4-hf", tmp_path / "ours", tmp_path / "back"
    assert main(["convert", "hf-rwkv", str(source), str(ours)]) == 0
    assert main(["convert", "hf-rwkv", "--reverse", str(ours), str(back)]) == 0
    assert "142,016 parameters in 60 tensors, float32, exactly as in" in capsys.readouterr().out
    weights = (load_file(folder / "model.safetensors") for folder in (source, back))
    assert all(torch.equal(*pair) for pair in zip(*(sorted_values(w) for w in weights)))


def test_convert_recognises_the_format(tmp_path, capsys):
    source, ours = GOLDENS / "rwkv4-hf", tmp_path / "ours"
    assert main(["convert", "--auto", str(source), str(ours)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{source}: hf-rwkv" and lines[1].startswith(f"{ours}: 142,016 parameters")
    # What is to be written nobody can see in the source.
    assert main(["convert", str(ours), "--reverse", str(tmp_path / "back"), "--auto"]) == 2
    assert "with --reverse name the FORMAT to write" in capsys.readouterr().err


def sorted_values(tensors):
    return [tensors[name] for name in sorted(tensors)]


def test_export_carries_the_license_of_the_weights(exported):
    assert "\nlicense: mit\n" in (exported / "README.md").read_text()
    assert "Apache License" in (exported / "LICENSE").read_text()


@pytest.mark.parametrize("subject", ["name", "folder"])
def test_info(subject, exported, capsys):
    assert main(["info", "retnet" if subject == "name" else str(exported)]) == 0
    text = capsys.readouterr().out
    if subject == "name":
        with torch.device("meta"):
            model = zoo.RetNetForCausalLM(zoo.RetNetConfig())
    else:
        model = zoo.RetNetForCausalLM.from_pretrained(exported)
        assert "rotation = 'half'" in text
    assert f"parameters {sum(p.numel() for p in model.parameters()):,}\n" in text
    assert f"{model.state_size():,} bytes of state per sequence" in text
    assert "  deepnorm: deepnorm = True, pre_norm = False" in text


def test_contract_gets_its_own_arguments(monkeypatch):
    seen = []

    def contract_main(argv):
        seen.append(argv)
        return 7

    monkeypatch.setitem(sys.modules, "zoo.contract", SimpleNamespace(main=contract_main))
    assert main(["contract", "retnet", "--help"]) == 7
    assert seen == [["retnet", "--help"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "retnte"], "did you mean retnet?"),
        (["convert", "fla_retnet", "a", "b"], "did you mean fla-retnet?"),
        (["convert", "fla-retnet", "nowhere", "b"], "nowhere: no such folder or file."),
        (["export", "nowhere", "out"], "nowhere: no such folder of a checkpoint or run."),
        (["push", "nowhere", "me/tiny"], "nowhere: no such folder."),
    ],
)
def test_errors_are_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"zoo: error: .+\n", captured.err) and message in captured.err


def test_errors_of_others_are_one_line_too(capsys, monkeypatch):
    def describe(model):
        raise OSError("first line\n\n  second line")

    monkeypatch.setattr("zoo.hub.info.describe", describe)
    assert main(["info", "retnet"]) == 2
    assert capsys.readouterr().err == "zoo: error: first line second line\n"


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    expected = f"zoo {zoo.__version__}, torch {torch.__version__}, transformers"
    assert capsys.readouterr().out.startswith(expected)


@pytest.mark.parametrize("command", ["contract", "convert", "export", "info", "push"])
def test_every_help_has_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    examples = re.findall(rf"(?m)^  zoo ({command} .+)$", text.partition("examples:\n")[2])
    assert examples
    for example in examples:
        if command != "contract":  # which parses its own
            assert _parser(is_auto="--auto" in example).parse_args(example.split()).run


def test_convert_says_what_to_do_next(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source, ours = GOLDENS / "rwkv7-blinkdl" / "model.safetensors", "my models/it's"
    assert main(["convert", "rwkv-pth", str(source), ours]) == 0
    text = capsys.readouterr().out.partition("next:\n")[2]
    words = " ".join(text.split())
    folder = shlex.quote(ours)
    assert f"python tokenizers/rwkv_world.py rwkv_vocab_v20230424.txt {folder};" in words
    # What it prints can be done, and the second time as well.
    (command,) = re.findall(r"(?m)^  zoo (export .*)    #", text)
    arguments = [word.replace("ID", "mit") for word in shlex.split(command)]
    assert main(arguments) == 0 and main([*arguments, "--overwrite"]) == 0


def test_convert_back_says_what_to_do_next(tmp_path, capsys):
    source = shutil.copytree(GOLDENS / "rwkv4-hf", tmp_path / "theirs")
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    assert main(["convert", "hf-rwkv", str(source), str(tmp_path / "ours")]) == 0
    assert "--license" not in capsys.readouterr().out
    assert (
        main(["convert", "hf-rwkv", "--reverse", str(tmp_path / "ours"), str(tmp_path / "b")]) == 0
    )
    text = capsys.readouterr().out.partition("next:\n")[2]
    assert "  load it as transformers' RwkvForCausalLM, RWKV-4 (RWKV/rwkv-4-*-pile)\n" in text
