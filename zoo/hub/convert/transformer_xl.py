"""The authors' PyTorch Transformer-XL (kimiyoung/transformer-xl, `MemTransformerLM`), both ways.

Its training script saves a pickled model, so a state dict is needed, and a config.json with the
arguments of the model: n_token, n_layer, n_head, d_model, d_head, d_inner, and tgt_len, mem_len,
same_length, clamp_len as it was trained or is to be evaluated. A text begins without a memory.

Its loss takes the entries of the clusters in the reverse order: the last one is that of the first
cluster after the words themselves. They are turned round here, which is exact.
"""

from ...models.transformer_xl import TransformerXLConfig
from . import transformer_xl_names as names
from .format import MAKE_A_TOKENIZER, Format, refuse_other

# Of the model's own constructor and script, where there are any.
DEFAULTS = {
    "d_embed": None,
    "div_val": 1,
    "cutoffs": None,
    "clamp_len": -1,
    "same_length": False,
    "pre_lnorm": False,
    "tie_projs": None,
    "tgt_len": None,
}
FIXED = {
    "zero_memory": False,
    "num_memory_tokens": 0,  # rmt-lmrmt has some
    "untie_r": False,
    "layer_norm_epsilon": 1e-5,
}


def is_one(config, names):
    """Whether a config.json is of this format."""
    return "model_type" not in config and "n_token" in config and "num_mem_tokens" not in config


def read_config(fields, weights):
    """Our config from the arguments of the model."""
    names.refuse_other_models(fields)
    values = {}
    for name, ours in names.NAMES.items():
        arguments = (DEFAULTS[name],) if name in DEFAULTS else ()
        values[ours] = fields.take(name, *arguments)
    names.fill_segment_length(fields, values)
    is_tied, width = fields.take("tie_weight", True), values["hidden_size"]
    clusters = len(values["cutoffs"] or []) + 1
    has_projections = values["div_val"] > 1 or values["d_embed"] not in (None, width)
    tied = [bool(x) for x in values["tie_projs"] or [False] * clusters]
    if any(tied) and not is_tied and has_projections:
        raise ValueError(
            f"{fields.file} has tie_projs without tie_weight: here projections are tied where the "
            "words are; save the weights of one that ties neither or both."
        )
    values["tie_projs"] = tied if has_projections else None
    return TransformerXLConfig(
        **values,
        **FIXED,
        vocab_size=fields.take("n_token"),
        initializer_range=fields.take("init_std", 0.02),
        tie_word_embeddings=is_tied,
    )


def write_config(config):
    """The arguments of the model from our config, and notes."""
    refuse_other(config, FIXED, "the authors'")
    values = {name: getattr(config, ours) for name, ours in names.NAMES.items()}
    values |= {
        "n_token": config.vocab_size,
        "tie_weight": config.tie_word_embeddings,
        "init_std": config.initializer_range,
        "attn_type": 0,
        "ext_len": 0,
    }
    return values, []


def read_weights(weights, config):
    """Pairs of our name and theirs, or part of it."""
    return names.read_weights(weights, config, reverses_clusters=True)


def write_weights(weights, config):
    """Pairs of their name and our tensor, or several."""
    return names.write_weights(weights, config, reverses_clusters=True)


FORMAT = Format(
    name="transformer-xl",
    title="the authors' PyTorch Transformer-XL, a state dict and its arguments; both ways",
    recognizes=is_one,
    expects="a config.json with n_token and the model's other arguments, and no model_type",
    read_config=read_config,
    read_weights=read_weights,
    architecture="transformer_xl",
    write_config=write_config,
    write_weights=write_weights,
    tokenizer=MAKE_A_TOKENIZER,
    left_out=("pad_token_id", "bos_token_id", "eos_token_id", "use_cache"),
)
