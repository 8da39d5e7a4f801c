"""One process' slice of a batch, for sequence parallelism (zoo/core/parallel.py)."""

import torch

from .sequence import restarting_positions

NOT_SCORED = -100


def split_batch(batch, rank, size, bounds=None):
    """One process' slice of a batch, and what it has to know of its neighbours'.

    Labels are shifted before they are cut: the last token of a slice is scored on the first of the
    next one. Boundaries of documents become positions that restart.

    Args:
        batch: input_ids or inputs_embeds, and attention_mask, position_ids, seq_idx,
            cu_seq_lens_q, labels or shift_labels as a causal language model takes them.
        rank, size: the process, and how many there are.
        bounds: [size + 1] columns where slices begin and end; None: as equal as they can be.

    Returns:
        The arguments of this process: tensors are contiguous, `labels` are `shift_labels` now.

    Raises:
        ValueError: fewer columns than processes; bounds that do not fit; an unknown argument.
    """
    batch = dict(batch)
    ids = batch.get("input_ids")
    tokens = ids if ids is not None else batch["inputs_embeds"]
    time = tokens.shape[1]
    if bounds is None:
        bounds = [time * number // size for number in range(size + 1)]
    grows = all(a < b for a, b in zip(bounds, bounds[1:]))
    if not grows or len(bounds) != size + 1 or bounds[0] != 0 or bounds[-1] != time:
        raise ValueError(
            f"expected bounds of {size} slices that grow from 0 to the {time} columns of the "
            f"batch, at least one column each, got {list(bounds)}; use fewer processes for a text "
            "this short, or other bounds."
        )
    cu_seqlens, seq_idx = batch.pop("cu_seq_lens_q", None), batch.pop("seq_idx", None)
    if cu_seqlens is not None or seq_idx is not None:
        batch["position_ids"] = restarting_positions(
            tuple(tokens.shape[:2]),
            batch.get("attention_mask"),
            batch.get("position_ids"),
            cu_seqlens,
            seq_idx,
            None,
        )
    labels = batch.pop("labels", None)
    if labels is not None and batch.get("shift_labels") is None:
        batch["shift_labels"] = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=NOT_SCORED)
    names = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "shift_labels")
    for name, x in batch.items():
        if name not in names:
            raise ValueError(
                f"split_batch knows {', '.join(names)}, seq_idx, cu_seq_lens_q and labels, got "
                f"{name!r}; leave it out."
            )
        if x is not None:
            batch[name] = x[:, -time:][:, bounds[rank] : bounds[rank + 1]].contiguous()
    return batch
