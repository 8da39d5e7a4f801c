"""Crossbatch: a memory layer that trains on the windows of other documents too, as negatives.

Tworkowski et al. 2023, section 3.2, https://arxiv.org/abs/2307.03170, as the authors' code has it
(FoT/cross_batch.py of CStanKonrad/long_llama). The windows of a batch lie one after the other,
each document's in their order. A window looks at itself, causally, and at those right before it in
that list, in one softmax, with the keys as a memory has them: without positions. Some of them are
its document's earlier windows, the rest are another document's, whose keys it learns to tell apart.

    C = 1 + range windows at most; the i-th of the list, the w-th of P of its document, sees

    min(C, i + 1)                                      all of them
    min(w ceil(C / max(P - 1, 1)) + 1, C, i + 1)       stepping, if P > 1: more, the later it is

A way to train, not a model: `train_across_batch(model, range)` sets it on a model's layers, whose
config knows nothing of it. All keys of these windows are seen, whatever a memory keeps and chooses
in use; after `model.eval()` there are no negatives, and what the config says.
"""

import torch
import torch.nn.functional as F


def train_across_batch(model, reach, stepping=True):
    """Lets a model's memory layers train on other documents' windows.

    Args:
        model: with such layers.
        reach: how many windows before its own a window looks at (the authors' cross_batch_range);
            None: on its own document's alone, as it is used.
        stepping: fewer for the first windows of a document, as in the authors' training.

    Raises:
        ValueError: no layer with a memory, or no number of windows.
    """
    layers = [module for module in model.modules() if hasattr(module, "cross_batch_range")]
    if not layers:
        raise ValueError(
            f"cross_batch_range is for layers with a memory, got a {type(model).__name__} without "
            "one; use a LongLlama model with memory_layers."
        )
    if reach is not None and reach < 1:
        raise ValueError(f"cross_batch_range is at least 1, got {reach}; None is no crossbatch.")
    for layer in layers:
        layer.cross_batch_range, layer.cross_batch_stepping = reach, stepping


def participants(rank_S, num_S, reach, stepping=True):
    """How many windows each window of the list sees, its own included, [S].

    Args:
        rank_S: w, which of its document's windows it is.
        num_S: P, how many windows its document has.
        reach: how many windows before its own there are at most.
        stepping: see the top of this file.
    """
    place_S = torch.arange(len(rank_S), device=rank_S.device)
    return torch.minimum(most_participants(rank_S, num_S, reach, stepping), place_S + 1)


def most_participants(rank_S, num_S, reach, stepping=True):
    """`participants` wherever enough windows lie before; arguments as there."""
    most = 1 + reach
    count_S = torch.full_like(rank_S, most)
    if stepping:
        step_S = -(-most // (num_S - 1).clamp(min=1))
        count_S = torch.where(num_S == 1, most, (rank_S * step_S + 1).clamp(max=most))
    return count_S


def attend_across_batch(q_SQHK, turned_SLGK, raw_SLGK, v_SLGV, lengths_S, count_S, scale=None):
    """Attention of windows to themselves and to those before them in the list, [S, H, Q, V].

    Args:
        q_SQHK: queries, turned; query q is of slot q.
        turned_SLGK: keys, turned as the queries.
        raw_SLGK: keys as others see them.
        v_SLGV: values.
        lengths_S: tokens of each window; what lies behind them nobody sees.
        count_S: of `participants`.
        scale: of the scores; None: K^-1/2.
    """
    num_windows, size = turned_SLGK.shape[:2]
    device = q_SQHK.device
    slots_L, windows_S = torch.arange(size, device=device), torch.arange(num_windows, device=device)
    own_SQL = slots_L <= slots_L[: q_SQHK.shape[1], None]
    keys, values = [turned_SLGK], [v_SLGV]
    seen = [own_SQL.expand(num_windows, -1, -1)]
    for back in range(1, min(int(count_S.max()), num_windows)):
        other_S = (windows_S - back).clamp(min=0)
        keys.append(raw_SLGK[other_S])
        values.append(v_SLGV[other_S])
        seen_SL = (slots_L < lengths_S[other_S, None]) & (count_S > back)[:, None]
        seen.append(seen_SL[:, None].expand_as(seen[0]))
    o_SHQV = F.scaled_dot_product_attention(
        q_SQHK.transpose(1, 2),
        torch.cat(keys, dim=1).transpose(1, 2),
        torch.cat(values, dim=1).transpose(1, 2),
        attn_mask=torch.cat(seen, dim=-1)[:, None],
        enable_gqa=turned_SLGK.shape[2] < q_SQHK.shape[2],
        scale=scale,
    )
    return o_SHQV
