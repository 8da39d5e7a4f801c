"""Where transformers, peft and their habits meet our models: names, files, masks, refusals."""

import json
import logging

import pytest
import torch
import transformers
from accelerate import big_modeling
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils.generic import find_labels

import zoo
from zoo.contract.subject import variants_of, zoo_subject
from zoo.core.base import scale_
from zoo.core.state import FORMER_LAYER_TYPES, load_state, save_state
from zoo.kernels import attention_by_head, windowed_attention
from zoo.layers import relative_scores

TINY = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
VARIANTS = [(name, variant) for name in zoo.MODELS for variant in variants_of(name)]
every_variant = pytest.mark.parametrize(("name", "variant"), VARIANTS)
architectures = pytest.mark.parametrize("architecture", zoo.MODELS.values(), ids=zoo.MODELS)


def build(architecture, **fields):
    torch.manual_seed(0)
    return architecture.causal_lm(architecture.config(**TINY | fields)).eval()


def ids_of(*shape):
    return torch.randint(1, 97, shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def said(caplog, monkeypatch):
    """What transformers' loggers say, each for the first time again."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    transformers.logging.get_logger().warning_once.cache_clear()
    return caplog


@architectures
def test_labels_are_the_only_labels(architecture):
    assert find_labels(architecture.causal_lm) == ["labels"]
    assert find_labels(architecture.sequence_classifier) == ["labels"]


@architectures
def test_shifted_labels_of_any_stride(architecture):
    model, ids = build(architecture), ids_of(2, 12)
    expected = model(ids[:, :-1], shift_labels=ids[:, 1:].contiguous()).loss
    assert not ids[:, 1:].is_contiguous()
    assert torch.equal(model(ids[:, :-1], shift_labels=ids[:, 1:]).loss, expected)
    model.train().loss_chunk_size = 5
    torch.testing.assert_close(model(ids[:, :-1], shift_labels=ids[:, 1:]).loss, expected)


@pytest.mark.parametrize("way", ["as it is", "by head"])
@architectures
def test_pytorchs_default_device_is_not_the_models(architecture, way, monkeypatch):
    """Whoever has a GPU as the default and a model elsewhere; meta tensors show what went there."""
    if way == "by head":  # which long texts of wide heads take on some processors
        monkeypatch.setattr(attention_by_head, "is_faster_here", lambda: True)
        monkeypatch.setattr(attention_by_head, "LEAST_QUERIES", 2)
        monkeypatch.setattr(attention_by_head, "LEAST_WIDTH", 1)
        for module in (windowed_attention, relative_scores):
            monkeypatch.setattr(module, "LEAST_IN_BLOCK", 2)
    # With windows and segments that the text is longer than.
    fields = next(iter(variants_of(architecture.name).values()))
    model, ids = build(architecture, **fields), ids_of(2, 150)

    def run():
        found, cache = [], None
        with torch.no_grad():
            for piece in ids.split([100, 47, 1, 1, 1], dim=1):
                output = model(piece, past_key_values=cache, use_cache=True)
                found, cache = [*found, output.logits], output.past_key_values
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return found + [p.grad for p in model.parameters() if p.grad is not None]

    expected = run()
    with torch.device("meta"):
        found = run()
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


def gradients_under_autocast(model, ids, is_inside, dtype=torch.bfloat16):
    model.zero_grad()
    with torch.autocast("cpu", dtype):
        loss = model(ids, labels=ids).loss
        if is_inside:
            loss.backward()
    if not is_inside:
        loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


# Whose mixers leave parts that have to be precise to autograd: it goes back through them in the
# types of autocast, as it does through everyone's.
BY_AUTOGRAD = {"infini", "landmark"}


@pytest.mark.parametrize("checkpointing", [False, True])
@architectures
def test_backward_may_be_called_under_autocast(architecture, checkpointing):
    model, ids = build(architecture).train(), ids_of(2, 45)
    if checkpointing:
        model.gradient_checkpointing_enable()
    outside, inside = (gradients_under_autocast(model, ids, is_inside) for is_inside in (0, 1))
    if architecture.name in BY_AUTOGRAD:
        assert (inside - outside).norm() <= 2**-6 * outside.norm()
    else:
        assert torch.equal(inside, outside)


@every_variant
def test_blocks_that_sharding_wraps_are_there(name, variant):
    """accelerate looks for each of them, and refuses a model that has none of one."""
    model = zoo.MODELS[name].causal_lm(zoo.MODELS[name].config(**TINY | variants_of(name)[variant]))
    blocks = {type(layer).__name__ for layer in model.model.layers}
    assert model._no_split_modules == model.model._no_split_modules == blocks


@every_variant
def test_transformers_own_config_class_reads_what_is_written(name, variant, tmp_path):
    """Trainer reads it with that class when it resumes, and AutoTokenizer when it guesses."""
    architecture = zoo.MODELS[name]
    config = architecture.config(**TINY | variants_of(name)[variant])
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "layer_types" not in written
    assert PreTrainedConfig.from_pretrained(tmp_path).hidden_size == config.hidden_size
    # A folder written before had them, by the names of then.
    former = {new: old for old, new in FORMER_LAYER_TYPES.items()}
    for names in (config.layer_types, [former.get(x, x) for x in config.layer_types]):
        (tmp_path / "config.json").write_text(json.dumps(written | {"layer_types": names}))
        again = architecture.config.from_pretrained(tmp_path)
        assert again.to_diff_dict() == config.to_diff_dict()
        assert again.layer_types == config.layer_types


@every_variant
def test_accelerate_refuses_to_split_a_text(name, variant):
    """By its own means, which know nothing of a state: it would begin anew on each device."""
    architecture = zoo.MODELS[name]
    model = nn.Module()
    model.config = architecture.config(**TINY | variants_of(name)[variant])
    for refuse in (
        big_modeling._attach_context_parallel_hooks,
        big_modeling._refuse_recurrent_layers_under_sequence_parallelism,
    ):
        with pytest.raises(ValueError, match="does not support attention layers of type") as error:
            refuse(model)
        for layer_type in model.config.layer_types:
            assert layer_type in str(error.value)


@architectures
def test_layer_types_of_others_are_refused(architecture):
    for asked in (["full_attention", "linear_attention"], ["zoo_linear_attention"], [], ["x"] * 2):
        with pytest.raises(ValueError, match="layer_types follow from the other fields") as error:
            architecture.config(**TINY, layer_types=asked)
        assert "softmax_layers" in str(error.value) and "\n" not in str(error.value)
    config = architecture.config(**TINY)
    assert architecture.config(**TINY, layer_types=config.layer_types).layer_types
    config.num_hidden_layers = 3  # they follow
    assert len(config.layer_types) == 3


def test_hybrids_have_the_layers_they_are_given():
    config = zoo.LightningConfig(**TINY, softmax_layers=[1])
    assert config.layer_types == ["zoo_linear_attention", "zoo_growing_linear_attention"]
    config = zoo.LightningConfig(**TINY, softmax_layers=[0], sliding_window=4)
    assert config.layer_types == ["zoo_sliding_linear_attention", "zoo_linear_attention"]


@architectures
def test_attention_implementations_are_set_or_refused(architecture):
    fields = {"softmax_layers": [1]} if architecture.name == "lightning" else {}
    model, ids = build(architecture, **fields), ids_of(1, 9)
    with torch.no_grad():
        expected = model(ids).logits
        if architecture.name not in ("lightning", "sliding_window", "rmt"):
            with pytest.raises(ValueError, match="does not support an attention implementation"):
                model.set_attn_implementation("sdpa")
            return
        for name in ("sdpa", "eager"):
            calls = []
            interface = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
            original = interface.get_interface

            def watch(name, default, calls=calls, original=original):
                calls.append(name)
                return original(name, default)

            interface.get_interface = watch
            try:
                model.set_attn_implementation(name)
                torch.testing.assert_close(model(ids).logits, expected)
            finally:
                del interface.get_interface
            assert set(calls) == {name}


@torch.no_grad()
def test_attention_that_another_copy_registered(monkeypatch):
    """A zoo in an exported folder registers its own function under our name, for the process."""
    model = build(zoo.MODELS["sliding_window"])
    expected = model(ids_of(1, 9)).logits
    interface = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    monkeypatch.setitem(interface, "banded", None)
    assert interface.get_interface("banded", "none") is None
    assert torch.equal(model(ids_of(1, 9)).logits, expected)


@architectures
def test_a_full_graph_is_promised_where_the_cache_has_one_size(architecture):
    """transformers' common tests compile `generate` of whoever promises it."""
    model = build(architecture)
    assert type(model)._can_compile_fullgraph == model.has_constant_state


def test_attention_implementation_without_softmax():
    model = build(zoo.MODELS["lightning"])
    # What asks before it sets one, as transformers' common tests do.
    assert not (model._supports_sdpa or model._supports_flash_attn or model._supports_flex_attn)
    assert build(zoo.MODELS["lightning"], softmax_layers=[1])._supports_sdpa
    with pytest.raises(ValueError, match="got 'sdpa' and no softmax_layers; leave it out"):
        model.set_attn_implementation("sdpa")


@architectures
def test_what_only_a_cache_of_keys_can_do(architecture):
    from peft import PrefixTuningConfig, get_peft_model

    model, ids = build(architecture), ids_of(1, 6)
    for _ in range(2):  # the first refusal leaves nothing behind
        with pytest.raises(ValueError, match="assistant_early_exit drafts with the first layers"):
            model.generate(ids, assistant_early_exit=1, max_new_tokens=3, pad_token_id=0)
        assert model.config.num_hidden_layers == 2
    with pytest.raises(ValueError, match="continuous batching .* use generate with a padded batch"):
        model.generate_batch([[1, 2, 3]], max_new_tokens=2)
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    tuned = get_peft_model(model, prefix)
    with pytest.raises(ValueError, match="prefix tuning; .*LoRA or prompt tuning"):
        tuned(input_ids=ids, attention_mask=torch.ones_like(ids))


def two_turns(model, ids, mask, turn, end):
    """Generates, hides what came after each row's end, and goes on; the last logits of each row."""
    settings = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    first = model.generate(
        ids, attention_mask=mask, max_new_tokens=20, eos_token_id=end, **settings
    )
    new = first.sequences[:, ids.shape[1] :]
    is_end = new == end
    after = is_end.cumsum(1) - is_end.long() > 0
    mask = torch.cat([mask, (~after).long(), torch.ones_like(turn)], dim=1)
    ids = torch.cat([first.sequences, turn], dim=1)
    cache = first.past_key_values
    second = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=2,
        output_logits=True,
        **settings,
    )
    return after, ids, mask, second.logits[0]


