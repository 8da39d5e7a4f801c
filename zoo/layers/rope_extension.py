"""Softmax attention with RoPE beyond the length it was trained for, without training.

`rope_extension` of a config: near keys keep RoPE's distances d, far ones get distances that the
model knows. n is a query's number in its document and m a key's, d = n - m:

    rerope        d < w: d; else w                             Su 2023, kexue.fm/archives/9708
    leaky_rerope  d < w: d; else w + (d - w) / k               the same
    self_extend   d < w: d; else n // G - m // G + w - w / G   Jin et al. 2024, arxiv 2401.01325
    dual_chunk    same chunk of s = c - l tokens: d            An et al. 2024, arxiv 2402.17463
                  the one before: min(n mod s + s, c) - m mod s
                  older: min(2 s - 1, c) - m mod s

with w = window, k = factor, G = group_size, c = chunk_size and l = local_window, which may be
called window too. With `log_n_length` L, queries are multiplied by max(1, ln(n + 1) / ln L), so
that attention stays as sharp as it was among L tokens. All of it counts the tokens of the document,
so it is a function of the text: `position_ids` say where documents start and nothing else.
dual_chunk is the exact form: one softmax over all keys, where the authors' merge of three has
weights in bfloat16 without gradients, and without their factor by the longest text seen so far.
"""

import difflib
import math
from typing import NamedTuple

import torch

# The fields of each type: those it has to have, and those it may have.
EXTENSION_FIELDS = {
    "rerope": (("window",), ("log_n_length",)),
    "leaky_rerope": (("window", "factor"), ("log_n_length",)),
    "self_extend": (("window", "group_size"), ("log_n_length",)),
    "dual_chunk": (("chunk_size",), ("local_window", "window")),
}
# What a field is, and the least that it may be.
_WHOLE = {"window": 1, "group_size": 1, "chunk_size": 1, "local_window": 0}


class ExtendedPositions(NamedTuple):
    """Where queries and keys stand, for each range of distances from the nearest on.

    Attributes:
        queries: [B or 1, T] for each range.
        keys: [B or 1, T] for each copy of the keys: one for each range, or one for all.
        reaches: the distance at which a range ends, an int or [B or 1, T], for all but the last.
    """

    queries: tuple
    keys: tuple
    reaches: tuple


def chunk_length(extension):
    """s = c - l of dual_chunk, tokens of a chunk."""
    local_window = extension.get("local_window")
    if local_window is None:
        local_window = extension["window"]
    return extension["chunk_size"] - local_window


def extended_positions(extension, clock_BT):
    """The `ExtendedPositions` of tokens.

    Args:
        extension: a config's `rope_extension`.
        clock_BT: the number of each token in its document.
    """
    if extension["type"] == "dual_chunk":
        chunk, limit = chunk_length(extension), extension["chunk_size"]
        inside_BT = clock_BT % chunk
        before_BT = (inside_BT + chunk).clamp(max=limit)
        older_BT = torch.full_like(clock_BT, min(2 * chunk - 1, limit))
        reaches = inside_BT + 1, inside_BT + 1 + chunk
        return ExtendedPositions((inside_BT, before_BT, older_BT), (inside_BT,), reaches)
    window = extension["window"]
    if extension["type"] == "rerope":
        far = torch.full_like(clock_BT, window), torch.zeros_like(clock_BT)
    elif extension["type"] == "leaky_rerope":
        far_BT = _exact(clock_BT) / extension["factor"]
        far = far_BT + (window - window / extension["factor"]), far_BT
    else:
        group_BT = clock_BT // extension["group_size"]
        far = _exact(group_BT) + (window - window / extension["group_size"]), group_BT
    return ExtendedPositions((clock_BT, far[0]), (clock_BT, far[1]), (window,))


def _exact(number_BT):
    # Apple's GPUs have no float64.
    return number_BT.to(torch.float32 if number_BT.device.type == "mps" else torch.float64)


def log_n_scale(extension, clock_BT):
    """What queries are multiplied by, [B or 1, T, 1, 1] float64; None: nothing."""
    length = extension.get("log_n_length")
    if length is None:
        return None
    return ((_exact(clock_BT) + 1).log() / math.log(length)).clamp(min=1)[..., None, None]


class ExtendedRotation(NamedTuple):
    """What turns the queries and keys of a layer with an extension.

    Attributes:
        queries: (cos, sin) for each range of distances, as of `rotate`.
        keys: (cos, sin) for each copy of the keys.
        scale: of queries, [B or 1, T, 1, 1], or None.
        reaches: as of `ExtendedPositions`.
    """

    queries: tuple
    keys: tuple
    scale: torch.Tensor | None
    reaches: tuple


