"""Rows in slices (`sequence_parallel`): processes that hold each row together, in a run.

With N of them to a row, process p of W has the rows of place p // N of W // N, and of each the
slice of place p % N. The weights span all W: a process' gradient is that of its slices, and data
parallelism sums them as it sums those of rows.
"""

import contextlib
from dataclasses import dataclass

import torch.distributed as dist
from torch.nn.functional import pad

from zoo.core.slicing import NOT_SCORED, split_batch

from .launching import is_on
from .recipe import UsageError


def check_slicing(recipe, num_processes, environ):
    """Refuses launches in which rows cannot be held together.

    Args:
        recipe: of the run.
        num_processes: of the run.
        environ: environment variables as the launcher set them.

    Raises:
        UsageError: another number of processes is needed, or another way of running them.
    """
    size = recipe.sequence_parallel
    if size == 1:
        return
    if num_processes % size:
        raise UsageError(
            f"sequence_parallel = {size} wants a multiple of {size} processes, got "
            f"{num_processes}; launch with --num_processes {-(-num_processes // size) * size}, or "
            "set another sequence_parallel."
        )
    if is_on(environ.get("ACCELERATE_USE_DEEPSPEED")):
        raise UsageError(
            "sequence_parallel was not tried with DeepSpeed, which the launcher asks for; launch "
            "with recipes/accelerate/fsdp2.yaml or ddp.yaml."
        )
    compiler = (environ.get("ACCELERATE_DYNAMO_BACKEND") or "no").lower()
    if compiler != "no":
        raise UsageError(
            "sequence_parallel exchanges states in the middle of layers, which torch.compile does "
            f"not take (--dynamo_backend {compiler}); leave out one of them."
        )


def check_walk(recipe, model):
    """Refuses FSDP for a model whose processes would take turns as a whole.

    Args:
        recipe: of the run.
        model: the language model, on any device.

    Raises:
        UsageError: the model walks all its layers for one segment after the other.
    """
    if decoder_of(model).walks_segments:
        raise UsageError(
            f"this {recipe.architecture} walks all its layers for one segment after the other, so "
            "processes of sequence_parallel run one after the other, and FSDP wants all of them in "
            "the same layer; launch with recipes/accelerate/ddp.yaml, or leave out "
            "sequence_parallel."
        )


def group_of(size, accelerator):
    """The processes that hold this one's rows, in the order of the text; None: it has them whole.

    Args:
        size: how many they are.
        accelerator: of the run. All of its processes call this.
    """
    if size == 1:
        return None
    # Groups of their own, also where one has all processes (for which a mesh takes the default
    # group): data parallelism's sums are under way while slices are exchanged.
    firsts = range(0, accelerator.num_processes, size)
    groups = [dist.new_group(list(range(first, first + size))) for first in firsts]
    return groups[accelerator.process_index // size]


def decoder_of(model):
    """The `ZooModel` in a language model, also in peft's wrapper; in no others."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(whole, "base_model", whole)


@contextlib.contextmanager
def whole_rows(model):
    """A model that runs whole rows in each process, as it does without `sequence_parallel`."""
    decoder = decoder_of(model)
    group = getattr(decoder, "sequence_parallel", None)
    if group is not None:
        decoder.sequence_parallel = None
    try:
        yield
    finally:
        if group is not None:
            decoder.sequence_parallel = group


@dataclass(frozen=True)
class Share:
    """Which rows a process has, and which slice of each.

    Attributes:
        rank, world: its place among those with other rows, and how many they are.
        place, size: its place among those with these rows, and how many they are.
    """

    rank: int
    world: int
    place: int = 0
    size: int = 1

    def bounds(self, time):
        """The columns of rows of `time` tokens that its slice begins and ends at."""
        time = max(time, self.size)
        return time * self.place // self.size, time * (self.place + 1) // self.size

    def cut(self, batch):
        """Its slice of a batch of this module's callers: tokens, targets, perhaps positions.

        A row that is too short for all to have a token of it, as the last one of a text may be, is
        padded.
        """
        if self.size == 1:
            return batch
        missing = self.size - batch["input_ids"].shape[1]
        if missing > 0:
            batch = _padded(batch, missing)
        return split_batch(batch, self.place, self.size)


def share_of(accelerator, model):
    """The `Share` of this process in what a model runs.

    Args:
        accelerator: of the run.
        model: the language model, in none of accelerate's wrappers.
    """
    group = getattr(decoder_of(model), "sequence_parallel", None)
    size = 1 if group is None else dist.get_world_size(group)
    rank, world = accelerator.process_index, accelerator.num_processes
    return Share(rank // size, world // size, rank % size, size)


def _padded(batch, missing):
    """A batch with so many more columns, which are no tokens."""
    ids = batch["input_ids"]
    padded = {"attention_mask": pad(ids.new_ones(ids.shape[:2]), (0, missing))}
    for name, x in batch.items():
        # Of a task a token may be two ids.
        ends = [0, 0] * (x.ndim - 2) + [0, missing]
        padded[name] = pad(x, ends, value=NOT_SCORED if name == "shift_labels" else 0)
    return padded
