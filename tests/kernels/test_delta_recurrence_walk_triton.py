"""The Triton kernels of the delta recurrence for wide heads, in the interpreter."""

import pytest
import torch
import torch.nn.functional as F
from ladder import values_and_gradients, worst
from test_delta_recurrence_triton import FORMS, arguments, distance, run, step_loop

from zoo.kernels import delta_recurrence as public
from zoo.kernels import delta_recurrence_triton as kernels
from zoo.kernels import delta_recurrence_walk_triton as walk
from zoo.kernels.delta_recurrence import delta_recurrence_reference
from zoo.kernels.launch_triton import recording
from zoo.kernels.segments_triton import override

# Of a forward and a backward pass: the latter needs u again.
NAMES = ["_walk_outputs", "_walk_outputs", "_walk_back", "_walk_readers", "_walk_writers"]
# Sums of float32 products, and a state whose errors no later token corrects. Measured: 4e-7 here,
# and 3e-7, as much as the definition's own in float32, after 1,000 tokens.
FLOAT32 = 2e-6
# Empty documents first, in the middle and last, one-token documents, and, with a state kept of
# every 4 tokens, one of a stretch, one of two and one token, and one of three less one.
CU_SEQLENS = torch.tensor([0, 0, 1, 2, 6, 6, 15, 26, 26])

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")


@pytest.fixture
def small(monkeypatch):
    """Heads of any size walk, in slices of 8, and of every 4 tokens a state is kept."""
    monkeypatch.setattr(kernels, "_CONFIGS", {})
    monkeypatch.setattr(walk, "MAX_ROWS", 8)
    with override(delta_recurrence_checkpoint=4):
        yield


def error(leaves, rest, dtype=torch.float32):
    """How far a dtype is from the definition in float64, over values and every gradient."""
    expected = run(delta_recurrence_reference, leaves, rest, torch.float64)
    return distance(run(kernels.delta_recurrence_triton, leaves, rest, dtype), expected)


def packed_arguments(form, heads=2, **choices):
    """`arguments` with the documents of this file; K and V leave the last slices half empty."""
    time, documents = int(CU_SEQLENS[-1]), len(CU_SEQLENS) - 1
    leaves, rest = arguments(form=form, shape=(1, time, heads, 12, 20), **choices)
    if leaves["initial_state"] is not None:
        generator = torch.Generator().manual_seed(2)
        shape = documents, heads, 12, 20
        leaves["initial_state"] = torch.randn(shape, generator=generator, dtype=torch.float64)
    return leaves, rest | {"cu_seqlens": CU_SEQLENS}


@pytest.mark.parametrize("form", FORMS)
def test_equals_the_definition(form, small):
    assert error(*arguments(form=form, shape=(2, 6, 2, 12, 12))) < FLOAT32


@pytest.mark.parametrize("form", FORMS)
def test_packed_documents(form, small):
    initial = form != "BTH"
    assert error(*packed_arguments(form, heads=1, initial=initial)) < FLOAT32


@pytest.mark.parametrize("time", [1, 3, 4, 5, 8, 13])
def test_lengths(time, small):
    """Around the tokens of which a state is kept."""
    assert error(*arguments(shape=(1, time, 1, 8, 8))) < FLOAT32


def test_shipped_stretches(monkeypatch):
    """One token more than a stretch, in whole slices."""
    monkeypatch.setattr(kernels, "_CONFIGS", {})
    assert error(*arguments(shape=(1, walk.CHECKPOINT + 1, 1, 16, 16), strength=0.3)) < FLOAT32


@pytest.mark.parametrize(
    ("key_dim", "value_dim", "time"), [(136, 16, 5), (200, 60, 3), (256, 256, 2), (512, 512, 2)]
)
def test_head_sizes(key_dim, value_dim, time):
    assert error(*arguments(shape=(1, time, 1, key_dim, value_dim))) < FLOAT32


def test_few_programs_walk_many_documents(small, monkeypatch):
    """Two programs, each with one document after another in the same memory."""
    monkeypatch.setattr(walk, "num_processors", lambda device: 1)
    with recording() as launches:
        assert error(*packed_arguments("BTHK", heads=1)) < FLOAT32
    assert launches[-1].grid == (2,)


@pytest.mark.parametrize("wanted", ["q", "v", "log_decay", "initial_state"])
def test_each_gradient_alone(wanted, small):
    """Kernels leave out what nobody asked for; what is asked for stays."""
    leaves, rest = arguments(shape=(1, 6, 1, 8, 8), form="BTH")
    leaves = {name: x.float() for name, x in leaves.items()}
    positional = [leaves[name] for name in ("q", "k", "v", "log_decay", "a", "b")]
    gradients = []
    for function in (kernels.delta_recurrence_triton, delta_recurrence_reference):
        leaves[wanted].requires_grad_()
        keyword = {"initial_state": leaves["initial_state"]} | rest
        o, _ = function(*positional, **keyword)
        gradients.append(torch.autograd.grad(o.sum(), leaves[wanted])[0])
    assert distance(*([x] for x in gradients)) < FLOAT32


