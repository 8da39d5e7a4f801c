"""transformers' MiniMax (`MiniMaxForCausalLM`), where it is dense, both ways.

MiniMax-Text-01 itself has 32 experts and does not convert. A single expert is an MLP: its router's
weight is a softmax over one number. Layers with softmax attention may stand between the lightning
ones. In those transformers turns whole heads, where MiniMax's own code turns the first `rotary_dim`
channels.
"""

import torch

from ...layers.decay_slopes import log_decay
from ...layers.position_fields import position_type_of
from ...layers.positions import num_rotated_channels
from ...models.lightning import LightningConfig
from .format import TRANSFORMERS, Format, refuse_beyond

NO_EFFECT_ALONE = ("num_experts_per_tok", "router_aux_loss_coef", "router_jitter_noise")
OF_SOFTMAX_LAYERS = (
    "num_key_value_heads",
    "full_attn_alpha_factor",
    "full_attn_beta_factor",
    "rope_parameters",
    "rope_theta",
    "rotary_dim",
    "attention_dropout",
    "sliding_window",
    "max_position_embeddings",
)
KINDS = {True: "full_attention", False: "linear_attention"}
BLOCK_SIZE = 256  # transformers' default: how to run, but the sizes of stored constants follow it
# What makes a LightningConfig MiniMax's.
FIXED = {
    # The norm of the attention's output has its class's default, whatever rms_norm_eps says.
    "out_norm_eps": 1e-6,
    "norm_weight": True,
    "decay_schedule": "minimax",
    "slopes": None,
    "activate_values": True,
    "gate": "sigmoid",
    "lrpe_layers": [],
    "bias": False,
    "scale_embedding": False,
    "residual_of_norm": True,
}


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
    if not set(kinds) <= set(KINDS.values()):
        raise ValueError(
            f"layer_types are {' and '.join(KINDS.values())}, got {sorted(set(kinds))}."
        )
    softmax = [index for index, kind in enumerate(kinds[:layers]) if kind == KINDS[True]]
    settings = {}
    if softmax:
        settings = read_softmax_config(fields)
    else:
        fields.drop("there are no softmax layers", *OF_SOFTMAX_LAYERS)
    fields.drop("there is a single expert", *NO_EFFECT_ALONE)
    fields.drop("it is how to run, not what to compute", "block_size")
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
        feature_act=activation,
        hidden_act=activation,
        attention_alpha=float(fields.take("linear_attn_alpha_factor", 1)),
        attention_beta=float(fields.take("linear_attn_beta_factor", 1)),
        mlp_alpha=float(fields.take("mlp_alpha_factor", 1)),
        mlp_beta=float(fields.take("mlp_beta_factor", 1)),
        initializer_range=fields.take("initializer_range", 0.02),
        softmax_layers=softmax,
        tie_word_embeddings=fields.take("tie_word_embeddings", False),
        use_cache=fields.take("use_cache", True),
        pad_token_id=fields.take("pad_token_id", None),
        bos_token_id=fields.take("bos_token_id", 1),
        eos_token_id=fields.take("eos_token_id", 2),
        **settings,
        **FIXED,
    )


def read_softmax_config(fields):
    """Our fields of layers with softmax attention."""
    fields.drop("dropout in training alone", "attention_dropout")
    rope = dict(fields.take("rope_parameters", None) or {})
    rope.setdefault("rope_type", "default")
    rope.setdefault("rope_theta", fields.take("rope_theta", 1e6))
    fields.take("rope_theta", None)
    whole = fields.values.get("head_dim")
    if whole is None:
        whole = fields.values.get("hidden_size", 4096) // fields.values.get(
            "num_attention_heads", 32
        )
    turned = {
        "rotary_dim": fields.take("rotary_dim", None) or whole,
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0) * whole,
    }
    for name, size in turned.items():
        if size != whole:
            raise ValueError(
                f"config.json has {name} that turns {size:g} channels of {whole}, which "
                "transformers does not obey: it turns whole heads. If that is what the weights "
                "were trained with, remove the field."
            )
    return {
        "num_key_value_heads": fields.take("num_key_value_heads", 8),
        "softmax_alpha": float(fields.take("full_attn_alpha_factor", 1)),
        "softmax_beta": float(fields.take("full_attn_beta_factor", 1)),
        "rope_parameters": rope,
        "max_position_embeddings": fields.take("max_position_embeddings", None),
        "sliding_window": fields.take("sliding_window", None),
    }


def write_config(config):
    """transformers' fields from our config, and notes."""
    for name, value in FIXED.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{name} is {getattr(config, name)!r}: transformers' model has {value!r}."
            )
    for layer in config.softmax_layers:
        if position_type_of(config, layer) != "rope":
            raise ValueError(
                f"position_embedding_type of layer {layer} is "
                f"{position_type_of(config, layer)!r}: transformers' model has 'rope'."
            )
    refuse_beyond(config, (*WRITTEN, *FIXED, *WRITTEN_AS_OTHERS), "transformers'")
    values = {"architectures": ["MiniMaxForCausalLM"], "model_type": "minimax"}
    values |= {name: getattr(config, name) for name in WRITTEN}
    values |= {
        "num_local_experts": 1,
        "num_experts_per_tok": 1,
        "block_size": BLOCK_SIZE,
        "hidden_act": config.hidden_act,
        "layer_types": [
            KINDS[layer in config.softmax_layers] for layer in range(config.num_hidden_layers)
        ],
        "linear_attn_alpha_factor": config.attention_alpha,
        "linear_attn_beta_factor": config.attention_beta,
        "mlp_alpha_factor": config.mlp_alpha,
        "mlp_beta_factor": config.mlp_beta,
    }
    notes = ["its router, over a single expert, is of no effect, and zero"]
    if config.softmax_layers:
        if num_rotated_channels(config) != config.head_dim:
            raise ValueError("partial_rotary_factor is not 1: transformers turns whole heads.")
        values |= {name: getattr(config, name) for name in ("rope_parameters", "sliding_window")}
        values |= {
            "num_key_value_heads": config.num_key_value_heads,
            "full_attn_alpha_factor": config.softmax_alpha,
            "full_attn_beta_factor": config.softmax_beta,
        }
        if hasattr(config, "max_position_embeddings"):
            values["max_position_embeddings"] = config.max_position_embeddings
        notes.append(
            "without position_ids transformers miscounts positions after a first lightning layer "
            "when it decodes from a cache; its generate() passes them and is right"
        )
    return values, notes


