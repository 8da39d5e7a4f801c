"""Windows whose positions jump (`[position_skip]`): distances longer than the windows are trained.

PoSE, Zhu et al. 2023, https://arxiv.org/abs/2309.10400. A window of W tokens becomes two chunks;
the second has positions from further on, below a `target` S that the model is to reach. With text
of n tokens to take it from and m = min(n, W), all ends included:

    r1 ~ {1 .. (m + 1) // 2}    chunk 1 is tokens 0 .. r1 - 1, at positions 0 .. r1 - 1
    r2 ~ {m .. n}               chunk 2 is tokens r2 - (m - r1) .. r2 - 1, so it ends before r2,
    u  ~ {0 .. S - m}           at positions r1 + u .. m - 1 + u

A target is the token that comes next in the window, also from chunk 1 to chunk 2. What those n
tokens are in a stream of text: the window itself (n = W, so that no text is left out and each token
is still read once in an epoch), or with `span` k the k windows of text from the window's beginning
on, of which chunk 2 is then any part (the authors cut a document at 5 W, and draw once for it, not
in every epoch). With packing = "documents" each document of a window has jumps of its own, counted
from its own start. Evaluation is at plain positions.

RoPE that is to reach S is stretched by S / W while this trains, and stays so: model.rope_parameters
with rope_type linear or yarn and that factor (yarn: and with model.max_position_embeddings = S), or
a larger rope_theta (NTK). The draws are a function of the seed and the sample's number alone.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch

from .usage import UsageError, nearest

KEY = 0x9053  # of its random numbers among those of a run


@dataclass(frozen=True)
class PositionSkip:
    """What the table may say."""

    target: int = 0  # S: positions stay below it
    window: int = 0  # W: sequence_length, which is what 0 says
    chunks: int = 2
    span: int = 1  # windows of text that the tokens of one are taken from


def check_position_skip(recipe):
    """The recipe's table as a `PositionSkip`, or None without one.

    Raises:
        UsageError: an unknown key, or a value that no run could use.
    """
    table, length = recipe.position_skip, recipe.sequence_length
    if not table:
        return None
    known = [entry.name for entry in fields(PositionSkip)]
    for key, value in table.items():
        if key not in known:
            raise UsageError(f"unknown key {'position_skip.' + key!r}: {nearest(key, known)}")
        if type(value) is not int:
            raise UsageError(f"position_skip.{key} is a whole number, got {value!r}.")
    skip = PositionSkip(**table)
    if skip.window not in (0, length):
        raise UsageError(
            f"position_skip.window is sequence_length = {length}, got {skip.window}; leave it out."
        )
    if skip.target <= length:
        raise UsageError(
            f"position_skip.target is above the window, sequence_length = {length}, or no position "
            f"could be skipped, got {skip.target}; give the length that is to be reached."
        )
    if skip.chunks != 2:
        raise UsageError(
            f"position_skip.chunks is 2, which is what was published, got {skip.chunks}; leave it "
            "out."
        )
    if skip.span < 1:
        raise UsageError(f"position_skip.span is at least 1 window of text, got {skip.span}.")
    if skip.span > 1 and (recipe.task or recipe.packing != "concat"):
        what = "a task" if recipe.task else f"packing = {recipe.packing!r}"
        raise UsageError(
            f'position_skip.span takes text from further on, which needs packing = "concat", got '
            f"{what}; leave span out."
        )
    return skip


def draw(uniform, num_tokens, window, target):
    """The three random numbers of one piece of text.

    Args:
        uniform: (low, high) -> a whole number from low to high, both included.
        num_tokens: n.
        window: W.
        target: S.

    Returns:
        r1, r2 and u.
    """
    size = min(num_tokens, window)
    return (
        uniform(1, (size + 1) // 2),
        uniform(size, num_tokens),
        uniform(0, target - size),
    )


def lay_out(size, first, end, jump):
    """Which tokens a window of `size` has, and at which positions; the rest as `draw` returns it.

    Returns:
        Two arrays [size], the tokens counted from the beginning of the text.
    """
    index = np.arange(size)
    later = index >= first
    return index + later * (end - size), index + later * jump


class Skipping:
    """The windows of a run with `position_skip`, a function of the samples' numbers.

    Args:
        recipe: its table and its seed.
    """

    def __init__(self, recipe):
        self.skip, self.seed = check_position_skip(recipe), recipe.seed

    def tokens_ahead(self, length):
        """How many tokens after a window of this length it may take its text from."""
        return (self.skip.span - 1) * length

    def window(self, tokens, start, length, packing, sample, part=0):
        """A window of text, as `Tokens.window` gives it.

        Args:
            tokens: that hold it.
            start: of the text among them.
            length: W.
            packing: of the recipe.
            sample: its number among those of the run.
            part: its number among those that the sample was cut into.

        Returns:
            Input ids, targets and positions.
        """
        ids, targets, positions = tokens.window(start, length, packing)
        if self.skip.span == 1:
            return ids, targets, self.positions(positions, sample, part)
        num_tokens = min(self.skip.span * length, len(tokens.ids) - 1 - start)
        drawn = draw(self._uniform(sample, part), num_tokens, length, self.skip.target)
        index, positions = lay_out(length, *drawn)
        text = tokens.ids[start + np.append(index, index[-1] + 1)].astype(np.int64)
        text = torch.from_numpy(text)
        return text[:-1], text[1:], torch.from_numpy(positions)

    def positions(self, plain, sample, part=0):
        """The positions of one row in place of plain ones, which are 0 where a document begins."""
        uniform, length = self._uniform(sample, part), len(plain)
        bounds = [*torch.nonzero(plain == 0)[:, 0].tolist(), length]
        pieces = []
        for begin, end in zip(bounds, bounds[1:]):
            size = end - begin
            _, own = lay_out(size, *draw(uniform, size, length, self.skip.target))
            pieces.append(own)
        return torch.from_numpy(np.concatenate(pieces))

    def _uniform(self, sample, part):
        # numpy promises that RandomState's numbers stay the same from version to version.
        random = np.random.RandomState([self.seed, sample, part, KEY])
        return lambda low, high: int(random.randint(low, high + 1))
