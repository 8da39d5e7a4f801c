"""The passkey task: what documents hold, what is measured, and errors of one line."""

import json

import pytest
import torch

import passkey
from passkey import ASK, FIRST_DIGIT, FIRST_FILLER, KEY, NUM_DIGITS, START, Task, documents

TASK = """
segment_length = 16
train_segments = 2
test_segments = [2, 3]
batch_size = 4
steps = 3
warmup_steps = 1
test_documents = 6

[models.small]
architecture = "infini"
hidden_size = 16
num_hidden_layers = 1
num_attention_heads = 2
segment_length = 16
learning_rate_scales = { "*.gate" = 5.0 }
"""


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "task.toml"
    path.write_text(f'output_dir = "{tmp_path / "out"}"\n' + TASK)
    return path


@pytest.mark.parametrize("distance", [0, 1, 6])
def test_documents(distance):
    generator = torch.Generator().manual_seed(0)
    distances = torch.full((500,), distance)
    ids = documents(500, 7, 16, distances, generator)
    assert ids.shape == (500, 112) and (ids[:, 0] == START).all()
    assert (ids[:, -NUM_DIGITS - 1] == ASK).all()
    row, place = (ids == KEY).nonzero().T
    assert row.tolist() == list(range(500))
    assert (6 - place // 16 == distance).all()
    assert ((place + NUM_DIGITS) // 16 == place // 16).all()  # the key is in one segment
    for start, n in zip(place, range(500)):
        key = ids[n, start + 1 : start + 1 + NUM_DIGITS]
        assert torch.equal(key, ids[n, -NUM_DIGITS:])
        rest = torch.cat([ids[n, 1:start], ids[n, start + 1 + NUM_DIGITS : -NUM_DIGITS - 1]])
        assert (rest >= FIRST_FILLER).all()
    # All places and digits occur.
    assert len(place.unique()) == (5 if distance == 0 else 10 if distance == 6 else 11)
    assert ids[:, -NUM_DIGITS:].unique().tolist() == list(range(FIRST_DIGIT, FIRST_FILLER))


class Oracle(torch.nn.Module):
    """Knows the key where it lies within so many segments of the answer."""

    def __init__(self, reach):
        super().__init__()
        self.reach = reach

    def forward(self, ids, use_cache, logits_to_keep):
        logits = torch.zeros(*ids.shape, passkey.VOCAB_SIZE)
        for row, place in zip(*(ids == KEY).nonzero().T):
            if (ids.shape[1] - 1) // 16 - place // 16 <= self.reach:
                answer = ids[row, place + 1 : place + 1 + NUM_DIGITS]
                logits[row, -NUM_DIGITS - 1 : -1].scatter_(-1, answer[:, None], 1.0)
        return type("Output", (), {"logits": logits[:, -logits_to_keep:]})


def test_accuracy_is_by_distance():
    task = Task({}, segment_length=16, test_segments=(3, 5), test_documents=10, batch_size=4)
    found = passkey.measure(task, Oracle(reach=1), seed=0)
    assert found == {3: [1, 1, 0], 5: [1, 1, 0, 0, 0]}


def test_a_run_and_its_report(toml, tmp_path):
    for seed in ("0", "1"):
        assert passkey.main([str(toml), "--model", "small", "--seed", seed, "--steps", "2"]) == 0
    assert passkey.main([str(toml), "--report"]) == 0
    result = json.loads((tmp_path / "out" / "passkey.json").read_text())
    row = result["models"]["small"]
    assert row["seeds"] == [0, 1] and [len(row["accuracy"][n]) for n in "23"] == [2, 3]
    assert all(len(values) == 2 for values in row["accuracy"]["3"])
    assert (tmp_path / "out" / "passkey.png").stat().st_size > 1000
    assert result["runs"][0]["task"]["steps"] == 2


def test_learns_within_a_segment(toml):
    """The task can be learnt: its loss falls far below that of guessing digits, log(10) = 2.3."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2}
    task = passkey.read_task(toml)
    task.models["small"] |= sizes
    task.models["small"]["learning_rate"] = 3e-3
    short = {"steps": 200, "warmup_steps": 20, "batch_size": 32}
    task = passkey.replace(task, train_segments=1, **short)
    model, task = passkey.build(task, "small", 0)
    assert task.learning_rate == 3e-3 and task.learning_rate_scales == {"*.gate": 5.0}
    curve = []
    passkey.train(task, model, 0, curve.append)
    assert [figures["step"] for figures in curve] == [100, 200]
    assert curve[1]["loss"] < 1.5 < curve[0]["loss"] < 3
    assert "gate/mean" in curve[1]


@pytest.mark.parametrize(
    ("arguments", "text", "message"),
    [
        (["--model", "smal"], "", "no model 'smal' in the TOML: did you mean 'small'?"),
        ([], "", "name a --model (small), or ask for a --report"),
        (["--report"], "", "there are no results"),
        (["--model", "small"], "stepz = 3\n", "unknown key 'stepz'"),
        (["--model", "x"], "[models.x]\narchitecture = 'y'\n", "x has architecture 'y'"),
        (["--model", "x"], "[models.x]\narchitecture = 'infini'\nsize = 3\n", "no field 'size'"),
    ],
)
def test_errors_are_one_line(toml, capsys, arguments, text, message):
    head, tail = (text, "") if text.startswith("stepz") else ("", text)
    toml.write_text(head + toml.read_text() + tail)
    assert passkey.main([str(toml), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
