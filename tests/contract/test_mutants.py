"""Bugs of the kind recurrent models really have, planted one at a time; the contract finds each."""

import inspect
import sys
import textwrap

import pytest

import zoo.kernels.linear_recurrence as kernel
from zoo.contract import points_numerics, points_sequence, run, zoo_subject
from zoo.core.sequence import Sequence
from zoo.core.state import StateLayer

# name: (where, function, right, wrong, point, checks that fail)
MUTANTS = {
    "decay off by one: the state is read with one decay too few": (
        kernel,
        "_decay_factors",
        "        read_NHCK.exp(),",
        "        (read_NHCK - log_decay_NHCK).exp(),",
        1,
        ("token by token, fp64: logits", "in pieces of 97, fp64: logits"),
    ),
    "decay off by one: the state decays once too rarely per chunk": (
        kernel,
        "_decay_factors",
        "        last_NH1K.transpose(-1, -2).exp(),",
        "        (last_NH1K - log_decay_NHCK[..., :1, :]).transpose(-1, -2).exp(),",
        1,
        ("token by token, fp64: state", "in pieces of 13, fp64: logits"),
    ),
    "a padded token leaks into the state: the one after each real token": (
        Sequence,
        "_packed",
        "attention_mask.flatten().nonzero()",
        "(attention_mask.bool() | attention_mask.roll(1, 1).bool()).flatten().nonzero()",
        2,
        (
            "at once, fp64: interior padding: logits",
            "at once, fp64: state of each row",
            "other ids under the mask: logits, bit for bit",
        ),
    ),
    "a padded token leaks into the state: a single masked one": (
        Sequence,
        "_single_step",
        "keep = _unless_all(attention_mask[:, 0] != 0)",
        "keep = None",
        2,
        ("then single tokens, masked in some rows, fp64: state of each row",),
    ),
    "a document boundary ignored: after a document of one token": (
        Sequence,
        "_packed",
        "positions[1:] <= positions[:-1]",
        "positions[1:] < positions[:-1]",
        3,
        ("position_ids alone, fp64: logits", "position_ids alone, fp64: gradients"),
    ),
    "a document boundary ignored: the state runs on into the first one of a piece": (
        Sequence,
        "_packed",
        "continues = continues & batch.goes_on(positions[start], row_of_document)",
        "continues = continues & (positions[start] >= 0)",
        3,
        ("pieces that cut documents: in pieces of 13: logits",),
    ),
    "rotation counted from the packed batch instead of the document": (
        Sequence,
        "_packed",
        "            positions[None],",
        "            torch.arange(len(token_index), device=device)[None],",
        3,
        # The logits of a document depend on differences of positions only and stay right; what
        # shows is the state it leaves, and what continues from that.
        (
            "position_ids alone, fp64: state",
            "position_ids alone, fp64: state: logits of a continuation",
        ),
    ),
    "rotation counted from the piece instead of the document": (
        Sequence,
        "_dense",
        "position_ids = clock if shift is None else clock + shift[:, None]",
        "position_ids = torch.arange(shape[1], device=clock.device).expand_as(clock)",
        1,
        ("token by token, fp64: logits", "in pieces of 13, fp64: state"),
    ),
    "state kept in bf16: between two pieces": (
        StateLayer,
        "_rows",
        "            tensors[name] = new\n        return",
        "            tensors[name] = new.bfloat16()\n        return",
        1,
        ("token by token, fp64: logits", "token by token, fp32: logits"),
    ),
    "state kept in bf16: in a model of bf16": (
        kernel,
        "accumulator_dtype",
        "torch.promote_types(x.dtype, torch.float32)",
        "x.dtype",
        9,
        ("bf16: state tensors of another dtype than declared",),
    ),
    "wrong gradient of the initial state: none": (
        kernel._BlockScan,
        "backward",
        "dinitial = torch.cat([dstate, dfinal[dstate.shape[0] :]])",
        "dinitial = torch.zeros_like(dfinal)",
        1,
        ("token by token, fp64: gradients", "in pieces of 97, fp32: gradients"),
    ),
    "wrong gradient of the initial state: not through the outputs": (
        kernel._BlockScan,
        "backward",
        "dstate = _scaled(dstate, decay.state) + _scaled(q, decay.query).mT @ do",
        "dstate = _scaled(dstate, decay.state)",
        1,
        ("token by token, fp64: gradients", "in pieces of 97, fp32: gradients"),
    ),
}


def plant(monkeypatch, owner, name, right, wrong):
    """Replaces a function by one whose source differs in one place."""
    function = getattr(owner, name)
    source = inspect.getsource(function)
    assert source.count(right) == 1, f"{name} has changed: plant this mutant anew"
    source = textwrap.dedent(source.replace(right, wrong))
    namespace = {}
    exec(source, vars(sys.modules[function.__module__]), namespace)
    monkeypatch.setattr(owner, name, namespace[name])


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_is_caught(mutant, monkeypatch):
    owner, name, right, wrong, point, culprits = MUTANTS[mutant]
    subject = zoo_subject("retnet")
    # In the pieces alone whose checks it fails.
    asked = {way: x for way, x in points_sequence.PIECES.items() if way in " ".join(culprits)}
    for points in (points_numerics, points_sequence):
        monkeypatch.setattr(points, "PIECES", asked)
    plant(monkeypatch, owner, name, right, wrong)
    report = run(subject, [point])
    caught = [check.name for check in report.failed(point)]
    print(f"{mutant}: caught by point {point}:", *caught, sep="\n    ")
    assert set(culprits) <= set(caught), "\n" + report.table()
