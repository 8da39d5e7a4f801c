"""A stack of layers over `memory_frames`: what a segment leaves goes into the next one's frame.

A layer is called as `ZooBlock` is, with `written` and `writers` of its `Frame` as keyword arguments
where it says `has_memory`. Of its state, tensors named in `memory_names` are a memory, which goes
from segment to segment; the others are about the frame that is not finished.
"""

from dataclasses import replace

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast

from .memory_frames import (
    Frame,
    at_border,
    joined_text,
    memory_frames,
    rows_of_frame,
    step_frame,
)
from .segment_passes import state_by_document, state_by_row
from .state import State
from .window import document_spans

# Of the first layer: what tokens of memory came to in the last layer.
MEMORY = "memory_BMD"


class MemoryTokens(nn.Module):
    """The vectors that a document's first memory is made of, all of them different.

    Args:
        config: with num_memory_tokens, hidden_size and initializer_range.
        std: of the vectors at the start; None: as wide as embeddings.
    """

    def __init__(self, config, std=None):
        super().__init__()
        self.std = config.initializer_range if std is None else std
        self.vectors = nn.Parameter(torch.empty(config.num_memory_tokens, config.hidden_size))

    def init_weights_of_paper(self):
        """No two are the same."""
        init.normal_(self.vectors, std=self.std)

    def forward(self, count, dtype):
        """For so many documents, [N, m, D]."""
        return self.vectors.to(dtype).repeat(count, 1, 1)


class MemoryWalk:
    """One forward pass.

    Args:
        layers: called as above.
        memory: the `MemoryTokens`.
        enter: (tokens of a frame, its `Sequence`) to the tokens and keyword arguments for layers.
        leave: what makes memory of the last layer's output; None: the layers keep it themselves,
            and every segment is written with the same vectors.
        sizes: `FrameSizes`.
        counts_on: whether clocks go on from frame to frame, for layers that look at earlier ones;
            else each begins at 0.
    """

    def __init__(self, layers, memory, enter, leave, sizes, counts_on=False):
        self.layers, self.memory, self.enter, self.leave = layers, memory, enter, leave
        self.sizes, self.counts_on = sizes, counts_on

    def run(self, x_BTD, sequence, cache, inputs, keeps_all=False):
        """Runs it, and brings the cache up to date.

        Args:
            x_BTD: the tokens.
            sequence: how they lie.
            cache: before them; None: there is none.
            inputs: the `Inputs` of the pass, for the cache.
            keeps_all: whether the output of every layer is wanted, or that of the last alone.

        Returns:
            Those outputs, [B, T, D] each.
        """
        specs = [layer.state_specs() for layer in self.layers]
        if cache is None:
            rows = [State(dict.fromkeys(names), is_kept=False) for names in specs]
        else:
            rows = [layer.read(sequence, s) for layer, s in zip(cache.layers, specs)]
        is_fresh = any(x is None for x in rows[0].tensors().values())
        self.states = [state_by_document(state, sequence) for state in rows]
        is_one_step = x_BTD.shape[1] == 1 and sequence.cu_seqlens is None
        if is_one_step and torch.compiler.is_compiling():
            self.begin(sequence, x_BTD, is_fresh)
            flags = [state.may_overwrite for state in self.states]
            for state in self.states:  # some rows take back what they had
                state.may_overwrite = False
            self.border_of_rows(sequence, x_BTD, is_fresh)
            for state, may_overwrite in zip(self.states, flags):
                state.may_overwrite = may_overwrite
            frames = [step_frame(sequence, self.sizes)]
        else:
            frames = memory_frames(sequence, self.sizes, is_fresh)
            is_step_inside = is_one_step and isinstance(frames[0].text, slice)
            is_step_inside &= len(frames) == 1 and not frames[0].is_anew
            if is_fresh or not is_step_inside:  # else a copy of all memory, of no effect
                self.begin(sequence, x_BTD, is_fresh)
        outputs = []
        for index, frame in enumerate(frames):
            # Of rows, the next frame has no use for the keys of this one.
            is_kept = cache is not None and (frame.source is not None or index + 1 == len(frames))
            pieces = self.run_frame(frame, x_BTD, is_kept, keeps_all)
            outputs.append([frame.of_text(h_BTD) for h_BTD in pieces])
        joined = [joined_text(pieces, frames, x_BTD.shape) for pieces in zip(*outputs)]
        if cache is not None:
            for number, (layer, state) in enumerate(zip(cache.layers, self.states)):
                state = state_by_row(state, rows[number], sequence)
                layer.write(sequence, specs[number], state, None if number else inputs)
        return joined

    def begin(self, sequence, x_BTD, is_fresh):
        """Gives documents that start in this pass the memory of a document without tokens."""
        start_N = document_spans(sequence).start
        if sequence.keep is not None:  # of padding, clocks say nothing
            start_N = torch.where(sequence.keep, start_N, 1)
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        for layer, state in zip(self.layers, self.states):
            for name in layer.memory_names:
                if name == MEMORY:
                    first_N = self.memory(start_N.shape[0], dtype)
                else:
                    spec = layer.state_specs()[name]
                    shape = start_N.shape[0], *spec.shape
                    first_N = x_BTD.new_zeros(shape, dtype=spec.dtype or dtype)
                if not is_fresh:
                    x_N = getattr(state, name)
                    is_old = (start_N > 0).view(-1, *[1] * (x_N.ndim - 1))
                    first_N = torch.where(is_old, x_N, first_N)
                setattr(state, name, first_N)

    def frame_names(self, number):
        """Tensors of a layer's state that are about the unfinished frame."""
        layer = self.layers[number]
        return [name for name in layer.state_specs() if name not in layer.memory_names]

    def vectors(self, dtype):
        """What the tokens of memory of a frame are, [N, m, D]."""
        if self.leave is None:
            name = self.layers[0].memory_names[0]
            return self.memory(getattr(self.states[0], name).shape[0], dtype)
        return getattr(self.states[0], MEMORY).to(dtype)

    def run_frame(self, frame, x_BTD, is_kept, keeps_all=False):
        """Runs the layers over a frame; returns their outputs, or the last one's."""
        h_BTD = frame.tokens(x_BTD, self.vectors(x_BTD.dtype))
        return self.run_layers(h_BTD, frame, is_kept, keeps_all)

    def run_layers(self, h_BTD, frame, is_kept, keeps_all=False):
        """The same of tokens that are put together already."""
        own = numbered(frame, self.sizes.width) if self.counts_on else frame.own
        h_BTD, arguments = self.enter(h_BTD, own)
        pieces, states = [], self.states
        if self.leave is None:
            arguments |= {"written": frame.written, "writers": frame.writers}
        for number, layer in enumerate(self.layers):
            state = states[number].copy()
            state.is_kept = is_kept
            if frame.is_anew:
                for name in self.frame_names(number):
                    setattr(state, name, None)
            h_BTD, states[number] = layer(h_BTD, own, state, **arguments)
            pieces.append(h_BTD)
        if frame.written is not None and self.leave is not None:
            written_NMD = self.leave(frame.of_writers(h_BTD, self.sizes.num_writes))
            setattr(states[0], MEMORY, frame.put(getattr(states[0], MEMORY), written_NMD))
        return pieces if keeps_all else pieces[-1:]

    def border_of_rows(self, sequence, x_BTD, is_fresh):
        """What comes before the first token of a segment, for a step whose clocks nobody may see.

        Of a compiled step: it runs the tokens of memory of all rows, and keeps what rows at a
        border make of them.
        """
        sizes, device = self.sizes, x_BTD.device
        is_border_B = at_border(sequence, sizes).expand(x_BTD.shape[0])
        is_full_B = is_border_B & (sequence.clock[:, 0] > 0)
        number_B = sequence.clock[:, 0] // sizes.length
        before, nothing = [state.copy() for state in self.states], slice(0, 0)
        if not is_fresh:
            own = rows_of_frame(is_full_B.shape[0], sizes.slots, sizes.num_writes, device)
            done_B = (number_B - 1).clamp(min=0)
            frame = Frame(nothing, own, nothing, written=slice(None), number=done_B)
            self.run_frame(frame, x_BTD, False)
            for layer, old, new in zip(self.layers, before, self.states):
                for name in layer.memory_names:
                    select(name, is_full_B, new, old)
        if sizes.num_reads == 0:
            return
        before = [state.copy() for state in self.states]
        own = rows_of_frame(is_full_B.shape[0], 0, sizes.num_reads, device)
        frame = Frame(
            nothing, own, nothing, num_reads=sizes.num_reads, is_anew=True, number=number_B
        )
        self.run_frame(frame, x_BTD, True)
        for layer, old, new in zip(self.layers, before, self.states):
            for name in layer.state_specs():
                select(name, is_border_B, new, old)


