"""transformers' MPT (`MptForCausalLM`, mosaicml/mpt-7b, -30b, -7b-storywriter), both ways.

GPT's block with LayerNorms without bias, an exact gelu and no biases at all; ALiBi; q, k and v in
one matrix, one after the other. Not of its mathematics here: learned positions, prefixes and norms
of queries and keys.

transformers' class has no way to compute three things that its config names. It takes the slopes
of alibi_bias_max = 8 whatever that says (mpt-7b-storywriter has 16), ALiBi whatever attn_config's
alibi says, and fails for texts beyond max_seq_len, where ALiBi has no limit. Here alibi_bias_max is
obeyed, as in MosaicML's code, alibi = False is refused, and no length is.
"""

import torch

from ...core.length_limit import length_limit
from ...models.sliding_window import SlidingWindowConfig
from .format import (
    TRANSFORMERS,
    Fields,
    Format,
    refuse_beyond,
    refuse_other,
    split_tensor,
)

IN_TRAINING = ("emb_pdrop", "resid_pdrop", "embedding_fraction", "init_config")
HOW_TO_RUN = ("init_device", "verbose")
NO_ATTENTION_LIKE_IT = {
    "qk_ln": "norms of queries and keys have no counterpart here",
    "prefix_lm": "attention that looks ahead in a prefix has no counterpart here",
    "attn_uses_sequence_id": "documents are told apart by positions here, not by ids of a batch",
}
BIAS_MAX = 8  # of transformers' class
# What makes a SlidingWindowConfig MPT's.
FIXED = {
    "position_embedding_type": "alibi",
    "hidden_act": "gelu",
    "gated_mlp": False,
    "mlp_bias": False,
    "attention_bias": False,
    "norm_type": "layer",
    "norm_bias": False,
    "embedding_norm": False,
    "sliding_window": None,
}
# Their field -> ours.
NAMES = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "layer_norm_epsilon": "rms_norm_eps",
    "initializer_range": "initializer_range",
    "use_cache": "use_cache",
    "tie_word_embeddings": "tie_word_embeddings",
    "pad_token_id": "pad_token_id",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
}
DEFAULTS = {
    "vocab_size": 50368,
    "d_model": 2048,
    "n_layers": 24,
    "n_heads": 16,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "use_cache": False,
    "tie_word_embeddings": True,
}


def is_one(config, names):
    """Whether a config.json is of this format."""
    return config.get("model_type") == "mpt"


def read_config(fields, weights):
    """Our config from transformers' fields."""
    fields.drop("in training alone", *IN_TRAINING)
    fields.drop("it is how to run, not what to compute", *HOW_TO_RUN)
    fields.drop("ALiBi takes their place", "learned_pos_emb")
    fields.drop("a tokenizer's name", "tokenizer_name")
    if not fields.take("no_bias", True):
        raise ValueError("config.json has no_bias = False, which transformers' MPT does not obey.")
    fields.refuse("logit_scale", "transformers' MPT does not obey it")
    norm = fields.take("norm_type", "low_precision_layernorm")
    if norm not in ("low_precision_layernorm", "layernorm"):
        raise ValueError(f"config.json has norm_type = {norm!r}: transformers' MPT has LayerNorms.")
    attention = read_attention(fields)
    values = {ours: fields.take(name, DEFAULTS.get(name)) for name, ours in NAMES.items()}
    return SlidingWindowConfig(
        **values,
        intermediate_size=fields.take("expansion_ratio", 4) * values["hidden_size"],
        max_position_embeddings=fields.take("max_seq_len", 2048),
        **attention,
        **FIXED,
    )


def read_attention(fields):
    """Our fields from those of attn_config."""
    attention = Fields(fields.take("attn_config", None, kind=dict | None) or {}, fields.file)
    attention.drop("dropout in training alone", "attn_pdrop")
    attention.drop("it is how to run, not what to compute", "attn_impl")
    kind = attention.take("attn_type", "multihead_attention")
    if kind != "multihead_attention":
        raise ValueError(
            f"config.json has attn_type = {kind!r}: transformers' MPT has 'multihead_attention'."
        )
    for name, reason in NO_ATTENTION_LIKE_IT.items():
        attention.refuse(name, reason)
    if not attention.take("alibi", True):
        raise ValueError(
            "config.json has alibi = False in attn_config: learned positions have no counterpart "
            "here."
        )
    bias_max = attention.take("alibi_bias_max", BIAS_MAX)
    if bias_max != BIAS_MAX:
        attention.notes.append(
            f"alibi_bias_max is {bias_max}, as in MosaicML's code; transformers' own class ignores "
            f"it, and computes something else: the slopes of {BIAS_MAX}"
        )
    found = {
        "alibi_bias_max": bias_max,
        "attention_scale": attention.take("softmax_scale", None),
        "clip_qkv": attention.take("clip_qkv", None) or None,
    }
    attention.finish()
    fields.notes += attention.notes
    return found


