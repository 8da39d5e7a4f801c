"""Attention in parts by distance: blocks against the definition, both against official numbers."""

import json
import math

import pytest
import torch
from goldens import golden_folder, golden_tensors
from ladder import worst

from zoo.kernels.extended_attention import (
    Part,
    extended_attention,
    extended_attention_reference,
    extended_attention_step,
)
from zoo.kernels.windowed_attention import windowed_attention_reference
from zoo.layers.positions import rotate, rotation_of
from zoo.layers.rope_extension import extended_positions, log_n_scale, reach_bounds

# An empty document first, in the middle and last; one-token documents; one of exactly a block.
CU_SEQLENS = [0, 0, 1, 2, 18, 18, 34, 37, 37]
EXTENSIONS = {
    "rerope": {"type": "rerope", "window": 8},
    "rerope_logn": {"type": "rerope", "window": 8, "log_n_length": 24},
    "leaky": {"type": "leaky_rerope", "window": 8, "factor": 4},
    "leaky_logn": {"type": "leaky_rerope", "window": 8, "factor": 4, "log_n_length": 24},
    "G4W8": {"type": "self_extend", "window": 8, "group_size": 4},
    "G4W8_logn": {"type": "self_extend", "window": 8, "group_size": 4, "log_n_length": 24},
    "G3W8": {"type": "self_extend", "window": 8, "group_size": 3},
    "exact": {"type": "dual_chunk", "chunk_size": 12, "local_window": 4},
}
GOLDENS = {
    "ops-rerope": ["rerope", "rerope_logn", "leaky", "leaky_logn"],
    "ops-self-extend": ["G4W8", "G4W8_logn", "G3W8"],
    "ops-dca": ["exact"],
}
CASES = [(golden, case) for golden, cases in GOLDENS.items() for case in cases]


