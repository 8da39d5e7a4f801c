"""A forward pass as frames, one after the other: segments of documents with memory around them.

A frame is [r tokens that read; L tokens of text; m tokens that write], r being m or 0. Token n of a
document stands at r + n mod L in the frame of its segment, n // L. The tokens that write a segment,
and those that read what was written, are both run late: right before the first token of the next
segment. So the state after exactly L tokens is that of a full segment, a text that ends with a
segment never pays for its memory, and a step costs more than a token at segments' ends alone.
Segments are counted as in zoo/core/segments.py.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from .segment_passes import put_tokens
from .sequence import Sequence
from .window import document_spans


class FrameSizes(NamedTuple):
    """What a frame is made of.

    Attributes:
        length: L, tokens of text.
        num_reads: r, tokens before them.
        num_writes: m, tokens behind them.
    """

    length: int
    num_reads: int
    num_writes: int

    @property
    def slots(self):
        """Tokens that a later one of the same frame may still look at: all but those that write."""
        return self.num_reads + self.length

    @property
    def width(self):
        """All of them."""
        return self.slots + self.num_writes

    def place(self, clock):
        """Where tokens of text stand in their frames, from their numbers in their documents."""
        return self.num_reads + clock % self.length

    def filled(self, done):
        """Slots that are filled after so many tokens of a document."""
        return torch.where(done > 0, self.place(done - 1) + 1, 0)


class Frame(NamedTuple):
    """A part of a pass: of each document a frame, or the rest of one, or none.

    A document is a row of it, in its state too. Where all documents are at the same place they are
    rows of its tokens as well; else they are packed.

    Attributes:
        places: of its tokens of text in the pass, a slice of columns or [T'] indices.
        own: the `Sequence` of all its tokens, whose clock is the place in the frame.
        text: where its tokens of text are, a slice of its columns or indices.
        source: [T''], of packed tokens: index in [tokens of the pass; memory of each document];
            None: they are rows.
        num_reads: of rows, how many tokens before the text.
        written: where the tokens that write are, as `text`; None: there are none.
        writers: [N'], the documents that write; None: all.
        is_anew: whether no document has older tokens of the same frame.
        number: which frame of its document it is, from 0: of all rows, or [N].
    """

    places: slice | torch.Tensor
    own: Sequence
    text: slice | torch.Tensor
    source: torch.Tensor | None = None
    num_reads: int = 0
    written: slice | torch.Tensor | None = None
    writers: torch.Tensor | None = None
    is_anew: bool = False
    number: int | torch.Tensor = 0

    def tokens(self, x_BTD, vectors_NMD):
        """Its tokens, of the pass's and the memory that every document reads and writes with."""
        if self.source is not None:
            both_TD = torch.cat([x_BTD.flatten(0, 1), vectors_NMD.flatten(0, 1)])
            return both_TD[self.source][None]
        parts = [x_BTD[:, self.places]]
        if self.num_reads:
            parts.insert(0, vectors_NMD)
        if self.written is not None:
            parts.append(vectors_NMD)
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def of_text(self, h_BTD):
        """What became of its tokens of text."""
        return h_BTD[:, self.text]

    def of_writers(self, h_BTD, num_writes):
        """What became of the tokens that write, [N', m, D]."""
        return h_BTD[:, self.written].flatten(0, 1).unflatten(0, (-1, num_writes))

    def put(self, x_N, new_N):
        """A tensor by document with new values for those that write."""
        new_N = new_N.to(x_N.dtype)
        return new_N if self.writers is None else x_N.index_copy(0, self.writers, new_N)


def joined_text(pieces, frames, shape):
    """The tokens of a pass from the text of its frames.

    Args:
        pieces: of each frame, as of `Frame.of_text`.
        frames: those.
        shape: [B, T, D] of the result; zeros where no frame has a token.
    """
    places = [frame.places for frame in frames]
    if isinstance(places[0], slice):
        return put_tokens(pieces, places, shape)
    y_TD = pieces[0].new_zeros(shape).flatten(0, 1)
    return y_TD.index_copy(0, torch.cat(places), torch.cat(pieces, dim=1)[0]).reshape(shape)


def memory_frames(sequence, sizes, is_fresh):
    """The frames of a pass, in order.

    Args:
        sequence: the `Sequence` of the pass.
        sizes: `FrameSizes`.
        is_fresh: whether every document starts in this pass.
    """
    batch, time = sequence.shape
    if torch.compiler.is_exporting() and not isinstance(time, int):
        raise ValueError(
            "with memory tokens the whole stack runs once per segment, and a program for export "
            "has to know how often: got a number of tokens that varies; leave it out of "
            "dynamic_shapes."
        )
    if sequence.cu_seqlens is None and is_fresh and sequence.keep is None:
        return _frames_of_rows(sequence, sizes, 0)
    if sequence.cu_seqlens is None:
        clock_B = sequence.clock[:, 0]
        if time == 1 and not bool(at_border(sequence, sizes).any()):
            return [step_frame(sequence, sizes)]
        start = int(clock_B[0])
        if sequence.keep is None and bool((clock_B == start).all()):
            return _frames_of_rows(sequence, sizes, start)
    return _frames_of_stream(sequence, sizes)


def at_border(sequence, sizes):
    """Which rows of a single step begin a segment with it, [B] bool."""
    is_first_B = sequence.clock[:, 0] % sizes.length == 0
    return is_first_B if sequence.keep is None else is_first_B & sequence.keep


def step_frame(sequence, sizes):
    """The frame of a single step in which no row begins a segment."""
    place_BT = sizes.place(sequence.clock)
    after_B = place_BT[:, 0] + 1
    own = replace(sequence, positions=place_BT, clock=place_BT, clock_after=after_B)
    return Frame(slice(None), own, slice(None), number=sequence.clock[:, 0] // sizes.length)


def rows_of_frame(batch, begin, count, device):
    """The `Sequence` of rows that are all at one place of their frames.

    Args:
        batch: rows.
        begin: the place of their first token.
        count: tokens of each.
        device: where they are.
    """
    place_1T = torch.arange(begin, begin + count, device=device)[None]
    return Sequence((batch, count), place_1T, place_1T, place_1T[:, -1] + 1)


def _frames_of_rows(sequence, sizes, start):
    """Of rows that all are at the same clock."""
    (batch, time), device = sequence.shape, sequence.clock.device
    length, num_reads, num_writes = sizes
    frames = []
    if start > 0 and start % length == 0:
        own = rows_of_frame(batch, sizes.slots, num_writes, device)
        none = slice(0, 0)
        number = start // length - 1
        frames.append(Frame(none, own, none, written=slice(None), number=number))
    done = 0
    while done < time:
        slot = (start + done) % length
        count = min(length - slot, time - done)
        reads = 0 if slot else num_reads
        writes = num_writes if done + count < time else 0
        begin = 0 if slot == 0 else num_reads + slot
        own = rows_of_frame(batch, begin, reads + count + writes, device)
        frames.append(
            Frame(
                slice(done, done + count),
                own,
                slice(reads, reads + count),
                num_reads=reads,
                written=slice(reads + count, None) if writes else None,
                is_anew=slot == 0,
                number=(start + done) // length,
            )
        )
        done += count
    return frames


def _frames_of_stream(sequence, sizes):
    """Of documents at clocks of their own: packed, or rows of which some may not take part."""
    length, num_reads, num_writes = sizes
    clock_T, device, places_T = sequence.clock.flatten(), sequence.clock.device, None
    spans = document_spans(sequence)
    start_N, count_N = spans.start, spans.after - spans.start
    if sequence.cu_seqlens is None:
        clock_T = sequence.clock.expand(sequence.shape).flatten()
        if sequence.keep is not None:
            start_N = torch.where(sequence.keep, start_N, sequence.clock_after)
            count_N = count_N * sequence.keep
            places_T = sequence.keep.nonzero()[:, 0]  # of a single step
            clock_T = clock_T[places_T]
    if places_T is None:
        places_T = torch.arange(len(clock_T), device=device)
    after_N = start_N + count_N
    documents_N = torch.arange(len(count_N), device=device)
    document_T = documents_N.repeat_interleave(count_N)
    first_N, last_N = start_N // length, (after_N - 1) // length
    is_present_N, begins_N = count_N > 0, start_N % length == 0
    num_tokens = sequence.shape[0] * sequence.shape[1] if sequence.cu_seqlens is None else None
    num_tokens = len(clock_T) if num_tokens is None else num_tokens
    memory_M = torch.arange(num_writes, device=device)
    frames = []
    # Before rank 0 come the writes of segments that were full when the pass began.
    for rank in range(-1, int((last_N - first_N).max()) + 1):
        token_T = ((clock_T // length - first_N[document_T]) == rank).nonzero()[:, 0]
        goes_on_N = is_present_N & (first_N + rank < last_N)
        if rank < 0:
            reads_N, writes_N = torch.zeros_like(begins_N), is_present_N & begins_N & (start_N > 0)
        else:
            is_here_N = is_present_N & (first_N + rank <= last_N)
            reads_N, writes_N = is_here_N & (begins_N if rank == 0 else True), goes_on_N
        readers, writers = (x.nonzero()[:, 0] for x in (reads_N, writes_N))
        if len(token_T) + len(writers) == 0:
            continue
        parts = [(document_T[token_T], sizes.place(clock_T[token_T]), places_T[token_T])]
        for owners, begin, number in ((readers, 0, num_reads), (writers, sizes.slots, num_writes)):
            place = (begin + memory_M[:number]).repeat(len(owners))
            source = (owners[:, None] * num_writes + memory_M[:number]).flatten() + num_tokens
            parts.append((owners.repeat_interleave(number), place, source))
        document, place, source = (torch.cat(x) for x in zip(*parts))
        order = (document * sizes.width + place).argsort()
        document, place, source = document[order], place[order], source[order]
        present, count = document.unique_consecutive(return_counts=True)
        cu_seqlens = pad(count.cumsum(0), (1, 0))
        row = torch.full_like(documents_N, -1)
        row[present] = torch.arange(len(present), device=device)
        done_N = torch.minimum((first_N + rank + 1) * length, after_N).maximum(start_N)
        # A row that takes no part keeps all it has, whatever its clock: padding has none.
        keeps_N = writes_N | ~is_present_N
        filled_N = torch.where(keeps_N, sizes.width, sizes.filled(done_N))
        own = Sequence(
            (len(documents_N), len(place)),
            place[None],
            place[None],
            filled_N,
            cu_seqlens=cu_seqlens,
            token_index=torch.arange(len(place), device=device),
            row_of_document=present,
            continues=place[cu_seqlens[:-1]] > 0,
            last_document=row,
        )
        written = (place >= sizes.slots).nonzero()[:, 0]
        frames.append(
            Frame(
                places_T[token_T],
                own,
                (source < num_tokens).nonzero()[:, 0],
                source=source,
                written=written if len(writers) else None,
                writers=writers,
                number=(done_N - 1).clamp(min=0) // length,
            )
        )
    return frames


__all__ = [
    "Frame",
    "FrameSizes",
    "at_border",
    "joined_text",
    "memory_frames",
    "rows_of_frame",
    "step_frame",
]
