"""The Triton kernels of `dilated_attention`, in Triton's interpreter, against the definition."""

import pytest
import torch
from ladder import worst
from test_dilated_attention import SHAPES, arguments, run
from test_kernel_mutants import mutant

from zoo.kernels import dilated_attention_triton as kernels
from zoo.kernels.dilated_attention import (
    Held,
    branches_of,
    dilated_attention,
    dilated_attention_reference,
)
from zoo.kernels.launch_triton import Config, recording
from zoo.kernels.ready_triton import Ready
from zoo.kernels.segments_triton import overridden, override

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")

# Sums in float32 of numbers below 10. Measured over all cases here: up to 1e-6.
TOLERANCE = 3e-6


@pytest.fixture(autouse=True)
def small():
    """Tiles of 16 and 32: several to a segment, of another size for what is walked over."""
    sizes = {64: (Config(64, 32, 4, 1), Config(32, 64, 4, 1), Config(64, 64, 4, 1))}
    with override(dilated_attention=sizes):
        yield


def triton_of(q, k, v, *branches, scale, offsets="grouped", weight_gradient=False, **keyword):
    """The kernels whatever the dtype; `dilated_attention` refuses float64."""
    numbers = branches_of(*branches), scale, offsets, keyword.get("log_decay")
    rest = keyword.get("cu_seqlens"), keyword.get("held"), weight_gradient
    return kernels.dilated_attention_triton(q, k, v, *numbers, *rest)


def exact(positional, keyword):
    """The same arguments in float64, and the leaves among them."""
    tensors = [x.detach().double().requires_grad_() for x in positional[:3]]
    keyword, leaves = dict(keyword), list(tensors)
    if "held" in keyword:
        held = [x.detach().double().requires_grad_() for x in keyword["held"][:2]]
        keyword["held"], leaves = Held(*held, *keyword["held"][2:]), leaves + held
    return [*tensors, *positional[3:]], keyword, leaves


def error(function=triton_of, reference=dilated_attention_reference, **choices):
    settings = {
        name: choices.pop(name) for name in ("offsets", "weight_gradient") if name in choices
    }
    positional, keyword, leaves = arguments(**choices, dtype=torch.float32)
    keyword |= settings
    got = run(function, positional, keyword, leaves)
    return worst(got, run(reference, *exact(positional, keyword)))


