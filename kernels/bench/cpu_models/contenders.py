"""The models that are timed: every architecture of ours, and transformers' own beside them.

All have as many parameters, embeddings and output projection aside, as a Mistral of that size, by
the width of their MLPs (transformers' Mamba2 has none: twice as many layers of half the size).
"""

import copy
from typing import NamedTuple

import torch
from torch import nn
from transformers import (
    Mamba2Config,
    Mamba2ForCausalLM,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

import zoo
from zoo.core.state import StateLayer, state_bytes

COMPILED = " compiled"  # at the end of a name
HEAD = 64  # width of a head
LARGEST = 3 * 2**30  # bytes of a contender's state, of which several are held at once


class Size(NamedTuple):
    """Layers, width, tokens of the vocabulary, and the width of Mistral's MLP."""

    layers: int
    width: int
    vocab: int
    mlp: int


SIZES = {
    "6 x 512": Size(6, 512, 8192, 1536),
    "12 x 768": Size(12, 768, 50304, 2304),
}
QUICK = {"2 x 128": Size(2, 128, 256, 384)}
# Contenders that take turns. Each group has MISTRAL too, which all are compared with: all models
# at once would not fit in memory.
MISTRAL = "transformers Mistral"
GROUPS = {
    "rwkv": ["rwkv4", "rwkv5", "rwkv6", "rwkv7", "transformers RWKV-4"],
    "linear": ["retnet", "gated_deltanet", "lightning", "transformers MiniMax"],
    "attention": ["sliding_window", "rmt", "transformer_xl", "longnet", "block_recurrent"],
    "memories": ["infini", "landmark", "long_llama", "transformers Mamba2"],
}
PEERS = {
    "rwkv": ["rwkv package RWKV-4", "rwkv package RWKV-7", "llama.cpp RWKV-7"],
    "linear": [],
    "attention": ["llama.cpp Mistral"],
    "memories": [],
}
# Whose formula of FLOPs theirs is, at the same width of the MLP.
SAME = {MISTRAL: "sliding_window", "transformers RWKV-4": "rwkv4"}
# With --compile: these by torch.compile, beside themselves without.
COMPILABLE = ("rwkv7", "lightning", "sliding_window", MISTRAL)


def theirs(name, size, mlp):
    """(config, class) of one of transformers' models."""
    heads = size.width // HEAD
    ids = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    sizes = {"vocab_size": size.vocab, "hidden_size": size.width, **ids}
    layers = {"num_hidden_layers": size.layers}
    many = {"num_attention_heads": heads, "num_key_value_heads": heads, "intermediate_size": mlp}
    if name == MISTRAL:
        return MistralConfig(**sizes, **layers, **many), MistralForCausalLM
    if name == "transformers RWKV-4":
        return RwkvConfig(**sizes, **layers, intermediate_size=mlp), RwkvForCausalLM
    if name == "transformers MiniMax":
        # Without experts, and every layer the linear one: what our Lightning Attention is.
        one = {"num_local_experts": 1, "num_experts_per_tok": 1}
        one["layer_types"] = ["linear_attention"] * size.layers
        return MiniMaxConfig(**sizes, **layers, **many, **one), MiniMaxForCausalLM
    layers = {"num_hidden_layers": 2 * size.layers}
    inner = {"num_heads": 2 * heads, "head_dim": HEAD, "n_groups": 1}
    return Mamba2Config(**sizes, **layers, **inner), Mamba2ForCausalLM


def ours(name, size, mlp):
    """(config, class) of one of our architectures, default variant."""
    found = zoo.MODELS[name]
    fields = {
        "vocab_size": size.vocab,
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.width // HEAD,
        "intermediate_size": mlp,
    }
    return found.config(**fields), found.causal_lm


def described(name, size, mlp):
    return (ours if name in zoo.MODELS else theirs)(name, size, mlp)


def without_embeddings(model):
    """Parameters beside embeddings and the output projection."""
    outside = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    outside |= {id(p) for p in model.get_output_embeddings().parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in outside)


def on_meta(name, size, mlp):
    config, kind = described(name, size, mlp)
    with torch.device("meta"):
        return kind(config)


def mlp_width(name, size):
    """The width of the MLP, a multiple of 32, that makes a model as large as Mistral.

    Parameters are affine in it, so two models without memory give the line.
    """
    if name == MISTRAL or name == "transformers Mamba2":
        return size.mlp
    target = without_embeddings(on_meta(MISTRAL, size, size.mlp))
    one, two = (without_embeddings(on_meta(name, size, width)) for width in (64, 128))
    return max(1, round((64 + (target - one) * 64 / (two - one)) / 32)) * 32


class Contender:
    """A model of ours or of transformers', and what is asked of it. `dtype` moves its weights.

    Args:
        name: in a group.
        size: of the model.
    """

    has_batches = can_train = True

    def __init__(self, name, size):
        torch.manual_seed(0)
        self.name, self.plain = name, name.removesuffix(COMPILED)
        plain = self.plain
        self.is_compiled = plain != name
        self.size, self.mlp = size, mlp_width(plain, size)
        config, kind = described(plain, size, self.mlp)
        self.model = kind(config).eval()
        self.call = torch.compile(self.model) if self.is_compiled else self.model
        # It would compile nothing by itself: its cache would have to be static.
        self.can_generate = not self.is_compiled
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.is_ours, self.prompts = plain in zoo.MODELS, {}
        special = {"transformers RWKV-4": "state", "transformers Mamba2": "cache_params"}
        self.cache_name = special.get(plain, "past_key_values")

    def to(self, dtype):
        self.prompts = {}
        self.model.to(dtype)

    def read(self, ids_BT, cache=None):
        """The cache after some tokens; of their logits, the last token's are computed."""
        cached = {} if cache is None else {self.cache_name: cache}
        output = self.call(ids_BT, **cached, use_cache=True, logits_to_keep=1)
        return getattr(output, self.cache_name)

    def prompt(self, ids_1T, rows):
        """A cache after one text in so many rows, a copy of one that is read once.

        Raises:
            MemoryError: the state of so many rows would not fit beside the others'.
        """
        of_one = self.is_ours or self.cache_name == "state" or self.name.startswith(MISTRAL)
        read = 1 if of_one else rows  # who cannot repeat rows reads them all
        known = self.dtype(), ids_1T.shape[1], read
        if known not in self.prompts:
            self.prompts[known] = self.read(ids_1T.expand(read, -1))
        cache = self.prompts[known]
        if self.is_ours and rows * state_bytes(cache) > LARGEST:
            raise MemoryError(
                f"the state of {rows} texts takes {rows * state_bytes(cache):,} bytes"
            )
        cache = copy.deepcopy(cache)
        if self.cache_name == "state":
            return [x.repeat_interleave(rows, dim=0) for x in cache]
        if rows > read:
            cache.batch_repeat_interleave(rows)
        return cache

    def dtype(self):
        return self.model.get_output_embeddings().weight.dtype

    def generate(self, ids_BT, cache, count, criteria):
        """Token ids after so many more of them; goes on from the cache, in place."""
        return self.model.generate(
            ids_BT,
            **{self.cache_name: cache},
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            stopping_criteria=criteria,
        )

    def loss(self, ids_BT):
        return self.call(ids_BT, labels=ids_BT, use_cache=False).loss

    def flops(self, length, is_training):
        """Of a pass over a text by `flops_per_token`, or None; a prefill has one token's logits."""
        model = self.model
        if not self.is_ours:
            if self.plain not in SAME:
                return None
            model = on_meta(SAME[self.plain], self.size, self.mlp)
        per_token = model.flops_per_token(length)
        if is_training:
            return 3 * per_token * length
        head = 2 * self.model.get_output_embeddings().weight.numel()
        return per_token * length - head * (length - 1)

    def decode_bytes(self, length, rows, cache=None):
        """Bytes that a step cannot do without: weights, rows of embeddings, state, or None.

        A recurrent state is read and written; of keys and values, those of the tokens so far are
        read, or as many as there is room for (a ring may be larger than the text).

        Args:
            length: tokens so far.
            rows: texts.
            cache: of all rows; a recurrent state or Mistral's needs none.
        """
        head = self.model.get_output_embeddings().weight
        tables = [m.weight for m in self.model.modules() if isinstance(m, nn.Embedding)]
        looked_up = [x for x in tables if x is not head]
        skipped = {id(x) for x in looked_up}
        total = sum(p.nbytes for p in self.model.parameters() if id(p) not in skipped)
        total += rows * sum(x[0].nbytes for x in looked_up)
        keys = rows * 2 * length * self.size.width * head.element_size()
        if self.plain == MISTRAL:
            return total + self.size.layers * keys
        if self.cache_name == "state":
            return total + 2 * sum(x.nbytes for x in cache)
        if not self.is_ours:
            return None
        if cache is None:
            return total + 2 * rows * self.model.state_size(length)
        for layer in cache.layers:
            held = sum(x.nbytes for x in layer.tensors.values())
            total += 2 * held if type(layer) is StateLayer else min(held, keys)
        return total
