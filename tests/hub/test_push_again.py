"""A push is planned, interrupted, given again, and says nothing that opens a door."""

import io
import json
import logging
import re

import pytest
import test_push
import torch
from fake_hub import SIGNATURE, TOKEN
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from test_push import make_export, push
from transformers import AutoModelForCausalLM

from zoo.cli import main
from zoo.hub.secrets import without_secrets

hub = test_push.hub  # the fixture
# Three of these hold the tiny model.
SHARD = "32KB"


@pytest.fixture
def log():
    """What huggingface_hub logs while a test runs, as a user would see it."""
    handler = logging.StreamHandler(io.StringIO())
    logger = logging.getLogger("huggingface_hub")
    logger.addHandler(handler)
    yield handler.stream
    logger.removeHandler(handler)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Between attempts huggingface_hub waits for seconds."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


def uploads(hub):
    return [path for method, path in hub.requests if method == "PUT"]


def loads_as(model, folder):
    loaded = AutoModelForCausalLM.from_pretrained("me/tiny", cache_dir=folder)
    theirs = loaded.state_dict()
    return all(torch.equal(x, theirs[name]) for name, x in model.state_dict().items())


def test_a_dry_run_says_what_would_go_up_and_sends_nothing(hub, tmp_path, capsys):
    make_export(tmp_path, 0, max_shard_size=SHARD)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert push(tmp_path / "out", "--dry-run", "--private") == 0
    assert hub.repositories == {} and {method for method, _ in hub.requests} == {"GET"}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{hub.url}/me/tiny: a new private repository"
    card = (tmp_path / "out" / "README.md").stat().st_size
    assert any(re.fullmatch(rf"  new +README.md +{card / 1000:.1f} kB", line) for line in lines)
    assert sum("model-0000" in line and "-of-00003" in line for line in lines) == 3
    assert "  not of the model, so it stays here: notes.txt" in lines
    assert lines[-1] == "nothing was sent: a dry run"
    # The same, once it is there; and then another model over it.
    assert push(tmp_path / "out", "--private", "--message", "First words") == 0
    there = hub.repositories["me/tiny"]
    assert there["private"] and there["commits"][-1]["title"] == "First words"
    make_export(tmp_path, 1)
    hub.requests.clear()
    capsys.readouterr()
    assert push(tmp_path / "out", "--dry-run") == 0
    assert len(there["commits"]) == 2 and {m for m, _ in hub.requests} <= {"GET", "HEAD"}
    text = capsys.readouterr().out
    assert ": a private repository\n" in text
    assert re.search(r"(?m)^  unchanged  retnet.py ", text)
    assert re.search(r"(?m)^  changed    README.md|^  unchanged  README.md", text)
    assert re.search(r"(?m)^  new        model.safetensors ", text)
    removed = re.findall(r"(?m)^  removed    (\S+)$", text)
    assert removed == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)] + [
        "model.safetensors.index.json"
    ]
    # What changed is what goes up.
    sent = re.search(r"to send: \S+ \S+ in (\d+) of", text)[1]
    assert push(tmp_path / "out") == 0
    files = [line for line in there["commits"][-1]["lines"] if line["key"] != "deletedFile"]
    assert len(files) == int(sent) and len(uploads(hub)) == 1


def test_an_interrupted_upload_goes_on(hub, log, tmp_path, capsys):
    model = make_export(tmp_path, 0, max_shard_size=SHARD)
    hub.max_objects = 1
    assert push(tmp_path / "out") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match(
        r"zoo: error: Error while uploading 'model-0000\d-of-00003.safetensors' to the", error
    )
    assert "Nothing was committed; push again: files that went up whole are not sent" in error
    assert "Retrying in" in log.getvalue()  # it did not give up at once
    assert SIGNATURE not in log.getvalue() + error
    (there,) = hub.objects
    assert len(hub.repositories["me/tiny"]["commits"]) == 1
    # The commit is lost on the way: all is there, and none of it is sent again.
    hub.max_objects, hub.trouble = None, lambda method, path: "/commit/" in path and "drop" or None
    hub.requests.clear()
    assert push(tmp_path / "out") == 2
    assert len(uploads(hub)) == 2 and not any(there in path for path in uploads(hub))
    assert len(hub.repositories["me/tiny"]["commits"]) == 1
    hub.trouble = lambda method, path: None
    hub.requests.clear()
    assert push(tmp_path / "out") == 0
    assert uploads(hub) == [] and len(hub.repositories["me/tiny"]["commits"]) == 2
    assert loads_as(model, tmp_path / "downloads")


