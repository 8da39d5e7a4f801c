"""Block-Recurrent and LongNet, token by token where the host knows the clocks, and where not."""

import pytest
import torch

from zoo import MODELS, BlockRecurrentConfig, BlockRecurrentForCausalLM, LongNetConfig
from zoo.core.state import fork_state, new_cache
from zoo.layers import recurrent_cell
from zoo.layers.recurrent_cell import RecurrentCell

SIZES = {"vocab_size": 31, "hidden_size": 20, "num_attention_heads": 2, "num_hidden_layers": 2}
VARIANTS = [
    ("block_recurrent", name)
    for name in ("default", "lstm-dual", "alibi", "transformer-xl", "feedback", "memorizing")
] + [("longnet", name) for name in LongNetConfig.variants]


def build(name, variant, **fields):
    torch.manual_seed(0)
    classes = MODELS[name]
    fields = SIZES | classes.config.variants[variant] | fields
    return classes.causal_lm(classes.config(**fields)).double().eval()


def steps(model, ids_BT, cache, **kwargs):
    """Logits of one token after the other."""
    logits = [
        model(ids_B1, past_key_values=cache, use_cache=True, **kwargs).logits
        for ids_B1 in ids_BT.split(1, dim=1)
    ]
    return torch.cat(logits, dim=1)


def without_clocks(monkeypatch):
    """As where the host does not know them."""
    for module in ("dilated_slots", "window_step"):
        monkeypatch.setattr(f"zoo.layers.{module}.host_clocks", lambda sequence: None)


@torch.no_grad()
@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_the_same_where_the_host_knows_clocks(name, variant, monkeypatch):
    """Logits and states past a window or two: from a document's first token, or after a pass."""
    model = build(name, variant)
    prompt, end = (0, 38) if variant in ("default", "alibi", "modulo") else (5, 40)
    ids_BT = torch.randint(31, (2, end))
    found, expected = new_cache(model.config), new_cache(model.config)
    if prompt:
        for cache in (found, expected):
            model(ids_BT[:, :prompt], past_key_values=cache, use_cache=True)
    logits = steps(model, ids_BT[:, prompt:], found)
    without_clocks(monkeypatch)
    of_any_clock = steps(model, ids_BT[:, prompt:], expected)
    torch.testing.assert_close(logits, of_any_clock, rtol=0, atol=1e-11)
    for a, b in zip(found.layers, expected.layers):
        assert a.tensors.keys() == b.tensors.keys()
        for key, x in a.tensors.items():
            torch.testing.assert_close(x, b.tensors[key], rtol=0, atol=1e-11)


@torch.no_grad()
@pytest.mark.parametrize("name", ["block_recurrent", "longnet"])
def test_a_step_leaves_a_recorded_past_as_it_was(name):
    """What is written over was copied where it may be asked for again; a fork goes its own way."""
    model = build(name, next(iter(MODELS[name].config.variants)))
    ids_BT, cache = torch.randint(31, (2, 30)), new_cache(model.config)
    cache.activate_past_recording()
    steps(model, ids_BT[:, :20], cache)
    held = [{key: x.clone() for key, x in layer.tensors.items()} for layer in cache.layers]
    kept = [dict(layer.tensors) for layer in cache.layers]
    fork = fork_state(cache)
    logits = steps(model, ids_BT[:, 20:], cache)
    for tensors, copies in zip(kept, held):
        assert all(torch.equal(x, copies[key]) for key, x in tensors.items())
    torch.testing.assert_close(steps(model, ids_BT[:, 20:], fork), logits, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["default", "feedback"])
def test_states_are_read_once_in_a_window(variant, monkeypatch):
    """Their keys and values are made at a window's first token, and where it ends."""
    model, window = build("block_recurrent", variant), 16
    if variant == "feedback":
        window = model.config.sliding_window
    count, made = [0], RecurrentCell.keys_values
    ids_BT, cache = torch.randint(31, (1, 3 * window)), new_cache(model.config)
    steps(model, ids_BT[:, :window], cache)

    def counted(self, state_NMD):
        count[0] += 1
        return made(self, state_NMD)

    monkeypatch.setattr(RecurrentCell, "keys_values", counted)
    steps(model, ids_BT[:, window : 2 * window - 1], cache)
    assert count[0] == 1
    steps(model, ids_BT[:, 2 * window - 1 :], cache)
    # Where a window ends, once for all tokens and, with feedback, once more for the cell.
    assert count[0] <= 1 + 2 + 1 + 2


@torch.no_grad()
def test_what_was_read_goes_with_its_states_and_cell():
    model, other = (build("block_recurrent", "default") for _ in range(2))
    for weight in other.parameters():
        weight.mul_(1.1)
    ids_BT, caches = torch.randint(31, (1, 20)), [new_cache(model.config) for _ in range(2)]
    before = len(recurrent_cell._READ)
    for cache in caches:
        steps(model, ids_BT[:, :18], cache)
    assert len(recurrent_cell._READ) == before + 2
    own, copy = steps(model, ids_BT[:, 18:], caches[0]), fork_state(caches[1])
    # The same states, in another model: it makes of them what it would of a copy.
    found, expected = (steps(other, ids_BT[:, 18:], cache) for cache in (caches[1], copy))
    assert torch.equal(found, expected) and not torch.equal(found, own)
    del cache, caches, copy
    assert len(recurrent_cell._READ) == before


@torch.no_grad()
def test_rows_that_have_ended_and_others(monkeypatch):
    """A step in which some rows have no token; LongNet plans it, Block-Recurrent does not."""
    for name in ("block_recurrent", "longnet"):
        model = build(name, next(iter(MODELS[name].config.variants)))
        ids_BT, mask_B1 = torch.randint(31, (3, 40)), torch.tensor([[1], [0], [1]])
        results = []
        for knows in (True, False):
            with monkeypatch.context() as patch:
                if not knows:
                    without_clocks(patch)
                cache = new_cache(model.config)
                steps(model, ids_BT[:, :9], cache)
                before = [{key: x.clone() for key, x in y.tensors.items()} for y in cache.layers]
                steps(model, ids_BT[:, 9:15], cache, attention_mask=mask_B1)
                for layer, held in zip(cache.layers, before):
                    assert all(torch.equal(x[1], held[key][1]) for key, x in layer.tensors.items())
                results.append(steps(model, ids_BT[:, 15:], cache))
        torch.testing.assert_close(*results, rtol=0, atol=1e-11)


def test_with_gradients_operators_are_those_that_have_them():
    model = BlockRecurrentForCausalLM(
        BlockRecurrentConfig(**SIZES | BlockRecurrentConfig.variants["default"])
    )
    ids_BT, cache = torch.randint(31, (1, 4)), new_cache(model.config)
    steps(model, ids_BT, cache).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@torch.no_grad()
def test_weights_that_change_within_a_window():
    """What was read of the states is read anew by other weights."""
    model = build("block_recurrent", "default")
    ids_BT = torch.randint(31, (1, 70), generator=torch.Generator().manual_seed(3))
    cache = model(ids_BT[:, :66], use_cache=True).past_key_values
    steps(model, ids_BT[:, 66:68], cache)
    for weight in model.parameters():
        weight.mul_(1.3)
    copied = fork_state(cache)  # other tensors, of which nothing has been read
    found = steps(model, ids_BT[:, 68:], cache)
    torch.testing.assert_close(found, steps(model, ids_BT[:, 68:], copied), rtol=0, atol=1e-12)
