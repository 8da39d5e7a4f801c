"""Small checkpoints in the two layouts of Transformer-XL, as shapes by their own names."""

CONFIGS = {
    "transfo-xl-hf": {
        "model_type": "transfo-xl",
        "vocab_size": 19,
        "n_layer": 2,
        "n_head": 2,
        "d_model": 16,
        "d_embed": 16,
        "d_head": 6,
        "d_inner": 24,
        "div_val": 2,
        "cutoffs": [4, 9],
        "mem_len": 8,
        "clamp_len": 5,
        "tgt_len": 7,
        "tie_projs": [False, True, True],
        # What the file of the published model says beside.
        "adaptive": True,
        "dropout": 0.1,
        "sample_softmax": -1,
        "task_specific_params": {"text-generation": {"max_length": 250}},
    },
    "transformer-xl": {
        "n_token": 19,
        "n_layer": 2,
        "n_head": 2,
        "d_model": 16,
        "d_head": 6,
        "d_inner": 24,
        "tgt_len": 7,
        "mem_len": 8,
        "cutoffs": [4, 9],
    },
}


def shapes(format):
    """The shapes of their tensors by their names, what is tied left out."""
    is_hf = format == "transfo-xl-hf"
    before, found = ("transformer." if is_hf else ""), {}
    for layer in range(2):
        attention = f"{before}layers.{layer}.dec_attn"
        mlp = f"{before}layers.{layer}.pos_ff"
        found |= {f"{x}.layer_norm.{kind}": (16,) for x in (attention, mlp) for kind in KINDS}
        found |= {f"{attention}.qkv_net.weight": (36, 16), f"{attention}.r_net.weight": (12, 16)}
        found |= {f"{attention}.o_net.weight": (16, 12)}
        found |= {f"{mlp}.CoreNet.0.weight": (24, 16), f"{mlp}.CoreNet.0.bias": (24,)}
        found |= {f"{mlp}.CoreNet.3.weight": (16, 24), f"{mlp}.CoreNet.3.bias": (16,)}
        if is_hf:  # untied
            found |= {f"{attention}.{x}": (2, 6) for x in ("r_w_bias", "r_r_bias")}
    found |= {"crit.cluster_weight": (2, 16), "crit.cluster_bias": (2,)}
    if not is_hf:  # of one width: one table
        found |= {"r_w_bias": (2, 6), "r_r_bias": (2, 6)}
        return found | {"word_emb.emb_layers.0.weight": (19, 16), "crit.out_layers.0.bias": (19,)}
    found["crit.out_projs.0"] = (16, 16)
    for cluster, (size, width) in enumerate(((4, 16), (5, 8), (10, 4))):
        found[f"{before}word_emb.emb_layers.{cluster}.weight"] = (size, width)
        found[f"{before}word_emb.emb_projs.{cluster}"] = (16, width)
        found[f"crit.out_layers.{cluster}.bias"] = (size,)
    return found


def tied(format):
    """What a saved state dict holds once more: its name -> the name of the same tensor."""
    if format == "transformer-xl":
        return {"crit.out_layers.0.weight": "word_emb.emb_layers.0.weight"}
    words = {
        f"crit.out_layers.{c}.weight": f"transformer.word_emb.emb_layers.{c}.weight"
        for c in range(3)
    }
    return words | {f"crit.out_projs.{c}": f"transformer.word_emb.emb_projs.{c}" for c in (1, 2)}


KINDS = ("weight", "bias")
