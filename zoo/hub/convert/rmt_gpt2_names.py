"""What the two formats of recurrent memory around transformers' GPT-2 have in common.

A state dict of the authors' wrapper, and a config.json with GPT-2's fields and the wrapper's
arguments. Its training scripts save the one, and have the other on their command lines.
"""

from functools import partial

from ...models.rmt import RmtConfig
from .format import split_tensor

IN_TRAINING = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
HOW_TO_RUN = ("reorder_and_upcast_attn", "task_specific_params")
OF_HEADS = (
    "summary_type",
    "summary_use_proj",
    "summary_activation",
    "summary_proj_to_labels",
    "summary_first_dropout",
)
# Of the wrapper: how it was trained.
TRAINED = ("max_n_segments", "vary_n_segments", "k1", "k2", "return_all_logits", "n_ctx")
# Their field -> (ours, its default in GPT2Config, if it has one).
NAMES = {
    "vocab_size": ("vocab_size",),
    "n_embd": ("hidden_size",),
    "n_layer": ("num_hidden_layers",),
    "n_head": ("num_attention_heads",),
    "segment_size": ("segment_length",),
    "num_mem_tokens": ("num_memory_tokens",),
    "activation_function": ("hidden_act", "gelu_new"),
    "layer_norm_epsilon": ("rms_norm_eps", 1e-5),
    "initializer_range": ("initializer_range", 0.02),
    "tie_word_embeddings": ("tie_word_embeddings", True),
    "use_cache": ("use_cache", True),
    "pad_token_id": ("pad_token_id", None),
    "bos_token_id": ("bos_token_id", None),
    "eos_token_id": ("eos_token_id", None),
}
FIXED = {
    "gated_mlp": False,
    "mlp_bias": True,
    "attention_bias": True,
    "norm_type": "layer",
    "norm_bias": True,
    "position_embedding_type": "learned",
}
DECODER = "memory_cell.model.transformer"
POSITIONS = f"{DECODER}.wpe.weight"
HEAD = "memory_cell.model.lm_head.weight"


def is_one(config, names):
    """Whether a config.json is of the wrappers around GPT-2."""
    return "segment_size" in config and "num_mem_tokens" in config and "n_embd" in config


def read_config(fields, weights, **memory):
    """Our config from GPT-2's fields and those of either wrapper.

    Args:
        fields, weights: theirs.
        memory: our fields of the memory.
    """
    fields.drop("dropout in training alone", *IN_TRAINING)
    fields.drop("it is how to run, not what to compute", *HOW_TO_RUN)
    fields.drop("it is about heads that are not here", *OF_HEADS)
    fields.drop("it is how it was trained; gradients went through all segments", *TRAINED)
    fields.refuse("scale_attn_by_inverse_layer_idx", "one scale is for all layers here")
    if not fields.take("scale_attn_weights", True):
        raise ValueError(
            f"{fields.file} has scale_attn_weights = False: scores are divided by the square root "
            "of a head's width here."
        )
    alignment = fields.take("segment_alignment", None)
    if alignment not in (None, "left"):
        raise ValueError(
            f"{fields.file} has segment_alignment = {alignment!r}, which cuts a text by what comes "
            "after: segments are counted from its start here, as 'left' has it."
        )
    fields.take("n_positions", None)  # the table says it
    values = {ours: fields.take(name, *default) for name, (ours, *default) in NAMES.items()}
    return RmtConfig(
        **values,
        **FIXED,
        **memory,
        intermediate_size=fields.take("n_inner", None) or 4 * values["hidden_size"],
        num_positions=weights.shape(POSITIONS, 2)[0],
    )


def read_weights(weights, config, block=""):
    """Pairs of our name and their tensor, or part of it.

    Args:
        weights: theirs.
        config: ours.
        block: what stands between a layer's name and those of GPT-2's block.
    """
    # Masks, which older versions of transformers kept as weights.
    for name in [x for x in weights.tensors if x.endswith((".attn.bias", ".attn.masked_bias"))]:
        weights.take(name)
    yield "model.memory.vectors", weights.take("memory_cell.memory")
    yield "model.embed_tokens.weight", weights.take(f"{DECODER}.wte.weight")
    yield "model.embed_positions.weight", weights.take(POSITIONS)
    if HEAD in weights.tensors or not config.tie_word_embeddings:
        yield "lm_head.weight", weights.take(HEAD)
    parts = {
        "mixer_norm": "ln_1",
        "mixer.out_proj": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp.up_proj": "mlp.c_fc",
        "mlp.down_proj": "mlp.c_proj",
    }
    for kind in ("weight", "bias"):
        yield f"model.norm.{kind}", weights.take(f"{DECODER}.ln_f.{kind}")
        for layer in range(config.num_hidden_layers):
            ours, theirs = f"model.layers.{layer}", f"{DECODER}.h.{layer}.{block}"
            for part, name in parts.items():
                # GPT-2's matrices are [in, out].
                is_matrix = kind == "weight" and part.endswith("proj")
                change = (lambda x: x.mT) if is_matrix else None
                tensor = weights.take(f"{theirs}{name}.{kind}", change=change)
                yield f"{ours}.{part}.{kind}", tensor
            cuts = [partial(_third, part) for part in range(3)]
            qkv = split_tensor(weights, f"{theirs}attn.c_attn.{kind}", cuts)
            for letter, tensor in zip("qkv", qkv, strict=True):
                yield f"{ours}.mixer.{letter}_proj.{kind}", tensor


def _third(part, x):
    """Queries, keys or values of a matrix [D, 3 D], or of a bias."""
    third = x.chunk(3, dim=-1)[part]
    return third.mT if x.ndim == 2 else third
