"""What `zoo contract` prints: a line for each point, what failed in full, the rest on demand."""

import re
from types import SimpleNamespace

import pytest

import zoo.contract
from zoo.contract import main


def first_point(subject, checks):
    """Passes, one figure nearer to its bound than the others."""
    checks.below("far", 1e-12, 1e-9)
    checks.below("near", 8e-10, 1e-9)
    checks.holds("yes or no", True)
    checks.not_run("on a GPU", "there is none")
    checks.note("a curve")


def second_point(subject, checks):
    """Fails in several ways."""
    checks.below("fine", 0, 0)
    checks.below("too large", 3.0, 2.0)
    checks.below("no number", float("nan"), 1.0)
    checks.holds("whether", False)
    with checks.case("broken"):
        raise RuntimeError("it broke")


def nothing_asked(subject, checks):
    """Has nothing to say."""
    checks.not_run("all of it", "cannot be asked")


@pytest.fixture
def printed(monkeypatch, capsys):
    """Runs three points that need no model, prints, and gives (exit status, lines)."""
    points = {1: ("first", first_point), 2: ("second", second_point), 3: ("third", nothing_asked)}
    monkeypatch.setattr(zoo.contract, "POINTS", points)
    monkeypatch.setattr(zoo.contract, "_subjects", lambda _: [SimpleNamespace(name="a model")])

    def run(*arguments):
        status = main(["model", "--points", "1,2,3", *arguments])
        return status, capsys.readouterr().out.splitlines()

    return run


def test_a_line_for_each_point_and_failures_in_full(printed):
    status, lines = printed()
    assert status == 1
    assert lines[0].startswith("a model")
    assert re.fullmatch(r" 1  first: passed +8.0e-10 of 1.0e-09 +\d\.\d s  \(1 not run\)", lines[1])
    assert re.fullmatch(r" 2  second: failed +nan of 1 +\d\.\d s", lines[2])
    assert lines[3:7] == [
        "    failed: too large: 3, bound 2",
        "    failed: no number: nan, bound 1",
        "    failed: whether: no, bound yes",
        "    failed: broken: -, bound - (RuntimeError: it broke)",
    ]
    assert re.fullmatch(r" 3  third: not run +\d\.\d s  \(1 not run\)", lines[7])
    assert lines[8].startswith("4 checks passed, 4 failed, 2 not run, in 0 s; --verbose")
    assert len(lines) == 9


def test_all_on_demand(printed, tmp_path):
    status, lines = printed("--verbose", "--json", str(tmp_path / "report.json"))
    text = "\n".join(lines)
    assert status == 1 and len(lines) > 12
    for part in ("far", "near", "yes or no", "(there is none)", "a curve", "it broke"):
        assert part in text
    # The file has everything either way.
    content = (tmp_path / "report.json").read_text()
    assert printed("--json", str(tmp_path / "report.json"))[0] == 1
    assert len((tmp_path / "report.json").read_text()) == pytest.approx(len(content), abs=40)


def test_a_report_that_cannot_be_written_is_refused_before_the_work(printed, tmp_path, capsys):
    status, lines = printed("--json", str(tmp_path / "nowhere" / "report.json"))
    assert status == 2 and lines == []
