"""Sliding-window attention: a Transformer that sees the last W tokens in each layer.

Mistral 7B v0.1, Jiang et al. 2023, https://arxiv.org/abs/2310.06825. Per head, with q and k turned
by RoPE (pairs (j, j + K/2), Su et al. 2021, https://arxiv.org/abs/2104.09864) and heads of keys
and values shared by groups of query heads:

    o_i = sum_j softmax_j(q_i^T k_j / sqrt(K)) v_j   over i - W < j <= i

W keys including its own, as in transformers and in the authors' later code. The paper's wording
(i - W to i) and the prefill of the authors' first code have W + 1, their decoding has W. Over L
layers a token sees L (W - 1) + 1 tokens back. The state is what the paper calls a rolling buffer:
keys (after RoPE) and values at slot position mod W. `sliding_window=None` is full attention, the
usual Transformer, whose state grows with the text.

Attention sinks (StreamingLLM, Xiao et al. 2023, https://arxiv.org/abs/2309.17453): the first
`num_sink_tokens` S tokens of a document stay visible, with positions counted inside the cache. So a
query at position p sees a sink at j from position min(p, S + W - 1). Keys in the window need only
differences of positions, so they keep their own; for the sinks alone the query is turned a second
time. That makes it a function of the text, the same in training and in generation. Sink logits
(`learnable_sinks`) are those of gpt-oss: one per head, in the softmax's denominator only.

Weights of Mistral load through `zoo convert hf-mistral` and `zoo convert mistral-consolidated`.
"""

from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AttentionInterface
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .base import (
    Constant,
    ZooBlock,
    ZooConfig,
    ZooForCausalLM,
    ZooForSequenceClassification,
    ZooModel,
    ZooPreTrainedModel,
)
from .kernels.windowed_attention import (
    Sinks,
    attention_step,
    visible_keys,
    windowed_attention,
    windowed_attention_reference,
)
from .positions import rotate
from .state import GrowingStateLayer, SlidingStateLayer, StateSpec
from .window import (
    Past,
    document_spans,
    first_positions,
    gather_tokens,
    ring_positions,
    row_spans,
    write_slot,
)

OUR_IMPLEMENTATIONS = ("banded", "eager")
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


