"""Attention sinks against StreamingLLM's own procedure, as the paper states it.

Xiao et al. 2023, https://arxiv.org/abs/2309.17453, section 3.2: a cache of the first S tokens and
the last W, keys kept before RoPE, and positions given anew at each step by the place in the cache.
`zoo.models.sliding_window` never turns a stored key again; what it does instead must be the same
numbers.
"""

import pytest
import torch
from torch.nn.functional import rms_norm, silu

from zoo.models.sliding_window import SlidingWindowConfig, SlidingWindowForCausalLM

SIZES = {
    "vocab_size": 31,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
}


def turned(x_HK, place, theta):
    """RoPE of one token at a place: channel j and j + K / 2 are a complex number."""
    half = x_HK.shape[-1] // 2
    angle = place * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    complex_HK = torch.complex(x_HK[:, :half], x_HK[:, half:]) * torch.exp(1j * angle)
    return torch.cat([complex_HK.real, complex_HK.imag], dim=-1)


class RollingCache:
    """One layer's keys, before RoPE, and values: the first S tokens, then the last W."""

    def __init__(self, num_sinks, window):
        self.num_sinks, self.window = num_sinks, window
        self.keys, self.values = [], []

    def add(self, key_HK, value_HV):
        for held, new in ((self.keys, key_HK), (self.values, value_HV)):
            held.append(new)
            if len(held) > self.num_sinks + self.window:
                del held[self.num_sinks]


def attention(mixer, x_D, cache, theta):
    """A token's attention over the cache, which it is the last entry of."""
    heads, groups, dim = mixer.num_heads, mixer.num_groups, mixer.head_dim
    cache.add(
        (mixer.k_proj.weight @ x_D).view(groups, dim),
        (mixer.v_proj.weight @ x_D).view(groups, dim),
    )
    own_place = len(cache.keys) - 1
    q_HK = turned((mixer.q_proj.weight @ x_D).view(heads, dim), own_place, theta)
    k_SHK = torch.stack([turned(key, place, theta) for place, key in enumerate(cache.keys)])
    k_SHK, v_SHV = (
        x.repeat_interleave(heads // groups, dim=1) for x in (k_SHK, torch.stack(cache.values))
    )
    p_HS = (torch.einsum("hk,shk->hs", q_HK, k_SHK) / dim**0.5).softmax(-1)
    return mixer.out_proj.weight @ torch.einsum("hs,shv->hv", p_HS, v_SHV).flatten()


def paper_logits(model, ids):
    """Logits [T, vocab] of a stream, token by token."""
    config, decoder = model.config, model.model
    caches = [RollingCache(config.num_sink_tokens, config.sliding_window) for _ in decoder.layers]

    def normed(norm, x_D):
        return rms_norm(x_D, x_D.shape, norm.weight, config.rms_norm_eps)

    logits = []
    for token in ids:
        x_D = decoder.embed_tokens.weight[token]
        for block, cache in zip(decoder.layers, caches):
            theta = config.rope_parameters["rope_theta"]
            x_D = x_D + attention(block.mixer, normed(block.mixer_norm, x_D), cache, theta)
            y_D, mlp = normed(block.mlp_norm, x_D), block.mlp
            hidden_F = silu(mlp.gate_proj.weight @ y_D) * (mlp.up_proj.weight @ y_D)
            x_D = x_D + mlp.down_proj.weight @ hidden_F
        logits.append(model.lm_head.weight @ normed(decoder.norm, x_D))
    return torch.stack(logits)


@torch.no_grad()
@pytest.mark.parametrize(("num_sinks", "window"), [(4, 8), (1, 5), (3, 2), (6, 4), (2, 1)])
def test_logits_are_those_of_the_rolling_cache(num_sinks, window):
    torch.manual_seed(num_sinks)
    config = SlidingWindowConfig(num_sink_tokens=num_sinks, sliding_window=window, **SIZES)
    model = SlidingWindowForCausalLM(config).double().eval()
    for x in model.parameters():
        x += 0.3 * torch.randn_like(x)  # so that attention chooses
    ids = torch.randint(SIZES["vocab_size"], (60,))
    expected = paper_logits(model, ids)
    for sizes in ([60], [1] * 60, [7, 1, 30, 22]):
        cache, logits = None, []
        for piece in ids[None].split(sizes, dim=1):
            output = model(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits[0])
        # float64 rounding over three layers is near 1e-13; a wrong place moves logits by far more.
        assert (torch.cat(logits) - expected).abs().max() < 1e-9
    # Nor would a window alone do: the sinks decide something here.
    model.config.num_sink_tokens = 0
    plain = SlidingWindowForCausalLM(model.config).double().eval()
    plain.load_state_dict(model.state_dict())
    assert (plain(ids[None]).logits[0] - expected)[-20:].abs().amax(-1).min() > 1e-3
