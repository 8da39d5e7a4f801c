"""RWKV-6 as in the RWKV group's own repositories on the Hub (RWKV/v6-Finch-1B6-HF), both ways.

`Rwkv6ForCausalLM` is no class of transformers: its code lies beside the weights there. llama.cpp's
convert_hf_to_gguf.py reads such folders, and no other ones of RWKV-6. The authors' numbers and
shapes under other names; what they never change is written into the class and no field: the ranks,
the width of the channel mix (its config forgets intermediate_size), and the last norm's epsilon.
"""

import torch

from ...models.rwkv6 import MIXED, RWKV6Config
from .format import Format, read_by_name, write_by_name

NORM_EPS = 1e-5
DIVISOR = 8  # of the epsilon of the head norm, squared


def is_one(config, names):
    """Whether a config.json is of this format."""
    return config.get("model_type") == "rwkv6" and "head_size" in config


def fixed_sizes(hidden_size):
    """Our fields that follow from the width there."""
    is_large = hidden_size == 4096
    return {
        "mix_lora_rank": 64 if is_large else 32,
        "decay_lora_rank": 128 if is_large else 64,
        "intermediate_size": int(hidden_size * 3.5) // 32 * 32,
    }


def read_config(fields, weights):
    """Our config from theirs."""
    eps = fields.take("layer_norm_epsilon", NORM_EPS)
    if eps != NORM_EPS:
        raise ValueError(
            f"config.json has layer_norm_epsilon = {eps!r}: the last norm there has {NORM_EPS} all "
            "the same, and ours have one epsilon."
        )
    hidden_size = fields.take("hidden_size", kind=int)
    keys = fields.take("attention_hidden_size", None, kind=int | None) or hidden_size
    if keys != hidden_size:
        raise ValueError(
            f"config.json has attention_hidden_size = {keys}, hidden_size = {hidden_size}: the "
            "head norm there takes none but the same."
        )
    rescale_every = fields.take("rescale_every", 6, kind=int)
    if rescale_every > 0:
        fields.notes.append(
            f"left out rescale_every = {rescale_every}: it is how to run. If a model wrote these "
            "weights after running in 16 bits, attention.output and feed_forward.value of layer i "
            f"are divided by 2^(i // {rescale_every}) in the file, which cannot be seen in it"
        )
    fields.drop("the class there does not read it", "num_attention_heads")
    fields.drop("there is no limit", "context_length", "max_context_length", "model_max_length")
    sizes = fixed_sizes(hidden_size)
    sizes["intermediate_size"] = (
        fields.take("intermediate_size", None) or sizes["intermediate_size"]
    )
    return RWKV6Config(
        vocab_size=fields.take("vocab_size"),
        hidden_size=hidden_size,
        num_hidden_layers=fields.take("num_hidden_layers", kind=int),
        head_size=fields.take("head_size", 64, kind=int),
        layer_norm_eps=eps,
        head_norm_eps=NORM_EPS * fields.take("head_size_divisor", DIVISOR, kind=int | float) ** 2,
        tie_word_embeddings=fields.take("tie_word_embeddings", False),
        use_cache=fields.take("use_cache", True),
        pad_token_id=fields.take("pad_token_id", None),
        bos_token_id=fields.take("bos_token_id", 0),
        eos_token_id=fields.take("eos_token_id", 0),
        **sizes,
    )


def write_config(config):
    """Their fields from our config, and notes."""
    needed = {
        "layer_norm_eps": NORM_EPS,
        "embedding_norm": True,
        "key_size": config.hidden_size,
        "value_size": config.hidden_size,
        **fixed_sizes(config.hidden_size),
    }
    for name, value in needed.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{name} is {getattr(config, name)}: Rwkv6ForCausalLM has {value}, whatever its "
                "config says."
            )
    divisor = (config.head_norm_eps / NORM_EPS) ** 0.5
    values = {
        "architectures": ["Rwkv6ForCausalLM"],
        "model_type": "rwkv6",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "attention_hidden_size": config.key_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "head_size": config.head_size,
        "head_size_divisor": round(divisor) if abs(divisor - round(divisor)) < 1e-9 else divisor,
        "layer_norm_epsilon": config.layer_norm_eps,
        "rescale_every": 0,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_cache": config.use_cache,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
    }
    notes = ["rescale_every is 0, which is exact; set it to 6 if float16 overflows"]
    if values["head_size_divisor"] != DIVISOR:
        notes.append(f"llama.cpp has a head_size_divisor of {DIVISOR}, whatever the config says")
    if config.tie_word_embeddings:
        notes.append("llama.cpp does not load a model of tied embeddings")
    return values, notes


