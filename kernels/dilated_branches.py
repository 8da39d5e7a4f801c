"""The branches of LongNet's dilated attention, and where the slots of each lie."""

from typing import NamedTuple

import torch


class Branch(NamedTuple):
    """One (w, r), and where its slots lie among those of all branches.

    Attributes:
        length: w, tokens of a segment.
        rate: r.
        first: its first slot.
        count: ceil(w / r), its slots.
    """

    length: int
    rate: int
    first: int
    count: int

    def offsets(self, num_heads, kind, device):
        """The offset of each head, [H]."""
        heads_H = torch.arange(num_heads, device=device)
        if kind == "modulo":
            return heads_H % self.rate
        return heads_H // self.group_size(num_heads)

    def group_size(self, num_heads):
        """How many heads share an offset, at most."""
        return -(-num_heads // self.rate)


def branches_of(segment_lengths, dilation_rates):
    """The `Branch`es.

    Raises:
        ValueError: not as many of one as of the other, none, or any below 1.
    """
    lengths, rates = list(segment_lengths), list(dilation_rates)
    if not lengths or len(lengths) != len(rates) or min(*lengths, *rates) < 1:
        raise ValueError(
            "segment_lengths and dilation_rates have one positive entry per branch each, got "
            f"{lengths} and {rates}."
        )
    counts = [-(-w // r) for w, r in zip(lengths, rates)]
    return [
        Branch(w, r, sum(counts[:i]), counts[i]) for i, (w, r) in enumerate(zip(lengths, rates))
    ]
