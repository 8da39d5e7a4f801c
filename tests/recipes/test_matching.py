"""Models made alike, and their sizes as they are."""

import pytest
import torch

import zoo
from ablating.counting import counted_flops
from ablating.matching import sizes, widths
from ablating.sweep import read_sweep
from pretraining.building import build_config, build_model, load_tokenizer
from pretraining.recipe import UsageError
from zoo.core.state import state_bytes

CASES = [(name, variant) for name, x in zoo.MODELS.items() for variant in x.config.variants]
SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
HEAD = """
[recipe]
sequence_length = 48
steps = 300
[fields]
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 2
[tasks.text]
eval_lengths = [96]
[tasks.narrow]
fields = { hidden_size = 24 }
[models.transformer]
architecture = "sliding_window"
fields = { sliding_window = "none", intermediate_size = 300 }
"""
OTHERS = [name for name in zoo.MODELS if name != "sliding_window"]
LONGNET = "fields = { segment_lengths = [16, 32], dilation_rates = [1, 2] }\n"
BLOCK_RECURRENT = "fields = { sliding_window = 16, num_states = 8 }\n"


@pytest.fixture
def sweep(tmp_path):
    def sweep(by, text=""):
        path = tmp_path / "sweep.toml"
        path.write_text(f'match = {{ by = "{by}" }}\n{HEAD}{text}')
        return read_sweep(path)

    return sweep


def models(names):
    own = {"longnet": LONGNET, "block_recurrent": BLOCK_RECURRENT}
    return "".join(f'[models.{n}]\narchitecture = "{n}"\n{own.get(n, "")}' for n in names)


@pytest.mark.parametrize(("by", "task"), [("parameters", "text"), ("flops", "narrow")])
def test_all_are_within_one_percent(sweep, by, task):
    """Counted on models with weights, with the fields that they have on that task."""
    some = OTHERS if by == "parameters" else ["retnet", "rwkv7"]
    plan, tokenizer = sweep(by, models(some)), load_tokenizer("tokenizers/byte")
    found = widths(plan, task)
    assert found["transformer"] is None and {*found} == {"transformer", *some}
    amounts = {}
    for name in plan.models:
        recipe = plan.resolve(task, name, 1e-3, 0, found[name])
        assert recipe.model["hidden_size"] == {"text": 32, "narrow": 24}[task]
        model = build_model(recipe, build_config(recipe, tokenizer))
        outside = {"lm_head.weight", "model.embed_tokens.weight"}
        amounts[name] = sum(p.numel() for n, p in model.named_parameters() if n not in outside)
        if by == "flops":
            amounts[name] = 3 * model.flops_per_token(48)
    for name in some:
        assert amounts[name] == pytest.approx(amounts["transformer"], rel=0.01), name


def test_sizes_are_those_of_the_live_model(sweep):
    plan = sweep("parameters", '[models.retnet]\narchitecture = "retnet"\n')
    found = sizes(plan, "text", widths(plan, "text"))
    for name, size in found.items():
        recipe = plan.resolve("text", name, 1e-3, 0, size.intermediate_size)
        model = build_model(recipe, build_config(recipe, load_tokenizer("tokenizers/byte"))).eval()
        assert size.parameters == sum(p.numel() for p in model.parameters())
        assert size.training_flops_per_token == 3 * size.flops_per_token
        for length in (48, 96):
            with torch.no_grad():
                cache = model(torch.ones(1, length, dtype=torch.long), use_cache=True)
            assert size.state_bytes[str(length)] == state_bytes(cache.past_key_values)
    assert found["transformer"].state_bytes["96"] == 2 * found["transformer"].state_bytes["48"]
    match = found["retnet"].match
    assert match["off"] == match["found"] / match["target"] - 1 and abs(match["off"]) < 0.01
    assert match["target"] == found["transformer"].parameters_without_embeddings


def test_what_cannot_match_is_one_line(sweep):
    wide = '[models.retnet]\narchitecture = "retnet"\nfields = { value_size = 1024 }\n'
    with pytest.raises(UsageError, match=r"retnet on text: even without an MLP .*\+\d+\.\d% off"):
        widths(sweep("parameters", wide), "text")
    plan = sweep("parameters", models(["longnet"]))
    plan.fields |= {"hidden_size": 8, "num_hidden_layers": 1}
    plan.models["transformer"]["fields"]["intermediate_size"] = 7
    with pytest.raises(UsageError, match=r"longnet on text: .* off by [+-]\d\.\d% in parameters"):
        widths(plan, "text")


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_declared_flops_are_those_of_pytorch(name, variant):
    """Within 3%: with feedback, states are read once more than the definition needs."""
    architecture = zoo.MODELS[name]
    fields = SIZES | architecture.config.variants[variant]
    # The definition spreads a window over its tokens, and reads states once for each.
    if fields.get("sliding_window") in (13, 32):
        fields["sliding_window"] = 16
    model = architecture.causal_lm(architecture.config(**fields))
    assert counted_flops(model, 96) == pytest.approx(model.flops_per_token(96), rel=0.03)
