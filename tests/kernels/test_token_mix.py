"""Token shift and mix: the kernels in Triton's interpreter, beside PyTorch's operations."""

import json

import pytest
import torch

import zoo
from zoo.kernels import token_mix_triton
from zoo.kernels.bench import layer_bytes
from zoo.kernels.launch_triton import recording
from zoo.kernels.token_mix import token_mix

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")

# Rows of a tile are 8: documents of one token, ending with a tile, and over three.
PACKED = [0, 1, 8, 9, 31]
# (B, T, D, N, corrections, what came before, boundaries, of the current one)
CASES = {
    "RWKV-7": (2, 9, 20, 6, False, True, None, False),
    "RWKV-6": (1, 17, 40, 5, True, False, None, False),
    "RWKV-5, packed": (1, 31, 24, 4, False, True, PACKED, True),
    "RWKV-6, packed": (1, 31, 16, 2, True, True, PACKED, False),
    "one token": (3, 1, 16, 1, False, True, None, True),
    "two slices, rows that end in a tile": (3, 5, 264, 2, False, False, None, True),
}


def arguments(case, dtype):
    batch, time, width, streams, corrected, has_before, bounds, of_current = CASES[case]
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    x = {"x": random(batch, time, width), "mu": random(streams, width).sigmoid()}
    if has_before:
        x["before"] = random(batch if bounds is None else len(bounds) - 1, width)
    corrections = [0.1 * random(batch, time, width) for _ in range(streams * corrected)]
    rest = {"of_current": of_current}
    rest |= {"cu_seqlens": None if bounds is None else torch.tensor(bounds)}
    return x, corrections, rest, [random(batch, time, width) for _ in range(streams)]


def results(case, dtype, backend, wide=None):
    """Streams, and gradients of all inputs."""
    x, corrections, rest, cotangents = arguments(case, dtype)
    wide = wide or dtype
    x = {key: value.to(wide).requires_grad_() for key, value in x.items()}
    corrections = [c.to(wide).requires_grad_() for c in corrections]
    streams = token_mix(**x, corrections=corrections, **rest, backend=backend)
    cotangents = [c.to(wide) for c in cotangents]
    return [*streams, *torch.autograd.grad(streams, [*x.values(), *corrections], cotangents)]


def errors(found, exact):
    for x, y in zip(found, exact, strict=True):
        yield ((x.double() - y).norm() / y.norm()).item()


@pytest.mark.parametrize("case", CASES)
def test_equals_pytorchs_operations(case, monkeypatch):
    monkeypatch.setattr(token_mix_triton, "FEWEST_ROWS", 8)
    monkeypatch.setattr(token_mix_triton, "PROGRAMS", 1 / 132)  # one program: two tiles and a rest
    exact = results(case, torch.float32, "torch", torch.float64)
    # Sums of twelve products in float32, and of dmu over 31 tokens.
    assert max(errors(results(case, torch.float32, "triton"), exact)) < 3e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["RWKV-7", "RWKV-6, packed"])
def test_low_precision_is_no_worse_than_pytorchs(case, dtype):
    exact = results(case, dtype, "torch", torch.float64)
    plain, ours = results(case, dtype, "torch"), results(case, dtype, "triton")
    assert [x.dtype for x in ours] == [x.dtype for x in plain]
    # One rounding each; PyTorch's operations round in between.
    bound = torch.finfo(dtype).eps / 2
    for error, other in zip(errors(ours, exact), errors(plain, exact), strict=True):
        assert error <= max(other, bound)


def test_a_stream_that_nobody_needs():
    x, _, _, cotangents = arguments("RWKV-7", torch.float32)
    found = []
    for backend in ("torch", "triton"):
        leaves = [value.clone().requires_grad_() for value in x.values()]
        streams = token_mix(**dict(zip(x, leaves, strict=True)), backend=backend)
        wanted = [streams[n] for n in (1, 4)]
        found.append(torch.autograd.grad(wanted, leaves, cotangents[:2]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_programs_share_the_sums_over_tokens():
    """As shipped: a long text has several programs, each with its share of dmu."""
    x = torch.randn(1, 70, 8)
    mu = torch.rand(1, 8, requires_grad=True)
    with recording() as launches:
        (ours,) = token_mix(x, mu, backend="triton")
        (gradient,) = torch.autograd.grad(ours.sum(), mu)
    assert launches[1].grid == (3, 1)
    (expected,) = token_mix(x, mu, backend="torch")
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), mu)[0])


WRONG = {
    "x is \\[B, T, D\\]": {"x": torch.ones(3, 4)},
    "there are no tokens": {"x": torch.ones(1, 0, 4)},
    "mu is \\[N, D\\]": {"mu": torch.ones(7, 4)},
    "corrections are 2 tensors": {"corrections": [torch.ones(1, 3, 4)]},
    "leave one out": {"corrections": 2 * [torch.ones(1, 3, 4)], "of_current": True},
    "before is \\[R, D\\]": {"before": torch.ones(2, 4)},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_refused(message):
    right = {"x": torch.ones(1, 3, 4), "mu": torch.ones(2, 4)}
    with pytest.raises(ValueError, match=message):
        token_mix(**right | WRONG[message])


@pytest.mark.parametrize("name", ["rwkv5", "rwkv7"])
def test_a_compiled_model_keeps_pytorchs_operations(name, monkeypatch):
    monkeypatch.setattr("zoo.kernels.token_mix.choose_backend", lambda *_: "triton")
    classes = zoo.MODELS[name]
    sizes = {"vocab_size": 9, "hidden_size": 16, "num_hidden_layers": 1, "head_size": 8}
    model = classes.causal_lm(classes.config(**sizes)).eval()
    ids = torch.arange(7)[None]
    with torch.no_grad(), recording() as launches:
        expected = model(ids).logits
        assert [x.name for x in launches] == ["_forward"] * 2
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(ids).logits, expected)
    assert len(launches) == 2


def test_the_count_of_bytes_is_that_on_record():
    """What it says of kernels that are there and of one that is not."""
    found = layer_bytes.count()
    assert found == json.loads(layer_bytes.RESULTS.read_text())
    assert all(x["token mix saves"] >= 0.1 for name, x in found.items() if "rwkv" in name)
    assert all(x["fused would save"] < 0.1 for x in found.values() if "fused would save" in x)
