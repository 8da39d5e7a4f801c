"""Sinks at one distance against LM-Infinite's own attention, and ALiBi's of them."""

import pytest
import torch
from goldens import golden_tensors
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import nn

from zoo import SlidingWindowConfig, SlidingWindowModel
from zoo.kernels.windowed_attention import visible_keys

NAME, HEADS, SIZE, WINDOW, SINKS, FARTHEST = "ops-lm-infinite", 4, 16, 8, 3, 8
FIELDS = {
    "vocab_size": 5,
    "hidden_size": 3 * HEADS * SIZE,
    "head_dim": SIZE,
    "num_attention_heads": HEADS,
    "num_hidden_layers": 1,
    "sliding_window": WINDOW,
    "num_sink_tokens": SINKS,
    "sink_distance": FARTHEST,
}


@pytest.fixture(scope="module")
def mixer():
    """A layer whose projections take queries, keys and values out of its input as they are."""
    model = SlidingWindowModel(SlidingWindowConfig(**FIELDS)).double()
    layer = model.layers[0].mixer
    for proj, part in zip(
        (layer.q_proj, layer.k_proj, layer.v_proj), torch.eye(3 * HEADS * SIZE).chunk(3)
    ):
        proj.weight.data.copy_(part)
    layer.out_proj = nn.Identity()

    def run(x_BTD, cache=None):
        class Stop(Exception):
            pass

        found = {}

        def keep(module, inputs, output):
            found["y_BTD"] = output[0]
            raise Stop

        hook = layer.register_forward_hook(keep)
        before = model.layers[0].mixer_norm
        model.layers[0].mixer_norm = nn.Identity()
        try:
            model(inputs_embeds=x_BTD, past_key_values=cache, use_cache=False)
        except Stop:
            return found["y_BTD"]
        finally:
            hook.remove()
            model.layers[0].mixer_norm = before

    return run


def test_official_numbers_and_gradients(mixer):
    golden = golden_tensors(NAME)
    leaves = [golden[x].clone().requires_grad_() for x in "qkv"]
    x_BTD = torch.cat([x.transpose(1, 2).flatten(2) for x in leaves], dim=-1)
    y_BTD = mixer(x_BTD)
    o_BHTV = y_BTD.unflatten(-1, (HEADS, SIZE)).transpose(1, 2)
    assert (o_BHTV - golden["o"]).abs().max() < 1e-12
    grads = torch.autograd.grad(o_BHTV, leaves, golden["cotangent"])
    for name, grad in zip("qkv", grads):
        assert (grad - golden[f"grad_{name}"]).abs().max() < 1e-12


def test_what_it_sees():
    visible_TS = golden_tensors(NAME)["visible"]
    length = len(visible_TS)
    ours_TS = visible_keys(length, length, WINDOW, device="cpu")[0]
    i_T1 = torch.arange(length)[:, None]
    is_sink_TS = (torch.arange(length) < SINKS) & (torch.arange(length) <= i_T1)
    assert torch.equal(ours_TS | is_sink_TS, visible_TS)


@torch.no_grad()
def test_alibi_of_sinks_is_of_that_distance():
    """With M the window, the nearest sink that has left it is where it was, others are nearer."""
    torch.manual_seed(0)
    fields = FIELDS | {"position_embedding_type": "alibi", "sink_distance": WINDOW}
    near = SlidingWindowModel(SlidingWindowConfig(**fields)).double().eval()
    ids = torch.randint(5, (1, WINDOW + SINKS + 5))
    expected = near(ids, use_cache=False).last_hidden_state
    cache, found = None, []
    for piece in ids.split([5, 1, 1, ids.shape[1] - 7], dim=1):
        output = near(piece, past_key_values=cache, use_cache=True)
        cache, found = output.past_key_values, [*found, output.last_hidden_state]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=0, atol=1e-12)
    # Token W sees one sink outside, at distance W: with places in the cache it is the same there.
    fields["sink_distance"] = "cache"
    other = SlidingWindowModel(SlidingWindowConfig(**fields)).double().eval()
    other.load_state_dict(near.state_dict())
    cached = other(ids, use_cache=False).last_hidden_state
    same = (cached - expected).abs().amax((0, 2)) < 1e-12
    assert same[: WINDOW + 1].all() and not same[WINDOW + 1 :].any()


@pytest.mark.parametrize(
    "fields",
    [
        {"num_sink_tokens": 0},
        {"sink_distance": 0},
        {"position_embedding_type": "fire"},
        {"position_embedding_type": "xpos"},
    ],
)
def test_refused(fields):
    with pytest.raises(StrictDataclassClassValidationError, match="sink_distance is 'cache', or"):
        SlidingWindowConfig(**(FIELDS | fields))
