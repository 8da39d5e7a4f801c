"""The Triton kernels of the delta recurrence, in the interpreter."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from ladder import values_and_gradients, worst

from zoo.kernels import delta_recurrence_triton as kernels
from zoo.kernels.delta_recurrence import delta_recurrence, delta_recurrence_reference
from zoo.kernels.launch_triton import Config, recording
from zoo.kernels.segments_triton import override

# Scores that nobody sees, above the diagonal of an inner block, may overflow.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in matmul:RuntimeWarning")

FORMS = ("none", "H", "BTH", "BTHK")
# The kernels read 16 positions at a time. Empty documents first, in the middle and last, one-token
# documents, one of exactly two chunks.
CU_SEQLENS = [0, 0, 1, 2, 34, 34, 53, 60, 60]
# Sums of a few hundred float32 products. Measured: 3e-7.
FLOAT32 = 2e-6


pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")


def chunks(length, num_warps=4):
    """Overrides the configurations with chunks of another length, in slices of 16 and 32."""
    configs = (Config(length, slice, num_warps, 1) for slice in (32, 16, 16))
    return override(delta_recurrence=kernels._Configs(*configs))


def arguments(form="BTHK", packed=False, initial=True, shape=(1, 60, 2, 16, 20), strength=1.0):
    """Random inputs in float64, rounded to bfloat16: (leaves by name, the rest).

    a and b have no relation to each other or to k, so that none can stand in for another.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    def unit(*size):
        # Short enough for states that stay of order 1 without any decay.
        return 0.7 * F.normalize(normal(*size), dim=-1)

    batch, time, heads, key_dim, value_dim = shape
    cu_seqlens = torch.tensor([min(x, time) for x in CU_SEQLENS]) if packed else None
    decay_shape = {
        "H": [heads],
        "BTH": [batch, time, heads],
        "BTHK": [batch, time, heads, key_dim],
    }.get(form)
    documents = len(CU_SEQLENS) - 1 if packed else batch
    strongest = 2 if form == "H" else 20
    leaves = {
        "q": normal(batch, time, heads, key_dim),
        "k": normal(batch, time, heads, key_dim),
        "v": normal(batch, time, heads, value_dim),
        # From almost none to e^-20 within one tensor. Per head less: where every decay is strong,
        # its gradient is the difference of numbers many times as large.
        "log_decay": None
        if decay_shape is None
        else -((3 * strength * normal(*decay_shape).abs()) ** 1.5).clamp(max=strongest),
        "a": unit(batch, time, heads, key_dim),
        "b": unit(batch, time, heads, key_dim),
        "initial_state": normal(documents, heads, key_dim, value_dim) if initial else None,
    }
    leaves = {n: None if x is None else x.bfloat16().double() for n, x in leaves.items()}
    return leaves, {"cu_seqlens": cu_seqlens, "scale": 0.7}


def run(function, leaves, rest, dtype):
    """Values and every gradient with the inputs in a dtype; states in float32, and gates too."""
    if dtype != torch.float64:
        wide = ("log_decay", "initial_state")
        leaves = {
            name: None if x is None else x.to(torch.float32 if name in wide else dtype)
            for name, x in leaves.items()
        }
    leaves = {n: None if x is None else x.detach().requires_grad_() for n, x in leaves.items()}
    positional = [leaves[name] for name in ("q", "k", "v", "log_decay", "a", "b")]
    keyword = {"initial_state": leaves["initial_state"]} | rest
    return values_and_gradients(function, positional, keyword)


def distance(got, expected):
    """||got - expected|| / ||expected|| of the worst tensor; NaN counts as far."""
    ratios = [
        ((a.double() - b).norm() / b.norm().clamp(min=1e-6)).nan_to_num(torch.inf).item()
        for a, b in zip(got, expected, strict=True)
    ]
    return max(ratios)


