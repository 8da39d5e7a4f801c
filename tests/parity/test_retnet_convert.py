"""RetNet against the authors' code and fla's: their weights, converted, give their numbers.

Bounds are of the maximum over all elements. In float64 what is left is the order of summation.
"""

import json

import pytest
import torch
from goldens import COPIES, SHARED, golden_folder, golden_tensors
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from zoo.hub.convert import FORMATS, convert
from zoo.hub.convert.format import Weights
from zoo.kernels.linear_recurrence import linear_recurrence_reference

FORMAT_OF = {"retnet-torchscale": "torchscale-retnet", "retnet-fla": "fla-retnet"}
WAYS = (
    "whole",
    "chunks",
    "token by token",
    "left padding",
    "interior padding",
    "right padding",
    "packed by position_ids",
    "packed by cu_seq_lens_q",
    "prefill, then steps",
)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """name -> folder of the converted golden."""
    folders = {}
    for name, format in FORMAT_OF.items():
        folders[name] = tmp_path_factory.mktemp("converted") / name
        convert(format, golden_folder(name), folders[name])
    return folders


@pytest.fixture(scope="module")
def load(converted):
    models = {}

    def load(name, dtype):
        if (name, dtype) not in models:
            model = AutoModelForCausalLM.from_pretrained(converted[name], dtype=dtype)
            models[name, dtype] = model.eval()
        return models[name, dtype]

    return load


@torch.no_grad()
def run(model, ids, way):
    """Logits [B, T, vocab] and the final memory [L, N, H, K, V] of the last N rows."""
    batch, time = ids.shape
    cache, logits = None, []

    def step(chunk, **inputs):
        nonlocal cache
        output = model(chunk, past_key_values=cache, use_cache=True, **inputs)
        cache = output.past_key_values
        return output.logits

    if way == "whole":
        logits = step(ids)
    elif way == "chunks":
        logits = torch.cat([step(c) for c in ids.split([1, 7, 37, 3, 52], dim=1)], dim=1)
    elif way == "token by token":
        logits = torch.cat([step(c) for c in ids.split(1, dim=1)], dim=1)
    elif way == "prefill, then steps":
        # As generate does it: a mask that grows with the cache, positions that skip the padding.
        padded, mask = pad(ids, torch.arange(6, 6 + time), 6 + time)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        first = padded.shape[1] - 20
        logits = [step(padded[:, :first], attention_mask=mask[:, :first])[:, 6:]]
        for t in range(first, padded.shape[1]):
            inputs = {"attention_mask": mask[:, : t + 1], "position_ids": positions[:, t : t + 1]}
            logits.append(step(padded[:, t : t + 1], **inputs))
        logits = torch.cat(logits, dim=1)
    elif way.endswith("padding"):
        extra = 13
        generator = torch.Generator().manual_seed(0)
        places = {
            "left": torch.arange(extra, extra + time),
            "right": torch.arange(time),
            "interior": torch.randperm(time + extra, generator=generator)[:time].sort().values,
        }[way.split()[0]]
        padded, mask = pad(ids, places, time + extra)
        logits = step(padded, attention_mask=mask)[:, places]
    else:
        inputs = {
            "packed by position_ids": {"position_ids": torch.arange(time).repeat(1, batch)},
            "packed by cu_seq_lens_q": {"cu_seq_lens_q": torch.arange(batch + 1) * time},
        }[way]
        logits = step(ids.reshape(1, -1), **inputs).reshape(batch, time, -1)
    return logits, torch.stack([layer.tensors["memory_BHKV"] for layer in cache.layers])


def pad(ids, places, width):
    """ids at the given columns of a wider batch, and the mask that says so."""
    padded = torch.full((len(ids), width), 5)
    mask = torch.zeros_like(padded)
    padded[:, places], mask[:, places] = ids, 1
    return padded, mask


def state_of(name, golden, memory_LNHKV):
    """Our memory in the official code's terms, and the official one of the same rows."""
    rows = slice(-memory_LNHKV.shape[1], None)
    if name == "retnet-fla":
        # fla scales the queries by K^-0.5, we the keys.
        key_dim = memory_LNHKV.shape[-2]
        return memory_LNHKV * key_dim**0.5, golden["final_recurrent_state_f64"][:, rows]
    # torchscale keeps it divided by sqrt(s), with V before K.
    s_LH = golden["final_scale_f64"]
    ours = memory_LNHKV.transpose(-1, -2) / s_LH[:, None, :, None, None].sqrt()
    return ours, golden["final_prev_key_value_f64"][:, rows]


