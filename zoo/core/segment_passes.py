"""A forward pass as several, one after the other, each of one segment of every document.

For what must have come through all layers before the next segment can begin: layers that read what
other layers made of the segments before. Segments are counted as in zoo/core/segments.py, which
computes them all at once.
"""

from dataclasses import replace

import torch
from torch import nn
from torch.nn.functional import pad

from .segments import documents_to_rows
from .sequence import Sequence
from .state import State
from .window import document_spans


class Joined(nn.Module):
    """Passes on a block's output for a whole pass, to be recorded."""

    def forward(self, before_BTD, after_BTD):
        """What came out of the block; what went in is for whoever records it."""
        return after_BTD


def run_by_segment(layers, x_BTD, sequence, cache, inputs, length, reads, keeps_all=False):
    """Runs a stack of layers over one segment after the other, and brings the cache up to date.

    Args:
        layers: called as `ZooBlock` is.
        x_BTD: the tokens.
        sequence: how they lie.
        cache: before them; None: there is none.
        inputs: the `Inputs` of the pass, for the cache.
        length: L, tokens per segment.
        reads: (the `Sequence` of a segment, the `State` of every layer before it) to what all
            layers get as keyword arguments.
        keeps_all: whether the output of every layer is wanted, or that of the last alone.

    Returns:
        Those outputs, [B, T, D] each.
    """
    specs = [layer.state_specs() for layer in layers]
    if cache is None:
        rows = [State(dict.fromkeys(names), is_kept=False) for names in specs]
    else:
        rows = [layer.read(sequence, s) for layer, s in zip(cache.layers, specs)]
    is_fresh = any(x is None for x in rows[0].tensors().values())
    passes = segment_passes(sequence, length, is_fresh)
    states, outputs = [state_by_document(state, sequence) for state in rows], []
    for index, (tokens, own) in enumerate(passes):
        h_BTD = take_tokens(x_BTD, tokens)
        read, pieces = reads(own, states), []
        for number, layer in enumerate(layers):
            states[number].is_kept = cache is not None or index + 1 < len(passes)
            h_BTD, states[number] = layer(h_BTD, own, states[number], **read)
            pieces.append(h_BTD)
        outputs.append(pieces if keeps_all else pieces[-1:])
    places = [tokens for tokens, _ in passes]
    joined = [put_tokens(pieces, places, x_BTD.shape) for pieces in zip(*outputs)]
    if cache is not None:
        for number, (layer, state) in enumerate(zip(cache.layers, states)):
            state = state_by_row(state, rows[number], sequence)
            layer.write(sequence, specs[number], state, None if number else inputs)
    return joined


def segment_passes(sequence, length, is_fresh):
    """A pass as several, each with no more than one segment of every document.

    A document is a row of those passes, in their states too.

    Args:
        sequence: the `Sequence` of the pass.
        length: L, tokens per segment.
        is_fresh: whether every document starts in this pass.

    Returns:
        Pairs of the tokens' places in the pass (a slice, or [T'] indices) and their `Sequence`.
    """
    batch, time = sequence.shape
    is_dense = sequence.cu_seqlens is None
    if torch.compiler.is_exporting() and not isinstance(time, int):
        raise ValueError(
            "with feedback the whole stack runs once per segment, and a program for export has to "
            "know how often: got a number of tokens that varies; leave it out of dynamic_shapes."
        )
    if is_dense and (time == 1 or (is_fresh and time <= length)):
        return [(slice(None), sequence)]
    if is_dense and is_fresh:
        return [
            _columns(sequence, start, min(start + length, time)) for start in range(0, time, length)
        ]
    spans, rows = document_spans(sequence), batch if is_dense else 1
    clock_T, positions_T = (
        x.expand(rows, -1).flatten() for x in (sequence.clock, sequence.positions)
    )
    lengths_N = spans.after - spans.start
    documents_N = torch.arange(len(lengths_N), device=clock_T.device)
    document_T = documents_N.repeat_interleave(lengths_N)
    rank_T = clock_T // length - (spans.start // length)[document_T]
    passes = []
    for rank in range(int(rank_T.max()) + 1):
        token_T = (rank_T == rank).nonzero()[:, 0]
        present_N, count_N = document_T[token_T].unique_consecutive(return_counts=True)
        cu_seqlens = pad(count_N.cumsum(0), (1, 0))
        last_N = torch.full_like(documents_N, -1)
        last_N[present_N] = torch.arange(len(present_N), device=clock_T.device)
        end_N = (spans.start // length + rank + 1) * length
        own = Sequence(
            (len(lengths_N), len(token_T)),
            positions_T[token_T][None],
            clock_T[token_T][None],
            torch.minimum(end_N, spans.after),
            cu_seqlens=cu_seqlens,
            token_index=token_T,
            row_of_document=present_N,
            continues=clock_T[token_T][cu_seqlens[:-1]] > 0,
            last_document=last_N,
        )
        passes.append((token_T, own))
    return passes


def _columns(sequence, start, end):
    """Some columns of a dense pass that is fresh: their places and their `Sequence`."""
    clock_BT = sequence.clock[:, start:end]
    own = replace(
        sequence,
        shape=(sequence.shape[0], end - start),
        positions=sequence.positions[:, start:end],
        clock=clock_BT,
        clock_after=clock_BT[:, -1] + 1,
    )
    return slice(start, end), own


def take_tokens(x_BTD, places):
    """The tokens of one of `segment_passes`."""
    if isinstance(places, slice):
        return x_BTD[:, places]
    return x_BTD.flatten(0, 1)[places][None]


def put_tokens(pieces, places, shape):
    """The inverse of `take_tokens` for all passes together.

    Args:
        pieces: of each pass.
        places: of each pass.
        shape: of the result.
    """
    if isinstance(places[0], slice):
        return torch.cat(pieces, dim=1)
    order_T = torch.cat(places).argsort()
    return torch.cat(pieces, dim=1)[0, order_T].reshape(shape)


def state_by_document(state, sequence):
    """A `State` by row as one by document; what it says of documents that start has no meaning."""
    if sequence.row_of_document is None:
        return state.copy()
    tensors = {
        name: None if x is None else x[sequence.row_of_document]
        for name, x in state.tensors().items()
    }
    return State(tensors, state.is_kept)


def state_by_row(state, before, sequence):
    """The inverse: of each row its last document's.

    Args:
        state: by document, after the pass.
        before: by row, before it; rows without a token keep theirs.
        sequence: the `Sequence` of the pass.
    """
    if sequence.row_of_document is None:
        return state
    tensors = {
        name: documents_to_rows(x_N, getattr(before, name), sequence)
        for name, x_N in state.tensors().items()
    }
    return State(tensors, is_kept=True)
