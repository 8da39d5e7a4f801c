"""A run on a synthetic task, evaluated as it measured itself."""

import json

import pytest

import evaluate
from pretraining.recipe import UsageError

TASK = """
architecture = "retnet"
batch_size = 8
steps = 20
warmup_steps = 4
decay_steps = 4
precision = "fp32"
cpu_threads = 1
eval_every = 0

[task]
name = "recall"
keys = 8
values = 8
pairs = 4
test_pairs = [2, 8]
control_pairs = 0
test_examples = 20

[model]
hidden_size = 16
num_hidden_layers = 1
num_attention_heads = 2
"""


def test_a_task(in_process, workshop, capsys):
    workshop.recipe.write_text(TASK)
    assert in_process("--data", "").returncode == 0
    folder, output = workshop.folder / "tiny", workshop.folder / "out.json"
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    words = [str(folder), "--device", "cpu"]
    capsys.readouterr()
    evaluate.start([*words, "--output", str(output)])
    found, names = json.loads(output.read_text()), [n for n in line if "accuracy" in n]
    assert len(names) == 3 and {n: found[n] for n in names} == {n: line[n] for n in names}
    assert found["nats"] == pytest.approx(line["nats"], rel=1e-6)
    assert found["task"]["pairs"] == 4 and len(found["state_bytes"]) == 3
    shown = capsys.readouterr().out.partition("accuracy, as trained")[2].split()[0]
    assert shown == f"{line['accuracy']:.3f}"
    for more in (["--contexts", "8"], ["--data", "stdlib"], ["--tasks", "zoo_recall_4"]):
        with pytest.raises(UsageError, match=f"on the task recall, not on text; .* {more[0]}"):
            evaluate.start([*words, *more])
