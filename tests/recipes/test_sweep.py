"""What a sweep's TOML may say, and the recipes that come of it."""

import dataclasses
import json

import pytest
from conftest import ROOT

from ablating.sweep import read_sweep
from ablating.trials import Trial, toml_of
from pretraining.building import build_config, load_tokenizer
from pretraining.recipe import Recipe, UsageError, parse_value, read_recipe

SWEEP = """
output_dir = "out"
[match]
by = "none"
[sweep]
learning_rates = [1e-2, 1]
[recipe]
steps = 30
warmup_steps = 5
decay_steps = 5
batch_size = 8
[fields]
hidden_size = 16
num_hidden_layers = 1
num_attention_heads = 2
[tasks.text]
sequence_length = 32
[tasks.long]
sequence_length = 64
batch_size = 4
fields = { hidden_size = 24 }
[models.transformer]
architecture = "sliding_window"
learning_rate_scales = { "*.q_proj.weight" = 2.0 }
fields = { sliding_window = "none", num_attention_heads = 4 }
tasks.long = { learning_rate_scales = {}, fields = { sliding_window = 8 } }
[models.infini]
architecture = "infini"
fields = { memory_update = "none" }
"""


@pytest.fixture
def write(tmp_path):
    def write(text=SWEEP, old="", new=""):
        assert old in text
        path = tmp_path / "sweep.toml"
        path.write_text(text.replace(old, new))
        return path

    return write


def test_what_is_said_of_fewer_trials_wins(write):
    sweep = read_sweep(write(), ["--recipe.steps", "40", "--sweep.seeds", "[4, 5]", "--name", "x"])
    assert sweep.sweep.learning_rates == [0.01, 1.0] and sweep.sweep.seeds == [4, 5]
    assert sweep.sweep.baseline == sweep.match.reference == "transformer"
    assert str(sweep.folder) == "out/x"
    text = sweep.resolve("text", "transformer", 3e-3, 7, width=48)
    assert (text.steps, text.batch_size, text.sequence_length) == (40, 8, 32)
    assert (text.learning_rate, text.seed, text.cache_dir) == (3e-3, 7, "out/.corpus")
    assert text.model == {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "sliding_window": "none",
        "intermediate_size": 48,
    }
    assert text.learning_rate_scales == {"*.q_proj.weight": 2.0}
    long = sweep.resolve("long", "transformer", 3e-3, 7)
    assert (long.batch_size, long.sequence_length, long.learning_rate_scales) == (4, 64, {})
    assert (long.model["hidden_size"], long.model["sliding_window"]) == (24, 8)


def test_none_is_none_where_there_can_be_none(write):
    sweep, tokenizer = read_sweep(write()), load_tokenizer("tokenizers/byte")
    full = build_config(sweep.resolve("text", "transformer", 1e-2, 0), tokenizer)
    assert full.sliding_window is None
    infini = build_config(sweep.resolve("text", "infini", 1e-2, 0), tokenizer)
    assert infini.memory_update == "none"  # which is one of its choices


def test_a_trial_is_its_recipe(write, tmp_path):
    """Its folder is the same wherever the sweep lies, and another for any other key."""
    sweep = read_sweep(write())
    recipe = sweep.resolve("text", "transformer", 3e-3, 7, width=48)
    trial = Trial("text", "transformer", 3e-3, 7, "select", recipe, tmp_path)
    elsewhere = dataclasses.replace(recipe, output_dir="a", cache_dir="b", name="c")
    same = dataclasses.replace(trial, recipe=elsewhere, role="report", sweep_folder=tmp_path / "x")
    assert same.hash == trial.hash and len(trial.hash) == 12
    other = dataclasses.replace(recipe, weight_decay=0.2)
    others = {dataclasses.replace(trial, recipe=other).hash}
    others |= {dataclasses.replace(trial, role="noise").hash}
    assert len(others | {trial.hash}) == 3
    trial.write_recipe()
    read = read_recipe(trial.recipe_file)
    assert read == dataclasses.replace(recipe, output_dir=str(trial.folder))
    assert read.run_dir == trial.run_folder


def test_trials_of_earlier_versions_keep_their_names():
    """Else a sweep would begin again whenever recipes get a new key."""
    results = json.loads((ROOT / "recipes/results/ablations/laptop/results.json").read_text())
    for record in results["trials"][::20]:
        recipe = Recipe(**record["recipe"])
        named = (record[key] for key in ("task", "model", "learning_rate", "seed", "role"))
        trial = Trial(*named, recipe, ROOT)
        assert trial.hash == record["hash"]
    skipping = dataclasses.replace(recipe, position_skip={"target": 4 * recipe.sequence_length})
    assert dataclasses.replace(trial, recipe=skipping).hash != trial.hash


@pytest.mark.parametrize("value", ['a "b" \\ é\n', [1, 2.5, 1e-7], {"*.x": {"y z": True}}, ""])
def test_values_as_toml(value):
    assert parse_value(toml_of(value)) == value


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[match]", "[macth]", r"unknown key 'macth': did you mean 'match'\?"),
        ("learning_rates", "lerning_rates", r"in \[sweep\]: did you mean 'learning_rates'\?"),
        ("steps = 30", "stepz = 30", r"unknown key 'stepz' in \[recipe\]: did you mean 'steps'\?"),
        ("batch_size = 4", "seed = 4", r"tasks.long.seed is not said there: say \[sweep\] seeds"),
        ("steps = 30", 'steps = "x"', "transformer on text: steps is a whole number, got 'x'"),
        ("tasks.long = {", "tasks.lung = {", r"models.transformer.tasks.lung: did you mean 'long'"),
        ("[1e-2, 1]", "[1e-2, -1]", "learning_rates are numbers above 0"),
        ("[1e-2, 1]", "[1e-2, 'a']", "sweep.learning_rates is a list of numbers"),
        ("[1e-2, 1]", "[1]\nseeds = [0]", "seeds are others than select_seed = 0"),
        ("[1e-2, 1]", "[1]\nbaseline = 'infni'", r"sweep.baseline .* 'infni': did you mean 'infin"),
        ('"none"\n[sweep]', '"width"\n[sweep]', "match.by is one of 'parameters', 'flops', 'none'"),
        (
            '"none"\n[sweep]',
            '"flops"\nreference = "infini"\n[sweep]',
            None,
        ),
        ('architecture = "infini"', "", "models.infini names no architecture"),
        ("[fields]", "[engine]\nslots = 0\n[fields]", "engine.slots is at least 1, got 0"),
    ],
)
def test_mistakes_are_one_line(write, old, new, message):
    path = write(old=old, new=new)
    if message is None:  # a width is said where none is solved for
        read_sweep(path)
        path = write(path.read_text(), "num_attention_heads = 4", "intermediate_size = 4")
        message = "models.transformer: intermediate_size is solved for"
    with pytest.raises(UsageError, match=message) as caught:
        read_sweep(path)
    assert "\n" not in str(caught.value)
