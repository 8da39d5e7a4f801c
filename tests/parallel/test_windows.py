"""What attention over slices exchanges, in bytes."""

import pytest
from processes import once
from windows import MODELS, PASSES

from zoo.contract.subject import zoo_subject
from zoo.kernels.dilated_branches import branches_of

SIZE, FLOAT = 3, 4


@pytest.fixture(scope="module")
def found(processes, tmp_path_factory):
    """(pass, rank) -> what was counted."""

    def run(folder):
        lines, why = processes.run(folder, "windows.py", SIZE)
        assert why is None, why
        return lines

    lines = once(tmp_path_factory, "windows", run)
    return {(x["pass"], x["rank"]): x for x in lines}


def to_next(tokens, layers, rank):
    """Forward to the process after, backward to the one before; one message in each layer."""
    there = {"send": tokens * layers, "messages": layers}
    return {} if rank == SIZE - 1 else there, {} if rank == 0 else there


def to_all(tokens, layers, messages):
    """Each tells all."""
    size, messages = tokens * layers, messages * layers
    forward = {"all_gather": size, "messages": messages}
    return forward, {"reduce_scatter": size * SIZE, "messages": messages}


def both(one, other):
    """Sums by kind."""
    return tuple(
        {kind: a.get(kind, 0) + b.get(kind, 0) for kind in a.keys() | b.keys()}
        for a, b in zip(one, other)
    )


def expected(name, rank):
    """As the docstrings say it of zoo/core/halo.py, and of the layers' own exchanges."""
    model, length, starts = PASSES[name]
    config = zoo_subject(*MODELS[model][:2], **MODELS[model][2]).build(0).config
    layers, width = config.num_hidden_layers, config.head_dim
    if model == "dilated":
        token, slots = 2 * FLOAT * config.num_attention_heads * width, [0, 0]
        for branch in branches_of(config.segment_lengths, config.dilation_rates):
            if length % branch.length:
                # What the last process needs of the segment it begins in.
                is_far = (2 * length) % branch.length > length
                slots[is_far] += min(branch.count, length // branch.rate + 3)
        near = to_next(token * slots[0], layers, rank) if slots[0] else ({}, {})
        return both(near, to_all(token * slots[1], layers, 2)) if slots[1] else near
    token = 2 * FLOAT * config.num_key_value_heads * width
    if model == "heads":
        heads = config.num_attention_heads + config.num_key_value_heads
        size = 2 * FLOAT * length * heads * width * (SIZE - 1) // SIZE
        return ({"all_to_all": size * layers, "messages": 2 * layers},) * 2
    window = config.sliding_window or 10**6
    if model == "full" and len(starts) == 1:
        return to_all(length * token, layers, 2)
    if model == "full":  # the longest part of a document at the end of a slice
        return to_next(48 * token, layers, rank)
    if window - 1 > length:
        return to_all(length * token, layers, 2)
    one = to_next((window - 1) * token, layers, rank)
    if model == "sinks":
        return both(one, to_all(config.num_sink_tokens * token, layers, 1))
    if model == "extended":  # the newest keys, turned once more
        near = config.rope_extension["window"]
        return both(one, to_next((near - 1) * token / 2, layers, rank))
    return one


@pytest.mark.parametrize("name", PASSES)
def test_bytes(found, name):
    for rank in range(SIZE):
        counted = found[name, rank]
        both_ways = counted["forward"], counted["backward"]
        assert both_ways == expected(name, rank), f"process {rank}"


def test_messages_of_layers_are_let_go(found):
    assert max(found[name, rank]["under_way"] for name in PASSES for rank in range(SIZE)) == 1


def test_a_row_that_restarts_at_a_cut_has_zeros_before_it(found):
    assert max(found["restarted", rank]["error"] for rank in range(SIZE)) < 1e-12  # float64
