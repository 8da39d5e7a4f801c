"""Mistral AI's own layout (params.json beside consolidated.safetensors or .00.pth), both ways.

The numbers of `hf-mistral` under the names of the authors' code, mistral-inference. That turns
adjacent channels (2j, 2j + 1) of a head, as one complex number, where we turn (j, j + K / 2): so
the rows of wq and wk are in another order, which is exact.

The window is W keys, the token's own included, as in all of the authors' code but the prefill of
their first, one_file_ref.py, whose mask lets W + 1 through (its decoding has W). A text longer than
W therefore has other logits there than in its decoding, in transformers and here.

Where params.json has no rope_theta it is 10,000 with a window (7B v0.1) and 1,000,000 without one:
the rule of the authors' code of the time. Their latest has 1,000,000 for both, and so what is
written always says it.
"""

from ...core.length_limit import length_limit
from ...layers.positions import num_rotated_channels
from ...models.sliding_window import SlidingWindowConfig
from .format import Format, read_by_name, refuse_beyond, write_by_name

NAMES = {"dim", "n_layers", "n_heads", "hidden_dim"}
WHOLE = ("consolidated.safetensors.index.json", "consolidated.safetensors")
HOW_TO_RUN = ("max_batch_size", "use_cache", "dtype")
KNOWN = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "max_position_embeddings",
    "sliding_window",
    "tie_word_embeddings",
)
OTHER_MODELS = {
    "moe": "mixtures of experts have no counterpart here",
    "vision_encoder": "images have no counterpart here",
    "multimodal": "images and sound have no counterpart here",
    "quantization": "quantised weights are not read; convert the original ones",
    "yarn": "scaled rotations are read from transformers' files alone (hf-mistral)",
    "use_biases": "our matrices have no biases",
}


def is_one(config, names):
    """Whether a params.json is of this format."""
    return config.keys() >= NAMES


def find_weights(src):
    """The file to read: in a folder of the Hub transformers' files lie beside it.

    Raises:
        ValueError: the matrices are cut over several files.
    """
    for name in WHOLE:
        if (src / name).is_file():
            return src / name
    parts = sorted((src if src.is_dir() else src.parent).glob("consolidated.*.pth"))
    if len(parts) > 1 and (src.is_dir() or src in parts):
        raise ValueError(
            f"{parts[0].name} and {parts[1].name} hold parts of the same matrices, cut for several "
            "devices; join them first, or convert transformers' files of this model (hf-mistral)."
        )
    return parts[0] if src.is_dir() and parts else src


def read_config(fields, weights):
    """Our config from the authors' fields."""
    if fields.take("model_type", "transformer") != "transformer":
        raise ValueError(
            f"params.json has model_type = {fields.values['model_type']!r}, which is another "
            "architecture; expected 'transformer', or none."
        )
    for name, reason in OTHER_MODELS.items():
        fields.refuse(name, reason)
    if fields.take("causal", True) is not True:
        raise ValueError("params.json has causal = false: our attention never looks ahead.")
    if fields.take("activation", "silu") != "silu":
        raise ValueError(
            f"params.json has activation = {fields.values['activation']!r}: the authors' code has "
            "'silu' alone."
        )
    fields.drop("it is how to run, not what to compute", *HOW_TO_RUN)
    window = _one_window(fields)
    theta = fields.take("rope_theta", None)
    if theta is None:
        theta = 1e6 if window is None else 1e4
        fields.notes.append(
            f"there is no rope_theta: {theta:,.0f}, as the authors' code of the time has it "
            f"{'without' if window is None else 'with'} a sliding window"
        )
    trained = fields.take("max_seq_len", None)
    return SlidingWindowConfig(
        vocab_size=fields.take("vocab_size"),
        hidden_size=fields.take("dim"),
        intermediate_size=fields.take("hidden_dim"),
        num_hidden_layers=fields.take("n_layers"),
        num_attention_heads=fields.take("n_heads"),
        num_key_value_heads=fields.take("n_kv_heads"),
        head_dim=fields.take("head_dim", None),
        hidden_act="silu",
        rms_norm_eps=fields.take("norm_eps"),
        rope_parameters={"rope_type": "default", "rope_theta": float(theta)},
        max_position_embeddings=fields.take("max_position_embeddings", trained),
        sliding_window=window,
        tie_word_embeddings=fields.take("tied_embeddings", False),
        # Of all their tokenizers.
        bos_token_id=1,
        eos_token_id=2,
    )


