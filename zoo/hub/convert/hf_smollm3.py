"""transformers' SmolLM3 (`SmolLM3ForCausalLM`, HuggingFaceTB/SmolLM3-3B), both ways.

The block of Mistral, with RoPE in some layers and no positions at all (NoPE) in the others. Its
no_rope_layers says 1 where a layer HAS RoPE, whatever its name; here it is a list of
position_embedding_type, "rope" and None.

Where it has windows, they are of its layers without RoPE, unless layer_types say otherwise; ours
are the same in every layer, so that all of its layers have one, or none.
"""

from ...layers.position_fields import position_types
from ...layers.positions import num_rotated_channels
from ...models.sliding_window import SlidingWindowConfig
from .format import (
    TRANSFORMERS,
    Format,
    check_transformers_activation,
    llama_names,
    read_by_name,
    refuse_beyond,
    write_by_name,
)

KINDS = {True: "sliding_attention", False: "full_attention"}
TYPES = {True: "rope", False: None}
DEFAULT_THETA = 2e6


def is_one(config, names):
    """Whether a config.json is of this format."""
    return config.get("model_type") == "smollm3"


def read_config(fields, weights):
    """Our config from transformers' fields."""
    fields.drop("dropout in training alone", "attention_dropout")
    fields.drop("it is how to run, not what to compute", "pretraining_tp")
    fields.drop("transformers' SmolLM3 does not read it", "max_window_layers")
    layers = fields.take("num_hidden_layers", 36, kind=int)
    interval = fields.take("no_rope_layer_interval", 4)
    turned = fields.take("no_rope_layers", None)
    if turned is None:
        turned = [(layer + 1) % interval != 0 for layer in range(layers)]
    if len(turned) < layers:
        raise ValueError(
            f"config.json has no_rope_layers of {len(turned)} layers, and num_hidden_layers = "
            f"{layers}."
        )
    turned = [bool(x) for x in turned[:layers]]
    types = [TYPES[x] for x in turned]
    heads = fields.take("num_attention_heads", 16, kind=int)
    groups = fields.take("num_key_value_heads", 4)
    return SlidingWindowConfig(
        vocab_size=fields.take("vocab_size", 128256),
        hidden_size=fields.take("hidden_size", 2048),
        intermediate_size=fields.take("intermediate_size", 11008),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads if groups is None else groups,
        head_dim=fields.take("head_dim", None),
        hidden_act=fields.take("hidden_act", "silu"),
        mlp_bias=fields.take("mlp_bias", False),
        attention_bias=fields.take("attention_bias", False),
        rms_norm_eps=fields.take("rms_norm_eps", 1e-6),
        initializer_range=fields.take("initializer_range", 0.02),
        position_embedding_type=types[0] if len(set(types)) == 1 else types,
        rope_parameters=read_rope(fields, any(turned)),
        max_position_embeddings=fields.take("max_position_embeddings", 32768),
        sliding_window=read_window(fields, turned),
        tie_word_embeddings=fields.take("tie_word_embeddings", True),
        use_cache=fields.take("use_cache", True),
        pad_token_id=fields.take("pad_token_id", 128004),
        bos_token_id=fields.take("bos_token_id", 128000),
        eos_token_id=fields.take("eos_token_id", 128001),
    )


def read_rope(fields, is_used):
    """Our rope_parameters; None where no layer has RoPE."""
    # Written by transformers 4, in two fields, where 5 has one.
    rope = dict(fields.take("rope_parameters", None) or fields.take("rope_scaling", None) or {})
    fields.take("rope_scaling", None)
    rope_type = rope.pop("type", "default")
    rope.setdefault("rope_type", rope_type)
    rope.setdefault("rope_theta", fields.take("rope_theta", DEFAULT_THETA))
    fields.take("rope_theta", None)
    if rope["rope_type"] != "proportional" and rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"config.json has partial_rotary_factor = {rope['partial_rotary_factor']}, which "
            "transformers' SmolLM3 does not obey: it turns whole heads."
        )
    if not is_used:
        fields.notes.append(f"left out rope_parameters = {rope}: no layer has RoPE")
    return rope if is_used else None


def read_window(fields, turned):
    """W, which all layers have, or None.

    Args:
        fields: theirs.
        turned: for each layer, whether it has RoPE.
    """
    window, is_used = fields.take("sliding_window", None), fields.take("use_sliding_window", False)
    is_used = bool(is_used) and window is not None
    kinds = fields.take("layer_types", None)
    if kinds is None:
        kinds = [KINDS[is_used and not has_rope] for has_rope in turned]
    if set(kinds) == {KINDS[True]} and is_used:
        return window
    if set(kinds) == {KINDS[False]}:
        return None
    raise ValueError(
        f"config.json has layers of layer_types {sorted(set(kinds))}, sliding_window = {window} "
        f"and use_sliding_window = {is_used}: our layers all have the same window, or none."
    )


def write_config(config):
    """transformers' fields from our config, and notes."""
    known = (*WRITTEN, "position_embedding_type", "rope_parameters", "sliding_window")
    refuse_beyond(config, known, "transformers'")
    check_transformers_activation(config)
    types = position_types(config)
    if not set(types) <= {"rope", None}:
        raise ValueError(
            f"position_embedding_type is {config.position_embedding_type!r}: transformers' SmolLM3 "
            "has layers with RoPE and layers without positions."
        )
    values = {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3"}
    # Where ours has no limit of length, theirs has one all the same, without effect.
    values |= {name: getattr(config, name) for name in WRITTEN if hasattr(config, name)}
    has_window = config.sliding_window is not None
    values |= {
        "no_rope_layers": [int(x == "rope") for x in types],
        "use_sliding_window": has_window,
        "sliding_window": config.sliding_window,
        "layer_types": [KINDS[has_window]] * config.num_hidden_layers,
    }
    if "rope" in types:
        if num_rotated_channels(config) != config.head_dim:
            raise ValueError("partial_rotary_factor is not 1: transformers turns whole heads.")
        values["rope_parameters"] = config.rope_parameters
    return values, []


WRITTEN = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "mlp_bias",
    "attention_bias",
    "rms_norm_eps",
    "initializer_range",
    "max_position_embeddings",
    "tie_word_embeddings",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


def tensor_names(config):
    """Our name and transformers' of each tensor."""
    has_bias = {"mixer": config.attention_bias, "mlp": config.mlp_bias}
    for ours, theirs in llama_names(config):
        yield ours, theirs
        if any(has and f".{part}." in ours for part, has in has_bias.items()):
            yield ours.replace(".weight", ".bias"), theirs.replace(".weight", ".bias")


def read_weights(weights, config):
    """Pairs of our name and transformers' tensor."""
    return read_by_name(weights, config, tensor_names(config), {})


def write_weights(weights, config):
    """Pairs of transformers' name and our tensor."""
    return write_by_name(weights, config, tensor_names(config), {})


FORMAT = Format(
    name="hf-smollm3",
    title="transformers' SmolLM3ForCausalLM (HuggingFaceTB/SmolLM3-3B); both ways",
    recognizes=is_one,
    expects="model_type 'smollm3'",
    library=TRANSFORMERS,
    read_config=read_config,
    read_weights=read_weights,
    architecture="sliding_window",
    write_config=write_config,
    write_weights=write_weights,
)