def turned_parts(q_BTHK, k_BSHK, extension, theta=10000.0):
    """The parts of one document from its start."""
    clock_BT = torch.arange(q_BTHK.shape[1])[None]
    size = q_BTHK.shape[-1]
    angle_K = theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    scale = log_n_scale(extension, clock_BT)
    if scale is not None:
        q_BTHK = q_BTHK * scale
    positions = extended_positions(extension, clock_BT)
    queries = [rotate(q_BTHK, *rotation_of(x, angle_K)) for x in positions.queries]
    keys = [rotate(k_BSHK, *rotation_of(x, angle_K)) for x in positions.keys]
    keys = keys * (len(queries) // len(keys))
    reaches, bounds = (*positions.reaches, None), (*reach_bounds(extension), None)
    return [Part(*x) for x in zip(queries, keys, reaches, bounds, strict=True)]


def definition(q, k, v, extension, theta=10000.0):
    """Query by query and key by key, from the equations, one head of each."""
    size, length = q.shape[-1], q.shape[0]
    angle = theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)

    def turned(x, position):
        a, b = x[: size // 2], x[size // 2 :]
        cos, sin = (position * angle).cos(), (position * angle).sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin])

    def relative(n, m):
        d, kind = n - m, extension["type"]
        if kind == "dual_chunk":
            c = extension["chunk_size"]
            s = c - extension["local_window"]
            if n // s == m // s:
                return d
            return (min(n % s + s, c) if n // s - m // s == 1 else min(2 * s - 1, c)) - m % s
        w = extension["window"]
        if d < w:
            return d
        if kind == "rerope":
            return w
        if kind == "leaky_rerope":
            return w + (d - w) / extension["factor"]
        group = extension["group_size"]
        return n // group - m // group + w - w / group

    outputs = []
    for n in range(length):
        base = extension.get("log_n_length")
        factor = 1 if base is None else max(1, math.log(n + 1) / math.log(base))
        scores = [
            turned(q[n] * factor, relative(n, m)) @ k[m] / math.sqrt(size) for m in range(n + 1)
        ]
        outputs.append(torch.stack(scores).softmax(0) @ v[: n + 1])
    return torch.stack(outputs)


@pytest.mark.parametrize("function", [extended_attention, extended_attention_reference])
@pytest.mark.parametrize(("golden", "case"), CASES, ids=[case for _, case in CASES])
def test_official_numbers(golden, case, function):
    tensors = golden_tensors(golden)
    config = json.loads((golden_folder(golden) / "config.json").read_text())
    inputs = [tensors[name].transpose(1, 2).requires_grad_() for name in "qkv"]
    parts = turned_parts(*inputs[:2], EXTENSIONS[case], config["rope_theta"])
    settings = {"block_length": 5} if function is extended_attention else {}
    o_BTHV = function(parts, inputs[2], **settings)
    assert worst([o_BTHV.transpose(1, 2)], [tensors[f"{case}.o"]]) < 1e-9
    grads = torch.autograd.grad(o_BTHV, inputs, tensors["cotangent"].transpose(1, 2))
    expected = [tensors[f"{case}.grad_{name}"].transpose(1, 2) for name in "qkv"]
    assert worst(grads, expected) < 1e-9


@pytest.mark.parametrize(("golden", "case"), CASES, ids=[case for _, case in CASES])
def test_distances_are_the_official_ones(golden, case):
    """Of the part of each pair, its query's position less its key's."""
    name = "relative" if case == "exact" else f"{case.removesuffix('_logn')}.relative"
    tensors = golden_tensors(golden)
    expected = tensors.get(f"{case}.relative", tensors.get(name)).double()
    clock_T = torch.arange(len(expected))
    positions = extended_positions(EXTENSIONS[case], clock_T[None])
    queries = [x[0].double() for x in positions.queries]
    keys = [x[0].double() for x in positions.keys] * (len(queries) // len(positions.keys))
    distance_TS = clock_T[:, None] - clock_T
    found = queries[-1][:, None] - keys[-1]
    for q_T, k_T, reach in reversed(list(zip(queries, keys, positions.reaches))):
        reach_T1 = reach[0][:, None] if torch.is_tensor(reach) else reach
        found = torch.where(distance_TS < reach_T1, q_T[:, None] - k_T, found)
    visible = distance_TS >= 0
    assert (found - expected)[visible].abs().max() < 1e-12


# Older chunks at 2 s - 1, which is less than c; no distance is kept beyond a chunk.
MORE = {
    "dual_chunk, l > s": {"type": "dual_chunk", "chunk_size": 12, "local_window": 8},
    "dual_chunk, l = 0": {"type": "dual_chunk", "chunk_size": 12, "local_window": 0},
    "leaky_rerope, k < 1": {"type": "leaky_rerope", "window": 1, "factor": 0.5},
}


@pytest.mark.parametrize("case", EXTENSIONS | MORE)
def test_query_by_query(case):
    q, k, v = (torch.randn(40, 6, dtype=torch.float64) for _ in range(3))
    one_head = [x[None, :, None] for x in (q, k, v)]
    extension = (EXTENSIONS | MORE)[case]
    o_BTHV = extended_attention_reference(turned_parts(*one_head[:2], extension), one_head[2])
    assert worst([o_BTHV[0, :, 0]], [definition(q, k, v, extension)]) < 1e-12


def random_parts(shape, older, reaches, packed, one_copy):
    """Parts that have nothing to do with each other, and all leaves."""
    generator = torch.Generator().manual_seed(0)
    batch, time, heads, groups, key_dim, value_dim = shape
    batch = 1 if packed else batch

    def normal(*size):
        x = torch.randn(*size, generator=generator, dtype=torch.float64)
        return x.requires_grad_()

    def random_reach(least, most):
        size = batch, time
        return torch.randint(least, most + 1, size, generator=generator)

    keys = [normal(batch, time + older, groups, key_dim) for _ in range(len(reaches) + 1)]
    keys = keys[:1] * len(keys) if one_copy else keys
    queries = [normal(batch, time, heads, key_dim) for _ in keys]
    parts = [
        Part(q, k, reach if isinstance(reach, int) else random_reach(*reach), bounds)
        for q, k, reach, bounds in zip(
            queries, keys, reaches, [None if isinstance(x, int) else x for x in reaches]
        )
    ]
    parts.append(Part(queries[-1], keys[-1]))
    v = normal(batch, time + older, groups, value_dim)
    return parts, v, [*queries, *dict.fromkeys(keys), v]


def run(function, parts, leaves, *arguments, **settings):
    o = function(parts, *arguments, **settings)
    weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [o, *torch.autograd.grad((o * weight).sum(), leaves, materialize_grads=True)]


@pytest.mark.parametrize("layout", ["dense", "older keys", "packed"])
@pytest.mark.parametrize("window", [9, 20, None])
@pytest.mark.parametrize("reaches", [[1], [4], [(1, 4), (5, 8)], [(1, 3), (2, 50)], []], ids=str)
def test_blocks_equal_reference(reaches, window, layout):
    older, packed = 11 if layout == "older keys" else 0, layout == "packed"
    parts, v, leaves = random_parts(
        (2, 37, 6, 2, 5, 7), older, reaches, packed, one_copy=len(reaches) == 2
    )
    settings = {"scale": 0.7}
    if packed:
        settings["cu_seqlens"] = torch.tensor(CU_SEQLENS)
    elif older:
        settings["first_key"] = torch.tensor([0, 5])
    case = parts, leaves, v, window
    expected = run(extended_attention_reference, *case, **settings)
    for block_length in (1, 7, None):
        found = run(extended_attention, *case, **settings, block_length=block_length)
        assert worst(found, expected) < 1e-12


def test_one_part_is_windowed_attention():
    parts, v, _ = random_parts((2, 30, 6, 2, 5, 7), 4, [], False, False)
    expected = windowed_attention_reference(parts[0].q, parts[0].k, v, 9)
    assert worst([extended_attention(parts, v, 9)], [expected]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    """Scores and sums are in float32, so what is lost is the inputs' and the output's rounding."""
    parts, v, _ = random_parts((2, 37, 6, 2, 5, 7), 0, [6], False, False)
    parts = [part._replace(q=part.q.to(dtype), k=part.k.to(dtype)) for part in parts]
    v = v.to(dtype)
    o = extended_attention(parts, v, block_length=8)
    exact = [part._replace(q=part.q.double(), k=part.k.double()) for part in parts]
    assert o.dtype == dtype
    expected = extended_attention_reference(exact, v.double())
    assert worst([o], [expected]) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("one_copy", [True, False])
def test_step_is_the_last_query(one_copy):
    reaches = [(2, 6), (7, 9)]
    parts, v, leaves = random_parts((2, 20, 6, 2, 5, 7), 0, reaches, False, one_copy)
    expected = run(lambda *x: extended_attention_reference(*x)[:, -1:], parts, leaves, v)
    # In any order.
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    last = [
        part._replace(q=part.q[:, -1:], k=part.k[:, order], reach=reach)
        for part, reach in zip(parts, [*(part.reach[:, -1:] for part in parts[:2]), None])
    ]
    if one_copy:
        last = [part._replace(k=last[0].k) for part in last]
    distance = (19 - order).expand(2, -1)
    found = run(extended_attention_step, last, leaves, v[:, order], distance)
    assert worst(found, expected) < 1e-12


@pytest.mark.parametrize("reaches", [[4], [(1, 3), (4, 5)]], ids=str)
def test_step_with_a_few_near_keys(reaches):
    """They say in which slots they lie; there may be more than those within reach."""
    parts, v, leaves = random_parts((2, 20, 6, 2, 5, 7), 0, reaches, False, len(reaches) == 2)
    expected = run(lambda *x: extended_attention_reference(*x)[:, -1:], parts, leaves, v)
    slots = torch.tensor([[17, 15, 18, 16, 19, 14], [16, 19, 18, 17, 15, 2]])
    near_k = parts[0].k[torch.arange(2)[:, None], slots]
    last = [
        part._replace(
            q=part.q[:, -1:],
            reach=part.reach[:, -1:] if torch.is_tensor(part.reach) else part.reach,
        )
        for part in parts
    ]
    last[:-1] = [part._replace(k=near_k, slots=slots) for part in last[:-1]]
    distance = (19 - torch.arange(20)).expand(2, -1)
    found = run(extended_attention_step, last, leaves, v, distance)
    assert worst(found, expected) < 1e-12


def part(reach=None, bounds=None, size=4):
    return Part(torch.zeros(1, 4, 4, size), torch.zeros(1, 4, 2, size), reach, bounds)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([part(3)], "every part but the last has a reach"),
        ([part(), part()], "every part but the last has a reach"),
        ([part(torch.ones(1, 4)), part()], "needs its bounds"),
        ([part(3), part(size=6)], "all parts have q"),
    ],
)
def test_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        extended_attention(parts, torch.zeros(1, 4, 2, 4))