def test_one_file_then_shards_then_one_file(hub, tmp_path):
    for seed, size, number in ((0, "5GB", 1), (1, SHARD, 3), (2, "5GB", 1)):
        model = make_export(tmp_path, seed, max_shard_size=size)
        assert push(tmp_path / "out") == 0
        names = hub.repositories["me/tiny"]["files"]
        assert sum(name.endswith(".safetensors") for name in names) == number
        assert loads_as(model, tmp_path / "downloads"), seed
    # One commit each, beside the one that made the repository.
    assert len(hub.repositories["me/tiny"]["commits"]) == 4


def test_large_files_go_up_in_parts(hub, tmp_path):
    model = make_export(tmp_path, 0)
    hub.part_size = 20_000
    assert push(tmp_path / "out") == 0
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert len(uploads(hub)) == -(-size // 20_000) > 2
    assert loads_as(model, tmp_path / "downloads")


def test_stopped_by_its_user(hub, tmp_path, capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    make_export(tmp_path, 0)
    monkeypatch.setattr("zoo.hub.push.HfApi.create_commit", stop)
    assert push(tmp_path / "out") == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("zoo: interrupted, nothing was")


@pytest.mark.parametrize(
    ("options", "trouble", "message"),
    [
        (("--dry-run",), None, "the Hub does not know this token"),
        ((), None, "the Hub does not know this token"),
        (("--dry-run",), "read", "the Hub token of me may only read, and me/tiny is not there"),
        ((), "read", "the Hub token of me may only read, and me/tiny is not there"),
        ((), 403, "the Hub refused me/tiny: "),
        ((), b"<html>", "gave an answer that is none of the Hub's"),
        ((), b"[]", "gave an answer that is none of the Hub's"),
        ((), 500, "the Hub refused me/tiny: "),
        (("--dry-run",), 429, "the Hub refused me/tiny: "),
        ((), "drop", "cannot be reached"),
    ],
)
def test_trouble_is_one_line_without_a_secret(
    hub,
    log,
    tmp_path,
    capsys,
    monkeypatch,
    options,
    trouble,
    message,
):
    make_export(tmp_path, 0)
    if trouble is None:
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    elif trouble == "read":
        hub.role = "read"
    elif isinstance(trouble, bytes):
        monkeypatch.setattr("fake_hub._Handler._info", lambda self, *_: self._answer(trouble))
    else:
        hub.trouble = lambda method, path: trouble
    secret = "hf_" + "Sec" * 8
    if trouble is None or isinstance(trouble, int | str) and trouble != "read":
        # Somebody wrote their token into the address. (It goes along instead of HF_TOKEN's.)
        address = hub.url.replace("//", f"//me:{secret}@")
        monkeypatch.setattr(constants, "ENDPOINT", address)
    assert push(tmp_path / "out", *options) == 2
    said = capsys.readouterr()
    error = said.err.splitlines()[-1]
    assert error.startswith("zoo: error: ") and message in error
    for text in (said.out, said.err, log.getvalue()):
        assert secret not in text and "hf_wrong" not in text and TOKEN not in text
        assert "Traceback" not in text


def test_secrets_are_found_in_texts():
    token = "hf_" + "aB3" * 11
    text = f"PUT https://me:pass@host:8/a/b?X-Sig={token}&y=1 by {token} or odd%2Ftoken odd/token"
    assert without_secrets(text, "odd/token") == (
        "PUT https://host:8/a/b by (a token) or (the token) (the token)"
    )
    assert without_secrets("what? ask me@host, see https://host/a_b") == (
        "what? ask me@host, see https://host/a_b"
    )


def test_weights_that_do_not_fit_are_not_pushed(hub, tmp_path, capsys):
    make_export(tmp_path, 0, max_shard_size=SHARD)
    out = tmp_path / "out"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    name, place = next(iter(index["weight_map"].items()))
    other = next(p for p in index["weight_map"].values() if p != place)
    changed = index | {"weight_map": index["weight_map"] | {name: other}}
    (out / "model.safetensors.index.json").write_text(json.dumps(changed))
    assert push(out) == 2
    assert f"says another file of {name} than holds it" in capsys.readouterr().err
    make_export(tmp_path, 0)
    weights = load_file(out / "model.safetensors")
    name = next(iter(weights))
    save_file(weights | {name: weights[name][:-1].clone()}, out / "model.safetensors")
    assert push(out) == 2
    assert f"{name} is " in capsys.readouterr().err
    del weights[name]
    save_file(weights, out / "model.safetensors")
    assert push(out) == 2
    assert f"weights and config do not fit: no {name}" in capsys.readouterr().err
    save_file({"a": torch.zeros(2, dtype=torch.int8)}, out / "model.safetensors")
    assert main(["push", str(out), "tiny"]) == 2
    assert "a is int8, not a plain float" in capsys.readouterr().err
    assert hub.requests == []


def test_a_name_without_an_owner_is_the_users_own(hub, tmp_path, capsys):
    make_export(tmp_path, 0)
    assert main(["push", str(tmp_path / "out"), "tiny"]) == 0
    assert set(hub.repositories) == {"me/tiny"}
