"""Infini-Transformer: attention inside a segment, and a memory of all segments before it.

Munkhdalai, Faruqui and Gopal 2024, "Leave No Context Behind", https://arxiv.org/abs/2404.07143.
A document is cut into segments of L tokens, counted from its own start. With sigma(x) = ELU(x) + 1,
per head, for segment s with queries, keys and values Q, K, V:

    A_local = softmax(RoPE(Q) RoPE(K)^T / sqrt(K), causal) V    positions restart in every segment
    A_mem   = sigma(Q) M_{s-1} / (sigma(Q) z_{s-1})             equation 7: read before written
    M_s     = M_{s-1} + sigma(K)^T V                            equation 8, "linear"
    M_s     = M_{s-1} + sigma(K)^T (V - sigma(K) M_{s-1} / (sigma(K) z_{s-1}))    9, "delta"
    z_s     = z_{s-1} + sum_n sigma(K_n)
    A       = sigmoid(g) A_mem + (1 - sigmoid(g)) A_local       equation 10, g learned per head

The memory sees no positions. In the first segment it is empty and reads as 0; the local part is
scaled by 1 - sigmoid(g) there too. The authors published no code; this follows their equations,
with sqrt(K), the width of a head, where equation 6 prints that of the model. Gradients flow through
the memory, as the paper trains. Around the attention is Llama's block, as in Beomi's public code,
whose weights load through `zoo convert infini-beomi`; those of lucidrains' package through
`infini-lucidrains`. Grouped queries read the memory of their own keys' head, which Beomi's code
mixes up.

The state of a layer: the memory with z as one more column, the same sums over the tokens of the
unfinished segment, and that segment's keys (after RoPE) and values.

What we found (recipes/passkey.py: five digits to be found again; two layers, 1.06 million
parameters, segments of 16 tokens, trained for 1,000 steps on documents of 8 segments; three seeds;
keys two segments back and more): the linear memory finds all five digits in 75% of documents of
that length (by seed 100, 24 and 100%), in 58% of twice that length and in 2% of four times. Without
the memory it is 0% in each. Gates learnt ten times as fast as the rest, and came from 0.50 to 0.79;
at the common rate to 0.53, and it is 40% (12, 9 and 99%). With the delta update it is 39% (18, 96
and 2%). Most seeds that had not got there ended near the loss of four known digits and a guess. So
gates that learn no faster than the rest use the memory late, and more compressions than in training
are what it does not stand: z grows with every segment, and what filler adds to the sums with it.
"""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import GenerationMixin
from transformers import initialization as init

from ..core.base import (
    ZooBlock,
    ZooConfig,
    ZooForCausalLM,
    ZooForSequenceClassification,
    ZooModel,
    ZooPreTrainedModel,
    check_activation,
    check_head_dim,
)
from ..core.segments import SegmentGrid, documents_to_rows
from ..core.state import SlidingStateLayer, StateSpec, dtype_of
from ..core.window import gather_ring, ring_positions, row_spans, write_slot
from ..kernels.export_scan import scan, without_autocast
from ..kernels.windowed_attention import attention_step
from ..layers.mlp import GatedMLP
from ..layers.positions import RotaryPositions, check_rope_parameters, rotate
from ..layers.softmax_attention import check_key_value_heads

# A memory that no key has been like reads as 0, not as 0 / 0.
SMALLEST_DENOMINATOR = 1e-10


