"""Batches of text to token ids: in this process, or in workers while this one reads and writes."""

import collections
import ctypes
import os
import signal
import sys
import warnings

import numpy as np
import psutil
import torch
from transformers import PreTrainedTokenizerFast

LARGE_TEXT = 2**25  # bytes; for less, starting workers takes longer than they save
PORTION = 2**18  # bytes that a worker's tokenizer is handed at once, for its memory


def encode(tokenizer, texts):
    """The ids of each text.

    Text that spells a special token is text: every byte is counted, none becomes a boundary.
    """
    plain, kind = PreTrainedTokenizerFast, type(tokenizer)
    methods = ("__call__", "_encode_plus")
    if all(getattr(kind, name, None) is getattr(plain, name) for name in methods):
        # What its `__call__` does, in half the time and memory: it also keeps each token's place.
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        return [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False)]
    options = {"return_attention_mask": False, "verbose": False}
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True, **options)[
        "input_ids"
    ]


def num_workers(asked, num_bytes):
    """Processes that tokenise: as many as asked for, or as the text is worth.

    Args:
        asked: 0: every physical core this process may run on, for a large text; else so many.
        num_bytes: of the text.
    """
    if asked or num_bytes < LARGE_TEXT:
        return asked or 1
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    return cores


def encoded(tokenizer, batches, workers, dtype):
    """Batches with their token ids, in order and however many processes there are.

    Args:
        tokenizer: of transformers.
        batches: lists of (is held out, begins a document, text). No more of them are read than the
            workers are about to tokenise.
        workers: 1: this process alone.
        dtype: of the ids.

    Yields:
        A batch, and the ids of each of its texts.
    """
    if workers == 1:
        for batch in batches:
            yield batch, encode(tokenizer, [text for *_, text in batch])
        return
    under_way = collections.deque()

    def texts():
        for batch in batches:
            under_way.append(batch)
            yield [text for *_, text in batch]

    # Before the fork, or the tokenizers' library warns of it: each worker is one of the threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # It warns of more workers than cores, and who asked for them knows.
    warnings.filterwarnings("ignore", "This DataLoader will create")
    # A dead worker is a signal, whose handler raises wherever this process then is. In the loader's
    # first step, while it imports what it is profiled with, that would be logged, and lost.
    with torch.autograd.profiler.record_function("tokenising"):
        pass
    # The loader keeps the order, and hands each worker two batches at most. What it takes for
    # indices are the texts themselves.
    loader = torch.utils.data.DataLoader(
        _Encoder(tokenizer, dtype),
        batch_size=None,
        sampler=texts(),
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_begin_worker,
        generator=torch.Generator(),  # it would draw from the one that all share
        multiprocessing_context="fork",  # others would import the script, and with it all of torch
    )
    for ids in loader:
        yield under_way.popleft(), ids


def died(error):
    """Whether an exception says that a worker is no more."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")


class _Encoder:
    """A data set whose "indices" are lists of texts, and whose items their ids."""

    def __init__(self, tokenizer, dtype):
        self.tokenizer, self.dtype = tokenizer, dtype

    def __getitem__(self, texts):
        ids, portion, size = [], [], 0
        for text in texts:
            if portion and size + len(text) > PORTION:
                ids += self._encode(portion)
                portion, size = [], 0
            portion.append(text)
            size += len(text)
        return ids + self._encode(portion)

    def _encode(self, texts):
        return [np.array(ids, dtype=self.dtype) for ids in encode(self.tokenizer, texts)]


def _as_it_is(item):
    return item


def _begin_worker(number):
    # The threads of a tokenizer do not survive a fork, and it would wait for them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # One that waits for the rest of a text would wait forever: its siblings hold the pipe open too.
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
