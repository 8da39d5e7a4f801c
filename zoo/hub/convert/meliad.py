"""meliad: the Block-Recurrent and Memorizing Transformers of their authors (google-research).

Their code saves flax parameters and no config.json. Write the tree of parameters as safetensors or
a .pt file of tensors, each named by its path joined with "/" ("transformer0/tbase/_kvq/
keys_layer/kernel"), kernels as flax has them, [in, out]. Beside it goes a config.json with
window_length, the one size that no weight shows; with an external memory also database_size,
memory_num_neighbors and segment_length (the tokens of a call, after which the memory is written).
The run's gin text may be added as "gin": it is then checked for settings that would make another
model.
"""

import ast
import re

from ...models.block_recurrent import BlockRecurrentConfig
from .format import MAKE_A_TOKENIZER, Format

PROJECTIONS = {"q_proj": "queries", "k_proj": "keys", "v_proj": "values"}
# What gin can set and no weight shows, with what our model computes.
COMPUTED = {
    "decoder_stack.DecoderStack.use_absolute_positions": False,
    "decoder_stack.DecoderStack.use_final_layernorm": True,
    "decoder_stack.DecoderStack.final_mlp_factory": None,
    "transformer_layer.TransformerLayer.relative_position_type": "t5",
    "transformer_layer.TransformerLayer.use_long_xl_architecture": True,
    "transformer_layer.TransformerLayer.use_causal_mask": True,
    "transformer_layer.TransformerLayer.recurrent_always_clear_state": False,
    "transformer_base.MemTransformerBase.normalize_keys": True,
    "transformer_attn/nn_components.MLP.num_layers": 1,
    "transformer_attn/nn_components.MLP.hidden_activation": None,
    "transformer_ffn/nn_components.MLP.num_layers": 2,
    "transformer_ffn/nn_components.MLP.hidden_activation": "relu",
    "transformer_ffn/nn_components.MLP.use_bias": False,
    "nn_components.LayerNorm.use_mean": False,
    "position_t5.T5RelativePositionBiases.max_distance": 128,
}
# Theirs, in config.json, and our field.
MEMORY_FIELDS = {
    "database_size": "memory_size",
    "memory_num_neighbors": "memory_neighbors",
    "segment_length": "memory_segment_length",
}
# The same in gin, with what else a memory has there.
MEMORY_COMPUTED = {
    "decoder_stack.DecoderStack.disable_position_encoding_for_memory_layers": True,
    "decoder_stack.DecoderStack.memory_factory": "@memory_factory.memory_on_tpu_factory",
}
MEMORY_SIZES = {
    "memory_factory.memory_on_tpu_factory.database_size": "memory_size",
    "transformer_layer.TransformerLayer.memory_num_neighbors": "memory_neighbors",
    "SEGMENT_LENGTH": "memory_segment_length",
}


def is_one(config, names):
    """Whether a config.json is of this format."""
    return "window_length" in config and "model_type" not in config


def gin_settings(text):
    """What a gin text sets last, by configurable and parameter; macros are put in."""
    settings, scope = {}, None
    for line in text.splitlines():
        line = line.split("#")[0].rstrip()
        if header := re.fullmatch(r"([\w./]+):", line):
            scope = header[1]
        elif pair := re.fullmatch(r"(\s*)([\w./]+)\s*=\s*(.+)", line):
            # Indented lines belong to the header above.
            name = f"{scope}.{pair[2]}" if pair[1] and scope else pair[2]
            settings[name] = pair[3]
    return {name: _gin_value(value, settings) for name, value in settings.items()}


def _gin_value(text, settings):
    seen = set()
    while text.startswith("%") and text not in seen:
        seen.add(text)
        text = settings.get(text[1:], text)
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def check_gin(text, config):
    """Raises a ValueError if a gin text sets what our model does not compute."""
    found = gin_settings(text)
    window = "transformer_layer.TransformerLayer.window_length"
    stack = "decoder_stack.DecoderStack.dstack_window_length"
    expected = COMPUTED | {window: config.sliding_window}
    if config.feedback:
        expected[stack] = config.sliding_window
    elif config.num_states and found.get(stack) not in (0, None, config.sliding_window):
        expected[stack] = 0
    if layers := config.memory_layers:
        expected |= MEMORY_COMPUTED
        expected |= {name: getattr(config, ours) for name, ours in MEMORY_SIZES.items()}
    name = "decoder_stack.DecoderStack.memory_layer_indices"
    if isinstance(given := found.get(name), tuple):
        found[name] = tuple(sorted(i % config.num_hidden_layers for i in given))
        expected[name] = tuple(sorted(layers))
    expected |= {name: False for name in found if name.endswith(".cross_batch_memory")}
    for name, value in expected.items():
        if name in found and found[name] != value:
            raise ValueError(f"gin sets {name} = {found[name]!r}; our model computes {value!r}.")


