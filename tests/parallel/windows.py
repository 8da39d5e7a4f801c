"""One of several processes that attend over slices: counts what it tells the others.

python tests/parallel/windows.py RANK SIZE STORE OUT

Each process writes a line of JSON for each pass to OUT: its rank, the name of the pass, and bytes
of forward and backward by kind, and how many messages it still holds then.
"""

import json
import sys

import torch
import torch.distributed as dist
from as_process import run_as_process

from zoo.contract.subject import zoo_subject
from zoo.core.parallel import split_batch
from zoo.core.wire import TRAFFIC, UNDER_WAY

MODELS = {
    "window": ("sliding_window", "default", {}),
    "sinks": ("sliding_window", "sinks", {}),
    "extended": ("sliding_window", "leaky-rerope", {}),
    "full": ("sliding_window", "gpt-block", {"num_attention_heads": 4}),
    "heads": ("sliding_window", "gpt-block", {"num_attention_heads": 3, "head_dim": 8}),
    "dilated": ("longnet", "xpos", {}),
}
# Of each pass: model, tokens of a slice, columns of the row where documents start.
PASSES = {
    "window": ("window", 48, [0]),
    "window, twice as long": ("window", 96, [0]),
    "window, short slices": ("window", 10, [0]),
    "sinks": ("sinks", 48, [0]),
    "extended": ("extended", 48, [0]),
    "full": ("full", 48, [0]),
    "full, documents over a cut": ("full", 48, [0, 60, 96]),
    "heads": ("heads", 48, [0]),
    "dilated, slices of segments": ("dilated", 64, [0]),
    "dilated, half a segment": ("dilated", 32, [0]),
    "dilated, twice as long": ("dilated", 96, [0]),
    "dilated, short slices": ("dilated", 12, [0]),
}


def told():
    """What this process has told the others since it was asked last."""
    found = {kind: n for kind, n in TRAFFIC.items() if n and kind != "door"}
    TRAFFIC.clear()
    return found


def restarted(rank, size):
    """The largest difference from one process where one of two rows restarts at every cut."""
    fields = {"zero_memory": True, "same_length": True}
    model = zoo_subject("transformer_xl", **fields).build(0).double().eval()
    positions = torch.arange(30 * size).repeat(2, 1)
    positions[1] %= 30
    batch = {"input_ids": torch.arange(60 * size).view(2, -1) % 50 + 1, "position_ids": positions}
    with torch.no_grad():
        expected = model(**batch, use_cache=False).logits[:, 30 * rank : 30 * (rank + 1)]
        model.base_model.sequence_parallel = dist.group.WORLD
        found = model(**split_batch(batch, rank, size), use_cache=False).logits
    return float((found - expected).abs().max() / expected.abs().max())


def main(rank, size, out):
    """Runs all passes."""
    models = {
        name: zoo_subject(model, variant, **fields).build(0).train()
        for name, (model, variant, fields) in MODELS.items()
    }
    for name, (model, length, starts) in PASSES.items():
        print("at", name, file=sys.stderr, flush=True)
        positions = torch.arange(size * length)
        starts = torch.tensor(starts)
        positions = positions - starts[torch.searchsorted(starts, positions, right=True) - 1]
        batch = {"input_ids": positions[None] % 50 + 1, "position_ids": positions[None]}
        own = split_batch(batch, rank, size)
        model = models[model]
        model.base_model.sequence_parallel = dist.group.WORLD
        told()
        logits = model(**own, use_cache=False).logits
        forward = told()
        logits.square().mean().backward()
        backward = told()
        model.base_model.sequence_parallel = None
        with open(out, "a") as file:
            line = {"rank": rank, "pass": name, "forward": forward, "backward": backward}
            line["under_way"] = len(UNDER_WAY)
            file.write(json.dumps(line) + "\n")
    line = {"rank": rank, "pass": "restarted", "error": restarted(rank, size)}
    with open(out, "a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    run_as_process(main)
