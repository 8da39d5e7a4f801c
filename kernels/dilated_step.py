"""A token of dilated attention on a CPU, in a time that grows with the slots it reads.

`dilated_attention_step` (zoo/kernels/dilated_attention.py has the equations) looks at all slots, as
clocks are not known where a program is compiled or a GPU is ahead of its host. Where they are, a
`TokenPlan` says once for all layers what the token reads and writes, and each layer does that:
keys and values are read where they lie, up to the token's own slot.
`hold_known` is `hold` likewise.

The weighted sum of the branches' softmaxes is one softmax over all that they see (equation 10), in
which a token counts once for each branch that sees it. A branch of rate 1 has every token of its
segment. So what other branches have of that segment is not read again: a token that m branches see
there has log m added to its score. Of these branches only the slots before the segment are read.
"""

from typing import NamedTuple

import torch

# In place of the log of no weight at all, as in zoo/kernels/dilated_attention.py.
NO_WEIGHT = -1e30


class DecayTables:
    """exp(d log_decay) for the distances d = 0, r, 2 r ... of a branch, made once, longest first.

    Args:
        compute: returns log_decay, [K] <= 0, in float64.
    """

    def __init__(self, compute):
        self.compute, self.tables = compute, {}

    def __getstate__(self):
        return vars(self) | {"tables": {}}  # as many as slots, and made again when needed

    def factors(self, rate, newest, count, dtype):
        """Of the first slots for the token in slot `newest`, [count, K]."""
        table_SK = self.tables.get((rate, dtype))
        if table_SK is None or len(table_SK) <= newest:
            size = 1 << newest.bit_length()  # grows by doubling
            with torch.device("cpu"):
                distance_S1 = torch.arange(size - 1, -1, -1)[:, None] * rate
                table_SK = (distance_S1 * self.compute()).exp_().to(dtype)
            self.tables[rate, dtype] = table_SK
        first = len(table_SK) - 1 - newest
        return table_SK[first : first + count]


class Piece(NamedTuple):
    """Slots in a row that some heads read.

    Attributes:
        heads: which.
        slots: of all branches' slots.
        decay: [C, K], a factor on each key; None: none.
        bias: [1, H, 1, C], added to scores; None: nothing.
    """

    heads: slice
    slots: slice
    decay: torch.Tensor | None
    bias: torch.Tensor | None


class Rows(NamedTuple):
    """Rows next to each other whose tokens have the same number.

    Attributes:
        rows: which.
        pieces: what they read.
        heads: [I], whose key and value goes into a slot.
        slots: [I], which, counted through all heads.
    """

    rows: slice
    pieces: list[Piece]
    heads: torch.Tensor
    slots: torch.Tensor


def heads_of(branch, u, num_heads, offsets):
    """The heads that a branch has for a token at u of its segment."""
    offset = u % branch.rate
    if offsets == "modulo":
        return slice(offset, num_heads, branch.rate)
    group = branch.group_size(num_heads)
    first = min(offset * group, num_heads)
    return slice(first, min(first + group, num_heads))


