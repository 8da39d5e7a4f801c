"""The tokens at the ends of slices: what a mixer sees of the processes before, and of its own.

Of each row, the last document of a slice is the one that may go on in the next. Its last tokens lie
at the end of a window [B, W, ...]; what is left of the window is 0.
"""

import torch
import torch.nn.functional as F


def tail(ranks, x_BTX, width=None):
    """The last tokens of each row's last document in this slice, [B, W, ...].

    Args:
        ranks: the `Ranks` of the pass.
        x_BTX: [B, T, ...] of a dense batch or a packed stream.
        width: W; None: as many as the longest has.
    """
    time, rest = x_BTX.shape[1], x_BTX.ndim - 2
    if ranks.cu_seqlens is None:
        if width is None or width == time:
            return x_BTX
        return F.pad(x_BTX[:, -width:], (0, 0) * rest + (max(width - time, 0), 0))
    if width is None:
        width = ranks.longest
    cu_seqlens, last_B = ranks.cu_seqlens, ranks.last_B.clamp(min=0)
    window_W = torch.arange(width, device=x_BTX.device)
    index_BW = cu_seqlens[1:][last_B][:, None] - width + window_W
    is_there_BW = (index_BW >= cu_seqlens[:-1][last_B][:, None]) & ranks.has_tokens_B[:, None]
    x_BWX = x_BTX[0][index_BW.clamp(min=0)]
    return torch.where(is_there_BW.view(*is_there_BW.shape, *[1] * rest), x_BWX, 0)


def tails_of_left(ranks, own_BWX):
    """The last W tokens of each row's last document before this slice.

    Args:
        ranks: the `Ranks` of the pass.
        own_BWX: `tail` of each process.
    """
    width = own_BWX.shape[1]
    if ranks.fewest >= width:
        return ranks.from_left(own_BWX)[0]
    # Some slice is shorter than the window, which then reaches further than to the next process.
    every_RBWX, left_BWX = ranks.gathered(own_BWX), torch.zeros_like(own_BWX)
    window_W = torch.arange(width, device=own_BWX.device)
    for rank in range(ranks.rank):
        count_B = ranks.own_RB[rank].clamp(max=width)
        count_B = torch.where(ranks.start_RB[rank], width, count_B).to(own_BWX.device)
        moved_BW = window_W + torch.where(
            window_W < width - count_B[:, None], count_B[:, None], width
        )
        both_BWX = torch.cat([left_BWX, every_RBWX[rank]], dim=1)
        left_BWX = both_BWX[torch.arange(len(count_B), device=count_B.device)[:, None], moved_BW]
    return left_BWX
