"""One of several processes that have slices of segments and windows: what they send, what comes.

python tests/parallel/segments.py RANK SIZE STORE OUT

Each process writes lines of JSON to OUT: of the traffic, which is that of process 1, and of errors.
"""

import json

import slices
import torch
import torch.distributed as dist
from as_process import run_as_process

import zoo.core.wire as wire
from zoo.core.parallel import split_batch

MODELS = (
    "infini:linear",
    "infini:delta",
    "infini:none",
    "infini:lucidrains",
    "block_recurrent:default",
    "block_recurrent:transformer-xl",
    "block_recurrent:memorizing",
    "landmark:default",
)
COMPARED = ("infini:linear", "infini:lucidrains", "block_recurrent:default", "landmark:default")
# With a memory told as matrices.
SCANNED = "infini:lucidrains"
# Segments and windows are 16 tokens. Slices that end with one, of two lengths; that end in one; a
# segment that lies in four of them, and one of one token.
BOUNDS = {
    "whole": [0, 32, 48, 80, 112],
    "longer": [0, 64, 96, 160, 224],
    "cut": [0, 25, 60, 94, slices.TIME],
    "short": [0, 17, 20, 21, slices.TIME],
}


def batch_of(time):
    """Two rows of random tokens, and the next ones."""
    ids = torch.randint(1, 61, (2, time), generator=torch.Generator().manual_seed(0))
    labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    return {"input_ids": ids, "shift_labels": labels}


def traffic(model, rank, size, bounds):
    """Bytes of a pass and of its backward, by kind."""
    own = split_batch(batch_of(bounds[-1]), rank, size, bounds)
    model.base_model.sequence_parallel = dist.group.WORLD
    wire.TRAFFIC.clear()
    loss = model(**own, use_cache=False).loss
    forward = wire.TRAFFIC.copy()
    loss.backward()
    model.base_model.sequence_parallel = None
    model.zero_grad()
    backward = wire.TRAFFIC - forward
    return [{n: x for n, x in c.items() if n != "door"} for c in (forward, backward)]


def cases():
    """Batches and where slices are cut, by name."""
    for name in ("cut", "short"):
        batch, bounds = batch_of(slices.TIME), BOUNDS[name]
        yield name, batch, bounds
        positions = torch.arange(slices.TIME).repeat(2, 1)
        positions[0, bounds[2] :] -= bounds[2]  # a document begins at a cut
        positions[1, 19:] -= 19  # and a token before one
        yield f"{name}, packed", batch | {"position_ids": positions}, bounds


def compare(model, rank, size):
    """Runs all cases. Yields what this process has made the reference of."""
    for index, (case, batch, bounds) in enumerate(cases()):
        count = (batch["shift_labels"] != -100).sum()
        expected = slices.run(model, batch, count) if rank == index % size else None
        own = slices.run_slice(model, batch, bounds, rank, size, count)
        got = slices.together(batch, bounds, rank, index % size, *own)
        if expected is not None:
            yield case, slices.differences(batch, got, expected)


def prefill(model, bounds, rank, size):
    """How far what the last process can go on from is from what one process has.

    The others keep nothing.
    """
    batch, is_last = {"input_ids": batch_of(bounds[-1])["input_ids"]}, rank == size - 1
    model.base_model.sequence_parallel = dist.group.WORLD
    with torch.no_grad():
        own = split_batch(batch, rank, size, bounds)
        cache = model(**own, use_cache=is_last).past_key_values
        model.base_model.sequence_parallel = None
        if not is_last:
            return None
        other = model(**batch, use_cache=True).past_key_values
        errors = []
        for layer, expected in zip(cache.layers, other.layers, strict=True):
            assert layer.tensors.keys() == expected.tensors.keys()
            for name, x in expected.tensors.items():
                scale = x.abs().max().clamp(min=1e-6)
                errors.append(float((layer.tensors[name] - x).abs().max() / scale))
    return max(errors)


def main(rank, size, out):
    """Everything."""

    def write(*line):
        with open(out, "a") as file:
            file.write(json.dumps(line) + "\n")

    for name in MODELS:
        slices.say(name)
        model = slices.built(name, torch.float32)
        for case, bounds in BOUNDS.items():
            found = traffic(model, rank, size, bounds)
            if rank == 1:
                write("traffic", name, case, found)
        slices.checkpointing(model, True)
        found = traffic(model, rank, size, BOUNDS["cut"])
        if rank == 1:
            write("traffic", name, "checkpointed", found)
        slices.checkpointing(model, False)
        if name in COMPARED:
            for case, found in compare(model.double(), rank, size):
                write("errors", name, case, found)
        if name == SCANNED:
            few, wire.LARGEST_GATHER = wire.LARGEST_GATHER, 1
            for case, found in compare(model, rank, size):
                write("errors", name, f"{case}, in doubled steps", found)
            wire.LARGEST_GATHER = few
        found = prefill(model.double().eval(), BOUNDS["short"], rank, size)
        if rank == size - 1:
            write("errors", name, "prefill", {"state": found})


if __name__ == "__main__":
    run_as_process(main)