def extended_rotation(rotation, extension, clock_BT):
    """The `ExtendedRotation` of tokens.

    Args:
        rotation: the `RotaryPositions`, which give an angle to any position, whole or not.
        extension: a config's `rope_extension`.
        clock_BT: the number of each token in its document.
    """
    positions = extended_positions(extension, clock_BT)
    return ExtendedRotation(
        tuple(rotation(x) for x in positions.queries),
        tuple(rotation(x) for x in positions.keys),
        log_n_scale(extension, clock_BT),
        positions.reaches,
    )


def near_window(extension):
    """How many of the newest keys are kept turned in another way than all; None: they are not."""
    return None if extension["type"] == "dual_chunk" else extension["window"]


def reach_bounds(extension):
    """(least, most) of each of the reaches."""
    if extension["type"] == "dual_chunk":
        chunk = chunk_length(extension)
        return (1, chunk), (chunk + 1, 2 * chunk)
    return ((extension["window"],) * 2,)


def check_rope_extension(config, types):
    """Raises a ValueError if a config's `rope_extension` is not one, or would change nothing.

    Args:
        config: with `rope_extension`, `rope_parameters` and `sliding_window`.
        types: the `position_embedding_type` of its layers with softmax attention.
    """
    extension = config.rope_extension
    _check_fields(extension)
    if "rope" not in types or "xpos" in types:
        raise ValueError(
            "rope_extension is of layers of position_embedding_type 'rope', not beside 'xpos', got "
            f"{', '.join(sorted(map(repr, types)))}; leave it out."
        )
    rope_type = config.rope_parameters["rope_type"]
    if rope_type in ("dynamic", "longrope"):
        raise ValueError(
            "rope_extension goes with angles that do not depend on the length of the text, got "
            f"rope_type {rope_type!r}; leave one of the two out."
        )
    name = "chunk_size" if extension["type"] == "dual_chunk" else "window"
    window = config.sliding_window
    if window is not None and window <= extension[name]:
        raise ValueError(
            f"rope_extension is about keys beyond its {name} {extension[name]}, which "
            f"sliding_window {window} hides; set sliding_window to None, or above it."
        )
    if getattr(config, "num_sink_tokens", 0) or getattr(config, "learnable_sinks", False):
        raise ValueError(
            "rope_extension keeps all keys in sight and has no sinks, got num_sink_tokens "
            f"{config.num_sink_tokens} and learnable_sinks {config.learnable_sinks}; leave one of "
            "the two out."
        )


def _check_fields(extension):
    """Raises a ValueError for fields that are unknown, missing or out of range."""
    kind = extension.get("type")
    if kind not in EXTENSION_FIELDS:
        raise ValueError(
            f"rope_extension['type'] is one of {', '.join(EXTENSION_FIELDS)}, got {kind!r}."
        )
    needed, optional = EXTENSION_FIELDS[kind]
    known = ("type", *needed, *optional)
    unknown = sorted(set(extension) - set(known))
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        remedy = f"did you mean {near[0]}?" if near else "leave it out."
        raise ValueError(f"rope_extension of type {kind} has no field {unknown[0]!r}; {remedy}")
    missing = [name for name in needed if extension.get(name) is None]
    if missing:
        raise ValueError(
            f"rope_extension of type {kind} needs {' and '.join(missing)}, got "
            f"{', '.join(sorted(extension))}."
        )
    for name in known[1:]:
        _check_field(name, extension.get(name))
    if kind == "dual_chunk":
        _check_local_window(extension)


def _check_local_window(extension):
    said = [name for name in ("local_window", "window") if extension.get(name) is not None]
    if len(said) != 1:
        raise ValueError(
            "rope_extension of type dual_chunk needs local_window, or window, which says the same, "
            f"got {' and '.join(said) or 'neither'}."
        )
    if chunk_length(extension) < 1:
        raise ValueError(
            f"rope_extension: {said[0]} is below chunk_size, got {extension[said[0]]} and "
            f"{extension['chunk_size']}."
        )


def _check_field(name, value):
    if value is None and name in ("local_window", "window"):
        return  # of which one is enough
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if name in _WHOLE:
        if not isinstance(value, int) or not is_number or value < _WHOLE[name]:
            raise ValueError(
                f"rope_extension[{name!r}] is a whole number of at least {_WHOLE[name]}, got "
                f"{value!r}."
            )
    elif name == "factor":
        if not is_number or not 0 < value < math.inf:
            raise ValueError(f"rope_extension['factor'] is a number above 0, got {value!r}.")
    elif value is not None and (not is_number or not 1 < value < math.inf):
        raise ValueError(
            "rope_extension['log_n_length'] is the trained length, a number above 1, or None, got "
            f"{value!r}."
        )
