"""The banded path against the definition, the definition against transformers' own numbers."""

import pytest
import torch
from goldens import golden_tensors
from ladder import worst
from torch.utils._pytree import tree_leaves

from zoo.kernels.windowed_attention import (
    Sinks,
    attention_step,
    windowed_attention,
    windowed_attention_reference,
)

# An empty document first, in the middle and last; one-token documents; one of exactly a block.
CU_SEQLENS = [0, 0, 1, 2, 18, 18, 34, 37, 37]


def arguments(
    shape=(2, 37, 6, 2, 5, 7),
    older=0,
    window=None,
    packed=False,
    sinks=False,
    logits=False,
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
    return positional, keyword, leaves


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


def test_work_is_linear():
    """Bytes written by forward and backward pass together grow as the length does."""
    written = {}

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            old = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if torch.is_tensor(x)}
            for x in tree_leaves(result):
                if torch.is_tensor(x) and x.untyped_storage().data_ptr() not in old:
                    written[length] = written.get(length, 0) + x.nbytes
            return result

    for length in (2048, 8192):
        case = arguments(shape=(1, length, 2, 1, 4, 4), window=64)
        with Watch():
            run(windowed_attention, *case)
    assert written[8192] < 4.1 * written[2048]


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
    ],
)
def test_refused(change, message):
    inputs = {"q": torch.zeros(1, 4, 4, 4), "k": torch.zeros(1, 4, 2, 4)}
    inputs["v"] = inputs["k"] if "v" not in change else change["v"]
    if "k" in change and "v" not in change:
        inputs["v"] = change["k"]
    with pytest.raises(ValueError, match=message):
        windowed_attention(**inputs | change)