def worst(ours, official, relative=False):
    """Largest difference; relative: to the largest official value."""
    difference = (ours.double() - official).abs().max()
    return (difference / official.abs().max() if relative else difference).item()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FORMAT_OF)
def test_every_way_gives_the_official_recurrence(load, name, way):
    golden = golden_tensors(name)
    official = golden["recurrent_logits_f64" if name == "retnet-torchscale" else "logits_f64"]
    logits, memory = run(load(name, torch.float64), golden["input_ids"], way)
    assert worst(logits, official) < 1e-10
    assert worst(*state_of(name, golden, memory)) < 1e-10
    logits, memory = run(load(name, torch.float32), golden["input_ids"], way)
    # fla's own float32 is off by 1.4e-4: its scores are not normalised before the head norm.
    if name == "retnet-fla":
        assert worst(logits, official) < 5e-4
        assert worst(*state_of(name, golden, memory), relative=True) < 1e-4
    else:
        assert worst(logits, official, relative=True) < 1e-5
        assert worst(*state_of(name, golden, memory), relative=True) < 1e-5


@pytest.mark.parametrize("mode", ["logits_f64", "chunkwise_logits_f64"])
def test_official_parallel_and_chunkwise_modes(load, mode):
    # They differ from the official recurrence, and among themselves, by as much.
    golden = golden_tensors("retnet-torchscale")
    logits, _ = run(load("retnet-torchscale", torch.float64), golden["input_ids"], "whole")
    assert worst(logits, golden[mode]) < 1.4e-4


def gradients(model, ids):
    """By name. transformers' loss is in float32 at best; this one stays in the model's dtype."""
    model.zero_grad()
    logits = model(ids, use_cache=False).logits
    cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("name", "bound"), [("retnet-torchscale", 1e-3), ("retnet-fla", 1e-5)])
def test_gradients_are_the_official_ones(load, name, bound):
    model = load(name, torch.float64)
    ours = gradients(model, golden_tensors(name)["input_ids"])
    official = Weights(golden_tensors(name, "grads"))
    pairs = dict(FORMATS[FORMAT_OF[name]].read_weights(official, model.config))
    assert official.untaken == set()
    differences = {n: worst(ours[n], g, relative=True) for n, g in pairs.items() if g is not None}
    assert len(differences) >= 20
    assert all(x < bound for x in differences.values()), differences


@pytest.mark.parametrize("name", FORMAT_OF)
def test_gradients_are_those_of_the_definition(load, name, monkeypatch):
    # Long enough for the state to pass through several chunks.
    model, ids = load(name, torch.float64), golden_tensors(name)["input_ids"].reshape(1, -1)
    ours = gradients(model, ids)
    calls = []

    def reference(*tensors, **options):
        calls.append(1)
        return linear_recurrence_reference(*tensors, **options)

    monkeypatch.setattr("zoo.layers.split_recurrence.linear_recurrence", reference)
    expected = gradients(model, ids)
    assert len(calls) == model.config.num_hidden_layers
    assert all(worst(ours[n], g, relative=True) < 1e-9 for n, g in expected.items())


@pytest.mark.parametrize("name", FORMAT_OF)
def test_copies_are_the_goldens(name):
    if not (SHARED / name).is_dir():
        pytest.skip("no whole goldens here")
    for path in (COPIES / name).iterdir():
        if path.suffix == ".json":
            assert path.read_text() == (SHARED / name / path.name).read_text()
        else:
            whole = load_file(SHARED / name / path.name)
            assert all(torch.equal(x, whole[key]) for key, x in load_file(path).items())


