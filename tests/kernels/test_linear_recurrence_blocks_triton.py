"""The scan in two passes, and three scans in one launch, in the interpreter; when they are chosen.

Decays are constants here: their gradients go another way, which has its own tests.
"""

import pytest
import test_linear_recurrence_triton as scan
import torch
from test_kernel_mutants import mutant

from zoo.kernels import (
    linear_recurrence_blocks_triton,
    linear_recurrence_triton,
    linear_recurrence_walk_triton,
)
from zoo.kernels.bench.aot.cases import linear
from zoo.kernels.launch_triton import Config, recording
from zoo.kernels.linear_recurrence import linear_recurrence_reference
from zoo.kernels.linear_recurrence_blocks_triton import Blocks
from zoo.kernels.linear_recurrence_walk_triton import Walk
from zoo.kernels.segments_triton import override

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")

# A block is one tile of rows and half of another, of two tiles of keys; two slices and tiles of a
# state.
SMALL = {
    "blocks": ((256, Blocks(32, 16, 16, 16, 4, 1)),),
    "walk": Walk(16, 16, 4, 1),
    "segment": 48,
}
# A stream of nine documents, or two rows that end within a tile.
PACKED, ROWS = (1, 150, 1, 16, 32), (2, 101, 1, 16, 32)


def error(module=linear_recurrence_triton, form="H", dtype=torch.float32, choices=None, **rest):
    """How far values and gradients are from the definition in float64."""
    leaves, keyword = scan.arguments(form=form, **rest)
    gates, leaves["log_decay"] = leaves["log_decay"], None

    def with_gates(function):
        def call(q, k, v, _, **others):
            given = gates if gates is None or q.dtype == torch.float64 else gates.float()
            return function(q, k, v, given, **others)

        return call

    exact = scan.run(with_gates(linear_recurrence_reference), leaves, keyword, torch.float64)
    with override(**(SMALL if choices is None else choices)):
        ours = scan.run(with_gates(module.linear_recurrence_triton), leaves, keyword, dtype)
    return scan.distance(ours, exact)


@pytest.mark.parametrize("form", scan.FORMS)
@pytest.mark.parametrize("shape", [ROWS, PACKED], ids=["dense", "packed"])
@pytest.mark.parametrize("initial", [False, True], ids=["zero", "initial"])
def test_equals_the_definition(form, shape, initial):
    assert error(form=form, packed=shape is PACKED, initial=initial, shape=shape) < scan.FLOAT32


@pytest.mark.parametrize("time", [1, 15, 32, 33, 48, 49, 96])
def test_lengths(time):
    """Of a tile, a block, and one more."""
    assert error(shape=(2, time, 1, 16, 16)) < scan.FLOAT32


@pytest.mark.parametrize(("key_dim", "value_dim"), [(20, 36), (60, 16), (16, 72)])
def test_head_sizes(key_dim, value_dim):
    assert error(shape=(1, 70, 1, key_dim, value_dim)) < scan.FLOAT32


def test_one_block_needs_no_states():
    """Where nobody asks for the last state."""
    x = torch.randn(2, 40, 1, 16)
    with override(**SMALL), recording() as launches:
        o, _ = linear_recurrence_triton.linear_recurrence_triton(x, x, x)
    assert [x.name for x in launches] == ["_outputs"]
    expected, _ = linear_recurrence_reference(x, x, x)
    assert scan.distance([o], [expected.double()]) < scan.FLOAT32


@pytest.mark.parametrize("form", ["H", "BTH"])
def test_strong_decays(form):
    """Logs that sum up to -60 a token, over a block: what is left is right."""
    assert error(form=form, decay=-60.0, shape=(1, 70, 1, 16, 16)) < scan.FLOAT32


def test_bfloat16_is_as_good_as_one_pass():
    shape = (1, 131, 1, 32, 32)
    choices = {"segment": 131, "scan": Config(32, 32, 4, 1)}
    one_pass = error(dtype=torch.bfloat16, shape=shape, choices=choices)
    blocks = ((256, Blocks(64, 32, 32, 32, 4, 1)),)
    choices = {"blocks": blocks, "walk": Walk(32, 32, 4, 1), "segment": 64}
    assert error(dtype=torch.bfloat16, shape=shape, choices=choices) < 1.1 * one_pass


def test_gradients_of_gates_go_the_other_way():
    """Forward in two passes; backward, where gates want gradients, in one."""
    with override(**SMALL):
        assert scan.error(form="BTH", shape=(1, 100, 1, 16, 32)) < scan.FLOAT32


