"""Synthetic tasks: what an example is, that it is a function of its number, what is refused."""

import hashlib
import itertools

import numpy as np
import pytest
import torch

from pretraining.usage import UsageError
from tasks import FAMILIES, load

SMALL = {
    "recall": {"pairs": 6, "keys": 8, "values": 9, "test_pairs": [2, 8]},
    "mqar": {"vocabulary": 40, "example_length": 24, "pairs": 5, "test_settings": [[48, 9]]},
    "copy": {"symbols": 5, "tokens": 7},
    "induction": {"symbols": 4, "example_length": 9, "test_lengths": [20]},
    "passkey": {"example_length": 30, "digits": 3, "filler": 7, "test_distances": [4, 9, 50]},
    "passkey_by_segment": {"segment_length": 9, "segments": 3, "digits": 2, "test_back": [0, 1, 4]},
    "parity": {"example_length": 10},
    "s5": {"example_length": 6},
}
# Runs that were begun go on, and results that were published are found again.
FIRST_EXAMPLES = {
    "recall": "e0643f6c75fb",
    "mqar": "41171575d905",
    "copy": "50cbf7ad4a3f",
    "induction": "3344af57017d",
    "passkey": "478039288eed",
    "passkey_by_segment": "f17f1b4fb7f2",
    "parity": "ec1cf19ec24d",
    "s5": "f6f26610671e",
}


def small(name):
    return load({"name": name, **SMALL[name]})


@pytest.mark.parametrize("name", FAMILIES)
def test_an_example_is_a_function_of_its_number(name):
    task = small(name)
    whole = task.batch(3, 5, 0, 12)
    (ids,) = {"input_ids", "stacked_ids"} & {*whole}
    for sizes in ([1] * 12, [5, 7], [8, 4]):
        firsts = [sum(sizes[:n]) for n in range(len(sizes))]
        parts = [task.batch(3, 5, first, size) for first, size in zip(firsts, sizes)]
        for key, x in whole.items():
            assert torch.equal(torch.cat([part[key] for part in parts]), x)
    assert whole[ids].shape[:2] == whole["shift_labels"].shape == (12, task.length)
    # Of other seeds, steps and tests there are others.
    others = [task.batch(4, 5, 0, 12), task.batch(3, 6, 0, 12), task.test_batch("trained", 0, 12)]
    seen = {tuple(row.flatten().tolist()) for row in whole[ids]}
    for other in others:
        assert len(seen & {tuple(row.flatten().tolist()) for row in other[ids]}) <= 4
        assert not torch.equal(other[ids], whole[ids])
    # More tests change neither the examples of training nor those of the other tests.
    more = load({**task.table(), "test_examples": 7})
    assert torch.equal(more.batch(3, 5, 0, 12)[ids], whole[ids])
    for test, settings in task.tests().items():
        batch = task.test_batch(test, 0, 300)
        assert batch[ids].shape[1] == task.length_of(settings)
        assert (batch["shift_labels"] != -100).any(1).all()
        values = torch.cat([batch[ids].flatten(), batch["shift_labels"].flatten()])
        assert values.min() >= -100 and values.max() == task.vocab_size - 1
    digest = hashlib.sha256(b"".join(x.numpy().tobytes() for x in whole.values())).hexdigest()
    assert digest[:12] == FIRST_EXAMPLES[name]


def scored(batch):
    """(row, ids, place, target) of each target of a batch."""
    (ids,) = {"input_ids", "stacked_ids"} & {*batch}
    for row, (row_ids, targets) in enumerate(zip(batch[ids].tolist(), batch["shift_labels"])):
        for place in torch.nonzero(targets != -100)[:, 0].tolist():
            yield row, row_ids, place, targets[place].item()


def test_recall_asks_for_every_key_once():
    task, asked = small("recall"), []
    for row, ids, place, value in scored(task.batch(0, 0, 0, 50)):
        pairs = dict(map(tuple, ids[:6]))
        assert len(pairs) == len(set(pairs.values())) == 6 and ids[place][1] == 0
        assert {*pairs} <= {*range(1, 9)} and {*pairs.values()} <= {*range(9, 18)}
        assert pairs[ids[place][0]] == value
        asked.append((row, ids[place][0]))
    assert len(asked) == len(set(asked)) == 300


