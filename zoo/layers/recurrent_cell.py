"""The recurrent cell of the Block-Recurrent Transformer: M state vectors that read a window.

Hutchins et al. 2022, https://arxiv.org/abs/2203.07852, sections 3.1 to 3.3, as the authors' code
(meliad) has it. Once per window, with s [M, D] the states, k and v the keys and values of the
window's tokens and of those of the window before (2 W), heads side by side:

    n = norm(s) + p                                    p: a learned vector for each state
    rk, rv, rq, rq2 = n W_k, n W_v, n W_q, n W_q2      rk, rq and rq2 of length 1 in every head
    u1 = softmax(|a| rq . rk) rv                       the states look at each other
    u2 = softmax(|a2| rq2 . k) v                       and at the tokens
    skip:    s' = gate(s, [u1, u2] W_o)
    dual:    c = gate(s, [u1, u2] W_o);  s' = gate(c, relu(norm(c) W_1) W_2)
    single:  s' = gate(s, tanh(relu([u1, u2] W_1) W_2))

A gate of s and y, where h is what W_o or W_2 was multiplied by:

    bias:  g s + (1 - g) y, g = sigmoid(b): the paper's fixed gate
    full:  g s + (1 - g) y, g = sigmoid(h W_g + b_g + 1)
    lstm:  f s + i y, f = sigmoid(h W_f + b_f + 1), i = sigmoid(h W_i + b_i - 1)

The paper's LSTM gate has a tanh around y; the code has one in "single" alone, for every gate. The
code knows "full" but no configuration of its authors uses it.
"""

import weakref

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import initialization as init

from ..core.flops import linear_flops
from ..core.segments import SegmentGrid, documents_to_rows
from ..core.window import document_spans
from ..kernels.attention_by_head import attention_by_head, takes_blocks_by_head
from ..kernels.export_scan import scan
from ..kernels.linear_recurrence import accumulator_dtype

GATES = ("bias", "full", "lstm")
CONFIGURATIONS = ("skip", "dual", "single")
# States -> (their cell, changes of its weights, what is read of them), as long as they exist.
_READ = WeakTensorKeyDictionary()
# Of a normal distribution cut off at two of its standard deviations, its standard deviation.
TRUNCATED_STD = 0.87962566103423978


def truncated_(weight, fan_in, scale=1.0):
    """The authors' matrices: normal with variance scale / fan_in, cut off at two deviations."""
    std = (scale / fan_in) ** 0.5 / TRUNCATED_STD
    init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def unit_heads(x_NTD, num_heads):
    """Cut in heads, [N, T, H, K], of length 1: in float32, rounded once."""
    wide_NTHK = x_NTD.unflatten(-1, (num_heads, -1)).to(accumulator_dtype(x_NTD))
    length_NTH1 = (wide_NTHK.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
    return wide_NTHK * length_NTH1


def scaled(q_NTHK, scale_H, dtype):
    """Queries of length 1 times |scale|, of which the sign is not to matter, rounded once."""
    return (q_NTHK * scale_H.to(q_NTHK.dtype).abs()[:, None]).to(dtype)


def look(q_NTHK, k_NMHK, v_NMHV):
    """Attention of all queries, scaled already, to all keys, [N, T, H, V]."""
    sizes = q_NTHK.shape[1], k_NMHK.shape[1]
    if takes_blocks_by_head(q_NTHK, k_NMHK, v_NMHV, *sizes):
        o_NTHV = attention_by_head(q_NTHK, k_NMHK, v_NMHV, 1.0, False, _look_written_out)
        return o_NTHV.to(v_NMHV.dtype)
    q, k, v = (x.transpose(1, 2) for x in (q_NTHK, k_NMHK, v_NMHV))
    return F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2)


def _look_written_out(q_NTHK, k_NMHK, v_NMHV):
    weights_NHTM = torch.einsum("nthk,nmhk->nhtm", q_NTHK, k_NMHK).softmax(-1)
    return torch.einsum("nhtm,nmhv->nthv", weights_NHTM, v_NMHV)


def project(linear, x_NMF):
    """linear(x), in a form whose gradient torch.export can follow through a scan of any batch."""
    if torch.compiler.is_exporting() and type(linear) is nn.Linear and linear.bias is not None:
        return F.linear(x_NMF, linear.weight) + linear.bias
    return linear(x_NMF)


