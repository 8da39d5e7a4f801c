"""Every program that can run a shape of the scan, side by side: segments, slices, stages.

    python kernels/bench/gpu/variants.py --output FILE.json     wide heads and few small ones
    python kernels/bench/gpu/variants.py --only "64, 128)"      shapes whose name contains this

What is shipped is one of them, so a row of its own says how far from the best it is. A program
that fails or computes something else is told, without a time. A second run leaves out what this
code was timed for.
"""

import argparse
import itertools
import json
import math
import sys
import time
from pathlib import Path

import torch

from zoo.kernels.bench.gpu.cases import CASES
from zoo.kernels.bench.gpu.checking import DeviceLost, first_line
from zoo.kernels.bench.gpu.failures import note
from zoo.kernels.bench.gpu.sources import fingerprint
from zoo.kernels.bench.gpu.timing import Cpu, Gpu, measure
from zoo.kernels.bench.run import setting_of

# Short of what is wanted on an H100 first.
SHAPES = (
    "retention (8, 2048, 32, 256)",
    "retention (4, 4096, 8, 256, 512)",
    "retention (8, 1024, 8, 64)",
    "retention (1, 8192, 96, 128)",
    "retention (4, 2048, 16, 128)",
    "retention (4, 4096, 64, 128)",
)
SHIPPED = "as shipped"


