"""The Triton kernels with a decay per channel, in the interpreter."""

from contextlib import nullcontext

import pytest
import torch
from ladder import values_and_gradients, worst
from triton.runtime import interpreter

from zoo.kernels import linear_recurrence_channels_triton as kernels
from zoo.kernels.launch_triton import recording
from zoo.kernels.linear_recurrence import linear_recurrence, linear_recurrence_reference
from zoo.kernels.segments_triton import override

# The kernels take 32 positions at a time in float32, 64 in bfloat16. Empty documents first, in the
# middle and last, one-token documents, one of exactly two chunks.
CU_SEQLENS = [0, 0, 1, 2, 66, 66, 130, 131, 150, 150]
# Root mean square error against float64: a few roundings of sums of a few hundred products;
# measured 3e-7 at most, at V = 512.
FLOAT32 = 1e-6


pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")


def decays(kind, shape, generator):
    """Log decays of a kind, [B, T, H, K]."""
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    return {
        # As RWKV-6 has them: from e^-0.01 to e^-10 within one tensor.
        "like RWKV-6": -torch.exp(2 * uniform.erfinv() - 1),
        "none": 0 * uniform,
        "uniform to -20": -20 * uniform,
        "0 or -20": -20 * (uniform < 0.3),
        "uniform to -10000": -1e4 * uniform,
    }[kind]


