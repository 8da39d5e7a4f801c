"""Types of positions where softmax attention is a part of the model: hybrids, segments."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from zoo import MODELS, LightningConfig, LightningForCausalLM

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
# A lightning model whose block is Mistral's.
PLAIN = {
    "norm_weight": True,
    "hidden_act": "silu",
    "scale_embedding": False,
    "lrpe_layers": [],
    "rms_norm_eps": 1e-5,
}
T5 = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
TYPES = {
    "rope": {},
    "none": {"position_embedding_type": None, "attention_scale": 0.7},
    "alibi": {"position_embedding_type": "alibi", "alibi_bias_max": 4},
    "t5": {"position_embedding_type": "t5", **T5, "sliding_window": 9},
    "fire": {"position_embedding_type": "fire", "fire_init_length": 8},
    "xpos": {"position_embedding_type": "xpos", "xpos_scale_base": 16},
    "self_extend": {"rope_extension": {"type": "self_extend", "window": 6, "group_size": 3}},
    "extended list": {
        "position_embedding_type": ["rope", None],
        "rope_extension": {"type": "dual_chunk", "chunk_size": 9, "local_window": 3},
    },
    "list": {"position_embedding_type": ["alibi", "rope"], "rope_parameters": {"rope_theta": 99.0}},
}


@torch.no_grad()
def run(model, ids, sizes=None, **inputs):
    cache, logits = None, []
    for piece in ids.split(sizes or ids.shape[1], dim=1):
        output = model(piece, past_key_values=cache, use_cache=True, **inputs)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("kind", TYPES)
def test_softmax_layers_of_a_hybrid_are_those_of_a_transformer(kind):
    """With nothing but such layers, the numbers of `sliding_window`, by every way to run it."""
    torch.manual_seed(0)
    fields = SIZES | {"sliding_window": None} | TYPES[kind]
    architecture = MODELS["sliding_window"]
    transformer = architecture.causal_lm(architecture.config(**fields)).double().eval()
    hybrid = LightningForCausalLM(LightningConfig(**fields, **PLAIN, softmax_layers=[0, 1]))
    hybrid = hybrid.double().eval()
    hybrid.load_state_dict(transformer.state_dict())
    ids = torch.randint(61, (2, 30), generator=torch.Generator().manual_seed(1))
    expected = run(transformer, ids)
    for sizes in (None, 1, [11, 1, 18]):
        torch.testing.assert_close(run(hybrid, ids, sizes), expected, rtol=1e-9, atol=1e-9)


def test_a_list_says_it_layer_by_layer():
    """Its entries are of the layers of the model, those without softmax attention too."""
    config = LightningConfig(
        **SIZES | {"num_hidden_layers": 4},
        softmax_layers=[1, 3],
        position_embedding_type=[None, "alibi", None, None],
    )
    mixers = [layer.mixer for layer in LightningForCausalLM(config).model.layers]
    assert [getattr(x, "position_type", "lightning") for x in mixers] == [
        *("lightning", "alibi", "lightning", None)
    ]
    assert config.rope_parameters is None


def test_a_hybrid_without_positions_keeps_that(tmp_path):
    """None is not left out of config.json, where it would be read as RoPE."""
    config = LightningConfig(**SIZES, softmax_layers=[1], position_embedding_type=None)
    config.save_pretrained(tmp_path)
    loaded = LightningConfig.from_pretrained(tmp_path)
    assert loaded.position_embedding_type is None and loaded.rope_parameters is None
    assert loaded.to_dict() == config.to_dict()


def test_a_model_without_softmax_layers_is_silent_on_them(tmp_path):
    LightningConfig(num_hidden_layers=2).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    of_attention = ("position", "alibi", "relative", "fire", "xpos", "attention_scale", "rope")
    assert [name for name in written if name.startswith(of_attention)] == []


REROPE = {"type": "rerope", "window": 8}
ALIBI = {"position_embedding_type": "alibi"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (ALIBI, "position_embedding_type: for layers with softmax attention, got no softmax"),
        ({"position_embedding_type": None}, "position_embedding_type: for layers with softmax"),
        ({"alibi_bias_max": 16}, "alibi_bias_max: for layers with softmax attention"),
        ({"attention_scale": 1.0}, "attention_scale: for layers with softmax attention"),
        ({"rope_extension": REROPE}, "rope_extension: for layers with softmax attention"),
        (
            {"softmax_layers": [1], "sliding_window": 8, "rope_extension": REROPE},
            "rope_extension is about keys beyond its window 8",
        ),
        (
            ALIBI | {"softmax_layers": [1], "rope_extension": REROPE},
            "rope_extension is of layers of position_embedding_type 'rope'",
        ),
        (
            {"softmax_layers": [1], "position_embedding_type": ["rope", "rope"]},
            "is None for layers without softmax attention, got 'rope' for layer 0",
        ),
        (
            {"softmax_layers": [1], "position_embedding_type": [None]},
            "one entry for each of 2 layers, got 1",
        ),
        ({"softmax_layers": [1], "alibi_bias_max": 16}, "about layers of .* 'alibi', got 16"),
        (
            ALIBI | {"softmax_layers": [1], "rope_parameters": {"rope_theta": 1e4}},
            "rope_parameters are about layers",
        ),
        ({"softmax_layers": [1], "position_embedding_type": "rpe"}, "is one of 'rope', 'alibi'"),
    ],
)
def test_hybrids_that_make_no_sense(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        LightningConfig(num_hidden_layers=2, **fields)


def test_flash_attention_has_no_bias():
    config = LightningConfig(**SIZES, softmax_layers=[1], **ALIBI)
    with pytest.raises(ValueError, match="'flash_attention_2' adds nothing to scores"):
        LightningForCausalLM(config).set_attn_implementation("flash_attention_2")
