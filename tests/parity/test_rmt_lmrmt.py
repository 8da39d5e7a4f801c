"""RMT in Transformer-XL's stack against its authors' numbers, and a definition for what they lack.

The golden has no cache of hidden states (mem_len 0). With one, the definition is the measure:
it is compared with the golden as well.
"""

import json

import pytest
import torch
from goldens import golden_folder, golden_tensors
from huggingface_hub.errors import StrictDataclassClassValidationError
from rmt_lmrmt_definition import SETTINGS, SMALL, build, definition, ids_of, run
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from ways import gradients, worst

from zoo import TransformerXLConfig
from zoo.core.state import state_bytes
from zoo.hub.convert import FORMATS, convert, convert_back
from zoo.hub.convert.format import Weights
from zoo.hub.convert.recognise import recognise

NAME = "rmt-lmrmt"


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """dtype -> the golden's model, converted."""
    folder = tmp_path_factory.mktemp("converted") / NAME
    convert(NAME, golden_folder(NAME), folder)
    return lambda dtype: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


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