class GatedProjection(nn.Module):
    """A projection whose result takes the place of a state, as far as a gate lets it.

    Args:
        size: width of what is projected.
        config: with hidden_size and gate.
        activation: of the projection; None: nothing.
    """

    def __init__(self, size, config, activation=None):
        super().__init__()
        width = config.hidden_size
        self.gate, self.activation = config.gate, activation
        self.proj = nn.Linear(size, width, bias=False)
        if self.gate == "bias":
            self.bias = nn.Parameter(torch.empty(width))
        else:
            self.keep_gate = nn.Linear(size, width)
        if self.gate == "lstm":
            self.input_gate = nn.Linear(size, width)

    def init_weights_of_paper(self):
        """Gates start near the middle, and depend little on the input."""
        truncated_(self.proj.weight, self.proj.in_features)
        if self.gate == "bias":
            init.normal_(self.bias, std=0.1)
        for name in ("keep_gate", "input_gate"):
            if hasattr(self, name):
                gate = getattr(self, name)
                truncated_(gate.weight, gate.in_features, 0.1)
                init.normal_(gate.bias, std=0.1)

    def forward(self, state_NMD, hidden_NMF):
        """The next state, in the dtype of the state."""
        dtype = state_NMD.dtype
        y_NMD = self.proj(hidden_NMF).to(dtype)
        if self.activation is not None:
            y_NMD = self.activation(y_NMD)
        if self.gate == "bias":
            kept = self.bias.to(dtype).sigmoid()
        else:
            kept = (project(self.keep_gate, hidden_NMF).to(dtype) + 1).sigmoid()
        taken = 1 - kept
        if self.gate == "lstm":
            taken = (project(self.input_gate, hidden_NMF).to(dtype) - 1).sigmoid()
        return kept * state_NMD + taken * y_NMD


