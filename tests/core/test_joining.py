"""Joined states are caches like any other: they go on, in every way a cache does, and are refused.

That the numbers are those of parallel context windows shows tests/parity/test_joined_windows.py.
"""

import copy

import pytest
import torch
from test_state_operations import check_same, contents, tensors_of
from transformers import DynamicCache
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from zoo import MODELS, join_states
from zoo.core import state
from zoo.hub.export import export

SIZES = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
START, LONGEST, TASK = 1, 6, 5
GREEDY = {"max_new_tokens": 8, "do_sample": False}


def build(name="sliding_window", **options):
    torch.manual_seed(0)
    fields = {"sliding_window": None, "initializer_range": 0.3} if name == "sliding_window" else {}
    return MODELS[name].causal_lm(MODELS[name].config(**SIZES | fields | options)).double().eval()


@pytest.fixture(scope="module")
def model():
    return build(num_key_value_heads=1)


def texts(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    windows = [torch.randint(2, 31, (size,), generator=generator) for size in sizes]
    for ids in windows:
        ids[0] = START
    return windows


WINDOWS = texts((4, LONGEST, 3))
TASKS = torch.stack(texts((TASK, TASK), seed=1))


@torch.no_grad()
def run(model, ids, cache=None, **inputs):
    output = model(ids, past_key_values=cache, use_cache=True, **inputs)
    return output.logits, output.past_key_values


def caches_of(model, windows=WINDOWS):
    return [run(model, ids[None])[1] for ids in windows]


def joined(model, rows=1, **options):
    cache = model.join_states(caches_of(model), **options)
    cache.batch_repeat_interleave(rows)
    return cache


def batch_of(model, windows, **inputs):
    """The cache of windows in a batch, padded at the left."""
    size = max(map(len, windows))
    ids = torch.stack([torch.cat([ids.new_zeros(size - len(ids)), ids]) for ids in windows])
    mask = torch.stack([torch.arange(size) >= size - len(ids) for ids in windows]).long()
    return run(model, ids, attention_mask=mask, **inputs)[1]


def at(length, start=LONGEST):
    return {"position_ids": start + torch.arange(length)[None]}


def close(a, b):
    return torch.allclose(a, b, rtol=1e-9, atol=1e-9)


def test_positions_go_on_by_themselves(model):
    """In a pass, pieces, steps and beside padding: as where the caller says them."""
    expected, _ = run(model, TASKS, joined(model, 2), **at(TASK))
    assert not close(expected, run(model, TASKS, joined(model, 2), **at(TASK, LONGEST + 1))[0])
    whole, cache = run(model, TASKS, joined(model, 2))
    assert close(whole, expected)
    for sizes in ([1] * TASK, [2, 1, 2]):
        cache, logits = joined(model, 2), []
        for ids in TASKS.split(sizes, dim=1):
            piece, cache = run(model, ids, cache)
            logits.append(piece)
        assert close(torch.cat(logits, dim=1), expected)
    mask = torch.ones_like(TASKS)
    mask[0, :2] = 0
    found, cache = run(model, TASKS, joined(model, 2), attention_mask=mask)
    assert close(found[1], expected[1])
    assert close(found[:1, 2:], run(model, TASKS[:1, 2:], joined(model))[0])
    step = torch.tensor([[7], [8]])
    found, cache = run(model, step, cache, attention_mask=torch.tensor([[1], [0]]))
    found, _ = run(model, step, cache)
    alone = [joined(model), joined(model)]
    for ids, own in ((TASKS[:1, 2:], alone[0]), (step[:1], alone[0]), (TASKS[1:], alone[1])):
        run(model, ids, own)
    assert close(found[:1], run(model, step[:1], alone[0])[0])
    assert close(found[1:], run(model, step[1:], alone[1])[0])


def test_a_new_document_begins_at_0(model):
    ids = TASKS[:1]
    expected, _ = run(model, ids)
    documents = torch.cat([ids, ids], dim=1)
    for inputs in (
        {"position_ids": torch.cat([LONGEST + torch.arange(TASK), torch.arange(TASK)])[None]},
        {"seq_idx": torch.tensor([[0] * TASK + [1] * TASK])},
        {"cu_seq_lens_q": torch.tensor([0, TASK, 2 * TASK])},
    ):
        logits, cache = run(model, documents, joined(model), **inputs)
        assert close(logits[:, :TASK], run(model, ids, joined(model))[0])
        assert close(logits[:, TASK:], expected)
        assert close(run(model, ids, cache)[0], run(model, ids, run(model, ids)[1])[0])
    logits, cache = run(model, ids, joined(model), position_ids=torch.arange(TASK)[None])
    assert close(logits, expected)
    assert close(run(model, ids, cache)[0], run(model, ids, run(model, ids)[1])[0])


def by_hand(model, ids, cache, steps=GREEDY["max_new_tokens"]):
    """Greedy decoding, positions said by the caller."""
    logits, cache = run(model, ids, cache, **at(ids.shape[1]))
    for _ in range(steps):
        new = logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, new], dim=1)
        logits, cache = run(model, new, cache, **at(1, LONGEST + ids.shape[1] - 1))
    return ids


