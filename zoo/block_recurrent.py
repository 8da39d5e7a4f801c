"""Block-Recurrent Transformer: sliding-window attention, and a layer whose state reads each window.

Hutchins et al. 2022, https://arxiv.org/abs/2203.07852. It is defined here by the authors' code
(google-research/meliad), which differs from the paper in places. Token n of a document, counted
from 0, per head, with q and k of length 1 (x / sqrt(|x|^2 + 1e-6)) and a learned scale a:

    s_d = |a| (q_n . k_{n-d} + b_d)    over the W tokens before it, d = 1 to W, without itself
    o_n = sum_d exp(s_d) v_{n-d} / (exp(-1000) + sum_d exp(s_d))

b is T5's bias by distance (Raffel et al. 2020, https://arxiv.org/abs/1910.10683), added before the
scale. Tokens before the document have k = v = 0 and are not masked: their exp(|a| b_d) stays in the
denominator. Blocks are pre-norm (RMSNorm, eps 1e-6) with a ReLU MLP; logits are divided by sqrt(D)
and the output projection is the embedding.

A recurrent layer (`recurrent_layers`) has M states s as well, learned ones before the first window.
Windows are W tokens long and counted from a document's own start. All tokens of window w read the
states from before it, with queries q2 of their own (of length 1, scale a2), and both results are
projected together; zoo/recurrent_cell.py then takes the keys and values of windows w - 1 and w in:

    y_n = W_o [o_n, softmax(|a2| q2_n . rk) rv],  rk, rv from s_w;   s_{w+1} = cell(s_w, k, v)

With `feedback`, tokens of all other layers read the states of the last recurrent layer from before
their window too, so that the stack runs window by window (1.35 to 1.4 times the time, they say).

`num_states=0` is the baseline: Transformer-XL (Dai et al. 2019, https://arxiv.org/abs/1901.02860)
with a sliding cache, "Slide" in the paper, whose gradients go into the window before.

Departures: the code's extra logit of -1000 in the softmax over states and of the states is left
out, which is exact to 1e-40 below scales of 450; its dropout and its other position encodings too.
Its weights load through `zoo convert meliad`.
"""

import functools
import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.output_capturing import capture_outputs

from .base import (
    Constant,
    ZooBlock,
    ZooConfig,
    ZooForCausalLM,
    ZooForSequenceClassification,
    ZooModel,
    ZooPreTrainedModel,
)
from .kernels.linear_recurrence import accumulator_dtype
from .kernels.windowed_attention import attention_step, windowed_attention
from .recurrent_cell import (
    CONFIGURATIONS,
    GATES,
    RecurrentCell,
    look,
    scaled,
    truncated_,
    unit_heads,
)
from .segments import SegmentGrid, segment_passes
from .state import SlidingStateLayer, State, StateSpec
from .window import Past, document_spans, gather_tokens, ring_positions, row_spans, write_slot

# In every softmax over a window: where it is all that is left, attention is zero.
EXTRA_LOGIT = -1000.0
_SMALL = {"sliding_window": 16, "num_states": 5, "recurrent_layers": [0]}


