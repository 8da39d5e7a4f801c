"""What a run leaves to read: metrics.jsonl, run.json, loss.png, lines on the terminal."""

import contextlib
import functools
import json
import math
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

from tqdm import tqdm


class Metrics:
    """metrics.jsonl: one JSON object per line, with "kind" and "step".

    The kinds are "train", "held_out", "skipped" for a step that was left out, and "change" where a
    continuation has another schedule.

    Attributes:
        lines: what the file holds.
    """

    def __init__(self, path, until_step, say=print):
        """Opens the file, without lines after `until_step`: what a killed run did after its
        checkpoint is done again. Damaged lines are put aside."""
        self.path = Path(path)
        lines, damaged = read_metrics(path)
        # A change is made by the continuation after its step, so the next one makes it again.
        self.lines = [
            line for line in lines if line["step"] + (line["kind"] == "change") <= until_step
        ]
        if damaged:
            aside = self.path.with_name(self.path.name + ".damaged")
            with open(aside, "ab") as file:
                file.write(b"".join(line + b"\n" for line in damaged))
            say(f"{self.path}: {len(damaged)} damaged lines, now in {aside.name}")
        beside = self.path.with_name(self.path.name + ".new")
        beside.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        os.replace(beside, self.path)

    def write(self, **line):
        """Appends a line, flushed to the operating system so that a kill does not lose it."""
        self.lines.append(line)
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")


def read_metrics(path):
    """The lines of a metrics.jsonl, and the bytes of those that are damaged; of no file, none."""
    if not Path(path).is_file():
        return [], []
    lines, damaged = [], []
    for content in Path(path).read_bytes().split(b"\n"):
        try:
            line = json.loads(content) if content else None
        except (ValueError, RecursionError):
            line = None
        if _is_metric(line):
            lines.append(line)
        elif content:
            damaged.append(content)
    return lines, damaged


def _is_metric(line):
    if not isinstance(line, dict) or not isinstance(line.get("kind"), str):
        return False
    numbers = ["step", "tokens", "seconds"]
    if line["kind"] in ("train", "held_out"):
        of_a_task = {"train": "loss", "held_out": "accuracy"}[line["kind"]]
        is_of_text = "bits_per_byte" in line or of_a_task not in line
        numbers.append("bits_per_byte" if is_of_text else of_a_task)
    return type(line.get("step")) is int and all(
        type(line.get(name)) in (int, float) for name in numbers
    )


class Lasting:
    """A text stream that may go away, as a closed terminal does: training goes on without it."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        """Writes, if anybody is still there."""
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self):
        """Sends on what was written."""
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


class Progress:
    """One line about training: redrawn in place on a terminal, else printed now and then."""

    def __init__(self, done, total, every_seconds=10):
        self.total, self.every_seconds = total, every_seconds
        self.begin = self.printed = time.monotonic()
        self.first = done
        self.bar = None
        if sys.stdout.isatty():
            layout = "{percentage:3.0f}% {bar:20} step {n_fmt}/{total_fmt}{postfix}"
            self.bar = tqdm(total=total, initial=done, bar_format=layout, file=sys.stdout)

    def update(self, step, loss, tokens_per_second):
        """Shows the state after `step` steps; loss in nats per token."""
        now = time.monotonic()
        # Evaluations and checkpoints take their share, so the time left counts them too.
        left = (now - self.begin) / max(step - self.first, 1) * (self.total - step)
        figures = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  ETA {duration(left)}"
        if self.bar is not None:
            self.bar.set_postfix_str(figures, refresh=False)
            self.bar.update(step - self.bar.n)
        elif now - self.printed >= self.every_seconds or step == self.total:
            self.printed = now
            self.say(f"step {step}/{self.total}  {figures}")

    def say(self, text):
        """Prints without disturbing the line."""
        if self.bar is None:
            print(text, flush=True)
        else:
            self.bar.write(text, file=sys.stdout)

    def close(self):
        """Leaves the line as it is."""
        if self.bar is not None:
            self.bar.close()


def duration(seconds):
    """Seconds as 0:42, 12:05 or 3:07:00."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def bits_per_byte(nats, num_bytes):
    """Code length of text: the summed negative log likelihood in bits, per UTF-8 byte."""
    return nats / math.log(2) / num_bytes


def versions():
    """Those of Python and of the packages that a run depends on, as far as they are installed."""
    packages = "longzoo torch transformers accelerate datasets numpy tokenizers".split()
    found = {package: _version(package) for package in packages}
    found = {package: version for package, version in found.items() if version}
    return {"python": platform.python_version()} | found


@functools.cache
def _version(package):
    """Of a package, or None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment(repository):
    """Versions and the source's commit, for run.json."""
    found = {"versions": versions()}
    git = ["git", "-C", str(repository)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
        source = {"git_commit": commit.stdout.strip(), "git_changed": bool(changes.stdout.strip())}
    except FileNotFoundError:
        return found
    return found | source if commit.returncode == 0 else found


def write_json(path, value):
    """Writes a JSON file that is never half there."""
    write_whole(path, json.dumps(value, indent=1) + "\n")


def write_whole(path, text):
    """Writes a file that is never half there."""
    beside = Path(path).with_name(Path(path).name + ".new")
    beside.write_text(text)
    os.replace(beside, path)
