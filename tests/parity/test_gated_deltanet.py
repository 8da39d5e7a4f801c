"""Gated DeltaNet against the linear layer of transformers' Qwen3-Next, on random weights."""

import types

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers.models.qwen3_next import modeling_qwen3_next as theirs
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig

from zoo import GatedDeltaNetConfig
from zoo.core.sequence import Sequence
from zoo.core.state import State
from zoo.models.gated_deltanet import GatedDeltaRule

WIDTH, KEY_DIM, VALUE_DIM = 24, 6, 10


class Wide(types.ModuleType):
    """torch, but that float32 is float64 in it: their code computes in float32 whatever it gets."""

    def __init__(self):
        super().__init__("torch")

    def __getattr__(self, name):
        return torch.float64 if name == "float32" else getattr(torch, name)


def layers(key_heads, heads, size):
    """Their layer and ours, with the same random weights, in float64."""
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_key_heads=key_heads,
        linear_num_value_heads=heads,
        linear_key_head_dim=KEY_DIM,
        linear_value_head_dim=VALUE_DIM,
        linear_conv_kernel_dim=size,
    )
    layer = theirs.Qwen3NextGatedDeltaNet(config, 0).double()
    config = GatedDeltaNetConfig(
        hidden_size=WIDTH,
        num_attention_heads=heads,
        num_key_heads=key_heads,
        head_dim=KEY_DIM,
        value_head_dim=VALUE_DIM,
        conv_size=size,
        rms_norm_eps=config.rms_norm_eps,
    )
    ours = GatedDeltaRule(config, 0).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        # Their rows lie by heads of q: its q, its k, its heads of v, and those of the gate.
        each = heads // key_heads
        rows = layer.in_proj_qkvz.weight.unflatten(0, (key_heads, -1))
        parts = rows.split([KEY_DIM, KEY_DIM, each * VALUE_DIM, each * VALUE_DIM], dim=1)
        for name, part in zip(("q", "k", "v", "gate"), parts, strict=True):
            getattr(ours, f"{name}_proj").weight.copy_(part.flatten(0, 1))
        b, a = layer.in_proj_ba.weight.unflatten(0, (key_heads, 2, each)).unbind(1)
        ours.b_proj.weight.copy_(b.flatten(0, 1))
        ours.a_proj.weight.copy_(a.flatten(0, 1))
        ours.convolution.weight.copy_(layer.conv1d.weight)
        ours.log_a.copy_(layer.A_log)
        ours.dt_bias.copy_(layer.dt_bias)
        ours.head_norm.weight.copy_(layer.norm.weight)
        ours.out_proj.weight.copy_(layer.out_proj.weight)
    return layer, ours


def run(layer, x_BTD, sizes):
    """Ours, in pieces of these sizes."""
    state, outputs = State({"conv_NWD": None, "memory_NHKV": None}, is_kept=True), []
    for piece_BTD in x_BTD.split(sizes, dim=1):
        sequence = Sequence.open(piece_BTD.shape[:2], piece_BTD.device)
        y_BTD, state = layer(piece_BTD, sequence, state)
        outputs.append(y_BTD)
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize(("key_heads", "heads", "size"), [(3, 3, 4), (2, 6, 3), (1, 2, 2)])
def test_equals_qwen3_next(key_heads, heads, size, monkeypatch):
    layer, ours = layers(key_heads, heads, size)
    monkeypatch.setattr(theirs, "torch", Wide())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    x_BTD = torch.randn(2, 131, WIDTH, dtype=torch.float64).requires_grad_()
    weight = torch.randn(2, 131, WIDTH, dtype=torch.float64)
    expected = layer(x_BTD)
    (expected_grad,) = torch.autograd.grad((expected * weight).sum(), x_BTD)
    for sizes in ([131], [1, 2, 64, 64], [1] * 131):
        found = run(ours, x_BTD, sizes)
        (grad,) = torch.autograd.grad((found * weight).sum(), x_BTD)
        assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()
        assert (grad - expected_grad).abs().max() <= 1e-9 * expected_grad.abs().max()


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(StrictDataclassClassValidationError, match="num_key_heads, got 8 and 3"):
        GatedDeltaNetConfig(num_key_heads=3)
    with pytest.raises(StrictDataclassClassValidationError, match="conv_size is at least 2, got 1"):
        GatedDeltaNetConfig(conv_size=1)
