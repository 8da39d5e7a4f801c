"""Full attention that trains in groups of tokens, for half of the heads in shifted ones: S2-Attn.

LongLoRA, Chen et al. 2023, https://arxiv.org/abs/2309.12307. With groups of g tokens and H query
heads, i and j counted from their document's start, token i sees j <= i

    by heads 0 .. H/2 - 1    if i // g == j // g
    by heads H/2 .. H - 1    if (i + s) // g == (j + s) // g,  s = g // 2

A way to train, not a model: `train_in_groups(model, g)` sets it on a model's layers, whose config
knows nothing of it, and attention is full again after `model.eval()`. Groups restart with each
document. The authors' form without flash attention rolls the sequence, which joins its end and its
beginning in one group, so that first tokens see the last; this is their other form, which does not.
"""

import torch


def train_in_groups(model, size):
    """Lets a model's layers of full attention train in groups.

    Args:
        model: with such layers, all of them or some.
        size: g, tokens of a group (the paper: a quarter of those of a row); None: full attention.

    Raises:
        ValueError: no layer of full attention, heads that have no halves, a size that is no number
            of tokens.
    """
    layers = [module for module in model.modules() if hasattr(module, "shift_groups")]
    full = [layer for layer in layers if layer.window is None]
    if size is not None and size < 1:
        raise ValueError(f"a group has at least 1 token, got {size}; None is full attention.")
    if not full:
        what = f"a window of {layers[0].window} tokens" if layers else "no softmax attention"
        raise ValueError(
            f"groups are for layers of full attention, got a model with {what}; use "
            "sliding_window=None, or softmax_layers of a hybrid."
        )
    if getattr(model.config, "rope_extension", None) is not None:
        raise ValueError(
            "rope_extension is for use without training, and groups are for training; load the "
            "model without a rope_extension, and give it one afterwards."
        )
    if full[0].num_heads % 2:
        raise ValueError(
            f"half of the heads see shifted groups, so their number is even, got "
            f"{full[0].num_heads}."
        )
    for layer in full:
        layer.shift_groups = size


class PartOfHeads:
    """A softmax mixer's stand-in where it attends by some of its heads.

    Args:
        mixer: of all heads.
        number: of the part, from 0 on.
        parts: how many there are, each with as many heads.
        num_key_value_groups: query heads for each head of keys and values.
        window: how far a token sees at most; None: as far as there are tokens.
    """

    def __init__(self, mixer, number, parts, num_key_value_groups, window=None):
        self.mixer, self.window, self.num_key_value_groups = mixer, window, num_key_value_groups
        logits = mixer.sink_logits
        self.sink_logits = None if logits is None else logits.chunk(parts)[number]

    def __getattr__(self, name):
        return getattr(self.mixer, name)

    def attend(self, *arguments, **options):
        """As the mixer's."""
        return type(self.mixer).attend(self, *arguments, **options)


def attend_in_groups(mixer, q_BTHK, k_BTHK, v_BTHV, sequence, bias):
    """The attention of a pass without a state before it.

    Args:
        mixer: a `SoftmaxAttention` with `shift_groups`.
        q_BTHK: queries, turned.
        k_BTHK, v_BTHV: keys, turned, and values.
        sequence: how the tokens lie.
        bias: what positions do to scores at distances below g, for queries in a single row, as
            keyword arguments of `windowed_attention`.
    """
    size, repeats = mixer.shift_groups, mixer.num_key_value_groups
    if mixer.num_groups % 2:  # one of them belongs to both halves
        k_BTHK, v_BTHV = (x.repeat_interleave(repeats, dim=2) for x in (k_BTHK, v_BTHV))
        repeats = 1
    outputs = []
    for number, shift in enumerate((0, size // 2)):
        x = [y.chunk(2, dim=2)[number] for y in (q_BTHK, k_BTHK, v_BTHV)]
        own = part_of_bias(bias, number, 2)
        if sequence.cu_seqlens is None and "query_bias" not in bias:
            half = PartOfHeads(mixer, number, 2, repeats)
            outputs.append(_as_rows(half, *x, size, shift, own))
        else:
            half = PartOfHeads(mixer, number, 2, repeats, window=size)
            outputs.append(_as_documents(half, *x, size, shift, own, sequence.clock))
    return torch.cat(outputs, dim=2)


def part_of_bias(bias, number, parts):
    """The bias of some of the heads: as of `PartOfHeads`."""
    own, by_query = dict(bias), bias.get("query_bias")
    if "distance_bias" in bias:
        own["distance_bias"] = bias["distance_bias"].chunk(parts)[number]
    if by_query is not None:
        own["query_bias"] = lambda *places: by_query(*places).chunk(parts, dim=1)[number]
    return own


def group_lengths(length, size, shift):
    """Tokens of a row's first group, how many whole ones follow, and what is left after them."""
    first = min((size - shift) % size, length)
    return first, *divmod(length - first, size)


def _as_rows(half, q_BTHK, k_BTHK, v_BTHV, size, shift, bias):
    """Every group a row of a batch: for documents that are rows themselves."""
    first, count, rest = group_lengths(q_BTHK.shape[1], size, shift)
    parts = [x.split((first, count * size, rest), dim=1) for x in (q_BTHK, k_BTHK, v_BTHV)]
    outputs = []
    for part, x in zip(("first", "whole", "rest"), zip(*parts)):
        if x[0].shape[1] == 0:
            continue
        if part == "whole":
            x = [y.unflatten(1, (count, size)).flatten(0, 1) for y in x]
        own = dict(bias)
        if "distance_bias" in own:
            own["distance_bias"] = own["distance_bias"][:, : x[0].shape[1]]
        o_BTHV = half.attend(*x, bias=own)
        if part == "whole":
            o_BTHV = o_BTHV.unflatten(0, (-1, count)).flatten(1, 2)
        outputs.append(o_BTHV)
    return torch.cat(outputs, dim=1)


def _as_documents(half, q_BTHK, k_BTHK, v_BTHV, size, shift, bias, clock_BT):
    """Every group a document of one row."""
    clock_T = clock_BT.expand(q_BTHK.shape[:2]).flatten()
    starts_N = ((clock_T == 0) | ((clock_T + shift) % size == 0)).nonzero()[:, 0]
    bounds = torch.cat([starts_N, starts_N.new_tensor([len(clock_T)])])
    x = (y.flatten(0, 1)[None] for y in (q_BTHK, k_BTHK, v_BTHV))
    o_BTHV = half.attend(*x, bias=bias, cu_seqlens=bounds)
    return o_BTHV[0].unflatten(0, q_BTHK.shape[:2])


def mean_visible_in_groups(length, size):
    """Keys that a token sees on average, over the heads and a text of so many tokens."""
    seen = 0
    for shift in (0, size // 2):
        first, count, rest = group_lengths(length, size, shift)
        seen += sum(n * (n + 1) / 2 for n in (first, rest)) + count * size * (size + 1) / 2
    return seen / 2 / length
