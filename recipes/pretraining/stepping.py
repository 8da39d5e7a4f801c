"""One step of training: what it reads, its random numbers, its gradient over all processes."""

import contextlib
import hashlib
import json
import random

import numpy as np
import torch
from accelerate.utils import set_seed
from torch.nn.parallel import DistributedDataParallel


def step_seed(seed, step, rank):
    """The seed of what one process draws in one step, such as dropout's masks.

    It is a function of these three alone, so a continued run needs no generator's state, and
    processes do not drop the same places of different windows.

    Args:
        seed: the recipe's.
        step: counted from 0.
        rank: the process.
    """
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


def seed_generators(seed, device):
    """Seeds what a step draws from.

    Where there are no devices, accelerate's `set_seed` takes a millisecond to note that they are to
    be seeded when they come.
    """
    if torch.accelerator.is_available() or device.type != "cpu":
        return set_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


def order_hash(windows, recipe):
    """What identifies the order in which a run reads, from its first and its last step.

    Args:
        windows: of the run, whose `batch` is a function of the step.
        recipe: of the run.

    Returns:
        A hash of places and ids, the same on any number of processes; None with a stream, of which
        the last step is not known.
    """
    if recipe.streaming or any(source.get("streaming") for source in recipe.sources):
        return None
    order = hashlib.sha256()
    for step in (0, recipe.steps - 1):
        order.update(json.dumps(windows.position(step)).encode())
        for name, x in windows.batch(step, 0, 0, 1, recipe.batch_size).items():
            order.update(name.encode() + x.numpy().tobytes())
    return order.hexdigest()


def accumulate_gradients(accelerator, model, batches, backward=None, carried=None):
    """The gradient of the mean loss over all scored tokens of all micro-batches and processes.

    The mean is over tokens and not over micro-batches, so that a token counts the same wherever
    it falls.

    Args:
        accelerator: of accelerate.
        model: as it prepared it.
        batches: this process's micro-batches, with `shift_labels` of which -100 are not scored.
        backward: (loss, whether it is the last) instead of accelerate's.
        carried: a `Carried` with the states that the rows go on from.

    Returns:
        The cross entropy in nats per token, a scalar tensor, the same on all processes.
    """
    num_targets = sum((batch["shift_labels"] != -100).sum() for batch in batches)
    num_targets = accelerator.reduce(num_targets.to(accelerator.device), "sum")
    total = torch.zeros((), device=accelerator.device)
    for i, batch in enumerate(batches):
        batch = {key: tensor.to(accelerator.device) for key, tensor in batch.items()}
        # Only a model that sees `labels` computes a loss; `shift_labels` is what it scores.
        labels = {"labels": batch["shift_labels"], "num_items_in_batch": num_targets}
        state = carried.arguments(i) if carried else {"use_cache": False}
        last = i == len(batches) - 1
        with contextlib.nullcontext() if last or backward else accelerator.no_sync(model):
            output = model(**batch, **labels, **state)
            loss = output.loss
            # Data parallelism averages gradients over processes, and their sum is wanted.
            summed = loss * accelerator.num_processes
            backward(summed, last) if backward else accelerator.backward(summed)
        total += loss.detach()
        if carried:
            carried.keep(i, output.past_key_values)
        if output.get("z_loss") is not None:
            total -= output.z_loss
    return accelerator.reduce(total, "sum")


def settle_buckets(accelerator, model, batches):
    """Has DDP lay out its buckets before the first step, which it does after its first backward.

    Where a gradient lies in a bucket decides in which order three processes or more sum it up, so
    the first step of a continuation would be rounded otherwise than in the run that it continues.

    Args:
        accelerator, model: as of `accumulate_gradients`.
        batches: () to micro-batches such as there.
    """
    if accelerator.num_processes <= 2:
        return
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        accumulate_gradients(accelerator, model, batches())
        model.zero_grad()
