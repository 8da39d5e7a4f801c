"""The chunked path against the definition, the definition against the official code's numbers."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from goldens import golden_tensors
from ladder import values_and_gradients, worst

from zoo.kernels.delta_recurrence import (
    CHUNK_LENGTH,
    delta_recurrence,
    delta_recurrence_chunked,
    delta_recurrence_reference,
)
from zoo.kernels.linear_recurrence import linear_recurrence

FORMS = ("none", "H", "BTH", "BTHK")
# An empty document first, in the middle and last; one-token documents; one of exactly a chunk.
CU_SEQLENS = [0, 0, 1, 2, 18, 18, 34, 37, 37]
# RWKV-7's decay is exp(-exp(-0.5) sigmoid(.)).
STRONGEST = -0.6065306597126334


def arguments(form, packed, initial, shape=(2, 37, 3, 5, 7), dtype=torch.float64, seed=0):
    """Random inputs as (positional, keyword) arguments, all leaves that require gradients.

    a and b have no relation to each other or to k, so that none can stand in for another.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

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
        # Short enough for states that stay of order 1 without any decay.
        0.7 * F.normalize(normal(batch, time, heads, key_dim), dim=-1),
        0.7 * F.normalize(normal(batch, time, heads, key_dim), dim=-1),
    ]
    state = normal(documents, heads, key_dim, value_dim) if initial else None
    positional, (state,) = (
        [None if x is None else x.to(dtype).requires_grad_() for x in tensors]
        for tensors in (positional, [state])
    )
    return positional, {"initial_state": state, "cu_seqlens": cu_seqlens, "scale": 0.7}


def rwkv7_arguments(shape, dtype=torch.float32, decay=None):
    """What RWKV-7 calls the operator with: a = -kk, b = kk * iclr; decay: the same everywhere."""
    generator = torch.Generator().manual_seed(0)
    batch, time, heads, key_dim, value_dim = shape
    q, k, kk, gate, w = torch.randn(5, batch, time, heads, key_dim, generator=generator)
    v = torch.randn(batch, time, heads, value_dim, generator=generator)
    kk = F.normalize(kk, dim=-1)
    log_decay = STRONGEST * w.sigmoid() if decay is None else torch.full_like(w, decay)
    return [x.to(dtype).requires_grad_() for x in (q, k, v, log_decay, -kk, kk * gate.sigmoid())]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("initial", [False, True], ids=["zero", "initial"])
def test_chunked_equals_reference(form, packed, initial):
    positional, keyword = arguments(form, packed, initial)
    expected = values_and_gradients(delta_recurrence_reference, positional, keyword)
    for chunk_length in (1, 2, 8, 64, None):

        def chunked(*args, chunk_length=chunk_length, **kwargs):
            return delta_recurrence_chunked(*args, chunk_length=chunk_length, **kwargs)

        # Sums of a few hundred products in float64, in another order.
        assert worst(values_and_gradients(chunked, positional, keyword), expected) < 1e-11


@pytest.mark.parametrize("time", [1, CHUNK_LENGTH - 1, CHUNK_LENGTH, CHUNK_LENGTH + 1, 131])
@pytest.mark.parametrize("form", FORMS)
def test_chunk_boundaries(time, form):
    positional, keyword = arguments(form, False, True, shape=(1, time, 2, 4, 6))
    expected = values_and_gradients(delta_recurrence_reference, positional, keyword)
    assert worst(values_and_gradients(delta_recurrence, positional, keyword), expected) < 1e-11


@pytest.mark.parametrize("form", FORMS)
def test_continues_from_its_state(form):
    positional, keyword = arguments(form, False, True)
    whole, final = delta_recurrence(*positional, **keyword, output_final_state=True)
    pieces, state = [], keyword.pop("initial_state")
    for start, end in itertools.pairwise((0, 1, 2, 20, 37)):
        part = [x if x is None or x.ndim == 1 else x[:, start:end] for x in positional]
        o, state = delta_recurrence(*part, **keyword, initial_state=state, output_final_state=True)
        pieces.append(o)
    assert worst([torch.cat(pieces, 1), state], [whole, final]) < 1e-12


