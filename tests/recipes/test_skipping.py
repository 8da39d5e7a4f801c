"""Steps that are skipped: which, what becomes of them, and how a run goes on."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch

from pretraining import stepping, training
from pretraining.carrying import Carried
from pretraining.skipping import FEWEST, WINDOW, Spikes

ONE = SimpleNamespace(device="cpu", num_processes=1, reduce=lambda x, how: x)
SHORT = ["--steps", "40", "--eval_every", "0", "--checkpoint_every", "30", "--decay_steps", "5"]
BAD = {24: math.nan, 25: 50.0, 33: math.inf}  # steps counted from 0 -> what their loss is made


@pytest.fixture
def spoil(monkeypatch):
    """`spoil(bad)` multiplies the losses and gradients of these steps."""

    def spoil(bad):
        original = training.Run._train_step

        def spoiled(run):
            factor = bad.get(run.step, 1.0)

            def gradients(accelerator, model, *batches):
                loss = stepping.accumulate_gradients(accelerator, model, *batches)
                for parameter in model.parameters():
                    parameter.grad.mul_(factor)
                return loss * factor

            monkeypatch.setattr(training, "accumulate_gradients", gradients)
            return original(run)

        monkeypatch.setattr(training.Run, "_train_step", spoiled)

    return spoil


def lines_of(workshop, kind, name="tiny"):
    return [line for line in workshop.curve(name) if line["kind"] == kind]


def test_spikes_are_skipped_and_written_down(in_process, workshop, spoil):
    spoil(BAD)
    options = [*SHORT, "--skip_spikes", "4"]
    result = in_process(*options, "--name", "whole")
    assert result.returncode == 0, result.stderr
    assert "3 steps skipped" in result.stdout and "step 26 skipped: its loss is" in result.stdout
    skipped = lines_of(workshop, "skipped", "whole")
    assert [line["step"] for line in skipped] == [25, 26, 34]
    assert [line["samples"] for line in skipped] == [[96, 99], [100, 103], [132, 135]]
    assert len(skipped[0]["first_tokens"]) == 4
    assert "NaN" not in (workshop.folder / "whole" / "metrics.jsonl").read_text()
    assert json.loads((workshop.folder / "whole" / "run.json").read_text())["skipped"] == 3
    trained = [line["step"] for line in lines_of(workshop, "train", "whole")]
    assert trained == [n for n in range(1, 41) if n not in (25, 26, 34)]


def test_resumed_is_bit_identical(in_process, workshop, spoil):
    """From between two spikes: what is usual comes from the checkpoint, and so does the average."""
    spoil(BAD)
    options = [*SHORT, "--skip_spikes", "4", "--ema_decay", "0.9", "--z_loss", "1e-3"]
    assert in_process(*options, "--name", "whole").returncode == 0
    shutil.copytree(workshop.folder / "whole", workshop.folder / "cut")
    shutil.rmtree(workshop.folder / "cut" / "checkpoint-40")
    result = in_process(*options, "--name", "cut", "--resume")
    assert "after step 30" in result.stdout
    assert workshop.curve("cut") == workshop.curve("whole")
    for part in (".", "ema"):
        files = [workshop.folder / n / part / "model.safetensors" for n in ("whole", "cut")]
        assert files[0].read_bytes() == files[1].read_bytes()
    manifest = json.loads((workshop.folder / "cut" / "checkpoint-40/checkpoint.json").read_text())
    assert len(manifest["spikes"]["losses"]) == 37


def test_too_many_in_a_row_end_the_run(in_process, workshop, spoil):
    spoil(dict.fromkeys(range(20, 40), math.nan))
    result = in_process(*SHORT, "--skip_spikes", "4", "--max_skipped", "3")
    assert result.returncode == 3
    (line,) = result.stderr.splitlines()
    assert "step 23: loss nan" in line and "the 3. step in a row to be skipped" in line
    assert "begin again with --overwrite" in line
    assert [line["step"] for line in lines_of(workshop, "skipped")] == [21, 22]


def test_what_a_spike_is():
    spikes = Spikes(3.0)
    for _ in range(FEWEST):
        assert spikes.reason(ONE, 2.0, 1.0) is None
    assert "its loss is 6.1, the median 2" == spikes.reason(ONE, 6.1, 1.0)
    assert "its gradient norm is 3.5, the median 1" == spikes.reason(ONE, 2.0, 3.5)
    assert "its gradient norm is nan" == spikes.reason(ONE, 2.0, math.nan)
    assert spikes.in_a_row == 3
    assert spikes.reason(ONE, 5.9, 2.9) is None and spikes.in_a_row == 0
    for _ in range(WINDOW):
        spikes.reason(ONE, 5.0, 2.9)
    assert spikes.reason(ONE, 14.0, 8.0) is None  # what is usual has changed
    again = Spikes(3.0, json.loads(json.dumps(spikes.state()))["spikes"])
    assert again.state() == spikes.state()
    assert Spikes(3.0).reason(ONE, 1e9, 1e9) is None  # too early to say
    assert Spikes(0.0).reason(ONE, math.nan, 1.0) is None and Spikes(0.0).state() == {}


def test_processes_decide_alike():
    """Norms that differ from process to process lead to one decision."""

    class Pair(SimpleNamespace):
        device, num_processes = "cpu", 2

        def reduce(self, figures, how):
            return figures + torch.tensor([2.0, 5.0])

    spikes = Spikes(3.0, {"losses": [2.0] * 20, "norms": [1.0] * 20, "in_a_row": 0})
    assert spikes.reason(Pair(), 2.0, 0.9) is None  # (0.9 + 5) / 2
    assert spikes.reason(Pair(), 2.0, 1.2) == "its gradient norm is 3.1, the median 1"


def test_the_logged_loss_is_cross_entropy(in_process, workshop):
    """z-loss moves the weights, and is no bits of the text."""
    options = ["--steps", "26", "--eval_every", "0", "--loss_chunk_size", "16"]
    for name, factor in (("without", "0"), ("with", "1e-2")):
        assert in_process(*options, "--name", name, "--z_loss", factor).returncode == 0
    (first, *_), (other, *_) = (lines_of(workshop, "train", n) for n in ("without", "with"))
    assert first["loss"] == pytest.approx(other["loss"], rel=1e-6)
    assert first["gradient_norm"] != pytest.approx(other["gradient_norm"], rel=1e-3)


def test_a_carried_state_begins_anew(in_process, workshop, spoil, monkeypatch):
    """After a step whose numbers are none, and in a run that was saved there."""
    spoil({20: math.nan, 22: 60.0})
    emptied, original = [], Carried.empty

    def watched(carried):
        emptied.append(steps[-1])
        original(carried)

    steps, seed = [0], training.step_seed
    monkeypatch.setattr(training, "step_seed", lambda *of: steps.append(of[1]) or seed(*of))
    monkeypatch.setattr(Carried, "empty", watched)
    options = [*SHORT, "--carry_state", "true", "--packing", "documents", "--skip_spikes", "4"]
    options += ["--checkpoint_every", "21", "--steps", "30"]
    result = in_process(*options, "--name", "whole")
    assert result.returncode == 0, result.stderr
    assert "step 21 skipped" in result.stdout and "step 23 skipped" in result.stdout
    assert emptied == [0, 0, 20]  # as it was made, at the beginning, after the step
    shutil.copytree(workshop.folder / "whole", workshop.folder / "tiny")
    shutil.rmtree(workshop.folder / "tiny" / "checkpoint-30")
    result = in_process(*options, "--resume")
    assert "after step 21" in result.stdout and result.returncode == 0, result.stderr
    assert workshop.curve("tiny") == workshop.curve("whole")
