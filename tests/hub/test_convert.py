"""Conversion is exact, takes every file layout, and refuses what would be another model."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import txl_shapes
from fla_models import RECORD, recorded_weights
from rwkv_files import (
    HF_CONFIG,
    authors_shapes,
    fla_shapes,
    hf_name,
    hf_shapes,
    random_weights,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    MistralConfig,
    MistralForCausalLM,
)

from zoo.hub.convert import FORMATS, convert
from zoo.hub.convert.meliad import tensor_names
from zoo.hub.convert.recognise import recognise
from zoo.hub.folder import find_weights
from zoo.models.block_recurrent import BlockRecurrentConfig, BlockRecurrentForCausalLM

ROOT = Path(__file__).resolve().parent.parent.parent
GOLDENS = ROOT / "tests" / "parity" / "goldens"
GOLDEN_OF = {"torchscale-retnet": "retnet-torchscale", "fla-retnet": "retnet-fla"}


@pytest.fixture(params=GOLDEN_OF)
def format(request):
    return request.param


@pytest.fixture
def source(format, tmp_path):
    """A copy of a foreign checkpoint, to rearrange."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(GOLDENS / GOLDEN_OF[format] / name, folder / name)
    return folder


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def replace_weights(folder, tensors):
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def expected(format, source, tmp_path):
    """The converted weights."""
    convert(format, source, tmp_path / "expected")
    return weights_of(tmp_path / "expected")


