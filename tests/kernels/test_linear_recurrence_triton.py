"""The Triton kernels, in the interpreter: decay per head or per token, or none."""

import itertools

import pytest
import torch
from ladder import values_and_gradients, worst

from zoo.kernels import linear_recurrence_triton as kernels
from zoo.kernels.launch_triton import recording
from zoo.kernels.linear_recurrence import linear_recurrence, linear_recurrence_reference
from zoo.kernels.segments_triton import override

FORMS = ("none", "H", "BTH")
# The kernels read 64 positions at a time in bf16, 32 in float32. Empty documents first, in the
# middle and last, one-token documents, one of exactly two chunks.
CU_SEQLENS = [0, 0, 1, 2, 66, 66, 130, 131, 150, 150]
# Sums of a few hundred float32 products. With gates per token also exponents of up to 300, known to
# 2^-16, and gradients of gates that are small differences: measured 1.6e-5 with V = 512.
FLOAT32 = 3e-5


pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")


def arguments(
    form="H", bonus=False, packed=False, initial=True, shape=(1, 150, 2, 16, 32), decay=None
):
    """Random inputs in float64, rounded to bfloat16: (leaves by name, the rest)."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        x = torch.randn(*size, generator=generator, dtype=torch.float64)
        return x.bfloat16().double()

    batch, time, heads, key_dim, value_dim = shape
    cu_seqlens = torch.tensor([min(x, time) for x in CU_SEQLENS]) if packed else None
    gates = {"H": [heads], "BTH": [batch, time, heads]}
    documents = len(CU_SEQLENS) - 1 if packed else batch
    leaves = {
        "q": normal(batch, time, heads, key_dim),
        "k": normal(batch, time, heads, key_dim),
        "v": normal(batch, time, heads, value_dim),
        # From almost none to e^-15 within one tensor.
        "log_decay": None if form == "none" else -((normal(*gates[form]).abs() * 2) ** 1.5),
        "bonus": normal(heads, key_dim) if bonus else None,
        "initial_state": normal(documents, heads, key_dim, value_dim) if initial else None,
    }
    if decay is not None:
        leaves["log_decay"].fill_(decay)
    return leaves, {"cu_seqlens": cu_seqlens, "scale": 0.3}


def run(function, leaves, rest, dtype):
    """Values and every gradient with the inputs in a dtype; states and gates in float32."""
    if dtype != torch.float64:
        low = ("q", "k", "v")
        leaves = {
            name: None if x is None else x.to(dtype if name in low else torch.float32)
            for name, x in leaves.items()
        }
    leaves = {n: None if x is None else x.detach().requires_grad_() for n, x in leaves.items()}
    positional = [leaves[name] for name in ("q", "k", "v", "log_decay")]
    keyword = {name: leaves[name] for name in ("bonus", "initial_state")} | rest
    return values_and_gradients(function, positional, keyword)


def distance(got, expected):
    """||got - expected|| / ||expected|| of the worst tensor; NaN counts as far."""
    ratios = [
        ((a.double() - b).norm() / b.norm().clamp(min=1e-6)).nan_to_num(torch.inf).item()
        for a, b in zip(got, expected, strict=True)
    ]
    return max(ratios)


def error(function=kernels.linear_recurrence_triton, segment=None, **choices):
    """How far float32 is from the definition in float64, over values and every gradient.

    The gradient of a decay is sum q . dq - sum k . dk over many tokens, so its error is compared
    with one of these sums, of absolute values: of a decay like e^-15 almost nothing is left.
    """
    leaves, rest = arguments(**choices)
    expected = run(linear_recurrence_reference, leaves, rest, torch.float64)
    with override(**({} if segment is None else {"segment": segment})):
        got = run(function, leaves, rest, torch.float32)
    if leaves["log_decay"] is not None and leaves["log_decay"].ndim == 1:
        subtracted = (leaves["q"] * expected[2]).sum(-1).abs().sum((0, 1))
        decay = ((got.pop(5) - expected.pop(5)).norm() / subtracted.norm()).nan_to_num(torch.inf)
        return max(distance(got, expected), decay.item())
    return distance(got, expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bonus", [False, True], ids=["plain", "bonus"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("initial", [False, True], ids=["zero", "initial"])
@pytest.mark.parametrize("segment", [None, 48], ids=["whole", "segments"])
def test_equals_the_definition(form, bonus, packed, initial, segment):
    # Of whole rows three chunks or two segments, and a part of one; of documents all.
    shape = (1, 150, 2, 16, 32) if packed else (2, 101, 2, 16, 32)
    choices = {"form": form, "bonus": bonus, "packed": packed, "initial": initial}
    assert error(segment=segment, shape=shape, **choices) < FLOAT32


@pytest.mark.parametrize("time", [1, 31, 32, 33, 63, 64, 65, 131])
@pytest.mark.parametrize("form", FORMS)
def test_lengths(time, form):
    assert error(form=form, shape=(2, time, 1, 16, 16)) < FLOAT32


@pytest.mark.parametrize(
    ("key_dim", "value_dim"),
    [(16, 512), (32, 60), (60, 32), (64, 128), (128, 64), (256, 16), (512, 256)],
)
def test_head_sizes(key_dim, value_dim):
    shape = (1, 34, 1, key_dim, value_dim)
    form = "BTH" if key_dim < value_dim else "H"
    assert error(form=form, shape=shape, segment=32, bonus=form == "BTH") < FLOAT32


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_good_as_plain_pytorch(form, dtype):
    """Root mean square error against float64 at most twice that of the parallel form in PyTorch.

    The parallel form is what one writes without kernels: scores, times decay, times values, each in
    the low precision with float32 sums inside a product.
    """
    leaves, rest = arguments(form=form, shape=(2, 131, 2, 64, 64))
    exact = run(linear_recurrence_reference, leaves, rest, torch.float64)
    plain = run(parallel_form, leaves, rest, dtype)
    with override(segment=100):
        ours = run(kernels.linear_recurrence_triton, leaves, rest, dtype)
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert a.dtype == b.dtype
        assert distance([a], [c]) <= 2 * distance([b], [c])


def parallel_form(q, k, v, log_decay, *, bonus, scale, initial_state, output_final_state, **_):
    """(q k^T * decay) v and its states, in the dtype of q."""
    dtype = q.dtype
    q_BHTK, k_BHTK, v_BHTV = (x.transpose(1, 2) for x in (q, k, v))
    batch, time, heads, _ = q.shape
    if log_decay is None:
        log_decay = torch.zeros(heads)
    if log_decay.ndim == 1:
        log_decay = log_decay.expand(batch, time, heads)
    cum_BHT = log_decay.transpose(1, 2).cumsum(-1)
    exponent = cum_BHT[..., :, None] - cum_BHT[..., None, :]
    visible = torch.ones(time, time, dtype=torch.bool).tril()
    pairs = torch.where(visible, exponent, -torch.inf).exp().to(dtype)
    o = (q_BHTK @ k_BHTK.mT * pairs) @ v_BHTV
    o = o + (q_BHTK @ initial_state.to(dtype)) * cum_BHT.exp()[..., None].to(dtype)
    to_end = (cum_BHT[..., -1:] - cum_BHT).exp()[..., None].to(dtype)
    state = (k_BHTK * to_end).mT @ v_BHTV
    state = state.float() + cum_BHT[..., -1].exp()[..., None, None] * initial_state
    return (o * scale).transpose(1, 2), state


def test_sixteen_bits_survive_large_states():
    """Sums of 300 positive products of 16 x 16 pass float16's largest number inside."""
    ones = torch.full((1, 300, 1, 16), 16.0, dtype=torch.float16)
    o, state = kernels.linear_recurrence_triton(
        ones, ones, ones, scale=2**-12, output_final_state=True
    )
    expected, exact = linear_recurrence_reference(
        ones, ones, ones, scale=2**-12, output_final_state=True
    )
    assert state.max() > 65504
    assert torch.equal(state, exact) and worst([o], [expected]) < 2**-10


