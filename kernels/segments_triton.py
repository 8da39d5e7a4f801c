"""Cutting documents into segments, so that a few long ones fill a device.

A kernel's program walks one segment; a segment never holds tokens of two documents. Everything
here is computed from shapes, or on the device: the host waits for nothing.
"""

import functools
from contextlib import contextmanager
from typing import NamedTuple

import torch

try:  # transformers asks for every library that code from the Hub imports, but in a try
    import triton
    import triton.language as tl
except ImportError:
    raise

from .launch_triton import num_processors, whole

# Segments shorter than this cost more in states than they bring in programs.
SHORTEST_SEGMENT = 1024


class Plan(NamedTuple):
    """How the documents of a call are cut into segments.

    Segment s covers the tokens from `table[s]` to `table[stride + s]` of the stream of all rows;
    without a table, rows of `time` tokens are cut into `per_row` segments of `length`.

    Attributes:
        time: T.
        length: tokens of a full segment.
        per_row: segments of each row; 0 with a table.
        num_segments: with a table an upper bound, the rest are empty.
        num_documents: N.
        is_cut: whether a document can have several segments.
        table: None, [N + 1] document boundaries where documents are segments, or [4, segments]:
            start, end, and those of the segment's document.
        stride: from a segment's start to its end in the table.
        offsets: [N + 1] the first segment of each document; None without a cut table.
    """

    time: int
    length: int
    per_row: int
    num_segments: int
    num_documents: int
    is_cut: bool
    table: torch.Tensor | None = None
    stride: int = 1
    offsets: torch.Tensor | None = None


# What measurements and tests choose in place of our tables.
overridden = {}


@contextmanager
def override(**choices):
    """Chooses for a block of code.

    `segment`: tokens of a segment. A kernel's `Config` by its name. Of the scan also `at_once`:
    whether a backward pass is one launch; `blocks`: two passes, where BLOCKS has them (True) or by
    ((padded width, `Blocks`), ...); `walk`: the first one's `Walk`.
    """
    previous = dict(overridden)
    overridden.update(choices)
    try:
        yield
    finally:
        overridden.clear()
        overridden.update(previous)


def plan(batch, time, programs_per_document, cu_seqlens, device, length=None):
    """Cuts documents so that the programs fill the device.

    Args:
        batch, time: B and T.
        programs_per_document: heads times slices.
        cu_seqlens: [N + 1] or None.
        device: that of the call.
        length: tokens of a segment; None: what keeps the device busy.
    """
    if length is None:
        length = _segment_length(batch, time, programs_per_document, cu_seqlens, device)
    if cu_seqlens is None:
        per_row = -(-time // length)
        return Plan(time, length, per_row, batch * per_row, batch, per_row > 1)
    num_documents = len(cu_seqlens) - 1
    if length >= time:
        return Plan(time, time, 0, num_documents, num_documents, False, cu_seqlens)
    table, offsets = segment_table(cu_seqlens, time, length)
    count = table.shape[1]
    return Plan(time, length, 0, count, num_documents, True, table, count, offsets)


def count_segments(batch, time, programs_per_document, cu_seqlens, device):
    """How many segments `plan` would make, 0 if every document is one. Arguments as there."""
    length = _segment_length(batch, time, programs_per_document, cu_seqlens, device)
    if length >= time:
        return 0
    if cu_seqlens is None:
        return batch * -(-time // length)
    return time // length + len(cu_seqlens) - 1


def _segment_length(batch, time, programs_per_document, cu_seqlens, device):
    if "segment" in overridden:
        return min(overridden["segment"], time)
    # How long documents of a packed stream are, only the device knows: they are cut as if the
    # stream were one. Those shorter than a segment are walked once all the same.
    rows = batch if cu_seqlens is None else 1
    most = max(1, int(time) // SHORTEST_SEGMENT)
    count = _num_segments(int(rows * programs_per_document), num_processors(device), most)
    return time if count == 1 else -(-time // (64 * count)) * 64


@functools.cache
def _num_segments(programs, processors, most):
    """As few segments as keep nine tenths of a device busy, the last round included.

    Each costs the traffic of a state. Two programs run at once on a processor.

    Args:
        programs: those of uncut documents.
        processors: of the device.
        most: no more segments than this, or 64.
    """

    def busy(count):
        slots, total = 2 * processors, count * programs
        return min(0.9, total / (slots * -(-total // slots)))

    return max(range(1, min(most, 64) + 1), key=lambda count: (busy(count), -count))


_kept = {}


@whole
def kept(make, tensors, numbers):
    """make(*tensors, *numbers), kept until the same function is asked for something else.

    All layers of a forward pass, and its backward, ask for the same tables.

    Args:
        make: a function that looks at nothing else.
        tensors: told apart by identity and version; None is one.
        numbers: told apart by value.
    """
    on_device = [x for x in tensors if x is not None and x.is_cuda]
    # A captured graph must make its own table again whenever it runs.
    if on_device and torch.cuda.is_current_stream_capturing():
        return make(*tensors, *numbers)
    # Tensors of inference mode have no version: what was kept for them may have changed since.
    if any(x is not None and x.is_inference() for x in tensors):
        return make(*tensors, *numbers)
    versions = [None if x is None else x._version for x in tensors]
    if make in _kept:
        old_tensors, *rest, result = _kept[make]
        is_same = all(a is b for a, b in zip(old_tensors, tensors, strict=True))
        if is_same and rest == [versions, numbers]:
            return result
    result = make(*tensors, *numbers)
    _kept[make] = tensors, versions, numbers, result
    return result


def segment_table(cu_seqlens, time, length):
    """([4, segments], [N + 1]) as in `Plan`, without reading a value on the host."""
    return kept(_segment_table, (cu_seqlens,), (time, length))


def _segment_table(cu_seqlens, time, length):
    bounds = cu_seqlens.long()
    num_segments = time // length + len(bounds) - 1
    count = (bounds.diff() + length - 1) // length
    offsets = torch.cat([count.new_zeros(1), count.cumsum(0)])
    segment = torch.arange(num_segments, device=bounds.device)
    document = torch.searchsorted(offsets, segment, right=True) - 1
    # Segments past the last one end where they start.
    document = document.clamp(max=len(bounds) - 2)
    first, end = bounds[document], bounds[document + 1]
    start = torch.minimum(first + (segment - offsets[document]) * length, end)
    table = torch.stack([start, torch.minimum(start + length, end), first, end])
    return table, offsets


@triton.jit
def segment_bounds(table, stride, s, T, LENGTH, PER_ROW):
    """First token and end of segment s in the stream of all rows, int64."""
    if table is None:
        row = s // PER_ROW
        start = row * T + (s % PER_ROW) * LENGTH
        end = tl.minimum(start + LENGTH, (row + 1) * T)
    else:
        start = tl.load(table + s).to(tl.int64)
        end = tl.load(table + stride + s).to(tl.int64)
    return start, end
