"""Checkpoints: complete or absent, in rotation, and refused when damaged."""

import os

import pytest

import checkpointing
from checkpointing import (
    list_checkpoints,
    newest_checkpoint,
    remove_unfinished,
    write_checkpoint,
)
from recipe import UsageError


def write_files(folder):
    (folder / "model.safetensors").write_bytes(b"0123456789" * 100)
    (folder / "config.json").write_text("{}")
    return {"seconds": 1.5}


def steps(run_dir):
    return [step for step, _ in list_checkpoints(run_dir)]


def test_rotation(tmp_path):
    for step in (5, 10, 100):
        write_checkpoint(tmp_path, step, write_files, keep=2)
    assert steps(tmp_path) == [10, 100]
    manifest, folder = newest_checkpoint(tmp_path)
    assert (manifest["step"], manifest["seconds"]) == (100, 1.5)
    assert folder == tmp_path / "checkpoint-100"
    write_checkpoint(tmp_path, 100, write_files, keep=1)  # replaces itself
    assert steps(tmp_path) == [100]
    assert newest_checkpoint(tmp_path / "nowhere") is None


def test_a_kill_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, 1, write_files, keep=1)

    def killed(*arguments):
        raise KeyboardInterrupt

    def killed_while_writing(folder):
        (folder / "model.safetensors").write_bytes(b"012")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, 2, killed_while_writing, keep=1)
    assert newest_checkpoint(tmp_path)[0]["step"] == 1
    monkeypatch.setattr(checkpointing.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, 3, write_files, keep=1)
    assert newest_checkpoint(tmp_path)[0]["step"] == 1
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


def damage(folder, how):
    path = folder / "model.safetensors"
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        os.truncate(path, 500)
    elif how == "flipped":
        content = bytearray(path.read_bytes())
        content[700] ^= 1
        path.write_bytes(content)
    else:
        (folder / "checkpoint.json").write_text("{")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "model.safetensors is missing"),
        ("truncated", "model.safetensors is damaged: expected 1000 bytes, got 500"),
        ("flipped", "model.safetensors is damaged: its content is not what was saved"),
        ("manifest", "checkpoint.json is damaged"),
    ],
)
def test_damage_is_found(tmp_path, how, message):
    for step in (5, 10):
        write_checkpoint(tmp_path, step, write_files, keep=2)
    damage(tmp_path / "checkpoint-10", how)
    with pytest.raises(UsageError) as error:
        newest_checkpoint(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert "delete" in str(error.value) and "to continue from checkpoint-5" in str(error.value)
