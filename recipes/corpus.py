"""Text as windows of token ids: read, split, tokenised once, and served batch by batch.

The token stream is `boundary document boundary document ... boundary`, where the boundary is the
tokenizer's end-of-text. So each byte of a document is predicted from something, the first from the
boundary before it, and a model learns where documents end.
"""

import itertools
import json
import os
import shutil
import tempfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from recipe import UsageError
from sources import load_dataset, sha256, standard_library

FORMAT = 1  # of the cached files; another number is another cache
FEW_DOCUMENTS = 20


@dataclass
class Tokens:
    """One split.

    Attributes:
        ids: token ids, read from disk where they are used.
        starts: the index in `ids` of each document's boundary.
        num_bytes: UTF-8 bytes of the documents.
    """

    ids: np.ndarray
    starts: np.ndarray
    num_bytes: int

    def window(self, start, length, packing):
        """A window as input ids, targets, and positions counted from its own documents' starts."""
        ids = torch.from_numpy(self.ids[start : start + length + 1].astype(np.int64))
        positions = np.arange(length)
        if packing == "documents":
            first, last = np.searchsorted(self.starts, (start, start + length))
            for begin in self.starts[first:last] - start:
                positions[begin:] = np.arange(length - begin)
        return ids[:-1], ids[1:], torch.from_numpy(positions)


@dataclass
class Corpus:
    """Train and held-out tokens, and what identifies them."""

    train: Tokens
    held_out: Tokens
    record: dict  # sizes, hashes and gzip's result, for run.json


class Windows:
    """The training batches, as a pure function of (seed, step, rank, micro-batch).

    Each epoch is a new permutation of windows of `length` tokens that begin at a new offset, so
    documents are cut at different places. Step s uses samples [s, s + 1) * batch_size of the
    epochs in a row, however many processes share them.
    """

    def __init__(self, tokens, length, batch_size, seed, packing):
        # One window less than fits leaves room for the offset.
        self.num_windows = (len(tokens.ids) - 1) // length - 1
        if self.num_windows < 1:
            raise UsageError(
                f"the training text has {len(tokens.ids)} tokens, two windows of sequence_length = "
                f"{length} need {2 * length + 1}; use more data or a shorter sequence_length."
            )
        self.tokens, self.length, self.batch_size = tokens, length, batch_size
        self.seed, self.packing = seed, packing
        self._epoch = (None, None, None)

    def start(self, sample):
        """The first token of a sample; samples are numbered through all epochs."""
        epoch, position = divmod(sample, self.num_windows)
        if self._epoch[0] != epoch:
            # numpy promises that RandomState's numbers stay the same from version to version.
            random = np.random.RandomState([self.seed, epoch])
            offset = random.randint(self.length)
            self._epoch = (epoch, offset, random.permutation(self.num_windows))
        _, offset, order = self._epoch
        return int(offset + order[position] * self.length)

    def batch(self, step, rank, micro, num_processes, size):
        """One process's micro-batch.

        Returns:
            input_ids, shift_labels [size, length], and position_ids if documents are kept apart.
        """
        first = step * self.batch_size + (micro * num_processes + rank) * size
        starts = [self.start(sample) for sample in range(first, first + size)]
        return collate(self.tokens, starts, self.length, self.packing)


def collate(tokens, starts, length, packing):
    """Windows at `starts` as the arguments of a causal language model."""
    windows = [tokens.window(start, length, packing) for start in starts]
    ids, targets, positions = (torch.stack(tensors) for tensors in zip(*windows))
    batch = {"input_ids": ids, "shift_labels": targets}
    return {**batch, "position_ids": positions} if packing == "documents" else batch


def held_out_batches(tokens, length, size, packing, rank=0, num_processes=1):
    """Consecutive windows in which each target occurs once; the last may be shorter."""
    num_targets = len(tokens.ids) - 1
    starts = range(0, num_targets - num_targets % length, length)
    groups = [(starts[i : i + size], length) for i in range(0, len(starts), size)]
    if num_targets % length:
        groups.append(([num_targets - num_targets % length], num_targets % length))
    for group, window_length in groups[rank::num_processes]:
        yield collate(tokens, group, window_length, packing)


