"""Checkpoints that are complete or absent.

A checkpoint is a folder `checkpoint-<step>`: weights that `from_pretrained` loads with the
optimizer's state beside them, or config.json and both of them in shards (saving.py). It is written
under another name, synced, and renamed, so a killed run leaves only complete ones, and the older
ones go when the new one is in place. `checkpoint.json` lists each file's size and hash: a damaged
one is found before it is trained on, and the one before it taken. Files that the list does not name
are somebody else's and stay.
"""

import contextlib
import json
import math
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from zoo.hub.files import file_hash

from .recipe import Recipe, UsageError

MANIFEST = "checkpoint.json"
TRAINING_STATE = "training_state.pt"
SHARDS = "shards"  # the folder of them, and what torch.distributed.checkpoint writes last
SHARDS_INDEX = f"{SHARDS}/.metadata"
UNFINISHED = ".unfinished"


@dataclass
class Checkpoint:
    """What a run continues from; without a folder, its beginning.

    Attributes:
        folder: where it is.
        manifest: what checkpoint.json says.
        damaged: newer ones that cannot be used, folder -> why.
    """

    folder: Path | None = None
    manifest: dict = field(default_factory=dict)
    damaged: dict = field(default_factory=dict)

    @property
    def step(self):
        """Steps done."""
        return self.manifest.get("step", 0)


def list_checkpoints(run_dir):
    """The checkpoints of a run as (step, folder), oldest first; none of them verified."""
    found = []
    for folder in Path(run_dir).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if match and (folder / MANIFEST).is_file():
            found.append((int(match[1]), folder))
    return sorted(found)


def write_checkpoint(run_dir, step, write_files, keep, say=print):
    """Writes a checkpoint from one process.

    Args:
        run_dir: the run's folder.
        step: steps done.
        write_files: called with a folder to fill; returns what the manifest should also say.
        keep: of `finish_checkpoint`, as is `say`.

    Returns:
        The folder.
    """
    unfinished = begin_checkpoint(run_dir, step)
    return finish_checkpoint(unfinished, step, write_files(unfinished), keep, say)


def begin_checkpoint(run_dir, step):
    """Makes and returns the folder that `checkpoint-<step>` is written into."""
    remove_unfinished(run_dir)
    unfinished = unfinished_checkpoint(run_dir, step)
    unfinished.mkdir(parents=True)
    return unfinished


def unfinished_checkpoint(run_dir, step):
    """The folder that becomes `checkpoint-<step>` when all of it is written."""
    return Path(run_dir) / f"checkpoint-{step}{UNFINISHED}"


