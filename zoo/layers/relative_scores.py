"""What distances do to scores in Transformer-XL, (q + t) r_d / sqrt(K), laid out by key.

Dai et al. 2019, https://arxiv.org/abs/1901.02860, appendix B: the scores of a block of queries by
distance are one product; every row of it is then moved to where its keys are.
"""

import torch
from torch.nn.functional import pad

from ..kernels.attention_by_head import LEAST_IN_BLOCK, padded_scores, takes_blocks_by_head

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
    return _moved(pad(score_CS, (0, 1)))


def _moved(padded_CS):
    """`shifted` of scores that have one more column, of no meaning."""
    num_queries, num_keys = padded_CS.shape[-2], padded_CS.shape[-1] - 1
    flat, begin = padded_CS.flatten(-2), num_queries - 1
    return flat[..., begin : begin + num_queries * num_keys].unflatten(-1, (num_queries, num_keys))


def band_scores(q_BTHK, rows, r_EHK, num_keys):
    """Scores of some queries and S keys, of which the last are their own, [B, H, ..., C, S].

    Args:
        q_BTHK: queries, scaled.
        rows: which of them, [..., C].
        r_EHK: a vector of each distance; the last one stands for all beyond.
        num_keys: S.
    """
    distance_S = torch.arange(num_keys - 1, -1, -1, device=r_EHK.device)
    r_SHK = r_EHK[distance_S.clamp(max=r_EHK.shape[0] - 1)]
    if rows.ndim == 1:
        if not torch.is_grad_enabled():
            sizes = len(rows), num_keys, LEAST_IN_BLOCK
            if takes_blocks_by_head(q_BTHK, r_SHK, r_SHK, *sizes):
                return _moved(padded_scores(q_BTHK[:, rows], r_SHK))
        return shifted(torch.einsum("bchk,shk->bhcs", q_BTHK[:, rows], r_SHK))
    # All blocks of a program for export, which cannot prove how [N, C] makes [T].
    return shifted(torch.einsum("bthk,shk->bhts", q_BTHK, r_SHK)[:, :, rows])


def logits_of_zeros(q_BTHK, r_EHK, sequence, config):
    """log of the sum of exp(q . r_d) over the zeros before a text, [B, T, H].

    Their values are zero: all they do is to add to the denominator. None where there are none.

    Args:
        q_BTHK: queries, scaled, of a pass that has no state, or is packed.
        r_EHK: a vector of each distance; the last one stands for all beyond.
        sequence: how the tokens lie.
        config: a `TransformerXLConfig`.
    """
    if torch.compiler.is_exporting():  # for any length: all tokens at once, with zeros or without
        return _sums_over_zeros(q_BTHK, sequence.clock.expand(q_BTHK.shape[:2]), r_EHK, config)
    batch, time = q_BTHK.shape[:2]
    clock_T = sequence.clock.expand(batch, time).flatten()
    tokens_T = torch.arange(batch * time, device=clock_T.device)
    if sequence.cu_seqlens is None:
        tokens_T = tokens_T.unflatten(0, (batch, time))[:, : config.zeros_end].flatten()
    else:
        tokens_T = tokens_T[clock_T < config.zeros_end]
    if tokens_T.shape[0] == 0:
        return None
    q_THK = q_BTHK.flatten(0, 1)
    blocks = [
        _sums_over_zeros(q_THK[tokens_C], clock_T[tokens_C], r_EHK, config)
        for tokens_C in tokens_T.split(BLOCK)
    ]
    logits_TH = q_THK.new_full(q_THK.shape[:2], -torch.inf)
    return logits_TH.index_copy(0, tokens_T, torch.cat(blocks)).unflatten(0, (batch, time))


def _sums_over_zeros(q_THK, clock_T, r_EHK, config):
    """Of queries at these clocks, of any axes before H."""
    distance_W = torch.arange(config.num_slots, device=clock_T.device)
    r_WHK = r_EHK[distance_W.clamp(max=r_EHK.shape[0] - 1)]
    score_THW = torch.einsum("...hk,whk->...hw", q_THK, r_WHK)
    n_T1 = clock_T[..., None]
    is_zero_TW = (distance_W > n_T1) & (distance_W <= config.reach(n_T1))
    return score_THW.masked_fill(~is_zero_TW[..., None, :], -torch.inf).logsumexp(-1)
