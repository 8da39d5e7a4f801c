"""lucidrains' infini-transformer-pytorch, linear and delta, with learned updates too.

The package saves weights alone; config.json beside them is to hold the arguments its
InfiniTransformer was made with (num_tokens, dim, depth, ...) and its wrapper's segment_length. Its
gate is on the local part, so that ours is minus theirs. RoPE turns pairs (2j, 2j + 1) there, and
(j, j + K/2) here: rows of queries and keys change places, of the memory too. With learned updates
its token-by-token mode weighs a whole segment like its last token; ours is its way of whole ones.
"""

import torch

from ...models.infini import InfiniConfig
from .format import MAKE_A_TOKENIZER, Format

# Its norm is x / max(|x|, 1e-12): an epsilon that no hidden state feels.
NORM_EPS = 1e-30


def is_one(config, names):
    """Whether a config.json is of this format."""
    return {"num_tokens", "dim", "depth"} <= config.keys()


def read_config(fields, weights):
    """Our config from its arguments."""
    fields.drop("dropout in training alone", "attn_dropout", "ff_dropout")
    fields.drop("it is how to run, not what to compute", "detach_mems_every_num_segments")
    width = fields.take("dim", kind=int)
    segment = fields.take("segment_length", None)
    if segment is None:
        segment = 512
        fields.notes.append(
            "segment_length is 512, the default of its wrapper; add it to config.json if the model "
            "was trained with another"
        )
    delta = fields.take("use_mem_delta_rule", False)
    if not isinstance(delta, bool):
        fields.notes.append(
            f"use_mem_delta_rule is {delta!r}, neither true nor false: read as false; set "
            "memory_update in the config that was written for the delta rule"
        )
        delta = False
    return InfiniConfig(
        vocab_size=fields.take("num_tokens", kind=int),
        hidden_size=width,
        intermediate_size=int(width * fields.take("ff_mult", 4) * 2 / 3),
        num_hidden_layers=fields.take("depth", kind=int),
        num_attention_heads=fields.take("heads", 8, kind=int),
        head_dim=fields.take("dim_head", 128, kind=int),
        segment_length=segment,
        memory_update="delta" if delta else "linear",
        gates_first_segment=False,
        learned_update=fields.take("learned_delta_update", False),
        gate_init=-10.0,
        hidden_act="gelu",
        mlp_bias=True,
        lm_head_bias=True,
        rms_norm_eps=NORM_EPS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
    )


def read_weights(weights, config):
    """Pairs of our name and their tensor, or part of it."""
    heads, head_dim = config.num_attention_heads, config.head_dim

    def parts(name, num_parts):
        joined = weights.take(name)
        return [None] * num_parts if joined is None else joined.chunk(num_parts)

    def halves(x):
        """Rows of pairs (2j, 2j + 1) of each head, moved to (j, j + K/2)."""
        if x is None:
            return None
        return x.unflatten(0, (heads, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)

    yield "model.embed_tokens.weight", weights.take("token_emb.weight")
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}", f"layers.{layer}"
        steps = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
        weights.drop_constant(f"{theirs}.0.rotary_emb.freqs", 10000.0**-steps)
        q, k, v = parts(f"{theirs}.0.to_qkv.weight", 3)
        yield f"{ours}.mixer.q_proj.weight", halves(q)
        yield f"{ours}.mixer.k_proj.weight", halves(k)
        yield f"{ours}.mixer.v_proj.weight", v
        gate = weights.take(f"{theirs}.0.fastweight_mem.head_gates", change=torch.neg)
        yield f"{ours}.mixer.gate", gate
        if config.learned_update:
            update = f"{theirs}.0.to_learned_delta_update_weights.0.weight"
            yield f"{ours}.mixer.update_proj.weight", weights.take(update)
        for kind in ("weight", "bias"):
            # The first half of its MLP is the value, the second the gate.
            up, gate = parts(f"{theirs}.1.proj_in.{kind}", 2)
            yield f"{ours}.mlp.up_proj.{kind}", up
            yield f"{ours}.mlp.gate_proj.{kind}", gate
            yield f"{ours}.mlp.down_proj.{kind}", weights.take(f"{theirs}.1.proj_out.{kind}")
        yield f"{ours}.mixer.out_proj.weight", weights.take(f"{theirs}.0.to_out.weight")
        yield f"{ours}.mixer_norm.weight", weights.take(f"{theirs}.0.norm.gamma")
        yield f"{ours}.mlp_norm.weight", weights.take(f"{theirs}.1.norm.gamma")
    yield "model.norm.weight", weights.take("norm.gamma")
    for kind in ("weight", "bias"):
        yield f"lm_head.{kind}", weights.take(f"to_logits.{kind}")


FORMAT = Format(
    name="infini-lucidrains",
    title="lucidrains' infini-transformer-pytorch, linear and delta memory",
    recognizes=is_one,
    expects="a config.json with its InfiniTransformer's arguments: num_tokens, dim, depth, ...",
    read_config=read_config,
    read_weights=read_weights,
    tokenizer=MAKE_A_TOKENIZER,
)
