"""A token of a Block-Recurrent Transformer where all rows have as many before it, on a CPU.

`WindowAttention` looks at a whole ring with a mask, as clocks are not known where a program is
compiled or a GPU is ahead of its host. Where the host knows them, a `WindowStep` says once for all
layers which slots the W tokens before a token lie in. What precedes the document has no values and
adds to the denominator alone: it is a factor on the result.
"""

import torch

from ..kernels.linear_recurrence import accumulator_dtype
from .host_clocks import host_clocks


def window_step(sequence, window):
    """A `WindowStep`, or None where the host does not know the clocks, or they differ."""
    clocks = host_clocks(sequence)
    if clocks is None or clocks[0] is None or clocks.count(clocks[0]) < len(clocks):
        return None
    return WindowStep(clocks[0], window)


class WindowStep:
    """Where the tokens before a token lie in rings.

    Args:
        clock: the token's number in its document, from 0.
        window: W.

    Attributes:
        clock: as given.
        count: tokens that it sees.
        changes_states: whether a window begins or ends with it, so that states do.
    """

    def __init__(self, clock, window):
        self.clock, self.window, self.count = clock, window, min(clock, window)
        self.changes_states = clock == 0 or (clock + 1) % window == 0
        self.kept = {}

    def kept_for_all_layers(self, name, compute):
        """compute(), once."""
        if name not in self.kept:
            self.kept[name] = compute()
        return self.kept[name]

    def seen(self, ring_BSHK):
        """What a ring has of the tokens that are seen, [B, C, H, K], in the order of `distances`.

        A view, but for a ring that is longer than the window and comes round in it.
        """
        size = ring_BSHK.shape[1]
        first = 0 if self.count == size else (self.clock - self.count) % size
        if first + self.count <= size:
            return ring_BSHK[:, first : first + self.count]
        return torch.cat([ring_BSHK[:, first:], ring_BSHK[:, : first + self.count - size]], dim=1)

    def distances(self, size):
        """How far behind the newest token before it each one is, [C], in a ring of such a size."""
        newest = (self.clock - 1) % size if self.count == size else self.count - 1
        return (newest - torch.arange(self.count, device="cpu")) % size

    def attend(self, q_B1HK, keys_BSHK, values_BSHV, bias_HC, rest_H):
        """Attention of a token to what it sees, [B, 1, H, V], where V is K.

        Args:
            q_B1HK: its query, scaled.
            keys_BSHK, values_BSHV: rings.
            bias_HC: added to scores, in the order of `distances`; None: nothing.
            rest_H: log of what else is in the denominator.
        """
        dtype = accumulator_dtype(q_B1HK)
        if self.count == 0:
            return torch.zeros_like(q_B1HK)
        k_BHCK, v_BHCV = (self.seen(x).transpose(1, 2).to(dtype) for x in (keys_BSHK, values_BSHV))
        bias = None if bias_HC is None else bias_HC[None, :, None]
        o_BH1V, log_BH1 = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_B1HK.transpose(1, 2).to(dtype), k_BHCK, v_BHCV, attn_mask=bias, scale=1.0
        )
        o_BH1V = o_BH1V * (log_BH1 - rest_H[:, None]).sigmoid()[..., None]
        return o_BH1V.transpose(1, 2).to(q_B1HK.dtype)

    def write(self, ring_BSHK, new_B1HK, may_overwrite):
        """The ring with the token itself; a copy unless it may be overwritten."""
        if not may_overwrite:
            ring_BSHK = ring_BSHK.clone()
        ring_BSHK[:, self.clock % ring_BSHK.shape[1]] = new_B1HK[:, 0]
        return ring_BSHK
