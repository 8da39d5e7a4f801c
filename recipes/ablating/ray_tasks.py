"""Trials as tasks of a Ray cluster, one that is there or one of this machine.

[engine.ray] holds arguments of ray.init: address = "auto" for the cluster that is there. Tasks note
in their folders how they ended, and nothing else is asked: there is no second memory of a sweep.
"""

import os
import pickle
import sys
import time

from pretraining.recipe import UsageError

from .engines import RECIPES, threads_of

STOPPED = 143  # as of a command that SIGTERM ended


class Ray:
    """A cluster, of which the sweep has `slots` tasks at once.

    Args:
        sweep: a `Sweep`.

    Raises:
        UsageError: Ray is missing, or there is no such cluster.
    """

    name = "ray"

    def __init__(self, sweep):
        try:
            import ray
        except ImportError:
            raise UsageError(
                "--engine ray needs Ray; run: pip install 'longzoo[ray]' (or ray)"
            ) from None
        self.ray, self.gpus = ray, sweep.engine.gpus_per_trial
        threads = threads_of(sweep.engine)
        self.environment = {"OMP_NUM_THREADS": str(threads)}
        if not self.gpus:
            self.environment["CUDA_VISIBLE_DEVICES"] = ""
        try:
            ray.init(**{"log_to_driver": False, **sweep.engine.ray})
        except (ConnectionError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"Ray refuses [engine.ray]: {reason}") from None
        path = [str(RECIPES), str(RECIPES.parent)]

        def run(arguments):  # goes to the cluster by value: nobody there knows this package
            sys.path[:0] = path
            from ablating.engines import run_and_mark

            return run_and_mark(*pickle.loads(arguments))

        self.task = ray.remote(num_cpus=threads, num_gpus=self.gpus, max_retries=0)(run)

    def start(self, trial, slot):
        """Hands a trial to the cluster, which runs it when it has room."""
        arguments = trial, self.gpus, self.environment, os.getcwd()
        return RayJob(self.ray, trial, self.task.remote(pickle.dumps(arguments)))

    def close(self):
        """Leaves the cluster; one of this machine ends."""
        self.ray.shutdown()


class RayJob:
    """A trial in a task.

    Args:
        ray: the module.
        trial: the trial.
        reference: to the task's result.
    """

    def __init__(self, ray, trial, reference):
        self.ray, self.trial, self.reference = ray, trial, reference
        self.is_stopped, self.began = False, time.monotonic()

    def poll(self):
        """As of any engine's job."""
        done, _ = self.ray.wait([self.reference], timeout=0)
        if not done:
            return None
        try:
            return self.ray.get(self.reference)
        except self.ray.exceptions.RayError as error:
            if self.is_stopped:
                return STOPPED
            lines = str(error).strip().splitlines()[-5:]
            self.trial.mark(1, time.monotonic() - self.began, lines)
            return 1

    def stop(self):
        """Interrupts the task, which passes it on as SIGTERM."""
        self.is_stopped = True
        self.ray.cancel(self.reference, force=False)
