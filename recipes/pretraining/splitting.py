"""Which text is held out: chosen by hashes, the same bytes for every tokenizer and file order."""

import heapq
import math
from dataclasses import dataclass

from .caching import Pace, sha256

FEW_DOCUMENTS = 20


@dataclass
class Split:
    """Divides documents. What is not held out is trained on; nothing is left out.

    Attributes:
        num_documents: how many have text.
        num_bytes: of their text in UTF-8.
        num_blank: documents without text.
        tail: of fewer than 20 documents the last part of each is held out: this fraction of its
            bytes. None: whole documents are held out.
        shrink: (n, d): only n / d of each tail, so that all fit into the bytes asked for.
        last: documents with a smaller hash than this are held out whole,
        share: and so many bytes at the beginning of those with this hash.
    """

    num_documents: int
    num_bytes: int
    num_blank: int
    tail: float | None = None
    shrink: tuple[int, int] = (1, 1)
    last: int = 0
    share: float = math.inf

    def divide(self, key, text):
        """(text to train on, text to hold out) of a document, either of them may be ''."""
        if self.tail is not None:
            content = text.encode()
            length = round(len(content) * self.tail) * self.shrink[0] // self.shrink[1]
            cut = len(content) - length
            while cut < len(content) and _is_inside(content, cut):
                cut += 1  # at the end of a character, and no byte more is held out
            return content[:cut].decode(), content[cut:].decode()
        number = hash_of(key)
        if number > self.last:
            return text, ""
        if number < self.last or self.share == math.inf:
            return "", text
        content, cut = text.encode(), self.share
        while _is_inside(content, cut):
            cut -= 1
        return content[cut:].decode(), content[:cut].decode()


def _is_inside(content, index):
    return 0 < index < len(content) and content[index] & 0xC0 == 0x80  # a continuation byte


def hash_of(key):
    """A document's place in the order in which documents are held out."""
    return int(sha256(key), 16)


def with_text(documents):
    """The documents that have text."""
    return ((key, text) for key, text in documents if text and not text.isspace())


def plan_split(documents, name, held_out, eval_bytes):
    """Reads all documents and says which are held out.

    Of 20 documents or more those are held out whose hash is below `held_out`, at least one, the
    smallest hashes first until `eval_bytes` are reached; the last is divided. Of fewer each gives
    the same fraction.

    Args:
        documents: (key, text) pairs.
        name: of the corpus, for what is said on the terminal.
        held_out: fraction of the documents, or of each if they are few.
        eval_bytes: how many bytes are held out at most; 0: no limit.

    Returns:
        A `Split`.
    """
    budget = eval_bytes or math.inf
    limit = math.ceil(held_out * 2**32) << 224  # hashes are below 2^256
    groups, order, total = {}, [], 0  # hash: [bytes, copies]; the largest hash first; their bytes
    sizes, count, num_bytes, num_blank = [], 0, 0, 0
    pace = Pace(f"reading {name}")
    for key, text in documents:
        if not text or text.isspace():
            num_blank += 1
            continue
        size = len(text.encode())
        pace.add(size)
        count, num_bytes = count + 1, num_bytes + size
        if count < FEW_DOCUMENTS:
            sizes.append(size)
        number = hash_of(key)
        if number in groups:
            groups[number][1] += 1
        elif number < limit or not groups or number < -order[0]:
            groups[number] = [0, 1]
            heapq.heappush(order, -number)
        else:
            continue
        groups[number][0] += size
        total += size
        # Without the largest hash where the others are enough: no more than that is kept in memory.
        while len(order) > 1 and (-order[0] >= limit or total - groups[-order[0]][0] >= budget):
            total -= groups.pop(-heapq.heappop(order))[0]
    split = Split(count, num_bytes, num_blank)
    if count < FEW_DOCUMENTS:
        split.tail = held_out
        tails = sum(round(size * held_out) for size in sizes)
        split.shrink = (eval_bytes, tails) if tails > budget else (1, 1)
    else:
        split.last = -order[0]
        size, copies = groups[split.last]
        if total > budget:
            split.share = (eval_bytes - (total - size)) // copies
    return split
