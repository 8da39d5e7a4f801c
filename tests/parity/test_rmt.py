"""Recurrent Memory Transformer and ARMT against their authors' numbers and their definition."""

import json

import pytest
import torch
from goldens import golden_folder, golden_tensors
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from ways import gradients, worst

from zoo.core.state import state_bytes
from zoo.hub.convert import FORMATS, convert
from zoo.hub.convert.format import Weights
from zoo.layers.associative_memory import dpfp
from zoo.models.rmt import RmtConfig, RmtForCausalLM

GOLDENS = ("rmt-hf-gpt2", "armt-hf-gpt2")
SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """(name of a golden, dtype) -> its model, converted."""
    folders = {}

    def load(name, dtype):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("converted") / name
            convert(name, golden_folder(name), folders[name])
        return AutoModelForCausalLM.from_pretrained(folders[name], dtype=dtype).eval()

    return load


@torch.no_grad()
def run(model, ids, sizes, padding=0):
    """Logits and the cache after pieces of these sizes, the first behind so much padding."""
    cache, logits = None, []
    for chunk in ids.split(sizes, dim=1):
        inputs = {}
        if padding and cache is None:
            chunk = torch.nn.functional.pad(chunk, (padding, 0), value=3)
            mask = torch.nn.functional.pad(torch.ones_like(ids[:, : sizes[0]]), (padding, 0))
            inputs["attention_mask"] = mask
        output = model(chunk, past_key_values=cache, use_cache=True, **inputs)
        logits.append(output.logits[:, padding if cache is None else 0 :])
        cache = output.past_key_values
    return torch.cat(logits, dim=1), cache


