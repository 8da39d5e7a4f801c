"""What is measured of any causal language model: text, state, speed."""

import math
import statistics
import time
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from pretraining.comparing import bucket_names, target_nats
from pretraining.measuring import own_batches
from pretraining.reporting import bits_per_byte
from zoo.contract.subject import cache_tensors


@dataclass
class Here:
    """One process, for measurements that ask an accelerator which part is theirs.

    Attributes:
        device: where the model is.
    """

    device: torch.device
    process_index: int = 0
    num_processes: int = 1

    def reduce(self, tensor, how):
        """The sum over all processes."""
        return tensor

    def unwrap_model(self, model, **options):
        """The model without anybody's wrappers."""
        return model


@torch.inference_mode()
def stream_figures(model, tokens, recipe, num_buckets):
    """Bits per byte of text in windows, as a run measures it, and nats by position in a window.

    Args:
        model: the language model.
        tokens: held-out text.
        recipe: its sequence_length, packing, and windows at once.
        num_buckets: parts of a window.

    Returns:
        "bits_per_byte" and "nats_at/<first>-<last position>" by name.
    """
    length = recipe.sequence_length
    sums = torch.zeros(2, length, dtype=torch.float64)
    for batch in own_batches(Here(model.device), model, tokens, recipe):
        targets_BT = batch.pop("shift_labels")
        nats_BT = target_nats(model, batch, targets_BT).cpu().double()
        sums[0, : nats_BT.shape[1]] += nats_BT.sum(0)
        sums[1, : nats_BT.shape[1]] += (targets_BT != -100).sum(0).cpu()
    bucket_T = torch.arange(length) * num_buckets // length
    nats, count = torch.zeros(2, num_buckets, dtype=sums.dtype).index_add_(1, bucket_T, sums)
    found = bits_per_byte(sums[0].sum().item(), tokens.num_bytes)
    # Text that is shorter than a window has nothing at its last positions.
    by_position = dict(zip(bucket_names(length, num_buckets), (nats / count).tolist()))
    return {
        "bits_per_byte": found,
        **{name: x for name, x in by_position.items() if not math.isnan(x)},
    }


@torch.inference_mode()
def nats_of_ends(model, windows, at_once):
    """The summed loss of the last tokens of each window, without padding.

    Args:
        model: the language model.
        windows: (ids [T + 1], number of last ones that are scored) of each; T may differ.
        at_once: tokens in a batch, at most if a window is no longer.

    Returns:
        Nats of each window, a list.
    """
    found, by_length = [None] * len(windows), {}
    for index, (ids, _) in enumerate(windows):
        by_length.setdefault(len(ids) - 1, []).append(index)
    for length, indices in by_length.items():
        size = max(1, at_once // length)
        for first in range(0, len(indices), size):
            group = indices[first : first + size]
            ids = torch.stack([torch.as_tensor(windows[i][0]) for i in group]).to(model.device)
            scored = [windows[i][1] for i in group]
            nats_BS = target_nats(model, {"input_ids": ids[:, :-1]}, ids[:, -max(scored) :])
            for index, count, nats_S in zip(group, scored, nats_BS.cpu().double()):
                found[index] = nats_S[-count:].sum().item()
    return found


def windows_of_documents(tokens, length):
    """Windows in which each token of a document is scored once, and none sees another document.

    They are those of lm-evaluation-harness: of `length` tokens from the boundary on; the last one
    of a document is as long, and sees again some of what the one before it scored.

    Returns:
        (ids, number of last ones that are scored) of each.
    """
    windows, ends = [], [*tokens.starts[1:], len(tokens.ids) - 1]
    for start, end in zip(tokens.starts, ends):
        ids = torch.from_numpy(tokens.ids[start:end].astype("int64"))
        for first in range(0, len(ids) - 1, length):
            last = min(first + length, len(ids) - 1)
            windows.append((ids[max(0, last - length) : last + 1], last - first))
    return windows


def bits_per_byte_of_documents(model, tokens, length, at_once):
    """Bits per byte of documents one by one: no boundary counts, as in lm-evaluation-harness."""
    nats = nats_of_ends(model, windows_of_documents(tokens, length), at_once)
    return bits_per_byte(sum(nats), tokens.num_bytes)


@torch.inference_mode()
def state_sizes(model, ids, lengths):
    """Bytes of the tensors that a live cache holds for one sequence, by the tokens it has seen."""
    found = {}
    for length in lengths:
        output = model(ids[None, :length].to(model.device), use_cache=True)
        cache = getattr(output, "past_key_values", None)
        cache = getattr(output, "cache_params", None) if cache is None else cache
        layers = getattr(cache, "layers", [])
        if layers and all(isinstance(getattr(x, "tensors", None), dict) for x in layers):
            # Ours, which beside its state counts tokens.
            tensors = [x for layer in layers for x in layer.tensors.values()]
        else:
            tensors = {id(x): x for x in cache_tensors(cache).values()}.values()
        found[length] = sum(x.nbytes for x in tensors)
    return found


class _Clock(LogitsProcessor):
    """Notes when each token's logits are there."""

    def __init__(self):
        self.times = []

    def __call__(self, input_ids, scores):
        scores.flatten()[0].item()  # waits for the device
        self.times.append(time.perf_counter())
        return scores


@torch.inference_mode()
def speeds(model, ids, num_tokens=33, repeats=3):
    """Tokens per second of one sequence: read in one pass, and written one by one after it.

    Args:
        model: the language model.
        ids: [T], what is read.
        num_tokens: written.
        repeats: of both, of which the median counts.
    """
    ids_BT, reading, writing = ids[None].to(model.device), [], []
    settings = GenerationConfig(
        max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, pad_token_id=0
    )
    for _ in range(1 + repeats):  # the first one warms up
        began, clock = time.perf_counter(), _Clock()
        model.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            generation_config=settings,
            logits_processor=LogitsProcessorList([clock]),
        )
        reading.append(ids_BT.shape[1] / (clock.times[0] - began))
        writing.append((num_tokens - 1) / (clock.times[-1] - clock.times[0]))
    return {
        "reading_tokens_per_second": statistics.median(reading[1:]),
        "writing_tokens_per_second": statistics.median(writing[1:]),
    }
