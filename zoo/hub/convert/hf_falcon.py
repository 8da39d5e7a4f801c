"""transformers' Falcon (`FalconForCausalLM`) with ALiBi: tiiuae/falcon-rw-1b, -7b; both ways.

BLOOM's block and its order of q, k and v, without a norm on the embeddings. Its ALiBi is another:
the slopes, and a slope times the place of the KEY in its document, are rounded to bfloat16 whatever
the model's dtype is, and that is added before 1 / sqrt(K) scales the scores. So here it is
alibi_rounding = "bfloat16" and alibi_scaled.

transformers' eager attention adds ALiBi twice (5.23: once in the mask, once to the scores): load
such a folder there with attn_implementation="sdpa", which is right, and which this equals.
"""

from ...models.sliding_window import SlidingWindowConfig
from .format import TRANSFORMERS, Format, refuse_beyond, refuse_other
from .hf_bloom import read_weights, write_weights

IN_TRAINING = ("hidden_dropout", "attention_dropout")
ONES_MEANT = (
    "those with ALiBi and one part after the other are meant: falcon-rw-1b and falcon-rw-7b"
)
EAGER = (
    "transformers' eager attention adds ALiBi twice (5.23); its sdpa is right: load Falcon there "
    "with attn_implementation='sdpa'"
)
# What makes a SlidingWindowConfig Falcon's.
FIXED = {
    "position_embedding_type": "alibi",
    "alibi_bias_max": 8,
    "alibi_rounding": "bfloat16",
    "alibi_scaled": True,
    "gated_mlp": False,
    "norm_type": "layer",
    "norm_bias": True,
    "embedding_norm": False,
    "sliding_window": None,
}
# Their field -> ours.
NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "layer_norm_epsilon": "rms_norm_eps",
    "initializer_range": "initializer_range",
    "activation": "hidden_act",
    "max_position_embeddings": "max_position_embeddings",
    "use_cache": "use_cache",
    "tie_word_embeddings": "tie_word_embeddings",
    "pad_token_id": "pad_token_id",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
}
DEFAULTS = {
    "vocab_size": 65024,
    "hidden_size": 4544,
    "num_hidden_layers": 32,
    "num_attention_heads": 71,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "activation": "gelu",
    "max_position_embeddings": 2048,
    "use_cache": True,
    "tie_word_embeddings": True,
    "bos_token_id": 11,
    "eos_token_id": 11,
}


def is_one(config, names):
    """Whether a config.json is of this format."""
    return config.get("model_type") == "falcon"


def read_config(fields, weights):
    """Our config from transformers' fields."""
    fields.drop("dropout in training alone", *IN_TRAINING)
    for name, default in (("new_decoder_architecture", False), ("parallel_attn", True)):
        if fields.take(name, default):
            raise ValueError(
                f"config.json has {name} = True, attention and MLP side by side; {ONES_MEANT}."
            )
    if not fields.take("alibi", False):
        raise ValueError(f"config.json has alibi = False, and so RoPE; {ONES_MEANT}.")
    for name in ("apply_residual_connection_post_layernorm", "num_ln_in_parallel_attn"):
        fields.refuse(name, "it has no counterpart here")
    fields.drop("there is ALiBi in place of RoPE", "rope_parameters", "rope_scaling", "rope_theta")
    fields.notes.append(EAGER)
    values = {ours: fields.take(name, DEFAULTS.get(name)) for name, ours in NAMES.items()}
    heads, is_single = values["num_attention_heads"], fields.take("multi_query", True)
    groups = fields.take("num_kv_heads", None)
    if not is_single and groups not in (None, heads):
        raise ValueError(
            f"config.json has num_kv_heads = {groups} of {heads} heads without multi_query, which "
            "transformers' Falcon cannot run."
        )
    has_bias, width = fields.take("bias", False), fields.take("ffn_hidden_size", None)
    return SlidingWindowConfig(
        **values,
        num_key_value_heads=1 if is_single else heads,
        intermediate_size=4 * values["hidden_size"] if width is None else width,
        attention_bias=has_bias,
        mlp_bias=has_bias,
        **FIXED,
    )


def write_config(config):
    """transformers' fields from our config, and notes."""
    head_dim = config.hidden_size // config.num_attention_heads
    refuse_other(config, FIXED | {"head_dim": head_dim}, "transformers'")
    known = {*NAMES.values(), *FIXED, "head_dim"}
    known |= {"num_key_value_heads", "intermediate_size", "attention_bias", "mlp_bias"}
    refuse_beyond(config, known, "transformers'")
    if config.attention_bias != config.mlp_bias:
        raise ValueError("attention_bias is not mlp_bias: transformers' Falcon has one for both.")
    if config.num_key_value_heads not in (1, config.num_attention_heads):
        raise ValueError(
            f"num_key_value_heads is {config.num_key_value_heads}: transformers' Falcon of this "
            f"block has 1 or all of {config.num_attention_heads}."
        )
    values = {"architectures": ["FalconForCausalLM"], "model_type": "falcon"}
    # Where ours has no limit of length, theirs has one all the same, without effect.
    values |= {name: getattr(config, ours) for name, ours in NAMES.items() if hasattr(config, ours)}
    values |= {
        "alibi": True,
        "bias": config.mlp_bias,
        "ffn_hidden_size": config.intermediate_size,
        "multi_query": config.num_key_value_heads != config.num_attention_heads,
        "new_decoder_architecture": False,
        "parallel_attn": False,
    }
    return values, [EAGER]


FORMAT = Format(
    name="hf-falcon",
    title="transformers' FalconForCausalLM with ALiBi (tiiuae/falcon-rw-1b, -7b); both ways",
    recognizes=is_one,
    expects="model_type 'falcon'",
    library=TRANSFORMERS,
    read_config=read_config,
    read_weights=read_weights,
    architecture="sliding_window",
    write_config=write_config,
    write_weights=write_weights,
)
