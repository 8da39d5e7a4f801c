"""The memory of Infini-attention, and the segments of a forward pass that read and write it.

Munkhdalai, Faruqui and Gopal 2024, section 2.1, https://arxiv.org/abs/2404.07143. A memory is
[H, K, V + 1]: M, and z as one more column, so that reading and writing are one product each.

A mixer sees its tokens through `segments_of`: as a `SegmentPass`, any number of them and all
segments at once, or a `SegmentStep`, one per row. Both bring the state up to date, and both lay the
tokens out as S segments of Q queries:

    attend      A_local, causal attention inside each segment, with a bias by distance if any
    remember    the memory that each segment reads, and the tokens written into it
    queries     what belongs to tokens, by segment;  join: its inverse
    is_first    which segments begin a document
"""

import torch
import torch.nn.functional as F

from ..core.segments import SegmentGrid, documents_to_rows
from ..core.window import ring_after
from ..kernels.attention_by_head import takes_blocks_by_head
from ..kernels.autograd_rules import by_autograd_alone
from ..kernels.export_scan import scan
from ..kernels.windowed_attention import attention_step, windowed_attention

# A memory that no key has been like reads as 0, not as 0 / 0.
SMALLEST_DENOMINATOR = 1e-10


def feature_map(x):
    """sigma(x) = ELU(x) + 1, which is x + 1 or exp(x), above 0; in float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return _FeatureMap.apply(x) if by_autograd_alone() else x.clamp(max=0).exp() + x.relu()


class _FeatureMap(torch.autograd.Function):
    """With the gradient min(sigma, 1), in half as many passes over the tokens as autograd's."""

    @staticmethod
    def forward(ctx, x):
        y = x.clamp(max=0).exp_().add_(x.relu())
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        return dy * y.clamp(max=1)


def read_memory(q_SHQK, memory_SHKV):
    """Equation 7: [S, H, Q, V] from features [S, H, Q, K] and a memory [S, H, K, V + 1].

    The last column of a memory is z.
    """
    read_SHQV = q_SHQK @ memory_SHKV
    return read_SHQV[..., :-1] / read_SHQV[..., -1:].clamp(min=SMALLEST_DENOMINATOR)


def recall(q_SQHK, memory_SGKV):
    """Equation 7 for the queries of all heads, [S, H, Q, V]; a group of them shares a memory."""
    q_SHQK, num_groups = feature_map(q_SQHK).transpose(1, 2), memory_SGKV.shape[1]
    groups = num_groups, q_SHQK.shape[1] // num_groups
    q_SGQK = q_SHQK.unflatten(1, groups).flatten(2, 3)  # a group's heads, one after the other
    recalled_SGQV = read_memory(q_SGQK, memory_SGKV)
    return recalled_SGQV.unflatten(2, (groups[1], -1)).flatten(1, 2)


def update_of(k_SHQK, v_SHQV, memory_SHKV=None, strength_SHQ1=None):
    """What tokens add to a memory, [S, H, K, V + 1]: equation 8, or 9 with the memory so far.

    Args:
        k_SHQK: features; zeros add nothing.
        v_SHQV: values.
        memory_SHKV: the memory whose recollection is taken off the values; None: linear update.
        strength_SHQ1: factor on what is written; z does not feel it.
    """
    if memory_SHKV is not None:
        v_SHQV = v_SHQV - read_memory(k_SHQK, memory_SHKV)
    if strength_SHQ1 is not None:
        v_SHQV = v_SHQV * strength_SHQ1
    v_SHQV = F.pad(v_SHQV, (0, 1), value=1.0)
    return k_SHQK.mT @ v_SHQV