class RecurrentCell(nn.Module):
    """The states' side of a recurrent layer.

    Args:
        config: of a Block-Recurrent Transformer.
    """

    def __init__(self, config):
        super().__init__()
        width, size = config.hidden_size, config.num_attention_heads * config.head_dim
        self.config = config
        self.initial = nn.Parameter(torch.empty(config.num_states, width))
        self.norm_weight = nn.Parameter(torch.empty(width))
        self.position = nn.Parameter(torch.empty(config.num_states, width))
        self.q_proj = nn.Linear(width, size, bias=False)
        self.k_proj = nn.Linear(width, size, bias=False)
        self.v_proj = nn.Linear(width, size, bias=False)
        self.token_q_proj = nn.Linear(width, size, bias=False)
        self.scale = nn.Parameter(torch.empty(config.num_attention_heads))
        self.token_scale = nn.Parameter(torch.empty(config.num_attention_heads))
        if config.configuration != "single":
            self.out = GatedProjection(2 * size, config)
        if config.configuration != "skip":
            is_single = config.configuration == "single"
            if not is_single:
                self.mlp_norm_weight = nn.Parameter(torch.empty(width))
            size = 2 * size if is_single else width
            self.up_proj = nn.Linear(size, config.intermediate_size, bias=False)
            activation = torch.tanh if is_single else None
            self.mlp_out = GatedProjection(config.intermediate_size, config, activation)

    def init_weights_of_paper(self):
        """States start small, and apart by their positions."""
        init.normal_(self.initial, std=0.1)
        init.normal_(self.position)
        for name in ("norm_weight", "mlp_norm_weight", "scale", "token_scale"):
            if hasattr(self, name):
                init.ones_(getattr(self, name))
        for name in ("q_proj", "k_proj", "v_proj", "token_q_proj", "up_proj"):
            if hasattr(self, name):
                truncated_(getattr(self, name).weight, getattr(self, name).in_features)

    def norm(self, state_NMD, weight_D):
        """Of a state that is wider than what follows, rounded once it has a size."""
        normed_NMD = F.rms_norm(state_NMD, weight_D.shape, eps=self.config.rms_norm_eps)
        return normed_NMD.to(weight_D.dtype) * weight_D

    def flops_per_window(self):
        """Of reading the states once and of their update, which sees M states and 2 W tokens."""
        config = self.config
        keys = config.num_states + 2 * config.sliding_window
        attention = 4 * config.num_attention_heads * config.head_dim * keys
        return config.num_states * (linear_flops(self) + attention)

    def forward(self, sequence, state, tokens=None, step=None):
        """What there is to read of the states before a pass; with tokens, what these read of them.

        All that uses a parameter of the cell is called from here: offloading and sharding bring a
        module's parameters where they are needed when the module itself is called.

        Args:
            sequence: how the tokens of the pass lie.
            state: before the pass.
            tokens: (queries for the states [B, T, H, K], keys, values [B, T, H, V]), or None.
            step: a `WindowStep` (zoo/layers/window_step.py), where there is one.

        Returns:
            Without tokens keys rk [N, M, H, K] and values rv of the states of each document; with
            them (what they see [B, T, H, V], the states after the pass [B, M, D] or None if nobody
            keeps them).
        """
        is_unchanged = step is not None and not step.changes_states
        if is_unchanged and state.states_BMD is not None:
            read = self.read_again(state.states_BMD)
            return read if tokens is None else (look(tokens[0], *read), state.states_BMD)
        if tokens is not None:
            return self.walk(*tokens, sequence, state)
        return self.keys_values(self.states_before(sequence, state.states_BMD))[1:]

    def keys_values(self, state_NMD):
        """What is read of a state.

        Returns:
            (n [N, M, D], keys rk [N, M, H, K] and values rv).
        """
        heads = self.config.num_attention_heads
        n_NMD = self.norm(state_NMD, self.norm_weight) + self.position
        v_NMHV = self.v_proj(n_NMD).unflatten(-1, (heads, -1))
        k_NMHK = unit_heads(self.k_proj(n_NMD), heads).to(v_NMHV.dtype)
        return n_NMD, k_NMHK, v_NMHV

    def read_again(self, states_BMD):
        """What is read of states that stay as they are until their window ends.

        Keys and values, made when the first token of a window asks for them, as those of tokens
        are. They live as long as the states, and are of these very tensors: a copy has its own.
        """
        # Weights that were trained or loaded since have counted a change of their own.
        changes = sum(x._version for x in self.parameters() if not x.is_inference())
        cell, changes_then, read = _READ.get(states_BMD, (None, None, None))
        if cell is None or cell() is not self or changes_then != changes:
            read = self.keys_values(states_BMD)[1:]
            _READ[states_BMD] = weakref.ref(self), changes, read
        return read

    def update(self, state_NMD, read, keys_NSHK, values_NSHV):
        """The states after a window.

        Args:
            state_NMD: before it.
            read: `keys_values` of it.
            keys_NSHK: of the tokens of the window and of the window before, [N, 2 W, H, K].
            values_NSHV: theirs.
        """
        n_NMD, rk_NMHK, rv_NMHV = read
        heads, dtype = self.config.num_attention_heads, rv_NMHV.dtype
        q_NMHK = scaled(unit_heads(self.q_proj(n_NMD), heads), self.scale, dtype)
        token_q_NMHK = unit_heads(self.token_q_proj(n_NMD), heads)
        token_q_NMHK = scaled(token_q_NMHK, self.token_scale, dtype)
        u_NMHV = torch.cat(
            [
                look(q_NMHK, rk_NMHK, rv_NMHV),
                look(token_q_NMHK, keys_NSHK.to(dtype), values_NSHV.to(dtype)),
            ],
            dim=2,
        )
        hidden_NMF = u_NMHV.flatten(2)
        if self.config.configuration == "single":
            return self.mlp_out(state_NMD, self.up_proj(hidden_NMF).relu())
        state_NMD = self.out(state_NMD, hidden_NMF)
        if self.config.configuration == "dual":
            hidden_NMF = self.up_proj(self.norm(state_NMD, self.mlp_norm_weight)).relu()
            state_NMD = self.mlp_out(state_NMD, hidden_NMF)
        return state_NMD

    def states_before(self, sequence, states_BMD):
        """The states of each document (row, if dense) before a pass, [N, M, D].

        Args:
            sequence: of the pass.
            states_BMD: of each row; None: all documents start.
        """
        start_N = document_spans(sequence).start
        initial_MD = self.initial.to(accumulator_dtype(self.initial))
        if states_BMD is None:
            # A copy, for a state may stay what it was while the parameter is trained.
            initial_NMD = initial_MD.expand(start_N.shape[0], -1, -1)
            return initial_NMD.clone(memory_format=torch.contiguous_format)
        if sequence.row_of_document is not None:
            states_BMD = states_BMD[sequence.row_of_document]
        return torch.where((start_N == 0)[:, None, None], initial_MD, states_BMD)

    def walk(self, q_BTHK, k_BTHK, v_BTHV, sequence, state):
        """All windows of a pass in their order: tokens look at the states, these at the tokens.

        Args:
            q_BTHK: the tokens' queries for the states.
            k_BTHK: their keys.
            v_BTHV: their values.
            sequence: how they lie.
            state: before them.

        Returns:
            As `forward` with tokens.
        """
        # Of the states nothing but each window after the other can be told: the process of a slice
        # waits for them here, and has them for the next before its tokens look at them. With
        # feedback the whole stack does.
        ranks = None if self.config.feedback else sequence.ranks
        is_wanted = ranks is not None and not ranks.is_last
        is_kept = state.is_kept or is_wanted
        if ranks is not None and not ranks.is_first:
            initial_MD = self.initial.to(accumulator_dtype(self.initial))
            like_BMD = initial_MD.detach().expand(sequence.shape[0], -1, -1).contiguous()
            state.states_BMD = ranks.wait_for(like_BMD, self)
        grid = SegmentGrid(sequence, self.config.sliding_window, state.keys_BWHK is None)
        if torch.compiler.is_exporting():
            return self.walk_exported(q_BTHK, k_BTHK, v_BTHV, grid, state)
        states_NMD = grid.in_walk_order(self.states_before(sequence, state.states_BMD))
        is_filled = self.filled_ranks(grid, is_kept)
        tokens = [None] * grid.num_ranks
        if not any(is_filled[:-1]) and torch.is_grad_enabled():
            # Texts of one window or less teach the cell nothing: no token reads what comes after.
            # That has to be a gradient of zero: training on several devices waits for one of every
            # parameter.
            size = len(states_NMD), 1
            window = (x.new_zeros(*size, *x.shape[2:]) for x in (k_BTHK, v_BTHV))
            next_NMD = self.update(states_NMD, self.keys_values(states_NMD), *window)
            states_NMD = states_NMD + 0 * next_NMD
        if any(is_filled):
            held = held_windows(grid, state.keys_BWHK), held_windows(grid, state.values_BWHV)
            tokens = zip(
                windows_with_last(grid, k_BTHK, *held[0]),
                windows_with_last(grid, v_BTHV, *held[1]),
            )
        reads, after = [], []
        complete = grid.by_rank(grid.is_complete)
        for is_filled_here, is_complete_N, window in zip(is_filled, complete, tokens):
            states_NMD = states_NMD[: len(is_complete_N)]
            read = self.keys_values(states_NMD)
            reads.append(read[1:])
            if is_filled_here:
                next_NMD = self.update(states_NMD, read, *window)
                states_NMD = torch.where(is_complete_N[:, None, None], next_NMD, states_NMD)
            after.append(states_NMD)
        states_BMD = self.states_after(grid, after, state.states_BMD) if is_kept else None
        if is_wanted:
            ranks.pass_on(states_BMD, self)
        rk_SMHK, rv_SMHV = (grid.from_ranks(list(xs)) for xs in zip(*reads))
        seen_BTHV = grid.join(look(grid.queries(q_BTHK), rk_SMHK, rv_SMHV))
        return seen_BTHV, states_BMD if state.is_kept else None

    def walk_exported(self, q_BTHK, k_BTHK, v_BTHV, grid, state):
        """`walk` in a program that is being exported, for any number of windows."""

        def step(states, is_complete_N, keys_NSHK, values_NSHV):
            (states_NMD,) = states
            read = self.keys_values(states_NMD)
            next_NMD = self.update(states_NMD, read, keys_NSHK, values_NSHV)
            return (torch.where(is_complete_N[:, None, None], next_NMD, states_NMD),), read[1:]

        windows = (
            stacked_with_last(grid, x_BTHK, *held_windows(grid, held_BWHK))
            for x_BTHK, held_BWHK in ((k_BTHK, state.keys_BWHK), (v_BTHV, state.values_BWHV))
        )
        states = (self.states_before(grid.sequence, state.states_BMD),)
        (states_NMD,), reads = scan(step, states, grid.stacked(grid.is_complete), *windows)
        states_BMD = None
        if state.is_kept:
            states_BMD = self.states_after(grid, [states_NMD], state.states_BMD)
        return grid.join(look(grid.queries(q_BTHK), *map(grid.unstacked, reads))), states_BMD

    def filled_ranks(self, grid, is_kept):
        """For each rank, whether a window may be filled there, so that states change."""
        window, ranks = self.config.sliding_window, range(grid.num_ranks)
        if grid.width < window:
            return [False] * grid.num_ranks
        # Nobody reads what comes after the last window, unless the state is kept.
        is_read = [is_kept or rank + 1 < grid.num_ranks for rank in ranks]
        if grid.is_dense and grid.is_aligned:
            num_filled = grid.sequence.shape[1] // window
            return [is_read[rank] and rank < num_filled for rank in ranks]
        if torch.compiler.is_compiling():
            return is_read
        # A look at the values saves the update where there is none: one token in W fills a window.
        filled = torch.stack([x_N.any() for x_N in grid.by_rank(grid.is_complete)]).tolist()
        return [a and b for a, b in zip(is_read, filled)]

    def states_after(self, grid, after, states_BMD):
        """The states of each row after a pass, from those after each rank."""
        sequence, states_NMD = grid.sequence, after[-1]
        if grid.walk is not None:
            states_NMD = grid.last(grid.from_ranks(after))
        if sequence.keep is not None:
            held = 0 if states_BMD is None else states_BMD
            return torch.where(sequence.keep[:, None, None], states_NMD, held)
        return documents_to_rows(states_NMD, states_BMD, grid.sequence)


