"""Recurrences over slices: how much is exchanged, and in how many steps."""

import pytest
from processes import once

from zoo.contract.subject import zoo_subject

SIZE, BATCH, FLOAT, TOLERANCE = 4, 2, 4, 1e-10
LENGTHS = (64, 256)
MODELS = (
    "retnet:torchscale",
    "lightning:minimax",
    "rwkv4:wide",
    "rwkv5:without-gate",
    "rwkv6:fla",
    "rwkv7:default",
    "gated_deltanet:grouped",
)
# Of each kind of state one: a factor for each head, for each channel, a matrix, an average.
SCANNED = ("retnet:torchscale", "rwkv6:fla", "gated_deltanet:grouped", "rwkv4:wide")
CASES = ("dense", "packed", "padded", "short")


@pytest.fixture(scope="module")
def found(processes, tmp_path_factory):
    """(model, case) -> what four processes found (recurrences.py)."""

    def run(folder):
        results, why = processes.run(folder, "recurrences.py", SIZE, *MODELS, "--", *SCANNED)
        assert why is None, why
        return results

    results = once(tmp_path_factory, "recurrences", run)
    return {(result["model"], result["case"]): result for result in results}


def bytes_of_layer(config):
    """(gathered forward, gathered backward, sent in each direction) by one layer of a model.

    A state S -> A S + U is told as A and U, and the gradient of what enters is as large as U.
    """
    kind, width = config.model_type.removeprefix("zoo_"), config.hidden_size
    heads = config.num_attention_heads
    if kind == "rwkv4":  # units, then two sums
        size = config.attention_hidden_size
        return 12 * BATCH * size, 8 * BATCH * size, 2 * FLOAT * BATCH * width
    if kind == "gated_deltanet":
        key, value = config.head_dim, config.value_head_dim
        channels = 2 * config.num_key_heads * key + heads * value
        sent = FLOAT * BATCH * (config.conv_size - 1) * channels
    elif kind == "lightning":
        key, value, sent = config.head_dim, config.head_dim, 0
    else:
        key, value = config.key_size // heads, config.value_size // heads
        sent = 0 if kind == "retnet" else 2 * FLOAT * BATCH * width  # both token shifts
    # What is left of a state follows from lengths where its decay is fixed.
    left = {"retnet": 0, "lightning": 0, "rwkv5": 1, "rwkv6": 1}.get(kind, key)
    state = FLOAT * BATCH * heads * key
    return state * (value + left), state * value, sent


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", MODELS)
def test_bytes_are_those_of_states_at_any_length(found, name, length):
    config = zoo_subject(*name.split(":")).build(0).config
    *gathered, sent = (config.num_hidden_layers * x for x in bytes_of_layer(config))
    for way, expected in zip(("forward", "backward"), gathered, strict=True):
        kinds = found[name, f"traffic {length}"][way]
        assert kinds.get("all_gather", 0) == expected
        assert kinds.get("send", 0) == sent
        assert kinds.keys() <= {"door", "messages", "all_gather", "send"}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", SCANNED)
def test_beyond_a_few_processes_in_steps_of_doubled_length(found, name, case):
    """As if even four were too many to tell everyone: two steps and one."""
    result = found[name, case]
    assert max(result[what] for what in ("logits", "loss", "gradients")) < TOLERANCE
    # Where somebody has no token of a row, everyone is told the last ones.
    if case in ("dense", "packed"):
        assert "all_gather" not in result["traffic"]


@pytest.mark.parametrize("case", CASES)
def test_a_convolution_reaches_over_several_slices(found, case):
    result = found["wide", case]
    assert max(result[what] for what in ("logits", "loss", "gradients")) < TOLERANCE