@strict
class SlidingWindowConfig(ZooConfig):
    """Mistral's mathematics. Defaults are those of Mistral 7B v0.1 but for its size.

    Args:
        intermediate_size: MLP width; None: 3.5 times hidden_size.
        num_key_value_heads: heads of keys and values, each shared by a group of query heads; None:
            num_attention_heads.
        head_dim: width of a head; None: hidden_size / num_attention_heads.
        hidden_act: activation of the MLP.
        rms_norm_eps: epsilon of the norms.
        initializer_range: standard deviation of matrices and embeddings at the start.
        rope_parameters: transformers' description of RoPE: rope_theta and rope_type, one of
            default, linear, dynamic, yarn, llama3 and longrope, with that one's own fields. For
            dynamic and longrope, whose angles depend on the length of the text, a token takes those
            of the text up to itself, as transformers does when it decodes token by token.
        max_position_embeddings: the length a model was trained for, which dynamic starts from, and
            others where rope_parameters does not say it. Else of no effect.
        sliding_window: W, the tokens a layer sees, the current one included; None: all.
        num_sink_tokens: S, first tokens of a document that stay visible.
        learnable_sinks: a logit per head in the softmax that stands for no token.
    """

    model_type = "zoo_sliding_window"
    layer_type: ClassVar[str] = SlidingStateLayer._layer_type
    variants: ClassVar[dict[str, dict]] = {
        "default": {"sliding_window": 16, "num_key_value_heads": 2},
        "sinks": {"sliding_window": 16, "num_key_value_heads": 2, "num_sink_tokens": 3},
        "learnable-sinks": {"sliding_window": 16, "head_dim": 10, "learnable_sinks": True},
        "full": {"sliding_window": None, "num_key_value_heads": 2},
    }

    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    rope_parameters: dict | None = None
    max_position_embeddings: int | None = None
    sliding_window: int | None = 4096
    num_sink_tokens: int = 0
    learnable_sinks: bool = False

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.hidden_size % self.num_attention_heads == 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = 7 * self.hidden_size // 2
        if self.layer_types is None and self.sliding_window is None:
            self.layer_types = [GrowingStateLayer._layer_type] * self.num_hidden_layers
        # transformers fills the rest of it in.
        self.rope_parameters = dict(self.rope_parameters or {})
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Checks heads, window and what the rotation needs to know."""
        super().validate_architecture()
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if self.head_dim is None:
            raise ValueError(
                "hidden_size is a multiple of num_attention_heads, "
                f"got {self.hidden_size} and {heads}; change one of them, or give head_dim."
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim is even (RoPE turns pairs), got {self.head_dim}.")
        if groups < 1 or heads % groups:
            raise ValueError(
                "num_attention_heads is a multiple of num_key_value_heads, "
                f"got {heads} and {groups}."
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(
                f"hidden_act is one of transformers' activations ({', '.join(sorted(ACT2FN))}), "
                f"got {self.hidden_act!r}."
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(
                "sliding_window counts the current token and is at least 1, "
                f"got {self.sliding_window}; None is full attention."
            )
        if self.num_sink_tokens < 0 or (self.num_sink_tokens and self.sliding_window is None):
            raise ValueError(
                "num_sink_tokens is at least 0, and 0 without a sliding_window (where every token "
                f"stays visible), got {self.num_sink_tokens}."
            )
        self._validate_rope_type()

    def _validate_rope_type(self):
        rope_type = self.rope_parameters.get("rope_type")
        if rope_type not in ROPE_TYPES:
            raise ValueError(
                f"rope_parameters['rope_type'] is one of {', '.join(ROPE_TYPES)}, "
                f"got {rope_type!r}."
            )
        known = self.max_position_embeddings
        if rope_type in ("yarn", "llama3", "longrope"):
            known = self.rope_parameters.get("original_max_position_embeddings")
        needs_length = rope_type in ("dynamic", "yarn", "llama3", "longrope")
        if needs_length and not (isinstance(known, int) and known > 0):
            raise ValueError(
                f"RoPE of type {rope_type} starts from the length the model was trained for, "
                f"got {known!r}; set max_position_embeddings."
            )
        if self.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError("partial_rotary_factor is 1: all of a head is turned.")


class RotaryPositions(nn.Module):
    """The angle of each position, as transformers computes it from `rope_parameters`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        self.angle = Constant(lambda: self.angles(config))
        self.scaling = 1.0
        if self.rope_type != "default":
            self.scaling = ROPE_INIT_FUNCTIONS[self.rope_type](config)[1]
        if self.rope_type == "longrope":
            self.trained_length = config.rope_parameters["original_max_position_embeddings"]
            self.long_angle = Constant(lambda: self.angles(config, self.trained_length + 1))

    @staticmethod
    def angles(config, length=None):
        """Radians per position for each pair of channels, [K / 2] in float64.

        Those of scaled rotations are transformers' float32 numbers.
        """
        rope_type = config.rope_parameters["rope_type"]
        if rope_type in ("default", "dynamic"):
            steps_K = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
            return config.rope_parameters["rope_theta"] ** -steps_K
        return ROPE_INIT_FUNCTIONS[rope_type](config, seq_len=length)[0].double()

    def forward(self, positions_BT):
        """(cos, sin) of each position, [B, T, 1, K / 2].

        A product of a position that may exceed a million with a small number: in float32 the angle
        would be off by hundredths of a radian.
        """
        angle_BTK = self.angle()
        if self.rope_type == "longrope":
            is_long_BT1 = positions_BT[..., None] >= self.trained_length
            angle_BTK = torch.where(is_long_BT1, self.long_angle(), angle_BTK)
        elif self.rope_type == "dynamic":
            angle_BTK = angle_BTK * self.dynamic_scale(positions_BT, angle_BTK.dtype)
        radians_BTK = positions_BT[..., None] * angle_BTK
        cos_BTK, sin_BTK = radians_BTK.cos() * self.scaling, radians_BTK.sin() * self.scaling
        return cos_BTK[:, :, None], sin_BTK[:, :, None]

    def dynamic_scale(self, positions_BT, dtype):
        """What a base that grows with the length of the text makes of each angle, [B, T, K / 2]."""
        dim, factor = self.config.head_dim, self.config.rope_parameters["factor"]
        trained = self.config.max_position_embeddings
        length_BT1 = (positions_BT[..., None] + 1).clamp(min=trained).to(dtype)
        growth_BT1 = (factor * length_BT1 / trained - (factor - 1)) ** (dim / (dim - 2))
        steps_K = torch.arange(0, dim, 2, device=positions_BT.device, dtype=dtype) / dim
        return growth_BT1**-steps_K


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
    **settings,
):
    if attention_mask is not None:
        raise ValueError(
            "this attention takes documents, not a mask; attn_implementation='banded' is for the "
            "zoo's sliding_window alone."
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
    )
    return o_BTHV, None


