"""Reads the weights of a training run that saved itself in shards.

torch.distributed.checkpoint keeps its index as a pickle, which could run code. Here it may name
nothing but the parts of an index.
"""

import io
import pickle
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as index_parts
from torch.distributed.checkpoint.filesystem import FileSystemReader

SHARDS, INDEX = "shards", ".metadata"
WEIGHTS = "model."  # what the names of weights begin with, beside those of the optimizer
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
    return (Path(folder) / SHARDS / INDEX).is_file()


def read_shards(folder):
    """Every weight of a checkpoint, put together.

    Args:
        folder: of the checkpoint.

    Returns:
        Name -> tensor.

    Raises:
        ValueError: the index or a shard is damaged or missing, or it names what is no index.
    """
    folder = Path(folder) / SHARDS
    try:
        parts = _Reader(folder).read_metadata().state_dict_metadata
        tensors = {
            name: torch.empty(part.size, dtype=part.properties.dtype)
            for name, part in parts.items()
            if name.startswith(WEIGHTS) and isinstance(part, index_parts.TensorStorageMetadata)
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it should be
            dcp.load(tensors, storage_reader=_Reader(folder), no_dist=True)
    except Exception as error:  # of pickle, of torch, of the file system: all of them say damaged
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{folder} is damaged or incomplete ({reason}); take another checkpoint, or a copy."
        ) from None
    return {name.removeprefix(WEIGHTS): tensor for name, tensor in tensors.items()}


class _Reader(FileSystemReader):
    def read_metadata(self, *args, **kwargs):
        content = io.BytesIO((Path(self.path) / INDEX).read_bytes())
        metadata = _Index(content).load()
        metadata.storage_meta = metadata.storage_meta or index_parts.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Index(pickle.Unpickler):
    def find_class(self, module, name):
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _PARTS:
            raise pickle.UnpicklingError(f"its index names {module}.{name}")
        return super().find_class(module, name)
