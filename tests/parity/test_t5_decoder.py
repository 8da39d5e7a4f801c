"""A sliding_window model with T5's bias against transformers' T5Stack as a decoder alone."""

import pytest
import torch
from torch import nn
from transformers import T5Config
from transformers.models.t5 import modeling_t5

from zoo import SlidingWindowConfig, SlidingWindowModel

LAYERS, BUCKETS, FARTHEST = 3, 8, 20
PARTS = {
    "mixer_norm": "layer.0.layer_norm",
    "mixer.q_proj": "layer.0.SelfAttention.q",
    "mixer.k_proj": "layer.0.SelfAttention.k",
    "mixer.v_proj": "layer.0.SelfAttention.v",
    "mixer.out_proj": "layer.0.SelfAttention.o",
    "mlp_norm": "layer.2.layer_norm",
    "mlp.gate_proj": "layer.2.DenseReluDense.wi_0",
    "mlp.up_proj": "layer.2.DenseReluDense.wi_1",
    "mlp.down_proj": "layer.2.DenseReluDense.wo",
}


class WideNorm(nn.RMSNorm):
    """T5's norm without its step through float32, which a comparison in float64 would see."""

    def __init__(self, size, eps):
        super().__init__(size, eps=eps)


@pytest.fixture(scope="module")
def pair():
    """T5's decoder, and ours with its weights: every layer has the table of its first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_t5, "T5LayerNorm", WideNorm)
        return build_pair()


def build_pair():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=67,
        d_model=48,
        d_kv=12,
        d_ff=80,
        num_layers=LAYERS,
        num_heads=4,
        relative_attention_num_buckets=BUCKETS,
        relative_attention_max_distance=FARTHEST,
        feed_forward_proj="gated-gelu",
        is_decoder=True,
        is_encoder_decoder=False,
        dropout_rate=0.0,
        initializer_factor=3.0,
    )
    theirs = modeling_t5.T5Stack(config).double().eval()
    torch.nn.init.normal_(theirs.embed_tokens.weight)
    ours = SlidingWindowModel(
        SlidingWindowConfig(
            vocab_size=67,
            hidden_size=48,
            head_dim=12,
            intermediate_size=80,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            hidden_act="gelu_new",
            rms_norm_eps=1e-6,
            sliding_window=None,
            position_embedding_type="t5",
            relative_attention_num_buckets=BUCKETS,
            relative_attention_max_distance=FARTHEST,
            attention_scale=1.0,
        )
    ).double()
    official = theirs.state_dict()
    table = official["block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    weights = {"embed_tokens.weight": official["embed_tokens.weight"]}
    weights["norm.weight"] = official["final_layer_norm.weight"]
    for i in range(LAYERS):
        weights[f"layers.{i}.mixer.position_bias.table"] = table
        for our_name, name in PARTS.items():
            weights[f"layers.{i}.{our_name}.weight"] = official[f"block.{i}.{name}.weight"]
    ours.load_state_dict(weights)
    return theirs, ours.eval()


def test_outputs_and_the_gradient_of_the_table(pair):
    theirs, ours = pair
    ids = torch.randint(67, (2, 70), generator=torch.Generator().manual_seed(1))
    cotangent = torch.randn(2, 70, 48, dtype=torch.float64)
    expected = theirs(input_ids=ids, use_cache=False).last_hidden_state
    found = ours(ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    table = theirs.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    (grad,) = torch.autograd.grad(expected, table, cotangent)
    tables = [layer.mixer.position_bias.table for layer in ours.layers]
    total = sum(torch.autograd.grad(found, tables, cotangent))
    torch.testing.assert_close(total, grad, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_left_padding_and_pieces(pair):
    theirs, ours = pair
    ids = torch.randint(67, (2, 50), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    expected = theirs(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    cache, found = None, []
    for start, piece in zip((0, 30, 31), ids.split([30, 1, 19], dim=1)):
        columns = mask[:, : start + piece.shape[1]]
        output = ours(piece, attention_mask=columns, past_key_values=cache, use_cache=True)
        cache, found = output.past_key_values, [*found, output.last_hidden_state]
    visible = mask.bool()
    found = torch.cat(found, dim=1)
    torch.testing.assert_close(found[visible], expected[visible], rtol=0, atol=1e-11)