def write_segment(
    held_NHKV, partial_NHKV, k_NHQK, v_NHQV, is_complete_N, strength_NHQ1=None, is_delta=True
):
    """A segment's tokens written: the memory and the sums of an unfinished segment after it.

    Args:
        held_NHKV: the memory before the segment.
        partial_NHKV: the sums of its tokens in earlier passes.
        k_NHQK, v_NHQV, strength_NHQ1: as of `update_of`.
        is_complete_N: whether these tokens complete the segment.
        is_delta: equation 9, else 8.
    """
    read_NHKV = held_NHKV if is_delta else None
    partial_NHKV = partial_NHKV + update_of(k_NHQK, v_NHQV, read_NHKV, strength_NHQ1)
    is_complete = is_complete_N[:, None, None, None]
    after_NHKV = torch.where(is_complete, held_NHKV + partial_NHKV, held_NHKV)
    return after_NHKV, torch.where(is_complete, 0, partial_NHKV)


def remember_step(
    q_B1HK, k_B1HK, v_B1HV, memory_BHKV, partial_BHKV, is_complete, is_delta, strength_B1H=None
):
    """`recall` and `write_segment` of one token of each row, at the same place of its segment.

    Args:
        q_B1HK, k_B1HK, v_B1HV: as projected.
        memory_BHKV, partial_BHKV: before the token, as of `write_segment`.
        is_complete: whether it completes the segment.
        is_delta, strength_B1H: as there.

    Returns:
        (what the query recalls [B, 1, H, V], memory and sums after the token).
    """
    (batch, groups, key_dim), dtype = memory_BHKV.shape[:3], memory_BHKV.dtype
    k_BGRK = k_B1HK.view(batch, groups, 1, key_dim)
    rows_BGRK = torch.cat([q_B1HK.view(batch, groups, -1, key_dim), k_BGRK], dim=2).to(dtype)
    rows_BGRK = rows_BGRK.clamp(max=0).exp_().add_(rows_BGRK.relu())  # `feature_map`
    read_BGRV = (rows_BGRK.flatten(0, 1) @ memory_BHKV.flatten(0, 1)).view(*rows_BGRK.shape[:3], -1)
    read_BGRV, z_BGR1 = read_BGRV.split([read_BGRV.shape[-1] - 1, 1], dim=-1)
    read_BGRV = read_BGRV / z_BGR1.clamp(min=SMALLEST_DENOMINATOR)
    v_BG1V = v_B1HV.view(batch, groups, 1, -1).to(dtype)
    if is_delta:
        v_BG1V = v_BG1V - read_BGRV[:, :, -1:]
    if strength_B1H is not None:
        v_BG1V = v_BG1V * strength_B1H.view(batch, groups, 1, 1).to(dtype)
    k_BGK1 = rows_BGRK[:, :, -1, :, None]
    partial_BHKV = torch.addcmul(partial_BHKV, k_BGK1, F.pad(v_BG1V, (0, 1), value=1.0))
    if is_complete:
        memory_BHKV, partial_BHKV = memory_BHKV + partial_BHKV, torch.zeros_like(partial_BHKV)
    return read_BGRV[:, :, :-1].flatten(1, 2)[:, None], memory_BHKV, partial_BHKV


def segments_of(sequence, length, state, specs):
    """The `SegmentStep` or `SegmentPass` of a forward pass.

    Args:
        sequence: the `Sequence` of the pass.
        length: L, tokens per segment.
        state: before the pass; brought up to date if it is kept.
        specs: its `StateSpec`s by name.
    """
    is_step = sequence.shape[1] == 1 and sequence.cu_seqlens is None and state.is_kept
    is_step = is_step and sequence.ranks is None
    return (SegmentStep if is_step else SegmentPass)(sequence, length, state, specs)


