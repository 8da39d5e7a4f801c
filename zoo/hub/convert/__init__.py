"""Foreign checkpoints become ours, exactly, and some go back: `zoo convert FORMAT SRC DST`.

One file per format. It says which config fields it understands, and where each of our weights
comes from. Whatever is left over, on either side, is an error: with a weight that nobody took, or a
setting that nobody read, it would be a different model.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError

from ... import MODELS
from ..files import carry_files, carry_tokenizer, new_folder
from ..folder import (
    build_model,
    check_tokenizer,
    current_names,
    find_dtype,
    load_tokenizer,
    open_tensors,
    read_config,
    read_generation_config,
    read_json,
    rounding,
    settings,
)
from ..guard import check_numbers
from ..lazy import are_equal
from ..messages import about, not_found, one_line
from ..origin import origin_of_checkpoint, origin_of_source
from ..saving import save_model, save_one_file, save_tensors
from .format import Fields, Weights
from .formats import FORMATS, find_format
from .recognise import names_of, other_format, what_it_is


class Report(NamedTuple):
    """What a conversion did.

    Attributes:
        num_tensors: written.
        num_parameters: written.
        dtype: of them.
        notes: what was left out, and why.
        has_tokenizer: whether a tokenizer came along.
        license: of the weights, as far as the source says.
        is_rounded: whether some weights are not the source's bit for bit; a note says which.
    """

    num_tensors: int
    num_parameters: int
    dtype: torch.dtype
    notes: list[str]
    has_tokenizer: bool
    license: str | None = None
    is_rounded: bool = False


def convert(format, src, dst, overwrite=False, max_shard_size="5GB", dtype=None):
    """Converts a foreign checkpoint to a folder that `from_pretrained` loads.

    Every weight keeps its value exactly; where a format or `dtype` forces a rounding, the report
    says so. A tensor is read when it is written, so that the memory is of a file, not of the model.
    Weights of several dtypes are written in the one that holds them all.

    Args:
        format: a key of `FORMATS`.
        src: a folder with weights (safetensors, sharded or not; .bin, .pt, .pth) and, in most
            formats, a config; or the weight file itself. Tokenizer files in it are carried over.
        dst: the folder to write.
        overwrite: replace a model that is there; files that are not its own stay.
        max_shard_size: a file of weights is at most this large, and so is the memory it takes.
        dtype: name of one to round the weights to. None: the one that holds them all exactly.

    Returns:
        A `Report`.

    Raises:
        ValueError: an unknown format, a checkpoint of another kind, weights or settings without a
            counterpart in our model, damaged files, or something in the way at `dst`.
    """
    chosen, dtype = find_format(format), find_dtype(dtype)
    src = _existing(src, dst)
    folder = src if src.is_dir() else src.parent
    with new_folder(dst, overwrite) as new:
        fields, weights = _open(chosen, src, folder)
        try:
            config = chosen.read_config(fields, weights)
            fields.finish()
            pairs = dict(chosen.read_weights(weights, config))
            weights.finish()
        except StrictDataclassError as error:
            raise ValueError(f"{src}: {one_line(error)}") from None
        except ValueError as error:
            raise about(src, error) from None
        except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
            # The file says a list where the format has a number, or nothing, or zero.
            raise ValueError(
                f"{src}: {chosen.config_file or 'the weights'} cannot be understood as "
                f"{chosen.name} ({type(error).__name__}: {one_line(error)[:200]}); correct it."
            ) from None
        architecture = next(a for a in MODELS.values() if a.config is type(config))
        model, tensors = build_model(architecture, config, pairs, src, dtype)
        generation_config = read_generation_config(folder)
        if generation_config is not None:
            model.generation_config = generation_config
        save_model(model, tensors, new, max_shard_size)
        origin = origin_of_source(src, chosen.name)
        rounded = rounding(pairs.values(), dtype)
        if rounded:
            fields.is_rounded = True
            fields.notes.append(f"the weights are rounded {rounded}")
        origin.add_rounding(rounded)
        origin.is_rounded |= fields.is_rounded
        origin.write(new)
        has_tokenizer = _carry_tokenizer(folder, new, config.vocab_size, fields.notes)
    return Report(
        num_tensors=len(pairs),
        num_parameters=sum(p.numel() for p in model.parameters()),
        dtype=model.dtype,
        notes=fields.notes,
        has_tokenizer=has_tokenizer,
        license=origin.license,
        is_rounded=fields.is_rounded,
    )


def convert_back(format, src, dst, overwrite=False, max_shard_size="5GB", dtype=None):
    """Converts one of our checkpoints to a foreign format.

    What is written is read again as `convert` does and compared, so a model that the format cannot
    express is refused, whatever the reason.

    Args:
        format: a key of `FORMATS` that has a way back.
        src: a folder that `save_pretrained`, a training run or `convert` wrote.
        dst: the folder to write.
        overwrite: replace a model that is there.
        max_shard_size: a file of weights is at most this large, where the format allows several.
        dtype: name of one to round the weights to. None: as they are.

    Returns:
        A `Report`.

    Raises:
        ValueError: an unknown format, one without a way back, a model that it cannot express,
            damaged files, or something in the way at `dst`.
    """
    chosen, dtype = find_format(format), find_dtype(dtype)
    if chosen.architecture is None:
        names = ", ".join(f.name for f in FORMATS.values() if f.architecture)
        raise ValueError(f"{format} is only read; what can be written is {names}.")
    src = _existing(src, dst)
    architecture, config = read_config(src)
    if architecture.name != chosen.architecture:
        raise ValueError(f"{src} is {architecture.name}; {format} holds {chosen.architecture}.")
    others = [chosen.weight_file] if chosen.weight_file else []
    with new_folder(dst, overwrite, chosen.config_file, others) as new:
        found = current_names(src, open_tensors(src))
        model, tensors = build_model(architecture, config, found, src, dtype)
        try:
            num_tensors, notes = write_model(chosen, model, tensors, new, max_shard_size)
        except ValueError as error:
            raise about(src, error) from None
        carry_files(src, new, ("generation_config.json",))
        origin, rounded = origin_of_checkpoint(src), rounding(found.values(), dtype)
        if rounded:
            notes.append(f"the weights are rounded {rounded}")
        origin.add_rounding(rounded)
        origin.write(new)
        has_tokenizer = _carry_tokenizer(src, new, config.vocab_size, notes)
    num_parameters = sum(p.numel() for p in model.parameters())
    return Report(
        num_tensors,
        num_parameters,
        model.dtype,
        notes,
        has_tokenizer,
        is_rounded=rounded is not None,
    )


def write_model(format, model, tensors, folder, max_shard_size="5GB"):
    """Writes config and weights of one of our models in a foreign format that has a way back.

    They are read again and compared before anything is written.

    Args:
        format: a `Format`.
        model: the outline of a language model of its architecture.
        tensors: its weights by name, as `build_model` gives them.
        folder: where.
        max_shard_size: a file of weights is at most this large, where the format allows several.

    Returns:
        (number of tensors written, notes on what was left out and why).

    Raises:
        ValueError: the format cannot express this model.
    """
    config = model.config
    values, notes = format.write_config(config)
    weights = Weights(tensors)
    theirs = dict(format.write_weights(weights, config))
    weights.finish()
    notes += _check_way_back(format, values, theirs, config, tensors)
    if format.weight_file is None:
        save_tensors(theirs, folder, max_shard_size)
        values["dtype"] = str(model.dtype).removeprefix("torch.")
    else:
        save_one_file(theirs, folder / format.weight_file)
    text = json.dumps(values, indent=2) + "\n"
    (folder / format.config_file).write_text(text, encoding="utf-8")
    return len(theirs), notes


def _existing(src, dst):
    if not Path(src).exists():
        raise not_found(src)
    if Path(src).resolve().is_relative_to(Path(dst).resolve()):
        raise ValueError(f"{dst} contains {src} itself; choose a folder beside it.")
    return Path(src)


def _open(chosen, src, folder):
    """The fields and weights of a checkpoint, which is of the chosen format."""
    if chosen.config_file is None:
        others = {}
        weights = Weights(open_tensors(src, others), others)
        if chosen.recognizes({}, weights.tensors):
            return Fields({}), weights
        raise ValueError(f"{src}: {other_format(chosen, folder, weights.tensors)}")
    path = folder / chosen.config_file
    if not path.is_file():
        names = names_of(src)
        if what_it_is(folder, names):
            raise ValueError(f"{src}: {other_format(chosen, folder, names)}")
    fields = Fields(read_json(path), chosen.config_file)
    check_numbers(fields.values, path)
    # What tells the formats apart is in the config: the weights are read once it is right.
    if not chosen.recognizes(fields.values, ()):
        raise ValueError(f"{path}: {other_format(chosen, folder, names_of(src))}")
    try:
        file = chosen.find_weights(src) if chosen.find_weights else src
    except ValueError as error:
        raise ValueError(f"{src}: {error}") from None
    return fields, Weights(open_tensors(file))


def _check_way_back(chosen, values, theirs, config, ours):
    """Notes on what is left out; a ValueError if what is written would be read as another model."""
    fields, weights = Fields(values, chosen.config_file), Weights(theirs)
    config_back = chosen.read_config(fields, weights)
    fields.finish()
    back = dict(chosen.read_weights(weights, config_back))
    weights.finish()
    before, after = settings(config), settings(config_back)
    changed = [name for name, value in before.items() if not _same(value, after[name])]
    left_out = [f"{n} = {before[n]!r}" for n in changed if n in chosen.left_out]
    changed = [n for n in changed if n not in chosen.left_out]
    if changed:
        listed = ", ".join(f"{n} = {before[n]!r} would become {after[n]!r}" for n in changed)
        raise ValueError(f"{chosen.name} cannot express this model: {listed}.")
    changed = [n for n in ours.keys() | back if n not in back or not are_equal(ours[n], back[n])]
    if changed:
        raise ValueError(f"{chosen.name} cannot express this model: {changed[0]} would change.")
    if not left_out:
        return []
    return [f"left out {', '.join(left_out)}: {chosen.config_file} has no field for it"]


def _same(a, b):
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-12)  # products of the same numbers
    return a == b


def _carry_tokenizer(src, new, vocab_size, notes):
    """Copies a tokenizer, if there is one, and checks it. Returns whether there is."""
    if not carry_tokenizer(src, new):
        return False
    # Some need a package that is not here; that does not make the copy wrong.
    try:
        tokenizer = load_tokenizer(new)
    except ValueError as error:
        notes.append(f"the tokenizer's files are copied, but here {error}")
    else:
        check_tokenizer(tokenizer, vocab_size)
    return True
