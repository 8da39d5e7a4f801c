"""Held-out loss by position within a window, and at other context lengths."""

import dataclasses
import inspect

import torch
from torch.nn.functional import cross_entropy

from tasks import load

from .corpus import collate
from .measuring import held_out_bits_per_byte, own_slices
from .recipe import UsageError
from .reporting import bits_per_byte
from .slicing import NOT_SCORED, share_of


def check_lengths(recipe, model, corpus):
    """Refuses lengths that model or text do not have, before anything is trained.

    Args:
        recipe: of the run.
        model: the language model.
        corpus: all the text of the run, or its task.

    Raises:
        UsageError: one of `eval_lengths` or `eval_contexts`, or an example of the task, is too
            long.
    """
    table = getattr(model.base_model, "embed_positions", None)
    asked = {"eval_lengths are": recipe.eval_lengths, "eval_contexts are": recipe.eval_contexts}
    if recipe.task:
        task = load(recipe.task)
        lengths = [task.length_of(settings) for settings in task.tests().values()]
        asked["the examples of a task and its tests have"] = lengths
    for whose, lengths in asked.items():
        longest = max(lengths, default=0)
        if table is not None and longest > table.num_embeddings:
            raise UsageError(
                f"{whose} at most {table.num_embeddings} tokens, the positions that the model "
                f"has, got {longest}."
            )
    if recipe.eval_contexts:
        check_text_for(recipe.eval_contexts, corpus.held_out, "eval_contexts", "eval_bytes")


def check_text_for(contexts, tokens, called, remedy):
    """Raises a UsageError if held-out text does not fill a window of the longest context."""
    num_targets = len(tokens.ids) - 1
    if max(contexts) > num_targets:
        raise UsageError(
            f"{called} are at most {num_targets} here, the tokens of held-out text, got "
            f"{max(contexts)}; use shorter ones, or more text (a larger {remedy} or more data)."
        )


