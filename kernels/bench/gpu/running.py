"""Parts of a run on a GPU: one process each, with a budget, one after the other.

What ends, ends for one part: a device that is lost to a process is not to the next, and a part that
takes too long is stopped, with all processes that it started. What it had written by then stays.
What is done for this device, these versions and this code is left out by a second run.
"""

import json
import os
import signal
import subprocess
import time
from typing import NamedTuple

from zoo.kernels.bench.gpu.failures import PLACE
from zoo.kernels.bench.gpu.sources import ROOT, fingerprint

STOPPED_SECONDS = 5.0  # that a process has to end by itself when it is told to


class Part(NamedTuple):
    """A part of the run.

    Attributes:
        name: of the part.
        what: it does, for people.
        seconds: its budget.
        command: words; {seconds} is what it has, {output} the path that its results begin with.
        output: what its result file is called after the device.
        files: that the result depends on, beside zoo/ and kernels/.
    """

    name: str
    what: str
    seconds: float
    command: tuple[str, ...]
    output: str
    files: tuple[str, ...] = ()


class Record:
    """What ran and how it ended, in a file: {"device", "versions", "parts": {name: {...}}}.

    Args:
        path: of the file.
        setting: {"device", "versions"}; a file of another one is begun anew.
    """

    def __init__(self, path, setting):
        self.path, self.content = path, {**setting, "parts": {}}
        if path.exists():
            old = json.loads(path.read_text())
            if all(old.get(key) == value for key, value in setting.items()):
                self.content["parts"] = old["parts"]

    def is_done(self, part):
        """Whether the part ran to its end, on this device, with the code that is here now."""
        entry = self.content["parts"].get(part.name, {})
        return entry.get("state") == "done" and entry["sources"] == fingerprint(*part.files)

    def write(self, part, **entry):
        """Keeps how a part ended."""
        self.content["parts"][part.name] = entry
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text(json.dumps(self.content, indent=1) + "\n")
        unfinished.replace(self.path)


def run_parts(parts, record, output, limit, commit=None, again=False, environment=None):
    """Runs what is not done, in order; prints a line for each part and one for each failure.

    Args:
        parts: in their order.
        record: a `Record`.
        output: the path that names of result files begin with.
        limit: seconds; no part begins after them, and none is let go on.
        commit: what the record is to say of the code.
        again: whether to run what is done, too.
        environment: variables to set for the parts.

    Returns:
        Whether all are done now.
    """
    start, all_done = time.monotonic(), True
    for part in parts:
        if not again and record.is_done(part):
            print(f"{part.name}: done before", flush=True)
            continue
        left = limit - (time.monotonic() - start)
        if left <= 0:
            print(f"{part.name}: not begun, {limit:.0f} s are over", flush=True)
            all_done = False
            continue
        entry = _run(part, output, min(part.seconds, left), environment or {})
        record.write(part, commit=commit, sources=fingerprint(*part.files), **entry)
        all_done = all_done and entry["state"] == "done"
        said = f"{part.name}: {entry['state']} after {entry['seconds']} s of {part.seconds:.0f}"
        print(f"{said}, {entry['file'] or 'nothing written'}", flush=True)
        for line in entry["failures"]:
            print(f"    {line}", flush=True)
    return all_done


def _run(part, output, seconds, environment):
    """The entry of one part: {"state", "seconds", "file", "failures"}."""
    file = output.with_name(output.name + part.output)
    told, log = (output.with_name(f"{output.name}{end}") for end in ("-failures.txt", ".log"))
    told.unlink(missing_ok=True)
    words = {"seconds": f"{seconds:.0f}", "output": str(output)}
    command = [word.format(**words) for word in part.command]
    start = time.monotonic()
    with log.open("a") as out:
        out.write(f"\n=== {part.name}: {' '.join(command)}\n")
        out.flush()
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | environment | {PLACE: str(told)},
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # so that all of its processes can be ended, and no others
        )
        try:
            code = child.wait(seconds)
            state = "done" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            state, code = "stopped", None
        finally:
            _end(child)
    failures = told.read_text().splitlines() if told.exists() else []
    told.unlink(missing_ok=True)
    if code:
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        failures.append(f"{how}; the end of {log.name}: {_last_line(log)}")
    return {
        "state": state,
        "seconds": round(time.monotonic() - start, 1),
        "file": file.name if file.exists() else None,
        "failures": failures,
    }


def _end(child):
    """Ends a process and those it started, whatever is left of them."""
    for which, seconds in ((signal.SIGTERM, STOPPED_SECONDS), (signal.SIGKILL, None)):
        try:
            os.killpg(child.pid, which)
        except ProcessLookupError:
            break
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
    child.wait()


def _last_line(log):
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""
