"""A text with the landmarks that its model puts in: one after every F tokens of a document.

Token n of a document, counted from 0, stands at place n + n // F of the stream, in block n // F of
F + 1 places, the landmark of that block at its last. When a landmark is run is a matter of who
needs it first: the first token of the next block ("lazily", with that token), or the prediction of
that token ("at once", with the last of its own block). Either way a state after n tokens is the
same for whole texts, pieces, padded rows and packed documents.
"""

import torch
from torch.nn.functional import pad

from ..core.sequence import Sequence
from ..core.window import document_spans


def stream_length(num_tokens, block_length, at_once):
    """Places that so many tokens and their landmarks take: a number, or a tensor of them."""
    if at_once:
        return num_tokens + num_tokens // block_length
    if torch.is_tensor(num_tokens):
        return num_tokens + (num_tokens.clamp(min=1) - 1) // block_length
    return num_tokens + max(num_tokens - 1, 0) // block_length


class PlacesOfRanks:
    """`Ranks` of a pass that count places of a stream, where those count tokens.

    Args:
        ranks: the `Ranks` of the tokens.
        length: of so many tokens, how many places they take.
    """

    def __init__(self, ranks, length):
        self.tokens = ranks
        self.clock_RB = length(ranks.clock_RB)
        before_RB = torch.where(ranks.start_RB, 0, ranks.clock_RB)
        self.own_RB = length(before_RB + ranks.own_RB) - length(before_RB)

    def __getattr__(self, name):
        return getattr(self.tokens, name)


