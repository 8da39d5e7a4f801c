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
}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}


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


def alibi(mixer, own_place, places):
    """-m d: slopes of four heads."""
    return -(4.0 ** -torch.arange(1.0, 5, dtype=torch.float64))[:, None] * (own_place - places)


def t5(mixer, own_place, places):
    """A bucket for each distance; the last, for all from 5 on, has a number of its own."""
    return mixer.position_bias.table[(own_place - places).long().clamp(max=5)].T


def fire(mixer, own_place, places):
    """Of the place in the cache and the distances there."""
    own, bias = mixer.position_bias, (own_place - places)[:, None] * mixer.position_bias.c.abs()
    largest = max(own_place, own.length_factor.abs().item() * mixer.config.fire_init_length)
    share = (1 + bias).log() / ((1 + own.c.abs() * largest).log() + 1e-6)
    hidden = (share * own.up_weight + own.up_bias).relu()
    return (hidden @ own.down_weight.T + own.down_bias).T


BIASES = {"alibi": alibi, "t5": t5, "fire": fire}
FIELDS = {
    "t5": {"relative_attention_num_buckets": 6, "relative_attention_max_distance": 5},
    "fire": {"fire_init_length": 5},
    "xpos": {"xpos_scale_base": 8},
}


def attention(mixer, x_D, cache, theta):
    """A token's attention over the cache, which it is the last entry of."""
    heads, groups, dim = mixer.num_heads, mixer.num_groups, mixer.head_dim
    cache.add(
        (mixer.k_proj.weight @ x_D).view(groups, dim),
        (mixer.v_proj.weight @ x_D).view(groups, dim),
    )
    own_place = len(cache.keys) - 1
    q_HK, k_SHK = (mixer.q_proj.weight @ x_D).view(heads, dim), torch.stack(cache.keys)
    places, kind = torch.arange(len(k_SHK), dtype=torch.float64), mixer.position_type
    if kind == "xpos":  # whose pairs are neighbours
        q_HK, k_SHK = (x.unflatten(-1, (-1, 2)).mT.flatten(-2) for x in (q_HK, k_SHK))
        steps = 2 * torch.arange(dim // 2, dtype=torch.float64)
        zeta = ((steps + 0.4 * dim) / (1.4 * dim)).repeat(2)
        decay_SK = zeta ** ((own_place - places)[:, None] / mixer.config.xpos_scale_base)
    if theta is not None:
        q_HK = turned(q_HK, own_place, theta)
        k_SHK = torch.stack([turned(key, place, theta) for place, key in enumerate(k_SHK)])
    if kind == "xpos":
        k_SHK = k_SHK * decay_SK[:, None]
    k_SHK, v_SHV = (
        x.repeat_interleave(heads // groups, dim=1) for x in (k_SHK, torch.stack(cache.values))
    )
    score_HS = torch.einsum("hk,shk->hs", q_HK, k_SHK) / dim**0.5
    if kind in BIASES:
        score_HS = score_HS + BIASES[kind](mixer, own_place, places)
    p_HS = score_HS.softmax(-1)
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
            theta = config.rope_parameters and config.rope_parameters["rope_theta"]
            x_D = x_D + attention(block.mixer, normed(block.mixer_norm, x_D), cache, theta)
            y_D, mlp = normed(block.mlp_norm, x_D), block.mlp
            hidden_F = silu(mlp.gate_proj.weight @ y_D) * (mlp.up_proj.weight @ y_D)
            x_D = x_D + mlp.down_proj.weight @ hidden_F
        logits.append(model.lm_head.weight @ normed(decoder.norm, x_D))
    return torch.stack(logits)


@torch.no_grad()
@pytest.mark.parametrize(
    ("num_sinks", "window", "kind"),
    [
        *[(4, 8, "rope"), (1, 5, "rope"), (3, 2, "rope"), (6, 4, "rope"), (2, 1, "rope")],
        *[(3, 4, kind) for kind in ("alibi", "t5", "fire", "xpos", None)],
    ],
)
def test_logits_are_those_of_the_rolling_cache(num_sinks, window, kind):
    torch.manual_seed(num_sinks)
    fields = SIZES | FIELDS.get(kind, {}) | (ROPE if kind in ("rope", "xpos") else {})
    fields |= {"num_sink_tokens": num_sinks, "sliding_window": window}
    config = SlidingWindowConfig(position_embedding_type=kind, **fields)
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
