"""What distances do to scores in Transformer-XL, (q + t) r_d / sqrt(K), laid out by key.

Dai et al. 2019, https://arxiv.org/abs/1901.02860, appendix B: the scores of a block of queries by
distance are one product; every row of it is then moved to where its keys are.
"""

import torch
from torch.nn.functional import pad

from ..kernels.linear_recurrence import accumulator_dtype

# Queries whose zeros before the text are summed at a time.
BLOCK = 512


def sinusoids(width, count):
    """[sin(d w_0), ..., cos(d w_0), ...] of the distances d from 0, w_j = 10000^(-2j / D); [E, D].

    Args:
        width: D, even.
        count: E.
    """
    frequencies_J = 10000 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles_EJ = torch.arange(count, dtype=torch.float64)[:, None] * frequencies_J
    return torch.cat([angles_EJ.sin(), angles_EJ.cos()], dim=1)


def shifted(score_CS):
    """Scores by distance, the largest first, to where keys are: [..., C, S] to the same.

    Row c has the distances S - 1 to 0. Of S keys the last C are the queries' own, so that query c
    sees key s at the distance S - C + c - s: row c moves by C - 1 - c. Keys after a query get what
    was in the next row, of no meaning.
    """
    num_queries, num_keys = score_CS.shape[-2:]
    flat = pad(score_CS, (0, 1)).flatten(-2)
    begin = num_queries - 1
    return flat[..., begin : begin + num_queries * num_keys].unflatten(-1, (num_queries, num_keys))


def band_scores(q_BCHK, r_EHK, num_keys):
    """Scores of a block of queries and S keys, of which the last are their own, [B, H, ..., C, S].

    Args:
        q_BCHK: queries, scaled, [B, ..., C, H, K].
        r_EHK: a vector of each distance; the last one stands for all beyond.
        num_keys: S.
    """
    distance_S = torch.arange(num_keys - 1, -1, -1, device=r_EHK.device)
    r_SHK = r_EHK[distance_S.clamp(max=r_EHK.shape[0] - 1)]
    return shifted(torch.einsum("b...chk,shk->bh...cs", q_BCHK, r_SHK))


def logits_of_zeros(q_BTHK, r_EHK, sequence, config):
    """log of the sum of exp(q . r_d) over the zeros before a text, [B, T, H].

    Their values are zero: all they do is to add to the denominator. None where there are none.

    Args:
        q_BTHK: queries, scaled, of a pass that has no state, or is packed.
        r_EHK: a vector of each distance; the last one stands for all beyond.
        sequence: how the tokens lie.
        config: a `TransformerXLConfig`.
    """
    (batch, time), dtype = q_BTHK.shape[:2], accumulator_dtype(q_BTHK)
    clock_T = sequence.clock.expand(batch, time).flatten()
    tokens_T = torch.arange(batch * time, device=clock_T.device)
    if sequence.cu_seqlens is None:
        tokens_T = tokens_T.unflatten(0, (batch, time))[:, : config.zeros_end].flatten()
    else:
        tokens_T = tokens_T[clock_T < config.zeros_end]
    if tokens_T.shape[0] == 0:
        return None
    distance_W = torch.arange(config.num_slots, device=clock_T.device)
    r_WHK = r_EHK[distance_W.clamp(max=r_EHK.shape[0] - 1)]
    q_THK, blocks = q_BTHK.flatten(0, 1), []
    for tokens_C in tokens_T.split(BLOCK):
        score_CHW = torch.einsum("chk,whk->chw", q_THK[tokens_C].to(dtype), r_WHK.to(dtype))
        n_C1 = clock_T[tokens_C][:, None]
        is_zero_CW = (distance_W > n_C1) & (distance_W <= config.reach(n_C1))
        score_CHW = score_CHW.masked_fill(~is_zero_CW[:, None], -torch.inf)
        blocks.append(score_CHW.logsumexp(-1))
    logits_TH = q_THK.new_full(q_THK.shape[:2], -torch.inf, dtype=dtype)
    return logits_TH.index_copy(0, tokens_T, torch.cat(blocks)).unflatten(0, (batch, time))
