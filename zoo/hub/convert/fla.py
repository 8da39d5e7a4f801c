"""What flash-linear-attention's models have in common in their configs."""

import math

HOW_TO_RUN = ("attn_mode", "fuse_cross_entropy", "fuse_linear_cross_entropy")
TRAINING = ("initializer_range", "use_l2warp")


def read_common(fields):
    """Reads the fields that every model has and that change nothing in ours.

    Raises:
        ValueError: a hybrid model.
    """
    fields.refuse("attn", "hybrid models with softmax attention layers have no counterpart here")
    fields.drop("it is how to run, not what to compute", *HOW_TO_RUN)
    fields.drop("it acts in training only", *TRAINING)
    fields.drop("there is no limit", "max_position_embeddings")


def expanded(hidden_size, name, factor):
    """hidden_size times a factor, which has to come out whole."""
    size = round(hidden_size * factor)
    if not math.isclose(size, hidden_size * factor):
        raise ValueError(f"hidden_size * {name} is whole, got {hidden_size} * {factor}.")
    return size


def rwkv_mlp_width(hidden_size, ratio, width):
    """fla's rule for RWKV: `ratio` times the model's width, up to a multiple of 32."""
    return 32 * math.ceil(int(hidden_size * ratio) / 32) if width is None else width


def read_rwkv(fields):
    """What RWKV-6 and 7 have in common, as arguments for our config.

    Raises:
        ValueError: an option without a counterpart.
    """
    read_common(fields)
    activation = fields.take("hidden_act", "sqrelu")
    if activation != "sqrelu":
        raise ValueError(f"hidden_act is sqrelu in RWKV's channel mix, got {activation!r}.")
    if not fields.take("norm_bias", True):
        raise ValueError("config.json has norm_bias = false: our norms have a bias.")
    return {
        "vocab_size": fields.take("vocab_size"),
        "num_hidden_layers": fields.take("num_hidden_layers", kind=int),
        "embedding_norm": bool(fields.take("norm_first", True)),
        "tie_word_embeddings": fields.take("tie_word_embeddings", False),
        "use_cache": fields.take("use_cache", True),
        "pad_token_id": fields.take("pad_token_id", None),
        "bos_token_id": fields.take("bos_token_id", 1),
        "eos_token_id": fields.take("eos_token_id", 2),
    }


def write_rwkv(config):
    """fla's fields of what RWKV-6 and 7 have in common, from our config."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "hidden_act": "sqrelu",
        "norm_first": config.embedding_norm,
        "norm_bias": True,
        "norm_eps": config.layer_norm_eps,
        "attn": None,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_cache": config.use_cache,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
    }


def rwkv_names(config, mixer, mlp):
    """Our name and fla's of each tensor of RWKV-6 or 7.

    Args:
        config: ours.
        mixer: (layer) -> our name and fla's of the tensors of its time mix that differ.
        mlp: our name and fla's of the tensors of the channel mix.
    """
    yield "model.embed_tokens.weight", "model.embeddings.weight"
    yield "lm_head.weight", "lm_head.weight"
    norms = {"model.norm": "model.norm"}
    if config.embedding_norm:
        norms["model.embed_norm"] = "model.layers.0.pre_norm"
    for layer in range(config.num_hidden_layers):
        p = f"model.layers.{layer}"
        norms |= {
            f"{p}.mixer_norm": f"{p}.attn_norm",
            f"{p}.mlp_norm": f"{p}.ffn_norm",
            f"{p}.mixer.head_norm": f"{p}.attn.g_norm",
        }
        yield f"{p}.mixer.out_proj.weight", f"{p}.attn.o_proj.weight"
        for ours, theirs in mixer(layer):
            yield f"{p}.mixer.{ours}", f"{p}.attn.{theirs}"
        for ours, theirs in mlp:
            yield f"{p}.mlp.{ours}", f"{p}.ffn.{theirs}"
    for ours, theirs in norms.items():
        for kind in ("weight", "bias"):
            yield f"{ours}.{kind}", f"{theirs}.{kind}"
