"""What programs for wide heads, and for few small ones, read, multiply and wait for: no GPU needed.

    python kernels/bench/wide.py            count, compile for sm_90, and write results/wide.json
    python kernels/bench/wide.py --table    the table of it in README.md, from that file

The shapes are those at which an H100 fell short of what is wanted (results/).
Calls run on tensors without memory; what they launch is counted (aot/counting.py) and compiled
(aot/compiling.py). A call's figures, per token and head where they are bytes:

    programs      of each launch, the fewest; of 132 processors
    in a row      chunks that one processor goes through, all launches one after the other
    memory        bytes that memory moves, each operand of a launch once
    read          bytes that programs ask for, from the cache or from memory
    products      FLOPs over those of one program for each head that computes scores once
    at least      us on an H100 at 3.0 TB/s and 787 TFLOP/s as measured there, launch by launch
    compiled      the worst of all launches: registers, words in memory, KB of shared memory,
                  programs at once on a processor, matrix instructions

`at least` is no forecast: it knows nothing of latency, nor of what feeds the matrix instructions.
"""

import argparse
import json
import sys
from pathlib import Path

from zoo.kernels.bench.aot.cases import linear
from zoo.kernels.bench.aot.compiling import specialise
from zoo.kernels.bench.aot.counting import count
from zoo.kernels.bench.marked import replaced
from zoo.kernels.bench.resources import compile_all
from zoo.kernels.launch_triton import Config, recording
from zoo.kernels.segments_triton import override

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "wide.json"
README = HERE / "README.md"
TARGET, PROCESSORS = "sm_90", 132
BYTES, FLOPS = 3.0e12, 787e12
SHIPPED = "as shipped"

WIDE = {
    SHIPPED: {},
    "slices of 64, 8 warps": {"scan": Config(64, 64, 8, 2)},
    "slices of 128, 8 warps": {"scan": Config(64, 128, 8, 2)},
    "two passes": {"blocks": True},
    "two passes, blocks of 128": {"blocks": True, "segment": 128},
}
FEW = {
    SHIPPED: {},
    "slices of 64, gradients in a row": {"scan": Config(64, 64, 4, 2), "at_once": False},
    "slices of 32, gradients in a row": {"scan": Config(64, 32, 4, 2), "at_once": False},
    "4 segments": {"segment": 256},
}
CUT = {
    SHIPPED: {},
    "1 segment": {"segment": 8192},
    "2 segments": {"segment": 4096},
}
# {(B, T, H, K, V): {words: what `override` takes}}
SHAPES = {
    (8, 2048, 32, 256, 256): WIDE,
    (4, 4096, 8, 256, 512): WIDE,
    (8, 1024, 8, 64, 64): FEW,
    (1, 8192, 96, 128, 128): CUT,
}


def least_flops(key_dim, value_dim):
    """Per token and head, forward and training: chunks of 64, scores once for each product."""
    k, v = key_dim, value_dim
    forward = 2 * 64 * (k + v) + 4 * k * v
    return {"forward": forward, "training": 4 * forward}


def launches_of(shape, chosen):
    """{mode: launches} of a call."""
    batch, time, heads, key_dim, value_dim = shape
    case = linear("H", batch, time, heads, key_dim, value_dim)
    with override(**chosen), recording(run=False, target=TARGET) as launches:
        case.run()
    # The forward pass ends with the first launch that writes an output.
    ends = next(i for i, x in enumerate(launches) if "out" in x.arguments) + 1
    return {"forward": launches[:ends], "training": launches}


def in_a_row(launch, at_once):
    """Chunks that a processor goes through in a launch, one after the other."""
    x, length = launch.arguments, launch.arguments.get("LENGTH", 0)
    if launch.name == "_outputs":
        steps = -(-length // x["C"]) + (x["entering"] is not None) * -(-x["A"] // x["BA"])
    elif launch.name == "_combine":
        steps = x["PER_ROW"]
    elif launch.name == "_walk":
        steps = -(-x["T"] // x["C"])
    else:
        steps = -(-length // x["C"])
    return -(-count(launch).programs // (PROCESSORS * at_once)) * steps


def counted(shape, mode, launches):
    """What of a row of the table needs no compiler."""
    batch, time, heads, key_dim, value_dim = shape
    token_heads = batch * time * heads
    counts = [count(x) for x in launches]
    return {
        "launches": len(launches),
        "programs": min(x.programs for x in counts),
        "memory": round(sum(x.memory for x in counts) / token_heads),
        "read": round(sum(x.read for x in counts) / token_heads),
        "products": round(
            sum(x.flops for x in counts) / token_heads / least_flops(key_dim, value_dim)[mode], 2
        ),
        "at least": round(1e6 * sum(max(x.memory / BYTES, x.flops / FLOPS) for x in counts)),
    }


def compiled_to(launches, compiled):
    """The rest of it.

    Args:
        compiled: {job: figures}.
    """
    found = [compiled[specialise(x, TARGET, True)] for x in launches]
    if failed := next((x["error"] for x in found if "error" in x), None):
        return {"failed": failed}
    steps = zip(launches, found, strict=True)
    return {
        "in a row": sum(in_a_row(x, max(1, y["programs"])) for x, y in steps),
        "registers": max(x["registers"] for x in found),
        "spilled": max(x["spilled"] for x in found),
        "shared": max(x["shared"] for x in found) // 1024,
        "at once": min(x["programs"] for x in found),
        "products by": "wgmma" if not sum(x["HMMA"] for x in found) else "mma",
        "misplaced": sum(x["stray"] for x in found),
    }


def measure(processes=2):
    """{shape: {words: {mode: figures}}}."""
    calls = {
        (shape, words): launches_of(shape, chosen)
        for shape, programs in SHAPES.items()
        for words, chosen in programs.items()
    }
    jobs = {specialise(x, TARGET, True) for modes in calls.values() for x in modes["training"]}
    compiled = compile_all(sorted(jobs, key=lambda job: job.key), processes)
    found = {}
    for (shape, words), modes in calls.items():
        found.setdefault(str(shape), {})[words] = {
            mode: counted(shape, mode, x) | compiled_to(x, compiled) for mode, x in modes.items()
        }
    return found


def table(found):
    """Lines of a table for people."""
    names = ("launches", "programs", "in a row", "memory", "read", "products", "at least")
    lines = [
        "| (B, T, H, K, V) | program | | " + " | ".join(names) + " | compiled |",
        "|---" * (len(names) + 4) + "|",
    ]
    for shape, programs in found.items():
        for words, modes in programs.items():
            for mode, x in modes.items():
                compiled = x.get("failed") or (
                    f"{x['registers']}, {x['spilled']}, {x['shared']}, {x['at once']}, "
                    f"{x['products by']}" + ", misplaced operands" * bool(x["misplaced"])
                )
                cells = [shape, words, mode, *(x.get(name, "") for name in names), compiled]
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def main():
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="write README.md from the results")
    parser.add_argument("--processes", type=int, default=2, help="that compile")
    options = parser.parse_args()
    if not options.table:
        found = measure(options.processes)
        print("\n".join(table(found)))
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        return
    lines = table(json.loads(RESULTS.read_text()))
    README.write_text(replaced(README.read_text(), "wide", lines))


if __name__ == "__main__":
    sys.exit(main())
