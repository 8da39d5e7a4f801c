"""Models over slices in the hands of training scripts; what they refuse, in a line."""

import re

import pytest
from processes import once

import zoo
from zoo.contract.subject import variants_of

NAMES = [f"{name}:{next(iter(variants_of(name)))}" for name in zoo.MODELS]
# Of float64; largest measured 1e-14.
TOLERANCE = 1e-10
# Errors against float64, in those of one process: sums in another order, some in wider numbers.
PRECISION = {"float32": 1.5, "bfloat16": 2.0, "float16": 2.0}
REFUSED = {
    "labels_that_are_not_shifted": "labels are shifted before a text is cut",
    "boundaries_that_are_not_positions": "position_ids that restart",
    "a_mask_of_the_whole_row": r"expected attention_mask \[B, T\] of this slice",
    "other_rows": r"the same rows from each process of sequence_parallel, got \[1, 2\]",
    "positions_of_one": "expected position_ids of all processes or of none, got them of 1 of 2",
    "a_state_from_before": "begins its texts, got a cache that has a state",
    "replay": "replay_segment_length cuts a text in time",
    "generate": "generate goes on from the end of rows",
    "exported": "got torch.compile or torch.export",
    "compiled": "got torch.compile or torch.export",
    "classes_of_texts": "a text is classified by its last token",
    "answers": "an answer is one of all tokens of a row",
}
WORKS = ("compiled_in_pieces", "classes_of_tokens", "copies")
SIZE = 2


def run_one(processes, folder, script, *names):
    lines, why = processes.run(folder, script, SIZE, *names)
    assert why is None, why
    return lines


@pytest.fixture(scope="module")
def uses(processes, tmp_path_factory):
    """Model -> use -> what was found."""

    def run(folder):
        return run_one(processes, folder, "uses.py", *NAMES)

    found = {}
    for line in once(tmp_path_factory, "uses", run):
        found.setdefault(line["model"], {})[line["case"]] = {
            name: x for name, x in line.items() if name not in ("model", "case", "size")
        }
    return found


@pytest.fixture(scope="module")
def refusals(processes, tmp_path_factory):
    """What was asked for -> what each process found."""

    def run(folder):
        return run_one(processes, folder, "refusals.py")

    found = {}
    for line in once(tmp_path_factory, "refusals", run):
        found.setdefault(line["model"], []).append(line)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_one_process(uses, name):
    found = dict(uses[name])
    found.pop("precision")
    assert len(found) == 7
    for use, errors in found.items():
        assert errors or use == "turns", use
        assert all(x < TOLERANCE for x in errors.values()), (use, errors)


def test_mixers_that_know_nothing_of_slices_take_turns(uses):
    # All but those that walk their segments, or whose stack knows of slices.
    assert sum(bool(uses[name]["turns"]) for name in NAMES) == len(NAMES) - 2


@pytest.mark.parametrize("name", NAMES)
def test_precision(uses, name):
    found = uses[name]["precision"]
    assert len(found) == 2 * len(PRECISION)
    for what, times in found.items():
        assert times < PRECISION[what.split()[0]], (what, times)


@pytest.mark.parametrize("asked", REFUSED)
def test_refusals(refusals, asked):
    assert len(refusals[asked]) == SIZE
    for found in refusals[asked]:
        assert re.search(REFUSED[asked], found["message"]), found
        if asked != "compiled":  # torch's own message is around ours
            assert "\n" not in found["message"]


@pytest.mark.parametrize("asked", WORKS)
def test_what_works(refusals, asked):
    assert [x["error"] < TOLERANCE for x in refusals[asked]] == [True] * SIZE, refusals[asked]
