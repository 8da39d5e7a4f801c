"""transformers' MiniMax (`MiniMaxForCausalLM`), where it is dense and all its layers are lightning.

MiniMax-Text-01 itself has 32 experts and softmax layers and does not convert. A single expert is
an MLP: its router's weight is a softmax over one number.
"""

from ...lightning import LightningConfig, log_decay
from .format import Format

NO_EFFECT_ALONE = ("num_experts_per_tok", "router_aux_loss_coef", "router_jitter_noise")
OF_SOFTMAX_LAYERS = (
    "num_key_value_heads",
    "full_attn_alpha_factor",
    "full_attn_beta_factor",
    "rope_parameters",
    "rope_theta",
    "attention_dropout",
    "sliding_window",
)
# The norm of the attention's output has its class's default, whatever rms_norm_eps says.
OUT_NORM_EPS = 1e-6


def is_one(config, names):
    """Whether a config.json is of this format."""
    return config.get("model_type") in ("minimax", "minimax_m1", "MiniMaxText01")


def read_config(fields, weights):
    """Our config from transformers' fields."""
    experts = fields.take("num_local_experts", 8)
    if experts != 1:
        raise ValueError(
            f"config.json has num_local_experts = {experts}: mixtures of experts have no "
            "counterpart here, a single expert has."
        )
    layers = fields.take("num_hidden_layers", 32, kind=int)
    # transformers' default: every second layer, beginning with softmax.
    kinds = fields.take("layer_types", None) or ["full_attention", "linear_attention"] * layers
    softmax = [index for index, kind in enumerate(kinds[:layers]) if kind != "linear_attention"]
    if softmax:
        raise ValueError(
            f"config.json has softmax attention in layers {softmax}, which have no counterpart "
            "here; all layer_types are to be linear_attention."
        )
    fields.drop("there is a single expert", *NO_EFFECT_ALONE)
    fields.drop("there are no softmax layers", *OF_SOFTMAX_LAYERS)
    fields.drop("it is how to run, not what to compute", "block_size")
    fields.drop("there is no limit", "max_position_embeddings")
    fields.drop("it is an output option", "output_router_logits")
    activation = fields.take("hidden_act", "silu")
    return LightningConfig(
        vocab_size=fields.take("vocab_size", 32000),
        hidden_size=fields.take("hidden_size", 4096),
        head_dim=fields.take("head_dim", None),
        intermediate_size=fields.take("intermediate_size", 14336),
        num_hidden_layers=layers,
        num_attention_heads=fields.take("num_attention_heads", 32),
        rms_norm_eps=fields.take("rms_norm_eps", 1e-5),
        out_norm_eps=OUT_NORM_EPS,
        norm_weight=True,
        decay_schedule="minimax",
        feature_act=activation,
        activate_values=True,
        gate="sigmoid",
        lrpe_layers=[],
        hidden_act=activation,
        scale_embedding=False,
        residual_of_norm=True,
        attention_alpha=float(fields.take("linear_attn_alpha_factor", 1)),
        attention_beta=float(fields.take("linear_attn_beta_factor", 1)),
        mlp_alpha=float(fields.take("mlp_alpha_factor", 1)),
        mlp_beta=float(fields.take("mlp_beta_factor", 1)),
        initializer_range=fields.take("initializer_range", 0.02),
        tie_word_embeddings=fields.take("tie_word_embeddings", False),
        use_cache=fields.take("use_cache", True),
        pad_token_id=fields.take("pad_token_id", None),
        bos_token_id=fields.take("bos_token_id", None),
        eos_token_id=fields.take("eos_token_id", None),
    )


def read_weights(weights, config):
    """Pairs of our name and transformers' tensor, or part of it."""
    heads, head_dim = config.num_attention_heads, config.head_dim
    yield "model.embed_tokens.weight", weights.take("model.embed_tokens.weight")
    for layer in range(config.num_hidden_layers):
        here = f"model.layers.{layer}"
        mixer, expert = f"{here}.self_attn", f"{here}.block_sparse_moe.experts.0"
        slopes = -log_decay(config, layer)
        weights.drop_constant(f"{mixer}.slope_rate", slopes.view(heads, 1, 1))
        for name in ("query_decay", "key_decay", "diagonal_decay"):
            # Powers of the slopes over a block, whose length is how to run.
            if f"{mixer}.{name}" in weights.tensors:
                weights.take(f"{mixer}.{name}")
        # q, k and v lie one after the other in every head.
        joined = weights.take(f"{mixer}.qkv_proj.weight")
        parts = [None] * 3
        if joined is not None:
            parts = joined.unflatten(0, (heads, 3, head_dim)).unbind(1)
        for name, part in zip("qkv", parts, strict=True):
            yield f"{here}.mixer.{name}_proj.weight", None if part is None else part.flatten(0, 1)
        names = {
            "mixer.gate_proj": f"{mixer}.output_gate",
            "mixer.out_proj": f"{mixer}.out_proj",
            "mixer.out_norm": f"{mixer}.norm",
            "mixer_norm": f"{here}.input_layernorm",
            "mlp_norm": f"{here}.post_attention_layernorm",
            "mlp.gate_proj": f"{expert}.w1",
            "mlp.down_proj": f"{expert}.w2",
            "mlp.up_proj": f"{expert}.w3",
        }
        for ours, theirs in names.items():
            yield f"{here}.{ours}.weight", weights.take(f"{theirs}.weight")
        # The softmax over a single expert is 1.
        weights.take(f"{here}.block_sparse_moe.gate.weight")
    yield "model.norm.weight", weights.take("model.norm.weight")
    if "lm_head.weight" in weights.tensors or not config.tie_word_embeddings:
        yield "lm_head.weight", weights.take("lm_head.weight")


FORMAT = Format(
    name="hf-minimax",
    title="transformers' MiniMaxForCausalLM with one expert, all of its layers lightning",
    recognizes=is_one,
    expects="model_type 'minimax'",
    is_native=True,
    read_config=read_config,
    read_weights=read_weights,
)
