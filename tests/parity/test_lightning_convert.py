"""Lightning attention against OpenNLPLab's TransNormerLLM and transformers' MiniMax."""

import json

import pytest
import torch
from goldens import golden_folder, golden_tensors
from safetensors.torch import load_file, save_file
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM, MiniMaxConfig, MiniMaxForCausalLM
from ways import WAYS, gradients, run, worst

from zoo import LightningConfig, LightningForCausalLM
from zoo.hub.convert import FORMATS, convert, convert_back
from zoo.hub.convert.format import Weights
from zoo.layers.decay_slopes import alibi_slopes, log_decay

FORMAT_OF = {"transnormerllm-hf": "transnormerllm", "minimax-hf-dense": "hf-minimax"}
SMALL = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """(name of a golden, dtype) -> its model, converted."""

    def load(name, dtype):
        folder = tmp_path_factory.mktemp("converted") / name
        convert(FORMAT_OF[name], golden_folder(name), folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    return load


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FORMAT_OF)
def test_logits_and_states(load, name, way):
    golden = golden_tensors(name)
    ids = golden["input_ids"]
    logits, cache = run(load(name, torch.float64), ids, way)
    assert worst(logits, golden["logits_f64"]) < 1e-9
    layers = range(len(cache.layers))
    if name == "transnormerllm-hf":
        official = [golden[f"final_kv_layer{layer}_f64"] for layer in layers]
    else:
        official = golden["final_linear_cache_f64"]
    for layer in layers:
        assert worst(cache.layers[layer].tensors["memory_BHKV"], official[layer]) < 1e-9
    logits, _ = run(load(name, torch.float32), ids, way)
    assert worst(logits, golden["logits_f64"], relative=True) < 1e-5


@pytest.mark.parametrize("name", FORMAT_OF)
def test_padding_as_official(load, name):
    golden = golden_tensors(name)
    mask = golden["attention_mask"].bool()
    logits = load(name, torch.float64)(golden["input_ids"], attention_mask=mask.long()).logits
    key, bound = {
        "transnormerllm-hf": ("rightpad_logits", 1e-4),  # stored from a run in float32
        "minimax-hf-dense": ("leftpad_logits_f64", 1e-9),
    }[name]
    assert worst(logits[mask], golden[key][mask]) < bound


@pytest.mark.parametrize("name", FORMAT_OF)
def test_gradients_are_the_official_ones(load, name):
    official = golden_tensors(name, "grads")
    if name == "minimax-hf-dense":  # they have the names of the class, not those of the file
        for layer in range(3):
            here = f"model.layers.{layer}"
            gate_up = official.pop(f"{here}.mlp.experts.gate_up_proj")[0]
            expert = f"{here}.block_sparse_moe.experts.0"
            official[f"{expert}.w1.weight"], official[f"{expert}.w3.weight"] = gate_up.chunk(2)
            official[f"{expert}.w2.weight"] = official.pop(f"{here}.mlp.experts.down_proj")[0]
            router = official.pop(f"{here}.mlp.gate.weight")
            assert not router.any()
            official[f"{here}.block_sparse_moe.gate.weight"] = router
    # In float64 what differs is that the official ones are stored in float32.
    for dtype, bound in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
        model, weights = load(name, dtype), Weights(official)
        ours = gradients(model, golden_tensors(name)["input_ids"])
        pairs = dict(FORMATS[FORMAT_OF[name]].read_weights(weights, model.config))
        assert weights.untaken == set() and pairs.keys() == ours.keys()
        for key, gradient in pairs.items():
            assert worst(ours[key], gradient, relative=True) < bound, key


def definition(model, ids):
    """TransNormerLLM's logits from its equations, with the whole matrix of scores."""
    config, weights = model.config, dict(model.named_parameters())

    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T

    time, heads = ids.shape[1], config.num_attention_heads
    n = torch.arange(time, dtype=torch.float64)
    distance = n[:, None] - n
    x = weights["model.embed_tokens.weight"][ids] * config.hidden_size**0.5
    for layer in range(config.num_hidden_layers):
        here, a = f"model.layers.{layer}", norm(x)
        q, k, v, u = (linear(f"{here}.mixer.{p}_proj", a) for p in ("q", "k", "v", "gate"))
        q, k = silu(q).unflatten(-1, (heads, -1)), silu(k).unflatten(-1, (heads, -1))
        if layer in config.lrpe_layers:
            angle = n[:, None, None] * weights[f"{here}.mixer.lrpe_theta"]
            q = torch.cat([q * angle.cos(), q * angle.sin()], -1)
            k = torch.cat([k * angle.cos(), k * angle.sin()], -1)
        depth = 1 - layer / (config.num_hidden_layers - 1) + 1e-5
        slopes = depth * 2 ** (-8 * (torch.arange(heads, dtype=torch.float64) + 1) / heads)
        decay = torch.where(distance >= 0, (-slopes[:, None, None] * distance).exp(), 0.0)
        scores = torch.einsum("bnhk,bmhk->bhnm", q, k) * decay
        o = torch.einsum("bhnm,bmhv->bnhv", scores, v.unflatten(-1, (heads, -1))).flatten(2)
        x = x + linear(f"{here}.mixer.out_proj", u * norm(o))
        c = norm(x)
        gated = linear(f"{here}.mlp.gate_proj", c) * linear(f"{here}.mlp.up_proj", c)
        x = x + linear(f"{here}.mlp.down_proj", gated)
    return linear("lm_head", norm(x))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lrpe_layers", [[], [0], [0, 2]])
