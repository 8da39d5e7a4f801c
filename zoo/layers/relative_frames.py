"""Transformer-XL with tokens of memory: attention inside a frame, a segment with these around it.

The Recurrent Memory Transformer of its paper's own experiments (Bulatov et al. 2022,
https://arxiv.org/abs/2207.06881). With m vectors of memory, memory_0 being learned, a segment x of
L tokens is run as

    [.., x', memory_{s+1}] = decoder([memory_s; x; memory_s])

in a frame of W = 2 m + L tokens: m that read, those of text, and m that write. They are numbered on
from frame to frame, and when they are run is in zoo/core/memory_frames.py. Of the mem_len tokens
before a frame the last ones are the m that wrote. Beside what zoo/layers/relative_attention.py
says, with W for the length of a segment:

- the m tokens that read see each other in both directions, and so do the m that write;
- they see nothing of earlier frames, unless `read_memory_from_cache`;
- the term of a distance d = i - j below 0 is what that code's shift of the scores leaves there: 0
  for -1, and from -2 on the next query's, (q_{i + 1} + t) . r_{S + 1 + d}, of S tokens in a full
  frame and before it.

Gradients go through all memories, and not through what layers saw of earlier frames. In that code
memory_0 is m times the same vector at the start; here all differ. Vectors of memory are not scaled
as embeddings are.
"""

import torch
from torch.nn.utils.rnn import pad_sequence

from ..core.flops import linear_flops
from ..core.memory_frames import FrameSizes
from ..core.memory_walk import MEMORY, MemoryWalk
from ..core.state import StateSpec
from ..core.window import ring_after
from .relative_attention import RelativeAttention
from .transformer_xl_block import RelativeBlock


def frame_of(config):
    """The `FrameSizes` of a config with segment_length and num_memory_tokens."""
    number = config.num_memory_tokens
    return FrameSizes(config.segment_length, number, number)


def check_memory_tokens(config):
    """Raises a ValueError for what tokens of memory, or their absence, do not go with."""
    if config.num_memory_tokens < 0:
        raise ValueError(f"num_memory_tokens is at least 0, got {config.num_memory_tokens}.")
    if config.num_memory_tokens and (config.same_length or config.zero_memory):
        raise ValueError(
            "num_memory_tokens go with segments, the first of which sees none before it, got "
            f"same_length = {config.same_length} and zero_memory = {config.zero_memory}; set both "
            "to False."
        )
    if config.read_memory_from_cache and not (config.num_memory_tokens and config.mem_len):
        raise ValueError(
            "read_memory_from_cache is about num_memory_tokens that see mem_len tokens, got "
            f"{config.num_memory_tokens} and {config.mem_len}; leave it out."
        )


def reach_in_frame(config, clock):
    """The largest distance that tokens at these clocks see; without memory, frames are segments."""
    sizes = frame_of(config)
    place = clock % sizes.width
    if sizes.num_reads == 0 or config.read_memory_from_cache:
        return place + config.mem_len
    is_text = (place >= sizes.num_reads) & (place < sizes.slots)
    return place + config.mem_len * is_text


