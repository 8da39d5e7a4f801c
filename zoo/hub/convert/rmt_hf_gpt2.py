"""The Recurrent Memory Transformer around transformers' GPT-2 (booydar's `RecurrentWrapper`).

Read alone: no library has a class for it. A batch's segments, which it cuts by columns, are counted
from each document's own start here, and `generate` writes a segment's memory when it is full.
"""

from . import rmt_gpt2_names as names
from .format import Format


def is_one(config, names_of_tensors):
    """Whether a config.json is of this format."""
    return names.is_one(config, names_of_tensors) and "d_mem" not in config


def read_config(fields, weights):
    """Our config from GPT-2's fields and the wrapper's."""
    return names.read_config(fields, weights)


def read_weights(weights, config):
    """Pairs of our name and their tensor, or part of it."""
    return names.read_weights(weights, config)


FORMAT = Format(
    name="rmt-hf-gpt2",
    title="the authors' Recurrent Memory Transformer around transformers' GPT-2",
    recognizes=is_one,
    expects="a config.json of GPT-2 with segment_size and num_mem_tokens too, and no d_mem",
    read_config=read_config,
    read_weights=read_weights,
    tokenizer="copy the files of GPT-2's, from whose weights it began, to {dst}",
)
