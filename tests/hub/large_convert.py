"""A file of 3 GB is converted, exported and converted back in the memory of one of its shards.

    python tests/hub/large_convert.py [--layers 24] [--shard 500MB] [--json FILE]

Makes a random RWKV-7 as its authors save one (bfloat16, one .pth), and runs `zoo` on it, each time
in a process of its own. Prints each one's peak of memory beside the bound, 1.3 times the largest
shard and 1 GB, and its time (in brackets: the processor's) beside that of `cp`, both until all is
on the disk; compares every tensor with what was made. Exits with a status that says whether all is
within the bound and equal. Linux only: /proc has the peaks.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "parity"), str(HERE.parent.parent)]

import rwkv_files
import torch

from zoo.hub.folder import open_tensors
from zoo.hub.lazy import value_of
from zoo.models.rwkv7 import MIXED

WIDTH, MLP, VOCAB = 2048, 8192, 65536  # of the authors' model of 1.5 billion parameters
MB = 1000**2
CHILD = """
import re, sys
from zoo.cli import main
status = main(sys.argv[1:])
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]
print("peak", int(peak) * 1024)
sys.exit(status)
"""
# Ours and the authors', within a layer; `#` is one of the following.
NAMES = {
    "mixer_norm.#": "ln1.#",
    "mlp_norm.#": "ln2.#",
    "mixer.head_norm.#": "att.ln_x.#",
    "mixer.r_proj.#": "att.receptance.#",
    "mixer.k_proj.#": "att.key.#",
    "mixer.v_proj.#": "att.value.#",
    "mixer.out_proj.#": "att.output.#",
    "mlp.k_proj.#": "ffn.key.#",
    "mlp.v_proj.#": "ffn.value.#",
    "mixer.decay.#": "att.w#",
    "mixer.rate.#": "att.a#",
    "mixer.residual.#": "att.v#",
    "mixer.gate.#": "att.g#",
    "mixer.k_k": "att.k_k",
    "mixer.k_a": "att.k_a",
    "mixer.r_k": "att.r_k",
    "mlp.mu_k": "ffn.x_k",
}
PARTS = {"weight": "weight", "bias": "bias"}
LORA_PARTS = {"a": "1", "b": "2", "bias": "0"}


def make(path, layers):
    """Writes a model; the memory that this takes is not what is measured."""
    rwkv_files.HEAD_SIZE = 64  # as in all of theirs
    shapes = rwkv_files.authors_shapes("7", layers=layers, width=WIDTH, mlp=MLP, vocab=VOCAB)
    tensors = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        tensors[name] = rwkv_files.random_weights({name: shape}, seed)[name].bfloat16()
    torch.save(tensors, path)


def expected(theirs):
    """Pairs of our name and the tensors of theirs that it is made of."""
    whole = {"emb": "model.embed_tokens", "head": "lm_head", "ln_out": "model.norm"}
    whole["blocks.0.ln0"] = "model.embed_norm"
    for name, ours in whole.items():
        yield from ((f"{ours}.{k}", [f"{name}.{k}"]) for k in PARTS if f"{name}.{k}" in theirs)
    layers = 1 + max(int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", n) for n in theirs) if m)
    for i in range(layers):
        for ours, name in NAMES.items():
            if i == 0 and "residual" in ours:
                continue  # the first layer has it in the file and does not use it
            parts = PARTS if ".#" in name else LORA_PARTS if "#" in name else {"": ""}
            for part, other in parts.items():
                source = f"blocks.{i}.{name.replace('#', other)}"
                if source in theirs:
                    yield f"model.layers.{i}.{ours.replace('#', part)}", [source]
        yield f"model.layers.{i}.mixer.mu", [f"blocks.{i}.att.x_{x}" for x in MIXED]


def are_the_file(folder, path):
    """Whether a folder's weights are those of the file, every one."""
    ours, theirs = open_tensors(folder), open_tensors(path)
    pairs = dict(expected(theirs))
    if pairs.keys() != ours.keys():
        print("names differ:", sorted(pairs.keys() ^ ours.keys())[:4])
        return False
    for name, sources in pairs.items():
        parts = [value_of(theirs[source]) for source in sources]
        if not torch.equal(torch.cat([x.flatten() for x in parts]), value_of(ours[name]).flatten()):
            print("differs:", name)
            return False
    return True


def cpu_time():
    """Seconds of the processor that the processes started here have taken so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(*arguments):
    """Runs `zoo`. Returns its peak in bytes, and its time and that of the processor in seconds."""
    start, busy = time.monotonic(), cpu_time()
    child = [sys.executable, "-c", CHILD, *map(str, arguments)]
    done = subprocess.run(child, cwd=HERE.parent.parent, text=True, capture_output=True)
    busy = cpu_time() - busy
    os.sync()
    if done.returncode:
        raise SystemExit(done.stderr)
    return int(done.stdout.split("peak")[-1]), time.monotonic() - start, busy


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24, help="the size (%(default)s: 3 GB)")
    parser.add_argument("--shard", default="500MB", help="of a file that is written")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    options = parser.parse_args()
    good, figures = True, {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        path, ours, exported, native = (folder / n for n in ("a.pth", "ours", "exported", "fla"))
        make(path, options.layers)
        os.sync()
        start, busy = time.monotonic(), cpu_time()
        subprocess.run(["cp", path, folder / "copy"], check=True)
        os.sync()
        copied, busy = time.monotonic() - start, cpu_time() - busy
        (folder / "copy").unlink()
        peak, started, busy_alone = run("info", "rwkv7")
        print(
            f"{path.stat().st_size / MB:,.0f} MB; cp takes {copied:.1f} s ({busy:.1f} of the "
            f"processor's); zoo alone, which loads torch and transformers, {started:.1f} s "
            f"({busy_alone:.1f}) and {peak / MB:,.0f} MB"
        )
        size = ("--max-shard-size", options.shard)
        steps = {
            "convert": ("convert", "rwkv-pth", path, ours),
            "export": ("export", ours, exported, "--license", "mit"),
            "convert --reverse": ("convert", "fla-rwkv7", "--reverse", ours, native),
            "convert back": ("convert", "fla-rwkv7", native, folder / "again"),
        }
        for name, arguments in steps.items():
            peak, seconds, used = run(*arguments, *size)
            out = next(x for x in (folder / "again", native, exported, ours) if x.is_dir())
            shards = [x.stat().st_size for x in out.glob("*.safetensors")]
            bound = 1.3 * max(shards) + 1000 * MB
            same = "fla" in out.name or are_the_file(out, path)
            good &= same and peak <= bound
            figures[name] = {
                "peak_bytes": peak,
                "bound_bytes": round(bound),
                "largest_file_bytes": max(shards),
                "seconds": round(seconds - started, 1),
            }
            print(
                f"{name}: peak {peak / MB:,.0f} MB, bound {bound / MB:,.0f} MB "
                f"({len(shards)} shards); {seconds:.1f} s ({used:.1f}), without loading "
                f"{seconds - started:.1f} s ({used - busy_alone:.1f}), "
                f"{(seconds - started) / copied:.1f} x cp ({(used - busy_alone) / busy:.1f}); "
                f"{'written' if 'fla' in out.name else 'every tensor equal' if same else 'WRONG'}",
                flush=True,
            )
        figures["cp"] = {"bytes": path.stat().st_size, "seconds": round(copied, 1)}
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
