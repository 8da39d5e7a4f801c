"""The state as a cache: taking tokens back, copies, files, rows."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, StaticCache

import zoo
from zoo.core.state import ROLLBACK_TOKENS, fork_state, load_state, save_state, state_bytes

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


@pytest.fixture(scope="module", params=zoo.MODELS.values(), ids=zoo.MODELS)
def model(request):
    torch.manual_seed(0)
    return request.param.causal_lm(request.param.config(**TINY)).double().eval()


def tokens(batch, time, seed=0):
    return torch.randint(0, 97, (batch, time), generator=torch.Generator().manual_seed(seed))


def run(model, ids, cache=None, **kwargs):
    with torch.no_grad():
        output = model(ids, past_key_values=cache, use_cache=True, **kwargs)
    return output.logits, output.past_key_values


def close(a, b):
    return (a - b).abs().max() < 1e-12


@pytest.mark.parametrize("removed", [(0,), (1,), (3,), (7,), (2, 3), (4, 8)])
def test_crop_takes_tokens_back(model, removed):
    """Passes of 20, 5 and 3 tokens; then some of the 28 are taken back, over several passes too."""
    ids, other = tokens(1, 28), tokens(1, 6, seed=1)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    for start, end in ((0, 20), (20, 25), (25, 28)):
        _, cache = run(model, ids[:, start:end], cache)
    for number in removed:
        cache.crop(-number)
    kept = 28 - sum(removed)
    assert cache.get_seq_length() == kept
    positions = torch.arange(kept, kept + 6)[None]
    logits, cache = run(model, other, cache, position_ids=positions)
    expected, again = run(model, torch.cat([ids[:, :kept], other], dim=1))
    assert close(logits, expected[:, kept:])
    assert cache.get_seq_length() == kept + 6
    for layer, expected_layer in zip(cache.layers, again.layers, strict=True):
        assert torch.equal(layer.clock, expected_layer.clock)
        for name, x in layer.tensors.items():
            assert close(x, expected_layer.tensors[name])


def test_crop_with_left_padding(model):
    ids, mask = tokens(1, 12), torch.ones(1, 15, dtype=torch.long)
    mask[:, :4] = 0
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    _, cache = run(model, ids, cache, attention_mask=mask[:, :12])
    cache.crop(-2)
    logits, _ = run(model, ids[:, 10:] + 1, cache, attention_mask=mask[:, :12])
    alone, _ = run(model, torch.cat([ids[:, 4:10], ids[:, 10:] + 1], dim=1))
    assert close(logits, alone[:, 6:])


def test_crop_beyond_what_is_remembered(model):
    _, cache = run(model, tokens(1, 5))
    with pytest.raises(ValueError, match="remembers the last 0; call activate_past_recording"):
        cache.crop(-1)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    for _ in range(ROLLBACK_TOKENS + 10):
        _, cache = run(model, tokens(1, 1), cache)
    assert len(cache.layers[0].segments) <= ROLLBACK_TOKENS + 1
    cache.crop(-ROLLBACK_TOKENS)
    assert cache.get_seq_length() == 10


def test_fork_leaves_the_other_alone(model):
    ids = tokens(2, 9)
    _, cache = run(model, ids[:, :5])
    before = [x.clone() for x in cache.layers[0].tensors.values()]
    fork = fork_state(cache)
    first, _ = run(model, ids[:, 5:], fork)
    assert all(map(torch.equal, before, cache.layers[0].tensors.values()))
    second, _ = run(model, ids[:, 5:], cache)
    assert torch.equal(first, second)


def test_fork_of_a_state_under_autograd(model):
    cache = model(tokens(1, 4), use_cache=True).past_key_values
    fork = fork_state(cache)
    model(tokens(1, 4), past_key_values=fork).logits.sum().backward()
    assert model.model.embed_tokens.weight.grad is not None
    model.zero_grad()


def test_save_and_load(model, tmp_path):
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    _, cache = run(model, ids[:, :5], attention_mask=mask[:, :5])
    save_state(cache, tmp_path / "state.safetensors")
    loaded = load_state(tmp_path / "state.safetensors", model.config)
    assert loaded.get_seq_length() == 5
    expected, _ = run(model, ids[:, 5:], cache)
    logits, _ = run(model, ids[:, 5:], loaded)
    assert torch.equal(logits, expected)


def test_state_files_that_do_not_fit(model, tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(ValueError, match="got one without state"):
        save_state(DynamicCache(config=model.config), tmp_path / "x")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="expected a state written by zoo"):
        load_state(tmp_path / "foreign.safetensors", model.config)
    _, cache = run(model, tokens(1, 2))
    save_state(cache, tmp_path / "state.safetensors")
    deeper = type(model.config)(**TINY | {"num_hidden_layers": 3})
    with pytest.raises(ValueError, match="expected the state of 3 layers, got 2"):
        load_state(tmp_path / "state.safetensors", deeper)


def test_rows_are_reordered_repeated_selected(model):
    ids = tokens(3, 6)
    _, cache = run(model, ids[:, :4])
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3, 5]))
    order = torch.tensor([2, 0, 1])
    logits, _ = run(model, ids[order, 4:], cache)
    expected, _ = run(model, ids[order])
    assert close(logits, expected[:, 4:])


def test_reset_forgets(model):
    ids = tokens(1, 6)
    expected, cache = run(model, ids)
    cache.reset()
    assert cache.get_seq_length() == 0
    logits, _ = run(model, ids, cache)
    assert torch.equal(logits, expected)


def test_a_static_cache_and_one_without_config(model):
    ids = tokens(1, 6)
    expected, _ = run(model, ids)
    for cache in (StaticCache(config=model.config, max_cache_len=64), DynamicCache()):
        _, cache = run(model, ids[:, :3], cache)
        logits, _ = run(model, ids[:, 3:], cache)
        assert close(logits, expected[:, 3:])


def test_state_size_is_what_the_cache_holds(model):
    for time in (1, 70, 300):
        _, cache = run(model, tokens(2, time))
        assert state_bytes(cache) == 2 * model.state_size(time)


def test_caches_that_do_not_fit(model):
    _, cache = run(model, tokens(2, 3))
    with pytest.raises(ValueError, match="state of 2 rows, got a batch of 1"):
        run(model, tokens(1, 3), cache)
    llama = DynamicCache(config=LlamaConfig(num_hidden_layers=2))
    with pytest.raises(ValueError, match="expected a cache of 2 recurrent state layers"):
        run(model, tokens(1, 3), llama)