def read_config(fields, weights):
    """Our config, from the weights and what they do not show."""
    window = fields.take("window_length", kind=int)
    gin = fields.take("gin", "", kind=str)
    vocab_size, width = weights.shape("embed/embedding", 2)
    layers = 0
    while f"transformer{layers}/tbase/_kvq/keys_layer/kernel" in weights.tensors:
        layers += 1
    if layers == 0:
        raise ValueError(
            "the weights have no transformer0/tbase/_kvq/keys_layer/kernel; they are flax's, named "
            'by their paths joined with "/".'
        )
    heads = weights.shape("transformer0/tbase/_kvq/attention_scale", 1)[0]
    memory = [i for i in range(layers) if _has(weights, i, "external_memory_bias")]
    recurrent = [i for i in range(layers) if _has(weights, i, "recurrent_initial_state")]
    others = [i for i in range(layers) if i not in recurrent]
    settings = {"num_states": 0, "recurrent_layers": recurrent, "memory_layers": memory}
    if memory:
        settings |= {ours: fields.take(name, kind=int) for name, ours in MEMORY_FIELDS.items()}
    if biased := [i for i in range(layers) if i not in memory]:
        name = f"transformer{biased[0]}/relative_positions/rel_embedding"
        settings["num_buckets"] = weights.shape(name, 2)[1]
    if recurrent:
        first = recurrent[0]
        name = f"transformer{first}/recurrent_initial_state"
        settings["num_states"] = weights.shape(name, 2)[0]
        has_projection = _has(weights, first, "recurrent_tbase/post_attn_mlp")
        has_mlp = _has(weights, first, "recurrent_tbase/ffn")
        settings["configuration"] = (
            "single" if not has_projection else "dual" if has_mlp else "skip"
        )
        last = "ffn" if has_mlp else "post_attn_mlp"
        kinds = {"gate_bias": "bias", "gate_layer": "full", "forget_gate": "lstm"}
        found = [
            gate
            for name, gate in kinds.items()
            if _has(weights, first, f"recurrent_tbase/{last}/{name}")
        ]
        if len(found) != 1:
            raise ValueError(
                f"a gate of transformer{first}/recurrent_tbase is one of {', '.join(kinds)}, "
                f"the weights have {len(found)} of them."
            )
        settings["gate"] = found[0]
        settings["feedback"] = any(_has(weights, i, "tbase/_kvq/queries2_layer") for i in others)
    config = BlockRecurrentConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=weights.shape("transformer0/tbase/ffn/hidden0/kernel", 2)[1],
        num_hidden_layers=layers,
        num_attention_heads=heads,
        head_dim=weights.shape("transformer0/tbase/_kvq/keys_layer/kernel", 2)[1] // heads,
        sliding_window=window,
        pad_token_id=fields.take("pad_token_id", None),
        bos_token_id=fields.take("bos_token_id", None),
        eos_token_id=fields.take("eos_token_id", None),
        **settings,
    )
    _check_fields(fields, config)
    check_gin(gin, config)
    return config


def _check_fields(fields, config):
    """Sizes that config.json names too are those of the weights."""
    expected = {
        "num_layers": config.num_hidden_layers,
        "embed_dim": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "head_dim": config.head_dim,
        "mlp_dim": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "recurrent_num_states": config.num_states,
    }
    for name, value in expected.items():
        if fields.take(name, value) != value:
            given = fields.take(name)
            raise ValueError(f"config.json has {name} = {given!r}, the weights have {value!r}.")
    layers = fields.take("recurrent_layer_indices", config.recurrent_layers, kind=list)
    given = sorted(i % config.num_hidden_layers for i in layers)
    if config.num_states and given != config.recurrent_layers:
        raise ValueError(
            f"config.json has recurrent_layer_indices = {layers}, by the weights they are "
            f"{config.recurrent_layers}."
        )
    layers = fields.take("memory_layer_indices", config.memory_layers, kind=list)
    if sorted(i % config.num_hidden_layers for i in layers) != config.memory_layers:
        raise ValueError(
            f"config.json has memory_layer_indices = {layers}, by the weights they are "
            f"{config.memory_layers}."
        )
    fields.drop("it is a name", "variant")


