"""Decoding steps without gradients on a CPU, which are code of their own, beside a whole pass.

Beyond the contract, whose rows all have as many tokens and whose weights are as they begin.
"""

import copy

import pytest
import torch

from zoo import MODELS
from zoo.contract.subject import variants_of, zoo_subject
from zoo.kernels.delta_recurrence import delta_recurrence_reference
from zoo.kernels.linear_recurrence import linear_recurrence_reference
from zoo.kernels.recurrence_steps import delta_recurrence_step, linear_recurrence_step, wkv4_step
from zoo.kernels.wkv4 import EMPTY_MAX, wkv4_reference

CASES = [(name, variant) for name in MODELS for variant in variants_of(name)]
# Steps pass a segment's end and a window's in all of them.
LENGTH, ROWS = 44, 2


def build(name, variant, dtype=torch.float64):
    """A tiny model of a variant, none of whose weights is zero, in evaluation."""
    model = zoo_subject(name, variant).build(0).eval().to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight += 0.1 * noise.to(dtype)
    return model


def tokens(model, length=LENGTH):
    size = model.config.vocab_size
    return torch.randint(1, size, (ROWS, length), generator=torch.Generator().manual_seed(2))


def logits_of(model, ids, cache=None, **inputs):
    output = model(ids, past_key_values=cache, use_cache=True, **inputs)
    return output.logits, output.past_key_values


@pytest.mark.parametrize(("name", "variant"), CASES)
@torch.no_grad()
def test_steps_equal_a_pass(name, variant):
    """Rows of one length, then rows of which some stay behind, and so have other clocks."""
    model = build(name, variant)
    ids = tokens(model)
    whole = model(ids, use_cache=False).logits
    first, cache = logits_of(model, ids[:, :3])
    pieces = [first]
    for column in range(3, LENGTH // 2):
        step, cache = logits_of(model, ids[:, column : column + 1], cache)
        pieces.append(step)
    torch.testing.assert_close(torch.cat(pieces, 1), whole[:, : LENGTH // 2], rtol=0, atol=1e-9)
    place, mask = [LENGTH // 2] * ROWS, torch.ones(ROWS, LENGTH // 2, dtype=torch.long)
    for turn in range(LENGTH // 2):
        runs = [1, turn % 2]
        mask = torch.cat([mask, torch.tensor(runs)[:, None]], 1)
        next_ids = torch.stack([ids[row, place[row]] for row in range(ROWS)])[:, None]
        step, cache = logits_of(model, next_ids, cache, attention_mask=mask)
        for row in range(ROWS):
            if runs[row]:
                there = whole[row, place[row]]
                torch.testing.assert_close(step[row, 0], there, rtol=0, atol=1e-9)
                place[row] += 1


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_state_that_is_held_stays(name):
    """A recorded past, as assisted decoding has, and a copy of the layers: no step writes there."""
    model = build(name, next(iter(variants_of(name))))
    ids = tokens(model, 8)
    _, cache = logits_of(model, ids[:, :4])
    cache.activate_past_recording()
    held = [layer.tensors for layer in cache.layers]
    before = copy.deepcopy(held)
    logits_of(model, ids[:, 4:5], cache)
    for own, own_before in zip(held, before, strict=True):
        for key, x in own.items():
            assert torch.equal(x, own_before[key]), key


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_in_bfloat16(name):
    """As good as the pass: both are a model of 16 bits beside one of 64."""
    variant = next(iter(variants_of(name)))
    model, exact = build(name, variant, torch.bfloat16), build(name, variant)
    exact.load_state_dict(model.state_dict())
    ids = tokens(model, 24)
    right = exact(ids).logits
    whole = (model(ids, use_cache=False).logits - right).abs().max()
    _, cache = logits_of(model, ids[:, :2])
    pieces = []
    for column in range(2, 24):
        step, cache = logits_of(model, ids[:, column : column + 1], cache)
        pieces.append(step)
    assert (torch.cat(pieces, 1) - right[:, 2:]).abs().max() < 3 * whole


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("has_bonus", [False, True])
@pytest.mark.parametrize("decay", [None, (3,), (2, 1, 3), (2, 1, 3, 4)])
@torch.no_grad()
def test_linear_recurrence(decay, has_bonus, has_state):
    """The definition."""
    q, k, v = normal(2, 1, 3, 4), normal(2, 1, 3, 4, seed=1), normal(2, 1, 3, 5, seed=2)
    gates = None if decay is None else -normal(*decay, seed=3).exp()
    options = {
        "bonus": normal(3, 4, seed=4) if has_bonus else None,
        "initial_state": normal(2, 3, 4, 5, seed=5) if has_state else None,
        "scale": 0.7,
        "output_final_state": True,
    }
    right = linear_recurrence_reference(q, k, v, gates, **options)
    for x, there in zip(linear_recurrence_step(q, k, v, gates, **options), right, strict=True):
        torch.testing.assert_close(x, there)


@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("decay", [None, (3,), (2, 1, 3), (2, 1, 3, 4)])
@torch.no_grad()
def test_delta_recurrence(decay, has_state):
    """The definition."""
    q, k, a, b = (normal(2, 1, 3, 4, seed=seed) for seed in range(4))
    v, gates = normal(2, 1, 3, 5, seed=4), None
    if decay is not None:
        gates = -normal(*decay, seed=5).exp()
    state = normal(2, 3, 4, 5, seed=6) if has_state else None
    options = {"initial_state": state, "scale": 0.7, "output_final_state": True}
    right = delta_recurrence_reference(q, k, v, gates, a, b, **options)
    for x, there in zip(delta_recurrence_step(q, k, v, gates, a, b, **options), right, strict=True):
        torch.testing.assert_close(x, there)


@pytest.mark.parametrize("is_empty", [False, True])
@torch.no_grad()
def test_wkv4(is_empty):
    """The definition, keys of hundreds among them, and a state that has seen nothing."""
    k, v, w, u = 200 * normal(2, 1, 6), normal(2, 1, 6, seed=1), -normal(6).exp(), normal(6, seed=2)
    state = torch.stack([normal(2, 6, seed=3), normal(2, 6, seed=4).exp(), 99 * normal(2, 6)], 1)
    if is_empty:
        state[:, :2], state[:, 2] = 0, EMPTY_MAX
    right, after = wkv4_reference(w, u, k, v, initial_state=state, output_final_state=True)
    y, own = wkv4_step(w, u, k[:, 0], v[:, 0], state.unbind(1))
    torch.testing.assert_close(y, right[:, 0])
    torch.testing.assert_close(torch.stack(own, 1), after)