def by_position_and_length(accelerator, model, tokens, recipe):
    """What `eval_positions`, `eval_lengths` and `eval_contexts` ask for, by name; {} for nothing.

    Args:
        accelerator: of the run.
        model: the language model.
        tokens: held-out text.
        recipe: of the run.

    Returns:
        "nats_at/<first>-<last position>" -> nats per token, "bits_per_byte_at/<length>" and
        "bits_per_byte_in_context/<length>" -> bits.
    """
    figures, length = {}, recipe.sequence_length
    if recipe.eval_positions:
        nats = nats_by_bucket(accelerator, model, tokens, recipe)
        figures |= dict(zip(bucket_names(length, len(nats)), nats))
    for other in recipe.eval_lengths:
        size = max(1, recipe.eval_batch_size * length // other)  # about as many tokens at once
        changed = {"sequence_length": other, "eval_batch_size": size, "eval_positions": 0}
        changed |= {"context_schedule": [], "sequence_parallel": 1}  # of training
        figures[f"bits_per_byte_at/{other}"] = held_out_bits_per_byte(
            accelerator, model, tokens, dataclasses.replace(recipe, **changed)
        )
    if recipe.eval_contexts:
        at_once = recipe.eval_batch_size * length
        contexts = recipe.eval_contexts, at_once, recipe.packing
        found = bits_per_byte_by_context(accelerator, model, tokens, *contexts)
        figures |= {f"bits_per_byte_in_context/{other}": bits for other, bits in found.items()}
    return figures


def bucket_names(length, count):
    """What the figures of `count` parts of a window are called, first to last."""
    firsts = [-(-n * length // count) for n in range(count + 1)]
    return [f"nats_at/{first}-{after - 1}" for first, after in zip(firsts, firsts[1:])]


@torch.no_grad()
def nats_by_bucket(accelerator, model, tokens, recipe):
    """Mean nats per token in each of `eval_positions` equal parts of a window, first to last."""
    model = accelerator.unwrap_model(model, keep_torch_compile=False)
    model.eval()
    buckets, length = recipe.eval_positions, recipe.sequence_length
    sums = torch.zeros(2, buckets, device=accelerator.device)
    for first, batch in own_slices(accelerator, model, tokens, recipe):
        targets_BT = batch.pop("shift_labels")
        logits = model(**batch, use_cache=False).logits.float()
        nats_BT = cross_entropy(logits.mT, targets_BT, reduction="none")
        position_T = first + torch.arange(nats_BT.shape[1], device=nats_BT.device)
        bucket_T = position_T * buckets // length
        sums[0].index_add_(0, bucket_T, nats_BT.sum(0))
        sums[1].index_add_(0, bucket_T, (targets_BT != -100).float().sum(0))
    model.train()
    nats, count = accelerator.reduce(sums, "sum")
    return (nats / count).tolist()


def target_nats(model, inputs, targets_BS):
    """The loss of the last targets of windows, of any causal language model.

    Args:
        model: of transformers, or with its interface.
        inputs: what it is called with, with input_ids [B, T].
        targets_BS: [B, S], the tokens after the last S of each window; -100: not scored.

    Returns:
        Nats [B, S] in float32, 0 where nothing is scored.
    """
    num_scored = targets_BS.shape[1]
    if "logits_to_keep" in inspect.signature(type(model).forward).parameters:
        inputs = {**inputs, "logits_to_keep": num_scored}
    logits = model(**inputs, use_cache=False).logits[:, -num_scored:]
    # Row by row: in float32 the logits of a large vocabulary take more memory than the model.
    rows = zip(logits, targets_BS)
    return torch.stack([cross_entropy(x.float(), y, reduction="none") for x, y in rows])


@torch.no_grad()
def bits_per_byte_by_context(
    accelerator, model, tokens, lengths, at_once, packing="concat", among=None
):
    """Bits per byte of the same targets, from contexts of several lengths.

    The text is cut into windows of the longest length L, one after the other, and the last S tokens
    of each are the targets, S the shortest length. For every length C they are predicted from a
    window of C tokens that ends with them, so the first of them sees C - S + 1 tokens and the last
    one C. Documents are kept apart as in training. What is left of the text, and with it all but
    S / L of its tokens, is context alone: a length costs one pass over the text at most.

    Bytes are counted by the text's mean length of a token: curves of models with the same tokenizer
    compare.

    Args:
        accelerator: of the run.
        model: the language model.
        tokens: held-out text, of L + 1 tokens at least.
        lengths: of contexts, in tokens.
        at_once: tokens that a process runs at once, at most if a window is no longer.
        packing: of the recipe.
        among: the lengths of which L is the longest and S the shortest; None: `lengths`. So
            lengths that are measured one by one have the same targets.

    Returns:
        Length -> bits per byte, in the order of `lengths`.
    """
    model = accelerator.unwrap_model(model, keep_torch_compile=False)
    model.eval()
    among = among or lengths
    found, shortest, longest = {}, min(among), max(among)
    ends = range(longest, len(tokens.ids), longest)
    for length in lengths:
        sums = torch.zeros(2, device=accelerator.device)
        size = max(1, at_once // length)
        for inputs, targets_BS in _ends_of_windows(
            share_of(accelerator, model), tokens, ends, length, shortest, size, packing
        ):
            inputs = {key: tensor.to(accelerator.device) for key, tensor in inputs.items()}
            targets_BS = targets_BS.to(accelerator.device)
            sums[0] += target_nats(model, inputs, targets_BS).sum()
            sums[1] += (targets_BS != -100).sum()
        nats, count = accelerator.reduce(sums, "sum").tolist()
        found[length] = bits_per_byte(nats / count * tokens.num_targets, tokens.num_bytes)
    model.train()
    return found


def _ends_of_windows(share, tokens, ends, length, num_scored, size, packing):
    """A process's part of windows of `length` tokens that end at `ends`, and their last targets.

    Of a slice before all targets the last one is there, and not scored.
    """
    rank, world = share.rank, share.world
    first, after = share.bounds(length)
    num_own = max(1, min(after - first, after - (length - num_scored)))
    groups = [ends[i : i + size] for i in range(0, len(ends), size)]
    # As in `held_out_batches`, processes go the same number of rounds.
    for index in range(rank, -(-len(groups) // world) * world, world):
        group = groups[min(index, len(groups) - 1)]
        windows = [tokens.window(end - length, length, packing) for end in group]
        batch = collate(windows, packing == "documents")
        batch["shift_labels"][:, :-num_scored] = NOT_SCORED
        if index >= len(groups):
            batch["shift_labels"].fill_(NOT_SCORED)
        batch = share.cut(batch)
        targets_BS = batch.pop("shift_labels")[:, -num_own:]
        yield batch, targets_BS
