"""The fields of a config that say how softmax attention knows positions, and what they may hold.

`position_embedding_type` is one of `POSITION_TYPES` for all layers, or a list with one for each.
Most of the other fields say something about one type alone: a config without a layer of that type
refuses them, unless they are what they are by default.
"""

import math

from .positions import check_rope_parameters, num_rotated_channels
from .rope_extension import check_rope_extension

POSITION_TYPES = ("rope", "alibi", "t5", "fire", "xpos", None)
# Those that turn queries and keys, by `rope_parameters`.
TURNED_TYPES = ("rope", "xpos")
# Field -> (the type it is about, its default).
POSITION_FIELDS = {
    "alibi_bias_max": ("alibi", 8),
    "alibi_scaled": ("alibi", False),
    "alibi_rounding": ("alibi", None),
    "relative_attention_num_buckets": ("t5", 32),
    "relative_attention_max_distance": ("t5", 128),
    "fire_mlp_width": ("fire", 32),
    "fire_init_c": ("fire", 0.1),
    "fire_init_length": ("fire", 512),
    "xpos_scale_base": ("xpos", 512),
}
# With a smaller one no score would be left a block of queries away; see kernels/windowed_attention.
LEAST_XPOS_SCALE_BASE = 8


def position_types(config):
    """The type of each layer of the model, a list; "rope" where a config has no such field."""
    types = getattr(config, "position_embedding_type", "rope")
    return list(types) if isinstance(types, list) else [types] * config.num_hidden_layers


def position_type_of(config, layer_idx):
    """The type of a layer."""
    return position_types(config)[layer_idx]


def turns(config):
    """Whether any layer turns queries and keys."""
    return any(x in TURNED_TYPES for x in position_types(config))


def check_position_fields(config, known_types=POSITION_TYPES, layers=None):
    """Raises a ValueError if a config's layers cannot know positions the way it says.

    Args:
        config: with `position_embedding_type`, `rope_parameters`, `attention_scale` and those of
            `POSITION_FIELDS` that the types it may have need.
        known_types: those types.
        layers: indices of the layers with softmax attention; None: all.
    """
    types, count = config.position_embedding_type, config.num_hidden_layers
    words = ", ".join(map(repr, known_types))
    if isinstance(types, list) and len(types) != count:
        raise ValueError(
            f"position_embedding_type has one entry for each of {count} layers, got {len(types)}: "
            f"{types}."
        )
    types = position_types(config)
    layers = range(count) if layers is None else layers
    for layer, name in enumerate(types):
        if name not in known_types:
            raise ValueError(
                f"position_embedding_type is one of {words}, or a list of them with one for each "
                f"layer, got {config.position_embedding_type!r}."
            )
        is_listed = isinstance(config.position_embedding_type, list)
        if is_listed and layer not in layers and name is not None:
            raise ValueError(
                f"position_embedding_type is None for layers without softmax attention, got "
                f"{name!r} for layer {layer}."
            )
    used = {types[layer] for layer in layers}
    _check_unused(config, used)
    _check_values(config)
    if not used.isdisjoint(TURNED_TYPES):
        # Of a config that had no such layer, and is loaded with another type.
        if config.rope_parameters is None:
            raise ValueError(
                f"position_embedding_type {config.position_embedding_type!r} turns by "
                "rope_parameters, got None; pass them too, as {'rope_type': 'default', "
                "'rope_theta': 10000.0}."
            )
        check_rope_parameters(config)
    if getattr(config, "rope_extension", None) is not None:
        check_rope_extension(config, used)
    if "xpos" in used:
        rope_type = config.rope_parameters["rope_type"]
        if rope_type != "default" or num_rotated_channels(config) != config.head_dim:
            raise ValueError(
                "position_embedding_type 'xpos' turns whole heads by a rope_theta and no more, got "
                f"{config.rope_parameters}; leave the rest of rope_parameters out."
            )


def _check_unused(config, used):
    """Raises a ValueError for fields about a type that no layer has."""
    for name, (kind, default) in POSITION_FIELDS.items():
        value = getattr(config, name, default)
        if kind not in used and value != default:
            raise ValueError(
                f"{name} is about layers of position_embedding_type {kind!r}, got {value!r} and "
                "no such layer; leave it out."
            )
    if used.isdisjoint(TURNED_TYPES) and config.rope_parameters is not None:
        raise ValueError(
            "rope_parameters are about layers of position_embedding_type 'rope' or 'xpos', got "
            f"{config.rope_parameters} and no such layer; leave them out."
        )


def _check_values(config):
    """Raises a ValueError for numbers out of range."""
    scale = config.attention_scale
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(
            f"attention_scale is a number above 0, or None for head_dim^-1/2, got {scale}."
        )
    numbers = POSITION_FIELDS.keys() - {"alibi_scaled", "alibi_rounding"}
    least = dict.fromkeys(sorted(numbers), 1) | {
        "alibi_bias_max": 0,
        "relative_attention_num_buckets": 2,
        "fire_init_c": 0,
        "xpos_scale_base": LEAST_XPOS_SCALE_BASE,
    }
    for name, lowest in least.items():
        value = getattr(config, name, POSITION_FIELDS[name][1])
        if not lowest <= value < math.inf or value == 0:
            words = "at least" if lowest else "above"
            raise ValueError(f"{name} is a number {words} {lowest}, got {value}.")
    buckets = getattr(config, "relative_attention_num_buckets", 32)
    distance = getattr(config, "relative_attention_max_distance", 128)
    if distance <= buckets // 2:
        raise ValueError(
            "relative_attention_max_distance is above half of relative_attention_num_buckets, "
            f"{buckets // 2}, got {distance}."
        )
