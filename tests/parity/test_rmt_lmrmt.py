"""RMT in Transformer-XL's stack against its authors' numbers, and a definition for what they lack.

The golden has no cache of hidden states (mem_len 0). With one, the definition below is the measure:
it is compared with the golden as well.
"""

import json

import pytest
import torch
from goldens import golden_folder, golden_tensors
from huggingface_hub.errors import StrictDataclassClassValidationError
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, layer_norm, softmax
from transformers import AutoModelForCausalLM
from ways import gradients, worst

from zoo import TransformerXLConfig, TransformerXLForCausalLM
from zoo.core.state import state_bytes
from zoo.hub.convert import FORMATS, convert, convert_back
from zoo.hub.convert.format import Weights
from zoo.hub.convert.recognise import recognise

NAME = "rmt-lmrmt"
SMALL = {
    "vocab_size": 31,
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "head_dim": 6,
    "segment_length": 5,
    "same_length": False,
    "num_memory_tokens": 3,
}
SETTINGS = {
    "no cache": {"mem_len": 0, "untie_r": False},
    "cache, not read by memory": {"mem_len": 4},
    "cache, read by memory": {"mem_len": 4, "read_memory_from_cache": True, "pre_lnorm": True},
    "cache of two segments": {"mem_len": 15, "read_memory_from_cache": True, "clamp_len": 17},
    "one token, near distances alone": {"mem_len": 9, "num_memory_tokens": 1, "clamp_len": 3},
    "clusters": {"mem_len": 4, "cutoffs": [10, 20], "div_val": 2},
}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """dtype -> the golden's model, converted."""
    folder = tmp_path_factory.mktemp("converted") / NAME
    convert(NAME, golden_folder(NAME), folder)
    return lambda dtype: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def build(fields):
    """A small model in float64 whose parameters are all of order one."""
    torch.manual_seed(0)
    model = TransformerXLForCausalLM(TransformerXLConfig(**SMALL | fields)).double().eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            x.add_(0.3 * torch.randn_like(x) * (x.shape[-1] ** -0.5 if "weight" in name else 1))
    return model


def ids_of(*shape):
    return torch.randint(0, SMALL["vocab_size"], shape, generator=torch.Generator().manual_seed(1))


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
    "whole": ([49], 0),
    "chunks": ([1, 7, 17, 3, 20, 1], 0),
    "token by token": ([1] * 49, 0),
    "segment by segment": ([12] * 4 + [1], 0),
    "left padding": ([49], 5),
    "left padding, then on": ([20] + [1] * 29, 5),
}


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_logits_and_losses(load, way):
    """And the memory that the last segment leaves, which the token after it has written."""
    golden = golden_tensors(NAME)
    ids = golden["input_ids"]
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        logits, cache = run(load(dtype), ids, *WAYS[way])
        assert worst(logits[:, :48], golden["logits_f64"]) < bound
        nll = cross_entropy(logits[:, :48].double().mT, ids[:, 1:], reduction="none")
        assert worst(nll, golden["nll_f64"]) < bound
        assert worst(nll.mean(), golden["loss_f64"]) < bound
        memory = cache.layers[0].tensors["memory_BMD"]
        assert worst(memory, golden["memory_after_segment_f64"][3]) < bound


@torch.no_grad()
def test_memories_of_all_segments(load):
    golden, cache, model = golden_tensors(NAME), None, load(torch.float64)
    for segment, chunk in enumerate(golden["input_ids"].split(12, dim=1)):
        cache = model(chunk, past_key_values=cache, use_cache=True).past_key_values
        if segment:
            memory = cache.layers[0].tensors["memory_BMD"]
            assert worst(memory, golden["memory_after_segment_f64"][segment - 1]) < 1e-9


def test_gradients_are_the_official_ones(load):
    """Through all segments; of a whole text and of pieces."""
    golden, weights = golden_tensors(NAME), Weights(golden_tensors(NAME, "grads"))
    ids, model = golden["input_ids"], load(torch.float64)
    official = dict(FORMATS[NAME].read_weights(weights, model.config))
    weights.finish()
    results = []
    for sizes in ([49], [5, 1, 13, 30]):
        model.zero_grad()
        logits = run(model, ids, sizes)[0][:, :48]
        cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        results.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert official.keys() == results[0].keys()
    for key, gradient in official.items():  # stored in float32
        assert worst(results[0][key], gradient, relative=True) < 1e-5, key
        assert worst(results[1][key], results[0][key], relative=True) < 1e-9, key


