"""Trials of a sweep, read in other ways and in texts longer than those of training."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from torch.nn.functional import cross_entropy, one_hot

import extrapolate
from extrapolating import readings as files
from extrapolating.measuring import Models, merged
from extrapolating.study import read_study
from extrapolating.summary import cells, markdown, overview, points, spans
from pretraining.building import build_config, build_model, tokenizer_of
from pretraining.mixing import load_mixture
from pretraining.recipe import UsageError
from tasks.passkey import ASK, KEY

SWEEP = """
output_dir = "{folder}/sweeps"
[match]
by = "none"
[sweep]
learning_rates = [1e-2]
select_seed = 1
seeds = [2]
[recipe]
sequence_length = 16
steps = 4
warmup_steps = 0
decay_steps = 0
[fields]
hidden_size = 16
num_hidden_layers = 1
num_attention_heads = 2
initializer_range = 0.3
sliding_window = "none"
[tasks.text]
data = "{folder}/text.txt"
eval_bytes = 300
[tasks.recall]
task = {{ name = "passkey", example_length = 16, digits = 1, test_distances = [4] }}
[tasks.segments]
task = {{ name = "passkey_by_segment", segment_length = 8, segments = 2, digits = 2 }}
[models.rope]
architecture = "sliding_window"
"""
BY_SEGMENT = ["--text", "", "--recall", "segments", "--distances", "[0, 1, 3, 7]"]
STUDY = """
sweep = "{folder}/sweep.toml"
output_dir = "{folder}/studies"
lengths = [16, 32, 64]
seeds = [1, 2]
text = "text"
places = 2
recall = "recall"
distances = [4, 28, 40]
examples = 6
[ways.rope]
model = "rope"
[ways.linear]
model = "rope"
panel = "slowed down"
fields = {{ rope_parameters = {{ rope_type = "linear" }} }}
by_length = {{ "rope_parameters.factor" = [1.0, 2.0, 4.0] }}
[ways.wide]
model = "rope"
panel = "windows"
fields = {{ sliding_window = 64 }}
attention = "sdpa"
[ways.window]
model = "rope"
panel = "windows"
fields = {{ sliding_window = 16 }}
"""


@pytest.fixture
def untrained(tmp_path):
    """The path of a study whose sweep has trained nothing."""
    (tmp_path / "text.txt").write_text("".join(f"{n} squared is {n * n}.\n" for n in range(200)))
    (tmp_path / "sweep.toml").write_text(SWEEP.format(folder=tmp_path))
    path = tmp_path / "study.toml"
    path.write_text(STUDY.format(folder=tmp_path))
    return path


@pytest.fixture
def written(untrained):
    """The same with both seeds trained: weights as they begin."""
    for reading in files.readings_of(read_study(untrained)):
        if reading.name == "rope":
            train(reading.trial)
    return untrained


def train(trial):
    """Leaves what a run leaves behind."""
    config = build_config(trial.recipe, tokenizer_of(trial.recipe))
    build_model(trial.recipe, config).save_pretrained(trial.run_folder)
    trial.mark(0, 1.0)


def results_of(path):
    return json.loads((path.parent / "studies/study/results.json").read_text())


def test_ways_are_measured_as_they_say(written):
    assert extrapolate.start([str(written)]) == 0
    ways = results_of(written)["ways"]
    # A window of the longest text hides nothing, and at its trained length no way differs.
    for measure in ("in_context", "by_distance"):
        for seed, found in ways["rope"][measure].items():
            same = dict(points(ways["wide"][measure][seed]))
            assert same == pytest.approx(dict(points(found)), rel=1e-5)
    rope, linear, window = (ways[name]["in_context"]["1"] for name in ("rope", "linear", "window"))
    assert rope["16"] == pytest.approx(linear["16"]) == pytest.approx(window["16"])
    assert len({round(x["64"], 4) for x in (rope, linear, window)}) == 3
    # In one layer a window of L sees as much from 2 L as from 4 L.
    assert window["32"] == pytest.approx(window["64"], rel=1e-5) != rope["32"]
    assert set(ways["rope"]["by_distance"]["1"]) == {"4", "28", "40"}
    assert set(ways["rope"]["trials"]) == {"text", "recall"}
    both = cells(ways["rope"], "in_context")[64]
    assert both.mean == pytest.approx(sum(both.values.values()) / 2) and len(both.values) == 2
    first, more = (cells(ways["rope"], "in_context", since)[64] for since in (None, 16))
    assert more.values["2"] == pytest.approx(
        first.values["2"] - ways["rope"]["in_context"]["2"]["16"]
    )
    tables = (written.parent / "studies/study/tables.md").read_text().split("| | ")
    assert [table.count("\n| rope |") for table in tables] == [0, 1, 1, 1]


def test_losses_are_those_of_the_same_text_and_by_position(written):
    extrapolate.start([str(written), "--seeds", "[1]", "--recall", "", "--first", "7"])
    study = read_study(written)
    reading = files.readings_of(study)[0]
    recipe, model = reading.trial.recipe, Models(study, reading.trial, reading.way).of(64)
    held_out = load_mixture(recipe, tokenizer_of(recipe), recipe.corpus_dir).held_out
    ids = torch.from_numpy(held_out.ids[7 : 7 + 129].astype("int64"))
    scale = held_out.num_targets / held_out.num_bytes / math.log(2)
    found = results_of(written)["ways"]["rope"]["in_context"]["1"]
    for length in study.lengths:
        nats = 0.0
        for end in (64, 128):
            # The targets end at position `length` of a text that goes on.
            text = ids[end - length : end + 1].tolist() + [1] * 9
            with torch.no_grad():
                logits = model(torch.tensor([text])).logits[0, length - 16 : length]
            nats += cross_entropy(logits, ids[end - 15 : end + 1]).item() / 2
        assert found[str(length)] == pytest.approx(nats * scale, rel=1e-5)


def test_recall_is_of_a_key_as_far_back_as_it_says(written, monkeypatch):
    """Whoever says again what came so many tokens before is always right."""
    far, seen = {16: 4, 32: 28, 64: 40}, []

    def looks_back(ids, use_cache, logits_to_keep):
        assert (ids[:, -1] == ASK).all() and (ids == KEY).sum() == len(ids)
        seen.append(tuple(ids.shape))
        return SimpleNamespace(logits=one_hot(ids[:, None, -far[ids.shape[1]]], 99).float())

    monkeypatch.setattr(Models, "of", lambda self, length: looks_back)
    extrapolate.start([str(written), "--seeds", "[1]", "--text", ""])
    found = results_of(written)["ways"]["rope"]["by_distance"]["1"]
    assert found == {"4": 1.0, "28": 1.0, "40": 1.0}
    # Six examples each, as many tokens at once as the longest text has.
    assert seen[:7] == [(4, 16), (2, 16), (2, 32), (2, 32), (2, 32), (1, 64), (1, 64)]


def test_recall_by_segment_is_of_documents_of_every_length(untrained, monkeypatch, capsys):
    """Whoever knows keys of this segment and the one before is right there, whatever the length."""
    study = read_study(untrained, BY_SEGMENT)
    for reading in files.readings_of(study):
        if reading.name == "rope":
            train(reading.trial)
    seen = []

    def knows_two_segments(ids, use_cache, logits_to_keep):
        seen.append(tuple(ids.shape))
        key = (ids == KEY).nonzero()[:, 1]
        back = (ids.shape[1] - 1) // 8 - key // 8
        digits = torch.stack([row[place + 1 : place + 3] for row, place in zip(ids, key)])
        digits[:, 1] += back > 1  # only one of two, farther back
        return SimpleNamespace(logits=one_hot(digits, 99).float())

    monkeypatch.setattr(Models, "of", lambda self, length: knows_two_segments)
    assert extrapolate.start([str(untrained), *BY_SEGMENT]) == 0
    results = results_of(untrained)
    found = {
        "16": {"0": 1.0, "1": 1.0},
        "32": {"0": 1.0, "1": 1.0, "3": 0.0},
        "64": {"0": 1.0, "1": 1.0, "3": 0.0, "7": 0.0},
    }
    digits = {n: {back: share or 0.5 for back, share in of.items()} for n, of in found.items()}
    for way in results["ways"].values():
        assert way["by_segment"] == {"1": found, "2": found}
        assert way["digits_by_segment"] == {"1": digits, "2": digits}
    assert seen[:2] == [(6, 16)] * 2 and seen[-1] == (6, 64)  # as many tokens as 32 examples have
    folder = untrained.parent / "studies/study"
    tables = (folder / "tables.md").read_text()
    shares = [f"{share:.2f} ± 0.00" for share in (1, 1, 0, 0)]
    for count in (2, 3, 4):  # a table for each length, of the distances that it has
        assert f"| wide | {' | '.join(shares[:count])} |\n" in tables
    assert tables.count("(as in training)") == 1
    assert "| | 2: 0 | 2: 1 | 4: 1 | 4: 3 | 8: 1 | 8: 3 | 8: 7 | seeds |" in tables
    assert (
        tables.count("\n| linear | 1.00 (1.00) | 1.00 (1.00) | 1.00 (1.00) | 0.00 (0.50) | ") == 1
    )
    assert tables.startswith("Share of answers") and "| | 0 | 1 | 3 | 7 |" in tables
    assert [path.name for path in (folder / "figures").iterdir()] == ["segments.png"]


def test_nothing_is_measured_twice(written, monkeypatch, capsys):
    real, seen = files.losses, []

    def stop_at_the_third(study, trial, way, held_out):
        seen.append(way)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(study, trial, way, held_out)

    monkeypatch.setattr(files, "losses", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        extrapolate.start([str(written)])
    folder = written.parent / "studies/study/readings"
    kept = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(kept) == 2
    assert extrapolate.start([str(written)]) == 0
    assert len(seen) == 3 + 6  # eight losses, two of which were there
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    before = {path.name for path in folder.iterdir()}
    capsys.readouterr()
    assert extrapolate.start([str(written)]) == 0 and "\n1/" not in "\n" + capsys.readouterr().out
    # A way that is changed is measured anew, the others are not; nothing is deleted.
    window = ["--ways.window.fields", "{ sliding_window = 8 }"]
    assert extrapolate.start([str(written), *window]) == 0
    assert len(seen) == 9 + 2 and before < {path.name for path in folder.iterdir()}


@pytest.mark.slow  # two processes that import torch
def test_processes_measure_alike(written):
    assert extrapolate.start([str(written)]) == 0
    alone = results_of(written)["ways"]
    assert extrapolate.start([str(written), "--name", "two", "--workers", "2"]) == 0
    other = json.loads((written.parent / "studies/two/results.json").read_text())["ways"]
    assert other == alone


def test_what_is_not_trained_is_named(written, capsys):
    for reading in files.readings_of(read_study(written)):
        if reading.task == "text" and reading.seed == 2:
            (reading.trial.folder / "DONE").unlink(missing_ok=True)
    assert extrapolate.start([str(written)]) == extrapolate.SOME_LEFT
    assert "- missing: window on text, seed 2: its trial is waiting" in capsys.readouterr().out
    results = results_of(written)
    assert list(results["ways"]["rope"]["in_context"]) == ["1"]
    assert list(results["ways"]["rope"]["by_distance"]) == ["1", "2"]
    figures = sorted(p.name for p in (written.parent / "studies/study/figures").iterdir())
    assert figures == ["contexts.png", "recall.png"]


def test_a_seed_that_rates_were_chosen_on_is_not_read(untrained, monkeypatch):
    study = read_study(untrained)
    search = dataclasses.replace(study.plan_of.sweep, learning_rates=[1e-3, 1e-2])
    study.plan_of = dataclasses.replace(study.plan_of, sweep=search)
    assert {reading.trial for reading in files.readings_of(study)} == {None}  # no rate is chosen
    monkeypatch.setattr(
        files.Plan,
        "of_model",
        lambda self, *names: [self.trial(*names, 1e-2, 2, "report")],
    )
    found = {reading.seed: reading.trial for reading in files.readings_of(study)}
    assert found[1] is None and found[2].learning_rate == 1e-2


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--lengths", "[32, 16]"], "lengths are numbers above 0 that rise, got .32, 16."),
        (["--first", "-1"], "first is at least 0"),
        (["--seeds", "[1, 1]"], "seeds are different"),
        (["--text", "tekst"], "did you mean 'text'"),
        (["--recall", "text"], "of the family passkey or passkey_by_segment, got 'text'"),
        (["--distances", "[4, 63]"], "has at least 65 tokens, more than the longest of lengths"),
        (["--distances", "[1]"], "test_distances are at least 2"),
        ([*BY_SEGMENT, "--lengths", "[16, 36]"], "whole segments of 8 tokens, got 36"),
        ([*BY_SEGMENT, "--distances", "[0, 8]"], "has 8 segments, and no key lies 8 segments back"),
        ([*BY_SEGMENT, "--distances", "[-1, 2]"], "distances are numbers of at least 0 that rise"),
        (["--ways.window.model", "ropes"], "did you mean 'rope'"),
        (["--ways.window.modle", "rope"], "did you mean 'model'"),
        (["--ways.linear.by_length", "{ a = [1] }"], "a list of 3 values"),
        (["--ways.new.fields", "{}"], "ways.new names no model"),
        (["--sweep", "nowhere.toml"], "cannot read nowhere.toml"),
        (["--colour", "red"], "unknown key 'colour'"),
        (["--report"], "nothing is measured"),
        (["--workers", "0"], "--workers is at least 1"),
    ],
)
def test_mistakes_are_one_line(untrained, changed, said):
    with pytest.raises(UsageError, match=said) as error:
        extrapolate.start([str(untrained), *changed])
    assert "\n" not in str(error.value)


def test_ways_that_do_not_fit_are_refused_before_anything_is_measured(written):
    for changed, said in (
        (["--ways.window.fields", "{ sliding_windows = 8 }"], "did you mean 'sliding_window'"),
        (["--places", "100"], "set a larger eval_bytes"),
    ):
        with pytest.raises(UsageError, match=said) as error:
            extrapolate.start([str(written), *changed])
        assert "\n" not in str(error.value)
    assert not list((written.parent / "studies/study").rglob("*.json"))
    with pytest.raises(UsageError, match="not those of its model"):
        extrapolate.start([str(written), "--ways.window.fields", "{ hidden_size = 32 }"])


def test_tables_are_merged():
    fields = {"a": {"b": 1, "c": 2}, "d": 3}
    assert merged(fields, {"a": {"b": 4}, "d": "none"}) == {"a": {"b": 4, "c": 2}, "d": "none"}
    assert fields == {"a": {"b": 1, "c": 2}, "d": 3}


@pytest.mark.parametrize("name", ["test_long"])
def test_committed_tables_are_those_of_the_results(name):
    folder = ROOT / "recipes/results" / name
    results = json.loads((folder / "results.json").read_text())
    assert (folder / "tables.md").read_text() == markdown(results)


def test_an_overview_is_of_the_distances_between_doublings():
    study = {"segment_length": 4, "lengths": [16, 32, 64], "distances": [0, 1, 2, 3, 6, 7, 8, 15]}
    assert spans(study) == [
        (16, [0]),
        (16, [1]),
        (16, [2, 3]),
        (32, [1, 2, 3]),
        (32, [6, 7]),
        (64, [1, 2, 3]),
        (64, [6, 7]),
        (64, [8, 15]),
    ]
    study["distances"] = [0, 2, 3, 6]
    shares = {"16": {"0": 1.0, "2": 0.5, "3": 1.0}, "32": {"2": 0, "3": 0, "6": 0.25}}
    shares["64"] = shares["32"]
    ways = {"one": {"by_segment": {"4": shares}, "digits_by_segment": {"4": shares}}, "none": {}}
    ways["none"] = {"by_segment": {}, "digits_by_segment": {}}
    head, _, *rows = overview({"study": study, "ways": ways})
    assert head == "| | 4: 0 | 4: 2 to 3 | 8: 2 to 3 | 8: 6 | 16: 2 to 3 | 16: 6 | seeds |"
    assert len(rows) == 1 and rows[0].startswith(
        "| one | 1.00 (1.00) | 0.75 (0.75) | 0.00 (0.00) |"
    )


def test_the_committed_study_has_the_numbers_of_its_formulas(monkeypatch):
    monkeypatch.chdir(ROOT)
    study = read_study("recipes/configs/test_long.toml")
    fields, trained = study.plan_of.fields, study.lengths[0]
    channels = fields["hidden_size"] // fields["num_attention_heads"]
    scales = [length / trained for length in study.lengths]
    pairs = range(channels // 2)
    power = channels / (channels - 2)

    def values(name, key):
        return study.ways[name].by_length[f"rope_parameters.{key}"]

    def factors(name):
        table = study.ways[name].fields["rope_parameters"]
        assert table["short_factor"] == table["long_factor"]
        return table["long_factor"]

    assert values("rope_linear", "factor") == values("rope_yarn", "factor") == scales
    ntk = [1e4 * scale**power for scale in scales]
    assert values("rope_ntk", "rope_theta") == pytest.approx(ntk, rel=1e-6)
    clex = [1e4 * (2 * scale - 1) ** power for scale in scales]
    assert values("rope_clex", "rope_theta") == pytest.approx(clex, rel=1e-6)
    giraffe = [(1 - j / len(pairs)) ** -0.5 for j in pairs]
    assert factors("rope_power") == pytest.approx(giraffe, rel=1e-6)
    for j, factor in zip(pairs, factors("rope_truncated")):
        angle, cut = 1e4 ** (-2 * j / channels), 2 * math.pi / trained
        slow = 2 * math.pi / (16 * trained)
        expected = 1.0 if angle >= cut else angle / slow if angle >= cut / 8 else 1e9
        assert factor == pytest.approx(expected, rel=1e-6)
    groups = study.ways["rope_self_extend"].by_length["rope_extension.group_size"]
    window = study.ways["rope_self_extend"].fields["rope_extension"]["window"]
    reach = [(trained - window) * group + window for group in groups]
    assert all(far >= length for far, length in zip(reach, study.lengths))
    assert all(window % group == 0 for group in groups)
