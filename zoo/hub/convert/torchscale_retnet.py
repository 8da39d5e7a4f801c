"""torchscale's RetNet (the paper's authors), and its Hugging Face port syncdoth/RetNet.

Both have the same weights; the port puts `model.` before the names, calls the output projection
`lm_head`, and adds two options: `use_lm_decay` and `use_glu`. Trained by fairseq, names begin with
`decoder.`.
"""

from ...layers.xpos import Rotation
from ...models.retnet import RetNetConfig, log_decay
from .format import MAKE_A_TOKENIZER, Format

ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "swish": "silu"}

TRAINING = (
    "drop_path_rate",
    "checkpoint_activations",
    "fsdp",
    "ddp_rank",
    "z_loss_coeff",
)
HOW_TO_RUN = ("chunkwise_recurrent", "recurrent_chunk_size", "forward_impl", "disable_fused_ops")
# RetNetConfig has these from torchscale's other models; its RetNetDecoder never looks at them.
# encoder_normalize_before is a slip of its own: deepnorm was to turn off the decoder's.
UNUSED_THERE = (
    "encoder_normalize_before",
    "rel_pos_buckets",
    "max_rel_pos",
    "multiway",
    "max_target_positions",
    "xpos_rel_pos",
    "xpos_scale_base",
)
EXPERTS = (
    "moe_top1_expert",
    "moe_expert_count",
    "moe_gating_use_fp32",
    "moe_eval_capacity_token_fraction",
    "moe_second_expert_policy",
    "moe_normalize_gate_prob_before_dropping",
    "use_xmoe",
)


