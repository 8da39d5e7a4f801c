"""Trials as jobs of Slurm, through submitit: the same command; a job that is requeued resumes it.

[engine.slurm] holds parameters of submitit's executor (slurm_partition, timeout_min ...). Jobs go
on when the driver is gone, and note themselves how they ended; the next driver finds them again.
"""

import json
import os
import time

from pretraining.recipe import UsageError
from pretraining.reporting import write_json

from .engines import RECIPES, run_and_mark

JOB = "job.json"  # in a trial's folder: the job that it runs in
STOPPED = 143  # as of a command that SIGTERM ended


class Slurm:
    """A queue of jobs, of which the sweep has `slots` at once.

    Args:
        sweep: a `Sweep`.

    Raises:
        UsageError: submitit or Slurm is missing, or a parameter that it does not know.
    """

    name = "slurm"

    def __init__(self, sweep):
        try:
            import submitit
        except ImportError:
            raise UsageError(
                "--engine slurm needs submitit; run: pip install 'longzoo[slurm]' (or submitit)"
            ) from None
        self.gpus = sweep.engine.gpus_per_trial
        given = dict(sweep.engine.slurm)
        cluster = given.pop("cluster", "slurm")
        cpus = given.get("cpus_per_task", max(1, 4 * self.gpus) if self.gpus else 1)
        self.environment = {"OMP_NUM_THREADS": str(cpus)}
        if not self.gpus:
            self.environment["CUDA_VISIBLE_DEVICES"] = ""
        parameters = {
            "name": sweep.name,
            "cpus_per_task": cpus,
            "gpus_per_node": self.gpus,
            "tasks_per_node": 1,
            "timeout_min": 24 * 60,
        }
        if cluster == "local":
            del parameters["cpus_per_task"]  # which it has no notion of
        folder = sweep.folder / "jobs"
        _make_importable()
        try:
            # A job that has run out of time goes on in another, however often.
            self.executor = submitit.AutoExecutor(
                folder, cluster=cluster, slurm_max_num_timeout=10**6
            )
            self.executor.update_parameters(**{**parameters, **given})
        except (RuntimeError, NameError, ValueError, AssertionError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"submitit refuses [engine.slurm]: {reason}") from None
        self.kind = {"slurm": submitit.SlurmJob, "local": submitit.LocalJob}[cluster]
        self.folder = folder

    def start(self, trial, slot):
        """Submits a trial, unless a job of an earlier driver still has it."""
        record = trial.folder / JOB
        if record.is_file():
            known = json.loads(record.read_text(encoding="utf-8"))["job"]
            job = self.kind(folder=self.folder, job_id=known)
            if not job.done(force_check=True):
                return SlurmJob(trial, job)
        job = self.executor.submit(Requeued(trial, self.gpus, self.environment, os.getcwd()))
        write_json(record, {"job": job.job_id})
        return SlurmJob(trial, job)

    def close(self):
        """Nothing: what runs goes on."""


class SlurmJob:
    """A trial in a job.

    Args:
        trial: the trial.
        job: of submitit.
    """

    def __init__(self, trial, job):
        self.trial, self.job, self.is_stopped = trial, job, False
        self.began = time.monotonic()

    def poll(self):
        """As of any engine's job."""
        marker = self.trial.marker()
        if marker is not None:
            return marker["exit"]
        if not self.job.done():
            return None
        if self.is_stopped or self.job.state.startswith("CANCEL"):
            return STOPPED
        try:
            return self.job.result()
        except Exception as error:  # submitit's: no result, or one of the job's own
            lines = [self.job.state, *str(error).strip().splitlines()[-5:]]
            self.trial.mark(1, time.monotonic() - self.began, lines)
            return 1

    def stop(self):
        """SIGTERM through Slurm."""
        self.is_stopped = True
        self.job.cancel(check=False)


class Requeued:
    """What a job does; if Slurm's time is up, it is requeued and does it again."""

    def __init__(self, trial, gpus, environment, folder):
        self.arguments, self.job = (trial, gpus, environment, folder), None

    def __call__(self):
        """Runs the trial; returns the exit status of its command."""
        trial, gpus, environment, folder = self.arguments
        return run_and_mark(trial, gpus, environment, folder, self._keep)

    def _keep(self, job):
        self.job = job

    def checkpoint(self):
        """What submitit calls before it requeues: the trial saves first."""
        import submitit

        self.job.stop()
        while self.job.poll() is None:
            time.sleep(0.2)
        return submitit.helpers.DelayedSubmission(Requeued(*self.arguments))


def _make_importable():
    """Jobs find this package where the driver does: the environment goes with them."""
    path = [str(RECIPES), str(RECIPES.parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, path)))
