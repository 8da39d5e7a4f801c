"""What point 9 measures 16 bits by: the definitions of the operators, and each is really called."""

import sys

import pytest
import torch

from zoo.contract.points_numerics import plain_operators
from zoo.contract.subject import zoo_subject

OPERATORS = {
    "retnet": "linear_recurrence",
    "rwkv4": "wkv4",
    "rwkv5": "linear_recurrence",
    "rwkv6": "linear_recurrence",
    "rwkv7": "delta_recurrence",
    "gated_deltanet": "delta_recurrence",
    "lightning": "linear_recurrence",
    "sliding_window": "windowed_attention",
    "block_recurrent": "windowed_attention",
    "longnet": "dilated_attention",
    "transformer_xl": "windowed_attention",
}


@pytest.mark.parametrize(("name", "operator"), OPERATORS.items())
@torch.no_grad()
def test_the_definition_takes_the_operators_place(name, operator, monkeypatch):
    """Wherever a mixer has it from: else the operator would be measured by itself."""
    home = sys.modules[f"zoo.kernels.{operator}"]
    definition, calls = getattr(home, f"{operator}_reference"), []

    def spied(*arguments, **keyword):
        calls.append(operator)
        return definition(*arguments, **keyword)

    monkeypatch.setattr(home, f"{operator}_reference", spied)
    subject = zoo_subject(name)
    model, ids = subject.model(torch.float32), subject.ids(1, 20)
    with plain_operators(model) as replaced:
        assert operator in replaced
        found = model(ids).logits
    assert calls
    calls.clear()
    assert (model(ids).logits - found).abs().max() < 1e-3 and not calls
