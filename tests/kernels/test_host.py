"""What the host does for a call: bounds on it, and that programs compute what passes did.

The bounds count launches and calls of Python functions, on the road that tensors on a GPU take
(kernels/bench/host.py): seconds would say how busy this machine is.
"""

import contextlib
import gc

import pytest
import torch
import triton

from zoo.kernels import delta_recurrence as delta_module
from zoo.kernels import (
    delta_recurrence_triton,
    delta_recurrence_walk_triton,
    dilated_attention_triton,
    known_calls,
    linear_recurrence_channels_triton,
    linear_recurrence_triton,
    programs_triton,
    token_mix_triton,
    wkv4_triton,
)
from zoo.kernels import dilated_attention as dilated_module
from zoo.kernels import linear_recurrence as linear_module
from zoo.kernels import token_mix as mix_module
from zoo.kernels import wkv4 as wkv4_module
from zoo.kernels.bench import host
from zoo.kernels.dilated_attention import Held, dilated_attention
from zoo.kernels.launch_triton import recording
from zoo.kernels.programs_triton import Program
from zoo.kernels.segments_triton import override

# (launches, calls of Python functions) at most, forward and with backward. Of the calls, autograd's
# own are 10 and 40: the floor. One that looks at each argument of a launch costs 20 more.
BOUNDS = {
    "floor": {"forward": (0, 12), "training": (0, 44)},
    "scan, a decay per head": {"forward": (1, 14), "training": (4, 70)},
    "scan, a decay per token": {"forward": (1, 14), "training": (4, 72)},
    "scan, a decay per channel, bonus": {"forward": (2, 17), "training": (7, 79)},
    "scan, a decay per head, segments": {"forward": (3, 16), "training": (8, 74)},
    "delta rule": {"forward": (2, 15), "training": (5, 78)},
    "delta rule, walk": {"forward": (1, 14), "training": (5, 78)},
    "wkv4": {"forward": (3, 14), "training": (6, 70)},
    "token mix, 6 streams": {"forward": (1, 13), "training": (2, 67)},
    "token mix, 5 streams, corrections": {"forward": (1, 18), "training": (2, 86)},
    "dilated attention, 3 branches": {"forward": (3, 15), "training": (9, 75)},
    "step of the scan, a decay per head": {"forward": (1, 15)},
    "step of the scan, a decay per channel, bonus": {"forward": (1, 17)},
    "step of the delta rule": {"forward": (1, 15)},
    "step of wkv4": {"forward": (1, 13)},
}


@pytest.fixture(scope="module")
def measured():
    gc.disable()  # callbacks of the collector are calls as well
    found = host.measure(rounds=1, repeats=1)
    gc.enable()
    return found


def test_every_case_has_a_bound(measured):
    assert {name: set(modes) for name, modes in measured.items()} == {
        name: set(modes) for name, modes in BOUNDS.items()
    }


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds(name, measured):
    for mode, (launches, calls) in BOUNDS[name].items():
        assert measured[name][mode]["launches"] == launches
        assert measured[name][mode]["calls"] <= calls, measured[name]


MODULES = linear_module, delta_module, wkv4_module, dilated_module, mix_module


@pytest.fixture
def on_kernels(monkeypatch):
    """Calls take the road of tensors on a GPU, and kernels run, in the interpreter."""
    for module in MODULES:
        monkeypatch.setattr(module, "choose_backend", lambda *_: "triton")
        monkeypatch.setattr(module, "_known", known_calls.KnownCalls())
    monkeypatch.setattr(known_calls, "KIND", "cpu")


