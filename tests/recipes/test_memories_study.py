"""What is said of the studies of memories is what they measured."""

import json
import re

import pytest
from conftest import ROOT

from extrapolating.readings import trials_of
from extrapolating.study import read_study
from extrapolating.summary import markdown, overview

README = (ROOT / "README.md").read_text()
# Study -> the heading of the README's section with its table.
HEADINGS = {
    "memories": "### All memories, one study",
    "memories_longer": "#### Three times as many steps",
}
FOLDERS = {name: ROOT / "recipes/results" / name for name in HEADINGS}
RESULTS = {name: json.loads((at / "results.json").read_text()) for name, at in FOLDERS.items()}
studies = pytest.mark.parametrize("name", HEADINGS)


def section(heading):
    """What the README says under a heading, up to the next one."""
    return re.split(r"^#+ ", README.split(f"{heading}\n")[1], flags=re.MULTILINE)[0]


def rows(text, results):
    """The lines of tables of so many columns as the overview has, by their first cell."""
    columns, names, found = overview(results)[0].count("|"), results["ways"], {}
    for line in text.splitlines():
        name = re.match(r"\| `?(\w+)`? \|", line)
        if name and name[1] in names and line.count("|") == columns:
            found[name[1]] = line.replace("`", "")
    return found


@studies
def test_tables_are_of_the_results(name):
    assert (FOLDERS[name] / "tables.md").read_text() == markdown(RESULTS[name])
    assert (FOLDERS[name] / "figures/segments.png").stat().st_size < 10**6


@studies
def test_the_readme_has_the_table_of_the_results(name):
    head, _, *lines = overview(RESULTS[name])
    text = section(HEADINGS[name])
    assert head in text
    assert list(rows(text, RESULTS[name]).values()) == lines


@pytest.mark.parametrize("card", sorted((ROOT / "hub_cards").glob("*.md")), ids=lambda p: p.stem)
def test_cards_have_rows_of_the_results(card):
    expected = {line for results in RESULTS.values() for line in overview(results)}
    for results in RESULTS.values():
        assert set(rows(card.read_text(), results).values()) <= expected


@studies
def test_all_was_measured_on_one_commit(name):
    """The trials and their reading, of a clean tree, one like the other."""
    results = RESULTS[name]
    sweep = json.loads((ROOT / f"recipes/results/ablations/{name}/results.json").read_text())
    assert results["missing"] == [] and not results["git_changed"]
    assert {trial["status"] for trial in sweep["trials"]} == {"done"}
    assert {trial["git_commit"] for trial in sweep["trials"]} == {results["git_commit"]}
    assert {trial["cpu_threads"] for trial in sweep["trials"]} == {1}
    versions = [trial["versions"] for trial in sweep["trials"]]
    assert all(found == results["versions"] for found in versions)


@studies
def test_the_configs_are_those_of_the_results(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    results, study = RESULTS[name], read_study(f"recipes/configs/{name}.toml")
    keys = "lengths seeds distances examples".split()
    assert {key: results["study"][key] for key in keys} == {k: getattr(study, k) for k in keys}
    trials = trials_of(study)
    assert results["ways"].keys() == study.ways.keys()
    for name, way in study.ways.items():
        found = results["ways"][name]
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


def test_rmt_alone_begins_with_short_documents():
    sweep = read_study("recipes/configs/memories.toml").plan_of
    schedules = {name: m.get("context_schedule") for name, m in sweep.models.items()}
    schedules = {name: found for name, found in schedules.items() if found}
    assert sorted(schedules) == ["rmt", "rmt_associative"]
    assert all(found[-1][1] == 128 for found in schedules.values())


def test_longer_is_longer_and_nothing_else(monkeypatch):
    monkeypatch.chdir(ROOT)
    short, long = (trials_of(read_study(f"recipes/configs/{name}.toml")) for name in HEADINGS)
    assert long
    for key, trial in long.items():
        ours, theirs = trial.recipe, short[key].recipe
        differs = {field for field, value in vars(ours).items() if value != vars(theirs)[field]}
        assert differs <= {"steps", "output_dir"}
        assert ours.steps == 3 * theirs.steps
