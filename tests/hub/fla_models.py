"""The models that are compared with flash-linear-attention's classes, with it and without."""

import json
import math
import zlib
from pathlib import Path

import torch

import zoo

RECORD = Path(__file__).parent / "fla_classes.json"
SIZES = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
RETNET = SIZES | {"num_attention_heads": 4} | zoo.RetNetConfig.variants["fla"]
RWKV6 = SIZES | {"num_attention_heads": 2, "mix_lora_rank": 4, "decay_lora_rank": 5}
RWKV6 |= {"head_norm_eps": 1e-5}
RANKS = {f"{name}_lora_rank": 4 + i for i, name in enumerate(("decay", "rate", "value", "gate"))}
RWKV7 = SIZES | {"head_size": 16, "head_norm_eps": 16e-5} | RANKS
DELTA = SIZES | {"num_attention_heads": 4, "head_dim": 8}
CONFIGS = {
    "retnet": ("retnet", RETNET | {"bos_token_id": 3, "eos_token_id": 4}),
    "retnet-groups": (
        "retnet",
        RETNET | {"num_key_value_heads": 2, "key_size": 64, "head_norm_weight": False},
    ),
    "rwkv6": ("rwkv6", RWKV6),
    "rwkv6-narrow": (
        "rwkv6",
        RWKV6 | {"key_size": 16, "tie_word_embeddings": True, "embedding_norm": False},
    ),
    "rwkv7": ("rwkv7", RWKV7),
    "rwkv7-fused": ("rwkv7", RWKV7 | {"removal_eps": 1e-6, "tie_word_embeddings": True}),
    "gated-deltanet": ("gated_deltanet", DELTA),
    "gated-deltanet-groups": (
        "gated_deltanet",
        DELTA | {"num_key_heads": 2, "head_dim": 10, "value_head_dim": 14, "conv_size": 3},
    ),
    "gated-deltanet-tied": ("gated_deltanet", DELTA | {"tie_word_embeddings": True}),
}


def shape_in_words(x):
    """As the record has it: "67 x 32"."""
    return " x ".join(map(str, x.shape))


def recorded_weights(name):
    """Tensors of the names and shapes on record, as fla's class had them when that was made."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))["models"][name]
    return weights_of(record["shapes"], record["fields"]["tie_word_embeddings"])


def weights_of(shapes, is_tied):
    """Tensors that follow from their names alone, on every machine, and differ everywhere.

    Args:
        shapes: name of fla's -> shape, in words.
        is_tied: whether the embedding is the output matrix, which is left out then.
    """
    weights = {}
    for name, words in shapes.items():
        if is_tied and name == "lm_head.weight":
            continue
        shape = [int(size) for size in words.split(" x ")]
        count = math.prod(shape)
        phase = torch.arange(count, dtype=torch.float64) * 1.7 + zlib.crc32(name.encode()) % 997
        # Waves of two lengths do not repeat themselves from row to row.
        x = (phase.sin() + (phase * 0.37).cos()) / 2
        is_scale = "norm" in name and name.endswith("weight")
        x = 1 + 0.2 * x if is_scale else x * (shape[-1] ** -0.5 if len(shape) > 1 else 0.5)
        weights[name] = x.view(shape).float()
    return weights


IDS = [[5, 66, 0, 31, 7, 7, 12, 48, 3, 59, 20, 1]]


def random_model(architecture, fields):
    """A small language model whose every weight matters."""
    torch.manual_seed(0)
    found = zoo.MODELS[architecture]
    model = found.causal_lm(found.config(**fields)).eval()
    with torch.no_grad():
        for p in model.parameters():
            # Away from where a model starts, so that no weight can be lost without a trace.
            p += 0.1 * torch.randn_like(p)
    return model
