"""Text to token ids on disk, in memory that is bounded by bytes of text."""

import hashlib
import itertools
import json
import os
import re
import shutil
import zlib
from array import array
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .building import vocabulary_size
from .caching import Pace, sha256
from .encoding import died, encode, encoded, num_workers
from .recipe import UsageError
from .splitting import with_text

BATCH_BYTES, BATCH_TEXTS = 2**20, 1024  # handed to the tokenizer at once, at most
PIECE = BATCH_BYTES // 4  # characters, which take at most four bytes each
AROUND = 2000  # characters on either side that show whether a cut changes the ids
LINE_OR_WORD = re.compile(r"(?<=\S\n)(?=\S)|(?<=\S)(?= \w)")


def pieces(tokenizer, text):
    """A long document in pieces that together have the ids of the whole.

    It is cut between lines or words (anywhere if each token is one character), where the
    tokenizer's pre-tokenizer splits and where the text around the cut, whole and in two, has the
    same ids. A tokenizer that treats the beginning of a text specially, or does not split text
    before it merges, passes nowhere and gets the document as it is.
    """
    begin, anywhere = 0, len(text) > PIECE and _is_by_character(tokenizer)
    while len(text) - begin > PIECE:
        cut = _find_cut(tokenizer, text, begin, anywhere)
        if cut is None:
            break
        yield text[begin:cut]
        begin = cut
    yield text[begin:]


def _find_cut(tokenizer, text, begin, anywhere):
    end = begin + PIECE
    if anywhere:
        cuts = [end]
    else:
        found = LINE_OR_WORD.finditer(text, end - AROUND)
        cuts = [match.start() for match in itertools.islice(found, 8)]
    for cut in cuts:
        before, after = text[max(cut - AROUND, begin) : cut], text[cut : cut + AROUND]
        whole, first, second = encode(tokenizer, [before + after, before, after])
        if whole == first + second and (anywhere or _splits(tokenizer, before, after)):
            return cut
    return None


def _splits(tokenizer, before, after):
    splitter = getattr(getattr(tokenizer, "backend_tokenizer", None), "pre_tokenizer", None)
    words = splitter.pre_tokenize_str(before + after) if splitter else []
    return any(len(before) in span for _, span in words)


def _is_by_character(tokenizer):
    special = set(tokenizer.all_special_tokens)
    return all(len(token) == 1 or token in special for token in tokenizer.get_vocab())


def batches(tokenizer, parts):
    """Texts to tokenise at once.

    Args:
        tokenizer: says where long texts may be cut.
        parts: (is held out, text) of documents.

    Yields:
        Lists of (is held out, begins a document, text) that hold at most `BATCH_BYTES` and
        `BATCH_TEXTS`, unless one text alone is longer and cannot be cut.
    """
    batch, size = [], 0
    for is_held_out, document in parts:
        for index, text in enumerate(pieces(tokenizer, document)):
            length = len(text.encode())
            if batch and (size + length > BATCH_BYTES or len(batch) == BATCH_TEXTS):
                yield batch
                batch, size = [], 0
            batch.append((is_held_out, index == 0, text))
            size += length
    if batch:
        yield batch


