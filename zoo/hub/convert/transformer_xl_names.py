"""What the two layouts of Transformer-XL share: their fields and their tensors' names."""

import torch

from ...layers.adaptive_models import is_adaptive
from ...layers.relative_scores import sinusoids
from .format import split_tensor

SEGMENT_LENGTH = 128  # tokens at a time in the config of the published model
# Their field -> ours.
NAMES = {
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "d_model": "hidden_size",
    "d_head": "head_dim",
    "d_inner": "intermediate_size",
    "d_embed": "d_embed",
    "div_val": "div_val",
    "cutoffs": "cutoffs",
    "mem_len": "mem_len",
    "clamp_len": "clamp_len",
    "same_length": "same_length",
    "tgt_len": "segment_length",
    "pre_lnorm": "pre_lnorm",
    "tie_projs": "tie_projs",
}
_PARTS = {
    "mixer_norm.weight": "dec_attn.layer_norm.weight",
    "mixer_norm.bias": "dec_attn.layer_norm.bias",
    "mixer.r_proj.weight": "dec_attn.r_net.weight",
    "mixer.out_proj.weight": "dec_attn.o_net.weight",
    "mlp_norm.weight": "pos_ff.layer_norm.weight",
    "mlp_norm.bias": "pos_ff.layer_norm.bias",
    "mlp.up_proj.weight": "pos_ff.CoreNet.0.weight",
    "mlp.up_proj.bias": "pos_ff.CoreNet.0.bias",
    "mlp.down_proj.weight": "pos_ff.CoreNet.3.weight",
    "mlp.down_proj.bias": "pos_ff.CoreNet.3.bias",
}
_BIASES = {"query_biases.content": "r_w_bias", "query_biases.position": "r_r_bias"}


def refuse_other_models(fields):
    """Raises a ValueError where the fields say another model than the paper's; drops the rest."""
    if fields.take("attn_type", 0) != 0:
        raise ValueError(
            f"{fields.file} has attn_type = {fields.values['attn_type']!r}: only 0 is the paper's "
            "relative attention."
        )
    if fields.take("sample_softmax", -1) > 0:
        raise ValueError(f"{fields.file} has sample_softmax, which approximates another softmax.")
    fields.refuse("ext_len", "an extended context, which no published model has, is not here")
    fields.drop("dropout in training alone", "dropout", "dropatt")
    fields.drop("how weights began", "init", "init_range", "proj_init_std")
    fields.drop("how a text was cut for a run", "segments")


def fill_segment_length(fields, values):
    """Sets our segment_length, where it is None, to a number that changes no logit.

    Raises:
        ValueError: every number would change them.
    """
    if values["segment_length"] is None:
        values["segment_length"] = SEGMENT_LENGTH
        if not values["same_length"]:
            raise ValueError(
                f"{fields.file} has same_length = false and no tgt_len: what a token sees depends "
                "on how many a segment has; add tgt_len."
            )


def layer_names(config, before):
    """Our name and theirs of the tensors that are the same, but for embeddings and softmax."""
    for layer in range(config.num_hidden_layers):
        for ours, theirs in _PARTS.items():
            yield f"model.layers.{layer}.{ours}", f"{before}layers.{layer}.{theirs}"
        for ours, theirs in _BIASES.items() if config.untie_r else ():
            name = f"{before}layers.{layer}.dec_attn.{theirs}"
            yield f"model.layers.{layer}.mixer.{ours}", name
    for ours, theirs in _BIASES.items() if not config.untie_r else ():
        yield f"model.{ours}", f"{before}{theirs}"


