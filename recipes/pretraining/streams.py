"""Text that is tokenised while it is trained on: from the Hub or from disk, through `datasets`.

A stream is `boundary document boundary document ...` as a cached corpus is, in the order of its
rows, and sample n is its n-th piece. In later epochs `datasets` takes the files in another order.
Where a stream stands is the state of `datasets`, and the tokens read and not yet trained on.
"""

import gzip
import json
import math

import numpy as np
import torch

from .caching import sha256
from .corpus import Corpus, Tokens, tokenizer_hash
from .encoding import encode
from .readers import BadRow, text_of
from .recipe import UsageError
from .sources import find_stream
from .splitting import hash_of
from .tokenising import batches

READ_AT_ONCE = 2**16  # characters, for the tokenizer's sake


class Stream:
    """The samples of a stream, asked for in their order.

    Every process reads the whole stream and takes the samples that are its own, so all of them
    stand at the same place after a step.

    Args:
        dataset: a `datasets.IterableDataset`.
        column: of the text.
        name: of the stream, for messages.
        tokenizer: of transformers.
        length: tokens of a sample.
        held_out: hashes of documents that are not trained on.
    """

    def __init__(self, dataset, column, name, tokenizer, length, held_out):
        self.dataset, self.column, self.name = dataset, column, name
        self.tokenizer, self.length, self.held_out = tokenizer, length, held_out
        self._documents, self._stands = self._read_documents(), None
        self.sample, self.ids, self.starts = 0, np.zeros(0, np.int64), np.zeros(0, np.int64)

    def locate(self, sample, ahead=0):
        """Tokens that hold a sample and so many after it, and where it begins among them."""
        self._go_to(sample)
        self._read(self.length + ahead + 1)
        return Tokens(self.ids, self.starts, 0), 0

    def start(self, sample):
        """How many tokens of the stream come before a sample."""
        return sample * self.length

    def state(self, sample):
        """What `restore` needs to go on with a sample."""
        self._go_to(sample)
        ids, starts = torch.tensor(self.ids), torch.tensor(self.starts)
        return {"dataset": self._stands, "sample": sample, "ids": ids, "starts": starts}

    def restore(self, state):
        """Goes on where a stream stood."""
        # What `datasets` says of its place before it has read on is that of the beginning.
        self._stands = state["dataset"]
        if self._stands:
            self.dataset.set_epoch(self._stands["epoch"])
            self.dataset.load_state_dict(self._stands)
        self._documents = self._read_documents()
        self.sample = state["sample"]
        self.ids, self.starts = state["ids"].numpy(), state["starts"].numpy()

    def _go_to(self, sample):
        if sample < self.sample:
            raise ValueError(f"expected sample {self.sample} or a later one, got {sample}.")
        for _ in range(sample - self.sample):
            self._read(self.length)
            first = np.searchsorted(self.starts, self.length)
            self.ids, self.starts = self.ids[self.length :], self.starts[first:] - self.length
        self.sample = sample

    def _read(self, num_tokens):
        """Reads on until there are so many tokens."""
        ids, starts, count = [self.ids], [self.starts], len(self.ids)
        while count < num_tokens:
            parts = [(False, text) for text in self._some_documents()]
            for batch in batches(self.tokenizer, parts):
                found = encode(self.tokenizer, [text for *_, text in batch])
                for (_, begins, _), own in zip(batch, found):
                    if begins:
                        starts.append([count])
                        own = [self.tokenizer.eos_token_id, *own]
                    ids.append(np.array(own, dtype=np.int64))
                    count += len(own)
        if len(ids) > 1:
            self.ids = np.concatenate(ids)
            self.starts = np.concatenate(starts).astype(np.int64)

    def _some_documents(self):
        texts, size = [], 0
        while size < READ_AT_ONCE:
            texts.append(next(self._documents))
            size += len(texts[-1])
        self._stands = self.dataset.state_dict()
        return texts

    def _read_documents(self):
        """The documents that are trained on, epoch after epoch."""
        whole = self._stands is None
        while True:
            found = False
            for text in documents_of(self.dataset, self.column, self.name):
                if hash_of(text) not in self.held_out:
                    found = True
                    yield text
            if whole and not found:
                raise UsageError(
                    f"the stream {self.name} has no text to train on beside what is held out; give "
                    "more text, or a smaller held_out or eval_bytes."
                )
            whole = True
            self.dataset.set_epoch(self.dataset.epoch + 1)


def documents_of(dataset, column, name):
    """The texts of a data set, but for those that are blank.

    Raises:
        UsageError: a row that is no text, or cannot be read.
    """
    rows = iter(dataset)
    while True:
        try:
            row = next(rows, None)
            text = "" if row is None else text_of(row, "a row", column)
        except BadRow as error:
            raise UsageError(f"{name}, {error}") from None
        except UsageError:
            raise
        except Exception as error:  # datasets raises what its readers and the network raise
            reason = " ".join(str(error.__cause__ or error).split())
            raise UsageError(
                f"cannot read on in the stream {name}: {reason}; continue with --resume."
            ) from error
        if row is None:
            return
        if text and not text.isspace():
            yield text


def take_held_out(documents, fraction, eval_bytes, name):
    """The documents of a stream that are measured and not trained on, which is known from its head.

    They are the first whose hash is below the fraction, until there are `eval_bytes`; the last is
    measured in part.

    Returns:
        Their hashes, and what is measured of each.

    Raises:
        UsageError: there are none.
    """
    limit = math.ceil(fraction * 2**32) << 224  # hashes are below 2^256
    hashes, texts, left = set(), [], eval_bytes
    for text in documents:
        number = hash_of(text)
        if number < limit and number not in hashes:
            content = text.encode()
            text = content[:left].decode(errors="ignore")  # no half of a character
            left -= len(content)
            hashes.add(number)
            texts += [text] if text else []
            if left <= 0:
                break
    if not texts:
        raise UsageError(
            f"no document of the stream {name} is held out; raise held_out or eval_bytes, or leave "
            "out streaming: of few documents a part of each is."
        )
    return hashes, texts


def load_stream(recipe, tokenizer):
    """A recipe's text as a `Corpus` that is trained on as it is read.

    Raises:
        UsageError: a stream that is missing, unreadable or empty.
    """
    dataset, source = find_stream(recipe)
    documents = documents_of(dataset, recipe.text_column, recipe.data)
    hashes, texts = take_held_out(documents, recipe.held_out, recipe.eval_bytes, recipe.data)
    boundary, ids, starts = tokenizer.eos_token_id, [], []
    for own in encode(tokenizer, texts):
        starts.append(len(ids))
        ids += [boundary, *own]
    content = "".join(texts).encode()
    held_out = Tokens(np.array([*ids, boundary]), np.array(starts), len(content))
    gzip_bits = 8 * len(gzip.compress(content, 9)) / len(content)
    stream = Stream(
        dataset, recipe.text_column, recipe.data, tokenizer, recipe.sequence_length, hashes
    )
    identity = [source["sha256"], recipe.held_out, recipe.eval_bytes, [*map(sha256, texts)]]
    sizes = {"documents": len(texts), "tokens": len(held_out.ids), "bytes": len(content)}
    record = {
        **source,
        "sha256": sha256(json.dumps(identity)),
        "tokenizer_sha256": tokenizer_hash(tokenizer),
        "streaming": True,
        "held_out": {**sizes, "gzip_bits_per_byte": gzip_bits},
    }
    return Corpus(stream, held_out, record)
