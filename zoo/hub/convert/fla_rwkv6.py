"""flash-linear-attention's RWKV-6 (`RWKV6ForCausalLM`, fla-hub/rwkv6-7B-finch), both ways.

The authors' equations with narrower keys as an option, and norm_eps as the epsilon of every norm:
the head norm has 1e-5 there and 64e-5 in the authors' code. fla's own converter from the authors'
weights changes that in memory only, so that a saved model computes something else than it was
trained to; here it computes what fla does with the same files.
"""

from numbers import Real

import torch

from ...models.rwkv6 import MIXED, RWKV6Config
from .fla import expanded, read_rwkv, rwkv_mlp_width, rwkv_names, write_rwkv
from .format import FLA, Format, read_by_name, write_by_name

MIXED_THERE = "rwkvg"
AUTHORS_EPS = 64e-5


def is_one(config, names):
    """Whether a config.json is of this format."""
    return config.get("model_type") == "rwkv6" and "proj_low_rank_dim" in config


def read_config(fields, weights):
    """Our config from fla's fields."""
    common = read_rwkv(fields)
    fields.drop("it is how to run, not what to compute", "fuse_norm")
    hidden_size = fields.take("hidden_size", kind=int)
    ratio = fields.take("hidden_ratio", 3.5, kind=Real | None)
    width = fields.take("intermediate_size", None)
    eps = fields.take("norm_eps", 1e-5)
    if eps != AUTHORS_EPS:
        fields.notes.append(
            f"the head norm has fla's epsilon, {eps}. If these weights were the authors' once, "
            f"they were trained with {AUTHORS_EPS}: convert the original with rwkv-pth instead"
        )
    return RWKV6Config(
        hidden_size=hidden_size,
        intermediate_size=rwkv_mlp_width(hidden_size, 3.5 if ratio is None else ratio, width),
        num_attention_heads=fields.take("num_heads"),
        key_size=expanded(hidden_size, "expand_k", fields.take("expand_k", 0.5, kind=Real)),
        value_size=expanded(hidden_size, "expand_v", fields.take("expand_v", 1.0, kind=Real)),
        mix_lora_rank=fields.take("proj_low_rank_dim", 32),
        decay_lora_rank=fields.take("gate_low_rank_dim", 64),
        layer_norm_eps=eps,
        head_norm_eps=eps,
        **common,
    )


def write_config(config):
    """fla's fields from our config, and notes."""
    if config.head_norm_eps != config.layer_norm_eps:
        raise ValueError(
            f"head_norm_eps is {config.head_norm_eps}, layer_norm_eps {config.layer_norm_eps}: "
            "fla's RWKV-6 has one epsilon for all norms, and would compute something else. (Of the "
            "authors' two, `zoo convert rwkv6-hf --reverse` makes what llama.cpp reads.)"
        )
    values = write_rwkv(config) | {
        "architectures": ["RWKV6ForCausalLM"],
        "model_type": "rwkv6",
        "expand_k": config.key_size / config.hidden_size,
        "expand_v": config.value_size / config.hidden_size,
        "proj_low_rank_dim": config.mix_lora_rank,
        "gate_low_rank_dim": config.decay_lora_rank,
    }
    return values, []


def read_weights(weights, config):
    """Pairs of our name and fla's tensor."""
    order = [MIXED_THERE.index(name) for name in MIXED]
    ranks = len(MIXED), config.mix_lora_rank
    changes = {
        "mu": lambda x_bias: x_bias[order],
        "mix_lora_a": lambda x_RD: x_RD.view(*ranks, -1)[order].flatten(0, 1).t(),
        "mix_lora_b": lambda x_DR: x_DR.view(-1, *ranks)[:, order].permute(1, 2, 0),
        "decay_lora_a": torch.t,
        "decay_lora_b": torch.t,
    }
    return read_by_name(weights, config, tensor_names(config), changes)


def write_weights(weights, config):
    """Pairs of fla's name and our tensor."""
    order = [MIXED.index(name) for name in MIXED_THERE]
    ranks = len(MIXED), config.mix_lora_rank
    changes = {
        "mu": lambda mu: mu[order],
        "mix_lora_a": lambda a_DR: a_DR.t().reshape(*ranks, -1)[order].flatten(0, 1),
        "mix_lora_b": lambda b_5RD: b_5RD[order].permute(2, 0, 1).flatten(1),
        "decay_lora_a": torch.t,
        "decay_lora_b": torch.t,
    }
    return write_by_name(weights, config, tensor_names(config), changes)


def tensor_names(config):
    """Our name and fla's of each tensor."""
    mixer = [
        ("mu", "x_bias"),
        ("mu_x", "x_proj.0.mu"),
        ("mix_lora_a", "x_proj.0.linear.weight"),
        ("mix_lora_b", "x_proj.2.weight"),
        ("decay_lora_a", "w_proj.linear.lora.0.weight"),
        ("decay_lora_b", "w_proj.linear.lora.2.weight"),
        ("time_decay", "w_proj.linear.lora.2.bias"),
        ("bonus", "bonus"),
        ("r_proj.weight", "r_proj.linear.weight"),
        ("k_proj.weight", "k_proj.linear.weight"),
        ("v_proj.weight", "v_proj.linear.weight"),
        ("gate_proj.weight", "g_proj.linear.weight"),
    ]
    mlp = [
        ("mu_k", "key.mu"),
        ("mu_r", "receptance.mu"),
        ("k_proj.weight", "key.linear.weight"),
        ("v_proj.weight", "value.weight"),
        ("r_proj.weight", "receptance.linear.weight"),
    ]
    return rwkv_names(config, lambda layer: mixer, mlp)


FORMAT = Format(
    name="fla-rwkv6",
    title="fla-org/flash-linear-attention's RWKV6ForCausalLM (fla-hub/rwkv6-*); both ways",
    recognizes=is_one,
    expects="model_type 'rwkv6' with fla's fields (proj_low_rank_dim, ...)",
    read_config=read_config,
    read_weights=read_weights,
    library=FLA,
    architecture="rwkv6",
    write_config=write_config,
    write_weights=write_weights,
)
