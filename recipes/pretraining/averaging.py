"""The exponential moving average of a run's weights (`ema_decay`)."""

import contextlib

import torch
from torch.distributed.fsdp import FSDPModule

EMA = "ema"  # the folder of the averaged model in that of a run or checkpoint


class Average:
    """An average of weights, which takes their place for as long as it is looked at.

    After each step it is decay * average + (1 - decay) * weights; it begins as the first weights.

    Args:
        model: the language model, in no wrappers.
        decay: 0 keeps no average.
    """

    def __init__(self, model, decay):
        self.model, self.decay = model, decay
        self.values = [p.detach().clone() for p in model.parameters()] if decay else []

    @torch.no_grad()
    def update(self):
        """Takes in the weights after a step."""
        if self.decay:
            torch._foreach_lerp_(self.values, list(self.model.parameters()), 1 - self.decay)

    @contextlib.contextmanager
    def in_place(self):
        """The model with the average as its weights; afterwards with its own, bit for bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self):
        for module in self.model.modules():
            if isinstance(module, FSDPModule):  # which keeps what it gathered last
                module.reshard()
        # In place: wrappers of data parallelism and compiled code keep hold of the tensors.
        for weight, value in zip(self.model.parameters(), self.values, strict=True):
            before = weight.clone()
            weight.copy_(value)
            value.copy_(before)

    def named(self):
        """The average of each weight by its name."""
        names = (name for name, _ in self.model.named_parameters())
        return dict(zip(names, self.values, strict=True))