def error(**choices):
    """How far float32 is from the definition in float64, over values and every gradient."""
    leaves, rest = arguments(**choices)
    expected = run(delta_recurrence_reference, leaves, rest, torch.float64)
    return distance(run(kernels.delta_recurrence_triton, leaves, rest, torch.float32), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("initial", [False, True], ids=["zero", "initial"])
def test_equals_the_definition(form, packed, initial):
    # Of whole rows two chunks and a part of one; of documents all.
    shape = (1, 60, 2, 16, 20) if packed else (2, 37, 2, 16, 20)
    assert error(form=form, packed=packed, initial=initial, shape=shape) < FLOAT32


@pytest.mark.parametrize("time", [1, 15, 16, 17, 53])
@pytest.mark.parametrize("form", FORMS)
def test_lengths(time, form):
    # Milder, as the gradient of one strong decay alone is a difference of larger numbers.
    assert error(form=form, shape=(1, time, 1, 16, 16), strength=0.3) < FLOAT32


@pytest.mark.parametrize("length", [32, 64])
@pytest.mark.parametrize("form", ["none", "BTHK"])
def test_longer_chunks(length, form):
    """The shipped chunk is 16; wider ones halve more often."""
    with chunks(length):
        assert error(form=form, shape=(1, 140, 1, 16, 20)) < FLOAT32


@pytest.mark.parametrize(
    ("key_dim", "value_dim"), [(16, 128), (32, 60), (60, 32), (64, 64), (128, 16)]
)
def test_head_sizes(key_dim, value_dim):
    for form in ("none", "BTHK"):
        assert error(form=form, shape=(1, 35, 1, key_dim, value_dim)) < FLOAT32


def test_what_no_chunk_fits_walks():
    """Keys above 128 anywhere, and float32 ones above 64 on gfx942."""
    for key_dim, dtype, target, walks in (
        (136, torch.bfloat16, "sm_90", True),
        (128, torch.bfloat16, "gfx942", False),
        (72, torch.float32, "gfx942", True),
        (64, torch.float16, "gfx942", False),
        (128, torch.float32, "sm_80", False),
    ):
        q = torch.empty(1, 64, 1, key_dim, dtype=dtype, device="meta")
        with recording(run=False, target=target) as launches:
            kernels.forward(q, q, q, None, q, q, None, None, 1.0, False)
            kernels.backward(q, q, q, None, q, q, None, None, q, None, 1.0, False, False)
        assert walks == all(x.name.startswith("_walk") for x in launches)
        assert len(launches) == 5


@pytest.mark.parametrize("strength", [0.0, 0.01, 3.0])
def test_strengths_of_decay(strength):
    """No decay, almost none, and a third of the log decays at -20, beside weak ones."""
    assert error(strength=strength, shape=(1, 50, 1, 16, 16)) < FLOAT32


@pytest.mark.parametrize("decay", [-50.0, -torch.inf])
def test_stronger_decays_count_as_e_to_the_minus_20(decay):
    leaves, rest = arguments(shape=(1, 50, 1, 16, 16))
    leaves["log_decay"] *= 0.02
    leaves["log_decay"][:, ::7] = decay
    expected = run(delta_recurrence_reference, leaves, rest, torch.float64)
    got = run(kernels.delta_recurrence_triton, leaves, rest, torch.float32)
    assert distance(got, expected) < FLOAT32


@pytest.mark.parametrize("form", ["H", "BTH", "BTHK"])
def test_a_positive_log_decay_gives_nan(form):
    """On a GPU the host does not look at values, so the kernels must not hide them."""
    leaves, _ = arguments(form=form, shape=(1, 3, 1, 16, 16))
    inputs = [leaves[name].float() for name in ("q", "k", "v", "log_decay", "a", "b")]
    inputs[3] = torch.full_like(inputs[3], 0.1)
    o, _ = kernels.delta_recurrence_triton(*inputs)
    assert o[:, 1:].isnan().all()
    _, state = kernels.delta_recurrence_step(
        *(x if x.ndim == 1 else x[:, :1] for x in inputs), state=torch.ones(1, 1, 16, 16)
    )
    assert state.isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["none", "BTHK"])
@pytest.mark.parametrize("length", [16, 32])
def test_low_precision_is_as_good_as_plain_pytorch(dtype, form, length):
    """Root mean square error against float64 at most twice that of the step loop in PyTorch.

    The step loop is what one writes without kernels: the state and every product in the low
    precision, as the inputs are. Gates and RWKV-7's a and b as it has them.
    """
    leaves, rest = arguments(form=form, shape=(1, 67, 2, 64, 64), strength=0.2)
    leaves["a"] = F.normalize(leaves["a"], dim=-1).to(dtype).double()
    leaves["b"] = (-0.5 * leaves["a"]).to(dtype).double()
    exact = run(delta_recurrence_reference, leaves, rest, torch.float64)
    plain = run(step_loop, leaves, rest, dtype)
    with chunks(length):
        ours = run(kernels.delta_recurrence_triton, leaves, rest, dtype)
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert a.dtype == b.dtype
        assert distance([a], [c]) <= 2 * distance([b], [c])


