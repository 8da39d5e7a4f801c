"""Which trials a sweep needs, as far as is known: a function of what has ended.

Each model on each task goes its own way: learning rates on one seed, further ones if the best lies
at the edge, then the best one on the seeds that are reported.
"""

from .trials import FAILED, Trial

ORDER = ("select", "extend", "report", "noise")


class Plan:
    """The trials of a sweep.

    Args:
        sweep: a `Sweep`.
        widths: task -> model -> width of the MLP, None where the sweep says it.
        precision: of all trials whose recipes say "auto"; empty: each decides for itself.
    """

    def __init__(self, sweep, widths, precision=""):
        self.sweep, self.widths, self.precision = sweep, widths, precision
        self._ended = {}  # hash -> (status, score), which no longer changes

    def trial(self, task, model, rate, seed, role):
        """The `Trial` of these."""
        recipe = self.sweep.resolve(task, model, rate, seed, self.widths[task][model])
        folder = self.sweep.folder
        return Trial(task, model, rate, seed, role, recipe, folder, self.precision)

    def outcome(self, trial):
        """(status, score) of a trial that has ended, None of others."""
        if trial.hash not in self._ended:
            status = trial.status()
            if status not in ("done", "diverged", "failed"):
                return None
            self._ended[trial.hash] = status, trial.score()
        return self._ended[trial.hash]

    def trials(self):
        """All trials that are known to be needed, with those that have ended, in a fixed order."""
        pairs = [(task, model) for task in self.sweep.tasks for model in self.sweep.models]
        return [trial for pair in pairs for trial in self.of_model(*pair)]

    def open(self):
        """Those of them that have not ended, in the order in which they should begin.

        All rates come first: at the end of a sweep, when slots run empty, nothing is left that
        waits for another.
        """
        waiting = [trial for trial in self.trials() if self.outcome(trial) is None]
        return sorted(waiting, key=lambda trial: ORDER.index(trial.role))

    def forget_failures(self):
        """Takes the marks off trials that crashed, so that they run again."""
        for trial in self.trials():
            (trial.folder / FAILED).unlink(missing_ok=True)
        self._ended.clear()

    def best(self, trials):
        """The trial with the best score, None if none has one.

        Of equally good ones the one in the middle: accuracies may all be 1.
        """
        sign = -1 if self.sweep.lower_is_better(trials[0].task) else 1
        trials = sorted(trials, key=lambda trial: trial.learning_rate)
        ranked = []
        for index, trial in enumerate(trials):
            score = (self.outcome(trial) or (None, None))[1]
            if score is not None:
                ranked.append((sign * score, min(index, len(trials) - 1 - index), index))
        return trials[max(ranked)[2]] if ranked else None

    def of_model(self, task, model):
        """The trials of a model on a task that are known to be needed."""
        search = self.sweep.sweep
        trials = [
            self.trial(task, model, rate, search.select_seed, "select")
            for rate in search.learning_rates
        ]
        for further in range(search.extend_at_edge + 1):
            if any(self.outcome(trial) is None for trial in trials):
                return trials
            best = self.best(trials)
            if best is None:
                return trials
            rate = beyond([trial.learning_rate for trial in trials], best.learning_rate)
            if rate is None or further == search.extend_at_edge:
                break
            trials.append(self.trial(task, model, rate, search.select_seed, "extend"))
        rate = best.learning_rate
        trials += [self.trial(task, model, rate, seed, "report") for seed in search.seeds]
        if model == search.baseline:
            trials.append(self.trial(task, model, rate, search.seeds[0], "noise"))
        return trials

    def expected(self):
        """How many trials there will be, if no best rate lies at an edge."""
        search, known = self.sweep.sweep, self.trials()
        each = len(search.learning_rates) + len(search.seeds)
        total = len(self.sweep.tasks) * (each * len(self.sweep.models) + 1)
        return max(total + sum(trial.role == "extend" for trial in known), len(known))


def beyond(rates, best):
    """The next learning rate where the best one is the first or the last of them, else None."""
    rates = sorted(rates)
    if len(rates) < 2 or best not in (rates[0], rates[-1]):
        return None
    further = rates[0] ** 2 / rates[1] if best == rates[0] else rates[-1] ** 2 / rates[-2]
    return float(f"{further:.2g}")
