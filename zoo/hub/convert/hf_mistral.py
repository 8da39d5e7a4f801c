"""transformers' Mistral (`MistralForCausalLM`, mistralai/Mistral-7B-*, zephyr-7b), both ways.

The same numbers under other names. A config without sliding_window, as of v0.2 and later, is full
attention; one that lacks the field has transformers' default, 4096.
"""

from ...layers.positions import num_rotated_channels
from ...models.sliding_window import SlidingWindowConfig
from .format import (
    TRANSFORMERS,
    Format,
    check_transformers_activation,
    read_llama,
    refuse_beyond,
    write_llama,
)


def is_one(config, names):
    """Whether a config.json is of this format."""
    return config.get("model_type") == "mistral"


def read_config(fields, weights):
    """Our config from transformers' fields."""
    fields.drop("dropout in training alone", "attention_dropout")
    # Written by transformers 4, in two fields, where 5 has one.
    rope = dict(fields.take("rope_parameters", None) or fields.take("rope_scaling", None) or {})
    fields.take("rope_scaling", None)
    rope_type = rope.pop("type", "default")
    rope.setdefault("rope_type", rope_type)
    rope.setdefault("rope_theta", fields.take("rope_theta", 10000.0))
    fields.take("rope_theta", None)
    if rope["rope_type"] != "proportional" and rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"config.json has partial_rotary_factor = {rope['partial_rotary_factor']}, which "
            "transformers' Mistral does not obey: it turns whole heads."
        )
    layers = fields.take("num_hidden_layers", 32)
    window = fields.take("sliding_window", 4096)
    kind = "full_attention" if window is None else "sliding_attention"
    if fields.take("layer_types", None) not in (None, [kind] * layers):
        raise ValueError("config.json has layers of several layer_types: ours are all alike.")
    return SlidingWindowConfig(
        vocab_size=fields.take("vocab_size", 32000),
        hidden_size=fields.take("hidden_size", 4096),
        intermediate_size=fields.take("intermediate_size", 14336),
        num_hidden_layers=layers,
        num_attention_heads=fields.take("num_attention_heads", 32),
        num_key_value_heads=fields.take("num_key_value_heads", 8),
        head_dim=fields.take("head_dim", None),
        hidden_act=fields.take("hidden_act", "silu"),
        rms_norm_eps=fields.take("rms_norm_eps", 1e-6),
        initializer_range=fields.take("initializer_range", 0.02),
        rope_parameters=rope,
        max_position_embeddings=fields.take("max_position_embeddings", None),
        sliding_window=window,
        tie_word_embeddings=fields.take("tie_word_embeddings", False),
        use_cache=fields.take("use_cache", True),
        pad_token_id=fields.take("pad_token_id", None),
        bos_token_id=fields.take("bos_token_id", 1),
        eos_token_id=fields.take("eos_token_id", 2),
    )


def write_config(config):
    """transformers' fields from our config, and notes."""
    refuse_beyond(config, WRITTEN, "transformers'")
    check_transformers_activation(config)
    if num_rotated_channels(config) != config.head_dim:
        raise ValueError("partial_rotary_factor is not 1: transformers' model turns whole heads.")
    values = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    # Where ours has no limit of length, theirs has one all the same, without effect.
    values |= {name: getattr(config, name) for name in WRITTEN if hasattr(config, name)}
    notes = []
    if config.rope_parameters["rope_type"] in ("dynamic", "longrope"):
        notes.append(
            "beyond the trained length transformers takes the angles of the whole pass for all of "
            "its tokens: what it computes there depends on how a text is cut, and equals ours "
            "token by token"
        )
    return values, notes


WRITTEN = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "initializer_range",
    "rope_parameters",
    "max_position_embeddings",
    "sliding_window",
    "tie_word_embeddings",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


FORMAT = Format(
    name="hf-mistral",
    title="transformers' MistralForCausalLM (mistralai/Mistral-7B-*, zephyr-7b); both ways",
    recognizes=is_one,
    expects="model_type 'mistral'",
    library=TRANSFORMERS,
    read_config=read_config,
    read_weights=read_llama,
    architecture="sliding_window",
    write_config=write_config,
    write_weights=write_llama,
)