def write_config(config):
    """transformers' fields from our config, and notes."""
    refuse_other(config, FIXED | fixed_sizes(config), "transformers'")
    refuse_other(config, {"alibi_bias_max": BIAS_MAX}, "transformers'")
    known = {*NAMES.values(), *FIXED, *fixed_sizes(config)}
    known |= {"alibi_bias_max", "attention_scale", "clip_qkv", "max_position_embeddings"}
    refuse_beyond(config, known, "transformers'")
    values = {"architectures": ["MptForCausalLM"], "model_type": "mpt"}
    values |= {name: getattr(config, ours) for name, ours in NAMES.items()}
    # transformers takes no whole numbers for these.
    scale, clip = (
        None if x is None else float(x) for x in (config.attention_scale, config.clip_qkv)
    )
    values["attn_config"] = {
        "alibi": True,
        "alibi_bias_max": config.alibi_bias_max,
        "softmax_scale": scale,
        "clip_qkv": clip,
    }
    if length_limit(config) is not None:
        values["max_seq_len"] = config.max_position_embeddings
    longest = values.get("max_seq_len", 2048)
    note = f"transformers' class fails for texts of more than max_seq_len = {longest} tokens"
    return values, [note]


def fixed_sizes(config):
    """Our fields that follow from the others there."""
    return {
        "num_key_value_heads": config.num_attention_heads,
        "head_dim": config.hidden_size // config.num_attention_heads,
        "intermediate_size": 4 * config.hidden_size,
    }


def tensor_names(config):
    """Our name and transformers' of each tensor but q, k and v."""
    yield "model.embed_tokens.weight", "transformer.wte.weight"
    parts = {
        "mixer_norm": "norm_1",
        "mixer.out_proj": "attn.out_proj",
        "mlp_norm": "norm_2",
        "mlp.up_proj": "ffn.up_proj",
        "mlp.down_proj": "ffn.down_proj",
    }
    for layer in range(config.num_hidden_layers):
        before, after = f"model.layers.{layer}", f"transformer.blocks.{layer}"
        for ours, theirs in parts.items():
            yield f"{before}.{ours}.weight", f"{after}.{theirs}.weight"
    yield "model.norm.weight", "transformer.norm_f.weight"


def joined_name(layer):
    """transformers' name of q, k and v in one."""
    return f"transformer.blocks.{layer}.attn.Wqkv.weight"


def read_weights(weights, config):
    """Pairs of our name and transformers' tensor, or part of it."""
    for ours, theirs in tensor_names(config):
        yield ours, weights.take(theirs)
    for layer in range(config.num_hidden_layers):
        thirds = [lambda x, i=i: x.unflatten(0, (3, -1))[i] for i in range(3)]
        parts = split_tensor(weights, joined_name(layer), thirds)
        for name, part in zip("qkv", parts, strict=True):
            yield f"model.layers.{layer}.mixer.{name}_proj.weight", part
    if "lm_head.weight" in weights.tensors or not config.tie_word_embeddings:
        yield "lm_head.weight", weights.take("lm_head.weight")


def write_weights(weights, config):
    """Pairs of transformers' name and our tensor."""
    for ours, theirs in tensor_names(config):
        yield theirs, weights.take(ours)
    for layer in range(config.num_hidden_layers):
        names = [f"model.layers.{layer}.mixer.{name}_proj.weight" for name in "qkv"]
        yield joined_name(layer), weights.take(*names, change=lambda *x: torch.cat(x))
    if not config.tie_word_embeddings:
        yield "lm_head.weight", weights.take("lm_head.weight")


FORMAT = Format(
    name="hf-mpt",
    title="transformers' MptForCausalLM (mosaicml/mpt-7b, -30b, -7b-storywriter); both ways",
    recognizes=is_one,
    expects="model_type 'mpt'",
    library=TRANSFORMERS,
    read_config=read_config,
    read_weights=read_weights,
    architecture="sliding_window",
    write_config=write_config,
    write_weights=write_weights,
)
