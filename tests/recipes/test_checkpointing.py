"""Checkpoints: complete or absent, in rotation, and passed over when damaged."""

import dataclasses
import json
import os

import pytest

from pretraining import checkpointing
from pretraining.checkpointing import (
    list_checkpoints,
    newest_checkpoint,
    remove_unfinished,
    write_checkpoint,
)
from pretraining.recipe import Recipe, UsageError
from pretraining.reporting import Metrics, read_metrics
from streaming import read_run

RECIPE = dataclasses.asdict(Recipe("x", "retnet"))


def write_files(folder):
    (folder / "model.safetensors").write_bytes(b"0123456789" * 100)
    (folder / "config.json").write_text("{}")
    (folder / "training_state.pt").write_bytes(b"moments")
    identity = {"corpus": "c" * 64, "tokenizer": "d" * 64}
    return {"seconds": 1.5, "cpu_threads": 2, "recipe": RECIPE, **identity}


def steps(run_dir):
    return [step for step, _ in list_checkpoints(run_dir)]


def test_rotation(tmp_path):
    for step in (5, 10, 100):
        write_checkpoint(tmp_path, step, write_files, keep=2)
    assert steps(tmp_path) == [10, 100]
    newest = newest_checkpoint(tmp_path)
    assert (newest.step, newest.manifest["seconds"], newest.damaged) == (100, 1.5, {})
    assert newest.folder == tmp_path / "checkpoint-100"
    write_checkpoint(tmp_path, 100, write_files, keep=1)  # replaces itself
    assert os.listdir(tmp_path) == ["checkpoint-100"]
    assert newest_checkpoint(tmp_path / "nowhere").folder is None


def test_a_kill_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, 1, write_files, keep=1)

    def killed(*arguments):
        raise KeyboardInterrupt

    def killed_while_writing(folder):
        (folder / "model.safetensors").write_bytes(b"012")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, 2, killed_while_writing, keep=1)
    assert newest_checkpoint(tmp_path).step == 1
    monkeypatch.setattr(checkpointing.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, 3, write_files, keep=1)
    assert newest_checkpoint(tmp_path).step == 1
    remove_unfinished(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-1"]


def test_everything_is_on_disk_before_it_counts(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(
        checkpointing.os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}"))
    )
    replace = os.replace

    def replace_and_note(source, target):
        synced.append("renamed")
        replace(source, target)

    monkeypatch.setattr(checkpointing.os, "replace", replace_and_note)
    write_checkpoint(tmp_path, 2, write_files, keep=1)
    names = [os.path.basename(name) for name in synced]
    before = names[: names.index("renamed")]
    assert {"model.safetensors", "config.json", "checkpoint.json"} <= set(before)
    assert names[-1] == tmp_path.name


def test_rotation_leaves_what_is_not_its_own(tmp_path):
    for name in ("checkpoint-7/a", "checkpoint-6/checkpoint.json", "notes.unfinished/a"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("mine")
    write_checkpoint(tmp_path, 5, write_files, keep=1)
    (tmp_path / "checkpoint-5" / "eval.json").write_text("mine")
    said = []
    for step in (6, 7, 8):
        write_checkpoint(tmp_path, step, write_files, keep=1, say=said.append)
    assert os.listdir(tmp_path / "checkpoint-5") == ["eval.json"]
    assert steps(tmp_path) == [8]
    assert sorted(os.listdir(tmp_path)) == [
        "checkpoint-5",
        "checkpoint-6.replaced",
        "checkpoint-7.replaced",
        "checkpoint-8",
        "notes.unfinished",
    ]
    assert [line.split()[-1] for line in said] == ["checkpoint-6.replaced", "checkpoint-7.replaced"]


def test_damaged_checkpoints_do_not_push_out_good_ones(tmp_path):
    for step in (5, 10, 15):
        write_checkpoint(tmp_path, step, write_files, keep=3)
    (tmp_path / "checkpoint-10" / "checkpoint.json").write_text("{")
    os.truncate(tmp_path / "checkpoint-15" / "model.safetensors", 3)
    write_checkpoint(tmp_path, 20, write_files, keep=2)
    assert steps(tmp_path) == [5, 10, 15, 20]
    write_checkpoint(tmp_path, 25, write_files, keep=2)
    assert steps(tmp_path) == [10, 15, 20, 25]


def change(path, how):
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        os.truncate(path, 500)
    else:
        content[700] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "model.safetensors is missing"),
        ("truncated", "model.safetensors is damaged: expected 1000 bytes, got 500"),
        ("flipped", "model.safetensors is damaged: its content is not what was saved"),
    ],
)
def test_damaged_weights_are_passed_over(tmp_path, how, message):
    for step in (5, 10):
        write_checkpoint(tmp_path, step, write_files, keep=2)
    change(tmp_path / "checkpoint-10" / "model.safetensors", how)
    newest = newest_checkpoint(tmp_path)
    assert newest.step == 5
    assert newest.damaged == {tmp_path / "checkpoint-10": message}


