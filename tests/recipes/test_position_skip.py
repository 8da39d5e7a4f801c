"""Positions that jump (PoSE): the authors' draws, every number of processes, what is refused."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pretraining.corpus import Corpus, Tokens
from pretraining.mixing import Batches, Part
from pretraining.position_skip import Skipping, draw, lay_out
from pretraining.recipe import Recipe, UsageError
from pretraining.synthetic import TaskBatches
from tasks import load

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "parity"))

from goldens import golden_tensors

SKIP = {"target": 128}
FULL = ["--architecture", "sliding_window", "--model.sliding_window", "none"]
EXTENDED = ["--model.rope_extension", "{type = 'rerope', window = 8}"]
JUMPS = ["--position_skip.target", "128"]
SHORT = ["--steps", "8", "--decay_steps", "2", "--checkpoint_every", "4", "--eval_every", "0"]


def recipe_for(skip=SKIP, **values):
    sizes = {"sequence_length": 32, "batch_size": 8, "position_skip": skip}
    return Recipe("x", "sliding_window", **{**sizes, **values})


def batches(skip=SKIP, num_tokens=3000, starts=(), **values):
    tokens = Tokens(np.arange(num_tokens, dtype=np.uint16), np.array([0, *starts]), num_tokens)
    return Batches(recipe_for(skip, **values), [Part("", 1, Corpus(tokens, None, {}))])


def all_rows(text, step, world=1, size=8):
    """Batch of a step, put together from all processes and micro-batches."""
    parts = [
        text.batch(step, rank, micro, world, size)
        for micro in range(8 // (world * size))
        for rank in range(world)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def test_the_authors_draws_make_the_authors_windows():
    golden = golden_tensors("ops-pose")
    for number, num_tokens in enumerate(golden["document_length"].tolist()):
        asked, expected = [], golden["draws"][number].view(3, 3).tolist()

        def replay(low, high, asked=asked, expected=expected):
            asked.append([low, high, expected[len(asked)][2]])
            return asked[-1][2]

        num_tokens = min(num_tokens, 5 * 32)  # as span = 5 does
        drawn = draw(replay, num_tokens, 32, 128)
        assert asked == expected
        index, positions = lay_out(min(num_tokens, 32), *drawn)
        for name, found in (("token_index", index), ("position_ids", positions)):
            expected = golden[name][number].tolist()
            assert found.tolist() == [x for x in expected if x != -1]


def test_distances_are_as_frequent_as_the_authors():
    """Of all pairs (r1, u), and of our own draws; each share within four standard errors."""

    def distances(positions):
        seen = np.zeros(128)
        seen[(positions[:, None] - positions).clip(0)] = 1
        return seen

    pairs = [(first, jump) for first in range(1, 17) for jump in range(97)]
    exact = sum(distances(lay_out(32, first, 32, jump)[1]) for first, jump in pairs) / len(pairs)
    authors = golden_tensors("ops-pose")["coverage"].numpy()
    error = np.sqrt(exact * (1 - exact) / 20_000)
    assert (abs(authors - exact) <= 4 * error + 1e-9).all()
    skipping, plain = Skipping(recipe_for()), torch.arange(32)
    drawn = [skipping.positions(plain, sample).numpy() for sample in range(2000)]
    error = np.sqrt(exact * (1 - exact) / len(drawn))
    ours = sum(map(distances, drawn)) / len(drawn)
    assert (abs(ours - exact) <= 4 * error + 1e-9).all()
    assert max(map(max, drawn)) == 127 and len({tuple(x) for x in drawn}) > 1000


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"skip": {"target": 128, "window": 32, "chunks": 2, "span": 3}},
        {"packing": "documents", "starts": (7, 8, 50, 700, 720)},
        {"context_schedule": [[0, 8], [3, 32]]},
        {"skip": {"target": 128, "span": 5}, "context_schedule": [[0, 8], [3, 32]]},
    ],
)
def test_a_function_of_the_sample_alone(values):
    """The same rows on any number of processes, in any order, and others in the next epoch."""
    text = batches(**values)
    for step in (0, 2, 3, 40, 1):
        whole = all_rows(text, step)
        for world, size in ((2, 4), (2, 2), (4, 1)):
            again = all_rows(batches(**values), step, world, size)
            assert all(torch.equal(again[name], x) for name, x in whole.items())
        positions = whole["position_ids"]
        assert 0 <= positions.min() and positions.max() < 128
        assert len(positions.unique(dim=0)) > 6  # of short windows two may be alike
    other = batches(seed=1, **values)
    assert not torch.equal(all_rows(other, 1)["position_ids"], positions)


def test_a_window_of_its_own_text_loses_none_of_it():
    """Content as without; one jump in each row, behind at most half of it."""
    jumping, plain = batches(), batches({})
    for step in range(30):
        found, expected = all_rows(jumping, step), all_rows(plain, step)
        assert "position_ids" not in expected
        for name in expected:
            assert torch.equal(found[name], expected[name])
        steps = found["position_ids"].diff()
        assert (found["position_ids"][:, 0] == 0).all() and (steps >= 1).all()
        assert ((steps > 1).sum(1) <= 1).all() and (steps[:, 16:] == 1).all()


def test_text_from_further_on():
    """Chunk 2 begins anywhere before span windows end; the target of a token is the next one's."""
    text, begins = batches({"target": 128, "span": 5}), []
    for step in range(40):
        found = all_rows(text, step)
        ids, targets = found["input_ids"], found["shift_labels"]
        assert torch.equal(ids[:, 1:], targets[:, :-1]) and (targets[:, -1] == ids[:, -1] + 1).all()
        skipped = ids.diff() - 1
        assert ((skipped > 0).sum(1) <= 1).all() and (skipped[:, 16:] == 0).all()
        begins += (ids[:, -1] - ids[:, 0] - 31).tolist()
        # A jump in the text is where one in the positions is, if there are both.
        moved = found["position_ids"].diff() - 1
        both = (skipped > 0).any(1) & (moved > 0).any(1)
        assert torch.equal((skipped > 0)[both], (moved > 0)[both])
        assert not torch.equal(skipped, moved)
    assert min(begins) < 10 and 120 < max(begins) <= 4 * 32
    # At the end of the text there is less of it.
    short = batches({"target": 128, "span": 5}, num_tokens=97)
    assert max(all_rows(short, step)["shift_labels"].max() for step in range(20)) == 96


