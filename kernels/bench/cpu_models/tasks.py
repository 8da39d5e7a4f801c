"""What is timed, and how: turns of some contenders, CPU seconds of this process.

A task makes of a contender a function that runs one turn and returns its seconds, per token or per
pass; `in_turns` runs those of all contenders one after the other, so many times.
"""

import contextlib
import statistics
import time

import torch
from transformers import StoppingCriteria

from zoo.core import onednn

PROMPT, LENGTH = 512, 1024  # tokens before decoding; of a prefill and of a training step
STEPS = 4  # tokens of a turn of decoding
PRODUCT = 2048  # rows and columns of the matrices whose product is the peak
VECTOR = 8192  # of the matrix whose product with a vector is the bandwidth: more than any cache


def tokens(size, length, rows=1):
    generator = torch.Generator().manual_seed(0)
    # Below the last id, which may stand for a landmark.
    return torch.randint(1, size.vocab - 1, (1, length), generator=generator).expand(rows, -1)


def clocked(function):
    """A turn: CPU seconds of one call."""

    def turn():
        start = time.process_time()
        function()
        return time.process_time() - start

    return turn


def matrix_product(dtype, size=PRODUCT):
    """(turn, FLOPs of it)."""
    a, b = (torch.randn(size, size, dtype=torch.float32).to(dtype) for _ in range(2))
    return clocked(lambda: a @ b), 2 * size**3


def matrix_vector(dtype, size=VECTOR):
    """(turn, bytes that it reads)."""
    matrix = torch.ones(size, size, dtype=dtype)
    vector = torch.ones(size, dtype=dtype)
    return clocked(lambda: torch.mv(matrix, vector)), matrix.nbytes


def onednn_product(size=PRODUCT):
    """`matrix_product` in float32 by oneDNN, which knows more processors than MKL."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return clocked(lambda: onednn.product(a, b, None)), 2 * size**3


def prefill(contender, length=LENGTH):
    ids = tokens(contender.size, length)
    return clocked(lambda: contender.read(ids))


def step(contender, rows, length=PROMPT):
    """Decoding by one model call per token; seconds of one."""
    ids = tokens(contender.size, length + 1)
    cache = contender.prompt(ids[:, :-1], rows)
    token = ids[:, -1:].expand(rows, 1).contiguous()

    def turn():
        nonlocal cache
        start = time.process_time()
        for _ in range(STEPS):
            cache = contender.read(token, cache)
        return (time.process_time() - start) / STEPS

    turn.cache = lambda: cache
    return turn


class Stamps(StoppingCriteria):
    """Notes the CPU time after every token of `generate`, and stops nothing."""

    def __init__(self):
        self.times = []

    def __call__(self, input_ids, scores, **kwargs):
        self.times.append(time.process_time())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def generation(contender, rows, length=PROMPT):
    """Decoding by `generate`; seconds between tokens, without what comes before the first."""
    ids = tokens(contender.size, length)
    cache = contender.prompt(ids[:, :-1], rows)
    ids = ids.expand(rows, -1).contiguous()

    def turn():
        nonlocal ids
        stamps = Stamps()
        ids = contender.generate(ids, cache, STEPS + 1, [stamps])
        return (stamps.times[-1] - stamps.times[0]) / STEPS

    return turn


def training(contender, autocast=None, length=LENGTH):
    """Forward, loss and backward, gradients written anew: no optimizer."""
    ids = tokens(contender.size, length)

    def run():
        context = contextlib.nullcontext()
        if autocast is not None:
            context = torch.autocast("cpu", dtype=autocast)
        with context:
            loss = contender.loss(ids)
        loss.backward()

    timed = clocked(run)

    def turn():
        contender.model.train()
        seconds = timed()
        contender.model.zero_grad(set_to_none=True)  # room for the next contender's
        contender.model.eval()
        return seconds

    return turn


def in_turns(turns, rounds, limit):
    """Seconds of each turn: name -> a sample per round, or the error that ended it.

    Args:
        turns: name -> function that runs one turn and returns seconds.
        rounds: how often each runs.
        limit: seconds; who has taken more sits the remaining rounds out, after one at least.
    """
    samples, spent = {name: [] for name in turns}, dict.fromkeys(turns, 0.0)
    for _ in range(rounds):
        for name, turn in turns.items():
            if isinstance(samples[name], str) or (samples[name] and spent[name] > limit):
                continue
            start = time.process_time()
            try:
                samples[name].append(turn())
            except Exception as error:  # one that fails is told, and does not end the others
                samples[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            spent[name] += time.process_time() - start
    return samples


def figures(seconds, reference):
    """Median, quartiles, number of samples, and how fast beside a reference in the same rounds.

    Args:
        seconds: of one contender, a sample per round from the first on.
        reference: those of what it is compared with; a ratio above 1 is in the contender's favour.
    """
    low = high = middle = statistics.median(seconds)
    if len(seconds) > 1:
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    found = {"seconds": middle, "quartiles": [low, high], "samples": len(seconds)}
    ratios = [other / own for own, other in zip(seconds, reference)]
    if ratios:
        found["ratio"] = statistics.median(ratios)
    return found
