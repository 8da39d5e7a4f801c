"""Softmax attention as a mixer: positions of some type, a window or all tokens, sinks.

The mathematics is that of `zoo/models/sliding_window.py`, whose mixer this is; hybrids have it in
some of their layers. It runs through transformers' attention interface: "banded" (ours, the
default, linear in the length where there is a window), "eager" (the definition), "sdpa",
"flex_attention" and the flash attentions.
"""

import functools

import torch
from torch import nn
from transformers import AttentionInterface
from transformers import initialization as init
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..core.base import Constant, ZooPreTrainedModel
from ..core.flops import linear_flops, mean_visible, product_flops
from ..core.halo import first_before, hops_to, last_before
from ..core.state import GrowingStateLayer, SlidingStateLayer, StateSpec, dtype_of
from ..core.window import (
    Past,
    document_spans,
    first_positions,
    gather_ring,
    gather_tokens,
    ring_positions,
    row_spans,
    write_common_slot,
    write_slot,
)
from ..kernels.linear_recurrence import accumulator_dtype
from ..kernels.recurrence_steps import takes_plain_step
from ..kernels.windowed_attention import (
    Sinks,
    attention_step,
    attention_step_to_all,
    windowed_attention,
    windowed_attention_reference,
)
from .foreign_attention import (
    all_biases,
    decayed,
    mask_arguments,
)
from .head_exchange import attend_by_heads
from .position_bias import DistanceBias, position_bias
from .position_fields import TURNED_TYPES, position_type_of, position_types
from .positions import turned
from .shifted_groups import attend_in_groups, mean_visible_in_groups
from .xpos import xpos_log_decay, xpos_steepest

OUR_IMPLEMENTATIONS = ("banded", "eager")
# Of `position_embedding_type`, those that add to scores.
BIAS_TYPES = ("alibi", "t5", "fire")


def softmax_layer_type(window):
    """The `layer_types` entry of a layer with such a window: which cache holds its state."""
    return (GrowingStateLayer if window is None else SlidingStateLayer)._layer_type


def state_is_list_of_tokens(config):
    """Whether such layers' states are lists of tokens in any order, as `join_states` needs them."""
    is_plain = getattr(config, "rope_extension", None) is None
    types = {*position_types(config)}
    return config.sliding_window is None and types <= {"rope", None} and is_plain


def fill_heads(config):
    """Sets num_key_value_heads and head_dim, where they are None, to what follows from the rest."""
    if config.num_key_value_heads is None:
        config.num_key_value_heads = config.num_attention_heads
    if config.head_dim is None and config.hidden_size % config.num_attention_heads == 0:
        config.head_dim = config.hidden_size // config.num_attention_heads