def assert_same(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, x in tensors.items():
        assert x.dtype == expected[name].dtype and torch.equal(x, expected[name]), name


def test_values_are_kept_exactly(source, expected):
    def values(tensors):
        return sorted(x.double().sum().item() for x in tensors.values())

    constants = ("angle", "decay")
    foreign = {n: x for n, x in weights_of(source).items() if not n.endswith(constants)}
    assert values(foreign) == values(expected)


def shard(folder, ending):
    tensors = list(weights_of(folder).items())
    (folder / "model.safetensors").unlink()
    stem = "model" if ending == ".safetensors" else "pytorch_model"
    weight_map = {}
    for i in range(3):
        name = f"{stem}-{i + 1:05}-of-00003{ending}"
        part = dict(tensors[i::3])
        save_file(part, folder / name) if stem == "model" else torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / f"{stem}{ending}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def as_pickle(name, wrap=lambda tensors: tensors):
    def rearrange(folder):
        torch.save(wrap(weights_of(folder)), folder / name)
        (folder / "model.safetensors").unlink()

    return rearrange


def transpose(x):
    return x.mT.contiguous().mT if x.ndim > 1 else x


LAYOUTS = {
    "sharded safetensors": lambda folder: shard(folder, ".safetensors"),
    "sharded pickles": lambda folder: shard(folder, ".bin"),
    "bin": as_pickle("pytorch_model.bin"),
    "pt of any name": as_pickle("checkpoint_best.pt"),
    "inside of a trainer's file": as_pickle("x.pth", lambda t: {"model": t, "step": 3}),
    "with a trainer's other files": lambda folder: torch.save({"lr": 1}, folder / "optimizer.pt"),
    "transposed in memory": as_pickle("a.bin", lambda t: {n: transpose(x) for n, x in t.items()}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_files(format, source, expected, layout, tmp_path):
    LAYOUTS[layout](source)
    convert(format, source, tmp_path / "ours")
    assert_same(weights_of(tmp_path / "ours"), expected)


def test_a_file_with_its_config_beside_it(format, source, expected, tmp_path):
    shutil.copyfile(source / "model.safetensors", source / "another.safetensors")
    convert(format, source / "another.safetensors", tmp_path / "ours")
    assert_same(weights_of(tmp_path / "ours"), expected)


@pytest.mark.parametrize("format", ["torchscale-retnet"])
@pytest.mark.parametrize("prefix", ["decoder.", "model."])
def test_names_of_fairseq_and_of_the_port(source, format, expected, prefix, tmp_path):
    tensors = {prefix + name: x for name, x in weights_of(source).items()}
    if prefix == "model.":
        tensors["lm_head.weight"] = tensors.pop("model.output_projection.weight")
    else:
        tensors["decoder.version"] = torch.tensor([3.0])
    replace_weights(source, tensors)
    convert(format, source, tmp_path / "ours")
    assert_same(weights_of(tmp_path / "ours"), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_stay(format, source, expected, dtype, tmp_path):
    replace_weights(source, {name: x.to(dtype) for name, x in weights_of(source).items()})
    report = convert(format, source, tmp_path / "ours")
    assert report.dtype == dtype
    assert_same(weights_of(tmp_path / "ours"), {n: x.to(dtype) for n, x in expected.items()})
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "ours").dtype == dtype


def test_mixed_dtypes_become_the_one_that_holds_all(format, source, tmp_path):
    tensors = {name: x.bfloat16() for name, x in weights_of(source).items()}
    for name, x in tensors.items():
        tensors[name] = x.float() if "norm" in name else x
    replace_weights(source, tensors)
    report = convert(format, source, tmp_path / "ours")
    assert report.dtype == torch.float32


def test_tokenizer_and_generation_config_come_along(format, source, tmp_path):
    replace_weights(source, widen(weights_of(source), 260))
    edit_config(source, vocab_size=260)
    AutoTokenizer.from_pretrained(ROOT / "tokenizers" / "byte").save_pretrained(source)
    (source / "generation_config.json").write_text('{"eos_token_id": 258}')
    convert(format, source, tmp_path / "ours")
    assert AutoTokenizer.from_pretrained(tmp_path / "ours")("Hi")["input_ids"] == [72, 105]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert model.generation_config.eos_token_id == 258


def widen(tensors, vocab_size):
    """Embedding and output projection with rows for more tokens."""
    rows = {"embed", "embeddings", "embed_tokens", "output_projection", "lm_head"}
    return {
        name: torch.nn.functional.pad(x, (0, 0, 0, vocab_size - len(x)))
        if rows & set(name.split("."))
        else x
        for name, x in tensors.items()
    }


def test_report_says_what_was_left_out(source, format, tmp_path):
    fields = {"torchscale-retnet": {"drop_path_rate": 0.1}, "fla-retnet": {"use_l2warp": True}}
    edit_config(source, **fields[format], torch_dtype="float32", temperature=0.7)
    report = convert(format, source, tmp_path / "ours")
    (name,) = fields[format]
    assert [note for note in report.notes if f"{name} = {fields[format][name]}" in note]
    assert not [note for note in report.notes if "temperature" in note]
    assert report.num_parameters == sum(x.numel() for x in weights_of(tmp_path / "ours").values())


class RunsCode:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickles_run_no_code(format, source, tmp_path):
    as_pickle("a.bin", lambda t: t | {"x": RunsCode(tmp_path / "ran")})(source)
    with pytest.raises(ValueError, match="holds more than tensors") as error:
        convert(format, source, tmp_path / "ours")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def drop(name):
    return lambda folder: replace_weights(
        folder, {n: x for n, x in weights_of(folder).items() if n != name}
    )


def add(name, x):
    return lambda folder: replace_weights(folder, weights_of(folder) | {name: x})


def config(**fields):
    return lambda folder: edit_config(folder, **fields)


def without_config(folder):
    (folder / "config.json").unlink()


def two_files(folder):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    shutil.copyfile(folder / "a.safetensors", folder / "b.safetensors")


def missing_shard(folder):
    shard(folder, ".safetensors")
    (folder / "model-00002-of-00003.safetensors").unlink()


def shard_elsewhere(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"x": "../other/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def larger_tokenizer(folder):
    AutoTokenizer.from_pretrained(ROOT / "tokenizers" / "byte").save_pretrained(folder)


TS, FLA = GOLDEN_OF
REFUSED = [
    (TS, drop("layers.1.ffn.gate.weight"), "have no layers.1.ffn.gate.weight"),
    (TS, drop("output_projection.weight"), "have no output_projection.weight"),
    (TS, add("layers.0.extra", torch.zeros(2)), "nothing uses layers.0.extra"),
    (TS, add("layers.3.ffn.fc1.weight", torch.zeros(2)), "nothing uses layers.3.ffn.fc1.weight"),
    (
        TS,
        add("embed_tokens.weight", torch.zeros(100, 64)),
        r"\[113, 64\] by the config, \[100, 64\]",
    ),
    (TS, add("layer_norm.weight", torch.ones(64, dtype=torch.int8)), "torch.int8, not a float"),
    (TS, add("retnet_rel_pos.decay", torch.full((4,), -0.1)), "retnet_rel_pos.decay is .*-0.1"),
    (TS, add("retnet_rel_pos.angle", torch.ones(16)), "retnet_rel_pos.angle is"),
    (TS, config(use_lm_decay=True), "retnet_rel_pos.decay is"),
    (TS, config(share_decoder_input_output_embed=True), "the two differ"),
    (TS, config(moe_freq=2), "mixtures of experts"),
    (TS, config(no_output_layer=True), "output projection"),
    (TS, config(activation_fn="tanh"), "activation_fn is one of gelu, relu, swish, got 'tanh'"),
    (TS, config(use_glu=False, subln=False), "a plain MLP without a norm inside"),
    (TS, config(use_glu=False, use_ffn_rms_norm=True), "use_ffn_rms_norm"),
    (TS, config(decoder_retention_heads=5), "num_attention_heads"),
    (TS, config(sparse_rate=0.5), "does not know: sparse_rate = 0.5"),
    (TS, config(decoder_layers="three"), "num_hidden_layers"),
    (
        FLA,
        drop("model.layers.1.attn.g_norm_swish_gate.weight"),
        "have no model.layers.1.attn.g_norm",
    ),
    (FLA, drop("lm_head.weight"), "have no lm_head.weight"),
    (FLA, add("model.layers.0.attn.q_conv1d.weight", torch.zeros(2)), "nothing uses .*q_conv1d"),
    (FLA, config(expand_v=1.0), r"\[64, 64\] by the config, \[128, 64\]"),
    (FLA, config(expand_k=0.33), r"hidden_size \* expand_k is whole"),
    (FLA, config(feature_map="relu"), "a feature map"),
    (FLA, config(use_short_conv=True), "short convolutions"),
    (FLA, config(attn={"layers": [1], "num_heads": 2}), "softmax attention layers"),
    (FLA, config(attnres_block_size=2), "residuals by attention"),
    (FLA, config(use_output_gate=False), "our retention has its gate"),
    (FLA, config(hidden_act="gelu"), "hidden_act is swish in fla's RetNet, got 'gelu'"),
    (FLA, config(hidden_size="64"), "hidden_size = '64', which is not of the right type"),
    (FLA, config(pad_token_id=200), "pad_token_id"),
    (
        FLA,
        config(model_type="gla"),
        "fla-retnet expects model_type 'retnet'.* got model_type 'gla'",
    ),
    (FLA, config(model_type="zoo_retnet"), "already a checkpoint of ours"),
    (FLA, lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "not a readable safetensors"),
    (FLA, lambda f: (f / "model.safetensors").unlink(), "expected weights"),
    (FLA, lambda f: (f / "config.json").write_text("[1]"), "expected a JSON object, got list"),
    (FLA, as_pickle("a.bin", lambda t: t | {"step": 3}), "expected tensors only, but step is"),
    (FLA, without_config, "config.json is missing"),
    (FLA, two_files, r"several weight files \(a.safetensors, b.safetensors\)"),
    (FLA, missing_shard, "00002-of-00003.safetensors is missing"),
    (FLA, shard_elsewhere, "outside of its folder"),
    (FLA, larger_tokenizer, "tokenizer has 259 ids, the model's vocab_size is 97"),
]


@pytest.mark.parametrize(("format", "damage", "message"), REFUSED)
def test_refused_in_one_line(format, source, damage, message, tmp_path):
    damage(source)
    with pytest.raises(ValueError, match=message) as error:
        convert(format, source, tmp_path / "ours")
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


FLA_RWKV = {
    "vocab_size": 19,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "intermediate_size": 64,
    "use_l2warp": True,
}
FLA_CONFIGS = {
    "fla-rwkv6": {
        **FLA_RWKV,
        "model_type": "rwkv6",
        "expand_k": 1.0,
        "proj_low_rank_dim": 4,
        "gate_low_rank_dim": 5,
    },
    "fla-rwkv7": {
        **FLA_RWKV,
        "model_type": "rwkv7",
        "head_dim": 16,
        "decay_low_rank_dim": 5,
        "a_low_rank_dim": 6,
        "v_low_rank_dim": 7,
        "gate_low_rank_dim": None,  # fla's own rule: it follows from the weights
    },
}


LIGHTNING_CONFIGS = {
    "transnormerllm": {
        "model_type": "transnormer",
        "vocab_size": 19,
        "decoder_embed_dim": 16,
        "hidden_dim": 16,
        "decoder_layers": 2,
        "decoder_attention_heads": 2,
        "glu_dim": 24,
        "linear_use_lrpe_list": [1, 0],
    },
    "hf-minimax": {
        "model_type": "minimax",
        "vocab_size": 19,
        "hidden_size": 16,
        "head_dim": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "num_local_experts": 1,
        "layer_types": ["linear_attention"] * 2,
    },
}


def lightning_shapes(format):
    """The shapes of its tensors by their names there."""
    shapes = {"model.embed_tokens.weight": (19, 16), "lm_head.weight": (19, 16)}
    if format == "hf-minimax":
        shapes["model.norm.weight"] = (16,)
    for layer in range(2):
        here = f"model.layers.{layer}"
        if format == "transnormerllm":
            shapes |= {
                f"{here}.token_mixer.qkvu_proj.weight": (64, 16),
                f"{here}.token_mixer.out_proj.weight": (16, 16),
                f"{here}.channel_mixer.l1.weight": (24, 16),
                f"{here}.channel_mixer.l2.weight": (24, 16),
                f"{here}.channel_mixer.l3.weight": (16, 24),
            }
        else:
            shapes |= {
                f"{here}.self_attn.qkv_proj.weight": (48, 16),
                f"{here}.self_attn.output_gate.weight": (16, 16),
                f"{here}.self_attn.out_proj.weight": (16, 16),
                f"{here}.self_attn.norm.weight": (16,),
                f"{here}.input_layernorm.weight": (16,),
                f"{here}.post_attention_layernorm.weight": (16,),
                f"{here}.block_sparse_moe.gate.weight": (1, 16),
                f"{here}.block_sparse_moe.experts.0.w1.weight": (24, 16),
                f"{here}.block_sparse_moe.experts.0.w2.weight": (16, 24),
                f"{here}.block_sparse_moe.experts.0.w3.weight": (24, 16),
            }
    if format == "transnormerllm":
        shapes["model.layers.0.token_mixer.lrpe.theta"] = (2, 1, 8)
    return shapes


CONSOLIDATED = {
    "dim": 16,
    "n_layers": 2,
    "head_dim": 8,
    "hidden_dim": 24,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "sliding_window": 8,
    "vocab_size": 19,
}


def consolidated_shapes():
    """The shapes of Mistral's own tensors by their names."""
    parts = {"attention.wq": (32, 16), "attention.wk": (16, 16), "attention.wv": (16, 16)}
    parts |= {"attention.wo": (16, 32), "attention_norm": (16,), "ffn_norm": (16,)}
    parts |= {f"feed_forward.w{i}": (16, 24) if i == 2 else (24, 16) for i in (1, 2, 3)}
    shapes = {f"layers.{i}.{part}": shape for i in range(2) for part, shape in parts.items()}
    shapes |= {"tok_embeddings": (19, 16), "norm": (16,), "output": (19, 16)}
    return {f"{name}.weight": shape for name, shape in shapes.items()}


INFINI_CONFIGS = {
    "infini-beomi": {
        "model_type": "llama",
        "vocab_size": 19,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "rms_norm_eps": 1e-6,
    },
    "infini-lucidrains": {"num_tokens": 19, "dim": 16, "depth": 2, "heads": 4, "dim_head": 4},
}
INFINI_CONFIGS["longllama"] = INFINI_CONFIGS["infini-beomi"] | {
    "model_type": "longllama",
    "mem_layers": [1],
}
INFINI_CONFIGS["landmark-llama"] = INFINI_CONFIGS["infini-beomi"] | {
    "model_type": "llama_with_landmark",
    "mem_freq": 5,
    "mem_id": 18,
}
LANDMARK_GPT = {"vocab_size": 19, "n_embd": 16, "n_head": 4, "n_layer": 2, "mem_freq": 5}


def landmark_shapes():
    """The shapes of lm_benchmark's tensors by their names."""
    parts = {"attn.c_attn": (48, 16), "attn.c_proj": (16, 16), "mlp.c_fc": (64, 16)}
    parts |= {"mlp.c_proj": (16, 64), "ln_1": (16,), "ln_2": (16,)}
    shapes = {f"h.{layer}.{part}": shape for layer in range(2) for part, shape in parts.items()}
    shapes |= {"wte": (19, 16), "ln_f": (16,)}
    return {f"transformer.{name}.weight": shape for name, shape in shapes.items()}


def infini_shapes(format):
    """The shapes of their tensors by their names."""
    shapes = {}
    for layer in range(2):
        if format != "infini-lucidrains":
            here = f"model.layers.{layer}"
            parts = dict.fromkeys("qkvo", (16, 16))
            shapes |= {f"{here}.self_attn.{x}_proj.weight": shape for x, shape in parts.items()}
            if format == "infini-beomi":
                shapes |= {f"{here}.self_attn.gate": (1, 4, 1, 1)}
            shapes |= {f"{here}.mlp.{x}_proj.weight": (24, 16) for x in ("gate", "up")}
            shapes |= {f"{here}.mlp.down_proj.weight": (16, 24)}
            norms = ("input_layernorm", "post_attention_layernorm")
            shapes |= {f"{here}.{norm}.weight": (16,) for norm in norms}
        else:
            here, size = f"layers.{layer}", 42
            shapes |= {f"{here}.{x}.norm.gamma": (16,) for x in (0, 1)}
            shapes |= {f"{here}.0.to_qkv.weight": (48, 16), f"{here}.0.to_out.weight": (16, 16)}
            shapes |= {f"{here}.0.fastweight_mem.head_gates": (4,)}
            shapes |= {f"{here}.1.proj_in.weight": (2 * size, 16)}
            shapes |= {f"{here}.1.proj_in.bias": (2 * size,), f"{here}.1.proj_out.bias": (16,)}
            shapes |= {f"{here}.1.proj_out.weight": (16, size)}
    if format != "infini-lucidrains":
        names = ("model.embed_tokens", "lm_head")
        return shapes | {f"{n}.weight": (19, 16) for n in names} | {"model.norm.weight": (16,)}
    shapes |= {"token_emb.weight": (19, 16), "to_logits.weight": (19, 16), "to_logits.bias": (19,)}
    return shapes | {"norm.gamma": (16,)}


LONGNET_CONFIG = {
    "vocab_size": 19,
    "decoder_embed_dim": 16,
    "decoder_ffn_embed_dim": 24,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "segment_length": [4, 8],
    "dilated_ratio": [1, 2],
}


def longnet_shapes():
    """The shapes of torchscale's tensors by their names."""
    modules = {f"self_attn.{x}_proj": (16, 16) for x in ("q", "k", "v", "out")}
    modules |= {"self_attn.inner_attn_ln": (16,), "ffn.ffn_layernorm": (24,)}
    modules |= {"self_attn_layer_norm": (16,), "final_layer_norm": (16,)}
    modules |= {"ffn.fc1": (24, 16), "ffn.fc2": (16, 24)}
    modules = {f"layers.{i}.{name}": shape for i in range(2) for name, shape in modules.items()}
    modules["layer_norm"] = (16,)
    shapes = {f"{name}.weight": shape for name, shape in modules.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in modules.items()}
    rows = {"embed_tokens": 19, "output_projection": 19, "embed_positions": 34}
    return shapes | {f"{name}.weight": (count, 16) for name, count in rows.items()}


OF_TRANSFORMERS = {
    "hf-mpt": {"d_model": 16, "n_layers": 2, "n_heads": 4},
    "hf-falcon": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "alibi": True,
        "parallel_attn": False,
    },
    "hf-bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 4},
    "hf-smollm3": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "pad_token_id": None,
    },
}


def make_source(format, folder):
    """A small checkpoint of any format."""
    folder.mkdir()
    if format in LIGHTNING_CONFIGS:
        (folder / "config.json").write_text(json.dumps(LIGHTNING_CONFIGS[format]))
        save_file(random_weights(lightning_shapes(format)), folder / "model.safetensors")
    elif format in INFINI_CONFIGS:
        (folder / "config.json").write_text(json.dumps(INFINI_CONFIGS[format]))
        save_file(random_weights(infini_shapes(format)), folder / "model.safetensors")
    elif format in txl_shapes.CONFIGS:
        (folder / "config.json").write_text(json.dumps(txl_shapes.CONFIGS[format]))
        save_file(random_weights(txl_shapes.shapes(format)), folder / "model.safetensors")
    elif format == "landmark-gpt":
        (folder / "config.json").write_text(json.dumps(LANDMARK_GPT | {"landmark_id": 18}))
        save_file(random_weights(landmark_shapes()), folder / "model.safetensors")
    elif format == "torchscale-longnet":
        (folder / "config.json").write_text(json.dumps(LONGNET_CONFIG))
        save_file(random_weights(longnet_shapes()), folder / "model.safetensors")
    elif format == "rwkv6-hf":
        weights = {hf_name(name): x for name, x in random_weights(hf_shapes()).items()}
        (folder / "config.json").write_text(json.dumps(HF_CONFIG))
        save_file(weights, folder / "model.safetensors")
    elif format == "fla-gated-deltanet":
        record = json.loads(RECORD.read_text())["models"]["gated-deltanet"]
        fields = record["fields"] | {"model_type": "gated_deltanet"}
        (folder / "config.json").write_text(json.dumps(fields))
        save_file(recorded_weights("gated-deltanet"), folder / "model.safetensors")
    elif format in FLA_CONFIGS:
        ranks = (4, 5) if format == "fla-rwkv6" else (5, 6, 7, 8)
        shapes = fla_shapes(format[-1], 32, 2, 32, 32, 64, 2, 19, ranks, True, False)
        (folder / "config.json").write_text(json.dumps(FLA_CONFIGS[format]))
        save_file(random_weights(shapes), folder / "model.safetensors")
    elif format.startswith("rwkv-pth"):
        version = format.removeprefix("rwkv-pth").strip() or "7"
        save_file(random_weights(authors_shapes(version)), folder / "model.safetensors")
    elif format == "meliad":
        sizes = {"vocab_size": 19, "hidden_size": 16, "intermediate_size": 24}
        sizes |= {"num_hidden_layers": 3, "num_attention_heads": 2}
        model = BlockRecurrentForCausalLM(BlockRecurrentConfig(**sizes, num_states=3))
        ours = model.state_dict()
        tensors = {
            theirs: (ours[name].mT if is_kernel else ours[name]).contiguous()
            for name, theirs, is_kernel in tensor_names(model.config)
        }
        (folder / "config.json").write_text('{"window_length": 5}')
        save_file(tensors, folder / "model.safetensors")
    elif format == "hf-mistral":
        sizes = {"vocab_size": 19, "hidden_size": 16, "intermediate_size": 24}
        sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        MistralForCausalLM(MistralConfig(**sizes)).save_pretrained(folder)
    elif format in OF_TRANSFORMERS:
        fields = OF_TRANSFORMERS[format] | {"vocab_size": 19}
        config = AutoConfig.for_model(format.removeprefix("hf-"), **fields)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    elif format == "mistral-consolidated":
        (folder / "params.json").write_text(json.dumps(CONSOLIDATED))
        save_file(random_weights(consolidated_shapes()), folder / "consolidated.safetensors")
    else:
        golden = GOLDENS / {**GOLDEN_OF, "hf-rwkv": "rwkv4-hf"}.get(format, format)
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(golden / name, folder / name)
    return folder


def prepared(**others):
    """As the rwkv package writes for itself."""
    others = {"_strategy": "cpu fp32", "_version": "0.7", "_rescale_layer": 0} | others
    return as_pickle("a.pth", lambda tensors: tensors | others)


def cut(name, *index):
    return lambda folder: add(name, weights_of(folder)[name][index].contiguous())(folder)


PTH, HF, FLA6, FLA7 = "rwkv-pth", "hf-rwkv", "fla-rwkv6", "fla-rwkv7"
REFUSED_RWKV = [
    (PTH, drop("blocks.1.att.g2"), "have no blocks.1.att.g2"),
    (PTH, drop("blocks.2.att.v0"), "have no blocks.2.att.v0"),
    (PTH, drop("blocks.0.ln0.weight"), "have no blocks.0.ln0.weight"),
    (PTH, drop("blocks.0.att.w1"), "have no blocks.0.att.w1"),
    (PTH, drop("blocks.1.att.x_w"), "have no blocks.1.att.x_w"),
    (PTH, drop("emb.weight"), "rwkv-pth expects the authors' names"),
    (PTH, add("blocks.0.att.extra", torch.zeros(2)), "nothing uses blocks.0.att.extra"),
    (PTH, add("blocks.7.ln1.weight", torch.zeros(2)), "have no blocks.3.att.receptance.weight"),
    (PTH, add("blocks.0.ffn.s_emb.weight", torch.zeros(2)), "DeepEmbed"),
    (PTH, cut("blocks.1.att.k_k", ..., slice(5)), r"mixer.k_k is \[48\] by .*, \[5\] in the file"),
    (PTH, cut("blocks.1.att.x_w", ..., slice(5)), "x_w of shape .*1, 1, 5.* does not fit"),
    (PTH, cut("emb.weight", 0), r"emb.weight has 2 dimensions, got \[48\]"),
    (PTH, prepared(), "known is '0.7' of RWKV 4, 5 and 6"),
    (PTH, as_pickle("a.pth", lambda t: t | {"steps": 3}), "tensors only, but steps is"),
    ("rwkv-pth 6", prepared(_version="0.6"), "in its format '0.6'"),
    ("rwkv-pth 6", add("blocks.0.att.time_state", torch.zeros(2)), "tuned initial states"),
    ("rwkv-pth 6", drop("blocks.0.att.time_maa_w2"), "have no blocks.0.att.time_maa_w2"),
    ("rwkv-pth 6", drop("blocks.0.att.gate.weight"), "have no blocks.0.att.gate.weight"),
    (
        "rwkv-pth 5.2",
        add("blocks.0.att.key.weight_mx", torch.zeros(2)),
        "rounded to 8 bits; convert the original",
    ),
    ("rwkv-pth 5.2", cut("blocks.1.att.time_decay", slice(2)), "does not fit"),
    ("rwkv-pth 5.1", drop("blocks.2.att.time_faaaa"), "have no blocks.2.att.time_f"),
    ("rwkv-pth 4", add("blocks.0.tiny_q.weight", torch.zeros(2)), "tiny attention"),
    ("rwkv-pth 4", add("emb.weight", torch.zeros(67, 48).byte()), "torch.uint8, not a float"),
    (HF, config(layer_norm_epsilon=1e-6), "layer_norm_epsilon = 1e-06"),
    (HF, config(sparse_rate=0.5), "does not know: sparse_rate = 0.5"),
    (HF, config(rescale_every="six"), "rescale_every = 'six', which is not of the right type"),
    (HF, config(tie_word_embeddings=True), "the two differ"),
    (HF, config(num_hidden_layers=2), "nothing uses rwkv.blocks.2"),
    (HF, drop("rwkv.ln_out.bias"), "have no rwkv.ln_out.bias"),
    (HF, cut("rwkv.blocks.0.attention.key.weight", slice(9)), r"\[9, 64\] in the file"),
    (FLA6, config(attn={"layers": [1], "num_heads": 2}), "softmax attention layers"),
    (FLA6, config(hidden_act="relu"), "hidden_act is sqrelu"),
    (FLA6, config(norm_bias=False), "our norms have a bias"),
    (FLA6, config(expand_k=0.33), r"hidden_size \* expand_k is whole"),
    (FLA6, config(expand_k=0.5), "does not fit|by the config"),
    (FLA6, config(gate_fn="sigmoid"), "does not know: gate_fn"),
    (FLA6, config(norm_first=False), "nothing uses model.layers.0.pre_norm"),
    (FLA6, cut("model.layers.0.attn.x_proj.2.weight", slice(None), slice(9)), "does not fit"),
    (FLA6, drop("model.layers.1.attn.x_bias"), "have no model.layers.1.attn.x_bias"),
    (FLA7, config(value_dim=[32, 64]), "the same in every layer of ours"),
    (FLA7, config(head_dim=None, num_heads=None), "says how hidden_size = 32 divides"),
    (FLA7, config(num_hidden_layers="2"), "num_hidden_layers = '2', which is not of"),
    (FLA7, config(v_low_rank_dim=9), r"residual.a is \[32, 9\] by the config, \[32, 7\]"),
    (FLA7, drop("model.layers.1.attn.x_a"), "have no model.layers.1.attn.x_a"),
]


MELIAD = "meliad"
KVQ = "transformer0/tbase/_kvq"
CELL = "transformer0/recurrent_tbase"
REFUSED_MELIAD = [
    (MELIAD, drop(f"{KVQ}/values_layer/kernel"), f"have no {KVQ}/values_layer/kernel"),
    (MELIAD, drop(f"{KVQ}/keys_layer/kernel"), f"have no {KVQ}/keys_layer/kernel; they are flax's"),
    (MELIAD, drop("embed/embedding"), "have no embed/embedding, which this format needs"),
    (MELIAD, drop(f"{CELL}/post_attn_mlp/gate_bias"), "a gate of .* is one of .*have 0 of them"),
    (MELIAD, add("transformer0/external_memory_bias", torch.zeros(2)), "has no database_size"),
    (MELIAD, cut("transformer1/tbase/ffn/hidden0/kernel", ..., slice(5)), r"\[5, 16\] in the file"),
    (
        MELIAD,
        lambda f: (f / "config.json").write_text("{}"),
        "expects a config.json with window_length",
    ),
    (MELIAD, without_config, "config.json is missing"),
]


@pytest.mark.parametrize(("format", "damage", "message"), REFUSED_RWKV + REFUSED_MELIAD)
def test_others_refused_in_one_line(format, damage, message, tmp_path):
    source = make_source(format, tmp_path / "source")
    damage(source)
    with pytest.raises(ValueError, match=message) as error:
        convert(format.split()[0], source, tmp_path / "ours")
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("format", FORMATS)
def test_the_right_format_is_named(format, tmp_path):
    source = make_source(format, tmp_path / "source")
    assert recognise(source) == format
    assert recognise(find_weights(source)[0]) == format
    convert(format, source, tmp_path / "ours")
    for other in FORMATS.keys() - {format}:
        with pytest.raises(ValueError, match=f"{other} expects .*this looks like {format}"):
            convert(other, source, tmp_path / "another")
    for every in FORMATS:
        with pytest.raises(ValueError, match="expects .* this is already a checkpoint of ours"):
            convert(every, tmp_path / "ours", tmp_path / "another")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours", "source"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("format", ["rwkv-pth", "hf-rwkv", "hf-bloom"])
def test_layouts_of_other_files(format, layout, tmp_path):
    source = make_source(format, tmp_path / "source")
    convert(format, source, tmp_path / "expected")
    LAYOUTS[layout](source)
    convert(format, source, tmp_path / "ours")
    assert_same(weights_of(tmp_path / "ours"), weights_of(tmp_path / "expected"))


def test_fla_asks_head_dim_before_num_heads(tmp_path):
    # As its layer does: released configs have a num_heads of another model.
    source = make_source("fla-rwkv7", tmp_path / "source")
    edit_config(source, num_heads=32)
    convert("fla-rwkv7", source, tmp_path / "ours")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert model.config.num_attention_heads == 2


def test_rwkv_report_says_what_was_left_out(tmp_path):
    left_out = {
        "rwkv-pth": "blocks.0.att.v0",
        "hf-rwkv": "context_length = 1024",
        "fla-rwkv6": "trained with 0.00064",
        "fla-rwkv7": "use_l2warp = True",
    }
    for format, note in left_out.items():
        source = make_source(format, tmp_path / format)
        notes = convert(format, source, tmp_path / f"{format} ours").notes
        assert any(note in line for line in notes), notes


UNRECOGNISED = {
    "ours": (
        lambda folder: config(model_type="zoo_rwkv7")(folder),
        "is already a checkpoint of ours; there is nothing to convert",
    ),
    "another model's": (
        lambda folder: config(model_type="gpt2")(folder),
        "of no format that zoo knows: .* has model_type 'gpt2', and its tensors are head.weight, "
        r"rwkv.blocks.0.attention.key.weight, .* and 57 more",
    ),
    "two": (
        lambda folder: (folder / "params.json").write_text(json.dumps(CONSOLIDATED)),
        "may be hf-rwkv or mistral-consolidated; name the format that you mean",
    ),
    "damaged": (
        lambda folder: (
            config(model_type="gpt2")(folder),
            (folder / "model.safetensors").write_bytes(b"..."),
        ),
        "is not a readable safetensors file",
    ),
    "none": (shutil.rmtree, "no such folder or file"),
}


@pytest.mark.parametrize("kind", UNRECOGNISED)
def test_what_is_of_no_one_format_is_said_in_a_line(kind, tmp_path):
    source = make_source("hf-rwkv", tmp_path / "source")
    change, message = UNRECOGNISED[kind]
    change(source)
    with pytest.raises(ValueError, match=message) as error:
        recognise(source)
    assert "\n" not in str(error.value)


def test_unknown_format_names_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="did you mean fla-retnet"):
        convert("fla-retent", tmp_path, tmp_path / "ours")
    with pytest.raises(ValueError, match=", ".join(FORMATS)):
        convert("gguf", tmp_path, tmp_path / "ours")