@pytest.mark.parametrize("decay", [-50.0, -torch.inf])
def test_strong_decays_are_what_they_are(decay, small):
    leaves, rest = arguments(shape=(1, 9, 1, 12, 12))
    leaves["log_decay"] *= 0.02
    leaves["log_decay"][:, ::3] = decay
    assert error(leaves, rest) < FLOAT32


def test_a_decay_is_not_clamped(small):
    """e^-25 of a state that nothing is added to; its exp is right to a few roundings."""
    zero, state = torch.zeros(1, 1, 1, 8), torch.ones(1, 1, 8, 8)
    gates = torch.full((1, 1, 1, 8), -25.0)
    inputs = zero, zero, zero, gates, zero, zero
    keyword = {"initial_state": state, "output_final_state": True}
    _, final = kernels.delta_recurrence_triton(*inputs, **keyword)
    assert (final.double() / gates.double().exp()[0] - 1).abs().max() < 1e-6


@pytest.mark.parametrize("form", ["H", "BTH", "BTHK"])
def test_a_positive_log_decay_gives_nan(form, small):
    leaves, _ = arguments(form=form, shape=(1, 3, 1, 12, 12))
    inputs = [leaves[name].float() for name in ("q", "k", "v", "log_decay", "a", "b")]
    inputs[3] = torch.full_like(inputs[3], 0.1)
    o, _ = kernels.delta_recurrence_triton(*inputs)
    assert o.isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_good_as_plain_pytorch(dtype):
    """Root mean square error against float64 at most twice that of the step loop in PyTorch."""
    leaves, rest = arguments(shape=(1, 14, 1, 136, 16), strength=0.2)
    leaves["a"] = F.normalize(leaves["a"], dim=-1).to(dtype).double()
    leaves["b"] = (-0.5 * leaves["a"]).to(dtype).double()
    exact = run(delta_recurrence_reference, leaves, rest, torch.float64)
    plain = run(step_loop, leaves, rest, dtype)
    ours = run(kernels.delta_recurrence_triton, leaves, rest, dtype)
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert a.dtype == b.dtype
        assert distance([a], [c]) <= 2 * distance([b], [c])


@pytest.mark.parametrize("form", ["BTH", "BTHK"])
def test_bfloat16_gates(form, small):
    leaves, rest = arguments(form=form, shape=(1, 7, 1, 12, 12))
    exact = run(delta_recurrence_reference, leaves, rest, torch.float64)
    low = {n: x.to(torch.float32 if n == "initial_state" else torch.bfloat16).requires_grad_()
           for n, x in leaves.items()}  # fmt: skip
    positional = [low[name] for name in ("q", "k", "v", "log_decay", "a", "b")]
    keyword = {"initial_state": low["initial_state"]} | rest
    got = values_and_gradients(kernels.delta_recurrence_triton, positional, keyword)
    assert got[5].dtype == torch.bfloat16
    # The results' own rounding to 2^-9, and that of the cotangent of o.
    assert distance(got, exact) < 8e-3


def test_non_contiguous_inputs(small):
    leaves, rest = arguments(shape=(2, 5, 2, 8, 8))
    expected = run(kernels.delta_recurrence_triton, leaves, rest, torch.float32)

    def strided(*positional, initial_state, **keyword):
        *positional, initial_state = (
            x.transpose(0, -1).contiguous().transpose(0, -1) for x in (*positional, initial_state)
        )
        assert not positional[0].is_contiguous() and not initial_state.is_contiguous()
        return kernels.delta_recurrence_triton(*positional, initial_state=initial_state, **keyword)

    assert worst(run(strided, leaves, rest, torch.float32), expected) == 0


def launches_of(time, documents, key_dim=512, value_dim=512, heads=4, form="BTHK"):
    """What a forward and backward pass with every gradient would launch, and on which tensors."""
    with torch.device("meta"):
        q, k, a, b = (torch.empty(1, time, heads, key_dim, dtype=torch.bfloat16) for _ in range(4))
        v = torch.empty(1, time, heads, value_dim, dtype=torch.bfloat16)
        decay = {"none": None, "BTHK": torch.empty(q.shape), "BTH": torch.empty(q.shape[:3])}[form]
        state = torch.empty(documents, heads, key_dim, value_dim)
        cu_seqlens = torch.empty(documents + 1, dtype=torch.int64)
    inputs = q, k, v, decay, a, b, state, cu_seqlens
    with recording(run=False, target="sm_90") as launches:
        kernels.forward(*inputs, 1.0, True)
        kernels.backward(*inputs, v, state, 1.0, decay is not None, True)
    return launches


