"""MPT, BLOOM, Falcon and SmolLM3 against transformers: converted, equal, and back again."""

import functools
import json
import shutil

import pytest
import torch
from goldens import golden_folder, golden_tensors
from huggingface_hub.errors import StrictDataclassClassValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.bloom.modeling_bloom import bloom_gelu_forward
from transformers.models.falcon.modeling_falcon import build_alibi_tensor
from transformers.models.mpt import modeling_mpt
from ways import gradients, worst

from zoo import SlidingWindowConfig
from zoo.hub.convert import FORMATS, convert, convert_back
from zoo.hub.convert.format import Fields, Weights
from zoo.layers.mlp import activation
from zoo.layers.position_bias import RoundedAlibiBias

GOLDENS = {
    "alibi-mpt-hf": ("hf-mpt", None),
    "alibi-bloom-hf": ("hf-bloom", None),
    "alibi-falcon-hf": ("hf-falcon", None),
    "nope-smollm3-hf every_second": ("hf-smollm3", "every_second"),
    "nope-smollm3-hf none": ("hf-smollm3", "none"),
}
# Of each format: sizes under transformers' names, and what else may be set there.
SIZES = {"vocab_size": 71, "initializer_range": 0.1}
WIDE = {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 2}
FALCON = SIZES | WIDE | {"alibi": True, "parallel_attn": False, "multi_query": False, "bias": True}
MPT = SIZES | {"d_model": 48, "n_heads": 6, "n_layers": 2, "max_seq_len": 64}
SMOLLM3 = {"intermediate_size": 56, "num_key_value_heads": 2, "no_rope_layers": [1, 0, 1]}
SMOLLM3 |= SIZES | WIDE | {"num_hidden_layers": 3, "pad_token_id": None}
OFFICIAL = {
    "mpt": ("hf-mpt", MPT),
    "mpt, others": (
        "hf-mpt",
        MPT
        | {"attn_config": {"clip_qkv": 0.4, "softmax_scale": 0.7}, "tie_word_embeddings": False},
    ),
    "bloom": ("hf-bloom", SIZES | {"hidden_size": 48, "n_head": 6, "n_layer": 2}),
    "bloom, untied": (
        "hf-bloom",
        SIZES | {"hidden_size": 64, "n_head": 8, "n_layer": 1, "tie_word_embeddings": False},
    ),
    "falcon": ("hf-falcon", FALCON),
    "falcon, others": (
        "hf-falcon",
        FALCON
        | {"multi_query": True, "bias": False, "ffn_hidden_size": 80, "activation": "gelu_new"}
        | {"tie_word_embeddings": False},
    ),
    "smollm3": ("hf-smollm3", SMOLLM3),
    "smollm3, biases": (
        "hf-smollm3",
        SMOLLM3 | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    ),
    "smollm3, every fourth": (
        "hf-smollm3",
        SMOLLM3 | {"no_rope_layers": None, "num_hidden_layers": 4},
    ),
    "smollm3, window": (
        "hf-smollm3",
        SMOLLM3
        | {"use_sliding_window": True, "sliding_window": 7}
        | {"layer_types": ["sliding_attention"] * 3},
    ),
    "smollm3, no positions": ("hf-smollm3", SMOLLM3 | {"no_rope_layers": [0, 0, 0]}),
}


def model_type(format):
    return format.removeprefix("hf-")


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """(golden, dtype) -> its model, converted."""
    folder = tmp_path_factory.mktemp("converted")

    @functools.cache
    def ready(name):
        format, case = GOLDENS[name]
        source = golden_folder(name.split()[0])
        if case is not None:
            source = shutil.copytree(source, folder / f"{name} theirs")
            (source / "config.json").chmod(0o644)
            fields = json.loads((source / "config.json").read_text())
            fields["no_rope_layers"] = fields.pop("cases")[case]
            source.chmod(0o755)
            (source / "config.json").write_text(json.dumps(fields))
        convert(format, source, folder / name)
        return folder / name

    return lambda name, dtype: AutoModelForCausalLM.from_pretrained(ready(name), dtype=dtype).eval()


def of_golden(name, key):
    """The name of one of its tensors."""
    case = GOLDENS[name][1]
    return key if case is None else f"{key}.{case}"


