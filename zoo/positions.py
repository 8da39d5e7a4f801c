"""Positions as rotations of queries and keys (RoPE, Su et al. 2021, section 3.2).

https://arxiv.org/abs/2104.09864. The angles are the architectures' own.
"""

import torch


def rotate(x_BTHK, cos_BTHK, sin_BTHK, interleaved=False):
    """Turns pairs of channels, in float32 or better; returned in x's own dtype.

    Args:
        x_BTHK: queries or keys.
        cos_BTHK, sin_BTHK: of each pair's angle, K / 2 wide.
        interleaved: pairs (2j, 2j + 1), else (j, j + K/2).
    """
    dtype = torch.promote_types(x_BTHK.dtype, torch.float32)
    cos_BTHK, sin_BTHK = cos_BTHK.to(dtype), sin_BTHK.to(dtype)
    if interleaved:
        a_BTHK, b_BTHK = x_BTHK.unflatten(-1, (-1, 2)).unbind(-1)
    else:
        a_BTHK, b_BTHK = x_BTHK.chunk(2, dim=-1)
    turned = a_BTHK * cos_BTHK - b_BTHK * sin_BTHK, b_BTHK * cos_BTHK + a_BTHK * sin_BTHK
    joined = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return joined.to(x_BTHK.dtype)
