"""Dilated attention as a mixer runs it: on a state of slots, in passes or token by token.

The state holds, for each branch, the selected keys and values of the segment that is not over:
`keys_BHMK` and `values_BHMV`. Behind the newest token of a segment lie those of the segment before,
until they are overwritten.

Where several processes have a slice of a text each (zoo/core/parallel.py), each makes the slots of
its own tokens and hands them on, those of the branches that have a segment on both sides of a cut.
"""

import torch

from ..core.flops import mean_of_segments
from ..core.halo import hops_to, span_of
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
from ..kernels.dilated_step import DecayTables, TokenPlan, hold_known
from .host_clocks import host_clocks, is_known


class DilatedSlots:
    """Where dilated attention keeps its keys and values.

    Args:
        config: with num_attention_heads, head_dim, segment_lengths, dilation_rates, head_offsets.
        log_decay: returns that of scores by distance, as of `DecayTables`; None: there is none. For
            `plan` alone.
    """

    def __init__(self, config, log_decay=None):
        self.head_shape = config.num_attention_heads, config.head_dim
        self.branches = config.segment_lengths, config.dilation_rates
        self.offsets = {"offsets": config.head_offsets}
        self.laid_out = branches_of(*self.branches)
        self.decays = None if log_decay is None else DecayTables(log_decay)

    def plan(self, sequence, dtype):
        """What a token per row reads and writes in every layer, a `TokenPlan`, or None.

        Where the host knows the clocks, that is (zoo/layers/host_clocks.py).

        Args:
            sequence: the `Sequence`.
            dtype: of scores and sums.
        """
        clocks = host_clocks(sequence)
        if clocks is None:
            return None
        options = self.head_shape[0], self.offsets["offsets"], self.decays, dtype
        return TokenPlan(clocks, self.laid_out, *options)

    def state_specs(self, dtype):
        """Keys and values of selected tokens."""
        (heads, head_dim), last = self.head_shape, self.laid_out[-1]
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

    def attend(self, q_BTHK, k_BTHK, v_BTHV, sequence, state, dtype, plan=None, **how):
        """Dilated attention after what the state holds, which is brought up to date: [B, T, H, V].

        Args:
            q_BTHK, k_BTHK, v_BTHV: of the pass.
            sequence: how the tokens lie.
            state: before them.
            dtype: of the state; None: of what comes.
            plan: the `TokenPlan` of a step; None: there is none, or it is not to be followed.
            how: log_decay and weight_gradient, as of `dilated_attention`.
        """
        is_step = q_BTHK.shape[1] == 1 and sequence.cu_seqlens is None and state.is_kept
        run = self._attend_step if is_step and sequence.ranks is None else self._attend_pass
        new = {"keys_BHMK": k_BTHK, "values_BHMV": v_BTHV}
        if sequence.ranks is not None:
            self._bring(new, sequence, state)
        elif is_step and plan is not None:
            return self._attend_planned(q_BTHK, new, state, dtype, plan)
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
                slots = None if slots is None else slots.to(x_BTHK.dtype)
                if is_known(sequence.clock):
                    rows = list(zip(*(n.tolist() for n in where)))
                    slots = hold_known(x_BTHK, slots, self.laid_out, rows=rows, **self.offsets)
                    setattr(state, name, slots)
                    continue
                slots = hold(x_BTHK, slots, *self.branches, *where, **self.offsets)
                setattr(state, name, slots)
        return y_BTHV

    def _bring(self, new, sequence, state):
        """A slice: the slots that a state would have before it, into the state.

        In bytes, per direction: of each branch that any process needs, those of its slots, or of as
        many as a slice has tokens for; to the next process where slices are as long as what is left
        of segments, else to all.
        """
        ranks, ways = sequence.ranks, self._ways(sequence)
        arrived = [[way.empty(x) for x in new.values()] for way in ways]
        for to_all in (False, True):
            going = [n for n, way in enumerate(ways) if way.hops and way.to_all is to_all]
            if not going:
                continue
            own = [torch.cat([ways[n].selected(x) for n in going], dim=2) for x in new.values()]
            sizes = [ways[n].num_going for n in going]
            if to_all:
                slots = torch.stack([ranks.gathered(x) for x in own]).unbind(1)[: ranks.rank]
            else:
                slots = [torch.stack(ranks.from_left(*own))]
            for rank, of_rank in zip(range(ranks.rank)[-len(slots) :], slots):
                for n, pieces in zip(going, of_rank.split(sizes, dim=3)):
                    arrived[n] = ways[n].merged(arrived[n], pieces, rank)
        if not ranks.is_first:
            for name, of_branches in zip(new, zip(*arrived)):
                setattr(state, name, torch.cat(of_branches, dim=2))

    def _ways(self, sequence):
        """How slots go from slice to slice, by branch; the same in all layers."""
        kept = sequence.ranks.kept
        if "slots" not in kept:
            options = self.head_shape[0], self.offsets, sequence
            kept["slots"] = [_Way(branch, *options) for branch in branches_of(*self.branches)]
        return kept["slots"]

    def _attend_planned(self, q_BTHK, new, state, dtype, plan):
        """`_attend_step`, where the host knows what to look at."""
        for name, x_BTHK in new.items():
            slots, may_overwrite = getattr(state, name), state.may_overwrite
            if slots is None:
                shape = self.state_specs(dtype)[name].shape
                slots = x_BTHK.new_zeros(x_BTHK.shape[0], *shape, dtype=dtype)
                may_overwrite = True
            setattr(state, name, plan.write(slots.contiguous(), x_BTHK, may_overwrite))
        return plan.attend(q_BTHK, state.keys_BHMK, state.values_BHMV)

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


