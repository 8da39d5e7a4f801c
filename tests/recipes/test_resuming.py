"""Continuing a run: after damage, after divergence, with a name that is none."""

import json
import signal

import pytest

from pretraining.continuing import changes_history
from pretraining.recipe import Recipe

SHORT = ["--steps", "26", "--eval_every", "0", "--checkpoint_every", "10"]
DIVERGING = ["--learning_rate", "1e30", "--warmup_steps", "0", "--gradient_clip", "0"]


def error_line(result, status=2):
    assert result.returncode == status, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_a_name_that_is_none(in_process, workshop):
    """It is refused; who wants both says --resume_or_start."""
    assert in_process(*SHORT).returncode == 0
    line = error_line(in_process(*SHORT, "--resume", "--name", "tinny"))
    assert "there is no run in" in line and "did you mean 'tiny'?" in line
    assert not (workshop.folder / "tinny").exists()
    line = error_line(in_process(*SHORT, "--resume", "--output_dir", "nowhere"))
    assert "nowhere does not exist" in line
    begun = in_process(*SHORT, "--resume_or_start", "--name", "tinny")
    assert begun.returncode == 0 and "Continuing" not in begun.stdout
    ended = in_process(*SHORT, "--resume_or_start", "--name", "tinny")
    assert ended.returncode == 0 and "after step 26" in ended.stdout


def test_killed_before_the_first_checkpoint(in_process, workshop):
    (workshop.folder / "tiny").mkdir()
    (workshop.folder / "tiny" / "run.lock").write_text("")
    result = in_process(*SHORT, "--resume")
    assert result.returncode == 0, result.stderr
    assert "Continuing from the beginning: no checkpoint was written yet" in result.stdout


def test_damage_is_passed_over_and_nothing_is_lost(in_process, workshop):
    """A continued run has the numbers of one that was never damaged."""
    run_dir = workshop.folder / "tiny"
    assert in_process(*SHORT, "--keep_checkpoints", "3").returncode == 0
    curve = workshop.curve("tiny")
    (run_dir / "checkpoint-26" / "model.safetensors").write_bytes(b"")
    (run_dir / "checkpoint-20" / "checkpoint.json").write_text("null")
    (run_dir / "run.json").write_text("{")
    with open(run_dir / "metrics.jsonl", "r+") as file:
        lines = file.read().splitlines()
        file.seek(0)
        file.write("\n".join([lines[0], "null", *lines[1:]]) + '\n{"kind": "tra')
    result = in_process(*SHORT, "--resume", "--keep_checkpoints", "3")
    assert result.returncode == 0, result.stderr
    assert f"Continuing from {run_dir / 'checkpoint-10'} after step 10" in result.stdout
    assert "checkpoint-26 cannot be used (model.safetensors is damaged" in result.stdout
    assert "checkpoint-20 cannot be used (checkpoint.json is damaged" in result.stdout
    assert "metrics.jsonl: 2 damaged lines, now in metrics.jsonl.damaged" in result.stdout
    assert "run.json cannot be read: it is now run.json.damaged" in result.stdout
    assert workshop.curve("tiny") == curve
    kept = {path.name for path in run_dir.glob("checkpoint-*")}
    assert kept == {f"checkpoint-{n}" for n in ("10", "20", "26", "20.damaged", "26.damaged")}
    assert (run_dir / "checkpoint-20.damaged" / "model.safetensors").is_file()


def test_without_a_whole_checkpoint(in_process, workshop):
    assert in_process(*SHORT).returncode == 0
    for folder in (workshop.folder / "tiny").glob("checkpoint-*"):
        (folder / "training_state.pt").unlink()
    line = error_line(in_process(*SHORT, "--resume"))
    assert "no checkpoint in" in line and "training_state.pt is missing" in line


def test_the_last_measurement_is_lost(in_process, workshop):
    assert in_process(*SHORT).returncode == 0
    curve = workshop.curve("tiny")
    assert curve[-1]["kind"] == "held_out"
    path = workshop.folder / "tiny" / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]) + "{\n")
    assert in_process(*SHORT, "--resume").returncode == 0
    assert workshop.curve("tiny") == curve


