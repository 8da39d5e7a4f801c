"""Recipes: what they refuse, and what the schedules say."""

import dataclasses

import pytest

from pretraining.continuing import changes_history
from pretraining.recipe import Recipe, UsageError, describe_keys, read_recipe


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text("architecture = 'retnet'\nsteps = 400\n[model]\nhidden_size = 64\n")
    return path


def refused(path, *overrides):
    with pytest.raises(UsageError) as error:
        read_recipe(path, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_overrides(toml):
    recipe = read_recipe(
        toml,
        "--learning_rate 3e-4 --batch-size=8 --name 7 --model.hidden_size 32 --model.deepnorm true "
        "--sample_prompts ['a','b'] --trackers tensorboard --weight_decay 0".split(),
    )
    assert (recipe.learning_rate, recipe.batch_size, recipe.name) == (3e-4, 8, "7")
    assert recipe.model == {"hidden_size": 32, "deepnorm": True}
    assert recipe.sample_prompts == ["a", "b"]
    assert recipe.trackers == ["tensorboard"]
    assert recipe.weight_decay == 0.0
    recipe = read_recipe(toml, ["--learning_rate_scales.*.mixer.gate", "10"])
    assert recipe.learning_rate_scales == {"*.mixer.gate": 10}
    assert read_recipe(toml).name == "small"


def test_unknown_key(toml):
    message = refused(toml, "--learning_rat", "1")
    assert message == "unknown recipe key 'learning_rat': did you mean 'learning_rate'?"
    toml.write_text("architecture = 'retnet'\nbatchsize = 3\n")
    assert "did you mean 'batch_size'?" in refused(toml)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--steps", "many"], "steps is a whole number, got 'many'."),
        (["--steps", "1.5"], "steps is a whole number, got 1.5."),
        (["--learning_rate", "fast"], "learning_rate is a number, got 'fast'."),
        (["--gradient_checkpointing", "1"], "gradient_checkpointing is true or false, got 1."),
        (["--model", "big"], "model is a table, got 'big'."),
        (["--packing", "tight"], "packing is one of 'concat', 'documents', got 'tight'."),
        (["--steps", "0"], "steps must be positive, got 0."),
        (["--held_out", "1.5"], "held_out is a fraction in [0, 1), got 1.5."),
        (["--learning_rate", "nan"], "learning_rate must be positive, got nan."),
        (["--steps", "100"], "warmup_steps + decay_steps must fit into steps, got 100 + 200 > 100"),
        (["--name", "a/b"], "name is the name of a folder, without slashes and without a dot"),
        (["--name", ".."], "name is the name of a folder, without slashes and without a dot"),
        (["--steps"], "--steps needs a value"),
        (["--replay_segment_length", "-1"], "replay_segment_length must not be negative"),
        (["--learning_rate_scales.gate", "fast"], "learning_rate_scales.gate is a factor"),
        (["--learning_rate_scales.gate", "-1"], "learning_rate_scales.gate is a factor"),
        (["7"], "expected --key value, got '7'."),
    ],
)
def test_bad_value(toml, overrides, message):
    assert message in refused(toml, *overrides)


def test_bad_file(tmp_path):
    assert "No such file" in refused(tmp_path / "none.toml")
    bad = tmp_path / "bad.toml"
    bad.write_text("steps: 3")
    assert "is not TOML" in refused(bad)
    bad.write_text("steps = 300")
    assert "names no architecture" in refused(bad)


def test_batch_is_shared_evenly():
    recipe = Recipe("x", "retnet", batch_size=12)
    assert recipe.windows_per_process(4) == (3, 1)
    assert dataclasses.replace(recipe, micro_batch_size=2).windows_per_process(3) == (2, 2)
    for bad in (dataclasses.replace(recipe, micro_batch_size=5), recipe):
        with pytest.raises(UsageError, match="batch_size must be a multiple"):
            bad.windows_per_process(5)


def test_wsd_schedule():
    recipe = Recipe("x", "retnet", steps=100, warmup_steps=9, decay_steps=16, learning_rate=2.0)
    assert recipe.learning_rate_at(0) == pytest.approx(2.0 / 10)
    assert recipe.learning_rate_at(8) == pytest.approx(2.0 * 9 / 10)
    assert {recipe.learning_rate_at(step) for step in range(9, 85)} == {2.0}
    assert recipe.learning_rate_at(88) == pytest.approx(2.0 * (1 - (4 / 16) ** 0.5))
    assert recipe.learning_rate_at(99) == pytest.approx(2.0 * (1 - (15 / 16) ** 0.5))
    floor = dataclasses.replace(recipe, min_learning_rate=0.1)
    assert floor.learning_rate_at(100) == pytest.approx(0.2)


def test_cosine_and_constant_schedules():
    cosine = Recipe("x", "retnet", steps=110, warmup_steps=10, schedule="cosine", learning_rate=1.0)
    assert cosine.learning_rate_at(10) == 1.0
    assert cosine.learning_rate_at(60) == pytest.approx(0.5)
    assert cosine.learning_rate_at(110) == pytest.approx(0.0)
    constant = dataclasses.replace(cosine, schedule="constant")
    assert constant.learning_rate_at(9) < constant.learning_rate_at(109) == 1.0
    none = dataclasses.replace(cosine, warmup_steps=0)
    assert none.learning_rate_at(0) == 1.0


def test_what_a_continuation_may_change():
    old = Recipe("x", "retnet", steps=100, warmup_steps=10, decay_steps=20)
    saved = dataclasses.asdict(old)

    def changes(step, **values):
        return list(changes_history(saved, dataclasses.replace(old, **values), step).values())

    assert changes(50, log_every=1, keep_checkpoints=5, micro_batch_size=1) == []
    assert changes(50, seed=1, batch_size=64) == ["batch_size: 32 -> 64", "seed: 0 -> 1"]
    assert changes(50, model={"hidden_size": 8}) == ["model: {} -> {'hidden_size': 8}"]
    # Training longer from the stable phase of WSD leaves the past as it was; after it does not.
    assert changes(80, steps=200) == []
    assert changes(82, steps=200) == ["steps: 100 -> 200"]
    assert changes(50, learning_rate=0.5) == ["learning_rate: 0.001 -> 0.5"]


def test_help_names_every_key_once_under_a_heading():
    said = describe_keys()
    headings = said.strip().split("\n\n")
    assert all(group.splitlines()[0].endswith(":") for group in headings) and len(headings) > 5
    keys = [word[2:].split(".")[0] for word in said.split() if word.startswith("--")]
    assert sorted(keys) == sorted(field.name for field in dataclasses.fields(Recipe))