class _Way:
    """How a branch's slots go from slice to slice.

    Args:
        branch: the `Branch`.
        num_heads: H.
        offsets: keyword arguments of `hold`.
        sequence: the `Sequence`, a slice.

    Attributes:
        hops: how many slices back the tokens lie that anyone needs.
        to_all: whether these are more than one.
        num_going: how many slots go.
    """

    def __init__(self, branch, num_heads, offsets, sequence):
        self.branch, self.num_heads, self.offsets = branch, num_heads, offsets
        self.ranks, self.spans = sequence.ranks, row_spans(sequence)
        device, (w, r, _, count) = sequence.clock.device, branch
        clock_RB, own_RB = self.ranks.clock_RB, self.ranks.own_RB
        # Slots of the segment before are looked at no more, but a state that is kept has them.
        need_RB = clock_RB.clamp(max=w) if self.ranks.anyone_keeps else clock_RB % w
        self.hops = hops_to(self.ranks, need_RB)
        self.to_all = self.hops > 1
        self.slots_C = torch.arange(count, device=device)
        # Tokens in a row select slots in a row, after the last the first; one more at either end.
        length = int(own_RB[:-1].max()) if self.hops else 0
        self.num_going = min(count, length // r + 3)
        u_HC = self.slots_C * r + branch.offsets(num_heads, offsets["offsets"], device)[:, None]
        newest_B11 = clock_RB[self.ranks.rank].to(device)[:, None, None] - 1
        number_BHC = newest_B11 - (newest_B11 - u_HC) % w
        self.number_BHC = torch.where(u_HC < w, number_BHC, -1)

    def first_going(self, start_B):
        """The slot that goes first, of slices that begin with these tokens of their rows."""
        return start_B % self.branch.length // self.branch.rate

    def selected(self, x_BTHK):
        """The slots of this slice's own tokens that go: [B, H, C, K]."""
        branch, spans = self.branch, self.spans
        where = spans.first, spans.start, spans.after
        x_BHCK = hold(x_BTHK, None, [branch.length], [branch.rate], *where, **self.offsets)
        if self.num_going == branch.count:
            return x_BHCK
        slot_BC = self.first_going(spans.start)[:, None] + self.slots_C[: self.num_going]
        return _at(x_BHCK, slot_BC % branch.count)

    def empty(self, x_BTHK):
        """All slots, without a token."""
        sizes = len(self.number_BHC), self.num_heads, self.branch.count, x_BTHK.shape[-1]
        return x_BTHK.new_zeros(sizes)

    def merged(self, slots, pieces, rank):
        """The slots of several tensors, with those that a process before this one has sent."""
        after_B1, start_B1 = span_of(self.ranks, rank, self.slots_C.device)
        is_of_BHC = (self.number_BHC >= start_B1[..., None]) & (self.number_BHC >= 0)
        is_of_BHC = (is_of_BHC & (self.number_BHC < after_B1[..., None]))[..., None]
        if self.num_going < self.branch.count:
            place_BC = (self.slots_C - self.first_going(start_B1)) % self.branch.count
            pieces = [_at(x, place_BC.clamp(max=self.num_going - 1)) for x in pieces]
        return [torch.where(is_of_BHC, x, y) for x, y in zip(pieces, slots)]


def _at(x_BHCK, slot_BC):
    """Of each row these slots."""
    rows_B1 = torch.arange(len(slot_BC), device=slot_BC.device)[:, None]
    return x_BHCK.transpose(1, 2)[rows_B1, slot_BC].transpose(1, 2)


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
