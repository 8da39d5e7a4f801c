"""Truncated backpropagation through time: each row of a batch goes on where it stopped.

A recurrent model then sees documents far longer than a window: forward the state is handed from
step to step, backward stops where a step began. The text is cut into as many regions as a batch has
rows; a row reads its region in order, its state is emptied where a document begins, and an epoch
deals the regions out anew.
"""

import numpy as np
import torch

from zoo.core.state import LayerFrame, put_together, take_apart

from .agreeing import gather
from .corpus import collate
from .recipe import UsageError

CARRIED = "carried_state.pt"  # of all rows, in a checkpoint


class Lanes:
    """Training batches whose rows go on, as a pure function of (seed, step, rank, micro-batch).

    Args:
        recipe: its sizes and seed.
        parts: the sources of the run: one.
    """

    def __init__(self, recipe, parts):
        (part,) = parts
        self.tokens, self.length, self.seed = part.corpus.train, recipe.sequence_length, recipe.seed
        self.rows, self.record = recipe.batch_size, part.corpus.record
        # One window less than fits leaves room for the offset.
        num_windows = (len(self.tokens.ids) - 1) // self.length - 1
        self.num_steps = num_windows // self.rows
        if self.num_steps < 2:
            raise UsageError(
                f"the training text has {len(self.tokens.ids)} tokens, two windows for each of "
                f"{self.rows} rows need {2 * self.rows * self.length + self.length + 1}; use more "
                "data, a smaller batch_size or a shorter sequence_length."
            )

    def described(self, num_tokens):
        """What there is to train on, for the terminal."""
        return (
            f"{self.record['train']['bytes']:,} bytes of text to train on, "
            f"{self.record['held_out']['bytes']:,} held out; {self.rows} rows of {self.num_steps} "
            f"windows of {self.length} tokens, carried on; {num_tokens:,} tokens to train"
        )

    def save(self, folder, step):
        """Nothing: what is read follows from the step."""

    def restore(self, folder):
        """Nothing, too."""

    def begins(self, step):
        """Whether the rows of a step begin anew, with empty states."""
        return step % self.num_steps == 0

    def position(self, step):
        """Where the text of a step is: the first token of each row."""
        return {"first_tokens": [start for _, start in self._starts(step)]}

    def _starts(self, step):
        """The first token of each row's region, and of its window in a step."""
        epoch, index = divmod(step, self.num_steps)
        # numpy promises that RandomState's numbers stay the same from version to version.
        random = np.random.RandomState([self.seed, epoch])
        offset, order = random.randint(self.length), random.permutation(self.rows)
        regions = (offset + order * self.num_steps * self.length).tolist()
        return [(region, region + index * self.length) for region in regions]

    def batch(self, step, rank, micro, num_processes, size):
        """One process's micro-batch: input_ids, shift_labels and position_ids [size, length]."""
        first = (micro * num_processes + rank) * size
        windows = []
        for region, start in self._starts(step)[first : first + size]:
            ids, targets, positions = self.tokens.window(start, self.length, "documents")
            document = self.tokens.starts[np.searchsorted(self.tokens.starts, start, "right") - 1]
            # Of the document that the window begins in, so much was read before.
            seen = start - max(int(document), region)
            restarts = torch.nonzero(positions == 0)[1:]
            positions[: int(restarts[0]) if len(restarts) else None] += seen
            windows.append((ids, targets, positions))
        return collate(windows, with_positions=True)


class Carried:
    """The states of this process's rows, by micro-batch, between two steps.

    Args:
        config: of the model.
        rank: of this process.
        num_processes: in all.
        size: rows of a micro-batch.
        accumulation: micro-batches of a process.
    """

    def __init__(self, config, rank, num_processes, size, accumulation):
        self.config, self.size = config, size
        self.firsts = [(micro * num_processes + rank) * size for micro in range(accumulation)]
        self.empty()

    def empty(self):
        """Forgets: the next step begins anew."""
        self.caches = [None] * len(self.firsts)

    def arguments(self, micro):
        """What a forward pass takes beside its batch."""
        return {"past_key_values": self.caches[micro], "use_cache": True}

    def keep(self, micro, cache):
        """Takes the state after a forward pass, cut off from what it was computed from."""
        frame, tensors = take_apart(cache)
        self.caches[micro] = put_together(self.config, frame, [x.detach() for x in tensors])

    def gathered(self):
        """The states of all rows of all processes, to be saved; None where they are empty."""
        own = {}
        for first, cache in zip(self.firsts, self.caches):
            if cache is not None:
                frame, tensors = take_apart(cache)
                frame = [{**layer._asdict(), "clock": layer.clock.cpu()} for layer in frame]
                own[first] = frame, [x.cpu() for x in tensors]
        pieces = {first: piece for rank in gather(own) for first, piece in rank.items()}
        if not pieces:
            return None
        frames, tensors = zip(*(pieces[first] for first in sorted(pieces)))
        clocks = [torch.cat([layer["clock"] for layer in layers]) for layers in zip(*frames)]
        return {
            "frame": [{**layer, "clock": clock} for layer, clock in zip(frames[0], clocks)],
            "tensors": [torch.cat(same) for same in zip(*tensors)],
        }

    def take_up(self, saved, device):
        """Takes this process's rows of what `gathered` returned, on any number of processes."""
        if saved is None:
            return
        for micro, first in enumerate(self.firsts):
            rows = slice(first, first + self.size)
            frame = [
                LayerFrame(**{**layer, "clock": layer["clock"][rows].to(device)})
                for layer in saved["frame"]
            ]
            tensors = [x[rows].to(device) for x in saved["tensors"]]
            self.caches[micro] = put_together(self.config, frame, tensors)
