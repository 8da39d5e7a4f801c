"""The operators and shapes that run.py measures."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from zoo.kernels.bench.gpu.workloads import Workload, decode, linear, longnet, rwkv4, rwkv7


class Case(NamedTuple):
    """What to measure.

    Attributes:
        make: (device, is_tiny) to `Workload`.
        modes: of "forward", "training" (forward and backward) and "decode".
        targets: how many times faster than fla we want to be, by mode.
    """

    make: Callable[[torch.device, bool], Workload]
    modes: tuple[str, ...]
    targets: dict[str, float] = {}


BOTH = ("forward", "training")


def retention(*shape):
    """A case of retention with our targets for it."""
    return Case(linear("H", *shape), BOTH, {"forward": 1.5, "training": 2.0})


# The most important first: the time may not suffice for all.
CASES = {
    "retention (4, 4096, 64, 128)": retention(4, 4096, 64, 128),
    "retention (1, 8192, 96, 128)": retention(1, 8192, 96, 128),
    "retention (2, 16384, 16, 128)": retention(2, 16384, 16, 128),
    "retention (8, 2048, 32, 256)": retention(8, 2048, 32, 256),
    "retention (4, 2048, 16, 128)": retention(4, 2048, 16, 128),
    "retention (8, 1024, 8, 64)": retention(8, 1024, 8, 64),
    "retention (4, 4096, 8, 256, 512)": retention(4, 4096, 8, 256, 512),
    "RWKV-6 (8, 4096, 32, 64)": Case(
        linear("BTHK", 8, 4096, 32, 64, bonus=True), BOTH, {"training": 1.5}
    ),
    "RWKV-7 (8, 4096, 32, 64)": Case(rwkv7(8, 4096, 32, 64), BOTH, {"training": 1.0}),
    "decode (64, 1, 16, 128)": Case(decode(64, 16, 128), ("decode",), {"decode": 2.0}),
    "decode (1, 1, 16, 128)": Case(decode(1, 16, 128), ("decode",), {"decode": 2.0}),
    "retention (1, 1048576, 16, 128)": Case(
        linear("H", 1, 1 << 20, 16, 128), ("forward",), {"forward": 2.0}
    ),
    "wkv4 (8, 4096, 2048)": Case(rwkv4(8, 4096, 2048), BOTH),
    "LongNet (1, 131072, 12, 64)": Case(longnet(1, 131_072, 12, 64), BOTH),
    "LongNet (4, 32768, 12, 128)": Case(longnet(4, 32_768, 12, 128), BOTH),
    "GLA (4, 4096, 16, 128)": Case(linear("BTHK", 4, 4096, 16, 128), BOTH),
    "scalar gates (4, 4096, 64, 64)": Case(linear("BTH", 4, 4096, 64, 64), BOTH),
}
# In a fresh process with nothing compiled, which can take a minute: after all cases.
FIRST_CALLS = ("retention (4, 2048, 16, 128)",)
FIRST_CALL_SECONDS = 90
