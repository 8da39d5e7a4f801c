"""flash-linear-attention's Gated DeltaNet (`GatedDeltaNetForCausalLM`), both ways.

The paper's equations, as ours: theirs are three convolutions where ours is one over q, k and v, and
num_heads counts the heads of q and k, num_v_heads those of v, which are our num_attention_heads.
"""

import math
from numbers import Real

import torch

from ...models.gated_deltanet import GatedDeltaNetConfig
from .fla import (
    BLOCK,
    expanded,
    gated_mlp_width,
    general_names,
    read_common,
    read_general,
    read_swish,
    refuse_unless,
    write_general,
)
from .format import FLA, Format, read_by_name, write_by_name

GREATEST_KEY = 256
CONVOLUTIONS = tuple(f"{name}_conv1d.weight" for name in "qkv")


def is_one(config, names):
    """Whether a config.json is of this format."""
    return config.get("model_type") == "gated_deltanet"


def read_config(fields, weights):
    """Our config from fla's fields."""
    fields.refuse("allow_neg_eigval", "a beta of up to 2 has no counterpart here")
    fields.refuse("attnres_block_size", "residuals by attention have no counterpart here")
    for name, ours in {"use_gate": "gate", "use_short_conv": "convolutions"}.items():
        if not fields.take(name, True):
            raise ValueError(f"config.json has {name} = false: ours has its {ours}.")
    gate = fields.take("output_gate_activation", "swish")
    if gate not in ("swish", "silu"):
        raise ValueError(f"output_gate_activation is swish in ours, got {gate!r}.")
    read_swish(fields, "Gated DeltaNet")
    fields.drop("it is how to run, not what to compute", "fuse_norm", "fuse_swiglu")
    initializer_range = fields.take("initializer_range", 0.02)
    read_common(fields, training=("use_l2warp",))

    hidden_size = fields.take("hidden_size", kind=int)
    head_dim = fields.take("head_dim", 256, kind=int)
    key_heads = fields.take("num_heads", 6, kind=int)
    expand_v = fields.take("expand_v", 2.0, kind=Real)
    return GatedDeltaNetConfig(
        hidden_size=hidden_size,
        intermediate_size=gated_mlp_width(
            hidden_size,
            fields.take("hidden_ratio", 4, kind=Real | None),
            fields.take("intermediate_size", None),
        ),
        num_attention_heads=fields.take("num_v_heads", None) or key_heads,
        num_key_heads=key_heads,
        head_dim=head_dim,
        value_head_dim=expanded(head_dim, "expand_v", expand_v, "head_dim"),
        conv_size=fields.take("conv_size", 4),
        hidden_act="silu",
        rms_norm_eps=fields.take("norm_eps", 1e-6),
        initializer_range=initializer_range,
        **read_general(fields),
    )


def write_config(config):
    """fla's fields from our config, and notes."""
    refuse_unless(config, "Gated DeltaNet", {"hidden_act": ("silu",)})
    if config.head_dim > GREATEST_KEY:
        raise ValueError(
            f"head_dim is {config.head_dim}: fla's Gated DeltaNet has {GREATEST_KEY} at most."
        )
    expand_v = config.value_head_dim / config.head_dim
    if int(config.head_dim * expand_v) < config.value_head_dim:
        # fla cuts the product off where a rounded quotient makes it a little too small.
        expand_v = math.nextafter(expand_v, math.inf)
    values = write_general(config) | {
        "architectures": ["GatedDeltaNetForCausalLM"],
        "model_type": "gated_deltanet",
        "num_heads": config.num_key_heads,
        "num_v_heads": config.num_attention_heads,
        "head_dim": config.head_dim,
        "expand_v": expand_v,
        "conv_size": config.conv_size,
        "use_gate": True,
        "use_short_conv": True,
        "allow_neg_eigval": False,
        "hidden_act": "swish",
        "norm_eps": config.rms_norm_eps,
        "initializer_range": config.initializer_range,
    }
    return values, []


def read_weights(weights, config):
    """Pairs of our name and fla's tensor."""
    yield from read_by_name(weights, config, tensor_names(config), {})
    for layer in range(config.num_hidden_layers):
        names = [f"model.layers.{layer}.attn.{name}" for name in CONVOLUTIONS]
        joined = weights.take(*names, change=lambda *parts: torch.cat(parts))
        yield f"model.layers.{layer}.mixer.convolution.weight", joined


def write_weights(weights, config):
    """Pairs of fla's name and our tensor."""
    yield from write_by_name(weights, config, tensor_names(config), {})
    keys = config.num_key_heads * config.head_dim
    widths = keys, keys, config.num_attention_heads * config.value_head_dim
    for layer in range(config.num_hidden_layers):
        joined = weights.take(f"model.layers.{layer}.mixer.convolution.weight")
        for name, part in zip(CONVOLUTIONS, joined.split(widths), strict=True):
            yield f"model.layers.{layer}.attn.{name}", part.clone()


def tensor_names(config):
    """Our name and fla's of each tensor but those of the convolutions."""
    yield from general_names(config)
    names = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in BLOCK.items()}
    names |= {f"mixer.{x}_proj.weight": f"attn.{x}_proj.weight" for x in ("q", "k", "v", "a", "b")}
    names |= {
        "mixer.gate_proj.weight": "attn.g_proj.weight",
        "mixer.out_proj.weight": "attn.o_proj.weight",
        "mixer.head_norm.weight": "attn.o_norm.weight",
        "mixer.log_a": "attn.A_log",
        "mixer.dt_bias": "attn.dt_bias",
    }
    for layer in range(config.num_hidden_layers):
        for ours, theirs in names.items():
            yield f"model.layers.{layer}.{ours}", f"model.layers.{layer}.{theirs}"


FORMAT = Format(
    name="fla-gated-deltanet",
    title="fla-org/flash-linear-attention's GatedDeltaNetForCausalLM; both ways",
    recognizes=is_one,
    expects="model_type 'gated_deltanet'",
    library=FLA,
    read_config=read_config,
    read_weights=read_weights,
    architecture="gated_deltanet",
    write_config=write_config,
    write_weights=write_weights,
)
