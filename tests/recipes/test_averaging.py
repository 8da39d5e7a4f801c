"""The moving average of the weights: its definition, where it is measured and saved."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from pretraining import training
from pretraining.averaging import Average
from zoo.hub.origin import origin_of_checkpoint


def test_it_is_the_definition_and_leaves_no_trace():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    expected, average = [p.detach().clone() for p in model.parameters()], Average(model, 0.75)
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update()
        expected = [0.75 * e + 0.25 * p.detach() for e, p in zip(expected, model.parameters())]
    own = [p.detach().clone() for p in model.parameters()]
    places = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(RuntimeError), average.in_place():
        for parameter, value in zip(model.parameters(), expected):
            torch.testing.assert_close(parameter.detach(), value)
        raise RuntimeError
    assert all(torch.equal(p, x) for p, x in zip(model.parameters(), own))
    assert places == [p.data_ptr() for p in model.parameters()]
    for value, e in zip(average.values, expected):
        torch.testing.assert_close(value, e)


def test_a_run_with_an_average(in_process, workshop, monkeypatch):
    """Evaluated beside the weights and saved in ema/, which goes with the run; weights stay."""
    options = ["--steps", "26", "--eval_every", "0"]
    weights, original = [], training.Run._train_step

    def watched(run):
        if not weights:
            weights.append([p.detach().clone() for p in run._bare_model().parameters()])
        result = original(run)
        weights.append([p.detach().clone() for p in run._bare_model().parameters()])
        return result

    monkeypatch.setattr(training.Run, "_train_step", watched)
    result = in_process(*options, "--ema_decay", "0.8")
    assert result.returncode == 0, result.stderr
    expected = weights[0]
    for step in weights[1:]:
        expected = [0.8 * e + 0.2 * w for e, w in zip(expected, step)]
    run_dir = workshop.folder / "tiny"
    for folder in (run_dir / "ema", run_dir / "checkpoint-26" / "ema"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        for parameter, value in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.detach(), value)
    line = workshop.curve("tiny")[-1]
    assert line["kind"] == "held_out" and line["ema_bits_per_byte"] != line["bits_per_byte"]
    assert f"average {line['ema_bits_per_byte']:.4f}" in result.stdout
    results = json.loads((run_dir / "run.json").read_text())["results"]
    assert results["ema_bits_per_byte"] == line["ema_bits_per_byte"]
    origin = origin_of_checkpoint(run_dir / "ema")
    assert (origin.license, origin.bits_per_byte) == ("apache-2.0", line["ema_bits_per_byte"])
    assert origin_of_checkpoint(run_dir).bits_per_byte == line["bits_per_byte"]
    assert in_process(*options, "--name", "plain").returncode == 0
    plain = [x for x in workshop.curve("plain") if x["kind"] == "train"]
    assert plain == [x for x in workshop.curve("tiny") if x["kind"] == "train"]
    # A run that is finished twice, and one that is replaced.
    assert in_process(*options, "--ema_decay", "0.8", "--resume").returncode == 0
    assert in_process(*options, "--overwrite").returncode == 0
    assert not (run_dir / "ema").exists()
