"""Starts the processes of one sequence, and sees that they end.

They are forked from one that has imported PyTorch and the zoo. One that fails leaves the others
waiting for it, and one that leaves an exchange out waits itself: whatever happens, all are killed
soon, and it is said where each of them was.
"""

import json
import os
import time
from pathlib import Path

from filelock import FileLock
from forks import Forks

ROOT = Path(__file__).resolve().parent.parent.parent
IMPORTED = ["torch", "torch.distributed.distributed_c10d", "zoo", "zoo.contract.subject"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
# Without a word from any of them. A model takes 2 s of an idle core.
PATIENCE = int(os.environ.get("PATIENCE", 60))


class Processes:
    """Runs a script in several processes that make one group."""

    def __init__(self):
        self._started = None  # of two workers of pytest one finds what the other has run

    @property
    def _forks(self):
        if self._started is None:
            path = [ROOT, ROOT / "tests", ROOT / "tests/parallel"]
            self._started = Forks(IMPORTED, path, ENVIRONMENT)
        return self._started

    def close(self):
        """Ends the process that is forked, if there is one."""
        if self._started is not None:
            self._started.close()

    def run(self, folder, script, size, *arguments, patience=PATIENCE):
        """Runs `script RANK SIZE STORE OUT *arguments`.

        Args:
            folder: where they write.
            script: a file beside this one.
            size: how many processes.
            patience: seconds without a word after which they are killed.

        Returns:
            What they wrote to OUT, a list of what its lines of JSON hold; and None, or where each
            process was when one failed or none said anything for so long.
        """
        store, out = folder / "store", folder / "out"
        for path in (store, out):
            path.unlink(missing_ok=True)
        file = Path(__file__).parent / script
        forks = [
            self._forks.start(file, rank, size, store, out, *arguments, cwd=folder, env=ENVIRONMENT)
            for rank in range(size)
        ]
        why = _wait(forks, patience)
        for fork in forks:
            if fork.poll() is None:
                fork.kill()
                fork.communicate()
        lines = out.read_text().splitlines() if out.exists() else []
        return [json.loads(line) for line in lines], why


def _wait(forks, patience):
    """Waits until all have ended. Returns None, or what went wrong."""
    said, since, failed_at = None, time.monotonic(), None
    while any(fork.poll() is None for fork in forks):
        now, errors = time.monotonic(), [fork.written()[1] for fork in forks]
        if errors != said:
            said, since = errors, now
        if failed_at is None and any(fork.poll() for fork in forks):
            failed_at = now
        # The others notice that one is gone, and say what they were at.
        if failed_at is not None and now - failed_at > 3:
            break
        if now - since > patience:
            return f"nothing happened for {patience} s:\n" + _where(forks)
        time.sleep(0.01)
    return _where(forks) if any(fork.poll() != 0 for fork in forks) else None


def _where(forks):
    """Of each process the last place that it told, and how it failed."""
    said = []
    for rank, fork in enumerate(forks):
        lines = fork.written()[1].splitlines()
        places = [index for index, line in enumerate(lines) if line.startswith("at ")]
        last = places[-1] if places else 0
        code = fork.poll()
        state = "was waiting" if code is None else f"ended with {code}"
        said.append("\n".join([f"process {rank} {state}", *lines[last:][-30:]]))
    return "\n".join(said)


def once(tmp_path_factory, name, run):
    """What `run(folder)` returns, which only one of pytest-xdist's workers calls."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / name
    folder.mkdir(exist_ok=True)
    result = folder / "result.json"
    with FileLock(folder / "lock"):
        if not result.exists():
            result.write_text(json.dumps(run(folder)))
    return json.loads(result.read_text())