class RelativeFrameAttention(RelativeAttention):
    """Attention to the frame's tokens and to the mem_len tokens before it, by content and distance.

    A pass has the tokens of one frame of each document. Gradients end where that of its text does
    in `RelativeAttention`: what a layer saw of earlier frames is a memory without any.
    """

    exchanges = False

    def frames(self, length):
        """Of a text of so many tokens, for each frame: tokens, and how many before it are seen.

        Who sees them: tokens of text, and those of memory if they read the cache. The last frame
        is not written.
        """
        sizes, mem_len = frame_of(self.config), self.config.mem_len
        for number in range((length - 1) // sizes.length + 1):
            done = (number + 1) * sizes.length
            width = sizes.width if done < length else sizes.num_reads + length - done + sizes.length
            yield width, min(mem_len, number * sizes.width)

    def flops_per_token(self, length):
        """Of all tokens of the frames a text takes, per token of text.

        Keys and values are made of a whole frame and all before it, whatever is there.
        """
        sizes, reads_cache = frame_of(self.config), self.config.read_memory_from_cache
        num_reads, num_frames, seen, total = sizes.num_reads, 0, 0, 0
        for width, past in self.frames(length):
            of_text = min(width, sizes.slots) - num_reads
            num_writes = width - num_reads - of_text
            seen += num_reads**2 + of_text * num_reads + of_text * (of_text + 1) // 2
            seen += num_writes * width + past * of_text
            seen += past * (num_reads + num_writes) * reads_cache
            num_frames, total = num_frames + 1, total + width
        flops = total * linear_flops(self.q_proj, self.out_proj)
        flops += num_frames * self.window * linear_flops(self.k_proj, self.v_proj)
        flops += num_frames * self.config.num_distances * linear_flops(self.r_proj)
        return (flops + 6 * self.num_heads * self.head_dim * seen) / length

    def attend_by_segment(self, x_BTD, sequence, state, given):
        """`attend`, without a gradient for what is left of earlier frames."""
        self.forget_gradients(state, sequence)
        return self.attend(x_BTD, sequence, state, given)

    def attend(self, x_BTD, sequence, state, given):
        """As there, of tokens of one frame of each document; the next frame needs the state."""
        state.is_kept = True
        if x_BTD.shape[1] == 1 and sequence.cu_seqlens is None:  # it sees none after it
            return super().attend(x_BTD, sequence, state, given)
        spec = self.state_specs()["inputs_BW1D"]
        state.inputs_BW1D = ring_after(
            x_BTD[:, :, None], state.inputs_BW1D, spec, sequence, state.may_overwrite
        )
        q_BTHK = self.in_heads(self.q_proj(given.norm(x_BTD)))
        if sequence.cu_seqlens is None:
            return self.attend_frames(q_BTHK, sequence.clock, state.inputs_BW1D, given)
        lengths_N = sequence.cu_seqlens.diff()
        sizes = lengths_N.tolist()
        q_NTHK, clock_NT = (
            pad_sequence(x[0].split(sizes), batch_first=True) for x in (q_BTHK, sequence.clock)
        )
        ring_NW1D = state.inputs_BW1D[sequence.row_of_document]
        y_NTHV = self.attend_frames(q_NTHK, clock_NT, ring_NW1D, given)
        is_token_NT = torch.arange(max(sizes), device=lengths_N.device) < lengths_N[:, None]
        return y_NTHV[is_token_NT][None]

    def attend_frames(self, q_NTHK, clock_NT, ring_NW1D, given):
        """Attention of the tokens of a frame per row, [N, T, H, V].

        Args:
            q_NTHK: queries.
            clock_NT: their numbers, [N or 1, T]; of padding behind them, any.
            ring_NW1D: inputs of the last tokens, up to these.
            given: as of `attend`.
        """
        config, sizes = self.config, frame_of(self.config)
        begin_N1 = clock_NT[:, :1] // sizes.width * sizes.width
        place_NT1 = (clock_NT % sizes.width)[..., None]
        place_W = torch.arange(-config.mem_len, sizes.width, device=clock_NT.device)
        slots_NW = (begin_N1 + place_W) % self.window
        rows_N1 = torch.arange(ring_NW1D.shape[0], device=clock_NT.device)[:, None]
        inputs_NWD = given.norm(ring_NW1D[rows_N1, slots_NW][:, :, 0].to(q_NTHK.dtype))
        k_NWHK, v_NWHV = (self.in_heads(x(inputs_NWD)) for x in (self.k_proj, self.v_proj))
        # The newest that each sees is itself, or the last of its group.
        newest_NT1 = place_NT1.where(place_NT1 >= sizes.num_reads, sizes.num_reads - 1)
        newest_NT1 = newest_NT1.where(place_NT1 < sizes.slots, sizes.width - 1)
        oldest_NT1 = place_NT1 - config.reach(clock_NT)[..., None]
        visible_NTW = (place_W <= newest_NT1) & (place_W >= oldest_NT1)
        visible_NTW = visible_NTW & (begin_N1 + place_W >= 0)[:, None]
        dtype = torch.promote_types(q_NTHK.dtype, torch.float32)
        uq_NTHK, tq_NTHK = (
            (q_NTHK + x_HK.to(q_NTHK.dtype)).to(dtype) * self.scale for x_HK in (given.u, given.t)
        )
        r_EHK = self.in_heads(self.r_proj(given.sinusoids)).to(dtype)
        num_keys_N1 = sizes.width + begin_N1.clamp(max=config.mem_len)
        distance_NTW = place_NT1 - place_W
        y_NTHV = attend_to_places(
            uq_NTHK, tq_NTHK, k_NWHK, v_NWHV, r_EHK, visible_NTW, distance_NTW, num_keys_N1
        )
        return y_NTHV.to(q_NTHK.dtype)


def attend_to_places(q, distance_q, k, v, r, visible, distance, num_keys):
    """Attention to the keys that are shown, of any distance, ahead too; [N, T, H, V].

    Args:
        q: [N, T, H, K], queries for content, scaled.
        distance_q: for distances.
        k: [N, W, H, K].
        v: [N, W, H, V].
        r: [E, H, K], of distances from 0; the last one stands for all beyond.
        visible: [N or 1, T, W] bool.
        distance: from a query back to each key, [N or 1, T, W].
        num_keys: S, of the shift, [N or 1, 1].
    """
    score_NHTW = torch.einsum("nthk,nwhk->nhtw", q, k.to(q.dtype))
    by_distance_NHTE = torch.einsum("nthk,ehk->nhte", distance_q, r)
    score_NHTW = score_NHTW + scores_of_places(by_distance_NHTE, distance, num_keys)
    p_NHTW = score_NHTW.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
    return torch.einsum("nhtw,nwhv->nthv", p_NHTW, v.to(q.dtype))


def scores_of_places(score_NHTE, distance_NTW, num_keys_N1):
    """Scores by distance to where keys are, [N, H, T, W].

    Args:
        score_NHTE: of distances from 0; the last one stands for all beyond.
        distance_NTW: from a query back to each key, [N or 1, T, W].
        num_keys_N1: S, of the shift, [N or 1, 1].
    """
    num_queries, num_distances = score_NHTE.shape[-2:]
    is_ahead_NTW = distance_NTW < 0
    index_NTW = torch.where(is_ahead_NTW, num_keys_N1[..., None] + 1 + distance_NTW, distance_NTW)
    index_NTW = index_NTW.clamp(max=num_distances - 1)
    row_T1 = torch.arange(num_queries, device=distance_NTW.device)[:, None]
    row_NTW = (row_T1 + is_ahead_NTW).clamp(max=num_queries - 1)
    index_NX = (row_NTW * num_distances + index_NTW).flatten(1)
    index_NHX = index_NX[:, None].expand(*score_NHTE.shape[:2], -1)
    found_NHTW = score_NHTE.flatten(2).gather(2, index_NHX).unflatten(2, distance_NTW.shape[1:])
    return found_NHTW.masked_fill((distance_NTW == -1)[:, None], 0)


class TransformerXLFrameBlock(RelativeBlock):
    """Transformer-XL's block with tokens of memory, called once per segment.

    Attributes:
        memory_names: tensors of its state that go from segment to segment: all.
    """

    mixer_class = RelativeFrameAttention

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.memory_specs = {}
        if layer_idx == 0:
            self.memory_specs[MEMORY] = StateSpec((config.num_memory_tokens, config.hidden_size))

    @property
    def memory_names(self):
        """Tensors of the state that go from segment to segment."""
        return tuple(self.state_specs())

    def state_specs(self):
        """Inputs of the last tokens, and memory."""
        return self.mixer.state_specs() | self.memory_specs

    def flops_per_token(self, length):
        """Of all tokens of the frames a text takes, per token of text."""
        total = sum(width for width, _ in self.mixer.frames(length))
        return self.mixer.flops_per_token(length) + total * linear_flops(self.mlp) / length


def frame_walk(model):
    """The `MemoryWalk` of a `TransformerXLModel`."""

    def enter(h_BTD, own):
        return h_BTD, model.mixer_inputs(h_BTD, own)

    def leave(h_NMD):
        return model.norm(h_NMD).clone()  # a part of the frame would keep all of it

    sizes = frame_of(model.config)
    return MemoryWalk(model.layers, model.memory, enter, leave, sizes, counts_on=True)
