"""LongLLaMA (syzymon/long_llama_3b, _3b_v1_1, _code_7b and their instruct models), both ways.

Llama's names, and in config.json which layers have a memory. What their code computes depends on
where it cuts a prompt, which last_context_length says; ours cuts windows from a text's start, and
equals it where that is the same. Memories are rounded to bfloat16 there (mem_dtype), here not.
"""

from ...layers.positions import num_rotated_channels
from ...models.long_llama import LongLlamaConfig
from .format import (
    Format,
    check_transformers_activation,
    read_llama,
    refuse_beyond,
    refuse_other,
    write_llama,
)

MODEL_TYPE = "longllama"
HOW_TO_RUN = (
    "last_context_length",
    "mem_attention_grouping",
    "torch_attention",
    "gradient_checkpoint_every_ith",
    "pretraining_tp",
)


def is_one(config, names):
    """Whether a config.json is of this format."""
    return config.get("model_type") == MODEL_TYPE


def read_config(fields, weights):
    """Our config from LongLLaMA's fields."""
    fields.drop("it is how to run, not what to compute", *HOW_TO_RUN)
    fields.drop("memories are in the dtype of the model here", "mem_dtype")
    fields.drop("dropout in training alone", "attention_dropout")
    fields.refuse("attention_bias", "its attention has no biases")
    fields.refuse("mlp_bias", "its MLP has no biases")
    fields.refuse("rope_scaling", "its positions restart in every window and are not scaled")
    if not fields.take("mem_positionals", True):
        raise ValueError(
            "config.json has mem_positionals = False: layers with a memory turn queries and keys "
            "here, as in all published models."
        )
    width, heads = fields.take("hidden_size", 4096), fields.take("num_attention_heads", 32)
    groups = fields.take("num_key_value_heads", None)
    if groups not in (None, heads):
        raise ValueError(
            f"config.json has num_key_value_heads = {groups}, which LongLLaMA's code does not "
            f"obey: it has keys for each of {heads} heads."
        )
    rope = dict(fields.take("rope_parameters", None) or {})
    rope_type = rope.get("rope_type", "default")
    if rope_type != "default":
        raise ValueError(
            f"config.json has rope_type {rope_type!r}: LongLLaMA's rotation is not scaled."
        )
    theta = fields.take("rope_theta", None) or rope.get("rope_theta", 10000.0)
    return LongLlamaConfig(
        vocab_size=fields.take("vocab_size", 32000),
        hidden_size=width,
        intermediate_size=fields.take("intermediate_size", 11008),
        num_hidden_layers=fields.take("num_hidden_layers", 32),
        num_attention_heads=heads,
        segment_length=fields.take("max_position_embeddings", 2048),
        memory_layers=fields.take("mem_layers", []),
        hidden_act=fields.take("hidden_act", "silu"),
        rms_norm_eps=fields.take("rms_norm_eps", 1e-6),
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        initializer_range=fields.take("initializer_range", 0.02),
        tie_word_embeddings=fields.take("tie_word_embeddings", False),
        use_cache=fields.take("use_cache", True),
        pad_token_id=fields.take("pad_token_id", 0),
        bos_token_id=fields.take("bos_token_id", 1),
        eos_token_id=fields.take("eos_token_id", 2),
    )


# Our fields that are theirs by another name, or of no effect.
OTHERWISE = ("num_key_value_heads", "head_dim", "segment_length", "memory_layers")
OTHERWISE += ("rope_parameters", "max_position_embeddings")
WRITTEN = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "rms_norm_eps",
    "initializer_range",
    "tie_word_embeddings",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


def write_config(config):
    """LongLLaMA's fields from our config, and notes."""
    refuse_beyond(config, WRITTEN + OTHERWISE, "LongLLaMA's")
    check_transformers_activation(config)
    width, heads = config.hidden_size, config.num_attention_heads
    refuse_other(config, {"num_key_value_heads": heads, "head_dim": width // heads}, "LongLLaMA's")
    rope = config.rope_parameters
    if rope["rope_type"] != "default" or num_rotated_channels(config) != config.head_dim:
        raise ValueError(
            f"rope_parameters are {rope}: LongLLaMA's model turns whole heads, by rope_theta alone."
        )
    values = {"architectures": ["LongLlamaForCausalLM"], "model_type": MODEL_TYPE}
    values |= {name: getattr(config, name) for name in WRITTEN}
    values |= {
        "max_position_embeddings": config.segment_length,
        "mem_layers": config.memory_layers,
        "mem_positionals": True,
        "mem_dtype": "float32",
        "rope_theta": rope["rope_theta"],
    }
    notes = [
        "their code cuts a prompt into windows by last_context_length: it computes what ours does "
        f"for a prompt of a multiple of {config.segment_length} tokens and that many more"
    ]
    return values, notes


FORMAT = Format(
    name="longllama",
    title="LongLLaMA (syzymon/long_llama_3b, long_llama_code_7b and others); both ways",
    recognizes=is_one,
    expects="model_type 'longllama'",
    read_config=read_config,
    read_weights=read_llama,
    architecture="long_llama",
    write_config=write_config,
    write_weights=write_llama,
)
