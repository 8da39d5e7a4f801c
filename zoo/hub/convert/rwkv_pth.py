"""The RWKV authors' own files: .pth, or safetensors of the same names; RWKV 4, 5.0 to 5.2, 6, 7.

There is no config: version and sizes follow from names and shapes, as in the authors' inference
package `rwkv`. Files that this package has prepared for itself (`convert_and_save_and_exit`, with
"_strategy" beside the tensors) are taken too, and what it did is undone: matrices transposed, the
outputs of layer i divided by 2^(i // rescale_layer) for float16, decays exponentiated; the norm of
the embeddings is in the embeddings and stays there.
"""

import re

import torch

from ...models.rwkv4 import RWKV4Config
from ...models.rwkv5 import RWKV5Config
from ...models.rwkv6 import MIXED as MIXED_6
from ...models.rwkv6 import RWKV6Config
from ...models.rwkv7 import MIXED as MIXED_7
from ...models.rwkv7 import RWKV7Config
from .format import Format

PREFIXES = ("", "module.", "_forward_module.", "model.")
# What the package writes beside the tensors.
PACKAGE = {"_strategy", "_version", "_rescale_layer"}
EXPERIMENTS = {
    "time_state": "tuned initial states have no counterpart here; convert the model without them, "
    "and start from a state of your own",
    "s_emb": "DeepEmbed has no counterpart here",
    "qkv_": "attention beside the recurrence has no counterpart here",
    "tiny_": "the trainer's tiny attention has no counterpart here",
    "head_q.": "the trainer's head_qk has no counterpart here",
    "pos_emb": "position embeddings have no counterpart here",
    "_mx": "the weights are rounded to 8 bits; convert the original file",
}


def prefix_of(names):
    """What a trainer has put before each name, or None if these are not the authors' names."""
    for prefix in PREFIXES:
        if f"{prefix}emb.weight" in names and f"{prefix}blocks.0.att.key.weight" in names:
            return prefix
    return None


def version_of(names, prefix):
    """4, 5, 6 or 7."""
    if f"{prefix}blocks.0.att.r_k" in names:
        return 7
    if any(".time_maa" in name for name in names):
        return 6
    return 5 if f"{prefix}blocks.0.att.ln_x.weight" in names else 4


def is_prepared(weights):
    """Whether the `rwkv` package has written the file for itself."""
    return "_strategy" in weights.others


def read_config(fields, weights):
    """Our config from names and shapes; of the four versions' configs, the right one."""
    names = weights.tensors
    prefix = prefix_of(names)
    version = version_of(names, prefix)
    _refuse_experiments(weights)
    if is_prepared(weights):
        _note_preparation(fields, weights, version)

    vocab_size, hidden_size = weights.shape(f"{prefix}emb.weight", 2)
    layers = [int(m[1]) for m in (re.search(r"\bblocks\.(\d+)\.", name) for name in names) if m]
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": 1 + max(layers),
        "intermediate_size": _rows(weights, f"{prefix}blocks.0.ffn.key.weight"),
        "embedding_norm": not is_prepared(weights),
    }
    att = f"{prefix}blocks.0.att"
    key_size = _rows(weights, f"{att}.key.weight")
    if version == 4:
        return RWKV4Config(attention_hidden_size=key_size, **sizes)
    sizes["key_size"] = key_size
    sizes["value_size"] = _rows(weights, f"{att}.value.weight")
    if version == 5:
        num_heads = weights.shape(f"{att}.time_decay")[0]
        gated = f"{att}.gate.weight" in names
        if not is_prepared(weights) and f"{att}.time_first" in names:
            fields.is_rounded = True
            fields.notes.append("the bonus is exp(time_first), in float32 at least")
        return RWKV5Config(num_attention_heads=num_heads, gated=gated, **sizes)
    if version == 6:
        bonus = "time_first" if is_prepared(weights) else "time_faaaa"
        return RWKV6Config(
            num_attention_heads=weights.shape(f"{att}.{bonus}")[0],
            mix_lora_rank=weights.shape(f"{att}.time_maa_w2", 3)[1],
            decay_lora_rank=weights.shape(f"{att}.time_decay_w1", 2)[1],
            **sizes,
        )
    if f"{att}.v1" in names:
        fields.notes.append(
            "left out blocks.0.att.v0, v1 and v2: the first layer does not use them"
        )
    # The first layer's, unused, is all there is in a model of one layer.
    value_lora = f"{prefix}blocks.{min(1, max(layers))}.att.v1"
    num_heads, head_size = weights.shape(f"{att}.r_k", 2)
    return RWKV7Config(
        num_attention_heads=num_heads,
        head_size=head_size,
        decay_lora_rank=weights.shape(f"{att}.w1", 2)[1],
        rate_lora_rank=weights.shape(f"{att}.a1", 2)[1],
        value_lora_rank=weights.shape(value_lora, 2)[1] if value_lora in names else None,
        gate_lora_rank=weights.shape(f"{att}.g1", 2)[1],
        **sizes,
    )


