"""Sweeps as users run them: killed and gone on with, trials that crash, diverge and wait."""

import json
import os
import re
import signal
import time

import psutil
import pytest
from conftest import ROOT

from ablating.engines import Process, command_of
from pretraining.run_folder import locked

SWEEP = """
[match]
by = "none"
[sweep]
learning_rates = [1e-2]
seeds = [1]
extend_at_edge = 0
[recipe]
steps = 60
warmup_steps = 2
decay_steps = 5
batch_size = 4
sequence_length = 32
precision = "fp32"
eval_every = 0
eval_bytes = 1000
log_every = 2
checkpoint_every = 6
data = "text.txt"
[fields]
hidden_size = 16
num_hidden_layers = 1
num_attention_heads = 2
[tasks.text]
[models.retnet]
architecture = "retnet"
"""
CLOCKS = {"seconds", "tokens_per_second", "peak_memory", "environment"}
PLACES = {"command", "output_dir", "name"}


class Sweeps:
    """A folder with text and a sweep's TOML."""

    def __init__(self, folder, forks):
        self.folder, self.forks = folder, forks
        (folder / "text.txt").write_text("".join(f"{n} squared is {n * n}.\n" for n in range(999)))
        (folder / "tiny.toml").write_text(SWEEP)

    def start(self, *arguments):
        """Starts recipes/ablate.py in a fork."""
        words = [ROOT / "recipes/ablate.py", "run", "tiny.toml", *arguments]
        return self.forks().start(*words, cwd=self.folder, env={"OMP_NUM_THREADS": "1"})

    def run(self, *arguments):
        """The same, waiting for the end: (exit status, output, errors)."""
        process = self.start(*arguments)
        output, errors = process.communicate()
        return process.returncode, output, errors

    def trials(self, name="tiny"):
        return self.folder / "runs/ablations" / name / "trials"

    def results(self, name):
        """What was found, without what depends on the machine."""
        path = self.folder / "runs/ablations" / name / "results.json"
        return without(json.loads(path.read_text()))


def without(value):
    if isinstance(value, dict):
        value = {k: without(x) for k, x in value.items() if k not in CLOCKS | PLACES}
        if "curve" in value:
            value["curve"] = [[step, tokens, loss] for step, tokens, _, loss in value["curve"]]
    return [without(x) for x in value] if isinstance(value, list) else value


@pytest.fixture
def sweeps(tmp_path, forks):
    return Sweeps(tmp_path, forks)


def wait_for(condition, process):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.01)


def is_running(process):
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_killed_and_gone_on_with(sweeps):
    """Nothing runs on, no trial runs twice, and what is found is that of a sweep left alone."""
    code, output, errors = sweeps.run("--name", "whole")
    assert code == 0, errors
    assert output.count(" bits per byte, ") == 3 and "wrote runs/ablations/whole" in output
    driver = sweeps.start("--name", "killed")
    done = lambda: [*sweeps.trials("killed").glob("*/DONE")]  # noqa: E731
    begun = lambda: [*sweeps.trials("killed").glob("*/run/checkpoint-12")]  # noqa: E731
    wait_for(lambda: len(done()) == 1 and len(begun()) == 1, driver)
    trial = begun()[0].parent
    started = psutil.Process(driver.pid).children(recursive=True)
    assert len(started) == 2  # what forks, and a trial
    driver.kill()
    wait = time.monotonic() + 5
    while any(map(is_running, started)) and time.monotonic() < wait:
        time.sleep(0.01)
    assert not any(map(is_running, started))
    assert not (trial / "model.safetensors").exists()  # nor did it come to its end
    marks = {path: path.stat().st_mtime_ns for path in done()}

    driver = sweeps.start("--name", "killed")
    begun = lambda: [*sweeps.trials("killed").glob("*/run/checkpoint-18")]  # noqa: E731
    wait_for(lambda: len(done()) == 2 and len(begun()) == 1, driver)
    driver.send_signal(signal.SIGINT)
    output, errors = driver.communicate()
    assert driver.returncode == 130 and "the same command goes on" in output, errors
    (stopped,) = (x.parent for x in sweeps.trials("killed").glob("*/run") if is_open(x.parent))
    assert "saved step" in (stopped / "log.txt").read_text()
    marks |= {path: path.stat().st_mtime_ns for path in done()}

    code, output, errors = sweeps.run("--name", "killed")
    assert code == 0, errors
    assert output.count(" bits per byte, ") == 1
    assert all(path.stat().st_mtime_ns == mark for path, mark in marks.items()) and len(marks) == 2
    assert sweeps.results("killed") == sweeps.results("whole")
    report, noise = (
        [t for t in sweeps.results("whole")["trials"] if t["role"] == role]
        for role in ("report", "noise")
    )
    assert report[0]["score"] == noise[0]["score"] and report[0]["hash"] != noise[0]["hash"]


