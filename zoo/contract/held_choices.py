"""Models that choose some of many: runs that are made to choose alike, so that they compare.

A choice (`zoo.core.choice.Choice`) is a step: two runs that differ by rounding differ by more where
they choose differently. In float64 that takes a tie of 1e-16, and runs are compared as they are: so
it is shown that all ways to run a model choose alike. In 32 and 16 bits ties are common. There the
float64 model is run once and its choices noted; every run is given these, wherever it would have
chosen otherwise, and then keeps the bounds of any other model. What it would have chosen is counted
and has a bound of its own, so that a search that is wrong does not hide behind what it is given.

Choices are known by row and clock. So this is for runs of one batch, of which each row is a
document: points 1 and 9.
"""

import contextlib

import torch

# What 32 bits may choose otherwise, of all choices: ties within a few roundings of 6e-8, where
# scores lie 1e-2 or so apart. A search that is wrong chooses otherwise in every second case.
SHARE_IN_32_BITS = 1e-3


def choices_in(model):
    """The modules of a model that let a choice through, by name.

    Known by the name of their class: those of an exported folder are its own.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if any(cls.__name__ == "Choice" for cls in type(module).__mro__)
    }


class HeldChoices:
    """What a model chose in one run, to be chosen in others.

    Args:
        model: that makes the choices.
        run: called with the model once; its choices are the ones.

    Attributes:
        made: how many choices others have made since the last `share_made_otherwise`.
        otherwise: how many of these were others.
    """

    def __init__(self, model, run):
        self.tables, self.made, self.otherwise = {}, 0, 0
        with _hooked(model, self._note):
            run(model)

    def _note(self, name, index, where):
        row, clock = torch.broadcast_tensors(*(x.cpu() for x in where()))
        size = int(row.max()) + 1, int(clock.max()) + 1
        rest = index.shape[row.ndim :]
        old = self.tables.get(name, index.new_empty(0, 0, *rest, device="cpu"))
        table = old.new_full((*map(max, size, old.shape), *rest), -1)
        table[: old.shape[0], : old.shape[1]] = old
        is_token = clock >= 0
        table[row[is_token], clock[is_token]] = index.detach().cpu()[is_token]
        self.tables[name] = table

    def _replace(self, name, index, where):
        table = self.tables[name].to(index.device)
        row, clock = torch.broadcast_tensors(*(x.to(index.device) for x in where()))
        is_token = (row >= 0) & (row < table.shape[0]) & (clock >= 0) & (clock < table.shape[1])
        held = table[torch.where(is_token, row, 0), torch.where(is_token, clock, 0)]
        held = held.to(index.dtype)
        own, held = index[is_token], held[is_token]
        self.made += own.numel()
        self.otherwise += (~(own[..., None] == held[..., None, :]).any(-1)).sum().item()
        return index.masked_scatter(_like(is_token, index), held)

    def given_to(self, model):
        """A context in which the model chooses what is held."""
        return _hooked(model, self._replace)

    def share_made_otherwise(self):
        """Of all choices since the last call, those that would have been others."""
        share = self.otherwise / max(self.made, 1)
        self.made = self.otherwise = 0
        return share

    def check(self, checks, bound):
        """That no more than this share of the choices since the last call would have been others.

        Args:
            checks: the `Checks` of a point.
            bound: the share.
        """
        checks.holds("choices were made", self.made > 0)
        checks.below("share of choices made otherwise", self.share_made_otherwise(), bound)


class FreeChoices:
    """For models that choose nothing, and where all choose for themselves."""

    def given_to(self, model):
        """A context in which nothing changes."""
        return contextlib.nullcontext()

    def share_made_otherwise(self):
        """None."""
        return 0.0

    def check(self, checks, bound):
        """Nothing to check."""


def held_for(subject, dtype, ids):
    """`HeldChoices` for runs in this type of a batch of these ids, of the float64 model.

    `FreeChoices` in float64 and for a model that makes none.

    Args:
        subject: the `Subject`.
        dtype: of the runs.
        ids: [B, T], the longest that is run.
    """
    model = subject.model(dtype)
    if dtype == torch.float64 or not choices_in(model):
        return FreeChoices()
    with torch.no_grad():
        return HeldChoices(model.double(), lambda model: subject.forward(model, ids))


@contextlib.contextmanager
def _hooked(model, function):
    """Calls function(name, index, where) at each choice; what it returns takes its place."""

    def hook_of(name):
        return lambda module, args, index: function(name, *args)

    handles = [x.register_forward_hook(hook_of(name)) for name, x in choices_in(model).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _like(condition, x):
    return condition.reshape(*condition.shape, *[1] * (x.ndim - condition.ndim)).expand_as(x)