@every_variant
def test_a_second_turn_after_rows_that_ended_at_different_tokens(name, variant, said):
    subject = zoo_subject(name, variant)
    model, ids = subject.model(torch.float32), subject.ids(3, 7)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    text = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    after, ids, mask, found = two_turns(model, ids, mask, subject.ids(3, 4, seed=1), text[0, 9])
    assert after[0].any()  # the first row ended early
    with torch.no_grad():
        for row in range(3):
            alone = model(ids[row][mask[row].bool()][None]).logits[0, -1]
            torch.testing.assert_close(found[row], alone, rtol=1e-4, atol=1e-4)
    assert "hides columns of the past" not in said.text


@architectures
def test_a_mask_of_the_past_that_comes_too_late_is_said(architecture, said, tmp_path):
    model, ids = build(architecture), ids_of(2, 8)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        save_state(cache, tmp_path / "state.safetensors")
        mask = torch.ones(2, 10, dtype=torch.long)
        model(ids[:, :2], attention_mask=mask, past_key_values=cache)
        assert "hides columns of the past" not in said.text
        cache = load_state(tmp_path / "state.safetensors", model.config)
        mask[1, 5:8] = 0
        for _ in range(2):
            model(ids[:, :1], attention_mask=mask[:, :9], past_key_values=cache)
            mask = torch.cat([mask[:, :9], mask[:, -1:]], dim=1)
            cache = load_state(tmp_path / "state.safetensors", model.config)
    assert said.text.count("hides columns of the past") == 1