def rms_norm(x, weight=1.0, eps=1e-6):
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def randoms(shapes, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, shape in shapes.items():
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        # Matrices keep the size of what passes through them; norms and biases are around one.
        tensors[name] = x * scale * shape[-1] ** -0.5 if len(shape) > 1 else 1 + 0.3 * x
    return tensors


def assert_converts(format, config, weights, expected, ids, folder):
    """A checkpoint of these weights converts to a model with the expected logits."""
    source = folder / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    torch.save(weights, source / "pytorch_model.bin")
    convert(format, source, folder / "ours")
    model = AutoModelForCausalLM.from_pretrained(folder / "ours")
    assert model.dtype == torch.float64
    for way in ("whole", "token by token", "left padding"):
        logits, _ = run(model, ids, way)
        assert worst(logits, expected) < 1e-10, way


# Three heads, K = 8, V = 12: an odd number of heads, and widths that are told apart.
TORCHSCALE = {
    "vocab_size": 19,
    "decoder_embed_dim": 24,
    "decoder_value_embed_dim": 36,
    "decoder_retention_heads": 3,
    "decoder_ffn_embed_dim": 20,
    "decoder_layers": 2,
    "layernorm_eps": 1e-5,
}


def torchscale_shapes(config, post_norm):
    d, v, f = (config[f"decoder_{k}"] for k in ("embed_dim", "value_embed_dim", "ffn_embed_dim"))
    gated = config.get("use_glu", True)
    shapes = {"embed_tokens.weight": (19, d)}
    if not config.get("share_decoder_input_output_embed"):
        shapes["output_projection.weight"] = (19, d)
    if config.get("layernorm_embedding"):
        shapes["layernorm_embedding.weight"] = (d,)
    if not post_norm:
        shapes["layer_norm.weight"] = (d,)
    for i in range(config["decoder_layers"]):
        layer = {
            "retention.q_proj.weight": (d, d),
            "retention.k_proj.weight": (d, d),
            "retention.v_proj.weight": (v, d),
            "retention.g_proj.weight": (v, d),
            "retention.out_proj.weight": (d, v),
            "retention_layer_norm.weight": (d,),
            "final_layer_norm.weight": (d,),
            "ffn.fc1.weight": (f, d),
            "ffn.fc2.weight": (d, f),
        }
        if gated:
            layer["ffn.gate.weight"] = (f, d)
        else:
            layer |= {"ffn.fc1.bias": (f,), "ffn.fc2.bias": (d,)}
            if config.get("subln", True) and not config.get("deepnorm"):
                layer |= {"ffn.ffn_layernorm.weight": (f,), "ffn.ffn_layernorm.bias": (f,)}
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def torchscale_step_by_step(config, w, ids, post_norm):
    """The official recurrent mode in float64, a token at a time, with its normalised state."""
    num_layers, heads, eps = config["decoder_layers"], 3, config["layernorm_eps"]
    dim = config["decoder_embed_dim"]
    alpha = (2 * num_layers) ** 0.25 if config.get("deepnorm") else 1.0
    if config.get("use_lm_decay"):
        start, end = torch.tensor([1 / 32, 1 / 512], dtype=torch.float64).log()
        gamma_H = 1 - torch.linspace(start, end, heads, dtype=torch.float64).exp()
    else:
        gamma_H = 1 - 2 ** (-5 - torch.arange(heads, dtype=torch.float64))
    gamma = gamma_H[:, None, None]
    key_dim = dim // heads
    theta = 10000 ** -torch.linspace(0, 1, key_dim // 2, dtype=torch.float64)
    act = {"gelu": torch.nn.functional.gelu, "swish": torch.nn.functional.silu}
    act = act[config.get("activation_fn", "gelu")]

    def norm(x, name):
        return rms_norm(x, w[f"{name}.weight"], eps)

    def turn(x_HK, t):
        z = torch.view_as_complex(x_HK.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(z * torch.polar(torch.ones_like(theta), t * theta)).flatten(-2)

    def retention(x, n, t, state):
        p = f"layers.{n}.retention"
        q, k, v = (
            (w[f"{p}.{name}_proj.weight"] @ x).unflatten(0, (heads, -1)) for name in ("q", "k", "v")
        )
        q, k = turn(q, t), turn(k * key_dim**-0.5, t)
        s_before, memory_HVK = state.get(n, (torch.zeros(3, 1, 1, dtype=torch.float64), 0.0))
        s = s_before * gamma + 1
        memory_HVK = memory_HVK * s_before.sqrt() * gamma / s.sqrt()
        memory_HVK = memory_HVK + v[:, :, None] * k[:, None, :] / s.sqrt()
        state[n] = s, memory_HVK
        o = rms_norm((memory_HVK @ q[:, :, None])[..., 0], eps=eps).flatten()
        gate = torch.nn.functional.silu(w[f"{p}.g_proj.weight"] @ x)
        return w[f"{p}.out_proj.weight"] @ (gate * o)

    def mlp(x, n):
        p = f"layers.{n}.ffn"
        h = w[f"{p}.fc1.weight"] @ x
        if f"{p}.gate.weight" in w:
            return w[f"{p}.fc2.weight"] @ (act(h) * (w[f"{p}.gate.weight"] @ x))
        h = act(h + w[f"{p}.fc1.bias"])
        if f"{p}.ffn_layernorm.weight" in w:
            h = (h - h.mean()) / (h.var(correction=0) + eps).sqrt()
            h = h * w[f"{p}.ffn_layernorm.weight"] + w[f"{p}.ffn_layernorm.bias"]
        return w[f"{p}.fc2.weight"] @ h + w[f"{p}.fc2.bias"]

    rows = []
    for row in ids:
        state, logits = {}, []
        for t, token in enumerate(row.tolist()):
            x = w["embed_tokens.weight"][token]
            x = x if config.get("no_scale_embedding", True) else x * dim**0.5
            x = norm(x, "layernorm_embedding") if config.get("layernorm_embedding") else x
            for n in range(num_layers):
                for part, name in ((retention, "retention"), (mlp, "final")):
                    y = x if post_norm else norm(x, f"layers.{n}.{name}_layer_norm")
                    y = retention(y, n, t, state) if part is retention else mlp(y, n)
                    x = alpha * x + y
                    x = norm(x, f"layers.{n}.{name}_layer_norm") if post_norm else x
            x = x if post_norm else norm(x, "layer_norm")
            logits.append(w.get("output_projection.weight", w["embed_tokens.weight"]) @ x)
        rows.append(torch.stack(logits))
    return torch.stack(rows)


PORT = {"model_type": "retnet", "tie_word_embeddings": False}
# name -> (config fields, whether blocks are post-norm, whether names are those of the port)
TORCHSCALE_VARIANTS = {
    "plain": ({"activation_fn": "swish"}, False, False),
    "deepnorm": (
        {
            "deepnorm": True,
            "decoder_normalize_before": False,
            "layernorm_embedding": True,
            "no_scale_embedding": False,
        },
        True,
        False,
    ),
    # torchscale's slip: deepnorm alone leaves the blocks pre-norm; the port turns them.
    "deepnorm alone": ({"deepnorm": True, "encoder_normalize_before": False}, False, False),
    "deepnorm alone, port": ({"deepnorm": True, **PORT}, True, True),
    "port, log decay": ({"use_lm_decay": True, **PORT}, False, True),
    "port, plain mlp": ({"use_glu": False, **PORT}, False, True),
    "port, plain mlp, deepnorm": ({"use_glu": False, "deepnorm": True, **PORT}, True, True),
    "tied": ({"share_decoder_input_output_embed": True}, False, False),
}


@pytest.mark.parametrize("variant", TORCHSCALE_VARIANTS)
def test_torchscale_variants_step_by_step(variant, tmp_path):
    fields, post_norm, is_port = TORCHSCALE_VARIANTS[variant]
    config = TORCHSCALE | fields
    weights = randoms(torchscale_shapes(config, post_norm))
    ids = torch.randint(19, (2, 11), generator=torch.Generator().manual_seed(2))
    expected = torchscale_step_by_step(config, weights, ids, post_norm)
    if is_port:
        output = weights.pop("output_projection.weight")
        weights = {f"model.{name}": x for name, x in weights.items()} | {"lm_head.weight": output}
    assert_converts("torchscale-retnet", config, weights, expected, ids, tmp_path)


def fla_step_by_step(config, w, ids):
    """fla's layer in float64, a token at a time."""
    heads, groups, eps = config["num_heads"], config["num_kv_heads"], config["norm_eps"]
    silu = torch.nn.functional.silu
    gamma = 1 - 2 ** (-5 - torch.arange(heads, dtype=torch.float64))[:, None, None]
    key_dim = round(config["hidden_size"] * config["expand_k"]) // heads
    theta = 10000 ** -(torch.arange(0, key_dim, 2, dtype=torch.float64) / key_dim)

    def turn(x, t):
        a, b = x.chunk(2, dim=-1)
        cos, sin = (t * theta).cos(), (t * theta).sin()
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

    def linear(name, x):
        return w[f"{name}.weight"] @ x

    rows = []
    for row in ids:
        state, logits = {}, []
        for t, token in enumerate(row.tolist()):
            x = w["model.embeddings.weight"][token]
            for n in range(config["num_hidden_layers"]):
                p = f"model.layers.{n}"
                a = rms_norm(x, w[f"{p}.attn_norm.weight"], eps)
                q = turn(linear(f"{p}.attn.q_proj", a).unflatten(0, (heads, -1)), t)
                k = turn(linear(f"{p}.attn.k_proj", a).unflatten(0, (groups, -1)), t)
                v = linear(f"{p}.attn.v_proj", a).unflatten(0, (groups, -1))
                # Query heads of one group are neighbours.
                k, v = (z[torch.arange(heads) // (heads // groups)] for z in (k, v))
                memory_HKV = state.get(n, 0.0) * gamma + k[:, :, None] * v[:, None, :]
                state[n] = memory_HKV
                o = key_dim**-0.5 * (q[:, None, :] @ memory_HKV)[:, 0]
                norm = w.get(f"{p}.attn.g_norm_swish_gate.weight", w.get(f"{p}.attn.g_norm.weight"))
                o = rms_norm(o, 1.0 if norm is None else norm, eps).flatten()
                x = x + linear(f"{p}.attn.o_proj", o * silu(linear(f"{p}.attn.g_proj", a)))
                m = rms_norm(x, w[f"{p}.mlp_norm.weight"], eps)
                h = silu(linear(f"{p}.mlp.gate_proj", m)) * linear(f"{p}.mlp.up_proj", m)
                x = x + linear(f"{p}.mlp.down_proj", h)
            x = rms_norm(x, w["model.norm.weight"], eps)
            logits.append(w.get("lm_head.weight", w["model.embeddings.weight"]) @ x)
        rows.append(torch.stack(logits))
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("heads", "groups", "head_norm", "tied"),
    [
        (6, 6, "g_norm_swish_gate", False),
        (6, 3, "g_norm", True),
        (3, 1, "g_norm_swish_gate", True),
        (3, 3, None, False),
    ],
)
def test_fla_variants_step_by_step(heads, groups, head_norm, tied, tmp_path):
    config = {
        "model_type": "retnet",
        "vocab_size": 19,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_heads": heads,
        "num_kv_heads": groups,
        "expand_k": 0.5,
        "expand_v": 1.5,
        "hidden_ratio": 20,
        "intermediate_size": None,
        "norm_eps": 1e-5,
        "fuse_norm": head_norm == "g_norm_swish_gate",
        "elementwise_affine": head_norm is not None,
        "tie_word_embeddings": tied,
    }
    shapes = {"model.embeddings.weight": (19, 24), "model.norm.weight": (24,)}
    if not tied:
        shapes["lm_head.weight"] = (19, 24)
    width = 512  # fla's rule: 24 * 20 * 2 / 3 = 320, up to a multiple of 256
    for n in range(2):
        layer = {
            "attn.q_proj": (12, 24),
            "attn.k_proj": (12 // heads * groups, 24),
            "attn.v_proj": (36 // heads * groups, 24),
            "attn.g_proj": (36, 24),
            "attn.o_proj": (24, 36),
            "attn_norm": (24,),
            "mlp_norm": (24,),
            "mlp.gate_proj": (width, 24),
            "mlp.up_proj": (width, 24),
            "mlp.down_proj": (24, width),
        }
        if head_norm:
            layer[f"attn.{head_norm}"] = (36 // heads,)
        shapes |= {f"model.layers.{n}.{name}.weight": shape for name, shape in layer.items()}
    weights = randoms(shapes)
    ids = torch.randint(19, (2, 11), generator=torch.Generator().manual_seed(2))
    expected = fla_step_by_step(config, weights, ids)
    assert_converts("fla-retnet", config, weights, expected, ids, tmp_path)
