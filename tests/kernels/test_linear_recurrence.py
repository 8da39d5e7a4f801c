"""The chunked path against the definition, the definition against the official code's numbers."""

import itertools

import pytest
import torch
from goldens import golden_tensors
from ladder import values_and_gradients, worst

from zoo.kernels.linear_recurrence import (
    linear_recurrence,
    linear_recurrence_chunked,
    linear_recurrence_reference,
)

FORMS = ("none", "H", "BTH", "BTHK")
# An empty document first, in the middle and last; one-token documents; one of exactly a chunk.
CU_SEQLENS = [0, 0, 1, 2, 18, 18, 34, 37, 37]


def arguments(form, bonus, packed, initial, shape=(2, 37, 3, 5, 7), dtype=torch.float64, seed=0):
    """Random inputs as (positional, keyword) arguments, all leaves that require gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    batch, time, heads, key_dim, value_dim = shape
    batch = 1 if packed else batch
    cu_seqlens = torch.tensor([min(x, time) for x in CU_SEQLENS]) if packed else None
    decay_shape = {
        "H": [heads],
        "BTH": [batch, time, heads],
        "BTHK": [batch, time, heads, key_dim],
    }.get(form)
    documents = len(CU_SEQLENS) - 1 if packed else batch
    positional = [
        normal(batch, time, heads, key_dim),
        normal(batch, time, heads, key_dim),
        normal(batch, time, heads, value_dim),
        # From almost none to e^-20 within one tensor.
        None if decay_shape is None else -((normal(*decay_shape).abs() * 5) ** 1.5),
    ]
    keyword = {
        "bonus": normal(heads, key_dim) if bonus else None,
        "initial_state": normal(documents, heads, key_dim, value_dim) if initial else None,
    }
    for x in (*positional, *keyword.values()):
        if x is not None:
            x.requires_grad_()
    return positional, keyword | {"cu_seqlens": cu_seqlens, "scale": 0.7}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bonus", [False, True], ids=["plain", "bonus"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("initial", [False, True], ids=["zero", "initial"])
def test_chunked_equals_reference(form, bonus, packed, initial):
    positional, keyword = arguments(form, bonus, packed, initial)
    expected = values_and_gradients(linear_recurrence_reference, positional, keyword)
    backwards = [False] if bonus and form != "BTHK" else [False, True]
    for chunk_length, by_hand in itertools.product((1, 8, 37, 64, None), backwards):

        def chunked(*args, chunk_length=chunk_length, by_hand=by_hand, **kwargs):
            return linear_recurrence_chunked(
                *args, chunk_length=chunk_length, hand_written_backward=by_hand, **kwargs
            )

        # Sums of a few hundred products in float64, in another order.
        assert worst(values_and_gradients(chunked, positional, keyword), expected) < 1e-11


@pytest.mark.parametrize("time", [1, 63, 64, 65, 131])
@pytest.mark.parametrize("form", FORMS)
def test_chunk_boundaries(time, form):
    positional, keyword = arguments(form, False, False, True, shape=(1, time, 2, 4, 6))
    expected = values_and_gradients(linear_recurrence_reference, positional, keyword)
    assert worst(values_and_gradients(linear_recurrence, positional, keyword), expected) < 1e-11


@pytest.mark.parametrize("form", FORMS)
def test_continues_from_its_state(form):
    positional, keyword = arguments(form, True, False, True)
    whole, final = linear_recurrence(*positional, **keyword, output_final_state=True)
    pieces, state = [], keyword.pop("initial_state")
    for start, end in itertools.pairwise((0, 1, 2, 20, 37)):
        part = [x if x is None or x.ndim == 1 else x[:, start:end] for x in positional]
        o, state = linear_recurrence(*part, **keyword, initial_state=state, output_final_state=True)
        pieces.append(o)
    assert worst([torch.cat(pieces, 1), state], [whole, final]) < 1e-12


@pytest.mark.parametrize(("form", "bonus"), [*((form, False) for form in FORMS), ("BTHK", True)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_plain_pytorch(form, bonus, dtype):
    """The error against float64 is at most twice that of the reference in the same precision.

    The reference takes the same rounded inputs and sums in float32, so what is left is the rounding
    of its output.
    """
    low, keyword = arguments(form, bonus, False, True, shape=(2, 131, 3, 16, 16), dtype=dtype)
    exact = [None if x is None else x.detach().double().requires_grad_() for x in low]
    exact_keyword = {
        name: x.detach().double().requires_grad_() if torch.is_tensor(x) else x
        for name, x in keyword.items()
    }
    expected = values_and_gradients(linear_recurrence_reference, exact, exact_keyword)
    plain = values_and_gradients(linear_recurrence_reference, low, keyword)
    ours = values_and_gradients(linear_recurrence, low, keyword)
    for a, b, c in zip(ours, plain, expected, strict=True):
        error, allowed = ((x.double() - c).abs().max().item() for x in (a, b))
        # Two values a hair apart may round to neighbours, and plain PyTorch's to the right one.
        ulp = torch.finfo(a.dtype).eps * c.abs().max().item()
        assert error <= 2 * allowed + ulp


@pytest.mark.parametrize("bonus", [False, True], ids=["plain", "bonus"])
@pytest.mark.parametrize("strength", ["uniform to -20", "0 or -20", "uniform to -1000"])
def test_decay_per_channel_of_any_strength(strength, bonus):
    """Weak decays behind strong ones, where differences of long sums of log decays would be off."""
    positional, keyword = arguments("BTHK", bonus, False, True, shape=(1, 131, 2, 16, 20))
    uniform = torch.rand(positional[3].shape, generator=torch.Generator().manual_seed(2))
    decay = {
        "uniform to -20": -20 * uniform,
        "0 or -20": -20 * uniform.round(),
        "uniform to -1000": -1000 * uniform,
    }
    positional[3] = decay[strength].double().requires_grad_()
    expected = values_and_gradients(linear_recurrence_reference, positional, keyword)
    single, single_keyword = (
        [x.detach().float().requires_grad_() for x in positional],
        {
            name: x.detach().float().requires_grad_() if torch.is_tensor(x) else x
            for name, x in keyword.items()
        },
    )
    got = values_and_gradients(linear_recurrence, single, single_keyword)
    # A few roundings, 4e-7, but for the gradient of the decay, measured 3e-6: it is a difference of
    # sums, each up to 20, and next to nothing itself where decay is strong.
    assert worst(got, expected) < 6e-6
    got = values_and_gradients(linear_recurrence, positional, keyword)
    assert worst(got, expected) < 1e-13


def test_state_is_float32_and_under_autocast_too():
    positional, keyword = arguments("H", False, False, False, dtype=torch.bfloat16)
    _, state = linear_recurrence(*positional, **keyword, output_final_state=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, again = linear_recurrence(*positional, **keyword, output_final_state=True)
    assert state.dtype == again.dtype == torch.float32
    assert torch.equal(state, again)


def test_a_thousand_documents():
    """Documents of one token and one of 5,000 in the same stream."""
    lengths = [1] * 1000 + [5000]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, sum(lengths), 2, 8, generator=generator).unbind(0)
    o, state = linear_recurrence(
        q, k, v, torch.tensor([-0.1, -0.01]), cu_seqlens=cu_seqlens, output_final_state=True
    )
    alone, last = linear_recurrence(
        q[:, 1000:], k[:, 1000:], v[:, 1000:], torch.tensor([-0.1, -0.01]), output_final_state=True
    )
    assert worst([o[:, 1000:], state[-1:]], [alone, last]) < 1e-5
    one = (q * k).sum(-1, keepdim=True) * v
    assert worst([o[:, :1000]], [one[:, :1000]]) < 1e-5


def test_non_contiguous_inputs():
    positional, keyword = arguments("BTH", False, False, False)
    expected = values_and_gradients(linear_recurrence, positional, keyword)
    strided = [
        x.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()
        for x in positional
    ]
    assert not strided[0].is_contiguous()
    assert worst(values_and_gradients(linear_recurrence, strided, keyword), expected) < 1e-12


@pytest.mark.parametrize("decay", [-1e-8, -0.01, -100.0])
def test_extremes_stay_finite(decay):
    """65,536 tokens in bf16 with a decay of almost 1, and of almost 0."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, 65536, 1, 8, generator=generator).bfloat16().requires_grad_()
        for _ in range(3)
    )
    o, state = linear_recurrence(q, k, v, torch.tensor([decay]), output_final_state=True)
    (o.float().sum() + state.sum()).backward()
    for x in (o, state, q.grad, k.grad, v.grad):
        assert x.isfinite().all()


