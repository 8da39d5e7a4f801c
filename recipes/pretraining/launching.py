"""How a script was started: refuses what was not asked for, picks threads, keeps memory."""

import ctypes
import os
import signal
import sys

import psutil
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from .recipe import UsageError, nearest

WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# What `accelerate launch` or its config file may ask for and this recipe does not do.
NOT_DONE = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
    "ACCELERATE_DOWNCAST_BF16": "downcast_bf16",
}
# What tells glibc how to keep memory, or takes its place; whoever sets one has chosen.
MEMORY_CHOICES = ("GLIBC_TUNABLES", "LD_PRELOAD")
# Of <malloc.h>, for mallopt.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")


def is_on(value):
    """Whether an environment variable, None if there is none, says yes."""
    return (value or "").lower() in ("1", "true", "yes", "y", "t", "on")


def check_environment(environ):
    """Refuses what the launcher asks for and would get otherwise, or not at all.

    Compilation (--dynamo_...) is done as asked, --mixed_precision by `precision_of`.

    Args:
        environ: environment variables, before accelerate reads them.

    Raises:
        UsageError: a way of training that the recipe does not know.
    """
    for name, called in NOT_DONE.items():
        if is_on(environ.get(name)):
            raise UsageError(
                f"the launcher asks for {called} ({name}={environ[name]}), which this recipe does "
                "not do; launch without it: data parallelism alone, with gradient_checkpointing "
                "or replay_segment_length where memory is short, or --sequence_parallel N for one "
                "text over N processes."
            )
    if is_on(environ.get("ACCELERATE_USE_FSDP")) and environ.get("FSDP_VERSION", "1") != "2":
        raise UsageError(
            "the launcher asks for the first version of FSDP, which this recipe does not do; say "
            "fsdp_version: 2, or launch with --config_file recipes/accelerate/fsdp2.yaml."
        )
    accumulation = environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS") or "1"
    if accumulation not in ("1", "auto"):
        raise UsageError(
            f"the launcher asks for {accumulation} steps of gradient accumulation "
            "(ACCELERATE_GRADIENT_ACCUMULATION_STEPS), which the recipe decides; unset that, and "
            "say --micro_batch_size for how many windows are run at once."
        )


def check_launcher(words):
    """Refuses options that `accelerate launch` would leave out without a word.

    Without --use_parallelism_config it reads none of the others.

    Args:
        words: of the launcher's command line.

    Raises:
        UsageError: they ask for a parallelism that the script never hears of.
    """
    for word in words:
        name = word.partition("=")[0].replace("-", "_")
        if name.startswith("__parallelism_config_"):
            raise UsageError(
                f"the launcher got {word.partition('=')[0]}, which this recipe does not do and "
                "accelerate leaves out without a word; launch without it, and say "
                "--sequence_parallel N to the recipe for one text over N processes."
            )


def launcher_words(environ):
    """The command line of the launcher that started this process, [] if there is none."""
    if "ACCELERATE_MIXED_PRECISION" not in environ:
        return []
    try:
        return psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):  # it has ended, or is somebody else's
        return []


def check_launch(environ, num_processes, command):
    """Refuses the two ways in which several processes are asked for and something else comes.

    Args:
        environ: environment variables as the script found them.
        num_processes: processes that accelerate sees.
        command: the script as it was called, with its arguments, for the message.

    Raises:
        UsageError: one process where more were asked for, or as many separate runs.
    """
    sizes = [int(environ[name]) for name in WORLD_SIZES if environ.get(name)]
    several = (
        "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes "
        f"{sizes[0] if sizes else 2} --num_machines 1 {command}"
    )
    # accelerate sets an address for the processes to meet at, and then starts only one.
    from_accelerate = "ACCELERATE_USE_CPU" in environ and "MASTER_ADDR" in environ
    if from_accelerate and not sizes and "LOCAL_RANK" not in environ:
        raise UsageError(
            "accelerate was asked for several processes but started one, as it does on a CPU; "
            f"run: {several} (for one process: --num_processes 1, and unset MASTER_ADDR)"
        )
    if sizes and sizes[0] != num_processes:
        raise UsageError(
            f"{sizes[0]} processes were started but each trains alone ({num_processes} in its "
            f"group), all writing one folder; run: {several}"
        )


def check_trackers(names):
    """Refuses trackers that accelerate would leave out without a word.

    Raises:
        UsageError: an unknown tracker, or one whose package is not installed.
    """
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UsageError(f"unknown tracker {name!r}: {nearest(name, LOGGER_TYPE_TO_CLASS)}")
        if name not in map(str, get_available_trackers()):
            raise UsageError(f"the tracker {name} is not installed; run: pip install {name}")


def set_cpu_threads(requested, environ):
    """Sets how many threads this process computes with on a CPU, and returns it.

    0 means OMP_NUM_THREADS if somebody chose it, else every physical core that this process may
    run on, shared by the processes of this machine. A plain `accelerate launch` exports
    OMP_NUM_THREADS=1 unasked, which would leave all cores but one idle.
    """
    chosen = environ.get("OMP_NUM_THREADS", "")
    launched = "ACCELERATE_MIXED_PRECISION" in environ or "TORCHELASTIC_RUN_ID" in environ
    if requested:
        threads = requested
    elif chosen.isdigit() and (int(chosen) > 1 or not launched):
        threads = int(chosen)
    else:
        cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
        if hasattr(os, "sched_getaffinity"):
            cores = min(cores, len(os.sched_getaffinity(0)))
        threads = max(1, cores // int(environ.get("LOCAL_WORLD_SIZE", 1)))
    torch.set_num_threads(threads)
    return threads


def keep_freed_memory(environ):
    """Has this process keep what is freed, on a CPU with glibc; returns whether it does so now.

    By itself glibc gives tensors of more than 32 MB back to the system at once, logits among them,
    and the next step has all their pages cleared anew: up to a quarter of a step. The price is
    memory, as freed pieces of any size stay. A choice that somebody made in the environment
    (MALLOC_..., or another allocator by LD_PRELOAD) stands.
    """
    if any(name in MEMORY_CHOICES or name.startswith("MALLOC_") for name in environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:  # neither musl nor other systems have it
        return False
    most = (1 << 31) - 1
    return mallopt(M_MMAP_MAX, 0) == 1 and mallopt(M_TRIM_THRESHOLD, most) == 1


class StopSignals:
    """Remembers the signals by which users and schedulers stop a run, or tell it to make ready.

    The loop then saves and leaves between two steps. What whoever started the run had ignored, as
    nohup does SIGHUP, stays ignored.
    """

    def __init__(self):
        self.received = None
        for name in STOP_SIGNALS:
            number = getattr(signal, name, None)  # not every system has all of them
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._remember)

    def _remember(self, number, frame):
        # Launchers pass signals on, so one Ctrl-C comes several times: later ones change nothing.
        self.received = self.received or signal.Signals(number)


def die_with_launcher(environ):
    """Makes Linux send SIGTERM when the launcher dies: one that was killed passes nothing on."""
    launched = "ACCELERATE_MIXED_PRECISION" in environ or "TORCHELASTIC_RUN_ID" in environ
    if launched and sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
