"""What is counted of programs for wide heads is what they do, and what README.md says."""

import json

import pytest
import torch
from quick_interpreter import ORIGINALS
from test_linear_recurrence_blocks_triton import SMALL
from triton.runtime import interpreter

from zoo.kernels import linear_recurrence_triton
from zoo.kernels.bench import wide
from zoo.kernels.bench.aot.counting import count
from zoo.kernels.launch_triton import recording
from zoo.kernels.segments_triton import override


class Counted:
    """Bytes and FLOPs that the interpreter is asked for while it is entered."""

    def __init__(self, patch):
        self.read = self.written = self.flops = 0
        for original in ORIGINALS:  # the quick ones go past what is counted
            patch.setattr(*original)
        owner = interpreter.InterpreterBuilder
        for name in ("create_masked_load", "create_masked_store", "create_dot"):
            patch.setattr(owner, name, self._counting(name, getattr(owner, name)))

    def _counting(self, name, original):
        def call(builder, *arguments):
            first, second = arguments[:2]
            if name == "create_dot":
                self.flops += 2 * first.data.size * second.data.shape[1]
            else:
                mask = arguments[1 if "load" in name else 2]
                size = int(mask.data.sum()) * first.get_element_ty().primitive_bitwidth // 8
                kind = "read" if "load" in name else "written"
                setattr(self, kind, getattr(self, kind) + size)
            return original(builder, *arguments)

        return call


@pytest.mark.parametrize(
    "choices",
    [
        {"segment": 64, "at_once": False},
        {"segment": 128, "at_once": True},
        {**SMALL, "segment": 64},
    ],
    ids=["segments", "at once", "two passes"],
)
@pytest.mark.parametrize("ends", [False, True])
def test_programs_do_what_is_counted(choices, ends, monkeypatch):
    """Bytes that programs ask for and FLOPs, of every launch, to the last."""
    q, v = torch.randn(1, 128, 2, 32), torch.randn(1, 128, 2, 32)
    inputs = q, q.clone(), v, None, None, None, None
    counted = Counted(monkeypatch)
    with override(**choices), recording() as launches:
        o, final, entering = linear_recurrence_triton.forward(*inputs, 1.0, ends)
        linear_recurrence_triton.backward(*inputs, entering, o, final, 1.0, False, ends)
    expected = [count(x) for x in launches]
    assert counted.read == sum(x.read for x in expected)
    assert counted.written == sum(x.written for x in expected)
    assert counted.flops == sum(x.flops for x in expected)


def test_the_table_is_of_these_programs():
    """results/wide.json has what is counted now, and README.md what it has."""
    found = json.loads(wide.RESULTS.read_text())
    assert {shape: list(x) for shape, x in found.items()} == {
        str(shape): list(programs) for shape, programs in wide.SHAPES.items()
    }
    for shape, programs in wide.SHAPES.items():
        for words, chosen in programs.items():
            for mode, launches in wide.launches_of(shape, chosen).items():
                stored = found[str(shape)][words][mode]
                assert wide.counted(shape, mode, launches).items() <= stored.items()
    assert "\n".join(wide.table(found)) in wide.README.read_text()


def test_least_products():
    """One pass with a slice for a whole head does no more; shipped slices of 32 do."""
    shape = 8, 2048, 32, 256, 256
    for mode, launches in wide.launches_of(shape, {}).items():
        assert wide.counted(shape, mode, launches)["products"] == 1.7