@strict
class BlockRecurrentConfig(ZooConfig):
    """The mathematics of meliad's Block-Recurrent Transformer; defaults are those of its code.

    Args:
        intermediate_size: MLP width F; None: four times hidden_size.
        head_dim: width of a head; None: hidden_size / num_attention_heads.
        sliding_window: W, how many tokens before its own a token sees, and the length of a window
            of the recurrence.
        num_states: M, state vectors of a recurrent layer; 0: none, a Transformer-XL.
        recurrent_layers: which layers have states, counted from 0, or from the top if negative;
            None: the third from the top (of fewer layers the first).
        gate: of a state: bias (the paper's fixed gate), full or lstm.
        configuration: of the states' side: skip (no MLP), dual (a gate after attention and one
            after the MLP) or single (the MLP alone, and its gate).
        feedback: whether all other layers read the states too.
        num_buckets: of distances in the bias.
        max_distance: from which on distances share the last bucket.
        rms_norm_eps: epsilon of the norms.
    """

    model_type = "zoo_block_recurrent"
    layer_type = SlidingStateLayer._layer_type
    variants: ClassVar[dict[str, dict]] = {
        "default": _SMALL,
        "bias-dual": _SMALL | {"configuration": "dual"},
        "bias-single": _SMALL | {"configuration": "single"},
        "full-dual": _SMALL | {"gate": "full", "configuration": "dual"},
        "lstm-skip": _SMALL | {"gate": "lstm"},
        "lstm-dual": _SMALL
        | {"gate": "lstm", "configuration": "dual", "sliding_window": 13, "head_dim": 10},
        "lstm-single": _SMALL | {"gate": "lstm", "configuration": "single"},
        "two-recurrent-layers": _SMALL | {"num_hidden_layers": 3, "recurrent_layers": [0, -1]},
        "feedback": _SMALL | {"num_hidden_layers": 3, "recurrent_layers": [1], "feedback": True},
        "transformer-xl": {"sliding_window": 16, "num_states": 0},
    }

    head_dim: int | None = None
    sliding_window: int = 512
    num_states: int = 512
    recurrent_layers: list[int] | None = None
    gate: str = "bias"
    configuration: str = "skip"
    feedback: bool = False
    num_buckets: int = 32
    max_distance: int = 128
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.head_dim is None and self.hidden_size % self.num_attention_heads == 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        layers = self.num_hidden_layers
        if self.recurrent_layers is None:
            self.recurrent_layers = [max(layers - 3, 0)] if self.num_states else []
        self.recurrent_layers = [
            i + layers if -layers <= i < 0 else i for i in self.recurrent_layers
        ]
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Checks heads, window, states and gates."""
        super().validate_architecture()
        if self.head_dim is None:
            raise ValueError(
                "hidden_size is a multiple of num_attention_heads, got "
                f"{self.hidden_size} and {self.num_attention_heads}; change one of them, or give "
                "head_dim."
            )
        if self.sliding_window < 1:
            raise ValueError(f"sliding_window is at least 1 token, got {self.sliding_window}.")
        if self.num_states < 0:
            raise ValueError(f"num_states is at least 0, got {self.num_states}.")
        layers = self.recurrent_layers
        if any(not 0 <= i < self.num_hidden_layers for i in layers) or len({*layers}) < len(layers):
            raise ValueError(
                f"recurrent_layers are different layers of {self.num_hidden_layers}, got {layers}."
            )
        if bool(self.num_states) != bool(layers):
            raise ValueError(
                "there are recurrent_layers where num_states is above 0, and none without states, "
                f"got {layers} and num_states = {self.num_states}; leave recurrent_layers out to "
                "have it filled in."
            )
        if self.feedback and not layers:
            raise ValueError("feedback needs a recurrent layer, got num_states = 0.")
        for name, known in (("gate", GATES), ("configuration", CONFIGURATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is one of {', '.join(known)}, got {getattr(self, name)!r}."
                )
        if self.num_buckets < 2 or self.max_distance <= self.num_buckets // 2:
            raise ValueError(
                "num_buckets is at least 2 and max_distance above half of it, got "
                f"{self.num_buckets} and {self.max_distance}."
            )


def distance_buckets(window, num_buckets, max_distance):
    """T5's bucket of each distance from 1 to `window`, in one direction.

    Half of the buckets hold one distance each, the others grow with the logarithm.
    """
    exact = num_buckets // 2
    growth = (num_buckets - exact) / math.log(max_distance / exact)
    eps = torch.finfo(torch.float32).eps
    distances = range(1, window + 1)
    # With the authors' epsilon, which lifts a distance on a boundary into the bucket above.
    return torch.tensor(
        [
            n
            if n < exact
            else min(exact + int(math.log(n / exact + eps) * growth), num_buckets - 1)
            for n in distances
        ]
    )


class WindowAttention(nn.Module):
    """Attention to the W tokens before, and to states: the layer's own, or those it is given."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.window = config, config.sliding_window
        self.is_recurrent = layer_idx in config.recurrent_layers
        self.reads_states = self.is_recurrent or config.feedback
        self.num_heads, width = config.num_attention_heads, config.hidden_size
        size = self.num_heads * config.head_dim
        self.q_proj = nn.Linear(width, size, bias=False)
        self.k_proj = nn.Linear(width, size, bias=False)
        self.v_proj = nn.Linear(width, size, bias=False)
        self.scale = nn.Parameter(torch.empty(self.num_heads))
        self.relative_bias = nn.Parameter(torch.empty(self.num_heads, config.num_buckets))
        sizes = self.window, config.num_buckets, config.max_distance
        self.buckets = Constant(functools.partial(distance_buckets, *sizes))
        if self.reads_states:
            self.state_q_proj = nn.Linear(width, size, bias=False)
            self.state_scale = nn.Parameter(torch.empty(self.num_heads))
        if self.is_recurrent:
            self.cell = RecurrentCell(config)
        self.out_proj = nn.Linear((1 + self.reads_states) * size, width, bias=False)

    def init_weights_of_paper(self):
        """The authors' matrices; biases as flax initialises an embedding, by its width."""
        for name in ("q_proj", "k_proj", "v_proj", "state_q_proj", "out_proj"):
            if hasattr(self, name):
                truncated_(getattr(self, name).weight, getattr(self, name).in_features)
        init.normal_(self.relative_bias, std=self.config.num_buckets**-0.5)
        init.ones_(self.scale)
        if self.reads_states:
            init.ones_(self.state_scale)

    def state_specs(self):
        """Keys and values of the last W tokens, of 2 W and the states in a recurrent layer.

        Keys and values in the dtype of the weights, which is that of a key before it is stored.
        """
        weight, slots = self.k_proj.weight, self.window
        dtype = weight.dtype if weight.is_floating_point() else None
        specs = {}
        if self.is_recurrent:
            specs["states_BMD"] = StateSpec((self.config.num_states, self.config.hidden_size))
            slots = 2 * self.window
        ring = StateSpec((slots, self.num_heads, self.config.head_dim), dtype=dtype)
        return specs | {"keys_BWHK": ring, "values_BWHV": ring}

    def forward(self, x_BTD, sequence, state, read=None):
        """Mixes a sequence [B, T, D]; returns it with the state after it.

        Args:
            x_BTD: the tokens.
            sequence: how they lie.
            state: before them.
            read: keys [N, M, H, K] and values of the states that tokens of each document read: of
                each row, if dense. For feedback, where a document has one window in a pass.
        """
        v_BTHV = self.v_proj(x_BTD).unflatten(-1, (self.num_heads, -1))
        dtype = v_BTHV.dtype
        q_BTHK = scaled(unit_heads(self.q_proj(x_BTD), self.num_heads), self.scale, dtype)
        k_BTHK = unit_heads(self.k_proj(x_BTD), self.num_heads).to(dtype)
        is_step = x_BTD.shape[1] == 1 and sequence.cu_seqlens is None and state.is_kept
        attend = self.attend_step if is_step else self.attend
        y_BTHV = attend(q_BTHK, k_BTHK, v_BTHV, sequence, state)
        if self.reads_states:
            q_BTHK = unit_heads(self.state_q_proj(x_BTD), self.num_heads)
            q_BTHK = scaled(q_BTHK, self.state_scale, dtype)
            if self.is_recurrent:
                y2_BTHV = self.walk(q_BTHK, k_BTHK, v_BTHV, sequence, state)
            else:
                y2_BTHV = self.look_by_document(q_BTHK, *read, sequence)
            y_BTHV = torch.cat([y_BTHV, y2_BTHV], dim=2)
        if state.is_kept:
            self.keep(k_BTHK, v_BTHV, sequence, state)
        return self.out_proj(y_BTHV.flatten(2)), state

    def biases(self, clock_BT, dtype):
        """(bias of each distance [H, W], logit of all that precedes the document [B, T, H]).

        The zero keys and the extra logit have no values: all they do is to add to the denominator.
        """
        bias_HR = self.relative_bias.to(dtype) * self.scale.to(dtype).abs()[:, None]
        bias_HW = bias_HR[:, self.buckets().long()]
        extra_H1 = bias_HW.new_full((self.num_heads, 1), EXTRA_LOGIT)
        # Before token n lie n tokens, and zeros at the distances n + 1 to W.
        logits_HN = torch.cat([extra_H1, bias_HW.flip(1)], dim=1).logcumsumexp(1).flip(1)
        return bias_HW, F.embedding(clock_BT.clamp(max=self.window), logits_HN.T)

    def attend(self, q_BTHK, k_BTHK, v_BTHV, sequence, state):
        """Any number of tokens, dense or packed, after what the state holds."""
        bias_HW, logits_BTH = self.biases(sequence.clock, accumulator_dtype(q_BTHK))
        logits_BTH = logits_BTH.expand(*q_BTHK.shape[:2], -1)
        documents, past = {"cu_seqlens": sequence.cu_seqlens}, None
        if state.keys_BWHK is not None:
            past = Past(sequence, state.keys_BWHK, self.window)
            documents = {"cu_seqlens": past.cu_seqlens, "first_key": past.first_key}
            k_BTHK = past.put_before(k_BTHK, state.keys_BWHK)
            v_BTHV = past.put_before(v_BTHV, state.values_BWHV)
            q_BTHK, logits_BTH = past.pick(q_BTHK), past.pick(logits_BTH)
        y_BTHV = windowed_attention(
            q_BTHK,
            k_BTHK,
            v_BTHV,
            self.window,
            scale=1.0,
            delay=1,
            distance_bias=bias_HW,
            sink_logits=logits_BTH,
            **documents,
        )
        return y_BTHV if past is None else past.drop(y_BTHV)

    def attend_step(self, q_BTHK, k_BTHK, v_BTHV, sequence, state):
        """One token per row: looks at the slots of the tokens before it, in any order."""
        clock_B1 = sequence.clock.expand(len(q_BTHK), 1)
        bias_HW, logits_BTH = self.biases(clock_B1, accumulator_dtype(q_BTHK))
        if state.keys_BWHK is None:
            return torch.zeros_like(v_BTHV)  # the values of what lies before a document
        num_slots = state.keys_BWHK.shape[1]
        slots_W = torch.arange(num_slots, device=clock_B1.device)
        distance_BW = (clock_B1 - 1 - slots_W) % num_slots
        visible_BW = (distance_BW < self.window) & (distance_BW < clock_B1)
        bias_HBW = bias_HW[:, distance_BW.clamp(max=self.window - 1)]
        return attention_step(
            q_BTHK,
            state.keys_BWHK,
            state.values_BWHV,
            visible_BW,
            scale=1.0,
            sink_logits=logits_BTH,
            slot_bias=bias_HBW.transpose(0, 1),
        )

    def keep(self, k_BTHK, v_BTHV, sequence, state):
        """Brings keys and values of the state up to date."""
        spec = self.state_specs()["keys_BWHK"]
        is_step = k_BTHK.shape[1] == 1 and sequence.cu_seqlens is None
        for name, x_BTHK in (("keys_BWHK", k_BTHK), ("values_BWHV", v_BTHV)):
            held_BWHK, x_BTHK = getattr(state, name), x_BTHK.to(spec.dtype)
            if is_step:
                clock_B = sequence.clock[:, 0].expand(len(x_BTHK))
                if held_BWHK is None:
                    held_BWHK = x_BTHK.new_zeros(len(x_BTHK), *spec.shape)
                held_BWHK = write_slot(
                    held_BWHK,
                    x_BTHK[:, 0],
                    clock_B % spec.shape[0],
                    sequence.keep,
                    state.may_overwrite,
                )
            else:
                spans = row_spans(sequence)
                numbers_BW = ring_positions(spans.after, spec.shape[0])
                held_BWHK = gather_tokens(x_BTHK, held_BWHK, numbers_BW, spans)
            setattr(state, name, held_BWHK)

    def look_by_document(self, q_BTHK, rk_NMHK, rv_NMHV, sequence):
        """Tokens look at the states of their document, of which this pass has one window."""
        if sequence.cu_seqlens is None:
            return look(q_BTHK, rk_NMHK, rv_NMHV)
        grid = SegmentGrid(sequence, self.window, is_fresh=False)
        return grid.join(look(grid.queries(q_BTHK), rk_NMHK, rv_NMHV))

    def states_before(self, sequence, state):
        """The states of each document (row, if dense) before this pass, [N, M, D]."""
        start_N, held_BMD = document_spans(sequence).start, state.states_BMD
        initial_MD = self.cell.initial.to(accumulator_dtype(self.cell.initial))
        if held_BMD is None:
            return initial_MD.expand(len(start_N), -1, -1)
        if sequence.row_of_document is not None:
            held_BMD = held_BMD[sequence.row_of_document]
        return torch.where((start_N == 0)[:, None, None], initial_MD, held_BMD)

    def walk(self, q_BTHK, k_BTHK, v_BTHV, sequence, state):
        """All windows, one after the other: tokens look at the states, these then at the tokens.

        Returns:
            What the tokens see, [B, T, H, V]; the states after the pass go into `state`.
        """
        grid = SegmentGrid(sequence, self.window, is_fresh=state.keys_BWHK is None)
        states_NMD = self.states_before(sequence, state)
        if grid.walk is not None:
            states_NMD = states_NMD[grid.walk]
        is_filled = self.filled_ranks(grid, state)
        windows = [None] * grid.num_ranks
        if any(is_filled):
            windows = self.windows(grid, k_BTHK, v_BTHV, state)
        completes = grid.by_rank(grid.is_complete)
        reads, after = [], []
        for is_filled_here, is_complete_N, window in zip(is_filled, completes, windows):
            states_NMD = states_NMD[: len(is_complete_N)]
            read = self.cell.keys_values(states_NMD)
            reads.append(read[1:])
            if is_filled_here:
                next_NMD = self.cell(states_NMD, read, *window)
                states_NMD = torch.where(is_complete_N[:, None, None], next_NMD, states_NMD)
            after.append(states_NMD)
        if state.is_kept:
            if grid.walk is not None:
                states_NMD = grid.last(grid.from_ranks(after))
            states_BMD = grid.documents_to_rows(states_NMD, state.states_BMD)
            if sequence.keep is not None:
                held = 0 if state.states_BMD is None else state.states_BMD
                states_BMD = torch.where(sequence.keep[:, None, None], states_BMD, held)
            state.states_BMD = states_BMD
        rk_SMHK, rv_SMHV = (grid.from_ranks(list(xs)) for xs in zip(*reads))
        return grid.join(look(grid.queries(q_BTHK), rk_SMHK, rv_SMHV))

    def filled_ranks(self, grid, state):
        """For each rank whether a window may be filled there, so that states change."""
        ranks = range(grid.num_ranks)
        if grid.width < self.window:
            return [False for _ in ranks]
        # Nobody reads what comes after the last window, unless the state is kept.
        is_read = [state.is_kept or rank + 1 < grid.num_ranks for rank in ranks]
        if grid.is_dense and grid.is_fresh:
            num_filled = grid.sequence.shape[1] // self.window
            return [is_read[rank] and rank < num_filled for rank in ranks]
        if torch.compiler.is_compiling():
            return is_read
        # A look at the values, which saves all others their update: one token in W fills a window.
        filled = torch.stack([x_N.any() for x_N in grid.by_rank(grid.is_complete)]).tolist()
        return [a and b for a, b in zip(is_read, filled)]

    def windows(self, grid, k_BTHK, v_BTHV, state):
        """By rank, keys and values of each window and of the one before it, [N, 2 W, H, K]."""
        pairs = []
        for x_BTHK, held_BWHK in zip((k_BTHK, v_BTHV), (state.keys_BWHK, state.values_BWHV)):
            current, before = None, None
            if held_BWHK is not None:
                # The ring's halves take turns in holding the window that is not full.
                halves = held_BWHK.unflatten(1, (2, self.window))
                rows = grid.sequence.row_of_document
                if rows is None:
                    rows = torch.arange(len(halves), device=halves.device)
                half_N = grid.first_segment.expand(len(rows)) % 2
                current, before = halves[rows, half_N], halves[rows, 1 - half_N]
                has_before_N = (grid.first_segment > 0)[:, None, None, None]
                before = torch.where(has_before_N, before, 0).to(x_BTHK.dtype)
            by_rank = grid.by_rank(grid.keys(x_BTHK, current))
            if before is None:
                before = torch.zeros_like(by_rank[0])
            elif grid.walk is not None:
                before = before[grid.walk]
            pair = []
            for own_NWHK in by_rank:
                pair.append(torch.cat([before[: len(own_NWHK)], own_NWHK], dim=1))
                before = own_NWHK
            pairs.append(pair)
        return list(zip(*pairs))


