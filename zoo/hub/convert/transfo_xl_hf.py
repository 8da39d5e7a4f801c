"""transformers' Transformer-XL (`TransfoXLLMHeadModel`, transfo-xl/transfo-xl-wt103), both ways.

Until 4.x it had this class. Its weights are those of the authors' TensorFlow code, so a text begins
after mem_len zero vectors that are not masked. Its state dict holds what softmax and embedding
share twice; the two have to be equal. `log_softmax` over all words is what it calls its
predictions, and what ours calls its logits.
"""

from ...models.transformer_xl import TransformerXLConfig
from . import transformer_xl_names as names
from .format import Format, refuse_other

DEFAULTS = {
    "n_layer": 18,
    "n_head": 16,
    "d_model": 1024,
    "d_head": 64,
    "d_inner": 4096,
    "d_embed": 1024,
    "div_val": 4,
    "cutoffs": [20000, 40000, 200000],
    "mem_len": 1600,
    "clamp_len": 1000,
    "same_length": True,
    "pre_lnorm": False,
    "tie_projs": None,
    "tgt_len": None,
}
BEFORE = "transformer."


def is_one(config, names):
    """Whether a config.json is of this format."""
    return config.get("model_type") == "transfo-xl"


def read_config(fields, weights):
    """Our config from transformers' fields."""
    names.refuse_other_models(fields)
    fields.drop("its softmax always is", "adaptive")
    fields.drop("how to generate", "task_specific_params")
    values = {ours: fields.take(name, DEFAULTS[name]) for name, ours in names.NAMES.items()}
    shares = fields.take("proj_share_all_but_first", True)
    is_tied = fields.take("tie_weight", True) and fields.take("tie_word_embeddings", True)
    has_projections = values["div_val"] > 1 or values["d_embed"] != values["hidden_size"]
    if not (is_tied and has_projections):
        # Without projections there are none to tie, whatever the list says.
        values["tie_projs"] = None
    elif values["tie_projs"] is None:
        values["tie_projs"] = [False] + [bool(shares)] * len(values["cutoffs"])
    names.fill_segment_length(fields, values)
    return TransformerXLConfig(
        **values,
        vocab_size=fields.take("vocab_size", 267735),
        zero_memory=True,
        untie_r=fields.take("untie_r", True),
        layer_norm_epsilon=fields.take("layer_norm_epsilon", 1e-5),
        initializer_range=fields.take("init_std", 0.02),
        tie_word_embeddings=is_tied,
        use_cache=fields.take("use_cache", True),
        pad_token_id=fields.take("pad_token_id", None),
        bos_token_id=fields.take("bos_token_id", None),
        eos_token_id=fields.take("eos_token_id", 0),
    )


def write_config(config):
    """transformers' fields from our config, and notes."""
    refuse_other(config, {"zero_memory": True}, "transformers'")
    values = {"architectures": ["TransfoXLLMHeadModel"], "model_type": "transfo-xl"}
    values |= {name: getattr(config, ours) for name, ours in names.NAMES.items()}
    values |= {
        "vocab_size": config.vocab_size,
        "untie_r": config.untie_r,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "init_std": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attn_type": 0,
        "use_cache": config.use_cache,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
    }
    notes = ["transformers has the class for it up to 4.x, and takes no attention_mask there"]
    return values, notes


def read_weights(weights, config):
    """Pairs of our name and transformers' tensor, or part of it."""
    return names.read_weights(weights, config, BEFORE)


def write_weights(weights, config):
    """Pairs of transformers' name and our tensor, or several."""
    return names.write_weights(weights, config, BEFORE)


FORMAT = Format(
    name="transfo-xl-hf",
    title="transformers' TransfoXLLMHeadModel, Transformer-XL (transfo-xl-wt103); both ways",
    recognizes=is_one,
    expects="model_type 'transfo-xl'",
    read_config=read_config,
    read_weights=read_weights,
    architecture="transformer_xl",
    write_config=write_config,
    write_weights=write_weights,
    tokenizer=(
        "make one of transformers from its vocab.pkl or the words of vocab-wt103: split at spaces, "
        "a word's line is its id, <unk> for others, <eos> at lines' ends; save_pretrained it to "
        "{dst}"
    ),
)
