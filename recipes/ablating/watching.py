"""What a sweep shows while it runs: a line for each trial that ended, a table of those that run."""

import json
import shutil
import sys
import time

from pretraining.reporting import duration
from pretraining.run_folder import METRICS

EVERY = 60  # seconds between tables where no terminal shows them in place
ROW = "  {:<40} {:>13}  {:>12}  {:>16}  {}"


class Table:
    """Redrawn in place on a terminal, else printed now and then.

    Args:
        plan: a `Plan`.
    """

    def __init__(self, plan):
        self.plan = plan
        self.is_live = sys.stdout.isatty()
        self.drawn, self.printed = 0, time.monotonic()
        self.began, self.shown = {}, []  # when each trial began here; the lines on the screen
        self.seconds = []  # that trials took here

    def draw(self, running):
        """Shows how far trials are.

        Args:
            running: those that run, by slot.
        """
        now = time.monotonic()
        for trial in running:
            self.began.setdefault(trial.hash, now)
        if not self.is_live and now - self.printed < EVERY:
            return
        self.printed = now
        rows = [self._row(trial, now) for trial in running]
        self._show([self._summary(len(running)), *rows])

    def ended(self, trial, code):
        """Says how a trial ended.

        Args:
            trial: the trial.
            code: exit status of its command.
        """
        seconds = time.monotonic() - self.began.pop(trial.hash, time.monotonic())
        marker = trial.marker()
        status, score = self.plan.outcome(trial) or ("interrupted", None)
        if status == "done":
            self.seconds.append(seconds)
        unit = "bits per byte" if self.plan.sweep.lower_is_better(trial.task) else "right"
        said = f"{score:.4f} {unit}" if score is not None else status
        self.say(f"{trial.title():<42} {said}, {duration(seconds)}")
        if status == "failed":
            how = f"exit status {code}" if code >= 0 else f"signal {-code}"
            self.say(f"  {trial.folder}: {how}; --retry_failed runs it again. Its last lines:")
            for line in marker["lines"]:
                self.say(f"  | {line}")

    def say(self, text):
        """Prints a line that stays."""
        self._clear()
        print(text, flush=True)
        if self.is_live:
            self._print(self.shown)

    def close(self):
        """Takes the table away."""
        self._clear()
        sys.stdout.flush()

    def _summary(self, num_running):
        counts = {"done": 0, "diverged": 0, "failed": 0}
        for trial in self.plan.trials():
            outcome = self.plan.outcome(trial)
            if outcome:
                counts[outcome[0]] += 1
        ended, expected = sum(counts.values()), self.plan.expected()
        said = [f"{ended} of about {expected} trials", f"{num_running} running"]
        said += [f"{counts[name]} {name}" for name in ("diverged", "failed") if counts[name]]
        if self.seconds:
            mean = sum(self.seconds) / len(self.seconds)
            left = mean * max(expected - ended - num_running / 2, 0) / self.plan.sweep.engine.slots
            said.append(f"about {duration(left)} left")
        return ", ".join(said)

    def _row(self, trial, now):
        line, steps = last_train_line(trial), trial.recipe.steps
        if line is None:
            return f"  {trial.title():<40} starting, {duration(now - self.began[trial.hash])}"
        eta = line["seconds"] / line["step"] * (steps - line["step"])
        return ROW.format(
            trial.title(),
            f"step {line['step']}/{steps}",
            f"loss {line['loss']:.4f}",
            f"{line['tokens_per_second']:,.0f} tokens/s",
            f"ETA {duration(eta)}",
        )

    def _show(self, lines):
        if not self.is_live:
            print(*lines, sep="\n", flush=True)
            return
        if lines != self.shown:
            self._clear()
            self._print(lines)

    def _print(self, lines):
        width, height = shutil.get_terminal_size()
        shown = [line[: width - 1] for line in lines[: height - 1]]  # one that wraps moves the rest
        sys.stdout.write("".join(line + "\n" for line in shown))
        sys.stdout.flush()
        self.drawn, self.shown = len(shown), lines

    def _clear(self):
        if self.drawn:
            sys.stdout.write(f"\x1b[{self.drawn}F\x1b[J")
        self.drawn = 0


def last_train_line(trial):
    """The newest line of training in metrics.jsonl, None before the first."""
    try:
        with open(trial.run_folder / METRICS, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 8192))
            content = file.read()
    except FileNotFoundError:
        return None
    for text in reversed(content.split(b"\n")):
        try:
            line = json.loads(text)
        except ValueError:
            continue  # half written, or its beginning was not read
        if isinstance(line, dict) and line.get("kind") == "train":
            return line
    return None