class FeedForward(nn.Module):
    """down(relu(up x))."""

    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def init_weights_of_paper(self):
        """The authors' matrices."""
        for proj in (self.up_proj, self.down_proj):
            truncated_(proj.weight, proj.in_features)

    def forward(self, x_BTD):
        """[B, T, D] to the same."""
        return self.down_proj(self.up_proj(x_BTD).relu())


class BlockRecurrentBlock(ZooBlock):
    """A block of the Block-Recurrent Transformer, recurrent or not."""

    mixer_class = WindowAttention
    mlp_class = FeedForward


class FinalNorm(nn.RMSNorm):
    """RMSNorm by whose output, divided by sqrt(D), logits are of order one."""

    def forward(self, x_BTD):
        """[B, T, D] to the same."""
        return super().forward(x_BTD) * x_BTD.shape[-1] ** -0.5


class Joined(nn.Module):
    """Passes on a block's output for a whole pass, where the block itself saw it in windows."""

    def forward(self, before_BTD, after_BTD):
        """What came out of the block; what went in is for whoever records it."""
        return after_BTD


class BlockRecurrentPreTrainedModel(ZooPreTrainedModel):
    """Block-Recurrent config, layers and initialisation for transformers."""

    config: BlockRecurrentConfig
    _no_split_modules = ["BlockRecurrentBlock"]
    _can_record_outputs = {"hidden_states": BlockRecurrentBlock}


