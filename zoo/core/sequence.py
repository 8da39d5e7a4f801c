"""The door: a padded or packed batch becomes one packed stream with document boundaries.

Padding exists only here. `Sequence.open` looks at a batch once, before the first block; `pack`
takes the padding out and `unpack` puts it back after the last. Between them a mixer sees either a
dense batch (one document per row, `cu_seqlens` None) or a packed stream (one row, `cu_seqlens`
given), never a mask.

A document starts at a row's first token and wherever `position_ids` restarts, `seq_idx` changes or
`cu_seq_lens_q` says so. The first document of a row continues the row's state, unless its position
is 0: then it is a new document. Positions and clocks count from each document's own start.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch


class _Batch(NamedTuple):
    """The arguments of a forward pass, checked; as of `Sequence.open`, with a clock in any case."""

    shape: tuple[int, int]
    device: torch.device
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    cu_seq_lens_q: torch.Tensor | None
    seq_idx: torch.Tensor | None
    clock_before: torch.Tensor
    has_state: bool
    shift_before: torch.Tensor | None = None
    position_before: torch.Tensor | None = None

    def is_packed(self):
        """Whether there is padding, or a row may hold several documents."""
        if self.cu_seq_lens_q is not None or self.seq_idx is not None:
            return True
        if self.attention_mask is not None and not bool(self.attention_mask.all()):
            return True
        return self.position_ids is not None and bool((self.position_ids.diff() <= 0).any())

    def goes_on(self, position, row=slice(None)):
        """Whether a row whose first token has this position goes on with what came before."""
        if self.position_before is None:
            return position != 0
        return position > self.position_before[row]


@dataclass
class Sequence:
    """How the tokens of one forward pass lie: B rows of T columns, or a packed stream of documents.

    Attributes:
        shape: (B, T) of the batch as it came.
        positions: for rotations, [B or 1, T] when dense, [1, total] when packed; the caller's
            `position_ids` if there are any, else `clock` (and the shift of a joined state).
        clock: how many tokens of its own document precede each token; same shape.
        cu_seqlens: [N + 1] document boundaries in the packed stream, or None when dense.
        token_index: [total], where each packed token lies in the flattened batch; None when dense.
        row_of_document: [N], the row each document belongs to; None when dense.
        continues: [N] (or [B] when dense) bool, whether the document takes over its row's state;
            None if all do.
        last_document: [B], the row's last document, -1 for a row without tokens; None when dense.
        keep: [B] bool, which rows take part in this single step; None if all do.
        clock_after: [B or 1], the clock of the next token of each row.
        shift_after: [B], how far that token's position is from its clock; None: they are the same.
        ranks: the `Ranks` of a pass that several processes make, each over a slice; None: one does.
        is_empty: whether there is no token: one that is none stands in the packed stream.
    """

    shape: tuple[int, int]
    positions: torch.Tensor
    clock: torch.Tensor
    clock_after: torch.Tensor
    cu_seqlens: torch.Tensor | None = None
    token_index: torch.Tensor | None = None
    row_of_document: torch.Tensor | None = None
    continues: torch.Tensor | None = None
    last_document: torch.Tensor | None = None
    keep: torch.Tensor | None = None
    shift_after: torch.Tensor | None = None
    ranks: object | None = None
    is_empty: bool = False
    # What `common_clock` has read; not a field, which a changed copy would have too.
    _clocks: ClassVar[list[int] | None] = None

    @classmethod
    def open(
        cls,
        shape,
        device,
        attention_mask=None,
        position_ids=None,
        cu_seq_lens_q=None,
        seq_idx=None,
        clock_before=None,
        shift_before=None,
        position_before=None,
        is_slice=False,
    ):
        """Reads the arguments of a Hugging Face forward pass.

        Args:
            shape: (B, T) of the new tokens.
            device: where the tokens are.
            attention_mask: [B, T] or [B, past + T], 0 where there is padding; None: no padding.
            position_ids: [B or 1, T]; a position that does not grow starts a new document.
            cu_seq_lens_q: [N + 1] document boundaries, for B = 1.
            seq_idx: [B, T], the index of each token's document.
            clock_before: [B], tokens of its document each row's state has seen; None: no state.
            shift_before: [B], what is added to clocks for the positions of tokens that go on from
                the state, where there are no position_ids; None: nothing.
            position_before: [B], of each row's last token before these, after which a row goes on
                if its position grows; None: if it is not 0.
            is_slice: whether a single token is one of many columns, and not a step.

        Raises:
            ValueError: shapes that do not fit; no tokens.
        """
        rows, time = shape
        if rows == 0 or time == 0:
            raise ValueError(
                f"expected at least one token, got input of shape [{rows}, {time}]; "
                "pass input_ids or inputs_embeds with B >= 1 and T >= 1."
            )
        if attention_mask is not None:
            attention_mask = _last_columns("attention_mask", attention_mask, shape)
        if position_ids is not None:
            position_ids = _last_columns("position_ids", position_ids, shape)
        if seq_idx is not None:
            seq_idx = _last_columns("seq_idx", seq_idx, shape)
        if cu_seq_lens_q is not None and (rows != 1 or cu_seq_lens_q.ndim != 1):
            raise ValueError(
                "cu_seq_lens_q is [N + 1] document boundaries of one packed row (B = 1), "
                f"got shape {list(cu_seq_lens_q.shape)} with B = {rows}; flatten the batch first."
            )

        has_state = clock_before is not None
        if not has_state:
            clock_before = torch.zeros(1, dtype=torch.long, device=device)
        arguments = attention_mask, position_ids, cu_seq_lens_q, seq_idx
        before = clock_before, has_state, shift_before, position_before
        batch = _Batch(shape, device, *arguments, *before)
        if time == 1 and cu_seq_lens_q is None and not is_slice:
            return cls._single_step(batch)
        if torch.compiler.is_exporting():
            _check_exportable(batch)
            return cls._dense(batch)
        return cls._packed(batch) if batch.is_packed() else cls._dense(batch)

    @classmethod
    def without_tokens(cls, shape, device, clock_before):
        """A slice that is padding in every row, [B] tokens after its rows began.

        A layer wants a token. It gets one that is of no row, and whose output is not looked at.
        """
        batch = shape[0]
        if clock_before is None:
            clock_before = torch.zeros(batch, dtype=torch.long, device=device)
        zero = clock_before.new_zeros(1)
        return cls(
            shape,
            zero[None],
            zero[None],
            clock_before,
            cu_seqlens=torch.arange(2, device=device),
            token_index=zero,
            row_of_document=zero,
            continues=zero > 0,
            last_document=torch.full((batch,), -1, device=device),
            is_empty=True,
        )

    @classmethod
    def _dense(cls, batch):
        shape, position_ids, clock_before = batch.shape, batch.position_ids, batch.clock_before
        continues, shift = None, batch.shift_before
        if batch.has_state and position_ids is not None:
            continues = _unless_all(batch.goes_on(position_ids[:, 0]))
            if continues is not None:
                clock_before = torch.where(continues, clock_before, 0)
                shift = None if shift is None else torch.where(continues, shift, 0)
        clock = clock_before[:, None]
        if shape[1] > 1 or torch.compiler.is_exporting():
            clock = clock + torch.arange(shape[1], device=clock_before.device)
        if position_ids is None:
            position_ids = clock if shift is None else clock + shift[:, None]
        return cls(
            shape,
            position_ids,
            clock,
            clock_before + shape[1],
            continues=continues,
            shift_after=shift,
        )

    @classmethod
    def _single_step(cls, batch):
        sequence, attention_mask = cls._dense(batch), batch.attention_mask
        if attention_mask is not None:
            keep = _unless_all(attention_mask[:, 0] != 0)
            if keep is not None:
                after = torch.where(keep, sequence.clock_after, batch.clock_before)
                shift = sequence.shift_after
                shift = None if shift is None else torch.where(keep, shift, batch.shift_before)
                sequence = replace(sequence, keep=keep, clock_after=after, shift_after=shift)
        return sequence

    @classmethod
    def _packed(cls, batch):
        (rows, time), device, has_state = batch.shape, batch.device, batch.has_state
        attention_mask, position_ids = batch.attention_mask, batch.position_ids
        clock_before = batch.clock_before.expand(rows)
        if attention_mask is None:
            token_index = torch.arange(rows * time, device=device)
        else:
            token_index = attention_mask.flatten().nonzero()[:, 0]
        row = token_index // time
        if len(token_index) == 0:
            raise ValueError(
                "expected at least one token, got an attention_mask that hides every token of the "
                "batch; drop empty batches."
            )
        is_start = torch.ones_like(row, dtype=torch.bool)
        is_start[1:] = row[1:] != row[:-1]
        is_first = is_start.clone()
        if position_ids is not None:
            positions = position_ids.expand(rows, time).flatten()[token_index]
            is_start[1:] |= positions[1:] <= positions[:-1]
        if batch.seq_idx is not None:
            documents = batch.seq_idx.expand(rows, time).flatten()[token_index]
            is_start[1:] |= documents[1:] != documents[:-1]
        if batch.cu_seq_lens_q is not None:
            bounds = batch.cu_seq_lens_q.tolist()
            if bounds[0] != 0 or bounds[-1] != time or bounds != sorted(bounds):
                raise ValueError(
                    f"cu_seq_lens_q grows from 0 to the number of tokens {time}, "
                    f"got {bounds[:8]}{'...' if len(bounds) > 8 else ''}."
                )
            is_column_start = torch.zeros(time + 1, dtype=torch.bool, device=device)
            is_column_start[batch.cu_seq_lens_q.to(device=device, dtype=torch.long)] = True
            # A boundary on padding belongs to the next token that is one.
            count = is_column_start[:time].cumsum(0)[token_index]
            is_start[1:] |= count[1:] != count[:-1]

        start = is_start.nonzero()[:, 0]
        total = start.new_tensor([len(token_index)])
        cu_seqlens = torch.cat([start, total])
        row_of_document = row[start]
        continues = is_first[start] & has_state
        if has_state and position_ids is not None:
            continues = continues & batch.goes_on(positions[start], row_of_document)

        before = torch.where(continues, clock_before[row_of_document], 0)
        document = is_start.cumsum(0) - 1
        clock = torch.arange(len(token_index), device=device) - start[document] + before[document]
        last_document = torch.full((rows,), -1, device=device)
        last_document = last_document.scatter_reduce(
            0, row_of_document, torch.arange(len(start), device=device), "amax"
        )
        last_token = cu_seqlens[1:] - 1
        clock_after = torch.where(
            last_document >= 0, clock[last_token][last_document] + 1, clock_before
        )
        shift_after = None
        if position_ids is None:
            positions = clock
        if batch.shift_before is not None:
            shift = torch.where(continues, batch.shift_before[row_of_document], 0)
            if position_ids is None:
                positions = clock + shift[document]
            shift_after = torch.where(last_document >= 0, shift[last_document], batch.shift_before)
        return cls(
            batch.shape,
            positions[None],
            clock[None],
            clock_after,
            cu_seqlens=cu_seqlens,
            token_index=token_index,
            row_of_document=row_of_document,
            continues=continues,
            last_document=last_document,
            shift_after=shift_after,
        )

    @property
    def common_clock(self):
        """Of a plain step: the clock of all rows as a number; None if they differ, or one is left.

        None as well in a program that is compiled, where values are not known.
        """
        if torch.compiler.is_compiling() or self.keep is not None:
            return None
        if self._clocks is None:
            self._clocks = self.clock.flatten().tolist()
        return self._clocks[0] if self._clocks.count(self._clocks[0]) == len(self._clocks) else None

    def starts_anew(self, has_state):
        """Whether a row holds more than one document, or leaves the one of its state.

        Never while it is compiled: the values are not known then.
        """
        if torch.compiler.is_compiling():
            return False
        if self.cu_seqlens is None:
            return self.continues is not None
        rows = int((self.last_document >= 0).sum())
        return len(self.row_of_document) > rows or (has_state and not bool(self.continues.all()))

    def pack(self, x_BTD):
        """Takes the padding out: [B, T, ...] to [1, total, ...]. A dense batch stays as it is."""
        if self.token_index is None:
            return x_BTD
        return x_BTD.flatten(0, 1).index_select(0, self.token_index)[None]

    def unpack(self, x_BTD):
        """Puts the padding back, as zeros: the inverse of `pack`."""
        if self.token_index is None:
            return x_BTD
        if self.is_empty:
            x_BTD = x_BTD * 0
        batch, time = self.shape
        x_TD = x_BTD.new_zeros(batch * time, *x_BTD.shape[2:])
        return x_TD.index_copy(0, self.token_index, x_BTD[0]).unflatten(0, (batch, time))

    def to(self, device, non_blocking=False):
        """The same sequence on another device, for models that are spread over several."""
        if self.clock.device == torch.device(device):
            return self
        moved = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)


def restarting_positions(
    shape,
    attention_mask,
    position_ids,
    cu_seq_lens_q,
    seq_idx,
    clock_before,
    shift_before=None,
):
    """Positions that are 0 where a document starts, from other words for its boundaries.

    Where a sequence is cut at a boundary, these alone say that the next piece does not go on.

    Args:
        shape: (B, T).
        attention_mask, position_ids, cu_seq_lens_q, seq_idx: as of `Sequence.open`, the last two
            not both None.
        clock_before, shift_before: [B], as there; None: no state.

    Returns:
        [B, T].

    Raises:
        ValueError: position_ids that do not restart where the others do.
    """
    batch, time = shape
    device = (seq_idx if cu_seq_lens_q is None else cu_seq_lens_q).device
    is_start_BT = torch.zeros(batch, time + 1, dtype=torch.bool, device=device)
    if cu_seq_lens_q is not None:
        is_start_BT[:, cu_seq_lens_q.long()] = True
    if seq_idx is not None:
        seq_idx = _last_columns("seq_idx", seq_idx, shape)
        is_start_BT[:, 1:time] |= seq_idx[:, 1:] != seq_idx[:, :-1]
    is_start_BT = is_start_BT[:, :time]
    is_start_BT[:, 0] = False  # the state says whether that is one
    if position_ids is not None:
        position_ids = _last_columns("position_ids", position_ids, shape).expand(shape)
        if bool(position_ids[is_start_BT].any()):
            raise ValueError(
                "position_ids do not restart at 0 where cu_seq_lens_q or seq_idx start a document; "
                "segment replay needs them to: leave position_ids out, or correct them."
            )
        return position_ids
    is_token_BT = torch.ones(shape, dtype=torch.long, device=device)
    if attention_mask is not None:
        is_token_BT = (_last_columns("attention_mask", attention_mask, shape) != 0).long()
    before_BT = is_token_BT.cumsum(1) - is_token_BT
    # What came before the document: the largest so far, as counts only grow.
    base_BT = torch.where(is_start_BT, before_BT, 0).cummax(1).values
    if clock_before is not None:
        next_B = clock_before if shift_before is None else clock_before + shift_before
        base_BT = torch.where(is_start_BT.cumsum(1) > 0, base_BT, base_BT - next_B[:, None])
    return before_BT - base_BT


def _last_columns(name, x, shape):
    """The columns of the new tokens, checked."""
    batch, time = shape
    if x.ndim != 2 or x.shape[0] not in (1, batch) or x.shape[1] < time:
        raise ValueError(
            f"{name} is [{batch}, {time}] for the new tokens, or longer with the past before them, "
            f"got shape {list(x.shape)}."
        )
    return x[:, -time:].expand(batch, time) if name == "attention_mask" else x[:, -time:]


def _check_exportable(batch):
    """Leaves checks in a program that is being exported, whose tokens are one document per row.

    Raises:
        ValueError: packed documents.
    """
    attention_mask, position_ids = batch.attention_mask, batch.position_ids
    if batch.cu_seq_lens_q is not None or batch.seq_idx is not None:
        raise ValueError(
            "a program that is exported takes one document per row, got cu_seq_lens_q or seq_idx; "
            "export without them."
        )
    if attention_mask is not None:
        torch._assert_async(
            attention_mask.all(),
            "this exported program takes no padding: expected an attention_mask of ones, got a "
            "zero; run rows of one length together, or the model itself.",
        )
    if position_ids is not None:
        before = torch.cat([position_ids[:, :1] - 1, position_ids], dim=1)
        torch._assert_async(
            (before[:, : position_ids.shape[1]] < position_ids).all(),
            "this exported program takes one document per row: expected position_ids that grow; "
            "run documents as rows of their own, or the model itself.",
        )


def _unless_all(condition_B):
    """The condition, or None where it holds for every row.

    Under torch.compile the values are not known: the condition is kept and costs a select.
    """
    if torch.compiler.is_compiling() or not bool(condition_B.all()):
        return condition_B
    return None
