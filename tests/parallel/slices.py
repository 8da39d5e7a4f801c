"""One of several processes that make passes over slices: compares them with a pass of one process.

python tests/parallel/slices.py RANK SIZE STORE OUT MODEL:VARIANT...

Writes a line of JSON for each model and case to OUT, from the first process.
"""

import json
import sys
import traceback

import torch
import torch.distributed as dist
from torch import nn

import zoo.core.exchange as exchange
from zoo.contract.subject import with_all_parts_active, zoo_subject
from zoo.core.parallel import split_batch

TIME = 101


def cases():
    """Batches of 2 rows by name, and where slices are cut; SIZE to bounds."""
    generator = torch.Generator().manual_seed(1)
    ids, labels = (torch.randint(1, 61, (2, TIME), generator=generator) for _ in range(2))
    bounds = {2: [0, 52, TIME], 4: [0, 26, 52, 83, TIME]}
    yield "dense", {"input_ids": ids, "shift_labels": labels}, bounds
    # A document over three slices, a boundary at a cut, several in a slice.
    positions = torch.zeros_like(ids)
    for row, starts in enumerate(([0, 9, 10, 90], [0, 52, 60, 65])):
        for start, end in zip(starts, [*starts[1:], TIME]):
            positions[row, start:end] = torch.arange(end - start)
    batch = {"input_ids": ids, "shift_labels": labels, "position_ids": positions}
    yield "packed", batch, bounds
    mask = (torch.rand(2, TIME, generator=generator) > 0.3).long()
    mask[0, :30] = 0  # a row without tokens in the first of four slices
    mask[1, 70:] = 0  # and in the last
    scored = labels.masked_fill(mask == 0, -100)
    batch = {"input_ids": ids, "shift_labels": scored, "attention_mask": mask}
    yield "padded", batch, bounds
    # Slices of one token, and one that is padding in every row.
    mask = torch.ones_like(ids)
    mask[:, -2:] = 0
    batch = {"input_ids": ids, "shift_labels": labels.masked_fill(mask == 0, -100)}
    batch["attention_mask"] = mask
    yield "short", batch, {2: [0, TIME - 2, TIME], 4: [0, 1, 18, TIME - 2, TIME]}


def summed_loss(logits, labels, count):
    """The loss as float64 wants it."""
    return (
        nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / count
    )


def run(model, batch, count):
    """Logits and loss of a batch, after backward."""
    batch = dict(batch)
    labels = batch.pop("shift_labels")
    logits = model(**batch, use_cache=False).logits
    loss = summed_loss(logits, labels, count)
    loss.backward()
    return logits.detach(), loss.detach()


def compare(model, batch, bounds, rank, size):
    """The largest differences of logits, loss and gradients, relative to the largest."""
    count = (batch["shift_labels"] != -100).sum()
    if rank == 0:
        logits, loss = run(model, batch, count)
        expected = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        model.zero_grad()
    exchange.TRAFFIC.clear()
    model.base_model.sequence_parallel = dist.group.WORLD
    own = split_batch(batch, rank, size, bounds)
    own_logits, own_loss = run(model, own, count)
    model.base_model.sequence_parallel = None
    if (
        dict(exchange.TRAFFIC).get("send", 0) + exchange.TRAFFIC["all_gather"] == 0
        and rank < size - 1
    ):
        raise AssertionError("nothing was exchanged")
    pieces = [
        own_logits.new_empty(2, b - a, own_logits.shape[-1]) for a, b in zip(bounds, bounds[1:])
    ]
    pieces[rank] = own_logits.contiguous()
    for source, piece in enumerate(pieces):
        dist.broadcast(piece, source)
    dist.all_reduce(own_loss)
    gradients = []
    for parameter in model.parameters():
        gradients.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        dist.all_reduce(gradients[-1])
    gradients = [x.clone() for x in gradients]
    model.zero_grad()
    if rank:
        return None
    is_token = batch.get("attention_mask", torch.ones(2, TIME)) != 0
    got = torch.cat(pieces, 1)[is_token]
    largest = max(float(x.abs().max()) for x in expected)
    errors = [
        float((g - e).abs().max() / e.abs().max().clamp(min=1e-6 * largest))
        for g, e in zip(gradients, expected)
    ]
    return {
        "logits": float((got - logits[is_token]).abs().max() / logits[is_token].abs().max()),
        "loss": abs(float(own_loss - loss)),
        "gradients": max(errors),
        "traffic": dict(exchange.TRAFFIC),
    }


def main(rank, size, store, out, *names):
    """Compares all of them."""
    rank, size = int(rank), int(size)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    for name in names:
        model = with_all_parts_active(zoo_subject(*name.split(":")).build(0)).double().train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        for case, batch, bounds in cases():
            try:
                found = compare(model, batch, bounds[size], rank, size)
            except BaseException:
                traceback.print_exc()
                print(f"at {name}, {case}, process {rank}", file=sys.stderr, flush=True)
                raise
            if rank == 0:
                with open(out, "a") as file:
                    file.write(
                        json.dumps({"model": name, "case": case, "size": size, **found}) + "\n"
                    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