def test_memory_is_linear_with_small_constants():
    """Of each token, heads of 512: 1/64 of a state and 5 rows; beside it what fills the device.

    All states of all tokens would be 8 GB here.
    """
    tokens, heads = 2048, 4
    inputs = {"q", "k", "v", "a", "b", "log_decay", "cu_seqlens", "initial", "dfinal", "do"}
    outputs = {"o", "final", "dinitial", "dq", "dk", "dv", "da", "db", "dlog_decay"}
    for documents in (1, 1000):
        own, between = {}, 0
        for launch in launches_of(tokens, documents, heads=heads):
            for name, x in launch.arguments.items():
                if torch.is_tensor(x) and name not in inputs | outputs:
                    own[name] = x.numel() * x.element_size()
        assert own.keys() == {"u", "du", "checkpoints", "between"}
        between = own.pop("between")
        # Two programs to each of 132 processors, 64 states each of 8 x 512 float32.
        assert between <= 2 * 132 * 64 * 8 * 512 * 4
        assert sum(own.values()) <= tokens * heads * (512 * 512 // 64 + 2 * 512) * 4
    # Without a gradient of the decay there is neither.
    for launch in launches_of(tokens, 1, form="none")[-2:]:
        assert launch.arguments["checkpoints"] is None
    assert launch.arguments["between"] is None


def test_launches(small):
    """One forward and four backward, whatever the decay."""
    for form in ("none", "BTH", "BTHK"):
        names = [x.name for x in launches_of(100, 3, 200, 60, form=form)]
        assert names == NAMES


def test_the_host_reads_nothing():
    """Tensors without values: reading one on the host, which stalls a GPU, raises here."""
    leaves, _ = packed_arguments("BTH", heads=1)
    leaves = [x.float() for x in leaves.values()]
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=False) as mode:
        *inputs, state = (mode.from_tensor(x) for x in leaves)
        bounds = mode.from_tensor(CU_SEQLENS)
        with recording(run=False) as launches:
            walk.forward(*inputs, state, bounds, 1.0, True)
            walk.backward(*inputs, state, bounds, inputs[2], state, 1.0, True, True)
        assert [x.name for x in launches] == NAMES


def test_operator_is_well_formed(small):
    """Its fakes promise what the walk returns."""
    leaves, _ = arguments(form="BTH", shape=(1, 3, 1, 8, 8))
    inputs = [x.float().requires_grad_() for x in leaves.values()]
    bounds = torch.tensor([0, 3])
    torch.library.opcheck(
        kernels._forward_operator, (*inputs, bounds, 0.7, True),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
    do, dfinal = torch.ones_like(inputs[2]), torch.ones_like(inputs[-1])
    inputs = [x.detach() for x in inputs]
    torch.library.opcheck(
        kernels._backward_operator, (*inputs, bounds, do, dfinal, 0.7, True, True),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def test_compiles_into_a_full_graph():
    leaves, rest = arguments(shape=(1, 2, 1, 136, 16))
    expected = run(kernels.delta_recurrence_triton, leaves, rest, torch.float32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(*positional, **keyword):
        return public.delta_recurrence(*positional, **keyword, backend="triton")

    assert worst(run(compiled, leaves, rest, torch.float32), expected) == 0


@pytest.mark.parametrize(("key_dim", "value_dim"), [(513, 16), (136, 513)])
def test_still_wider_heads(key_dim, value_dim, monkeypatch):
    """Refused if the kernels are asked for; "auto" takes PyTorch."""
    leaves, _ = arguments(shape=(1, 2, 1, key_dim, value_dim))
    inputs = [leaves[name].float() for name in ("q", "k", "v", "log_decay", "a", "b")]
    wide = f'K and V up to 512, got K = {key_dim} and V = {value_dim}; use backend="torch"'
    with pytest.raises(ValueError, match=wide):
        public.delta_recurrence(*inputs, backend="triton")
    # As it would be on a GPU.
    monkeypatch.setattr(public, "choose_backend", lambda *_: "triton")
    with recording() as launches:
        o, _ = public.delta_recurrence(*inputs)
    assert not launches
    expected, _ = public.delta_recurrence_chunked(*inputs)
    assert worst([o], [expected]) == 0


def test_offsets_beyond_32_bits(monkeypatch):
    """The 2^31st element of every tensor, in memory of which only the used pages exist."""
    torch.use_deterministic_algorithms(False)  # it would fill gigabytes
    monkeypatch.setattr(kernels, "_CONFIGS", {})
    first, count, size = 2**27, 18, 16
    inputs = [torch.empty(1, first + count, 1, size, dtype=torch.bfloat16) for _ in range(7)]
    assert inputs[0].numel() > 2**31
    generator = torch.Generator().manual_seed(0)
    for x in inputs:
        x[:, first:] = 0.3 * torch.randn(1, count, 1, size, generator=generator)
    *inputs, do = inputs
    inputs[3][:, first:] = -inputs[3][:, first:].abs()
    bounds = torch.tensor([first, first + count])
    o, _ = kernels.forward(*inputs, None, bounds, 1.0, False)
    with override(delta_recurrence_checkpoint=16):
        gradients = kernels.backward(*inputs, None, bounds, do, None, 1.0, True, False)
    last = [x[:, first:].clone().requires_grad_() for x in inputs]
    expected, _ = delta_recurrence_reference(*last)
    expected.backward(do[:, first:])
    got = [o[:, first:], *(x[:, first:] for x in gradients[:-1])]
    # One rounding to 2^-9 of each result, in both.
    assert distance(got, [expected.double(), *(x.grad.double() for x in last)]) < 8e-3
