"""Infini-attention against Beomi's and lucidrains' code, and against the paper's equations."""

import json
import shutil

import pytest
import torch
from goldens import golden_folder, golden_tensors
from huggingface_hub.errors import StrictDataclassError
from torch.nn.functional import elu, silu, softmax
from transformers import AutoModelForCausalLM
from ways import WAYS, gradients, run, worst

from zoo import InfiniConfig, InfiniForCausalLM
from zoo.hub.convert import FORMATS, convert
from zoo.hub.convert.format import Weights
from zoo.layers.compressive_memory import read_memory, update_of
from zoo.models.infini import InfiniAttention

SMALL = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "segment_length": 13,
}
BEOMI, LUCIDRAINS = "infini-beomi-llama", "infini-lucidrains"
SEGMENT = 32
CASES = {
    "beomi": (BEOMI, "infini-beomi", {}, "logits_f64"),
    "lucidrains, linear": (LUCIDRAINS, "infini-lucidrains", {}, "linear_logits_f64"),
    "lucidrains, delta": (
        LUCIDRAINS,
        "infini-lucidrains",
        {"use_mem_delta_rule": True},
        "delta_logits_f64",
    ),
}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """(case, dtype) -> the golden's model, converted."""

    def load(case, dtype):
        golden, format, fields, _ = CASES[case]
        folder = tmp_path_factory.mktemp("golden")
        shutil.copytree(golden_folder(golden), folder / "theirs")
        values = json.loads((folder / "theirs" / "config.json").read_text())
        values |= {"segment_length": SEGMENT, "use_mem_delta_rule": False} | fields
        if format == "infini-beomi":
            del values["use_mem_delta_rule"]
        (folder / "theirs" / "config.json").write_text(json.dumps(values))
        convert(format, folder / "theirs", folder / "ours")
        return AutoModelForCausalLM.from_pretrained(folder / "ours", dtype=dtype).eval()

    return load


def final_memory(cache):
    """The memories [L, B, H, K, V] and z [L, B, H, K], the unfinished segment's part included."""
    whole = [x.tensors["memory_BHKV"] + x.tensors["partial_BHKV"] for x in cache.layers]
    return torch.stack(whole).split([whole[0].shape[-1] - 1, 1], dim=-1)