def definition(model, ids):
    """Logits of one text, its memories and last caches, key by key, from the authors' equations.

    For full segments, and rows of keys that are masked as there: a later segment's memory does not
    exist yet, and a shifted score is looked up where the shift leaves it.
    """
    config, weights = model.config, dict(model.named_parameters(remove_duplicate=False))
    width, heads, size = config.hidden_size, config.num_attention_heads, config.head_dim
    number, length = config.num_memory_tokens, config.segment_length

    def of(name, x):
        bias = weights.get(f"{name}.bias")
        y = x @ weights[f"{name}.weight"].T
        return y if bias is None else y + bias

    def norm(name, x):
        return layer_norm(x, (width,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    def vector(distance):
        if config.clamp_len > 0:
            distance = min(distance, config.clamp_len)
        angles = distance / 10000 ** (torch.arange(0, width, 2).double() / width)
        return torch.cat([angles.sin(), angles.cos()])

    def attend(layer, x, past):
        own = f"{layer}.mixer" if config.untie_r else "model"
        u, t = (weights[f"{own}.query_biases.{name}"] for name in ("content", "position"))
        both = torch.cat([past, x])
        if config.pre_lnorm:
            both = norm(f"{layer}.mixer_norm", both)
        q, k, v = (of(f"{layer}.mixer.{c}_proj", both).view(-1, heads, size) for c in "qkv")
        q, before, keys = q[len(past) :], len(past), len(both)
        r = of(f"{layer}.mixer.r_proj", torch.stack([vector(d) for d in range(keys)]))
        r = r.view(keys, heads, size)
        outputs = []
        for i in range(len(x)):
            is_read, is_write = i < number, i >= number + length
            sees, scores = [], []
            for j in range(keys):
                place, n = j - before, before + i - j
                together = (is_read and 0 <= place < number) or (
                    is_write and place >= number + length
                )
                hidden = place < 0 and (is_read or is_write) and not config.read_memory_from_cache
                if hidden or not (n >= 0 or together):
                    continue
                position = 0
                if n >= 0:
                    position = ((q[i] + t) * r[n]).sum(-1)
                elif n < -1:
                    position = ((q[i + 1] + t) * r[keys + 1 + n]).sum(-1)
                scores.append((((q[i] + u) * k[j]).sum(-1) + position) / size**0.5)
                sees.append(v[j])
            p = softmax(torch.stack(scores), dim=0)
            outputs.append((p[..., None] * torch.stack(sees)).sum(0).flatten())
        return of(f"{layer}.mixer.out_proj", torch.stack(outputs))

    layers = [f"model.layers.{index}" for index in range(config.num_hidden_layers)]
    caches = [ids.new_zeros(0, width).double() for _ in layers]
    memory, logits, memories = weights["model.memory.vectors"], [], []
    embeds = model.model.embed_tokens(ids) * width**0.5
    for text in embeds.split(length):
        x = torch.cat([memory, text, memory])
        for index, layer in enumerate(layers):
            past = caches[index]
            both = torch.cat([past, x]).detach()
            caches[index] = both[max(len(both) - config.mem_len, 0) :]
            y = x + attend(layer, x, past)
            if not config.pre_lnorm:
                y = norm(f"{layer}.mixer_norm", y)
            h = norm(f"{layer}.mlp_norm", y) if config.pre_lnorm else y
            x = y + of(f"{layer}.mlp.down_proj", of(f"{layer}.mlp.up_proj", h).relu())
            if not config.pre_lnorm:
                x = norm(f"{layer}.mlp_norm", x)
        memory = x[-number:]
        logits.append(model.lm_head(x[number:-number]))
        memories.append(memory)
    return torch.cat(logits), memories, caches


@torch.no_grad()
def test_the_definition_is_the_authors(load):
    golden, model = golden_tensors(NAME), load(torch.float64)
    for row, ids in enumerate(golden["input_ids"][:, :48]):
        logits, memories, _ = definition(model, ids)
        assert worst(logits, golden["logits_f64"][row]) < 1e-9
        assert worst(torch.stack(memories), golden["memory_after_segment_f64"][:, row]) < 1e-9


@pytest.mark.parametrize("fields", SETTINGS.values(), ids=SETTINGS)
def test_the_definition(fields):
    """Whole, in pieces, by the token, packed, beside others behind padding; gradients too."""
    model, ids = build(fields), ids_of(2, 20)
    length, number = model.config.segment_length, model.config.num_memory_tokens
    results = [definition(model, row) for row in ids]
    expected = torch.stack([logits for logits, _, _ in results])
    cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    official = {name: p.grad.clone() for name, p in model.named_parameters()}
    for key, gradient in gradients(model, ids).items():
        assert worst(gradient, official[key], relative=True) < 1e-9, key
    with torch.no_grad():
        for sizes, padding in (([20], 0), ([7, 1, 1, 11], 0), ([1] * 20, 0), ([8, 12], 3)):
            logits, cache = run(model, ids, sizes, padding)
            assert worst(logits, expected) < 1e-9, sizes
            memory = cache.layers[0].tensors["memory_BMD"]
            assert worst(memory, torch.stack([x[1][2] for x in results])) < 1e-9, sizes
        cache = model(ids[:, :1], past_key_values=cache, use_cache=True).past_key_values
        memory = cache.layers[0].tensors["memory_BMD"]
        assert worst(memory, torch.stack([x[1][3] for x in results])) < 1e-9
        end = 4 * model.config.frame_width
        for index, layer in enumerate(cache.layers):
            held = layer.tensors["inputs_BW1D"][:, :, 0]
            slots = torch.arange(end - model.config.mem_len, end) % held.shape[1]
            assert (
                model.config.mem_len == 0
                or worst(held[:, slots], torch.stack([x[2][index] for x in results])) < 1e-9
            )
        assert state_bytes(cache) == 2 * model.state_size(21)
        width = model.config.mem_len + length + 2 * number
        assert model.state_size() == 8 * SMALL["hidden_size"] * (2 * width + number)
        mask = torch.ones(2, 25, dtype=torch.long)
        mask[0, :5], mask[1, 20:] = 0, 0
        padded = torch.zeros(2, 25, dtype=torch.long)
        padded[0, 5:], padded[1, :20] = ids
        cache, logits = None, []
        for columns in torch.arange(25).split([12, 1, 9, 1, 1, 1]):
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
        assert worst(logits[1, :20], expected[1]) < 1e-9
        positions = torch.arange(20).repeat(2)[None]
        packed = model(ids.reshape(1, -1), position_ids=positions).logits
        assert worst(packed.view(2, 20, -1), expected) < 1e-9


@pytest.mark.parametrize("length", [5, 7, 17])
@pytest.mark.parametrize("checkpoints", [False, True])
def test_replay_and_checkpointing_are_plain_backpropagation(length, checkpoints):
    """And the last segment's loss asks the first one for something, through memory alone."""
    model = build(SETTINGS["cache, read by memory"]).train()
    embeds = torch.randn(2, 30, 20, dtype=torch.float64, requires_grad=True)
    results = []
    for replayed in (None, length):
        model.zero_grad()
        embeds.grad, model.model.replay_segment_length = None, replayed
        if checkpoints and replayed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(inputs_embeds=embeds).logits[:, 25:].square().sum().backward()
        results.append([embeds.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert results[0][0][:, :5].abs().amax(-1).min() > 1e-12
    for plain, replayed in zip(*results, strict=True):
        assert worst(replayed, plain, relative=True) < 1e-9


@torch.no_grad()
def test_generates_over_borders():
    """Rows at different places of their segments, as each does alone."""
    model, ids = build(SETTINGS["cache of two segments"]), ids_of(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0}
    together = model.generate(ids, attention_mask=mask, **options)
    for row, begin in enumerate((3, 0)):
        alone = model.generate(ids[row : row + 1, begin:], **options)
        assert torch.equal(together[row, begin:], alone[0])


@torch.no_grad()
def test_a_full_segment_is_written_by_the_next_token():
    """So that a text of whole segments pays for no memory that nobody reads."""
    model, ids, counts = build(SETTINGS["cache, read by memory"]), ids_of(2, 7), []
    model.model.layers[0].mlp.register_forward_hook(
        lambda module, args, y: counts.append(y.shape[1])
    )
    cache = model(ids[:, :5], use_cache=True).past_key_values
    first = cache.layers[0].tensors["memory_BMD"].clone()
    assert counts == [3 + 5] and torch.equal(first[0], model.model.memory.vectors)
    model(ids[:, 5:6], past_key_values=cache)
    assert counts[1:] == [3, 3 + 1]
    assert (cache.layers[0].tensors["memory_BMD"] - first).abs().min() > 0
    model(ids[:, 6:], past_key_values=cache)
    assert counts[3:] == [1]
    states = model(ids, output_hidden_states=True).hidden_states
    assert [tuple(x.shape) for x in states] == [(2, 7, 20)] * 3


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 3])
@torch.no_grad()
def test_a_compiled_step_goes_over_borders(number):
    """Of rows that are at different places, and one of them does not take part."""
    fields = {"num_memory_tokens": number, "num_hidden_layers": 1}
    fields = SETTINGS["cache of two segments"] | fields
    model, ids, mask = build(fields), ids_of(3, 18), torch.ones(3, 18, dtype=torch.long)
    mask[0, :2] = mask[1, 7:10] = 0
    caches = [
        model(ids[:, :6], attention_mask=mask[:, :6], use_cache=True).past_key_values
        for _ in range(2)
    ]
    torch._dynamo.reset()
    step = torch.compile(model, fullgraph=True, backend="eager")
    for column in range(6, 18):
        inputs = {"input_ids": ids[:, column : column + 1]}
        inputs["attention_mask"] = mask[:, column : column + 1]
        found, expected = (
            f(**inputs, past_key_values=cache).logits
            for f, cache in zip((step, model), caches, strict=True)
        )
        taking_part = mask[:, column].bool()
        assert worst(found[taking_part], expected[taking_part]) < 1e-12, column
    for ours, theirs in zip(*(cache.layers for cache in caches), strict=True):
        for name, x in ours.tensors.items():
            assert worst(x, theirs.tensors[name]) < 1e-12, name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mem_at_end": False}, "nothing is passed on"),
        ({"num_mem_tokens": 0}, "format transformer-xl"),
        ({"same_length": True}, "same_length"),
        ({"cutoffs": [20]}, "cutoffs"),
        ({"div_val": 2}, "div_val"),
        ({"d_embed": 16}, "d_embed"),
        ({"attn_type": 1}, "attn_type"),
        ({"ext_len": 4}, "ext_len"),
        ({"segment_length": None}, "tgt_len"),
        ({"tgt_len": 13}, "tgt_len"),
        ({"num_mem_tokens": 5}, "mem_tokens"),
    ],
)
def test_what_would_be_another_model_is_refused(tmp_path, values, message):
    source = golden_folder(NAME)
    config = json.loads((source / "config.json").read_text()) | values
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        convert(NAME, tmp_path, tmp_path / "converted")


