"""Transformer-XL against its authors' code, transformers' class of it, and the equations."""

import json
import shutil

import pytest
import torch
from goldens import golden_folder, golden_tensors
from torch.nn.functional import cross_entropy, layer_norm, softmax
from transformers import AutoModelForCausalLM
from ways import WAYS, gradients, run, worst

from zoo import TransformerXLConfig, TransformerXLForCausalLM
from zoo.hub.convert import FORMATS, convert, convert_back
from zoo.hub.convert.format import Weights

# Golden -> (format, fields of its config that the format wants).
CASES = {
    "txl-kimiyoung": ("transformer-xl", {}),
    "txl-kimiyoung-eval": ("transformer-xl", {}),
    "txl-hf": ("transfo-xl-hf", {"model_type": "transfo-xl", "tgt_len": 16}),
}
SMALL = {
    "vocab_size": 31,
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "head_dim": 6,
    "segment_length": 7,
}
# What definitions and ways are compared for.
SETTINGS = {
    "same length": {"mem_len": 9},
    "same length, zeros, pre-norm": {"mem_len": 9, "zero_memory": True, "pre_lnorm": True},
    "segments": {"mem_len": 9, "same_length": False, "clamp_len": 5, "untie_r": False},
    "segments, zeros": {"mem_len": 9, "same_length": False, "zero_memory": True},
    "segments, zeros, pre-norm, short": {
        "mem_len": 3,
        "same_length": False,
        "zero_memory": True,
        "pre_lnorm": True,
    },
    "no memory": {"mem_len": 0, "same_length": False},
    "itself alone": {"mem_len": 1, "zero_memory": True},
    "clusters": {"mem_len": 9, "cutoffs": [10, 20, 25], "div_val": 2, "zero_memory": True},
    "clusters of one width": {"mem_len": 9, "cutoffs": [10, 20, 25]},
    "clusters of one width, projected": {"mem_len": 9, "cutoffs": [10, 20, 25], "d_embed": 12},
    "clusters, nothing tied": {
        "mem_len": 9,
        "cutoffs": [10, 20],
        "div_val": 2,
        "tie_word_embeddings": False,
    },
    "one cluster, projected": {"mem_len": 9, "d_embed": 12},
}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """(golden, dtype) -> its model, converted."""

    def load(case, dtype):
        folder = tmp_path_factory.mktemp("golden")
        shutil.copytree(golden_folder(case), folder / "theirs")
        format, fields = CASES[case]
        values = json.loads((folder / "theirs" / "config.json").read_text()) | fields
        (folder / "theirs" / "config.json").write_text(json.dumps(values))
        convert(format, folder / "theirs", folder / "ours")
        return AutoModelForCausalLM.from_pretrained(folder / "ours", dtype=dtype).eval()

    return load


def build(fields, seed=0):
    """A small model in float64 whose parameters are all of order one."""
    torch.manual_seed(seed)
    model = TransformerXLForCausalLM(TransformerXLConfig(**SMALL | fields)).double().eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            x.add_(0.3 * torch.randn_like(x) * (x.shape[-1] ** -0.5 if "weight" in name else 1))
    return model


