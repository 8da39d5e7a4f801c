"""torchscale's LongNetDecoder (the paper's authors), with learned positions, with xPos, or both.

Trained by fairseq, names begin with `decoder.`. Learned positions are fairseq's: token n has row
n + 2 of the table.
"""

import ast

from ...layers.xpos import xpos_zeta
from ...models.longnet import LongNetConfig
from .format import MAKE_A_TOKENIZER, Format
from .torchscale_retnet import ACTIVATIONS, EXPERTS, TRAINING, prefix_of, take_prefix

HOW_TO_RUN = ("flash_attention", "seq_parallel")
# LongNetDecoder has these from torchscale's other models, and never looks at them; the first is a
# slip of its own: deepnorm was to turn off the decoder's.
UNUSED_THERE = (
    "encoder_normalize_before",
    "max_target_positions",
    "multiway",
    "bert_init",
)
# Rows of fairseq's tables of positions before that of the first token.
ROWS_BEFORE = 2


def numbers(fields, name):
    """A list of numbers, which torchscale takes as a Python expression too."""
    value = fields.take(name)
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            raise ValueError(f"{name} is a list of numbers, got {value!r}.") from None
    return list(value)


def read_config(fields, weights):
    """Our config from torchscale's fields."""
    fields.refuse("moe_freq", "mixtures of experts have no counterpart here")
    fields.refuse("no_output_layer", "only a language model with its output projection converts")
    buckets, distance = (fields.take(name, 0) for name in ("rel_pos_buckets", "max_rel_pos"))
    if buckets and distance:
        raise ValueError(
            f"config.json has rel_pos_buckets = {buckets} and max_rel_pos = {distance}: dilated "
            "attention takes no relative bias, in torchscale neither."
        )
    fields.drop("there are no experts", *EXPERTS)
    dropouts = "dropout", "attention_dropout", "activation_dropout"
    fields.drop("it acts in training only", *TRAINING, *dropouts)
    fields.drop("it is how to run, not what to compute", *HOW_TO_RUN)
    fields.drop("torchscale's LongNetDecoder does not use it", *UNUSED_THERE)

    activation = fields.take("activation_fn", "gelu")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation_fn is one of {', '.join(ACTIVATIONS)}, got {activation!r}.")
    # deepnorm comes first there: it turns the sub-LayerNorm off, which else turns it off.
    deepnorm = fields.take("deepnorm", False)
    xpos = fields.take("xpos_rel_pos", False)
    scale_base = fields.take("xpos_scale_base", 512)
    positions = f"{prefix_of(weights)}embed_positions.weight"
    length = None
    if positions in weights.tensors:
        length = weights.shape(positions, 2)[0] - ROWS_BEFORE
    return LongNetConfig(
        vocab_size=fields.take("vocab_size"),
        hidden_size=fields.take("decoder_embed_dim"),
        intermediate_size=fields.take("decoder_ffn_embed_dim"),
        num_hidden_layers=fields.take("decoder_layers"),
        num_attention_heads=fields.take("decoder_attention_heads"),
        segment_lengths=numbers(fields, "segment_length"),
        dilation_rates=numbers(fields, "dilated_ratio"),
        xpos=xpos,
        xpos_scale_base=scale_base,
        max_position_embeddings=length,
        hidden_act=ACTIVATIONS[activation],
        layer_norm_eps=fields.take("layernorm_eps", 1e-5),
        sub_norm=fields.take("subln", True) and not deepnorm,
        pre_norm=fields.take("decoder_normalize_before", True),
        deepnorm=deepnorm,
        scale_embedding=not fields.take("no_scale_embedding", True),
        embedding_norm=fields.take("layernorm_embedding", False),
        tie_word_embeddings=fields.take("share_decoder_input_output_embed", False),
    )


def read_weights(weights, config):
    """Pairs of our name and torchscale's tensor."""
    prefix = take_prefix(weights)
    yield "model.embed_tokens.weight", weights.take(f"{prefix}embed_tokens.weight")
    if hasattr(config, "max_position_embeddings"):
        table = weights.take(
            f"{prefix}embed_positions.weight", change=lambda rows: rows[ROWS_BEFORE:]
        )
        yield "model.embed_positions.weight", table
    kinds = ("weight", "bias")
    if config.embedding_norm:
        for kind in kinds:
            name = f"{prefix}layernorm_embedding.{kind}"
            yield f"model.embed_norm.{kind}", weights.take(name)
    for layer in range(config.num_hidden_layers):
        theirs = f"{prefix}layers.{layer}"
        if config.xpos:
            weights.drop_constant(f"{theirs}.self_attn.xpos.scale", xpos_zeta(config))
        for ours, name in layer_names(config):
            for kind in kinds:
                yield f"model.layers.{layer}.{ours}.{kind}", weights.take(f"{theirs}.{name}.{kind}")
    if config.pre_norm:
        for kind in kinds:
            yield f"model.norm.{kind}", weights.take(f"{prefix}layer_norm.{kind}")
    output = f"{prefix}output_projection.weight"
    if output in weights.tensors or not config.tie_word_embeddings:
        yield "lm_head.weight", weights.take(output)


def layer_names(config):
    """Our name and torchscale's of each module of a layer with a weight and a bias."""
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        yield f"mixer.{name}", f"self_attn.{name}"
    yield "mixer_norm", "self_attn_layer_norm"
    yield "mlp_norm", "final_layer_norm"
    yield "mlp.up_proj", "ffn.fc1"
    yield "mlp.down_proj", "ffn.fc2"
    if config.sub_norm:
        yield "mixer.inner_norm", "self_attn.inner_attn_ln"
        yield "mlp.inner_norm", "ffn.ffn_layernorm"


FORMAT = Format(
    name="torchscale-longnet",
    title="microsoft/torchscale's LongNetDecoder",
    recognizes=lambda config, names: "dilated_ratio" in config and "decoder_layers" in config,
    expects="torchscale's fields (decoder_embed_dim, dilated_ratio, ...)",
    read_config=read_config,
    read_weights=read_weights,
    tokenizer=MAKE_A_TOKENIZER,
)
