"""What the main process writes down of a run: run.json, metrics.jsonl, loss.png."""

import dataclasses
import shlex
import sys

from .building import REPOSITORY
from .checkpointing import move_aside, remove_unfinished
from .plotting import plot_loss, plot_task
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
        if self.recipe.task:
            return plot_task(self.recipe.run_dir / PLOT, self.metrics.lines, title)
        gzip = self.corpus["held_out"]["gzip_bits_per_byte"]
        return plot_loss(self.recipe.run_dir / PLOT, self.metrics.lines, gzip, title)

    def results(self):
        """What the last evaluation found, {} before the first."""
        measured = [line for line in self.metrics.lines if line["kind"] == "held_out"]
        if not measured:
            return {}
        last = measured[-1]
        figure = "accuracy" if self.recipe.task else "bits_per_byte"
        found = {f"held_out_{figure}": last[figure]}
        found |= {k: last[k] for k in (f"ema_{figure}",) if k in last}
        if not self.recipe.task:
            found["gzip_bits_per_byte"] = self.corpus["held_out"]["gzip_bits_per_byte"]
        return {
            **found,
            "step": last["step"],
            "tokens": last["tokens"],
            "training_seconds": last["seconds"],
        }

    def said_of_results(self):
        """The last evaluation in words, for the last line on the terminal."""
        result = self.results()
        if self.recipe.task:
            return f"accuracy {result['held_out_accuracy']:.4f}"
        return (
            f"held-out {result['held_out_bits_per_byte']:.4f} bits per byte, "
            f"gzip -9 {result['gzip_bits_per_byte']:.4f}"
        )

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