def word_names(config, before):
    """Our name, theirs, and whether it may be left out as it is tied, of embeddings and softmax.

    Clusters of one width lie in one table there, so that several of ours have the same name.
    """
    is_tied, count = config.tie_word_embeddings, len(config.cutoffs) + 1
    if not is_adaptive(config):
        yield "model.embed_tokens.weight", f"{before}word_emb.emb_layers.0.weight", False
        yield "lm_head.weight", "crit.out_layers.0.weight", is_tied
        yield "lm_head.bias", "crit.out_layers.0.bias", False
        return
    has_projections = config.div_val > 1 or config.d_embed != config.hidden_size
    for c in range(count):
        table = 0 if config.div_val == 1 else c
        yield (
            f"model.embed_tokens.tables.{c}.weight",
            f"{before}word_emb.emb_layers.{table}.weight",
            False,
        )
        yield f"lm_head.words.{c}.weight", f"crit.out_layers.{table}.weight", is_tied
        yield f"lm_head.words.{c}.bias", f"crit.out_layers.{table}.bias", False
        if has_projections:
            if table == c:
                name = f"{before}word_emb.emb_projs.{c}"
                yield f"model.embed_tokens.projections.{c}.weight", name, False
            projection = f"lm_head.projections.{c}.weight"
            yield projection, f"crit.out_projs.{c}", config.tie_projs[c]


def read_weights(weights, config, before="", reverses_clusters=False):
    """Pairs of our name and theirs, or part of it.

    Args:
        weights: theirs.
        config: ours.
        before: what is before the decoder's names.
        reverses_clusters: whether the first cluster's entries for the others are the last first.
    """
    frequencies = sinusoids(config.hidden_size, 2)[1, : config.hidden_size // 2].asin()
    weights.drop_constant(f"{before}pos_emb.inv_freq", frequencies)
    for ours, theirs in layer_names(config, before):
        yield ours, weights.take(theirs)
    for layer in range(config.num_hidden_layers):
        name = f"{before}layers.{layer}.dec_attn.qkv_net.weight"
        parts = [lambda x, n=n: x.unflatten(0, (3, -1))[n] for n in range(3)]
        for letter, part in zip("qkv", split_tensor(weights, name, parts), strict=True):
            yield f"model.layers.{layer}.mixer.{letter}_proj.weight", part
    bounds = [0, *config.cutoffs, config.vocab_size]
    for ours, theirs, may_be_missing in word_names(config, before):
        if may_be_missing and theirs not in weights.tensors:
            continue
        change = None
        if is_adaptive(config) and config.div_val == 1 and "projections" not in ours:
            c = int(ours.split(".")[-2])
            change = _rows(bounds[c], bounds[c + 1], config.vocab_size)
        yield ours, weights.take(theirs, change=change)
    for kind in ("weight", "bias") if config.cutoffs else ():
        change = (lambda x: x.flip(0)) if reverses_clusters else None
        yield f"lm_head.clusters.{kind}", weights.take(f"crit.cluster_{kind}", change=change)


def _rows(start, after, total):
    def cut(x):
        if x.shape[0] != total:
            raise IndexError
        return x[start:after]

    return cut


def write_weights(weights, config, before="", reverses_clusters=False):
    """Pairs of their name and our tensor, or several; the way back of `read_weights`."""
    for ours, theirs in layer_names(config, before):
        yield theirs, weights.take(ours)
    for layer in range(config.num_hidden_layers):
        names = [f"model.layers.{layer}.mixer.{letter}_proj.weight" for letter in "qkv"]
        yield (
            f"{before}layers.{layer}.dec_attn.qkv_net.weight",
            weights.take(*names, change=_joined),
        )
    found = {}
    for ours, theirs, may_be_missing in word_names(config, before):
        if not (may_be_missing and ours not in weights.tensors):
            found.setdefault(theirs, []).append(ours)
    for theirs, names in found.items():
        yield theirs, weights.take(*names, change=_joined if len(names) > 1 else None)
    for kind in ("weight", "bias") if config.cutoffs else ():
        change = (lambda x: x.flip(0)) if reverses_clusters else None
        yield f"crit.cluster_{kind}", weights.take(f"lm_head.clusters.{kind}", change=change)


def _joined(*parts):
    return torch.cat(parts)