def _refuse_experiments(weights):
    for part, reason in EXPERIMENTS.items():
        found = [name for name in weights.tensors if part in name]
        if found:
            raise ValueError(f"the weights have {found[0]}: {reason}.")
    strange = sorted(map(str, weights.others.keys() - PACKAGE))
    if strange:
        raise ValueError(f"expected tensors only, but {strange[0]} is something else.")


def _note_preparation(fields, weights, version):
    written_by = weights.others.get("_version")
    if written_by != "0.7" or version == 7:
        raise ValueError(
            f"prepared by the rwkv package in its format {written_by!r}, known is '0.7' of RWKV 4, "
            "5 and 6; convert the original file."
        )
    fields.notes.append(
        f"the rwkv package has prepared this file (strategy {weights.others['_strategy']!r}): its "
        "norm of the embeddings stays in them (embedding_norm = False); matrices are turned and "
        "scaled back"
    )
    if version < 6:
        fields.is_rounded = True
        fields.notes.append(
            "time_decay is computed back in float64 from the file's float32 exponentials, and "
            "rounded to float32"
        )


def _rows(weights, name):
    """The output width of a matrix."""
    return weights.shape(name, 2)[1 if is_prepared(weights) else 0]


def read_weights(weights, config):
    """Pairs of our name and the authors' tensor."""
    prefix = prefix_of(weights.tensors)
    version = int(config.model_type[-1])
    prepared = is_prepared(weights)
    rescale = int(weights.others.get("_rescale_layer", 0))

    def take(name, change=None):
        return weights.take(prefix + name, change=change)

    def matrix(name):
        return take(name, torch.t if prepared else None)

    yield "model.embed_tokens.weight", take("emb.weight")
    yield "lm_head.weight", matrix("head.weight")
    norms = {"model.norm": "ln_out"}
    if config.embedding_norm:
        norms["model.embed_norm"] = "blocks.0.ln0"
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}", f"blocks.{layer}"
        norms |= {f"{ours}.mixer_norm": f"{theirs}.ln1", f"{ours}.mlp_norm": f"{theirs}.ln2"}
        if version > 4:
            norms[f"{ours}.mixer.head_norm"] = f"{theirs}.att.ln_x"
        names = {
            "mixer.r_proj": "att.receptance",
            "mixer.k_proj": "att.key",
            "mixer.v_proj": "att.value",
            "mlp.k_proj": "ffn.key",
        }
        if version < 7:
            names["mlp.r_proj"] = "ffn.receptance"
        if version == 6 or version == 5 and config.gated:
            names["mixer.gate_proj"] = "att.gate"
        for our_name, name in names.items():
            yield f"{ours}.{our_name}.weight", matrix(f"{theirs}.{name}.weight")
        scale = 2 ** (layer // rescale) if rescale > 0 else 1
        for our_name, name in {"mixer.out_proj": "att.output", "mlp.v_proj": "ffn.value"}.items():
            x = matrix(f"{theirs}.{name}.weight")
            # A product with a power of two is exact; float16 could overflow.
            yield f"{ours}.{our_name}.weight", x if x is None or scale == 1 else x.float() * scale
        reader = {4: _layer_4, 5: _layer_5, 6: _layer_6, 7: _layer_7}[version]
        for name, tensor in reader(weights, config, f"{prefix}{theirs}", layer):
            yield f"{ours}.{name}", tensor
    for our_name, name in norms.items():
        for kind in ("weight", "bias"):
            yield f"{our_name}.{kind}", take(f"{name}.{kind}")


def _mixes_4(weights, theirs, mixed):
    """The token shift of RWKV-4 and 5."""
    for name in mixed:
        yield f"mixer.mix_{name}", weights.take(f"{theirs}.att.time_mix_{name}", change=_flat)
    for name in "kr":
        yield f"mlp.mix_{name}", weights.take(f"{theirs}.ffn.time_mix_{name}", change=_flat)


def _layer_4(weights, config, theirs, layer):
    yield from _mixes_4(weights, theirs, "rkv")
    decay = _log_of_negative if is_prepared(weights) else None
    yield "mixer.time_decay", weights.take(f"{theirs}.att.time_decay", change=decay)
    yield "mixer.time_first", weights.take(f"{theirs}.att.time_first")


def _layer_5(weights, config, theirs, layer):
    """Before 5.2 a head has one decay and one bonus; files of then may hold the bonus's log."""
    yield from _mixes_4(weights, theirs, "rkvg" if config.gated else "rkv")
    shape = config.num_attention_heads, config.head_size

    def per_channel(x):
        return x.view(shape[0], -1).expand(shape)

    prepared = is_prepared(weights)

    def decay(x):
        return per_channel(_log_of_log(x) if prepared else x)

    def bonus(x):
        # exp has more digits than a bfloat16 has.
        return per_channel(x.double().exp().to(torch.promote_types(x.dtype, torch.float32)))

    yield "mixer.time_decay", weights.take(f"{theirs}.att.time_decay", change=decay)
    if f"{theirs}.att.time_faaaa" in weights.tensors or prepared:
        # The package calls the bonus time_first, after it has been exponentiated.
        name = "time_first" if prepared else "time_faaaa"
        yield "mixer.bonus", weights.take(f"{theirs}.att.{name}", change=per_channel)
    else:
        yield "mixer.bonus", weights.take(f"{theirs}.att.time_first", change=bonus)


def _layer_6(weights, config, theirs, layer):
    att, bonus = f"{theirs}.att", "time_first" if is_prepared(weights) else "time_faaaa"
    head_shape = config.num_attention_heads, config.head_size
    yield "mixer.mu_x", weights.take(f"{att}.time_maa_x", change=_flat)
    names = [f"{att}.time_maa_{name}" for name in MIXED_6]
    yield "mixer.mu", weights.take(*names, change=_stacked)
    yield "mixer.mix_lora_a", weights.take(f"{att}.time_maa_w1")
    yield "mixer.mix_lora_b", weights.take(f"{att}.time_maa_w2")
    yield "mixer.time_decay", weights.take(f"{att}.time_decay", change=_flat)
    yield "mixer.decay_lora_a", weights.take(f"{att}.time_decay_w1")
    yield "mixer.decay_lora_b", weights.take(f"{att}.time_decay_w2")
    yield "mixer.bonus", weights.take(f"{att}.{bonus}", change=lambda x: x.view(head_shape))
    for name in "kr":
        yield f"mlp.mu_{name}", weights.take(f"{theirs}.ffn.time_maa_{name}", change=_flat)


def _layer_7(weights, config, theirs, layer):
    att = f"{theirs}.att"
    yield "mixer.mu", weights.take(*(f"{att}.x_{name}" for name in MIXED_7), change=_stacked)
    for ours, name in {"decay": "w", "rate": "a", "residual": "v", "gate": "g"}.items():
        if ours == "residual" and layer == 0:
            weights.untaken -= {f"{att}.v0", f"{att}.v1", f"{att}.v2"}
            continue
        yield f"mixer.{ours}.a", weights.take(f"{att}.{name}1")
        yield f"mixer.{ours}.b", weights.take(f"{att}.{name}2")
        if ours != "gate":
            yield f"mixer.{ours}.bias", weights.take(f"{att}.{name}0", change=_flat)
    for name in ("k_k", "k_a"):
        yield f"mixer.{name}", weights.take(f"{att}.{name}", change=_flat)
    yield "mixer.r_k", weights.take(f"{att}.r_k")
    yield "mlp.mu_k", weights.take(f"{theirs}.ffn.x_k", change=_flat)


def _flat(x):
    return x.flatten()


def _stacked(*tensors):
    return torch.stack([x.flatten() for x in tensors])


def _log_of_negative(x):
    """time_decay from -exp(time_decay), in float32."""
    return (-x.double()).log().float()


def _log_of_log(x):
    """time_decay from exp(-exp(time_decay)) in float32; for 0 and 1, of what rounds to them."""
    tiny, half_ulp = 2.0**-149, 2.0**-25
    return (-x.double().clamp(tiny, 1 - half_ulp).log()).log().float()


FORMAT = Format(
    name="rwkv-pth",
    title="BlinkDL's RWKV 4, 5, 6 and 7, .pth or safetensors (BlinkDL/rwkv-*)",
    recognizes=lambda config, names: prefix_of(names) is not None,
    expects="the authors' names of tensors (emb.weight, blocks.0.att.key.weight, ...)",
    read_config=read_config,
    read_weights=read_weights,
    config_file=None,
    tokenizer=(
        "World models (65,536 ids) take python tokenizers/rwkv_world.py rwkv_vocab_v20230424.txt "
        "{dst}; models of the Pile (50,277) the files of EleutherAI/gpt-neox-20b, copied to {dst}"
    ),
)
