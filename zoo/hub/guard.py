"""What a file claims is checked before anything is done with it, or any memory taken for it.

Checkpoints come from anywhere. A file may be a pipe, on which whoever opens it waits; a kilobyte
may unpack to a terabyte; a number in a config may be larger than any machine.
"""

import json
import os
import zipfile
from pathlib import Path

import torch

MAX_JSON = 1024**3  # bytes; tokenizers and indices of the largest models have a hundredth
MAX_NUMBER = 2**40  # in a config: more than the tokens, channels and parts of any model
MAX_LAYERS = 10_000
MAX_GROWTH = 20  # weights, which are as good as random, pack to no less than a half


def check_file(path):
    """Raises a ValueError if there is something of a name, but it is no file: nothing is opened."""
    path = Path(path)
    if os.path.lexists(path) and not path.is_file():
        kind = "a folder" if path.is_dir() else "a pipe, a device or a link to nowhere"
        raise ValueError(f"{path} is no file but {kind}; expected a file, or nothing of that name.")


def parse_json(path, allow_nan=False):
    """What a JSON file says, if it says one thing only.

    Args:
        path: of the file.
        allow_nan: let it have NaN and Infinity.

    Raises:
        FileNotFoundError: there is none.
        ValueError: no file, not UTF-8, no JSON, nested too deep, with a key twice, or with NaN.
    """
    check_file(path)
    size = os.stat(path).st_size
    if size > MAX_JSON:
        raise ValueError(f"its {size:,} bytes are more than any such file has")
    with open(path, encoding="utf-8") as file:
        text = file.read()
    constant = None if allow_nan else _no_constant
    try:
        return json.loads(text, object_pairs_hook=_no_key_twice, parse_constant=constant)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def check_numbers(values, path):
    """Raises a ValueError if a config asks for what no machine can hold.

    Args:
        values: its fields.
        path: of it, for messages.
    """
    for name, value in values.items():
        if not isinstance(value, int):
            continue
        if abs(value) > MAX_NUMBER:
            raise ValueError(f"{path}: {name} is beyond 2^40, which is of no model; correct it.")
        if "layer" in name and value > MAX_LAYERS:
            raise ValueError(
                f"{path}: {name} = {value}, and no model has more than {MAX_LAYERS}; correct it."
            )


def check_pickle(path):
    """Raises a ValueError if a file of torch.save is packed as no weights can be."""
    try:
        with zipfile.ZipFile(path) as file:
            size = sum(part.file_size for part in file.infolist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return  # of before torch 1.6, or none at all, as torch will say
    _check_growth(path, size)


def check_tensors(path, tensors):
    """Raises a ValueError if tensors of a file repeat its numbers over and over.

    Args:
        path: of the file.
        tensors: what was found in it.
    """
    _check_growth(path, sum(x.numel() * x.element_size() for x in tensors if not x.is_meta))


def empty_model(model_class, config, source, num_tensors=None):
    """A model without values, which takes no memory whatever its config says.

    Args:
        model_class: of it.
        config: its config.
        source: where that comes from, for messages.
        num_tensors: that there are for it; None: unknown. No layer is without any.

    Returns:
        The model, on the meta device.

    Raises:
        ValueError: no model is of these sizes, or there are more layers than tensors.
    """
    if num_tensors is not None and config.num_hidden_layers > num_tensors:
        raise ValueError(
            f"{source}: weights and config do not fit: num_hidden_layers = "
            f"{config.num_hidden_layers}, and there are {num_tensors} tensors."
        )
    try:
        with torch.device("meta"):
            return model_class(config)
    except (RuntimeError, TypeError, OverflowError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{source}: no model is of these sizes ({reason}).") from None


def _check_growth(path, size):
    there = os.stat(path).st_size
    if size > MAX_GROWTH * there + 2**20:
        raise ValueError(
            f"{path} has {there:,} bytes and would unpack to {size:,}: no weights repeat so much, "
            "and it is not opened; save them as safetensors."
        )


def _no_key_twice(pairs):
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has {twice[:80]!r} twice")
    return values


def _no_constant(name):
    raise ValueError(f"it holds {name}, which is no number of JSON")