class Random:
    """Numbers that differ in each call of a form."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape, dtype=torch.float32):
        return torch.randn(shape, generator=self.generator).to(dtype)


def bounds(seed, time):
    """Boundaries of three documents, elsewhere in each call."""
    cut = 2 + 3 * seed
    return torch.tensor([0, cut, cut, time])


def linear(random, form="H", bonus=False, packed=None, dtype=torch.float32, time=12):
    """(function, arguments by name, what of them is differentiated)."""
    rows, documents = (1, 3) if packed is not None else (2, 2)
    x = {key: random(rows, time, 2, 16, dtype=dtype) for key in "qkv"}
    shapes = {"H": (2,), "BTH": (rows, time, 2), "BTHK": (rows, time, 2, 16)}
    if form in shapes:
        x["log_decay"] = -random(*shapes[form]).abs()
    if bonus:
        x["bonus"] = random(2, 16)
    x["initial_state"] = random(documents, 2, 16, 16)
    rest = {"output_final_state": True, "scale": 0.5, "cu_seqlens": packed}
    return linear_module.linear_recurrence, x, rest


def delta(random, width=16, packed=None, time=12, rows=2):
    """As `linear`."""
    rows, documents = (1, 3) if packed is not None else (rows, rows)
    x = {key: random(rows, time, 1, width) for key in "qkv"}
    x |= {"log_decay": -random(rows, time, 1, width).abs()}
    x |= {key: 0.2 * random(rows, time, 1, width) for key in "ab"}
    x["initial_state"] = random(documents, 1, width, width)
    return delta_module.delta_recurrence, x, {"output_final_state": True, "cu_seqlens": packed}


def wkv4(random, packed=None, time=12):
    """As `linear`."""
    rows, documents = (1, 3) if packed is not None else (2, 2)
    x = {"w": -random(16).abs(), "u": random(16)}
    x |= {key: random(rows, time, 16) for key in "kv"}
    x["initial_state"] = random(documents, 3, 16).abs()
    return wkv4_module.wkv4, x, {"output_final_state": True, "cu_seqlens": packed}


def longnet(random, packed=None, held=False, seed=0):
    """As `linear`; with one output, in a tuple."""
    x = {key: random(1, 12, 2, 16) for key in "qkv"}
    count = torch.tensor([3, 0, seed])
    kept_slots = (random(3, 2, 12, 16), random(3, 2, 12, 16), count)

    def call(q, k, v, **rest):
        of = Held(*kept_slots) if held else None
        branches = (8, 16), (1, 4)
        return (dilated_attention(q, k, v, *branches, cu_seqlens=packed, held=of, **rest),)

    return call, x, {}


def mix(random, seed=None):
    """As `linear`; packed, from a state and with corrections if there is a seed."""
    x = {"x": random(1 if seed is not None else 2, 12, 16), "mu": random(2, 16)}
    if seed is None:
        return mix_module.token_mix, x, {"of_current": True}
    x |= {"before": random(2, 16), "c0": random(1, 12, 16), "c1": random(1, 12, 16)}

    def call(c0, c1, **rest):
        return mix_module.token_mix(corrections=(c0, c1), **rest)

    return call, x, {"cu_seqlens": torch.tensor([0, 2 + 3 * seed, 12])}


CALLS = {
    "scan H": lambda seed, random: linear(random),
    "scan, no decay, bfloat16": lambda seed, random: linear(random, None, dtype=torch.bfloat16),
    "scan BTH, packed": lambda seed, random: linear(random, "BTH", packed=bounds(seed, 12)),
    "scan BTHK with bonus": lambda seed, random: linear(random, "BTHK", bonus=True),
    "scan H with bonus": lambda seed, random: linear(random, bonus=True),
    "step of the scan": lambda seed, random: linear(random, "BTH", time=1),
    "delta": lambda seed, random: delta(random),
    "delta, packed": lambda seed, random: delta(random, packed=bounds(seed, 12)),
    "delta, walk": lambda seed, random: delta(random, 130, time=3, rows=1),
    "step of delta": lambda seed, random: delta(random, time=1),
    "wkv4": lambda seed, random: wkv4(random),
    "wkv4, packed": lambda seed, random: wkv4(random, bounds(seed, 12)),
    "step of wkv4": lambda seed, random: wkv4(random, time=1),
    "token mix": lambda seed, random: mix(random),
    "token mix, packed, corrections": lambda seed, random: mix(random, seed),
    "longnet": lambda seed, random: longnet(random),
    "longnet, packed, from a state": lambda seed, random: longnet(
        random, bounds(seed, 12), True, seed
    ),
}


def results(name, seed, gradients, change=None):
    """Outputs and gradients of a call whose numbers hang on the seed."""
    function, x, rest = CALLS[name](seed, Random(seed))
    x = x if change is None else {key: change(value) for key, value in x.items()}
    if not gradients:
        with torch.no_grad():
            return function(**x, **rest)
    leaves = {key: value.requires_grad_() for key, value in x.items()}
    outputs = function(**leaves, **rest)
    random = Random(seed + 100)
    cotangents = [random(*y.shape, dtype=y.dtype) for y in outputs]
    return outputs + torch.autograd.grad(outputs, list(leaves.values()), cotangents)


def programs():
    """What is known of calls: the programs, and those of both passes where there are gradients."""
    calls = [call for module in MODULES for call in module._known.prepared.values()]
    for call in calls:
        if isinstance(call, Program):
            yield call
        else:
            ready = call.args[0]
            yield ready.forward
            yield from ready.backward.values()


KERNELS = (
    linear_recurrence_triton,
    linear_recurrence_channels_triton,
    delta_recurrence_triton,
    delta_recurrence_walk_triton,
    wkv4_triton,
    token_mix_triton,
    dilated_attention_triton,
)


@pytest.fixture
def written(on_kernels, monkeypatch):
    """A function that lets calls of a form be written down, after which only programs run."""

    def write(name, gradients, change=None):
        for seed in range(2):
            results(name, seed, gradients, change)
        found = list(programs())
        assert found
        for program in found:
            assert program.source, program.refused
        for module in KERNELS:
            monkeypatch.setattr(module, "launch", None)

    return write


def as_it_stands(name, seeds, gradients, change=None):
    """Results without programs: where anything is overridden, none is written or run."""
    with override(unused=None):
        return [results(name, seed, gradients, change) for seed in seeds]


def assert_equal(got, expected):
    for a, b in zip(got, expected, strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y)


# Without gradients a call is one program, of whatever operator; steps have no others.
PAIRS = [(name, not name.startswith("step")) for name in CALLS] + [("scan H", False)]


@pytest.mark.parametrize(("name", "gradients"), PAIRS)
def test_a_program_computes_what_it_was_written_from(name, gradients, written):
    """To the bit, with other numbers, boundaries and states than those that it saw."""
    expected = as_it_stands(name, (2,), gradients)
    written(name, gradients)
    assert_equal([results(name, 2, gradients)], expected)


def strided(x):
    """The same numbers, two apart in memory."""
    return torch.stack([x, x], -1)[..., 0]


def shifted(x):
    """The same numbers at an address that is no multiple of 16."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