def test_after_divergence_the_advice_works(in_process, workshop):
    run_dir = workshop.folder / "tiny"
    options = ["--steps", "26", "--eval_every", "0", "--checkpoint_every", "1"]
    result = in_process(*options, *DIVERGING)
    line = error_line(result, status=3)
    assert "stopped before the update" in line
    assert "with --resume and a lower --learning_rate (it is 1e+30)" in line
    step = int(line.split("step ")[1].split(":")[0])
    assert f"{run_dir / f'checkpoint-{step - 1}'} is kept" in line
    assert json.loads((run_dir / "run.json").read_text())["diverged"] == [step]
    assert "NaN" not in (run_dir / "metrics.jsonl").read_text()
    # The weights of the steps behind are ruined; what may be continued is the matter here.
    line = error_line(in_process(*options, *DIVERGING, "--resume", "--weight_decay", "0"))
    assert "weight_decay: 0.1 -> 0.0" in line and "--change_schedule" not in line
    calm = [*DIVERGING, "--resume", "--learning_rate", "1e-9"]
    for _ in range(2):  # as when the second attempt is killed before its checkpoint
        result = in_process(*options, *calm)
        assert "From here on learning_rate: 1e+30 -> 1e-09" in result.stdout
        record = json.loads((run_dir / "run.json").read_text())
        (change,) = record["changes"]
        assert change["step"] == step - 1
        assert change["changes"] == ["learning_rate: 1e+30 -> 1e-09"]
    lines = [line for line in workshop.curve("tiny") if line["kind"] == "change"]
    assert len(lines) == 1


def test_divergence_before_the_first_checkpoint(in_process):
    options = ["--steps", "26", "--eval_every", "0", "--checkpoint_every", "0", *DIVERGING]
    line = error_line(in_process(*options), status=3)
    assert "there is no checkpoint yet, so begin again with --overwrite" in line
    calm = ["--learning_rate", "1e-3", "--overwrite"]
    assert in_process(*options, *calm).returncode == 0


def test_another_schedule_takes_a_word(in_process, workshop):
    assert in_process(*SHORT).returncode == 0
    other = ["--resume", "--learning_rate", "1e-3", "--steps", "30"]
    line = error_line(in_process(*SHORT, *other))
    assert "learning_rate: 0.01 -> 0.001" in line and "with --change_schedule" in line
    result = in_process(*SHORT, *other, "--change_schedule")
    assert result.returncode == 0, result.stderr
    curve = workshop.curve("tiny")
    (change,) = [line for line in curve if line["kind"] == "change"]
    assert change["step"] == 26
    assert change["changes"] == ["learning_rate: 0.01 -> 0.001", "steps: 26 -> 30"]
    rates = [line["learning_rate"] for line in curve if line["kind"] == "train"]
    assert len(rates) == 30 and rates[10] > 1e-3 > rates[26]
    line = error_line(in_process(*SHORT, *other, "--change_schedule", "--seed", "1"))
    assert "seed: 0 -> 1" in line


@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_signals_save_and_leave(in_process, workshop, monkeypatch, name):
    from pretraining import training

    number = getattr(signal, name)
    signal.signal(number, lambda number, frame: None)  # in place of the end of all tests
    step_of = training.Run._train_step

    def interrupted(run):
        if run.step == 4:
            signal.raise_signal(number)
        return step_of(run)

    monkeypatch.setattr(training.Run, "_train_step", interrupted)
    result = in_process(*SHORT)
    assert result.returncode == 128 + number
    assert f"{name}: saved step 5; continue with --resume" in result.stdout
    assert (workshop.folder / "tiny" / "checkpoint-5" / "checkpoint.json").is_file()


def test_recipes_from_before():
    """A key that there was not then had the value that is the default now."""
    recipe = Recipe("x", "retnet")
    old = {key: value for key, value in vars(recipe).items() if key != "gradient_clip"}
    assert changes_history(old, recipe, 5) == {}
    assert changes_history(old, Recipe("x", "retnet", gradient_clip=2.0), 5) == {
        "gradient_clip": "gradient_clip: 1.0 -> 2.0"
    }
