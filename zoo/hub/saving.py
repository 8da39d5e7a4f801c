"""Writes a model whose weights are lazy, with the memory of one of its files at a time."""

import json

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from .files import INDEX
from .lazy import value_of

METADATA = {"format": "pt"}  # transformers asks for it


def save_model(model, tensors, folder, max_shard_size):
    """What `save_pretrained` writes, without the weights being in memory together.

    Args:
        model: its outline, from `build_model`.
        tensors: its weights by name, lazy or not.
        folder: an existing one.
        max_shard_size: a file of weights is at most this large, as "5GB", or a number of bytes.
    """
    model.save_pretrained(folder, state_dict={})  # the configs alone
    save_tensors(tensors, folder, max_shard_size, {"total_parameters": model.num_parameters()})


def save_tensors(tensors, folder, max_shard_size, metadata=None):
    """Writes safetensors by transformers' names: one file, or several and their index.

    Args:
        tensors: by name, lazy or not.
        folder: an existing one.
        max_shard_size: a file is at most this large, unless a single tensor is larger.
        metadata: for the index, beside the tensors' size.
    """
    # A part of another tensor counts as a whole one.
    outlines = {n: torch.empty(x.shape, dtype=x.dtype, device="meta") for n, x in tensors.items()}
    split = split_torch_state_dict_into_shards(outlines, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        save_one_file({name: tensors[name] for name in names}, folder / file)
    if split.is_sharded:
        index = {
            "metadata": (metadata or {}) | split.metadata,
            "weight_map": split.tensor_to_filename,
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / INDEX).write_text(text, encoding="utf-8")


def save_one_file(tensors, path):
    """Writes one file of safetensors.

    Args:
        tensors: by name, lazy or not.
        path: of it.
    """
    read, places = {}, set()
    for name, x in tensors.items():
        x = value_of(x).contiguous()
        # Of what lies in one piece of memory with another tensor, safetensors wants a copy.
        if x.untyped_storage().nbytes() != x.nbytes or x.data_ptr() in places:
            x = x.clone()
        places.add(x.data_ptr())
        read[name] = x
    save_file(read, path, metadata=METADATA)
