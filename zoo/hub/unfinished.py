"""The folder in which another one is prepared, and what becomes of it when its process is killed.

It lies beside the one to be, as `.NAME.<random>.unfinished`, and is locked as long as its process
lives. Whoever writes to the same place next removes those that no process holds. If the files in
one were already being moved to their place, that is done to the end first.
"""

import json
import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

LOCK, MOVES = "lock", "moves.json"


@contextmanager
def unfinished_folder(path):
    """A folder beside a path, with an empty folder `new` in it, for as long as the block runs.

    Args:
        path: what is prepared there; the folder that it is in exists.
    """
    while True:
        work = tempfile.mkdtemp(prefix=f".{path.name[:64]}.", suffix=".unfinished", dir=path.parent)
        work = Path(work)
        lock = FileLock(work / LOCK)
        try:
            _acquire(lock)
            (work / "new").mkdir()
            break
        except (Timeout, FileNotFoundError):
            # Another process took it for a dead one's, in the moment before it was locked.
            lock.release()
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        lock.release()


def clear_unfinished(path):
    """Removes what killed processes have left of their work on a path.

    Args:
        path: what they prepared.

    Raises:
        ValueError: a process that lives is preparing it.
    """
    if not path.parent.is_dir():
        return
    pattern = re.compile(rf"\.{re.escape(path.name[:64])}\.[a-z0-9_]{{8}}\.unfinished")
    for work in sorted(path.parent.iterdir()):
        if not pattern.fullmatch(work.name) or not (work / LOCK).is_file():
            continue
        lock = FileLock(work / LOCK)
        try:
            if not _acquire(lock):
                continue  # nobody can tell whether its process lives
            if (work / MOVES).is_file():
                _go_on(work)
            shutil.rmtree(work, ignore_errors=True)
        except Timeout:
            raise ValueError(
                f"{path} is being written by another process; wait until it ends, or choose "
                f"another name (if there is no such process, remove {work})."
            ) from None
        except FileNotFoundError:
            continue  # another process has removed it
        finally:
            lock.release()


def replace_files(work, path, old_names, new_names):
    """Moves files out of a folder and others in: all or none, also if the process is killed.

    Args:
        work: an unfinished folder, whose `old` takes the former and whose `new` holds the latter.
        path: the folder.
        old_names: of files in it, in the order in which they go.
        new_names: in the order in which they come.
    """
    text = json.dumps({"folder": path.name, "old": old_names, "new": new_names})
    (work / "being written").write_text(text, encoding="utf-8")
    (work / "being written").rename(work / MOVES)  # it is there whole, or not
    done = []
    try:
        for source, target in _moves(work, path, old_names, new_names):
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
            done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            os.replace(target, source)
        raise


def _go_on(work):
    """Ends what `replace_files` was killed at."""
    fields = json.loads((work / MOVES).read_text(encoding="utf-8"))
    names = [fields["folder"], *fields["old"], *fields["new"]]
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in names):
        raise ValueError(f"{work / MOVES} names files outside of its folder; remove {work}.")
    path = work.parent / fields["folder"]
    for source, target in _moves(work, path, fields["old"], fields["new"]):
        # What is in `old` was moved there: a file of its name in the folder is a new one.
        if source.is_file() and not (target.is_relative_to(work) and target.exists()):
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)


def _moves(work, path, old_names, new_names):
    moves = [(path / name, work / "old" / name) for name in old_names]
    return moves + [(work / "new" / name, path / name) for name in new_names]


def _acquire(lock):
    """Whether a lock is held now. Some file systems have none.

    Raises:
        Timeout: another process holds it.
    """
    try:
        lock.acquire(timeout=0)
    except (Timeout, FileNotFoundError):
        raise
    except (NotImplementedError, OSError):
        pass
    return lock.is_locked