def test_mqar_is_zoologys():
    task, gaps = load({"name": "mqar"}), []
    batch = task.batch(0, 0, 0, 400)
    for _, ids, place, value in scored(batch):
        pairs = dict(zip(ids[0:8:2], ids[1:8:2]))
        assert pairs[ids[place]] == value and len(pairs) == 4
        assert all(0 < key < 4096 <= value < 8192 for key, value in pairs.items())
        assert place >= 8 and place % 2 == 0
        gaps.append((place - 8) // 2)
    assert len(gaps) == 1600
    # Of 28 places four are taken, near ones more often: 1 / n of all first draws.
    weights = 1 / np.arange(1, 29) ** 0.99
    drawn = np.random.default_rng(0)
    expected = [drawn.choice(28, 4, replace=False, p=weights / weights.sum()) for _ in range(4000)]
    expected = np.bincount(np.concatenate(expected), minlength=28) / 4000
    # Four standard deviations of 400 draws.
    assert np.abs(np.bincount(gaps, minlength=28) / 400 - expected).max() < 0.1


def test_copies_marks_and_keys():
    copied = small("copy").batch(0, 0, 0, 20)
    assert torch.equal(copied["shift_labels"][:, 7:], copied["input_ids"][:, :7])
    assert torch.equal(copied["shift_labels"][:, 7:-1], copied["input_ids"][:, 8:])
    assert (copied["input_ids"][:, 7] == 0).all() and (copied["input_ids"][:, :7] > 0).all()
    places = set()
    for _, ids, place, target in scored(small("induction").batch(0, 0, 0, 200)):
        marks = [n for n, x in enumerate(ids) if x == 0]
        assert len(marks) == 2 and marks[1] == place == 8 and target == ids[marks[0] + 1]
        places.add(marks[0])
    assert places == {*range(7)}
    task, distances = small("passkey"), set()
    for name, settings in task.tests().items():
        batch = task.test_batch(name, 0, 200)
        for ids, targets in zip(batch["input_ids"].tolist(), batch["shift_labels"].tolist()):
            key, asked = ids.index(1), ids.index(2)
            assert ids[0] == 0 and ids.count(1) == ids.count(2) == 1
            assert targets[-3:] == ids[key + 1 : key + 4] and ids[-2:] == targets[-3:-1]
            assert [(digit - 3) // 10 for digit in targets[-3:]] == [0, 1, 2]
            assert len(ids) - 3 == asked and settings.get("distance") in (None, asked - key)
            filler = [x for x in ids if x >= 33]
            assert len(filler) == len(ids) - 2 - 4 - 2
            distances |= {asked - key} if name == "trained" else set()
    assert distances == {*range(4, 27)}


def test_keys_lie_whole_in_their_segments():
    task, seen = small("passkey_by_segment"), {}
    for name, settings in task.tests().items():
        batch = task.test_batch(name, 0, 900)
        for ids, targets in zip(batch["input_ids"].tolist(), batch["shift_labels"].tolist()):
            key, asked, last = ids.index(1), ids.index(2), len(ids) // 9 - 1
            assert ids[0] == 0 and ids.count(1) == ids.count(2) == 1 and len(ids) - 2 == asked
            assert targets[-2:] == ids[key + 1 : key + 3] and ids[-1:] == targets[-2:-1]
            assert key // 9 == (key + 2) // 9 and key + 2 < asked
            assert settings.get("back") in (None, last - key // 9)
            places = seen.setdefault((name, last - key // 9), {})
            places[key % 9] = places.get(key % 9, 0) + 1
    # In each segment as often, and anywhere in it: beside the start and the question as well.
    assert [sum(seen["trained", back].values()) for back in range(3)] == pytest.approx(
        [300] * 3, abs=60
    )
    assert [{*seen["trained", back]} for back in range(3)] == [
        {*range(5)},
        {*range(7)},
        {*range(1, 7)},
    ]
    assert all(min(places.values()) > 20 for places in seen.values())
    assert [{*seen["back_4", 4]}, {*seen["back_0", 0]}] == [{*range(1, 7)}, {*range(5)}]


def test_products_are_those_of_the_group():
    for _, ids, place, target in scored(small("parity").batch(0, 0, 0, 20)):
        assert target == sum(ids[: place + 1]) % 2
    elements = list(itertools.permutations(range(5)))
    for _, ids, place, target in scored(small("s5").batch(0, 0, 0, 30)):
        things = tuple(range(5))
        for number in ids[: place + 1]:  # each moves what stands where those before it put it
            things = tuple(elements[number][x] for x in things)
        assert elements[target] == things


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "task.name is that of a task, there is none: known are"),
        ({"name": "recal"}, "got 'recal': did you mean 'recall'?"),
        ({"name": "recall", "pair": 3}, "unknown key 'task.pair' of recall: did you mean 'pairs'?"),
        ({"name": "recall", "pairs": 2.5}, "task.pairs is a whole number, got 2.5"),
        ({"name": "recall", "test_pairs": ["a"]}, "test_pairs is a list of whole numbers, got"),
        ({"name": "recall", "pairs": 65}, "at most the keys and the values, 64 and 64, got 65"),
        ({"name": "recall", "pairs": 0}, "task recall: pairs is at least 1, got 0"),
        ({"name": "copy", "test_tokens": [4, 0]}, "test_tokens is at least 1, got [4, 0]"),
        ({"name": "mqar", "test_settings": [64, 4]}, "test_settings is a list of lists of"),
        ({"name": "mqar", "test_settings": [[64, 17]]}, "at least 4 tokens for each pair"),
        ({"name": "induction", "test_lengths": 2}, "examples have at least 3 tokens"),
        ({"name": "passkey", "example_length": 11}, "example_length is at least 12 with 5 digits"),
        ({"name": "passkey", "test_distances": [5]}, "test_distances are at least 6, the mark and"),
        ({"name": "passkey_by_segment", "segment_length": 11}, "at least 12 with 5 digits"),
        ({"name": "passkey_by_segment", "segments": 0}, "segments is at least 1, got 0"),
        ({"name": "passkey_by_segment", "test_back": [1, -1]}, "0 or more, got [1, -1]"),
        ({"name": "parity", "test_examples": 0}, "test_examples is at least 1, got 0"),
    ],
)
def test_tables_that_are_no_task(table, message):
    with pytest.raises(UsageError) as error:
        load(table)
    assert message in str(error.value) and "\n" not in str(error.value)
