"""Held-out text for any tokenizer: its documents, and their tokens as a run would measure them."""

from dataclasses import dataclass

import numpy as np

from pretraining.caching import sha256
from pretraining.corpus import Tokens
from pretraining.encoding import encode
from pretraining.mixing import sources_of
from pretraining.recipe import UsageError
from pretraining.sources import find_source, find_stream
from pretraining.splitting import plan_split, with_text
from pretraining.streams import documents_of, take_held_out


@dataclass
class HeldOut:
    """Text that is measured.

    Attributes:
        documents: the texts.
        record: source, sizes, and a hash that is the same where the documents are.
    """

    documents: list[str]
    record: dict


def held_out_text(recipe, whole=False):
    """The text that a run of a recipe holds out, without tokenising what it trains on.

    Args:
        recipe: its data fields say what is read.
        whole: all documents are measured, up to `eval_bytes`, none kept for training.

    Raises:
        UsageError: a source that is missing, unreadable or empty.
    """
    documents, names = [], []
    for name, _, single in sources_of(recipe):
        documents += _of_source(single, whole)
        names.append(f"{name}: {single.data}" if name else single.data)
    if not documents:
        raise UsageError(f"{', '.join(names)}: no text to measure; give a file with text in it.")
    content = [text.encode() for text in documents]
    record = {
        "source": ", ".join(names),
        "sha256": sha256(b"".join(b"\xff" + text for text in content)),  # no byte of UTF-8
        "documents": len(documents),
        "bytes": sum(map(len, content)),
    }
    return HeldOut(documents, record)


def _of_source(recipe, whole):
    if recipe.streaming:
        dataset, _ = find_stream(recipe)
        texts = documents_of(dataset, recipe.text_column, recipe.data)
        if whole:
            return list(_head(texts, recipe.eval_bytes))
        return take_held_out(texts, recipe.held_out, recipe.eval_bytes, recipe.data)[1]
    read, _ = find_source(recipe, recipe.corpus_dir)
    if whole:
        return list(_head((text for _, text in with_text(read())), recipe.eval_bytes))
    split = plan_split(read(), recipe.data, recipe.held_out, recipe.eval_bytes)
    divided = (split.divide(key, text) for key, text in with_text(read()))
    return [held_out for _, held_out in divided if held_out]


def _head(texts, num_bytes):
    """The first texts, of so many bytes together at most; 0: all of them."""
    left = num_bytes or float("inf")
    for text in texts:
        content = text.encode()
        if len(content) > left:
            content = content[:left].decode(errors="ignore")  # no half of a character
            if content:
                yield content
            return
        left -= len(content)
        yield text


@dataclass
class Unended(Tokens):
    """Text whose boundary is not predicted: it begins a document, and does not end the last.

    Attributes:
        boundary: its id.
    """

    boundary: int

    @property
    def num_targets(self):
        """How many tokens are predicted."""
        return len(self.ids) - 1 - len(self.starts)

    def window(self, start, length, packing):
        """As of `Tokens`, with -100 in place of boundaries among the targets."""
        ids, targets, positions = super().window(start, length, packing)
        return ids, targets.masked_fill(targets == self.boundary, -100), positions


def boundary_of(tokenizer):
    """What a document's first token is predicted from, and whether it also ends a document.

    It is the tokenizer's end-of-text, as in training here; where the tokenizer puts a
    beginning-of-text before every text, as Llama's does, or has no other, it is that.

    Returns:
        Its id, and whether it is end-of-text.

    Raises:
        UsageError: the tokenizer has neither.
    """
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if begin is None and end is None:
        raise UsageError(
            "the tokenizer has neither an eos_token nor a bos_token, from which the first token of "
            "a document is predicted; choose another with --tokenizer."
        )
    if begin is not None and (end is None or tokenizer("a")["input_ids"][:1] == [begin]):
        return begin, begin == end
    return end, True


def tokens_of(documents, tokenizer):
    """Documents as one stream: `boundary document boundary ... boundary`.

    Args:
        documents: their texts.
        tokenizer: of transformers.

    Raises:
        UsageError: a tokenizer without a boundary.
    """
    boundary, is_end = boundary_of(tokenizer)
    ids, starts, count = [], [], 0
    for own in encode(tokenizer, documents):
        ids.append(np.array([boundary, *own]))
        starts.append(count)
        count += len(ids[-1])
    stream = np.concatenate([*ids, [boundary]]), np.array(starts)
    num_bytes = sum(len(text.encode()) for text in documents)
    return Tokens(*stream, num_bytes) if is_end else Unended(*stream, num_bytes, boundary)