@strict
class InfiniConfig(ZooConfig):
    """The mathematics of Infini-attention in a block like Llama's.

    Args:
        intermediate_size: MLP width; None: 4 times hidden_size, as in the paper.
        num_key_value_heads: heads of keys, values and memory, each shared by a group of query
            heads; None: num_attention_heads.
        head_dim: width of a head; None: hidden_size / num_attention_heads.
        segment_length: L, tokens per segment.
        memory_update: "linear" (equation 8), "delta" (equation 9), or "none": local attention
            alone, the same model with the memory off.
        gates_first_segment: whether the local part is scaled by 1 - sigmoid(g) while the memory is
            still empty; the paper does not exempt it, lucidrains' package does.
        learned_update: scale what a token writes by a learned 1 - sigmoid(w . x) per head, an
            addition of lucidrains' package.
        gate_init: g at the start. 0, an even mixture, in Beomi's code.
        hidden_act: activation of the MLP's gate.
        mlp_bias: biases in the MLP.
        lm_head_bias: a bias on the logits.
        rms_norm_eps: epsilon of the norms.
        norm_adds_one: norms multiply with 1 + weight (Gemma).
        scale_embedding: embeddings times sqrt(hidden_size) (Gemma).
        rope_parameters: as in `SlidingWindowConfig`; positions count from the start of a segment.
        max_position_embeddings: as in `SlidingWindowConfig`.
        initializer_range: standard deviation of matrices and embeddings at the start.
    """

    model_type = "zoo_infini"
    layer_type: ClassVar[str] = SlidingStateLayer._layer_type
    variants: ClassVar[dict[str, dict]] = {
        "linear": {"segment_length": 16, "num_key_value_heads": 2},
        "delta": {"segment_length": 16, "memory_update": "delta"},
        "none": {"segment_length": 16, "memory_update": "none"},
        "lucidrains": {
            "segment_length": 16,
            "memory_update": "delta",
            "gates_first_segment": False,
            "learned_update": True,
            "gate_init": -10.0,
            "hidden_act": "gelu",
            "mlp_bias": True,
            "lm_head_bias": True,
        },
        "gemma": {
            "segment_length": 16,
            "num_key_value_heads": 1,
            "head_dim": 20,
            "hidden_act": "gelu_pytorch_tanh",
            "norm_adds_one": True,
            "scale_embedding": True,
            "tie_word_embeddings": True,
        },
    }

    num_key_value_heads: int | None = None
    head_dim: int | None = None
    segment_length: int = 2048
    memory_update: Literal["linear", "delta", "none"] = "linear"
    gates_first_segment: bool = True
    learned_update: bool = False
    gate_init: float = 0.0
    hidden_act: str = "silu"
    mlp_bias: bool = False
    lm_head_bias: bool = False
    rms_norm_eps: float = 1e-6
    norm_adds_one: bool = False
    scale_embedding: bool = False
    rope_parameters: dict | None = None
    max_position_embeddings: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.hidden_size % self.num_attention_heads == 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        # transformers fills the rest of it in.
        self.rope_parameters = dict(self.rope_parameters or {})
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Checks heads, segment and what the rotation needs to know."""
        super().validate_architecture()
        check_head_dim(self)
        if self.segment_length < 1:
            raise ValueError(f"segment_length is at least 1, got {self.segment_length}.")
        if self.memory_update == "none" and (self.learned_update or not self.gates_first_segment):
            raise ValueError(
                "learned_update and gates_first_segment are about the memory, and memory_update is "
                "'none'; leave them out."
            )
        check_activation("hidden_act", self.hidden_act)
        check_key_value_heads(self)
        check_rope_parameters(self)


def feature_map(x):
    """sigma(x) = ELU(x) + 1, which is x + 1 or exp(x), above 0; in float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def read_memory(q_SHQK, memory_SHKV):
    """Equation 7: [S, H, Q, V] from features [S, H, Q, K] and a memory [S, H, K, V + 1].

    The last column of a memory is z.
    """
    read_SHQV = q_SHQK @ memory_SHKV
    return read_SHQV[..., :-1] / read_SHQV[..., -1:].clamp(min=SMALLEST_DENOMINATOR)


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


def write_segment(held_NHKV, partial_NHKV, k_NHQK, v_NHQV, is_complete_N, strength_NHQ1=None):
    """Equation 9 for a segment's tokens: the memory and the sums of an unfinished segment after it.

    Args:
        held_NHKV: the memory before the segment.
        partial_NHKV: the sums of its tokens in earlier passes.
        k_NHQK, v_NHQV, strength_NHQ1: as of `update_of`.
        is_complete_N: whether these tokens complete the segment.
    """
    partial_NHKV = partial_NHKV + update_of(k_NHQK, v_NHQV, held_NHKV, strength_NHQ1)
    is_complete = is_complete_N[:, None, None, None]
    after_NHKV = torch.where(is_complete, held_NHKV + partial_NHKV, held_NHKV)
    return after_NHKV, torch.where(is_complete, 0, partial_NHKV)


