"""Landmark attention in GPT's block against its equations."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import gelu, layer_norm
from transformers import AutoModelForCausalLM
from ways import worst

from zoo.hub.convert import convert

GPT = {
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 24,
    "vocab_size": 61,
    "bias": False,
    "mem_freq": 5,
    "landmark_id": 60,
    "sequence_length": 64,
    "dropout": 0.0,
}


def gpt_weights():
    generator = torch.Generator().manual_seed(3)
    shapes = {"transformer.wte.weight": (61, 24), "transformer.ln_f.weight": (24,)}
    parts = {"attn.c_attn": (72, 24), "attn.c_proj": (24, 24), "mlp.c_fc": (96, 24)}
    parts |= {"mlp.c_proj": (24, 96), "ln_1": (24,), "ln_2": (24,)}
    for layer in range(2):
        shapes |= {f"transformer.h.{layer}.{x}.weight": shape for x, shape in parts.items()}
    return {
        name: torch.randn(shape, generator=generator) * (0.3 if len(shape) == 2 else 1.0)
        for name, shape in shapes.items()
    }


def gpt_by_definition(weights, ids, size):
    """The equations, a query at a time; ids has the landmarks in it."""
    w = {name.removeprefix("transformer."): x.double() for name, x in weights.items()}
    x, heads, width = w["wte.weight"][ids], 4, 6
    angle = torch.arange(len(ids))[:, None] * 10000.0 ** (-torch.arange(3).double() * 2 / width)
    rotation = torch.polar(torch.ones_like(angle), angle)[:, None]
    for layer in range(2):
        part = {name.split(".", 2)[2]: x for name, x in w.items() if name.startswith(f"h.{layer}.")}
        normed = layer_norm(x, (24,), part["ln_1.weight"], eps=1e-5)
        q, k, v = (normed @ part["attn.c_attn.weight"].T).view(len(ids), 3, heads, width).unbind(1)
        q, k = (
            torch.view_as_real(torch.view_as_complex(y.reshape(len(ids), heads, 3, 2)) * rotation)
            for y in (q, k)
        )
        q, k = q.flatten(2), k.flatten(2)
        y = torch.zeros_like(v)
        for i in range(len(ids)):
            begin = i // size * size
            for head in range(heads):
                s = k[:, head] @ q[i, head] / width**0.5
                own = [j for j in range(begin, i + 1) if j % size != size - 1]
                marks = list(range(size - 1, begin, size))
                p = s[own + marks].softmax(0)
                y[i, head] = p[: len(own)] @ v[own, head]
                for weight, mark in zip(p[len(own) :], marks):
                    block = list(range(mark - size + 1, mark))
                    y[i, head] += weight * (s[block] - s[block].logsumexp(0)).exp() @ v[block, head]
        x = x + y.flatten(1) @ part["attn.c_proj.weight"].T
        normed = layer_norm(x, (24,), part["ln_2.weight"], eps=1e-5)
        x = x + gelu(normed @ part["mlp.c_fc.weight"].T) @ part["mlp.c_proj.weight"].T
    return layer_norm(x, (24,), w["ln_f.weight"], eps=1e-5) @ w["wte.weight"].T


@pytest.mark.parametrize("is_nested", [False, True])
def test_gpt_block_is_its_definition(tmp_path, is_nested):
    source = tmp_path / "theirs"
    source.mkdir()
    weights = gpt_weights()
    if is_nested:
        (source / "config.json").write_text(json.dumps({"args": GPT, "val_loss": 3.0}))
        save_file({f"_orig_mod.{k}": x for k, x in weights.items()}, source / "model.safetensors")
    else:
        (source / "config.json").write_text(json.dumps(GPT))
        save_file(weights, source / "model.safetensors")
    convert("landmark-gpt", source, tmp_path / "ours")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float64).eval()
    stream = torch.randint(0, 60, (29,), generator=torch.Generator().manual_seed(5))
    stream[5::6] = 60
    is_text = torch.arange(29) % 6 != 5
    expected = gpt_by_definition(weights, stream, 6)[is_text]
    with torch.no_grad():
        assert worst(model(stream[is_text][None]).logits[0], expected) < 1e-9


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"enable_rem_score": True}, "scores of the remainder"),
        ({"pos_jump_on_mem": 3}, "positions that jump"),
        ({"softmax_func": "nomem"}, "the softmax in groups"),
        ({"model": "base_rotary"}, "expected 'landmark'"),
        ({"mem_freq": None}, "neither mem_freq nor mem_cache_freq"),
        ({"bias": True}, "without bias"),
        ({"tricks": 3}, "does not know: tricks = 3"),
    ],
)
def test_other_models_of_theirs_are_refused(tmp_path, fields, words):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/config.json").write_text(json.dumps(GPT | fields))
    save_file(gpt_weights(), tmp_path / "theirs/model.safetensors")
    with pytest.raises(ValueError, match=words):
        convert("landmark-gpt", tmp_path / "theirs", tmp_path / "ours")
