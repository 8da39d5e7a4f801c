"""What programs of the scan read, write and multiply, counted from their launches.

`checks.traffic` counts what memory has to move at least, each operand of a launch once. A program
reads its tiles whatever others read: what several programs read is in the cache at best, and still
goes from there to each processor. Lengths that are multiples of the tiles are assumed.
"""

import math
from typing import NamedTuple

from zoo.kernels.bench.aot.checks import traffic


class Count(NamedTuple):
    """Of one launch, in all.

    Attributes:
        programs: how many.
        memory: bytes that memory moves at least.
        read, written: bytes that programs ask for.
        flops: of products of matrices, two for each element and step.
    """

    programs: int
    memory: int
    read: int
    written: int
    flops: int


def count(launch):
    """The `Count` of a launch of linear_recurrence_triton.py or its two passes."""
    kinds = {
        "_scan": _scan,
        "_scan_gradients": _scan_gradients,
        "_segment_states": _states,
        "_walk": _states,
        "_combine": _combine,
        "_outputs": _outputs,
    }
    read, written, flops = kinds[launch.name](launch.arguments)
    return Count(math.prod(launch.grid), traffic([launch]), int(read), int(written), int(flops))


def _bytes(x, name):
    return 0 if x.get(name) is None else x[name].numel() * x[name].element_size()


def _scan(x):
    rows = x["x"].numel() // x["A"]  # tokens and heads
    return _one_scan(x, rows, x["A"], x["Z"], x["x"].element_size(), "entering", "leaving")


def _scan_gradients(x):
    rows, size = x["q"].numel() // x["A"], x["q"].element_size()
    uses = [("entering", None), ("later", "leaving"), ("later", None)]
    parts = [_one_scan(x, rows, x["A"], x["A"], size, *ends) for ends in uses]
    return [sum(part) for part in zip(*parts, strict=True)]


def _one_scan(x, rows, a, z, size, entering, leaving):
    """(bytes read, bytes written, FLOPs)."""
    slices, width = -(-z // x["BZ"]), x["BZ"]
    block, chunk = x["BLOCK_A"], x["C"]
    read = rows * size * (slices * 2 * a + z) + _bytes(x, entering)
    written = rows * size * z + (_bytes(x, leaving) if leaving else 0)
    # Scores, and what they and the states do to a slice.
    flops = rows * slices * 2 * (chunk * block + chunk * width + 2 * block * width)
    return read, written, flops


def _states(x):
    rows, size = x["y"].numel() // x["A"], x["y"].element_size()
    tiles_a, tiles_z = -(-x["A"] // x["BA"]), -(-x["Z"] // x["BZ"])
    walked = x["PER_ROW"] - (x["SKIP_OUTERMOST"] if "SKIP_OUTERMOST" in x else x["last"] is None)
    rows *= walked / x["PER_ROW"]
    read = rows * size * (tiles_z * x["A"] + tiles_a * x["Z"]) + _bytes(x, "first")
    skipped = "SKIP_OUTERMOST" in x and x["SKIP_OUTERMOST"]  # its state is left as it is
    written = _bytes(x, "states") * (1 - skipped / x["PER_ROW"]) + _bytes(x, "last")
    return read, written, rows * 2 * tiles_a * x["BA"] * tiles_z * x["BZ"]


def _combine(x):
    states = _bytes(x, "states")
    read = states * (x["PER_ROW"] - (x["last"] is None)) / x["PER_ROW"]
    return read + _bytes(x, "first"), states + _bytes(x, "last"), 0


def _outputs(x):
    a, z, width, length = x["A"], x["Z"], x["BZ"], x["LENGTH"]
    rows, size = x["x"].numel() // a, x["x"].element_size()
    slices = -(-z // width)
    # The keys that a row's program goes through, and how often a key is read.
    keys = (length + x["R"]) / 2
    often = keys / x["R"]
    read = rows * size * (slices * (a + often * a) + often * z)
    flops = rows * slices * 2 * keys * (x["BLOCK_A"] + width)
    if x["entering"] is not None:
        read += rows * size * slices * a + _bytes(x, "entering") * x["TILES"]
        flops += rows * slices * 2 * a * width
    return read, rows * size * z, flops
