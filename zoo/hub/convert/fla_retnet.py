"""flash-linear-attention's RetNet, as in fla-hub/retnet-1.3B-100B, both ways.

Another model than torchscale's: rotation of halves with RoPE's angles, no normalisation by s_n, a
learned weight in the head norm, SwiGLU. Our `RetNetConfig` has these as options, and only a model
that has them all goes back.
"""

from numbers import Real

from ...models.retnet import RetNetConfig
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

SAME_IN_ALL = {
    "rotation": ("half",),
    "normalize_retention": (False,),
    "decay_schedule": ("power",),
    "gated_mlp": (True,),
    "hidden_act": ("silu",),
    "pre_norm": (True,),
    "deepnorm": (False,),
    "scale_embedding": (False,),
    "embedding_norm": (False,),
}
GREATEST_KEY = 256


def is_one(config, names):
    """Whether a config.json is of this format."""
    return config.get("model_type") == "retnet" and "num_heads" in config


def read_config(fields, weights):
    """Our config from fla's fields."""
    fields.refuse("feature_map", "a feature map on q and k has no counterpart here")
    fields.refuse("use_short_conv", "short convolutions have no counterpart here")
    fields.refuse("attnres_block_size", "residuals by attention have no counterpart here")
    if not fields.take("use_output_gate", True):
        raise ValueError("config.json has use_output_gate = false: our retention has its gate.")
    # fla uses it for the output gate too, which is always swish here.
    read_swish(fields, "RetNet")
    fields.drop("there is no convolution", "conv_size")
    fields.drop("it is how to run, not what to compute", "fuse_norm", "fuse_swiglu")
    read_common(fields)

    hidden_size = fields.take("hidden_size", kind=int)
    num_heads = fields.take("num_heads")
    num_groups = fields.take("num_kv_heads", None)
    return RetNetConfig(
        hidden_size=hidden_size,
        intermediate_size=gated_mlp_width(
            hidden_size,
            fields.take("hidden_ratio", 2, kind=Real | None),
            fields.take("intermediate_size", None),
        ),
        num_attention_heads=num_heads,
        num_key_value_heads=num_groups or num_heads,
        key_size=expanded(hidden_size, "expand_k", fields.take("expand_k", 1.0, kind=Real)),
        value_size=expanded(hidden_size, "expand_v", fields.take("expand_v", 2.0, kind=Real)),
        rms_norm_eps=fields.take("norm_eps", 1e-6),
        rotation="half",
        normalize_retention=False,
        head_norm_weight=bool(fields.take("elementwise_affine", True)),
        hidden_act="silu",
        **read_general(fields),
    )


def write_config(config):
    """fla's fields from our config, and notes."""
    refuse_unless(config, "RetNet", SAME_IN_ALL)
    width = config.key_size // config.num_attention_heads
    if width > GREATEST_KEY:
        raise ValueError(f"a head of q has width {width}: fla's RetNet has {GREATEST_KEY} at most.")
    values = write_general(config) | {
        "architectures": ["RetNetForCausalLM"],
        "model_type": "retnet",
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "expand_k": config.key_size / config.hidden_size,
        "expand_v": config.value_size / config.hidden_size,
        "hidden_act": "swish",
        "elementwise_affine": config.head_norm_weight,
        "norm_eps": config.rms_norm_eps,
        "fuse_norm": True,
    }
    return values, []


def read_weights(weights, config):
    """Pairs of our name and fla's tensor."""
    # With fuse_norm, norm and gate are one module, of another name.
    fused = "model.layers.0.attn.g_norm_swish_gate.weight" in weights.tensors
    return read_by_name(weights, config, tensor_names(config, fused), {})


def write_weights(weights, config):
    """Pairs of fla's name and our tensor."""
    return write_by_name(weights, config, tensor_names(config, fused=True), {})


def tensor_names(config, fused):
    """Our name and fla's of each tensor."""
    yield from general_names(config)
    names = BLOCK | {
        "mixer.q_proj": "attn.q_proj",
        "mixer.k_proj": "attn.k_proj",
        "mixer.v_proj": "attn.v_proj",
        "mixer.gate_proj": "attn.g_proj",
        "mixer.out_proj": "attn.o_proj",
    }
    if config.head_norm_weight:
        names["mixer.head_norm"] = "attn.g_norm_swish_gate" if fused else "attn.g_norm"
    for layer in range(config.num_hidden_layers):
        for ours, theirs in names.items():
            yield f"model.layers.{layer}.{ours}.weight", f"model.layers.{layer}.{theirs}.weight"


FORMAT = Format(
    name="fla-retnet",
    title="fla-org/flash-linear-attention's RetNetForCausalLM (fla-hub/retnet-*); both ways",
    recognizes=is_one,
    expects="model_type 'retnet' with fla's fields (num_heads, expand_k, ...)",
    library=FLA,
    read_config=read_config,
    read_weights=read_weights,
    architecture="retnet",
    write_config=write_config,
    write_weights=write_weights,
    left_out=("dropout", "activation_dropout"),
)
