"""A name on the Hub where a folder is taken: what comes of it, and what is said if nothing does."""

import os
import re
import shutil
from pathlib import Path

import pytest
from fake_hub import TOKEN, running_hub
from huggingface_hub import constants
from safetensors.torch import load_file
from test_convert import GOLDENS, shard

from zoo.cli import main
from zoo.hub.download import Name, fetch, needed

NAME = "them/base-1.0"
CARD = b"---\nlicense: mit\n---\n"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on localhost, which everything in this process takes for the real one."""
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        address = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        yield hub


def files_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def publish(hub, golden="retnet-fla", name=NAME, more=(), **options):
    """A foreign checkpoint on the Hub, with what else such a repository holds."""
    files = files_of(GOLDENS / golden)
    files = {n: files[n] for n in ("config.json", "model.safetensors")}
    others = {"README.md": CARD, "modeling_x.py": b"raise SystemExit", "pytorch_model.bin": b"old"}
    others |= {"training_args.bin": b"x", "figures/loss.png": b"x", "onnx/config.json": b"{}"}
    return hub.create(name, files=files | others | dict(more), **options)


def downloaded(hub):
    """Names of the files whose content was asked for."""
    paths = [path for method, path in hub.requests if method == "GET" and "/resolve/" in path]
    return sorted(re.fullmatch(r"/[^/]+/[^/]+/resolve/[^/]+/(.+)", path)[1] for path in paths)


def test_a_model_is_converted_by_its_name(hub, tmp_path, capsys):
    publish(hub)
    assert main(["convert", "--auto", NAME, "ours"]) == 0
    assert downloaded(hub) == ["README.md", "config.json", "model.safetensors"]
    assert main(["convert", "fla-retnet", str(GOLDENS / "retnet-fla"), "expected"]) == 0
    ours, expected = (Path(x) / "model.safetensors" for x in ("ours", "expected"))
    assert ours.read_bytes() == expected.read_bytes()
    # What the source says of itself came along.
    assert main(["export", "ours", "out"]) == 0
    card = Path("out/README.md").read_text()
    assert f"base_model: {NAME}\n" in card and "license: mit\n" in card
    out = capsys.readouterr().out
    assert f"{NAME}: fla-retnet\n" in out and "exactly as in " + NAME in out


def test_ours_is_exported_and_described_by_its_name(hub, tmp_path, capsys):
    main(["convert", "fla-retnet", str(GOLDENS / "retnet-fla"), "ours"])
    main(["export", "ours", "out", "--license", "mit"])
    hub.create("me/tiny", files=files_of("out"))
    capsys.readouterr()
    assert main(["info", "me/tiny"]) == 0
    assert "retnet: RetNetForCausalLM" in capsys.readouterr().out
    assert "model.safetensors" not in downloaded(hub)
    assert main(["export", "me/tiny", "again", "--format", "native"]) == 0
    assert not [name for name in downloaded(hub) if name.endswith(".py")]
    weights = load_file("again/model.safetensors")
    expected = load_file(GOLDENS / "retnet-fla" / "model.safetensors")
    assert {n: x.tolist() for n, x in weights.items()} == {
        n: x.tolist() for n, x in expected.items()
    }
    assert "base_model: me/tiny\n" in Path("again/README.md").read_text()


def test_revision_and_file(hub, tmp_path, capsys):
    pth = files_of(GOLDENS / "rwkv7-blinkdl")["model.safetensors"]
    several = {"a/one.safetensors": pth, "a/two.safetensors": pth, "config.json": b"{}"}
    hub.create(NAME, revisions={"v1": several})
    assert main(["convert", "rwkv-pth", f"{NAME}@v1/a/two.safetensors", "ours"]) == 0
    assert downloaded(hub) == ["a/two.safetensors"]
    path = fetch(f"{NAME}@v1/a/one.safetensors")
    assert path.read_bytes() == pth and path.name == "one.safetensors"
    # Where a link of the cache leads has no name worth telling.
    assert main(["export", "ours", "out", "--license", "mit"]) == 0
    card = Path("out/README.md").read_text()
    assert f"`{NAME}/two.safetensors`" in card and f"base_model: {NAME}\n" in card


def test_shards_and_their_index_come_together(hub, tmp_path):
    source = shutil.copytree(GOLDENS / "retnet-fla", tmp_path / "source")
    shard(source, ".safetensors")
    hub.create(NAME, files=files_of(source))
    folder = fetch(NAME)
    assert len(list(folder.glob("model-0000?-of-00003.safetensors"))) == 3
    assert (folder / "model.safetensors.index.json").is_file()


def test_what_is_here_comes_first(hub):
    publish(hub)
    Path(NAME).mkdir(parents=True)
    assert fetch(NAME) == Path(NAME)
    assert not hub.requests


def test_offline_a_copy_in_the_cache_is_taken(hub, monkeypatch):
    publish(hub)
    folder = fetch(NAME)
    count = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(NAME) == folder
    assert fetch(f"{NAME}/model.safetensors") == folder / "model.safetensors"
    assert len(hub.requests) == count
    assert main(["convert", "--auto", NAME, "ours"]) == 0


def test_without_a_network_too_and_it_is_said(hub, monkeypatch, caplog):
    publish(hub)
    folder = fetch(NAME)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert fetch(NAME) == folder
    (line,) = [r.getMessage() for r in caplog.records if r.name == "zoo.hub.download"]
    assert "cannot be reached" in line and f"Taken from the cache, as of {folder.name}." in line


def one_error(arguments, capsys):
    """The line that a command ends with."""
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    (line,) = [x for x in captured.err.splitlines() if x.startswith("zoo: error: ")]
    assert captured.err.endswith(line + "\n") and TOKEN not in captured.err + captured.out
    assert not Path("ours").exists()
    return line


def refuse(hub, **options):
    publish(hub, **options)


def offline(hub, monkeypatch):
    publish(hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def offline_without_weights(hub, monkeypatch):
    publish(hub)
    fetch(NAME, weights=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def no_network(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


def no_token(hub, monkeypatch):
    publish(hub, private=True)
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", os.devnull)


def wrong_token(hub, monkeypatch):
    publish(hub)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")


def failing(hub, monkeypatch):
    publish(hub)
    hub.trouble = lambda method, path: 500


def many(hub, monkeypatch):
    hub.create(NAME, files={f"RWKV-{i}.pth": b"" for i in range(9)})


def two_models(hub, monkeypatch):
    publish(hub, more={"model.safetensors.index.json": b"{}"})


def nothing(hub, monkeypatch):
    hub.create(NAME, files={"config.json": b"{}"})


def plain(hub, monkeypatch):
    publish(hub)


def is_gated(hub, monkeypatch):
    publish(hub, gated=True)


REFUSED = [
    (offline, NAME, "HF_HUB_OFFLINE is set; the cache at .* does not hold what is needed"),
    (offline_without_weights, NAME, "does not hold what is needed: unset it"),
    (no_network, NAME, "cannot be reached .*Connection refused.*check the name, the network"),
    (no_token, NAME, "neither a path here nor a model on the Hub that you may see; .* private"),
    (wrong_token, NAME, "the Hub does not know this token.*hf auth login"),
    (failing, NAME, f"the Hub does not give {NAME}: .*500"),
    (plain, "them/other", "them/other is neither a path here nor a model on the Hub"),
    (plain, f"{NAME}@v9", f"{NAME} has no revision v9 on the Hub; see http://.*/{NAME}"),
    (plain, f"{NAME}/a.pth", f"{NAME} has no file a.pth; it has model.safetensors, pytorch_model"),
    (is_gated, NAME, f"{NAME} is gated: accept its terms at http://.*/{NAME}, then `hf auth"),
    (many, NAME, rf"several files of weights \(.*and 5 more\); .* as in {NAME}/RWKV-0.pth"),
    (two_models, NAME, r"several files .*\(model.safetensors, model.safetensors.index.json\)"),
    (nothing, NAME, f"{NAME} holds no weights .* beside its configs"),
    (plain, "./them/other", "./them/other: no such folder or file"),
    (plain, "them/other/", "them/other/: no such folder or file"),
]


@pytest.mark.parametrize(("prepare", "name", "message"), REFUSED)
def test_refused_in_one_line(hub, monkeypatch, capsys, prepare, name, message):
    prepare(hub, monkeypatch)
    assert re.search(message, one_error(["convert", "--auto", name, "ours"], capsys))


def test_the_format_is_checked_before_anything_is_downloaded(hub, capsys):
    publish(hub)
    assert "did you mean fla-retnet?" in one_error(["convert", "fla-retnte", NAME, "x"], capsys)
    assert not hub.requests


CHOICES = {
    "the index goes with its shards": (
        ["model-1-of-2.safetensors", "model-2-of-2.safetensors", "model.safetensors.index.json"],
        None,
        ["model-1-of-2.safetensors", "model-2-of-2.safetensors", "model.safetensors.index.json"],
    ),
    "one model beside another layout of it": (
        ["consolidated.safetensors", "model.safetensors", "params.json"],
        None,
        ["model.safetensors", "params.json"],
    ),
    "of several the one that is named": (
        ["consolidated.safetensors", "model.safetensors", "params.json"],
        "consolidated.safetensors",
        ["consolidated.safetensors", "params.json"],
    ),
    "a named index": (
        ["x.safetensors.index.json", "x-1.safetensors", "y-1.safetensors"],
        "x.safetensors.index.json",
        ["x-1.safetensors", "x.safetensors.index.json"],
    ),
    "pickles, if there is nothing else": (
        ["pytorch_model.bin", "optimizer.bin", "scheduler.pt"],
        None,
        ["pytorch_model.bin"],
    ),
    "no trainer's file": (["training_args.bin", "a.pth"], None, ["a.pth"]),
    "the tokenizer": (
        ["a.pth", "tokenizer.json", "additional_chat_templates/rag.jinja", "run.py", "a.gguf"],
        None,
        ["a.pth", "additional_chat_templates/rag.jinja", "tokenizer.json"],
    ),
    "what lies beside the named file": (
        ["a.pth", "config.json", "sub/b.pth", "sub/config.json", "sub/c.pth"],
        "sub/b.pth",
        ["sub/b.pth", "sub/config.json"],
    ),
}


@pytest.mark.parametrize("case", CHOICES)
def test_which_files_are_needed(case):
    names, file, expected = CHOICES[case]
    assert needed(names, Name("them/x", None, file)) == expected
