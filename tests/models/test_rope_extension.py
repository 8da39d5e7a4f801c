"""Models with a rope_extension against a plain definition, by its own words; loading; refusals."""

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch.nn.functional import rms_norm, silu
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from zoo import SlidingWindowConfig, SlidingWindowForCausalLM
from zoo.core.state import state_bytes, state_size
from zoo.hub.convert import convert, convert_back
from zoo.hub.export import export
from zoo.layers.extended_softmax import ExtendedAttention

SIZES = {
    "vocab_size": 71,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXTENSIONS = {
    "rerope": {"type": "rerope", "window": 8},
    "rerope-log": {"type": "rerope", "window": 8, "log_n_length": 20},
    "leaky": {"type": "leaky_rerope", "window": 8, "factor": 4},
    "self-extend": {"type": "self_extend", "window": 8, "group_size": 3, "log_n_length": None},
    "dual-chunk": {"type": "dual_chunk", "chunk_size": 12, "local_window": 4},
}


def relative_position(n, m, extension):
    """What takes the place of n - m."""
    kind, d = extension["type"], n - m
    if kind == "dual_chunk":
        limit, chunk = extension["chunk_size"], extension["chunk_size"] - extension["local_window"]
        chunks_before, place = n // chunk - m // chunk, n % chunk
        at = place, min(place + chunk, limit), min(2 * chunk - 1, limit)
        return at[max(0, min(chunks_before, 2))] - m % chunk
    w = extension["window"]
    if d < w:
        return d
    if kind == "self_extend":
        group = extension["group_size"]
        return n // group - m // group + w - w / group
    return w if kind == "rerope" else w + (d - w) / extension["factor"]


def definition(weights, ids, extension, window=None, theta=10000.0):
    """Logits [T, vocab] of LlamaForCausalLM with an extension, from its weights, in float64."""
    weights = {name: x.double() for name, x in weights.items()}
    heads, groups = SIZES["num_attention_heads"], SIZES["num_key_value_heads"]
    width = SIZES["hidden_size"] // heads
    length = len(ids)
    angle_K = theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    relative_TS = torch.tensor(
        [[relative_position(n, m, extension) for m in range(length)] for n in range(length)],
        dtype=torch.float64,
    )
    cos_TSK, sin_TSK = (f(relative_TS[..., None] * angle_K) for f in (torch.cos, torch.sin))
    distance_TS = torch.arange(length)[:, None] - torch.arange(length)
    visible_TS = (distance_TS >= 0) & (distance_TS < (window or length))
    factor_T = torch.ones(length, dtype=torch.float64)
    if extension.get("log_n_length"):
        base = math.log(extension["log_n_length"])
        factors = [max(1.0, math.log(n + 1) / base) for n in range(length)]
        factor_T = torch.tensor(factors, dtype=torch.float64)
    x_TD = weights["model.embed_tokens.weight"][ids]
    for layer in range(SIZES["num_hidden_layers"]):
        own = {
            name.removeprefix(f"model.layers.{layer}."): x
            for name, x in weights.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        normed_TD = rms_norm(x_TD, x_TD.shape[1:], own["input_layernorm.weight"], 1e-5)
        q, k, v = (
            (normed_TD @ own[f"self_attn.{name}_proj.weight"].T).unflatten(1, (-1, width))
            for name in "qkv"
        )
        k, v = (x.repeat_interleave(heads // groups, dim=1) for x in (k, v))
        # The product of a query turned by an angle and a key.
        (a_THK, b_THK), (c_SHK, d_SHK) = (x.chunk(2, dim=2) for x in (q, k))
        same = torch.einsum("thk,shk->tshk", a_THK, c_SHK)
        same = same + torch.einsum("thk,shk->tshk", b_THK, d_SHK)
        across = torch.einsum("thk,shk->tshk", a_THK, d_SHK)
        across = across - torch.einsum("thk,shk->tshk", b_THK, c_SHK)
        score_TSH = (same * cos_TSK[:, :, None] + across * sin_TSK[:, :, None]).sum(-1)
        score_TSH = score_TSH * factor_T[:, None, None] / math.sqrt(width)
        p_TSH = score_TSH.masked_fill(~visible_TS[..., None], -torch.inf).softmax(1)
        o_THV = torch.einsum("tsh,shv->thv", p_TSH, v)
        x_TD = x_TD + o_THV.flatten(1) @ own["self_attn.o_proj.weight"].T
        normed_TD = rms_norm(x_TD, x_TD.shape[1:], own["post_attention_layernorm.weight"], 1e-5)
        gate, up = (normed_TD @ own[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x_TD = x_TD + (silu(gate) * up) @ own["mlp.down_proj.weight"].T
    x_TD = rms_norm(x_TD, x_TD.shape[1:], weights["model.norm.weight"], 1e-5)
    return x_TD @ weights["lm_head.weight"].T


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """(a folder of ours, the weights of LlamaForCausalLM that it was converted from)."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, max_position_embeddings=32, rms_norm_eps=1e-5)
    theirs = LlamaForCausalLM(config)
    with torch.no_grad():
        for x in theirs.parameters():
            x += 0.2 * torch.randn_like(x)
    # Mistral without a window has Llama's layers and names.
    theirs.config.update({"model_type": "mistral", "sliding_window": None})
    theirs.save_pretrained(folder / "theirs")
    text = (folder / "theirs" / "config.json").read_text()
    text = text.replace("LlamaForCausalLM", "MistralForCausalLM").replace('"llama"', '"mistral"')
    for name in ("attention_bias", "mlp_bias", "pretraining_tp"):
        text = "\n".join(line for line in text.splitlines() if f'"{name}"' not in line)
    (folder / "theirs" / "config.json").write_text(text)
    convert("hf-mistral", folder / "theirs", folder / "ours")
    return folder / "ours", theirs.state_dict()


def load(folder, **fields):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **fields)
    return model.eval()


def text_of(*shape):
    return torch.randint(71, shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def run(model, ids, sizes=None, **inputs):
    """Logits [B, T, vocab] of a text in pieces of these sizes, and the cache after it."""
    cache, logits = None, []
    for piece in ids.split(sizes or ids.shape[1], dim=1):
        output = model(piece, past_key_values=cache, use_cache=True, **inputs)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, dim=1), cache


# The last has so many slots that a step looks at the newest apart, in a ring that comes round.
CASES = [*((name, window) for name in EXTENSIONS for window in (None, 14)), ("dual-chunk", 40)]


@torch.no_grad()
def test_the_local_window_of_chunks_may_be_called_window(llama):
    same = {"type": "dual_chunk", "chunk_size": 12, "window": 4}
    ids = text_of(1, 40)
    models = [load(llama[0], rope_extension=x) for x in (EXTENSIONS["dual-chunk"], same)]
    one, other = (run(model, ids, [25, 1, 14]) for model in models)
    assert torch.equal(one[0], other[0]) and state_bytes(one[1]) == state_bytes(other[1])


@pytest.mark.parametrize(("name", "window"), CASES)
def test_a_trained_model_is_extended_when_it_is_loaded(llama, name, window):
    folder, weights = llama
    model = load(folder, rope_extension=EXTENSIONS[name], sliding_window=window)
    ids = text_of(2, 50)
    expected = torch.stack([definition(weights, row, EXTENSIONS[name], window) for row in ids])
    for sizes in (None, 1, [3, 20, 1, 1, 25]):
        assert (run(model, ids, sizes)[0] - expected).abs().max() < 1e-9
    model.set_attn_implementation("eager")
    assert (run(model, ids, [30, 20])[0] - expected).abs().max() < 1e-9
    plain = run(load(folder, sliding_window=window), ids)[0]
    near = 8 if "log_n_length" in EXTENSIONS[name] else 9
    assert torch.allclose(plain[:, :near], expected[:, :near], atol=1e-9)
    assert (plain - expected).abs().max() > 1e-2


@pytest.mark.parametrize("name", EXTENSIONS)
def test_positions_count_the_tokens_of_a_document(llama, name):
    """Left padding, packing and jumps of position_ids change nothing."""
    model, ids = load(llama[0], rope_extension=EXTENSIONS[name]), text_of(2, 50)
    expected = run(model, ids)[0]
    mask = torch.ones(2, 63, dtype=torch.long)
    mask[0, :13], mask[1, :13] = 0, 0
    padded = torch.cat([torch.zeros(2, 13, dtype=torch.long), ids], dim=1)
    assert (run(model, padded, attention_mask=mask)[0][:, 13:] - expected).abs().max() < 1e-12
    packed = torch.cat([text_of(1, 13), ids[:1]], dim=1)
    positions = torch.cat([torch.arange(13), torch.arange(50)])[None]
    found = run(model, packed, position_ids=positions)[0]
    assert (found[0, 13:] - expected[0]).abs().max() < 1e-12
    jumping = torch.arange(50)[None] + 100 * (torch.arange(50) >= 30)
    assert (run(model, ids, position_ids=jumping)[0] - expected).abs().max() == 0


def test_packed_rows_go_on_from_a_state(llama):
    """A row that starts another document after some of its own, and one that does not."""
    model = load(llama[0], rope_extension=EXTENSIONS["rerope"], sliding_window=14)
    ids, other = text_of(2, 40), text_of(1, 9).flip(1)
    _, cache = run(model, ids[:, :23])
    piece = ids[:, 23:].clone()
    piece[1, 8:] = other[0]
    positions = torch.arange(23, 40).repeat(2, 1)
    positions[1, 8:] = torch.arange(9)
    with torch.no_grad():
        logits = model(piece, past_key_values=cache, position_ids=positions).logits
    whole = run(model, ids)[0]
    assert (logits[0] - whole[0, 23:]).abs().max() < 1e-12
    assert (logits[1, :8] - whole[1, 23:31]).abs().max() < 1e-12
    assert (logits[1, 8:] - run(model, other)[0][0]).abs().max() < 1e-12
    following = text_of(2, 3)
    after = run(model, torch.cat([ids[:1], following[:1]], dim=1))[0][0, -3:]
    after_other = run(model, torch.cat([other, following[1:]], dim=1))[0][0, -3:]
    for sizes in ([3], [1, 1, 1]):
        found, used = [], cache
        for step in following.split(sizes, dim=1):
            with torch.no_grad():
                output = model(step, past_key_values=used)
            found.append(output.logits)
        found = torch.cat(found, dim=1)
        assert (found[0] - after).abs().max() < 1e-12
        assert (found[1] - after_other).abs().max() < 1e-12
        _, cache = run(model, ids[:, :23])
        with torch.no_grad():
            cache = model(piece, past_key_values=cache, position_ids=positions).past_key_values


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("name", EXTENSIONS)
def test_bytes_of_the_state_are_those_of_the_formula(name, window):
    extension = EXTENSIONS[name]
    config = SlidingWindowConfig(**SIZES, sliding_window=window, rope_extension=extension)
    model = SlidingWindowForCausalLM(config).eval()
    for length in (5, 50):
        _, cache = run(model, text_of(3, length))
        slots = window or length
        width = SIZES["hidden_size"] // SIZES["num_attention_heads"]
        per_layer = 4 * SIZES["num_key_value_heads"] * width
        per_layer *= 2 * slots + extension.get("window", 0)
        assert state_bytes(cache) == 3 * SIZES["num_hidden_layers"] * per_layer
        specs = model.model.state_specs()
        assert state_size(specs, num_tokens=length) == SIZES["num_hidden_layers"] * per_layer


def test_exported_and_converted_back(llama, tmp_path):
    extension, ids = EXTENSIONS["dual-chunk"], text_of(1, 40)
    model = load(llama[0], rope_extension=extension)
    model.save_pretrained(tmp_path / "extended")
    export(tmp_path / "extended", tmp_path / "exported")
    again = load(tmp_path / "exported", trust_remote_code=True)
    assert again.config.rope_extension == extension
    assert torch.equal(run(again, ids)[0], run(model, ids)[0])
    other = load(tmp_path / "exported", trust_remote_code=True, rope_extension=EXTENSIONS["leaky"])
    expected = run(load(llama[0], rope_extension=EXTENSIONS["leaky"]), ids)[0]
    assert torch.equal(run(other, ids)[0], expected)
    plain = load(tmp_path / "exported", trust_remote_code=True, rope_extension=None)
    assert torch.equal(run(plain, ids)[0], run(load(llama[0]), ids)[0])
    with pytest.raises(ValueError, match="rope_extension is"):
        convert_back("hf-mistral", tmp_path / "exported", tmp_path / "back")


def test_layers_with_other_positions_stay_as_they_are():
    types = ["rope", None, "alibi"]
    config = SlidingWindowConfig(
        **SIZES | {"num_hidden_layers": 3},
        sliding_window=None,
        position_embedding_type=types,
        rope_extension=EXTENSIONS["rerope"],
    )
    model = SlidingWindowForCausalLM(config)
    extended = [name for name, x in model.named_modules() if isinstance(x, ExtendedAttention)]
    assert extended == ["model.layers.0.mixer"]
    ids = text_of(2, 30)
    assert torch.allclose(run(model, ids)[0], run(model, ids, [11, 1, 18])[0], atol=1e-5)


@pytest.mark.parametrize("rope_type", ["linear", "yarn", "llama3"])
def test_scaled_angles_are_extended_too(rope_type):
    """Near the beginning all is as without an extension, scaled as it is."""
    fields = {"factor": 4.0, "rope_type": rope_type}
    if rope_type == "llama3":
        fields |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    fields = {**SIZES, "sliding_window": None, "rope_parameters": fields}
    torch.manual_seed(0)
    config = SlidingWindowConfig(**fields, max_position_embeddings=16)
    plain = SlidingWindowForCausalLM(config).double().eval()
    ids = text_of(1, 30)
    for extension in EXTENSIONS.values():
        config = SlidingWindowConfig(**fields, max_position_embeddings=16, rope_extension=extension)
        model = SlidingWindowForCausalLM(config).double().eval()
        model.load_state_dict(plain.state_dict())
        found, expected = run(model, ids)[0], run(plain, ids)[0]
        assert (found[:, :8] - expected[:, :8]).abs().max() < 1e-12
        assert (found[:, -1] - expected[:, -1]).abs().max() > 1e-6
        assert (run(model, ids, 1)[0] - found).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "ntk"}, "is one of rerope, leaky_rerope, self_extend, dual_chunk, got 'ntk'"),
        ({"type": None}, "is one of rerope"),
        ({"windows": 3}, "no field 'windows'; did you mean window?"),
        ({"group_size": 3}, "of type rerope has no field 'group_size'; leave it out"),
        ({"window": None}, "of type rerope needs window, got log_n_length, type"),
        ({"window": 8.0}, "whole number of at least 1, got 8.0"),
        ({"window": 0}, "whole number of at least 1, got 0"),
        ({"window": True}, "whole number of at least 1, got True"),
        ({"log_n_length": 1}, "a number above 1, or None, got 1"),
        ({"type": "leaky_rerope"}, "of type leaky_rerope needs factor"),
        ({"type": "leaky_rerope", "factor": 0}, "a number above 0, got 0"),
        ({"type": "leaky_rerope", "factor": "4"}, "a number above 0, got '4'"),
        ({"type": "self_extend", "group_size": 0}, "whole number of at least 1, got 0"),
        ({"type": "dual_chunk"}, "of type dual_chunk has no field 'log_n_length'"),
    ],
)
def test_refused_fields(change, message):
    extension = {"type": "rerope", "window": 8, "log_n_length": 20} | change
    extension = {name: x for name, x in extension.items() if x is not None}
    with pytest.raises(StrictDataclassClassValidationError, match=message) as error:
        SlidingWindowConfig(**SIZES, sliding_window=None, rope_extension=extension)
    assert "\n" not in str(error.value.__cause__)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sliding_window": 8}, "beyond its window 8, which sliding_window 8 hides"),
        (
            {"sliding_window": 12, "rope_extension": EXTENSIONS["dual-chunk"]},
            "beyond its chunk_size 12, which sliding_window 12 hides",
        ),
        (
            {"rope_extension": {"type": "dual_chunk", "chunk_size": 4, "local_window": 4}},
            "local_window is below chunk_size, got 4 and 4",
        ),
        (
            {"rope_extension": {"type": "dual_chunk", "chunk_size": 4}},
            "dual_chunk needs local_window, or window, which says the same, got neither",
        ),
        (
            {"rope_extension": EXTENSIONS["dual-chunk"] | {"window": 4}},
            "got local_window and window",
        ),
        ({"position_embedding_type": "alibi"}, "of position_embedding_type 'rope'"),
        ({"position_embedding_type": [None, None]}, "of position_embedding_type 'rope'"),
        ({"sliding_window": 16, "num_sink_tokens": 2}, "has no sinks, got num_sink_tokens 2"),
        ({"learnable_sinks": True}, "has no sinks"),
        (
            {
                "rope_parameters": {"rope_type": "dynamic", "factor": 2.0},
                "max_position_embeddings": 16,
            },
            "do not depend on the length of the text, got rope_type 'dynamic'",
        ),
    ],
)
def test_refused_configs(fields, message):
    fields = {"sliding_window": None, "rope_extension": EXTENSIONS["rerope"]} | fields
    with pytest.raises(StrictDataclassClassValidationError, match=message) as error:
        SlidingWindowConfig(**SIZES, **fields)
    assert "\n" not in str(error.value.__cause__)


def test_refused_when_loading(llama):
    with pytest.raises(StrictDataclassClassValidationError, match="rerope needs window, got type"):
        load(llama[0], rope_extension={"type": "rerope"})
    with pytest.raises(StrictDataclassClassValidationError, match="sliding_window 8 hides"):
        load(llama[0], rope_extension=EXTENSIONS["rerope"], sliding_window=8)
    with pytest.raises(ValueError, match="use 'banded' or 'eager'"):
        load(llama[0], rope_extension=EXTENSIONS["rerope"], attn_implementation="sdpa")
    model = load(llama[0], rope_extension=EXTENSIONS["rerope"])
    with pytest.raises(ValueError, match="use 'banded' or 'eager'"):
        model.set_attn_implementation("sdpa")
