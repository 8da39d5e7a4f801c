"""Softmax attention of which a part is to the keys with the largest scores alone.

The k nearest of a memory for each query and head, with the others of it left out of the softmax as
if they had never been there (Wu et al. 2022, https://arxiv.org/abs/2203.08913, section 3.1, without
a gate; Tworkowski et al. 2023, https://arxiv.org/abs/2307.03170, section 3.1).
"""

import torch
import torch.nn.functional as F


@torch.no_grad()
def choose(score_XS, count):
    """Which scores are the largest, [..., S] bool: so many; of equal ones the first.

    Args:
        score_XS: scores; -inf is chosen by nobody.
        count: how many, or all where there are fewer.
    """
    size = score_XS.shape[-1]
    if torch.compiler.is_exporting():
        # A program of any length cannot ask how many there are: so that there are always enough.
        score_XS = F.pad(score_XS, (0, count), value=-torch.inf)
    elif count >= size:
        return score_XS > -torch.inf
    least_X1 = score_XS.topk(count, dim=-1, sorted=True).values[..., -1:]
    is_above, is_equal = score_XS > least_X1, score_XS == least_X1
    room_X1 = count - is_above.sum(-1, keepdim=True)
    chosen_XS = is_above | (is_equal & (is_equal.cumsum(-1) <= room_X1))
    return (chosen_XS & (score_XS > -torch.inf))[..., :size]


def indices_of(chosen_XS, count):
    """Where the chosen are, in their order, [..., count]; -1 behind the last of them."""
    if torch.compiler.is_exporting():
        chosen_XS = F.pad(chosen_XS, (0, count))
        most = count
    else:
        most = min(count, chosen_XS.shape[-1])
    size = chosen_XS.shape[-1]
    place_S = torch.arange(size, 0, -1, device=chosen_XS.device)
    found_XK = torch.where(chosen_XS, place_S, 0).topk(most, dim=-1).values
    index_XK = torch.where(found_XK > 0, size - found_XK, -1)
    return F.pad(index_XK, (0, count - most), value=-1)


def attend_to_chosen(q_NQHK, own, memory, top_k, scale, choice=None):
    """One softmax over a query's own keys and those it chooses of a memory, [N, H, Q, V].

    Args:
        q_NQHK: queries.
        own, memory: (keys [N, S, G, K], values [N, S, G, V], which are seen [N or 1, Q, S] bool).
        top_k: how many of the memory; None: all.
        scale: of the scores.
        choice: a function of where the chosen are in the memory, [N, Q, H, top_k] with -1 for none,
            that returns it; None: it stays.
    """
    dtype = torch.promote_types(q_NQHK.dtype, torch.float32)
    num_groups = own[0].shape[2]
    q_NGRQK = q_NQHK.to(dtype).transpose(1, 2).unflatten(1, (num_groups, -1)) * scale
    scores, values = [], []
    for k_NSGK, v_NSGV, seen_NQS in (memory, own):
        k_NG1SK, v_NG1SV = (x.to(dtype).transpose(1, 2)[:, :, None] for x in (k_NSGK, v_NSGV))
        score_NGRQS = q_NGRQK @ k_NG1SK.mT
        scores.append(score_NGRQS.masked_fill(~seen_NQS[:, None, None], -torch.inf))
        values.append(v_NG1SV)
    place_NGRQk = None
    if top_k is not None and scores[0].shape[-1]:
        place_NGRQk = indices_of(choose(scores[0], top_k), top_k)
        if choice is not None:
            place_NQHk = choice(place_NGRQk.flatten(1, 2).transpose(1, 2))
            place_NGRQk = place_NQHk.transpose(1, 2).unflatten(1, (num_groups, -1))
        chosen_NGRQk = scores[0].gather(-1, place_NGRQk.clamp(min=0))
        all_NGRQS, scores[0] = scores[0], chosen_NGRQk.masked_fill(place_NGRQk < 0, -torch.inf)
    sizes = [x.shape[-1] for x in scores]
    far_NGRQS, near_NGRQS = torch.cat(scores, dim=-1).softmax(-1).split(sizes, dim=-1)
    if place_NGRQk is not None:
        place_NGRQk = place_NGRQk.clamp(min=0)  # of those that are none the share is 0
        far_NGRQS = torch.zeros_like(all_NGRQS).scatter_add(-1, place_NGRQk, far_NGRQS)
    o_NGRQV = far_NGRQS @ values[0] + near_NGRQS @ values[1]
    return o_NGRQV.flatten(1, 2).to(own[1].dtype)


def attend_to_found(q_BTHK, own, memory, place_BHk, scale):
    """A step's softmax over a query's own keys and some of a memory, by their numbers.

    Args:
        q_BTHK: a query per row, [B, 1, H, K].
        own: as of `attend_to_chosen`, [B, S] seen.
        memory: (keys [B, S, G, K], values).
        place_BHk: where they are, [B, H, k]; -1: there is none.
        scale: of the scores.

    Returns:
        o [B, 1, H, V].
    """
    dtype = torch.promote_types(q_BTHK.dtype, torch.float32)
    num_heads, num_groups = q_BTHK.shape[2], own[0].shape[2]
    q_BHK = q_BTHK[:, 0].to(dtype) * scale
    rows_B11 = torch.arange(len(q_BHK), device=q_BHK.device)[:, None, None]
    group_H1 = torch.arange(num_heads, device=q_BHK.device)[:, None] // (num_heads // num_groups)
    places = rows_B11, place_BHk.clamp(min=0), group_H1
    far_BHkK, far_BHkV = (x[places].to(dtype) for x in memory)
    k_BSHK, v_BSHV = (x.to(dtype).repeat_interleave(num_heads // num_groups, 2) for x in own[:2])
    far_BHk = (far_BHkK @ q_BHK[..., None])[..., 0].masked_fill(place_BHk < 0, -torch.inf)
    near_BHS = torch.einsum("bhk,bshk->bhs", q_BHK, k_BSHK)
    near_BHS = near_BHS.masked_fill(~own[2][:, None], -torch.inf)
    p_BHS = torch.cat([far_BHk, near_BHS], dim=-1).softmax(-1)
    far, near = p_BHS.split([far_BHk.shape[-1], near_BHS.shape[-1]], dim=-1)
    o_BHV = (far[:, :, None] @ far_BHkV)[:, :, 0] + torch.einsum("bhs,bshv->bhv", near, v_BSHV)
    return o_BHV[:, None].to(own[1].dtype)
