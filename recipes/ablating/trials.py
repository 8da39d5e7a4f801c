"""Trials: one command of pretrain.py each, in a folder that is named after its recipe.

Beside the recipe and the run lies DONE or FAILED once it has ended. So what is there is what was
done, whichever driver, machine or engine did it.
"""

import hashlib
import json
import shlex
import signal
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from pretraining.recipe import Recipe
from pretraining.reporting import read_metrics, write_json
from pretraining.run_folder import METRICS, is_run, read_record

DONE, FAILED, LOG, RECIPE = "DONE", "FAILED", "log.txt", "recipe.toml"
TRIALS = "trials"
PLACES = ("name", "output_dir", "cache_dir")  # where things are is no part of what was done
# Keys that recipes have got since trials are named -> their defaults, which change nothing of what
# a trial does, and so not its name: every new key belongs here.
LATER = {"position_skip": {}, "attention_shift_groups": 0, "cross_batch_range": 0}
LATER |= {"sequence_parallel": 1}
DIVERGED = 3  # pretrain.py's exit status
STOPPED = {128 + number for number in signal.Signals}  # by a signal, after saving


@dataclass(frozen=True)
class Trial:
    """One training run of a sweep.

    Attributes:
        task, model: names in the sweep.
        learning_rate: its peak.
        seed: of weights and data.
        role: "select" (the rate on the first seed), "extend" (a further rate), "report" (the best
            rate on another seed) or "noise" (once more, for what the machine adds).
        recipe: what it does.
        sweep_folder: of the sweep.
        precision: that all trials of the sweep train in where recipes say "auto"; empty: each
            decides for itself.
    """

    task: str
    model: str
    learning_rate: float
    seed: int
    role: str
    recipe: Recipe
    sweep_folder: Path
    precision: str = ""

    @cached_property
    def hash(self):
        """Names the folder: the same for the same recipe, whatever sweep asks for it."""
        values = {k: v for k, v in asdict(self.recipe).items() if k not in PLACES}
        values = {k: v for k, v in values.items() if k not in LATER or v != LATER[k]}
        if self.role == "noise":
            values["role"] = self.role
        text = json.dumps(values, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def folder(self):
        """Where all of it lies."""
        return self.sweep_folder / TRIALS / self.hash

    @property
    def run_folder(self):
        """What pretrain.py writes to."""
        return self.folder / "run"

    @property
    def recipe_file(self):
        """What pretrain.py reads."""
        return self.folder / RECIPE

    @property
    def command(self):
        """What a person would type in the repository's folder."""
        words = ["python", "recipes/pretrain.py", str(self.recipe_file), "--resume_or_start"]
        return shlex.join(words)

    def title(self):
        """The trial in a few words."""
        return f"{self.task} {self.model} {self.learning_rate:g} seed {self.seed} {self.role}"

    def write_recipe(self):
        """Puts the recipe where the command expects it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        values = asdict(self.recipe) | {"name": "run", "output_dir": str(self.folder)}
        if self.recipe.precision == "auto":
            begun = read_record(self.run_folder).get("precision")
            values["precision"] = begun or self.precision or "auto"
        lines = [f"{key} = {toml_of(value)}\n" for key, value in values.items()]
        self.recipe_file.write_text("".join(lines), encoding="utf-8")

    def mark(self, code, seconds, lines=()):
        """Writes DONE or FAILED, nothing if the trial was stopped and goes on later.

        Args:
            code: exit status of the command; -n: killed by signal n.
            seconds: that it took, the last time.
            lines: the last ones that it said.
        """
        if code in STOPPED:
            return
        status = {0: "done", DIVERGED: "diverged"}.get(code, "failed")
        record = {"status": status, "exit": code, "seconds": seconds, "command": self.command}
        if status == "failed":
            record["lines"] = list(lines)
        write_json(self.folder / (FAILED if status == "failed" else DONE), record)

    def marker(self):
        """What DONE or FAILED says, None if there is neither."""
        for name in (DONE, FAILED):
            if (self.folder / name).is_file():
                return json.loads((self.folder / name).read_text(encoding="utf-8"))
        return None

    def status(self):
        """ "done", "diverged", "failed", "interrupted" or "waiting"."""
        marker = self.marker()
        if marker:
            return marker["status"]
        return "interrupted" if is_run(self.run_folder) else "waiting"

    def lines(self, kind):
        """The lines of one kind in metrics.jsonl."""
        found, _ = read_metrics(self.run_folder / METRICS)
        return [line for line in found if line["kind"] == kind]

    def score(self):
        """Held-out bits per byte, or the accuracy on a synthetic task; None: not measured."""
        measured = self.lines("held_out")
        if not measured or self.status() != "done":
            return None
        is_synthetic = getattr(self.recipe, "task", {})
        return measured[-1].get("accuracy" if is_synthetic else "bits_per_byte")


def toml_of(value):
    """A value as TOML writes it. JSON's strings, numbers and lists are TOML's too."""
    if isinstance(value, dict):
        pairs = (f"{json.dumps(key)} = {toml_of(item)}" for key, item in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_of, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
