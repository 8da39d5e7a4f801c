"""The gathered path of dilated attention against its definition, and both against torchscale's."""

import itertools
import json

import pytest
import torch
from goldens import golden_folder, golden_tensors
from ladder import BytesWritten, worst

from zoo.kernels import dilated_attention as module
from zoo.kernels.dilated_attention import (
    Held,
    branches_of,
    dilated_attention,
    dilated_attention_reference,
    dilated_attention_step,
    hold,
    write_slots,
)

# Empty documents first, in the middle and last; one-token documents; more than go one by one.
CU_SEQLENS = [0, 0, 1, 2, 18, 18, 34, 37, 37, 38, 39, 53, 53]
# (heads, V, segments, rates): as the paper's; what nothing divides, V wider than K; a branch longer
# than any text, one without all heads, one of single tokens.
SHAPES = [
    (4, 6, [16, 32, 64], [1, 2, 4]),
    (5, 8, [7, 13], [3, 2]),
    (3, 4, [5, 100, 4], [7, 3, 1]),
]


def arguments(
    shape=SHAPES[0], batch=2, time=53, packed=False, held=False, decay=False, dtype=torch.float64
):
    """Random inputs as (positional, keyword) arguments, and the leaves among them."""
    generator = torch.Generator().manual_seed(0)
    heads, value_dim, *branches = shape

    def normal(*size):
        x = torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)
        return x.requires_grad_()

    batch = 1 if packed else batch
    leaves = [normal(batch, time, heads, size) for size in (6, 6, value_dim)]
    keyword, documents = {"scale": 0.7}, batch
    if packed:
        keyword["cu_seqlens"] = torch.tensor([min(x, time) for x in CU_SEQLENS])
        documents = len(CU_SEQLENS) - 1
    if held:
        slots = sum(-(-w // r) for w, r in zip(*branches))
        tensors = [normal(documents, heads, slots, size) for size in (6, value_dim)]
        # Documents that go on from anywhere in a segment, rows in another order.
        count, row = torch.arange(documents) * 7 % 23, torch.arange(documents).flip(0)
        keyword["held"] = Held(*tensors, count, row)
        leaves += tensors
    if decay:
        keyword["log_decay"] = torch.linspace(-0.1, 0, 6, dtype=torch.float64)
    return [*leaves[:3], *branches], keyword, leaves


def run(function, positional, keyword, leaves):
    """The output and every gradient, of a random cotangent."""
    o = function(*positional, **keyword)
    weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [o, *torch.autograd.grad((o * weight).sum(), leaves)]


@pytest.mark.parametrize("weights", [False, True], ids=["constant weights", "weight gradient"])
@pytest.mark.parametrize("offsets", ["grouped", "modulo"])
@pytest.mark.parametrize("held", [False, True], ids=["fresh", "held"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("decay", [False, True], ids=["plain", "decay"])
def test_equals_the_definition(packed, held, decay, offsets, weights):
    for shape in SHAPES:
        positional, keyword, leaves = arguments(shape, packed=packed, held=held, decay=decay)
        keyword |= {"offsets": offsets, "weight_gradient": weights}
        expected = run(dilated_attention_reference, positional, keyword, leaves)
        assert worst(run(dilated_attention, positional, keyword, leaves), expected) < 1e-12


@pytest.mark.parametrize("time", [1, 2, 15, 16, 17, 64, 65, 131])
def test_lengths(time):
    case = arguments(time=time)
    expected = run(dilated_attention_reference, *case)
    assert worst(run(dilated_attention, *case), expected) < 1e-12


@pytest.mark.parametrize("held", [False, True], ids=["fresh", "held"])
def test_blocks_under_a_decay(monkeypatch, held):
    """Several blocks of queries in a segment, and a product that has no fused attention."""
    monkeypatch.setattr(module, "_block_size", lambda rate: 5)
    monkeypatch.setattr(module, "BLOCK", 4)
    case = arguments(decay=True, held=held)
    expected = run(dilated_attention_reference, *case)
    assert worst(run(dilated_attention, *case), expected) < 1e-12


@pytest.mark.parametrize("held", [False, True], ids=["fresh", "held"])
@pytest.mark.parametrize("decay", [False, True], ids=["plain", "decay"])
def test_written_out_for_other_devices(monkeypatch, decay, held):
    """The same where PyTorch's fused attention for a CPU is not to be had."""
    monkeypatch.setattr(module, "_is_fused", lambda x: False)
    monkeypatch.setattr(module, "BLOCK", 7)
    case = arguments(decay=decay, held=held)
    expected = run(dilated_attention_reference, *case)
    assert worst(run(dilated_attention, *case), expected) < 1e-12


@pytest.mark.parametrize("function", [dilated_attention, dilated_attention_reference])
def test_official_numbers(function):
    golden = golden_tensors("ops-dilated")
    cases = json.loads((golden_folder("ops-dilated") / "config.json").read_text())
    causal = {name: case for name, case in cases.items() if case["causal"]}
    assert len(causal) == 5
    for name, case in causal.items():
        leaves = [
            golden[f"{name}_{x}"].unflatten(-1, (case["heads"], -1)).requires_grad_() for x in "qkv"
        ]
        o = function(*leaves, case["segment_length"], case["dilated_ratio"])
        grads = torch.autograd.grad(o, leaves, golden[f"{name}_cotangent_0"].view_as(o))
        assert worst([o.flatten(2)], [golden[f"{name}_o"]]) < 1e-12
        expected = [golden[f"{name}_grad_{x}"] for x in "qkv"]
        assert worst([x.flatten(2) for x in grads], expected) < 1e-12


def test_the_definition_one_query_at_a_time():
    """Against sums written out: which tokens, weights of branches, decay by distance."""
    (q, k, v, *branches), keyword, _ = arguments((4, 3, [6, 12], [1, 3]), time=14, decay=True)
    o = dilated_attention_reference(q, k, v, *branches, **keyword)
    rate = keyword["log_decay"]
    for head in range(4):
        for n in range(14):
            total, above = 0.0, torch.zeros(3, dtype=torch.float64)
            for w, r in zip(*branches):
                offset = head // -(-4 // r)
                if n % w % r != offset:
                    continue
                for j in range(n // w * w + offset, n + 1, r):
                    decay = (rate * (n - j)).exp()
                    weight = (0.7 * (q[0, n, head] * k[0, j, head] * decay).sum()).exp()
                    total, above = total + weight, above + weight * v[0, j, head]
            assert worst([o[0, n, head]], [above / total if total else above]) < 1e-12


@pytest.mark.parametrize("offsets", ["grouped", "modulo"])
@pytest.mark.parametrize("decay", [False, True], ids=["plain", "decay"])
@pytest.mark.parametrize("weights", [False, True], ids=["constant weights", "weight gradient"])
def test_token_by_token(decay, offsets, weights):
    """Values and gradients of decoding from slots are those of a pass, and so are the slots."""
    for shape in SHAPES:
        (q, k, v, *branches), keyword, leaves = arguments(shape, time=70, decay=decay)
        settings, spread = keyword | {"weight_gradient": weights}, {"offsets": offsets}

        def step_by_step(q, k, v, *branches, branches_=branches, **settings):
            last, outputs = branches_of(*branches)[-1], []
            slots = [
                x.new_zeros(2, x.shape[2], last.first + last.count, x.shape[3]) for x in (k, v)
            ]
            for t in range(q.shape[1]):
                clock = torch.tensor([t, t])
                slots = [
                    write_slots(held, x[:, t], clock, *branches, offsets=offsets)
                    for held, x in zip(slots, (k, v))
                ]
                step = dilated_attention_step(q[:, t : t + 1], *slots, clock, *branches, **settings)
                outputs.append(step)
            step_by_step.slots = slots
            return torch.cat(outputs, dim=1)

        case = [q, k, v, *branches], settings | spread, leaves
        found, expected = (run(f, *case) for f in (step_by_step, dilated_attention))
        assert worst(found, expected) < 1e-12
        first, start, after = torch.tensor([0, 70]), torch.zeros(2).long(), torch.tensor([70, 70])
        for x, slots in zip((k, v), step_by_step.slots):
            assert torch.equal(hold(x, None, *branches, first, start, after, **spread), slots)
            # And in two passes, rows cut in different places.
            cut = torch.tensor([33, 17])
            early = hold(x, None, *branches, first, start, cut, **spread)
            late = hold(x, early, *branches, first + cut, cut, after, **spread)
            assert torch.equal(late, slots)


def test_rows_that_have_no_token_keep_their_slots():
    held = torch.randn(3, 4, 12, 5)
    new, clock = torch.randn(3, 4, 5), torch.tensor([9, 2, 4])
    branches = [4, 16], [1, 2]
    keep = torch.tensor([True, False, True])
    found = write_slots(held, new, clock, *branches, is_written=keep)
    every = write_slots(held, new, clock, *branches)
    assert torch.equal(found[1], held[1]) and torch.equal(found[::2], every[::2])
    assert not torch.equal(every[1], held[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    """Scores and sums are in float32, so what is lost is the inputs' and the output's rounding."""
    positional, keyword, _ = arguments(dtype=dtype, held=True)
    exact = [x.double() if torch.is_tensor(x) else x for x in positional]
    o = dilated_attention(*positional, **keyword)
    held = keyword.pop("held")
    held = Held(*(x.double() for x in held[:2]), *held[2:])
    expected = dilated_attention_reference(*exact, **keyword, held=held)
    assert o.dtype == dtype
    # Half a unit in the last place of numbers below 4, and for float32 a sum of 20 products.
    assert worst([o], [expected]) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("weights", [False, True], ids=["constant weights", "weight gradient"])
def test_scores_that_no_exponential_holds(weights):
    """Slots without a query compute something as well, which must not show."""
    for shape, held in itertools.product(((4, 6, [13, 40], [2, 3]), *SHAPES), (False, True)):
        positional, keyword, leaves = arguments(shape, held=held)
        with torch.no_grad():  # all scores are large, and one sign's
            for x in leaves:
                x.abs_()
        keyword |= {"scale": 1000.0, "weight_gradient": weights}
        expected = run(dilated_attention_reference, positional, keyword, leaves)
        got = run(dilated_attention, positional, keyword, leaves)
        # Scores of 10,000 are rounded to 2e-12, which is what is left of a softmax's digits.
        assert worst(got, expected) < 1e-8


def test_nothing_overflows_in_a_long_segment():
    """Where xPos as written would need exp(490): 400,000 tokens away from the middle."""
    length, key_dim = 400_000, 2
    log_decay = torch.full((key_dim,), -0.00245)
    q, k, v = torch.ones(3, 1, length, 1, key_dim)
    v = v * torch.linspace(0, 1, length)[:, None, None]
    leaves = [x.requires_grad_() for x in (q, k, v)]
    branches = [length], [512]
    o = dilated_attention(*leaves, *branches, scale=5.0, log_decay=log_decay)
    grads = torch.autograd.grad(o.sum(), leaves)
    assert all(x.isfinite().all() for x in (o, *grads))
    chosen = [x.detach()[:, ::512] for x in leaves]
    expected = dilated_attention_reference(
        *chosen, [length], [1], scale=5.0, log_decay=512 * log_decay
    )
    assert worst([o[:, ::512]], [expected]) < 1e-5


def test_work_is_linear():
    """Bytes written by both passes grow as the length does, for lengths and rates that double."""
    counts = []
    shape = (4, 4, [64 << n for n in range(6)], [1 << n for n in range(6)])
    for length in (2048, 8192):
        case = arguments(shape, batch=1, time=length)
        with BytesWritten() as written:
            run(dilated_attention, *case)
        counts.append(written.count)
    assert counts[1] < 4.1 * counts[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segment_lengths": [4]}, "one positive entry per branch each"),
        ({"dilation_rates": [1, 0]}, "one positive entry per branch each"),
        ({"k": torch.zeros(1, 4, 4, 3)}, r"expected q and k \[B, T, H, K\]"),
        ({"v": torch.zeros(1, 4, 2, 4)}, r"expected q and k \[B, T, H, K\]"),
        ({"offsets": "spread"}, "offsets is one of grouped, modulo"),
        ({"log_decay": torch.zeros(3)}, r"log_decay is \[K\] = \[4\]"),
        ({"log_decay": torch.full((4,), -50.0)}, "too strong for a dilation rate of 1"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens grows from 0 to T = 4"),
        (
            {"held": Held(*torch.zeros(2, 1, 4, 7, 4), torch.tensor([0]))},
            r"held.keys is \[R, 4, 8, 4\]",
        ),
        (
            {"held": Held(*torch.zeros(2, 1, 4, 8, 4), torch.tensor([0, 1]))},
            r"held.count is \[N\] = \[1\]",
        ),
        ({"backend": "fla"}, "'fla', which has no such attention"),
        ({"backend": "mps"}, "backend is one of"),
    ],
)
def test_refused(change, message):
    inputs = {name: torch.zeros(1, 4, 4, 4) for name in "qkv"}
    inputs |= {"segment_lengths": [4, 8], "dilation_rates": [1, 2]}
    with pytest.raises(ValueError, match=message):
        dilated_attention(**inputs | change)
