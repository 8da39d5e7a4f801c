"""One of several processes that have slices of a recurrence: what they send, what comes of it.

python tests/parallel/recurrences.py RANK SIZE STORE OUT TRAFFIC... -- SCANNED...

Lines of JSON go to OUT: bytes of a pass of the models TRAFFIC and of its backward, from process 1,
which has a neighbour on either side; differences from one process of the models SCANNED, if more
processes than one are too many to tell everyone, and of a wide convolution.
"""

import copy

import slices
import torch
import torch.distributed as dist
from as_process import run_as_process

import zoo.core.wire as wire
from zoo.core.parallel import split_batch

LENGTHS = (64, 256)
KERNEL = 30  # tokens that the wide convolution sees


def traffic(model, rank, size, time):
    """Bytes of a pass and of its backward, by kind."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 61, (2, time), generator=generator)
    own = split_batch({"input_ids": ids, "labels": ids}, rank, size)
    model.base_model.sequence_parallel = dist.group.WORLD
    wire.TRAFFIC.clear()
    loss = model(**own, use_cache=False).loss
    forward = wire.TRAFFIC.copy()
    loss.backward()
    model.base_model.sequence_parallel = None
    return {"forward": dict(forward), "backward": dict(wire.TRAFFIC - forward)}


def compare(model, rank, size, case, batch, bounds):
    """Differences, on the first process."""
    count = (slices.targets(batch) != -100).sum()
    own = slices.run_slice(model, batch, bounds, rank, size, count)
    sent = {"traffic": dict(wire.TRAFFIC)}
    got = slices.together(batch, bounds, rank, 0, *own)
    if rank > 0:
        return None
    return slices.differences(batch, got, slices.run(model, batch, count)) | sent


def wide_convolution():
    """A model whose convolution sees more tokens than most slices have."""
    model = slices.built("gated_deltanet:default")
    config = copy.deepcopy(model.config)
    config.conv_size = KERNEL
    return type(model)(config).double().train()


def main(rank, size, out, *names):
    """Everything."""
    of_traffic, scanned = names[: names.index("--")], names[names.index("--") + 1 :]
    for name in of_traffic:
        model = slices.built(name, torch.float32)
        for length in LENGTHS:
            slices.say(name, length)
            found = traffic(model, rank, size, length)
            if rank == 1:
                slices.write(out, name, f"traffic {length}", size, found)
    models = {name: slices.built(name) for name in scanned} | {"wide": wide_convolution()}
    for name, model in models.items():
        # All tell all of them at most one.
        wire.LARGEST_GATHER = 8 if name == "wide" else 1
        for case, batch, bounds in slices.cases():
            slices.say(name, case)
            found = compare(model, rank, size, case, batch, bounds[size])
            if found is not None:
                slices.write(out, name, case, size, found)


if __name__ == "__main__":
    run_as_process(main)
