"""The Triton kernels of `wkv4`, in Triton's interpreter, against the definition in float64."""

import itertools

import pytest
import torch
from ladder import values_and_gradients
from test_wkv4 import arguments, worst

from zoo.kernels import wkv4_triton as kernels
from zoo.kernels.launch_triton import Config, launch, recording
from zoo.kernels.wkv4 import wkv4, wkv4_chunked, wkv4_reference
from zoo.kernels.wkv4_triton import wkv4_step, wkv4_triton

# Documents of all kinds beside tiles of 4: empty ones first, in the middle and last, one token,
# a tile, one more and one less.
CU_SEQLENS = [0, 0, 1, 5, 5, 10, 13, 13]


pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")


@pytest.fixture
def small(monkeypatch):
    """Tiles of 4 tokens in chunks of 2, slices of 16 channels: the interpreter is slow."""
    monkeypatch.setattr(kernels, "_CONFIGS", {"sm_90": Config(2, 16, 1, 1)})
    monkeypatch.setattr(kernels, "_SHORTEST_TILE", 4)


def cases(packed, initial, shape, **keyword):
    """Random inputs in float32, and results of the definition for them in float64."""
    positional, keyword = arguments(
        packed, initial, shape=shape, dtype=torch.float32, cu_seqlens=CU_SEQLENS, **keyword
    )
    return positional, keyword, definition(positional, keyword)


def definition(positional, keyword):
    exact = [x.detach().double().requires_grad_() for x in positional]
    state = keyword["initial_state"]
    if state is not None:
        state = state.detach().double().requires_grad_()
    return values_and_gradients(wkv4_reference, exact, keyword | {"initial_state": state})


# Sums in float32. Measured over seeds and 131 tokens: up to 7e-6 (a state near 1e2), where the loop
# of `wkv4_reference` in float32 reaches 4e-6.
TOLERANCE = 1e-5


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("initial", [False, True], ids=["empty", "initial"])
def test_equals_the_definition(small, packed, initial):
    positional, keyword, expected = cases(packed, initial, (1 if packed else 2, 13, 20))
    assert worst(values_and_gradients(wkv4_triton, positional, keyword), expected) < TOLERANCE


@pytest.mark.parametrize("time", [1, 3, 4, 5, 17])
def test_tile_boundaries(small, time):
    positional, keyword, expected = cases(False, True, (2, time, 5))
    assert worst(values_and_gradients(wkv4_triton, positional, keyword), expected) < TOLERANCE


@pytest.mark.parametrize("time", [29, 67], ids=["whole", "tiles"])
def test_as_shipped(time):
    positional, keyword, expected = cases(False, time == 29, (1, time, 60))
    assert worst(values_and_gradients(wkv4_triton, positional, keyword), expected) < TOLERANCE


def test_packed_as_shipped():
    positional, keyword, expected = cases(True, True, (1, 13, 60))
    assert worst(values_and_gradients(wkv4_triton, positional, keyword), expected) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_plain_pytorch(small, dtype):
    """The error against float64 is at most twice that of PyTorch in the same precision."""
    low, keyword = arguments(True, True, shape=(1, 13, 16), dtype=dtype, cu_seqlens=CU_SEQLENS)
    expected = definition(low, keyword)
    plain = values_and_gradients(wkv4_chunked, low, keyword)
    ours = values_and_gradients(wkv4_triton, low, keyword)
    assert [x.dtype for x in ours] == [x.dtype for x in plain]
    for a, b, c in zip(ours, plain, expected, strict=True):
        error, allowed = ((x.double() - c).clamp(min=-1e9).abs().max().item() for x in (a, b))
        # Two values a hair apart may round to neighbours, and plain PyTorch's to the right one.
        ulp = torch.finfo(a.dtype).eps * c.clamp(min=-1e9).abs().max().item()
        assert error <= 2 * allowed + ulp


@pytest.mark.parametrize("key", [-60.0, 60.0])
def test_keys_of_sixty(small, key):
    """Every decay there is, and keys beyond what e^k can hold in float32."""
    positional, keyword = arguments(False, False, shape=(1, 9, 5), dtype=torch.float32)
    w, _, k, _ = positional
    with torch.no_grad():
        w.copy_(torch.tensor([-1e-8, -1e-3, -1.0, -60.0, -1000.0]))
        k.mul_(10).add_(key)
    expected = definition(positional, keyword)
    got = values_and_gradients(wkv4_triton, positional, keyword)
    # Keys of 90 have a rounding error of 4e-6 in float32 whenever something is added.
    assert worst(got, expected) < 2e-5