WRITTEN = (
    "vocab_size",
    "hidden_size",
    "head_dim",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rms_norm_eps",
    "initializer_range",
    "tie_word_embeddings",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
WRITTEN_AS_OTHERS = (
    "attention_alpha",
    "attention_beta",
    "mlp_alpha",
    "mlp_beta",
    "feature_act",
    "hidden_act",
    "softmax_layers",
    "softmax_alpha",
    "softmax_beta",
    "num_key_value_heads",
    "rope_parameters",
    "max_position_embeddings",
    "sliding_window",
    "position_embedding_type",
)


def read_weights(weights, config):
    """Pairs of our name and transformers' tensor, or part of it."""
    yield "model.embed_tokens.weight", weights.take("model.embed_tokens.weight")
    for layer in range(config.num_hidden_layers):
        here = f"model.layers.{layer}"
        if layer not in config.softmax_layers:
            yield from read_lightning(weights, config, layer)
        for ours, theirs in tensor_names(config, layer).items():
            yield f"{here}.{ours}.weight", weights.take(f"{here}.{theirs}.weight")
        # The softmax over a single expert is 1.
        weights.take(f"{here}.block_sparse_moe.gate.weight")
    yield "model.norm.weight", weights.take("model.norm.weight")
    if "lm_head.weight" in weights.tensors or not config.tie_word_embeddings:
        yield "lm_head.weight", weights.take("lm_head.weight")


def read_lightning(weights, config, layer):
    """q, k and v of a lightning layer; leaves out its constants."""
    heads, head_dim = config.num_attention_heads, config.head_dim
    mixer = f"model.layers.{layer}.self_attn"
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
        ours = f"model.layers.{layer}.mixer.{name}_proj.weight"
        yield ours, None if part is None else part.flatten(0, 1)


def write_weights(weights, config):
    """Pairs of transformers' name and our tensor."""
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        yield name, weights.take(name)
    for layer in range(config.num_hidden_layers):
        here = f"model.layers.{layer}"
        if layer not in config.softmax_layers:
            yield from write_lightning(weights, config, layer)
        for ours, theirs in tensor_names(config, layer).items():
            yield f"{here}.{theirs}.weight", weights.take(f"{here}.{ours}.weight")
        dtype = weights.tensors["model.embed_tokens.weight"].dtype
        router = f"{here}.block_sparse_moe.gate.weight"
        yield router, torch.zeros(1, config.hidden_size, dtype=dtype)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", weights.take("lm_head.weight")


def write_lightning(weights, config, layer):
    """The joined projection of a lightning layer, and the constants transformers stores."""
    ours, theirs = f"model.layers.{layer}.mixer", f"model.layers.{layer}.self_attn"
    names = [f"{ours}.{name}_proj.weight" for name in "qkv"]
    shape = config.num_attention_heads, config.head_dim

    def joined(*parts):
        return torch.stack([x.unflatten(0, shape) for x in parts], dim=1).flatten(0, 2)

    projection = weights.take(*names, change=joined)
    yield f"{theirs}.qkv_proj.weight", projection
    slope = -log_decay(config, layer).view(-1, 1, 1)
    n = torch.arange(1, BLOCK_SIZE + 1, dtype=torch.float64)[:, None]
    constants = {
        "slope_rate": slope,
        "query_decay": (-slope * n).exp(),
        "key_decay": (-slope * (BLOCK_SIZE - n)).exp(),
        "diagonal_decay": (-slope * (n - n.mT).clamp(min=0)).exp().tril()[None],
    }
    for name, value in constants.items():
        yield f"{theirs}.{name}", value.to(projection.dtype)


def tensor_names(config, layer):
    """Our module and transformers', within a layer, where one is the other."""
    mixer, expert = "self_attn", "block_sparse_moe.experts.0"
    if layer in config.softmax_layers:
        names = {f"mixer.{name}_proj": f"{mixer}.{name}_proj" for name in "qkv"}
        names["mixer.out_proj"] = f"{mixer}.o_proj"
    else:
        names = {
            "mixer.gate_proj": f"{mixer}.output_gate",
            "mixer.out_proj": f"{mixer}.out_proj",
            "mixer.out_norm": f"{mixer}.norm",
        }
    return names | {
        "mixer_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "mlp.gate_proj": f"{expert}.w1",
        "mlp.down_proj": f"{expert}.w2",
        "mlp.up_proj": f"{expert}.w3",
    }


FORMAT = Format(
    name="hf-minimax",
    title="transformers' MiniMaxForCausalLM with one expert, hybrids too; both ways",
    recognizes=is_one,
    expects="model_type 'minimax'",
    library=TRANSFORMERS,
    read_config=read_config,
    read_weights=read_weights,
    architecture="lightning",
    write_config=write_config,
    write_weights=write_weights,
)