@pytest.mark.parametrize("weights", [False, True], ids=["constant weights", "weight gradient"])
@pytest.mark.parametrize("held", [False, True], ids=["fresh", "held"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("decay", [False, True], ids=["plain", "decay"])
def test_equals_the_definition(packed, held, decay, weights):
    """Odd lengths, several heads to an offset, rates that divide nothing."""
    shape = SHAPES[1] if packed == decay else (3, 6, [16, 40], [1, 4])
    offsets = "modulo" if held == decay else "grouped"
    settings = {"offsets": offsets, "weight_gradient": weights}
    settings |= {"packed": packed, "held": held, "decay": decay}
    assert error(shape=shape, time=40, **settings) < TOLERANCE


@pytest.mark.parametrize("time", [1, 31, 33, 100])
def test_tiles(time):
    """Segments of several tiles, of a tile and of one token more or less."""
    assert error(shape=(2, 6, [97, 64], [1, 2]), time=time, batch=1) < TOLERANCE


def test_as_shipped():
    overridden.clear()
    assert error(shape=(2, 6, [200, 400], [1, 3]), time=301, batch=1, decay=True) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", [False, True], ids=["plain", "decay"])
def test_low_precision_is_as_good_as_plain_pytorch(dtype, decay):
    """The error against float64 is at most twice that of PyTorch in the same precision.

    Plain PyTorch is the definition with scores, weights and sums of that dtype, as the authors' is.
    """
    positional, keyword, leaves = arguments(dtype=dtype, decay=decay)
    expected = run(dilated_attention_reference, *exact(positional, keyword))
    ours = run(triton_of, positional, keyword, leaves)
    with torch.autocast("cpu", dtype):
        plain = run(dilated_attention_reference, positional, keyword, leaves)
    assert [x.dtype for x in ours] == [x.dtype for x in plain]
    for a, b, c in zip(ours, plain, expected, strict=True):
        found, allowed = ((x.double() - c).pow(2).mean().sqrt().item() for x in (a, b))
        assert found <= 2 * allowed


def test_through_the_public_function():
    positional, keyword, leaves = arguments(dtype=torch.float32, batch=1, time=20)
    got = run(
        lambda *x, **y: dilated_attention(*x, **y, backend="triton"), positional, keyword, leaves
    )
    expected = run(dilated_attention, positional, keyword, leaves)
    assert worst(got, expected) < TOLERANCE


def test_as_operators_of_pytorch():
    """What a graph holds: fake kernels that tell the shapes, and autograd."""
    positional, keyword, leaves = arguments(dtype=torch.float32, batch=1, time=20, held=True)
    held, branches = keyword["held"], positional[3:]
    inputs = [x.detach().requires_grad_() for x in (*positional[:3], *held[:2])]
    numbers = held.count, None, None, None, *branches, 0.7, False, True
    torch.library.opcheck(
        kernels.forward_operator,
        (*inputs, *numbers),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    others, settings = numbers[:4], numbers[4:]
    ready = Ready(kernels.PASSES, settings, is_kept=False)
    results = []
    for o in (
        ready(*inputs, *others)[0],
        kernels.forward_operator(*inputs, *others, *settings)[0],
    ):
        results.append([o, *torch.autograd.grad(o.square().sum(), inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_no_branch_is_copied():
    """Forward allocates o, its denominators and, for training, the branches' outputs."""
    positional, _, _ = arguments(dtype=torch.float32, time=64)
    q, k, v = (x.detach() for x in positional[:3])
    with recording() as launches:
        triton_of(q, k, v, *positional[3:], scale=0.7)
    assert len(launches) == 3
    for launch in launches:
        for name, x in (("q", q), ("k", k), ("v", v)):
            assert launch.arguments[name].data_ptr() == x.data_ptr()
        assert launch.arguments["part"] is None


def test_heads_that_are_too_wide():
    x = torch.zeros(1, 4, 1, 300)
    with pytest.raises(ValueError, match="takes heads up to 64 wide, got K = 300"):
        dilated_attention(x, x, x, [4], [1], backend="triton")


MUTANTS = {
    "a query sees itself not": (
        "visible = (c_k[None, :] <= c_q[:, None]) & (u_k < high)[None, :]\n            score",
        "visible = (c_k[None, :] < c_q[:, None]) & (u_k < high)[None, :]\n            score",
        {},
    ),
    "another head's offset": ("h % r if MODULO else h // group", "h % r", {}),
    "a branch in place of all": (
        "own = top + tl.log2(total)",
        "own = top + tl.log2(total) * 0",
        {},
    ),
    "what is held is forgotten": (
        "rows += tl.load(held + at",
        "rows += 0 * tl.load(held + at",
        {"held": True, "batch": 2},
    ),
    "the wrong row of what is held": (
        "held_row = tl.load(table + 3 * stride + s).to(tl.int64)",
        "held_row = base * 0",
        {"held": True, "packed": True},
    ),
    "a decay by slots": (
        "_factor(log_decay, (c_q - anchor) * r, K, BK)",
        "_factor(log_decay, c_q - anchor, K, BK)",
        {"decay": True},
    ),
    "all branches' output in one branch's gradient": (
        "        if part is None:\n            outputs",
        "        if True:\n            outputs",
        {},
    ),
    "the last branch's gradients alone": (
        "tl.load(total + at, mask=inside, other=0.0) + sums",
        "sums",
        {},
    ),
    "queries that come too late": (
        "start = tl.maximum(c0, low // r) // BN * BN",
        "start = (tl.maximum(c0, low // r) + BN) // BN * BN",
        {},
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_caught(name, tmp_path):
    line, replacement, choices = MUTANTS[name]
    broken = mutant(kernels, line, replacement, tmp_path)

    def function(q, k, v, *branches, scale, **keyword):
        numbers = branches_of(*branches), scale, "grouped", keyword.get("log_decay")
        rest = keyword.get("cu_seqlens"), keyword.get("held"), False
        return broken.dilated_attention_triton(q, k, v, *numbers, *rest)

    choices = {"shape": (5, 6, [16, 20], [2, 3]), "batch": 1, "time": 40} | choices
    assert not error(function, **choices) < 1e-3
