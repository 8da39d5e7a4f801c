"""Foreign checkpoints become ours, exactly, and some go back: `zoo convert FORMAT SRC DST`.

One file per format. It says which config fields it understands, and where each of our weights
comes from. Whatever is left over, on either side, is an error: with a weight that nobody took, or a
setting that nobody read, it would be a different model.
"""

import difflib
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import save_torch_state_dict
from huggingface_hub.errors import StrictDataclassError

from ... import MODELS
from ..folder import (
    TOKENIZER_FILES,
    build_model,
    carry_files,
    check_tokenizer,
    load_tokenizer,
    new_folder,
    one_line,
    read_config,
    read_generation_config,
    read_json,
    read_tensors,
    settings,
)
from . import (
    fla_retnet,
    fla_rwkv6,
    fla_rwkv7,
    hf_minimax,
    hf_mistral,
    hf_rwkv,
    meliad,
    rwkv_pth,
    torchscale_retnet,
    transnormerllm,
)
from .format import Fields, Weights

_FILES = (
    torchscale_retnet,
    fla_retnet,
    rwkv_pth,
    hf_rwkv,
    fla_rwkv6,
    fla_rwkv7,
    transnormerllm,
    hf_minimax,
    hf_mistral,
    meliad,
)
FORMATS = {file.FORMAT.name: file.FORMAT for file in _FILES}


class Report(NamedTuple):
    """What a conversion did.

    Attributes:
        num_tensors: written.
        num_parameters: written.
        dtype: of them.
        notes: what was left out, and why.
        is_rounded: whether some weights are not the source's bit for bit; a note says which.
    """

    num_tensors: int
    num_parameters: int
    dtype: torch.dtype
    notes: list[str]
    is_rounded: bool = False


def convert(format, src, dst, overwrite=False):
    """Converts a foreign checkpoint to a folder that `from_pretrained` loads.

    Every weight keeps its value exactly; where a format forces a rounding, the report says so.
    Weights of several dtypes are written in the one that holds them all.

    Args:
        format: a key of `FORMATS`.
        src: a folder with weights (safetensors, sharded or not; .bin, .pt, .pth) and, in most
            formats, config.json; or the weight file itself. Tokenizer files in it are carried over.
        dst: the folder to write.
        overwrite: replace a model that is there.

    Returns:
        A `Report`.

    Raises:
        ValueError: an unknown format, a checkpoint of another kind, weights or settings without a
            counterpart in our model, damaged files, or something in the way at `dst`.
    """
    chosen = _find_format(format)
    src = _existing(src)
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
            raise ValueError(f"{src}: {error}") from None
        architecture = next(a for a in MODELS.values() if a.config is type(config))
        model = build_model(architecture, config, pairs, src)
        generation_config = read_generation_config(folder)
        if generation_config is not None:
            model.generation_config = generation_config
        model.save_pretrained(new)
        _carry_tokenizer(folder, new, config.vocab_size, fields.notes)
    num_parameters = sum(p.numel() for p in model.parameters())
    return Report(len(pairs), num_parameters, model.dtype, fields.notes, fields.is_rounded)