@torch.no_grad()
def run(model, ids, sizes=None, **inputs):
    """Logits [B, T, vocab] of a text in pieces of these sizes."""
    cache, logits = None, []
    for piece in ids.split(sizes or ids.shape[1], dim=1):
        output = model(piece, past_key_values=cache, use_cache=True, **inputs)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("sizes", [None, 1, [37, 1, 5]], ids=["whole", "steps", "chunks"])
@pytest.mark.parametrize("name", GOLDENS)
def test_logits(load, name, sizes):
    golden = golden_tensors(name.split()[0])
    ids, expected = golden["input_ids"], golden[of_golden(name, "logits_f64")]
    if isinstance(sizes, list):
        sizes = [*sizes, ids.shape[1] - sum(sizes)]
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        model = load(name, dtype)
        assert worst(run(model, ids, sizes), expected, dtype == torch.float32) < bound


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", GOLDENS)
def test_other_implementations(load, name, implementation):
    golden = golden_tensors(name.split()[0])
    model = load(name, torch.float64)
    model.set_attn_implementation(implementation)
    expected = golden[of_golden(name, "logits_f64")]
    for sizes in (None, [60, *[1] * (golden["input_ids"].shape[1] - 60)]):
        assert worst(run(model, golden["input_ids"], sizes), expected) < 1e-9


@pytest.mark.parametrize("name", [name for name in GOLDENS if name.startswith("alibi")])
def test_left_padding(load, name):
    golden = golden_tensors(name)
    mask = golden["attention_mask"]
    logits = run(load(name, torch.float64), golden["input_ids"], attention_mask=mask)
    visible = mask.bool()
    assert worst(logits[visible], golden["leftpad_logits_f64"][visible]) < 1e-9