def test_operators_in_graphs():
    """No states are held, and graphs know it."""
    q = torch.randn(1, 70, 1, 16, requires_grad=True)
    inputs = q, q, q, torch.tensor([-0.1]), None, None, None
    with override(**SMALL):
        assert linear_recurrence_triton._forward_operator(*inputs, 1.0, False)[2].numel() == 0
        torch.library.opcheck(
            linear_recurrence_triton._forward_operator,
            (*inputs, 1.0, True),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("shape", [(2, 70, 1, 16, 16), (1, 150, 1, 16, 16)])
@pytest.mark.parametrize("form", ["none", "H"])
@pytest.mark.parametrize("segment", [150, 64])
def test_gradients_at_once(shape, form, segment):
    """One launch in place of three; K = 60 in slices of 16 too."""
    choices = {"at_once": True, "segment": segment, "scan": Config(32, 16, 4, 1)}
    packed = shape[1] == 150
    assert error(form=form, packed=packed, shape=shape, choices=choices) < scan.FLOAT32
    if segment == 64:
        wide = (*shape[:3], 60, 60)
        assert error(form=form, packed=packed, shape=wide, choices=choices) < scan.FLOAT32


def launched(*shape, form="H", **choices):
    """[(kernel, slice)] of a training step as on a device of 132 processors."""
    with override(**choices), recording(run=False, target="sm_90") as launches:
        linear(form, *shape).run()
    return [(x.name, x.arguments.get("BZ")) for x in launches]


def test_programs_fill_a_device():
    """132 processors: by slices as long as each program has one of its own, and by three uses."""
    few = [("_scan", 32), ("_scan_gradients", 64)]
    assert launched(8, 1024, 8, 64) == few
    assert launched(2, 1024, 8, 64) == [("_scan", 16), ("_scan_gradients", 32)]
    # 67 programs: twice as many are more than there are processors, three times fit in pairs.
    assert launched(1, 1024, 67, 64) == [("_scan", 64), ("_scan_gradients", 64)]
    assert launched(1, 1024, 89, 64) == [("_scan", 64)] * 4
    assert launched(4, 4096, 64, 128) == [("_scan", 64)] * 4
    # Other shapes of q and v have other programs; so have gradients of gates.
    assert launched(8, 1024, 8, 64, 128) == [("_scan", z) for z in (64, 32, 64, 32)]
    assert {name for name, _ in launched(8, 1024, 8, 64, form="BTH")} == {"_scan"}
    assert launched(8, 1024, 8, 64, scan=Config(64, 16, 4, 2), at_once=False) == [("_scan", 16)] * 4


def test_two_passes_are_chosen_by_name_alone():
    assert {name for name, _ in launched(8, 2048, 32, 256)} == {"_scan"}
    backward = ["_walk", "_walk", *["_outputs"] * 3]
    found = launched(8, 2048, 32, 256, blocks=True)
    assert [name for name, _ in found] == ["_walk", "_outputs", *backward]


BLOCKS, WALK = linear_recurrence_blocks_triton, linear_recurrence_walk_triton
MUTANTS = {
    "mask off by one": (BLOCKS, "visible = row[:, None] >= key", "visible = row[:, None] > key"),
    "keys after the tile are left out": (
        BLOCKS,
        "first // C, tl.cdiv(count, C)",
        "first // C, (first + R) // C",
    ),
    "no state": (BLOCKS, "for a in range(0, A, BA):", "for a in range(0, 0, BA):"),
    "half of a state": (BLOCKS, "for a in range(0, A, BA):", "for a in range(0, BA, BA):"),
    "missing decay of the state": (BLOCKS, "result *= tl.exp2(passed)[:, None]", "result *= 1.0"),
    "wrong slice": (BLOCKS, "rz = slice * BZ + tl.arange(0, BZ)", "rz = tl.arange(0, BZ)"),
    "unmasked tail": (BLOCKS, "is_key = key < count", "is_key = key < LENGTH"),
    "missing decay between chunks": (WALK, "state *= tl.exp2(total)", "state *= 1.0"),
    "a block's state too early": (WALK, "block = begin + (step + 1) // each", "block = begin"),
    "in reverse too": (WALK, "begin + chunk // each - 1", "begin + chunk // each"),
    "the last block's state is of another document": (
        WALK,
        "begin = tl.load(offsets + n)",
        "begin = tl.load(offsets + tl.maximum(n - 1, 0))",
    ),
    "a tile of the state twice": (WALK, "rz = (tile % NUM_Z) * BZ", "rz = 0 * BZ"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_caught(name, tmp_path, monkeypatch):
    original, line, replacement = MUTANTS[name]
    changed = mutant(original, line, replacement, tmp_path)
    function = "outputs" if original is BLOCKS else "walk"
    monkeypatch.setattr(linear_recurrence_triton, function, getattr(changed, function))
    assert not error(packed=True, shape=PACKED) < scan.FLOAT32


AT_ONCE = {
    "the state's gradient is left out": ('"leaving": left}', '"leaving": None}'),
    "two uses alone": ("elif use == 1:", "elif use == 3:"),
}


@pytest.mark.parametrize("name", AT_ONCE)
def test_every_mutant_at_once_is_caught(name, tmp_path):
    module = mutant(linear_recurrence_triton, *AT_ONCE[name], tmp_path)
    choices = {"at_once": True}
    assert not error(module, shape=(1, 33, 1, 16, 16), choices=choices) < scan.FLOAT32
