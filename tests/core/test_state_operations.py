"""Every operation on a cache does its work on all that the cache holds: seconds, not minutes.

What a layer holds is compared as a whole, whatever its names. That each of these checks can fail
shows test_state_faults.py.
"""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache

from zoo import MODELS
from zoo.core import state

SIZES = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
# A model for each kind of layer.
KINDS = {
    state.StateLayer: ("retnet", {}),
    state.SlidingStateLayer: ("sliding_window", {"sliding_window": 3}),
    state.GrowingStateLayer: ("sliding_window", {"sliding_window": None}),
}
# Columns of each pass, and the padding at the left of each row.
PASSES, PADDING = (4, 3, 1), (0, 2, 5)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def model(request):
    torch.manual_seed(0)
    name, options = KINDS[request.param]
    model = MODELS[name].causal_lm(MODELS[name].config(**SIZES, **options)).eval()
    assert {type(layer) for layer in state.new_cache(model.config).layers} == {request.param}
    return model


def inputs(seed=0):
    """(ids, mask), in which no two rows have seen as much."""
    mask = torch.stack([torch.arange(sum(PASSES)) >= padding for padding in PADDING]).long()
    return torch.randint(31, mask.shape, generator=torch.Generator().manual_seed(seed)), mask


def fill(cache, model):
    """The cache after each pass."""
    (ids, mask), start = inputs(), 0
    for length in PASSES:
        end = start + length
        with torch.no_grad():
            model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
        start = end
        yield cache


def filled(model, recording=False):
    cache = DynamicCache(config=model.config)
    if recording:
        cache.activate_past_recording()
    *_, cache = fill(cache, model)
    return cache


def contents(cache):
    """Everything that the layers of a cache hold, by its path."""
    found = {}

    def visit(path, value):
        if isinstance(value, (list, tuple)):
            value = dict(enumerate(value))
        elif hasattr(value, "__dict__") and not torch.is_tensor(value):
            value = vars(value)
        if not isinstance(value, dict):
            found[path] = value
            return
        for name, child in value.items():
            # How the length is counted is the layer's own business.
            if not str(name).startswith("_"):
                visit(f"{path}.{name}", child)

    for index, layer in enumerate(cache.layers):
        lengths = {"length": layer.length, "columns": layer.get_seq_length()}
        visit(str(index), vars(layer) | lengths)
    return found


def check_same(found, expected):
    assert found.keys() == expected.keys()
    for path, x in expected.items():
        y = found[path]
        are_tensors = torch.is_tensor(x) and torch.is_tensor(y)
        same = torch.equal(x, y) if are_tensors else type(x) is type(y) and x == y
        assert same, f"{path}: expected {x}, got {y}"


def tensors_of(cache):
    return [x for x in contents(cache).values() if torch.is_tensor(x)]


ROWS = {
    "reorder_cache": (torch.tensor([2, 0, 0]), [2, 0, 0]),
    "batch_repeat_interleave": (2, [0, 0, 1, 1, 2, 2]),
    "batch_select_indices": (torch.tensor([2, 0]), [2, 0]),
}


def check_rows(model, operation):
    argument, rows = ROWS[operation]
    cache = filled(model)
    expected = {k: x[rows] if torch.is_tensor(x) else x for k, x in contents(cache).items()}
    getattr(cache, operation)(argument)
    check_same(contents(cache), expected)


def check_reset(model):
    cache, empty = filled(model, recording=True), DynamicCache(config=model.config)
    cache.crop(-2)
    cache.reset()
    empty.activate_past_recording()
    check_same(contents(cache), contents(empty))


