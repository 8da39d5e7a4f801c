"""Landmark attention on LLaMA, as its authors' code for transformers 4.30 writes it, both ways.

LLaMA's names. What is published (epfml/landmark-attention-llama7b-wdiff) is a difference to
LLaMA's own weights, which is refused here: the sum is what their weight_diff.py makes of it.

Which blocks are read is no field there but an argument of a call (cache_top_k): a model comes with
all of them, as it was trained, and `from_pretrained(DST, retrieved_blocks=4)` reads four. Their
code retrieves as ours does where calls end at block borders; two blocks in one call see one another
there without having been chosen. include_landmark_in_loss says what a model was trained to predict
the token after a block from, and that is what their generation takes: its landmark, or without it
the block's last token.
"""

from ...layers.positions import num_rotated_channels
from ...models.landmark import LandmarkConfig
from ..lazy import value_of
from .format import (
    Format,
    check_transformers_activation,
    read_llama,
    refuse_beyond,
    refuse_other,
    write_llama,
)

THETA = 10000.0  # whatever its config says
# A final norm multiplies by about 1; its difference between two models is about 0.
LEAST_NORM = 0.1
# What makes a LandmarkConfig LLaMA's.
FIXED = {
    "gated_mlp": True,
    "mlp_bias": False,
    "attention_bias": False,
    "norm_type": "rms",
    "norm_bias": False,
}
# Their field -> ours, and its default there.
NAMES = {
    "vocab_size": ("vocab_size", 32000),
    "hidden_size": ("hidden_size", 4096),
    "intermediate_size": ("intermediate_size", 11008),
    "num_hidden_layers": ("num_hidden_layers", 32),
    "num_attention_heads": ("num_attention_heads", 32),
    "hidden_act": ("hidden_act", "silu"),
    "rms_norm_eps": ("rms_norm_eps", 1e-6),
    "initializer_range": ("initializer_range", 0.02),
    "max_position_embeddings": ("max_position_embeddings", 2048),
    "tie_word_embeddings": ("tie_word_embeddings", False),
    "use_cache": ("use_cache", True),
    "mem_freq": ("block_length", 50),
    "mem_id": ("landmark_token_id", 32001),
    "include_landmark_in_loss": ("landmark_predicts_next", True),
    "pad_token_id": ("pad_token_id", None),
    "bos_token_id": ("bos_token_id", None),
    "eos_token_id": ("eos_token_id", None),
}


def is_one(config, names):
    """Whether a config.json is of this format."""
    return config.get("model_type") == "llama_with_landmark" or (
        "mem_freq" in config and "mem_id" in config and "num_hidden_layers" in config
    )


def find_weights(src):
    """The checkpoint, unless it is a difference to another.

    Raises:
        ValueError: it is one: the authors' script leaves a checksum beside it.
    """
    folder = src if src.is_dir() else src.parent
    if (folder / "checksum_psum.txt").is_file():
        raise ValueError(_difference(f"{folder} has a checksum_psum.txt"))
    return src


def _difference(sign):
    return (
        f"{sign}, as a difference to LLaMA's weights has; add LLaMA's own with the authors' "
        "weight_diff.py (recover --path_raw ... --path_diff ... --path_tuned ...) and convert that."
    )


def read_config(fields, weights):
    """Our config from theirs."""
    fields.drop("dropout in training alone", "attention_dropout")
    fields.drop("it is how to run, not what to compute", "pretraining_tp", "train_context_length")
    fields.refuse("rope_scaling", "the authors' code has no scaled positions")
    for name in ("attention_bias", "mlp_bias"):
        fields.refuse(name, "the authors' LLaMA has no biases")
    values = {ours: fields.take(name, default) for name, (ours, default) in NAMES.items()}
    heads = values["num_attention_heads"]
    if fields.take("num_key_value_heads", None) not in (None, heads):
        raise ValueError(
            f"config.json has num_key_value_heads = {fields.values['num_key_value_heads']}, and "
            f"{heads} heads: the authors' LLaMA shares none."
        )
    if fields.take("rope_theta", THETA) != THETA:
        raise ValueError(
            f"config.json has rope_theta = {fields.values['rope_theta']}, which the authors' code "
            f"does not obey: its positions turn by {THETA}."
        )
    norm = weights.tensors.get("model.norm.weight")
    if norm is not None and value_of(norm).abs().max() < LEAST_NORM:
        raise ValueError(_difference("model.norm.weight is near 0"))
    return LandmarkConfig(
        **values,
        **FIXED,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
    )


def write_config(config):
    """Their fields from our config, and notes."""
    ours = [name for name, _ in NAMES.values()]
    known = (*ours, *FIXED, *FORMAT.left_out, "num_key_value_heads", "head_dim", "rope_parameters")
    refuse_beyond(config, known, "the authors'")
    shared = {
        "num_key_value_heads": config.num_attention_heads,
        "head_dim": config.hidden_size // config.num_attention_heads,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
    }
    if num_rotated_channels(config) != config.head_dim:
        raise ValueError("partial_rotary_factor is not 1: the authors' code turns whole heads.")
    refuse_other(config, FIXED | shared, "the authors'")
    check_transformers_activation(config)
    values = {"architectures": ["LlamaForCausalLM"], "model_type": "llama_with_landmark"}
    for name, (own, _) in NAMES.items():
        if getattr(config, own, None) is not None:
            values[name] = getattr(config, own)
    notes = []
    if config.retrieved_blocks is not None:
        notes.append(
            f"retrieved_blocks = {config.retrieved_blocks} is no field there: pass cache_top_k = "
            f"{config.retrieved_blocks} when you call it"
        )
    return values, notes


FORMAT = Format(
    name="landmark-llama",
    title="landmark attention on LLaMA, its authors' LlamaForCausalLM; both ways",
    recognizes=is_one,
    expects="model_type 'llama_with_landmark', or mem_freq and mem_id",
    find_weights=find_weights,
    read_config=read_config,
    read_weights=read_llama,
    architecture="landmark",
    write_config=write_config,
    write_weights=write_llama,
    left_out=("retrieved_blocks",),
)
