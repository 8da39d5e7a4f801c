"""The files of a study: one for each trial read in one way, whole or not there.

A file is named after all that its figures follow from, so what is there stays right, whatever else
changes in the TOML, and a study that was killed goes on.
"""

import hashlib
import json
import time
from dataclasses import dataclass

from ablating.matching import widths
from ablating.planning import Plan
from pretraining.reporting import write_json

from .measuring import losses, recall, recall_by_segment

FORMAT = 1  # of the measures; another number is another file
READINGS = "readings"


@dataclass(frozen=True)
class Reading:
    """One trial in one way.

    Attributes:
        study: the `Study`.
        name: of the way.
        task: of the sweep.
        seed: of the trial.
        trial: the `Trial`; None: there is none, see `trials_of`.
    """

    study: object
    name: str
    task: str
    seed: int
    trial: object

    @property
    def way(self):
        """The `Way`."""
        return self.study.ways[self.name]

    @property
    def path(self):
        """Where the figures lie."""
        of = [FORMAT, self.trial.hash, self.study.measured(self.task, self.way)]
        text = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:12]
        name = f"{self.way.model}-{self.task}-{self.seed}-{text}.json"
        return self.study.folder / READINGS / name

    def why_not(self):
        """Why it cannot be measured; empty if it can."""
        if self.trial is None:
            return "its rate is not chosen yet, or was chosen on this seed"
        status = self.trial.status()
        return "" if status == "done" else f"its trial is {status}"

    def is_done(self):
        """Whether it has been measured."""
        return self.trial is not None and self.path.is_file()

    def figures(self):
        """What was measured, None if nothing."""
        return json.loads(self.path.read_text())["figures"] if self.is_done() else None

    def measure(self, held_out):
        """Measures it and writes its file.

        Args:
            held_out: the tokens that a trial on text did not see; None on recall.
        """
        began = time.monotonic()
        of = self.study, self.trial, self.way
        recalled = recall_by_segment if self.study.segment_length else recall
        figures = recalled(*of) if held_out is None else losses(*of, held_out)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        seconds = time.monotonic() - began
        record = {
            "way": self.name,
            "model": self.way.model,
            "task": self.task,
            "seed": self.seed,
            "trial": self.trial.hash,
            **self.study.measured(self.task, self.way),
            "figures": figures,
            "seconds": seconds,
        }
        write_json(self.path, record)
        return seconds


def trials_of(study):
    """The trials that a study reads: (task, model, seed) -> `Trial`, None where no rate is chosen.

    Those of the best rate. The seed on which rates were compared is among them only if there was
    but one rate: else its score is the best of several, and so too good.
    """
    sweep = study.plan_of
    tasks = [task for task in (study.text, study.recall) if task]
    plan = Plan(sweep, {task: widths(sweep, task) for task in tasks})
    found = {}
    for task in tasks:
        for model in {way.model: None for way in study.ways.values()}:
            rates = sweep.sweep.learning_rates
            known = [t for t in plan.of_model(task, model) if t.role != "noise"]
            reported = [trial for trial in known if trial.role == "report"]
            rate = rates[0] if len(rates) == 1 else reported[0].learning_rate if reported else None
            for seed in study.seeds:
                is_free = len(rates) == 1 or seed != sweep.sweep.select_seed
                found[task, model, seed] = (
                    plan.trial(task, model, rate, seed, "report") if rate and is_free else None
                )
    return found


def readings_of(study):
    """All readings of a study, in the order in which they are measured: seed by seed."""
    trials = trials_of(study)
    return [
        Reading(study, name, task, seed, trials[task, way.model, seed])
        for seed in study.seeds
        for task in (study.text, study.recall)
        if task
        for name, way in study.ways.items()
    ]
