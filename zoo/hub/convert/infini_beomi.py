"""Beomi's InfiniTransformer: Llama or Gemma with a gate in every attention, on top of the memory.

Nobody published a model in it; its use is to start from Llama's or Gemma's own weights, so a
checkpoint without gates is refused: add them, zeros of [1, heads, 1, 1] (its Llama) or -100 (its
Gemma). What it computes is the paper's linear memory, with two exceptions that are not copied: its
grouped queries read the memory of another group's head, and gradients stop at the segments' ends.
"""

from ...models.infini import InfiniConfig
from .format import Format, llama_names, read_llama

SEGMENT_LENGTH = 2048  # the default of its Gemma; its Llama has no field for it


def is_one(config, names):
    """Whether a config.json and names of tensors are of this format."""
    if names and not any(name.endswith("self_attn.gate") for name in names):
        return False
    return config.get("model_type") in ("llama", "gemma") or (
        # Its plain classes write no model_type.
        "model_type" not in config and "num_key_value_heads" in config and "rope_theta" in config
    )


def read_config(fields, weights):
    """Our config from Llama's or Gemma's fields."""
    is_gemma = fields.values.get("model_type") == "gemma"
    fields.drop("dropout in training alone", "attention_dropout")
    fields.drop("it is how to run, not what to compute", "pretraining_tp", "_attn_implementation")
    fields.refuse("attention_bias", "the attention has no biases here")
    fields.refuse("mlp_bias", "its MLP has no biases")
    fields.refuse("rope_scaling", "positions restart in every segment: there is nothing to scale")
    layers, width = fields.take("num_hidden_layers", 32, kind=int), fields.take("hidden_size", 4096)
    heads = fields.take("num_attention_heads", 32, kind=int)
    activation = fields.take("hidden_act", "silu")
    if is_gemma:
        activation = fields.take("hidden_activation", None) or "gelu_pytorch_tanh"
    segment = fields.take("segment_length", None)
    segment = fields.take("segment_size", None) if segment is None else segment
    if segment is None:
        segment = SEGMENT_LENGTH
        fields.notes.append(
            f"segment_length is {SEGMENT_LENGTH}, which config.json does not say: add it there if "
            "the model was trained with another"
        )
    groups = fields.take("num_key_value_heads", None) or heads
    if 1 < groups < heads:
        fields.notes.append(
            "grouped queries read the memory of their own keys' head; Beomi's code reads another's"
        )
    return InfiniConfig(
        vocab_size=fields.take("vocab_size", 32000),
        hidden_size=width,
        intermediate_size=fields.take("intermediate_size", 11008),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=fields.take("head_dim", None) or width // heads,
        segment_length=segment,
        memory_update="linear",
        gate_init=-100.0 if is_gemma else 0.0,
        hidden_act=activation,
        norm_adds_one=is_gemma,
        scale_embedding=is_gemma,
        rms_norm_eps=fields.take("rms_norm_eps", 1e-6),
        rope_parameters={"rope_type": "default", "rope_theta": fields.take("rope_theta", 10000.0)},
        max_position_embeddings=fields.take("max_position_embeddings", None),
        initializer_range=fields.take("initializer_range", 0.02),
        tie_word_embeddings=fields.take("tie_word_embeddings", is_gemma),
        use_cache=fields.take("use_cache", True),
        pad_token_id=fields.take("pad_token_id", None),
        bos_token_id=fields.take("bos_token_id", None),
        eos_token_id=fields.take("eos_token_id", None),
    )


def read_weights(weights, config):
    """Pairs of our name and theirs."""
    return read_llama(weights, config, tensor_names, {"gate": lambda x: x.flatten()})


def tensor_names(config):
    """Our name and theirs of each tensor."""
    yield from llama_names(config)
    for layer in range(config.num_hidden_layers):
        yield f"model.layers.{layer}.mixer.gate", f"model.layers.{layer}.self_attn.gate"


FORMAT = Format(
    name="infini-beomi",
    title="Beomi's InfiniTransformer: Llama or Gemma with gates and a linear memory",
    recognizes=is_one,
    expects="a config of Llama or Gemma, and a self_attn.gate in every layer",
    read_config=read_config,
    read_weights=read_weights,
    tokenizer="copy the files of Llama's or Gemma's, from whose weights it began, to {dst}",
)