class BlockRecurrentModel(BlockRecurrentPreTrainedModel, ZooModel):
    """The Block-Recurrent decoder."""

    block_class = BlockRecurrentBlock

    def __init__(self, config):
        if config.feedback:
            self._can_record_outputs = {"hidden_states": Joined}
        super().__init__(config)
        self.joined = Joined()

    def build_norm(self, config):
        """The norm after the last block."""
        return FinalNorm(config.hidden_size, eps=config.rms_norm_eps)

    def init_weights_of_paper(self):
        """Embeddings of variance 1."""
        init.normal_(self.embed_tokens.weight)

    def _run_blocks(self, *args, **kwargs):
        run = self._run_windows if self.config.feedback else super()._run_blocks
        return run(*args, **kwargs)

    @capture_outputs
    def _run_windows(self, x_BTD, sequence, cache, inputs, **kwargs):
        """The stack window by window, for layers that read what the windows before left."""
        specs = [layer.state_specs() for layer in self.layers]
        if cache is None:
            rows = [State(dict.fromkeys(names), is_kept=False) for names in specs]
        else:
            rows = [layer.read(sequence, s) for layer, s in zip(cache.layers, specs)]
        is_fresh = rows[0].keys_BWHK is None
        passes = segment_passes(sequence, self.config.sliding_window, is_fresh)
        states, outputs = [_by_document(state, sequence) for state in rows], []
        source = self.config.recurrent_layers[-1]
        is_recorded = kwargs.get("output_hidden_states") or self.config.output_hidden_states
        for index, (tokens, own) in enumerate(passes):
            h_BTD = _take(x_BTD, tokens)
            mixer = self.layers[source].mixer
            read = mixer.cell.keys_values(mixer.states_before(own, states[source]))[1:]
            pieces = []
            for number, layer in enumerate(self.layers):
                states[number].is_kept = cache is not None or index + 1 < len(passes)
                h_BTD, states[number] = layer(h_BTD, own, states[number], read=read)
                pieces.append(h_BTD)
            outputs.append(pieces if is_recorded else pieces[-1:])
        places = [tokens for tokens, _ in passes]
        for pieces in zip(*outputs):
            x_BTD = self.joined(x_BTD, _join(pieces, places, x_BTD.shape))
        if cache is not None:
            for number, (layer, state) in enumerate(zip(cache.layers, states)):
                state = _by_row(state, rows[number], sequence)
                layer.write(sequence, specs[number], state, None if number else inputs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x_BTD))


