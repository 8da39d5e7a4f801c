"""Landmark attention: a grouped softmax over blocks of keys, each closed by its landmark.

Mohtashami and Jaggi 2023, https://arxiv.org/abs/2305.16300. A text is cut into blocks of N slots:
N - 1 tokens and, last, a landmark. For a query of block b, with scores s of all keys:

    p = softmax over [the tokens of its own block up to itself | landmarks of earlier blocks]
    o = sum_own p_j v_j + sum_c p_{landmark c} sum_{t in c} softmax_c(s)_t v_t

No landmark's value is ever used, and none sees itself. As the weights of a block's tokens sum to
its landmark's, this is one softmax over all tokens, with s_t + s_{landmark c} - logsumexp_c(s) for
those of an earlier block c: that is how it is computed, from one matrix of scores.

`attend_to_all` is the attention a model trains with: all earlier blocks take part, at their own
places. `attend_to_retrieved` reads the K blocks whose landmarks score highest, for every query and
head on its own, at places close by: a text may be longer than any that was trained. Both take
queries in pieces, so that of B H T S scores no more than `MOST_SCORES` exist at a time; in training
each piece is computed again in backward. Scores of all T tokens against all S cost 2 B H T S K
operations, once, and values as many; retrieval costs those for landmarks alone, and K + 1 blocks.
"""

import torch
from torch.utils.checkpoint import checkpoint

from ..kernels.windowed_attention import attention_step_to_all
from .landmark_by_head import attend_to_all_by_head, takes_all_by_head
from .positions import rotate

# In a piece, of scores or of keys that were picked; on a GPU, whose memory is not a cache, more.
MOST_SCORES = 1 << 23
TIMES_ON_A_GPU = 8
# On a CPU, attention to all earlier blocks is fastest with scores that a cache holds, and queries
# in pieces do not look at blocks that come after them.
SHARE_OF_ALL_ON_A_CPU = 4


def attend_to_all(q, k, v, clock, scale, first=None):
    """Every earlier block takes part.

    Args:
        q: [B, Q, H, K] queries, turned as their places in the stream of tokens and landmarks say.
        k: [B, M, N, G, K] keys of M blocks, turned.
        v: [B, M, N, G, V].
        clock: [B or 1, Q], the places of the queries.
        scale: what a score is multiplied by.
        first: the place of the first query, if all rows have the same and later queries follow it.

    Returns:
        [B, Q, H, V] in v's dtype.
    """
    if takes_all_by_head(q, k, v, first):

        def otherwise(q, k, v):
            return _all_in_pieces(q, k, v, clock, scale, first)

        return attend_to_all_by_head(q, k, v, scale, first, otherwise)
    return _all_in_pieces(q, k, v, clock, scale, first)


def _all_in_pieces(q, k, v, clock, scale, first):
    batch, num_blocks, size = k.shape[:3]
    per_query = batch * q.shape[2] * num_blocks * size
    if q.device.type == "cpu":
        per_query *= SHARE_OF_ALL_ON_A_CPU

    def piece(q_BCHK, clock_BC, last):
        reach = num_blocks if last is None else last // size + 1
        return _all(q_BCHK, k[:, :reach], v[:, :reach], clock_BC, scale)

    return _in_pieces(piece, q, clock, per_query, first)


def attend_step_to_all(q, k, v, size, scale, key_rotation):
    """`attend_to_all` for the last place alone, a token's, without gradients.

    Args:
        q: [B, 1, H, K], turned.
        k, v: [B, S, G, K or V] by place up to its own.
        size: N, places of a block.
        scale: as there.
        key_rotation: the `StepRotation` that turns the keys.

    Returns:
        [B, 1, H, V], in float32 at least.
    """
    dtype, block = torch.promote_types(q.dtype, torch.float32), (k.shape[1] - 1) // size
    if block == 0:
        return attention_step_to_all(q, key_rotation.turn(k), v, scale)
    q_BGRK = q[:, 0].to(dtype).unflatten(1, (k.shape[2], -1)) * scale
    # Row by row: the turned keys of one stay near the processor, and are not copied for a product.
    rows = ((q, key_rotation.turn(k).to(dtype)[0]) for q, k in zip(q_BGRK, k.split(1)))
    scores_BGRS = torch.stack([q_GRK @ k_SGK.permute(1, 2, 0) for q_GRK, k_SGK in rows])
    earlier_BGRMN = scores_BGRS[..., : block * size].unflatten(-1, (block, size))
    tokens_BGRMT, landmark_BGRM1 = earlier_BGRMN.split([size - 1, 1], dim=-1)
    tokens_BGRMT += landmark_BGRM1 - tokens_BGRMT.logsumexp(-1, keepdim=True)
    landmark_BGRM1.fill_(-torch.inf)
    rows = zip(scores_BGRS.softmax(-1), v.to(dtype).transpose(1, 2))
    o_BGRV = torch.stack([p_GRS @ v_GSV for p_GRS, v_GSV in rows])
    return o_BGRV.flatten(1, 2)[:, None]


