"""Launches: what is refused, and how many threads a process takes."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from pretraining.launching import (
    StopSignals,
    check_environment,
    check_launch,
    check_trackers,
    keep_freed_memory,
    set_cpu_threads,
)
from pretraining.recipe import UsageError
from pretraining.reporting import Lasting

RIGHT = "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2"


def test_one_process_where_two_were_asked_for():
    environ = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    with pytest.raises(UsageError, match="asked for several processes but started one") as error:
        check_launch(environ, 1, "recipes/pretrain.py x.toml")
    assert RIGHT in str(error.value)
    assert str(error.value).count(" recipes/pretrain.py x.toml (for one process") == 1


def test_two_runs_of_one_process():
    environ = {"LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    with pytest.raises(UsageError, match="2 processes were started but each trains alone") as error:
        check_launch(environ, 1, "recipes/pretrain.py x.toml")
    assert RIGHT in str(error.value)


def test_the_hint_is_what_the_user_typed(in_process, monkeypatch):
    """The script's path as it was called, from where the user stands, and the number asked for."""
    environment = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1"}
    alone = SimpleNamespace(num_processes=1)
    monkeypatch.setattr("pretrain.PartialState", lambda cpu: alone)
    result = in_process("--name", "a b", script="../../some where/pretrain.py", **environment)
    assert result.returncode == 2
    assert "--num_processes 4 " in result.stderr
    assert " '../../some where/pretrain.py' /" in result.stderr
    assert result.stderr.endswith("--name 'a b'\n")


@pytest.mark.parametrize(
    ("environ", "processes"),
    [
        ({}, 1),
        ({"ACCELERATE_USE_CPU": "False", "ACCELERATE_MIXED_PRECISION": "no"}, 1),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}, 1),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}, 2),
        ({"OMPI_COMM_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "a"}, 2),
    ],
)
def test_good_launches(environ, processes):
    check_launch({"MASTER_PORT": "1", **environ}, processes, "x")


@pytest.mark.slow
def test_accelerate_launch_of_one_process_is_refused(workshop):
    launch = ["--cpu", "--num_processes", "2", "--num_machines", "1"]
    _, errors = workshop.launch(options=launch).communicate()
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert RIGHT in line
    assert not (workshop.folder / "tiny").exists()


def test_threads(monkeypatch):
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: 8 if logical else 4)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    accelerate = {"ACCELERATE_MIXED_PRECISION": "no"}
    assert set_cpu_threads(0, {}) == 4
    assert set_cpu_threads(3, {"OMP_NUM_THREADS": "1"}) == 3
    assert set_cpu_threads(0, {"OMP_NUM_THREADS": "1"}) == 1
    # accelerate exports 1 whether or not anybody asked for it.
    assert set_cpu_threads(0, {"OMP_NUM_THREADS": "1", **accelerate}) == 4
    assert set_cpu_threads(0, {"OMP_NUM_THREADS": "2", **accelerate}) == 2
    assert set_cpu_threads(0, {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2", **accelerate}) == 2
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0}, raising=False)
    assert set_cpu_threads(0, {}) == 1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ACCELERATE_USE_FSDP", "true", "asks for the first version of FSDP"),
        ("ACCELERATE_USE_MEGATRON_LM", "True", "asks for Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "asks for a parallelism config"),
        ("ACCELERATE_DOWNCAST_BF16", "1", "asks for downcast_bf16"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "4 steps of gradient accumulation"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "asks for mixed precision 'fp16'"),
    ],
)
def test_what_the_launcher_asks_for_and_does_not_get(in_process, workshop, name, value, message):
    result = in_process("--steps", "26", **{name: value})
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: the launcher asks for ") and message in line
    assert not (workshop.folder / "tiny").exists()


def test_what_accelerates_config_file_says_by_default():
    check_environment(
        {
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
            "ACCELERATE_MIXED_PRECISION": "no",
            "ACCELERATE_USE_FSDP": "false",
            "ACCELERATE_DYNAMO_BACKEND": "no",
        }
    )


def test_compiling_leaves_fp32_as_it_is(in_process, monkeypatch):
    """accelerate allows TensorFloat-32 when it compiles, on a GPU."""

    def allowing(*arguments, **options):
        torch.backends.cuda.matmul.allow_tf32 = True
        return Accelerator(*arguments, **options)

    monkeypatch.setattr("pretrain.Accelerator", allowing)
    assert in_process("--steps", "26", "--eval_every", "0").returncode == 0
    assert torch.backends.cuda.matmul.allow_tf32 is False


def test_ignored_signals_stay_ignored(monkeypatch):
    """As nohup does with SIGHUP."""
    numbers = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signals = StopSignals()
        signal.raise_signal(signal.SIGHUP)
        assert signals.received is None
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert signals.received is signal.SIGUSR1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_closed_terminal_ends_no_run():
    class Closed:
        encoding = "utf-8"

        def write(self, *text):
            raise OSError(5, "Input/output error")

        flush = write

    stream = Lasting(Closed())
    print("step 3", file=stream, flush=True)
    assert stream.encoding == "utf-8"


def test_trackers():
    check_trackers(["tensorboard"])
    with pytest.raises(UsageError, match="did you mean 'tensorboard'?"):
        check_trackers(["tensorbord"])
    with pytest.raises(UsageError, match="clearml is not installed; run: pip install clearml"):
        check_trackers(["clearml"])


@pytest.mark.parametrize("config", ["ddp.yaml", "fsdp2.yaml", "zero2.yaml", "zero3_offload.yaml"])
def test_what_our_own_files_ask_for_is_done(workshop, config):
    """accelerate reads them, and the recipe refuses nothing of what it makes of them."""
    asked = workshop.launched_with(config, 2)
    check_environment(asked)
    assert asked["ACCELERATE_MIXED_PRECISION"] == "no"  # the recipe's precision decides
    plugins = {name for name in ("FSDP", "DEEPSPEED") if f"ACCELERATE_USE_{name}" in asked}
    assert plugins == {"d": set(), "f": {"FSDP"}, "z": {"DEEPSPEED"}}[config[0]]


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_freed_memory_is_kept():
    """A tensor as large as one just freed takes its pages: none is cleared anew.

    In a process of its own: one that has run other tests has a heap that nobody knows.
    """
    script = """
import resource, torch
from pretraining.launching import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)  # 64 MB; glibc gives back what is above 32
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
is_kept = keep_freed_memory({"PATH": "/bin"})
print(is_kept, min([faults() for _ in range(4)][1:]))
"""
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    is_kept, fewest = done.stdout.split()
    assert is_kept == "True" and int(fewest) < 100, done


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "LD_PRELOAD"])
def test_a_choice_of_memory_stands(name, monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", None)
    assert keep_freed_memory({name: "1"}) is False
