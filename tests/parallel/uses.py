"""One of several processes that use models over slices as training scripts do.

python tests/parallel/uses.py RANK SIZE STORE OUT MODEL:VARIANT...

Writes a line of JSON for each model and use to OUT, from the last process: differences from one
process, or for "precision" how many times its error.
"""

import copy
import functools
import gc
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from as_process import run_as_process
from slices import TIME, built, cases, say, targets, without_labels, write
from torch import nn

from zoo.core.parallel import split_batch

USES = {}


def use(function):
    """Has it run for each model: (model, its `OneProcess` or None, rank, size) to what it found."""
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
    vector = flat(found)
    if group is not None:
        dist.all_reduce(vector, group=group)
    return [logits.detach() for logits, _ in made], vector


def flat(tensors):
    """As one vector, in float64."""
    return torch.cat([x.double().flatten() for x in tensors])


@dataclass
class OneProcess:
    """What one process makes of a model whose weights stay: on the last one, which compares.

    Attributes:
        logits: of each pass.
        gradients: of each pass's loss those of all parameters; of a model that is frozen but for
            some, theirs are the same.
    """

    logits: list
    gradients: list

    @classmethod
    def of(cls, model):
        logits, gradients, parameters = [], [], list(model.parameters())
        for index in (0, 1):
            ((of_pass, loss),) = losses(model, indices=[index])
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            pairs = zip(found, parameters)
            gradients.append([torch.zeros_like(p) if x is None else x for x, p in pairs])
            logits.append(of_pass.detach())
        return cls(logits, gradients)

    def distance(self, model, vector, times=(1, 1)):
        """How far gradients of so many times each loss are from its own, relative to the largest.

        Args:
            vector: those of the parameters that train.
        """
        which = [n for n, p in enumerate(model.parameters()) if p.requires_grad]
        of_passes = (flat([of_pass[n] for n in which]) for of_pass in self.gradients)
        expected = sum(n * x for n, x in zip(times, of_passes, strict=True))
        return float((vector - expected).abs().max() / expected.abs().max())


def against_one(model, one, rank, size, backward, times=(1, 1)):
    """How far gradients are from those of one process; on the last one."""
    _, got = trained(model, backward, dist.group.WORLD, rank=rank, size=size)
    return {"gradients": one.distance(model, got, times)} if one else {}


@use
def one_backward_of_two_passes(model, one, rank, size):
    """The second pass is made before the first one's backward."""
    return against_one(model, one, rank, size, backward_of_sum)


@use
def two_backwards_of_one_pass(model, one, rank, size):
    """With retain_graph: gradients add up."""

    def backward(of_passes):
        of_passes[1].backward(retain_graph=True)
        of_passes[1].backward()
        of_passes[0].backward()

    return against_one(model, one, rank, size, backward, times=(1, 2))


@use
def many_steps(model, one, rank, size):
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
def turns(model, one, rank, size):
    """Mixers that know nothing of slices: the processes take turns in each layer."""
    modules = [m for layer in model.base_model.layers for m in (layer.mixer, layer.mlp)]
    modules = [m for m in modules if getattr(m, "exchanges", False)]
    if not modules or "landmark" in type(model).__name__.lower():  # the stack itself knows of them
        return {}
    for module in modules:
        module.exchanges, module.forward = False, functools.partial(unaware, module)
    found = against_one(model, one, rank, size, backward_of_sum)
    for module in modules:
        module.exchanges = True
        del module.forward
    return found


def unaware(module, x_BTD, sequence, *arguments, **inputs):
    """The mixer of a pass that goes on from a state."""
    return type(module).forward(module, x_BTD, replace(sequence, ranks=None), *arguments, **inputs)


@use
def frozen(model, one, rank, size):
    """One weight trains, as of an adapter: of the first layer, or the last of all."""
    found = {}
    parameters = list(model.parameters())
    first = next(p for p in model.base_model.layers[0].parameters() if p.ndim == 2)
    for place, kept in (("first", first), ("last", parameters[-1])):
        for p in parameters:
            p.requires_grad_(p is kept)
        for x in against_one(model, one, rank, size, backward_of_sum).values():
            found[place] = x
    for p in parameters:
        p.requires_grad_()
    return found


@use
def a_group_of_one(model, one, rank, size):
    """It makes the same pass."""
    own = [dist.new_group([other]) for other in range(size)][rank]
    if one is None:
        return {}
    got_logits, got = trained(model, backward_of_sum, own, rank=0, size=1)
    return {
        "logits": max(float((x - y).abs().max()) for x, y in zip(got_logits, one.logits)),
        "gradients": one.distance(model, got),
    }


@use
def generation(model, one, rank, size):
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
def precision(model, one, rank, size):
    """Errors of logits and gradients, in those of one process; against float64."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        low = copy.deepcopy(model).to(dtype)
        # The first process has the truth, the last what one makes of it.
        if rank == 0:
            made = trained(copy.deepcopy(low).double(), backward_of_sum)
        elif rank == size - 1:
            made = trained(low, backward_of_sum)
        else:
            made = None
        logits, gradients = told(made, 0)
        one_logits, one_gradients = told(made, size - 1)
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
        error, of_one = (got - gradients).norm(), (one_gradients - gradients).norm()
        found[f"{name} gradients"] = float(error / of_one)
    return found


def told(made, source):
    """What one process has made, told to all of them."""
    box = [made]
    dist.broadcast_object_list(box, source)
    return box[0]


def main(rank, size, out, *names):
    """Uses each of them."""
    for name in names:
        model = built(name)
        one = OneProcess.of(model) if rank == size - 1 else None
        for what, function in USES.items():
            say(name, what)
            found = function(model, one, rank, size)
            if rank == size - 1:
                write(out, name, what, size, found)


if __name__ == "__main__":
    run_as_process(main)
