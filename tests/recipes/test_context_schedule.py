"""The length of the windows by step, and how much of each document is read."""

import shutil
from collections import Counter

import numpy as np
import pytest
import torch

from pretraining.corpus import Corpus, Tokens, Windows
from pretraining.mixing import Batches, Part
from pretraining.recipe import Recipe, UsageError, make_recipe
from pretraining.synthetic import TaskBatches
from tasks import load

SCHEDULE = [[0, 8], [3, 16], [5, 32]]


def batches(tokens, schedule, packing="documents"):
    sizes = {"sequence_length": 32, "batch_size": 4, "context_schedule": schedule}
    recipe = Recipe("x", "retnet", packing=packing, **sizes)
    return Batches(recipe, [Part("", 1, Corpus(tokens, None, {}))])


def test_each_step_sees_the_tokens_that_it_would_see_without():
    tokens = Tokens(np.arange(3000, dtype=np.uint16), np.arange(0, 2990, 13), 3000)
    cut, whole = batches(tokens, SCHEDULE), batches(tokens, [])
    for step, length in ((0, 8), (2, 8), (3, 16), (4, 16), (5, 32), (400, 32), (1, 8)):
        for world, size in ((1, 4), (2, 2), (2, 1), (4, 1)):
            for micro in range(4 // (world * size)):
                for rank in range(world):
                    place = (step, rank, micro, world, size)
                    short, long = cut.batch(*place), whole.batch(*place)
                    assert short["input_ids"].shape == (size * 32 // length, length)
                    for name in ("input_ids", "shift_labels"):
                        assert torch.equal(short[name].flatten(), long[name].flatten())
                    # Positions count from the windows' own beginnings, and from documents.
                    starts = short["input_ids"] % 13 == 0
                    assert (short["position_ids"][starts] == 0).all()
                    assert (short["position_ids"][:, 0] == 0).all()


def test_documents_are_read_in_proportion_to_their_tokens():
    sizes = [200, 3, 5000, 40, 1, 700, 200]
    ids = np.repeat(np.arange(len(sizes), dtype=np.uint16), sizes)
    windows = Windows(Tokens(ids, np.cumsum([0, *sizes[:-1]]), len(ids)), 32, seed=0)
    read = Counter()
    for sample in range(50 * windows.num_windows):
        start = windows.start(sample)
        read.update(ids[start : start + 32].tolist())
    total = sum(read.values())
    for document, size in enumerate(sizes[1:-1], 1):
        assert read[document] == 50 * size  # once in every epoch
    # Those at the ends lose what does not fill a window, fewer than three windows together.
    assert 50 * sum(sizes) > total > 50 * (sum(sizes) - 3 * 32)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([[0, 8], [3, 24]], "each length divides sequence_length = 32, .* got 24"),
        ([[0, 64]], "each length divides sequence_length = 32, .* got 64"),
        ([[0, 0]], "each length divides sequence_length = 32, .* got 0"),
        ([[1, 8]], "begins at step 0 and goes on to later ones .* got steps 1"),
        ([[0, 8], [5, 16], [5, 32]], "got steps 0, 5, 5"),
        ([[0, 8], [1000, 16]], "before the last of 1000, got steps 0, 1000"),
        ([[0, 8.5]], r"such as \[\[0, 256\], \[500, 1024\]\].* got \[0, 8.5\] in it"),
        ([[0]], r"got \[0\] in it"),
        ([[0, -8]], r"got \[0, -8\] in it"),
    ],
)
def test_bad_schedules(schedule, message):
    with pytest.raises(UsageError, match=message):
        Recipe("x", "retnet", sequence_length=32, context_schedule=schedule)


def test_resumed_across_the_switch(in_process, workshop):
    options = ["--steps", "26", "--eval_every", "0", "--checkpoint_every", "5"]
    options += ["--context_schedule", "[[0, 8], [13, 32]]", "--keep_checkpoints", "9"]
    assert in_process(*options).returncode == 0
    curve = workshop.curve("tiny")
    lengths = {line["step"]: line["sequence_length"] for line in curve if line["kind"] == "train"}
    assert (lengths[1], lengths[13], lengths[14], lengths[26]) == (8, 8, 32, 32)
    assert [line["tokens"] for line in curve[:26]] == [128 * step for step in range(1, 27)]
    for step in (15, 20, 25, 26):
        shutil.rmtree(workshop.folder / f"tiny/checkpoint-{step}")
    resumed = in_process(*options, "--resume")
    assert "after step 10" in resumed.stdout and workshop.curve("tiny") == curve
    other = in_process(*options, "--resume", "--context_schedule", "[[0, 8], [14, 32]]")
    assert other.returncode == 2 and "context_schedule: [[0, 8], [13, 32]] -> " in other.stderr


TASK = {"name": "passkey_by_segment", "segment_length": 12, "segments": 4, "digits": 3}


def task_recipe(schedule, task=TASK):
    values = {"task": task, "batch_size": 2, "context_schedule": schedule}
    return make_recipe({"name": "x", "architecture": "rmt", **values}, "here")


def test_examples_of_a_task_get_longer():
    recipe = task_recipe([[0, 12], [3, 36], [5, 48]])
    task = load(recipe.task)
    short, plain = TaskBatches(recipe, task), TaskBatches(task_recipe([]), task)
    for step, length in ((0, 12), (2, 12), (3, 36), (4, 36), (5, 48), (900, 48)):
        batch = short.batch(step, 0, 0, 1, 2)
        assert batch["input_ids"].shape == batch["shift_labels"].shape == (2, length)
        assert ((batch["shift_labels"] >= 0).sum(1) == 3).all()
        # A batch of one length is the same whatever steps had another.
        again = task_recipe([[0, length]])
        assert torch.equal(
            TaskBatches(again, task).batch(step, 0, 0, 1, 2)["input_ids"], batch["input_ids"]
        )
    assert torch.equal(
        short.batch(7, 0, 0, 1, 2)["input_ids"], plain.batch(7, 0, 0, 1, 2)["input_ids"]
    )
    tokens = [recipe.tokens_until(step) for step in range(8)]
    assert tokens == [0, 24, 48, 72, 144, 216, 312, 408]
    assert task_recipe([]).tokens_until(5) == 5 * 2 * 48


@pytest.mark.parametrize(
    ("schedule", "task", "message"),
    [
        ([[0, 60]], TASK, "at most that of the task's examples, 48, got 60"),
        ([[0, 20]], TASK, "whole segments of 12 tokens, got 20"),
        ([[0, 5]], {"name": "passkey", "digits": 3}, "at least 8 tokens, got 5"),
        ([[0, 5]], {"name": "copy"}, "examples of the task copy have .* tokens, got 5"),
        ([[2, 12]], TASK, "begins at step 0"),
    ],
)
def test_bad_schedules_of_tasks(schedule, task, message):
    with pytest.raises(UsageError, match=message):
        task_recipe(schedule, task)