WAYS = {
    "whole": ([44], 0),
    "chunks": ([1, 7, 17, 3, 16], 0),
    "token by token": ([1] * 44, 0),
    "segment by segment": ([12, 12, 12, 8], 0),
    "left padding": ([44], 5),
    "left padding, then on": ([20] + [1] * 24, 5),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", GOLDENS)
def test_logits_and_memories(load, name, way):
    golden = golden_tensors(name)
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        logits, cache = run(load(name, dtype), golden["input_ids"], *WAYS[way])
        # Sums of A are in the hundreds, and their quotients not bounded.
        is_relative = dtype == torch.float32
        assert worst(logits, golden["logits_f64"], is_relative) < bound
        # The last segment of 8 is not full: what they write after it nobody reads.
        if name.startswith("rmt"):
            memory = cache.layers[0].tensors["memory_BMD"]
            assert worst(memory, golden["memory_after_segment_f64"][2], is_relative) < bound
            continue
        for layer, state in enumerate(cache.layers):
            found = state.tensors["association_BKD"], state.tensors["normalizer_BK"]
            official = golden["W_mem_after_segment_f64"][layer, 0]
            assert worst(found[0], official, is_relative) < bound
            assert worst(found[1], golden["z_after_segment_f64"][layer, 2], is_relative) < bound


@pytest.mark.parametrize("name", GOLDENS)
def test_memories_of_all_segments(load, name):
    golden, cache = golden_tensors(name), None
    model = load(name, torch.float64)
    for segment, chunk in enumerate(golden["input_ids"].split(12, dim=1)):
        with torch.no_grad():
            cache = model(chunk, past_key_values=cache, use_cache=True).past_key_values
        if segment and name.startswith("rmt"):
            memory = cache.layers[0].tensors["memory_BMD"]
            assert worst(memory, golden["memory_after_segment_f64"][segment - 1]) < 1e-9
        elif segment:
            sums = torch.stack([x.tensors["normalizer_BK"] for x in cache.layers])
            assert worst(sums, golden["z_after_segment_f64"][:, segment - 1]) < 1e-9


@pytest.mark.parametrize("name", GOLDENS)
def test_gradients_are_the_official_ones(load, name):
    ids, weights = golden_tensors(name)["input_ids"], Weights(golden_tensors(name, "grads"))
    model = load(name, torch.float64)
    logits = model(ids, use_cache=False).logits
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert abs(loss.item() - golden_tensors(name)["loss_f64"].item()) < 1e-12
    found = gradients(model, ids)
    official = dict(FORMATS[name].read_weights(weights, model.config))
    weights.finish()
    assert official.keys() == found.keys()
    for key, gradient in official.items():  # stored in float32
        if key.endswith("k_proj.bias"):  # which adds the same to all scores: what is left is noise
            assert max(gradient.abs().max(), found[key].abs().max()) < 1e-12
            continue
        assert worst(found[key], gradient, relative=True) < 1e-5, key


@pytest.mark.parametrize("length", [12, 24, 5, 31])
@pytest.mark.parametrize("variant", RmtConfig.variants)
def test_replay_is_plain_backpropagation(variant, length):
    """And the last segment's loss asks the first one for something."""
    torch.manual_seed(0)
    fields = RmtConfig.variants[variant] | {"segment_length": 12}
    model = RmtForCausalLM(RmtConfig(**SIZES | fields)).double().train()
    for p in model.parameters():  # where ARMT begins, its memory is silent
        p.data += 0.1 * torch.randn_like(p)
    embeds = torch.randn(2, 60, 32, dtype=torch.float64, requires_grad=True)
    results = []
    for replayed in (None, length):
        model.zero_grad()
        embeds.grad, model.model.replay_segment_length = None, replayed
        model(inputs_embeds=embeds).logits[:, 48:].square().sum().backward()
        # A bias of keys adds the same to all scores: its gradient is noise.
        own = {k: p.grad for k, p in model.named_parameters() if not k.endswith("k_proj.bias")}
        results.append([embeds.grad, *(x for x in own.values() if x is not None)])
    assert results[0][0][:, :12].abs().amax(-1).min() > 1e-9
    for plain, replayed in zip(*results, strict=True):
        assert worst(replayed, plain, relative=True) < 1e-9


def definition(model, ids):
    """RMT in a few lines, of one text: each segment by itself, with memory around it."""
    config, logits = model.config, []
    memory = model.model.memory.vectors[None]
    for segment in ids.split(config.segment_length, dim=1):
        x = torch.cat([memory, model.model.embed_tokens(segment), memory], dim=1)
        width = x.shape[1]
        cos, sin = model.model.rotation(torch.arange(width)[None])
        for layer in model.model.layers:
            h, mixer = layer.mixer_norm(x), layer.mixer
            q, k, v = mixer.project(h)
            q, k = (
                torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
                for a, b in (y.chunk(2, dim=-1) for y in (q, k))
            )
            k, v = (y.repeat_interleave(q.shape[2] // y.shape[2], dim=2) for y in (k, v))
            scores = torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
            later = torch.ones(width, width, dtype=torch.bool).triu(1)
            weights = scores.masked_fill(later, -torch.inf).softmax(-1)
            mixed = torch.einsum("bhts,bshk->bthk", weights, v).flatten(2)
            x = x + mixer.out_proj(mixed)
            x = x + layer.mlp(layer.mlp_norm(x))
        x, m = model.model.norm(x), config.num_memory_tokens
        memory = x[:, -m:]
        logits.append(model.lm_head(x[:, m:-m]))
    return torch.cat(logits, dim=1)


@torch.no_grad()
def test_llamas_block_with_rope_is_the_definition():
    torch.manual_seed(0)
    config = RmtConfig(**SIZES | RmtConfig.variants["default"], initializer_range=0.3)
    model, ids = RmtForCausalLM(config).double().eval(), torch.randint(0, 40, (1, 53))
    assert worst(model(ids).logits, definition(model, ids)) < 1e-12


def test_features_are_products_of_neighbours():
    b = [2.0, 0.0, 0.0, 3.0]
    expected = [b[i] * b[i - j] for j in (1, 2, 3) for i in range(4)]
    assert dpfp(torch.tensor([2.0, -3.0]), 3).tolist() == expected


@torch.no_grad()
def test_a_full_segment_is_written_by_the_next_token():
    """So that a text of whole segments pays for no memory that nobody reads."""
    torch.manual_seed(0)
    model = RmtForCausalLM(RmtConfig(**SIZES | RmtConfig.variants["default"])).eval()
    ids, counts = torch.randint(0, 40, (2, 33)), []
    model.model.layers[0].mlp.register_forward_hook(
        lambda module, args, y: counts.append(y.shape[1])
    )
    cache = model(ids[:, :16], use_cache=True).past_key_values
    first = cache.layers[0].tensors["memory_BMD"].clone()
    assert counts == [3 + 16] and torch.equal(first[0], model.model.memory.vectors)
    before = state_bytes(cache)
    model(ids[:, 16:17], past_key_values=cache)
    assert counts[1:] == [3, 3 + 1]
    assert (cache.layers[0].tensors["memory_BMD"] - first).abs().min() > 0
    model(ids[:, 17:18], past_key_values=cache)
    assert counts[3:] == [1] and state_bytes(cache) == before == 2 * model.state_size()
    # By formula: keys and values of memory and segment in each layer, and one memory.
    assert model.state_size() == 4 * (2 * 2 * (3 + 16) * 2 * 16 + 3 * 32)


@pytest.mark.slow
@pytest.mark.parametrize("variant", RmtConfig.variants)
@torch.no_grad()
def test_a_compiled_step_goes_over_borders(variant):
    """Of rows that are at different places, and one of them does not take part."""
    torch.manual_seed(0)
    fields = RmtConfig.variants[variant] | {"segment_length": 4}
    model = RmtForCausalLM(RmtConfig(**SIZES | fields)).double().eval()
    for p in model.parameters():
        p += 0.1 * torch.randn_like(p)
    ids, mask = torch.randint(0, 40, (3, 16)), torch.ones(3, 16, dtype=torch.long)
    mask[0, :2] = mask[1, 7:10] = 0
    caches = [
        model(ids[:, :6], attention_mask=mask[:, :6], use_cache=True).past_key_values
        for _ in range(2)
    ]
    torch._dynamo.reset()
    step = torch.compile(model, fullgraph=True, backend="eager")
    for column in range(6, 16):
        inputs = {"input_ids": ids[:, column : column + 1]}
        inputs["attention_mask"] = mask[:, column : column + 1]
        found, expected = (
            f(**inputs, past_key_values=cache).logits
            for f, cache in zip((step, model), caches, strict=True)
        )
        taking_part = mask[:, column].bool()
        assert worst(found[taking_part], expected[taking_part]) < 1e-12, column
    for ours, theirs in zip(*(cache.layers for cache in caches), strict=True):
        for name in ours.tensors.keys() - {"keys_BWHK", "values_BWHV"}:
            assert worst(ours.tensors[name], theirs.tensors[name]) < 1e-12, name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"segment_length": 0}, "segment_length is at least 1, got 0"),
        ({"num_memory_tokens": 0}, "num_memory_tokens is at least 1, got 0"),
        ({"memory_size": 4}, "memory_size is about memory 'associative', got 4 and 'tokens'"),
        ({"dpfp_order": 2}, "dpfp_order is about memory 'associative'"),
        ({"memory": "associative", "memory_size": 0}, "memory_size is at least 1, got 0"),
        ({"norm_bias": True}, "norm_bias is of norm_type 'layer'"),
        ({"num_positions": 9}, "num_positions is of position_embedding_type 'learned', got 9"),
        (
            {"position_embedding_type": "learned", "segment_length": 6, "num_positions": 37},
            "num_positions is at least 38, for a segment of 6 and its memory, got 37",
        ),
        ({"memory_at_table_end": True}, "is of position_embedding_type 'learned' and memory"),
        ({"position_embedding_type": None, "rope_parameters": {"rope_theta": 1e4}}, "leave them"),
    ],
)
def test_configs_that_are_refused(values, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        RmtConfig(**SIZES, **values)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("rmt-hf-gpt2", {"segment_alignment": "right"}, "segments are counted from its start"),
        ("rmt-hf-gpt2", {"scale_attn_by_inverse_layer_idx": True}, "one scale is for all layers"),
        ("rmt-hf-gpt2", {"scale_attn_weights": False}, "divided by the square root"),
        ("rmt-hf-gpt2", {"some_gate": 3}, "fields this converter does not know: some_gate = 3"),
        ("armt-hf-gpt2", {"sliding_window": True}, "keys of the segment before are not passed"),
        ("armt-hf-gpt2", {"use_denom": False}, "divided by the normaliser"),
    ],
)
def test_other_models_are_refused(tmp_path, name, values, message):
    source = golden_folder(name)
    config = json.loads((source / "config.json").read_text()) | values
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        convert(name, tmp_path, tmp_path / "converted")


def test_what_a_whole_run_saved(tmp_path, load):
    """Layers twice, masks as weights, a head, arguments of training: the same model."""
    source, name = golden_folder("armt-hf-gpt2"), "armt-hf-gpt2"
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "gpt2", "n_ctx": 32, "resid_pdrop": 0.1, "k2": 2}
    tensors = load_file(source / "model.safetensors")
    decoder = "memory_cell.model.transformer."
    twice = {
        key.replace(f"{decoder}h", "memory_cell.layers"): x.clone()
        for key, x in tensors.items()
        if key.startswith(f"{decoder}h.")
    }
    tensors[f"{decoder}h.0.layer.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
    tensors["memory_cell.model.lm_head.weight"] = tensors[f"{decoder}wte.weight"].clone()
    save_file(tensors | twice, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    convert(name, tmp_path, tmp_path / "converted")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    for key, x in load(name, torch.float32).state_dict().items():
        assert torch.equal(model.state_dict()[key], x)
