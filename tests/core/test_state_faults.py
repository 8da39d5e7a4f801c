"""The checks of test_state_operations.py fail where an operation forgets a single thing."""

import pytest
import test_state_operations
from test_state_operations import ROWS, check

from zoo.core import state

model = test_state_operations.model

# What a layer may forget, and what it then has.
EMPTY = {
    "clock": None,
    "tensors": {},
    "length": 0,
    "segments": [],
    "pending": None,
    "pending_length": 0,
}


def take_out(layer, name):
    """Takes one thing out of a layer, of its tensors one; returns what puts it back."""
    kept, rest = getattr(layer, name), EMPTY[name]
    if name == "segments":
        kept = list(kept)
    elif name == "tensors" and kept:
        first, *others = kept
        kept, rest = {first: kept[first]}, {key: kept[key] for key in others}
    setattr(layer, name, rest)
    return lambda: setattr(layer, name, layer.tensors | kept if name == "tensors" else kept)


def skips(operation, name):
    """An operation that leaves one thing of a layer as it was."""

    def faulty(layer, *args):
        put_back = take_out(layer, name)
        operation(layer, *args)
        put_back()

    return faulty


def loses(operation, name):
    """An operation after which one thing is gone."""

    def faulty(first, *args):
        result = operation(first, *args)
        for layer in [first] if result is None else result.layers:
            take_out(layer, name)
        return result

    return faulty


FAULTS = [
    *((skips, x, name) for x in (*ROWS, "offload") for name in ("clock", "tensors")),
    *((skips, x, name) for x in ("reset", "crop") for name in EMPTY),
    *((loses, "fork_state", name) for name in EMPTY),
    *(
        (loses, x, name)
        for x in (*ROWS, "offload", "load_state", "put_together")
        for name in ("clock", "tensors", "length")
    ),
]


@pytest.mark.parametrize(("fault", "operation", "name"), FAULTS)
def test_what_an_operation_forgets_is_noticed(fault, operation, name, model, monkeypatch, tmp_path):
    owner = type(state.new_cache(model.config).layers[0])
    owner = owner if hasattr(owner, operation) else state
    monkeypatch.setattr(owner, operation, fault(getattr(owner, operation), name))
    # A crop without a past refuses; everything else is found by its result.
    with pytest.raises(ValueError if (operation, name) == ("crop", "segments") else AssertionError):
        check(operation, model, tmp_path)
