"""Checkpoints that are complete or absent.

A checkpoint is a folder `checkpoint-<step>` that `from_pretrained` loads, with the optimizer's
state beside the weights. It is written under another name, synced, and renamed, so a killed run
leaves only complete ones, and the older ones go when the new one is in place. `checkpoint.json`
lists each file's size and hash: a damaged file is found before it is trained on.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from recipe import UsageError

MANIFEST = "checkpoint.json"
UNFINISHED = ".unfinished"


def list_checkpoints(run_dir):
    """The complete checkpoints of a run as (step, folder), oldest first."""
    found = []
    for folder in Path(run_dir).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if match and (folder / MANIFEST).is_file():
            found.append((int(match[1]), folder))
    return sorted(found)


def write_checkpoint(run_dir, step, write_files, keep):
    """Writes `checkpoint-<step>` and deletes the oldest beyond `keep`.

    Args:
        run_dir: the run's folder.
        step: steps done.
        write_files: called with a folder to fill; returns what the manifest should also say.
        keep: how many checkpoints stay, this one included.

    Returns:
        The folder.
    """
    folder = Path(run_dir) / f"checkpoint-{step}"
    unfinished = folder.with_name(folder.name + UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    manifest = {"step": step, **write_files(unfinished)}
    files = sorted(path for path in unfinished.rglob("*") if path.is_file())
    manifest["files"] = {
        path.relative_to(unfinished).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": file_hash(path),
        }
        for path in files
    }
    (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    for path in [*files, unfinished / MANIFEST, unfinished]:
        _sync(path)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)
    _sync(folder.parent)
    others = [old for _, old in list_checkpoints(run_dir) if old != folder]
    for old in others[: max(0, len(others) - keep + 1)]:
        shutil.rmtree(old)
    return folder


def newest_checkpoint(run_dir):
    """The manifest and folder of the newest checkpoint, verified, or None if there is none.

    Raises:
        UsageError: a file of it is missing or damaged.
    """
    complete = list_checkpoints(run_dir)
    if not complete:
        return None
    _, folder = complete[-1]
    previous = complete[-2][1].name if len(complete) > 1 else None
    remedy = f"delete {folder} to continue from " + (previous or "the beginning")
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest["files"].items()
    except (ValueError, KeyError):
        raise UsageError(f"{folder / MANIFEST} is damaged; {remedy}.") from None
    for name, expected in files:
        path = folder / name
        if not path.is_file():
            raise UsageError(f"{path} is missing; {remedy}.")
        if path.stat().st_size != expected["bytes"]:
            raise UsageError(
                f"{path} is damaged: expected {expected['bytes']} bytes, got "
                f"{path.stat().st_size}; {remedy}."
            )
        if file_hash(path) != expected["sha256"]:
            raise UsageError(f"{path} is damaged: its content is not what was saved; {remedy}.")
    return manifest, folder


def remove_unfinished(run_dir):
    """Deletes what a killed process left behind."""
    for folder in Path(run_dir).glob(f"*{UNFINISHED}"):
        shutil.rmtree(folder)


def move_into(source, target):
    """Moves each file of a folder into another, replacing files one at a time."""
    for path in Path(source).iterdir():
        os.replace(path, Path(target) / path.name)
    Path(source).rmdir()


def file_hash(path):
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