def manifest_with(**fields):
    return lambda manifest: json.dumps({**manifest, **fields}).encode()


MANIFESTS = {
    "empty": lambda manifest: b"",
    "half a line": lambda manifest: json.dumps(manifest).encode()[:100],
    "null": lambda manifest: b"null",
    "a list": lambda manifest: b"[1]",
    "not UTF-8": lambda manifest: b"\xff\xfe{}",
    "nested": lambda manifest: b"[" * 100_000,
    "no step": manifest_with(step=None),
    "another step": manifest_with(step=5),
    "true": manifest_with(step=True),
    "seconds": manifest_with(seconds="1.5"),
    "not a number": manifest_with(seconds=float("nan")),
    "threads": manifest_with(cpu_threads=0),
    "recipe": manifest_with(recipe={"name": "x"}),
    "type in recipe": manifest_with(recipe={**RECIPE, "learning_rate": "fast"}),
    "text": manifest_with(corpus=3),
    "files": manifest_with(files=[]),
    "no files": manifest_with(files={}),
    "file": lambda m: json.dumps({**m, "files": {**m["files"], "a": None}}).encode(),
    "outside": lambda m: json.dumps({**m, "files": {**m["files"], "../a": FILE}}).encode(),
}
FILE = {"bytes": 1, "sha256": "e" * 64}


@pytest.mark.parametrize("how", MANIFESTS)
def test_damaged_manifests_are_passed_over(tmp_path, how):
    for step in (5, 10):
        write_checkpoint(tmp_path, step, write_files, keep=2)
    path = tmp_path / "checkpoint-10" / "checkpoint.json"
    path.write_bytes(MANIFESTS[how](json.loads(path.read_text())))
    newest = newest_checkpoint(tmp_path)
    assert newest.step == 5
    (reason,) = newest.damaged.values()
    assert "checkpoint.json is damaged: " in reason and "\n" not in reason and len(reason) < 100


def test_without_a_whole_checkpoint_nothing_begins_in_silence(tmp_path):
    for step in (5, 10):
        write_checkpoint(tmp_path, step, write_files, keep=2)
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="no checkpoint in .* is whole") as error:
        newest_checkpoint(tmp_path)
    assert "--overwrite" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "null", '{"recipe": null}', '{"recipe": {}}'])
@pytest.mark.parametrize("name", ["checkpoint.json", "run.json"])
def test_streaming_refuses_a_damaged_record(tmp_path, name, content):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=f"{name} is damaged") as error:
        read_run(tmp_path)
    assert "\n" not in str(error.value)


def test_damaged_metrics_are_put_aside(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = {"kind": "train", "step": 1, "tokens": 8, "seconds": 0.1, "bits_per_byte": 3.0}
    bad = [b"null", b"[]", b"3", b"\xff\xfe", b"{", b'{"kind": "train"}']
    bad += [json.dumps({**good, key: None}).encode() for key in good]
    lines = [json.dumps({**good, "step": step}).encode() for step in (1, 2, 3)]
    path.write_bytes(b"\n".join([lines[0], *bad, b"", lines[1], lines[2], lines[0][:20]]))
    said = []
    metrics = Metrics(path, 2, said.append)
    assert [line["step"] for line in metrics.lines] == [1, 2]
    assert read_metrics(path) == (metrics.lines, [])
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes().split(b"\n")[:-1] == [
        *bad,
        lines[0][:20],
    ]
    assert said == [f"{path}: {len(bad) + 1} damaged lines, now in metrics.jsonl.damaged"]
    Metrics(path, 2, said.append)  # the second time there are none
    assert len(said) == 1
