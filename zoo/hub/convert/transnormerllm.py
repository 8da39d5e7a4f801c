"""OpenNLPLab's TransNormerLLM (OpenNLPLab/TransNormerLLM-385M, -1B, -7B)."""

from ...models.lightning import LightningConfig
from .format import Format

# Theirs, by ours. They have others, of which no published model makes use.
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu"}


def is_one(config, names):
    """Whether a config.json is of this format."""
    return "decoder_embed_dim" in config and "glu_dim" in config


def read_config(fields, weights):
    """Our config from theirs."""
    norm = fields.take("norm_type", "simplermsnorm")
    if norm != "simplermsnorm":
        raise ValueError(f"norm_type is simplermsnorm in every published model, got {norm!r}.")
    activation = fields.take("linear_act_fun", "silu")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"linear_act_fun is one of {', '.join(ACTIVATIONS)}, got {activation!r}: it has no "
            "counterpart here."
        )
    fields.drop("it is the tokenizer's", "add_bos_token")
    width = fields.take("decoder_embed_dim", 1024, kind=int)
    size = fields.take("hidden_dim", 1024, kind=int)
    layers = fields.take("decoder_layers", 24, kind=int)
    heads = fields.take("decoder_attention_heads", 8, kind=int)
    with_lrpe = fields.take("linear_use_lrpe_list", [], kind=list)
    single = fields.take("linear_use_lrpe", None)
    if not with_lrpe:
        with_lrpe = [single] * layers
    if len(with_lrpe) != layers:
        raise ValueError(
            f"linear_use_lrpe_list has one entry for each of {layers} layers, got {with_lrpe}."
        )
    glu_dim = fields.take("glu_dim", 2816, kind=int)
    return LightningConfig(
        vocab_size=fields.take("vocab_size", 64000),
        hidden_size=width,
        head_dim=size // heads,
        intermediate_size=width if glu_dim == -1 else glu_dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        feature_act=ACTIVATIONS[activation],
        lrpe_layers=[layer for layer, has in enumerate(with_lrpe) if has],
        bias=fields.take("bias", False),
        scale_embedding=not fields.take("no_scale_embedding", False),
        initializer_range=fields.take("init_std", 0.02),
        tie_word_embeddings=fields.take("tie_word_embeddings", False),
        use_cache=fields.take("use_cache", True),
        pad_token_id=fields.take("pad_token_id", 0),
        bos_token_id=fields.take("bos_token_id", 1),
        eos_token_id=fields.take("eos_token_id", 2),
    )


def read_weights(weights, config):
    """Pairs of our name and their tensor, or part of it."""
    kinds = ("weight", "bias") if config.bias else ("weight",)
    yield "model.embed_tokens.weight", weights.take("model.embed_tokens.weight")
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}", f"model.layers.{layer}"
        for kind in kinds:
            # q, k, v and the gate u lie one after the other.
            joined = weights.take(f"{theirs}.token_mixer.qkvu_proj.{kind}")
            parts = [None] * 4 if joined is None else joined.chunk(4)
            for name, part in zip(("q", "k", "v", "gate"), parts, strict=True):
                yield f"{ours}.mixer.{name}_proj.{kind}", part
            out = weights.take(f"{theirs}.token_mixer.out_proj.{kind}")
            yield f"{ours}.mixer.out_proj.{kind}", out
            for name, linear in {"gate": "l1", "up": "l2", "down": "l3"}.items():
                tensor = weights.take(f"{theirs}.channel_mixer.{linear}.{kind}")
                yield f"{ours}.mlp.{name}_proj.{kind}", tensor
        if layer in config.lrpe_layers:
            theta = weights.take(f"{theirs}.token_mixer.lrpe.theta")
            yield f"{ours}.mixer.lrpe_theta", None if theta is None else theta[:, 0]
    if "lm_head.weight" in weights.tensors or not config.tie_word_embeddings:
        yield "lm_head.weight", weights.take("lm_head.weight")


FORMAT = Format(
    name="transnormerllm",
    title="OpenNLPLab's TransNormerLLM (OpenNLPLab/TransNormerLLM-385M, -1B, -7B)",
    recognizes=is_one,
    expects="TransNormerLLM's fields (decoder_embed_dim, glu_dim, ...)",
    read_config=read_config,
    read_weights=read_weights,
)
