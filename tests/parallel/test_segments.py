"""Models of segments over slices: what is exchanged, where segments are cut."""

import collections
import functools

import pytest

from zoo.contract.subject import zoo_subject
from zoo.layers.landmark_stream import stream_length

SIZE, BATCH, FLOAT, LENGTH = 4, 2, 4, 16
# Of segments.py, which imports what only a process of several can.
BOUNDS = {
    "whole": [0, 32, 48, 80, 112],
    "longer": [0, 64, 96, 160, 224],
    "cut": [0, 25, 60, 94, 101],
    "short": [0, 17, 20, 21, 101],
}
INFINI = ("infini:linear", "infini:delta", "infini:none", "infini:lucidrains")
BLOCK_RECURRENT = ("default", "transformer-xl", "memorizing")
MODELS = (*INFINI, *(f"block_recurrent:{variant}" for variant in BLOCK_RECURRENT))
ALL_MODELS = (*MODELS, "landmark:default")
# Float64; largest measured: 3e-15.
TOLERANCE = 1e-12


@pytest.fixture(scope="module")
def found(processes, tmp_path_factory):
    """Kind -> model -> case -> what four processes found."""
    lines, why = processes.run(tmp_path_factory.mktemp("segments"), "segments.py", SIZE)
    assert why is None, why
    found = collections.defaultdict(lambda: collections.defaultdict(dict))
    for kind, name, case, result in lines:
        found[kind][name][case] = result
    return found


def config_of(name):
    return zoo_subject(*name.split(":")).build(0).config


def tokens_brought(case, need_of):
    """(Whether a neighbour has all tokens that a slice needs, how many each process tells)."""
    bounds = BOUNDS[case]
    own = [end - start for start, end in zip(bounds, bounds[1:-1])]
    needs = [need_of(cut) for cut in bounds[1:-1]]
    is_near = all(need <= there for need, there in zip(needs, own))
    return is_near, min(max(own), max(needs))


def add_tokens(forward, backward, brought, floats, has_gradients=True):
    """Adds what goes with so many numbers per token."""
    is_near, tokens = brought
    size = BATCH * FLOAT * tokens * floats
    forward["send" if is_near else "all_gather"] += size
    if has_gradients:
        backward["send" if is_near else "reduce_scatter"] += size if is_near else SIZE * size


def bytes_of_infini(name, case):
    """(Forward, backward) of all layers, by kind."""
    config, forward, backward = config_of(name), collections.Counter(), collections.Counter()
    heads, width = config.num_key_value_heads, config.head_dim
    for _ in range(config.num_hidden_layers):
        floats = 2 * heads * width + heads * config.learned_update
        add_tokens(forward, backward, tokens_brought(case, lambda cut: cut % LENGTH), floats)
        if config.memory_update == "linear":  # and whether a slice starts a document
            forward["all_gather"] += BATCH * FLOAT * (heads * width * (width + 1) + 1)
            backward["all_gather"] += BATCH * FLOAT * heads * width * (width + 1)
        elif config.memory_update == "delta":  # z; then M, and what the slice makes of another
            forward["all_gather"] += BATCH * FLOAT * (heads * width * (1 + 2 * width) + 1)
            backward["all_gather"] += BATCH * FLOAT * heads * width * (1 + width)
    return +forward, +backward


def bytes_of_block_recurrent(name, case):
    """(Forward, backward, the states' part of each) of all layers, by kind."""
    config, forward, backward = config_of(name), collections.Counter(), collections.Counter()
    floats, states = 2 * config.num_attention_heads * config.head_dim, 0
    for layer in range(config.num_hidden_layers):
        is_recurrent = layer in config.recurrent_layers
        brought = tokens_brought(case, lambda cut: min(cut, LENGTH))
        if is_recurrent:
            states += BATCH * FLOAT * config.num_states * config.hidden_size
            brought = tokens_brought(case, lambda cut: min(cut, cut % LENGTH + LENGTH))
        add_tokens(forward, backward, brought, floats)
        if layer in config.memory_layers:
            reach = config.memory_segment_length, config.memory_size
            brought = tokens_brought(case, functools.partial(memory_of, *reach))
            add_tokens(forward, backward, brought, floats, has_gradients=False)
    forward["send"] += states
    backward["send"] += states
    return +forward, +backward, states


def bytes_of_landmark(name, case):
    """(Forward, backward) of all layers, by kind: keys and values of all places, to all."""
    config, bounds = config_of(name), BOUNDS[case]
    places = [stream_length(n, config.block_length, config.landmark_predicts_next) for n in bounds]
    most = max(end - start for start, end in zip(places, places[1:-1]))
    floats = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim
    size = BATCH * FLOAT * most * floats
    # And once, how long the longest document is.
    return {"all_gather": size + 8}, {"reduce_scatter": SIZE * size}


def memory_of(segment, size, cut):
    """Tokens before a cut that a memory holds for its next segment, and those since."""
    return min(cut, cut % segment + size)


def without_messages(traffic):
    return {kind: number for kind, number in traffic.items() if kind != "messages"}


@pytest.mark.parametrize("case", BOUNDS)
@pytest.mark.parametrize("name", ALL_MODELS)
def test_bytes(found, name, case):
    count = bytes_of_infini if name in INFINI else bytes_of_block_recurrent
    count = bytes_of_landmark if name == "landmark:default" else count
    expected = count(name, case)[:2]
    assert [without_messages(x) for x in found["traffic"][name][case]] == [*map(dict, expected)]


@pytest.mark.parametrize("name", [*INFINI, "block_recurrent:default"])
def test_bytes_do_not_grow_with_the_text(found, name):
    assert found["traffic"][name]["whole"] == found["traffic"][name]["longer"]


@pytest.mark.parametrize("name", MODELS)
def test_a_layer_that_is_run_again_waits_for_nothing_twice(found, name):
    """Memories and states come once; windows, for which nobody waits, again."""
    forward, backward = map(collections.Counter, found["traffic"][name]["cut"])
    once, again = found["traffic"][name]["checkpointed"]
    assert once == forward
    states = 0 if name in INFINI else bytes_of_block_recurrent(name, "cut")[2]
    backward["send"] += forward["send"] - states
    if name not in INFINI:
        backward["all_gather"] += forward["all_gather"]
    assert without_messages(again) == without_messages(+backward)


@pytest.mark.parametrize("name", ALL_MODELS)
def test_slices_that_cut_segments(found, name):
    assert found["errors"][name]
    is_scanned = any("doubled" in case for case in found["errors"][name])
    assert is_scanned == (name == "infini:lucidrains")
    for case, errors in found["errors"][name].items():
        assert all(error < TOLERANCE for error in errors.values()), (case, errors)
