"""flash-linear-attention's RetNet, as in fla-hub/retnet-1.3B-100B.

Another model than torchscale's: rotation of halves with RoPE's angles, no normalisation by s_n, a
learned weight in the head norm, SwiGLU. Our `RetNetConfig` has these as options.
"""

import math
from numbers import Real

from ...models.retnet import RetNetConfig
from .fla import expanded, read_common
from .format import Format


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
    activation = fields.take("hidden_act", "swish")
    if activation not in ("swish", "silu"):
        # fla uses it for the output gate too, which is always swish here.
        raise ValueError(f"hidden_act is swish in fla's RetNet, got {activation!r}.")
    fields.drop("there is no convolution", "conv_size")
    fields.drop("it is how to run, not what to compute", "fuse_norm", "fuse_swiglu")
    read_common(fields)

    hidden_size = fields.take("hidden_size", kind=int)
    num_heads = fields.take("num_heads")
    num_groups = fields.take("num_kv_heads", None)
    return RetNetConfig(
        vocab_size=fields.take("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=mlp_width(
            hidden_size,
            fields.take("hidden_ratio", 2, kind=Real | None),
            fields.take("intermediate_size", None),
        ),
        num_hidden_layers=fields.take("num_hidden_layers"),
        num_attention_heads=num_heads,
        num_key_value_heads=num_groups or num_heads,
        key_size=expanded(hidden_size, "expand_k", fields.take("expand_k", 1.0, kind=Real)),
        value_size=expanded(hidden_size, "expand_v", fields.take("expand_v", 2.0, kind=Real)),
        rms_norm_eps=fields.take("norm_eps", 1e-6),
        rotation="half",
        normalize_retention=False,
        head_norm_weight=bool(fields.take("elementwise_affine", True)),
        hidden_act="silu",
        tie_word_embeddings=fields.take("tie_word_embeddings", False),
        use_cache=fields.take("use_cache", True),
        pad_token_id=fields.take("pad_token_id", None),
        bos_token_id=fields.take("bos_token_id", 1),
        eos_token_id=fields.take("eos_token_id", 2),
    )


def mlp_width(hidden_size, ratio, width):
    """fla's rule: two thirds of `ratio` times the model's width, up to a multiple of 256."""
    if width is not None:
        return width
    return 256 * math.ceil(int(hidden_size * (4 if ratio is None else ratio) * 2 / 3) / 256)


def read_weights(weights, config):
    """Pairs of our name and fla's tensor."""
    yield "model.embed_tokens.weight", weights.take("model.embeddings.weight")
    for layer in range(config.num_hidden_layers):
        theirs = f"model.layers.{layer}"
        names = {
            "mixer.q_proj": "attn.q_proj",
            "mixer.k_proj": "attn.k_proj",
            "mixer.v_proj": "attn.v_proj",
            "mixer.gate_proj": "attn.g_proj",
            "mixer.out_proj": "attn.o_proj",
            "mixer_norm": "attn_norm",
            "mlp_norm": "mlp_norm",
            "mlp.gate_proj": "mlp.gate_proj",
            "mlp.up_proj": "mlp.up_proj",
            "mlp.down_proj": "mlp.down_proj",
        }
        if config.head_norm_weight:
            # With fuse_norm, norm and gate are one module, of another name.
            fused = f"{theirs}.attn.g_norm_swish_gate.weight" in weights.tensors
            names["mixer.head_norm"] = "attn.g_norm_swish_gate" if fused else "attn.g_norm"
        for ours, name in names.items():
            yield f"model.layers.{layer}.{ours}.weight", weights.take(f"{theirs}.{name}.weight")
    yield "model.norm.weight", weights.take("model.norm.weight")
    if "lm_head.weight" in weights.tensors or not config.tie_word_embeddings:
        yield "lm_head.weight", weights.take("lm_head.weight")


FORMAT = Format(
    name="fla-retnet",
    title="fla-org/flash-linear-attention's RetNetForCausalLM (fla-hub/retnet-*)",
    recognizes=is_one,
    expects="model_type 'retnet' with fla's fields (num_heads, expand_k, ...)",
    read_config=read_config,
    read_weights=read_weights,
)
