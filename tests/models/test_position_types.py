"""Types of positions in softmax attention: official numbers, and what configs may say."""

import pytest
import torch
import transformers.integrations.flex_attention
from goldens import golden_tensors
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch.nn.attention.flex_attention import flex_attention

from zoo import SlidingWindowConfig, SlidingWindowForCausalLM
from zoo.kernels.windowed_attention import (
    attention_step,
    windowed_attention,
    windowed_attention_reference,
)
from zoo.layers import position_bias
from zoo.layers.position_bias import AlibiBias, FireBias, T5Bias
from zoo.layers.positions import RotaryPositions, rotate
from zoo.layers.xpos import xpos_log_decay

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 40,
}
d64 = torch.float64
functions = pytest.mark.parametrize("function", [windowed_attention, windowed_attention_reference])


def config_of(kind, heads=4, **fields):
    return SlidingWindowConfig(
        **SIZES
        | {"num_attention_heads": heads, "num_key_value_heads": heads}
        | {"position_embedding_type": kind}
        | fields
    )


def worst(ours, official, relative=False):
    difference = (ours.double() - official.double()).abs().max()
    return (difference / official.abs().max() if relative else difference).item()


def attended(function, golden, bias, prefix="", **settings):
    """(output, gradients of q, k, v) with the golden's cotangent, in its layout [B, H, T, K]."""
    leaves = [golden[f"{prefix}{name}"].clone().requires_grad_() for name in "qkv"]
    q, k, v = (x.transpose(1, 2) for x in leaves)
    table = bias.below(q.shape[1], torch.float64, q.device)
    o = function(q, k, v, distance_bias=table, **settings).transpose(1, 2)
    cotangent = golden[f"{prefix}cotangent"]
    return o, torch.autograd.grad((o * cotangent).sum(), [*leaves, *bias.parameters()])


@functions
def test_alibi_official_numbers(function):
    golden = golden_tensors("ops-alibi")
    o, grads = attended(function, golden, AlibiBias(config_of("alibi", 6)))
    assert worst(o, golden["o"]) < 1e-9
    for name, grad in zip("qkv", grads):
        assert worst(grad, golden[f"grad_{name}"]) < 1e-9


@pytest.mark.parametrize("layout", ["left padded", "packed"])
def test_alibi_of_documents(layout):
    golden = golden_tensors("ops-alibi")
    q, k, v = (golden[name].transpose(1, 2) for name in "qkv")
    table = AlibiBias(config_of("alibi", 6)).below(q.shape[1], torch.float64, q.device)
    if layout == "left padded":
        mask = golden["attention_mask"].bool()
        o = windowed_attention(q, k, v, distance_bias=table, first_key=mask.long().argmax(1))
        found, expected = (x[mask] for x in (o, golden["o_left_padded"].transpose(1, 2)))
        assert worst(found, expected) < 1e-9
        return
    for row in range(len(q)):
        row = slice(row, row + 1)
        bounds = {"cu_seqlens": golden["cu_seqlens"]}
        o = windowed_attention(q[row], k[row], v[row], distance_bias=table, **bounds)
        assert worst(o.transpose(1, 2), golden["o_packed"][row]) < 1e-9


def test_alibi_slopes_of_any_number_of_heads():
    golden = golden_tensors("ops-alibi")
    counts = [int(name[7:]) for name in golden if name.startswith("slopes.")]
    assert len(counts) >= 10
    for heads in counts:
        slopes = -AlibiBias(config_of("alibi", heads)).log_decay(torch.device("cpu"))
        assert worst(slopes, golden[f"slopes.{heads}"]) < 1e-12


def test_alibi_bias_max():
    """b in place of 8: the slopes of MPT's fields."""
    slopes = -AlibiBias(config_of("alibi", 4, alibi_bias_max=16)).log_decay(torch.device("cpu"))
    assert slopes.tolist() == [2**-4, 2**-8, 2**-12, 2**-16]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_alibi_is_exact_far_into_a_text(dtype):
    """By the key's own place the bias would be wrong by 4.5 here in bfloat16."""
    bias = AlibiBias(config_of("alibi", 8)).to(dtype)
    q = torch.zeros(1, 4096, 8, 2, dtype=dtype)
    found = bias.below(4096, torch.promote_types(q.dtype, torch.float32), q.device)
    slopes = 2.0 ** -torch.arange(1, 9, dtype=torch.float64)
    assert torch.equal(found.double(), -slopes[:, None] * torch.arange(4096))