def check_key_value_heads(config):
    """Raises a ValueError if heads of keys and values cannot be shared evenly."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if groups < 1 or heads % groups:
        raise ValueError(
            f"num_attention_heads is a multiple of num_key_value_heads, got {heads} and {groups}."
        )


def check_window(window):
    """Raises a ValueError for a window without tokens."""
    if window is not None and window < 1:
        raise ValueError(
            f"sliding_window counts the current token and is at least 1, got {window}; None is "
            "full attention."
        )


def banded_attention_forward(module, query, key, value, attention_mask=None, **settings):
    """The default: blocks of queries against their band of keys, linear in the length."""
    return _in_our_layout(windowed_attention, query, key, value, attention_mask, **settings)


def eager_attention_forward(module, query, key, value, attention_mask=None, **settings):
    """The definition, with all scores and a mask."""
    return _in_our_layout(
        windowed_attention_reference, query, key, value, attention_mask, **settings
    )


AttentionInterface.register("banded", banded_attention_forward)


def _in_our_layout(
    operator,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    sliding_window=None,
    cu_seqlens=None,
    first_key=None,
    sinks=None,
    s_aux=None,
    distance_bias=None,
    query_bias=None,
    log_decay=None,
    **settings,
):
    if attention_mask is not None:
        raise ValueError(
            "this attention takes documents, not a mask; attn_implementation='banded' is for the "
            "softmax layers of the zoo alone."
        )
    q_BTHK, k_BSHK, v_BSHV = (x.transpose(1, 2) for x in (query, key, value))
    o_BTHV = operator(
        q_BTHK,
        k_BSHK,
        v_BSHV,
        sliding_window,
        scale=scaling,
        cu_seqlens=cu_seqlens,
        first_key=first_key,
        sinks=sinks,
        sink_logits=s_aux,
        distance_bias=distance_bias,
        query_bias=query_bias,
        log_decay=log_decay,
    )
    return o_BTHV, None


def check_implementation(name, num_sinks, has_sink_logits, position_types=()):
    """Raises a ValueError if an attention implementation cannot compute what layers have.

    Args:
        name: of the implementation.
        num_sinks: first tokens that stay visible.
        has_sink_logits: whether there are logits without a value.
        position_types: of the layers.
    """
    if name in OUR_IMPLEMENTATIONS:
        return
    adding = [x for x in position_types if x in BIAS_TYPES]
    if adding and name not in ("sdpa", "flex_attention"):
        raise ValueError(
            f"attn_implementation={name!r} adds nothing to scores, as position_embedding_type "
            f"{adding[0]!r} does; use 'banded', 'eager', 'sdpa' or 'flex_attention'."
        )
    if num_sinks:
        raise ValueError(
            f"attn_implementation={name!r} cannot turn a query a second time, as "
            f"num_sink_tokens = {num_sinks} needs; use 'banded' or 'eager'."
        )
    if has_sink_logits and name != "flex_attention":
        raise ValueError(
            f"attn_implementation={name!r} has no logits without a value (learnable_sinks); "
            "use 'banded', 'eager' or, on a GPU, 'flex_attention'."
        )


def check_extended_implementation(name):
    """Raises a ValueError if an attention implementation does not know `rope_extension`."""
    if name not in OUR_IMPLEMENTATIONS:
        raise ValueError(
            f"attn_implementation={name!r} has one angle for each key, where rope_extension has "
            "several; use 'banded' or 'eager'."
        )


def longer(held_BSHK, more, like_BTHK, spec):
    """A state with that many more slots, of zeros; held None: with these alone."""
    shape = len(like_BTHK), more, *like_BTHK.shape[2:]
    zeros_BSHK = like_BTHK.new_zeros(shape, dtype=spec.dtype)
    return zeros_BSHK if held_BSHK is None else torch.cat([held_BSHK, zeros_BSHK], dim=1)


class SoftmaxAttention(nn.Module):
    """Softmax attention over a window, or all tokens, and sinks if there are any.

    Args:
        config: with hidden_size, num_attention_heads, num_key_value_heads, head_dim,
            sliding_window (None: all tokens), initializer_range, and the fields of
            zoo/layers/position_fields.py.
        layer_idx: of the layer.
        num_sinks: first tokens of a document that stay visible.
        sink_distance: how far away they are once they have left the window; None: as far as in a
            cache of them and the window.
        has_sink_logits: a logit per head in the softmax that stands for no token.
        bias: in the linear layers.
        clip_qkv: queries, keys and values are cut off at plus and minus this; None: not.

    Attributes:
        shift_groups: tokens of the groups that full attention trains in; None: it does not. How to
            train, not part of a model: see `train_in_groups` of zoo/layers/shifted_groups.py.
    """

    is_causal = True
    shift_groups = None
    exchanges = True
    has_plain_step = True

    def __init__(
        self,
        config,
        layer_idx,
        num_sinks=0,
        sink_distance=None,
        has_sink_logits=False,
        bias=False,
        clip_qkv=None,
    ):
        super().__init__()
        self.config, self.layer_idx, self.sink_distance = config, layer_idx, sink_distance
        self.window = getattr(config, "sliding_window", None)
        self.num_sinks, self.clip_qkv = num_sinks, clip_qkv
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.num_groups = config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_groups
        self.scale = getattr(config, "attention_scale", None) or self.head_dim**-0.5
        width = config.hidden_size
        self.q_proj = nn.Linear(width, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, self.num_groups * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, self.num_groups * self.head_dim, bias=bias)
        self.out_proj = nn.Linear(self.num_heads * self.head_dim, width, bias=bias)
        self.position_type = position_type_of(config, layer_idx)
        self.position_bias = position_bias(config, self.position_type)
        self.log_decay = None
        if self.position_type == "xpos":
            self.log_decay = Constant(functools.partial(xpos_log_decay, config))
        self.sink_logits = None
        if has_sink_logits:
            self.sink_logits = nn.Parameter(torch.empty(self.num_heads))
        # Whether a step looks at keys alone, all of which count alike.
        has_sinks = num_sinks > 0 or has_sink_logits
        is_of_scores = self.position_bias is not None or self.log_decay is not None
        self.is_plain = self.has_plain_step and not (has_sinks or is_of_scores or clip_qkv)

    def init_weights_of_paper(self):
        """Sink logits as gpt-oss; matrices as transformers does for any linear layer."""
        if self.sink_logits is not None:
            init.normal_(self.sink_logits, std=self.config.initializer_range)

    def state_specs(self):
        """Keys and values in a ring of W slots, or one per token, and those of S sinks.

        In the dtype of the weights, which is that of a key before it is stored.
        """
        dtype = dtype_of(self.k_proj)
        sizes = {"keys_BWHK": self.window, "values_BWHV": self.window}
        if self.num_sinks:
            sizes |= {"sink_keys_BSHK": self.num_sinks, "sink_values_BSHV": self.num_sinks}
        shape = (self.num_groups, self.head_dim)
        return {name: StateSpec((size, *shape), dtype=dtype) for name, size in sizes.items()}

    def flops_per_token(self, length):
        """Of its matrices, and of attention to the keys a token sees, with FIRE's MLP for each."""
        keys = mean_visible(length, self.window, self.num_sinks)
        if self.training and self.shift_groups is not None:
            keys = mean_visible_in_groups(length, self.shift_groups)
        per_key = 4 * self.num_heads * self.head_dim
        if self.position_type == "fire":
            per_key += product_flops(self.position_bias.down_weight)
        return linear_flops(self) + per_key * keys

    def forward(self, x_BTD, sequence, state, rotation=None, sink_rotation=None):
        """Mixes a sequence [B, T, D]; returns it with the state after it.

        Args:
            x_BTD: the tokens.
            sequence: how they lie.
            state: before them.
            rotation: (cos, sin) of each position, for layers that turn queries and keys.
            sink_rotation: of each position as sinks are seen from it.
        """
        if self.is_plain and state.is_kept and takes_plain_step(sequence, x_BTD):
            y_BTD = self.plain_step(x_BTD, sequence, state, rotation)
            if y_BTD is not None:
                return y_BTD, state
        q_BTHK, k_BTHK, v_BTHV = self.project(x_BTD)
        q_BTHK, k_BTHK, as_sinks = self.turn(q_BTHK, k_BTHK, rotation, sink_rotation)
        is_step = x_BTD.shape[1] == 1 and sequence.cu_seqlens is None and state.is_kept
        run = self.run_step if is_step and sequence.ranks is None else self.run_pass
        if self.training and self.shift_groups is not None:
            run = self.run_groups
        y_BTHV = run(q_BTHK, k_BTHK, v_BTHV, as_sinks, sequence, state)
        return self.out_proj(y_BTHV.flatten(2)), state

    def plain_step(self, x_BTD, sequence, state, rotation):
        """`forward` of one token of each row, if all rows are as long; None: it is not so simple.

        The slots that are filled are then the first ones, and nothing has to be hidden.
        """
        held_BWHK, name = state.keys_BWHK, self.config._attn_implementation
        clock = sequence.common_clock
        if clock is None or held_BWHK is None or name != "banded":
            return None
        batch, dtype = len(x_BTD), held_BWHK.dtype
        q_B1HK = self.q_proj(x_BTD).view(batch, 1, self.num_heads, self.head_dim)
        k_B1HK = self.k_proj(x_BTD).view(batch, 1, self.num_groups, self.head_dim)
        v_B1HV = self.v_proj(x_BTD).view(batch, 1, self.num_groups, self.head_dim)
        if self.position_type in TURNED_TYPES:
            q_B1HK, k_B1HK = turned(q_B1HK, rotation), turned(k_B1HK, rotation)
        for name, x_B1HK in (("keys_BWHK", k_B1HK), ("values_BWHV", v_B1HV)):
            held_BWHK, x_B1HK = getattr(state, name), x_B1HK.to(dtype)
            if self.window is None:
                held_BWHK = torch.cat([held_BWHK[:, :clock], x_B1HK], dim=1)
            else:
                slot = clock % self.window
                held_BWHK = write_common_slot(held_BWHK, x_B1HK, slot, state.may_overwrite)
            setattr(state, name, held_BWHK)
        seen = clock + 1 if self.window is None else min(clock + 1, self.window)
        y_B1HV = attention_step_to_all(
            q_B1HK, state.keys_BWHK[:, :seen], state.values_BWHV[:, :seen], self.scale
        )
        return self.out_proj(y_B1HV.to(v_B1HV.dtype).flatten(2))

    def project(self, x_BTD):
        """Queries [B, T, H, K], keys and values [B, T, groups, K] of hidden states [B, T, D]."""
        parts = ((self.q_proj, self.num_heads), (self.k_proj, self.num_groups))
        parts += ((self.v_proj, self.num_groups),)
        for proj, heads in parts:
            y_BTK = proj(x_BTD)
            if self.clip_qkv is not None:
                y_BTK = y_BTK.clamp(-self.clip_qkv, self.clip_qkv)
            yield y_BTK.unflatten(-1, (heads, self.head_dim))

    def turn(self, q_BTHK, k_BTHK, rotation, sink_rotation):
        """Queries and keys, turned where this layer's type does that, and both as of sinks."""
        if self.position_type not in TURNED_TYPES:
            return q_BTHK, k_BTHK, (q_BTHK, k_BTHK)
        interleaved = self.position_type == "xpos"
        turned_k_BTHK, as_sinks = turned(k_BTHK, rotation, interleaved), None
        if sink_rotation is not None:
            # At a distance that is a number, the same for all of them, it is the query that turns.
            sink_k_BTHK = turned_k_BTHK if self.sink_distance is None else k_BTHK
            as_sinks = turned(q_BTHK, sink_rotation, interleaved), sink_k_BTHK
        return turned(q_BTHK, rotation, interleaved), turned_k_BTHK, as_sinks

    def run_step(self, q_BTHK, k_BTHK, v_BTHV, as_sinks, sequence, state):
        """One token per row: writes its slot, and looks at all that are filled, in any order."""
        clock_B = sequence.clock[:, 0].expand(len(q_BTHK))
        specs = self.state_specs()
        new = {"keys": k_BTHK, "values": v_BTHV, "sink_values": v_BTHV}
        if self.num_sinks:
            sink_q_BTHK, new["sink_keys"] = as_sinks
        for name, spec in specs.items():
            x_BTHK, slot_B, is_written_B = new[name.rpartition("_")[0]], clock_B, sequence.keep
            held_BSHK, may_overwrite = getattr(state, name), state.may_overwrite
            if self.window is None:
                held_BSHK = longer(held_BSHK, 1, x_BTHK, spec)
            elif held_BSHK is None:
                held_BSHK = x_BTHK.new_zeros(len(clock_B), *spec.shape, dtype=spec.dtype)
            if name.startswith("sink"):
                slot_B = clock_B.clamp(max=self.num_sinks - 1)
                is_sink_B = clock_B < self.num_sinks
                is_written_B = is_sink_B if is_written_B is None else is_sink_B & is_written_B
            else:
                slot_B = clock_B if self.window is None else clock_B % self.window
            held_BSHK = write_slot(held_BSHK, x_BTHK[:, 0], slot_B, is_written_B, may_overwrite)
            setattr(state, name, held_BSHK)
        keys_BWHK, values_BWHV = state.keys_BWHK, state.values_BWHV
        slots_W = torch.arange(keys_BWHK.shape[1], device=clock_B.device)
        sinks = None
        if self.num_sinks:
            held = state.sink_keys_BSHK, state.sink_values_BSHV
            sinks = self.sinks_seen_from(clock_B[:, None], sink_q_BTHK, *held)
        visible_BS = slots_W <= clock_B[:, None]
        distance_BS = clock_B[:, None] - slots_W
        if self.window is not None:
            distance_BS = distance_BS % self.window
        bias = self.step_bias(clock_B, distance_BS.clamp(min=0), q_BTHK)
        return self.attend(q_BTHK, keys_BWHK, values_BWHV, sinks, bias, visible_BS=visible_BS)

    def run_pass(self, q_BTHK, k_BTHK, v_BTHV, as_sinks, sequence, state):
        """Any number of tokens, dense or packed, after what the state holds."""
        is_slice = self.exchanges and sequence.ranks is not None
        if is_slice and self.splits_heads(sequence.ranks):
            return attend_by_heads(self, q_BTHK, k_BTHK, v_BTHV, sequence)
        if is_slice:
            new = {"keys_BWHK": k_BTHK, "values_BWHV": v_BTHV}
            if self.num_sinks:
                new |= {"sink_keys_BSHK": as_sinks[1], "sink_values_BSHV": v_BTHV}
            self.bring(new, sequence, state)
        documents, sinks = {"cu_seqlens": sequence.cu_seqlens}, None
        if self.num_sinks:
            sinks = self.sinks_of_documents(*as_sinks, v_BTHV, sequence, state)
        past, keys_BSHK, values_BSHV, clock_BT = None, k_BTHK, v_BTHV, sequence.clock
        if state.keys_BWHK is not None:
            size = state.keys_BWHK.shape[1] if self.window is None else self.window - 1
            past = Past(sequence, state.keys_BWHK, size)
            documents = {"cu_seqlens": past.cu_seqlens, "first_key": past.first_key}
            keys_BSHK = past.put_before(k_BTHK, state.keys_BWHK)
            values_BSHV = past.put_before(v_BTHV, state.values_BWHV)
            q_BTHK, clock_BT = past.pick(q_BTHK), past.pick(clock_BT)
            if sinks is not None:
                bias = None if sinks.bias is None else past.pick(sinks.bias)
                sinks = sinks._replace(q=past.pick(sinks.q), count=past.pick(sinks.count))
                sinks = sinks._replace(bias=bias)
        bias = self.pass_bias(clock_BT, keys_BSHK.shape[1], q_BTHK)
        y_BTHV = self.attend(q_BTHK, keys_BSHK, values_BSHV, sinks, bias, **documents)
        if state.is_kept:
            self.keep(k_BTHK, v_BTHV, sequence, state, as_sinks)
        return y_BTHV if past is None else past.drop(y_BTHV)

    def splits_heads(self, ranks):
        """Whether processes exchange heads: for documents over more than two of their slices.

        Not where somebody keeps the state, who wants all keys and values of all heads.
        """
        if self.window is not None or ranks.anyone_keeps or self.num_groups % ranks.size:
            return False
        if "documents" not in ranks.kept:
            ranks.kept["documents"] = hops_to(ranks, ranks.clock_RB)
        return ranks.kept["documents"] > 1

    def bring(self, new, sequence, state):
        """A slice: what a state would hold of the slices before.

        Args:
            new: of this slice's tokens what the state holds, by name.
            sequence: the slice.
            state: an empty one, which has it afterwards.
        """
        groups, specs = {}, self.state_specs()
        for name, spec in specs.items():
            brings = first_before if name.startswith("sink") else last_before
            groups.setdefault((brings, spec.shape[0]), []).append(name)
        for (brings, size), names in groups.items():
            tensors = brings([new[name] for name in names], sequence, size)
            for name, x_BSHK in zip(names, tensors or ()):
                dtype = specs[name].dtype if state.is_kept else None
                setattr(state, name, x_BSHK.to(dtype or x_BSHK.dtype))

    def run_groups(self, q_BTHK, k_BTHK, v_BTHV, as_sinks, sequence, state):
        """`run_pass` where training is in groups."""
        if state.keys_BWHK is not None or sequence.ranks is not None:
            before = "a state of tokens before these" if sequence.ranks is None else "slices"
            raise ValueError(
                f"training in groups (shift_groups) takes whole texts, got {before}; "
                "pass none, call model.eval(), or train_in_groups(model, None)."
            )
        clock_BT = sequence.clock.expand(q_BTHK.shape[:2]).reshape(1, -1)
        bias = self.pass_bias(clock_BT, self.shift_groups, q_BTHK)
        y_BTHV = attend_in_groups(self, q_BTHK, k_BTHK, v_BTHV, sequence, bias)
        if state.is_kept:
            self.keep(k_BTHK, v_BTHV, sequence, state)
        return y_BTHV

    def keep(self, k_BTHK, v_BTHV, sequence, state, as_sinks=None):
        """Brings the state up to date."""
        spans, dtype = row_spans(sequence), self.state_specs()["keys_BWHK"].dtype
        k_BTHK, v_BTHV = k_BTHK.to(dtype), v_BTHV.to(dtype)
        if self.window is None:
            self.make_room(k_BTHK, sequence, state)
            positions_BW = first_positions(spans.after, state.keys_BWHK.shape[1])
            gather = gather_tokens
        else:
            positions_BW, gather = ring_positions(spans.after, self.window), gather_ring
        state.keys_BWHK = gather(k_BTHK, state.keys_BWHK, positions_BW, spans)
        state.values_BWHV = gather(v_BTHV, state.values_BWHV, positions_BW, spans)
        if self.num_sinks:
            positions_BS = first_positions(spans.after, self.num_sinks)
            held = state.sink_keys_BSHK, state.sink_values_BSHV
            sink_k_BTHK = as_sinks[1].to(dtype)
            state.sink_keys_BSHK = gather_tokens(sink_k_BTHK, held[0], positions_BS, spans)
            state.sink_values_BSHV = gather_tokens(v_BTHV, held[1], positions_BS, spans)

    def make_room(self, k_BTHK, sequence, state):
        """Full attention: slots for all tokens of the longest row."""
        held, specs = state.keys_BWHK, self.state_specs()
        if sequence.cu_seqlens is None:
            more = sequence.shape[1]
        else:
            longest = int(sequence.clock_after.max())
            more = max(0, longest - (0 if held is None else held.shape[1]))
        empty_BTHK = k_BTHK.new_zeros(sequence.shape[0], 0, *k_BTHK.shape[2:])
        for name, spec in specs.items():
            if spec.shape[0] is None:
                setattr(state, name, longer(getattr(state, name), more, empty_BTHK, spec))

    def num_visible_sinks(self, clock_BT):
        """How many sinks have left the window; those inside are seen there."""
        return (clock_BT - self.window + 1).clamp(0, self.num_sinks)

    def sinks_of_documents(self, sink_q_BTHK, k_BTHK, v_BTHV, sequence, state):
        """The `Sinks` of each document, from the state and from this pass."""
        spans = document_spans(sequence)
        positions_NS = first_positions(spans.after, self.num_sinks)
        held = state.sink_keys_BSHK, state.sink_values_BSHV
        if held[0] is not None and sequence.row_of_document is not None:
            held = (x[sequence.row_of_document] for x in held)
        k_NSHK, v_NSHV = (
            gather_tokens(x, old, positions_NS, spans) for x, old in zip((k_BTHK, v_BTHV), held)
        )
        return self.sinks_seen_from(sequence.clock, sink_q_BTHK, k_NSHK, v_NSHV)

    def place_in_cache(self, clock_BT):
        """Where a token is as its layer counts: with sinks, in a cache of S of them and W others.

        It stops growing when that is full, and so does the distance to a sink.
        """
        if not self.num_sinks:
            return clock_BT
        return clock_BT.clamp(max=self.num_sinks + self.window - 1)

    def sinks_seen_from(self, clock_BT, sink_q_BTHK, k_NSHK, v_NSHV):
        """The `Sinks` of queries at these clocks."""
        place_BT, dtype = self.place_in_cache(clock_BT), accumulator_dtype(sink_q_BTHK)
        count_BT = self.num_visible_sinks(clock_BT).expand(sink_q_BTHK.shape[:2])
        sinks_S = torch.arange(self.num_sinks, device=clock_BT.device)
        distance_BTS = (place_BT[..., None] - sinks_S).clamp(min=0)
        if self.sink_distance is not None:
            distance_BTS = torch.full_like(distance_BTS, self.sink_distance)
        bias_BTSH = None
        if isinstance(self.position_bias, DistanceBias):
            bias_BTSH = self.position_bias.by_distance(distance_BTS, dtype).movedim(0, -1)
        elif self.position_bias is not None:
            bias_BTSH = self.position_bias.by_query(place_BT, distance_BTS, dtype)
        if self.log_decay is not None:
            log_decay_K = self.log_decay(clock_BT.device)
            q_factor_BTK = (place_BT[..., None] * log_decay_K).exp().to(dtype)
            k_factor_SK = (-sinks_S[:, None] * log_decay_K).exp().to(dtype)
            sink_q_BTHK = sink_q_BTHK * q_factor_BTK[:, :, None]
            k_NSHK = k_NSHK * k_factor_SK[:, None]
        return Sinks(sink_q_BTHK, k_NSHK, v_NSHV, count_BT, bias_BTSH)

    def pass_bias(self, clock_BT, num_keys, q_BTHK):
        """What positions do to the scores of a pass, as keyword arguments of `windowed_attention`.

        Args:
            clock_BT: of each query, [B or 1, T].
            num_keys: S, of all keys, of which the last are the queries' own.
            q_BTHK: queries.
        """
        bias, dtype, device = self.position_bias, accumulator_dtype(q_BTHK), q_BTHK.device
        if self.log_decay is not None:
            return {"log_decay": self.log_decay(device)}
        if bias is None:
            return {}
        size = num_keys if self.window is None else self.window
        if isinstance(bias, DistanceBias):
            return {"distance_bias": bias.below(size, dtype, device)}
        place_BT = self.place_in_cache(clock_BT)
        if bias.depends_on_distance_alone(place_BT):
            return {"distance_bias": bias.below(size, dtype, device)}

        def query_bias(rows, distance_CS):
            return bias.by_query(place_BT[:, rows], distance_CS, dtype).movedim(-1, 1)

        return {"query_bias": query_bias}

    def step_bias(self, clock_B, distance_BS, q_BTHK):
        """What positions do to the scores of a step, as keyword arguments of `attention_step`.

        Args:
            clock_B: of the query of each row.
            distance_BS: of each slot's token.
            q_BTHK: a query per row.
        """
        bias, dtype = self.position_bias, accumulator_dtype(q_BTHK)
        if self.log_decay is not None:
            return {"log_decay": self.log_decay(clock_B.device), "distance": distance_BS}
        if bias is None:
            return {}
        if isinstance(bias, DistanceBias):
            return {"slot_bias": bias.by_distance(distance_BS, dtype).transpose(0, 1)}
        bias_BSH = bias.by_query(self.place_in_cache(clock_B), distance_BS, dtype)
        return {"slot_bias": bias_BSH.transpose(1, 2)}

    def attend(self, q_BTHK, k_BSHK, v_BSHV, sinks=None, bias=None, visible_BS=None, **documents):
        """The attention itself, through the implementation that was asked for.

        Args:
            q_BTHK: queries.
            k_BSHK, v_BSHV: keys and values.
            sinks: `Sinks`, or None.
            bias: as `pass_bias` or `step_bias` say it.
            visible_BS: of a step, which keys are seen.
            documents: of a pass, its cu_seqlens or first_key.
        """
        name, bias = self.config._attn_implementation, bias or {}
        has_logits = self.sink_logits is not None
        check_implementation(name, self.num_sinks, has_logits, [self.position_type])
        settings = {"scaling": self.scale, "s_aux": self.sink_logits, "dropout": 0.0}
        if name in OUR_IMPLEMENTATIONS and visible_BS is not None:
            settings = {"scale": self.scale, "sinks": sinks, "sink_logits": self.sink_logits}
            return attention_step(q_BTHK, k_BSHK, v_BSHV, visible_BS, **settings, **bias)
        if name in OUR_IMPLEMENTATIONS:
            settings |= documents | {"sinks": sinks, "sliding_window": self.window} | bias
            settings["attention_mask"] = None
        else:
            # A state may be wider than what autocast computes in.
            k_BSHK, v_BSHV = k_BSHK.to(q_BTHK.dtype), v_BSHV.to(q_BTHK.dtype)
            bias_BHTS = None
            if "log_decay" in bias:
                bias = bias | {"steepest": xpos_steepest(self.config)}
                q_BTHK, k_BSHK = decayed(q_BTHK, k_BSHK, **bias)
            else:
                bias_BHTS = all_biases(q_BTHK.shape[1], k_BSHK.shape[1], q_BTHK.device, **bias)
            seen = {"visible_BS": visible_BS, "bias_BHTS": bias_BHTS} | documents
            settings |= mask_arguments(name, q_BTHK, k_BSHK, self.window, **seen)
        # Under our name a copy of the zoo in an exported folder, maybe an older one, registers its
        # own function: what is ours is not asked for by name.
        interface = banded_attention_forward
        if name != "banded":
            interface = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        heads_first = (x.transpose(1, 2) for x in (q_BTHK, k_BSHK, v_BSHV))
        return interface(self, *heads_first, **settings)[0]


class SoftmaxPreTrainedModel(ZooPreTrainedModel):
    """What a model with such layers tells transformers about them."""

    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def get_correct_attn_implementation(self, requested_attention, is_init_check=False):
        """The implementation that was asked for; else banded."""
        name = "banded" if requested_attention is None else requested_attention
        if getattr(self.config, "rope_extension", None) is not None:
            check_extended_implementation(name)
        return super().get_correct_attn_implementation(name, is_init_check)
