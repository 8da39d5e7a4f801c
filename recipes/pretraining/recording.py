"""What the main process writes down of a run: run.json, metrics.jsonl, loss.png."""

import dataclasses
import shlex
import sys

from .building import REPOSITORY
from .checkpointing import move_aside, remove_unfinished
from .plotting import plot_loss
from .reporting import Metrics, environment, write_json
from .run_folder import METRICS, PLOT, RECORD, read_record


class Records:
    """The files of a run, opened where it begins or goes on.

    Args:
        recipe: of the run.
        checkpoint: what is continued.
        about: what else run.json says of the run.
        corpus: the record of what is read.

    Attributes:
        files: names of the final model's files in the run's folder.
        diverged: steps at which the run diverged so far.
    """

    def __init__(self, recipe, checkpoint, about, corpus):
        self.recipe, self.about, self.corpus = recipe, about, corpus
        run_dir = recipe.run_dir
        remove_unfinished(run_dir)
        for folder, reason in checkpoint.damaged.items():
            aside = move_aside(folder, "damaged").name
            print(f"{folder} cannot be used ({reason}): it is now {aside}")
        record = read_record(run_dir)
        if (run_dir / RECORD).exists() and not record:
            aside = move_aside(run_dir / RECORD, "damaged").name
            print(f"{run_dir / RECORD} cannot be read: it is now {aside}")
        self.files, self.diverged = record.get("files") or [], record.get("diverged") or []
        self.metrics = Metrics(run_dir / METRICS, checkpoint.step)

    def write(self, kind, now, figures):
        """Appends a line to metrics.jsonl.

        Args:
            kind: of line.
            now: step, tokens trained on and seconds of training.
            figures: what was measured.
        """
        self.metrics.write(kind=kind, **now, **figures)

    def draw(self, title):
        """Draws the curve."""
        gzip = self.corpus["held_out"]["gzip_bits_per_byte"]
        plot_loss(self.recipe.run_dir / PLOT, self.metrics.lines, gzip, title)

    def results(self):
        """What the last evaluation found, {} before the first."""
        measured = [line for line in self.metrics.lines if line["kind"] == "held_out"]
        if not measured:
            return {}
        last = measured[-1]
        average = {k: last[k] for k in ("ema_bits_per_byte",) if k in last}
        return {
            "held_out_bits_per_byte": last["bits_per_byte"],
            **average,
            "gzip_bits_per_byte": self.corpus["held_out"]["gzip_bits_per_byte"],
            "step": last["step"],
            "tokens": last["tokens"],
            "training_seconds": last["seconds"],
        }

    def num_skipped(self):
        """How many steps were skipped."""
        return sum(line["kind"] == "skipped" for line in self.metrics.lines)

    def said_of_skipped(self):
        """What the last line on the terminal adds."""
        count = self.num_skipped()
        return f"; {count} steps skipped" if count else ""

    def save(self):
        """Writes run.json."""
        record = {
            "command": shlex.join(sys.argv),
            "recipe": dataclasses.asdict(self.recipe),
            **self.about,
            "corpus": self.corpus,
            **environment(REPOSITORY),
            "results": self.results(),
            "changes": [line for line in self.metrics.lines if line["kind"] == "change"],
            "diverged": self.diverged,
            "skipped": self.num_skipped(),
            "files": self.files,
        }
        write_json(self.recipe.run_dir / RECORD, record)
