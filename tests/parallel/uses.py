"""One of several processes that use models over slices as training scripts do.

python tests/parallel/uses.py RANK SIZE STORE OUT MODEL:VARIANT...

Writes a line of JSON for each model and use to OUT, from the last process: differences from one
process, or for "precision" how many times its error.
"""

import copy
import functools
import gc
from dataclasses import replace

import torch
import torch.distributed as dist
from as_process import run_as_process
from slices import TIME, built, cases, say, targets, without_labels, write
from torch import nn

from zoo.core.parallel import split_batch

USES = {}


def use(function):
    """Has it run for each model: (model, rank, size) to what it found."""
    USES[function.__name__] = function
    return function


def losses(model, rank=0, size=1, indices=(0, 1)):
    """Logits and sums of losses of some of the cases; over slices if the model is set so."""
    for index in indices:
        _, batch, bounds = list(cases())[index]
        if model.base_model.sequence_parallel is not None:
            batch = split_batch(batch, rank, size, bounds.get(size))
        logits = model(**without_labels(batch), use_cache=False).logits.double()
        labels = targets(batch).flatten()
        yield logits, nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")


def backward_of_sum(of_passes):
    """Of all losses at once."""
    sum(of_passes).backward()


def trained(model, backward, group=None, **place):
    """Logits, and gradients of all processes as one vector, that `backward(losses)` leaves."""
    model.zero_grad()
    model.base_model.sequence_parallel = group
    made = list(losses(model, **place))
    backward([loss for _, loss in made])
    model.base_model.sequence_parallel = None
    found = [
        torch.zeros_like(p) if p.grad is None else p.grad
        for p in model.parameters()
        if p.requires_grad
    ]
    model.zero_grad()
    vector = torch.cat([x.double().flatten() for x in found])
    if group is not None:
        dist.all_reduce(vector, group=group)
    return [logits.detach() for logits, _ in made], vector


def against_one(model, rank, size, backward):
    """How far gradients are from those of one process, relative to the largest."""
    place = {"rank": rank, "size": size}
    _, expected = trained(model, backward)
    _, got = trained(model, backward, dist.group.WORLD, **place)
    return {"gradients": float((got - expected).abs().max() / expected.abs().max())}


@use
def one_backward_of_two_passes(model, rank, size):
    """The second pass is made before the first one's backward."""
    return against_one(model, rank, size, backward_of_sum)


@use
def two_backwards_of_one_pass(model, rank, size):
    """With retain_graph: gradients add up."""

    def backward(of_passes):
        of_passes[1].backward(retain_graph=True)
        of_passes[1].backward()
        of_passes[0].backward()

    return against_one(model, rank, size, backward)


@use
def many_steps(model, rank, size):
    """A pass and its backward leave no tensor behind: autograd's functions hold no circle."""
    counts = []
    for _ in range(4):
        trained(model, backward_of_sum, dist.group.WORLD, rank=rank, size=size)
        gc.collect()
        # By type: a look at `__class__` of whatever there is runs others' code.
        counts.append(sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()))
    # A message more or less may be on its way; what is left behind grows with every step.
    return {"tensors more": min(after - before for before, after in zip(counts, counts[1:]))}


@use
def turns(model, rank, size):
    """Mixers that know nothing of slices: the processes take turns in each layer."""
    modules = [m for layer in model.base_model.layers for m in (layer.mixer, layer.mlp)]
    modules = [m for m in modules if getattr(m, "exchanges", False)]
    if not modules or "landmark" in type(model).__name__.lower():  # the stack itself knows of them
        return {}
    for module in modules:
        module.exchanges, module.forward = False, functools.partial(unaware, module)
    found = against_one(model, rank, size, backward_of_sum)
    for module in modules:
        module.exchanges = True
        del module.forward
    return found


def unaware(module, x_BTD, sequence, *arguments, **inputs):
    """The mixer of a pass that goes on from a state."""
    return type(module).forward(module, x_BTD, replace(sequence, ranks=None), *arguments, **inputs)


@use
def frozen(model, rank, size):
    """One weight trains, as of an adapter: of the first layer, or the last of all."""
    found = {}
    parameters = list(model.parameters())
    first = next(p for p in model.base_model.layers[0].parameters() if p.ndim == 2)
    for place, kept in (("first", first), ("last", parameters[-1])):
        for p in parameters:
            p.requires_grad_(p is kept)
        (found[place],) = against_one(model, rank, size, backward_of_sum).values()
    for p in parameters:
        p.requires_grad_()
    return found


@use
def a_group_of_one(model, rank, size):
    """It makes the same pass."""
    own = [dist.new_group([other]) for other in range(size)][rank]
    logits, expected = trained(model, backward_of_sum)
    got_logits, got = trained(model, backward_of_sum, own, rank=0, size=1)
    return {
        "logits": max(float((x - y).abs().max()) for x, y in zip(got_logits, logits)),
        "gradients": float((got - expected).abs().max() / expected.abs().max()),
    }


@use
def generation(model, rank, size):
    """The last process goes on from the state after the prompt."""
    model = model.eval()
    _, batch, bounds = list(cases())[0]
    ids = batch["input_ids"]
    with torch.no_grad():
        model.base_model.sequence_parallel = dist.group.WORLD
        own = split_batch({"input_ids": ids}, rank, size, bounds[size])
        cache = model(**own, use_cache=True).past_key_values
        model.base_model.sequence_parallel = None
        model.train()
        if rank < size - 1:
            return {}
        model.eval()
        longer = torch.cat([ids, ids[:, :1]], 1)
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        options |= {"return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0}
        mask = torch.ones_like(longer)
        got = model.generate(longer, attention_mask=mask, past_key_values=cache, **options)
        expected = model.generate(longer, attention_mask=mask, **options)
        model.train()
    assert torch.equal(got.sequences, expected.sequences)
    assert got.sequences.shape[1] == TIME + 1 + 4
    got, expected = torch.stack(got.logits), torch.stack(expected.logits)
    return {"logits": float((got - expected).abs().max() / expected.abs().max())}


@use
def precision(model, rank, size):
    """Errors of logits and gradients, in those of one process; against float64."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        low = copy.deepcopy(model).to(dtype)
        true = copy.deepcopy(low).double()
        logits, gradients = trained(true, backward_of_sum)
        one_logits, one = trained(low, backward_of_sum)
        own_logits, got = trained(low, backward_of_sum, dist.group.WORLD, rank=rank, size=size)
        bounds = list(cases())[0][2][size]
        columns = slice(bounds[rank], bounds[rank + 1])
        squares = torch.zeros(2, dtype=torch.float64)
        for true_x, one_x, own_x in zip(logits, one_logits, own_logits):
            true_x = true_x[:, columns]
            squares[0] += (own_x - true_x).square().sum()
            squares[1] += (one_x[:, columns] - true_x).square().sum()
        dist.all_reduce(squares)
        name = str(dtype).removeprefix("torch.")
        found[f"{name} logits"] = float((squares[0] / squares[1]).sqrt())
        found[f"{name} gradients"] = float((got - gradients).norm() / (one - gradients).norm())
    return found


def main(rank, size, out, *names):
    """Uses each of them."""
    for name in names:
        model = built(name)
        for what, function in USES.items():
            say(name, what)
            found = function(model, rank, size)
            if rank == size - 1:
                write(out, name, what, size, found)


if __name__ == "__main__":
    run_as_process(main)