def candidates(workload):
    """{words: what `override` of segments_triton.py takes} of a retention's workload."""
    from zoo.kernels.launch_triton import Config

    tokens, key_dim = workload.inputs["q"].shape[1], workload.inputs["q"].shape[-1]
    found = {SHIPPED: {}}
    batch, heads, value_dim = len(workload.inputs["q"]), *workload.inputs["v"].shape[2:]
    if key_dim > 128:
        found |= two_passes(key_dim, value_dim)
        programs = [*itertools.product((64,), (32, 64, 128), (4, 8), (2, 3))]
        programs += itertools.product((32,), (32, 64, 128), (4,), (2,))
    else:
        programs = [*itertools.product((64,), (32, 64, 128), (4,), (2, 3))]
    if key_dim <= 64:  # more programs for a device, and fewer chunks one after the other
        programs += [(64, 16, 4, 2), (128, 16, 8, 2), (128, 32, 8, 2)]
    configs = {
        f"chunk {chunk}, slice {width}, {num_warps} warps, {stages} stages": {
            "scan": Config(chunk, width, num_warps, stages)
        }
        for chunk, width, num_warps, stages in programs
    }
    cuts = {
        f"{count} segment{'s' * (count > 1)}": {"segment": -(-tokens // count)}
        for count in (1, 2, 4, 16)
        if tokens // count >= 64
    }
    found |= cuts | configs
    if batch * heads < 132:
        found["gradients in a row"] = {"at_once": False}
        found["slices of 64, gradients in a row"] = {
            "at_once": False,
            "scan": Config(64, 64, 4, 2),
        }
    # Both at once where one launch has too few programs for a device.
    if batch * heads < 132:
        for (a, cut), (b, config) in itertools.product(cuts.items(), configs.items()):
            if a != "1 segment":
                found[f"{a}, {b}"] = cut | config
    return found


def two_passes(key_dim, value_dim):
    """As `candidates`: the two passes of linear_recurrence_blocks_triton.py."""
    from zoo.kernels.linear_recurrence_blocks_triton import BLOCKS, Blocks
    from zoo.kernels.linear_recurrence_walk_triton import Walk

    shipped = BLOCKS["sm_90"]
    found = {"two passes": {"blocks": True}}
    for length in (128, 512):
        found[f"two passes, blocks of {length}"] = {"blocks": True, "segment": length}
    found["two passes, walk of 4 warps"] = {"blocks": True, "walk": Walk(64, 128, 4, 3)}
    others = {
        256: [Blocks(64, 64, 128, 64, 4, 2), Blocks(64, 64, 256, 64, 8, 2)],
        512: [Blocks(64, 64, 128, 64, 8, 2), Blocks(64, 32, 128, 64, 4, 2)],
    }
    for width in sorted({key_dim, value_dim}):
        for one in others[width]:
            words = f"two passes, {width}: {one.rows} by {one.keys}, slices of {one.slice}"
            found[words] = {"blocks": tuple((shipped | {width: one}).items())}
    return found


def time_one(device, workload, mode, chosen, ceilings, seconds):
    """The figures of ours with these choices."""
    from zoo.kernels.segments_triton import override

    ours = workload._replace(contenders={"ours": workload.contenders["ours"]})
    with override(**chosen):
        return measure(device, ours, mode, ceilings, seconds)["by"]["ours"]


def run(device, names, output, deadline, is_tiny=False):
    """Times the candidates of the shapes, and writes the file after each.

    Returns:
        Whether all were timed.
    """
    code, seconds = fingerprint(), 0.0 if is_tiny else 0.15
    old = json.loads(output.read_text()) if output and output.exists() else {}
    record = setting_of(device)
    is_same = all(old.get(key) == value for key, value in record.items())
    record["variants"] = old["variants"] if is_same else {}
    ceilings = device.ceilings()
    for name in names:
        case = CASES[name]
        workload = case.make(device.device, is_tiny)
        for mode in case.modes:
            key = f"{name} {mode}"
            entry = record["variants"].get(key, {})
            if entry.get("sources") != code:
                entry = record["variants"][key] = {"sources": code, "by": {}}
            for words, chosen in candidates(workload).items():
                if words in entry["by"]:
                    continue
                if time.perf_counter() > deadline:
                    note(f"out of time before {key}, {words}")
                    return False
                try:
                    figures = time_one(device, workload, mode, chosen, ceilings, seconds)
                except DeviceLost as error:
                    entry["by"][words] = {"failed": str(error)}
                    write(record, output)
                    note(f"{key}, {words}: the device is lost: {error}")
                    return False
                except Exception as error:  # what does not compile, say: a finding
                    figures = {"failed": first_line(error)}
                entry["by"][words] = figures
                if "failed" in figures and words == SHIPPED:
                    note(f"{key}, {words}: {figures['failed']}")
                write(record, output)
            print("\n".join([f"\n{key}", *ranking(entry)]), flush=True)
    return True


def write(record, output):
    if output:
        unfinished = output.with_suffix(".part")
        unfinished.write_text(json.dumps(record, indent=1) + "\n")
        unfinished.replace(output)


def ranking(entry):
    """Lines of the candidates of a shape, fastest first."""
    rows = [
        (figures.get("ms", math.inf), words, figures.get("failed", ""))
        for words, figures in entry["by"].items()
    ]
    return [f"  {ms:9.4f} ms  {words}  {failed}".rstrip() for ms, words, failed in sorted(rows)]


def main(arguments=None):
    """See the module docstring. The exit status: 0 if all were timed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="shapes whose name contains this")
    parser.add_argument("--seconds", type=float, default=300, help="no program starts after them")
    parser.add_argument("--output", type=Path, help="result file")
    parser.add_argument("--processes", type=int, default=0, help="compile in so many first")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to test this script")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("this torch sees no GPU; --device cpu --smoke tests the script.")
    if options.device == "cpu" and not options.smoke:
        parser.error("programs run on a GPU; --device cpu goes with --smoke.")
    names = [name for name in SHAPES if options.only in name]
    if not names:
        parser.error(f"no shape's name contains {options.only!r}; there are: {', '.join(SHAPES)}.")
    deadline = time.perf_counter() + options.seconds
    if options.processes:
        from zoo.kernels.bench.gpu import compiled_ahead

        # Before this process has the device: those that compile need none.
        jobs = compiled_ahead.variants_of(names)
        cache, key = compiled_ahead.triton.knobs.cache.dir, compiled_ahead.key_of_triton()
        compiled_ahead.compile_all(cache, key, jobs, options.processes, options.seconds / 2)
    device = Cpu() if options.device == "cpu" else Gpu(torch.device("cuda", 0))
    return 0 if run(device, names, options.output, deadline, options.smoke) else 1


if __name__ == "__main__":
    sys.exit(main())
