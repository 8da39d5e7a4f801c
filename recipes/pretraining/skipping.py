"""Steps that are left out: spikes of loss or gradient, and numbers that are not finite."""

import math
import statistics
from collections import deque

import torch

WINDOW, FEWEST = 128, 16  # steps that a median is of, and how many it takes to judge by


class Spikes:
    """Tells which steps to leave out, the same in all processes.

    A step is a spike if its loss or gradient norm is above `factor` times the median of that figure
    over the last steps that were taken.

    Args:
        factor: 0 leaves no step out.
        state: of an earlier part of the run.

    Attributes:
        in_a_row: steps left out since the last that was taken.
    """

    def __init__(self, factor, state=None):
        state = state or {"losses": [], "norms": [], "in_a_row": 0}
        self.factor, self.in_a_row = factor, state["in_a_row"]
        self.losses = deque(state["losses"], WINDOW)
        self.norms = deque(state["norms"], WINDOW)

    def state(self):
        """What a checkpoint keeps; numbers come back from JSON bit for bit."""
        if not self.factor:
            return {}
        state = {"losses": [*self.losses], "norms": [*self.norms], "in_a_row": self.in_a_row}
        return {"spikes": state}

    def reason(self, accelerator, loss, norm):
        """Why a step is to be left out, or None. Every process calls it.

        Args:
            accelerator: of the run.
            loss: of the step, over all processes.
            norm: of its gradient.
        """
        if not self.factor:
            return None
        # The mean is the same number everywhere, so no process takes a step that others do not.
        figures = torch.tensor([loss, norm], device=accelerator.device)
        figures = accelerator.reduce(figures, "sum")
        loss, norm = (figures / accelerator.num_processes).tolist()
        why = self._judge("loss", loss, self.losses) or self._judge(
            "gradient norm", norm, self.norms
        )
        if why:
            self.in_a_row += 1
            return why
        self.in_a_row = 0
        self.losses.append(loss)
        self.norms.append(norm)
        return None

    def said(self):
        """What a message about divergence adds."""
        return f", the {self.in_a_row}. step in a row to be skipped" if self.in_a_row else ""

    def _judge(self, name, value, history):
        if not math.isfinite(value):
            return f"its {name} is {value}"
        median = statistics.median(history) if len(history) >= FEWEST else math.inf
        if value > self.factor * median:
            return f"its {name} is {value:.4g}, the median {median:.4g}"
        return None