def test_delta_rule():
    """Schlag et al. 2021, eq. 23-24: what the state holds at k moves towards v by beta."""
    generator = torch.Generator().manual_seed(0)
    time, key_dim, value_dim = 70, 6, 4
    q, k = torch.randn(2, time, key_dim, generator=generator, dtype=torch.float64)
    k = F.normalize(k, dim=-1)
    v = torch.randn(time, value_dim, generator=generator, dtype=torch.float64)
    beta = torch.rand(time, 1, generator=generator, dtype=torch.float64)
    fast_weight, outputs = torch.zeros(value_dim, key_dim, dtype=torch.float64), []
    for t in range(time):
        held = fast_weight @ k[t]
        fast_weight = fast_weight + torch.outer(beta[t] * (v[t] - held), k[t])
        outputs.append(fast_weight @ q[t])
    arguments = (x[None, :, None] for x in (q, k, beta * v, -k, beta * k))
    q, k, v, a, b = arguments
    for function in (delta_recurrence_reference, delta_recurrence):
        o, state = function(q, k, v, None, a, b, output_final_state=True)
        assert worst([o[0, :, 0], state[0, 0].T], [torch.stack(outputs), fast_weight]) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_nothing_removed_is_the_linear_recurrence(form):
    (q, k, v, log_decay, a, b), keyword = arguments(form, False, True)
    expected = linear_recurrence(q, k, v, log_decay, **keyword, output_final_state=True)
    for removal in ((a, 0 * b), (0 * a, b)):
        got = delta_recurrence(q, k, v, log_decay, *removal, **keyword, output_final_state=True)
        assert worst(got, expected) < 1e-12


def test_official_rwkv7():
    """BlinkDL's RWKV7_OP from a zero state; flash-linear-attention's dplr_recurrence from s0."""
    golden = golden_tensors("ops-wkv7")
    inputs = [golden[name].requires_grad_() for name in ("r", "w", "k", "v", "a", "b", "s0")]
    r, w, k, v, a, b, s0 = inputs
    for function in (delta_recurrence_reference, delta_recurrence):
        y, _ = function(r, k, v, -w.exp(), a, b)
        assert worst([y], [golden["y"]]) < 1e-12
        y, final = function(r, k, v, -w.exp(), a, b, initial_state=s0, output_final_state=True)
        assert worst([final], [golden["s_final"]]) < 1e-12
        loss = (y * golden["s_cotangent_0"]).sum() + (final * golden["s_cotangent_1"]).sum()
        gradients = torch.autograd.grad(loss, inputs)
        expected = [golden[f"s_grad_{name}"] for name in ("r", "w", "k", "v", "a", "b", "s0")]
        assert worst(gradients, expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", [None, 0.0], ids=["decay", "none"])
def test_low_precision_is_as_good_as_plain_pytorch(dtype, decay):
    """The error against float64 is at most twice that of the reference in the same precision.

    The reference takes the same rounded inputs and sums in float32, so what is left is the rounding
    of its output.
    """
    low = rwkv7_arguments((2, 131, 3, 16, 24), dtype, decay)
    generator = torch.Generator().manual_seed(2)
    state = torch.randn(2, 3, 16, 24, generator=generator).requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in low]
    keyword = {"initial_state": state.detach().double().requires_grad_()}
    expected = values_and_gradients(delta_recurrence_reference, exact, keyword)
    keyword = {"initial_state": state}
    plain = values_and_gradients(delta_recurrence_reference, low, keyword)
    ours = values_and_gradients(delta_recurrence, low, keyword)
    for got, reference, c in zip(ours, plain, expected, strict=True):
        error, allowed = ((x.double() - c).abs().max().item() for x in (got, reference))
        # Two values a hair apart may round to neighbours, and plain PyTorch's to the right one.
        ulp = torch.finfo(got.dtype).eps * c.abs().max().item()
        assert error <= 2 * allowed + ulp


