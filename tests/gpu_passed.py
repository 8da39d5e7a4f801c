"""A pytest plugin: which tests passed with which code, in a file; those are not run again.

`make gpu` has ten minutes on a device that is seldom to be had. Loaded by `-p gpu_passed`. The file
gets a line of JSON as a test ends, so that an end by force loses nothing. What never ran comes
first, then what failed or was skipped.

After an illegal access of memory nothing runs in that process any more: it ends, and no test is
blamed for another.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import pytest

LOST = 86  # kernels/bench/gpu/testing.py begins another process


def pytest_addoption(parser):
    group = parser.getgroup("passed")
    group.addoption("--passed-record", help="file of what passed")
    group.addoption("--passed-sources", default="", help="a word for the code that is tested")
    group.addoption("--passed-call", default="", help="a word for this call")


def pytest_configure(config):
    if config.getoption("passed_record"):
        config.pluginmanager.register(Passed(config), "what passed")


def entries(path):
    """The last line of each test: {its id: {"outcome", "sources", "call", ...}}."""
    path = Path(path)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = {}
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:  # cut off where a process was ended
            continue
        found[entry["test"]] = entry
    return found


def device_is_lost():
    """Whether this process can do nothing more on its GPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


class Passed:
    """The hooks, where a record is asked for."""

    def __init__(self, config):
        self.path = config.getoption("passed_record")
        self.sources, self.call = (config.getoption(f"passed_{x}") for x in ("sources", "call"))
        self.root, self.files = config.rootpath, {}
        self.is_worker = hasattr(config, "workerinput")
        self.parts = {}

    def word(self, test):
        """A word for the code that a test depends on, its own file included."""
        name = test.split("::")[0]
        if name not in self.files:
            path = self.root / name
            content = path.read_bytes() if path.is_file() else b""
            self.files[name] = hashlib.sha256(self.sources.encode() + content).hexdigest()[:16]
        return self.files[name]

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        known, chosen, left_out = entries(self.path), [], []
        for item in items:
            entry = known.get(item.nodeid, {})
            is_new = entry.get("sources") != self.word(item.nodeid)
            ran_now = entry.get("call") == self.call
            is_left_out = not is_new and (entry["outcome"] == "passed" or ran_now)
            (left_out if is_left_out else chosen).append((not is_new, item))
        chosen.sort(key=lambda pair: pair[0])
        items[:] = [item for _, item in chosen]
        if left_out:
            config.hook.pytest_deselected(items=[item for _, item in left_out])

    def pytest_runtest_logreport(self, report):
        if self.is_worker:  # the process that started it is told, and writes
            return
        outcomes = self.parts.setdefault(report.nodeid, [])
        outcomes.append(report.outcome)
        if report.outcome == "failed":
            self.tell(f"{report.nodeid}: {reason(report)}")
        # A process that ended has a report of no phase that the plugin would know.
        if report.when in ("setup", "call"):
            return
        self.write(self.parts.pop(report.nodeid), report)

    def write(self, outcomes, report):
        """A line about a test that ended."""
        worst = next((x for x in ("failed", "skipped") if x in outcomes), "passed")
        test = report.nodeid
        entry = {"test": test, "outcome": worst, "sources": self.word(test), "call": self.call}
        if worst == "failed":
            entry["why"] = reason(report)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def tell(self, line):
        """A line for who runs this as a part."""
        if path := os.environ.get("ZOO_GPU_FAILURES"):
            with open(path, "a", encoding="utf-8") as file:
                file.write(" ".join(line.split())[:300] + "\n")

    def pytest_runtest_logfinish(self, nodeid):
        if device_is_lost():
            os._exit(LOST)


def reason(report):
    """The line of an error that says most."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr or "")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:200] if lines else report.outcome
