"""The chunked path against the definition, the definition against the official code's numbers."""

import itertools

import pytest
import torch
from goldens import golden_tensors
from ladder import values_and_gradients

from zoo.kernels import wkv4 as module
from zoo.kernels.wkv4 import wkv4, wkv4_chunked, wkv4_reference

# An empty document first, in the middle and last; one-token documents; one of exactly a chunk.
CU_SEQLENS = [0, 0, 1, 2, 18, 18, 34, 37, 37]
FUNCTIONS = pytest.mark.parametrize("function", [wkv4_reference, wkv4])


def arguments(
    packed, initial, shape=(2, 37, 5), dtype=torch.float64, seed=0, cu_seqlens=CU_SEQLENS
):
    """Random inputs as (positional, keyword) arguments, all leaves that require gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    batch, time, width = shape
    batch = 1 if packed else batch
    documents = len(cu_seqlens) - 1 if packed else batch
    # Decays from almost none to e^-20, keys over many powers of e.
    positional = [-normal(width).mul(2).exp(), normal(width)]
    positional += [3 * normal(batch, time, width), normal(batch, time, width)]
    state = normal(documents, 3, width)
    state[:, 1] = state[:, 1].exp()
    positional = [x.to(dtype).requires_grad_() for x in positional]
    return positional, {
        "initial_state": state.to(dtype).requires_grad_() if initial else None,
        "cu_seqlens": torch.tensor(cu_seqlens) if packed else None,
    }


def worst(got, expected):
    """Largest difference, relative to each tensor's largest entry if that is above 1.

    The max of a state without tokens, -1e38, is not taken for such a scale.
    """
    differences = []
    for a, b in zip(got, expected, strict=True):
        a, b = (x.double().clamp(min=-1e9) for x in (a, b))
        differences.append((a - b).abs().max() / b[b > -1e9].abs().max().clamp(min=1))
    # Python's own max would pass over what is not a number.
    return torch.stack(differences).max().item()


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("initial", [False, True], ids=["empty", "initial"])
def test_chunked_equals_reference(packed, initial):
    positional, keyword = arguments(packed, initial)
    expected = values_and_gradients(wkv4_reference, positional, keyword)
    for chunk_length in (1, 8, 37, 64, None):

        def chunked(*args, chunk_length=chunk_length, **kwargs):
            return wkv4_chunked(*args, chunk_length=chunk_length, **kwargs)

        # Sums of a few hundred products in float64, in another order.
        assert worst(values_and_gradients(chunked, positional, keyword), expected) < 1e-11


@pytest.mark.parametrize("positions", [1, 8, 11, 16])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_blocks_of_positions(packed, positions, monkeypatch):
    """One position of a chunk of 16 at a time, some, with a rest, or all."""
    positional, keyword = arguments(packed, True)
    expected = values_and_gradients(wkv4_reference, positional, keyword)
    monkeypatch.setattr(module, "_FEWEST", 1)
    blocks = module._blocks
    lengths = set()

    def counted(*x_RCX):
        rows, _, width = x_RCX[0].shape
        monkeypatch.setattr(module, "_BLOCK", positions * rows * width)
        for parts in blocks(*x_RCX):
            lengths.add(len(parts[0]))
            yield parts

    monkeypatch.setattr(module, "_blocks", counted)

    def chunked(*args, **kwargs):
        return wkv4_chunked(*args, chunk_length=16, **kwargs)

    assert worst(values_and_gradients(chunked, positional, keyword), expected) < 1e-11
    assert lengths == {positions, 16 % positions or positions}


@pytest.mark.parametrize("time", [1, 7, 8, 9, 15, 16, 17, 131])
@pytest.mark.parametrize("initial", [False, True], ids=["empty", "initial"])
def test_chunk_boundaries(time, initial):
    positional, keyword = arguments(False, initial, shape=(2, time, 6))
    expected = values_and_gradients(wkv4_reference, positional, keyword)
    for chunk_length in (8, None):

        def chunked(*args, chunk_length=chunk_length, **kwargs):
            return wkv4_chunked(*args, chunk_length=chunk_length, **kwargs)

        assert worst(values_and_gradients(chunked, positional, keyword), expected) < 1e-11


def test_continues_from_its_state():
    """Values, and gradients through the states between the pieces."""
    (w, u, k, v), keyword = arguments(False, True)
    leaves = [w, u, k, v, keyword["initial_state"]]
    whole, final = wkv4(w, u, k, v, **keyword, output_final_state=True)
    pieces, state = [], keyword["initial_state"]
    for start, end in itertools.pairwise((0, 1, 2, 20, 37)):
        part = k[:, start:end], v[:, start:end]
        y, state = wkv4(w, u, *part, initial_state=state, output_final_state=True)
        pieces.append(y)
    joined = torch.cat(pieces, 1)
    assert worst([joined, state], [whole, final]) < 1e-12
    cotangent = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1)).double()
    got, expected = (torch.autograd.grad((y * cotangent).sum(), leaves) for y in (joined, whole))
    assert worst(got, expected) < 1e-11


def test_the_units_of_a_state_do_not_matter():
    """(num, den, max) and (e^c num, e^c den, max - c) are the same sums."""
    positional, keyword = arguments(False, True)
    state = keyword["initial_state"].detach()
    shift = torch.tensor([0.0, 0.0, 30.0]).double()[:, None]
    scale = torch.tensor([-30.0, -30.0, 0.0]).double()[:, None].exp()
    for function in (wkv4, wkv4_reference):
        y, _ = function(*positional, initial_state=state)
        again, _ = function(*positional, initial_state=state * scale + shift)
        assert worst([again], [y]) < 1e-12


@FUNCTIONS
@pytest.mark.parametrize("start", [-1e38, -1e30, 0.0])
def test_an_empty_state_is_no_state(function, start):
    positional, _ = arguments(False, False)
    state = torch.zeros(2, 3, 5, dtype=torch.float64)
    state[:, 2] = start
    assert (
        worst([function(*positional, initial_state=state)[0]], [function(*positional)[0]]) < 1e-12
    )


@FUNCTIONS
def test_is_the_formula(function):
    """Against the two sums, written out over all pairs."""
    (w, u, k, v), _ = arguments(False, False)
    t = torch.arange(37)
    distance = t[:, None] - 1 - t
    exponent = distance[..., None] * w + k[:, None]
    exponent = torch.where((distance == -1)[..., None], u + k[:, None], exponent)
    weight = exponent.masked_fill((distance < -1)[..., None], -torch.inf).softmax(2)
    expected = (weight * v[:, None]).sum(2)
    assert worst([function(w, u, k, v)[0]], [expected]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_low_precision_is_as_good_as_plain_pytorch(dtype, packed):
    """The error against float64 is at most twice that of the reference in the same precision.

    The reference takes the same rounded inputs and sums in float32, so what is left is the rounding
    of its output.
    """
    time = CU_SEQLENS[-1] if packed else 131
    low, keyword = arguments(packed, True, shape=(2, time, 48), dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in low]
    state = keyword.pop("initial_state").detach()
    expected = values_and_gradients(
        wkv4_reference, exact, {"initial_state": state.double().requires_grad_()} | keyword
    )
    keyword = {"initial_state": state.requires_grad_()} | keyword
    plain = values_and_gradients(wkv4_reference, low, keyword)
    ours = values_and_gradients(wkv4, low, keyword)
    for a, b, c in zip(ours, plain, expected, strict=True):
        error, allowed = ((x.double() - c).abs().max().item() for x in (a, b))
        # Two values a hair apart may round to neighbours, and plain PyTorch's to the right one.
        ulp = torch.finfo(a.dtype).eps * c.abs().max().item()
        assert error <= 2 * allowed + ulp


def test_state_is_float32_and_under_autocast_too():
    positional, keyword = arguments(False, False, dtype=torch.bfloat16)
    y, state = wkv4(*positional, **keyword, output_final_state=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, again = wkv4(*positional, **keyword, output_final_state=True)
    assert y.dtype == torch.bfloat16
    assert state.dtype == again.dtype == torch.float32
    assert torch.equal(state, again)


def test_a_thousand_documents():
    """Documents of one token and one of 5,000 in the same stream."""
    lengths = [1] * 1000 + [5000]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
    (w, u, k, v), _ = arguments(False, False, shape=(1, sum(lengths), 8), dtype=torch.float32)
    y, state = wkv4(w, u, k, v, cu_seqlens=cu_seqlens, output_final_state=True)
    alone, last = wkv4(w, u, k[:, 1000:], v[:, 1000:], output_final_state=True)
    assert worst([y[:, 1000:], state[-1:]], [alone, last]) < 1e-5
    assert torch.equal(y[:, :1000], v[:, :1000])


def test_non_contiguous_inputs():
    positional, keyword = arguments(False, True)
    expected = values_and_gradients(wkv4, positional, keyword)
    strided = [
        x.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()
        for x in positional
    ]
    assert not strided[2].is_contiguous()
    assert worst(values_and_gradients(wkv4, strided, keyword), expected) < 1e-12


@pytest.mark.parametrize("decay", [-1e-8, -0.01, -1000.0])
@pytest.mark.parametrize("spread", [1.0, 60.0])
def test_extremes_stay_finite(decay, spread):
    """65,536 tokens in bf16 with a decay of almost 1, and of almost 0, and keys beyond e^88."""
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 65536, 4, generator=generator) for _ in range(2))
    inputs = [torch.full((4,), decay), torch.ones(4), (k * spread).bfloat16(), v.bfloat16()]
    inputs = [x.requires_grad_() for x in inputs]
    y, state = wkv4(*inputs, output_final_state=True)
    (y.float().sum() + state.sum()).backward()
    for x in (y, state, *(x.grad for x in inputs)):
        assert x.isfinite().all()
    exact, _ = wkv4(*(x.detach().double() for x in inputs))
    assert worst([y], [exact]) < torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("key", [-60.0, 60.0])
def test_keys_of_sixty_throughout(key):
    positional, keyword = arguments(False, False, dtype=torch.float32)
    positional[2] = torch.full((2, 37, 5), key, requires_grad=True)
    got = values_and_gradients(wkv4, positional, keyword)
    exact = [x.detach().double().requires_grad_() for x in positional]
    assert worst(got, values_and_gradients(wkv4_reference, exact, keyword)) < 1e-4


@FUNCTIONS
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_a_decay_of_zero(function, packed):
    """With w = -inf a token sees itself and the one before, the first one the initial state."""
    (_, u, k, v), keyword = arguments(packed, True)
    state = keyword["initial_state"]
    w = torch.full((5,), -torch.inf, dtype=torch.float64, requires_grad=True)
    y, final = function(w, u, k, v, **keyword, output_final_state=True)
    bounds = [(0, 0, 37), (1, 0, 37)]
    if packed:
        bounds = [(0, *pair) for pair in itertools.pairwise(CU_SEQLENS)]
    for n, (row, start, end) in enumerate(bounds):
        num, den, top = state[n]
        for t in range(start, end):
            now = (u + k[row, t]).exp()
            expected = (num * top.exp() + now * v[row, t]) / (den * top.exp() + now)
            assert worst([y[row, t]], [expected]) < 1e-12
            num, den, top = v[row, t], torch.ones(5), k[row, t]
        assert worst([final[n]], [torch.stack([num, den.to(num), top])]) < 1e-12
    leaves = [w, u, k, v, state]
    gradients = torch.autograd.grad(y.square().sum() + final[:, :2].sum(), leaves)
    assert gradients[0].eq(0).all()
    # Any decay this strong is one of zero.
    almost = torch.full((5,), -1e4, dtype=torch.float64, requires_grad=True)
    y, final = function(almost, u, k, v, **keyword, output_final_state=True)
    expected = torch.autograd.grad(y.square().sum() + final[:, :2].sum(), [almost, *leaves[1:]])
    assert worst(gradients, expected) < 1e-12


@FUNCTIONS
def test_official_kernel(function):
    """The CUDA kernel of RWKV-LM, compiled for the CPU; its gradient is of the raw time_decay."""
    golden = golden_tensors("ops-wkv4")
    names = ("time_decay", "time_first", "k", "v")
    inputs = [golden[name].requires_grad_() for name in names]
    time_decay, u, k, v = inputs
    y, state = function(-time_decay.exp(), u, k, v, output_final_state=True)
    final = torch.stack([golden[f"final_{name}"] for name in ("num", "den", "max")], dim=1)
    assert worst([y, state], [golden["y"], final]) < 1e-12
    gradients = torch.autograd.grad((y * golden["cotangent_0"]).sum(), inputs)
    assert worst(gradients, [golden[f"grad_{name}"] for name in names]) < 1e-12

    extreme, _ = function(-time_decay.exp(), u, golden["x_k"], golden["x_v"])
    assert worst([extreme], [golden["x_y"]]) < 1e-12


@FUNCTIONS
def test_official_code_with_a_state(function):
    """transformers' loop in float64, which takes and returns (num, den, max)."""
    golden = golden_tensors("ops-wkv4")
    names = ("time_decay", "time_first", "k", "v", "num0", "den0", "max0")
    inputs = [golden[f"s_{name}"].requires_grad_() for name in names]
    time_decay, u, k, v, *initial = inputs
    y, state = function(
        -time_decay.exp(),
        u,
        k,
        v,
        initial_state=torch.stack(initial, dim=1),
        output_final_state=True,
    )
    final = torch.stack([golden[f"s_final_{name}"] for name in ("num", "den", "max")], dim=1)
    assert worst([y, state], [golden["s_y"], final]) < 1e-12
    gradients = torch.autograd.grad((y * golden["s_cotangent_0"]).sum(), inputs)
    assert worst(gradients, [golden[f"s_grad_{name}"] for name in names]) < 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(k=a["k"][:, :0], v=a["v"][:, :0]), "no tokens"),
        (lambda a: a.update(w=torch.tensor([0.1, -1, -1, -1])), "at most 0"),
        (lambda a: a.update(w=-torch.ones(3)), r"w is \[D\]"),
        (lambda a: a.update(u=torch.ones(1, 4)), r"u is \[D\]"),
        (lambda a: a.update(k=a["k"][0]), r"k is \[B, T, D\]"),
        (lambda a: a.update(v=a["v"][:, :3]), "v has the shape of k"),
        (lambda a: a.update(initial_state=torch.zeros(1, 3, 4)), "initial_state is"),
        (lambda a: a.update(cu_seqlens=torch.tensor([0, 5])), "B = 1"),
        (lambda a: a.update(backend="cuda"), "backend is one of"),
        (lambda a: a.update(backend="fla"), "no packed documents"),
        (lambda a: a.update(backend="triton", k=a["k"].double()), "takes float32"),
    ],
)
def test_bad_arguments(change, message):
    given = {"w": -torch.ones(4), "u": torch.ones(4)}
    given |= {name: torch.ones(2, 5, 4) for name in ("k", "v")}
    change(given)
    with pytest.raises(ValueError, match=message) as error:
        wkv4(**given)
    assert "\n" not in str(error.value)


def test_bad_boundaries():
    w, k = -torch.ones(4), torch.ones(1, 5, 4)
    for bounds in ([0, 4], [1, 5], [0, 3, 2, 5]):
        with pytest.raises(ValueError, match="cu_seqlens grows from 0 to T = 5"):
            wkv4(w, w, k, k, cu_seqlens=torch.tensor(bounds))
