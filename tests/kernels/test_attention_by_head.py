"""Attention by head on a CPU: who takes it, and that it is the same."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo.kernels import attention_by_head as module
from zoo.kernels import dilated_attention, host_products
from zoo.kernels import windowed_attention as windowed
from zoo.kernels.dilated_attention import dilated_attention_reference
from zoo.kernels.windowed_attention import windowed_attention, windowed_attention_reference
from zoo.layers import compressive_memory, recurrent_cell, relative_scores

PACKED = torch.tensor([0, 1, 1, 38, 60])
pytestmark = pytest.mark.skipif(
    not host_products._is_what_we_know(), reason="this PyTorch was built without oneDNN"
)


def counted(calls, name, run):
    def counting(*args, **kwargs):
        calls.append(name)
        return run(*args, **kwargs)

    return counting


@pytest.fixture
def calls(monkeypatch):
    """Calls of both passes, of any size and on any processor, in blocks of 16 queries."""
    calls = []
    monkeypatch.setattr(module, "is_faster_here", lambda: True)
    monkeypatch.setattr(module, "BLOCK", 16)
    for name in ("LEAST_QUERIES", "LEAST_WIDTH"):
        monkeypatch.setattr(module, name, 8)
    for owner in (module, dilated_attention):
        for name in ("attend", "attend_gradients"):
            run = getattr(owner, name)
            monkeypatch.setattr(owner, name, counted(calls, name, run))
    return calls


def inputs(dtype=torch.float32, rows=2, time=60, heads=4, groups=2, width=8):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(rows, time, n, width, generator=generator, dtype=torch.float64).to(dtype)
        for n in (heads, groups, groups)
    ]


def values_and_gradients(function, x, *args, **keyword):
    x = [value.detach().clone().requires_grad_() for value in x]
    o = function(*x, *args, **keyword)
    cotangent = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(o.dtype)
    return [o.detach(), *torch.autograd.grad(o, x, cotangent)]


def errors(found, exact):
    return [
        ((x.double() - right).norm() / right.norm()).item()
        for x, right in zip(found, exact, strict=True)
    ]


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("cu_seqlens", [None, PACKED], ids=["dense", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_attention(calls, dtype, cu_seqlens, groups):
    """As precise as blocks of queries by PyTorch's operations."""
    x = inputs(dtype, rows=2 if cu_seqlens is None else 1, groups=groups)
    keyword = {"cu_seqlens": cu_seqlens, "scale": 0.3}
    exact = values_and_gradients(windowed_attention_reference, [y.double() for y in x], **keyword)
    blocks = values_and_gradients(windowed_attention, x, block_length=32, **keyword)
    assert calls == []
    found = values_and_gradients(windowed_attention, x, **keyword)
    documents = 1 if cu_seqlens is None else 2  # those of 8 queries or more
    assert calls == ["attend"] * documents + ["attend_gradients"] * documents
    assert [y.dtype for y in found] == [dtype] * 4
    for error, allowed in zip(errors(found, exact), errors(blocks, exact), strict=True):
        assert error <= (2 if dtype == torch.float32 else 1.02) * allowed
    with torch.no_grad():
        assert torch.equal(windowed_attention(*x, **keyword), found[0])


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("decay", [False, True])
def test_dilated_attention(calls, monkeypatch, decay, weights):
    """Queries that are the last of more slots, and a softmax of which these keys are a part."""
    monkeypatch.setattr(dilated_attention, "_block_size", lambda rate: 24)
    x, branches = inputs(time=90, groups=4), ([16, 64, 128], [1, 2, 4])
    keyword = {"weight_gradient": weights}
    if decay:
        keyword["log_decay"] = -torch.linspace(0.001, 0.05, 8)
    wide = [y.double() for y in x]
    own = dict(keyword, **({"log_decay": keyword["log_decay"].double()} if decay else {}))
    exact = values_and_gradients(dilated_attention_reference, wide, *branches, **own)
    found = values_and_gradients(dilated_attention.dilated_attention, x, *branches, **keyword)
    assert calls.count("attend") == calls.count("attend_gradients") > 2
    assert max(errors(found, exact)) < 1e-6