def step_loop(q, k, v, log_decay, a, b, *, scale, initial_state, output_final_state, cu_seqlens):
    state = initial_state.to(q.dtype)
    outputs = []
    for t in range(q.shape[1]):
        held = a[:, t, :, None, :] @ state
        if log_decay is not None:
            state = log_decay[:, t, :, :, None].exp().to(q.dtype) * state
        state = state + b[:, t, :, :, None] * held + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(scale * (q[:, t, :, None, :] @ state)[:, :, 0])
    return torch.stack(outputs, dim=1), state.float()


def test_bfloat16_gates():
    """Gates in the inputs' own precision take a shorter way through the kernels."""
    leaves, rest = arguments(shape=(1, 40, 1, 16, 16), packed=True)
    exact = run(delta_recurrence_reference, leaves, rest, torch.float64)
    low = {n: x.to(torch.float32 if n == "initial_state" else torch.bfloat16).requires_grad_()
           for n, x in leaves.items()}  # fmt: skip
    positional = [low[name] for name in ("q", "k", "v", "log_decay", "a", "b")]
    keyword = {"initial_state": low["initial_state"]} | rest
    got = values_and_gradients(kernels.delta_recurrence_triton, positional, keyword)
    assert got[5].dtype == torch.bfloat16
    # A few roundings to 2^-9, relative.
    assert distance(got, exact) < 2e-2


def test_a_thousand_documents():
    """Most of them empty, others of one token, and one of 50 in the same stream."""
    lengths = [int(n % 7 == 0) for n in range(1000)] + [50]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
    generator = torch.Generator().manual_seed(0)
    q, k, v, a, b = torch.randn(5, 1, sum(lengths), 1, 16, generator=generator)
    a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    inputs = q, k, v, None, a, b
    o, state = kernels.delta_recurrence_triton(
        *inputs, cu_seqlens=cu_seqlens, output_final_state=True
    )
    expected = delta_recurrence_reference(*inputs, cu_seqlens=cu_seqlens, output_final_state=True)
    assert worst([o, state], expected) < FLOAT32


def test_non_contiguous_inputs():
    leaves, rest = arguments(shape=(2, 20, 2, 16, 16))
    expected = run(kernels.delta_recurrence_triton, leaves, rest, torch.float32)

    def strided(*positional, initial_state, **keyword):
        *positional, initial_state = (
            x.transpose(0, -1).contiguous().transpose(0, -1) for x in (*positional, initial_state)
        )
        assert not positional[0].is_contiguous() and not initial_state.is_contiguous()
        return kernels.delta_recurrence_triton(*positional, initial_state=initial_state, **keyword)

    assert worst(run(strided, leaves, rest, torch.float32), expected) == 0


@pytest.mark.parametrize("form", FORMS)
def test_step_is_one_token_of_the_definition(form):
    """Without and with a state, beside it and in its place; one launch."""
    leaves, rest = arguments(form=form, shape=(3, 1, 2, 60, 20))
    del rest["cu_seqlens"]
    leaves = {name: None if x is None else x.float() for name, x in leaves.items()}
    state = leaves.pop("initial_state")
    inputs = list(leaves.values())
    for before in (None, state):
        keyword = {"initial_state": before, "output_final_state": True} | rest
        expected = delta_recurrence_reference(*inputs, **keyword)
        with recording() as launches:
            got = delta_recurrence(*inputs, **keyword, backend="triton")
        # Sums of 60 float32 products.
        assert worst(got, expected) < 2e-6
        assert [x.name for x in launches] == ["_step"]
    place = state.clone()
    got = kernels.delta_recurrence_step(*inputs, state=place, in_place=True, **rest)
    assert got[1] is place and worst(got, expected) < 2e-6
    with pytest.raises(ValueError, match="contiguous float32 state, got None"):
        kernels.delta_recurrence_step(*inputs, in_place=True)


def test_step_of_wide_heads():
    """Up to K = 512; any V."""
    for key_dim, value_dim in ((512, 16), (200, 600)):
        leaves, rest = arguments(shape=(1, 1, 1, key_dim, value_dim))
        del rest["cu_seqlens"]
        state = leaves.pop("initial_state")
        expected = delta_recurrence_reference(
            *leaves.values(), initial_state=state, output_final_state=True, **rest
        )
        inputs = [x.float() for x in leaves.values()]
        got = kernels.delta_recurrence_step(*inputs, state=state.float(), **rest)
        # Sums of 512 float32 products.
        assert worst(got, expected) < 2e-6
    x = torch.ones(1, 1, 1, 513)
    with pytest.raises(ValueError, match='K up to 512, got 513; use .* backend="torch"'):
        delta_recurrence(x, x, x, None, x, x, backend="triton")


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_launches(packed):
    """Two forward, three backward, whatever the decay and the documents."""
    for form in FORMS:
        leaves, rest = arguments(form=form, packed=packed, shape=(1, 60, 1, 16, 16))
        with recording() as launches:
            run(kernels.delta_recurrence_triton, leaves, rest, torch.float32)
        names = [x.name for x in launches]
        assert names == ["_prepare", "_scan_outputs", "_prepare", "_scan_states", "_gradients"]


