"""The folder of a run: what is done with an earlier one, who may write, what is deleted."""

import contextlib
import difflib
import errno
import json
import os
import re
import socket
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from .checkpointing import (
    MANIFEST,
    is_inside,
    list_checkpoints,
    move_aside,
    remove_checkpoint,
    remove_files,
    remove_unfinished,
)
from .recipe import UsageError

RECORD, METRICS, PLOT, LOCK = "run.json", "metrics.jsonl", "loss.png", "run.lock"
TRACKED = "longzoo"  # the project's name, and the folder that tensorboard's events go to
WRITTEN = {RECORD, METRICS, PLOT, f"{METRICS}.damaged", f"{RECORD}.damaged"}
WRITTEN |= {f"{name}.new" for name in (RECORD, METRICS, PLOT)}
# The final model, where run.json does not name its files (it did not always).
MODEL_FILES = re.compile(
    r"(generation_)?config\.json|model(-\d{5}-of-\d{5})?\.safetensors|chat_template\.jinja|"
    r"model\.safetensors\.index\.json|tokenizer(_config)?\.json|special_tokens_map\.json"
)
FULL = {errno.ENOSPC, errno.EDQUOT}
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def read_record(run_dir):
    """What run.json says, {} if there is none or it is damaged."""
    try:
        record = json.loads((Path(run_dir) / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def is_run(run_dir):
    """Whether a folder is that of a run: it was locked once, has a record or checkpoints."""
    return (
        (Path(run_dir) / LOCK).is_file()
        or "recipe" in read_record(run_dir)
        or bool(list_checkpoints(run_dir))
    )


def check_run_dir(run_dir, resume=False, start=True, overwrite=False):
    """Whether to continue the run that is there. Keeps it from being lost by accident.

    Args:
        run_dir: the run's folder, which need not exist.
        resume: the user wants to continue a run.
        start: the user is content with a new run.
        overwrite: the user wants an earlier run deleted.

    Raises:
        UsageError: the folder is not what the user takes it for.
    """
    run_dir = Path(run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise UsageError(f"{run_dir} is a file, not a run's folder; choose another --name.")
    if is_run(run_dir):
        metrics = run_dir / METRICS
        begun = list_checkpoints(run_dir) or (metrics.is_file() and metrics.stat().st_size)
        if not (resume or overwrite) and (begun or (run_dir / "config.json").exists()):
            raise UsageError(
                f"{run_dir} holds a run; continue it with --resume, replace it with "
                "--overwrite, or choose another --name."
            )
        return resume
    if resume and not start:
        raise UsageError(
            f"there is no run in {run_dir} to continue{_nearby(run_dir)} To begin one, leave out "
            "--resume or say --resume_or_start."
        )
    names = sorted(path.name for path in run_dir.iterdir()) if run_dir.is_dir() else []
    if overwrite and names:
        raise UsageError(
            f"{run_dir} holds {names[0]} but no run, so --overwrite does not touch it; choose "
            "another --name."
        )
    taken = [name for name in names if name in WRITTEN or MODEL_FILES.fullmatch(name)]
    if taken:
        raise UsageError(
            f"{run_dir} is no run's folder, and its {taken[0]} would be replaced; choose another "
            "--name."
        )
    return False


def _nearby(run_dir):
    if not run_dir.parent.is_dir():
        return f"; {run_dir.parent} does not exist."
    runs = [path.name for path in sorted(run_dir.parent.iterdir()) if is_run(path)]
    if not runs:
        return ", nor is there any other beside it."
    near = difflib.get_close_matches(run_dir.name, runs, n=1, cutoff=0.5)
    more = f" and {len(runs) - 5} more" if len(runs) > 5 else ""
    return f": did you mean {near[0]!r}?" if near else f"; there are {', '.join(runs[:5])}{more}."


@contextlib.contextmanager
def locked(run_dir, say=print):
    """Makes a run's folder and keeps other processes from writing a run there.

    The kernel releases the lock of a process that dies.

    Args:
        run_dir: the folder. If no run is written to it, it goes again.
        say: prints a line.

    Raises:
        UsageError: another process holds the lock, or the folder cannot be written to.
    """
    run_dir = Path(run_dir)
    path, made = run_dir / LOCK, not run_dir.exists()
    lock = FileLock(path)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(
            f"{run_dir} is being written by {_holder(path)}; wait until it ends or stop it, or "
            "choose another --name."
        ) from None
    except (OSError, NotImplementedError) as error:
        # Older versions of filelock raise the second.
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise UsageError(f"cannot write to {run_dir}: {error.strerror}.") from None
        say(
            f"{run_dir} is on a file system without locks: see to it that no second process "
            "writes this run"
        )
    if lock.is_locked and not isinstance(lock, SoftFileLock):  # which notes its holder itself
        path.write_text(f"{os.getpid()}\n{socket.gethostname()}\n", encoding="utf-8")
    elif lock.is_locked:
        say(
            f"{run_dir} is on a file system without locks: if this process is killed, delete "
            f"{path} before the next start on another machine"
        )
    try:
        yield
    finally:
        if made and os.listdir(run_dir) == [LOCK]:
            remove_files(run_dir, [LOCK])
        lock.release()


@contextlib.contextmanager
def one_line_if_full(run_dir, is_main):
    """Makes what a full disk raises one line, and what was being written there makes room again.

    Args:
        run_dir: the run's folder.
        is_main: whether this process is the one that writes it.

    Raises:
        UsageError: the disk is full.
    """
    try:
        yield
    except Exception as error:
        reason = _why_no_room(error)
        if not reason:
            raise
        if is_main:
            remove_unfinished(run_dir)
        raise UsageError(
            f"cannot write to {run_dir}: {reason}; make room and go on with --resume."
        ) from None


def _why_no_room(error):
    """What an exception, or what it was raised from, says of a full disk; None if it is another."""
    while error:
        # safetensors has an error of its own, with the system's number in its text.
        if getattr(error, "errno", None) in FULL or f"os error {errno.ENOSPC}" in str(error):
            return os.strerror(errno.ENOSPC)
        # torch says only where in its writer it was; what it reads it has read before.
        if isinstance(error, RuntimeError) and "inline_container.cc" in str(error):
            return "a file could not be written whole, perhaps for want of space"
        error = error.__cause__ or error.__context__
    return None


def _holder(path):
    try:
        pid, host = path.read_text(encoding="utf-8").split()[:2]
    except (OSError, ValueError):
        return "another process"
    return f"process {pid} on {host}"


def remove_run(run_dir, say=print):
    """Deletes what a run wrote into its folder and nothing else.

    Args:
        run_dir: the folder, which is locked.
        say: prints a line.
    """
    run_dir = Path(run_dir)
    files = read_record(run_dir).get("files")
    if not isinstance(files, list):
        files = [path.name for path in run_dir.iterdir() if MODEL_FILES.fullmatch(path.name)]
    for _, folder in list_checkpoints(run_dir):
        remove_checkpoint(folder)
        if (folder / MANIFEST).exists():
            say(f"{folder} is damaged and stays, as {move_aside(folder, 'damaged').name}")
    for folder in run_dir.glob("checkpoint-*.damaged*"):
        remove_checkpoint(folder)
    remove_unfinished(run_dir)
    events = [
        path.relative_to(run_dir).as_posix()
        for path in (run_dir / TRACKED).rglob("*")
        if path.name.startswith("events.out.tfevents.") or path.name == "hparams.yml"
    ]
    names = [name for name in files if isinstance(name, str) and is_inside(name)]
    remove_files(run_dir, [*events, *names, *WRITTEN - {RECORD}, RECORD])