def read_config(fields, weights):
    """Our config from torchscale's fields."""
    is_port = not {"lm_head.weight", "model.embed_tokens.weight"}.isdisjoint(weights.tensors)
    fields.refuse("moe_freq", "mixtures of experts have no counterpart here")
    fields.refuse("no_output_layer", "only a language model with its output projection converts")
    fields.drop("there are no experts", *EXPERTS)
    fields.drop("it acts in training only", *TRAINING)
    fields.drop("it is how to run, not what to compute", *HOW_TO_RUN)
    fields.drop("torchscale's RetNet does not use it", *UNUSED_THERE)
    fields.drop("it is an output option", "output_retentions")

    activation = fields.take("activation_fn", "gelu")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation_fn is one of {', '.join(ACTIVATIONS)}, got {activation!r}.")
    gated_mlp = fields.take("use_glu", True)
    deepnorm = fields.take("deepnorm", False)
    # deepnorm comes first in both codes: it turns the sub-LayerNorm off, which else turns it off.
    sub_norm = fields.take("subln", True) and not deepnorm
    if not gated_mlp and not deepnorm and not sub_norm:
        raise ValueError(
            "use_glu, subln and deepnorm are all false: a plain MLP without a norm inside has no "
            "counterpart here."
        )
    if fields.take("use_ffn_rms_norm", False) and not gated_mlp and sub_norm:
        raise ValueError("use_ffn_rms_norm is set; the norm inside our MLP is a LayerNorm.")
    pre_norm = fields.take("decoder_normalize_before", True)
    if is_port and (deepnorm or sub_norm):
        # The port decides; torchscale itself, by its slip, leaves what the user said.
        pre_norm = not deepnorm
    tied = fields.take("share_decoder_input_output_embed", False)
    tied = fields.take("tie_word_embeddings", False) or tied
    hidden_size = fields.take("decoder_embed_dim")
    return RetNetConfig(
        vocab_size=fields.take("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.take("decoder_ffn_embed_dim"),
        num_hidden_layers=fields.take("decoder_layers"),
        num_attention_heads=fields.take("decoder_retention_heads"),
        key_size=hidden_size,
        value_size=fields.take("decoder_value_embed_dim"),
        rms_norm_eps=fields.take("layernorm_eps", 1e-6),
        decay_schedule="log" if fields.take("use_lm_decay", False) else "power",
        gated_mlp=gated_mlp,
        hidden_act=ACTIVATIONS[activation],
        pre_norm=pre_norm,
        deepnorm=deepnorm,
        scale_embedding=not fields.take("no_scale_embedding", True),
        embedding_norm=fields.take("layernorm_embedding", False),
        dropout=fields.take("dropout", 0.0),
        activation_dropout=fields.take("activation_dropout", 0.0),
        tie_word_embeddings=tied,
        use_cache=fields.take("use_cache", True),
        pad_token_id=fields.take("pad_token_id", None),
        bos_token_id=fields.take("bos_token_id", None),
        eos_token_id=fields.take("eos_token_id", None),
    )


def prefix_of(weights):
    """What stands before every name: fairseq puts `decoder.` there."""
    embedding = "embed_tokens.weight"
    return next((x.removesuffix(embedding) for x in weights.tensors if x.endswith(embedding)), "")


def take_prefix(weights):
    """`prefix_of`, with fairseq's version of its own format taken."""
    prefix = prefix_of(weights)
    if f"{prefix}version" in weights.tensors:
        weights.take(f"{prefix}version")
    return prefix


def read_weights(weights, config):
    """Pairs of our name and torchscale's tensor."""
    prefix = take_prefix(weights)
    # Every second angle is a repetition: one for each channel of a pair.
    angle_K = Rotation.angles(config).repeat_interleave(2)
    weights.drop_constant(f"{prefix}retnet_rel_pos.angle", angle_K)
    # log(1 - x) of a small x in float32 is off by the rounding of 1 - x.
    weights.drop_constant(f"{prefix}retnet_rel_pos.decay", log_decay(config), absolute=2e-7)

    yield "model.embed_tokens.weight", weights.take(f"{prefix}embed_tokens.weight")
    if config.embedding_norm:
        yield "model.embed_norm.weight", weights.take(f"{prefix}layernorm_embedding.weight")
    for layer in range(config.num_hidden_layers):
        for ours, theirs in layer_names(config):
            yield f"model.layers.{layer}.{ours}", weights.take(f"{prefix}layers.{layer}.{theirs}")
    if config.pre_norm:
        yield "model.norm.weight", weights.take(f"{prefix}layer_norm.weight")
    outputs = [f"{prefix}output_projection.weight", "lm_head.weight"]
    output = next((name for name in outputs if name in weights.tensors), None)
    if output or not config.tie_word_embeddings:
        yield "lm_head.weight", weights.take(output or outputs[0])


def layer_names(config):
    """Our name and torchscale's of each weight of a layer."""
    yield "mixer.gate_proj.weight", "retention.g_proj.weight"
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        yield f"mixer.{name}.weight", f"retention.{name}.weight"
    yield "mixer_norm.weight", "retention_layer_norm.weight"
    yield "mlp_norm.weight", "final_layer_norm.weight"
    if config.gated_mlp:
        # torchscale activates fc1 and multiplies by its `gate`: for us, gate is the activated one.
        yield "mlp.gate_proj.weight", "ffn.fc1.weight"
        yield "mlp.up_proj.weight", "ffn.gate.weight"
        yield "mlp.down_proj.weight", "ffn.fc2.weight"
        return
    for kind in ("weight", "bias"):
        yield f"mlp.up_proj.{kind}", f"ffn.fc1.{kind}"
        yield f"mlp.down_proj.{kind}", f"ffn.fc2.{kind}"
        if not config.deepnorm:
            yield f"mlp.inner_norm.{kind}", f"ffn.ffn_layernorm.{kind}"


FORMAT = Format(
    name="torchscale-retnet",
    title="microsoft/torchscale's RetNetDecoder; its Hugging Face port syncdoth/RetNet",
    recognizes=lambda config, names: "decoder_retention_heads" in config,
    expects="torchscale's fields (decoder_embed_dim, decoder_retention_heads, ...)",
    read_config=read_config,
    read_weights=read_weights,
    tokenizer=MAKE_A_TOKENIZER,
)