def test_a_decay_near_one_is_not_lost_in_rounding(small):
    """60 - 1.8e-6 is 60 in float32: 30 tokens would lose 5e-5 of the first one's decay."""
    w, u = torch.full((4,), -1.8e-6), torch.zeros(4)
    k, v = torch.full((1, 32, 4), 60.0), torch.randn(1, 32, 4)
    initial = torch.tensor([0.0, 1000.0, 60.0]).expand(1, 4, 3).mT.contiguous()
    keyword = {"initial_state": initial, "output_final_state": True}
    kernels._SHORTEST_TILE = 32
    _, state = wkv4_triton(w, u, k, v, **keyword)
    _, expected = wkv4_reference(w.double(), u, k.double(), v, **keyword)
    logs = [x[0, 1].double().log() + x[0, 2].double() for x in (state, expected)]
    # Half a unit in the last place of 60 is 1.9e-6, and of the sum of 1,032 weights 3e-8.
    assert (logs[0] - logs[1]).abs().max() < 4e-6


def test_a_decay_of_zero(small):
    """With w = -inf a token sees itself and the one before, the first one the initial state."""
    positional, keyword = arguments(False, True, shape=(1, 9, 5), dtype=torch.float32)
    with torch.no_grad():
        positional[0][:3] = -torch.inf
    expected = values_and_gradients(wkv4_chunked, positional, keyword)
    got = values_and_gradients(wkv4_triton, positional, keyword)
    assert all(x.isfinite().all() for x in got)
    assert worst(got, expected) < TOLERANCE


def test_an_empty_state_is_no_state(small):
    """Its max of 0 must not make keys of -100 vanish, which are all there is."""
    (w, u, k, v), _ = arguments(False, False, shape=(1, 5, 5), dtype=torch.float32)
    with torch.no_grad():
        y, _ = wkv4_triton(w, u, k - 100, v, initial_state=torch.zeros(1, 3, 5))
        expected, _ = wkv4_chunked(w, u, k - 100, v)
    # Keys near 100 are 4e-6 apart.
    assert worst([y], [expected]) < 2e-5


def test_an_empty_document_leaves_its_state(small):
    """In its own units, and with all of its gradient, where there is no weight in it too."""
    (w, u, k, v), _ = arguments(False, False, shape=(1, 3, 5), dtype=torch.float32)
    initial = torch.tensor([0.0, 0.0, 5.0])[:, None].repeat(2, 1, 5).requires_grad_()
    bounds = torch.tensor([0, 0, 3])
    _, final = wkv4_triton(
        w, u, k, v, initial_state=initial, cu_seqlens=bounds, output_final_state=True
    )
    assert torch.equal(final[0], initial[0])
    (gradient,) = torch.autograd.grad(final.sum(), initial)
    # The max of a final state is a constant to autograd.
    assert torch.equal(gradient[0], torch.tensor([1.0, 1.0, 0.0])[:, None].expand(3, 5))


def test_a_thousand_documents(small):
    """A document of 9 tokens after 999 of one token and of none."""
    lengths = [1, 0, 0, 0, 0, 0, 0, 0, 0] * 111 + [9]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
    (w, u, k, v), _ = arguments(False, False, shape=(1, sum(lengths), 4), dtype=torch.float32)
    initial = torch.randn(1000, 3, 4).exp()
    keyword = {"initial_state": initial, "cu_seqlens": cu_seqlens, "output_final_state": True}
    with torch.no_grad():
        y, state = wkv4_triton(w, u, k, v, **keyword)
        expected, final = wkv4_chunked(w, u, k, v, **keyword)
    assert worst([y, state], [expected, final]) < TOLERANCE
    is_empty = torch.tensor(lengths) == 0
    assert torch.equal(state[is_empty], initial[is_empty])


def test_non_contiguous_inputs(small):
    positional, keyword, expected = cases(False, True, (1, 5, 5))
    strided = [x.detach().mT.contiguous().mT.requires_grad_() for x in positional[2:]]
    assert not strided[0].is_contiguous()
    keyword["initial_state"] = keyword["initial_state"].detach().mT.contiguous().mT.requires_grad_()
    got = values_and_gradients(wkv4_triton, [*positional[:2], *strided], keyword)
    assert worst(got, expected) < TOLERANCE


def test_only_the_state_or_only_the_output(small):
    """Either result may go unused."""
    (w, u, k, v), keyword = arguments(False, True, shape=(1, 5, 5), dtype=torch.float32)
    for pick in (0, 1):
        got, expected = (
            torch.autograd.grad(
                function(w, u, k, v, **keyword, output_final_state=True)[pick].square().sum(),
                [w, k, v, keyword["initial_state"]],
            )
            for function in (wkv4_triton, wkv4_chunked)
        )
        assert worst(got, expected) < TOLERANCE