@pytest.mark.parametrize("decay", [-1e-7, -20.0, -1e4])
def test_extreme_decays(decay):
    """Almost no decay, and states forgotten at once, over several segments.

    e^-10000 counts as e^-30: 1e-13.
    """
    assert error(segment=64, shape=(1, 150, 2, 16, 16), decay=decay) < FLOAT32


def test_gates_of_exactly_zero_decay():
    """Log decays of -inf forget everything and stay finite."""
    leaves, rest = arguments(form="BTH", initial=True, shape=(1, 70, 1, 16, 16))
    leaves["log_decay"][:, ::7] = -torch.inf
    leaves["log_decay"] = leaves["log_decay"].float()
    inputs = [leaves[name].float() for name in ("q", "k", "v")]
    state = leaves["initial_state"].float()
    got = kernels.linear_recurrence_triton(
        *inputs, leaves["log_decay"], initial_state=state, output_final_state=True, **rest
    )
    expected = linear_recurrence_reference(
        *inputs, leaves["log_decay"], initial_state=state, output_final_state=True, **rest
    )
    assert distance(got, [x.double() for x in expected]) < FLOAT32


@pytest.mark.parametrize("form", ["H", "BTH"])
def test_a_positive_log_decay_gives_nan(form):
    """On a GPU the host does not look at values, so the kernels must not hide them."""
    leaves, _ = arguments(form=form, shape=(1, 3, 1, 16, 16))
    inputs = [leaves[name].float() for name in ("q", "k", "v")]
    gates = torch.full_like(leaves["log_decay"], 0.1).float()
    o, _ = kernels.linear_recurrence_triton(*inputs, gates)
    assert o[:, 1:].isnan().all()


