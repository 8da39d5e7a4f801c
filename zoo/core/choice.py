"""Where a token takes some of many, and leaves the rest: what no derivative goes through.

The k keys, blocks or slots that score highest are a step function of the scores: where two of them
score the same but for rounding, another order of sums takes the other, and what comes after moves
by as much as the two differ. No bound of rounding holds across such a step. So a layer that chooses
lets its choice through a `Choice`, a module that does nothing: it is the place at which others can
look at the choice, or put another one there, with PyTorch's own forward hooks.

The contract does both (zoo/contract/held_choices.py): in 32 and 16 bits it lets every run choose
what the model in float64 chose, compares the results as those of any other model, and counts
how many choices would have been others. A model without such a module is taken for continuous.
"""

from torch import nn


class Choice(nn.Module):
    """Gives back what was chosen.

    In a layer, `self.choice = Choice()` once for each thing it chooses, and where it does:

        index = scores.topk(k, dim=-1).indices     # or what of it no layout of the pass changes
        index = self.choice(index, where)          # [..., H, k]; with hooks it may be another one
        own = values.gather(-1, index)             # all that follows uses what came back

    Nothing after it may use the scores' order again: gather the chosen scores by index.
    """

    def forward(self, index, where):
        """The choice itself; what a hook returns takes its place.

        Args:
            index: integers, [..., *rest] with the axes of `where` first: what each token chose.
                They count what the token's document says, as numbers of its tokens, blocks or
                slots do, so that they mean the same however the text was cut, and are as many for
                each token (fill up with -1, say). Their order on the last axis has no meaning.
            where: () -> (row, clock), integers whose common shape [...] is that of the first axes:
                the row of the batch, or the document of a packed stream, that a token is in, and
                its number there (a number out of range where there is no token). Called by
                hooks only: a run without them does not pay for it.
        """
        return index