def arguments(
    bonus=False, packed=False, initial=True, shape=(1, 70, 2, 16, 20), kind="like RWKV-6"
):
    """Random inputs in float64, rounded to bfloat16: (leaves by name, the rest)."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        x = torch.randn(*size, generator=generator, dtype=torch.float64)
        return x.bfloat16().double()

    batch, time, heads, key_dim, value_dim = shape
    cu_seqlens = torch.tensor([min(x, time) for x in CU_SEQLENS]) if packed else None
    documents = len(CU_SEQLENS) - 1 if packed else batch
    leaves = {
        "q": normal(batch, time, heads, key_dim),
        "k": normal(batch, time, heads, key_dim),
        "v": normal(batch, time, heads, value_dim),
        "log_decay": decays(kind, shape[:4], generator).bfloat16().double(),
        "bonus": normal(heads, key_dim) if bonus else None,
        "initial_state": normal(documents, heads, key_dim, value_dim) if initial else None,
    }
    return leaves, {"cu_seqlens": cu_seqlens, "scale": 0.3}


def run(function, leaves, rest, dtype, decay_dtype=torch.float32):
    """Values and every gradient with the inputs in a dtype; states in float32."""
    leaves = dict(leaves)
    if dtype != torch.float64:
        dtypes = dict.fromkeys("qkv", dtype) | {"log_decay": decay_dtype}
        for name, x in leaves.items():
            leaves[name] = None if x is None else x.to(dtypes.get(name, torch.float32))
    leaves = {n: None if x is None else x.detach().requires_grad_() for n, x in leaves.items()}
    positional = [leaves[name] for name in ("q", "k", "v", "log_decay")]
    keyword = {name: leaves[name] for name in ("bonus", "initial_state")} | rest
    return values_and_gradients(function, positional, keyword)


def distances(got, expected):
    """||got - expected|| / ||expected|| of each tensor; NaN counts as far."""
    return [
        ((a.double() - b).norm() / b.norm().clamp(min=1e-6)).nan_to_num(torch.inf).item()
        for a, b in zip(got, expected, strict=True)
    ]


def error(function=kernels.linear_recurrence_channels_triton, segment=None, **choices):
    """How far float32 is from the definition in float64, over values and every gradient."""
    leaves, rest = arguments(**choices)
    expected = run(linear_recurrence_reference, leaves, rest, torch.float64)
    with override(segment=segment) if segment else nullcontext():
        got = run(function, leaves, rest, torch.float32)
    return max(distances(got, expected))


@pytest.mark.parametrize("bonus", [False, True], ids=["plain", "bonus"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("initial", [False, True], ids=["zero", "initial"])
@pytest.mark.parametrize("segment", [None, 48], ids=["whole", "segments"])
def test_equals_the_definition(bonus, packed, initial, segment):
    shape = (1, 150, 1, 16, 20) if packed else (2, 70, 1, 16, 20)
    choices = {"bonus": bonus, "packed": packed, "initial": initial, "shape": shape}
    assert error(segment=segment, **choices) < FLOAT32


@pytest.mark.parametrize("time", [1, 31, 32, 33, 67])
def test_lengths(time):
    for bonus in (False, True):
        assert error(bonus=bonus, shape=(2, time, 1, 16, 16)) < FLOAT32


@pytest.mark.parametrize(
    ("key_dim", "value_dim"),
    [(32, 16), (60, 32), (32, 60), (64, 64), (64, 128), (128, 64), (256, 16), (16, 512)],
)
def test_head_sizes(key_dim, value_dim):
    assert error(bonus=True, shape=(1, 40, 1, key_dim, value_dim)) < FLOAT32


@pytest.mark.parametrize("bonus", [False, True], ids=["plain", "bonus"])
@pytest.mark.parametrize("kind", ["none", "uniform to -20", "0 or -20", "uniform to -10000"])
def test_decay_of_any_strength(kind, bonus):
    assert error(segment=48, bonus=bonus, kind=kind, shape=(1, 75, 1, 16, 16)) < FLOAT32


@pytest.mark.parametrize("bonus", [False, True], ids=["plain", "bonus"])
@pytest.mark.parametrize(
    ("dtype", "decay_dtype"),
    [(torch.bfloat16,) * 2, (torch.bfloat16, torch.float32), (torch.float16, torch.float32)],
    ids=str,
)
def test_low_precision_is_as_good_as_plain_pytorch(dtype, decay_dtype, bonus):
    """Root mean square error against float64 at most twice that of the parallel form in PyTorch.

    The parallel form is what one writes without kernels: scores with a decay for each pair and
    channel, times values, each in the low precision with float32 sums inside a product.
    """
    leaves, rest = arguments(bonus=bonus, shape=(1, 131, 1, 64, 64))
    exact = run(linear_recurrence_reference, leaves, rest, torch.float64)
    plain = run(parallel_form, leaves, rest, dtype, decay_dtype)
    with override(segment=64):
        ours = run(kernels.linear_recurrence_channels_triton, leaves, rest, dtype, decay_dtype)
    for a, b in zip(ours, plain, strict=True):
        assert a.dtype == b.dtype
    for got, allowed in zip(distances(ours, exact), distances(plain, exact), strict=True):
        assert got <= 2 * allowed


def parallel_form(q, k, v, log_decay, *, bonus, scale, initial_state, output_final_state, **_):
    """Scores times values, and the states' part, in the dtype of q."""
    dtype, time = q.dtype, q.shape[1]
    q_BHTK, k_BHTK, v_BHTV = (x.transpose(1, 2) for x in (q, k, v))
    cum_BHTK = log_decay.float().transpose(1, 2).cumsum(-2)
    read_BHTK, visible = cum_BHTK, torch.ones(time, time, dtype=torch.bool).tril()
    if bonus is not None:
        read_BHTK = cum_BHTK - log_decay.float().transpose(1, 2)
        visible = visible.tril(-1)
    exponent = read_BHTK[..., :, None, :] - cum_BHTK[..., None, :, :]
    pairs = torch.where(visible[..., None], exponent, -torch.inf).exp().to(dtype)
    scores = torch.einsum("bhik,bhijk,bhjk->bhij", q_BHTK, pairs, k_BHTK)
    if bonus is not None:
        own = (q_BHTK * bonus[:, None].to(dtype) * k_BHTK).sum(-1)
        scores = scores + torch.diag_embed(own)
    o = scores @ v_BHTV + (q_BHTK * read_BHTK.exp().to(dtype)) @ initial_state.to(dtype)
    to_end = (cum_BHTK[..., -1:, :] - cum_BHTK).exp().to(dtype)
    state = (k_BHTK * to_end).mT @ v_BHTV
    state = state.float() + cum_BHTK[..., -1, :, None].exp() * initial_state
    return (o * scale).transpose(1, 2), state


def test_sixteen_bits_survive_large_states():
    """Sums of 300 positive products of 16 x 16 pass float16's largest number inside."""
    ones = torch.full((1, 300, 1, 16), 16.0, dtype=torch.float16)
    keyword = {"scale": 2**-12, "output_final_state": True}
    gates = torch.zeros(ones.shape)
    o, state = kernels.linear_recurrence_channels_triton(ones, ones, ones, gates, **keyword)
    expected, exact = linear_recurrence_reference(ones, ones, ones, gates, **keyword)
    assert state.max() > 65504
    assert torch.equal(state, exact) and worst([o], [expected]) < 2**-10