class InfiniAttention(nn.Module):
    """Causal attention in the segment and a compressive memory, mixed by a gate per head.

    Attributes:
        detaches_memory: whether gradients stop at segments' ends, as in Beomi's code. How to train,
            not part of the model: set it on the instance.
    """

    detaches_memory = False

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.length = config, config.segment_length
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.num_groups = config.num_key_value_heads
        width, size = config.hidden_size, self.num_heads * self.head_dim
        self.q_proj = nn.Linear(width, size, bias=False)
        self.k_proj = nn.Linear(width, self.num_groups * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, self.num_groups * self.head_dim, bias=False)
        self.out_proj = nn.Linear(size, width, bias=False)
        self.has_memory = config.memory_update != "none"
        if self.has_memory:
            self.gate = nn.Parameter(torch.empty(self.num_heads))
        if config.learned_update:
            self.update_proj = nn.Linear(width, self.num_groups, bias=False)

    def init_weights_of_paper(self):
        """The gate; matrices as transformers does for any linear layer."""
        if self.has_memory:
            init.constant_(self.gate, self.config.gate_init)

    def state_specs(self):
        """Memory and unfinished segment."""
        dtype = dtype_of(self.k_proj)
        slots = StateSpec((self.length, self.num_groups, self.head_dim), dtype=dtype)
        specs = {"keys_BLHK": slots, "values_BLHV": slots}
        if self.has_memory:
            memory = StateSpec((self.num_groups, self.head_dim, self.head_dim + 1))
            specs |= {"memory_BHKV": memory, "partial_BHKV": memory}
        return specs

    def forward(self, x_BTD, sequence, state, rotation):
        """Mixes a sequence [B, T, D]; returns it with the state after it."""
        q_BTHK = self.q_proj(x_BTD).unflatten(-1, (self.num_heads, self.head_dim))
        k_BTHK = self.k_proj(x_BTD).unflatten(-1, (self.num_groups, self.head_dim))
        v_BTHV = self.v_proj(x_BTD).unflatten(-1, (self.num_groups, self.head_dim))
        strength_BTH = None
        if self.config.learned_update:
            strength_BTH = 1 - self.update_proj(x_BTD).sigmoid()
        is_step = x_BTD.shape[1] == 1 and sequence.cu_seqlens is None and state.is_kept
        run = self.run_step if is_step else self.run_pass
        y_BTHV = run(q_BTHK, k_BTHK, v_BTHV, strength_BTH, rotation, sequence, state)
        if strength_BTH is not None and torch.is_grad_enabled():
            # Where no segment is read again, a gradient of zero: training on several devices waits
            # for one of every parameter.
            y_BTHV = y_BTHV + 0 * strength_BTH.sum().to(y_BTHV.dtype)
        return self.out_proj(y_BTHV.flatten(2)), state

    def run_pass(self, q_BTHK, k_BTHK, v_BTHV, strength_BTH, rotation, sequence, state):
        """Any number of tokens, all segments at once."""
        grid = SegmentGrid(sequence, self.length, is_fresh=state.keys_BLHK is None)
        turned_k_BTHK = rotate(k_BTHK, *rotation)
        held = (grid.rows_to_documents(x) for x in (state.keys_BLHK, state.values_BLHV))
        keys_SLHK, values_SLHV = (
            grid.keys(x, old) for x, old in zip((turned_k_BTHK, v_BTHV), held, strict=True)
        )
        visible_SQL = grid.visible()
        y_SHQV = F.scaled_dot_product_attention(
            grid.queries(rotate(q_BTHK, *rotation)).transpose(1, 2),
            keys_SLHK.transpose(1, 2),
            values_SLHV.transpose(1, 2),
            attn_mask=None if visible_SQL is None else visible_SQL[:, None],
            is_causal=visible_SQL is None,
            enable_gqa=self.num_groups < self.num_heads,
        )
        if self.has_memory:
            with without_autocast(q_BTHK):
                memory_SHKV, after, partial = self.pass_over_memory(
                    k_BTHK, v_BTHV, strength_BTH, grid, state
                )
                recalled_SHQV = self.recall(grid.queries(q_BTHK), memory_SHKV)
            is_first_S = (grid.begin == 0)[:, None, None, None]
            y_SHQV = self.mix(recalled_SHQV, y_SHQV, is_first_S)
        if state.is_kept:
            if self.has_memory:
                state.memory_BHKV = documents_to_rows(after, state.memory_BHKV, sequence)
                state.partial_BHKV = documents_to_rows(partial, state.partial_BHKV, sequence)
            spans, dtype = row_spans(sequence), self.state_specs()["keys_BLHK"].dtype
            # A ring, as decoding leaves it: behind the unfinished segment lies the one before.
            number_BL = ring_positions(spans.after, self.length)
            for name, x_BTHK in (("keys_BLHK", turned_k_BTHK), ("values_BLHV", v_BTHV)):
                held_BLHK = gather_ring(x_BTHK.to(dtype), getattr(state, name), number_BL, spans)
                setattr(state, name, held_BLHK)
        return grid.join(y_SHQV.transpose(1, 2))

    def pass_over_memory(self, k_BTHK, v_BTHV, strength_BTH, grid, state):
        """(The memory that each segment reads [S, ...], of each document after the pass [N, ...],
        and the sums of its unfinished segment)."""
        k_SHQK = feature_map(grid.queries(k_BTHK)).transpose(1, 2)
        v_SHQV = grid.queries(v_BTHV).transpose(1, 2).to(k_SHQK.dtype)
        is_new_SQ = torch.arange(grid.num_queries, device=k_SHQK.device) < grid.count[:, None]
        k_SHQK = torch.where(is_new_SQ[:, None, :, None], k_SHQK, 0)
        strength_SHQ1 = None
        if strength_BTH is not None:
            strength_SHQ1 = grid.queries(strength_BTH).mT[..., None].to(k_SHQK.dtype)
        held_N, partial_N = (
            grid.rows_to_documents(x) for x in (state.memory_BHKV, state.partial_BHKV)
        )
        if held_N is None:
            num_documents = grid.first_row.shape[0]
            shape = num_documents, self.num_groups, self.head_dim, self.head_dim + 1
            held_N = partial_N = k_SHQK.new_zeros(shape)
        run = self.pass_delta if self.config.memory_update == "delta" else self.pass_linear
        return run(k_SHQK, v_SHQV, strength_SHQ1, held_N, partial_N, grid)

    def pass_linear(self, k_SHQK, v_SHQV, strength_SHQ1, held_N, partial_N, grid):
        """Sums of whole segments, without a loop over them."""
        update_SHKV = update_of(k_SHQK, v_SHQV, strength_SHQ1=strength_SHQ1)
        is_first_S = (grid.rank == 0)[:, None, None, None]
        update_SHKV = update_SHKV + torch.where(is_first_S, partial_N[grid.document], 0)
        memory_SHKV = held_N[grid.document] + grid.sums_before(update_SHKV)
        is_complete_N = grid.last(grid.is_complete)[:, None, None, None]
        before_N, update_N = grid.last(memory_SHKV), grid.last(update_SHKV)
        after_N = torch.where(is_complete_N, before_N + update_N, before_N)
        return memory_SHKV, after_N, torch.where(is_complete_N, 0, update_N)

    def pass_delta(self, k_SHQK, v_SHQV, strength_SHQ1, held_N, partial_N, grid):
        """One segment after the other: what each writes depends on what it finds."""
        if torch.compiler.is_exporting():
            return self.scan_delta(k_SHQK, v_SHQV, strength_SHQ1, held_N, partial_N, grid)
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

    def scan_delta(self, k_SHQK, v_SHQV, strength_SHQ1, held_N, partial_N, grid):
        """`pass_delta` in a program that is being exported, for any number of segments."""

        def step(state, *tokens):
            held_N, partial_N = state
            return write_segment(held_N, partial_N, *tokens), (held_N.clone(),)

        parts = [k_SHQK, v_SHQV, grid.is_complete]
        parts += [] if strength_SHQ1 is None else [strength_SHQ1]
        state = held_N, partial_N.clone()
        (after, partial), (memories,) = scan(step, state, *map(grid.stacked, parts))
        return grid.unstacked(memories), after, partial

    def recall(self, q_SQHK, memory_SHKV):
        """A_mem of each query, [S, H, Q, V]."""
        if self.detaches_memory:
            memory_SHKV = memory_SHKV.detach()
        q_SHQK = feature_map(q_SQHK).transpose(1, 2)
        groups = self.num_groups, self.num_heads // self.num_groups
        q_SGQK = q_SHQK.unflatten(1, groups).flatten(2, 3)  # a group's heads, one after the other
        recalled_SGQV = read_memory(q_SGQK, memory_SHKV)
        return recalled_SGQV.unflatten(2, (groups[1], -1)).flatten(1, 2)

    def mix(self, recalled_SHQV, local_SHQV, is_first_S):
        """Equation 10."""
        share_H11 = self.gate.sigmoid()[:, None, None].to(recalled_SHQV.dtype)
        kept_H11 = 1 - share_H11
        if not self.config.gates_first_segment:
            kept_H11 = torch.where(is_first_S, 1.0, kept_H11)
        mixed_SHQV = share_H11 * recalled_SHQV + kept_H11 * local_SHQV
        return mixed_SHQV.to(local_SHQV.dtype)

    def run_step(self, q_BTHK, k_BTHK, v_BTHV, strength_BTH, rotation, sequence, state):
        """One token per row."""
        batch = q_BTHK.shape[0]
        clock_B = sequence.clock[:, 0].expand(batch)
        slot_B, specs = clock_B % self.length, self.state_specs()
        for name, spec in specs.items():
            if getattr(state, name) is None:
                dtype = spec.dtype or feature_map(q_BTHK[:0]).dtype
                setattr(state, name, q_BTHK.new_zeros(batch, *spec.shape, dtype=dtype))
        new = {"keys_BLHK": rotate(k_BTHK, *rotation), "values_BLHV": v_BTHV}
        for name, x_BTHK in new.items():
            slots = slot_B, sequence.keep, state.may_overwrite
            setattr(state, name, write_slot(getattr(state, name), x_BTHK[:, 0], *slots))
        visible_BL = torch.arange(self.length, device=slot_B.device) <= slot_B[:, None]
        y_BTHV = attention_step(
            rotate(q_BTHK, *rotation), state.keys_BLHK, state.values_BLHV, visible_BL
        )
        if not self.has_memory:
            return y_BTHV
        with without_autocast(q_BTHK):
            memory_BHKV = state.memory_BHKV
            recalled_BHTV = self.recall(q_BTHK, memory_BHKV)
            k_BHTK = feature_map(k_BTHK).transpose(1, 2)
            strength_BHT1 = None if strength_BTH is None else strength_BTH.mT[..., None]
            is_delta = self.config.memory_update == "delta"
            partial_BHKV = state.partial_BHKV + update_of(
                k_BHTK,
                v_BTHV.transpose(1, 2).to(k_BHTK.dtype),
                memory_BHKV if is_delta else None,
                strength_BHT1,
            )
        is_written_B = torch.ones_like(slot_B, dtype=torch.bool)
        if sequence.keep is not None:
            is_written_B = sequence.keep
        is_complete_B = is_written_B & (slot_B == self.length - 1)
        is_written, is_complete = (x[:, None, None, None] for x in (is_written_B, is_complete_B))
        state.memory_BHKV = torch.where(is_complete, memory_BHKV + partial_BHKV, memory_BHKV)
        partial_BHKV = torch.where(is_written, partial_BHKV, state.partial_BHKV)
        state.partial_BHKV = torch.where(is_complete, 0, partial_BHKV)
        is_first = (clock_B < self.length)[:, None, None, None]
        y_BHTV = self.mix(recalled_BHTV, y_BTHV.transpose(1, 2), is_first)
        return y_BHTV.transpose(1, 2)


class GemmaNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) (1 + weight)."""

    def init_weights_of_paper(self):
        """The weight at 0."""
        init.zeros_(self.weight)

    def forward(self, x_BTD):
        """[B, T, D] to the same; in float32 at least, as 16 bits would round 1 + weight."""
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        weight = 1 + self.weight.to(dtype)
        normed_BTD = F.rms_norm(x_BTD.to(dtype), self.normalized_shape, weight, self.eps)
        return normed_BTD.to(x_BTD.dtype)


def build_norm(config):
    """The norm of this model."""
    norm_class = GemmaNorm if config.norm_adds_one else nn.RMSNorm
    return norm_class(config.hidden_size, eps=config.rms_norm_eps)


class InfiniBlock(ZooBlock):
    """Llama's block around Infini-attention."""

    mixer_class = InfiniAttention
    build_norm = staticmethod(build_norm)

    @staticmethod
    def mlp_class(config):
        """SwiGLU, or what hidden_act says."""
        return GatedMLP(config, bias=config.mlp_bias)


class InfiniPreTrainedModel(ZooPreTrainedModel):
    """The config and layers for transformers."""

    config: InfiniConfig
    _no_split_modules = ["InfiniBlock"]
    _can_record_outputs = {"hidden_states": InfiniBlock}


