"""Where trials run. An engine starts a trial and returns a job, which can be asked and stopped:

    start(trial, slot) -> job      poll() -> exit status of its command, None while it runs
    close()                        stop()    SIGTERM to it and to what it started: it saves and ends

The command is the same everywhere, and so is what is left behind, so a sweep that one engine began
another one goes on with.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from pretraining.recipe import UsageError

from .forking import Nursery, die_with
from .trials import LOG

RECIPES = Path(__file__).resolve().parents[1]
IS_LINUX = sys.platform == "linux"


def command_of(trial, gpus):
    """The command of a trial, as it is run here."""
    launch = [sys.executable]
    if gpus > 1:
        launch += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
        launch += ["--num_processes", str(gpus), "--main_process_port", "0"]
        launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    return [*launch, str(RECIPES / "pretrain.py"), str(trial.recipe_file), "--resume_or_start"]


def cores():
    """Physical cores that this process may run on."""
    count = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = min(count, len(os.sched_getaffinity(0)))
    return count


def threads_of(engine):
    """Threads of each trial."""
    return max(1, cores() // engine.slots)


class Process:
    """A command in a group of processes of its own, which ends with the process that started it.

    Args:
        command: words.
        log: a file that gets its output, after what is there.
        environment: variables beside those of this process.
    """

    def __init__(self, command, log, environment):
        parent = os.getpid()
        with open(log, "ab") as output:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=(lambda: die_with(parent)) if IS_LINUX else None,
            )
        self.pid = self._process.pid

    def poll(self):
        """Its exit status, -n if signal n killed it, None while it runs."""
        return self._process.poll()


class Fork:
    """The same, forked from a process that has imported what the command needs.

    Args:
        nursery: a `Nursery`.
        command: words, of which the first is a Python.
        log, environment: as of `Process`.
    """

    def __init__(self, nursery, command, log, environment):
        self._nursery = nursery
        self.pid = nursery.start(command[1:], log, environment)

    def poll(self):
        """As of `Process`."""
        return self._nursery.poll(self.pid)


class Job:
    """A trial that runs as a child of this process, which notes how it ended.

    Args:
        trial: the trial.
        process: its `Process` or `Fork`.
    """

    def __init__(self, trial, process):
        self.trial, self.process, self.began = trial, process, time.monotonic()

    def poll(self):
        """Its exit status, None while it runs; DONE or FAILED is there before it is returned."""
        code = self.process.poll()
        if code is not None:
            self.trial.mark(code, time.monotonic() - self.began, last_lines(self.trial))
        return code

    def stop(self):
        """SIGTERM to it and to what it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)


class Local:
    """Slots on this machine.

    Args:
        engine: the sweep's table.
    """

    name = "local"

    def __init__(self, engine):
        self.gpus, self.slots = engine.gpus_per_trial, engine.slots
        self.threads = threads_of(engine)
        self.devices = visible_gpus()
        if self.gpus * self.slots > len(self.devices):
            raise UsageError(
                f"slots x gpus_per_trial = {self.slots} x {self.gpus} takes "
                f"{self.slots * self.gpus} GPUs, and there are {len(self.devices)}; say less with "
                "--engine.slots or --engine.gpus_per_trial."
            )
        if not IS_LINUX:
            print("Only Linux ends trials with a driver that was killed: end them yourself then.")

        # What a GPU's libraries keep does not stand a fork.
        self.nursery = Nursery() if IS_LINUX and not self.gpus else None

    def start(self, trial, slot):
        """Starts a trial in a slot, a number from 0."""
        devices = self.devices[slot * self.gpus : (slot + 1) * self.gpus]
        environment = {
            "OMP_NUM_THREADS": str(self.threads),
            "CUDA_VISIBLE_DEVICES": ",".join(devices),
        }
        how = command_of(trial, self.gpus), trial.folder / LOG, environment
        return Job(trial, Fork(self.nursery, *how) if self.nursery else Process(*how))

    def close(self):
        """Nothing can be started after it."""
        if self.nursery:
            self.nursery.close()


def run_and_mark(trial, gpus, environment, folder, started=None):
    """Runs a trial to its end, for engines that have others run it.

    Args:
        trial: the trial.
        gpus: that it has.
        environment: variables beside those of this process.
        folder: that paths are relative to.
        started: called with the job.

    Returns:
        The exit status of its command.
    """
    os.chdir(folder)
    job = Job(trial, Process(command_of(trial, gpus), trial.folder / LOG, environment))
    if started:
        started(job)
    while True:
        try:
            while (code := job.poll()) is None:
                time.sleep(0.2)
            return code
        except KeyboardInterrupt:  # how Ray cancels
            job.stop()


def visible_gpus():
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip()]
    import torch  # without a context on a device, which would take memory there

    return [str(index) for index in range(torch.cuda.device_count())]


def last_lines(trial, count=5):
    """The end of what a trial said."""
    path = trial.folder / LOG
    text = path.read_bytes()[-4000:].decode(errors="replace") if path.is_file() else ""
    return [line for line in text.replace("\r", "\n").splitlines() if line.strip()][-count:]


def engine_named(name, sweep):
    """An engine by the name that --engine gives.

    Raises:
        UsageError: no such engine, or a package that it needs is missing.
    """
    if name == "local":
        return Local(sweep.engine)
    if name == "slurm":
        from .slurm import Slurm

        return Slurm(sweep)
    from .ray_tasks import Ray

    return Ray(sweep)