def read_weights(weights, config):
    """Pairs of our name and their tensor."""
    flat = dict.fromkeys(("mu_x", "mu_k", "mu_r", "time_decay"), lambda x: x.flatten())
    yield from read_by_name(weights, config, tensor_names(config), flat)
    for layer in range(config.num_hidden_layers):
        mu = weights.take(
            *mixed_names(layer), change=lambda *parts: torch.stack([x.flatten() for x in parts])
        )
        yield f"model.layers.{layer}.mixer.mu", mu


def write_weights(weights, config):
    """Pairs of their name and our tensor."""
    boxed = dict.fromkeys(("mu_x", "mu_k", "mu_r", "time_decay"), lambda x: x.view(1, 1, -1))
    yield from write_by_name(weights, config, tensor_names(config), boxed)
    for layer in range(config.num_hidden_layers):
        mu = weights.take(f"model.layers.{layer}.mixer.mu")
        for name, mu_D in zip(mixed_names(layer), mu, strict=True):
            yield name, mu_D.view(1, 1, -1).clone()


def mixed_names(layer):
    """Their names of what are the rows of our mu."""
    return [f"rwkv.blocks.{layer}.attention.time_maa_{name}" for name in MIXED]


def tensor_names(config):
    """Our name and theirs of each tensor but those of `mixed_names`."""
    yield "model.embed_tokens.weight", "rwkv.embeddings.weight"
    yield "lm_head.weight", "head.weight"
    norms = {"model.embed_norm": "rwkv.blocks.0.pre_ln", "model.norm": "rwkv.ln_out"}
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}", f"rwkv.blocks.{layer}"
        norms |= {
            f"{ours}.mixer_norm": f"{theirs}.ln1",
            f"{ours}.mlp_norm": f"{theirs}.ln2",
            f"{ours}.mixer.head_norm": f"{theirs}.attention.ln_x",
        }
        mixer = {
            "mu_x": "time_maa_x",
            "mix_lora_a": "time_maa_w1",
            "mix_lora_b": "time_maa_w2",
            "time_decay": "time_decay",
            "decay_lora_a": "time_decay_w1",
            "decay_lora_b": "time_decay_w2",
            "bonus": "time_faaaa",
            "r_proj.weight": "receptance.weight",
            "k_proj.weight": "key.weight",
            "v_proj.weight": "value.weight",
            "gate_proj.weight": "gate.weight",
            "out_proj.weight": "output.weight",
        }
        for our_name, name in mixer.items():
            yield f"{ours}.mixer.{our_name}", f"{theirs}.attention.{name}"
        for short, name in {"k": "key", "v": "value", "r": "receptance"}.items():
            yield f"{ours}.mlp.{short}_proj.weight", f"{theirs}.feed_forward.{name}.weight"
            if short != "v":
                yield f"{ours}.mlp.mu_{short}", f"{theirs}.feed_forward.time_maa_{short}"
    for ours, theirs in norms.items():
        for kind in ("weight", "bias"):
            yield f"{ours}.{kind}", f"{theirs}.{kind}"


FORMAT = Format(
    name="rwkv6-hf",
    title="Rwkv6ForCausalLM of RWKV/v6-Finch-*-HF, which llama.cpp converts; both ways",
    recognizes=is_one,
    expects="model_type 'rwkv6' with the RWKV group's fields (head_size, ...)",
    read_config=read_config,
    read_weights=read_weights,
    architecture="rwkv6",
    write_config=write_config,
    write_weights=write_weights,
    tokenizer="python tokenizers/rwkv_world.py rwkv_vocab_v20230424.txt {dst}",
)