def interleaved(x, axis):
    """Channels of a head from (j, j + K/2) back to pairs (2j, 2j + 1)."""
    return x.unflatten(axis, (2, -1)).transpose(axis, axis + 1).flatten(axis, axis + 1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_logits_and_memories(load, case, way):
    golden = golden_tensors(CASES[case][0])
    expected = golden[CASES[case][3]]
    logits, cache = run(load(case, torch.float64), golden["input_ids"], way)
    assert worst(logits, expected) < 1e-9
    memory, z = final_memory(cache)
    if case == "beomi":
        assert worst(memory, golden["final_memory_f64"]) < 1e-9
        assert worst(z[..., 0], golden["final_norm_f64"][..., 0, :]) < 1e-9
    else:
        update = case.split(", ")[1]
        memory, z = interleaved(memory, 3), interleaved(z[..., 0], 3)
        assert worst(memory, golden[f"{update}_final_kv_mem_f64"]) < 1e-9
        assert worst(z, golden[f"{update}_final_k_norm_f64"]) < 1e-9
    logits, _ = run(load(case, torch.float32), golden["input_ids"], way)
    assert worst(logits, expected, relative=True) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_official_ones(load, case, monkeypatch):
    golden, format, _, _ = CASES[case]
    official = golden_tensors(golden, "grads")
    if case == "beomi":
        monkeypatch.setattr(InfiniAttention, "detaches_memory", True)
    else:
        prefix = case.split(", ")[1] + "/"
        official = {k.removeprefix(prefix): x for k, x in official.items() if k.startswith(prefix)}
        official = {k: x for k, x in official.items() if not k.endswith("freqs")}  # not trained
    for dtype, bound in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
        model, weights = load(case, dtype), Weights(dict(official))
        ours = gradients(model, golden_tensors(golden)["input_ids"])
        pairs = dict(FORMATS[format].read_weights(weights, model.config))
        assert weights.untaken == set() and pairs.keys() == ours.keys()
        for key, gradient in pairs.items():
            # The official ones are stored in float32.
            assert worst(ours[key], gradient, relative=True) < bound, key


@pytest.mark.parametrize("update", ["linear", "delta"])
def test_the_memory_alone(update):
    """Reads, writes and their gradients, with the official operator's own inputs."""
    golden = golden_tensors("ops-infini")
    names = ("q", "k", "v", "local", "gate")
    inputs = {name: golden[name].clone().requires_grad_() for name in names}
    share = inputs["gate"].sigmoid()[:, None, None]
    shape = (*golden["k"].shape[1:3], golden["k"].shape[-1], golden["v"].shape[-1] + 1)
    memory, outputs = torch.zeros(shape, dtype=torch.float64), []
    for q, k, v, local in zip(*(inputs[name] for name in names[:4]), strict=True):
        read = read_memory(elu(q) + 1, memory)
        outputs.append(share * read + (1 - share) * local)
        memory = memory + update_of(elu(k) + 1, v, memory if update == "delta" else None)
    found = torch.stack(outputs), memory[..., :-1], memory[..., -1]
    for name, x in zip(("paper_out", "M", "z"), found, strict=True):
        assert worst(x, golden[f"{update}_{name}"]) < 1e-12
    cotangents = (golden[f"{update}_cotangent_{n}"] for n in range(3))
    sum((x * c).sum() for x, c in zip(found, cotangents, strict=True)).backward()
    for name, x in inputs.items():
        assert worst(x.grad, golden[f"{update}_grad_{name}"]) < 1e-12


def definition(model, ids):
    """Logits from the paper's equations, segment by segment, head by head."""
    config, weights = model.config, dict(model.named_parameters())
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def norm(name, x):
        scale = (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt()
        return x * scale * weights[f"{name}.weight"]

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T

    def rope(x):
        angle = torch.arange(x.shape[0], dtype=x.dtype)[:, None] * 10000 ** (
            -torch.arange(0, width, 2, dtype=x.dtype) / width
        )
        turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turned.real, turned.imag], dim=-1)

    def xpos(x, sign):
        places = torch.arange(x.shape[0], dtype=x.dtype)[:, None]
        steps = torch.arange(0, width, 2, dtype=x.dtype)
        angle = places * config.rope_parameters["rope_theta"] ** (-steps / width)
        power = sign * places / config.xpos_scale_base
        factor = ((steps + 0.4 * width) / (1.4 * width)) ** power
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(factor, angle)
        return torch.view_as_real(turned).flatten(-2)

    def bias(layer, head, length):
        distance = (torch.arange(length)[:, None] - torch.arange(length)).clamp(min=0)
        kind = config.position_embedding_type
        if kind == "alibi":  # of four heads
            return -(2 ** (-config.alibi_bias_max * (head + 1) / 4)) * distance.double()
        if kind == "t5":  # of 8 buckets, the last from 12 on
            bucket = torch.tensor([0, 1, 2, 3, 4, 4, 5, 6, 6, 6, 7, 7, 7])[distance]
            return weights[f"model.layers.{layer}.mixer.position_bias.table"][bucket, head]
        return 0.0

    def attention(layer, a):
        here = f"model.layers.{layer}.mixer"
        q, k, v = (linear(f"{here}.{name}_proj", a) for name in "qkv")
        shared, outputs = heads // groups, []
        for head in range(heads):
            columns = slice(head * width, (head + 1) * width)
            group = slice(head // shared * width, (head // shared + 1) * width)
            gate = weights[f"{here}.gate"][head].sigmoid()
            memory, z, output = torch.zeros(width, width).double(), torch.zeros(width).double(), []
            for start in range(0, len(a), config.segment_length):
                rows = slice(start, start + config.segment_length)
                q_s, k_s, v_s = q[rows, columns], k[rows, group], v[rows, group]
                if config.position_embedding_type == "rope":
                    scores = rope(q_s) @ rope(k_s).T
                elif config.position_embedding_type == "xpos":
                    scores = xpos(q_s, 1) @ xpos(k_s, -1).T
                else:
                    scores = q_s @ k_s.T
                scores = scores * (config.attention_scale or width**-0.5)
                scores = scores + bias(layer, head, len(q_s))
                future = torch.ones_like(scores, dtype=torch.bool).triu(1)
                local = softmax(scores.masked_fill(future, -torch.inf), dim=-1) @ v_s
                sq, sk = elu(q_s) + 1, elu(k_s) + 1
                recalled = sq @ memory / (sq @ z)[:, None] if start else torch.zeros_like(local)
                output.append(gate * recalled + (1 - gate) * local)
                if config.memory_update == "delta" and start:
                    v_s = v_s - sk @ memory / (sk @ z)[:, None]
                memory, z = memory + sk.T @ v_s, z + sk.sum(0)
            outputs.append(torch.cat(output))
        return linear(f"{here}.out_proj", torch.cat(outputs, dim=-1))

    rows = []
    for row in ids:
        x = weights["model.embed_tokens.weight"][row]
        for layer in range(config.num_hidden_layers):
            here = f"model.layers.{layer}"
            x = x + attention(layer, norm(f"{here}.mixer_norm", x))
            c = norm(f"{here}.mlp_norm", x)
            gated = silu(linear(f"{here}.mlp.gate_proj", c)) * linear(f"{here}.mlp.up_proj", c)
            x = x + linear(f"{here}.mlp.down_proj", gated)
        rows.append(linear("lm_head", norm("model.norm", x)))
    return torch.stack(rows)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("update", ["linear", "delta"])
def test_the_definition(update, groups, way):
    """For clones without the goldens, and for grouped queries, which the public code has wrong."""
    torch.manual_seed(0)
    fields = {"num_key_value_heads": groups, "memory_update": update}
    config = InfiniConfig(**SMALL, **fields, initializer_range=0.3)
    model = InfiniForCausalLM(config).double().eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mixer.gate.normal_()
    ids = torch.randint(0, 61, (2, 75))
    logits, _ = run(model, ids, way)
    assert worst(logits, definition(model, ids), relative=True) < 1e-10


T5 = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
LOCAL = {
    "alibi": {"position_embedding_type": "alibi", "alibi_bias_max": 4, "num_key_value_heads": 2},
    "t5": {"position_embedding_type": "t5", "attention_scale": 1.0, "memory_update": "delta"} | T5,
    "none": {"position_embedding_type": None},
    "xpos": {
        "position_embedding_type": "xpos",
        "rope_parameters": {"rope_theta": 50.0},
        "xpos_scale_base": 16,
    },
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", LOCAL)
def test_positions_of_other_types(kind, way):
    """Counted inside a segment, whatever pass its tokens came in."""
    torch.manual_seed(0)
    config = InfiniConfig(**SMALL, **LOCAL[kind], initializer_range=0.3)
    model = InfiniForCausalLM(config).double().eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mixer.gate.normal_()
    ids = torch.randint(0, 61, (2, 75))
    logits, _ = run(model, ids, way)
    assert worst(logits, definition(model, ids), relative=True) < 1e-10
    weight = torch.randn(logits.shape, dtype=torch.float64)
    names, parameters = zip(*model.named_parameters())
    official = torch.autograd.grad((definition(model, ids) * weight).sum(), parameters)
    found = torch.autograd.grad((model(ids).logits * weight).sum(), parameters)
    for name, ours, theirs in zip(names, found, official, strict=True):
        assert worst(ours, theirs, relative=True) < 1e-9, name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"position_embedding_type": "fire"}, "position_embedding_type is one of"),
        ({"position_embedding_type": ["rope"]}, "one entry for each of 2 layers, got 1"),
        ({"alibi_bias_max": 16}, "about layers of position_embedding_type 'alibi', got 16"),
        (
            {"position_embedding_type": None, "rope_parameters": {"rope_theta": 1e4}},
            "rope_parameters are about layers",
        ),
    ],
)
def test_positions_that_make_no_sense(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        InfiniConfig(**SMALL, **fields)


def test_segments_count_tokens_not_positions():
    torch.manual_seed(0)
    config = InfiniConfig(**SMALL, initializer_range=0.3)
    model = InfiniForCausalLM(config).double().eval()
    ids = torch.randint(0, 61, (2, 40))
    shifted = torch.arange(5, 45).expand(2, -1)
    with torch.no_grad():
        logits = model(ids, position_ids=shifted).logits
        assert worst(logits, model(ids).logits, relative=True) < 1e-12


def test_diagnostics():
    model = InfiniForCausalLM(InfiniConfig(**SMALL))
    with torch.no_grad():
        for layer, gates in zip(model.model.layers, ([-1.0, 0.0, 0.0, 2.0], [3.0] * 4)):
            layer.mixer.gate.copy_(torch.tensor(gates))
    shares = torch.tensor([-1.0, 0.0, 0.0, 2.0, 3.0, 3.0, 3.0, 3.0]).sigmoid()
    found = model.diagnostics()
    assert found == pytest.approx(
        {
            "gate/least": shares.min().item(),
            "gate/mean": shares.mean().item(),
            "gate/largest": shares.max().item(),
        }
    )
    cache = model(torch.ones(1, 12, dtype=torch.long), use_cache=True).past_key_values
    assert model.diagnostics(cache)["memory_norm/layer_0"] == 0  # no segment is complete
    cache = model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache).past_key_values
    assert model.diagnostics(cache)["memory_norm/layer_1"] > 0
