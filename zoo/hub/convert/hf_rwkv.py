"""transformers' RWKV-4 (`RwkvForCausalLM`, RWKV/rwkv-4-*-pile, RWKV/rwkv-raven-*), both ways.

The same numbers as in the authors' files, under other names. Its last norm has an epsilon of 1e-5
whatever the config says. In eval mode it divides the weights that write to the residual stream by
2^(layer // rescale_every), and the stream by 2 every so many layers: the same function but for the
epsilons of the norms. We compute the one without.
"""

from ...models.rwkv4 import RWKV4Config
from .format import TRANSFORMERS, Format, read_by_name, write_by_name

LAST_NORM_EPS = 1e-5


def is_one(config, names):
    """Whether a config.json is of this format."""
    return config.get("model_type") == "rwkv"


def read_config(fields, weights):
    """Our config from transformers' fields."""
    eps = fields.take("layer_norm_epsilon", LAST_NORM_EPS)
    if eps != LAST_NORM_EPS:
        raise ValueError(
            f"config.json has layer_norm_epsilon = {eps!r}: transformers' last norm has "
            f"{LAST_NORM_EPS} all the same, and ours have one epsilon."
        )
    rescale_every = fields.take("rescale_every", 6, kind=int)
    if rescale_every > 0:
        fields.notes.append(
            f"left out rescale_every = {rescale_every}: it is how to run. If a model wrote these "
            "weights after running in eval mode, attention.output and feed_forward.value of layer "
            f"i are divided by 2^(i // {rescale_every}) in the file, which cannot be seen in it"
        )
    fields.drop("there is no limit", "context_length", "max_position_embeddings")
    hidden_size = fields.take("hidden_size")
    return RWKV4Config(
        vocab_size=fields.take("vocab_size"),
        hidden_size=hidden_size,
        attention_hidden_size=fields.take("attention_hidden_size", None),
        intermediate_size=fields.take("intermediate_size", None),
        num_hidden_layers=fields.take("num_hidden_layers"),
        layer_norm_eps=eps,
        tie_word_embeddings=fields.take("tie_word_embeddings", False),
        use_cache=fields.take("use_cache", True),
        pad_token_id=fields.take("pad_token_id", None),
        bos_token_id=fields.take("bos_token_id", 0),
        eos_token_id=fields.take("eos_token_id", 0),
    )


def write_config(config):
    """transformers' fields from our config, and notes."""
    if config.layer_norm_eps != LAST_NORM_EPS:
        raise ValueError(
            f"layer_norm_eps is {config.layer_norm_eps}: transformers' last norm has "
            f"{LAST_NORM_EPS} whatever its config says."
        )
    if not config.embedding_norm:
        raise ValueError("embedding_norm is false: transformers' model always has that norm.")
    if config.attention_hidden_size != config.hidden_size:
        raise ValueError(
            f"attention_hidden_size is {config.attention_hidden_size}, hidden_size "
            f"{config.hidden_size}: transformers cannot decode when they differ."
        )
    values = {
        "architectures": ["RwkvForCausalLM"],
        "model_type": "rwkv",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "attention_hidden_size": config.attention_hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "layer_norm_epsilon": config.layer_norm_eps,
        "rescale_every": 0,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_cache": config.use_cache,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
    }
    notes = [
        "rescale_every is 0, which is exact; set it to 6 if float16 overflows",
        "transformers 5.23 decodes one text rightly and several at once wrongly (it mixes the rows "
        "of a batch): generate texts one by one, or with use_cache=False",
    ]
    return values, notes


def read_weights(weights, config):
    """Pairs of our name and transformers' tensor."""
    flat = dict.fromkeys(("mix_k", "mix_v", "mix_r"), lambda x: x.flatten())
    return read_by_name(weights, config, tensor_names(config), flat)


def write_weights(weights, config):
    """Pairs of transformers' name and our tensor."""
    boxed = dict.fromkeys(("mix_k", "mix_v", "mix_r"), lambda x: x.view(1, 1, -1))
    return write_by_name(weights, config, tensor_names(config), boxed)


def tensor_names(config):
    """Our name and transformers' of each tensor."""
    yield "model.embed_tokens.weight", "rwkv.embeddings.weight"
    yield "lm_head.weight", "head.weight"
    norms = {"model.embed_norm": "rwkv.blocks.0.pre_ln", "model.norm": "rwkv.ln_out"}
    mixed = {"k": "key", "v": "value", "r": "receptance"}
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}", f"rwkv.blocks.{layer}"
        norms |= {f"{ours}.mixer_norm": f"{theirs}.ln1", f"{ours}.mlp_norm": f"{theirs}.ln2"}
        for name in ("time_decay", "time_first"):
            yield f"{ours}.mixer.{name}", f"{theirs}.attention.{name}"
        yield f"{ours}.mixer.out_proj.weight", f"{theirs}.attention.output.weight"
        for short, name in mixed.items():
            yield f"{ours}.mixer.mix_{short}", f"{theirs}.attention.time_mix_{name}"
            yield f"{ours}.mixer.{short}_proj.weight", f"{theirs}.attention.{name}.weight"
            if short != "v":
                yield f"{ours}.mlp.mix_{short}", f"{theirs}.feed_forward.time_mix_{name}"
            yield f"{ours}.mlp.{short}_proj.weight", f"{theirs}.feed_forward.{name}.weight"
    for ours, theirs in norms.items():
        for kind in ("weight", "bias"):
            yield f"{ours}.{kind}", f"{theirs}.{kind}"


FORMAT = Format(
    name="hf-rwkv",
    title="transformers' RwkvForCausalLM, RWKV-4 (RWKV/rwkv-4-*-pile); both ways",
    recognizes=is_one,
    expects="model_type 'rwkv'",
    library=TRANSFORMERS,
    read_config=read_config,
    read_weights=read_weights,
    architecture="rwkv4",
    write_config=write_config,
    write_weights=write_weights,
)