@pytest.mark.parametrize(("documents", "segment"), [(1000, None), (100, 64)])
def test_many_documents(documents, segment):
    """Documents of one token and one of 200 in the same stream."""
    lengths = [1] * documents + [200]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, sum(lengths), 1, 16, generator=generator).unbind(0)
    log_decay = torch.tensor([-0.1])
    with override(**({} if segment is None else {"segment": segment})):
        o, state = kernels.linear_recurrence_triton(
            q, k, v, log_decay, cu_seqlens=cu_seqlens, output_final_state=True
        )
    last = [x[:, documents:] for x in (q, k, v)]
    alone, final = linear_recurrence_reference(*last, log_decay, output_final_state=True)
    assert worst([o[:, documents:], state[-1:]], [alone, final]) < FLOAT32
    one = (q * k).sum(-1, keepdim=True) * v
    assert worst([o[:, :documents]], [one[:, :documents]]) < FLOAT32


def test_non_contiguous_inputs():
    leaves, rest = arguments(form="BTH", shape=(2, 40, 2, 16, 16))
    expected = run(kernels.linear_recurrence_triton, leaves, rest, torch.float32)

    def strided(q, k, v, log_decay, *, initial_state, **keyword):
        q, k, v, log_decay, initial_state = (
            x.transpose(0, -1).contiguous().transpose(0, -1)
            for x in (q, k, v, log_decay, initial_state)
        )
        assert not q.is_contiguous() and not initial_state.is_contiguous()
        return kernels.linear_recurrence_triton(
            q, k, v, log_decay, initial_state=initial_state, **keyword
        )

    assert worst(run(strided, leaves, rest, torch.float32), expected) == 0


def check_offsets(function):
    """The 2^31st element of q, k, v and o, in memory of which only the used pages exist."""
    first, count, key_dim = 2**27, 40, 16
    tensors = [torch.empty(1, first + count, 1, key_dim, dtype=torch.bfloat16) for _ in range(3)]
    assert tensors[0].numel() > 2**31
    generator = torch.Generator().manual_seed(0)
    for x in tensors:
        x[:, first:] = torch.randn(1, count, 1, key_dim, generator=generator)
    bounds = torch.tensor([first, first + count])
    with override(segment=2**30):
        o, _, _ = function(*tensors, torch.tensor([-0.1]), None, None, bounds, 1.0, False)
    last = [x[:, first:] for x in tensors]
    expected, _ = linear_recurrence_reference(*last, torch.tensor([-0.1]))
    # Both are rounded to bf16.
    assert worst([o[:, first:]], [expected]) < 2**-7


def test_offsets_beyond_32_bits():
    torch.use_deterministic_algorithms(False)  # it would fill gigabytes
    check_offsets(kernels.forward)


@pytest.mark.parametrize("form", [*FORMS, "BTHK"])
@pytest.mark.parametrize("bonus", [False, True], ids=["plain", "bonus"])
def test_step_is_one_token_of_the_definition(form, bonus):
    """Without and with a state, beside it and in its place; one launch."""
    leaves, rest = arguments(form=form.rstrip("K"), bonus=bonus, shape=(3, 1, 2, 60, 20))
    del rest["cu_seqlens"]
    leaves = {name: None if x is None else x.float() for name, x in leaves.items()}
    if form == "BTHK":
        leaves["log_decay"] = leaves["log_decay"][..., None] * torch.rand(60)
    state, bonus = leaves.pop("initial_state"), leaves.pop("bonus")
    inputs = list(leaves.values())
    for before in (None, state):
        expected = linear_recurrence_reference(
            *inputs, bonus=bonus, initial_state=before, output_final_state=True, **rest
        )
        with recording() as launches:
            got = linear_recurrence(
                *inputs,
                bonus=bonus,
                initial_state=before,
                output_final_state=True,
                backend="triton",
                **rest,
            )
        # Sums of 60 float32 products.
        assert worst(got, expected) < 2e-6
        assert [x.name for x in launches] == ["_step"]
    place = state.clone()
    got = kernels.linear_recurrence_step(*inputs, bonus=bonus, state=place, in_place=True, **rest)
    assert got[1] is place and worst(got, expected) < 2e-6
    with pytest.raises(ValueError, match="contiguous float32 state, got None"):
        kernels.linear_recurrence_step(*inputs, in_place=True)


