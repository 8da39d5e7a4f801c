"""One of four processes that make passes over slices: compares them with a pass of one process.

python tests/parallel/slices.py RANK SIZE STORE OUT MODEL:VARIANT...

A line of JSON for each model, case and number of slices goes to OUT, from the process that made the
reference: each makes those of other cases. Where it is goes to stderr.
"""

import json
import sys

import torch
import torch.distributed as dist
from as_process import run_as_process
from torch import nn

import zoo.core.wire as wire
from zoo.contract.subject import cache_tensors, with_all_parts_active, zoo_subject
from zoo.core.parallel import split_batch

TIME = 101
# Of the largest gradient of all parameters: errors of smaller ones are relative to this.
FLOOR = 1e-6
# And what is below this on both sides is rounding of what is 0 in mathematics, such as the gradient
# of a bias of all keys.
ROUNDING = 1e-14
# Cases whose layers are run again in backward; without that in the same cases of two processes.
CHECKPOINTED = {2: (), 4: ("packed", "short")}
# Of four processes, those that have two slices.
PAIRS = ((0, 1), (2, 3))


def cases():
    """Batches of 2 rows by name, and where slices are cut; SIZE to bounds."""
    generator = torch.Generator().manual_seed(1)
    ids, labels = (torch.randint(1, 61, (2, TIME), generator=generator) for _ in range(2))
    bounds = {2: [0, 52, TIME], 4: [0, 26, 52, 83, TIME]}
    yield "dense", {"input_ids": ids, "labels": labels}, bounds
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


def targets(batch):
    """What each token is scored on, [B, T]."""
    if "labels" in batch:
        return nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    return batch["shift_labels"]


def without_labels(batch):
    """The rest of its arguments."""
    return {name: x for name, x in batch.items() if "labels" not in name}


def run(model, batch, count):
    """Logits, loss and gradients of a batch, in float64."""
    parameters = list(model.parameters())
    labels, batch = targets(batch), without_labels(batch)
    logits = model(**batch, use_cache=False).logits
    loss = nn.functional.cross_entropy(
        logits.double().flatten(0, 1), labels.flatten(), reduction="sum"
    )
    loss = loss / count
    for p in parameters:
        p.grad = None
    loss.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    return logits.detach().double(), loss.detach(), [x.double() for x in gradients]


def together(batch, bounds, rank, owner, logits, loss, gradients, group=None):
    """What all processes of a group have made, on the owner; both by their places in it."""
    whole = logits.new_zeros(2, TIME, logits.shape[-1])
    whole[:, bounds[rank] : bounds[rank + 1]] = logits
    vector = torch.cat([whole.flatten(), loss.view(1), *(x.flatten() for x in gradients)])
    dist.reduce(vector, group_dst=owner, group=group)
    logits, loss, *flat = vector.split([whole.numel(), 1, *(x.numel() for x in gradients)])
    return logits.view_as(whole), loss[0], [x.view_as(y) for x, y in zip(flat, gradients)]


def differences(batch, got, expected):
    """The largest, of logits and gradients relative to the largest value."""
    is_token = batch.get("attention_mask", torch.ones(2, TIME)) != 0
    logits, true_logits = got[0][is_token], expected[0][is_token]
    largest = max(float(x.abs().max()) for x in expected[2])
    errors = [
        float((g - e).abs().max() / e.abs().max().clamp(min=FLOOR * largest))
        for g, e in zip(got[2], expected[2])
        if max(g.abs().max(), e.abs().max()) > ROUNDING * largest
    ]
    return {
        "logits": float((logits - true_logits).abs().max() / true_logits.abs().max()),
        "loss": abs(float(got[1] - expected[1])),
        "gradients": max(errors),
    }


def run_slice(model, batch, bounds, rank, size, count, group=None):
    """What this process makes of its slice."""
    wire.TRAFFIC.clear()
    model.base_model.sequence_parallel = group or dist.group.WORLD
    own = run(model, split_batch(batch, rank, size, bounds), count)
    model.base_model.sequence_parallel = None
    sent = sum(wire.TRAFFIC[name] for name in ("send", "all_gather", "all_to_all"))
    assert sent or rank == size - 1, "nothing was exchanged"
    return own