@every_variant
def test_weights_that_are_missing_begin_as_the_paper_says(name, variant):
    """What a checkpoint lacks is initialised, whatever memory held before; what it has stays."""
    architecture = zoo.MODELS[name]
    config = architecture.config(**TINY | variants_of(name)[variant])
    torch.manual_seed(0)
    fresh = architecture.causal_lm(config)
    torch.manual_seed(0)
    loaded = architecture.causal_lm.from_pretrained(None, config=config, state_dict={})
    for key, value in fresh.state_dict().items():
        found = loaded.state_dict()[key]
        assert found.isfinite().all(), key
        is_constant = value.numel() > 1 and value.std(correction=0) == 0
        if is_constant:  # the order of random numbers is transformers'
            assert torch.equal(found, value), key
        elif value.numel() > 200:
            torch.testing.assert_close(found.std(), value.std(), rtol=0.4, atol=0)


def test_an_initialiser_leaves_what_is_loaded():
    weight = torch.nn.Parameter(torch.ones(3))
    scale_(weight, 2.0)
    assert torch.equal(weight, torch.full((3,), 2.0))
    weight._is_hf_initialized = True
    scale_(weight, 2.0)
    assert torch.equal(weight, torch.full((3,), 2.0))


def test_an_untied_projection_begins_like_the_embedding_it_stands_for():
    """At 0.02, transformers' own, the loss of its overfitting test falls by 63% and not by 98%."""
    model = build(zoo.MODELS["block_recurrent"], tie_word_embeddings=False)
    assert 0.95 < model.lm_head.weight.std() < 1.05