def test_official_retention():
    """flash-linear-attention's naive retention, and torchscale's through the normaliser."""
    golden = golden_tensors("ops-retention")
    log_gamma = golden["raw_log_gamma"]
    inputs = [golden[f"raw_{name}"].requires_grad_() for name in ("q", "k", "v", "s0")]
    q, k, v, s0 = inputs
    for function in (linear_recurrence_reference, linear_recurrence):
        y, final = function(
            q,
            k,
            v,
            log_gamma,
            scale=q.shape[-1] ** -0.5,
            initial_state=s0,
            output_final_state=True,
        )
        assert worst([y, final], [golden["raw_y"], golden["raw_s_final"]]) < 1e-12
        loss = (y * golden["raw_cotangent_0"]).sum() + (final * golden["raw_cotangent_1"]).sum()
        gradients = torch.autograd.grad(loss, inputs)
        expected = [golden[f"raw_grad_{name}"] for name in ("q", "k", "v", "s0")]
        assert worst(gradients, expected) < 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(q=a["q"][:, :0], k=a["k"][:, :0], v=a["v"][:, :0]), "no tokens"),
        (lambda a: a.update(log_decay=torch.tensor([0.1, -1.0])), "at most 0"),
        (lambda a: a.update(log_decay=torch.zeros(3)), r"log_decay is None, \[H\]"),
        (lambda a: a.update(k=a["k"][..., :3]), "k has the shape of q"),
        (lambda a: a.update(v=a["v"][:, :3]), r"v is \[B, T, H, V\]"),
        (lambda a: a.update(bonus=torch.zeros(4)), r"bonus is \[H, K\]"),
        (lambda a: a.update(initial_state=torch.zeros(1, 2, 4, 4)), "initial_state is"),
        (lambda a: a.update(cu_seqlens=torch.tensor([0, 5])), "B = 1"),
        (
            lambda a: a.update(backend="cuda"),
            "backend is one of auto, torch, triton, fla, got 'cuda'",
        ),
        (
            lambda a: a.update(backend="triton", q=a["q"].double()),
            "takes float32, bfloat16 or float16, got torch.float64",
        ),
    ],
)
def test_bad_arguments(change, message):
    given = {name: torch.ones(2, 5, 2, 4) for name in ("q", "k", "v")}
    change(given)
    with pytest.raises(ValueError, match=message) as error:
        linear_recurrence(**given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", ["triton", "fla"])
def test_what_was_asked_for_is_done_or_refused(backend, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.ones(1, 5, 2, 4)
    with pytest.raises(ValueError, match="needs tensors on a GPU, got cpu|is not installed"):
        linear_recurrence(x, x, x, backend=backend)


def test_bad_boundaries():
    x = torch.ones(1, 5, 2, 4)
    for bounds in ([0, 4], [1, 5], [0, 3, 2, 5]):
        with pytest.raises(ValueError, match="cu_seqlens grows from 0 to T = 5"):
            linear_recurrence(x, x, x, cu_seqlens=torch.tensor(bounds))
