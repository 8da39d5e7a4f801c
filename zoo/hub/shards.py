"""Reads the weights of a training run that saved itself in shards, as FSDP does.

Ours have them in `shards`, those of transformers' Trainer and of accelerate in
`pytorch_model_fsdp_0`; whoever calls torch.distributed.checkpoint has them where they like, which
here is the checkpoint's folder itself.

torch.distributed.checkpoint keeps its index as a pickle, which could run code. Here it may name
nothing but the parts of an index.
"""

import io
import pickle
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint import metadata as index_parts
from torch.distributed.checkpoint.filesystem import FileSystemReader

from .lazy import Lazy
from .tensors import PLAIN_DTYPES

SHARDS, INDEX = "shards", ".metadata"
PLACES = (SHARDS, "pytorch_model_fsdp_0", "")
WHOLE = ("model.safetensors", "pytorch_model.bin")
WEIGHTS = "model."  # what the names of weights begin with, beside those of the optimizer
OPTIMIZER = "optim"  # and of those
_PARTS = {
    (index_parts.__name__, name)
    for name, part in vars(index_parts).items()
    if isinstance(part, type) and part.__module__ == index_parts.__name__
}
_PARTS |= {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
}


def has_shards(folder):
    """Whether a folder is a checkpoint in shards."""
    return _find(folder) is not None


def shard_files(folder):
    """The files of a checkpoint in shards, in a fixed order."""
    folder = _find(folder)
    return [folder / INDEX, *sorted(folder.glob("*.distcp"))]


def _find(folder):
    """The folder of the shards of a checkpoint, or None: of others than ours, whole weights win."""
    folder = Path(folder)
    places = [folder / place for place in PLACES if (folder / place / INDEX).is_file()]
    if not places or places[0].name == SHARDS:
        return places[0] if places else None
    whole = [n for name in WHOLE for n in (name, f"{name}.index.json") if (folder / n).is_file()]
    return None if whole else places[0]


def open_shards(folder):
    """Every weight of a checkpoint by name, lazy: put together when it is asked for.

    Args:
        folder: of the checkpoint.

    Raises:
        ValueError: the index is damaged or missing, or names what is no index, or weights that are
            no plain numbers; when a weight is asked for, also that its shard is.
    """
    is_plain, folder = _find(folder) == Path(folder), _find(folder)
    with _damage_is_said(folder):
        index = _read_index(folder)
        outlines = {
            name: torch.empty(part.size, dtype=part.properties.dtype, device="meta")
            for name, part in index.state_dict_metadata.items()
            if isinstance(part, index_parts.TensorStorageMetadata)
        }
    # A plain one may hold the weights alone, without a word before their names.
    prefix = WEIGHTS
    if is_plain and not all(name.startswith((WEIGHTS, OPTIMIZER)) for name in outlines):
        prefix = ""
    outlines = {name: x for name, x in outlines.items() if name.startswith(prefix)}
    for name, x in outlines.items():
        if x.dtype not in PLAIN_DTYPES:
            raise ValueError(
                f"{folder}: {name} is {str(x.dtype).removeprefix('torch.')}; save the weights as "
                "plain floats."
            )

    def later(name, outline):
        def read():
            tensors = {name: torch.empty_like(outline, device="cpu")}
            with _damage_is_said(folder), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it should
                dcp.load(tensors, storage_reader=_Reader(folder, index), no_dist=True)
            return tensors[name]

        return Lazy(outline, read)

    return {name.removeprefix(prefix): later(name, x) for name, x in outlines.items()}


@contextmanager
def _damage_is_said(folder):
    try:
        yield
    # Of pickle, of torch, of the file system: all of them say damaged.
    except (Exception, CheckpointException) as error:
        # To torch it is no Exception that one of its processes failed, of which there is one.
        causes = [cause for cause, _ in getattr(error, "failures", {}).values()] or [error]
        reason = " ".join(str(causes[0]).split())[:200]
        raise ValueError(
            f"{folder} is damaged or incomplete ({reason}); take another checkpoint, or a copy."
        ) from None


def _read_index(folder):
    return _Index(io.BytesIO((folder / INDEX).read_bytes())).load()


class _Reader(FileSystemReader):
    def __init__(self, folder, index):
        super().__init__(folder)
        self.index = index

    def read_metadata(self, *args, **kwargs):
        self.index.storage_meta = self.index.storage_meta or index_parts.StorageMeta()
        self.index.storage_meta.load_id = self.load_id
        return self.index


class _Index(pickle.Unpickler):
    def find_class(self, module, name):
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _PARTS:
            raise pickle.UnpicklingError(f"its index names {module}.{name}")
        return super().find_class(module, name)