def _has(weights, layer, part):
    name = f"transformer{layer}/{part}"
    return any(key == name or key.startswith(f"{name}/") for key in weights.tensors)


def tensor_names(config):
    """Our name, theirs, and whether it is a kernel, [in, out], of each tensor."""
    yield "model.embed_tokens.weight", "embed/embedding", False
    yield "model.norm.weight", "final_layernorm/scale", False
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}", f"transformer{layer}"
        base, is_recurrent = f"{theirs}/tbase", layer in config.recurrent_layers
        yield f"{ours}.mixer_norm.weight", f"{base}/_kvq/pre_attn_layernorm/scale", False
        yield f"{ours}.mlp_norm.weight", f"{base}/pre_ffn_layernorm/scale", False
        yield f"{ours}.mixer.scale", f"{base}/_kvq/attention_scale", False
        if layer in config.memory_layers:
            yield f"{ours}.mixer.memory.gate", f"{theirs}/external_memory_bias", False
        else:
            bias = f"{theirs}/relative_positions/rel_embedding"
            yield f"{ours}.mixer.relative_bias", bias, False
        for name, part in PROJECTIONS.items():
            yield f"{ours}.mixer.{name}.weight", f"{base}/_kvq/{part}_layer/kernel", True
        if is_recurrent or config.feedback:
            yield f"{ours}.mixer.state_scale", f"{base}/attention_scale2", False
            queries = f"{base}/_kvq/queries2_layer/kernel"
            yield f"{ours}.mixer.state_q_proj.weight", queries, True
        out = f"{base}/post_attn_mlp/output_layer/kernel"
        yield f"{ours}.mixer.out_proj.weight", out, True
        yield f"{ours}.mlp.up_proj.weight", f"{base}/ffn/hidden0/kernel", True
        yield f"{ours}.mlp.down_proj.weight", f"{base}/ffn/output_layer/kernel", True
        if is_recurrent:
            yield f"{ours}.mixer.cell.initial", f"{theirs}/recurrent_initial_state", False
            yield from cell_names(config, f"{ours}.mixer.cell", f"{theirs}/recurrent_tbase")


def cell_names(config, ours, theirs):
    """The same of a recurrent cell, but for its first states."""
    yield f"{ours}.norm_weight", f"{theirs}/_kvq/pre_attn_layernorm/scale", False
    yield f"{ours}.position", f"{theirs}/_kvq/position_embeddings", False
    yield f"{ours}.scale", f"{theirs}/_kvq/attention_scale", False
    yield f"{ours}.token_scale", f"{theirs}/attention_scale2", False
    for name, part in (PROJECTIONS | {"token_q_proj": "queries2"}).items():
        yield f"{ours}.{name}.weight", f"{theirs}/_kvq/{part}_layer/kernel", True
    gated = []
    if config.configuration != "single":
        gated.append(("out", "post_attn_mlp"))
    if config.configuration != "skip":
        gated.append(("mlp_out", "ffn"))
        yield f"{ours}.up_proj.weight", f"{theirs}/ffn/hidden0/kernel", True
    if config.configuration == "dual":
        yield f"{ours}.mlp_norm_weight", f"{theirs}/pre_ffn_layernorm/scale", False
    gates = {"lstm": {"keep_gate": "forget_gate", "input_gate": "input_gate"}}
    gates["full"] = {"keep_gate": "gate_layer"}
    for name, part in gated:
        yield f"{ours}.{name}.proj.weight", f"{theirs}/{part}/output_layer/kernel", True
        if config.gate == "bias":
            yield f"{ours}.{name}.bias", f"{theirs}/{part}/gate_bias", False
        for gate, layer in gates.get(config.gate, {}).items():
            yield f"{ours}.{name}.{gate}.weight", f"{theirs}/{part}/{layer}/kernel", True
            yield f"{ours}.{name}.{gate}.bias", f"{theirs}/{part}/{layer}/bias", False


def read_weights(weights, config):
    """Pairs of our name and meliad's tensor."""
    for ours, theirs, is_kernel in tensor_names(config):
        yield ours, weights.take(theirs, change=_transposed if is_kernel else None)


def _transposed(kernel):
    return kernel.mT


FORMAT = Format(
    name="meliad",
    title="the Block-Recurrent and Memorizing Transformers' authors (google-research/meliad), flax",
    recognizes=is_one,
    expects="a config.json with window_length, which the authors' code does not write: add it",
    read_config=read_config,
    read_weights=read_weights,
    tokenizer=MAKE_A_TOKENIZER,
)
