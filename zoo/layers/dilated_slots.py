"""Dilated attention as a mixer runs it: on a state of slots, in passes or token by token.

The state holds, for each branch, the selected keys and values of the segment that is not over:
`keys_BHMK` and `values_BHMV`. Behind the newest token of a segment lie those of the segment before,
until they are overwritten.
"""

import torch

from ..core.flops import mean_of_segments
from ..core.state import StateSpec
from ..core.window import document_spans, row_spans
from ..kernels.dilated_attention import (
    Held,
    dilated_attention,
    dilated_attention_step,
    hold,
    write_slots,
)
from ..kernels.dilated_branches import branches_of


class DilatedSlots:
    """Where dilated attention keeps its keys and values.

    Args:
        config: with num_attention_heads, head_dim, segment_lengths, dilation_rates, head_offsets.
    """

    def __init__(self, config):
        self.head_shape = config.num_attention_heads, config.head_dim
        self.branches = config.segment_lengths, config.dilation_rates
        self.offsets = {"offsets": config.head_offsets}

    def state_specs(self, dtype):
        """Keys and values of selected tokens."""
        (heads, head_dim), last = self.head_shape, branches_of(*self.branches)[-1]
        slots = StateSpec((heads, last.first + last.count, head_dim), dtype=dtype)
        return {"keys_BHMK": slots, "values_BHMV": slots}

    def mean_keys(self, length):
        """Keys that a token sees in all heads and branches together, a mean over such a text."""
        num_heads, total = self.head_shape[0], 0.0
        for branch in branches_of(*self.branches):

            def count(tokens, branch=branch):
                offsets = branch.offsets(num_heads, self.offsets["offsets"], "cpu").tolist()
                # The selected tokens of a head see those before them and themselves.
                selected = [len(range(offset, tokens, branch.rate)) for offset in offsets]
                return sum(n * (n + 1) // 2 for n in selected)

            total += mean_of_segments(length, branch.length, count)
        return total

    def attend(self, q_BTHK, k_BTHK, v_BTHV, sequence, state, dtype, **how):
        """Dilated attention after what the state holds, which is brought up to date: [B, T, H, V].

        Args:
            q_BTHK, k_BTHK, v_BTHV: of the pass.
            sequence: how the tokens lie.
            state: before them.
            dtype: of the state; None: of what comes.
            how: log_decay and weight_gradient, as of `dilated_attention`.
        """
        is_step = q_BTHK.shape[1] == 1 and sequence.cu_seqlens is None and state.is_kept
        run = self._attend_step if is_step else self._attend_pass
        new = {"keys_BHMK": k_BTHK, "values_BHMV": v_BTHV}
        return run(q_BTHK, new, sequence, state, dtype, **how, **self.offsets)

    def _attend_pass(self, q_BTHK, new, sequence, state, dtype, **how):
        """Any number of tokens, dense or packed."""
        held = None
        if state.keys_BHMK is not None:
            slots = state.keys_BHMK, state.values_BHMV
            held = Held(*slots, document_spans(sequence).start, sequence.row_of_document)
        documents = {"cu_seqlens": sequence.cu_seqlens, "held": held}
        y_BTHV = dilated_attention(q_BTHK, *new.values(), *self.branches, **documents, **how)
        if state.is_kept:
            spans = row_spans(sequence)
            where = spans.first, spans.start, spans.after
            for name, x_BTHK in new.items():
                slots, x_BTHK = getattr(state, name), x_BTHK.to(dtype)
                slots = hold(x_BTHK, slots, *self.branches, *where, **self.offsets)
                setattr(state, name, slots)
        return y_BTHV

    def _attend_step(self, q_BTHK, new, sequence, state, dtype, **how):
        """One token per row: writes its slots, and looks at those it sees."""
        clock_B = sequence.clock[:, 0].expand(q_BTHK.shape[0])
        for name, x_BTHK in new.items():
            slots, spec = getattr(state, name), self.state_specs(dtype)[name]
            if slots is None:
                slots = x_BTHK.new_zeros(clock_B.shape[0], *spec.shape, dtype=dtype)
            token = x_BTHK[:, 0], clock_B, *self.branches
            written = {"is_written": sequence.keep, "may_overwrite": state.may_overwrite}
            setattr(state, name, write_slots(slots, *token, **written, **self.offsets))
        slots = state.keys_BHMK, state.values_BHMV
        return dilated_attention_step(q_BTHK, *slots, clock_B, *self.branches, **how)


def tokens_behind(config, length):
    """Of so many tokens, those that the last one sees through all layers, [length] bool."""
    tokens_T, num_heads = torch.arange(length), config.num_attention_heads
    seen_T = tokens_T == length - 1
    for _ in range(config.num_hidden_layers):
        before_T = seen_T.clone()
        for branch in branches_of(config.segment_lengths, config.dilation_rates):
            segment_T, u_T = tokens_T // branch.length, tokens_T % branch.length
            for offset in branch.offsets(num_heads, config.head_offsets, "cpu").unique():
                has_T = u_T % branch.rate == offset
                # In each segment all up to the last that was seen from above.
                last_T = torch.where(has_T & before_T, tokens_T, -1)
                last_N = torch.full((int(segment_T[-1]) + 1,), -1)
                last_N = last_N.scatter_reduce(0, segment_T, last_T, "amax")
                seen_T = seen_T | (has_T & (tokens_T <= last_N[segment_T]))
    return seen_T