class SegmentPass:
    """Any number of tokens, all segments at once; arguments are those of `segments_of`."""

    def __init__(self, sequence, length, state, specs):
        self.sequence, self.length, self.state, self.specs = sequence, length, state, specs
        self.grid = SegmentGrid(sequence, length, is_fresh=state.keys_BLHK is None)
        self.is_first = (self.grid.begin == 0)[:, None, None, None]

    def queries(self, x_BTHK):
        """[B, T, ...] as [S, Q, ...]."""
        return self.grid.queries(x_BTHK)

    def join(self, x_SQHV):
        """[S, Q, ...] as [B, T, ...]."""
        return self.grid.join(x_SQHV)

    def attend(self, q_BTHK, k_BTHK, v_BTHV, scale, bias=None):
        """Softmax attention inside the segments, [S, H, Q, V].

        Args:
            q_BTHK, k_BTHK, v_BTHV: queries and keys are turned, if they are to be.
            scale: of the scores; None: K^-1/2.
            bias: what distances do to them, a function of distances and queries that returns
                keyword arguments of `windowed_attention` (distances 0 to S - 1) or of
                `attention_step` (of each row and slot); None: nothing.
        """
        grid, state = self.grid, self.state
        held = (grid.rows_to_documents(x) for x in (state.keys_BLHK, state.values_BLHV))
        keys_SLHK, values_SLHV = (
            grid.keys(x, old) for x, old in zip((k_BTHK, v_BTHV), held, strict=True)
        )
        q_SQHK, visible_SQL = grid.queries(q_BTHK), grid.visible() if bias is None else None
        x = q_SQHK, keys_SLHK, values_SLHV
        is_causal = bias is None and visible_SQL is None
        if is_causal and takes_blocks_by_head(*x, q_SQHK.shape[1], keys_SLHK.shape[1]):
            y_SHQV = windowed_attention(*x, scale=scale).transpose(1, 2)
        elif bias is None:
            y_SHQV = F.scaled_dot_product_attention(
                q_SQHK.transpose(1, 2),
                keys_SLHK.transpose(1, 2),
                values_SLHV.transpose(1, 2),
                attn_mask=None if visible_SQL is None else visible_SQL[:, None],
                is_causal=visible_SQL is None,
                enable_gqa=k_BTHK.shape[2] < q_BTHK.shape[2],
                scale=scale,
            )
        else:
            keys_SPHK, first_S = grid.behind_older(keys_SLHK)
            values_SPHV, _ = grid.behind_older(values_SLHV)
            distance_P = torch.arange(keys_SPHK.shape[1], device=q_BTHK.device)
            y_SHQV = windowed_attention(
                q_SQHK,
                keys_SPHK,
                values_SPHV,
                scale=scale,
                first_key=first_S,
                **bias(distance_P, q_BTHK),
            ).transpose(1, 2)
        if state.is_kept:
            _keep_tokens(state, k_BTHK, v_BTHV, self.sequence, self.specs)
        return y_SHQV

    def remember(self, k_BTHK, v_BTHV, update, strength_BTH=None):
        """Writes the tokens into the memory, by equation 8 or 9.

        Args:
            k_BTHK, v_BTHV: keys without positions, and values.
            update: "linear" or "delta".
            strength_BTH: factor on what each token writes; None: 1.

        Returns:
            The memory that each segment reads, [S, H, K, V + 1]: that of all segments before it.
        """
        grid, state = self.grid, self.state
        tokens = self.written(k_BTHK, v_BTHV, strength_BTH)
        held_N, partial_N = (
            grid.rows_to_documents(x) for x in (state.memory_BHKV, state.partial_BHKV)
        )
        if held_N is None:
            held_N = partial_N = self.empty(tokens[0])
        write = {"linear": write_at_once, "delta": write_in_turn}[update]
        memory_SHKV, after_N, partial_N = write(*tokens, held_N, partial_N, grid)
        self.keep(after_N, partial_N)
        return memory_SHKV

    def written(self, k_BTHK, v_BTHV, strength_BTH=None):
        """What tokens write, by segment: features, 0 where no token is, values, and strengths."""
        grid = self.grid
        k_SHQK = feature_map(grid.queries(k_BTHK)).transpose(1, 2)
        v_SHQV = grid.queries(v_BTHV).transpose(1, 2).to(k_SHQK.dtype)
        is_new_SQ = torch.arange(grid.num_queries, device=k_SHQK.device) < grid.count[:, None]
        k_SHQK = torch.where(is_new_SQ[:, None, :, None], k_SHQK, 0)
        strength_SHQ1 = None
        if strength_BTH is not None:
            strength_SHQ1 = grid.queries(strength_BTH).mT[..., None].to(k_SHQK.dtype)
        return k_SHQK, v_SHQV, strength_SHQ1

    def empty(self, k_SHQK):
        """The memory of each document before its first token, [N, H, K, V + 1]."""
        shape = self.grid.first_row.shape[0], *self.specs["memory_BHKV"].shape
        return k_SHQK.new_zeros(shape)

    def keep(self, memory_NHKV, partial_NHKV):
        """Brings memory and sums of the state up to date, if it is kept."""
        state, sequence = self.state, self.sequence
        if state.is_kept:
            state.memory_BHKV = documents_to_rows(memory_NHKV, state.memory_BHKV, sequence)
            state.partial_BHKV = documents_to_rows(partial_NHKV, state.partial_BHKV, sequence)