@functions
@pytest.mark.parametrize("kind", ["scaled", "unscaled"])
def test_t5_official_numbers(function, kind):
    golden = golden_tensors("ops-t5-bias")
    sizes = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}
    bias = T5Bias(config_of("t5", **sizes)).double()
    bias.table.data = golden["table"]
    assert worst(bias.below(60, torch.float64, "cpu"), golden["bias"][:, -1].flip(1)) < 1e-12
    scale = 1.0 if kind == "unscaled" else None
    o, grads = attended(function, golden, bias, scale=scale)
    assert worst(o, golden[f"{kind}.o"]) < 1e-9
    for name, grad in zip(["q", "k", "v", "table"], grads, strict=True):
        assert worst(grad, golden[f"{kind}.grad_{name}"]) < 1e-9


def test_t5_buckets():
    golden = golden_tensors("ops-t5-bias")
    names = [name for name in golden if name.startswith("buckets.")]
    assert len(names) == 5
    for name in names:
        buckets, distance = map(int, name.removeprefix("buckets.").split("_"))
        fields = {"relative_attention_num_buckets": buckets}
        bias = T5Bias(config_of("t5", **fields, relative_attention_max_distance=distance))
        bias.table.data = torch.arange(buckets, dtype=torch.float32)[:, None].expand(-1, 4)
        found = bias.by_distance(torch.arange(1200), torch.float32)
        assert torch.equal(found[0].long(), golden[name])


FIRE_NAMES = {
    "c": "c",
    "L_multiplier": "length_factor",
    "mlp.0.weight": "up_weight",
    "mlp.0.bias": "up_bias",
    "mlp.2.weight": "down_weight",
    "mlp.2.bias": "down_bias",
}


@functions
@pytest.mark.parametrize("case", ["paper", "threshold_inside", "negative"])
@pytest.mark.parametrize("way", ["by query", "as the model chooses"])
def test_fire_official_numbers(case, way, function):
    golden = golden_tensors("ops-fire")
    length = int(golden[f"{case}.W.init_L"])
    bias = FireBias(config_of("fire", fire_init_length=length)).double()
    parameters = dict(bias.named_parameters())
    for theirs, ours in FIRE_NAMES.items():
        parameters[ours].data = golden[f"{case}.W.{theirs}"].reshape(parameters[ours].shape)
    place = torch.arange(50)

    def query_bias(rows, distance):
        return bias.by_query(place[rows], distance, d64).movedim(-1, 0)[None]

    settings = {"query_bias": query_bias}
    found = query_bias(place, (place[:, None] - place).clamp(min=0))
    visible = torch.ones(50, 50, dtype=torch.bool).tril()
    assert worst(found[..., visible], golden[f"{case}.bias"][..., visible]) < 1e-12
    if way != "by query" and bias.depends_on_distance_alone(place):
        settings = {"distance_bias": bias.below(50, d64, "cpu")}
    assert ("distance_bias" in settings) == (way != "by query" and case == "paper")
    leaves = [golden[f"{case}.{name}"].clone().requires_grad_() for name in "qkv"]
    o = function(*(x.transpose(1, 2) for x in leaves), **settings).transpose(1, 2)
    assert worst(o, golden[f"{case}.o"]) < 1e-9
    leaves += [parameters[name] for name in FIRE_NAMES.values()]
    grads = torch.autograd.grad((o * golden[f"{case}.cotangent"]).sum(), leaves)
    expected = [golden[f"{case}.grad_{name}"] for name in "qkv"]
    expected += [golden[f"{case}.G.{name}"] for name in FIRE_NAMES]
    for found, official in zip(grads, expected, strict=True):
        assert worst(found, official.reshape(found.shape)) < 1e-9