ROPE = {
    "unknown": ({"rope_type": "linear", "factor": 2.0, "scale": 3}, "have no field 'scale'"),
    "near": ({"rope_type": "linear", "facter": 2.0}, "no field 'facter'; did you mean factor?"),
    "missing": ({"rope_type": "linear"}, "of type linear need factor"),
    "negative": ({"rope_type": "linear", "factor": -2.0}, "a number at least 1, got -2.0"),
    "text": ({"rope_type": "dynamic", "factor": "2"}, "a number at least 1, got '2'"),
    "infinite": ({"rope_type": "yarn", "factor": float("inf")}, "a number at least 1"),
    "theta": ({"rope_theta": -1.0}, r"\['rope_theta'\] is a number above 0, got -1.0"),
    "share": ({"partial_rotary_factor": -0.5}, "is a number above 0, got -0.5"),
    "betas": ({"rope_type": "yarn", "factor": 2.0, "beta_fast": 1, "beta_slow": 2}, "beta_fast is"),
    "freqs": (
        {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0},
        "high_freq_factor is above low_freq_factor",
    ),
    "lists": (
        {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 4},
        r"\['short_factor'\] is a list of 4 numbers",
    ),
    "llama3": ({"rope_type": "llama3", "factor": 2.0}, "low_freq_factor and high_freq_factor"),
    "default": ({"rope_type": "default", "factor": 2.0}, "of type default have no field 'factor'"),
    "type": ({"rope_type": "yarm", "factor": 2.0}, "'rope_type'.* is one of default, linear"),
}


@pytest.mark.parametrize("name", ["sliding_window", "infini", "lightning"])
@pytest.mark.parametrize("case", ROPE)
def test_rope_parameters_are_checked(name, case, said):
    parameters, message = ROPE[case]
    fields = {"softmax_layers": [1], "lrpe_layers": []} if name == "lightning" else {}
    config = zoo.MODELS[name].config
    with pytest.raises(Exception, match=message):
        config(**TINY, **fields, rope_parameters=dict(parameters), max_position_embeddings=64)
    assert said.text == ""


@pytest.mark.parametrize("name", ["sliding_window", "infini"])
def test_scaled_rope_without_a_limit_of_length(name):
    """transformers asks a config for its limit, which ours need not have."""
    config = zoo.MODELS[name].config
    with pytest.raises(Exception, match="got None; set max_position_embeddings"):
        config(**TINY, rope_parameters={"rope_type": "yarn", "factor": 2.0})
    lists = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    trained = {"original_max_position_embeddings": 8}
    with pytest.raises(Exception, match="need factor, or max_position_embeddings"):
        config(**TINY, rope_parameters={"rope_type": "longrope"} | lists | trained)
    for more in ({"rope_type": "yarn"}, {"rope_type": "longrope"} | lists):
        made = config(**TINY, rope_parameters=trained | {"factor": 2.0} | more)
        assert not hasattr(made, "max_position_embeddings")
        model = zoo.MODELS[name].model(made)
        model(torch.arange(20)[None] % made.vocab_size)