def check_implementation(config, name):
    """Raises a ValueError if an attention implementation cannot compute what a config asks for."""
    if name in OUR_IMPLEMENTATIONS:
        return
    if config.num_sink_tokens:
        raise ValueError(
            f"attn_implementation={name!r} cannot turn a query a second time, as "
            f"num_sink_tokens = {config.num_sink_tokens} needs; use 'banded' or 'eager'."
        )
    if config.learnable_sinks and name != "flex_attention":
        raise ValueError(
            f"attn_implementation={name!r} has no logits without a value (learnable_sinks); "
            "use 'banded', 'eager' or, on a GPU, 'flex_attention'."
        )


def mask_arguments(name, q_BTHK, k_BSHK, window, cu_seqlens=None, first_key=None, visible_BS=None):
    """Which keys are visible, in the terms of one of transformers' attention functions.

    Args:
        name: of the implementation.
        q_BTHK: queries.
        k_BSHK: keys.
        window: W or None.
        cu_seqlens, first_key: as of `windowed_attention`.
        visible_BS: instead of all these, for one query per row, bool.

    Returns:
        Its keyword arguments.
    """
    length, num_keys, device = q_BTHK.shape[1], k_BSHK.shape[1], q_BTHK.device
    if name.startswith("flash"):
        if visible_BS is not None:
            return {"attention_mask": visible_BS.long()}
        arguments = {"attention_mask": None, "sliding_window": window}
        if first_key is not None:
            keys_S = torch.arange(num_keys, device=device)
            arguments["attention_mask"] = (keys_S >= first_key[:, None]).long()
        if cu_seqlens is not None:
            bounds, longest = cu_seqlens.int(), int(cu_seqlens.diff().max())
            for side in "qk":
                arguments |= {f"cu_seq_lens_{side}": bounds, f"max_length_{side}": longest}
        return arguments
    if visible_BS is not None:
        visible_BTS = visible_BS[:, None]
    else:
        documents = {"cu_seqlens": cu_seqlens, "first_key": first_key}
        visible_BTS = visible_keys(length, num_keys, window, **documents, device=device)
    if name == "flex_attention":
        visible_BTS = visible_BTS.expand(len(q_BTHK), -1, -1)
        sizes = len(q_BTHK), None, length, num_keys
        mask = create_block_mask(lambda b, h, i, j: visible_BTS[b, i, j], *sizes, device=device)
        return {"attention_mask": mask}
    is_plain = visible_BS is None and cu_seqlens is None and first_key is None
    if is_plain and length == num_keys <= (window or num_keys):
        return {"attention_mask": None}  # causal, which they are by themselves, and faster
    return {"attention_mask": visible_BTS[:, None]}


def longer(held_BSHK, more, like_BTHK, spec):
    """A state with that many more slots, of zeros; held None: with these alone."""
    shape = len(like_BTHK), more, *like_BTHK.shape[2:]
    zeros_BSHK = like_BTHK.new_zeros(shape, dtype=spec.dtype)
    return zeros_BSHK if held_BSHK is None else torch.cat([held_BSHK, zeros_BSHK], dim=1)


