"""A token's plan against the step that knows no clocks: the same slots, the same attention."""

import pickle

import pytest
import torch
from ladder import worst

from zoo.kernels.dilated_attention import branches_of, dilated_attention_step, hold, write_slots
from zoo.kernels.dilated_step import DecayTables, TokenPlan, hold_known

# (heads, segments, rates): as the paper's; what nothing divides; one without a branch of rate 1;
# two with it, the longer one last; heads that no branch has.
SHAPES = [
    (4, [16, 32, 64], [1, 2, 4]),
    (5, [7, 13, 26], [1, 3, 5]),
    (5, [7, 13], [3, 2]),
    (3, [4, 6, 9], [1, 4, 1]),
    (2, [30], [7]),
]
SIZE = 6


def log_decay():
    return torch.linspace(-0.1, 0, SIZE, dtype=torch.float64)


def normal(*size):
    return torch.randn(*size, dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("offsets", ["grouped", "modulo"])
@pytest.mark.parametrize("decay", [False, True], ids=["plain", "decay"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_step_of_any_clock(shape, decay, offsets):
    """Rows at several clocks, neighbours at one, and now and then rows without a token."""
    torch.manual_seed(0)
    heads, *settings = shape
    branches, clock = branches_of(*settings), torch.tensor([0, 3, 3, 29, 0])
    slots = branches[-1].first + branches[-1].count
    expected = [torch.zeros(5, heads, slots, SIZE, dtype=torch.float64) for _ in "kv"]
    found = [x.clone() for x in expected]
    how = {"log_decay": log_decay() if decay else None, "offsets": offsets}
    decays = DecayTables(log_decay) if decay else None
    for step in range(40):
        q, *new = (normal(5, 1, heads, SIZE) for _ in "qkv")
        keep = torch.rand(5) > 0.2 if step % 3 == 0 else torch.ones(5, dtype=torch.bool)
        own = {"is_written": keep, "offsets": offsets}
        expected = [write_slots(x, y[:, 0], clock, *settings, **own) for x, y in zip(expected, new)]
        o = dilated_attention_step(q, *expected, clock, *settings, **how)
        clocks = [n if kept else None for n, kept in zip(clock.tolist(), keep.tolist())]
        plan = TokenPlan(clocks, branches, heads, offsets, decays, torch.float64)
        before = [x.clone() for x in found]
        after = [plan.write(x, y, may_overwrite=False) for x, y in zip(found, new)]
        assert all(torch.equal(x, y) for x, y in zip(found, before))
        found = [plan.write(x, y, may_overwrite=True) for x, y in zip(found, new)]
        assert all(torch.equal(x, y) for x, y in zip([*after, *found], expected * 2))
        assert worst([plan.attend(q, *found)[keep]], [o[keep]]) < 1e-12
        clock = clock + keep
    assert len(clock.unique()) > 2


@pytest.mark.parametrize("offsets", ["grouped", "modulo"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reads_what_it_sees(shape, offsets):
    """No slot that has nothing to see, and what a branch of rate 1 has in that branch alone."""
    heads, *settings = shape
    branches = branches_of(*settings)
    for clock in range(150):
        whole = [clock - clock % b.length for b in branches if b.rate == 1]
        start, seen = min(whole, default=clock + 1), set()
        for n, b in enumerate(branches):
            u, first = clock % b.length, clock - clock % b.length
            for head in range(heads):
                offset = b.offsets(heads, offsets, "cpu")[head].item()
                if u % b.rate == offset:
                    tokens = range(first + offset, clock + 1, b.rate)
                    seen |= {(head, j, None if j >= start else n) for j in tokens}
        (run,) = TokenPlan([clock], branches, heads, offsets, None, torch.float32).runs
        sizes = (len(range(heads)[x.heads]) * len(range(100)[x.slots]) for x in run.pieces)
        assert sum(sizes) == len(seen)


def test_decays_are_made_once_and_grow_by_doubling():
    decays = DecayTables(log_decay)
    for newest in range(20):
        found = decays.factors(3, newest, newest // 2 + 1, torch.float64)
        distance = 3.0 * (newest - torch.arange(newest // 2 + 1, dtype=torch.float64))
        assert worst([found], [(distance[:, None] * log_decay()).exp()]) < 1e-15
        assert len(decays.tables[3, torch.float64]) == 1 << newest.bit_length()
    assert decays.factors(3, 19, 1, torch.float64).data_ptr() in range(
        decays.tables[3, torch.float64].data_ptr(), found.data_ptr() + 1
    )
    with torch.device("meta"):  # as a model is built that is given its weights later
        assert decays.factors(3, 40, 1, torch.float32).device.type == "cpu"
    assert pickle.loads(pickle.dumps(decays)).tables == {}


@torch.no_grad()
@pytest.mark.parametrize("offsets", ["grouped", "modulo"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_holds_what_a_pass_leaves(shape, offsets):
    """Rows that begin, go on, have no token, and pass several segments; after slots and none."""
    torch.manual_seed(0)
    heads, *settings = shape
    branches = branches_of(*settings)
    x = normal(1, 150, heads, SIZE)
    slots = branches[-1].first + branches[-1].count
    start, count = torch.tensor([0, 0, 5, 31, 17, 0]), torch.tensor([3, 90, 0, 1, 50, 0])
    first = count.cumsum(0) - count
    where = first, start, start + count
    for held in (None, normal(6, heads, slots, SIZE)):
        if held is not None:  # slots that never had a token hold zeros
            held = hold(
                x, held, *settings, first, torch.full_like(start, 200), start, offsets=offsets
            )
        expected = hold(x, held, *settings, *where, offsets=offsets)
        before = None if held is None else held.clone()
        rows = list(zip(*(n.tolist() for n in where)))
        assert torch.equal(hold_known(x, held, branches, offsets, rows), expected)
        assert held is None or torch.equal(held, before)