def checkpointing(model, is_on):
    """Switches it."""
    if is_on:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()


def references(model, indices):
    """What one process makes of some cases: a case's index to the case, its count and that."""
    found = {}
    for index, (case, batch, bounds) in enumerate(cases()):
        count = (targets(batch) != -100).sum()
        expected = run(model, batch, count) if index in indices else None
        found[index] = (case, batch, bounds), count, expected
    return found


def compare(name, model, rank, size, group=None, found=None):
    """Runs cases, in a group in which this is one of so many. Yields what it has the reference of.

    Args:
        found: what `references` gave, of all cases to run; the reference of the nth of them is that
            of the nth process.
    """
    found = found or references(model, [rank])
    for owner, ((case, batch, bounds), count, expected) in enumerate(found.values()):
        say(name, case, size)
        checkpointing(model, case in CHECKPOINTED[size])
        own = run_slice(model, batch, bounds[size], rank, size, count, group)
        checkpointing(model, False)
        got = together(batch, bounds[size], rank, owner, *own, group=group)
        if rank == owner:
            yield case, differences(batch, got, expected) | {"traffic": dict(wire.TRAFFIC)}


def prefill(model, rank, size, group=None):
    """Differences of the cache that slices leave on the last process, and of what follows it."""
    _, batch, bounds = list(cases())[2 if size == 4 else 0]
    batch, bounds = without_labels(batch), bounds[size]
    with torch.no_grad():
        model.base_model.sequence_parallel = group or dist.group.WORLD
        own = split_batch(batch, rank, size, bounds)
        output = model(**own, use_cache=True, logits_to_keep=1)
        model.base_model.sequence_parallel = None
        if rank < size - 1:
            return None
        caches = output.past_key_values, model(**batch, use_cache=True).past_key_values
        got, expected = (cache_tensors(cache) for cache in caches)
        assert got.keys() == expected.keys(), (sorted(got), sorted(expected))
        lengths = [cache.get_seq_length() for cache in caches]
        assert lengths[0] == lengths[1] == TIME, lengths
        state = [
            float((x.double() - expected[name].double()).abs().max())
            / max(1.0, float(expected[name].double().abs().max()))
            for name, x in got.items()
        ]
        ids = batch["input_ids"][:, :20]
        new = [model(ids, past_key_values=cache).logits for cache in caches]
    return {
        "logits": float((new[0] - new[1]).abs().max() / new[1].abs().max()),
        "state": max(state),
    }


def say(*where):
    print("at", *where, file=sys.stderr, flush=True)


def built(name, dtype=torch.float64):
    """A model whose every part matters, without dropout."""
    model = with_all_parts_active(zoo_subject(*name.split(":")).build(0)).to(dtype).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def main(rank, size, out, *names):
    """Compares all of them: over four slices, and over two, two pairs with two cases each."""
    assert size == 4
    pairs = [dist.new_group(pair) for pair in PAIRS]
    pair, place, own = pairs[rank // 2], rank % 2, PAIRS[rank // 2]
    for name in names:
        model = built(name)
        found = references(model, [rank])
        of_pair = {index: found[index] for index in own}  # the processes' numbers are the cases'
        passes = (rank, 4, None, found), (place, 2, pair, of_pair)
        for number, slices, group, cases_found in passes:
            for case, errors in compare(name, model, number, slices, group, cases_found):
                write(out, name, case, slices, errors)
        model.eval()
        for number, slices, group, is_asked in ((rank, 4, None, True), (place, 2, pair, rank < 2)):
            say(name, "prefill", slices)
            errors = prefill(model, number, slices, group) if is_asked else None
            if errors is not None:
                write(out, name, "prefill", slices, errors)


def write(out, name, case, size, found):
    with open(out, "a") as file:
        file.write(json.dumps({"model": name, "case": case, "size": size, **found}) + "\n")


if __name__ == "__main__":
    run_as_process(main)