def ids_of(*shape, seed=1):
    return torch.randint(0, SMALL["vocab_size"], shape, generator=torch.manual_seed(seed))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_logits_and_memories(load, case, way):
    golden = golden_tensors(case)
    logits_name = "log_probs_f64" if case == "txl-hf" else "logits_f64"
    model = load(case, torch.float64)
    ids = golden["input_ids"]
    if ids.shape[1] < 49 and way == "chunks":
        pieces, cache, logits = ids.split([1, 7, 25, 3, ids.shape[1] - 36], dim=1), None, []
        with torch.no_grad():
            for piece in pieces:
                output = model(piece, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                logits.append(output.logits)
        logits = torch.cat(logits, dim=1)
    else:
        logits, cache = run(model, ids, way)
    assert worst(logits, golden[logits_name]) < 1e-9
    length = model.config.mem_len
    for layer, memory in zip(cache.layers, golden["final_mems_f64"]):
        held = layer.tensors["inputs_BW1D"][:, :, 0]
        slots = torch.arange(ids.shape[1] - length, ids.shape[1]) % held.shape[1]
        assert worst(held[:, slots], memory) < 1e-9
    logits, _ = run(load(case, torch.float32), ids, "whole")
    assert worst(logits, golden[logits_name], relative=True) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_the_official_ones(load, case):
    golden, official = golden_tensors(case), golden_tensors(case, "grads")
    for dtype, bound in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
        model, weights = load(case, dtype), Weights(dict(official))
        ids = golden["input_ids"]
        with torch.no_grad():
            loss = model(ids, labels=ids).loss
        assert worst(loss, golden["loss_f64"]) < 1e-5  # transformers' loss is in float32
        ours = gradients(model, ids)
        pairs = dict(FORMATS[CASES[case][0]].read_weights(weights, model.config))
        # The goldens have each tensor once.
        assert weights.untaken == set() and pairs.keys() == ours.keys()
        for key, gradient in pairs.items():
            # The official ones are stored in float32.
            assert worst(ours[key], gradient, relative=True) < bound, key


@pytest.mark.parametrize("case", CASES)
def test_weights_go_back_as_they_came(load, case, tmp_path):
    model, format = load(case, torch.float32), CASES[case][0]
    model.save_pretrained(tmp_path / "ours")
    report = convert_back(format, tmp_path / "ours", tmp_path / "theirs")
    official = golden_tensors(case, "model")
    from safetensors.torch import load_file

    back = load_file(tmp_path / "theirs" / "model.safetensors")
    assert report.num_tensors == len(back) and back.keys() == official.keys()
    assert all(torch.equal(back[name], x) for name, x in official.items())


def definition(model, ids):
    """Logits of one text, token by token and key by key, from the equations."""
    config, weights = model.config, dict(model.named_parameters(remove_duplicate=False))
    width, heads, size = config.hidden_size, config.num_attention_heads, config.head_dim

    def of(name, x):
        bias = weights.get(f"{name}.bias")
        y = x @ weights[f"{name}.weight"].T
        return y if bias is None else y + bias

    def norm(name, x):
        eps = config.layer_norm_epsilon
        return layer_norm(x, (width,), weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    def word(token):
        if "model.embed_tokens.weight" in weights:
            return weights["model.embed_tokens.weight"][token]
        bounds = [0, *config.cutoffs, config.vocab_size]
        c = max(c for c in range(len(bounds) - 1) if token >= bounds[c])
        x = weights[f"model.embed_tokens.tables.{c}.weight"][token - bounds[c]]
        shared = 0 if config.div_val == 1 else c
        projection = weights.get(f"model.embed_tokens.projections.{shared}.weight")
        return x if projection is None else projection @ x

    x = torch.stack([word(int(token)) for token in ids]) * width**0.5
    padding = config.mem_len if config.zero_memory else 0
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        own = f"{layer}.mixer" if config.untie_r else "model"
        u, t = (weights[f"{own}.query_biases.{name}"] for name in ("content", "position"))
        memory = torch.cat([x.new_zeros(padding, width), x])
        inputs = norm(f"{layer}.mixer_norm", memory) if config.pre_lnorm else memory
        k = of(f"{layer}.mixer.k_proj", inputs).view(-1, heads, size)
        v = of(f"{layer}.mixer.v_proj", inputs).view(-1, heads, size)
        q = of(f"{layer}.mixer.q_proj", inputs).view(-1, heads, size)
        outputs = []
        for n in range(len(ids)):
            first = n - config.mem_len + 1
            if not config.same_length:
                first = n - n % config.segment_length - config.mem_len
            scores, values = [], []
            for j in range(max(first, -padding), n + 1):
                distance = n - j
                if config.clamp_len > 0:
                    distance = min(distance, config.clamp_len)
                angles = distance / 10000 ** (torch.arange(0, width, 2).double() / width)
                r = of(f"{layer}.mixer.r_proj", torch.cat([angles.sin(), angles.cos()]))
                content = (q[padding + n] + u) * k[padding + j]
                position = (q[padding + n] + t) * r.view(heads, size)
                scores.append((content + position).sum(-1) / size**0.5)
                values.append(v[padding + j])
            p = softmax(torch.stack(scores), dim=0)
            outputs.append((p[..., None] * torch.stack(values)).sum(0).flatten())
        y = of(f"{layer}.mixer.out_proj", torch.stack(outputs))

        def mlp(x, layer=layer):
            return of(f"{layer}.mlp.down_proj", of(f"{layer}.mlp.up_proj", x).relu())

        if config.pre_lnorm:
            x = x + y
            x = x + mlp(norm(f"{layer}.mlp_norm", x))
        else:
            x = norm(f"{layer}.mixer_norm", x + y)
            x = norm(f"{layer}.mlp_norm", x + mlp(x))
    if "lm_head.weight" in weights:
        return of("lm_head", x)
    parts, head = [], None
    for c in range(len(config.cutoffs) + 1):
        projection = weights.get(f"lm_head.projections.{c}.weight")
        h = x if projection is None else x @ projection
        logits = of(f"lm_head.words.{c}", h)
        if c == 0 and config.cutoffs:
            logits = torch.cat([logits, of("lm_head.clusters", h)], dim=-1)
        logs = logits.log_softmax(-1)
        if c == 0:
            head, logs = logs, logs[:, : (config.cutoffs or [config.vocab_size])[0]]
            parts.append(logs)
        else:
            parts.append(logs + head[:, config.cutoffs[0] + c - 1, None])
    return torch.cat(parts, dim=-1)


@pytest.mark.parametrize("fields", SETTINGS.values(), ids=SETTINGS)
def test_the_equations(fields):
    """Whole, in pieces, by the token, and beside another text behind padding."""
    model, ids = build(fields), ids_of(2, 33)
    with torch.no_grad():
        expected = torch.stack([definition(model, row) for row in ids])
        for sizes in ([33], [10, 1, 1, 9, 12], [1] * 33):
            cache, logits = None, []
            for piece in ids.split(sizes, dim=1):
                output = model(piece, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                logits.append(output.logits)
            assert worst(torch.cat(logits, dim=1), expected) < 1e-9
        mask = torch.ones(2, 38, dtype=torch.long)
        mask[0, :5], mask[1, 33:] = 0, 0
        padded = torch.zeros(2, 38, dtype=torch.long)
        padded[0, 5:], padded[1, :33] = ids
        cache, logits = None, []
        for columns in torch.arange(38).split([17, 12, 9]):
            output = model(
                padded[:, columns],
                attention_mask=mask[:, : columns[-1] + 1],
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            logits.append(output.logits)
        logits = torch.cat(logits, dim=1)
        assert worst(logits[0, 5:], expected[0]) < 1e-9
        assert worst(logits[1, :33], expected[1]) < 1e-9
        positions = torch.cat([torch.arange(33), torch.arange(33)])[None]
        packed = model(ids.reshape(1, -1), position_ids=positions).logits
        assert worst(packed.view(2, 33, -1), expected) < 1e-9


def by_segments(model, ids, sizes=None):
    """Gradients of the mean loss where each segment is run after a memory without a gradient."""
    model.zero_grad()
    cache, losses = None, []
    for piece in ids.split(sizes or model.config.segment_length, dim=1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        for layer in cache.layers:
            layer.tensors = {name: x.detach() for name, x in layer.tensors.items()}
        losses.append(output.logits)
    logits = torch.cat(losses, dim=1)
    cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["same length", "segments", "segments, zeros", "clusters"])
def test_gradients_stop_where_segments_begin(name):
    """As cutting a text there and detaching does; the cuts of a text do not matter."""
    model, ids = build(SETTINGS[name]), ids_of(2, 31)
    expected = by_segments(model, ids)
    for sizes in (None, [10, 1, 3, 17], [1] * 31):
        model.zero_grad()
        cache, logits = None, []
        for piece in ids.split(sizes or 31, dim=1):
            output = model(piece, past_key_values=cache, use_cache=sizes is not None)
            cache = output.past_key_values
            logits.append(output.logits)
        logits = torch.cat(logits, dim=1)
        cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        for key, p in model.named_parameters():
            assert worst(p.grad, expected[key], relative=True) < 1e-9, (key, sizes)
    for layer in model.model.layers:
        layer.mixer.detaches_memory = False
    key = "model.layers.0.mlp.up_proj.weight"
    assert worst(gradients(model, ids)[key], expected[key], relative=True) > 1e-3
