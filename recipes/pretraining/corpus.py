"""Text as windows of token ids: read, split, tokenised once, and served batch by batch.

The token stream is `boundary document boundary document ... boundary`, where the boundary is the
tokenizer's end-of-text. So each byte of a document is predicted from something, the first from the
boundary before it, and a model learns where documents end.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .caching import alone, remove_unfinished, sha256
from .recipe import UsageError
from .sources import find_source
from .splitting import plan_split
from .tokenising import fill_cache

FORMAT = 2  # of the cached files and of the split; another number is another cache


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

    @property
    def num_targets(self):
        """How many tokens are predicted."""
        return len(self.ids) - 1

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
    """The windows of one text, as a pure function of the sample's number.

    Each epoch is a new permutation of windows of `length` tokens that begin at a new offset, so
    documents are cut at different places. Each token is read once in an epoch but for those at the
    two ends, so a document is read in proportion to its tokens, however long it is.

    Args:
        tokens: of the text.
        length: tokens per window.
        seed: of the permutations.
        source: number of the text among those of the run.
        name: of the text, for messages.
    """

    def __init__(self, tokens, length, seed, source=0, name=""):
        # One window less than fits leaves room for the offset.
        self.num_windows = (len(tokens.ids) - 1) // length - 1
        if self.num_windows < 1:
            raise UsageError(
                f"the training text{' of ' * bool(name)}{name} has {len(tokens.ids)} tokens, two "
                f"windows of sequence_length = {length} need {2 * length + 1}; use more data or a "
                "shorter sequence_length."
            )
        self.tokens, self.length = tokens, length
        self.seed, self.source = seed, source
        self._epoch = (None, None, None)

    def locate(self, sample, ahead=0):
        """Tokens that hold a sample and, where the text goes on, so many after it; its begin."""
        return self.tokens, self.start(sample)

    def start(self, sample):
        """The first token of a sample; samples are numbered through all epochs."""
        epoch, position = divmod(sample, self.num_windows)
        if self._epoch[0] != epoch:
            # numpy promises that RandomState's numbers stay the same from version to version.
            key = [self.seed, epoch] + [self.source] * bool(self.source)
            random = np.random.RandomState(key)
            offset = random.randint(self.length)
            self._epoch = (epoch, offset, random.permutation(self.num_windows))
        _, offset, order = self._epoch
        return int(offset + order[position] * self.length)


def collate(windows, with_positions):
    """Windows as the arguments of a causal language model."""
    ids, targets, positions = (torch.stack(tensors) for tensors in zip(*windows))
    batch = {"input_ids": ids, "shift_labels": targets}
    return {**batch, "position_ids": positions} if with_positions else batch


def held_out_batches(tokens, length, size, packing, rank=0, num_processes=1):
    """Consecutive windows in which each target occurs once; the last may be shorter.

    All processes get the same number: in the last round, those for which nothing is left get
    windows without targets, to be there where weights are gathered from all.
    """
    num_targets = len(tokens.ids) - 1
    starts = range(0, num_targets - num_targets % length, length)
    groups = [(starts[i : i + size], length) for i in range(0, len(starts), size)]
    if num_targets % length:
        groups.append(([num_targets - num_targets % length], num_targets % length))
    for index in range(rank, -(-len(groups) // num_processes) * num_processes, num_processes):
        group, window_length = groups[min(index, len(groups) - 1)]
        windows = [tokens.window(start, window_length, packing) for start in group]
        batch = collate(windows, packing == "documents")
        if index >= len(groups):
            batch["shift_labels"].fill_(-100)
        yield batch


def load_corpus(recipe, tokenizer, cache_dir):
    """The recipe's corpus from the cache, after filling the cache if need be.

    Every process calls it, and none of them in a collective operation: the first fills the cache
    while the others wait for its lock, as long as it takes.

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
    cache_dir = Path(cache_dir)
    documents, source = find_source(recipe, cache_dir)
    identity = [FORMAT, source["sha256"], tokenizer_hash(tokenizer), recipe.held_out]
    folder = cache_dir / sha256(json.dumps([*identity, recipe.eval_bytes]))[:16]
    remove_unfinished(cache_dir)
    if not (folder / "corpus.json").is_file():
        with alone(folder.with_suffix(".lock"), f"tokenises {recipe.data}"):
            if not (folder / "corpus.json").is_file():
                split = plan_split(documents(), recipe.data, recipe.held_out, recipe.eval_bytes)
                _announce(source, split)
                record = {**source, "tokenizer_sha256": identity[2]}
                workers = recipe.tokenising_workers
                fill_cache(folder, documents(), split, tokenizer, record, workers)
    record = json.loads((folder / "corpus.json").read_text())
    record["source"] = source["source"]  # it may have been called otherwise
    return Corpus(*(_read_tokens(folder, name, record) for name in ("train", "held_out")), record)


def _announce(source, split):
    notes = {
        "documents without text": split.num_blank,
        **{f"{kind} not read": number for kind, number in source.get("files_not_read", {}).items()},
    }
    said = "".join(f", {number:,} {what}" for what, number in notes.items() if number)
    print(
        f"Tokenising {source['source']}: {split.num_bytes:,} bytes of text in "
        f"{split.num_documents:,} documents{said}",
        flush=True,
    )


def _read_tokens(folder, name, record):
    dtype = np.dtype(record[name]["dtype"])
    ids = np.memmap(folder / f"{name}.bin", dtype=dtype, mode="r")
    if len(ids) != record[name]["tokens"]:
        raise UsageError(
            f"{folder} should hold {record[name]['tokens']:,} tokens to {name}, got {len(ids):,}; "
            "delete that folder, and it is made again."
        )
    starts = np.load(folder / f"{name}_starts.npy", mmap_mode="r")
    return Tokens(ids, starts, record[name]["bytes"])


def tokenizer_hash(tokenizer):
    """Identifies what a tokenizer does to documents, wherever its files are."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend else tokenizer.get_vocab()
    # Calls change these two, and they play no part here.
    state = {key: value for key, value in state.items() if key not in ("truncation", "padding")}
    return sha256(json.dumps([state, tokenizer.eos_token_id], sort_keys=True))