def test_the_definition(lrpe_layers, way):
    """For clones without the goldens, and for other layers with LRPE."""
    torch.manual_seed(0)
    fields = SMALL | {"num_attention_heads": 4, "lrpe_layers": lrpe_layers}
    model = LightningForCausalLM(LightningConfig(**fields, initializer_range=0.3)).double().eval()
    ids = torch.randint(0, 61, (2, 75))
    logits, _ = run(model, ids, way)
    assert worst(logits, definition(model, ids), relative=True) < 1e-10


LIGHTNING, SOFTMAX = "linear_attention", "full_attention"
# layer_types and the fields of transformers' config that go with them.
MINIMAX = {
    "lightning, 3 heads": ([LIGHTNING] * 3, {"num_attention_heads": 3, "num_key_value_heads": 3}),
    "lightning, 4 heads": ([LIGHTNING] * 3, {"tie_word_embeddings": True}),
    "softmax last": ([LIGHTNING, LIGHTNING, SOFTMAX], {"rope_parameters": {"rope_theta": 1e4}}),
    "softmax first": ([SOFTMAX, LIGHTNING, SOFTMAX], {"tie_word_embeddings": True}),
    "softmax alone": ([SOFTMAX] * 3, {"num_key_value_heads": 1}),
    "window": ([LIGHTNING, SOFTMAX, LIGHTNING], {"sliding_window": 9}),
    "yarn": (
        [LIGHTNING, SOFTMAX, LIGHTNING],
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 24,
            }
        },
    ),
}


@pytest.fixture(params=MINIMAX)
def minimax(request, tmp_path):
    """transformers' model with random weights, whose folder is tmp_path / "theirs"."""
    torch.manual_seed(0)
    layer_types, fields = MINIMAX[request.param]
    settings = SMALL | {
        "num_attention_heads": 4,
        "head_dim": 8,
        "num_local_experts": 1,
        "num_experts_per_tok": 1,
        "num_key_value_heads": 2,
        "layer_types": layer_types,
        "linear_attn_alpha_factor": 1.5,
        "linear_attn_beta_factor": 0.7,
        "full_attn_alpha_factor": 0.8,
        "full_attn_beta_factor": 1.3,
        "mlp_alpha_factor": 1.2,
        "mlp_beta_factor": 0.9,
        "block_size": 16,
        "initializer_range": 0.3,
        "pad_token_id": None,
        "experts_implementation": "eager",  # the other ways have no float64
        "attn_implementation": "eager",
    }
    model = MiniMaxForCausalLM(MiniMaxConfig(**settings | fields)).double().eval()
    model.save_pretrained(tmp_path / "theirs")
    return model


def test_equals_transformers_minimax(minimax, tmp_path):
    convert("hf-minimax", tmp_path / "theirs", tmp_path / "ours")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float64)
    ids = torch.randint(0, 61, (2, 70))
    with torch.no_grad():
        expected = minimax(ids).logits
    for way in WAYS:
        # Their norms, softmax and decays are computed in float32.
        assert worst(run(ours, ids, way)[0], expected, relative=True) < 3e-6


def test_minimax_and_back(minimax, tmp_path):
    """The way back is bit for bit, but for the router and the constants, which are computed."""
    theirs, ours, back = (tmp_path / name for name in ("theirs", "ours", "back"))
    convert("hf-minimax", theirs, ours)
    convert_back("hf-minimax", ours, back)
    before, after = (load_file(folder / "model.safetensors") for folder in (theirs, back))
    assert before.keys() == after.keys()
    for name, value in before.items():
        if not name.endswith(("_decay", "slope_rate", ".gate.weight")):
            assert torch.equal(value, after[name]), name
    model = MiniMaxForCausalLM.from_pretrained(
        back, dtype=torch.float64, experts_implementation="eager", attn_implementation="eager"
    )
    ids = torch.randint(0, 61, (2, 70))
    with torch.no_grad():
        assert worst(model(ids).logits, minimax(ids).logits, relative=True) < 3e-6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "norm_weight is False"),  # TransNormerLLM itself
        (
            LightningConfig.variants["hybrid"]
            | {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "whole heads",
        ),
        (LightningConfig.variants["minimax"] | {"gate": "linear"}, "gate is 'linear'"),
        (
            LightningConfig.variants["hybrid-alibi"],
            "position_embedding_type of layer 1 is 'alibi': transformers' model has 'rope'",
        ),
        (LightningConfig.variants["hybrid-list"], "of layer 0 is 't5'"),
        (LightningConfig.variants["hybrid"] | {"attention_scale": 1.0}, "attention_scale is 1.0"),
        (LightningConfig.variants["minimax"] | {"feature_act": "relu"}, "would become"),
    ],
)
def test_what_minimax_cannot_express(fields, message, tmp_path):
    settings = SMALL | {"num_attention_heads": 4, "head_dim": 8} | fields
    LightningForCausalLM(LightningConfig(**settings)).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=message):
        convert_back("hf-minimax", tmp_path / "ours", tmp_path / "back")