def test_generate(model):
    """Without a word about positions: a batch, padding, beams, drafts, and a second turn."""
    expected = by_hand(model, TASKS, joined(model, 2))
    cache = joined(model, 2)
    found = model.generate(TASKS, past_key_values=cache, **GREEDY)
    assert torch.equal(found, expected)
    mask = torch.ones_like(TASKS)
    assert torch.equal(
        model.generate(
            input_ids=TASKS, attention_mask=mask, past_key_values=joined(model, 2), **GREEDY
        ),
        expected,
    )
    mask[0, :2] = 0
    ids = TASKS * mask
    left = model.generate(ids, attention_mask=mask, past_key_values=joined(model, 2), **GREEDY)
    alone = model.generate(TASKS[:1, 2:], past_key_values=joined(model), **GREEDY)
    assert torch.equal(left[:1, 2:], alone) and torch.equal(left[1:], expected[1:])
    beams = {"num_beams": 2} | GREEDY
    both = model.generate(TASKS, past_key_values=joined(model, 4), **beams)
    for row in range(2):
        own = model.generate(TASKS[row : row + 1], past_key_values=joined(model, 2), **beams)
        assert torch.equal(both[row : row + 1], own)
    drafted = {"prompt_lookup_num_tokens": 3} | GREEDY
    found = model.generate(TASKS[:1], past_key_values=joined(model), **drafted)
    assert torch.equal(found, expected[:1])
    chunked = model.generate(
        TASKS, past_key_values=joined(model, 2), prefill_chunk_size=2, **GREEDY
    )
    assert torch.equal(chunked, expected)


def test_a_second_turn(model):
    """The whole text so far and the cache, as transformers has it; padding between the turns."""
    cache = joined(model, 2)
    mask = torch.ones_like(TASKS)
    mask[0, :2] = 0
    first = model.generate(TASKS, attention_mask=mask, past_key_values=cache, **GREEDY)
    more = torch.tensor([[3, 4, 5], [6, 7, 8]])
    mask = torch.cat([mask, torch.ones(2, first.shape[1] - TASK + 3, dtype=torch.long)], dim=1)
    text = torch.cat([first, more], dim=1)
    second = model.generate(text, attention_mask=mask, past_key_values=cache, **GREEDY)
    for row, start in ((0, 2), (1, 0)):
        expected = by_hand(model, text[row : row + 1, start:], joined(model))
        assert torch.equal(second[row : row + 1, start:], expected)


@pytest.mark.parametrize("indentation", ["left", "right"])
def test_windows_of_a_batch(model, indentation):
    """Rows of one cache, padded at the left, join as caches of their own do."""
    inputs, caches = {}, caches_of(model)
    if indentation == "right":
        inputs = at(LONGEST, 0)
        caches = [run(model, x[None], **at(len(x), LONGEST - len(x)))[1] for x in WINDOWS]
    cache = batch_of(model, WINDOWS, **inputs)
    expected = model.join_states(caches)
    # Rounding: matrix products of other sizes.
    for layer, other in zip(model.join_states(cache).layers, expected.layers, strict=True):
        assert all(close(x, other.tensors[name]) for name, x in layer.tensors.items())
        assert torch.equal(layer.clock, other.clock)
        assert torch.equal(layer.position_shift, other.position_shift)
    logits = run(model, TASKS[:1], expected)[0]
    assert close(run(model, TASKS[:1], model.join_states(cache))[0], logits)


def test_rows_with_windows_of_their_own(model):
    """Caches of several rows, and rows by name: each as it would be alone."""
    other = texts((5, 2, 2), seed=2)
    caches = [batch_of(model, pair) for pair in zip(WINDOWS, other, strict=True)]
    alone = [
        run(model, TASKS[row : row + 1], model.join_states(caches_of(model, windows)))[0]
        for row, windows in enumerate((WINDOWS, other))
    ]
    assert close(run(model, TASKS, model.join_states(caches))[0], torch.cat(alone))
    cache = batch_of(model, [*WINDOWS, *other])
    rows = [[2, 0, 1], [4, 5, 3]]
    assert close(run(model, TASKS, model.join_states(cache, rows=rows))[0], torch.cat(alone))
    found = run(model, TASKS, model.join_states(cache, rows=[[1], [4, 0]]))[0]
    single, pair = [WINDOWS[1]], [other[1], WINDOWS[0]]
    for row, windows in enumerate((single, pair)):
        own = model.join_states(caches_of(model, windows))
        assert close(found[row : row + 1], run(model, TASKS[row : row + 1], own)[0])


