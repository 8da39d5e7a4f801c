"""Foreign checkpoints become ours, exactly: `zoo convert FORMAT SRC DST`.

One file per format. It says which config fields it understands, and where each of our weights
comes from. Whatever is left over, on either side, is an error: with a weight that nobody took, or a
setting that nobody read, it would be a different model.
"""

import difflib
from pathlib import Path
from typing import NamedTuple

import torch
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
    read_generation_config,
    read_json,
    read_tensors,
)
from . import fla_retnet, torchscale_retnet
from .format import Fields, Weights

FORMATS = {f.name: f for f in (torchscale_retnet.FORMAT, fla_retnet.FORMAT)}


class Report(NamedTuple):
    """What a conversion did: tensors and parameters written, their dtype, what was left out."""

    num_tensors: int
    num_parameters: int
    dtype: torch.dtype
    notes: list[str]


def convert(format, src, dst, overwrite=False):
    """Converts a foreign checkpoint to a folder that `from_pretrained` loads.

    Every weight keeps its value exactly. Weights of several dtypes are written in the one that
    holds them all.

    Args:
        format: a key of `FORMATS`.
        src: a folder with weights (safetensors, sharded or not; .bin, .pt, .pth) and config.json,
            or the weight file itself. Tokenizer files in it are carried over.
        dst: the folder to write.
        overwrite: replace a model that is there.

    Returns:
        A `Report`.

    Raises:
        ValueError: an unknown format, a checkpoint of another kind, weights or settings without a
            counterpart in our model, damaged files, or something in the way at `dst`.
    """
    if format not in FORMATS:
        near = difflib.get_close_matches(format, FORMATS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(FORMATS)}."
        raise ValueError(f"unknown format {format!r}; {hint}")
    chosen = FORMATS[format]
    src = Path(src)
    if not src.exists():
        raise ValueError(f"{src}: no such folder or file.")
    folder = src if src.is_dir() else src.parent
    fields = Fields(read_json(folder / "config.json"))
    if not chosen.recognizes(fields.values):
        raise ValueError(_wrong_format(chosen, folder, fields.values))
    with new_folder(dst, overwrite) as new:
        weights = Weights(read_tensors(src))
        try:
            config = chosen.read_config(fields, set(weights.tensors))
            fields.finish()
            pairs = dict(chosen.read_weights(weights, config))
            weights.finish()
        except StrictDataclassError as error:
            raise ValueError(f"{src}: {one_line(error)}") from None
        except ValueError as error:
            raise ValueError(f"{src}: {error}") from None
        model = build_model(MODELS[chosen.architecture], config, pairs, src)
        generation_config = read_generation_config(folder)
        if generation_config is not None:
            model.generation_config = generation_config
        model.save_pretrained(new)
        if carry_files(folder, new, TOKENIZER_FILES):
            # Some need a package that is not here; that does not make the copy wrong.
            try:
                tokenizer = load_tokenizer(new)
            except ValueError as error:
                fields.notes.append(f"the tokenizer's files are copied, but here {error}")
            else:
                check_tokenizer(tokenizer, config.vocab_size)
    num_parameters = sum(p.numel() for p in model.parameters())
    return Report(len(pairs), num_parameters, model.dtype, fields.notes)


def _wrong_format(chosen, folder, values):
    message = (
        f"{folder / 'config.json'}: {chosen.name} expects {chosen.expects}, "
        f"got model_type {values.get('model_type')!r}"
    )
    others = [f.name for f in FORMATS.values() if f.recognizes(values)]
    if others:
        return f"{message}; this looks like {others[0]}."
    if any(values.get("model_type") == a.config.model_type for a in MODELS.values()):
        return f"{message}; this is already a checkpoint of ours."
    return f"{message}; `zoo convert --list` names the formats."