def test_slopes_are_the_authors():
    golden = golden_tensors("ops-lightning")
    for heads in (6, 8, 12):
        slopes = torch.tensor(alibi_slopes(heads), dtype=torch.float64)
        assert worst(slopes, golden[f"slopes_H{heads}"]) < 1e-12


def test_decay_schedules():
    """Each by its own words, head by head and layer by layer."""

    def slopes(**fields):
        config = LightningConfig(**SMALL | {"num_attention_heads": 4, "hidden_size": 32}, **fields)
        return torch.stack([-log_decay(config, layer) for layer in range(3)]).tolist()

    for layer in range(3):
        for h in range(4):
            alibi = 2.0 ** (-2 * (h + 1))
            paper = 2 * h * (1 - layer / 3)
            minimax = alibi * (1 - layer / (2 + 1e-5) + 1e-5)
            transnormer = alibi * (1 - layer / 2 + 1e-5)
            assert slopes()[layer][h] == pytest.approx(transnormer, rel=1e-12)
            assert slopes(decay_schedule="minimax")[layer][h] == pytest.approx(minimax, rel=1e-12)
            assert slopes(decay_schedule="paper")[layer][h] == pytest.approx(paper, rel=1e-12)
    own = [[0.0, 0.1, 0.2, 0.3]] * 2 + [[1.0, 2.0, 3.0, 4.0]]
    assert slopes(slopes=own) == own


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"slopes": [[0.1] * 3] * 2}, "slopes are 3 numbers"),
        ({"slopes": [[0.1, -0.1, 0.1]] * 3}, "slopes are 3 numbers"),
        ({"lrpe_layers": [3]}, "lrpe_layers are indices from 0 to 2"),
        ({"hidden_act": "silly"}, "hidden_act is one of"),
        ({"feature_act": None}, "feature_act"),
        ({"num_attention_heads": 5}, "multiple of num_attention_heads"),
        ({"softmax_layers": [3]}, "softmax_layers are indices from 0 to 2"),
        ({"softmax_layers": [1], "lrpe_layers": [1]}, "layers \\[1\\] are in lrpe_layers"),
        ({"sliding_window": 9, "softmax_alpha": 1.0}, "softmax_alpha, sliding_window: for layers"),
        ({"softmax_layers": [1], "num_key_value_heads": 2}, "multiple of num_key_value_heads"),
        ({"softmax_layers": [1], "sliding_window": 0}, "at least 1, got 0"),
        (
            {"softmax_layers": [1], "rope_parameters": {"partial_rotary_factor": 0.1}},
            "partial_rotary_factor makes an even number",
        ),
    ],
)
def test_configs_that_do_not_fit(fields, message):
    with pytest.raises(Exception, match=message):
        LightningConfig(**SMALL | fields)


@pytest.mark.parametrize(
    ("format", "fields", "message"),
    [
        ("hf-minimax", {"num_local_experts": 4}, "mixtures of experts"),
        ("hf-minimax", {"layer_types": ["linear_attention", "mamba"]}, "layer_types are"),
        (
            "hf-minimax",
            {"num_hidden_layers": 2, "head_dim": 8, "rotary_dim": 4},
            "rotary_dim that turns 4 channels of 8",
        ),
        (
            "hf-minimax",
            {"num_hidden_layers": 2, "rope_parameters": {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor that turns 64 channels of 128",
        ),
        ("transnormerllm", {"norm_type": "layernorm"}, "norm_type"),
        ("transnormerllm", {"linear_act_fun": "sine"}, "linear_act_fun"),
        ("transnormerllm", {"linear_use_lrpe_list": [1]}, "one entry for each"),
        ("transnormerllm", {"model_type": "minimax"}, "looks like hf-minimax"),
    ],
)
def test_refused(format, fields, message, tmp_path):
    values = {
        "hf-minimax": {"model_type": "minimax", "num_local_experts": 1},
        "transnormerllm": {"decoder_embed_dim": 24, "glu_dim": 40},
    }[format]
    if "model_type" in fields and format == "transnormerllm":
        values = {}
    (tmp_path / "config.json").write_text(json.dumps(values | fields))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        convert(format, tmp_path, tmp_path / "ours")


def test_every_number_arrives(tmp_path):
    """What a converted folder holds is what lay in the file, only elsewhere."""
    folder = golden_folder("transnormerllm-hf")
    convert("transnormerllm", folder, tmp_path / "ours")
    theirs = load_file(folder / "model.safetensors")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    sums = [sum(x.double().sum().item() for x in file.values()) for file in (theirs, ours)]
    counts = [sum(x.numel() for x in file.values()) for file in (theirs, ours)]
    assert counts[0] == counts[1] and sums[0] == pytest.approx(sums[1], rel=1e-12)
