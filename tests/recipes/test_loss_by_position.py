"""Runs with and without carried states, compared by position in a stream."""

import json

import pytest

import loss_by_position
from pretraining.recipe import UsageError

TINY = ["--steps", "26", "--eval_every", "0", "--packing", "documents", "--sample_prompts", "[]"]


def test_runs_are_compared_if_they_differ_in_carrying_alone(in_process, workshop, capsys):
    others = {"windows": [], "carried": ["--carry_state", "true"], "longer": ["--batch_size", "8"]}
    for name, more in others.items():
        assert in_process("--name", name, *TINY, *more).returncode == 0
    windows, carried, longer = (str(workshop.folder / name) for name in others)
    options = [
        "--output_dir",
        str(workshop.folder / "out"),
        "--cache_dir",
        str(workshop.folder / "c"),
    ]
    options += ["--text", "400", "--width", "40", "--positions", "160"]
    loss_by_position.start([windows, "--carried", carried, *options])
    result = json.loads((workshop.folder / "out/loss_by_position.json").read_text())
    assert {name: len(x[0]["bits_per_byte"]) for name, x in result["curves"].items()} == {
        "windows": 4,
        "carried": 4,
    }
    # The first bin of either is within a window of 32 and little more: no state to speak of.
    first = [result["curves"][name][0]["bits_per_byte"][0] for name in ("windows", "carried")]
    assert all(0 < value < 9 for value in first)
    assert (workshop.folder / "out/loss_by_position.png").stat().st_size > 10_000
    with pytest.raises(UsageError, match="trained otherwise than .*batch_size: 4 -> 8"):
        loss_by_position.start([windows, "--carried", longer, *options])
    with pytest.raises(UsageError, match="expected a finished run, got nowhere"):
        loss_by_position.start(["nowhere", "--carried", carried])