class InfiniModel(InfiniPreTrainedModel, ZooModel):
    """The decoder."""

    block_class = InfiniBlock
    build_norm = staticmethod(build_norm)

    def __init__(self, config):
        super().__init__(config)
        self.rotation = RotaryPositions(config)
        self.post_init()

    def mixer_inputs(self, x_BTD, sequence):
        """The rotation of each token by its place in its segment."""
        return {"rotation": self.rotation(sequence.clock % self.config.segment_length)}

    def embed(self, embeds_BTD, sequence):
        """The scale of the embeddings."""
        return embeds_BTD * (self.config.hidden_size**0.5 if self.config.scale_embedding else 1.0)


class InfiniForCausalLM(InfiniPreTrainedModel, ZooForCausalLM, GenerationMixin):
    """Infini-Transformer as a language model."""

    model_class = InfiniModel

    def __init__(self, config):
        super().__init__(config)
        if config.lm_head_bias:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
            self.post_init()

    def visible_tokens(self, length):
        """Of so many tokens, those the last one's logits depend on, [length] bool."""
        segment = self.config.segment_length
        begin = (length - 1) // segment * segment if self.config.memory_update == "none" else 0
        return torch.arange(length) >= begin

    @torch.no_grad()
    def diagnostics(self, past_key_values=None):
        """What to watch in training: the memory's share in each layer, and how full it is.

        Args:
            past_key_values: a cache after some text; None: gates alone.

        Returns:
            Name -> number: least, mean and largest sigmoid(g) over all heads, and per layer the
            largest norm of a head's memory per z, that is of the values it recalls.
        """
        if self.config.memory_update == "none":
            return {}
        share_LH = torch.stack([layer.mixer.gate.float().sigmoid() for layer in self.model.layers])
        figures = {
            "gate/least": share_LH.min().item(),
            "gate/mean": share_LH.mean().item(),
            "gate/largest": share_LH.max().item(),
        }
        if past_key_values is not None:
            for index, layer in enumerate(past_key_values.layers):
                memory_BHKV = layer.tensors["memory_BHKV"]
                norm_BH = memory_BHKV[..., :-1].norm(dim=(-2, -1))
                per_key_BH = norm_BH / memory_BHKV[..., -1].norm(dim=-1).clamp(min=1e-10)
                figures[f"memory_norm/layer_{index}"] = per_key_BH.max().item()
        return figures


class InfiniForSequenceClassification(InfiniPreTrainedModel, ZooForSequenceClassification):
    """Infini-Transformer as a classifier."""

    model_class = InfiniModel


__all__ = ["InfiniConfig", "InfiniModel", "InfiniForCausalLM", "InfiniForSequenceClassification"]