def held_windows(grid, held_BWHK):
    """The tokens that each document's state holds, in two windows [N, W, H, K].

    Args:
        grid: the `SegmentGrid` of the pass.
        held_BWHK: a ring of 2 W by row; None: there is none.

    Returns:
        (The window the pass begins in, of which only tokens before the pass have a meaning; the one
        before it, zeros where the document begins.) None for both without a state.
    """
    if held_BWHK is None:
        return None, None
    rows_N = grid.sequence.row_of_document
    if rows_N is None:
        rows_N = torch.arange(held_BWHK.shape[0], device=held_BWHK.device)
    # The halves take turns.
    halves_BRWHK, half_N = held_BWHK.unflatten(1, (2, -1)), grid.first_segment % 2
    has_last_N = (grid.first_segment > 0)[:, None, None, None]
    last_NWHK = torch.where(has_last_N, halves_BRWHK[rows_N, 1 - half_N], 0)
    return halves_BRWHK[rows_N, half_N], last_NWHK


def windows_with_last(grid, x_BTHK, held_NWHK, last_NWHK):
    """By rank, the tokens of each window and of the one before it, [N, 2 W, H, K].

    Args:
        grid: the `SegmentGrid` of the pass.
        x_BTHK: keys or values of the pass.
        held_NWHK, last_NWHK: of `held_windows`.
    """
    by_rank = grid.by_rank(grid.keys(x_BTHK, held_NWHK))
    if last_NWHK is None:
        last_NWHK = torch.zeros_like(by_rank[0])
    else:
        last_NWHK = grid.in_walk_order(last_NWHK)
    for own_NWHK in by_rank:
        yield torch.cat([last_NWHK[: len(own_NWHK)].to(own_NWHK.dtype), own_NWHK], dim=1)
        last_NWHK = own_NWHK


def stacked_with_last(grid, x_BTHK, held_NWHK, last_NWHK):
    """`windows_with_last` of a dense pass with an axis for ranks, [ranks, N, 2 W, H, K]."""
    own_RNWHK = grid.stacked(grid.keys(x_BTHK, held_NWHK))
    if last_NWHK is None:
        last_NWHK = torch.zeros_like(own_RNWHK[0])
    last_RNWHK = torch.cat([last_NWHK[None].to(own_RNWHK.dtype), own_RNWHK])
    return torch.cat([last_RNWHK[: own_RNWHK.shape[0]], own_RNWHK], dim=2)