def _take(x_BTD, tokens):
    """Some tokens of a pass: its columns, or a stream [1, T', D] of those of these indices."""
    return x_BTD[:, tokens] if isinstance(tokens, slice) else x_BTD.flatten(0, 1)[tokens][None]


def _join(pieces, places, shape):
    """The inverse of `_take` for all pieces of a pass together."""
    if isinstance(places[0], slice):
        return torch.cat(pieces, dim=1)
    order = torch.cat(places).argsort()
    return torch.cat(pieces, dim=1)[0, order].reshape(shape)


def _by_document(state, sequence):
    """A state by row as one by document, which documents that start do not look at."""
    if sequence.row_of_document is None:
        return state.copy()
    tensors = {
        name: None if x is None else x[sequence.row_of_document]
        for name, x in state.tensors().items()
    }
    return State(tensors, state.is_kept)


def _by_row(state, before, sequence):
    """The state of each row, that of its last document; rows without a token keep theirs."""
    if sequence.row_of_document is None:
        return state
    last_B = sequence.last_document
    tensors = {}
    for name, x_N in state.tensors().items():
        x_B, held_B = x_N[last_B.clamp(min=0)], getattr(before, name)
        is_new_B = (last_B >= 0).view(-1, *[1] * (x_B.ndim - 1))
        tensors[name] = torch.where(is_new_B, x_B, 0 if held_B is None else held_B)
    return State(tensors, is_kept=True)


class BlockRecurrentForCausalLM(BlockRecurrentPreTrainedModel, ZooForCausalLM):
    """A Block-Recurrent Transformer as a language model."""

    model_class = BlockRecurrentModel

    @property
    def receptive_field(self):
        """How many tokens up to its own a logit depends on; None: all, through the states."""
        if self.config.num_states:
            return None
        return self.config.num_hidden_layers * self.config.sliding_window + 1


class BlockRecurrentForSequenceClassification(
    BlockRecurrentPreTrainedModel, ZooForSequenceClassification
):
    """A Block-Recurrent Transformer as a classifier."""

    model_class = BlockRecurrentModel
