"""The RMT paper's own code, in Transformer-XL's stack (booydar/LM-RMT, `MemTransformerLM`).

Both ways. Its training script saves a pickled model, so a state dict is needed, and a config.json
with the arguments of the model: those that the format transformer-xl takes (`segment_length` is a
name of tgt_len here), num_mem_tokens, mem_at_end and read_mem_from_cache. The arguments that it
has and this does not would be other models: memory that is not at the end is written by tokens
that see no text, so that nothing is passed on.
"""

from ...models.transformer_xl import TransformerXLConfig
from . import transformer_xl_names as names
from .format import MAKE_A_TOKENIZER, Format, refuse_other

MEMORY = "model.memory.vectors"
# Of the model's own constructor and script, where there are any.
DEFAULTS = {"clamp_len": -1, "pre_lnorm": False}
PLAIN = ("n_layer", "n_head", "d_model", "d_head", "d_inner", "mem_len", "clamp_len", "pre_lnorm")
FIXED = {
    "same_length": False,
    "zero_memory": False,
    "untie_r": False,
    "cutoffs": [],
    "div_val": 1,
    "tie_projs": [False],
    "layer_norm_epsilon": 1e-5,
}


def is_one(config, names):
    """Whether a config.json is of this format."""
    return "model_type" not in config and "n_token" in config and "num_mem_tokens" in config


def read_config(fields, weights):
    """Our config from the arguments of the model."""
    names.refuse_other_models(fields)
    number = fields.take("num_mem_tokens", kind=int)
    if number < 1:
        raise ValueError(
            f"{fields.file} has num_mem_tokens = {number}, which is Transformer-XL without memory: "
            "remove num_mem_tokens and mem_at_end, and convert it with the format transformer-xl."
        )
    held = weights.shape("mem_tokens", 3)[0]
    if held != number:
        raise ValueError(
            f"{fields.file} has num_mem_tokens = {number}, but the weights' mem_tokens are {held}; "
            "correct the config, or the weights are of another model."
        )
    if not fields.take("mem_at_end", True):
        raise ValueError(
            f"{fields.file} has mem_at_end = false, so that memory is written by tokens that see "
            "no text and nothing is passed on: another model, which is not here."
        )
    fields.refuse("same_length", "with it tokens of memory see what is not this model's memory")
    for name, plain in (("cutoffs", []), ("div_val", 1), ("tie_projs", [False])):
        if fields.take(name, plain) not in (plain, None, [], [False]):
            raise ValueError(
                f"{fields.file} has {name} = {fields.values[name]!r}: only a vocabulary of one "
                "plain table is read here, not an adaptive one."
            )
    values = {}
    for name in PLAIN:
        arguments = (DEFAULTS[name],) if name in DEFAULTS else ()
        values[names.NAMES[name]] = fields.take(name, *arguments)
    if fields.take("d_embed", None) not in (None, values["hidden_size"]):
        raise ValueError(
            f"{fields.file} has d_embed = {fields.values['d_embed']!r}: only embeddings as wide as "
            "the model are read here."
        )
    lengths = {fields.take(name, None) for name in ("tgt_len", "segment_length")} - {None}
    if len(lengths) != 1:
        raise ValueError(
            f"{fields.file} says in tgt_len, or segment_length, how many tokens a segment has, got "
            f"{sorted(lengths)}; give one number."
        )
    fields.drop("how far gradients went through memory in training", "mem_backprop_depth")
    return TransformerXLConfig(
        **values,
        **FIXED,
        segment_length=lengths.pop(),
        num_memory_tokens=number,
        # Without a cache it says nothing.
        read_memory_from_cache=bool(fields.take("read_mem_from_cache", False))
        and values["mem_len"] > 0,
        vocab_size=fields.take("n_token"),
        initializer_range=fields.take("init_std", 0.02),
        tie_word_embeddings=fields.take("tie_weight", True),
    )


def write_config(config):
    """The arguments of the model from our config, and notes."""
    if config.num_memory_tokens < 1:
        raise ValueError("num_memory_tokens is 0: that is the format transformer-xl's.")
    refuse_other(config, FIXED | {"d_embed": config.hidden_size}, "the authors'")
    values = {name: getattr(config, names.NAMES[name]) for name in PLAIN}
    values |= {
        "tgt_len": config.segment_length,
        "num_mem_tokens": config.num_memory_tokens,
        "mem_at_end": True,
        "read_mem_from_cache": config.read_memory_from_cache,
        "same_length": False,
        "n_token": config.vocab_size,
        "tie_weight": config.tie_word_embeddings,
        "init_std": config.initializer_range,
        "attn_type": 0,
        "ext_len": 0,
    }
    return values, []


def read_weights(weights, config):
    """Pairs of our name and theirs, or part of it."""
    yield MEMORY, weights.take("mem_tokens", change=lambda x: x.squeeze(1))
    yield from names.read_weights(weights, config)


def write_weights(weights, config):
    """Pairs of their name and our tensor, or several."""
    yield "mem_tokens", weights.take(MEMORY, change=lambda x: x[:, None])
    yield from names.write_weights(weights, config)


FORMAT = Format(
    name="rmt-lmrmt",
    title="the RMT paper's own code in Transformer-XL's, a state dict and its arguments; both ways",
    recognizes=is_one,
    expects="a config.json with n_token and num_mem_tokens, and no model_type",
    read_config=read_config,
    read_weights=read_weights,
    architecture="transformer_xl",
    write_config=write_config,
    write_weights=write_weights,
    tokenizer=MAKE_A_TOKENIZER,
    left_out=("pad_token_id", "bos_token_id", "eos_token_id", "use_cache"),
)
