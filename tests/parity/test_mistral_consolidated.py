"""Mistral's own files against its first code, written again here, and against transformers."""

import json

import pytest
import torch
from goldens import golden_folder, golden_tensors
from safetensors.torch import load_file, save_file
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM

from zoo.hub.convert import convert, convert_back

FORMAT = "mistral-consolidated"
GOLDEN = "swa-mistral-hf"
# Groups of query heads, and heads that together are not as wide as the model.
SIZES = {
    "dim": 40,
    "n_layers": 2,
    "head_dim": 12,
    "hidden_dim": 56,
    "n_heads": 6,
    "n_kv_heads": 3,
    "norm_eps": 1e-5,
    "sliding_window": 9,
    "vocab_size": 71,
    "rope_theta": 500.0,
}
PARTS = ("attention.wq", "attention.wk", "attention.wv", "attention.wo")
PARTS += ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "attention_norm", "ffn_norm")


def shapes(params):
    """Shape of each tensor of the authors' model, by its name."""
    dim, hidden, vocab = params["dim"], params["hidden_dim"], params["vocab_size"]
    queries, keys = (params[n] * params["head_dim"] for n in ("n_heads", "n_kv_heads"))
    of_layer = [(queries, dim), (keys, dim), (keys, dim), (dim, queries)]
    of_layer += [(hidden, dim), (dim, hidden), (hidden, dim), (dim,), (dim,)]
    found = {"tok_embeddings": (vocab, dim), "norm": (dim,), "output": (vocab, dim)}
    for layer in range(params["n_layers"]):
        found |= {f"layers.{layer}.{part}": shape for part, shape in zip(PARTS, of_layer)}
    return {f"{name}.weight": shape for name, shape in found.items()}


def random_model(**fields):
    """params.json and float32 weights, norms away from one and logits of order one."""
    params = {n: x for n, x in (SIZES | fields).items() if x is not None}
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes(params).items():
        x = torch.randn(shape, generator=generator)
        weights[name] = 1 + 0.3 * x if len(shape) == 1 else 0.25 * x
    return params, weights


def save(folder, params, weights):
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    save_file(weights, folder / "consolidated.safetensors")
    return folder