def test_slices_narrow_where_programs_are_few():
    """An H200 has 132 processors: 40 walks take slices of 16, four programs each; 160 of 32."""
    shapes = {2: 16, 8: 32}
    for batch, slice in shapes.items():
        q = torch.empty(batch, 64, 20, 64, dtype=torch.bfloat16, device="meta")
        with recording(run=False, target="sm_90") as launches:
            kernels.forward(q, q, q, None, q, q, None, None, 1.0, False)
        assert launches[1].arguments["BV"] == slice


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_the_host_reads_nothing(packed):
    """Tensors without values: reading one on the host, which stalls a GPU, raises here."""
    leaves, rest = arguments(packed=packed)
    leaves = {name: x.float() for name, x in leaves.items()}
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = [mode.from_tensor(x) for x in leaves.values()]
        bounds = mode.from_tensor(rest["cu_seqlens"]) if packed else None
        with recording(run=False) as launches:
            *inputs, state = fake
            kernels.forward(*inputs, state, bounds, 1.0, True)
            kernels.backward(*inputs, state, bounds, inputs[2], state, 1.0, True, True)
        assert len(launches) == 5


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_operator_is_well_formed(packed):
    """Schema, fake kernels and autograd registration, as torch.library checks them."""
    leaves, rest = arguments(packed=packed, shape=(1, 35, 1, 16, 16))
    inputs = [x.float().requires_grad_() for x in leaves.values()]
    torch.library.opcheck(
        kernels._forward_operator, (*inputs, rest["cu_seqlens"], 0.7, True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )  # fmt: skip
    token = [x[:, :1].detach() for x in inputs[:-1]]
    state = torch.zeros(1, 1, 16, 16)
    torch.library.opcheck(
        kernels._step_operator, (*token, state, 0.7), test_utils=("test_schema", "test_faketensor")
    )


def test_compiles_into_a_full_graph():
    leaves, rest = arguments(shape=(1, 20, 1, 16, 16))
    expected = run(kernels.delta_recurrence_triton, leaves, rest, torch.float32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(*positional, **keyword):
        return delta_recurrence(*positional, **keyword, backend="triton")

    assert worst(run(compiled, leaves, rest, torch.float32), expected) == 0


def test_offsets_beyond_32_bits(monkeypatch):
    """The 2^31st element of every tensor, in memory of which only the used pages exist.

    The interpreter would visit every chunk before the document, so its programs are renumbered.
    """
    torch.use_deterministic_algorithms(False)  # it would fill gigabytes
    from triton.runtime.interpreter import interpreter_builder

    first, count, size = 2**27, 40, 16
    slots = range(first // 16, first // 16 + 3)
    number, launch = interpreter_builder.create_get_program_id, kernels.launch

    def launch_few(kernel, grid, *arguments, **keyword):
        def shifted(axis):
            program = number(axis)
            program.data = program.data + (slots.start if axis == 0 else 0)
            return program

        with monkeypatch.context() as patch:
            if kernel in (kernels._prepare, kernels._gradients):
                assert grid[0] >= slots.stop
                patch.setattr(interpreter_builder, "create_get_program_id", shifted)
                grid = len(slots), *grid[1:]
            launch(kernel, grid, *arguments, **keyword)

    monkeypatch.setattr(kernels, "launch", launch_few)
    inputs = [torch.empty(1, first + count, 1, size, dtype=torch.bfloat16) for _ in range(7)]
    assert inputs[0].numel() > 2**31
    generator = torch.Generator().manual_seed(0)
    for x in inputs:
        x[:, first:] = 0.3 * torch.randn(1, count, 1, size, generator=generator)
    *inputs, do = inputs
    inputs[3][:, first:] = -inputs[3][:, first:].abs()
    bounds = torch.tensor([first, first + count])
    o, _ = kernels.forward(*inputs, None, bounds, 1.0, False)
    gradients = kernels.backward(*inputs, None, bounds, do, None, 1.0, True, False)
    last = [x[:, first:].clone().requires_grad_() for x in inputs]
    expected, _ = delta_recurrence_reference(*last)
    expected.backward(do[:, first:])
    got = [o[:, first:], *(x[:, first:] for x in gradients[:-1])]
    # A few roundings to 2^-9, relative.
    assert distance(got, [expected.double(), *(x.grad.double() for x in last)]) < 2e-2
