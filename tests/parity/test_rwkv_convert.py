"""RWKV 4 to 7 against the authors' trainers, transformers and flash-linear-attention.

Their weights, converted, give their numbers. Bounds are of the maximum over all elements; in
float64 what is left is the order of summation.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from goldens import COPIES, SHARED, golden_folder, golden_tensors
from rwkv_files import VERSIONS, authors_shapes, fla_shapes, random_weights
from safetensors.torch import load_file, save_file
from torch.nn.functional import group_norm, layer_norm, normalize, silu
from transformers import AutoModelForCausalLM, AutoTokenizer, RwkvForCausalLM
from ways import WAYS, gradients, run, worst

from zoo import MODELS
from zoo.hub.convert import FORMATS, convert, convert_back
from zoo.hub.convert.format import Weights
from zoo.hub.folder import read_config, settings

FORMAT_OF = {
    "rwkv4-hf": "hf-rwkv",
    "rwkv5-blinkdl": "rwkv-pth",
    "rwkv6-blinkdl": "rwkv-pth",
    "rwkv7-blinkdl": "rwkv-pth",
}
BYTE_TOKENIZER = COPIES.parents[2] / "tokenizers" / "byte"


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """(name of a golden, dtype) -> its model, converted."""
    folders, models = {}, {}

    def load(name, dtype):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("converted") / name
            convert(FORMAT_OF[name], golden_folder(name) / "model.safetensors", folders[name])
        if (name, dtype) not in models:
            model = AutoModelForCausalLM.from_pretrained(folders[name], dtype=dtype)
            models[name, dtype] = model.eval()
        return models[name, dtype]

    return load


def states(name, golden, cache):
    """Pairs of our state and the official one, of all layers."""
    stacked = {
        key: torch.stack([layer.tensors[key] for layer in cache.layers], dim=1)
        for key in cache.layers[0].tensors
    }
    if name == "rwkv4-hf":
        mlp, mixer, num, den, top = golden["final_state_f64"].permute(0, 1, 3, 2)
        # (num, den, max) stand for an average and a sum, whatever the max.
        yield stacked["num_ND"] / stacked["den_ND"], num / den
        yield stacked["max_ND"] + stacked["den_ND"].log(), top + den.log()
    else:
        mixer, mlp = golden["state_shift_f64"].unbind(2)
        memory = golden["state_kv_f64"]
        # The authors keep RWKV-7's with V before K.
        yield stacked["memory_NHKV"], memory.mT if name == "rwkv7-blinkdl" else memory
    yield stacked["mixer_shift_ND"], mixer
    yield stacked["mlp_shift_ND"], mlp


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FORMAT_OF)
def test_logits(load, name, way):
    golden = golden_tensors(name)
    logits, _ = run(load(name, torch.float64), golden["input_ids"], way)
    assert worst(logits, golden["logits_f64"]) < 1e-9
    logits, _ = run(load(name, torch.float32), golden["input_ids"], way)
    assert worst(logits, golden["logits_f64"], relative=True) < 1e-5


@pytest.mark.parametrize("way", WAYS[:3])
@pytest.mark.parametrize("name", FORMAT_OF)
def test_final_states(load, name, way, monkeypatch):
    golden = golden_tensors(name)
    if name == "rwkv7-blinkdl":
        # The official state is that of the authors' inference package, with this constant.
        monkeypatch.setattr("zoo.models.rwkv7.math", SimpleNamespace(exp=lambda x: 0.606531))
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        _, cache = run(load(name, dtype), golden["input_ids"], way)
        for ours, official in states(name, golden, cache):
            assert ours.shape == official.shape
            assert worst(ours, official, relative=True) < bound


@pytest.mark.parametrize("name", FORMAT_OF)
def test_official_step_by_step_logits(load, name, monkeypatch):
    golden = golden_tensors(name)
    if "step_logits_f64" not in golden:
        pytest.skip("left out of the copies in this clone")
    if name == "rwkv7-blinkdl":
        monkeypatch.setattr("zoo.models.rwkv7.math", SimpleNamespace(exp=lambda x: 0.606531))
    logits, _ = run(load(name, torch.float64), golden["input_ids"], "token by token")
    assert worst(logits, golden["step_logits_f64"]) < 1e-9


@pytest.mark.parametrize("name", FORMAT_OF)
def test_gradients_are_the_official_ones(load, name):
    official = Weights(golden_tensors(name, "grads"))
    is_whole = "blocks.0" in str(official.tensors.keys())
    if not is_whole:  # the copies hold what is small, of one layer; the format is told by others
        official.tensors |= {"emb.weight": None, "blocks.0.att.key.weight": None}
    for dtype, bound in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
        model = load(name, dtype)
        ours = gradients(model, golden_tensors(name)["input_ids"])
        pairs = dict(FORMATS[FORMAT_OF[name]].read_weights(official, model.config))
        assert official.untaken == set()
        assert not is_whole or pairs.keys() == ours.keys()
        # The official ones are stored in float32.
        differences = {
            n: worst(ours[n], g, relative=True) for n, g in pairs.items() if g is not None
        }
        assert len(differences) >= 5
        for n, difference in differences.items():
            assert difference < bound, n


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


def test_hf_rwkv_is_transformers(load):
    official = RwkvForCausalLM.from_pretrained(golden_folder("rwkv4-hf")).eval()
    model = load("rwkv4-hf", torch.float32)
    for row in golden_tensors("rwkv4-hf")["input_ids"].split(1):
        with torch.no_grad():
            assert worst(model(row).logits, official(row).logits, relative=True) < 2e-6
            cache, state = None, None
            for token in row[:, :30].split(1, dim=1):
                ours = model(token, past_key_values=cache, use_cache=True)
                theirs = official(token, state=state, use_cache=True)
                cache, state = ours.past_key_values, theirs.state
                assert worst(ours.logits, theirs.logits, relative=True) < 2e-6


@pytest.mark.parametrize("tied", [False, True])
def test_hf_rwkv_there_and_back(tied, tmp_path):
    weights = load_file(golden_folder("rwkv4-hf") / "model.safetensors")
    config = json.loads((golden_folder("rwkv4-hf") / "config.json").read_text())
    vocab = 260  # of the tokenizer
    pad = (0, 0, 0, vocab - config["vocab_size"])
    for name in ("rwkv.embeddings.weight", "head.weight"):
        weights[name] = torch.nn.functional.pad(weights[name], pad, value=0.01)
    if tied:
        del weights["head.weight"]
    first = tmp_path / "first"
    first.mkdir()
    save_file(weights, first / "model.safetensors")
    config |= {"vocab_size": vocab, "tie_word_embeddings": tied, "rescale_every": 6}
    (first / "config.json").write_text(json.dumps(config))
    (first / "generation_config.json").write_text('{"eos_token_id": 258}')
    AutoTokenizer.from_pretrained(BYTE_TOKENIZER).save_pretrained(first)

    report = convert("hf-rwkv", first, tmp_path / "ours")
    assert any("2^(i // 6)" in note for note in report.notes)
    report = convert_back("hf-rwkv", tmp_path / "ours", tmp_path / "back")
    assert any("rescale_every is 0" in note for note in report.notes)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert_same(back, weights)
    read_back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert read_back["rescale_every"] == 0
    same = config.keys() & read_back.keys() - {"rescale_every"}
    assert {n: config[n] for n in same} == {n: read_back[n] for n in same} and len(same) >= 10

    ids = torch.arange(3, 60)[None]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    official, loading = RwkvForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(loading.values()), loading
    assert official.generation_config.eos_token_id == 258
    with torch.no_grad():
        logits, theirs = model.eval()(ids).logits, official.eval()(ids).logits
    assert worst(logits, theirs, relative=True) < 2e-6
    assert AutoTokenizer.from_pretrained(tmp_path / "back")("Hi")["input_ids"] == [72, 105]


def assert_same(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, x in tensors.items():
        assert x.dtype == expected[name].dtype and torch.equal(x, expected[name]), name


def pth(folder, version, change=lambda tensors: tensors, **sizes):
    """A file of random weights."""
    weights = random_weights(authors_shapes(version, **sizes))
    torch.save(change(dict(weights)), folder / "a.pth")
    return folder / "a.pth", weights


@pytest.mark.parametrize("version", VERSIONS)
def test_every_number_arrives(version, tmp_path):
    """Sorted sums: nothing is changed, lost or doubled, but for the spreading over channels."""
    path, weights = pth(tmp_path, version)
    report = convert("rwkv-pth", path, tmp_path / "ours")
    assert report.is_rounded == (version == "5.0")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    if version in ("5.0", "5.1"):
        for i in range(3):
            names = {"time_decay": "time_decay"}
            names["bonus"] = "time_first" if version == "5.0" else "time_faaaa"
            for name, theirs in names.items():
                x_HK = ours.pop(f"model.layers.{i}.mixer.{name}")
                assert x_HK.shape == (3, 16) and (x_HK == x_HK[:, :1]).all()
                expected = weights.pop(f"blocks.{i}.att.{theirs}")
                if theirs == "time_first":
                    expected = expected.double().exp().float()
                assert torch.equal(x_HK[:, 0], expected)
    if version == "7":
        weights = {n: x for n, x in weights.items() if not n.startswith("blocks.0.att.v")} | {
            n: x for n, x in weights.items() if n == "blocks.0.att.value.weight"
        }
    numbers = [torch.cat([x.flatten() for x in side.values()]) for side in (weights, ours)]
    assert torch.equal(*(x.sort().values for x in numbers))


@pytest.mark.parametrize("prefix", ["module.", "_forward_module."])
def test_names_of_trainers(prefix, tmp_path):
    path, _ = pth(tmp_path, "6")
    convert("rwkv-pth", path, tmp_path / "expected")
    path, _ = pth(tmp_path, "6", lambda w: {prefix + name: x for name, x in w.items()})
    convert("rwkv-pth", path, tmp_path / "ours")
    assert_same(*(load_file(tmp_path / n / "model.safetensors") for n in ("ours", "expected")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("version", VERSIONS)
def test_dtypes_stay(version, dtype, tmp_path):
    weights = random_weights(authors_shapes(version))
    save_file({n: x.to(dtype) for n, x in weights.items()}, tmp_path / "any.safetensors")
    # A folder of one file; a config.json beside it is not asked.
    (tmp_path / "config.json").write_text('{"model_type": "rwkv7"}')
    report = convert("rwkv-pth", tmp_path, tmp_path / "ours")
    # The exponentials of 5.0's bonuses have more digits.
    assert report.dtype == (torch.float32 if version == "5.0" else dtype)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert version == "4" or model.config.head_norm_eps == 64e-5


def test_one_layer_of_version_7(tmp_path):
    path, _ = pth(tmp_path, "7", layers=1)
    convert("rwkv-pth", path, tmp_path / "ours")
    assert read_config(tmp_path / "ours")[1].value_lora_rank == 8


def step_by_step(version, config, w, ids):
    """fla's RWKV-6 or 7 in float64, a token at a time, from its layers' code."""
    heads, eps = config["num_heads"], config["norm_eps"]
    width = config["hidden_size"]

    def norm(x, name):
        return layer_norm(x, (width,), w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def head_norm(x, name, eps):
        weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
        return group_norm(x[None], heads, weight, bias, eps)[0]

    def per_head(*tensors):
        return [x.view(heads, -1) for x in tensors]

    def attention_6(x, delta, p, state, v_first):
        lora = torch.tanh(w[f"{p}.x_proj.0.linear.weight"] @ (x + delta * w[f"{p}.x_proj.0.mu"]))
        second = w[f"{p}.x_proj.2.weight"].view(width, 5, -1)
        mus = torch.einsum("nr,hnr->nh", lora.view(5, -1), second) + w[f"{p}.x_bias"]
        r_x, w_x, k_x, v_x, g_x = (x + delta * mu for mu in mus)
        r, k, v, g = (
            w[f"{p}.{name}_proj.linear.weight"] @ y
            for name, y in (("r", r_x), ("k", k_x), ("v", v_x), ("g", g_x))
        )
        name = f"{p}.w_proj.linear.lora"
        decay = w[f"{name}.2.weight"] @ torch.tanh(w[f"{name}.0.weight"] @ w_x)
        decay = torch.exp(-torch.exp(decay + w[f"{name}.2.bias"]))
        r, k, v, decay = per_head(r, k, v, decay)
        kv = k[:, :, None] * v[:, None, :]
        memory = state.get(p, torch.zeros_like(kv))
        o = (r[:, :, None] * (memory + w[f"{p}.bonus"][:, :, None] * kv)).sum(1).flatten()
        state[p] = memory * decay[:, :, None] + kv
        return w[f"{p}.o_proj.weight"] @ (head_norm(o, f"{p}.g_norm", eps) * silu(g)), None

    def attention_7(x, delta, p, state, v_first):
        def lora(name, y, middle):
            first, last = f"{p}.{name}_lora.lora.0.weight", f"{p}.{name}_lora.lora.2"
            return w[f"{last}.weight"] @ middle(w[first] @ y) + w.get(f"{last}.bias", 0.0)

        mixed = {}
        for i, name in enumerate("rwkvag"):
            mu = w[f"{p}.x_x"][i] if f"{p}.x_x" in w else w[f"{p}.x_{name}"].flatten()
            mixed[name] = x + delta * mu
        r, k, v = (w[f"{p}.{name}_proj.weight"] @ mixed[name] for name in "rkv")
        decay = torch.exp(-0.6065306597126334 * lora("w", mixed["w"], torch.tanh).sigmoid())
        if v_first is None:
            v_first = v
        else:
            v = torch.lerp(v, v_first, lora("v", mixed["v"], lambda y: y).sigmoid())
        a = lora("a", mixed["a"], lambda y: y).sigmoid()
        g = lora("g", mixed["g"], torch.sigmoid)
        kk = (k * w[f"{p}.k_k"]).view(heads, -1)
        if config["fuse_norm"]:
            kk = kk / (kk.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        else:
            kk = normalize(kk, dim=-1)
        k = k * (1 + (a - 1) * w[f"{p}.k_a"])
        r, k, v, a, decay = per_head(r, k, v, a, decay)
        memory = state.get(p, torch.zeros(heads, k.shape[1], v.shape[1], dtype=k.dtype))
        removed = (kk[:, :, None] * memory).sum(1, keepdim=True)
        memory = memory * decay[:, :, None] - (kk * a)[:, :, None] * removed
        state[p] = memory = memory + k[:, :, None] * v[:, None, :]
        o = (r[:, :, None] * memory).sum(1).flatten()
        o = head_norm(o, f"{p}.g_norm", k.shape[1] * eps).view(heads, -1)
        o = o + (r * k * w[f"{p}.r_k"]).sum(-1, keepdim=True) * v
        return w[f"{p}.o_proj.weight"] @ (o.flatten() * g), v_first

    def feed_forward(x, delta, p):
        if version == "7":
            h = w[f"{p}.key.weight"] @ (x + delta * w[f"{p}.x_k"])
            return w[f"{p}.value.weight"] @ h.relu().square()
        k, r = (
            w[f"{p}.{name}.linear.weight"] @ (x + delta * w[f"{p}.{name}.mu"])
            for name in ("key", "receptance")
        )
        return r.sigmoid() * (w[f"{p}.value.weight"] @ k.relu().square())

    attention = attention_6 if version == "6" else attention_7
    rows = []
    for row in ids:
        state, logits = {}, []
        for token in row.tolist():
            x, v_first = w["model.embeddings.weight"][token], None
            for i in range(config["num_hidden_layers"]):
                p = f"model.layers.{i}"
                x = norm(x, f"{p}.pre_norm") if f"{p}.pre_norm.weight" in w else x
                a = norm(x, f"{p}.attn_norm")
                delta = state.get((p, 1), torch.zeros_like(a)) - a
                y, v_first = attention(a, delta, f"{p}.attn", state, v_first)
                x, state[p, 1] = x + y, a
                m = norm(x, f"{p}.ffn_norm")
                delta = state.get((p, 2), torch.zeros_like(m)) - m
                x, state[p, 2] = x + feed_forward(m, delta, f"{p}.ffn"), m
            x = norm(x, "model.norm")
            logits.append(w.get("lm_head.weight", w["model.embeddings.weight"]) @ x)
        rows.append(torch.stack(logits))
    return torch.stack(rows)


FLA = {
    "vocab_size": 19,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_heads": 3,
    "hidden_act": "sqrelu",
    "norm_eps": 1e-5,
    "attn": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "norm_bias": True,
    "norm_first": True,
    "fuse_norm": True,
    "tie_word_embeddings": False,
}
FLA_6 = FLA | {
    "model_type": "rwkv6",
    "expand_k": 0.5,
    "expand_v": 1.0,
    "hidden_ratio": 3.5,
    "intermediate_size": None,
    "proj_low_rank_dim": 4,
    "gate_low_rank_dim": 5,
}
FLA_7 = FLA | {
    "model_type": "rwkv7",
    "head_dim": 8,
    "intermediate_size": 40,
    "decay_low_rank_dim": 5,
    "gate_low_rank_dim": 8,
    "a_low_rank_dim": 6,
    "v_low_rank_dim": 7,
    "value_dim": [24, 24, 24],
}
FLA_VARIANTS = {
    "6": (FLA_6, {}),
    "6, wide": (FLA_6, {"expand_k": 1.0, "expand_v": 1.5, "num_heads": 6, "norm_eps": 1e-3}),
    "6, tied, no first norm": (FLA_6, {"tie_word_embeddings": True, "norm_first": False}),
    "7": (FLA_7, {}),
    "7, not fused": (FLA_7, {"fuse_norm": False, "norm_eps": 1e-4}),
    "7, wide values": (FLA_7, {"value_dim": [48, 48, 48], "head_dim": None}),
    "7, old names": (FLA_7, {"norm_first": False, "tie_word_embeddings": True}),
}


def fla_checkpoint(variant, folder):
    """A random checkpoint in float64: config and weights."""
    config, fields = FLA_VARIANTS[variant]
    config = config | fields
    width, version = config["hidden_size"], variant[0]
    values = round(width * config.get("expand_v", 1)) if version == "6" else config["value_dim"][0]
    shapes = fla_shapes(
        version,
        width,
        config["num_heads"],
        round(width * config.get("expand_k", 1)),
        values,
        # 24 * 3.5 = 84, up to a multiple of 32.
        config["intermediate_size"] or 96,
        config["num_hidden_layers"],
        config["vocab_size"],
        (4, 5) if version == "6" else (5, 6, 7, 8),
        config["norm_first"],
        config["tie_word_embeddings"],
    )
    weights = {n: x.double() for n, x in random_weights(shapes, seed=5).items()}
    if variant == "7, old names":
        for i in range(3):
            x = [weights.pop(f"model.layers.{i}.attn.x_{n}").flatten() for n in "rwkvag"]
            weights[f"model.layers.{i}.attn.x_x"] = torch.stack(x)
    if version == "7":
        # Keys so short that the 1e-6 beside their squares counts.
        for i in range(3):
            weights[f"model.layers.{i}.attn.k_k"] *= 1e-3
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return config, weights


@pytest.mark.parametrize("variant", FLA_VARIANTS)
def test_fla_variants_step_by_step_and_back(variant, tmp_path):
    format = f"fla-rwkv{variant[0]}"
    config, weights = fla_checkpoint(variant, tmp_path / "source")
    ids = torch.randint(19, (2, 11), generator=torch.Generator().manual_seed(2))
    expected = step_by_step(variant[0], config, weights, ids)
    convert(format, tmp_path / "source", tmp_path / "ours")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert model.dtype == torch.float64
    for way in ("whole", "token by token", "left padding"):
        logits, _ = run(model, ids, way)
        assert worst(logits, expected) < 1e-10, way

    if variant == "7, wide values":
        # fla reads such a file's config and then fails to initialise the model (0.6.0).
        with pytest.raises(ValueError, match="value_size is 48: fla's RWKV-7 has hidden_size, 24"):
            convert_back(format, tmp_path / "ours", tmp_path / "back")
        return
    convert_back(format, tmp_path / "ours", tmp_path / "back")
    if variant == "7, old names":
        for i in range(3):
            x = weights.pop(f"model.layers.{i}.attn.x_x")
            for name, x_D in zip("rwkvag", x):
                weights[f"model.layers.{i}.attn.x_{name}"] = x_D[None, None]
    assert_same(load_file(tmp_path / "back" / "model.safetensors"), weights)
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    filled_in = {"hidden_ratio", "intermediate_size", "head_dim"}
    # How to run RWKV-6; in RWKV-7 it is part of the mathematics.
    filled_in |= {"fuse_norm"} if variant[0] == "6" else set()
    assert not {n for n in config.keys() - filled_in if back[n] != config[n]}
    convert(format, tmp_path / "back", tmp_path / "again")
    assert_same(*(load_file(tmp_path / n / "model.safetensors") for n in ("ours", "again")))


def test_fla_7_between_the_authors_and_back(tmp_path):
    """With heads of 64 and without fuse_norm, fla's RWKV-7 is the authors'."""
    shapes = authors_shapes("7", width=128, layers=2)
    shapes |= {n: (2, 64) for n in shapes if n.endswith("r_k")}
    torch.save(random_weights(shapes), tmp_path / "a.pth")
    convert("rwkv-pth", tmp_path / "a.pth", tmp_path / "ours")
    convert_back("fla-rwkv7", tmp_path / "ours", tmp_path / "fla")
    config = json.loads((tmp_path / "fla" / "config.json").read_text())
    assert (config["fuse_norm"], config["norm_eps"], config["head_dim"]) == (False, 1e-5, 64)
    convert("fla-rwkv7", tmp_path / "fla", tmp_path / "again")
    assert_same(*(load_file(tmp_path / n / "model.safetensors") for n in ("ours", "again")))
    before, after = (settings(read_config(tmp_path / name)[1]) for name in ("ours", "again"))
    assert before.pop("head_norm_eps") == pytest.approx(after.pop("head_norm_eps"), rel=1e-12)
    assert before == after


SMALL = {"vocab_size": 11, "hidden_size": 32, "num_hidden_layers": 2, "head_size": 16}
NOT_BACK = [
    ("hf-rwkv", "rwkv4", {"layer_norm_eps": 1e-6}, "last norm has 1e-05 whatever"),
    ("hf-rwkv", "rwkv4", {"embedding_norm": False}, "always has that norm"),
    ("hf-rwkv", "rwkv4", {"attention_hidden_size": 48}, "cannot decode when they differ"),
    ("hf-rwkv", "rwkv4", {"num_attention_heads": 4}, "num_attention_heads = 4 would become 1"),
    ("hf-rwkv", "rwkv5", {}, "is rwkv5; hf-rwkv holds rwkv4"),
    ("fla-rwkv6", "rwkv6", {}, "head_norm_eps is 0.00064, layer_norm_eps 1e-05"),
    ("fla-rwkv7", "rwkv7", {}, "head_norm_eps is 0.00064: fla's RWKV-7 has .*0.00016"),
    (
        "fla-rwkv7",
        "rwkv7",
        {"removal_eps": 1e-5, "head_norm_eps": 16e-5},
        "removal_eps is 1e-05: fla's RWKV-7 has 1e-06, or 0",
    ),
    ("fla-rwkv7", "rwkv7", {"key_size": 16, "head_norm_eps": 16e-5}, "key_size is 16"),
    ("fla-rwkv7", "rwkv7", {"value_size": 48, "head_norm_eps": 16e-5}, "value_size is 48"),
    (
        "rwkv-pth",
        "rwkv7",
        {},
        "only read; what can be written is .*hf-rwkv, rwkv6-hf, fla-rwkv6, fla-",
    ),
]


@pytest.mark.parametrize(("format", "name", "fields", "message"), NOT_BACK)
def test_refused_on_the_way_back(format, name, fields, message, tmp_path):
    architecture = MODELS[name]
    small = {n: v for n, v in SMALL.items() if name != "rwkv4" or n != "head_size"}
    model = architecture.causal_lm(architecture.config(**small | fields))
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=message) as error:
        convert_back(format, tmp_path / "ours", tmp_path / "back")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


CHECKED = ["hf-rwkv", "fla-rwkv6", "fla-rwkv7", "hf-mistral", "mistral-consolidated"]


@pytest.mark.parametrize("format", CHECKED)
def test_the_way_back_is_checked(format, tmp_path, monkeypatch):
    """Whatever a format's writer gets wrong, what it wrote is not what was to be written."""
    chosen = FORMATS[format]
    architecture = MODELS[chosen.architecture]
    eps = {"rwkv6": {"head_norm_eps": 1e-5}, "rwkv7": {"head_norm_eps": 16e-5}}
    fields = SMALL | eps.get(chosen.architecture, {})
    if chosen.architecture in ("rwkv4", "sliding_window"):
        del fields["head_size"]
    architecture.causal_lm(architecture.config(**fields)).save_pretrained(tmp_path / "ours")

    def wrong_tensor(weights, config):
        pairs = dict(chosen.write_weights(weights, config))
        name = next(n for n in pairs if "embed" in n)
        return (pairs | {name: pairs[name] + 1}).items()

    # Some have no field for special tokens.
    wrong, message = {"eos_token_id": 7}, "eos_token_id = None would become 7"
    if "eos_token_id" in chosen.left_out:
        wrong, message = {"norm_eps": 0.5}, "rms_norm_eps = 1e-05 would become 0.5"

    def wrong_field(config):
        values, notes = chosen.write_config(config)
        return values | wrong, notes

    wrongs = {
        "embed_tokens.weight would change": {"write_weights": wrong_tensor},
        message: {"write_config": wrong_field},
    }
    for expected, writer in wrongs.items():
        monkeypatch.setitem(FORMATS, format, chosen._replace(**writer))
        with pytest.raises(ValueError, match=expected):
            convert_back(format, tmp_path / "ours", tmp_path / "back")
