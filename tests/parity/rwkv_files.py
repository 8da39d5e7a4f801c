"""Random checkpoints under the names of the RWKV authors and of flash-linear-attention.

The tables of names and shapes are written down from their code, not from our converters.
"""

import torch

WIDTH, HEADS, HEAD_SIZE, MLP, LAYERS, VOCAB = 48, 3, 16, 80, 3, 67
VERSIONS = ("4", "5.0", "5.1", "5.2", "6", "7")


def authors_shapes(version, layers=LAYERS, width=WIDTH, mlp=MLP, vocab=VOCAB):
    """Name -> shape of a file of version 4, 5.0, 5.1, 5.2, 6 or 7."""
    d, heads = width, width // HEAD_SIZE
    shapes = {"emb.weight": (vocab, d)}
    for i in range(layers):
        norms = ["ln1", "ln2", "ln0"] if i == 0 else ["ln1", "ln2"]
        norms += [] if version == "4" else ["att.ln_x"]
        layer = {f"{norm}.{kind}": (d,) for norm in norms for kind in ("weight", "bias")}
        matrices = ["receptance", "key", "value", "output"]
        matrices += ["gate"] if version in ("5.1", "5.2", "6") else []
        layer |= {f"att.{name}.weight": (d, d) for name in matrices}
        layer |= {"ffn.key.weight": (mlp, d), "ffn.value.weight": (d, mlp)}
        if version != "7":
            layer["ffn.receptance.weight"] = (d, d)
        if version[0] in "45":
            mixes = "kvr" if version in ("4", "5.0") else "kvrg"
            layer |= {f"att.time_mix_{name}": (1, 1, d) for name in mixes}
            layer |= {f"ffn.time_mix_{name}": (1, 1, d) for name in "kr"}
        layer |= {
            "4": {"att.time_decay": (d,), "att.time_first": (d,)},
            "5.0": {"att.time_decay": (heads,), "att.time_first": (heads,)},
            "5.1": {"att.time_decay": (heads,), "att.time_faaaa": (heads,)},
            "5.2": {"att.time_decay": (heads, HEAD_SIZE), "att.time_faaaa": (heads, HEAD_SIZE)},
            "6": {
                **{f"att.time_maa_{name}": (1, 1, d) for name in "xwkvrg"},
                "att.time_maa_w1": (d, 5 * 6),
                "att.time_maa_w2": (5, 6, d),
                "att.time_decay": (1, 1, d),
                "att.time_decay_w1": (d, 7),
                "att.time_decay_w2": (7, d),
                "att.time_faaaa": (heads, HEAD_SIZE),
                **{f"ffn.time_maa_{name}": (1, 1, d) for name in "kr"},
            },
            "7": {
                **{f"att.x_{name}": (1, 1, d) for name in "rwkvag"},
                **{f"att.{name}0": (1, 1, d) for name in "wav"},
                **{f"att.{name}1": (d, rank) for name, rank in zip("wavg", (6, 7, 8, 9))},
                **{f"att.{name}2": (rank, d) for name, rank in zip("wavg", (6, 7, 8, 9))},
                "att.k_k": (1, 1, d),
                "att.k_a": (1, 1, d),
                "att.r_k": (heads, HEAD_SIZE),
                "ffn.x_k": (1, 1, d),
            },
        }[version]
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in layer.items()}
    return shapes | {"ln_out.weight": (d,), "ln_out.bias": (d,), "head.weight": (vocab, d)}


# The authors' part of a name -> that of Rwkv6ForCausalLM in RWKV/v6-Finch-*-HF.
HF_NAMES = {
    "emb.": "rwkv.embeddings.",
    "blocks.": "rwkv.blocks.",
    "ln0": "pre_ln",
    ".att.": ".attention.",
    ".ffn.": ".feed_forward.",
    "ln_out": "rwkv.ln_out",
}


def hf_name(name):
    """The name there of a tensor of the authors'."""
    for theirs, there in HF_NAMES.items():
        name = name.replace(theirs, there)
    return name