def test_documents_jump_each_on_its_own():
    starts = tuple(range(5, 2990, 13))
    found = all_rows(batches(packing="documents", starts=starts), 3)
    plain = all_rows(batches({}, packing="documents", starts=starts), 3)["position_ids"]
    jumping = found["position_ids"]
    assert torch.equal(jumping == 0, plain == 0)
    for row, (positions, counted) in enumerate(zip(jumping, plain)):
        bounds = [*torch.nonzero(counted == 0)[:, 0].tolist(), 32]
        jumps = []
        for begin, end in zip(bounds, bounds[1:]):
            steps = positions[begin:end].diff()
            assert (steps >= 1).all() and (steps > 1).sum() <= 1
            jumps += steps[steps > 1].tolist()
        assert len(set(jumps)) > 1, row


def test_the_examples_of_a_task_jump_too():
    table = {"name": "copy", "tokens": 4}
    length = load(table).length
    sizes = {"sequence_length": 0, "data": "", "tokenizer": "", "task": table}
    jumping, plain = (
        TaskBatches(recipe_for(skip, **sizes), load(table)) for skip in ({"target": 64}, {})
    )
    whole, expected = all_rows(jumping, 3), all_rows(plain, 3)
    positions = whole.pop("position_ids")
    assert positions.shape == (8, length) and length <= positions.max() < 64
    assert all(torch.equal(whole[name], x) for name, x in expected.items())
    assert torch.equal(all_rows(jumping, 3, 2, 2)["position_ids"], positions)