def test_weights_go_back_as_they_came(load, tmp_path):
    assert recognise(golden_folder(NAME)) == NAME
    load(torch.float32).save_pretrained(tmp_path / "ours")
    convert_back(NAME, tmp_path / "ours", tmp_path / "theirs")
    back, official = (
        load_file(x / "model.safetensors") for x in (tmp_path / "theirs", golden_folder(NAME))
    )
    assert back.keys() == official.keys()
    assert all(torch.equal(back[name], x) for name, x in official.items())
    with pytest.raises(ValueError, match="num_memory_tokens"):
        convert_back("transformer-xl", tmp_path / "ours", tmp_path / "other")
    # Its own arguments, a plain list of which the script saves beside the model.
    values = json.loads((tmp_path / "theirs" / "config.json").read_text())
    values |= {"tie_projs": [False], "cutoffs": [], "div_val": 1, "mem_backprop_depth": 2}
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(values))
    save_file(back, tmp_path / "theirs" / "model.safetensors")
    convert(NAME, tmp_path / "theirs", tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert all(torch.equal(again[name], x) for name, x in ours.items())


@pytest.mark.parametrize(
    "fields",
    [
        {"same_length": True},
        {"zero_memory": True},
        {"num_memory_tokens": -1},
        {"mem_len": 0, "read_memory_from_cache": True},
        {"num_memory_tokens": 0, "read_memory_from_cache": True},
    ],
)
def test_fields_that_do_not_go_together(fields):
    with pytest.raises(StrictDataclassClassValidationError, match="num_memory_tokens"):
        TransformerXLConfig(**SMALL | fields)
