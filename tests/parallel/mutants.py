"""One of several processes whose code is broken in one place, to see that a test tells.

python tests/parallel/mutants.py RANK SIZE STORE OUT MUTANT

As slices.py, for the model that has what is broken.
"""

import slices
import torch
import torch.distributed as dist
from as_process import run_as_process

from zoo.core import exchange, halo
from zoo.core.parallel import Ranks
from zoo.layers import split_recurrence

# Of each: the model, and a case in which it shows.
MUTANTS = {
    "nothing": ("retnet:torchscale", None),
    "decay_of_a_slice_dropped": ("retnet:torchscale", "dense"),
    "continues_ignored": ("retnet:torchscale", "packed"),
    "halo_off_by_one": ("sliding_window:default", "dense"),
    "labels_shifted_after_slicing": ("retnet:torchscale", "dense"),
    "gradient_scaled_by_processes": ("retnet:torchscale", "dense"),
    "exchanges_without_tokens": ("transformer_xl:default", None),
}


def nothing():
    """All as it is."""


def decay_of_a_slice_dropped():
    """A slice leaves of a state all there was."""
    original = split_recurrence._left_of
    split_recurrence._left_of = lambda *arguments: torch.ones_like(original(*arguments))


def continues_ignored():
    """Documents that start in a slice go on from the one before."""
    original = Ranks.take

    def take(self, sequence):
        original(self, sequence)
        self.continues_N = torch.full_like(self.continues_N, self.rank > 0)

    Ranks.take = take


def halo_off_by_one():
    """A window gets the tokens before the newest."""
    original = halo.ring_positions
    halo.ring_positions = lambda clock_B, size: original(clock_B - 1, size)


def labels_shifted_after_slicing():
    """The last token of a slice is not scored."""
    original = slices.split_batch

    def split_batch(batch, rank, size, bounds):
        own = original(slices.without_labels(batch), rank, size, bounds)
        labels = batch["labels"] if "labels" in batch else batch["shift_labels"]
        return own | {"labels": labels[:, bounds[rank] : bounds[rank + 1]]}

    slices.split_batch = split_batch


def gradient_scaled_by_processes():
    """As if each process had a loss of its own."""
    original = exchange._Affine.backward

    def backward(ctx, *grads):
        token, nothing, a, u, *others = original(ctx, *grads)
        return token, nothing, a, u * dist.get_world_size(), *others

    exchange._Affine.backward = staticmethod(backward)


def exchanges_without_tokens():
    """Backward leaves out what nobody used."""

    def make(self, function, *arguments):
        *results, _ = function.apply(self.token, self.wire, *arguments)
        return results

    exchange.Exchanges.make = make


def main(rank, size, out, mutant):
    """Compares the model."""
    globals()[mutant]()
    name, _ = MUTANTS[mutant]
    for case, found in slices.compare(name, slices.built(name), rank, size):
        slices.write(out, name, case, size, found)


if __name__ == "__main__":
    run_as_process(main)