def test_state_is_float32_and_under_autocast_too():
    positional = rwkv7_arguments((1, 50, 2, 8, 8), torch.bfloat16)
    _, state = delta_recurrence(*positional, output_final_state=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, again = delta_recurrence(*positional, output_final_state=True)
    assert o.dtype == torch.bfloat16
    assert state.dtype == again.dtype == torch.float32
    assert torch.equal(state, again)


@pytest.mark.parametrize("decay", [0.0, -1e-8, STRONGEST, -100.0, -torch.inf])
def test_extremes_stay_finite(decay):
    """65,536 tokens in bf16: no decay, RWKV-7's strongest, stronger, and none of the past kept."""
    positional = rwkv7_arguments((1, 65536, 1, 8, 8), torch.bfloat16, decay)
    o, state = delta_recurrence(*positional, output_final_state=True)
    (o.float().sum() + state.sum()).backward()
    for x in (o, state, *(x.grad for x in positional)):
        assert x.isfinite().all()


@pytest.mark.parametrize("decay", [STRONGEST, -30.0, -1000.0])
def test_strong_decay_in_float32(decay):
    """A token of strong decay among tokens of almost none: no digits are lost to a difference."""
    low = rwkv7_arguments((1, 96, 2, 16, 16), decay=-0.01)
    with torch.no_grad():
        low[3][:, ::7] = decay
    exact = [x.detach().double().requires_grad_() for x in low]
    expected = values_and_gradients(delta_recurrence_reference, exact, {})
    assert worst(values_and_gradients(delta_recurrence, low, {}), expected) < 5e-6


def test_a_thousand_documents():
    """Documents of one token and one of 2,000 in the same stream."""
    lengths = [1] * 1000 + [2000]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
    positional = [x.detach() for x in rwkv7_arguments((1, sum(lengths), 2, 8, 8))]
    o, state = delta_recurrence(*positional, cu_seqlens=cu_seqlens, output_final_state=True)
    last = delta_recurrence(*(x[:, 1000:] for x in positional), output_final_state=True)
    assert worst([o[:, 1000:], state[-1:]], last) < 1e-5
    q, k, v = positional[:3]
    one = (q * k).sum(-1, keepdim=True) * v
    assert worst([o[:, :1000]], [one[:, :1000]]) < 1e-5


def test_memory_is_linear_in_time():
    """The backward pass finds the inputs and the state that enters each chunk, no more."""
    saved = []
    for time in (256, 512):
        sizes = {}

        def pack(x, sizes=sizes):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        positional = rwkv7_arguments((1, time, 2, 16, 16))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            o, _ = delta_recurrence(*positional)
        saved.append(sum(sizes.values()))
    assert saved[1] < 2.05 * saved[0]
    inputs = sum(x.nbytes for x in positional)
    assert saved[1] <= inputs + 512 // CHUNK_LENGTH * 2 * 16 * 16 * 4


def test_non_contiguous_inputs():
    positional, keyword = arguments("BTHK", False, False)
    expected = values_and_gradients(delta_recurrence, positional, keyword)
    strided = [
        x.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()
        for x in positional
    ]
    assert not strided[0].is_contiguous()
    assert worst(values_and_gradients(delta_recurrence, strided, keyword), expected) < 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.update({n: x[n][:, :0] for n in "qkvab"}), "no tokens"),
        (lambda x: x.update(log_decay=torch.tensor([0.1, -1.0])), "at most 0"),
        (lambda x: x.update(log_decay=torch.zeros(3)), r"log_decay is None, \[H\]"),
        (lambda x: x.update(k=x["k"][..., :3]), "k has the shape of q"),
        (lambda x: x.update(v=x["v"][:, :3]), r"v is \[B, T, H, V\]"),
        (lambda x: x.update(a=x["a"][..., :3]), "a has the shape of q"),
        (lambda x: x.update(b=x["b"][:, :3]), "b has the shape of q"),
        (lambda x: x.update(initial_state=torch.zeros(1, 2, 4, 4)), "initial_state is"),
        (lambda x: x.update(cu_seqlens=torch.tensor([0, 5])), "B = 1"),
        (lambda x: x.update(backend="cuda"), "backend is one of"),
        (
            lambda x: x.update({n: x[n].double() for n in "qkvab"} | {"backend": "triton"}),
            "float32",
        ),
    ],
)
def test_bad_arguments(change, message):
    given = {name: torch.ones(2, 5, 2, 4) for name in "qkvab"} | {"log_decay": None}
    change(given)
    with pytest.raises(ValueError, match=f"delta_recurrence: .*{message}") as error:
        delta_recurrence(**given)
    assert "\n" not in str(error.value)


def test_bad_boundaries():
    x = torch.ones(1, 5, 2, 4)
    for bounds in ([0, 4], [1, 5], [0, 3, 2, 5]):
        with pytest.raises(ValueError, match="delta_recurrence: cu_seqlens grows from 0 to T = 5"):
            delta_recurrence(x, x, x, None, x, x, cu_seqlens=torch.tensor(bounds))


def test_bad_chunk_length():
    x = torch.ones(1, 5, 2, 4)
    with pytest.raises(ValueError, match="a power of two, got 24"):
        delta_recurrence_chunked(x, x, x, None, x, x, chunk_length=24)