@dataclass
class _Writer:
    """Writes one split, and keeps its text only as a hash and a gzip size."""

    folder: Path
    name: str
    boundary: int
    dtype: np.dtype
    starts: array = field(default_factory=lambda: array("q"))
    num_tokens: int = 0
    num_bytes: int = 0
    gzip_bytes: int = 0

    def __post_init__(self):
        self.file = open(self.folder / f"{self.name}.bin", "wb")
        self.gzip = zlib.compressobj(9, wbits=31)  # the gzip container, as `gzip -9` writes it
        self.hash = hashlib.sha256()

    def add(self, begins, text, ids):
        """Appends text, and returns its length in bytes."""
        content = text.encode()
        if begins:
            self.starts.append(self.num_tokens)
            self.hash.update(b"\xff")  # no byte of UTF-8
            self._write([self.boundary])
        self._write(ids)
        self.hash.update(content)
        self.num_bytes += len(content)
        if self.name == "held_out":
            self.gzip_bytes += len(self.gzip.compress(content))
        return len(content)

    def _write(self, ids):
        self.file.write(np.asarray(ids, dtype=self.dtype).tobytes())
        self.num_tokens += len(ids)

    def close(self):
        self._write([self.boundary])
        self.file.close()
        np.save(self.folder / f"{self.name}_starts.npy", np.asarray(self.starts, dtype=np.int64))
        record = {
            "documents": len(self.starts),
            "tokens": self.num_tokens,
            "bytes": self.num_bytes,
            "dtype": np.dtype(self.dtype).name,
        }
        if self.name == "held_out" and self.num_bytes:
            size = self.gzip_bytes + len(self.gzip.flush())
            record["gzip_bits_per_byte"] = 8 * size / self.num_bytes
        return record


def fill_cache(folder, documents, split, tokenizer, record, workers=1):
    """Tokenises a corpus into `folder`, which appears when it is complete.

    Its bytes are the same with any number of workers.

    Args:
        folder: the cache. The caller holds its lock.
        documents: (key, text) pairs, the same that `split` was planned on.
        split: says what is held out.
        tokenizer: a transformers tokenizer with an end-of-text token.
        record: what is known of the corpus; sizes and hash are added to it.
        workers: processes that tokenise; 0: as many as the text is worth.

    Raises:
        UsageError: no text on one side of the split, text that changed meanwhile, a full disk, a
            worker that died.
    """
    building = folder.with_name(f"{folder.name}.unfinished")
    try:
        shutil.rmtree(building, ignore_errors=True)  # of a process that was killed just now
        building.mkdir(parents=True)
        _write_cache(building, documents, split, tokenizer, record, workers)
        os.replace(building, folder)
    except OSError as error:
        raise UsageError(
            f"cannot write to {folder.parent}: {error.strerror or error}; make room, or choose "
            "another --cache_dir."
        ) from None
    except RuntimeError as error:
        if not died(error):
            raise
        raise UsageError(
            f"a process that tokenised {record['source']} died ({str(error).split('. ')[0]}), "
            "perhaps for want of memory; start again, with fewer --tokenising_workers."
        ) from None
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write_cache(folder, documents, split, tokenizer, record, workers):
    dtype = np.uint16 if vocabulary_size(tokenizer) <= 2**16 else np.uint32
    splits = [
        _Writer(folder, name, tokenizer.eos_token_id, dtype) for name in ("train", "held_out")
    ]
    parts = (
        (is_held_out, part)
        for key, text in with_text(documents)
        for is_held_out, part in enumerate(split.divide(key, text))
        if part
    )
    pace = Pace(f"tokenising {record['source']}", split.num_bytes)
    workers = num_workers(workers, split.num_bytes)
    for batch, ids in encoded(tokenizer, batches(tokenizer, parts), workers, dtype):
        for (is_held_out, begins, text), text_ids in zip(batch, ids):
            pace.add(splits[is_held_out].add(begins, text, text_ids))
    for part in splits:
        record[part.name] = part.close()
        if part.num_bytes == 0:
            raise UsageError(
                f"the corpus {record['source']} is empty: no {part.name.replace('_', '-')} text; "
                "check the file, or give more text (or a larger held_out or eval_bytes)."
            )
    if sum(part.num_bytes for part in splits) != split.num_bytes:
        raise UsageError(f"{record['source']} changed while it was read; start again.")
    # What is trained on and what is measured: the identity of a corpus, wherever it came from.
    record["sha256"] = sha256(" ".join(part.hash.hexdigest() for part in splits))
    record["documents_without_text"] = split.num_blank
    (folder / "corpus.json").write_text(json.dumps(record, indent=1) + "\n")
