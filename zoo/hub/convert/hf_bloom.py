"""transformers' BLOOM (`BloomForCausalLM`, bigscience/bloom-560m to bloom), both ways.

GPT's block with LayerNorms, biases everywhere, a tanh gelu with a rounded constant and one more
norm on the embeddings; ALiBi by the places of tokens without padding, as everything counts here. q,
k and v lie in one matrix, one after the other in every head: [H, 3, K] rows.

bigscience's files name the tensors of the decoder without transformers' "transformer." before them.
"""

import torch

from ...core.length_limit import length_limit
from ...models.sliding_window import SlidingWindowConfig
from .format import TRANSFORMERS, Format, refuse_beyond, refuse_other, split_tensor

IN_TRAINING = ("hidden_dropout", "attention_dropout")
HOW_TO_RUN = (
    "pretraining_tp",
    "slow_but_exact",
    "masked_softmax_fusion",
    "bias_dropout_fusion",
    "attention_softmax_in_fp32",
    "skip_bias_add",
    "skip_bias_add_qkv",
    "offset_alibi",
)
# What makes a SlidingWindowConfig BLOOM's.
FIXED = {
    "position_embedding_type": "alibi",
    "alibi_bias_max": 8,
    "hidden_act": "gelu_bloom",
    "gated_mlp": False,
    "mlp_bias": True,
    "attention_bias": True,
    "norm_type": "layer",
    "norm_bias": True,
    "embedding_norm": True,
    "sliding_window": None,
}
# Their field -> ours.
NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "layer_norm_epsilon": "rms_norm_eps",
    "initializer_range": "initializer_range",
    "use_cache": "use_cache",
    "tie_word_embeddings": "tie_word_embeddings",
    "pad_token_id": "pad_token_id",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
}
# Of bigscience's own configs.
OTHER_NAMES = {
    "hidden_size": "n_embed",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
}
DEFAULTS = {
    "vocab_size": 250880,
    "hidden_size": 64,
    "n_layer": 2,
    "n_head": 8,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "use_cache": True,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def is_one(config, names):
    """Whether a config.json is of this format."""
    return config.get("model_type") == "bloom"


def read_config(fields, weights):
    """Our config from transformers' fields."""
    fields.drop("dropout in training alone", *IN_TRAINING)
    fields.drop("it is how to run, not what to compute", *HOW_TO_RUN)
    fields.drop("a tokenizer's id", "unk_token_id")
    fields.refuse(
        "apply_residual_connection_post_layernorm",
        "residuals that start from a norm's output have no counterpart here",
    )
    fields.refuse("n_inner", "transformers' BLOOM has an MLP of four times the width")
    values = {}
    for name, ours in NAMES.items():
        other = fields.take(OTHER_NAMES[name], None) if name in OTHER_NAMES else None
        value = fields.take(name, DEFAULTS.get(name))
        values[ours] = value if other is None else other
    return SlidingWindowConfig(
        **values,
        intermediate_size=4 * values["hidden_size"],
        max_position_embeddings=fields.take("seq_length", None),
        **FIXED,
    )


def write_config(config):
    """transformers' fields from our config, and notes."""
    refuse_other(config, FIXED | fixed_sizes(config), "transformers'")
    known = {*NAMES.values(), *FIXED, *fixed_sizes(config), "max_position_embeddings"}
    refuse_beyond(config, known, "transformers'")
    values = {"architectures": ["BloomForCausalLM"], "model_type": "bloom"}
    values |= {name: getattr(config, ours) for name, ours in NAMES.items()}
    if length_limit(config) is not None:
        values["seq_length"] = config.max_position_embeddings
    return values, []


def fixed_sizes(config):
    """Our fields that follow from the others there."""
    return {
        "num_key_value_heads": config.num_attention_heads,
        "head_dim": config.hidden_size // config.num_attention_heads,
        "intermediate_size": 4 * config.hidden_size,
    }


def module_names(config):
    """Our module and transformers', of those that have a weight and a bias, but q, k and v."""
    if config.embedding_norm:
        yield "model.embed_norm", "word_embeddings_layernorm"
    parts = {
        "mixer_norm": "input_layernorm",
        "mixer.out_proj": "self_attention.dense",
        "mlp_norm": "post_attention_layernorm",
        "mlp.up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    }
    for layer in range(config.num_hidden_layers):
        for ours, theirs in parts.items():
            yield f"model.layers.{layer}.{ours}", f"h.{layer}.{theirs}"
    yield "model.norm", "ln_f"


def kinds_of(ours, config):
    """Which tensors one of our modules has."""
    has_bias = config.norm_bias if ours.endswith("norm") else config.mlp_bias
    return ("weight", "bias") if has_bias else ("weight",)


def read_weights(weights, config):
    """Pairs of our name and transformers' tensor, or part of it."""
    embedding = "word_embeddings.weight"
    before = "" if embedding in weights.tensors else "transformer."
    yield "model.embed_tokens.weight", weights.take(before + embedding)
    for ours, theirs in module_names(config):
        for kind in kinds_of(ours, config):
            yield f"{ours}.{kind}", weights.take(f"{before}{theirs}.{kind}")
    for layer in range(config.num_hidden_layers):
        mixer = f"model.layers.{layer}.mixer"
        for kind in kinds_of(mixer, config):
            name = f"{before}h.{layer}.self_attention.query_key_value.{kind}"
            parts = split_tensor(weights, name, cuts(config))
            for letter, part in zip("qkv", parts, strict=True):
                yield f"{mixer}.{letter}_proj.{kind}", part
    if "lm_head.weight" in weights.tensors or not config.tie_word_embeddings:
        yield "lm_head.weight", weights.take("lm_head.weight")


def write_weights(weights, config):
    """Pairs of transformers' name and our tensor."""
    yield "transformer.word_embeddings.weight", weights.take("model.embed_tokens.weight")
    for ours, theirs in module_names(config):
        for kind in kinds_of(ours, config):
            yield f"transformer.{theirs}.{kind}", weights.take(f"{ours}.{kind}")
    for layer in range(config.num_hidden_layers):
        mixer = f"model.layers.{layer}.mixer"
        for kind in kinds_of(mixer, config):
            names = [f"{mixer}.{letter}_proj.{kind}" for letter in "qkv"]
            name = f"transformer.h.{layer}.self_attention.query_key_value.{kind}"
            yield name, weights.take(*names, change=lambda *parts: join(config, *parts))
    if not config.tie_word_embeddings:
        yield "lm_head.weight", weights.take("lm_head.weight")


def cuts(config):
    """What cuts q, k and v out of one tensor: row by row in every head, or a single k and v."""
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    shape, parts = (heads, 3, size), [(slice(None), i) for i in range(3)]
    if groups != heads:
        shape = heads + 2, size
        parts = [slice(0, heads), slice(heads, heads + 1), slice(heads + 1, heads + 2)]
    return [lambda x, part=part: x.unflatten(0, shape)[part].flatten(0, 1) for part in parts]


def join(config, *parts):
    """The way back of `cuts`."""
    if config.num_key_value_heads != config.num_attention_heads:
        return torch.cat(parts)
    shape = config.num_attention_heads, config.head_dim
    return torch.stack([x.unflatten(0, shape) for x in parts], dim=1).flatten(0, 2)


FORMAT = Format(
    name="hf-bloom",
    title="transformers' BloomForCausalLM (bigscience/bloom-560m to bloom); both ways",
    recognizes=is_one,
    expects="model_type 'bloom'",
    library=TRANSFORMERS,
    read_config=read_config,
    read_weights=read_weights,
    architecture="sliding_window",
    write_config=write_config,
    write_weights=write_weights,
)
