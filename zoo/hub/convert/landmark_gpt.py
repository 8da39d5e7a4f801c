"""Landmark attention in GPT's block, as its authors trained it on PG-19 and arXiv (lm_benchmark).

Their ckpt.pt with the arguments of training beside it: summary.json there, config.json here (copy
it; what is in "args" counts). LayerNorms without bias, an exact gelu, q, k and v in one matrix, the
embedding as the projection onto the vocabulary, RoPE of adjacent channels, where we turn (j, j +
K / 2): so the rows of queries and keys are in another order, which is exact.

A token after a block is predicted from the block's last token here, as where their cache puts in
landmarks: it drops the logits of those. Set landmark_predicts_next for a model whose training text
had landmarks in it as targets.

What is not copied: with retrieval (lm_cache "mem") and exactly as many finished blocks as are read,
their query stands a block too early, so that the newest block has places at it and behind it. Here
a model reads all blocks, or with retrieved_blocks those that landmark-llama's code would.
"""

import torch

from ...models.landmark import LandmarkConfig
from ..lazy import value_of
from .format import Fields, Format, read_by_name, split_tensor
from .mistral_consolidated import halves_of

EPS = 1e-5
LANDMARK_ID = 50260  # of their script, whatever the vocabulary
OTHER_MODELS = {
    "enable_rem_score": "scores of the remainder have no counterpart here",
    "pos_jump_on_mem": "positions that jump at landmarks have no counterpart here",
    "under_rem_score_prob": "scores of the remainder have no counterpart here",
    "rem_cutoff": "scores of the remainder have no counterpart here",
}
SIZES = {"vocab_size", "n_embd", "n_head", "n_layer"}
# Of training, evaluation and retrieval, which are no part of a model.
LEFT_OUT = (
    "dropout group_dropout dtype max_groups_for_softmax use_cache lm_cache mem_cache_size "
    "cache_topk cache_selection_method eval_seq_length eval_sample_size mid_length "
    "allow_cache_during_training postpone_lm_cache optimization_process total_sequence_length "
    "batch_size acc_steps seed device iterations lr warmup_percent weight_decay beta1 beta2 "
    "scheduler opt eval_freq results_base_folder save_checkpoint_freq dataset no_compile "
    "run_prefix exp_name wandb wandb_project distributed_backend config_format"
).split()


def is_one(config, names):
    """Whether a config.json and names of tensors are of this format."""
    values = _arguments(config)
    return (
        values.keys() >= SIZES
        and not values.keys().isdisjoint(("landmark_id", "mem_freq", "mem_cache_freq"))
        and (not names or any(name.endswith("attn.c_attn.weight") for name in names))
    )


def _arguments(values):
    args = values.get("args")
    return args if isinstance(args, dict) else values


def read_config(fields, weights):
    """Our config from the arguments of their training."""
    args = _arguments(fields.values)
    if args is not fields.values:
        fields.take("args")
        fields.drop("results, not the model", *(fields.unread - {"args"}))
        args = Fields(args, fields.file)
        args.notes = fields.notes
    else:
        args = fields
    for name, reason in OTHER_MODELS.items():
        args.refuse(name, reason)
    args.drop("in training, evaluation or retrieval alone", *LEFT_OUT)
    if args.take("model", "landmark") != "landmark":
        raise ValueError(
            f"{args.file} has model = {args.values['model']!r}: expected 'landmark', whose "
            "attention this is."
        )
    if args.take("positional_encoder", "rotary") != "rotary":
        raise ValueError(
            f"{args.file} has positional_encoder = {args.values['positional_encoder']!r}: expected "
            "'rotary'."
        )
    softmax = args.take("softmax_func", "mem_opt")
    if softmax not in ("mem_opt", "mem"):
        raise ValueError(
            f"{args.file} has softmax_func = {softmax!r}: expected 'mem_opt' or 'mem', the softmax "
            "in groups."
        )
    args.refuse("bias", "the converter knows matrices and norms without bias")
    width = args.take("n_embd", kind=int)
    block = args.take("mem_freq", None) or args.values.get("mem_cache_freq")
    args.take("mem_cache_freq", None)
    if not block:
        raise ValueError(
            f"{args.file} has neither mem_freq nor mem_cache_freq, the tokens of a block; add one."
        )
    config = LandmarkConfig(
        vocab_size=args.take("vocab_size"),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=args.take("n_layer", kind=int),
        num_attention_heads=args.take("n_head", kind=int),
        hidden_act="gelu",
        gated_mlp=False,
        norm_type="layer",
        rms_norm_eps=EPS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        max_position_embeddings=args.take("sequence_length", None),
        block_length=block,
        landmark_token_id=args.take("landmark_id", LANDMARK_ID),
        tie_word_embeddings=True,
    )
    if args is not fields:
        args.finish()
    return config


def read_weights(weights, config):
    """Pairs of our name and their tensor."""
    # What PyTorch's compiler puts before names, and a mask that follows from the arguments.
    prefix = "_orig_mod." if any(x.startswith("_orig_mod.") for x in weights.tensors) else ""
    heads, width = config.num_attention_heads, config.hidden_size
    to_halves = halves_of(heads)
    head, embedding = (f"{prefix}{x}.weight" for x in ("lm_head", "transformer.wte"))
    if head in weights.tensors and embedding in weights.tensors:
        if not torch.equal(value_of(weights.take(head)), value_of(weights.tensors[embedding])):
            raise ValueError(f"{head} and {embedding} differ, which are one matrix in this format.")
    for layer in range(config.num_hidden_layers):
        here, there = f"model.layers.{layer}", f"{prefix}transformer.h.{layer}"
        if f"{there}.attn.bias" in weights.tensors:
            weights.take(f"{there}.attn.bias")
        changes = (
            lambda x: to_halves(x[:width]),
            lambda x: to_halves(x[width : 2 * width]),
            lambda x: x[2 * width :],
        )
        parts = split_tensor(weights, f"{there}.attn.c_attn.weight", changes)
        for name, part in zip("qkv", parts, strict=True):
            yield f"{here}.mixer.{name}_proj.weight", part
    yield from read_by_name(weights, config, tensor_names(config, prefix), {})


def tensor_names(config, prefix):
    """Our name and theirs of each tensor that is one of theirs."""
    yield "model.embed_tokens.weight", f"{prefix}transformer.wte.weight"
    yield "model.norm.weight", f"{prefix}transformer.ln_f.weight"
    parts = {
        "mixer_norm": "ln_1",
        "mlp_norm": "ln_2",
        "mixer.out_proj": "attn.c_proj",
        "mlp.up_proj": "mlp.c_fc",
        "mlp.down_proj": "mlp.c_proj",
    }
    for layer in range(config.num_hidden_layers):
        for ours, theirs in parts.items():
            yield (
                f"model.layers.{layer}.{ours}.weight",
                f"{prefix}transformer.h.{layer}.{theirs}.weight",
            )


FORMAT = Format(
    name="landmark-gpt",
    title="landmark attention in GPT's block, its authors' lm_benchmark",
    recognizes=is_one,
    expects="n_layer, n_head, n_embd, vocab_size and mem_freq, and c_attn weights",
    read_config=read_config,
    read_weights=read_weights,
    tokenizer="save transformers' GPT-2 tokenizer, whose ids it was trained on, to {dst}",
)