def numbered(frame, width):
    """The `Sequence` of a `Frame` whose clocks count tokens of all frames of their documents.

    Args:
        frame: the frame.
        width: tokens of each.
    """
    own, begin_N = frame.own, frame.number * width
    if own.cu_seqlens is not None:
        lengths_N = own.cu_seqlens.diff()
        begin_BT = begin_N[own.row_of_document].repeat_interleave(lengths_N)[None]
    else:
        begin_BT = begin_N[:, None] if torch.is_tensor(begin_N) else begin_N
    return replace(own, clock=own.clock + begin_BT, clock_after=own.clock_after + begin_N)


def walked(model, walk, x_BTD, sequence, cache, inputs, **kwargs):
    """What `_run_blocks` of a model with `memory`, `joined` and `norm` returns of a `MemoryWalk`.

    Args:
        model: a `ZooModel`.
        walk: over its layers.
        x_BTD, sequence, cache, inputs, kwargs: as of its `_run_blocks`.
    """
    if torch.is_grad_enabled():
        # Processes that train together wait for each; a text after a state needs none of these.
        x_BTD = x_BTD + 0 * model.memory(1, x_BTD.dtype).sum()
    is_recorded = kwargs.get("output_hidden_states") or model.config.output_hidden_states
    for y_BTD in walk.run(x_BTD, sequence, cache, inputs, keeps_all=is_recorded):
        x_BTD = model.joined(x_BTD, y_BTD)
    return BaseModelOutputWithPast(last_hidden_state=model.norm(x_BTD))


def select(name, is_new_B, new, old):
    """Takes a tensor of a `State` back for some rows.

    Args:
        name: of the tensor.
        is_new_B: the other rows.
        new: the state.
        old: as it was; a tensor of None is zeros.
    """
    x_B, old_B = getattr(new, name), getattr(old, name)
    is_new = is_new_B.view(-1, *[1] * (x_B.ndim - 1))
    setattr(new, name, torch.where(is_new, x_B, 0 if old_B is None else old_B))
