"""Transformer-XL's attention, whose scores know how far away a key is.

Dai et al. 2019, https://arxiv.org/abs/1901.02860, section 3.3. The mathematics is that of
`zoo/models/transformer_xl.py`; what distances add to scores is in zoo/layers/relative_scores.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from ..core.flops import linear_flops, mean_visible
from ..core.halo import last_before
from ..core.segment_passes import (
    put_tokens,
    segment_passes,
    state_by_document,
    state_by_row,
    take_tokens,
)
from ..core.state import StateSpec, dtype_of
from ..core.window import Past, ring_after, ring_positions, row_spans
from ..kernels.linear_recurrence import accumulator_dtype
from ..kernels.recurrence_steps import takes_plain_step
from ..kernels.windowed_attention import attention_step, windowed_attention
from .relative_scores import band_scores, logits_of_zeros


class _Given(NamedTuple):
    """What a forward pass of the attention has beside its tokens.

    Attributes:
        u, t: [H, K], added to queries for content and for distance.
        sinusoids: [E, D], of all distances.
        norm: of the inputs, those of a memory too.
        nothing: [D], what that makes of a zero vector, or 0.
    """

    u: torch.Tensor
    t: torch.Tensor
    sinusoids: torch.Tensor
    norm: Callable
    nothing: torch.Tensor | float


class QueryBiases(nn.Module):
    """u and t, of one layer or of all."""

    def __init__(self, config):
        super().__init__()
        shape, self.std = (config.num_attention_heads, config.head_dim), config.initializer_range
        self.content, self.position = (nn.Parameter(torch.empty(shape)) for _ in range(2))

    def init_weights_of_paper(self):
        """As any matrix."""
        for bias_HK in (self.content, self.position):
            init.normal_(bias_HK, std=self.std)

    def forward(self):
        """(u, t), [H, K] each."""
        return self.content, self.position


class RelativeAttention(nn.Module):
    """Attention to the last tokens, or to a memory and the own segment, by content and distance.

    Attributes:
        detaches_memory: whether no gradient goes through what a layer saw of earlier segments, as
            the authors train: their inputs are a memory, of which keys and values are made again,
            with a gradient for the matrices that do it. Segments are counted from a document's own
            start, so that gradients do not depend on how a text comes. How to train, not part of
            the model: set it on the instance.
    """

    detaches_memory = True
    exchanges = True

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.window = config, config.num_slots
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.scale = self.head_dim**-0.5
        width, size = config.hidden_size, self.num_heads * self.head_dim
        for name in ("q_proj", "k_proj", "v_proj", "r_proj"):
            setattr(self, name, nn.Linear(width, size, bias=False))
        self.out_proj = nn.Linear(size, width, bias=False)
        self.query_biases = QueryBiases(config) if config.untie_r else None

    def state_specs(self):
        """What came into the layer at the last tokens, in a ring, as one head of width D.

        Half as many numbers as keys and values would be, and what gradients of their matrices need.
        A step puts those matrices before and after its sums instead of making keys and values.
        """
        shape = (self.window, 1, self.config.hidden_size)
        return {"inputs_BW1D": StateSpec(shape, dtype=dtype_of(self.k_proj))}

    def flops_per_token(self, length):
        """Of its matrices, and for each visible key of two products with it and one with its value.

        The vectors of distances are made once for a text, and so is the value of a zero vector
        that a norm makes something of; zeros before a text are left out.
        """
        config = self.config
        if config.same_length:
            keys = mean_visible(length, config.mem_len)
        else:
            clock_T = torch.arange(length)
            keys = torch.minimum(config.reach(clock_T), clock_T).double().mean().item() + 1
        once = min(length, config.num_distances) / length
        flops = linear_flops(self) - (1 - once) * linear_flops(self.r_proj)
        if config.zero_memory and config.pre_lnorm:
            flops += linear_flops(self.v_proj) / length
        return flops + 6 * self.num_heads * self.head_dim * keys

    def forward(self, x_BTD, sequence, state, sinusoids_ED, biases=None, norm=None, nothing_D=0.0):
        """Mixes a sequence [B, T, D]; returns it with the state after it.

        Args:
            x_BTD: the tokens.
            sequence: how they lie.
            state: before them.
            sinusoids_ED: of all distances.
            biases: u and t, [H, K] each, where all layers share them.
            norm: of the inputs; None: there is none.
            nothing_D: what it makes of a zero vector, where such lie before a text. Keys and values
                are then of the difference, which changes no softmax, and comes to one value for the
                sum.
        """
        if self.exchanges and sequence.ranks is not None:
            self.bring(x_BTD, sequence, state)
        u_HK, t_HK = self.query_biases() if biases is None else biases
        given = _Given(u_HK, t_HK, sinusoids_ED, norm or nn.Identity(), nothing_D)
        if self.detaches_memory and torch.is_grad_enabled():
            y_BTHV = self.attend_by_segment(x_BTD, sequence, state, given)
        else:
            y_BTHV = self.attend(x_BTD, sequence, state, given)
        if torch.is_tensor(nothing_D):
            y_BTHV = y_BTHV + self.in_heads(self.v_proj(nothing_D[None]))
        return self.out_proj(y_BTHV.flatten(2)), state

    def bring(self, x_BTD, sequence, state):
        """A slice: what came into the layer at the last tokens before it, into the state."""
        dtype = self.state_specs()["inputs_BW1D"].dtype if state.is_kept else None
        for ring_BW1D in last_before([x_BTD[:, :, None]], sequence, self.window) or ():
            state.inputs_BW1D = ring_BW1D.to(dtype or ring_BW1D.dtype)

    def in_heads(self, x_BTD):
        """[..., H K] to [..., H, K]."""
        return x_BTD.unflatten(-1, (self.num_heads, self.head_dim))

    def attend_by_segment(self, x_BTD, sequence, state, given):
        """`attend` one segment after the other; no gradient goes through what one leaves."""
        own, pieces, places = state_by_document(state, sequence), [], []
        is_fresh, length = state.inputs_BW1D is None, self.config.segment_length
        passes = segment_passes(sequence, length, is_fresh)
        for index, (place, part) in enumerate(passes):
            self.forget_gradients(own, part)
            own.is_kept = state.is_kept or index + 1 < len(passes)
            pieces.append(self.attend(take_tokens(x_BTD, place), part, own, given))
            places.append(place)
        if state.is_kept:
            state.inputs_BW1D = state_by_row(own, state, sequence).inputs_BW1D
        shape = (*x_BTD.shape[:2], self.num_heads, self.head_dim)
        return put_tokens(pieces, places, shape)

    def forget_gradients(self, state, sequence):
        """Detaches what a state holds of segments before the one that a pass is in."""
        held_BW1D = state.inputs_BW1D
        if held_BW1D is None:
            return
        spans, length = row_spans(sequence), self.config.frame_width
        begin_B = (spans.after - 1) // length * length
        is_old_BW = ring_positions(spans.start, self.window) < begin_B[:, None]
        state.inputs_BW1D = torch.where(is_old_BW[..., None, None], held_BW1D.detach(), held_BW1D)

    def attend(self, x_BTD, sequence, state, given):
        """Any number of tokens after what the state holds, which is brought up to date if kept.

        Args:
            x_BTD: what comes into the layer.
            sequence, state: as of `forward`.
            given: `_Given`.

        Returns:
            [B, T, H, V].
        """
        config, held_BW1D, past = self.config, state.inputs_BW1D, None
        if state.is_kept:
            spec = self.state_specs()["inputs_BW1D"]
            state.inputs_BW1D = ring_after(
                x_BTD[:, :, None], held_BW1D, spec, sequence, state.may_overwrite
            )
        q_BTHK = self.in_heads(self.q_proj(given.norm(x_BTD)))
        uq_BTHK, tq_BTHK = (q_BTHK + x_HK.to(q_BTHK.dtype) for x_HK in (given.u, given.t))
        dtype = accumulator_dtype(tq_BTHK)
        tq_BTHK = tq_BTHK.to(dtype) * self.scale
        if x_BTD.shape[1] == 1 and sequence.cu_seqlens is None and state.is_kept:
            if self.takes_all_rows_alike(x_BTD, sequence, given):
                return self.plain_step(uq_BTHK[:, 0], tq_BTHK[:, 0], sequence, state, given)
            return self.attend_step(uq_BTHK, tq_BTHK, sequence, state, given)
        documents, clock_BT = {"cu_seqlens": sequence.cu_seqlens}, sequence.clock
        if held_BW1D is not None:
            past = Past(sequence, held_BW1D, self.window - 1)
            first_key = None if config.zero_memory else past.first_key
            documents = {"cu_seqlens": past.cu_seqlens, "first_key": first_key}
            x_BTD = past.put_before(x_BTD[:, :, None], held_BW1D.to(x_BTD.dtype))[:, :, 0]
        sinusoids_ED, logits_BTH = given.sinusoids, None
        if not (config.zero_memory or torch.compiler.is_exporting()):
            sinusoids_ED = sinusoids_ED[: x_BTD.shape[1]]  # no key is farther away
        r_EHK = self.in_heads(self.r_proj(sinusoids_ED)).to(dtype)
        # A dense pass has the zeros before a text in the ring that it goes on from.
        if config.zero_memory and (past is None or sequence.cu_seqlens is not None):
            logits_BTH = logits_of_zeros(tq_BTHK, r_EHK, sequence, config)
        if past is not None:
            uq_BTHK, tq_BTHK = past.pick(uq_BTHK), past.pick(tq_BTHK)
            clock_BT = past.pick(clock_BT)
            logits_BTH = None if logits_BTH is None else past.pick(logits_BTH)
        own_BTD = given.norm(x_BTD) - given.nothing
        y_BTHV = windowed_attention(
            uq_BTHK,
            self.in_heads(self.k_proj(own_BTD)),
            self.in_heads(self.v_proj(own_BTD)),
            self.window,
            scale=self.scale,
            query_bias=self.bias_of(tq_BTHK, clock_BT, r_EHK),
            sink_logits=logits_BTH,
            **documents,
        )
        return y_BTHV if past is None else past.drop(y_BTHV)

    def bias_of(self, tq_BTHK, clock_BT, r_EHK):
        """What distances do to the scores of a pass, as `windowed_attention` asks for it."""
        reach_BT = None if self.config.same_length else self.config.reach(clock_BT)

        def query_bias(rows, distance_CS):
            bias = band_scores(tq_BTHK, rows, r_EHK, distance_CS.shape[1])
            if reach_BT is None:
                return bias
            is_beyond = distance_CS > reach_BT[:, rows][..., None]
            return bias.masked_fill(is_beyond[:, None], -torch.inf)

        return query_bias

    def attend_step(self, uq_BTHK, tq_BTHK, sequence, state, given):
        """One token per row, itself in the ring: looks at all slots in any order.

        A matrix of keys is put before the sum over channels, W_k^T (q + u), one of values after the
        sum over tokens: all heads look at the same inputs, and no key or value is made.
        """
        clock_B1 = sequence.clock.expand(uq_BTHK.shape[0], 1)
        slots_W = torch.arange(self.window, device=clock_B1.device)
        distance_BW = (clock_B1 - slots_W) % self.window
        visible_BW = distance_BW <= self.config.reach(clock_B1)
        if not self.config.zero_memory:
            visible_BW = visible_BW & (distance_BW <= clock_B1)
        score_BHE = self.scores_of_step(tq_BTHK[:, 0], given.sinusoids)
        index_BW = distance_BW.clamp(max=score_BHE.shape[-1] - 1)
        bias_BHW = score_BHE.gather(-1, index_BW[:, None].expand(-1, self.num_heads, -1))
        held_BWD = state.inputs_BW1D[:, :, 0].to(uq_BTHK.dtype)
        own_BWD = given.norm(held_BWD) - given.nothing
        settings = {"scale": self.scale, "slot_bias": bias_BHW}
        if not (_is_plain(self.k_proj) and _is_plain(self.v_proj)):
            k_BWHK, v_BWHV = (self.in_heads(x(own_BWD)) for x in (self.k_proj, self.v_proj))
            return attention_step(uq_BTHK, k_BWHK, v_BWHV, visible_BW, **settings)
        k_HKD, v_HVD = (
            x.weight.unflatten(0, (self.num_heads, -1)) for x in (self.k_proj, self.v_proj)
        )
        q_BTHD = torch.einsum("bthk,hkd->bthd", uq_BTHK, k_HKD.to(uq_BTHK.dtype))
        own_BW1D = own_BWD[:, :, None]
        sum_BTHD = attention_step(q_BTHD, own_BW1D, own_BW1D, visible_BW, **settings)
        return torch.einsum("bthd,hvd->bthv", sum_BTHD, v_HVD.to(sum_BTHD.dtype))

    def takes_all_rows_alike(self, x_BTD, sequence, given):
        """Whether `plain_step` can run a step: all rows are at one clock, with few distances."""
        return (
            takes_plain_step(sequence, x_BTD)
            and not self.config.zero_memory
            and all(map(_is_plain, (self.k_proj, self.v_proj, self.r_proj)))
            and sequence.common_clock is not None
            and min(sequence.common_clock + 1, self.window) <= given.sinusoids.shape[0]
        )

    def plain_step(self, uq_BHK, tq_BHK, sequence, state, given):
        """`attend_step` of rows at the same clock: of the slots those that are seen."""
        clock, dtype, heads = sequence.common_clock, tq_BHK.dtype, self.num_heads
        seen, size = min(self.config.reach(clock), clock) + 1, min(clock + 1, self.window)
        k_HKD, v_HVD, r_HKD = (
            x.weight.view(heads, self.head_dim, -1) for x in (self.k_proj, self.v_proj, self.r_proj)
        )
        q_HBD = uq_BHK.transpose(0, 1).bmm(k_HKD.to(uq_BHK.dtype))
        t_HBD = tq_BHK.transpose(0, 1).bmm(r_HKD.to(dtype))
        if clock < self.window:  # the ring has not come round
            held_BSD = state.inputs_BW1D[:, clock + 1 - seen : clock + 1, 0]
            bias_HBS = F.linear(t_HBD, given.sinusoids[:seen].to(dtype)).flip(-1)
        else:
            held_BSD = state.inputs_BW1D[:, :, 0]
            bias_HBS = F.linear(t_HBD, given.sinusoids.to(dtype))[..., :size]
            bias_HBS[..., seen:] = -torch.inf
            bias_HBS = bias_HBS.flip(-1).roll(clock % size + 1, -1)
        own_BSD = given.norm(held_BSD.to(uq_BHK.dtype)).to(dtype)
        sum_BHD = self._read(q_HBD.transpose(0, 1).to(dtype), own_BSD, bias_HBS.transpose(0, 1))
        y_HBV = sum_BHD.to(uq_BHK.dtype).transpose(0, 1) @ v_HVD.to(uq_BHK.dtype).mT
        return y_HBV.transpose(0, 1)[:, None]

    def _read(self, q_BHD, own_BSD, bias_BHS):
        """softmax(q x^T / sqrt(K) + b) x of each row's heads, which share the inputs x."""
        if own_BSD.shape[0] > 1:
            return F.scaled_dot_product_attention(
                q_BHD[:, None],
                own_BSD[:, None],
                own_BSD[:, None],
                attn_mask=bias_BHS[:, None],
                scale=self.scale,
            )[:, 0]
        # Of one row it is two products with the same matrix, which each read it once for all heads.
        (own_SD,) = own_BSD
        p_BHS = (F.linear(q_BHD * self.scale, own_SD) + bias_BHS).softmax(-1)
        return F.linear(p_BHS, own_SD.T)

    def scores_of_step(self, tq_BHK, sinusoids_ED):
        """(q + t) r_d / sqrt(K) of one query per row and all distances, [B, H, E].

        For few rows the matrix is put before the sum here as well: the E vectors r_d would cost
        more than the rest of the layer.
        """
        if _is_plain(self.r_proj) and tq_BHK.shape[0] < self.head_dim:
            weight_HKD = self.r_proj.weight.to(tq_BHK.dtype).unflatten(0, (self.num_heads, -1))
            t_BHD = torch.einsum("bhk,hkd->bhd", tq_BHK, weight_HKD)
            return t_BHD @ sinusoids_ED.to(tq_BHK.dtype).T
        r_EHK = self.in_heads(self.r_proj(sinusoids_ED)).to(tq_BHK.dtype)
        return torch.einsum("bhk,ehk->bhe", tq_BHK, r_EHK)


def _is_plain(linear):
    """Whether its weight is all there is to a layer: no adapter, hook, shard or quantised one."""
    return (
        type(linear) is nn.Linear
        and type(linear.weight) is nn.Parameter
        and linear.weight.is_floating_point()
        and "forward" not in vars(linear)
    )
