"""Rows that go on where they stopped: what they read, their gradients, their states on resume."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import zoo
from pretraining.carrying import Carried, Lanes
from pretraining.checkpointing import list_checkpoints
from pretraining.corpus import Tokens
from pretraining.recipe import Recipe, UsageError
from pretraining.stepping import accumulate_gradients

CARRY = ["--carry_state", "true", "--packing", "documents", "--learning_rate", "1e-3"]
CARRY += ["--steps", "12", "--decay_steps", "2", "--checkpoint_every", "4", "--eval_every", "0"]
CARRY += ["--keep_checkpoints", "9", "--eval_batch_size", "11"]


SOURCES = [{"name": "a", "data": "stdlib"}, {"name": "b", "data": "stdlib"}]


def lanes(num_tokens=1000, rows=3, length=16, starts=(0, 100, 101, 420)):
    tokens = Tokens(np.arange(num_tokens), np.array(starts), num_tokens)
    part = SimpleNamespace(corpus=SimpleNamespace(train=tokens, record={}))
    return Lanes(SimpleNamespace(sequence_length=length, seed=5, batch_size=rows), [part])


def test_rows_go_on_and_count_from_the_document_s_start():
    text = lanes()
    starts = [0, 100, 101, 420]
    for epoch in (0, 1):
        steps = range(epoch * text.num_steps, (epoch + 1) * text.num_steps)
        batches = [text.batch(step, 0, 0, 1, 3) for step in steps]
        assert [text.begins(step) for step in steps] == [True] + [False] * (text.num_steps - 1)
        ids, targets, positions = (
            torch.cat([batch[key] for batch in batches], dim=1)
            for key in ("input_ids", "shift_labels", "position_ids")
        )
        assert (ids.diff() == 1).all() and targets.equal(ids + 1)
        assert len(ids.unique()) == ids.numel()
        for row, counted in zip(ids.tolist(), positions.tolist()):
            seen = [max([row[0], *(x for x in starts if x <= token)]) for token in row]
            assert counted == [token - start for token, start in zip(row, seen)]
    assert text.batch(0, 0, 0, 1, 3)["input_ids"][0, 0] != batches[0]["input_ids"][0, 0]


def test_rows_are_shared_out_over_processes_and_micro_batches():
    text = lanes(rows=4)
    whole = text.batch(7, 0, 0, 1, 4)["input_ids"]
    parts = {
        (micro, rank): text.batch(7, rank, micro, 2, 1)["input_ids"]
        for micro in (0, 1)
        for rank in (0, 1)
    }
    assert torch.cat([parts[key] for key in sorted(parts)]).equal(whole)
    with pytest.raises(UsageError, match="two windows for each of 40 rows need 1297"):
        lanes(rows=40)


def test_gradients_are_those_of_the_definition():
    """Backward stops where the step began; forward all that was read before is known."""
    torch.manual_seed(0)
    config = zoo.RetNetConfig(vocab_size=1000, hidden_size=16, num_hidden_layers=2)
    model = zoo.RetNetForCausalLM(config).double().train()
    text = lanes(starts=(0, 40))
    accelerator = SimpleNamespace(
        num_processes=1,
        device=torch.device("cpu"),
        reduce=lambda x, how: x,
        no_sync=None,
        backward=lambda loss: loss.backward(),
    )
    carried = Carried(config, 0, 1, 3, 1)
    for step in range(3):
        model.zero_grad()
        loss = accumulate_gradients(
            accelerator, model, [text.batch(step, 0, 0, 1, 3)], None, carried
        )
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    read = [text.batch(step, 0, 0, 1, 3) for step in range(3)]
    with torch.no_grad():
        before = {key: torch.cat([batch[key] for batch in read[:2]], 1) for key in read[0]}
        cache = model(before["input_ids"], position_ids=before["position_ids"]).past_key_values
    last = read[2]
    output = model(
        last["input_ids"],
        position_ids=last["position_ids"],
        past_key_values=cache,
        labels=last["shift_labels"],
        shift_labels=last["shift_labels"],
    )
    output.loss.backward()
    torch.testing.assert_close(loss, output.loss.detach(), rtol=1e-12, atol=0)
    for grad, parameter in zip(found, model.parameters()):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-9, atol=1e-12)
    # And it is another one without the state.
    fresh = model(last["input_ids"], labels=last["shift_labels"], shift_labels=last["shift_labels"])
    assert abs(fresh.loss - loss) > 1e-3


def of_another(workshop, architecture):
    """Options for an architecture that has no dropout, which the tiny recipe has."""
    text = workshop.recipe.read_text()
    workshop.recipe.write_text(text.replace("dropout = 0.1", ""))
    return ["--architecture", architecture]


@pytest.mark.parametrize("architecture", ["retnet", "block_recurrent"])
def test_states_are_saved(workshop, architecture):
    """Killed after step 4 and resumed: the same numbers, and to rounding on two processes."""
    model = of_another(workshop, architecture)
    if architecture == "block_recurrent":
        model += ["--model.sliding_window", "16"]
    result = workshop.run("--name", "whole", *CARRY, *model)
    assert result.returncode == 0, result.stderr
    expected = [line.get("loss") for line in workshop.curve("whole")]
    ways = [("same", {}, []), ("two", {"processes": 2}, ["--micro_batch_size", "1"])]
    if architecture == "retnet":  # what a state holds makes no difference to who holds the weights
        ways.append(("shards", {"processes": 2, "config": "fsdp2.yaml"}, []))
    for name, options, extra in ways:
        shutil.copytree(workshop.folder / "whole", workshop.folder / name)
        for step, folder in list_checkpoints(workshop.folder / name):
            if step > 4:
                shutil.rmtree(folder)
        (workshop.folder / name / "model.safetensors").unlink()
        result = workshop.run("--name", name, "--resume", *CARRY, *model, *extra, **options)
        assert result.returncode == 0, result.stderr
        assert "after step 4" in result.stdout
        found = [line.get("loss") for line in workshop.curve(name)]
        if name == "same":
            assert found == expected
        losses = torch.tensor([x for x in found if x is not None], dtype=torch.float64)
        wanted = torch.tensor([x for x in expected if x is not None], dtype=torch.float64)
        torch.testing.assert_close(losses, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("values", "need"),
    [
        ({}, 'packing = "documents"'),
        (
            {"packing": "documents", "gradient_checkpointing": True},
            "gradient_checkpointing = false",
        ),
        ({"packing": "documents", "context_schedule": [[0, 512]]}, "no context_schedule"),
        ({"packing": "documents", "data": "", "sources": SOURCES}, "one text, no sources"),
        ({"packing": "documents", "streaming": True}, "a text that is read whole"),
    ],
)
def test_what_cannot_be_carried_is_refused(values, need):
    with pytest.raises(UsageError, match=f"carry_state needs {need}"):
        Recipe("a", "retnet", carry_state=True, **values)


def test_a_state_that_grows_is_refused(in_process, workshop):
    hybrid = ["--model.softmax_layers", "[1]", "--model.num_key_value_heads", "2"]
    result = in_process(*CARRY, *of_another(workshop, "lightning"), *hybrid)
    assert result.returncode == 2 and "this lightning grows with the text" in result.stderr
