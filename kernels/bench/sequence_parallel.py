"""Sequence parallelism on a CPU: peak memory of a process, and bytes that it tells the others.

    python kernels/bench/sequence_parallel.py [--length 65536] [--processes 4]

Forward and backward of one sequence through two layers of width 64 with two heads, in one process
and in several (gloo), one thread each. Peak memory is beyond what a process held after a short
step, in a heap that keeps what is freed (as in lengths.py): the largest of all processes. Bytes are
per layer and direction, of the second process, with that length and a quarter of it, beside the
formula where there is one. Prints a line per model, and writes
kernels/bench/results/sequence_parallel.json.
"""

import argparse
import json
import math
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from lengths import HEAP, RESULTS, peak_bytes

import zoo
from zoo.core.parallel import split_batch
from zoo.core.wire import TRAFFIC

SIZES = {
    "vocab_size": 259,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 176,
}
# All whose state has one size at any length.
MODELS = {
    "retnet": {},
    "rwkv4": {},
    "rwkv5": {},
    "rwkv6": {},
    "rwkv7": {},
    "gated_deltanet": {},
    "lightning": {},
    "infini": {"segment_length": 1024},
    "sliding_window": {"sliding_window": 512},
    "block_recurrent": {"sliding_window": 512, "num_states": 128},
    "rmt": {"segment_length": 512},
    "longnet": {"segment_lengths": [1024, 4096, 16384], "dilation_rates": [1, 4, 16]},
    "transformer_xl": {"mem_len": 512},
}
# Peak memory of a process of four, in parts of one process'.
WANTED = 0.35


def step(model, batch):
    """Forward and backward. Returns the bytes told in each."""
    TRAFFIC.clear()
    hidden = model.model(**batch, use_cache=False).last_hidden_state
    forward = told()
    hidden.square().mean().backward()
    model.zero_grad()
    return forward, told()


def told():
    """Bytes that this process told others since it was asked last; the door is none of a layer."""
    total = sum(n for kind, n in TRAFFIC.items() if kind not in ("door", "messages"))
    TRAFFIC.clear()
    return total


def tokens(length):
    return torch.randint(0, 259, (1, length), generator=torch.Generator().manual_seed(0))


def measure(name, length, rank, size, store):
    """{"peak_bytes", "seconds", "forward", "backward"} of one process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    torch.manual_seed(0)
    model = build(name)
    if size > 1:
        model.model.sequence_parallel = dist.group.WORLD
    step(model, split_batch({"input_ids": tokens(256 * size)}, rank, size))
    own = split_batch({"input_ids": tokens(length)}, rank, size)
    dist.barrier()
    before, start = peak_bytes(), time.process_time()
    forward, backward = step(model, own)
    seconds = round(time.process_time() - start, 2)
    peak = peak_bytes() - before
    dist.barrier()
    dist.destroy_process_group()
    layers = model.config.num_hidden_layers
    told = {"forward": forward / layers, "backward": backward / layers}
    return {"peak_bytes": peak, "seconds": seconds} | told


def build(name):
    """A model of `MODELS`."""
    architecture = zoo.MODELS[name]
    return architecture.causal_lm(architecture.config(**SIZES | MODELS[name])).train()


def measured(name, length, size):
    """What each of several processes, forked from this one, measured."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(size):
            pid = os.fork()
            if not pid:
                code = 1
                try:
                    found = measure(name, length, rank, size, f"{folder}/store")
                    Path(folder, str(rank)).write_text(json.dumps(found))
                    code = 0
                finally:
                    os._exit(code)
            children.append(pid)
        for pid in children:
            _, status = os.waitpid(pid, 0)
            if status:
                raise SystemExit(f"{name}, {length} tokens: process {children.index(pid)} failed.")
        return [json.loads(Path(folder, str(rank)).read_text()) for rank in range(size)]


def formula(name):
    """Bytes per layer and direction of one process, in float32; None: there is none."""
    model = build(name)
    layers = model.model.state_specs()
    held = {
        kind: sum(4 * math.prod(spec.shape) for x in layers for n, spec in x.items() if kind in n)
        / len(layers)
        for kind in ("memory", "conv", "states")
    }
    heads, width = model.config.num_attention_heads, model.config.hidden_size
    key = layers[0]["memory_NHKV"].shape[1] if "memory_NHKV" in layers[0] else width // heads
    decays, transition = 4 * heads * key, 4 * heads * key * key
    shifts, token = 2 * 4 * width, 2 * 4 * width  # of both mixes; a key and a value
    return {
        "retnet": held["memory"],
        "lightning": held["memory"],
        "rwkv4": 12 * width + shifts,
        "rwkv5": held["memory"] + decays + shifts,
        "rwkv6": held["memory"] + decays + shifts,
        "rwkv7": held["memory"] + transition + shifts,
        "gated_deltanet": held["memory"] + transition + held["conv"],
        "infini": 4 * heads * key * (key + 1),
        "sliding_window": 511 * token,
        "block_recurrent": 512 * token + held["states"],
        "transformer_xl": 511 * token / 2,  # what came into the layer
        "longnet": 0,  # where cuts divide no segment
    }.get(name)


def main():
    """Prints a line per model and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=65_536, help="tokens (default: 65,536)")
    parser.add_argument("--processes", type=int, default=4, help="how many (default: 4)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    arguments = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in HEAP.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | HEAP)
    results, failed = {}, []
    for name in arguments.models:
        (one,) = measured(name, arguments.length, 1)
        several = measured(name, arguments.length, arguments.processes)
        shorter = measured(name, arguments.length // 4, arguments.processes)
        peak = max(x["peak_bytes"] for x in several)
        ratio = peak / one["peak_bytes"]
        results[name] = {
            "one": one,
            "several": several,
            "memory_ratio": round(ratio, 3),
            "bytes": {way: several[1][way] for way in ("forward", "backward")},
            "bytes_of_a_quarter": {way: shorter[1][way] for way in ("forward", "backward")},
            "formula": formula(name),
        }
        bytes_told = " and ".join(
            f"{x['forward']:,.0f} + {x['backward']:,.0f}" for x in (shorter[1], several[1])
        )
        print(
            f"{name:16} {one['peak_bytes'] / 2**20:6.0f} MiB, in {arguments.processes} processes "
            f"{peak / 2**20:5.0f}: {ratio:.2f}; told {bytes_told}, "
            f"formula {results[name]['formula']}",
            flush=True,
        )
        if arguments.processes == 4 and ratio > WANTED:
            failed.append(name)
        record = {"device": platform.processor() or platform.machine(), "torch": torch.__version__}
        record |= {"length": arguments.length, "processes": arguments.processes}
        file = RESULTS / "sequence_parallel.json"
        file.write_text(json.dumps(record | {"models": results}, indent=1) + "\n")
    if failed:
        raise SystemExit(f"more than {WANTED} of one process' memory: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