def attend_to_retrieved(
    q, k, v, clock, scale, count, rotation, same_landmarks=False, let_through=None
):
    """The blocks whose landmarks score highest take part, at places close by.

    A query of block b at slot s stands at (K_b + 1) N + s, where K_b = min(count, b). To be chosen,
    the last K_b blocks stand where they are, (K_b + 1) N or less before; all older ones at 0. The
    chosen then stand in the order of the text: the r-th at r N, or at (r + 1) N if it is one of the
    last K_b.

    Args:
        q, k: as of `attend_to_all`, but not turned.
        v, clock, scale: as there.
        count: K, blocks that are read.
        rotation: (cos, sin) of the places from 0 to (count + 2) N, [places, 1, K / 2].
        same_landmarks: whether the landmarks' keys are those of one embedding, as in a first layer:
            then all old ones have the same score, and of them the first are read.
        let_through: (blocks that each query reads [B, Q, H, count], -1 where there are fewer;
            clock) -> those that it is to read, a `Choice`; None: the same.

    Returns:
        [B, Q, H, V] in v's dtype.
    """
    batch, num_blocks, size = k.shape[:3]
    heads = q.shape[2]
    landmarks = rotate(k[:, :, -1], *(x[size - 1] for x in rotation))
    per_query = batch * heads * max(num_blocks, 2 * count * size * k.shape[-1])
    # Keys are turned by their slots: all of them before they are picked, or those that were.
    slots = tuple(x[:size] for x in rotation)
    is_turned = q.shape[1] * heads * count > k.shape[3] * num_blocks
    if is_turned:
        k = rotate(k, *slots)

    def piece(q_BCHK, clock_BC, last):
        chosen = _retrieve(
            q_BCHK, landmarks, clock_BC, scale, count, size, rotation, same_landmarks
        )
        if let_through is not None:
            chosen = let_through(chosen, clock_BC)
        turn_key = None if is_turned else slots
        return _retrieved(q_BCHK, k, v, clock_BC, scale, chosen, rotation, turn_key)

    return _in_pieces(piece, q, clock, per_query, None)