def test_one_window_is_that_window(model):
    (cache,) = caches_of(model, WINDOWS[1:2])
    expected, _ = run(model, TASKS[:1], state.fork_state(cache))
    assert close(run(model, TASKS[:1], model.join_states(cache))[0], expected)


def test_joined_again(model):
    """Positions go on from the furthest, in what was joined too; or from where one says."""
    first = joined(model)
    run(model, TASKS[:1], first)
    (other,) = caches_of(model, texts((4,), seed=3))
    again = model.join_states([first, other])
    assert again.layers[0].clock.tolist() == [4 + LONGEST + 3 - 2 + TASK + 4 - 1]
    assert (again.layers[0].clock + again.layers[0].position_shift).tolist() == [LONGEST + TASK]
    logits, _ = run(model, TASKS[:1], state.fork_state(again))
    assert close(logits, run(model, TASKS[:1], again, **at(TASK, LONGEST + TASK))[0])
    logits, _ = run(model, TASKS[:1], joined(model, next_position=20))
    assert close(logits, run(model, TASKS[:1], joined(model), **at(TASK, 20))[0])


def test_crop_takes_back_what_came_after(model):
    cache = joined(model)
    cache.activate_past_recording()
    run(model, TASKS[:1], cache)
    cache.crop(-2)
    new = torch.tensor([[9, 8]])
    expected, _ = run(model, torch.cat([TASKS[:1, :-2], new], dim=1), joined(model))
    assert close(run(model, new, cache)[0], expected[:, -2:])
    cache.crop(-TASK)
    check_same(tensors(cache), tensors(joined(model)))
    with pytest.raises(ValueError, match="remembers the last 0"):
        cache.crop(-1)


def tensors(cache):
    return {k: x for k, x in contents(cache).items() if torch.is_tensor(x)}


