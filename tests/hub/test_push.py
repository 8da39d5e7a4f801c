"""A push makes a repository of the Hub the model in a folder: all of it, and nothing else."""

import json
import os
import re
import shutil

import pytest
import torch
from fake_hub import TOKEN, running_hub
from huggingface_hub import constants, snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

import zoo
from zoo.cli import main
from zoo.hub.export import export
from zoo.hub.push import files_to_push

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def make_export(folder, seed, max_shard_size="5GB", tokenizer=None, **fields):
    """An exported model in `folder`/out. Returns the model."""
    torch.manual_seed(seed)
    model = zoo.RetNetForCausalLM(zoo.RetNetConfig(**SIZES | fields))
    shutil.rmtree(folder / "model", ignore_errors=True)
    model.save_pretrained(folder / "model")
    if tokenizer:
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder / "model")
    export(folder / "model", folder / "out", True, "mit", max_shard_size)
    return model


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
        # transformers keeps the address that it asked first.
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def push(folder, *options):
    return main(["push", str(folder), "me/tiny", *options])


def test_pushed_again_it_replaces_what_it_wrote(hub, tmp_path, capsys):
    make_export(tmp_path, 0, max_shard_size="20KB")
    secrets = {".env": "KEY=1", "training_state.pt": "x", "metrics.jsonl": "{}", "a b.png": "x"}
    secrets |= {"checkpoint-3/optimizer.pt": "x", "__pycache__/x.pyc": "x", "notes.py": "x"}
    for name, text in secrets.items():
        (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_text(text)
    assert push(tmp_path / "out") == 0
    there = hub.repositories["me/tiny"]
    shards = {name for name in there["files"] if re.match("model-.*safetensors", name)}
    assert len(shards) > 1 and len(there["commits"]) == 2
    said = " ".join(capsys.readouterr().out.split())
    left_out = ".env, __pycache__/, a b.png, checkpoint-3/, metrics.jsonl, notes.py"
    assert f"stays here: {left_out}, training_state.pt" in said
    assert not {name for name in there["files"] if name in secrets or "/" in name}
    # Somebody adds files of their own, and the model is trained on, exported and pushed again.
    there["files"] |= {"notes.py": b"mine", "loss.png": b"mine", ".gitignore": b"x"}
    model = make_export(tmp_path, 1)
    assert push(tmp_path / "out") == 0
    assert len(there["commits"]) == 3
    assert shards | {"model.safetensors.index.json"} == {
        line["value"]["path"] for line in there["commits"][-1]["lines"] if "deleted" in line["key"]
    }
    mine = {"notes.py", "loss.png", ".gitignore", ".gitattributes"}
    assert set(there["files"]) == set(files_to_push(tmp_path / "out")[0]) | mine
    loaded = AutoModelForCausalLM.from_pretrained("me/tiny", cache_dir=tmp_path / "downloads")
    assert all(torch.equal(x, loaded.state_dict()[n]) for n, x in model.state_dict().items())
    # A third time there is nothing to do: no commit says so.
    capsys.readouterr()
    assert push(tmp_path / "out") == 0
    assert len(there["commits"]) == 3
    assert "nothing was sent: the repository is as this folder" in capsys.readouterr().out


def test_weights_of_a_push_without_a_record_go_too(hub, tmp_path):
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    names.append("model.safetensors.index.json")
    others = {"model.gguf": b"mine", "retnet_notes.py": b"mine"}
    there = hub.create("me/tiny", files=dict.fromkeys(names, b"old") | others)["files"]
    make_export(tmp_path, 0)
    assert push(tmp_path / "out") == 0
    assert not set(names) & there.keys() and others.items() <= there.items()


def test_code_and_tokenizer_of_an_earlier_push_go(hub, tmp_path, pytestconfig):
    byte = pytestconfig.rootpath / "tokenizers" / "byte"
    make_export(tmp_path, 0, tokenizer=byte, vocab_size=264)
    (tmp_path / "out" / "added_tokens.json").write_text("{}")
    assert push(tmp_path / "out") == 0
    there = hub.repositories["me/tiny"]["files"]
    assert {"retnet.py", "tokenizer.json", "added_tokens.json"} <= there.keys()
    # The tokenizer is another, the model of transformers' own class.
    config = zoo.SlidingWindowConfig(**SIZES | {"vocab_size": 264})
    zoo.SlidingWindowForCausalLM(config).save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(byte).save_pretrained(tmp_path / "other")
    export(tmp_path / "other", tmp_path / "native", license="mit", format="native")
    assert push(tmp_path / "native") == 0
    assert not {"retnet.py", "base.py", "added_tokens.json", "LICENSE"} & there.keys()
    assert "tokenizer.json" in there
    # Without a tokenizer here, the one there may be the user's.
    (tmp_path / "out" / "added_tokens.json").unlink()
    make_export(tmp_path, 0)
    there["vocab.txt"] = b"mine"
    assert push(tmp_path / "out") == 0
    assert "vocab.txt" in there and "tokenizer.json" not in there


def test_images_of_the_card_go_along_and_links_lead_nowhere(tmp_path):
    make_export(tmp_path, 0)
    out = tmp_path / "out"
    (out / "figures").mkdir()
    for name in ("loss.png", "figures/a.png", "figures/b.png", "other.png"):
        (out / name).write_bytes(b"png")
    (tmp_path / "secret.png").write_bytes(b"png")
    (out / "link.png").symlink_to(tmp_path / "secret.png")
    (out / "merges.txt").symlink_to(tmp_path / "secret.png")
    with open(out / "README.md", "a") as card:
        card.write("![x](loss.png) ![](figures/a.png)<img src='link.png'> ![y](../secret.png)\n")
    files, left_out = files_to_push(out)
    assert {"loss.png", "figures/a.png"} <= set(files)
    assert left_out == ["figures/b.png", "link.png", "merges.txt", "other.png"]
    (out / "config.json").rename(tmp_path / "config.json")
    (out / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(ValueError, match="config.json leads out of the folder; .* `cp -rL`"):
        files_to_push(out)


def test_a_downloaded_export_is_exported_again(hub, tmp_path, capsys):
    model = make_export(tmp_path, 0)
    record = json.loads((tmp_path / "out" / "longzoo.json").read_text())
    record["origin"] |= {"training": [["seed", "7"]], "base_model": "them/base"}
    (tmp_path / "out" / "longzoo.json").write_text(json.dumps(record))
    assert push(tmp_path / "out") == 0
    got = snapshot_download("me/tiny", cache_dir=tmp_path / "downloads")
    assert main(["export", got, str(tmp_path / "again")]) == 0
    card = (tmp_path / "again" / "README.md").read_text()
    assert (
        "\nlicense: mit\n" in card and "base_model: them/base" in card and "| seed | `7` |" in card
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert all(torch.equal(x, loaded.state_dict()[n]) for n, x in model.state_dict().items())
    assert push(tmp_path / "again") == 0


def wrong_token(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")


def no_token(hub, monkeypatch):
    monkeypatch.setattr("zoo.hub.push.get_token", lambda: None)


def no_network(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


def odd_token(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wr\x01öng")


def offline(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def seen_by_all(hub, monkeypatch):
    hub.create("me/tiny")


def somebody_else_pushes(hub, monkeypatch):
    def info(api, name, original=zoo.hub.push.HfApi.model_info, **options):
        found = original(api, name, **options)
        hub.repositories[name]["commits"].append({"oid": "f" * 40})
        return found

    monkeypatch.setattr("zoo.hub.push.HfApi.model_info", info)


def no_upload(hub, monkeypatch):
    monkeypatch.setattr("fake_hub._Handler.do_PUT", lambda self: self._answer({}, 400))


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        (wrong_token, "the Hub does not know this token"),
        (no_token, "run `hf auth login` or set HF_TOKEN"),
        (no_network, "the Hub at http://127.0.0.1:9 cannot be reached"),
        (odd_token, "the Hub token holds characters that no token has"),
        (offline, "HF_HUB_OFFLINE is set"),
        (seen_by_all, "me/tiny exists and everyone can see it"),
        (somebody_else_pushes, "me/tiny changed on the Hub meanwhile"),
        (no_upload, "Error while uploading 'model.safetensors' to the Hub."),
    ],
)
def test_trouble_on_the_way_is_one_line(hub, exported, monkeypatch, capsys, trouble, message):
    trouble(hub, monkeypatch)
    assert push(exported, "--private") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("zoo: error: ") and message in error
    assert os.environ["HF_TOKEN"] not in error
    if "me/tiny" in hub.repositories:
        assert "config.json" not in hub.repositories["me/tiny"]["files"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("push")
    make_export(folder, 0)
    return folder / "out"


def test_a_folder_that_is_no_whole_export_is_refused(hub, exported, tmp_path, capsys):
    assert push("me/somewhere") == 2
    assert "hf download me/somewhere --local-dir somewhere" in capsys.readouterr().err
    broken = tmp_path / "broken"
    shutil.copytree(exported, broken)
    (broken / "state.py").unlink()
    assert push(broken) == 2
    assert "state.py is missing" in capsys.readouterr().err
    shutil.copyfile(exported / "state.py", broken / "state.py")
    (broken / "model.safetensors.index.json").write_text("{}")
    assert push(broken) == 2
    assert "holds model.safetensors and model.safetensors.index.json" in capsys.readouterr().err
    (broken / "model.safetensors.index.json").unlink()
    (broken / "README.md").write_text("---\nlicense: My License\n---\n")
    assert push(broken) == 2
    assert "has license 'My License'" in capsys.readouterr().err
    assert main(["push", str(exported), "them/tiny"]) == 2
    error = capsys.readouterr().err
    assert "the Hub refused them/tiny" in error and "(the token) may not create" in error
    assert TOKEN not in error
    assert main(["push", str(exported), "a/b/c"]) == 2
    assert hub.repositories == {}
