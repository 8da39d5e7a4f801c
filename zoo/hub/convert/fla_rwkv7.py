"""flash-linear-attention's RWKV-7 (`RWKV7ForCausalLM`, fla-hub/rwkv7-*), both ways.

The authors' equations, but the head norm's epsilon is head_dim * norm_eps, which is the authors'
64e-5 for heads of 64 alone, and with fuse_norm, kk is divided by sqrt(|kk|^2 + 1e-6). Without, it
is divided as in the authors' code. Old files have one `x_x` in place of six `x_*`.
"""

import math
from numbers import Real

import torch

from ...models.rwkv7 import MIXED, RWKV7Config
from .fla import read_rwkv, rwkv_mlp_width, rwkv_names, write_rwkv
from .format import FLA, Format, read_by_name, write_by_name

FUSED_REMOVAL_EPS = 1e-6
# Our name of a low-rank projection, fla's, its rank in fla's config and fla's default.
LORAS = {
    "decay": ("w_lora", "decay_low_rank_dim", 64),
    "rate": ("a_lora", "a_low_rank_dim", 64),
    "residual": ("v_lora", "v_low_rank_dim", 16),
    "gate": ("g_lora", "gate_low_rank_dim", 128),
}


def is_one(config, names):
    """Whether a config.json is of this format."""
    return config.get("model_type") == "rwkv7" and "a_low_rank_dim" in config


def read_config(fields, weights):
    """Our config from fla's fields."""
    common = read_rwkv(fields)
    hidden_size = fields.take("hidden_size", kind=int)
    ratio = fields.take("hidden_ratio", 4, kind=Real | None)
    width = fields.take("intermediate_size", None)
    eps = fields.take("norm_eps", 1e-5, kind=Real)
    head_size = fields.take("head_dim", 64, kind=int | None)
    num_heads = fields.take("num_heads", None, kind=int | None)
    if head_size is None:
        if not num_heads or hidden_size % num_heads:
            raise ValueError(
                f"config.json has head_dim = null, num_heads = {num_heads!r}: one of them says how "
                f"hidden_size = {hidden_size} divides into heads."
            )
        head_size = hidden_size // num_heads
    ranks = {}
    for name, (theirs, field, default) in LORAS.items():
        rank = fields.take(field, default)
        layer = min(1, common["num_hidden_layers"] - 1)
        first = f"model.layers.{layer}.attn.{theirs}.lora.0.weight"
        if rank is None and first in weights.tensors:  # fla's own rule, which has changed
            rank = weights.shape(first, 2)[0]
        ranks["value" if name == "residual" else name] = rank
    return RWKV7Config(
        hidden_size=hidden_size,
        intermediate_size=rwkv_mlp_width(hidden_size, 4 if ratio is None else ratio, width),
        head_size=head_size,
        value_size=_value_size(fields.take("value_dim", None)),
        **{f"{name}_lora_rank": rank for name, rank in ranks.items()},
        layer_norm_eps=eps,
        head_norm_eps=head_size * eps,
        removal_eps=FUSED_REMOVAL_EPS if fields.take("fuse_norm", True) else 0.0,
        **common,
    )


def _value_size(value_dim):
    if not isinstance(value_dim, list):
        return value_dim
    if len(set(value_dim)) != 1:
        raise ValueError(f"value_dim is the same in every layer of ours, got {value_dim}.")
    return value_dim[0]


def write_config(config):
    """fla's fields from our config, and notes."""
    expected = config.head_size * config.layer_norm_eps
    if not math.isclose(config.head_norm_eps, expected, rel_tol=1e-12):
        raise ValueError(
            f"head_norm_eps is {config.head_norm_eps}: fla's RWKV-7 has head_dim * norm_eps = "
            f"{expected} and would compute something else."
        )
    if config.removal_eps not in (0, FUSED_REMOVAL_EPS):
        raise ValueError(
            f"removal_eps is {config.removal_eps}: fla's RWKV-7 has {FUSED_REMOVAL_EPS}, or 0 "
            "without fuse_norm."
        )
    if config.key_size != config.hidden_size:
        raise ValueError(
            f"key_size is {config.key_size}: fla's RWKV-7 has hidden_size, {config.hidden_size}."
        )
    if config.value_size != config.hidden_size:
        raise ValueError(
            f"value_size is {config.value_size}: fla's RWKV-7 has hidden_size, "
            f"{config.hidden_size} (its value_dim takes more, its initialisation does not)."
        )
    if config.num_hidden_layers == 1:
        raise ValueError(
            "num_hidden_layers is 1: fla's RWKV-7 has 2 at least (its initialisation divides by "
            "one less)."
        )
    values = write_rwkv(config) | {
        "architectures": ["RWKV7ForCausalLM"],
        "model_type": "rwkv7",
        "head_dim": config.head_size,
        "value_dim": [config.value_size] * config.num_hidden_layers,
        "fuse_norm": config.removal_eps > 0,
    }
    for name, (_, field, _) in LORAS.items():
        values[field] = getattr(config, f"{'value' if name == 'residual' else name}_lora_rank")
    return values, []


def read_weights(weights, config):
    """Pairs of our name and fla's tensor."""
    changes = {"a": torch.t, "b": torch.t}
    yield from read_by_name(weights, config, tensor_names(config), changes)
    for layer in range(config.num_hidden_layers):
        attn = f"model.layers.{layer}.attn"
        if f"{attn}.x_x" in weights.tensors:
            mu = weights.take(f"{attn}.x_x", change=lambda x: x.view(len(MIXED), -1))
        else:
            mu = weights.take(
                *(f"{attn}.x_{name}" for name in MIXED),
                change=lambda *x: torch.stack([y.flatten() for y in x]),
            )
        yield f"model.layers.{layer}.mixer.mu", mu


def write_weights(weights, config):
    """Pairs of fla's name and our tensor."""
    changes = {"a": torch.t, "b": torch.t}
    yield from write_by_name(weights, config, tensor_names(config), changes)
    for layer in range(config.num_hidden_layers):
        mu = weights.take(f"model.layers.{layer}.mixer.mu")
        for name, mu_D in zip(MIXED, mu):
            yield f"model.layers.{layer}.attn.x_{name}", mu_D.view(1, 1, -1).clone()


def tensor_names(config):
    """Our name and fla's of each tensor but those of the token shift."""

    def mixer(layer):
        for ours, (theirs, _, _) in LORAS.items():
            if ours == "residual" and layer == 0:
                continue
            yield f"{ours}.a", f"{theirs}.lora.0.weight"
            yield f"{ours}.b", f"{theirs}.lora.2.weight"
            if ours != "gate":
                yield f"{ours}.bias", f"{theirs}.lora.2.bias"
        for name in ("k_k", "k_a", "r_k", "r_proj.weight", "k_proj.weight", "v_proj.weight"):
            yield name, name

    mlp = [("mu_k", "x_k"), ("k_proj.weight", "key.weight"), ("v_proj.weight", "value.weight")]
    return rwkv_names(config, mixer, mlp)


FORMAT = Format(
    name="fla-rwkv7",
    title="fla-org/flash-linear-attention's RWKV7ForCausalLM (fla-hub/rwkv7-*); both ways",
    recognizes=is_one,
    expects="model_type 'rwkv7' with fla's fields (a_low_rank_dim, ...)",
    read_config=read_config,
    read_weights=read_weights,
    library=FLA,
    architecture="rwkv7",
    write_config=write_config,
    write_weights=write_weights,
)