def test_operations_on_a_joined_cache(model, tmp_path):
    """Rows, copies, files and parts have where positions go on, too."""
    cache = joined(model, 2)
    assert sum("position_shift" in name for name in tensors(cache)) == 2
    fork = state.fork_state(cache)
    check_same(contents(fork), contents(cache))
    assert not {id(x) for x in tensors_of(fork)} & {id(x) for x in tensors_of(cache)}
    state.save_state(cache, tmp_path / "state.safetensors")
    check_same(
        contents(state.load_state(tmp_path / "state.safetensors", model.config)), contents(cache)
    )
    check_same(
        contents(state.put_together(model.config, *state.take_apart(cache))), contents(cache)
    )
    logits, cache = run(model, TASKS, cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    step = torch.tensor([[4], [4]])
    swapped, _ = run(model, step, cache)
    _, straight = run(model, TASKS, joined(model, 2))
    assert close(swapped, run(model, step, straight)[0].flip(0))
    cache.batch_select_indices(torch.tensor([0]))
    assert len(cache.layers[0].position_shift) == 1
    cache.reset()
    assert cache.layers[0].position_shift is None and not cache.layers[0].tensors
    assert close(run(model, TASKS[:1], cache)[0], run(model, TASKS[:1])[0])


def test_training_goes_on_from_it(model):
    """Gradients reach the windows; in segments as in one."""
    model, grads = copy.deepcopy(model).train(), []
    for length in (None, 2):
        model.model.replay_segment_length = length
        model.zero_grad()
        caches = [model(ids[None], use_cache=True).past_key_values for ids in WINDOWS]
        cache = model.join_states(caches)
        model(TASKS[:1], labels=TASKS[:1], past_key_values=cache).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(map(close, *grads))
    assert model.model.embed_tokens.weight.grad[WINDOWS[0][1]].abs().max() > 0


@pytest.mark.parametrize("extra", [{"seq_idx": torch.tensor([[0] * 3 + [1] * 2])}, {}])
def test_replay_knows_the_positions(model, extra):
    model = copy.deepcopy(model).train()
    losses = []
    for length in (None, 2):
        model.model.replay_segment_length = length
        output = model(TASKS[:1], labels=TASKS[:1], past_key_values=joined(model), **extra)
        losses.append(output.loss.detach())
    assert close(*losses)


REFUSED = {
    "window": ("sliding_window", {"sliding_window": 8}),
    "hybrid": ("lightning", {"softmax_layers": [1]}),
    "recurrence": ("retnet", {}),
    "segments": ("infini", {}),
    # Positions of these are counted by slot.
    "alibi": ("sliding_window", {"position_embedding_type": "alibi"}),
    "t5": ("sliding_window", {"position_embedding_type": ["rope", "t5"]}),
    "fire": ("sliding_window", {"position_embedding_type": "fire"}),
    "xpos": ("sliding_window", {"position_embedding_type": "xpos"}),
    "rerope": ("sliding_window", {"rope_extension": {"type": "rerope", "window": 4}}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_states_that_are_no_lists_of_tokens(name):
    architecture, options = REFUSED[name]
    model = build(architecture, **options)
    with pytest.raises(ValueError, match="states that are lists of tokens, in all layers"):
        model.join_states(caches_of(model))


@pytest.mark.parametrize("types", [None, ["rope", None]])
def test_without_positions(types):
    """Layers without positions see windows and task as a bag of tokens, in the order of passes."""
    model = build(position_embedding_type=types)
    expected, _ = run(model, TASKS[:1], joined(model), **at(TASK))
    found, cache = run(model, TASKS[:1], joined(model))
    assert close(found, expected)
    expected, _ = run(model, TASKS[:1, :1], cache)
    found, _ = run(model, torch.cat([TASKS[:1], TASKS[:1, :1]], dim=1), joined(model))
    assert close(found[:, -1:], expected)
    if types is None:
        again, _ = run(model, TASKS[:1], joined(model), **at(TASK, 90))
        assert close(again, run(model, TASKS[:1], joined(model))[0])


def test_a_model_of_softmax_layers_alone():
    model = build("lightning", softmax_layers=[0, 1], lrpe_layers=[])
    expected, _ = run(model, TASKS[:1], joined(model), **at(TASK))
    assert close(run(model, TASKS[:1], joined(model))[0], expected)


def test_what_does_not_fit(model):
    caches = caches_of(model)
    assert join_states(caches, model.config).layers[0].clock.tolist() == [4 + LONGEST + 3 - 2]

    def refused(message, caches=caches, **options):
        with pytest.raises(ValueError, match=message) as caught:
            model.join_states(caches, **options)
        assert "\n" not in str(caught.value)

    refused("less than the tokens of each window, got 3", num_start_tokens=3)
    refused("at least 0", num_start_tokens=-1)
    refused("at least one cache, got none", [])
    refused("expected caches of 2 GrowingStateLayers", [DynamicCache()])
    refused("without tokens", [state.new_cache(model.config)])
    refused("expected caches of 2 GrowingStateLayers", [None])
    deeper = build(num_hidden_layers=3)
    refused("got 3 layers", caches_of(deeper))
    refused("of different shapes", [caches[0], *caches_of(build())])
    _, two = run(model, TASKS)
    refused("as many rows each", [two, caches[0]])
    for rows in ([[0, 0]], [[3]], [[]], [["a"]]):
        refused("different indices from 0 to 2", rows=rows)
    refused("at least one row", rows=[])
    for position in (0, [3, 4], 2.5):
        refused("next_position is", next_position=position)
    cache = state.new_cache(model.config)
    cache.activate_past_recording()
    run(model, TASKS[:1], cache)
    cache.crop(-1)
    refused("tokens to run again", [cache])


def test_windows_that_do_not_begin_alike(model):
    windows = [ids.clone() for ids in WINDOWS]
    windows[2][0] = START + 1
    caches = caches_of(model, windows)
    with pytest.raises(
        ValueError, match="windows 0 and 2 do not begin with the same num_start_tokens = 1"
    ):
        model.join_states(caches)
    model.join_states(caches, check_start=False)
    kept = model.join_states(caches, num_start_tokens=0)
    assert kept.layers[0].clock.tolist() == [4 + LONGEST + 3]
    low = copy.deepcopy(model).bfloat16()
    cache = batch_of(low, WINDOWS)
    low.join_states([*caches_of(low), cache], rows=[[0, 1, 2, 3, 4, 5]])


def test_an_exported_folder_has_it(model, tmp_path):
    """By its own code: the cache's layers are its own, too."""
    model.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "exported")
    path = str(tmp_path / "exported")
    # As the Auto classes do where the zoo has not registered its own.
    kind = get_class_from_dynamic_module("sliding_window.SlidingWindowForCausalLM", path)
    own = kind.from_pretrained(path, dtype="auto").eval()
    assert kind.__module__.startswith("transformers_modules") and own.dtype == torch.float64
    found = own.generate(TASKS, past_key_values=joined(own, 2), **GREEDY)
    assert torch.equal(found, model.generate(TASKS, past_key_values=joined(model, 2), **GREEDY))
    with pytest.raises(ValueError, match="expected caches of 2 GrowingStateLayers of this model"):
        own.join_states(caches_of(model))