class TokenPlan:
    """What one token per row reads and writes, for all layers.

    Args:
        clocks: each row's token's number in its document, from 0; None: the row has none.
        branches: `branches_of` the configuration.
        num_heads: H.
        offsets: "grouped" or "modulo".
        decays: `DecayTables`; None: no decay.
        dtype: of scores and sums.

    Attributes:
        turn: [B or 1, 1, 1, K / 2], complex: what pairs (2j, 2j + 1) of queries and keys are
            multiplied by; None: nothing. Set by the model.
    """

    def __init__(self, clocks, branches, num_heads, offsets, decays, dtype):
        self.branches, self.num_heads, self.offsets = branches, num_heads, offsets
        self.decays, self.dtype, self.runs = decays, dtype, []
        start, size = 0, branches[-1].first + branches[-1].count
        for end in range(1, len(clocks) + 1):
            clock = clocks[start]
            if end < len(clocks) and clocks[end] == clock:
                continue
            if clock is not None:
                written = [
                    (head, head * size + b.first + clock % b.length // b.rate)
                    for b in branches
                    for head in range(num_heads)[heads_of(b, clock % b.length, num_heads, offsets)]
                ]
                indices_I2 = torch.tensor(written, dtype=torch.long, device="cpu").view(-1, 2)
                indices_2I = indices_I2.T.contiguous()
                self.runs.append(Rows(slice(start, end), self._pieces(clock), *indices_2I))
            start = end
        self.turn = None
        self.is_whole = len(self.runs) == 1 and self.runs[0].rows == slice(0, len(clocks))

    def _pieces(self, clock):
        """What all heads read of a branch of rate 1, then what is before that, by branch."""
        whole = [b for b in self.branches if b.rate == 1]
        base = max(whole, key=lambda b: clock % b.length, default=None)
        start = clock if base is None else clock - clock % base.length
        pieces, counts_HC = [], None
        for branch in self.branches:
            heads = heads_of(branch, clock % branch.length, self.num_heads, self.offsets)
            if branch is base or heads.start >= heads.stop:
                continue
            u = clock % branch.length
            first, newest, offset = clock - u, u // branch.rate, u % branch.rate
            count = newest + 1
            if base is not None:
                count = max(-(-(start - first - offset) // branch.rate), 0)
                again = first + offset + count * branch.rate - start
                if counts_HC is None:
                    sizes = self.num_heads, clock - start + 1
                    counts_HC = torch.ones(sizes, dtype=self.dtype, device="cpu")
                counts_HC[heads, again :: branch.rate] += 1
            if count:
                pieces.append(self._piece(branch, heads, newest, count, None))
        if base is not None:
            bias = None if counts_HC is None else counts_HC.log_()[None, :, None]
            newest, heads = clock - start, slice(0, self.num_heads)
            pieces.insert(0, self._piece(base, heads, newest, newest + 1, bias))
        return pieces

    def _piece(self, branch, heads, newest, count, bias):
        decay_CK = None
        if self.decays is not None:
            decay_CK = self.decays.factors(branch.rate, newest, count, self.dtype)
        return Piece(heads, slice(branch.first, branch.first + count), decay_CK, bias)

    def turned(self, x_B1HK):
        """A query or key, as `rotate` (zoo/layers/positions.py) turns it by pairs side by side."""
        pairs_B1HK = torch.view_as_complex(x_B1HK.to(self.dtype).unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs_B1HK * self.turn).flatten(-2).to(x_B1HK.dtype)

    def write(self, held, new, may_overwrite=False):
        """As `write_slots`; `held` [B, H, M, K] lies in one piece, and new is [B, 1, H, K]."""
        new_BHK = new[:, 0].to(held.dtype)
        if not may_overwrite:
            held = held.clone()
        held_BRK = held.view(held.shape[0], -1, held.shape[-1])
        for run in self.runs:
            own_BRK, own_BHK = held_BRK, new_BHK
            if not self.is_whole:
                own_BRK, own_BHK = held_BRK[run.rows], new_BHK[run.rows]
            own_BRK.index_copy_(1, run.slots, own_BHK.index_select(1, run.heads))
        return held

    def attend(self, q, keys, values, scale=None):
        """As `dilated_attention_step`, after `write`, without a gradient; V is K."""
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        q_BH1K = q.transpose(1, 2).to(self.dtype)
        if self.is_whole:
            o_BH1V = self._attend(q_BH1K, keys, values, self.runs[0], scale)
        else:
            o_BH1V = torch.zeros_like(q_BH1K)
            for run in self.runs:
                own = (x[run.rows] for x in (q_BH1K, keys, values))
                o_BH1V[run.rows] = self._attend(*own, run, scale)
        return o_BH1V.transpose(1, 2).to(q.dtype)

    def _attend(self, q_BH1K, keys_BHMK, values_BHMV, run, scale):
        o_BH1V = log_BH1 = None
        for piece in run.pieces:
            k_BGCK = keys_BHMK[:, piece.heads, piece.slots]
            v_BGCV = values_BHMV[:, piece.heads, piece.slots].to(self.dtype)
            is_first = o_BH1V is None and k_BGCK.shape[1] == self.num_heads
            q_BG1K = q_BH1K if is_first else q_BH1K[:, piece.heads]
            # Keys have to be rounded once, as those of a pass.
            k_BGCK = k_BGCK.to(self.dtype) if piece.decay is None else k_BGCK * piece.decay
            o_BG1V, log_BG1 = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q_BG1K, k_BGCK, v_BGCV, attn_mask=piece.bias, scale=scale
            )
            if is_first:
                o_BH1V, log_BH1 = o_BG1V, log_BG1
                continue
            if o_BH1V is None:
                o_BH1V = torch.zeros_like(q_BH1K)
                log_BH1 = q_BH1K.new_full(q_BH1K.shape[:3], NO_WEIGHT)
            to_BG1V, to_BG1 = o_BH1V[:, piece.heads], log_BH1[:, piece.heads]
            weight_BG11 = torch.sigmoid(log_BG1 - to_BG1)[..., None]
            to_BG1V.lerp_(o_BG1V, weight_BG11)
            to_BG1.copy_(torch.logaddexp(to_BG1, log_BG1))
        return torch.zeros_like(q_BH1K) if o_BH1V is None else o_BH1V


def hold_known(x, held, branches, offsets, rows):
    """As `hold`, of numbers that the host knows: copies what changes, and nothing else.

    Args:
        x: [B, T, H, K], keys or values of the pass.
        held: [R, H, M, K], the slots before it; None: there were none.
        branches: `branches_of` the configuration.
        offsets: "grouped" or "modulo".
        rows: for each of R rows where its document begins in the flattened batch, how many of its
            tokens came before the pass, and how many there are after it.
    """
    num_heads, x_TK = x.shape[2], x.flatten(0, 1)
    slots = branches[-1].first + branches[-1].count
    after_RHMK = x.new_zeros(len(rows), num_heads, slots, x.shape[-1])
    if held is not None:
        after_RHMK = held.clone()
    for own_HMK, (first, start, after) in zip(after_RHMK, rows):
        if held is not None and start == 0:
            own_HMK.zero_()
        own_THK = x_TK[first : first + after - start]
        for branch in branches:
            w, r = branch.length, branch.rate
            # The tokens of the newest segment, and those of the one before behind them.
            segments = {(after - 1) // w, max(after - w, 0) // w}
            for begin in (segment * w for segment in segments):
                low, high = max(start, after - w, begin), min(after, begin + w)
                for u in range(min(r, num_heads)):
                    heads = heads_of(branch, u, num_heads, offsets)
                    token = begin + u + max(-(-(low - begin - u) // r), 0) * r
                    if token < high and heads.start < heads.stop:
                        new_CHK = own_THK[token - start : high - start : r, heads]
                        slot = branch.first + (token - begin) // r
                        own_HMK[heads, slot : slot + len(new_CHK)] = new_CHK.transpose(0, 1)
    return after_RHMK