def test_launches():
    """One for the forward pass and three backward; two over segments more in each, if cut."""

    def count(segment, **choices):
        leaves, rest = arguments(**choices)
        with override(segment=segment), recording() as launches:
            run(kernels.linear_recurrence_triton, leaves, rest, torch.float32)
        return [x.name for x in launches]

    for form in FORMS:
        assert count(150, form=form) == ["_scan"] * 4
    cut = ["_segment_states", "_combine", "_scan", "_segment_states", "_combine", *["_scan"] * 3]
    assert count(64, form="none") == cut
    assert count(64, form="none", packed=True) == cut
    # The gradient of a decay needs the entering states again, from factors that are not rounded.
    assert count(64) == [*cut[:5], *cut[3:5], *cut[5:]]


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_the_host_reads_nothing(packed):
    """Tensors without values: reading one on the host, which stalls a GPU, raises here."""
    leaves, rest = arguments("BTH", bonus=True, packed=packed)
    leaves = {name: x.float() for name, x in leaves.items()}
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = {name: mode.from_tensor(x) for name, x in leaves.items()}
        bounds = mode.from_tensor(rest["cu_seqlens"]) if packed else None
        with override(segment=64), recording(run=False) as launches:
            o, final, entering = kernels.forward(*fake.values(), bounds, 1.0, True)
            kernels.backward(*fake.values(), bounds, entering, o, final, 1.0, True, True)
    assert len(launches) == 10


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("segment", [150, 64])
def test_operators_are_registered_correctly(packed, segment):
    leaves, rest = arguments("BTH", bonus=True, packed=packed, shape=(1, 150, 1, 16, 16))
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


@pytest.mark.parametrize("form", FORMS)
def test_compiles_as_one_graph(form):
    leaves, rest = arguments(form, bonus=form == "BTH", packed=form == "H")

    def call(*args, **keyword):
        return linear_recurrence(*args, **keyword, backend="triton")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    eager = run(call, leaves, rest, torch.float32)
    assert worst(run(compiled, leaves, rest, torch.float32), eager) == 0
    torch._dynamo.reset()


def test_exports():
    class Recurrence(torch.nn.Module):
        def forward(self, q, k, v):
            return linear_recurrence(q, k, v, torch.tensor([-0.1, -0.2]), backend="triton")[0]

    leaves, _ = arguments()
    inputs = tuple(leaves[name].float() for name in ("q", "k", "v"))
    program = torch.export.export(Recurrence(), inputs)
    assert torch.equal(program.module()(*inputs), Recurrence()(*inputs))


def test_mixed_dtypes_are_computed_in_the_widest():
    """float16 queries and keys with float32 values, as RetNet passes them."""
    leaves, rest = arguments()
    q, k, v = (leaves[name].float() for name in ("q", "k", "v"))
    log_decay = leaves["log_decay"].float()
    o, _ = linear_recurrence(q.half(), k.half(), v, log_decay, backend="triton", **rest)
    expected, _ = linear_recurrence(q, k, v, log_decay, backend="triton", **rest)
    assert o.dtype == torch.float32 and torch.equal(o, expected)


def test_the_table_of_segments_follows_its_boundaries():
    """A table is kept for the tensor it was made of, until that is written to."""
    leaves, rest = arguments(packed=True)
    inputs = [leaves[name].float() for name in ("q", "k", "v")]
    bounds = rest["cu_seqlens"]
    with override(segment=48):
        for _ in range(2):
            o, _ = kernels.linear_recurrence_triton(*inputs, cu_seqlens=bounds)
            expected, _ = linear_recurrence_reference(*inputs, cu_seqlens=bounds)
            assert worst([o], [expected]) < FLOAT32
            bounds[4:6] += 20