def _one_window(fields):
    """W, or None. It may be a text, or a list that the layers walk through."""
    window = fields.take("sliding_window", None)
    hidden = fields.take("_sliding_window", None)
    window = hidden if window is None else window
    several = window if isinstance(window, list) else [window]
    if len(set(several)) > 1:
        raise ValueError(
            f"params.json has sliding_window = {window!r}: ours is the same in every layer."
        )
    window = several[0] if several else None
    return int(window) if isinstance(window, str) and window.isdigit() else window


def write_config(config):
    """The authors' fields from our config, and notes."""
    refuse_beyond(config, KNOWN + FORMAT.left_out, "the authors'")
    if config.hidden_act != "silu":
        raise ValueError(f"hidden_act is {config.hidden_act!r}: the authors' code has 'silu'.")
    if config.rope_parameters["rope_type"] != "default":
        raise ValueError(
            f"RoPE is of type {config.rope_parameters['rope_type']}: the authors' code has the "
            "default one."
        )
    if num_rotated_channels(config) != config.head_dim:
        raise ValueError("partial_rotary_factor is not 1: the authors' code turns whole heads.")
    values = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "head_dim": config.head_dim,
        "hidden_dim": config.intermediate_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "norm_eps": config.rms_norm_eps,
        "sliding_window": config.sliding_window,
        "vocab_size": config.vocab_size,
        "rope_theta": config.rope_parameters["rope_theta"],
        "max_seq_len": length_limit(config),
    }
    values = {name: value for name, value in values.items() if value is not None}
    notes = []
    if config.tie_word_embeddings:
        values["tied_embeddings"] = True
        notes.append(
            "there is no output.weight but tied_embeddings = true, which vLLM reads and "
            "mistral-inference does not"
        )
    return values, notes


def read_weights(weights, config):
    """Pairs of our name and the authors' tensor."""
    return read_by_name(weights, config, tensor_names(config), rotated(config, halves_of))


def write_weights(weights, config):
    """Pairs of the authors' name and our tensor."""
    return write_by_name(weights, config, tensor_names(config), rotated(config, _pairs_of))


def rotated(config, reorder):
    """Our names of the matrices whose outputs are turned, and what reorders their rows."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return {
        f"model.layers.{layer}.mixer.{name}.weight": reorder(num_heads)
        for layer in range(config.num_hidden_layers)
        for name, num_heads in heads.items()
    }


def halves_of(num_heads):
    """Of each head's rows the even ones, then the odd ones."""
    return lambda x: x.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _pairs_of(num_heads):
    """The way back: rows of the first and the second half by turns."""
    return lambda x: x.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def tensor_names(config):
    """Our name and the authors' of each tensor."""
    names = {"model.embed_tokens": "tok_embeddings", "lm_head": "output", "model.norm": "norm"}
    parts = {
        "mixer_norm": "attention_norm",
        "mlp_norm": "ffn_norm",
        "mixer.q_proj": "attention.wq",
        "mixer.k_proj": "attention.wk",
        "mixer.v_proj": "attention.wv",
        "mixer.out_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
    }
    for layer in range(config.num_hidden_layers):
        for ours, theirs in parts.items():
            names[f"model.layers.{layer}.{ours}"] = f"layers.{layer}.{theirs}"
    for ours, theirs in names.items():
        yield f"{ours}.weight", f"{theirs}.weight"


FORMAT = Format(
    name="mistral-consolidated",
    title="Mistral AI's own files: params.json, consolidated.safetensors or .00.pth; both ways",
    recognizes=is_one,
    expects="a params.json with dim, n_layers, n_heads and hidden_dim",
    config_file="params.json",
    find_weights=find_weights,
    read_config=read_config,
    read_weights=read_weights,
    architecture="sliding_window",
    write_config=write_config,
    write_weights=write_weights,
    weight_file="consolidated.safetensors",  # the one that mistral-inference opens
    left_out=("initializer_range", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id"),
)