def test_a_not_a_number_stays_one(small):
    """Wherever it is, it shows in the outputs which it reaches, and in no others."""
    for name in ("w", "u", "k", "v"):
        given = {"w": -torch.ones(4), "u": torch.ones(4)}
        given |= {x: torch.randn(1, 6, 4) for x in ("k", "v")}
        (given[name][..., 3, :] if given[name].ndim == 3 else given[name])[..., 2] = torch.nan
        y, _ = wkv4_triton(**given)
        assert torch.equal(y.isnan(), wkv4_reference(**given)[0].isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_place", [False, True])
def test_steps_equal_the_sequence(small, dtype, in_place):
    (w, u, k, v), keyword = arguments(False, True, shape=(2, 5, 20), dtype=dtype)
    with torch.no_grad():
        y, final = wkv4_triton(w, u, k, v, **keyword, output_final_state=True)
        state = given = keyword["initial_state"].float()
        outputs = []
        for t in range(5):
            part = k[:, t : t + 1], v[:, t : t + 1]
            with recording() as launches:
                out, state = wkv4_step(w, u, *part, state=state, in_place=in_place)
            assert len(launches) == 1
            outputs.append(out)
    assert (state.data_ptr() == given.data_ptr()) == in_place
    # One rounding apart; tiles multiply decays, steps do so one by one.
    tolerance = TOLERANCE if dtype == torch.float32 else torch.finfo(dtype).eps
    assert worst([torch.cat(outputs, 1)], [y]) < tolerance
    assert worst([state], [final]) < TOLERANCE


def test_a_step_in_place_needs_a_state():
    x = torch.ones(1, 1, 4)
    for state in (None, torch.ones(1, 3, 4).bfloat16(), torch.ones(1, 4, 3).mT):
        with pytest.raises(ValueError, match="in_place replaces a contiguous float32 state"):
            wkv4_step(-x[0, 0], x[0, 0], x, x, state=state, in_place=True)


def test_the_operators_are_what_torch_expects(small):
    (w, u, k, v), keyword = arguments(True, True, shape=(1, 3, 4), cu_seqlens=[0, 0, 3])
    tensors = [x.detach().float().requires_grad_() for x in (w, u, k, v, keyword["initial_state"])]
    bounds = keyword["cu_seqlens"]
    operators = getattr(torch.ops, kernels._NAMESPACE)
    torch.library.opcheck(operators.forward, (*tensors, bounds))
    tensors = [x.detach() for x in tensors]
    _, final, entering = operators.forward(*tensors, bounds)
    gradients = torch.randn(1, 3, 4), torch.randn(2, 3, 4)
    torch.library.opcheck(operators.backward, (*tensors, bounds, final, entering, *gradients))
    w, u, k, v, _ = tensors
    torch.library.opcheck(operators.step, (w, u, k[:, :1], v[:, :1], None))


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_compiled_equals_eager(small, packed):
    positional, keyword = arguments(
        packed, True, shape=(1, 5, 4), dtype=torch.float32, cu_seqlens=[0, 2, 5]
    )
    torch._dynamo.reset()
    compiled = torch.compile(wkv4, fullgraph=True, backend="aot_eager")
    keyword["backend"] = "triton"
    got, expected = (values_and_gradients(f, positional, keyword) for f in (compiled, wkv4))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_a_tile_writes_its_own_rows_only(small):
    """Run alone, the tile of the first document leaves the next one's outputs as they are."""
    positional, keyword = arguments(
        True, False, shape=(1, 8, 5), dtype=torch.float32, cu_seqlens=[0, 3, 8]
    )
    with recording(run=False) as launches:
        values_and_gradients(wkv4_triton, positional, keyword)
    assert len(launches) == 6
    for kernel, _, given, num_warps, num_stages in launches:
        written = {x: torch.full_like(given[x], 7.0) for x in ("y", "dk", "dv") if x in given}
        launch(kernel, (1,), num_warps, num_stages, **given | written)
        for x in written.values():
            assert (x[0, :3] != 7).all()
            assert (x[0, 3:] == 7).all()


@pytest.mark.parametrize(
    ("shape", "packed", "forward"),
    [
        ((2, 32, 8), False, ["_outputs"]),
        ((2, 33, 8), False, ["_tile_sums", "_entering", "_outputs"]),
        ((1, 33, 8), True, ["_tile_sums", "_entering", "_outputs"]),
        ((1, 65536, 2048), False, ["_tile_sums", "_entering", "_outputs"]),
    ],
)
def test_launches(shape, packed, forward):
    batch, time, width = shape
    w, u, k, v = (torch.empty(*s, device="meta") for s in ([width], [width], shape, shape))
    bounds = torch.tensor([0, 1, 33]) if packed else None
    with recording(run=False) as launches:
        _, final, entering = kernels.forward(w, u, k, v, None, bounds)
    assert [x.name for x in launches] == forward
    with recording(run=False) as launches:
        kernels.backward(w, u, k, v, None, bounds, final, entering, k, None)
    assert [x.name for x in launches] == ["_tile_gradients", "_leaving", "_gradients"]
    if time == 65536:
        # A row of 2,048 channels alone must fill 132 processors many times over.
        assert all(x.grid[0] >= 16 * 132 for x in launches if x.name != "_leaving")


def test_the_public_function_chooses_the_kernels(small):
    """Sequence or step, by whether gradients are wanted."""
    (w, u, k, v), _ = arguments(False, False, shape=(1, 1, 4), dtype=torch.float32)
    with recording() as launches:
        wkv4(w, u, k, v, backend="triton")
        wkv4(*(x.detach() for x in (w, u, k, v)), backend="triton")
        wkv4(w, u, k, v, backend="torch")
        wkv4(w, u, k, v)
    assert [x.name for x in launches] == ["_outputs", "_step"]


def test_offsets_beyond_32_bits(monkeypatch):
    """A tile more than 2^31 elements into its tensors, of which only these pages ever exist."""
    width, start = 8, 2**28 + 3
    # Offsets that wrap in 32 bits would land 2^31 before, which is also ours.
    with monkeypatch.context() as patch:
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
        memory = torch.empty(2**32 + 2**16, dtype=torch.bfloat16)
    far = [memory[2**31 + 2**12 * i :] for i in range(3)]
    k, v, y = (x[start * width :][: 5 * width].view(5, width) for x in far)
    k.normal_(), v.normal_()
    w, u = -torch.ones(width), torch.ones(width)
    expected, _ = wkv4_chunked(w, u, k[None], v[None])
    launch(
        kernels._outputs,
        (1,),
        1,
        1,
        w=w,
        u=u,
        k=far[0],
        v=far[1],
        y=far[2],
        initial=None,
        entering=torch.zeros(1, 3, width),
        final=torch.zeros(1, 3, width),
        table=torch.tensor([start, start + 5]),
        stride=1,
        T=2**29,
        LENGTH=32,
        PER_ROW=1,
        D=width,
        SLICE=16,
        CHUNK=2,
        WHOLE=True,
    )
    assert worst([y[None]], [expected]) < torch.finfo(torch.bfloat16).eps


def test_addresses_are_computed_in_64_bits(compilers):
    """No kernel multiplies in 32 bits, or adds anything of 32 bits to a pointer."""
    compilers(__file__)


def check_addresses():
    """What the test above runs, in a process of its own where Triton compiles."""
    import re

    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # Short unrolled loops, which compile fast.
    kernels._CONFIGS = {"sm_90": Config(2, 64, 1, 1)}
    names = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64"}
    width = 60
    w = torch.empty(width, device="meta")
    k = torch.empty(1, 99, width, dtype=torch.bfloat16, device="meta")
    initial = torch.empty(1, 3, width, device="meta")
    bounds = torch.tensor([0, 99])
    with recording(run=False, target="sm_90") as launches:
        for cu_seqlens in (None, bounds):
            results = kernels.forward(w, w, k, k, initial, cu_seqlens)
            kernels.backward(w, w, k, k, initial, cu_seqlens, *results[1:], k, initial)
        kernels._run_step(w, w, k[:, :1], k[:, :1], initial, initial)
    seen = set()
    for kernel, _, given, num_warps, num_stages in launches:
        signature, compile_time = {}, {}
        for i, parameter in enumerate(kernel.params):
            value = given[parameter.name]
            if torch.is_tensor(value):
                signature[parameter.name] = names[value.dtype]
            elif value is None or parameter.is_constexpr:
                signature[parameter.name] = "constexpr"
                compile_time[(i,)] = value
            else:
                signature[parameter.name] = "i32"
        source = ASTSource(fn=kernel, signature=signature, constexprs=compile_time)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        code = compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ttir"]
        # Constants, a few times D, may be narrow, and the number of tiles.
        allowed = {"%stride", *re.findall(r"(%\S+) = arith\.constant", code)}
        narrow = re.findall(r".*arith\.muli .*(?:: i32|xi32>).*", code)
        narrow += [
            offset
            for offset in re.findall(r"tt\.addptr \S+, (\S+) : .*, (?:i32|tensor<\w+xi32>)", code)
            if offset not in allowed
        ]
        assert not narrow, (kernel.fn.__name__, narrow)
        assert "tt.addptr" in code
        seen.add(kernel.fn.__name__)
    assert len(seen) == 7, seen


if __name__ == "__main__":
    check_addresses()
