"""What processes share and starts leave behind: locks, hashes of files, unfinished caches."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from pathlib import Path

from filelock import FileLock, Timeout

from .recipe import UsageError

LARGE = 2**24  # bytes; hashes of so much are remembered
UNFINISHED = re.compile(r"([0-9a-f]{16})\.(unfinished|[a-z0-9_]{8})")
CACHE_FILES = {f"{name}{end}" for name in ("train", "held_out") for end in (".bin", "_starts.npy")}
CACHE_FILES |= {"corpus.json"}


def sha256(content):
    """The SHA-256 of a string or of bytes, in hexadecimal."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


class Pace:
    """Says now and then how many bytes of a long piece of work are done."""

    def __init__(self, doing, total=None, every_seconds=10):
        self.doing, self.total, self.every_seconds = doing, total, every_seconds
        self.done, self.said = 0, time.monotonic()

    def add(self, num_bytes):
        """Counts bytes as done."""
        self.done += num_bytes
        if time.monotonic() - self.said >= self.every_seconds:
            self.said = time.monotonic()
            whole = f" of {self.total / 1e6:,.0f}" if self.total else ""
            print(f"{self.doing}: {self.done / 1e6:,.0f}{whole} MB", flush=True)


@contextlib.contextmanager
def alone(path, doing):
    """Lets one process at a time in; the others wait as long as it takes.

    The kernel releases the lock of a process that dies. No collective operation waits meanwhile,
    so no timeout of a process group runs.

    Args:
        path: the lock's file, which stays.
        doing: what the process inside does, for those that wait.

    Raises:
        UsageError: the folder cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=1)
        except Timeout:
            if os.environ.get("RANK", "0") == "0":  # once for all processes of a launch
                print(f"waiting for another process, which {doing}", flush=True)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot write to {path.parent}: {reason}; choose --cache_dir.") from None
    try:
        yield
    finally:
        lock.release()


def remove_unfinished(cache_dir):
    """Removes what killed processes left of caches. Those that are at work hold their lock."""
    for folder in Path(cache_dir).glob("*.*"):
        name = UNFINISHED.fullmatch(folder.name)
        if not (name and folder.is_dir()):
            continue
        lock = FileLock(folder.with_name(f"{name[1]}.lock"))
        # One that is locked is being written; one that vanished was removed by another process.
        with contextlib.suppress(Timeout, OSError), lock.acquire(timeout=0):
            if {path.name for path in folder.iterdir()} <= CACHE_FILES:
                shutil.rmtree(folder)


def file_hashes(paths, cache_dir):
    """The SHA-256 of each file's bytes.

    Of much data they are remembered in `cache_dir`, for as long as size, times and inode say that
    a file is the same.

    Raises:
        UsageError: a file that cannot be read.
    """
    try:
        total = sum(path.stat().st_size for path in paths)
        if total < LARGE:
            return [sha256(path.read_bytes()) for path in paths]
        memory = Path(cache_dir) / "hashes.json"
        pace = Pace("reading files", total)
        with alone(memory.with_suffix(".lock"), "reads files to know them again"):
            known = _read(memory)
            hashes = [_remembered(path, known, pace) for path in paths]
            beside = memory.with_suffix(".new")
            beside.write_text(json.dumps(known))
            os.replace(beside, memory)
        return hashes
    except OSError as error:
        raise UsageError(f"cannot read {error.filename}: {error.strerror}.") from None


def _read(memory):
    try:
        return dict(json.loads(memory.read_text()))
    except (OSError, ValueError, TypeError):
        return {}  # it is only a memory


def _remembered(path, known, pace):
    def state():
        status = path.stat()
        return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]

    before, place = state(), str(path.resolve())
    if known.get(place, [None])[0] == before:
        pace.add(before[0])
        return known[place][1]
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**22):
            digest.update(piece)
            pace.add(len(piece))
    # A file changed this very moment may change again without its times moving on.
    if state() == before and time.time() - max(before[1:3]) / 1e9 > 2:
        known[place] = [before, digest.hexdigest()]
    return digest.hexdigest()