def _in_pieces(piece, q, clock, per_query, first):
    """Runs piece(q, clock, the last query's place or None) over some queries at a time."""
    time = q.shape[1]
    most = MOST_SCORES * (1 if q.device.type == "cpu" else TIMES_ON_A_GPU)
    step = max(1, most // per_query) if not torch.compiler.is_exporting() else time
    if torch.compiler.is_exporting() or step >= time:
        return piece(q, clock, None)
    saves_memory = torch.is_grad_enabled()
    outputs = []
    for start in range(0, time, step):
        own = q[:, start : start + step], clock[:, start : start + step]
        last = None if first is None else first + min(start + step, time) - 1
        if saves_memory:
            outputs.append(checkpoint(piece, *own, last, use_reentrant=False))
        else:
            outputs.append(piece(*own, last))
    return torch.cat(outputs, dim=1)


def _all(q, k, v, clock, scale):
    dtype = torch.promote_types(q.dtype, torch.float32)
    size, groups = k.shape[2:4]
    q = q.to(dtype).unflatten(2, (groups, -1)) * scale
    tokens_BGRQMT, landmark_BGRQM = _scores(q, k.to(dtype))
    block_BQ1, slot_BQ11 = clock[..., None] // size, (clock % size)[..., None, None]
    blocks_M = torch.arange(k.shape[1], device=clock.device)
    is_earlier_BQM = blocks_M < block_BQ1
    bias_BGRQM = landmark_BGRQM - tokens_BGRQMT.logsumexp(-1)
    bias_BGRQM = torch.where(is_earlier_BQM[:, None, None], bias_BGRQM, 0)
    tokens_T = torch.arange(size - 1, device=clock.device)
    is_own_BQMT = (blocks_M == block_BQ1)[..., None] & (tokens_T <= slot_BQ11)
    visible_BQMT = is_earlier_BQM[..., None] | is_own_BQMT
    scores_BGRQMT = tokens_BGRQMT + bias_BGRQM[..., None]
    scores_BGRQMT = torch.where(visible_BQMT[:, None, None], scores_BGRQMT, -torch.inf)
    return _weighed(scores_BGRQMT, v.to(dtype)).flatten(2, 3).to(v.dtype)


def _scores(q_BQGRK, k_BMNGK):
    """Of tokens [B, G, R, Q, M, N - 1], and of landmarks [B, G, R, Q, M]."""
    if not torch.compiler.is_exporting():
        scores_BGRQMN = torch.einsum("bqgrk,bmngk->bgrqmn", q_BQGRK, k_BMNGK)
        return scores_BGRQMN[..., :-1], scores_BGRQMN[..., -1]
    # What exporting cannot prove of sizes is how one is split in two: so blocks are taken by index.
    num_blocks, size = k_BMNGK.shape[1:3]
    k_BG1SK = k_BMNGK.flatten(1, 2).transpose(1, 2).contiguous()[:, :, None]
    scores_BGRQS = q_BQGRK.permute(0, 2, 3, 1, 4).contiguous() @ k_BG1SK.mT
    begins_M = torch.arange(num_blocks, device=q_BQGRK.device) * size
    tokens_MT = begins_M[:, None] + torch.arange(size - 1, device=q_BQGRK.device)
    return scores_BGRQS[..., tokens_MT], scores_BGRQS[..., begins_M + size - 1]


def _weighed(scores_BGRQMT, v_BMNGV):
    """Values of tokens by the softmax over all of them, [B, Q, G, R, V]."""
    if not torch.compiler.is_exporting():
        values_BSGV = v_BMNGV[:, :, :-1].flatten(1, 2)
        weights_BGRQS = scores_BGRQMT.flatten(-2).softmax(-1)
        return torch.einsum("bgrqs,bsgv->bqgrv", weights_BGRQS, values_BSGV)
    num_blocks, size = v_BMNGV.shape[1:3]
    weights = (scores_BGRQMT - scores_BGRQMT.amax((-2, -1), keepdim=True)).exp()
    weights = weights / weights.sum((-2, -1), keepdim=True)
    place_S = torch.arange(num_blocks * size, device=v_BMNGV.device)
    slot_S = place_S % size
    weights_BGRQS = weights[..., place_S // size, slot_S.clamp(max=size - 2)]
    weights_BGRQS = torch.where(slot_S < size - 1, weights_BGRQS, 0)
    values_BG1SV = v_BMNGV.flatten(1, 2).transpose(1, 2).contiguous()[:, :, None]
    return (weights_BGRQS @ values_BG1SV).permute(0, 3, 1, 2, 4)


def _turned(q, places_BQ, rotation, groups):
    """Queries at some places, [B, G, R, Q, K]."""
    turned = rotate(q, *(x[places_BQ] for x in rotation))
    return turned.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).contiguous()


def _retrieve(q, landmarks, clock, scale, count, size, rotation, same_landmarks):
    """The blocks each query of a head reads, [B, Q, H, count]; -1 where there are fewer."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    num_blocks, groups = landmarks.shape[1:3]
    q, landmarks = q.to(dtype) * scale, landmarks.to(dtype)
    block_BQ, slot_BQ = clock // size, clock % size
    block_BQ1, device = block_BQ[..., None], clock.device
    reads_BQ = block_BQ.clamp(max=count)
    old_BGRQK = _turned(q, (reads_BQ + 1) * size + slot_BQ, rotation, groups)
    if same_landmarks:
        old_BGRQ = (old_BGRQK * landmarks[:, 0, :, None, None]).sum(-1)
        old_BGRQM = old_BGRQ[..., None].expand(*old_BGRQ.shape, num_blocks)
    else:
        landmarks_BG1MK = landmarks.transpose(1, 2).contiguous()[:, :, None]
        old_BGRQM = old_BGRQK @ landmarks_BG1MK.mT
    # The last blocks, from 1 to `count` before; column M takes those that are not there.
    back_C = torch.arange(1, count + 1, device=device)
    last_BQC = block_BQ1 - back_C
    rows_B11 = torch.arange(q.shape[0], device=device)[:, None, None]
    last_BQCGK = landmarks[rows_B11, last_BQC.clamp(0, num_blocks - 1)]
    turned = [_turned(q, n * size + slot_BQ, rotation, groups) for n in range(1, count + 1)]
    last_BG1QCK = last_BQCGK.permute(0, 3, 1, 2, 4)[:, :, None]
    last_BGRQC = (torch.stack(turned, dim=-2) * last_BG1QCK).sum(-1)
    scores_BGRQM = torch.nn.functional.pad(old_BGRQM, (0, count))
    into_BQC = torch.where(last_BQC < 0, num_blocks, last_BQC)[:, None, None]
    scores_BGRQM = scores_BGRQM.scatter(-1, into_BQC.expand_as(last_BGRQC), last_BGRQC)
    chosen = choose(scores_BGRQM, block_BQ, count, same_landmarks)
    is_one = torch.arange(count, device=device) < reads_BQ[:, None, None, :, None]
    return torch.where(is_one, chosen, -1).permute(0, 3, 1, 2, 4).flatten(2, 3)


def choose(scores_BGRQM, block_BQ, count, has_ties):
    """The earlier blocks that score highest, best first, [B, G, R, Q, count].

    Args:
        scores_BGRQM: of all blocks, and of `count` more that are none.
        block_BQ: the block of each query; where fewer than `count` came before, others follow.
        count: K.
        has_ties: whether blocks have the same score, bit for bit: then the first come first.
    """
    blocks_M = torch.arange(scores_BGRQM.shape[-1], device=block_BQ.device)
    is_earlier_BQM = blocks_M < block_BQ[..., None]
    scores_BGRQM = torch.where(is_earlier_BQM[:, None, None], scores_BGRQM, -torch.inf)
    if has_ties:
        return scores_BGRQM.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return scores_BGRQM.topk(count, dim=-1).indices


def _retrieved(q, k, v, clock, scale, chosen_BQHC, rotation, turn_key):
    """Attention to the chosen blocks and the query's own; turn_key: the rotation of keys' slots."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch, num_blocks, size, groups = k.shape[:4]
    q = q.to(dtype) * scale
    block_BQ, slot_BQ = clock.expand(batch, -1) // size, clock % size
    count, device = chosen_BQHC.shape[-1], clock.device
    chosen = chosen_BQHC.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)
    # In the order of the text, those that are none last.
    chosen = torch.where(chosen < 0, num_blocks, chosen).sort(dim=-1).values
    is_any, chosen = chosen < num_blocks, chosen.clamp(max=num_blocks - 1)
    block_BQ1 = block_BQ[:, None, None, :, None]
    reads_BQ1 = block_BQ1.clamp(max=count)
    is_last = (chosen >= block_BQ1 - reads_BQ1).long()
    before = (reads_BQ1 + 1 - torch.arange(count, device=device) - is_last).clamp(min=0)
    places = [n * size + slot_BQ for n in range(count + 2)]
    # By how many blocks the keys stand before them, 0 for their own.
    q_BGRQDK = torch.stack([_turned(q, x, rotation, groups) for x in places], dim=-2)

    def keys_of(picked):
        return picked.to(dtype) if turn_key is None else rotate(picked, *_flat(turn_key)).to(dtype)

    rows_B = torch.arange(batch, device=device)
    own_BQGNK = keys_of(k[rows_B[:, None], block_BQ].transpose(2, 3))
    own_BGQNK = own_BQGNK.transpose(1, 2).contiguous()
    own_scores = q_BGRQDK[..., 0, :].transpose(2, 3).contiguous() @ own_BGQNK.mT
    tokens_T = torch.arange(size - 1, device=device)
    seen_BQT = tokens_T <= slot_BQ[..., None]
    own_scores = torch.where(seen_BQT[:, None, :, None], own_scores[..., :-1], -torch.inf)

    index = rows_B.view(-1, 1, 1, 1, 1), torch.arange(groups, device=device).view(-1, 1, 1, 1)
    k_BGMNK, v_BGMNV = (x.permute(0, 3, 1, 2, 4) for x in (k, v))
    picked = keys_of(k_BGMNK[index[0], index[1], chosen])
    at = before[..., None].expand(*before.shape, q.shape[-1])
    scores = (q_BGRQDK.gather(-2, at)[..., None, :] * picked).sum(-1)
    tokens, landmark = scores[..., :-1], scores[..., -1]
    tokens = tokens + (landmark - tokens.logsumexp(-1))[..., None]
    tokens = torch.where(is_any[..., None], tokens, -torch.inf).flatten(-2).transpose(2, 3)
    weights = torch.cat([own_scores, tokens], dim=-1).softmax(-1)
    own_weights, weights = weights.split([size - 1, count * (size - 1)], dim=-1)
    own_BGQNV = v[rows_B[:, None], block_BQ][:, :, :-1].permute(0, 3, 1, 2, 4).to(dtype)
    values = v_BGMNV[index[0], index[1], chosen][..., :-1, :].flatten(-3, -2).to(dtype)
    y_BGQRV = own_weights @ own_BGQNV.contiguous()
    y_BGRQV = (weights.transpose(2, 3).contiguous()[..., None, :] @ values)[..., 0, :]
    return (y_BGQRV.transpose(1, 2) + y_BGRQV.permute(0, 3, 1, 2, 4)).flatten(2, 3).to(v.dtype)


def _flat(rotation):
    """A rotation of slots without its axis for heads, [N, K / 2]."""
    return tuple(x[:, 0] for x in rotation)
