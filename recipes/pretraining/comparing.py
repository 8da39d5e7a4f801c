"""Held-out loss by position within a window, and at other context lengths."""

import dataclasses

import torch
from torch.nn.functional import cross_entropy

from tasks import load

from .measuring import held_out_bits_per_byte, own_batches
from .recipe import UsageError


def check_lengths(recipe, model):
    """Refuses lengths that a model has no positions for, before it is trained.

    Raises:
        UsageError: one of `eval_lengths`, or an example of the task, is too long.
    """
    table = getattr(model.base_model, "embed_positions", None)
    lengths, whose = recipe.eval_lengths, "eval_lengths are"
    if recipe.task:
        task = load(recipe.task)
        lengths = [task.length_of(settings) for settings in task.tests().values()]
        whose = "the examples of a task and its tests have"
    longest = max(lengths, default=0)
    if table is not None and longest > table.num_embeddings:
        raise UsageError(
            f"{whose} at most {table.num_embeddings} tokens, the positions that the model "
            f"has, got {longest}."
        )


def by_position_and_length(accelerator, model, tokens, recipe):
    """What `eval_positions` and `eval_lengths` ask for, by name; {} if they ask for nothing.

    Args:
        accelerator: of the run.
        model: the language model.
        tokens: held-out text.
        recipe: of the run.

    Returns:
        "nats_at/<first>-<last position>" -> nats per token, "bits_per_byte_at/<length>" -> bits.
    """
    figures, length = {}, recipe.sequence_length
    if recipe.eval_positions:
        nats = nats_by_bucket(accelerator, model, tokens, recipe)
        firsts = [-(-n * length // len(nats)) for n in range(len(nats) + 1)]
        names = [f"nats_at/{first}-{after - 1}" for first, after in zip(firsts, firsts[1:])]
        figures |= dict(zip(names, nats))
    for other in recipe.eval_lengths:
        size = max(1, recipe.eval_batch_size * length // other)  # about as many tokens at once
        changed = {"sequence_length": other, "eval_batch_size": size, "eval_positions": 0}
        changed["context_schedule"] = []  # of training
        figures[f"bits_per_byte_at/{other}"] = held_out_bits_per_byte(
            accelerator, model, tokens, dataclasses.replace(recipe, **changed)
        )
    return figures


@torch.no_grad()
def nats_by_bucket(accelerator, model, tokens, recipe):
    """Mean nats per token in each of `eval_positions` equal parts of a window, first to last."""
    model = accelerator.unwrap_model(model, keep_torch_compile=False)
    model.eval()
    buckets, length = recipe.eval_positions, recipe.sequence_length
    sums = torch.zeros(2, buckets, device=accelerator.device)
    for batch in own_batches(accelerator, tokens, recipe):
        targets_BT = batch.pop("shift_labels")
        logits = model(**batch, use_cache=False).logits.float()
        nats_BT = cross_entropy(logits.mT, targets_BT, reduction="none")
        bucket_T = torch.arange(nats_BT.shape[1], device=nats_BT.device) * buckets // length
        sums[0].index_add_(0, bucket_T, nats_BT.sum(0))
        sums[1].index_add_(0, bucket_T, (targets_BT != -100).float().sum(0))
    model.train()
    nats, count = accelerator.reduce(sums, "sum")
    return (nats / count).tolist()