class SegmentStep:
    """One token per row: what `SegmentPass` does, for segments of one query and a kept state."""

    def __init__(self, sequence, length, state, specs):
        self.sequence, self.length, self.state, self.specs = sequence, length, state, specs
        clock_B = sequence.clock[:, 0].expand(sequence.shape[0])
        self.slot_B = clock_B % length
        self.is_first = (clock_B < length)[:, None, None, None]

    def queries(self, x_BTHK):
        """[B, 1, ...], as they are."""
        return x_BTHK

    def join(self, x_BTHV):
        """[B, 1, ...], as they are."""
        return x_BTHV

    def attend(self, q_BTHK, k_BTHK, v_BTHV, scale, bias=None):
        """The token's attention to its segment so far, [B, H, 1, V]; as `SegmentPass.attend`."""
        state = self.state
        for name, spec in self.specs.items():
            if getattr(state, name) is None:
                dtype = spec.dtype or feature_map(q_BTHK[:0]).dtype
                zeros = q_BTHK.new_zeros(q_BTHK.shape[0], *spec.shape, dtype=dtype)
                setattr(state, name, zeros)
        _keep_tokens(state, k_BTHK, v_BTHV, self.sequence, self.specs)
        slots_L, settings = torch.arange(self.length, device=self.slot_B.device), {"scale": scale}
        if bias is not None:
            distance_BL = (self.slot_B[:, None] - slots_L).clamp(min=0)
            settings |= bias(distance_BL, q_BTHK)
        visible_BL = slots_L <= self.slot_B[:, None]
        y_BTHV = attention_step(q_BTHK, state.keys_BLHK, state.values_BLHV, visible_BL, **settings)
        return y_BTHV.transpose(1, 2)

    def remember(self, k_BTHK, v_BTHV, update, strength_BTH=None):
        """As `SegmentPass.remember`: the memory before the token's segment, [B, H, K, V + 1]."""
        state, keep = self.state, self.sequence.keep
        k_BHTK = feature_map(k_BTHK).transpose(1, 2)
        v_BHTV = v_BTHV.transpose(1, 2).to(k_BHTK.dtype)
        strength_BHT1 = None if strength_BTH is None else strength_BTH.mT[..., None]
        is_complete_B = self.slot_B == self.length - 1
        if keep is not None:
            is_complete_B = keep & is_complete_B
        memory_BHKV, partial_BHKV = state.memory_BHKV, state.partial_BHKV
        state.memory_BHKV, state.partial_BHKV = write_segment(
            memory_BHKV,
            partial_BHKV,
            k_BHTK,
            v_BHTV,
            is_complete_B,
            strength_BHT1,
            is_delta=update == "delta",
        )
        if keep is not None:
            is_written = keep[:, None, None, None]
            state.partial_BHKV = torch.where(is_written, state.partial_BHKV, partial_BHKV)
        return memory_BHKV


def _keep_tokens(state, k_BTHK, v_BTHV, sequence, specs):
    # A ring: behind the unfinished segment lies the one before.
    for name, x_BTHK in (("keys_BLHK", k_BTHK), ("values_BLHV", v_BTHV)):
        held_BLHK = getattr(state, name)
        after_BLHK = ring_after(x_BTHK, held_BLHK, specs[name], sequence, state.may_overwrite)
        setattr(state, name, after_BLHK)


# Both ways to write all segments of a pass take and return:
#     held_N, partial_N: of each document, the memory and the sums of an unfinished segment.
#     (The memory that each segment reads [S, ...]; those two after the pass [N, ...]).