class SlidingWindowAttention(nn.Module):
    """Attention over a window and, if the config has them, sinks."""

    is_causal = True

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.window, self.num_sinks = config.sliding_window, config.num_sink_tokens
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.num_groups = config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_groups
        width = config.hidden_size
        self.q_proj = nn.Linear(width, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, self.num_groups * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, self.num_groups * self.head_dim, bias=False)
        self.out_proj = nn.Linear(self.num_heads * self.head_dim, width, bias=False)
        self.sink_logits = None
        if config.learnable_sinks:
            self.sink_logits = nn.Parameter(torch.empty(self.num_heads))

    def init_weights_of_paper(self):
        """Sink logits as gpt-oss; matrices as transformers does for any linear layer."""
        if self.sink_logits is not None:
            init.normal_(self.sink_logits, std=self.config.initializer_range)

    def state_specs(self):
        """Keys and values in a ring of W slots, or one per token, and those of S sinks.

        In the dtype of the weights, which is that of a key before it is stored.
        """
        weight = self.k_proj.weight
        dtype = weight.dtype if weight.is_floating_point() else None
        sizes = {"keys_BWHK": self.window, "values_BWHV": self.window}
        if self.num_sinks:
            sizes |= {"sink_keys_BSHK": self.num_sinks, "sink_values_BSHV": self.num_sinks}
        shape = (self.num_groups, self.head_dim)
        return {name: StateSpec((size, *shape), dtype=dtype) for name, size in sizes.items()}

    def forward(self, x_BTD, sequence, state, rotation, sink_rotation=None):
        """Mixes a sequence [B, T, D]; returns it with the state after it."""
        q_BTHK = self.q_proj(x_BTD).unflatten(-1, (self.num_heads, self.head_dim))
        k_BTHK = self.k_proj(x_BTD).unflatten(-1, (self.num_groups, self.head_dim))
        v_BTHV = self.v_proj(x_BTD).unflatten(-1, (self.num_groups, self.head_dim))
        sink_q_BTHK = None if sink_rotation is None else rotate(q_BTHK, *sink_rotation)
        q_BTHK, k_BTHK = rotate(q_BTHK, *rotation), rotate(k_BTHK, *rotation)
        is_step = x_BTD.shape[1] == 1 and sequence.cu_seqlens is None and state.is_kept
        run = self.run_step if is_step else self.run_pass
        y_BTHV = run(q_BTHK, k_BTHK, v_BTHV, sink_q_BTHK, sequence, state)
        return self.out_proj(y_BTHV.flatten(2)), state

    def run_step(self, q_BTHK, k_BTHK, v_BTHV, sink_q_BTHK, sequence, state):
        """One token per row: writes its slot, and looks at all that are filled, in any order."""
        clock_B = sequence.clock[:, 0].expand(len(q_BTHK))
        specs = self.state_specs()
        new = {"keys": k_BTHK, "sink_keys": k_BTHK, "values": v_BTHV, "sink_values": v_BTHV}
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
            sinks = state.sink_keys_BSHK, state.sink_values_BSHV
            sinks = Sinks(sink_q_BTHK, *sinks, self.num_visible_sinks(clock_B[:, None]))
        visible_BS = slots_W <= clock_B[:, None]
        return self.attend(q_BTHK, keys_BWHK, values_BWHV, sinks, visible_BS=visible_BS)

    def run_pass(self, q_BTHK, k_BTHK, v_BTHV, sink_q_BTHK, sequence, state):
        """Any number of tokens, dense or packed, after what the state holds."""
        documents, sinks = {"cu_seqlens": sequence.cu_seqlens}, None
        if self.num_sinks:
            sinks = self.sinks_of_documents(k_BTHK, v_BTHV, sink_q_BTHK, sequence, state)
        past, keys_BSHK, values_BSHV = None, k_BTHK, v_BTHV
        if state.keys_BWHK is not None:
            size = state.keys_BWHK.shape[1] if self.window is None else self.window - 1
            past = Past(sequence, state.keys_BWHK, size)
            documents = {"cu_seqlens": past.cu_seqlens, "first_key": past.first_key}
            keys_BSHK = past.put_before(k_BTHK, state.keys_BWHK)
            values_BSHV = past.put_before(v_BTHV, state.values_BWHV)
            q_BTHK = past.pick(q_BTHK)
            if sinks is not None:
                sinks = sinks._replace(q=past.pick(sinks.q), count=past.pick(sinks.count))
        y_BTHV = self.attend(q_BTHK, keys_BSHK, values_BSHV, sinks, **documents)
        if state.is_kept:
            self.keep(k_BTHK, v_BTHV, sequence, state)
        return y_BTHV if past is None else past.drop(y_BTHV)

    def keep(self, k_BTHK, v_BTHV, sequence, state):
        """Brings the state up to date."""
        spans, dtype = row_spans(sequence), self.state_specs()["keys_BWHK"].dtype
        k_BTHK, v_BTHV = k_BTHK.to(dtype), v_BTHV.to(dtype)
        if self.window is None:
            self.make_room(k_BTHK, sequence, state)
            positions_BW = first_positions(spans.after, state.keys_BWHK.shape[1])
        else:
            positions_BW = ring_positions(spans.after, self.window)
        state.keys_BWHK = gather_tokens(k_BTHK, state.keys_BWHK, positions_BW, spans)
        state.values_BWHV = gather_tokens(v_BTHV, state.values_BWHV, positions_BW, spans)
        if self.num_sinks:
            positions_BS = first_positions(spans.after, self.num_sinks)
            held = state.sink_keys_BSHK, state.sink_values_BSHV
            state.sink_keys_BSHK = gather_tokens(k_BTHK, held[0], positions_BS, spans)
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
            setattr(state, name, longer(getattr(state, name), more, empty_BTHK, spec))

    def num_visible_sinks(self, clock_BT):
        """How many sinks have left the window; those inside are seen there."""
        return (clock_BT - self.window + 1).clamp(0, self.num_sinks)

    def sinks_of_documents(self, k_BTHK, v_BTHV, sink_q_BTHK, sequence, state):
        """The `Sinks` of each document, from the state and from this pass."""
        spans = document_spans(sequence)
        positions_NS = first_positions(spans.after, self.num_sinks)
        held = state.sink_keys_BSHK, state.sink_values_BSHV
        if held[0] is not None and sequence.row_of_document is not None:
            held = (x[sequence.row_of_document] for x in held)
        k_NSHK, v_NSHV = (
            gather_tokens(x, old, positions_NS, spans) for x, old in zip((k_BTHK, v_BTHV), held)
        )
        count_BT = self.num_visible_sinks(sequence.clock).expand(sink_q_BTHK.shape[:2])
        return Sinks(sink_q_BTHK, k_NSHK, v_NSHV, count_BT)

    def attend(self, q_BTHK, k_BSHK, v_BSHV, sinks=None, visible_BS=None, **documents):
        """The attention itself, through the implementation that was asked for."""
        name = self.config._attn_implementation
        check_implementation(self.config, name)
        settings = {"scaling": self.head_dim**-0.5, "s_aux": self.sink_logits, "dropout": 0.0}
        if name in OUR_IMPLEMENTATIONS and visible_BS is not None:
            return attention_step(
                q_BTHK, k_BSHK, v_BSHV, visible_BS, sinks=sinks, sink_logits=self.sink_logits
            )
        if name in OUR_IMPLEMENTATIONS:
            settings |= documents | {"sinks": sinks, "sliding_window": self.window}
            settings["attention_mask"] = None
        else:
            # A state may be wider than what autocast computes in.
            k_BSHK, v_BSHV = k_BSHK.to(q_BTHK.dtype), v_BSHV.to(q_BTHK.dtype)
            settings |= mask_arguments(
                name, q_BTHK, k_BSHK, self.window, visible_BS=visible_BS, **documents
            )
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        heads_first = (x.transpose(1, 2) for x in (q_BTHK, k_BSHK, v_BSHV))
        return interface(self, *heads_first, **settings)[0]