@pytest.mark.parametrize("name", ["scan BTHK with bonus", "delta", "wkv4", "longnet"])
def test_strides_are_not_written_down(name, written):
    """Contiguous tensors wrote it, others are read."""
    expected = as_it_stands(name, (2,), True)
    written(name, True)
    assert_equal([results(name, 2, True, strided)], expected)


@pytest.mark.parametrize("name", ["scan BTH, packed", "step of delta"])
def test_any_address_is_right(name, on_kernels, monkeypatch):
    """Triton compiled for aligned ones: at others the pass runs as it stands."""
    gradients = not name.startswith("step")
    expected = as_it_stands(name, (2,), gradients)
    for seed in range(2):
        results(name, seed, gradients)
    asked = []
    for module in KERNELS:
        launch = module.launch
        monkeypatch.setattr(module, "launch", lambda *a, f=launch, **k: asked.append(f(*a, **k)))
    results(name, 2, gradients)
    assert not asked
    assert_equal([results(name, 2, gradients, shifted)], expected)
    assert asked


def test_one_tensor_in_two_places(on_kernels):
    """The lines would say that the queries are the keys."""
    x = Random(0)(1, 8, 2, 16)
    with torch.no_grad():
        for _ in range(3):
            linear_module.linear_recurrence(x, x, x)
        y, z = Random(1)(1, 8, 2, 16), Random(2)(1, 8, 2, 16)
        got = linear_module.linear_recurrence(y, z, y + z)
        with override(unused=None):
            expected = linear_module.linear_recurrence(y, z, y + z)
    assert torch.equal(got[0], expected[0])


