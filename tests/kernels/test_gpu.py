"""The kernels on a GPU, at sizes that are used: `make gpu`.

Without one, ZOO_TINY_GPU_TESTS=1 runs what can run in Triton's interpreter, at tiny sizes: a test
of these tests.
"""

import functools
import itertools
import os
import statistics
import time

import pytest
import torch
import torch.nn.functional as F

from zoo.kernels.delta_recurrence import delta_recurrence, delta_recurrence_chunked
from zoo.kernels.linear_recurrence import linear_recurrence, linear_recurrence_chunked
from zoo.kernels.segments_triton import override
from zoo.kernels.token_mix import token_mix
from zoo.kernels.wkv4 import wkv4, wkv4_chunked

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
IS_TINY = not HAS_GPU

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not HAS_GPU and "ZOO_TINY_GPU_TESTS" not in os.environ, reason="this torch sees no GPU"
    ),
]
gpu_only = pytest.mark.skipif(not HAS_GPU, reason="a property of the device")

# ||x - reference|| / ||reference||, values and gradients. float32 is multiplied in three products
# of tf32, 21 bits. float16 is widened, and its factors rounded to tf32, 11 bits. bfloat16 rounds
# scores and states to 8 bits before they are multiplied.
LIMITS = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1.5e-2}
# Gradients of decays are sums over all later tokens of differences that mostly cancel.
DECAY_FACTOR = 10
DTYPES = list(LIMITS)

# (B, T, H, K, V): powers of two and not, a tail in the last chunk, wide heads.
SHAPES = [
    (2, 1000, 4, 64, 64),
    (2, 1000, 3, 128, 128),
    (1, 777, 2, 60, 100),
    (1, 2048, 2, 256, 512),
]
FORMS = [
    ("none", False),
    ("H", False),
    ("BTH", False),
    ("BTHK", False),
    ("H", True),
    ("BTHK", True),
]
names = [form + "+bonus" * bonus for form, bonus in FORMS]


def tiny(*shape, to=32):
    return tuple(min(n, to) for n in shape) if IS_TINY else shape


class Random:
    """Reproducible numbers, made on the device."""

    def __init__(self, seed=0):
        self.generator = torch.Generator(DEVICE).manual_seed(seed)

    def __call__(self, *shape, dtype=torch.float32):
        x = torch.randn(shape, generator=self.generator, device=DEVICE)
        return x.to(dtype)


def linear_inputs(form, bonus, shape, dtype, documents=None):
    """Arguments of `linear_recurrence`; decays from almost none to e^-8 within one tensor."""
    random = Random()
    batch, tokens, heads, key_dim, value_dim = shape
    x = {
        "q": random(batch, tokens, heads, key_dim, dtype=dtype) * key_dim**-0.5,
        "k": random(batch, tokens, heads, key_dim, dtype=dtype),
        "v": random(batch, tokens, heads, value_dim, dtype=dtype),
        "initial_state": random(documents or batch, heads, key_dim, value_dim),
    }
    decay = {"H": (heads,), "BTH": (batch, tokens, heads), "BTHK": (batch, tokens, heads, key_dim)}
    if form != "none":
        x["log_decay"] = -(random(*decay[form]).abs() ** 3).clamp(1e-4, 8)
    if bonus:
        x["bonus"] = random(heads, key_dim)
    return x


def delta_inputs(shape, dtype, documents=None):
    """Arguments of `delta_recurrence` as RWKV-7 makes them."""
    x = linear_inputs("BTHK", False, shape, dtype, documents)
    random = Random(1)
    key = F.normalize(random(*x["k"].shape), dim=-1)
    x["log_decay"] = -0.6 * torch.sigmoid(random(*key.shape))
    x["a"], x["b"] = -key.to(dtype), (key * torch.sigmoid(random(*key.shape))).to(dtype)
    return x