class MLP(nn.Module):
    """SwiGLU: down(act(gate x) * up x)."""

    def __init__(self, config):
        super().__init__()
        width = config.intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x_BTD):
        """[B, T, D] to the same."""
        return self.down_proj(self.act(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class SlidingWindowBlock(ZooBlock):
    """Mistral's block."""

    mixer_class = SlidingWindowAttention
    mlp_class = MLP


class SlidingWindowPreTrainedModel(ZooPreTrainedModel):
    """Mistral's config and layers for transformers."""

    config: SlidingWindowConfig
    _no_split_modules = ["SlidingWindowBlock"]
    _can_record_outputs = {"hidden_states": SlidingWindowBlock}
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def get_correct_attn_implementation(self, requested_attention, is_init_check=False):
        """The implementation that was asked for, if it can compute this model; else banded."""
        name = "banded" if requested_attention is None else requested_attention
        check_implementation(self.config, name)
        return super().get_correct_attn_implementation(name, is_init_check)


class SlidingWindowModel(SlidingWindowPreTrainedModel, ZooModel):
    """Mistral's decoder."""

    block_class = SlidingWindowBlock

    def __init__(self, config):
        super().__init__(config)
        self.rotation = RotaryPositions(config)
        self.post_init()

    def mixer_inputs(self, x_BTD, sequence):
        """The rotation of each position, and that of a query for the sinks, the same in all layers.

        A query's distance to a sink stops growing when the cache is full of S sinks and W others.
        """
        inputs = {"rotation": self.rotation(sequence.positions)}
        if self.config.num_sink_tokens:
            largest = self.config.num_sink_tokens + self.config.sliding_window - 1
            excess_BT = (sequence.clock - largest).clamp(min=0)
            inputs["sink_rotation"] = self.rotation(sequence.positions - excess_BT)
        return inputs


class SlidingWindowForCausalLM(SlidingWindowPreTrainedModel, ZooForCausalLM):
    """A sliding-window Transformer as a language model."""

    model_class = SlidingWindowModel

    @property
    def receptive_field(self):
        """How many tokens up to its own a logit depends on; None: all."""
        if self.config.sliding_window is None:
            return None
        return self.config.num_hidden_layers * (self.config.sliding_window - 1) + 1

    @property
    def num_permanent_tokens(self):
        """How many of a document's first tokens every logit depends on, however far."""
        return self.config.num_sink_tokens


class SlidingWindowForSequenceClassification(
    SlidingWindowPreTrainedModel, ZooForSequenceClassification
):
    """A sliding-window Transformer as a classifier."""

    model_class = SlidingWindowModel
