"""What is said of the study of memories is what it measured."""

import json
import re

import pytest
from conftest import ROOT

from extrapolating.readings import trials_of
from extrapolating.study import read_study
from extrapolating.summary import markdown, overview

FOLDER = ROOT / "recipes/results/memories"
RESULTS = json.loads((FOLDER / "results.json").read_text())
README = (ROOT / "README.md").read_text()


def rows(text, names):
    """The lines of tables of so many columns as the overview has, by their first cell."""
    columns = overview(RESULTS)[0].count("|")
    found = {}
    for line in text.splitlines():
        name = re.match(r"\| `?(\w+)`? \|", line)
        if name and name[1] in names and line.count("|") == columns:
            found[name[1]] = line.replace("`", "")
    return found


def test_tables_are_of_the_results():
    assert (FOLDER / "tables.md").read_text() == markdown(RESULTS)
    assert (FOLDER / "figures/segments.png").stat().st_size < 10**6


def test_the_readme_has_the_table_of_the_results():
    head, _, *lines = overview(RESULTS)
    assert head in README
    assert list(rows(README, RESULTS["ways"]).values()) == lines


@pytest.mark.parametrize("card", sorted((ROOT / "hub_cards").glob("*.md")), ids=lambda p: p.stem)
def test_cards_have_rows_of_the_results(card):
    expected = rows("\n".join(overview(RESULTS)), RESULTS["ways"])
    for name, row in rows(card.read_text(), RESULTS["ways"]).items():
        assert row == expected[name]


def test_the_configs_are_those_of_the_results(monkeypatch):
    monkeypatch.chdir(ROOT)
    study = read_study("recipes/configs/memories.toml")
    assert {
        key: RESULTS["study"][key] for key in ("lengths", "seeds", "distances", "examples")
    } == {key: getattr(study, key) for key in ("lengths", "seeds", "distances", "examples")}
    trials = trials_of(study)
    for name, way in study.ways.items():
        found = RESULTS["ways"][name]
        assert (found["model"], found["fields"]) == (way.model, way.fields)
        for seed, trial in found["trials"].get("passkey", {}).items():
            assert trial == trials["passkey", way.model, int(seed)].hash, name
    # One segment everywhere, and a memory of as many tokens as documents of training have.
    sweep = study.plan_of
    segment = sweep.tasks["passkey"]["task"]["segment_length"]
    keys = "segment_length block_length sliding_window mem_len memory_segment_length".split()
    fields = [model["fields"] for model in sweep.models.values()]
    sizes = {table[key] for table in fields for key in keys if key in table} - {"none"}
    assert sizes == {segment}
    assert sweep.models["memorizing"]["fields"]["memory_size"] == study.lengths[0]
    schedules = [m["context_schedule"] for m in sweep.models.values() if "context_schedule" in m]
    assert len(schedules) == 2 and all(s[-1][1] == study.lengths[0] for s in schedules)
