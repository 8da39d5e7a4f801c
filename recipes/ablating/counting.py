"""Operations of a forward pass as PyTorch's own counter sees them, with formulas for our operators.

The counter sees what is run: chunks of a recurrence, masked scores, activations computed again. An
operator's formula says what its definition takes, from the arguments of each call.
"""

import contextlib
import sys
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

from zoo.core.flops import mean_of_segments, mean_visible
from zoo.kernels.delta_recurrence import delta_recurrence
from zoo.kernels.dilated_attention import dilated_attention
from zoo.kernels.dilated_branches import branches_of
from zoo.kernels.extended_attention import extended_attention
from zoo.kernels.linear_recurrence import linear_recurrence
from zoo.kernels.windowed_attention import windowed_attention
from zoo.kernels.wkv4 import wkv4
from zoo.layers.external_memory import ExternalMemory
from zoo.layers.focused_pass import FocusedPass
from zoo.layers.landmark_softmax import attend_to_all, attend_to_retrieved
from zoo.layers.relative_frames import attend_to_places


def _recurrence(q, k, v, *rest, **options):
    return 4 * q.numel() * v.shape[-1]  # written and read


def _delta(q, k, v, *rest, **options):
    return 8 * q.numel() * v.shape[-1]  # read at a key, corrected, written and read


def _wkv4(w, u, k, v, **options):
    return 2 * 4 * k.numel()


def _windowed(q, k, v, window=None, *, delay=0, sinks=None, query_bias=None, **options):
    batch, length, heads, size = q.shape
    keys = mean_visible(length, None if window is None else window + delay) - delay
    if sinks is not None:
        keys = mean_visible(length, window, sinks.k.shape[1])
    if query_bias is not None and not q.is_meta:
        keys = _not_hidden(length, window, query_bias, q.device)
    total = batch * length * heads * keys * 2 * (size + v.shape[-1])
    if query_bias is None:
        return total
    place = torch.zeros(1, dtype=torch.long, device=q.device)
    with FlopCounterMode(display=False) as of_a_pair:
        query_bias(place, place[None])
    return total + batch * length * keys * of_a_pair.get_total_flops()


def _not_hidden(length, window, query_bias, device):
    """Keys of a window that a query sees on average, where a bias may hide some of them."""
    tokens = torch.arange(length, device=device)
    distance = tokens[:, None] - tokens
    is_seen = (distance >= 0) & (distance < (window or length))
    bias = query_bias(tokens, distance.clamp(min=0)).flatten(0, 1)
    return (is_seen & (bias > -torch.inf).any(0)).sum().item() / length


def _extended(parts, v, window=None, **options):
    # One score of each query and key, whichever part it is of.
    return _windowed(parts[0].q, None, v, window)


def _dilated(q, k, v, segment_lengths, dilation_rates, *, offsets="grouped", **options):
    batch, length, heads, size = q.shape
    total = 0
    for branch in branches_of(segment_lengths, dilation_rates):

        def pairs(tokens, branch=branch):
            first = branch.offsets(heads, offsets, "cpu").tolist()
            chosen = [len(range(offset, tokens, branch.rate)) for offset in first]
            return sum(n * (n + 1) // 2 for n in chosen)

        total += mean_of_segments(length, branch.length, pairs) * length
    return batch * total * 2 * (size + v.shape[-1])


def _to_all(q, k, v, *rest, count=None, **options):
    """Of a whole text, whose queries stand at the places 0, 1, ... of tokens and landmarks."""
    (batch, places, heads, width), size = q.shape, k.shape[2]
    place = torch.arange(places)
    block, slot = place // size, place % size
    own, read = (slot + 1).clamp(max=size - 1), block if count is None else block.clamp(max=count)
    pairs = 2 * own + read * (2 * size - 1) + (0 if count is None else block)
    return batch * heads * int(pairs.sum()) * 2 * width


def _to_retrieved(q, k, v, clock, scale, count, *rest, **options):
    return _to_all(q, k, v, count=count)


def _focused(own, q, *rest):
    """Of a whole text: scores of all keys that are seen, and the values of those in the softmax."""
    batch, length, heads, size = q.shape
    slot, segment = torch.arange(length) % own.length, torch.arange(length) // own.length
    far = own.length * segment.clamp(max=length if own.windows is None else own.windows)
    pairs = 2 * (slot + 1) + far + far.clamp(max=length if own.top_k is None else own.top_k)
    return batch * heads * int(pairs.sum()) * 2 * size


def _recalled(own, tokens, *rest):
    """Of a whole text: scores of all that is remembered, and attention to the chosen."""
    batch, length, heads, size = tokens[0].shape
    remembered = (torch.arange(length) // own.segment * own.segment).clamp(max=own.size)
    pairs = int(remembered.sum()) + length * 2 * own.neighbors
    return batch * heads * pairs * 2 * size


def _to_places(q, distance_q, k, v, r, visible, *rest):
    """Three products for each key that is seen: with it, with its distance, with its value."""
    pairs = visible.numel() if visible.is_meta else int(visible.sum())
    return q.shape[0] // visible.shape[0] * pairs * 2 * q.shape[2] * 3 * q.shape[3]


METHODS = {(FocusedPass, "attend"): _focused, (ExternalMemory, "recall_pass"): _recalled}
FORMULAS = {
    attend_to_all: _to_all,
    attend_to_retrieved: _to_retrieved,
    attend_to_places: _to_places,
    linear_recurrence: _recurrence,
    delta_recurrence: _delta,
    wkv4: _wkv4,
    windowed_attention: _windowed,
    extended_attention: _extended,
    dilated_attention: _dilated,
}


def _fused_attention(q_shape, k_shape, v_shape, dropout=0.0, is_causal=False, *rest, **options):
    """The CPU's attention in one piece: of causal attention, the keys a token sees."""
    batch, heads, length, size = q_shape
    keys = mean_visible(length) if is_causal else k_shape[-2]
    return int(batch * heads * length * keys * 2 * (size + v_shape[-1]))


@torch.no_grad()
def counted_flops(model, length):
    """Floating-point operations per token of a forward pass over one text.

    Args:
        model: a language model, on a CPU or on meta.
        length: tokens of the text.
    """
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={fused: _fused_attention})
    corrected = [0.0]
    training, model = model.training, model.eval()
    with contextlib.ExitStack() as patches, counter:
        for operator, formula in FORMULAS.items():
            _patch(patches, operator, formula, counter, corrected)
        for (owner, name), formula in METHODS.items():
            counting = _counting(getattr(owner, name), formula, counter, corrected)
            patches.enter_context(mock.patch.object(owner, name, counting))
        ids = torch.zeros(1, length, dtype=torch.long, device=model.device)
        model(ids, use_cache=True)  # without one, a last state is not computed
    model.train(training)
    return (counter.get_total_flops() + corrected[0]) / length


def _counting(operator, formula, counter, corrected):
    """An operator, or a method, that counts by its formula."""

    def counting(*arguments, **options):
        before = counter.get_total_flops()
        result = operator(*arguments, **options)
        wanted = formula(*arguments, **options)  # which may run something itself
        seen = counter.get_total_flops() - before
        corrected[0] += wanted - seen
        return result

    return counting


def _patch(patches, operator, formula, counter, corrected):
    """Puts an operator that counts by its formula in the place of one, wherever it was imported."""
    counting, name = _counting(operator, formula, counter, corrected), operator.__name__
    ours = [module for title, module in sys.modules.items() if title.startswith("zoo.")]
    for module in ours:
        if vars(module).get(name) is operator:
            patches.enter_context(mock.patch.object(module, name, counting))
