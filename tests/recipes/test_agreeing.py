"""Processes that differ are refused before they train, all of them and in one line."""

import json
import os

import pytest

from pretraining import agreeing
from pretraining.agreeing import together
from pretraining.recipe import UsageError

SHORT = ["--steps", "26", "--eval_every", "0"]


def together_with(*others):
    """`together` as the first of several processes, whose answers are (error, facts, host)."""
    return lambda action, *arguments: together(
        action, *arguments, gather=lambda mine: [mine, *others]
    )


def test_all_alike():
    assert together_with((None, {"corpus": "a"}, "b"))(lambda: (7, {"corpus": "a"})) == 7


def test_an_error_in_one_process_ends_all():
    with pytest.raises(UsageError) as error:
        together_with(("no such file", {}, "node2"), (None, {}, "node2"))(lambda: (7, {}))
    assert str(error.value) == "process 1 on node2: no such file"


def test_the_same_error_is_said_once():
    def fail():
        raise UsageError("no such file")

    with pytest.raises(UsageError) as error:
        together_with(("no such file", {}, "node2"))(fail)
    assert str(error.value) == "no such file"


def test_a_crash_in_one_process_ends_the_others():
    answers = []

    def fail():
        raise ZeroDivisionError("by\nzero")

    with pytest.raises(ZeroDivisionError):  # here with its traceback
        together(fail, gather=lambda mine: answers.append(mine) or [mine])
    with pytest.raises(UsageError, match="process 1: ZeroDivisionError: by zero"):
        here = agreeing.socket.gethostname()
        together_with((answers[0][0], {}, here))(lambda: (7, {}))


def test_what_differs_is_named_and_the_rest_is_not():
    mine, other = {"steps": 3, "seed": 0}, {"steps": 4, "seed": 0}
    with pytest.raises(UsageError) as error:
        together_with((None, {"recipe": other}, "b"))(lambda: (7, {"recipe": mine}))
    assert "differ in their recipe (process 0" in str(error.value)
    assert "steps = 3; process 1 on b: steps = 4)" in str(error.value)
    assert "seed" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("fact", ["recipe", "checkpoint", "versions", "corpus", "tokenizer"])
def test_a_run_compares_everything(in_process, monkeypatch, fact):
    """The second process has found something else than this one, which is a real run's."""
    assert in_process(*SHORT).returncode == 0
    seen = []

    def gather(mine):
        error, facts, host = mine
        seen.append(facts)
        other = {**facts, fact: {"a": 1} if isinstance(facts.get(fact), dict) else "other"}
        return [mine, (error, other if fact in facts else facts, host)]

    monkeypatch.setattr(together, "__kwdefaults__", {"gather": gather})
    result = in_process(*SHORT, "--resume")
    assert result.returncode == 2
    assert f"the processes differ in their {fact} (process 0: " in result.stderr
    assert len(result.stderr.splitlines()) == 1
    found = {name for facts in seen for name in facts}
    assert fact in found and (fact in ("corpus", "tokenizer")) == (len(seen) == 2)
    assert seen[0]["checkpoint"].startswith("step 26, ")
    assert seen[0]["recipe"]["batch_size"] == 4 and "torch" in seen[0]["versions"]
    assert not {"output_dir", "cache_dir"} & set(seen[0]["recipe"])


def test_nothing_is_lost_by_a_refusal(in_process, workshop, monkeypatch):
    """--overwrite deletes the run only when all processes are going to train."""
    assert in_process(*SHORT).returncode == 0
    before = workshop.curve("tiny")

    def gather(mine):
        error, facts, host = mine
        return [mine, ("no text here" if "corpus" in facts else error, facts, host)]

    monkeypatch.setattr(together, "__kwdefaults__", {"gather": gather})
    result = in_process(*SHORT, "--overwrite")
    assert "process 1: no text here" in result.stderr
    assert workshop.curve("tiny") == before
    assert (workshop.folder / "tiny" / "checkpoint-26" / "checkpoint.json").is_file()


@pytest.mark.slow
def test_nodes_without_a_shared_disk(in_process, workshop):
    """Each of two processes has an output_dir of its own, and only one of them a checkpoint."""
    assert in_process(*SHORT, "--steps", "120").returncode == 0
    (workshop.folder / "0").mkdir()
    (workshop.folder / "1" / "tiny").mkdir(parents=True)
    os.rename(workshop.folder / "tiny", workshop.folder / "0" / "tiny")
    (workshop.folder / "1" / "tiny" / "run.json").write_text(json.dumps({"recipe": {}}))
    places = ["--data", workshop.folder / "text.txt", "--cache_dir", workshop.folder / "c"]
    ranks = workshop.start_ranks("--resume", *places, processes=2, apart=True)
    errors = "".join(rank.communicate(timeout=60)[1] for rank in ranks)
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "differ in their checkpoint (process 0: step 120, " in line
    assert "; process 1: none); put output_dir on a disk that all of them share" in line
    # Of themselves: nobody ends one because the other has ended.
    assert [rank.returncode for rank in ranks] == [2, 2]
