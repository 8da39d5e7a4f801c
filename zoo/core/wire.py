"""How a process of a sequence sends to the others, and receives."""

from collections import Counter

import torch
import torch.distributed as dist

# What this process has sent, in bytes, and how often: "all_gather" counts its own part once,
# "send" each message. For whoever measures.
TRAFFIC = Counter()

# Messages on their way out, with their group and memory: a pass may be over before they are out.
UNDER_WAY = []

# Up to so many processes everyone tells everyone; beyond, in log2 steps.
LARGEST_GATHER = 8


def settle(group):
    """Forgets the messages of passes that everyone in a group has finished."""
    forget([message for message in UNDER_WAY if message[0] is group])


def forget(messages):
    """Waits until messages are out, and lets go of their memory."""
    # Of those that are not out yet: who waits for one a second time waits for ever.
    messages = [x for x in UNDER_WAY if any(x is message for message in messages)]
    for _, work, _ in messages:
        work.wait()
    UNDER_WAY[:] = [x for x in UNDER_WAY if not any(x is message for message in messages)]


class Wire:
    """How a process sends to the others, and receives; what autograd functions of a pass hold.

    They may not hold the `Exchanges`, which hold what came of them: a circle that nothing frees.

    Args:
        group: the processes, in the order of the text.
        device: where what they exchange lies.

    Attributes:
        rank, size: this process' place in the group, and how many there are.
    """

    def __init__(self, group, device):
        self.group, self.device = group, device
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.shifted = []  # the last message of a shift

    @property
    def are_few(self):
        """Whether everyone tells everyone."""
        return self.size <= LARGEST_GATHER

    def send(self, x, to):
        """Sends a tensor without waiting until it is there."""
        x = x.detach().contiguous()
        TRAFFIC["send"] += x.nbytes
        TRAFFIC["messages"] += 1
        UNDER_WAY.append((self.group, dist.isend(x, group_dst=to, group=self.group), x))

    def receive(self, x, source):
        """Waits for a tensor, which is written into `x`."""
        dist.recv(x, group_src=source, group=self.group)
        return x

    def all_gather(self, x):
        """Everyone's tensor, a list: all have one shape."""
        x = x.detach().contiguous()
        TRAFFIC["all_gather"] += x.nbytes
        TRAFFIC["messages"] += 1
        every = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(every, x, group=self.group)
        return every

    def reduce_scatter(self, x_RX):
        """The sum of what all have for this process; its share of [R, ...]."""
        # Its name since PyTorch 2.13, and before.
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        TRAFFIC["reduce_scatter"] += x_RX.nbytes
        TRAFFIC["messages"] += 1
        own = torch.empty_like(x_RX[0]).flatten()
        scatter(own, x_RX.contiguous().flatten(), group=self.group)
        return own.view(x_RX.shape[1:])

    def all_to_all(self, x, sizes, sizes_there):
        """Gives each process its part of a tensor, and gets what each has for this one.

        Args:
            x: parts of these sizes along the first dimension, in the order of the processes.
            sizes_there: of what comes.
        """
        x = x.detach().contiguous()
        y = x.new_empty(sum(sizes_there), *x.shape[1:])
        TRAFFIC["all_to_all"] += x.nbytes - sizes[self.rank] * x[:1].nbytes
        TRAFFIC["messages"] += 1
        as_numbers = (z.view(torch.uint8) for z in (y, x))  # not all backends send all dtypes
        dist.all_to_all_single(*as_numbers, sizes_there, sizes, group=self.group)
        return y

    def shift(self, tensors, step):
        """What the process `step` places before has; zeros if there is none."""
        to, source = self.rank + step, self.rank - step
        # All make the same shifts in the same order: who is to get the last one is near by, and
        # waiting for it here keeps the memory of one message and not of those of all layers.
        forget(self.shifted)
        self.shifted = []
        if 0 <= to < self.size:
            self.send(as_bytes(tensors), to)
            self.shifted = UNDER_WAY[-1:]
        if not 0 <= source < self.size:
            return [torch.zeros_like(x) for x in tensors]
        return from_bytes(self.receive(as_bytes(tensors).clone(), source), tensors)


def as_bytes(tensors):
    """Tensors as one, of bytes."""
    return torch.cat([x.detach().contiguous().flatten().view(torch.uint8) for x in tensors])


def from_bytes(flat, like):
    """The inverse, with the shapes and dtypes of other tensors."""
    pieces = flat.split([x.nbytes for x in like])
    return [piece.clone().view(x.dtype).view(x.shape) for piece, x in zip(pieces, like)]
