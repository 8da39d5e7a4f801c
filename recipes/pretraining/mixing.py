"""Several sources of text in one run: whose each sample is, and what they have in common."""

import dataclasses
import functools
import json
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from .caching import sha256
from .corpus import Corpus, Tokens, Windows, collate, load_corpus
from .position_skip import Skipping
from .recipe import UsageError
from .source_tables import TEXT_KEYS
from .streams import Stream, load_stream

BLOCK = 256  # samples among which each source has its share
STREAMS = "streams.pt"  # of a checkpoint: where the streams stand


class Shares:
    """Which source each sample comes from, a function of the sample's number alone.

    Of every block of samples each source has its share, and what a whole number of samples leaves
    over is made up for in the blocks that follow. Inside a block the order is random.

    Args:
        weights: of the sources, positive; their sum counts as one.
        seed: of the order.
    """

    def __init__(self, weights, seed):
        self.weights = [Fraction(weight) for weight in weights]  # exact on every machine
        self.seed = seed
        self._block = (None, None, None)

    def before(self, sample):
        """How many of the samples before this one are each source's."""
        block, position = divmod(sample, BLOCK)
        first, order = self._order(block)
        return first + np.bincount(order[:position], minlength=len(first))

    def place(self, sample):
        """The source of a sample, and the sample's number among those of that source."""
        block, position = divmod(sample, BLOCK)
        first, order = self._order(block)
        source = int(order[position])
        return source, int(first[source] + np.count_nonzero(order[:position] == source))

    def _order(self, block):
        """(samples of each source before a block, the source of each in it)."""
        if self._block[0] != block:
            first, end = self._apportion(block * BLOCK), self._apportion((block + 1) * BLOCK)
            order = np.repeat(np.arange(len(first)), end - first)
            # numpy promises that RandomState's numbers stay the same from version to version.
            np.random.RandomState([self.seed, block, len(first)]).shuffle(order)
            self._block = (block, first, order)
        return self._block[1:]

    def _apportion(self, num_samples):
        """Each source's share of the first samples, in whole numbers that never go down.

        The first source has its share of all, rounded down, the second its share of what is left.
        """
        counts, rest, total = [], num_samples, sum(self.weights)
        for weight in self.weights:
            counts.append(rest * weight // total)
            rest, total = rest - counts[-1], total - weight
        return np.array(counts, dtype=np.int64)


@dataclass
class Part:
    """One source of a run.

    Attributes:
        name: what the recipe calls it; '' if it is the only one.
        weight: how much of it is read beside the others.
        corpus: its text.
    """

    name: str
    weight: float
    corpus: Corpus


@dataclass
class Mixture:
    """All the text of a run.

    Attributes:
        parts: its sources.
        record: sizes, hashes and gzip's result, for run.json: the only source's own, or sums, with
            those of the sources beside them.
    """

    parts: list[Part]
    record: dict

    @functools.cached_property
    def held_out(self):
        """The held-out text of all sources, one after the other."""
        texts = [part.corpus.held_out for part in self.parts]
        if len(texts) == 1:
            return texts[0]
        # The boundary after one is that before the next.
        ids = [text.ids[:-1] for text in texts[:-1]] + [texts[-1].ids]
        begins = np.cumsum([0, *map(len, ids[:-1])])
        starts = [text.starts + begin for text, begin in zip(texts, begins)]
        num_bytes = sum(text.num_bytes for text in texts)
        return Tokens(np.concatenate(ids), np.concatenate(starts), num_bytes)

    def tokens_and_bytes(self):
        """So many tokens of training text stand for so many bytes, in the mean over samples."""
        # Of a stream what is held out is known.
        texts = [
            part.corpus.held_out if isinstance(part.corpus.train, Stream) else part.corpus.train
            for part in self.parts
        ]
        if len(texts) == 1:
            return len(texts[0].ids), texts[0].num_bytes
        total = sum(part.weight for part in self.parts)
        means = [
            part.weight / total * text.num_bytes / len(text.ids)
            for part, text in zip(self.parts, texts)
        ]
        return 1, sum(means)


class Batches:
    """The training batches, a pure function of (seed, step, rank, micro-batch).

    Step s uses samples [s, s + 1) * batch_size, however many processes share them. Where the
    recipe's schedule has shorter windows, each sample is cut into as many as it holds: a step has
    the same tokens.

    Args:
        recipe: its sizes, packing and seed.
        parts: the sources.
    """

    def __init__(self, recipe, parts):
        self.batch_size, self.length = recipe.batch_size, recipe.sequence_length
        self.packing, self.parts = recipe.packing, parts
        self.length_at = recipe.sequence_length_at
        self.skipping = Skipping(recipe) if recipe.position_skip else None
        self.readers = [
            part.corpus.train
            if isinstance(part.corpus.train, Stream)
            else Windows(part.corpus.train, self.length, recipe.seed, number, part.name)
            for number, part in enumerate(parts)
        ]
        self.shares = Shares([part.weight for part in parts], recipe.seed)

    def described(self, num_tokens):
        """What there is to train on and to measure, and how much is trained, for the terminal."""
        lines = []
        for part, reader in zip(self.parts, self.readers):
            record, share = part.corpus.record, part.weight / sum(p.weight for p in self.parts)
            whose = f"{part.name}, {share:.2%} of the samples: " if len(self.parts) > 1 else ""
            text = (
                f"{record['train']['bytes']:,} bytes of text" if "train" in record else "a stream"
            )
            count = f"{reader.num_windows:,} " if "train" in record else ""
            lines.append(
                f"{whose}{text} to train on, {record['held_out']['bytes']:,} held out; "
                f"{count}windows of {self.length} tokens"
            )
        separator = "\n" if len(lines) > 1 else "; "
        return "\n".join(lines) + f"{separator}{num_tokens:,} tokens to train"

    def position(self, step):
        """Where the text of a step is: its samples, and the source and first token of each."""
        samples = range(step * self.batch_size, (step + 1) * self.batch_size)
        places = [self.shares.place(sample) for sample in samples]
        return {
            "samples": [samples.start, samples.stop - 1],
            "sources": [self.parts[source].name for source, _ in places],
            "first_tokens": [self.readers[source].start(number) for source, number in places],
        }

    def batch(self, step, rank, micro, num_processes, size):
        """One process's micro-batch.

        Returns:
            input_ids, shift_labels [windows, length], and position_ids if documents are kept
            apart or positions skipped; `size` windows of sequence_length, or more, shorter ones.
        """
        length = self.length_at(step)
        first = step * self.batch_size + (micro * num_processes + rank) * size
        windows, skipping = [], self.skipping
        ahead = skipping.tokens_ahead(length) if skipping else 0
        for sample in range(first, first + size):
            source, number = self.shares.place(sample)
            reader = self.readers[source]
            tokens, start = reader.locate(number, ahead)
            for part, begin in enumerate(range(start, start + self.length, length)):
                place = begin, length, self.packing
                windows.append(
                    skipping.window(tokens, *place, sample, part)
                    if skipping
                    else tokens.window(*place)
                )
        return collate(windows, self.packing == "documents" or skipping is not None)

    def save(self, folder, step):
        """Writes where the streams stand before a step, the same in all processes."""
        numbers = self.shares.before(step * self.batch_size).tolist()
        states = {
            index: reader.state(numbers[index])
            for index, reader in enumerate(self.readers)
            if isinstance(reader, Stream)
        }
        if states:
            torch.save(states, folder / STREAMS)

    def restore(self, folder):
        """Goes on where the streams of a checkpoint stood."""
        if (folder / STREAMS).is_file():
            states = torch.load(folder / STREAMS, weights_only=True)
            for index, state in states.items():
                self.readers[index].restore(state)


def sources_of(recipe):
    """(name, weight, recipe of its own) of each source; of a recipe with `data` of that alone."""
    if recipe.task:
        raise UsageError(
            f"expected a recipe with text, got one with the task {recipe.task['name']}; take one "
            "with data or [[sources]]."
        )
    if not recipe.sources:
        return [("", 1, recipe)]
    found = []
    for source in recipe.sources:
        own = {key: source[key] for key in TEXT_KEYS if key in source}
        single = dataclasses.replace(recipe, sources=[], **own)
        found.append((source["name"], source.get("weight", 1), single))
    return found


def load_mixture(recipe, tokenizer, cache_dir=""):
    """The text of a recipe, from caches that are filled if need be: see `load_corpus`.

    Args:
        recipe: its data fields say what is read.
        tokenizer: a transformers tokenizer with an end-of-text token.
        cache_dir: folder of caches; '' for the recipe's.

    Raises:
        UsageError: a source that is missing, unreadable or empty.
    """
    parts = []
    for name, weight, single in sources_of(recipe):
        if single.streaming:
            corpus = load_stream(single, tokenizer)
        else:
            corpus = load_corpus(single, tokenizer, cache_dir or recipe.corpus_dir)
        parts.append(Part(name, weight, corpus))
    return Mixture(parts, _record(parts))


def _record(parts):
    records = [part.corpus.record for part in parts]
    if len(parts) == 1:
        return records[0]
    total = sum(part.weight for part in parts)
    shares = [part.weight / total for part in parts]
    sums = {
        side: {key: sum(r[side][key] for r in records) for key in ("documents", "tokens", "bytes")}
        for side in ("train", "held_out")
        if all(side in r for r in records)
    }
    gzip_bits = sum(r["held_out"]["gzip_bits_per_byte"] * r["held_out"]["bytes"] for r in records)
    sums["held_out"]["gzip_bits_per_byte"] = gzip_bits / sums["held_out"]["bytes"]
    texts = [[record["sha256"], share] for record, share in zip(records, shares)]
    return {
        "sha256": sha256(json.dumps(texts)),
        "tokenizer_sha256": records[0]["tokenizer_sha256"],
        **sums,
        "sources": {
            part.name: {"share": share, **part.corpus.record} for part, share in zip(parts, shares)
        },
    }
