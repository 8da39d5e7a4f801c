"""Full attention over slices by heads: each process has some of the heads of all tokens (Ulysses).

Jacobs et al. 2023, https://arxiv.org/abs/2309.14509. A process gives away the queries, keys and
values of its slice but for its share of the heads, and gets those of the other slices for that one;
then it is as if it had whole rows, and what comes of them goes back. All do the same work, which
slices of causal attention do not. In bytes, for a slice of N tokens, b bytes per number, H heads of
queries and G of keys and values of width K, and R processes, in each direction:

    2 b N (H + G) K (R - 1) / R

and once per pass, where documents are packed, the place of each token in its document.
"""

import torch

from .shifted_groups import PartOfHeads, part_of_bias


class Whole:
    """How whole rows lie that are put together from all slices; the same in all layers.

    Args:
        sequence: the `Sequence`, a slice.

    Attributes:
        counts: how many tokens each process has.
        shape: (B, T) of the rows, or (1, total) where they are packed.
        clock: [1, T] or [1, total], as of `Sequence`.
        cu_seqlens: as of `Sequence`.
    """

    def __init__(self, sequence):
        ranks, device = sequence.ranks, sequence.clock.device
        tokens_RB = ranks.tokens_RB.to(device)
        num_rows = tokens_RB.shape[1]
        rows_B = torch.arange(num_rows, device=device)
        row_N = torch.cat([torch.repeat_interleave(rows_B, n_B) for n_B in tokens_RB])
        # As they arrive, tokens are in the order of slices.
        self.order_N = row_N.argsort(stable=True)
        self.back_N = self.order_N.argsort()
        self.counts = tokens_RB.sum(1).tolist()
        is_even = bool((tokens_RB == tokens_RB[:, :1]).all())
        if is_even and not bool(ranks.start_RB.any()):
            self.shape, self.cu_seqlens = (num_rows, len(row_N) // num_rows), None
            self.clock = torch.arange(self.shape[1], device=device)[None]
            return
        own = self.counts[ranks.rank]
        clock_N = sequence.clock
        if sequence.cu_seqlens is None:
            clock_N = clock_N.expand(sequence.shape)
        clock_N = torch.nn.functional.pad(clock_N.flatten()[:own], (0, max(self.counts) - own))
        every = zip(ranks.wire.all_gather(clock_N), self.counts)
        clock_N = torch.cat([x_N[:count] for x_N, count in every])[self.order_N]
        starts_N = (clock_N == 0).nonzero()[:, 0]
        self.cu_seqlens = torch.cat([starts_N, starts_N.new_tensor([len(clock_N)])])
        self.clock, self.shape = clock_N[None], (1, len(clock_N))


def attend_by_heads(mixer, q_BTHK, k_BTHK, v_BTHV, sequence):
    """The attention of a slice's tokens to all of their documents.

    Args:
        mixer: a `SoftmaxAttention` without a window, of whose heads of keys and values each process
            gets as many.
        q_BTHK, k_BTHK, v_BTHV: of the slice.
        sequence: the slice.
    """
    ranks, heads, groups = sequence.ranks, mixer.num_heads, mixer.num_groups
    if "whole" not in ranks.kept:
        ranks.kept["whole"] = Whole(sequence)
    whole, size, own = ranks.kept["whole"], ranks.size, ranks.kept["whole"].counts[ranks.rank]
    # A slice of padding has a token that is none.
    tensors = [x.flatten(0, 1)[:own].unflatten(1, (size, -1)) for x in (q_BTHK, k_BTHK, v_BTHV)]
    to_all_RNHK = torch.cat(tensors, dim=2).transpose(0, 1)
    x_NHK = ranks.to_each(to_all_RNHK.flatten(0, 1), [own] * size, whole.counts)
    x_BTHK = x_NHK[whole.order_N].unflatten(0, whole.shape)
    parts = x_BTHK.split([heads // size, groups // size, groups // size], dim=2)
    whole_q, whole_k, whole_v = (x.to(y.dtype) for x, y in zip(parts, (q_BTHK, k_BTHK, v_BTHV)))
    bias = mixer.pass_bias(whole.clock, whole.shape[1], whole_q)
    part = PartOfHeads(mixer, ranks.rank, size, mixer.num_key_value_groups)
    o_BTHV = part.attend(
        *(whole_q, whole_k, whole_v),
        bias=part_of_bias(bias, ranks.rank, size),
        cu_seqlens=whole.cu_seqlens,
    )
    o_NHV = o_BTHV.flatten(0, 1)[whole.back_N]
    y_NHV = ranks.to_each(o_NHV, whole.counts, [own] * size)
    y_NHV = y_NHV.reshape(size, own, *y_NHV.shape[1:]).transpose(0, 1).flatten(1, 2)
    if sequence.is_empty:
        y_NHV = y_NHV.new_zeros(1, *y_NHV.shape[1:])
    return y_NHV.unflatten(0, q_BTHK.shape[:2])