@pytest.mark.parametrize("name", GOLDENS)
def test_loss_and_gradients_are_the_official_ones(load, name):
    folder = name.split()[0]
    golden, official = golden_tensors(folder), golden_tensors(folder, "grads")
    model, ids = load(name, torch.float64), golden["input_ids"]
    loss = torch.nn.functional.cross_entropy(
        run(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    )
    assert worst(loss, golden[of_golden(name, "loss_f64")]) < 1e-9
    if name.endswith("none"):
        return  # there are gradients of the other case alone
    format = GOLDENS[name][0]
    # Under their names, where q, k and v are one: the gradient of k's bias alone is zero.
    ours = dict(FORMATS[format].write_weights(Weights(gradients(model, ids)), model.config))
    assert ours.keys() == official.keys()
    found = {n: worst(g, official[n], True) for n, g in ours.items()}
    # The official ones are stored in float32.
    assert all(x < 1e-5 for x in found.values()), found


def official_model(folder, name, dtype=torch.float32, **more):
    """transformers' model with random weights large enough to matter; saved in a folder."""
    format, fields = OFFICIAL[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(format.removeprefix("hf-"), **fields | more)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for x in model.parameters():
            x += 0.2 * torch.randn_like(x)
    model.save_pretrained(folder)
    return model


def converted(tmp_path, name, **more):
    """transformers' model, the report and ours."""
    official = official_model(tmp_path / "theirs", name, **more)
    report = convert(OFFICIAL[name][0], tmp_path / "theirs", tmp_path / "ours")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=official.dtype)
    return official, report, model.eval()


def random_ids(*shape):
    return torch.randint(71, shape, generator=torch.Generator().manual_seed(1))


def padded_on_the_left(ids, count=9):
    """(ids, mask) with that much padding before the last row."""
    mask = torch.ones_like(ids)
    mask[-1, :count] = 0
    return ids, mask


@pytest.mark.parametrize("name", OFFICIAL)
def test_random_models_and_the_way_back(name, tmp_path):
    official, report, model = converted(tmp_path, name)
    assert not report.is_rounded
    ids, mask = padded_on_the_left(random_ids(3, 50))
    expected = run(official, ids, attention_mask=mask)
    assert worst(run(model, ids), run(official, ids), True) < 1e-5
    found = run(model, ids, attention_mask=mask)
    visible = mask.bool()
    assert worst(found[visible], expected[visible], True) < 1e-5
    assert worst(run(model, ids, 1), run(official, ids, 1), True) < 1e-5
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    options |= {"pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **options), official.generate(ids, **options))
    convert_back(OFFICIAL[name][0], tmp_path / "ours", tmp_path / "back")
    theirs, back = (load_file(tmp_path / n / "model.safetensors") for n in ("theirs", "back"))
    assert theirs.keys() == back.keys() and all(torch.equal(x, back[n]) for n, x in theirs.items())
    configs = [AutoConfig.from_pretrained(tmp_path / n).to_dict() for n in ("theirs", "back")]
    for config in configs:
        del config["transformers_version"], config["_name_or_path"]
        config.pop("head_dim", None)  # said, where it follows
        config.get("attn_config", {}).pop("dtype", None)
        if "no positions" in name:
            del config["rope_parameters"]
    assert configs[0] == configs[1]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert torch.equal(run(again, ids), run(official, ids))


def test_mpt_obeys_its_largest_bias(tmp_path, monkeypatch):
    """As MosaicML's code; transformers' own passes it over, but computes it when told."""
    fields = {"attn_config": {"alibi_bias_max": 16}}
    official, report, model = converted(tmp_path, "mpt", **fields)
    assert [note for note in report.notes if "transformers' own class ignores it" in note]
    ids = random_ids(2, 40)
    assert worst(run(model, ids), run(official, ids), True) > 1e-2
    build = functools.partial(modeling_mpt.build_mpt_alibi_tensor, alibi_bias_max=16)
    monkeypatch.setattr(
        official.transformer,
        "build_mpt_alibi_tensor",
        lambda heads, size, device: build(heads, size),
    )
    assert worst(run(model, ids), run(official, ids), True) < 1e-5
    with pytest.raises(ValueError, match="alibi_bias_max is 16: transformers' model has 8"):
        convert_back("hf-mpt", tmp_path / "ours", tmp_path / "back")


def test_mpt_goes_on_beyond_the_length_it_was_trained_for(tmp_path):
    official, _, model = converted(tmp_path, "mpt", max_seq_len=16)
    longer = official_model(tmp_path / "longer", "mpt", max_seq_len=99)
    assert all(torch.equal(a, b) for a, b in zip(official.parameters(), longer.parameters()))
    ids = random_ids(2, 90)
    assert worst(run(model, ids), run(longer, ids), True) < 1e-5
    assert model.config.max_position_embeddings == 16
    assert "max_seq_len = 16" in convert_back("hf-mpt", tmp_path / "ours", tmp_path / "b").notes[0]


def edit(folder, change):
    path = folder / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def test_another_type_on_loading(tmp_path):
    """A model without RoPE has no rope_parameters to turn by."""
    _, _, model = converted(tmp_path, "bloom")
    load = AutoModelForCausalLM.from_pretrained
    with pytest.raises(StrictDataclassClassValidationError, match="pass them too") as error:
        load(tmp_path / "ours", position_embedding_type="rope")
    assert "\n" not in str(error.value.__cause__ or "")
    rope = {"rope_type": "default", "rope_theta": 500.0}
    other = load(tmp_path / "ours", position_embedding_type="rope", rope_parameters=rope)
    ids = random_ids(1, 9)
    assert worst(run(other.eval(), ids), run(model, ids)) > 1e-3


def test_blooms_activation():
    x = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    assert worst(activation("gelu_bloom")(x), bloom_gelu_forward(x)) < 1e-14
    assert worst(activation("gelu_pytorch_tanh")(x), bloom_gelu_forward(x)) > 1e-10


def test_bloom_of_bigscience(tmp_path):
    """Names without the prefix, and fields of their trainer."""
    official, _, expected = converted(tmp_path, "bloom")
    tensors = load_file(tmp_path / "theirs" / "model.safetensors")
    tensors = {n.removeprefix("transformer."): x for n, x in tensors.items()}
    save_file(tensors, tmp_path / "theirs" / "model.safetensors")
    more = {"n_embed": 48, "num_attention_heads": 6, "n_inner": None, "seq_length": 2048}
    more |= {"offset_alibi": 100, "masked_softmax_fusion": True, "unk_token_id": 0}
    gone = ("hidden_size", "n_head")
    edit(tmp_path / "theirs", lambda v: {n: x for n, x in v.items() if n not in gone} | more)
    notes = convert("hf-bloom", tmp_path / "theirs", tmp_path / "again").notes
    assert [note for note in notes if "offset_alibi = 100" in note]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    ids = random_ids(2, 30)
    assert torch.equal(run(model, ids), run(expected, ids))
    assert model.config.max_position_embeddings == 2048


def test_smollm3_by_old_fields(tmp_path):
    """Of transformers 4, and of SmolLM3-3B itself."""
    official, _, _ = converted(tmp_path, "smollm3, every fourth")

    def older(values):
        del values["rope_parameters"], values["no_rope_layers"], values["layer_types"]
        more = {"rope_theta": 2e6, "rope_scaling": None, "max_window_layers": 28}
        return values | more | {"pretraining_tp": 2, "sliding_window": 5}

    edit(tmp_path / "theirs", older)
    convert("hf-smollm3", tmp_path / "theirs", tmp_path / "again")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert model.config.position_embedding_type == ["rope", "rope", "rope", None]
    ids = random_ids(2, 30)
    assert worst(run(model, ids), run(official, ids), True) < 1e-5


# As on the Hub: those of transformers 4, and of the authors' own trainers and classes.
RELEASED = {
    "mosaicml/mpt-7b-storywriter": (
        "hf-mpt",
        {
            "architectures": ["MPTForCausalLM"],
            "attn_config": {
                "alibi": True,
                "alibi_bias_max": 16,
                "attn_impl": "torch",
                "attn_pdrop": 0,
                "attn_type": "multihead_attention",
                "attn_uses_sequence_id": False,
                "clip_qkv": 6,
                "prefix_lm": False,
                "qk_ln": False,
                "softmax_scale": None,
            },
            "auto_map": {"AutoConfig": "configuration_mpt.MPTConfig"},
            "d_model": 4096,
            "emb_pdrop": 0,
            "embedding_fraction": 1.0,
            "expansion_ratio": 4,
            "init_config": {"name": "kaiming_normal_", "verbose": 0},
            "init_device": "cpu",
            "learned_pos_emb": True,
            "logit_scale": None,
            "max_seq_len": 65536,
            "model_type": "mpt",
            "n_heads": 32,
            "n_layers": 32,
            "no_bias": True,
            "norm_type": "low_precision_layernorm",
            "resid_pdrop": 0,
            "tokenizer_name": "EleutherAI/gpt-neox-20b",
            "torch_dtype": "bfloat16",
            "use_cache": False,
            "verbose": 0,
            "vocab_size": 50432,
        },
        {"clip_qkv": 6, "alibi_bias_max": 16, "intermediate_size": 16384, "head_dim": 128},
    ),
    "bigscience/bloom-560m": (
        "hf-bloom",
        {
            "apply_residual_connection_post_layernorm": False,
            "attention_dropout": 0.0,
            "attention_softmax_in_fp32": True,
            "bias_dropout_fusion": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_dropout": 0.0,
            "initializer_range": 0.02,
            "layer_norm_epsilon": 1e-05,
            "masked_softmax_fusion": True,
            "model_type": "bloom",
            "n_embed": 1024,
            "n_inner": None,
            "n_layer": 24,
            "num_attention_heads": 16,
            "offset_alibi": 100,
            "pad_token_id": 3,
            "pretraining_tp": 1,
            "seq_length": 2048,
            "skip_bias_add": True,
            "skip_bias_add_qkv": False,
            "unk_token_id": 0,
            "use_cache": True,
            "vocab_size": 250880,
        },
        {
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "pad_token_id": 3,
            "num_hidden_layers": 24,
        },
    ),
    "tiiuae/falcon-rw-1b": (
        "hf-falcon",
        {
            "alibi": True,
            "apply_residual_connection_post_layernorm": False,
            "architectures": ["FalconForCausalLM"],
            "attention_dropout": 0.0,
            "bias": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_dropout": 0.0,
            "hidden_size": 2048,
            "initializer_range": 0.02,
            "layer_norm_epsilon": 1e-05,
            "model_type": "falcon",
            "multi_query": False,
            "new_decoder_architecture": False,
            "num_attention_heads": 32,
            "num_hidden_layers": 24,
            "parallel_attn": False,
            "torch_dtype": "bfloat16",
            "vocab_size": 50304,
        },
        {"mlp_bias": True, "num_key_value_heads": 32, "intermediate_size": 8192, "eos_token_id": 2},
    ),
    "HuggingFaceTB/SmolLM3-3B": (
        "hf-smollm3",
        {
            "architectures": ["SmolLM3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "eos_token_id": 128012,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "initializer_range": 0.02,
            "intermediate_size": 11008,
            "layer_types": ["full_attention"] * 36,
            "max_position_embeddings": 65536,
            "max_window_layers": 28,
            "mlp_bias": False,
            "model_type": "smollm3",
            "no_rope_layer_interval": 4,
            "no_rope_layers": [1, 1, 1, 0] * 9,
            "num_attention_heads": 16,
            "num_hidden_layers": 36,
            "num_key_value_heads": 4,
            "pad_token_id": 128004,
            "pretraining_tp": 2,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 5000000.0,
            "sliding_window": None,
            "torch_dtype": "bfloat16",
            "use_cache": False,
            "use_sliding_window": False,
            "vocab_size": 128256,
        },
        {"position_embedding_type": ["rope", "rope", "rope", None] * 9, "eos_token_id": 128012},
    ),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_configs_are_understood(name):
    format, values, expected = RELEASED[name]
    fields = Fields(values)
    config = FORMATS[format].read_config(fields, Weights({}))
    fields.finish()
    assert {field: getattr(config, field) for field in expected} == expected
    if config.alibi_bias_max == 8:
        config_back = AutoConfig.for_model(**FORMATS[format].write_config(config)[0])
        assert config_back.vocab_size == config.vocab_size


def attention(**fields):
    return lambda values: values | {"attn_config": values["attn_config"] | fields}


def of(**fields):
    return lambda values: values | fields


def test_falcon_in_float64_beyond_the_places_that_bfloat16_tells_apart(tmp_path):
    """Whole, padded and in pieces; and its rounding and scale are seen."""
    fields = {"num_hidden_layers": 1, "max_position_embeddings": 64}
    official, report, model = converted(tmp_path, "falcon", dtype=torch.float64, **fields)
    assert official.config._attn_implementation == "sdpa"
    assert [note for note in report.notes if "eager attention adds ALiBi twice" in note]
    ids, mask = padded_on_the_left(random_ids(2, 600), 40)
    expected, visible = run(official, ids, attention_mask=mask), mask.bool()
    assert worst(run(model, ids, attention_mask=mask)[visible], expected[visible]) < 1e-9
    for implementation in ("banded", "eager", "sdpa"):
        model.set_attn_implementation(implementation)
        found = run(model, ids, [300, 1, 290, *[1] * 9])
        assert worst(found, run(official, ids)) < 1e-9
    for other in ({"alibi_rounding": None}, {"alibi_scaled": False}):
        changed = AutoModelForCausalLM.from_pretrained(
            tmp_path / "ours", dtype=official.dtype, **other
        )
        assert worst(run(changed.eval(), ids), run(official, ids)) > 1e-2


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 20, 32, 71, 112])
def test_falcon_slopes(heads):
    config = SlidingWindowConfig(
        hidden_size=8 * heads,
        num_attention_heads=heads,
        position_embedding_type="alibi",
        alibi_rounding="bfloat16",
    )
    mask = torch.ones(1, 3000, dtype=torch.long)
    expected_HS = build_alibi_tensor(mask, heads, torch.float64)[:, 0]
    place, distance_S = torch.tensor([2999]), torch.arange(3000).flip(0)
    bias_SH = RoundedAlibiBias(config).by_query(place, distance_S, torch.float64)[0]
    assert torch.equal(bias_SH.T, expected_HS - expected_HS[:, -1:])


KINDS = ["full_attention", "sliding_attention"]
REFUSED = [
    ("mpt", attention(alibi=False), "alibi = False .* learned positions"),
    ("mpt", attention(qk_ln=True), "qk_ln = True: norms of queries"),
    ("mpt", attention(prefix_lm=True), "looks ahead in a prefix"),
    ("mpt", attention(attn_uses_sequence_id=True), "attn_uses_sequence_id = True: documents"),
    ("mpt", attention(attn_type="multiquery_attention"), "attn_type = 'multiquery_attention'"),
    ("mpt", attention(colour=1), "does not know: colour = 1"),
    ("mpt", of(logit_scale=2.0), "logit_scale = 2.0"),
    ("mpt", of(no_bias=False), "no_bias = False"),
    ("mpt", of(norm_type="rmsnorm"), "norm_type = 'rmsnorm': transformers' MPT has LayerNorms"),
    ("mpt", of(expansion_ratio=3), r"up_proj.weight is \[144, 48\] by the config, \[192, 48\]"),
    ("mpt", of(n_heads=5), "multiple of num_attention_heads"),
    ("mpt", of(attn_config=3), "attn_config = 3, which is not of the right type"),
    (
        "bloom",
        of(apply_residual_connection_post_layernorm=True),
        "residuals that start from a norm",
    ),
    ("bloom", of(n_inner=99), "n_inner = 99"),
    ("bloom", of(hidden_size=42), "by the config|does not fit"),
    ("bloom", of(rotary=True), "does not know: rotary"),
    ("falcon", of(alibi=False), "alibi = False, and so RoPE; .* falcon-rw-1b and falcon-rw-7b"),
    ("falcon", of(parallel_attn=True), "parallel_attn = True, attention and MLP side by side"),
    ("falcon", of(new_decoder_architecture=True), "new_decoder_architecture = True, attention"),
    ("falcon", of(num_kv_heads=2), "num_kv_heads = 2 of 6 heads without multi_query"),
    ("falcon", of(num_ln_in_parallel_attn=2), "num_ln_in_parallel_attn = 2"),
    ("falcon", of(multi_query=True), "query_key_value.weight of shape .* does not fit"),
    ("falcon", of(ffn_hidden_size=99), r"\[99, 48\] by the config"),
    ("smollm3", of(no_rope_layers=[1, 0]), "no_rope_layers of 2 layers, and .*= 3"),
    ("smollm3", of(layer_types=[*KINDS, KINDS[0]], sliding_window=4), "all have the same window"),
    (
        "smollm3",
        of(layer_types=None, sliding_window=4, use_sliding_window=True),
        "all have the same window",
    ),
    ("smollm3", of(rope_parameters={"partial_rotary_factor": 0.5}), "it turns whole heads"),
    ("smollm3", of(attention_bias=True), "the weights have no .*q_proj.bias"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED)
def test_refused_in_one_line(name, change, message, tmp_path):
    official_model(tmp_path / "theirs", name)
    edit(tmp_path / "theirs", change)
    with pytest.raises(ValueError, match=message) as error:
        convert(OFFICIAL[name][0], tmp_path / "theirs", tmp_path / "ours")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


NOT_BACK = [
    ("mpt", {"sliding_window": 9}, "sliding_window is 9: transformers' model has None"),
    ("mpt", {"norm_type": "rms"}, "norm_type is 'rms': transformers' model has 'layer'"),
    ("mpt", {"num_key_value_heads": 3}, "num_key_value_heads is 3: transformers' model has 6"),
    ("mpt", {"learnable_sinks": True}, "learnable_sinks is True: transformers' model has none"),
    ("bloom", {"position_embedding_type": None}, "is None: transformers' model has 'alibi'"),
    ("bloom", {"alibi_bias_max": 16}, "alibi_bias_max is 16: transformers' model has 8"),
    ("bloom", {"hidden_act": "gelu"}, "hidden_act is 'gelu': transformers' model has 'gelu_bloom'"),
    ("bloom", {"attention_scale": 1.0}, "attention_scale is 1.0: transformers' model has none"),
    ("falcon", {"alibi_rounding": None}, "alibi_rounding is None: .* has 'bfloat16' at all times"),
    ("falcon", {"alibi_scaled": False}, "alibi_scaled is False: transformers' model has True"),
    ("falcon", {"mlp_bias": False}, "attention_bias is not mlp_bias"),
    ("falcon", {"num_key_value_heads": 3}, "num_key_value_heads is 3: transformers' Falcon"),
    ("bloom", {"alibi_scaled": True}, "alibi_scaled is True: transformers' model has none"),
    ("smollm3", {"norm_type": "layer"}, "norm_type is 'layer': transformers' model has none"),
    ("smollm3", {"hidden_act": "gelu_bloom"}, "transformers has none of the name"),
    (
        "smollm3",
        {"position_embedding_type": ["rope", "alibi", "rope"]},
        "layers with RoPE and layers without positions",
    ),
]


@pytest.mark.parametrize(("name", "fields", "message"), NOT_BACK)
def test_what_they_cannot_express_does_not_go_back(name, fields, message, tmp_path):
    format = OFFICIAL[name][0]
    official_model(tmp_path / "theirs", name)
    convert(format, tmp_path / "theirs", tmp_path / "ours")
    config = AutoConfig.from_pretrained(tmp_path / "ours", **fields)
    with pytest.raises(ValueError, match=message) as error:
        FORMATS[format].write_config(config)
    assert "\n" not in str(error.value)