def write_at_once(k_SHQK, v_SHQV, strength_SHQ1, held_N, partial_N, grid):
    """Equation 8: sums of whole segments, without a loop over them."""
    return sums_of_segments(
        update_of(k_SHQK, v_SHQV, strength_SHQ1=strength_SHQ1), held_N, partial_N, grid
    )


def sums_of_segments(update_SHKV, held_N, partial_N, grid):
    """`write_at_once` of what each segment's tokens add."""
    is_first_S = (grid.rank == 0)[:, None, None, None]
    update_SHKV = update_SHKV + torch.where(is_first_S, partial_N[grid.document], 0)
    memory_SHKV = held_N[grid.document] + grid.sums_before(update_SHKV)
    is_complete_N = grid.last(grid.is_complete)[:, None, None, None]
    before_N, update_N = grid.last(memory_SHKV), grid.last(update_SHKV)
    after_N = torch.where(is_complete_N, before_N + update_N, before_N)
    return memory_SHKV, after_N, torch.where(is_complete_N, 0, update_N)


def write_in_turn(k_SHQK, v_SHQV, strength_SHQ1, held_N, partial_N, grid):
    """Equation 9, one segment after the other: what each writes depends on what it finds."""
    if torch.compiler.is_exporting():
        return _write_in_turn_exported(k_SHQK, v_SHQV, strength_SHQ1, held_N, partial_N, grid)
    strengths = [None] * grid.num_ranks
    if strength_SHQ1 is not None:
        strengths = grid.by_rank(strength_SHQ1)
    held_N, partial_N = grid.in_walk_order(held_N), grid.in_walk_order(partial_N)
    memories, after, partials = [], [], []
    pieces = (grid.by_rank(x) for x in (k_SHQK, v_SHQV, grid.is_complete))
    for k_NHQK, v_NHQV, is_complete_N, strength_NHQ1 in zip(*pieces, strengths, strict=True):
        # Documents that have no segment of this rank are the last ones.
        held_N, partial_N = held_N[: len(k_NHQK)], partial_N[: len(k_NHQK)]
        memories.append(held_N)
        held_N, partial_N = write_segment(
            held_N, partial_N, k_NHQK, v_NHQV, is_complete_N, strength_NHQ1
        )
        after.append(held_N)
        partials.append(partial_N)
    ends = (grid.last(grid.from_ranks(xs)) for xs in (after, partials))
    return grid.from_ranks(memories), *ends


def _write_in_turn_exported(k_SHQK, v_SHQV, strength_SHQ1, held_N, partial_N, grid):
    """`write_in_turn` in a program that is being exported, for any number of segments."""

    def step(state, *tokens):
        held_N, partial_N = state
        return write_segment(held_N, partial_N, *tokens), (held_N.clone(),)

    parts = [k_SHQK, v_SHQV, grid.is_complete]
    parts += [] if strength_SHQ1 is None else [strength_SHQ1]
    state = held_N, partial_N.clone()
    (after, partial), (memories,) = scan(step, state, *map(grid.stacked, parts))
    return grid.unstacked(memories), after, partial


def memory_figures(gates, cache=None):
    """What to watch in training: the memory's share in each layer, and how full it is.

    Args:
        gates: g [H] of each layer.
        cache: after some text; None: gates alone.

    Returns:
        Name -> number: least, mean and largest sigmoid(g) over all heads, and per layer the largest
        norm of a head's memory per z, that is of the values it recalls.
    """
    share_LH = torch.stack([gate_H.float().sigmoid() for gate_H in gates])
    figures = {
        "gate/least": share_LH.min().item(),
        "gate/mean": share_LH.mean().item(),
        "gate/largest": share_LH.max().item(),
    }
    for index, layer in enumerate([] if cache is None else cache.layers):
        memory_BHKV = layer.tensors["memory_BHKV"]
        norm_BH = memory_BHKV[..., :-1].norm(dim=(-2, -1))
        per_key_BH = norm_BH / memory_BHKV[..., -1].norm(dim=-1).clamp(min=SMALLEST_DENOMINATOR)
        figures[f"memory_norm/layer_{index}"] = per_key_BH.max().item()
    return figures