def hf_shapes(layers=LAYERS, width=WIDTH, vocab=VOCAB):
    """The authors' name -> shape of a file of version 6 that Rwkv6ForCausalLM can hold."""
    shapes = authors_shapes("6", layers, width, int(3.5 * width) // 32 * 32, vocab)
    ranks = {
        "time_maa_w1": (width, 5 * 32),
        "time_maa_w2": (5, 32, width),
        "time_decay_w1": (width, 64),
        "time_decay_w2": (64, width),
    }
    return {name: ranks.get(name.rpartition(".")[2], shape) for name, shape in shapes.items()}


HF_CONFIG = {  # as the repositories' are
    "architectures": ["Rwkv6ForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_rwkv6.Rwkv6ForCausalLM"},
    "attention_hidden_size": WIDTH,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "head_size": HEAD_SIZE,
    "head_size_divisor": 8,
    "hidden_size": WIDTH,
    "intermediate_size": None,
    "layer_norm_epsilon": 1e-05,
    "model_type": "rwkv6",
    "num_attention_heads": 64,
    "num_hidden_layers": LAYERS,
    "rescale_every": 6,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": VOCAB,
}


def fla_shapes(version, width, heads, keys, values, mlp, layers, vocab, ranks, pre_norm, tied):
    """Name -> shape of RWKV-6 or 7 of flash-linear-attention."""
    d = width
    shapes = {"model.embeddings.weight": (vocab, d)}
    if not tied:
        shapes["lm_head.weight"] = (vocab, d)
    for i in range(layers):
        norms = ["attn_norm", "ffn_norm"] + (["pre_norm"] if pre_norm and i == 0 else [])
        layer = {f"{norm}.{kind}": (d,) for norm in norms for kind in ("weight", "bias")}
        layer |= {"attn.g_norm.weight": (values,), "attn.g_norm.bias": (values,)}
        layer["attn.o_proj.weight"] = (d, values)
        outputs = {"r_proj": keys, "k_proj": keys, "v_proj": values}
        if version == "6":
            outputs["g_proj"] = values
            layer |= {f"attn.{name}.linear.weight": (n, d) for name, n in outputs.items()}
            layer |= {
                "attn.x_bias": (5, d),
                "attn.x_proj.0.mu": (d,),
                "attn.x_proj.0.linear.weight": (5 * ranks[0], d),
                "attn.x_proj.2.weight": (d, 5 * ranks[0]),
                "attn.w_proj.linear.lora.0.weight": (ranks[1], d),
                "attn.w_proj.linear.lora.2.weight": (keys, ranks[1]),
                "attn.w_proj.linear.lora.2.bias": (keys,),
                "attn.bonus": (heads, keys // heads),
                "ffn.key.mu": (d,),
                "ffn.key.linear.weight": (mlp, d),
                "ffn.value.weight": (d, mlp),
                "ffn.receptance.mu": (d,),
                "ffn.receptance.linear.weight": (d, d),
            }
        else:
            layer |= {f"attn.{name}.weight": (n, d) for name, n in outputs.items()}
            layer |= {f"attn.x_{name}": (1, 1, d) for name in "rwkvag"}
            loras = zip("wavg", (keys, keys, values, values), ranks)
            for name, out, rank in loras:
                if name == "v" and i == 0:
                    continue
                layer[f"attn.{name}_lora.lora.0.weight"] = (rank, d)
                layer[f"attn.{name}_lora.lora.2.weight"] = (out, rank)
                if name != "g":
                    layer[f"attn.{name}_lora.lora.2.bias"] = (out,)
            layer |= {
                "attn.k_k": (keys,),
                "attn.k_a": (keys,),
                "attn.r_k": (heads, keys // heads),
                "ffn.x_k": (d,),
                "ffn.key.weight": (mlp, d),
                "ffn.value.weight": (d, mlp),
            }
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (d,), "model.norm.bias": (d,)}


# Part of a name -> (least, greatest), for all that is neither a matrix nor a norm.
RANGES = {
    "time_mix": (0, 1),
    "time_maa": (0, 1),
    "att.x_": (0, 1),
    "ffn.x_k": (0, 1),
    "attn.x_": (0, 1),
    ".mu": (0, 1),
    "time_decay": (-5, 0.5),
    "w_proj.linear.lora.2.bias": (-5, 0.5),
    "att.w0": (-5, 2),
    "w_lora.lora.2.bias": (-5, 2),
    "time_f": (-1, 1),
    "bonus": (-1, 1),
    "k_k": (0.5, 1),
    "k_a": (0.8, 1.2),
    "r_k": (-0.3, 0.3),
}


def random_weights(shapes, seed=0):
    """Float32 tensors that a trained model could have: every term of the equations counts."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=generator)
        least, greatest = next((v for part, v in RANGES.items() if part in name), (None, None))
        if name.endswith(("_w1", "_w2")) or "x_proj" in name and name.endswith("weight"):
            least = None
        if least is not None:
            x = least + (greatest - least) * torch.rand(shape, generator=generator)
        elif name.endswith(("bias", "a0", "v0")):
            x = 0.3 * x
        elif len(shape) == 1:
            x = 1 + 0.3 * x
        elif len(shape) == 2:
            # As many inputs as the matrix has, on the side where they are.
            inputs = shape[0] if name.endswith(("1", "2")) else shape[1]
            x = x * inputs**-0.5
        else:
            x = 0.3 * x
        tensors[name] = x
    return tensors
