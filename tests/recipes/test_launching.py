"""Launches: what is refused, and how many threads a process takes."""

import sys

import pytest
import torch

from launching import check_launch, check_trackers, precision_of, set_cpu_threads
from recipe import UsageError

RIGHT = "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2"


def test_one_process_where_two_were_asked_for():
    environ = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    with pytest.raises(UsageError, match="asked for several processes but started one") as error:
        check_launch(environ, 1, "recipes/pretrain.py x.toml")
    assert RIGHT in str(error.value) and "recipes/pretrain.py x.toml" in str(error.value)


def test_two_runs_of_one_process():
    environ = {"LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    with pytest.raises(UsageError, match="2 processes were started but each trains alone") as error:
        check_launch(environ, 1, "recipes/pretrain.py x.toml")
    assert RIGHT in str(error.value)


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
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    result = workshop.run(launch=[*launch, "--num_machines", "1"])
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
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


def test_precision(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert [precision_of(asked, cpu) for asked in ("auto", "bf16", "fp32")] == [
        "bf16",
        "bf16",
        "fp32",
    ]
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False}, raising=False
    )
    assert [precision_of(asked, cpu) for asked in ("auto", "fp32")] == ["fp32", "fp32"]
    with pytest.raises(UsageError, match="has no bf16"):
        precision_of("bf16", cpu)


def test_trackers():
    check_trackers(["tensorboard"])
    with pytest.raises(UsageError, match="did you mean 'tensorboard'?"):
        check_trackers(["tensorbord"])
    with pytest.raises(UsageError, match="clearml is not installed; run: pip install clearml"):
        check_trackers(["clearml"])