def is_open(folder):
    return not (folder / "DONE").exists()


def test_what_crashes_and_diverges_stops_nothing(sweeps):
    """A learning rate that diverges is one more point; a model that crashes may run again."""
    changed = SWEEP.replace("[1e-2]", "[1e-2, 1e9]").replace("steps = 60", "steps = 10")
    changed += '[models.broken]\narchitecture = "retnet"\ninit_from = "./nothing"\n'
    (sweeps.folder / "tiny.toml").write_text(changed.replace('"fp32"', '"auto"'))
    code, output, errors = sweeps.run()
    assert code == 1 and "2 trials crashed" in output, errors
    # What to compute in was decided once, for those that crash too.
    decided = json.loads((sweeps.trials().parent / "precision.json").read_text())["precision"]
    said = [path.read_text() for path in sweeps.trials().glob("*/recipe.toml")]
    assert len(said) == 6 and all(f'precision = "{decided}"\n' in text for text in said)
    runs = [json.loads(path.read_text()) for path in sweeps.trials().glob("*/run/run.json")]
    assert {run["precision"] for run in runs} == {decided}
    assert "| error: init_from: ./nothing is no such folder" in output
    assert re.search(r"text retnet 1e\+09 seed 0 select +diverged", output)
    marks = {path: path.stat().st_mtime_ns for path in sweeps.trials().glob("*/[DF]*")}
    code, output, errors = sweeps.run()
    assert code == 1 and "| error" not in output, errors
    code, output, errors = sweeps.run("--retry_failed")
    assert code == 1 and output.count("text broken") == 2, errors
    again = {path.name for path, mark in marks.items() if path.stat().st_mtime_ns != mark}
    assert again == {"FAILED"} and len(marks) == 6
    statuses = [(t["model"], t["role"], t["status"]) for t in sweeps.results("tiny")["trials"]]
    expected = [("select", "done"), ("select", "diverged"), ("report", "done"), ("noise", "done")]
    assert statuses[:4] == [("retnet", *each) for each in expected]
    assert statuses[4:] == [("broken", "select", "failed")] * 2
    code, output, _ = sweeps.run("--dry_run")
    assert code == 0 and output.splitlines()[-1].startswith("6 trials, 7,680 tokens")


def test_one_driver_at_a_time(sweeps):
    with locked(sweeps.folder / "runs/ablations/tiny"):
        code, _, errors = sweeps.run()
    assert code == 2 and "is being written by process" in errors and errors.count("\n") == 1
    code, _, errors = sweeps.run("--retry_failde")
    assert code == 2 and errors.count("\n") == 1
    assert sweeps.run("--engine.gpus_per_trial", "99")[0] == 2  # nobody has so many


def test_a_command_dies_with_its_process(tmp_path):
    """Where trials are not forked: its group is its own, and SIGTERM reaches all of it."""
    log = tmp_path / "log"
    process = Process(["sh", "-c", "sleep 60 & echo $OMP_NUM_THREADS; wait"], log, {"A": "1"})
    wait = time.monotonic() + 30
    while not log.read_text() and time.monotonic() < wait:
        time.sleep(0.01)
    children = psutil.Process(process.pid).children()
    assert len(children) == 1 and psutil.Process(process.pid).pid == process.pid
    assert os.getpgid(children[0].pid) == process.pid
    os.killpg(process.pid, signal.SIGTERM)
    # The shell may be gone a moment before what it started.
    while (process.poll() is None or is_running(children[0])) and time.monotonic() < wait:
        time.sleep(0.01)
    assert process.poll() == -signal.SIGTERM and not is_running(children[0])


def test_several_gpus_are_launched():
    class OneTrial:
        recipe_file = "recipe.toml"

    plain, launched = command_of(OneTrial, 1), command_of(OneTrial, 4)
    assert plain[1:] == launched[-3:] and plain[1].endswith("recipes/pretrain.py")
    assert launched[launched.index("--num_processes") + 1] == "4"