def test_gates_of_exactly_zero_decay():
    """Log decays of -inf forget everything and stay finite; positive ones give NaN."""
    leaves, rest = arguments(bonus=True)
    leaves["log_decay"][:, ::7] = -torch.inf
    leaves["log_decay"][:, 40, :, ::3] = -torch.inf
    expected = run(linear_recurrence_reference, leaves, rest, torch.float64)
    got = run(kernels.linear_recurrence_channels_triton, leaves, rest, torch.float32)
    # Where the decay is 0 its own gradient is infinitely small, and not compared.
    assert max(distances(got[:5] + got[6:], expected[:5] + expected[6:])) < FLOAT32
    leaves["log_decay"].fill_(0.1)
    q, k, v, log_decay = (leaves[name].float() for name in ("q", "k", "v", "log_decay"))
    # On a GPU the host does not look at values, so the kernels must not hide them.
    o, _ = kernels.linear_recurrence_channels_triton(q, k, v, log_decay)
    assert o[:, 1:].isnan().all()


def launch_only(monkeypatch, choose):
    """Lets the interpreter run some programs of each launch: `choose` says which of how many."""
    builder, original = interpreter.interpreter_builder, kernels.launch

    def launch(kernel, grid, *how, **arguments):
        chosen = choose(grid[0])

        def at(x, y, z):
            builder.grid_idx = (chosen[x], y, z)

        with monkeypatch.context() as patch:
            patch.setattr(builder, "set_grid_idx", at)
            original(kernel, (len(chosen), *grid[1:]), *how, **arguments)

    monkeypatch.setattr(kernels, "launch", launch)


in_the_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="chooses programs, as only the interpreter can"
)


