"""Files of weights, opened: names, shapes and dtypes are known at once, values when asked for.

Files are mapped into memory. What was read from a mapping counts as used memory until the mapping
goes, so it goes often: a file is opened anew after every `AT_ONCE` bytes.
"""

import pickle
import zipfile

import torch
from safetensors import SafetensorError, safe_open

from .guard import check_pickle, check_tensors
from .lazy import Lazy
from .messages import one_line, some

AT_ONCE = 64 * 1024**2
# What can be computed with, or is none of the model's own weights, as a counter is.
PLAIN_DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool}
PLAIN_DTYPES |= {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


def open_files(paths, others=None):
    """Every tensor of some files by name, lazy. Code in pickled files is never run.

    Pickles of before torch 1.6, and compressed ones, cannot be mapped: they are read whole.

    Args:
        paths: of files of safetensors, or pickles.
        others: a dict to fill with what is not a tensor, by name; None refuses such things.

    Raises:
        ValueError: damaged files, something that is not a tensor, or tensors that are quantised,
            sparse, complex or without values, or are in two files.
    """
    tensors, reader = {}, _Reader()
    for path in paths:
        found = _open(path, others)
        for name, x in found.items():
            if what := _what_is_odd(x):
                raise ValueError(f"{path}: {name} is {what}; save the weights as plain floats.")
        if twice := sorted(found.keys() & tensors.keys()):
            raise ValueError(f"{path} holds {some(twice)}, which another shard holds too.")
        is_mapped = path.suffix == ".safetensors" or _can_be_mapped(path)
        for name, x in found.items():
            tensors[name] = reader.later(path, name, x) if is_mapped else x.contiguous()
    return tensors


class _Reader:
    """Reads tensors of mapped files, one of which is open at a time."""

    def __init__(self):
        self.path, self.tensors, self.num_bytes = None, None, 0

    def later(self, path, name, x):
        outline = torch.empty(x.shape, dtype=x.dtype, device="meta")
        return Lazy(outline, lambda: self._read(path, name))

    def _read(self, path, name):
        if self.path != path:
            self.path, self.tensors, self.num_bytes = path, _open(path, {}), 0
        x = self.tensors[name]
        self.num_bytes += x.nbytes
        if self.num_bytes > AT_ONCE:
            self.path = self.tensors = None
        return x.contiguous()


def _open(path, others):
    """The tensors of one file, their values mapped where that is possible."""
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path, others)


def _open_safetensors(path):
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        reason = one_line(error)
        remedy = "it is damaged or not fully downloaded: get it again."
        if "dtype" in reason.lower():
            remedy = "save the weights as plain floats."
        raise ValueError(
            f"{path} is not a readable safetensors file ({reason}); {remedy}"
        ) from None


def _can_be_mapped(path):
    """Whether a pickle is a zip file, as torch.save writes it, with nothing in it compressed."""
    try:
        with zipfile.ZipFile(path) as file:
            return all(part.compress_type == zipfile.ZIP_STORED for part in file.infolist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return False


def _open_pickle(path, others):
    check_pickle(path)
    try:
        is_mapped = _can_be_mapped(path)
        tensors = torch.load(str(path), map_location="cpu", weights_only=True, mmap=is_mapped)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, OSError, KeyError):
        raise ValueError(
            f"{path} is damaged or holds more than tensors, and a pickle that runs code is not "
            "opened; save its state_dict() alone, best as safetensors."
        ) from None
    # Trainers put the weights beside other things.
    for name in ("model", "state_dict", "module"):
        if isinstance(tensors, dict) and isinstance(tensors.get(name), dict):
            tensors = tensors[name]
    if not isinstance(tensors, dict):
        raise ValueError(f"{path}: expected a dict of tensors, got {type(tensors).__name__}.")
    tensors = dict(tensors)
    if odd := [name for name in tensors if not isinstance(name, str)]:
        raise ValueError(f"{path}: expected tensors by name, got {some(odd)} for a name.")
    strange = {name: x for name, x in tensors.items() if not torch.is_tensor(x)}
    if strange and others is None:
        names = some(sorted(map(str, strange)))
        raise ValueError(f"{path}: expected tensors only, but {names} is something else.")
    for name in strange:
        others[name] = tensors.pop(name)
    check_tensors(path, tensors.values())
    return tensors


def _what_is_odd(x):
    """Why a tensor is no plain one, in words, or None."""
    if x.is_meta:
        return "on the meta device, so it has no values"
    if x.is_quantized or x.dtype not in PLAIN_DTYPES:
        kind = "complex" if x.is_complex() else "quantised"
        return f"{kind} ({str(x.dtype).removeprefix('torch.')})"
    if x.layout != torch.strided or x.is_nested:
        return f"sparse or nested ({str(x.layout).removeprefix('torch.')})"
    return None
