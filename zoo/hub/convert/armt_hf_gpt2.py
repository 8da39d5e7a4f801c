"""ARMT around transformers' GPT-2 (RodkinIvan's `AssociativeRecurrentWrapper`), read alone.

Its state dict has each layer twice, once as the wrapper's own and once as the decoder's, of which
the second is read.
"""

from . import rmt_gpt2_names as names
from .format import Format

# Our matrix of a layer's memory -> theirs.
MATRICES = {
    "q_proj.weight": "W_mq.weight",
    "k_proj.weight": "W_mk.weight",
    "v_proj.weight": "W_mv.weight",
    "strength_proj.weight": "W_mb.weight",
    "strength_proj.bias": "W_mb.bias",
}


def is_one(config, names_of_tensors):
    """Whether a config.json is of this format."""
    return names.is_one(config, names_of_tensors) and "d_mem" in config


def read_config(fields, weights):
    """Our config from GPT-2's fields and the wrapper's."""
    fields.refuse("sliding_window", "keys of the segment before are not passed on here")
    fields.refuse("gating", "what is found is added without a gate here")
    if not fields.take("use_denom", True):
        raise ValueError(
            f"{fields.file} has use_denom = False: what is found is divided by the normaliser here."
        )
    return names.read_config(
        fields,
        weights,
        memory="associative",
        memory_size=fields.take("d_mem"),
        dpfp_order=fields.take("nu", 3),
        memory_correction=fields.take("correction", True),
        memory_at_table_end=fields.take("wrap_pos", False),
    )


def read_weights(weights, config):
    """Pairs of our name and their tensor, or part of it."""
    for name in [x for x in weights.tensors if x.startswith("memory_cell.layers.")]:
        weights.take(name)
    for layer in range(config.num_hidden_layers):
        for ours, theirs in MATRICES.items():
            tensor = weights.take(f"{names.DECODER}.h.{layer}.{theirs}")
            yield f"model.layers.{layer}.memory.{ours}", tensor
    yield from names.read_weights(weights, config, "layer.")


FORMAT = Format(
    name="armt-hf-gpt2",
    title="the authors' associative recurrent memory around transformers' GPT-2",
    recognizes=is_one,
    expects="a config.json of GPT-2 with segment_size, num_mem_tokens and d_mem too",
    read_config=read_config,
    read_weights=read_weights,
    tokenizer="copy the files of GPT-2's, from whose weights it began, to {dst}",
)
