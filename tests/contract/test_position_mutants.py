"""Bugs that codes for positions really have, planted one at a time; each is found.

By a point of the contract, where the model is then no function of the text, or by an official
number, where it is one of another text.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from test_mutants import plant

from zoo.contract import run, zoo_subject
from zoo.core.sequence import Sequence, _Batch
from zoo.layers import rope_extension
from zoo.layers.position_bias import AlibiBias
from zoo.layers.softmax_attention import SoftmaxAttention

TESTS = Path(__file__).resolve().parents[1]


def module_of(path, monkeypatch):
    """A module of tests, to be called."""
    monkeypatch.syspath_prepend((TESTS / path).parent)
    spec = importlib.util.spec_from_file_location(Path(path).stem, TESTS / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_keys_place_in_the_place_of_its_distance(monkeypatch):
    """The same in float64, and off by 4.5 in bfloat16 at the 4,095th token."""
    types = module_of("models/test_position_types.py", monkeypatch)
    checks = [types.test_alibi_is_exact_far_into_a_text, types.test_alibi_official_numbers]
    for dtype in (torch.bfloat16, torch.float16):
        checks[0](dtype)
    slopes = "slopes_H.view(-1, *[1] * distance.ndim)"
    own = f"({slopes} * (distance.max() - distance)).to(self.kept)"
    query = f"({slopes} * distance.max()).to(self.kept)"
    wrong = f"({query}.to(dtype) - {own}.to(dtype))"
    plant(monkeypatch, AlibiBias, "forward", f"{slopes} * distance.to(dtype)", wrong)
    AlibiBias.kept = torch.float64
    try:
        checks[1](types.windowed_attention)
        for AlibiBias.kept in (torch.bfloat16, torch.float16):
            with pytest.raises(AssertionError):
                checks[0](AlibiBias.kept)
    finally:
        del AlibiBias.kept


def caught(point, variant):
    """The names of the checks of a point that fail."""
    report = run(zoo_subject("sliding_window", variant), [point])
    return {check.name for check in report.failed(point)}


def test_a_place_in_the_row_in_the_place_of_the_document(monkeypatch):
    """FIRE's bias knows how far into its document a query is."""
    right = "        place_BT = self.place_in_cache(clock_BT)\n        if bias."
    wrong = (
        "        place_BT = torch.arange(clock_BT.shape[1], device=device)[None]\n        if bias."
    )
    plant(monkeypatch, SoftmaxAttention, "pass_bias", right, wrong)
    assert "position_ids alone, fp64: logits" in caught(3, "fire")


def test_a_group_that_is_off_by_one(monkeypatch):
    extended = module_of("kernels/test_extended_attention.py", monkeypatch)
    check, case = extended.test_distances_are_the_official_ones, ("ops-self-extend", "G4W8")
    check(*case)
    right = 'group_BT = clock_BT // extension["group_size"]'
    wrong = 'group_BT = (clock_BT + 1) // extension["group_size"]'
    plant(monkeypatch, rope_extension, "extended_positions", right, wrong)
    monkeypatch.setattr(extended, "extended_positions", rope_extension.extended_positions)
    with pytest.raises(AssertionError):
        check(*case)


def test_a_scale_by_the_length_of_the_batch(monkeypatch):
    """log n of the longest row so far, not of each token."""
    right, wrong = "_exact(clock_BT) + 1", "_exact(clock_BT.max(-1, keepdim=True).values) + 1"
    plant(monkeypatch, rope_extension, "log_n_scale", right, wrong)
    found = caught(1, "rerope")
    assert {"token by token, fp64: logits", "in pieces of 13, fp64: logits"} <= found


def test_a_boundary_at_a_jump(monkeypatch):
    """As transformers takes one for; PoSE's windows would be two documents."""
    jumps = module_of("core/test_position_jumps.py", monkeypatch)
    jumps.test_a_jump_is_in_the_document(None, "banded")
    plant(monkeypatch, _Batch, "is_packed", "diff() <= 0", "diff() != 1")
    right, wrong = "positions[1:] <= positions[:-1]", "positions[1:] != positions[:-1] + 1"
    plant(monkeypatch, Sequence, "_packed", right, wrong)
    with pytest.raises(AssertionError):
        jumps.test_a_jump_is_in_the_document(None, "banded")