def convert_back(format, src, dst, overwrite=False):
    """Converts one of our checkpoints to a foreign format.

    What is written is read again as `convert` does and compared, so a model that the format cannot
    express is refused, whatever the reason.

    Args:
        format: a key of `FORMATS` that has a way back.
        src: a folder that `save_pretrained`, a training run or `convert` wrote.
        dst: the folder to write.
        overwrite: replace a model that is there.

    Returns:
        A `Report`.

    Raises:
        ValueError: an unknown format, one without a way back, a model that it cannot express,
            damaged files, or something in the way at `dst`.
    """
    chosen = _find_format(format)
    if chosen.architecture is None:
        names = ", ".join(f.name for f in FORMATS.values() if f.architecture)
        raise ValueError(f"{format} is only read; what can be written is {names}.")
    src = _existing(src)
    architecture, config = read_config(src)
    if architecture.name != chosen.architecture:
        raise ValueError(f"{src} is {architecture.name}; {format} holds {chosen.architecture}.")
    with new_folder(dst, overwrite) as new:
        model = build_model(architecture, config, read_tensors(src), src)
        ours = dict(model.state_dict())
        if config.tie_word_embeddings:
            for alias in model._tied_weights_keys:
                del ours[alias]
        try:
            values, notes = chosen.write_config(config)
            weights = Weights(ours)
            theirs = dict(chosen.write_weights(weights, config))
            weights.finish()
            _check_way_back(chosen, values, theirs, config, ours)
        except ValueError as error:
            raise ValueError(f"{src}: {error}") from None
        save_torch_state_dict(theirs, new)
        values["dtype"] = str(model.dtype).removeprefix("torch.")
        (new / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        carry_files(src, new, ("generation_config.json",))
        _carry_tokenizer(src, new, config.vocab_size, notes)
    num_parameters = sum(p.numel() for p in model.parameters())
    return Report(len(theirs), num_parameters, model.dtype, notes)


def _find_format(name):
    if name in FORMATS:
        return FORMATS[name]
    near = difflib.get_close_matches(name, FORMATS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(FORMATS)}."
    raise ValueError(f"unknown format {name!r}; {hint}")


def _existing(src):
    if not Path(src).exists():
        raise ValueError(f"{src}: no such folder or file.")
    return Path(src)


def _open(chosen, src, folder):
    """The fields and weights of a checkpoint, which is of the chosen format."""
    path = folder / "config.json"
    if not chosen.has_config:
        others = {}
        weights = Weights(read_tensors(src, others), others)
        if chosen.recognizes({}, weights.tensors):
            return Fields({}), weights
        values = read_json(path) if path.is_file() else {}
        raise ValueError(f"{src}: {_other_format(chosen, values, weights.tensors)}")
    if not path.is_file():
        names = _names(src)
        others = [f for f in FORMATS.values() if not f.has_config and f.recognizes({}, names)]
        if others:
            raise ValueError(f"{src}: {_other_format(chosen, {}, names)}")
    fields = Fields(read_json(path))
    # What tells the formats apart is in config.json: the weights are read once it is right.
    if not chosen.recognizes(fields.values, ()):
        raise ValueError(f"{path}: {_other_format(chosen, fields.values, _names(src))}")
    return fields, Weights(read_tensors(src))


def _names(src):
    """The tensors' names, for a message: none, if they cannot be read."""
    try:
        return read_tensors(src, {}).keys()
    except ValueError:
        return ()


def _other_format(chosen, values, names):
    message = f"{chosen.name} expects {chosen.expects}"
    if chosen.has_config and values:
        message += f", got model_type {values.get('model_type')!r}"
    others = [f.name for f in FORMATS.values() if f.recognizes(values, names)]
    if others:
        return f"{message}; this looks like {others[0]}."
    if any(values.get("model_type") == a.config.model_type for a in MODELS.values()):
        return f"{message}; this is already a checkpoint of ours."
    return f"{message}; `zoo convert --list` names the formats."


def _check_way_back(chosen, values, theirs, config, ours):
    """Raises a ValueError if what is to be written would be read as another model."""
    fields, weights = Fields(values), Weights(theirs)
    config_back = chosen.read_config(fields, weights)
    fields.finish()
    back = dict(chosen.read_weights(weights, config_back))
    weights.finish()
    before, after = settings(config), settings(config_back)
    changed = [name for name, value in before.items() if not _same(value, after[name])]
    if changed:
        listed = ", ".join(f"{n} = {before[n]!r} would become {after[n]!r}" for n in changed)
        raise ValueError(f"{chosen.name} cannot express this model: {listed}.")
    changed = [n for n in ours.keys() | back if n not in back or not torch.equal(ours[n], back[n])]
    if changed:
        raise ValueError(f"{chosen.name} cannot express this model: {changed[0]} would change.")


def _same(a, b):
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-12)  # products of the same numbers
    return a == b


def _carry_tokenizer(src, new, vocab_size, notes):
    if not carry_files(src, new, TOKENIZER_FILES):
        return
    # Some need a package that is not here; that does not make the copy wrong.
    try:
        tokenizer = load_tokenizer(new)
    except ValueError as error:
        notes.append(f"the tokenizer's files are copied, but here {error}")
    else:
        check_tokenizer(tokenizer, vocab_size)