@in_the_interpreter
def test_a_thousand_documents(monkeypatch):
    """Documents of one token and one of 60 in the same stream; of the former every fiftieth."""
    documents, chunk, some = 1000, 32, torch.arange(0, 1000, 50)
    cu_seqlens = torch.cat([torch.arange(documents + 1), torch.tensor([documents + 60])])
    slots = [*(some // chunk + some).tolist(), *range(documents // chunk + documents, 1034)]
    segments = [*some.tolist(), documents]
    launch_only(monkeypatch, lambda count: slots if count == 1034 else segments)
    generator = torch.Generator().manual_seed(0)
    shape = 1, documents + 60, 1, 16
    inputs = [torch.randn(shape, generator=generator, requires_grad=True) for _ in range(3)]
    inputs.append((-torch.rand(shape, generator=generator)).requires_grad_())

    def chosen(function, inputs, bounds, tokens, states):
        o, final = function(*inputs, cu_seqlens=bounds, output_final_state=True)
        o, final = o[:, tokens], final[states]
        gradients = torch.autograd.grad(o.square().sum() + final.square().sum(), inputs)
        return [o, final, *(x[:, tokens] for x in gradients)]

    tokens = torch.cat([some, torch.arange(documents, documents + 60)])
    states = torch.tensor(segments)
    with override(segment=2000):
        got = chosen(kernels.linear_recurrence_channels_triton, inputs, cu_seqlens, tokens, states)
    exact = [x.detach()[:, tokens].double().requires_grad_() for x in inputs]
    bounds = torch.cat([torch.arange(len(some) + 1), torch.tensor([len(tokens)])])
    everything = slice(None)
    expected = chosen(linear_recurrence_reference, exact, bounds, everything, everything)
    assert max(distances(got, expected)) < FLOAT32


def test_non_contiguous_inputs():
    leaves, rest = arguments(shape=(2, 40, 2, 16, 16))
    function = kernels.linear_recurrence_channels_triton
    expected = run(function, leaves, rest, torch.float32)

    def strided(*inputs, initial_state, **keyword):
        *inputs, initial_state = (
            x.transpose(0, -1).contiguous().transpose(0, -1) for x in (*inputs, initial_state)
        )
        assert not inputs[0].is_contiguous() and not initial_state.is_contiguous()
        return function(*inputs, initial_state=initial_state, **keyword)

    assert worst(run(strided, leaves, rest, torch.float32), expected) == 0


@in_the_interpreter
def test_offsets_beyond_32_bits(monkeypatch):
    """The 2^31st element, in memory of which only the used pages exist."""
    torch.use_deterministic_algorithms(False)  # it would fill gigabytes
    # Millions of programs in front of these find an empty chunk.
    launch_only(monkeypatch, lambda count: range(max(0, count - 4), count))
    first, count, key_dim = 2**27, 40, 16
    tensors = [torch.empty(1, first + count, 1, key_dim, dtype=torch.bfloat16) for _ in range(5)]
    assert tensors[0].numel() > 2**31
    generator = torch.Generator().manual_seed(0)
    for x in tensors:
        x[:, first:] = -torch.rand(1, count, 1, key_dim, generator=generator)
    bounds = torch.tensor([first, first + count])
    *inputs, do = tensors
    last = [x[:, first:].double().requires_grad_() for x in inputs]
    expected, _ = linear_recurrence_reference(*last)
    expected = [expected, *torch.autograd.grad(expected, last, do[:, first:].double())]
    with override(segment=2**30):
        o, _, _ = kernels.forward(*inputs, None, None, bounds, 1.0, False)
        gradients = kernels.backward(*inputs, None, None, bounds, None, do, None, 1.0, True, False)
    # Rounded to bfloat16, and the factors of products too.
    got = [x[:, first:] for x in (o, *gradients[:4])]
    assert max(distances(got, expected)) < 2**-7


def test_launches():
    """Two for the forward pass and five backward; two over segments more in each, if cut."""

    def count(segment, **choices):
        leaves, rest = arguments(**choices)
        with override(segment=segment), recording() as launches:
            run(kernels.linear_recurrence_channels_triton, leaves, rest, torch.float32)
        return [x.name for x in launches]

    states = ["_segment_states", "_combine"]
    back = [*["_scan"] * 3, "_within_gradients"]
    assert count(70) == ["_within", "_scan", "_within", *back]
    cut = ["_within", *states, "_scan", "_within", *states, *back]
    assert count(32, bonus=True) == count(32, packed=True) == cut


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_the_host_reads_nothing(packed):
    """Tensors without values: reading one on the host, which stalls a GPU, raises here."""
    leaves, rest = arguments(bonus=True, packed=packed)
    leaves = [x.float() for x in leaves.values()]
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = [mode.from_tensor(x) for x in leaves]
        bounds = mode.from_tensor(rest["cu_seqlens"]) if packed else None
        with override(segment=32), recording(run=False) as launches:
            o, final, entering = kernels.forward(*fake, bounds, 1.0, True)
            kernels.backward(*fake, bounds, entering, o, final, 1.0, True, True)
    assert len(launches) == 11


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("segment", [150, 64])
def test_operators_are_registered_correctly(packed, segment):
    leaves, rest = arguments(bonus=True, packed=packed, shape=(1, 150, 1, 16, 16))
    inputs = [x.float().requires_grad_() for x in leaves.values()]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    with override(segment=segment):
        torch.library.opcheck(
            kernels._forward_operator, (*inputs, rest["cu_seqlens"], 0.3, True), test_utils=tests
        )
        inputs = [x.detach() for x in inputs]
        o, final, entering = kernels._forward_operator(*inputs, rest["cu_seqlens"], 0.3, True)
        torch.library.opcheck(
            kernels._backward_operator,
            (*inputs, rest["cu_seqlens"], entering, o, final, 0.3, True, True),
            test_utils=tests,
        )


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_compiles_as_one_graph(packed):
    leaves, rest = arguments(bonus=packed, packed=packed)

    def call(*args, **keyword):
        return linear_recurrence(*args, **keyword, backend="triton")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    eager = run(call, leaves, rest, torch.float32)
    assert worst(run(compiled, leaves, rest, torch.float32), eager) == 0
    torch._dynamo.reset()


def test_mixed_dtypes_are_computed_in_the_widest():
    leaves, rest = arguments()
    q, k, v, log_decay = (leaves[name].float() for name in ("q", "k", "v", "log_decay"))
    o, _ = linear_recurrence(q.half(), k.half(), v, log_decay, backend="triton", **rest)
    expected, _ = linear_recurrence(q, k, v, log_decay, backend="triton", **rest)
    assert o.dtype == torch.float32 and torch.equal(o, expected)