@functions
@pytest.mark.parametrize("case", ["T44", "T45"])
def test_xpos_official_numbers(function, case):
    golden = golden_tensors("ops-xpos")
    config = config_of("xpos", head_dim=16)
    leaves = [golden[f"{case}.{name}"].clone().requires_grad_() for name in "qkv"]
    rotation = RotaryPositions(config)(torch.arange(int(case[1:]))[None])
    q, k, v = (x.transpose(1, 2) for x in leaves)
    q, k = (rotate(x, *rotation, interleaved=True) for x in (q, k))
    o = function(q, k, v, log_decay=xpos_log_decay(config)).transpose(1, 2)
    assert worst(o, golden[f"{case}.o"]) < 1e-9
    grads = torch.autograd.grad((o * golden[f"{case}.cotangent"]).sum(), leaves)
    for name, grad in zip("qkv", grads):
        assert worst(grad, golden[f"{case}.grad_{name}"]) < 1e-9


def test_xpos_at_any_length():
    """Powers counted from a sequence's middle are infinite in float32 from 72,000 tokens on."""
    torch.manual_seed(0)
    log_decay = xpos_log_decay(config_of("xpos", head_dim=16))
    length = 100_000
    q, k, v = (torch.randn(1, length, 1, 16, dtype=d64) for _ in range(3))
    outputs = []
    for dtype in (torch.float32, d64):
        last, *keys = (x.to(dtype) for x in (q[:, -300:], k, v))
        distance = torch.arange(length).flip(0)[None]
        seen = {"visible": distance >= 0, "log_decay": log_decay, "distance": distance}
        step = attention_step(last[:, -1:], *keys, **seen)
        o = windowed_attention(last, *keys, log_decay=log_decay)
        assert worst(o[:, -1:], step) < (1e-12 if dtype == d64 else 1e-6)
        outputs.append(o)
    assert worst(*outputs) < 1e-6 and outputs[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_xpos_in_16_bits(dtype):
    """float16 ends at 9,000 tokens from a sequence's middle."""
    torch.manual_seed(0)
    log_decay = xpos_log_decay(config_of("xpos", head_dim=16))
    q, k, v = (torch.randn(1, 20_000, 1, 16).to(dtype) for _ in range(3))
    o = windowed_attention(q[:, -200:], k, v, log_decay=log_decay)
    wide = windowed_attention(*(x.double() for x in (q[:, -200:], k, v)), log_decay=log_decay)
    assert worst(o, wide, relative=True) < 2 * torch.finfo(dtype).eps


def build(**fields):
    torch.manual_seed(0)
    model = SlidingWindowForCausalLM(SlidingWindowConfig(**SIZES | fields)).double().eval()
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def logits_of(model, ids, sizes=None, past_key_values=None, **inputs):
    cache, logits = past_key_values, []
    for piece in ids.split(sizes or ids.shape[1], dim=1):
        output = model(piece, past_key_values=cache, use_cache=True, **inputs)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


# Each type alone, and two in one model.
KINDS = ["alibi", "t5", "fire", "xpos", None, ["rope", "alibi"], ["t5", None], ["xpos", "fire"]]


@pytest.mark.parametrize("fields", [{}, {"sliding_window": 9}], ids=["full", "window"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_implementation(kind, fields):
    if "fire" in str(kind):  # a threshold that some tokens are beyond
        fields = fields | {"fire_init_length": 40}
    model = build(**{"sliding_window": None} | fields, position_embedding_type=kind)
    ids = torch.randint(0, 50, (2, 41))
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    expected = logits_of(model, ids)
    alone = logits_of(model, ids[1:, 13:])
    for name in ("banded", "eager", "sdpa"):
        model.set_attn_implementation(name)
        for sizes in (None, [7, 1, 1, 20, 1, 11]):
            assert worst(logits_of(model, ids, sizes), expected) < 1e-12
        padded = logits_of(model, ids, attention_mask=mask)
        assert worst(padded[1:, 13:], alone) < 1e-12
    # A padded pass after a state, a stream of documents with their pasts.
    model.set_attn_implementation("banded")
    mask[1] = 1
    mask[1, 20:25] = 0
    with torch.no_grad():
        cache = model(ids[:, :20], use_cache=True).past_key_values
        rest = {"attention_mask": mask[:, 20:], "past_key_values": cache}
        found = model(ids[:, 20:], **rest).logits[mask[:, 20:].bool()]
    gone = torch.cat([ids[1:, :20], ids[1:, 25:]], dim=1)
    assert worst(found, torch.cat([expected[0, 20:], logits_of(model, gone)[0, 20:]])) < 1e-12


@pytest.mark.parametrize("fields", [{}, {"sliding_window": 9}], ids=["full", "window"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_packed_documents_are_those_apart(kind, fields):
    """Documents that do not begin a row, and tokens after a packed pass; in gradients too."""
    if "fire" in str(kind):
        fields = fields | {"fire_init_length": 40}
    model = build(**{"sliding_window": None} | fields, position_embedding_type=kind)
    lengths, ids = [11, 1, 29], torch.randint(0, 50, (1, 41))
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    apart = torch.cat([model(x, use_cache=False).logits for x in ids.split(lengths, dim=1)], dim=1)
    packed = model(ids, cu_seq_lens_q=bounds, use_cache=False).logits
    assert worst(packed, apart) < 1e-12
    weight = torch.randn_like(packed)
    grads = [torch.autograd.grad((x * weight).sum(), model.parameters()) for x in (packed, apart)]
    # Not of what is added to all scores of a query alike, which has no gradient.
    pairs = [(a, b) for a, b in zip(*grads) if b.abs().max() > 1e-6]
    assert max(worst(a, b, relative=True) for a, b in pairs) < 1e-10
    assert len(grads[0]) - len(pairs) <= 2
    with torch.no_grad():
        cache = model(ids, cu_seq_lens_q=bounds, use_cache=True).past_key_values
        more = torch.randint(0, 50, (1, 6))
        found = logits_of(model, more[:, :5], past_key_values=cache)
        whole = logits_of(model, torch.cat([ids[:, 12:], more], dim=1))
    assert worst(found, whole[:, 29:34]) < 1e-12


def test_fire_keeps_no_hidden_units():
    """What backward needs of a pair of tokens is a few numbers, not all of the MLP's."""
    bias = FireBias(config_of("fire", fire_init_length=10, fire_mlp_width=100))
    for parameter in bias.parameters():
        parameter.data.normal_()
    place, counts = torch.arange(200), []

    def counted(x):
        counts.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(counted, lambda x: x):
        y = bias.by_query(place, (place[:, None] - place).clamp(min=0), torch.float32)
    assert sum(counts) < 8 * 200 * 200
    whole = torch.autograd.grad(y.square().sum(), bias.parameters())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(position_bias, "PAIRS_ON_A_CPU", 777)
        parts = bias.by_query(place, (place[:, None] - place).clamp(min=0), torch.float32)
        assert worst(parts, y) < 1e-4
        grads = torch.autograd.grad(parts.square().sum(), bias.parameters())
    assert max(worst(a, b, relative=True) for a, b in zip(grads, whole)) < 1e-4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", ["xpos", ["alibi", "fire"]], ids=str)
def test_flex_attention(kind, monkeypatch):
    """The banded path's numbers; heads do not share one bias.

    Not compiled: PyTorch 2.13's own C++ for such biases does not compile on a CPU for all shapes.
    """

    def not_compiled(query, key, value, training, **arguments):
        return flex_attention(query, key, value, **arguments)

    module = transformers.integrations.flex_attention
    monkeypatch.setattr(module, "compile_friendly_flex_attention", not_compiled)
    fire = {"fire_init_length": 40} if "fire" in str(kind) else {}
    model = build(position_embedding_type=kind, sliding_window=None, **fire)
    ids, mask = torch.randint(0, 50, (2, 41)), torch.ones(2, 41, dtype=torch.long)
    mask[1, :13] = 0
    cases = [({}, None), ({"attention_mask": mask}, None), ({}, [30, 1, 10])]
    expected = [logits_of(model, ids, sizes, **case) for case, sizes in cases]
    model.set_attn_implementation("flex_attention")
    for (case, sizes), logits in zip(cases, expected):
        found = logits_of(model, ids, sizes, **case)
        assert worst(found[mask.bool()], logits[mask.bool()]) < 1e-12


@pytest.mark.parametrize("kind", ["alibi", "t5", "fire", ["rope", "alibi"]], ids=str)
def test_flash_attention_is_refused(kind):
    model = build(position_embedding_type=kind)
    with pytest.raises(ValueError, match="adds nothing to scores, as position_embed") as error:
        model.set_attn_implementation("flash_attention_2")
    assert "\n" not in str(error.value)


def test_xpos_in_one_piece_has_a_longest_length():
    """float16 has room for 1,262 tokens if powers count from the middle."""
    model = build(position_embedding_type="xpos", sliding_window=None).half()
    model.set_attn_implementation("sdpa")
    ids = torch.randint(0, 50, (1, 1300))
    with pytest.raises(ValueError, match="up to 1262 tokens in torch.float16.*use 'banded'"):
        model(ids)
    assert model(ids[:, :1262]).logits.isfinite().all()
    model.set_attn_implementation("banded")
    assert model(ids).logits.isfinite().all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"position_embedding_type": "rotary"}, "one of 'rope', 'alibi'"),
        ({"position_embedding_type": ["rope"]}, "one entry for each of 2 layers, got 1"),
        ({"position_embedding_type": ["rope", "x"]}, "one of 'rope', 'alibi'"),
        ({"alibi_bias_max": 16}, "alibi_bias_max is about layers of .*'alibi', got 16"),
        ({"relative_attention_num_buckets": 8}, "about layers of .*'t5'"),
        ({"position_embedding_type": "alibi", "alibi_bias_max": 0}, "above 0, got 0"),
        (
            {"position_embedding_type": "t5", "relative_attention_max_distance": 16},
            "above half of relative_attention_num_buckets, 16, got 16",
        ),
        (
            {"position_embedding_type": "alibi", "rope_parameters": {"rope_theta": 5.0}},
            "rope_parameters are about layers .*leave them out",
        ),
        (
            {
                "position_embedding_type": "xpos",
                "rope_parameters": {"rope_type": "linear", "factor": 2.0},
            },
            "'xpos' turns whole heads by a rope_theta and no more",
        ),
        (
            {
                "position_embedding_type": ["xpos", None],
                "rope_parameters": {"partial_rotary_factor": 0.5},
            },
            "'xpos' turns whole heads by a rope_theta and no more",
        ),
        ({"position_embedding_type": "xpos", "xpos_scale_base": 7}, "at least 8, got 7"),
        ({"position_embedding_type": "fire", "fire_init_c": 0.0}, "above 0, got 0.0"),
        ({"attention_scale": 0.0}, "attention_scale is a number above 0"),
    ],
)
def test_refused_in_one_line(fields, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message) as error:
        SlidingWindowConfig(**SIZES | fields)
    assert "\n" not in str(error.value.__cause__)


@pytest.mark.parametrize("kind", ["alibi", ["rope", None], None], ids=str)
def test_a_config_that_is_saved_means_the_same(kind, tmp_path):
    config = SlidingWindowConfig(**SIZES, position_embedding_type=kind)
    assert (config.rope_parameters is not None) == (kind == ["rope", None])
    config.save_pretrained(tmp_path)
    loaded = SlidingWindowConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.position_embedding_type == kind


def test_another_type_for_a_checkpoint(tmp_path):
    build().save_pretrained(tmp_path)
    fields = {"position_embedding_type": "alibi", "rope_parameters": None}
    model = SlidingWindowForCausalLM.from_pretrained(tmp_path, **fields)
    model.save_pretrained(tmp_path / "alibi")
    again = SlidingWindowForCausalLM.from_pretrained(tmp_path / "alibi")
    ids = torch.arange(40)[None]
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert again.model.rotation is None and again.config.rope_parameters is None