def check_crop(model):
    """Back to the end of a pass, into it, into it again, and over two passes."""
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    after = [contents(cache)] + [contents(x) for x in fill(cache, model)]
    embeds = model.get_input_embeddings()(inputs()[0])
    for removed, passes in (((1,), 2), ((2,), 1), ((2, 1), 1), ((6,), 0)):
        cache = filled(model, recording=True)
        for number in removed:
            cache.crop(-number)
        start, end = sum(PASSES[:passes]), sum(PASSES) - sum(removed)
        found, expected = contents(cache), dict(after[passes])
        for index in range(len(cache.layers)):
            expected |= {f"{index}.columns": end, f"{index}.pending_length": end - start}
        if start < end:
            # The first layer keeps the inputs for all.
            del expected["0.pending"]
            expected["0.pending.embeds_BTD"] = embeds[:, start:end]
            expected["0.pending.attention_mask"] = found.get("0.pending.attention_mask")
            expected["0.pending.position_ids"] = None
        check_same(found, expected)


def check_fork(model):
    cache = filled(model, recording=True)
    cache.crop(-2)
    expected = {k: x.clone() if torch.is_tensor(x) else x for k, x in contents(cache).items()}
    fork = state.fork_state(cache)
    check_same(contents(fork), expected)
    for x in tensors_of(fork):
        x.zero_()
    check_same(contents(cache), expected)


def check_file(model, tmp_path):
    cache = filled(model)
    state.save_state(cache, tmp_path / "state.safetensors")
    loaded = state.load_state(tmp_path / "state.safetensors", model.config)
    check_same(contents(loaded), contents(cache))


def check_parts(model):
    cache = filled(model)
    frame, tensors = state.take_apart(cache)
    again = state.put_together(model.config, frame, tensors)
    check_same(contents(again), contents(cache))
    assert all(x is y for x, y in zip(state.take_apart(again)[1], tensors, strict=True))


class MovedToTheCPU(TorchFunctionMode):
    """Notes every tensor that is sent to the CPU."""

    def __enter__(self):
        self.moved = []
        return super().__enter__()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.to and torch.device(args[1]).type == "cpu":
            self.moved.append(args[0])
        return function(*args, **kwargs or {})


def check_offload(model):
    cache = filled(model)
    expected = contents(cache)
    with MovedToTheCPU() as mode:
        for layer in cache.layers:
            layer.offload()
            layer.prefetch()
    check_same(contents(cache), expected)
    held = {id(x) for x in expected.values() if torch.is_tensor(x)}
    assert held <= {id(x) for x in mode.moved}


OPERATIONS = dict.fromkeys(ROWS, check_rows) | {
    "reset": check_reset,
    "crop": check_crop,
    "fork_state": check_fork,
    "load_state": check_file,
    "put_together": check_parts,
    "offload": check_offload,
}


def check(operation, model, folder):
    arguments = {check_rows: [operation], check_file: [folder]}
    OPERATIONS[operation](model, *arguments.get(OPERATIONS[operation], []))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation(operation, model, tmp_path):
    check(operation, model, tmp_path)


@pytest.mark.parametrize("operation", [*ROWS, "offload"])
def test_rows_stay_where_tokens_wait_to_be_run_again(operation, model):
    cache = filled(model, recording=True)
    cache.crop(-2)
    before = contents(cache)
    with pytest.raises(ValueError, match="tokens waiting to be run again after crop"):
        arguments = [] if operation == "offload" else ROWS[operation][:1]
        getattr(cache.layers[0], operation)(*arguments)
    check_same(contents(cache), before)


@pytest.mark.parametrize("operation", ROWS)
def test_other_rows_have_no_past(operation, model):
    cache = filled(model, recording=True)
    getattr(cache, operation)(ROWS[operation][0])
    assert all(layer.segments == [] for layer in cache.layers)
    with pytest.raises(ValueError, match="remembers the last 0"):
        cache.crop(-1)


def test_the_tokens_that_wait_keep_their_mask(model):
    """Where the next pass brings no mask of its own for them."""
    cache = filled(model, recording=True)
    cache.crop(-2)
    start, end = PASSES[0], sum(PASSES) - 2
    mask = cache.layers[0].pending.attention_mask
    assert torch.equal(mask[:, start - end :], inputs()[1][:, start:end])
