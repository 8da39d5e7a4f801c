"""The banded path against the definition, the definition against transformers' own numbers."""

import pytest
import torch
from goldens import golden_tensors
from ladder import BytesWritten, worst

from zoo.kernels.windowed_attention import (
    Sinks,
    attention_step,
    windowed_attention,
    windowed_attention_reference,
)
from zoo.kernels.windowed_attention_export import windowed_attention_exported

# An empty document first, in the middle and last; one-token documents; one of exactly a block.
CU_SEQLENS = [0, 0, 1, 2, 18, 18, 34, 37, 37]


def arguments(
    shape=(2, 37, 6, 2, 5, 7),
    older=0,
    window=None,
    packed=False,
    sinks=False,
    logits=False,
    bias=False,
    dtype=torch.float64,
):
    """Random inputs as (positional, keyword) arguments, and the leaves among them."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        x = torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)
        return x.requires_grad_()

    batch, time, heads, groups, key_dim, value_dim = shape
    batch = 1 if packed else batch
    keys = (batch, time + older, groups)
    positional = [normal(batch, time, heads, key_dim), normal(*keys, key_dim)]
    positional += [normal(*keys, value_dim), window]
    leaves, keyword = positional[:3], {"scale": 0.7}
    if packed:
        keyword["cu_seqlens"] = torch.tensor([min(x, time) for x in CU_SEQLENS])
    elif older:
        keyword["first_key"] = torch.arange(batch) * older // 2
    if sinks:
        documents = len(CU_SEQLENS) - 1 if packed else batch
        tensors = [
            normal(batch, time, heads, key_dim),
            normal(documents, 3, groups, key_dim),
            normal(documents, 3, groups, value_dim),
        ]
        count = torch.randint(0, 4, (batch, time), generator=generator)
        keyword["sinks"] = Sinks(*tensors, count)
        leaves += tensors
    if logits:
        keyword["sink_logits"] = normal(heads)
        leaves.append(keyword["sink_logits"])
    if bias:
        # Of each query its own logit, without which a document's first would see nothing.
        extra = {"sink_logits": normal(batch, time, heads), "distance_bias": normal(heads, window)}
        keyword |= extra | {"delay": 1 if bias is True else bias}
        leaves += extra.values()
    return positional, keyword, leaves


def exported(*positional, **keyword):
    """What an exported program runs, which takes no packed documents."""
    names = ("scale", "first_key", "sinks", "sink_logits", "delay", "distance_bias", "query_bias")
    settings = dict.fromkeys((*names, "log_decay", "block_length")) | {"delay": 0}
    return windowed_attention_exported(*positional, **settings | keyword)


def run(function, positional, keyword, leaves):
    o = function(*positional, **keyword)
    weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [o, *torch.autograd.grad((o * weight).sum(), leaves)]


@pytest.mark.parametrize("extra", ["plain", "sinks", "logits", "both"])
@pytest.mark.parametrize("layout", ["dense", "older keys", "packed"])
@pytest.mark.parametrize("window", [1, 2, 7, 16, 36, 37, 1000, None])
def test_banded_equals_reference(window, layout, extra):
    positional, keyword, leaves = arguments(
        window=window,
        older=9 if layout == "older keys" else 0,
        packed=layout == "packed",
        sinks=extra in ("sinks", "both"),
        logits=extra in ("logits", "both"),
    )
    expected = run(windowed_attention_reference, positional, keyword, leaves)
    for block_length in (1, 5, 16, 37, None):
        keyword["block_length"] = block_length
        assert worst(run(windowed_attention, positional, keyword, leaves), expected) < 1e-12


@pytest.mark.parametrize("delay", [1, 3])
@pytest.mark.parametrize("layout", ["dense", "older keys", "packed"])
@pytest.mark.parametrize("window", [1, 2, 7, 16, 37, 100])
def test_delay_and_bias_by_distance(window, layout, delay):
    older, packed = 9 if layout == "older keys" else 0, layout == "packed"
    positional, keyword, leaves = arguments(window=window, older=older, packed=packed, bias=delay)
    expected = run(windowed_attention_reference, positional, keyword, leaves)
    for block_length in (1, 5, 16, 37, None):
        keyword["block_length"] = block_length
        assert worst(run(windowed_attention, positional, keyword, leaves), expected) < 1e-12


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("layout", ["dense", "older keys", "packed"])
@pytest.mark.parametrize("window", [1, 7, 16, 37, 100, None])
def test_bias_by_distance_of_what_is_seen(window, layout, sinks):
    """Without a delay and a logit of no value, without a window, and of sinks."""
    older, packed = 9 if layout == "older keys" else 0, layout == "packed"
    case = arguments(window=window, older=older, packed=packed, sinks=sinks)
    positional, keyword, leaves = case
    heads, size = positional[0].shape[2], positional[1].shape[1] if window is None else window
    keyword["distance_bias"] = torch.randn(heads, size, dtype=torch.float64, requires_grad=True)
    leaves.append(keyword["distance_bias"])
    if sinks:
        shape = positional[0].shape[1], 3, heads
        bias = torch.randn(1, *shape, dtype=torch.float64, requires_grad=True)
        keyword["sinks"] = keyword["sinks"]._replace(bias=bias)
        leaves.append(bias)
    expected = run(windowed_attention_reference, *case)
    for block_length in (1, 5, 16, 37, None):
        keyword["block_length"] = block_length
        assert worst(run(windowed_attention, *case), expected) < 1e-12
        if layout != "packed" and block_length in (5, 16):
            assert worst(run(exported, *case), expected) < 1e-12


@pytest.mark.parametrize("kind", ["by query", "decay", "decay and bias"])
@pytest.mark.parametrize("layout", ["dense", "older keys", "packed"])
@pytest.mark.parametrize("window", [1, 7, 16, 37, 100, None])
def test_bias_by_query_and_decay(window, layout, kind):
    older, packed = 9 if layout == "older keys" else 0, layout == "packed"
    case = arguments(window=window, older=older, packed=packed, logits=kind == "by query")
    positional, keyword, leaves = case
    (batch, length, heads, size), keys = positional[0].shape, positional[1].shape[1]
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return x.requires_grad_()

    if kind == "by query":
        table = normal(batch, heads, length, keys)

        def query_bias(rows, distance_CS):
            """Of each row of the batch and each query its own."""
            return table[:, :, rows[..., None], distance_CS.clamp(max=keys - 1)]

        keyword["query_bias"] = query_bias
        leaves.append(table)
    else:
        keyword["log_decay"] = -torch.rand(size, generator=generator, dtype=torch.float64)
    if kind == "decay and bias":
        keyword["distance_bias"] = normal(heads, keys if window is None else window)
        leaves.append(keyword["distance_bias"])
    if kind != "by query" and layout == "older keys":
        keyword |= {"delay": 2, "sink_logits": normal(heads)}
        leaves.append(keyword["sink_logits"])
    expected = run(windowed_attention_reference, *case)
    for block_length in (1, 5, 16, 37, None):
        keyword["block_length"] = block_length
        assert worst(run(windowed_attention, *case), expected) < 1e-12
        if layout != "packed" and block_length in (5, 16):
            assert worst(run(exported, *case), expected) < 1e-12


def test_delay_and_bias_one_query_at_a_time():
    """The reference against sums written out."""
    (q, k, v, window), keyword, _ = arguments((1, 9, 2, 1, 3, 4), window=4, bias=2)
    bias, logits = keyword["distance_bias"], keyword["sink_logits"]
    o = windowed_attention_reference(q, k, v, window, **keyword)
    for head in range(2):
        for i in range(9):
            total, above = logits[0, i, head].exp(), 0
            for d in range(window):
                if i - 2 - d >= 0:
                    score = 0.7 * (q[0, i, head] @ k[0, i - 2 - d, 0]) + bias[head, d]
                    total = total + score.exp()
                    above = above + score.exp() * v[0, i - 2 - d, 0]
            assert worst([o[0, i, head]], [above / total + 0 * v[0, 0, 0]]) < 1e-12


def test_step_with_a_bias():
    positional, keyword, _ = arguments((2, 20, 6, 2, 5, 7), window=8, bias=True)
    q, k, v, window = positional
    expected = windowed_attention_reference(*positional, **keyword)[:, -1:]
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    distance = 18 - order
    bias = keyword["distance_bias"][:, distance.clamp(0, window - 1)]
    o = attention_step(
        q[:, -1:],
        k[:, order],
        v[:, order],
        ((distance >= 0) & (distance < window)).expand(2, -1),
        scale=0.7,
        sink_logits=keyword["sink_logits"][:, -1:],
        slot_bias=bias.expand(2, -1, -1),
    )
    assert worst([o], [expected]) < 1e-12


def test_long_prime_length_in_default_blocks():
    for window in (3, 130, 700):
        case = arguments(shape=(1, 1031, 2, 1, 4, 4), window=window)
        expected = run(windowed_attention_reference, *case)
        assert worst(run(windowed_attention, *case), expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    """Scores and sums are in float32, so what is lost is the inputs' and the output's rounding."""
    positional, keyword, _ = arguments(window=7, sinks=True, logits=True, dtype=dtype)
    exact = [x.double() if torch.is_tensor(x) else x for x in positional]
    keyword = dict(keyword)
    sinks, logits = keyword.pop("sinks"), keyword.pop("sink_logits")
    o = windowed_attention(*positional, **keyword, sinks=sinks, sink_logits=logits)
    sinks = Sinks(*(x.double() for x in sinks[:3]), sinks.count)
    expected = windowed_attention_reference(
        *exact, **keyword, sinks=sinks, sink_logits=logits.double()
    )
    assert o.dtype == dtype
    # Half a unit in the last place of numbers below 4, and for float32 a sum of 20 products.
    assert worst([o], [expected]) < 4 * torch.finfo(dtype).eps


def test_step_is_the_last_query():
    positional, keyword, _ = arguments(shape=(2, 20, 6, 2, 5, 7), window=8, sinks=True, logits=True)
    q, k, v, window = positional
    expected = windowed_attention_reference(*positional, **keyword)[:, -1:]
    sinks = keyword["sinks"]
    # In any order, with others between them that are not shown.
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    o = attention_step(
        q[:, -1:],
        k[:, order],
        v[:, order],
        (order > 19 - window).expand(2, -1),
        scale=0.7,
        sinks=Sinks(sinks.q[:, -1:], sinks.k, sinks.v, sinks.count[:, -1:]),
        sink_logits=keyword["sink_logits"],
    )
    assert worst([o], [expected]) < 1e-12


@pytest.mark.parametrize("function", [windowed_attention, windowed_attention_reference])
def test_official_numbers(function):
    golden = golden_tensors("ops-swa")
    q, k, v = (golden[name].transpose(1, 2).requires_grad_() for name in "qkv")
    o = function(q, k, v, 12)
    grads = torch.autograd.grad(o, (q, k, v), golden["cotangent_0"])
    assert worst([o], [golden["o"]]) < 1e-12
    expected = [golden[f"grad_{name}"].transpose(1, 2) for name in "qkv"]
    # transformers takes its softmax in float32.
    assert worst(grads, expected) < 1e-6


@pytest.mark.parametrize("bias", [False, True])
def test_work_is_linear(bias):
    """Bytes written by forward and backward pass together grow as the length does."""
    counts = []
    for length in (2048, 8192):
        case = arguments(shape=(1, length, 2, 1, 4, 4), window=64, bias=bias)
        with BytesWritten() as written:
            run(windowed_attention, *case)
        counts.append(written.count)
    assert counts[1] < 4.1 * counts[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "window is at least 1"),
        ({"k": torch.zeros(1, 3, 2, 4)}, "S is at least T"),
        ({"k": torch.zeros(1, 4, 3, 4), "v": torch.zeros(1, 4, 3, 4)}, "G divides H"),
        (
            {"v": torch.zeros(1, 4, 2, 4), "k": torch.zeros(1, 4, 2, 5)},
            r"expected q \[B, T, H, K\]",
        ),
        ({"cu_seqlens": torch.tensor([0, 4]), "first_key": torch.tensor([0])}, "packed documents"),
        ({"delay": 1}, "0, or more with sink_logits"),
        ({"sink_logits": torch.zeros(2)}, r"sink_logits is \[H\] or \[B, T, H\]"),
        ({"window": 3, "distance_bias": torch.zeros(4, 2)}, r"distance_bias is .*\[4, 3\]"),
        ({"distance_bias": torch.zeros(4, 3)}, r"distance_bias is .*\[4, 4\]"),
    ],
)
def test_refused(change, message):
    inputs = {"q": torch.zeros(1, 4, 4, 4), "k": torch.zeros(1, 4, 2, 4)}
    inputs["v"] = inputs["k"] if "v" not in change else change["v"]
    if "k" in change and "v" not in change:
        inputs["v"] = change["k"]
    with pytest.raises(ValueError, match=message):
        windowed_attention(**inputs | change)
