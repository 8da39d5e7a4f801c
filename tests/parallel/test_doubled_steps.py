"""Beyond a few processes what comes out of slices goes on in steps of doubled length."""

import math
from concurrent.futures import ThreadPoolExecutor
from queue import Queue

import pytest
import torch

from zoo.core.exchange import scan

HEADS, KEYS, VALUES = 2, 3, 4
SIZES = (1, 2, 9, 16, 33)


class Threads:
    """A `Wire` between threads of this process, which counts."""

    def __init__(self, rank, size, mail):
        self.rank, self.size, self.mail = rank, size, mail
        self.steps = self.bytes = 0

    def shift(self, tensors, step):
        """As `Wire.shift`."""
        to, source = self.rank + step, self.rank - step
        self.steps += 1
        if 0 <= to < self.size:
            self.bytes += sum(x.nbytes for x in tensors)
            self.mail[self.rank, to].put([x.clone() for x in tensors])
        if not 0 <= source < self.size:
            return [torch.zeros_like(x) for x in tensors]
        return self.mail[source, self.rank].get(timeout=60)


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("is_matrix", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_states_bytes_and_steps(size, is_matrix, direction):
    generator = torch.Generator().manual_seed(size)
    shape = (HEADS, KEYS, KEYS if is_matrix else 1)
    a_R = torch.randn(size, *shape, generator=generator, dtype=torch.float64)
    u_R = torch.randn(size, HEADS, KEYS, VALUES, generator=generator, dtype=torch.float64)
    mail = {(x, y): Queue() for x in range(size) for y in range(size)}
    wires = [Threads(rank, size, mail) for rank in range(size)]
    with ThreadPoolExecutor(size) as pool:
        found = list(pool.map(scan, wires, a_R, u_R, [direction] * size))

    state, expected = torch.zeros_like(u_R[0]), {}
    for rank in range(size)[::direction]:
        expected[rank] = state
        state = (a_R[rank] @ state if is_matrix else a_R[rank] * state) + u_R[rank]
    for rank, got in enumerate(found):
        torch.testing.assert_close(got, expected[rank], rtol=1e-10, atol=1e-10)

    steps = math.ceil(math.log2(size))
    assert {wire.steps for wire in wires} == {steps + 1}
    # Both of each function, in every step that reaches somebody; the last hands on states alone.
    for rank, wire in enumerate(wires):
        place = rank if direction == 1 else size - 1 - rank
        told = sum(place + 2**step < size for step in range(steps))
        last = u_R[0].nbytes * (place + 1 < size)
        assert wire.bytes == told * (a_R[0].nbytes + u_R[0].nbytes) + last
