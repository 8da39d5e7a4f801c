"""What flash-linear-attention's models have in common in their configs."""

import math

HOW_TO_RUN = ("attn_mode", "fuse_cross_entropy", "fuse_linear_cross_entropy")
TRAINING = ("initializer_range", "use_l2warp")


def read_common(fields, training=TRAINING):
    """Reads the fields that every model has and that change nothing in ours.

    Args:
        fields: theirs.
        training: those of them that act in training only and have no counterpart.

    Raises:
        ValueError: a hybrid model.
    """
    fields.refuse("attn", "hybrid models with softmax attention layers have no counterpart here")
    fields.drop("it is how to run, not what to compute", *HOW_TO_RUN)
    fields.drop("it acts in training only", *training)
    fields.drop("there is no limit", "max_position_embeddings")


def read_general(fields):
    """What every model has and ours as well, as arguments for our config."""
    return {
        "vocab_size": fields.take("vocab_size"),
        "num_hidden_layers": fields.take("num_hidden_layers", kind=int),
        "tie_word_embeddings": fields.take("tie_word_embeddings", False),
        "use_cache": fields.take("use_cache", True),
        "pad_token_id": fields.take("pad_token_id", None),
        "bos_token_id": fields.take("bos_token_id", 1),
        "eos_token_id": fields.take("eos_token_id", 2),
    }


def write_general(config):
    """The way back of `read_general`, with the fields that are to be none."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    names += ("tie_word_embeddings", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id")
    return {"attn": None} | {name: getattr(config, name) for name in names}


def refuse_unless(config, library_model, settings):
    """Raises a ValueError if a config has another setting than the only one a model of fla's has.

    Args:
        config: ours.
        library_model: its name, for the message.
        settings: name of ours -> values that are the same there.
    """
    for name, values in settings.items():
        value = getattr(config, name)
        if value not in values:
            raise ValueError(f"{name} is {value!r}: fla's {library_model} has {values[0]!r}.")


def expanded(width, name, factor, width_name="hidden_size"):
    """A width times a factor, which has to come out whole."""
    size = round(width * factor)
    if not math.isclose(size, width * factor):
        raise ValueError(f"{width_name} * {name} is whole, got {width} * {factor}.")
    return size


def gated_mlp_width(hidden_size, ratio, width):
    """fla's rule for SwiGLU: two thirds of `ratio` times the width, up to a multiple of 256."""
    if width is not None:
        return width
    return 256 * math.ceil(int(hidden_size * (4 if ratio is None else ratio) * 2 / 3) / 256)


def read_swish(fields, model):
    """Reads the activation of MLP and gate, which is the same under two names.

    Raises:
        ValueError: it is another.
    """
    activation = fields.take("hidden_act", "swish")
    if activation not in ("swish", "silu"):
        raise ValueError(f"hidden_act is swish in fla's {model}, got {activation!r}.")


def general_names(config):
    """Our name and fla's of the tensors around the blocks."""
    yield "model.embed_tokens.weight", "model.embeddings.weight"
    yield "model.norm.weight", "model.norm.weight"
    yield "lm_head.weight", "lm_head.weight"


# Our name and fla's of what is around the mixer in each block of RetNet and Gated DeltaNet.
BLOCK = {
    "mixer_norm": "attn_norm",
    "mlp_norm": "mlp_norm",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
}


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
    general = read_general(fields)
    return general | {"embedding_norm": bool(fields.take("norm_first", True))}


def write_rwkv(config):
    """fla's fields of what RWKV-6 and 7 have in common, from our config."""
    return write_general(config) | {
        "num_heads": config.num_attention_heads,
        "hidden_act": "sqrelu",
        "norm_first": config.embedding_norm,
        "norm_bias": True,
        "norm_eps": config.layer_norm_eps,
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