def test_gradients_of_gradients(calls):
    def penalty(**keyword):
        x = [y.requires_grad_() for y in inputs()]
        o = windowed_attention(*x, **keyword)
        gradients = torch.autograd.grad(o.square().sum(), x, create_graph=True)
        return torch.autograd.grad(sum(y.square().sum() for y in gradients), x)

    for one, other in zip(penalty(), penalty(block_length=32), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert calls == ["attend", "attend_gradients"]  # the last one is of o itself


def test_a_frozen_operand(calls):
    q, k, v = inputs()
    o = windowed_attention(q, k.requires_grad_(), v)
    (found,) = torch.autograd.grad(o.sum(), k)
    (expected,) = torch.autograd.grad(windowed_attention(q, k, v, block_length=32).sum(), k)
    torch.testing.assert_close(found, expected)
    assert calls == ["attend", "attend_gradients"]


def test_scores_that_no_exponential_holds(calls):
    q, k, v = inputs()
    found = windowed_attention(q * 100, k * 100, v)
    torch.testing.assert_close(found, windowed_attention_reference(q * 100, k * 100, v))
    assert calls == ["attend"]


def test_who_is_left_alone(calls, monkeypatch):
    x = inputs()
    windowed_attention(*inputs(torch.float64))
    windowed_attention(*inputs(time=7))
    windowed_attention(*inputs(width=4))
    with FlopCounterMode(display=False) as counter:
        windowed_attention(*x)
    assert counter.get_total_flops() > 0
    torch.compile(windowed_attention, backend="eager", fullgraph=True)(*x)
    with torch.backends.mkldnn.flags(enabled=False):
        windowed_attention(*x)
    monkeypatch.setattr(module, "MOST_KEYS", 59)
    windowed_attention(*x)
    monkeypatch.setattr(module, "MOST_KEYS", 60)
    monkeypatch.setattr(module, "is_faster_here", lambda: False)
    windowed_attention(*x)
    assert calls == []


@pytest.mark.parametrize("heads", [4, 2], ids=["own", "shared"])
@pytest.mark.parametrize("logits", [None, "head", "query"])
@pytest.mark.parametrize("bias", [None, "distance", "query"])
def test_blocks_of_queries(calls, monkeypatch, bias, logits, heads):
    """Without gradients, whatever is added to scores; with a delay the first query sees nothing."""
    monkeypatch.setattr(windowed, "attend_block", counted(calls, "block", module.attend_block))
    monkeypatch.setattr(windowed, "LEAST_IN_BLOCK", 8)
    x = inputs(groups=heads)
    keyword = {"first_key": torch.tensor([0, 3]), "block_length": 16, "scale": 0.3}
    generator = torch.Generator().manual_seed(2)
    if logits is not None:
        shape = (4,) if logits == "head" else (2, 60, 4)
        keyword["sink_logits"] = torch.randn(shape, generator=generator)
        keyword["delay"] = 1
    if bias == "distance":
        keyword["distance_bias"] = torch.randn(4, 20, generator=generator)
    elif bias == "query":
        table = torch.randn(2, 4, 60, 60, generator=generator)
        keyword["query_bias"] = lambda rows, d: table[:, :, rows[..., None], d]
    expected = windowed_attention(*(y.requires_grad_() for y in x), 20, **keyword).detach()
    assert calls == []
    with torch.no_grad():
        found = windowed_attention(*x, 20, **keyword)
    assert calls == ["block"] * 4
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_scores_of_distances(calls, monkeypatch):
    """Transformer-XL's, which without gradients are made by head and moved to their keys."""
    monkeypatch.setattr(relative_scores, "LEAST_IN_BLOCK", 8)
    made = counted(calls, "scores", relative_scores.padded_scores)
    monkeypatch.setattr(relative_scores, "padded_scores", made)
    q, r = inputs()[0], inputs(rows=1, time=30, groups=4)[1][0]
    expected = relative_scores.band_scores(q.requires_grad_(), torch.arange(9, 25), r, 40).detach()
    assert calls == []
    with torch.no_grad():
        found = relative_scores.band_scores(q, torch.arange(9, 25), r, 40)
    seen = torch.ones(16, 40).tril(24).bool()
    assert calls == ["scores"]
    torch.testing.assert_close(found[..., seen], expected[..., seen], rtol=1e-5, atol=1e-6)


def test_states_look_at_all(calls):
    """Block-Recurrent's, which are not causal."""

    def written_out(q, k, v):
        return recurrent_cell._look_written_out(q, k, v)

    generator = torch.Generator().manual_seed(0)
    shapes = (2, 40, 4, 8), (2, 70, 4, 8), (2, 70, 4, 8)
    x = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    exact = values_and_gradients(recurrent_cell.look, x)
    assert calls == []
    found = values_and_gradients(recurrent_cell.look, [y.float() for y in x])
    assert calls == ["attend", "attend_gradients"]
    assert max(errors(found, exact)) < 1e-6
    assert max(errors(values_and_gradients(written_out, x), exact)) < 1e-12


def test_segments_of_a_memory(calls):
    """Infini-attention's, which are causal, in a model and with gradients."""
    config = zoo.InfiniConfig(
        vocab_size=20,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        segment_length=24,
    )
    torch.manual_seed(0)
    model, ids = zoo.InfiniForCausalLM(config), torch.arange(48)[None] % 20
    found = torch.autograd.grad(model(ids, labels=ids).loss, [*model.parameters()])
    assert calls == ["attend"] * 2 + ["attend_gradients"] * 2
    exact = copy.deepcopy(model).double()
    exact = torch.autograd.grad(exact(ids, labels=ids).loss, [*exact.parameters()])
    assert max(errors(found, exact)) < 1e-4


def test_features_are_elu_plus_one():
    x = torch.tensor([-90.0, -20.0, -1e-9, -0.0, 0.0, 1e-9, 3.0, torch.inf, torch.nan])
    x.requires_grad_()
    found = compressive_memory.feature_map(x)
    wanted = torch.where(x > 0, x + 1, x.clamp(max=0).exp())
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    one, other = (torch.autograd.grad(y[:7].sum(), x)[0] for y in (found, wanted))
    assert torch.equal(one[:8], other[:8])
    x = torch.randn(20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(compressive_memory.feature_map, x)
    assert torch.autograd.gradgradcheck(compressive_memory.feature_map, x)