class LandmarkStream:
    """How the tokens of a pass and its landmarks lie.

    Args:
        sequence: the `Sequence` of the tokens.
        block_length: F.
        at_once: whether a landmark follows its block's last token at once, or comes lazily.
        num_slots: places that the state of each row holds; None: there is no state.

    Attributes:
        sequence: of the stream: dense, [B, T'], or packed documents.
        start: the place of the first, where all rows have the same; else None.
        present: [B, T'] bool, which of the stream's places are there; None: all. (Where a program
            is traced and cannot know, every token has a landmark beside it.)
        num_slots: places that a state after the pass has room for: whole blocks, but for a traced
            one.
        ends_block: [B or 1, T] bool, at once: which tokens have their landmark behind them.
        landmark_of_token: [B or 1, T], index of that landmark.
        num_landmarks: landmarks in each row of the stream.
    """

    def __init__(self, sequence, block_length, at_once, num_slots=None):
        self.block_length, self.at_once = block_length, at_once
        self.start = self.present = None
        self.text_shape = sequence.shape
        if sequence.token_index is not None:
            self.text_shape = (1, len(sequence.token_index))
        self.ends_block = self.landmark_of_token = None
        clock_BT, has_state = sequence.clock, num_slots is not None
        if has_state and torch.compiler.is_compiling():
            self._traced(sequence, num_slots)
            return
        starts = [0]
        if sequence.cu_seqlens is None and has_state:
            starts = clock_BT[:, 0].tolist()
        if sequence.cu_seqlens is None and sequence.keep is None and len({*starts}) == 1:
            self._dense(sequence, starts[0])
        else:
            self._packed(sequence)
        self._make_room(num_slots or 0)

    def _length(self, num_tokens):
        return stream_length(num_tokens, self.block_length, self.at_once)

    def _dense(self, sequence, before):
        """All rows begin and end at the same place."""
        size, device = self.block_length + 1, sequence.clock.device
        time = self.text_shape[1]
        self.start, end = self._length(before), self._length(before + time)
        if torch.compiler.is_exporting():
            # For any length: whole blocks, one more than there may be, as exporting takes a number
            # that is 1 for a constant.
            end = ((time - 1) // self.block_length + 2) * size
        clock_S = torch.arange(self.start, end, device=device)
        first_block = self.start // size
        self.num_landmarks = end // size - first_block
        token_S = (clock_S - clock_S // size - before).clamp(0, time - 1)
        is_landmark_S = clock_S % size == size - 1
        self.order = torch.where(is_landmark_S, time + clock_S // size - first_block, token_S)
        landmarks = torch.arange(self.num_landmarks, device=device)
        self.landmark_places = (first_block + landmarks) * size + size - 1 - self.start
        number_T = before + torch.arange(time, device=device)
        self.token_places = number_T + number_T // self.block_length - self.start
        if self.at_once:
            self.ends_block = (number_T % self.block_length == self.block_length - 1)[None]
            index_T = number_T // self.block_length - first_block
            self.landmark_of_token = index_T.clamp(max=max(self.num_landmarks - 1, 0))[None]
        self.sequence = Sequence(
            (self.text_shape[0], clock_S.shape[0]),
            clock_S[None],
            clock_S[None],
            clock_S[-1:] + 1,
        )
        self.longest = end

    def _packed(self, sequence):
        """Documents, or rows that are at different places, one behind the other."""
        size, spans = self.block_length + 1, document_spans(sequence)
        device, batch = spans.start.device, sequence.shape[0]
        rows_N = torch.arange(len(spans.start), device=device)
        is_row = sequence.cu_seqlens is None
        if is_row:
            present_N = rows_N if sequence.keep is None else rows_N[sequence.keep]
            row_of_document, continues = present_N, spans.start[present_N] > 0
            last_B = torch.full((batch,), -1, device=device)
            last_B[present_N] = torch.arange(len(present_N), device=device)
        else:
            present_N, row_of_document = rows_N, sequence.row_of_document
            continues, last_B = sequence.continues, sequence.last_document
        before_N, after_N = spans.start[present_N], spans.after[present_N]
        start_N, end_N = self._length(before_N), self._length(after_N)
        cu_seqlens = pad((end_N - start_N).cumsum(0), (1, 0))
        total, num_documents = int(cu_seqlens[-1]), len(present_N)
        document_S = torch.arange(num_documents, device=device).repeat_interleave(end_N - start_N)
        clock_S = torch.arange(total, device=device) - cu_seqlens[document_S] + start_N[document_S]
        is_landmark_S = clock_S % size == size - 1
        token_S = clock_S - clock_S // size - before_N[document_S]
        token_S = spans.first[present_N][document_S] + token_S
        num_tokens = self.text_shape[0] * self.text_shape[1]
        self.num_landmarks = int(is_landmark_S.sum())
        self.order = torch.where(is_landmark_S, num_tokens + is_landmark_S.cumsum(0) - 1, token_S)
        self.landmark_places = is_landmark_S.nonzero()[:, 0]
        places = torch.zeros(num_tokens, dtype=torch.long, device=device)
        is_token_S = ~is_landmark_S
        places[token_S[is_token_S]] = is_token_S.nonzero()[:, 0]
        self.token_places = places
        if self.at_once:
            is_followed_S = pad(is_landmark_S[1:] & is_token_S[:-1], (0, 1))
            ends = torch.zeros(num_tokens, dtype=torch.bool, device=device)
            ends[token_S[is_followed_S]] = True
            index = torch.zeros(num_tokens, dtype=torch.long, device=device)
            index[token_S[is_followed_S]] = torch.arange(self.num_landmarks, device=device)
            self.ends_block, self.landmark_of_token = ends[None], index[None]
        clock_after = self._length(sequence.clock_after).expand(batch)
        self.sequence = Sequence(
            (batch, total),
            clock_S[None],
            clock_S[None],
            clock_after,
            cu_seqlens=cu_seqlens,
            row_of_document=row_of_document,
            continues=continues,
            last_document=last_B,
        )
        self.longest = int(torch.cat([end_N, clock_after]).max())

    def _traced(self, sequence, num_slots):
        """A landmark beside every token, present or not."""
        length, (batch, time) = self.block_length, self.text_shape
        clock_BT = sequence.clock.expand(batch, time)
        block_BT, slot_BT = clock_BT // length, clock_BT % length
        if self.at_once:
            landmark_BT, is_there_BT = (block_BT + 1) * (length + 1) - 1, slot_BT == length - 1
            self.ends_block = is_there_BT
            self.landmark_of_token = torch.arange(time, device=clock_BT.device)[None]
        else:
            landmark_BT, is_there_BT = block_BT * (length + 1) - 1, (slot_BT == 0) & (clock_BT > 0)
        token_BT, is_token_BT = clock_BT + block_BT, torch.ones_like(is_there_BT)
        if sequence.keep is not None:
            is_there_BT = is_there_BT & sequence.keep[:, None]
            is_token_BT = is_token_BT & sequence.keep[:, None]

        def pairs(landmarks, tokens):
            both = (tokens, landmarks) if self.at_once else (landmarks, tokens)
            return torch.stack(both, dim=-1).flatten(-2)

        steps_T = torch.arange(time, device=clock_BT.device)
        self.order = pairs(time + steps_T, steps_T)
        self.token_places = 2 * steps_T + (0 if self.at_once else 1)
        self.landmark_places = 2 * steps_T + (1 if self.at_once else 0)
        self.num_landmarks, self.present = time, pairs(is_there_BT, is_token_BT)
        clock_BS = pairs(landmark_BT, token_BT)
        self.sequence = Sequence(
            (batch, 2 * time),
            clock_BS.clamp(min=0),
            clock_BS.clamp(min=0),
            self._length(sequence.clock_after),
        )
        self.num_slots = num_slots + 2 * time

    def join_slices(self, ranks):
        """What a pass over slices knows of the others' streams.

        Args:
            ranks: the `Ranks` of the pass.
        """
        self.sequence.ranks = PlacesOfRanks(ranks, self._length)
        (longest,) = torch.stack(ranks.wire.all_gather(self.order.new_tensor([self.longest]))).T
        self.longest = int(longest[: ranks.rank + 1].max())
        self._make_room(0)

    def _make_room(self, num_slots):
        size = self.block_length + 1
        if torch.compiler.is_exporting():
            self.num_slots = self.longest
        else:
            self.num_slots = max(num_slots, -(-self.longest // size) * size)

    @property
    def is_one_token(self):
        """Whether each row has one token, no landmark, and all are at the same place."""
        is_traced = self.present is not None or torch.compiler.is_compiling()
        return not is_traced and self.start is not None and self.order.shape[0] == 1

    def join(self, x_BTD, landmarks_BLD):
        """Tokens and landmarks in the order of the stream."""
        if self.sequence.cu_seqlens is not None:
            x_BTD = x_BTD.flatten(0, 1)[None]
        return torch.cat([x_BTD, landmarks_BLD], dim=1)[:, self.order]

    def split(self, x_BSD):
        """The inverse of `join`: (tokens, landmarks)."""
        tokens_BTD = x_BSD[:, self.token_places].reshape(*self.text_shape, x_BSD.shape[-1])
        return tokens_BTD, x_BSD[:, self.landmark_places]

    def predicting(self, x_BTD, landmarks_BLD):
        """What the next token is predicted from: at once, a landmark where a token has one."""
        if not self.at_once or self.num_landmarks == 0:
            return x_BTD
        if self.sequence.cu_seqlens is not None:
            picked = landmarks_BLD[0, self.landmark_of_token[0]].view_as(x_BTD)
            return torch.where(self.ends_block.view(*self.text_shape, 1), picked, x_BTD)
        picked = landmarks_BLD[:, self.landmark_of_token[0]]
        return torch.where(self.ends_block[..., None], picked, x_BTD)

    def landmark_ids(self, token_id):
        """Ids of the landmarks, [B, L]."""
        rows = 1 if self.sequence.cu_seqlens is not None else self.text_shape[0]
        return torch.full((rows, self.num_landmarks), token_id, device=self.order.device)

    def to(self, device, non_blocking=False):
        """The same on another device, for models that are spread over several."""
        if self.order.device == torch.device(device):
            return self
        moved = object.__new__(LandmarkStream)
        for name, value in vars(self).items():
            has_device = isinstance(value, (torch.Tensor, Sequence))
            vars(moved)[name] = value.to(device, non_blocking=non_blocking) if has_device else value
        return moved