def load_corpus(recipe, tokenizer, cache_dir):
    """The recipe's corpus from the cache, after filling the cache if need be.

    Args:
        recipe: its data fields say what is read.
        tokenizer: a transformers tokenizer with an end-of-text token.
        cache_dir: folder of caches, one per corpus and tokenizer.

    Raises:
        UsageError: data that is missing, unreadable or empty; a tokenizer without end-of-text.
    """
    if tokenizer.eos_token_id is None:
        raise UsageError(
            f"the tokenizer {recipe.tokenizer} has no eos_token, which ends a document."
        )
    documents, source = (
        standard_library() if recipe.data == "stdlib" else load_dataset(recipe, cache_dir)
    )
    identity = [FORMAT, source["sha256"], tokenizer_hash(tokenizer), recipe.held_out]
    key = sha256(json.dumps([*identity, recipe.eval_bytes]))[:16]
    folder = Path(cache_dir) / key
    if not (folder / "corpus.json").is_file():
        record = {**source, "tokenizer_sha256": identity[2]}
        _fill_cache(folder, documents(), tokenizer, recipe, record)
    record = json.loads((folder / "corpus.json").read_text())
    splits = []
    for name in ("train", "held_out"):
        dtype = np.dtype(record[name]["dtype"])
        ids = np.memmap(folder / f"{name}.bin", dtype=dtype, mode="r")
        starts = np.load(folder / f"{name}_starts.npy")
        splits.append(Tokens(ids, starts, record[name]["bytes"]))
    return Corpus(*splits, record)


def tokenizer_hash(tokenizer):
    """Identifies what a tokenizer does, wherever its files are."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return sha256(backend.to_str() if backend else json.dumps(tokenizer.get_vocab()))


@dataclass
class _Writer:
    """Writes one split, and keeps its text only as a gzip size."""

    folder: Path
    name: str
    boundary: int
    dtype: np.dtype
    starts: list[int] = field(default_factory=list)
    num_tokens: int = 0
    num_bytes: int = 0
    gzip_bytes: int = 0

    def __post_init__(self):
        self.file = open(self.folder / f"{self.name}.bin", "wb")
        self.gzip = zlib.compressobj(9, wbits=31)  # the gzip container, as `gzip -9` writes it

    def add(self, text, ids):
        self.starts.append(self.num_tokens)
        stream = np.empty(len(ids) + 1, dtype=self.dtype)
        stream[0], stream[1:] = self.boundary, ids
        stream.tofile(self.file)
        self.num_tokens += len(stream)
        content = text.encode()
        self.num_bytes += len(content)
        if self.name == "held_out":
            self.gzip_bytes += len(self.gzip.compress(content))

    def close(self):
        np.asarray([self.boundary], dtype=self.dtype).tofile(self.file)
        self.file.close()
        np.save(self.folder / f"{self.name}_starts.npy", np.asarray(self.starts, dtype=np.int64))
        record = {
            "documents": len(self.starts),
            "tokens": self.num_tokens + 1,
            "bytes": self.num_bytes,
            "dtype": np.dtype(self.dtype).name,
        }
        if self.name == "held_out" and self.num_bytes:
            size = self.gzip_bytes + len(self.gzip.flush())
            record["gzip_bits_per_byte"] = 8 * size / self.num_bytes
        return record


def _fill_cache(folder, documents, tokenizer, recipe, record):
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the final place, and renamed when complete: an interrupted run leaves no half cache.
    building = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
        splits = [
            _Writer(building, name, tokenizer.eos_token_id, dtype) for name in ("train", "held_out")
        ]
        for batch in _batched(_divide(documents, recipe), 64):
            ids = tokenizer(
                [text for _, text in batch],
                add_special_tokens=False,
                # Text that spells a special token is text: every byte is counted, none becomes
                # a boundary.
                split_special_tokens=True,
                return_attention_mask=False,
                verbose=False,
            )["input_ids"]
            for (is_held_out, text), document_ids in zip(batch, ids):
                splits[is_held_out].add(text, document_ids)
        for split in splits:
            record[split.name] = split.close()
            if split.num_bytes == 0:
                raise UsageError(
                    f"the corpus {recipe.data} is empty: no {split.name.replace('_', '-')} text; "
                    "check the file, or give more text."
                )
        (building / "corpus.json").write_text(json.dumps(record, indent=1) + "\n")
        try:
            os.replace(building, folder)
        except OSError:
            if not (folder / "corpus.json").is_file():  # else another run was faster
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _divide(documents, recipe):
    """(is held out, text) of each document, by a hash of its key and never by chance.

    Of fewer than 20 documents the last part of each is held out. Held-out text ends after
    `eval_bytes`, the same bytes for every tokenizer.
    """
    documents = ((key, text) for key, text in documents if text.strip())
    few = list(itertools.islice(documents, FEW_DOCUMENTS))
    if len(few) < FEW_DOCUMENTS:
        pairs = [
            (is_held_out, part)
            for _, text in few
            for is_held_out, part in enumerate(_cut_tail(text, recipe.held_out))
        ]
    else:
        pairs = (
            (int(sha256(key)[:8], 16) < recipe.held_out * 2**32, text)
            for key, text in itertools.chain(few, documents)
        )
    left = recipe.eval_bytes or None
    for is_held_out, text in pairs:
        if is_held_out and left is not None:
            text = text.encode()[:left].decode(errors="ignore")
            left -= len(text.encode())
        if text:
            yield bool(is_held_out), text


def _cut_tail(text, fraction):
    cut = round(len(text) * (1 - fraction))
    return text[:cut], text[cut:]


def _batched(items, size):
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