def test_launches_are_seen_and_choices_heeded(on_kernels, monkeypatch):
    """Who records or overrides gets them all, also of calls that are known."""
    for gradients in (True, False):
        for seed in range(3):
            results("scan H", seed, gradients)
    with recording() as launches:
        results("scan H", 3, True)
    assert [x.name for x in launches] == ["_scan"] * 4
    asked, launch = [], linear_recurrence_triton.launch
    monkeypatch.setattr(
        linear_recurrence_triton,
        "launch",
        lambda kernel, *args, **rest: asked.append(kernel) or launch(kernel, *args, **rest),
    )
    results("scan H", 3, False)
    assert not asked
    with override(segment=8):
        results("scan H", 3, False)
    assert len(asked) == 3


def test_gradients_of_gradients_are_refused(on_kernels):
    for name in ("scan H", "delta", "wkv4"):
        for seed in range(3):
            function, x, rest = CALLS[name](seed, Random(seed))
            k = x["k"].requires_grad_()
            o, _ = function(**x, **rest)
            cotangent = torch.ones_like(o).requires_grad_()
            (gradient,) = torch.autograd.grad(o, k, cotangent, create_graph=True)
            with pytest.raises(RuntimeError, match="once_differentiable"):
                gradient.sum().backward()


def test_what_cannot_be_repeated_is_not_written():
    """Values that the host reads, and tensors of before."""
    other, x = torch.ones(3), torch.ones(3)
    for function, why in (
        (lambda x: x * x.sum().item(), "item returned a float"),
        (lambda x: x if x.any() else 2 * x, "__bool__ returned a bool"),
        (lambda x: x + other, "came from elsewhere"),
    ):
        program = Program(function)
        for _ in range(3):
            assert torch.equal(program(x), function(x))
        assert program.source is None and why in program.refused


def test_the_oldest_calls_are_forgotten(monkeypatch):
    """Texts of ever different lengths do not fill the memory."""
    monkeypatch.setattr(known_calls, "MOST", 4)
    known = known_calls.KnownCalls()
    for key in range(10):
        assert known.meet(key, lambda: "first") is None
        assert known.meet(key, lambda: "second") == "second"
        assert len(known.prepared) <= 4


def test_hooks_of_launches_are_called(monkeypatch):
    """A profiler's: then the pass runs as it stands, through Triton's own launch."""
    hooks = triton.knobs.runtime.launch_enter_hook
    with host.without_a_gpu(), torch.no_grad():
        x = Random(0)(1, 8, 2, 16), Random(1)(1, 8, 2, 16), Random(2)(1, 8, 2, 16)
        for _ in range(2):
            linear_module.linear_recurrence(*x)
        for module in KERNELS:
            monkeypatch.setattr(module, "launch", lambda *_, **__: asked.append(1))
        asked = []
        linear_module.linear_recurrence(*x)
        assert not asked
        monkeypatch.setattr(hooks, "calls", [print])
        linear_module.linear_recurrence(*x)
        assert asked


def test_tensors_of_another_device_than_the_current(monkeypatch):
    """Triton launches on the current one: for the launches it becomes the tensors'."""
    current, entered = [0], []

    @contextlib.contextmanager
    def on_device(index):
        before, current[0] = current[0], index
        entered.append(index)
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", on_device)
    with host.without_a_gpu(), torch.no_grad():
        triton.runtime.driver.active.get_current_device = lambda: current[0]
        x = Random(0)(1, 8, 2, 16), Random(1)(1, 8, 2, 16), Random(2)(1, 8, 2, 16)
        for _ in range(3):
            linear_module.linear_recurrence(*x)
        assert not entered
        current[0] = 1
        launched = host.calls_of(lambda: linear_module.linear_recurrence(*x))["launches"]
    assert (launched, entered, current) == (1, [0], [1])


@pytest.mark.parametrize("missing", ["packed_metadata", "function"])
def test_another_triton_launches_by_itself(missing, monkeypatch):
    """What is not where it is known to be is not used."""
    compiled = host.Compiled()
    assert programs_triton.can_be_direct(compiled)
    delattr(compiled, missing)
    assert not programs_triton.can_be_direct(compiled)
    assert not programs_triton.can_be_direct(None)