def official_logits(params, weights, ids, theta):
    """The authors' model of one_file_ref.py in float64, with W keys as in its decoding."""
    w = {name.removesuffix(".weight"): x.double() for name, x in weights.items()}
    heads, kv_heads, size = (params[n] for n in ("n_heads", "n_kv_heads", "head_dim"))
    time = torch.arange(ids.shape[1])
    distance = time[:, None] - time
    hidden = (distance < 0) | (distance >= params.get("sliding_window", len(time)))
    angles = torch.outer(time.double(), theta ** -(torch.arange(0, size, 2).double() / size))
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]

    def norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + params["norm_eps"]).rsqrt() * w[name]

    def turned(x):
        pairs = torch.view_as_complex(x.unflatten(-1, (size // 2, 2)).contiguous())
        return torch.view_as_real(pairs * turns).flatten(-2)

    x = w["tok_embeddings"][ids]
    for layer in range(params["n_layers"]):
        here = f"layers.{layer}"
        y = norm(x, f"{here}.attention_norm")
        q, k, v = (y @ w[f"{here}.attention.w{n}"].T for n in "qkv")
        q = turned(q.unflatten(-1, (heads, size)))
        k = turned(k.unflatten(-1, (kv_heads, size)))
        v = v.unflatten(-1, (kv_heads, size))
        k, v = (z.repeat_interleave(heads // kv_heads, dim=2) for z in (k, v))
        scores = torch.einsum("bthk,bshk->bhts", q, k) * size**-0.5
        chance = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        o = torch.einsum("bhts,bshv->bthv", chance, v).flatten(2)
        x = x + o @ w[f"{here}.attention.wo"].T
        y = norm(x, f"{here}.ffn_norm")
        gate, up = (y @ w[f"{here}.feed_forward.{n}"].T for n in ("w1", "w3"))
        x = x + (silu(gate) * up) @ w[f"{here}.feed_forward.w2"].T
    return norm(x, "norm") @ w["output"].T


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, x in found.items():
        assert x.dtype == expected[name].dtype and torch.equal(x, expected[name]), name


@torch.no_grad()
def assert_logits(folder, ids, expected):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    # Rounding alone: both are in float64, angles too.
    assert (model(ids).logits - expected).abs().max() < 1e-9


CASES = {
    "grouped heads, wider than the model": ({}, 500.0),
    "one group": ({"n_kv_heads": 1}, 500.0),
    "no groups": ({"n_kv_heads": 6, "head_dim": 6}, 500.0),
    "a window of one": ({"sliding_window": 1}, 500.0),
    "7B v0.1: no theta": ({"rope_theta": None}, 1e4),
    "v0.2 and later: no window": ({"sliding_window": None, "rope_theta": 1e6}, 1e6),
    "neither": ({"sliding_window": None, "rope_theta": None}, 1e6),
}


@pytest.mark.parametrize("case", CASES)
def test_random_models_there_and_back(case, tmp_path):
    fields, theta = CASES[case]
    params, weights = random_model(**fields)
    source = save(tmp_path / "theirs", params, weights)
    report = convert(FORMAT, source, tmp_path / "ours")
    assert not report.is_rounded
    assert [f"{theta:,.0f}" in note for note in report.notes] == [True] * (
        "rope_theta" not in params
    )
    ids = torch.randint(71, (2, 50), generator=torch.Generator().manual_seed(1))
    assert_logits(tmp_path / "ours", ids, official_logits(params, weights, ids, theta))
    convert_back(FORMAT, tmp_path / "ours", tmp_path / "back")
    assert sorted(p.name for p in (tmp_path / "back").iterdir()) == [
        "consolidated.safetensors",
        "generation_config.json",
        "longzoo.json",
        "params.json",
    ]
    assert_equal(load_file(tmp_path / "back" / "consolidated.safetensors"), weights)
    back = json.loads((tmp_path / "back" / "params.json").read_text())
    # Said even where it was left out: their codes do not agree on what that means.
    assert back == params | {"rope_theta": theta}


def test_the_golden(tmp_path):
    """transformers' Mistral, its rows put in the authors' order one by one."""
    folder = golden_folder(GOLDEN)
    config = json.loads((folder / "config.json").read_text())
    theirs = load_file(folder / "model.safetensors")
    names = {
        "dim": "hidden_size",
        "n_layers": "num_hidden_layers",
        "hidden_dim": "intermediate_size",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "norm_eps": "rms_norm_eps",
        "sliding_window": "sliding_window",
        "vocab_size": "vocab_size",
    }
    params = {name: config[theirs] for name, theirs in names.items()}
    params["head_dim"] = params["dim"] // params["n_heads"]
    theta = params["rope_theta"] = config["rope_parameters"]["rope_theta"]

    def interleaved(x):
        size = params["head_dim"]
        heads = x.split(size)
        return torch.stack(
            [h[j + i * size // 2] for h in heads for j in range(size // 2) for i in (0, 1)]
        )

    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    parts += ("mlp.gate_proj", "mlp.down_proj", "mlp.up_proj")
    parts += ("input_layernorm", "post_attention_layernorm")
    weights = {
        "tok_embeddings.weight": theirs.pop("model.embed_tokens.weight"),
        "norm.weight": theirs.pop("model.norm.weight"),
        "output.weight": theirs.pop("lm_head.weight"),
    }
    for layer in range(params["n_layers"]):
        for name, part in zip(PARTS, parts):
            x = theirs.pop(f"model.layers.{layer}.{part}.weight")
            turned = name in ("attention.wq", "attention.wk")
            weights[f"layers.{layer}.{name}.weight"] = interleaved(x) if turned else x
    assert not theirs
    source = save(tmp_path / "theirs", params, weights)
    golden = golden_tensors(GOLDEN)
    ids, expected = golden["input_ids"], golden["logits_f64"]
    # What this file holds the converter against is itself right.
    assert (official_logits(params, weights, ids, theta) - expected).abs().max() < 1e-9
    convert(FORMAT, source, tmp_path / "ours")
    assert_logits(tmp_path / "ours", ids, expected)
    # The same model as by way of transformers' files.
    convert("hf-mistral", folder, tmp_path / "other")
    ours, other = (load_file(tmp_path / n / "model.safetensors") for n in ("ours", "other"))
    assert_equal(ours, other)


def as_pickle(folder):
    torch.save(load_file(folder / "consolidated.safetensors"), folder / "consolidated.00.pth")
    (folder / "consolidated.safetensors").unlink()


def beside_transformers_files(folder):
    """As on the Hub."""
    (folder / "config.json").write_text('{"model_type": "mistral"}')
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "a.safetensors"}}')
    save_file({"x": torch.zeros(1)}, folder / "a.safetensors")


def in_several_files(folder):
    tensors = list(load_file(folder / "consolidated.safetensors").items())
    (folder / "consolidated.safetensors").unlink()
    weight_map = {}
    for i in range(2):
        name = f"consolidated-0000{i + 1}-of-00002.safetensors"
        save_file(dict(tensors[i::2]), folder / name)
        weight_map |= dict.fromkeys(dict(tensors[i::2]), name)
    index = json.dumps({"weight_map": weight_map})
    (folder / "consolidated.safetensors.index.json").write_text(index)


def under_another_name(folder):
    (folder / "consolidated.safetensors").rename(folder / "mistral.safetensors")


LAYOUTS = (as_pickle, beside_transformers_files, in_several_files, under_another_name)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_layouts_of_files(layout, tmp_path):
    source = save(tmp_path / "theirs", *random_model())
    convert(FORMAT, source, tmp_path / "expected")
    layout(source)
    convert(FORMAT, source, tmp_path / "ours")
    found, expected = (load_file(tmp_path / n / "model.safetensors") for n in ("ours", "expected"))
    assert_equal(found, expected)


def test_a_file_with_its_params_beside_it(tmp_path):
    source = save(tmp_path / "theirs", *random_model())
    as_pickle(source)
    report = convert(FORMAT, source / "consolidated.00.pth", tmp_path / "ours")
    assert report.num_tensors == 21


def test_bfloat16_stays(tmp_path):
    params, weights = random_model()
    weights = {name: x.bfloat16() for name, x in weights.items()}
    convert(FORMAT, save(tmp_path / "theirs", params, weights), tmp_path / "ours")
    convert_back(FORMAT, tmp_path / "ours", tmp_path / "back")
    assert_equal(load_file(tmp_path / "back" / "consolidated.safetensors"), weights)


FIELDS_OF_LATER_RELEASES = {
    "a list of one window": ({"sliding_window": [9, 9]}, 9),
    "a window as a text": ({"sliding_window": "9"}, 9),
    "a window hidden from vLLM": ({"sliding_window": None, "_sliding_window": 9}, 9),
    "null": ({"sliding_window": None, "moe": None, "vision_encoder": None}, None),
    "said although usual": ({"model_type": "transformer", "causal": True, "activation": "silu"}, 9),
}


@pytest.mark.parametrize("case", FIELDS_OF_LATER_RELEASES)
def test_fields_of_later_releases(case, tmp_path):
    fields, window = FIELDS_OF_LATER_RELEASES[case]
    params, weights = random_model()
    source = save(tmp_path / "theirs", params | fields, weights)
    assert convert(FORMAT, source, tmp_path / "ours").notes == []
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["sliding_window"] == window


def test_report_says_what_was_left_out(tmp_path):
    params, weights = random_model(max_batch_size=4, max_seq_len=128)
    source = save(tmp_path / "theirs", params, weights)
    (source / "tekken.json").write_text("{}")
    notes = convert(FORMAT, source, tmp_path / "ours").notes
    assert any("left out max_batch_size = 4: it is how to run" in note for note in notes)
    assert any("tokenizer's files are copied, but here" in note for note in notes)
    assert (tmp_path / "ours" / "tekken.json").read_text() == "{}"
    path = tmp_path / "ours" / "config.json"
    fields = json.loads(path.read_text())
    assert fields["max_position_embeddings"] == 128
    path.write_text(json.dumps(fields | {"pad_token_id": 3, "eos_token_id": 4}))
    (note,) = convert_back(FORMAT, tmp_path / "ours", tmp_path / "back").notes[:1]
    assert note.startswith("left out pad_token_id = 3, eos_token_id = 4: params.json has no field")
    assert json.loads((tmp_path / "back" / "params.json").read_text())["max_seq_len"] == 128


def test_tied_embeddings_there_and_back(tmp_path):
    params, weights = random_model(tied_embeddings=True)
    del weights["output.weight"]
    source = save(tmp_path / "theirs", params, weights)
    convert(FORMAT, source, tmp_path / "ours")
    ids = torch.arange(30)[None]
    whole = weights | {"output.weight": weights["tok_embeddings.weight"]}
    assert_logits(tmp_path / "ours", ids, official_logits(params, whole, ids, 500.0))
    (note,) = convert_back(FORMAT, tmp_path / "ours", tmp_path / "back").notes
    assert "mistral-inference does not" in note
    assert_equal(load_file(tmp_path / "back" / "consolidated.safetensors"), weights)
    assert json.loads((tmp_path / "back" / "params.json").read_text()) == params


def edit(**fields):
    def damage(folder):
        path = folder / "params.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return damage


def without(name):
    def damage(folder):
        fields = json.loads((folder / "params.json").read_text())
        del fields[name]
        (folder / "params.json").write_text(json.dumps(fields))

    return damage


def cut_for_two_devices(folder):
    as_pickle(folder)
    torch.save({}, folder / "consolidated.01.pth")


def of_another_format(folder):
    (folder / "params.json").unlink()
    (folder / "config.json").write_text('{"model_type": "mistral"}')


def weights_of_transformers(folder):
    save_file({"model.norm.weight": torch.ones(40)}, folder / "consolidated.safetensors")


REFUSED = [
    (edit(moe={"num_experts": 8}), "params.json has moe = .*: mixtures of experts"),
    (edit(vision_encoder={"hidden_size": 8}), "images have no counterpart"),
    (edit(quantization={"qformat_weight": "fp8_e4m3"}), "quantised weights"),
    (edit(yarn={"factor": 4}), "hf-mistral"),
    (edit(model_type="mamba"), "model_type = 'mamba', which is another architecture"),
    (edit(causal=False), "never looks ahead"),
    (edit(activation="gelu"), "activation = 'gelu'"),
    (edit(sliding_window=[9, None]), "the same in every layer"),
    (edit(llama_4_scaling={"beta": 0.1}), "params.json has fields .* not know: llama_4_scaling"),
    (edit(output_hidden_states=True), "not know: output_hidden_states"),
    (edit(n_kv_heads=2), "does not fit|by the config"),
    (edit(n_layers=3), "the weights have no layers.2.attention_norm.weight"),
    (edit(n_layers=1), "nothing uses layers.1"),
    (edit(dim="40"), "hidden_size"),
    (without("norm_eps"), "params.json has no norm_eps, which this format needs"),
    (cut_for_two_devices, "consolidated.00.pth and consolidated.01.pth hold parts of the same"),
    (lambda f: (f / "params.json").unlink(), "params.json is missing"),
    (lambda f: (f / "params.json").write_text("{"), "params.json cannot be read as JSON"),
    (of_another_format, f"{FORMAT} expects a params.json with .*; this looks like hf-mistral"),
    (without("n_heads"), "params.json: .* expects a params.json with dim, n_layers, n_heads"),
    (weights_of_transformers, "the weights have no tok_embeddings.weight"),
    (lambda f: (f / "consolidated.safetensors").unlink(), "expected weights"),
]


@pytest.mark.parametrize(("damage", "message"), REFUSED)
def test_refused_in_one_line(damage, message, tmp_path):
    source = save(tmp_path / "theirs", *random_model())
    damage(source)
    with pytest.raises(ValueError, match=message) as error:
        convert(FORMAT, source, tmp_path / "ours")
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["theirs"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_sink_tokens": 2}, "num_sink_tokens is 2: the authors' model has none"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "RoPE is of type linear"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "turns whole heads"),
        ({"position_embedding_type": ["rope", None]}, "'rope', None.: the authors' model has none"),
        ({"attention_scale": 1.0}, "attention_scale is 1.0"),
    ],
)
def test_what_it_cannot_express_does_not_go_back(fields, message, tmp_path):
    convert(FORMAT, save(tmp_path / "theirs", *random_model()), tmp_path / "ours")
    path = tmp_path / "ours" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ValueError, match=message):
        convert_back(FORMAT, tmp_path / "ours", tmp_path / "back")


def test_only_a_model_of_its_own_is_overwritten(tmp_path):
    convert(FORMAT, save(tmp_path / "theirs", *random_model()), tmp_path / "ours")
    for overwrite in (False, True):
        convert_back(FORMAT, tmp_path / "ours", tmp_path / "back", overwrite)
    (tmp_path / "back" / "params.json").unlink()
    with pytest.raises(ValueError, match=r"holds no model \(no params.json\)"):
        convert_back(FORMAT, tmp_path / "ours", tmp_path / "back", overwrite=True)