def finish_checkpoint(unfinished, step, facts, keep, say=print):
    """Makes a folder that is written the checkpoint, and deletes the oldest beyond `keep`.

    What has that name already goes if it is a whole checkpoint, and else gets another name.

    Args:
        unfinished: of `begin_checkpoint`, with all files in it.
        step: steps done.
        facts: what the manifest also says.
        keep: how many checkpoints stay, this one included. Damaged ones do not count.
        say: prints a line.

    Returns:
        The folder.
    """
    folder = unfinished.with_name(f"checkpoint-{step}")
    manifest = {"step": step, **facts}
    files = sorted(path for path in unfinished.rglob("*") if path.is_file())
    manifest["files"] = {
        path.relative_to(unfinished).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": file_hash(path),
        }
        for path in files
    }
    (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    folders = {path.parent for path in files} | {unfinished}
    for path in [*files, unfinished / MANIFEST, *sorted(folders, reverse=True)]:
        _sync(path)
    before = move_aside(folder, "replaced") if os.path.lexists(folder) else None
    os.replace(unfinished, folder)
    _sync(folder.parent)
    if before and _is_whole(before, step):
        remove_checkpoint(before)
    elif before:
        say(f"{folder} was there already and is no whole checkpoint: it is now {before.name}")
    others = [
        old for n, old in list_checkpoints(folder.parent) if old != folder and _is_whole(old, n)
    ]
    for old in others[: max(0, len(others) - keep + 1)]:
        remove_checkpoint(old)
    return folder


def newest_checkpoint(run_dir):
    """The newest checkpoint whose files are what was saved.

    Raises:
        UsageError: there are checkpoints, but not one that is whole.
    """
    damaged = {}
    for step, folder in reversed(list_checkpoints(run_dir)):
        try:
            manifest = read_manifest(folder, step)
            _check_files(folder, manifest)
        except ValueError as error:
            damaged[folder] = str(error)
        else:
            return Checkpoint(folder, manifest, damaged)
    if damaged:
        reasons = "; ".join(f"{folder.name}: {reason}" for folder, reason in damaged.items())
        raise UsageError(
            f"no checkpoint in {run_dir} is whole ({reasons}); put one back from a copy, or begin "
            "again with --overwrite."
        )
    return Checkpoint()


def read_manifest(folder, step):
    """What checkpoint.json says, with every field that a continuation reads.

    Raises:
        ValueError: a field is missing or of another type, or it is no JSON.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise ValueError(f"{MANIFEST} is damaged: it is not JSON") from None
    types = {"seconds": (int, float), "cpu_threads": int, "corpus": str, "tokenizer": str}
    types |= {"step": int, "recipe": dict, "files": dict}
    if not isinstance(manifest, dict):
        raise ValueError(f"{MANIFEST} is damaged: it is no table")
    for key, expected in types.items():
        value = manifest.get(key)
        if not isinstance(value, expected) or isinstance(value, bool):
            raise ValueError(f"{MANIFEST} is damaged: {key} is missing or of another type")
    try:
        Recipe(**manifest["recipe"])
    except (TypeError, UsageError):
        raise ValueError(f"{MANIFEST} is damaged: its recipe is none") from None
    entries = manifest["files"].items()
    good = (
        manifest["step"] == step
        and manifest["cpu_threads"] >= 1
        and 0 <= manifest["seconds"] < math.inf
        and "config.json" in manifest["files"]
        and {TRAINING_STATE, SHARDS_INDEX} & manifest["files"].keys()
        and all(_is_entry(name, entry) for name, entry in entries)
    )
    if not good:
        raise ValueError(f"{MANIFEST} is damaged: it is not what a run writes after step {step}")
    return manifest


def remove_checkpoint(folder):
    """Deletes what a run wrote into a checkpoint's folder; if that was all, the folder too."""
    if folder.is_symlink():
        folder.unlink()  # somebody moved it elsewhere and may want it there
        return
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        names = [name for name, entry in manifest["files"].items() if _is_entry(name, entry)]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return
    remove_files(folder, [*names, MANIFEST])  # the list goes last: what it names is known till then


def remove_files(folder, names):
    """Deletes files and the folders that are empty without them, this one included."""
    for name in names:
        with contextlib.suppress(OSError):
            (folder / name).unlink()
    parents = {folder / parent for name in names for parent in PurePosixPath(name).parents}
    for parent in sorted(parents, reverse=True):
        with contextlib.suppress(OSError):
            parent.rmdir()


def remove_unfinished(run_dir):
    """Deletes what a killed process left behind."""
    for folder in Path(run_dir).glob(f"*{UNFINISHED}"):
        if re.fullmatch(r"checkpoint-\d+|final", folder.name.removesuffix(UNFINISHED)):
            folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)


def move_aside(path, why):
    """Gives a file or folder another name, `<name>.<why>`, and returns it."""
    for number in range(1, 10_000):
        beside = path.with_name(f"{path.name}.{why}" + (f"-{number}" if number > 1 else ""))
        if not os.path.lexists(beside):
            os.rename(path, beside)
            return beside
    raise UsageError(f"there are too many {path.name}.{why}-* in {path.parent}; delete some.")


def move_into(source, target):
    """Moves each file of a folder into another, replacing files one at a time."""
    for path in Path(source).iterdir():
        if path.is_dir():
            (Path(target) / path.name).mkdir(exist_ok=True)
            move_into(path, Path(target) / path.name)
        else:
            os.replace(path, Path(target) / path.name)
    Path(source).rmdir()


def files_in(folder):
    """The names of all files in a folder and those within, relative to it."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return [path.relative_to(folder).as_posix() for path in paths]


def is_inside(name):
    """Whether a name is that of something within a folder."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _is_entry(name, entry):
    typed = isinstance(entry, dict) and type(entry.get("bytes")) is int
    return is_inside(name) and typed and isinstance(entry.get("sha256"), str)


def _check_files(folder, manifest, content=True):
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        if path.stat().st_size != expected["bytes"]:
            raise ValueError(
                f"{name} is damaged: expected {expected['bytes']} bytes, got {path.stat().st_size}"
            )
        try:
            if content and file_hash(path) != expected["sha256"]:
                raise ValueError(f"{name} is damaged: its content is not what was saved")
        except OSError as error:
            raise ValueError(f"{name} cannot be read: {error.strerror}") from None


def _is_whole(folder, step):
    try:
        _check_files(folder, read_manifest(folder, step), content=False)
    except ValueError:
        return False
    return True


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