def test_resumed_is_bit_identical(in_process, workshop):
    """And the exported config knows nothing of it."""
    text = workshop.recipe.read_text().replace("dropout = 0.1", "")
    workshop.recipe.write_text(text)
    options = [*FULL, *SHORT, *JUMPS, "--position_skip.span", "5", "--replay_segment_length", "16"]
    whole = in_process(*options)
    assert whole.returncode == 0, whole.stderr
    assert "Positions jump, below 128" in whole.stdout
    curve, run_dir = workshop.curve("tiny"), workshop.folder / "tiny"
    record = json.loads((run_dir / "run.json").read_text())
    assert record["recipe"]["position_skip"] == {"target": 128, "span": 5}
    assert "position_skip" not in (run_dir / "config.json").read_text()
    shutil.rmtree(run_dir / "checkpoint-8")
    (run_dir / "model.safetensors").unlink()
    resumed = in_process(*options, "--resume")
    assert "after step 4" in resumed.stdout, resumed.stderr
    assert workshop.curve("tiny") == curve
    other = in_process(*options, "--resume", "--position_skip.span", "1")
    assert other.returncode == 2 and "position_skip: {'target': 128, 'span': 5} -> " in other.stderr


@pytest.mark.parametrize(
    ("skip", "values", "message"),
    [
        ({"taget": 9}, {}, "unknown key 'position_skip.taget': did you mean 'target'?"),
        ({"target": 64.0}, {}, "position_skip.target is a whole number, got 64.0."),
        ({"target": True}, {}, "position_skip.target is a whole number, got True."),
        ({"target": 32}, {}, "above the window, sequence_length = 32"),
        ({"span": 2}, {}, "above the window, sequence_length = 32.*, got 0"),
        ({"target": 128, "window": 16}, {}, "window is sequence_length = 32, got 16"),
        ({"target": 128, "chunks": 3}, {}, "chunks is 2, which is what was published, got 3"),
        ({"target": 128, "span": 0}, {}, "span is at least 1 window of text, got 0"),
        ({"target": 128, "span": 2}, {"packing": "documents"}, "got packing = 'documents'"),
        (SKIP, {"packing": "documents", "carry_state": True}, "carry_state needs no position_skip"),
    ],
)
def test_bad_tables(skip, values, message):
    with pytest.raises(UsageError, match=message):
        recipe_for(skip, **values)


def test_models_that_it_does_nothing_for(in_process, workshop):
    workshop.recipe.write_text(workshop.recipe.read_text().replace("dropout = 0.1", ""))
    hybrid = ["--architecture", "lightning", "--model.num_key_value_heads", "2"]
    hybrid += ["--model.softmax_layers", "[1]"]
    for options, said in (
        (["--architecture", "retnet"], "this retnet has none"),
        (["--architecture", "infini"], "this infini has none"),
        (["--architecture", "lightning"], "this lightning has none"),
        ([*FULL[:2], "--model.sliding_window", "8"], "a window of 8 tokens never sees"),
        ([*FULL, "--model.position_embedding_type", "alibi"], "; alibi counts tokens; use rope or"),
        ([*FULL, "--model.position_embedding_type", "none"], "without a position_embedding_type"),
        ([*FULL, *EXTENDED], "positions; rope_extension rerope counts tokens; use rope or xpos."),
        ([*FULL, "--model.position_embedding_type", "xpos"], ""),
        (FULL, ""),
        (hybrid, ""),
    ):
        result = in_process(*options, *JUMPS, "--dry_run")
        if said:
            (line,) = result.stderr.splitlines()
            assert result.returncode == 2 and said in line
        else:
            assert result.returncode == 0 and '"position_skip": {' in result.stdout, result.stderr