def wkv4_inputs(batch, tokens, width, dtype, documents=None):
    """Arguments of `wkv4`."""
    random = Random()
    state = random(documents or batch, 3, width)
    state[:, 1] = state[:, 1].abs() + 0.1
    return {
        "w": -torch.exp(random(width)),
        "u": random(width),
        "k": random(batch, tokens, width, dtype=dtype),
        "v": random(batch, tokens, width, dtype=dtype),
        "initial_state": state,
    }


def results(function, x, **keyword):
    """Outputs, final state and all gradients by name, for a fixed cotangent of both."""
    leaves = {name: value.detach().requires_grad_() for name, value in x.items()}
    o, state = function(**leaves, output_final_state=True, **keyword)
    random = Random(2)
    cotangents = [random(*y.shape).to(y.dtype) for y in (o, state)]
    gradients = torch.autograd.grad(
        [o, state], list(leaves.values()), cotangents, allow_unused=True
    )
    return {"o": o.detach(), "state": state.detach()} | {
        f"d{name}": gradient
        for name, gradient in zip(leaves, gradients, strict=True)
        if gradient is not None
    }


def relative(x, expected):
    expected = expected.double()
    return ((x.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def assert_close(got, expected, limit):
    errors = {name: relative(got[name], expected[name]) for name in expected}
    wrong = {
        name: error
        for name, error in errors.items()
        if not error <= limit * (DECAY_FACTOR if name in ("dlog_decay", "dw", "du") else 1)
    }
    assert not wrong, f"{wrong} above {limit}; all: {errors}"


def in_float64(function, x, **keyword):
    return results(function, {name: value.double() for name, value in x.items()}, **keyword)


# Each pair is a new set of compilations: the other dtypes at the most irregular shape.
PAIRS = [(shape, torch.bfloat16) for shape in SHAPES]
PAIRS += [(SHAPES[2], dtype) for dtype in (torch.float32, torch.float16)]


@pytest.mark.parametrize(("shape", "dtype"), PAIRS, ids=str)
@pytest.mark.parametrize(("form", "bonus"), FORMS, ids=names)
def test_linear_recurrence(form, bonus, shape, dtype):
    x = linear_inputs(form, bonus, tiny(*shape), dtype)
    got = results(linear_recurrence, x, backend="triton")
    assert_close(got, in_float64(linear_recurrence_chunked, x), LIMITS[dtype])


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(
    ("choices", "shape"),
    [
        ({"blocks": True}, (1, 1000, 2, 256, 256)),
        ({"blocks": True}, (1, 777, 2, 256, 512)),
        ({"at_once": True}, (1, 1000, 8, 64, 64)),
        ({"at_once": True}, (1, 1000, 2, 128, 128)),
    ],
    ids=str,
)
def test_programs_by_choice(choices, shape, packed):
    """Two passes for wide heads; three gradients in one launch. Decays here are constants."""
    lengths = [0, 1, 19, 0, 12] if IS_TINY else [0, 1, 300, 0, 476]
    shape = (1, sum(lengths), *tiny(*shape[2:])) if packed else tiny(*shape)
    x = linear_inputs("H", False, shape, torch.bfloat16, len(lengths) if packed else None)
    gates = x.pop("log_decay")
    keyword = {"cu_seqlens": boundaries(lengths)} if packed else {}
    with override(**choices):
        ours = functools.partial(linear_recurrence, log_decay=gates)
        got = results(ours, x, backend="triton", **keyword)
    exact = functools.partial(linear_recurrence_chunked, log_decay=gates.double())
    assert_close(got, in_float64(exact, x, **keyword), LIMITS[torch.bfloat16])


@pytest.mark.parametrize(("shape", "dtype"), PAIRS, ids=str)
def test_delta_recurrence(shape, dtype):
    x = delta_inputs(tiny(*shape), dtype)
    got = results(delta_recurrence, x, backend="triton")
    # Errors of one correction are seen by all later ones: one more rounding of each state.
    assert_close(got, in_float64(delta_recurrence_chunked, x), 2 * LIMITS[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("key_dim", "value_dim"), [(200, 60), (512, 512)])
def test_delta_recurrence_of_wide_heads(key_dim, value_dim, dtype):
    """Token by token; states are kept of every 64, and more documents than programs at once."""
    lengths = [0, 1, 2] if IS_TINY else [0, 1, 63, 64, 65, 0, 500, *range(1, 40)]
    shape = 1, sum(lengths), 1 if IS_TINY else 4, *tiny(key_dim, value_dim, to=136)
    x = delta_inputs(shape, dtype, len(lengths))
    keyword = {"cu_seqlens": boundaries(lengths)}
    got = results(delta_recurrence, x, backend="triton", **keyword)
    assert_close(got, in_float64(delta_recurrence_chunked, x, **keyword), LIMITS[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 1000, 768), (2, 4097, 100)], ids=str)
def test_wkv4(shape, dtype):
    x = wkv4_inputs(*tiny(*shape), dtype)
    # Its max is a choice of units.
    got = results(wkv4, x, backend="triton")
    expected = in_float64(wkv4_chunked, x)
    for part in (got, expected):
        num, den, top = part.pop("state").double().unbind(1)
        part["sums"] = torch.stack([num, den], 1) * (top - top.mean()).exp()[:, None]
        part.pop("dinitial_state")
    assert_close(got, expected, LIMITS[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("streams", [6, 5], ids=["RWKV-7", "RWKV-6, packed"])
def test_token_mix(streams, dtype):
    """Streams and gradients; with corrections and documents where there are five streams."""
    random, is_packed = Random(), streams == 5
    batch, tokens, width = tiny(1 if is_packed else 4, 1000, 2100)
    lengths = [1, 7, 8, tokens - 16]
    x = [random(batch, tokens, width, dtype=dtype), random(streams, width, dtype=dtype)]
    x += [random(len(lengths) if is_packed else batch, width, dtype=dtype)]
    x += [random(batch, tokens, width, dtype=dtype) for _ in range(streams * is_packed)]
    cotangents = [random(batch, tokens, width, dtype=dtype) for _ in range(streams)]
    found = []
    for backend, wide in (("triton", dtype), ("torch", torch.float64)):
        leaves = [value.to(wide).requires_grad_() for value in x]
        bounds = boundaries(lengths) if is_packed else None
        keyword = {"before": leaves[2], "corrections": leaves[3:], "cu_seqlens": bounds}
        outputs = token_mix(*leaves[:2], **keyword, backend=backend)
        given = [value.to(wide) for value in cotangents]
        found.append([*outputs, *torch.autograd.grad(outputs, leaves, given)])
    # One rounding each, and of dmu the sum over all tokens in float32.
    limit = max(torch.finfo(dtype).eps, 2e-6)
    for got, expected in zip(*found, strict=True):
        assert relative(got, expected) <= limit


def boundaries(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], device=DEVICE)


# Empty ones first, in the middle and last; one-token ones; many short ones beside a long one.
LENGTHS = {
    "few": [0, 1, 500, 0, 64, 63, 65, 1307, 0],
    "a thousand": [1 + i % 7 for i in range(1000)] + [9000],
}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("form", "bonus"), FORMS, ids=names)
def test_packed_documents(form, bonus, lengths):
    lengths = [min(n, 9) for n in LENGTHS[lengths][:9]] if IS_TINY else LENGTHS[lengths]
    shape = (1, sum(lengths), *tiny(2, 64, 64))
    x = linear_inputs(form, bonus, shape, torch.float32, len(lengths))
    keyword = {"cu_seqlens": boundaries(lengths)}
    got = results(linear_recurrence, x, backend="triton", **keyword)
    assert_close(got, in_float64(linear_recurrence_chunked, x, **keyword), LIMITS[torch.float32])


@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed_documents_of_the_other_operators(lengths):
    lengths = [min(n, 9) for n in LENGTHS[lengths][:9]] if IS_TINY else LENGTHS[lengths]
    keyword = {"cu_seqlens": boundaries(lengths)}
    x = delta_inputs((1, sum(lengths), *tiny(2, 64, 64)), torch.float32, len(lengths))
    got = results(delta_recurrence, x, backend="triton", **keyword)
    expected = in_float64(delta_recurrence_chunked, x, **keyword)
    assert_close(got, expected, 2 * LIMITS[torch.float32])
    x = wkv4_inputs(1, sum(lengths), 128, torch.float32, len(lengths))
    got = results(wkv4, x, backend="triton", **keyword)
    expected = in_float64(wkv4_chunked, x, **keyword)
    names = [name for name in got if name not in ("state", "dinitial_state")]
    assert_close(got, {name: expected[name] for name in names}, LIMITS[torch.float32])


@pytest.mark.alone
def test_a_million_tokens():
    """One row and two heads, cut into segments; every gradient."""
    x = linear_inputs("H", False, tiny(1, 1 << 20, 2, 64, 64, to=64), torch.bfloat16)
    got = results(linear_recurrence, x, backend="triton")
    assert_close(got, in_float64(linear_recurrence_chunked, x), LIMITS[torch.bfloat16])


BEYOND = {
    "linear": ("H", False, linear_recurrence, linear_recurrence_chunked),
    "linear per channel": ("BTHK", True, linear_recurrence, linear_recurrence_chunked),
    "delta": (None, False, delta_recurrence, delta_recurrence_chunked),
}


@pytest.mark.alone
@pytest.mark.parametrize("name", BEYOND)
def test_offsets_beyond_31_bits(name):
    """2.2e9 elements; decays forget within tens of tokens, so the tail has a reference of its own.

    Forward of all, and the gradients where memory allows.
    """
    form, bonus, function, reference = BEYOND[name]
    gigabytes = torch.cuda.mem_get_info()[0] / 1e9 if HAS_GPU else 0
    if HAS_GPU and gigabytes < 70:
        pytest.skip("needs 70 GB")
    shape = (1, 64, 2, 16, 16) if IS_TINY else (1, (1 << 20) + (1 << 15), 16, 128, 128)
    random = Random()
    batch, tokens, heads, width, _ = shape
    x = {key: random(batch, tokens, heads, width, dtype=torch.bfloat16) for key in "qkv"}
    if form == "H":
        x["log_decay"] = torch.full((heads,), -1.0, device=DEVICE)
    else:
        x["log_decay"] = torch.full(x["k"].shape, -1.0, device=DEVICE, dtype=torch.bfloat16)
    if bonus:
        x["bonus"] = random(heads, width)
    if function is delta_recurrence:
        x["a"] = F.normalize(x["k"].float(), dim=-1).bfloat16()
        x["b"] = -0.5 * x["a"]
    assert IS_TINY or x["q"].numel() > 2**31
    tail = 32 if IS_TINY else 1024

    def last(value, count):
        return value[:, -count:] if value.ndim > 2 else value

    with torch.no_grad():
        o, _ = function(**x, backend="triton")
    few = {key: last(value, 2 * tail).double() for key, value in x.items()}
    expected, _ = reference(**few)
    assert relative(o[:, -tail:], expected[:, -tail:]) < 2 * LIMITS[torch.bfloat16]
    if name != "linear":
        return
    del o
    leaves = [x[key].requires_grad_() for key in "qkv"]
    o, _ = function(**x, backend="triton")
    gradients = torch.autograd.grad(o, leaves, torch.ones_like(o))
    exact = [few[key].requires_grad_() for key in "qkv"]
    expected, _ = reference(**few)
    expected_gradients = torch.autograd.grad(expected, exact, torch.ones_like(expected))
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        assert relative(got[:, -tail:], wanted[:, -tail:]) < LIMITS[torch.bfloat16]


@pytest.mark.alone
def test_wkv4_offsets_beyond_31_bits():
    shape = (1, 64, 16) if IS_TINY else (1, 1 << 20, 2064)
    if HAS_GPU and torch.cuda.mem_get_info()[0] < 60e9:
        pytest.skip("needs 60 GB")
    x = wkv4_inputs(*shape, torch.bfloat16)
    x["w"] = torch.full_like(x["w"], -1.0)
    del x["initial_state"]
    with torch.no_grad():
        y, _ = wkv4(**x, backend="triton")
    few = {name: value[:, -64:] if value.ndim == 3 else value for name, value in x.items()}
    expected, _ = wkv4_chunked(**{name: value.double() for name, value in few.items()})
    # What came before the last 64 tokens weighs e^-32 or less for the later half of them.
    assert relative(y[:, -32:], expected[:, -32:]) < LIMITS[torch.bfloat16]


def operators(dtype=torch.bfloat16):
    """(name, function, arguments) of a call of each kind, of the size of a layer."""
    shape = tiny(2, 2048, 8, 64, 64)
    for (form, bonus), name in zip(FORMS, names, strict=True):
        yield f"linear {name}", linear_recurrence, linear_inputs(form, bonus, shape, dtype)
    # So few rows and heads that documents are cut into segments.
    cut = linear_inputs("H", False, tiny(1, 16384, 2, 64, 64), dtype)
    yield "linear H, segments", linear_recurrence, cut
    yield "delta", delta_recurrence, delta_inputs(shape, dtype)
    yield "wkv4", wkv4, wkv4_inputs(*tiny(2, 2048, 768), dtype)


OPERATORS = [*(f"linear {name}" for name in names), "linear H, segments", "delta", "wkv4"]


def operator(name):
    return next((function, x) for key, function, x in operators() if key == name)


@pytest.mark.parametrize("name", OPERATORS)
def test_twice_the_same(name):
    """To the bit: nothing is summed in an order that changes."""
    function, x = operator(name)
    first, second = (results(function, x, backend="triton") for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", OPERATORS)
def test_compiles_whole(name):
    """torch.compile(fullgraph=True), with gradients, gives what eager gives."""
    function, x = operator(name)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="inductor" if HAS_GPU else "aot_eager")
    def compiled(**keyword):
        o, state = function(**keyword, backend="triton")
        return o * 2, state

    def eager(**keyword):
        o, state = function(**keyword, backend="triton")
        return o * 2, state

    got, expected = results(compiled, x), results(eager, x)
    assert_close(got, expected, 1e-3)


@gpu_only
@pytest.mark.parametrize("name", OPERATORS)
def test_graph_capture(name):
    """A captured forward and backward, replayed on other inputs."""
    function, x = operator(name)
    static = {key: value.clone().requires_grad_() for key, value in x.items()}

    def call():
        o, _ = function(**static, backend="triton")
        return [o, *torch.autograd.grad(o.float().square().sum(), list(static.values()))]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    with torch.no_grad():
        for key in ("k", "v"):
            static[key].copy_(torch.randn_like(static[key]))
    graph.replay()
    replayed = [y.clone() for y in outputs]
    torch.cuda.synchronize()
    for got, expected in zip(replayed, call(), strict=True):
        assert torch.equal(got, expected)


def steps():
    """(name, step, operator, arguments, name of those with an axis of time)."""
    from zoo.kernels.delta_recurrence_triton import delta_recurrence_step
    from zoo.kernels.linear_recurrence_triton import linear_recurrence_step
    from zoo.kernels.wkv4_triton import wkv4_step

    shape = tiny(4, 9, 8, 64, 64)
    for (form, bonus), name in zip(FORMS, names, strict=True):
        x = linear_inputs(form, bonus, shape, torch.float32)
        yield f"linear {name}", linear_recurrence_step, linear_recurrence_chunked, x
    x = delta_inputs(shape, torch.float32)
    yield "delta", delta_recurrence_step, delta_recurrence_chunked, x
    yield "wkv4", wkv4_step, wkv4_chunked, wkv4_inputs(4, 9, 256, torch.float32)


STEPS = [*(f"linear {name}" for name in names), "delta", "wkv4"]


def step_of(name):
    step, whole, x = next(parts for key, *parts in steps() if key == name)
    state = x.pop("initial_state")
    return step, whole, x, state, [key for key, value in x.items() if value.ndim > 2]


@pytest.mark.parametrize("name", STEPS)
def test_steps_in_place_are_the_whole(name):
    step, whole, x, state, moving = step_of(name)
    expected, _ = whole(**{k: v.double() for k, v in x.items()}, initial_state=state.double())
    outputs = []
    for t in range(x["k"].shape[1]):
        now = x | {key: x[key][:, t : t + 1] for key in moving}
        o, after = step(**now, state=state, in_place=True)
        assert after is state
        outputs.append(o)
    assert relative(torch.cat(outputs, 1), expected) < LIMITS[torch.float32]


@gpu_only
@pytest.mark.parametrize("name", STEPS)
def test_graph_capture_of_the_step(name):
    """One capture serves every token: the state is replaced where it lies."""
    step, whole, x, state, moving = step_of(name)
    expected, _ = whole(**{k: v.double() for k, v in x.items()}, initial_state=state.double())
    static = x | {key: x[key][:, :1].clone() for key in moving}
    kept = state.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(**static, state=kept, in_place=True)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = step(**static, state=kept, in_place=True)
    kept.copy_(state)
    outputs = []
    for t in range(x["k"].shape[1]):
        for key in moving:
            static[key].copy_(x[key][:, t : t + 1])
        graph.replay()
        outputs.append(o.clone())
    assert relative(torch.cat(outputs, 1), expected) < LIMITS[torch.float32]


@gpu_only
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("name", OPERATORS)
def test_the_host_never_waits(name, packed):
    function, x = operator(name)
    keyword = {"backend": "triton"}
    if packed:
        x = {key: value[:1] if value.ndim > 2 else value for key, value in x.items()}
        tokens = x["k"].shape[1]
        keyword["cu_seqlens"] = boundaries([100, 0, tokens - 101, 1])
        state = x["initial_state"]
        x["initial_state"] = state.expand(4, *state.shape[1:]).contiguous()
    results(function, x, **keyword)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(function, x, **keyword)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu_only
@pytest.mark.alone
@pytest.mark.parametrize("name", OPERATORS)
def test_host_time(name):
    """60 us are the aim, and hosts differ: this notices work that does not belong there.

    Building a tensor on the host or reading one back costs that much by itself. What of it is not
    the launch, test_host.py bounds without a GPU.
    """
    function, x = operator(name)
    samples = []
    with torch.no_grad():
        for _ in range(20):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(10):
                function(**x, backend="triton")
            samples.append((time.perf_counter() - start) / 10)
    assert statistics.median(samples) < 100e-6


@gpu_only
@pytest.mark.alone
def test_peak_memory_is_linear_and_small():
    """Forward and backward of 32,768 tokens: inputs' size in gradients, and little beside."""
    x = linear_inputs("H", False, (1, 32768, 8, 128, 128), torch.bfloat16)
    x = {key: x[key].requires_grad_() for key in ("q", "k", "v", "log_decay")}
    x["log_decay"] = x["log_decay"].detach()

    def call():
        o, _ = linear_recurrence(**x, backend="triton")
        return torch.autograd.grad(o, [x["q"], x["k"], x["v"]], torch.ones_like(o))

    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    used = torch.cuda.max_memory_allocated() - before
    # The output, its gradient and three gradients, and states of segments of 1,024 tokens or more.
    one = x["q"].numel() * 2
    assert used < 6.5 * one


@gpu_only
@pytest.mark.parametrize(("form", "bonus"), FORMS, ids=names)
def test_fla_computes_the_same(form, bonus):
    pytest.importorskip("fla")
    x = linear_inputs(form, bonus, (2, 1000, 4, 64, 64), torch.bfloat16)
    with torch.no_grad():
        got, expected = (linear_recurrence(**x, backend=backend) for backend in ("triton", "fla"))
    assert relative(got[0], expected[0]) < 2 * LIMITS[torch.bfloat16]


@gpu_only
def test_fla_computes_the_same_delta_recurrence():
    pytest.importorskip("fla")
    x = delta_inputs((2, 1000, 4, 64, 64), torch.bfloat16)
    with torch.no_grad():
        got, expected = (delta_recurrence(**x, backend=backend) for backend in ("triton", "fla"))
    assert relative(got[0], expected[0]) < 2 * LIMITS[torch.bfloat16]
