"""Products by oneDNN: which passes take them, that they are the same, and who is left alone."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo.core import onednn
from zoo.kernels import autograd_rules, host_products

WIDTH = 384  # 384^2 numbers are worth it in a step
IDS = torch.arange(12).view(2, 6)

pytestmark = pytest.mark.skipif(
    not host_products._is_what_we_know(), reason="this PyTorch was built without oneDNN"
)


@pytest.fixture
def calls(monkeypatch):
    """Products by oneDNN, on whatever processor this is."""
    own, calls = onednn.product, []

    def counted(*args):
        calls.append(args[1].shape)
        return own(*args)

    monkeypatch.setattr(onednn, "is_faster_here", lambda: True)
    monkeypatch.setattr(onednn, "product", counted)
    return calls


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = zoo.RetNetConfig(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=400,
        intermediate_size=400,
    )
    return zoo.RetNetForCausalLM(config).eval()


def reference(model, **kwargs):
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        return model(IDS, **kwargs).logits


def assert_equal(found, expected):
    """Within rounding of float32: sums of 400 numbers, some of them one after the other."""
    assert (found - expected).norm() <= 3e-6 * expected.norm()


def test_a_pass_and_its_steps_take_them(model, calls):
    expected = reference(model)
    assert calls == []
    with torch.no_grad():
        assert_equal(model(IDS).logits, expected)
        in_pass = len(calls)
        linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
        assert in_pass == sum(m.weight.numel() * IDS.numel() >= 1 << 17 for m in linear) > 5
        cache = None
        for t in range(IDS.shape[1]):
            output = model(IDS[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            assert_equal(output.logits[:, 0], expected[:, t])
    assert len(calls) == in_pass * (1 + IDS.shape[1])
    with torch.inference_mode():
        assert_equal(model(IDS).logits, expected)
    assert len(calls) == in_pass * (2 + IDS.shape[1])


def test_the_mode_is_left_after_an_error(model, calls, monkeypatch):
    def fails(*args):
        raise RuntimeError("on the way")

    monkeypatch.setattr(onednn, "product", fails)
    with torch.no_grad(), pytest.raises(RuntimeError, match="on the way"):
        model(IDS)
    monkeypatch.undo()
    with torch.no_grad():
        F.linear(torch.ones(1, WIDTH), torch.ones(WIDTH, WIDTH))  # would fail again


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_left_alone(model, calls, dtype):
    with torch.no_grad():
        copy.deepcopy(model).to(dtype)(IDS)
    assert calls == []


def test_small_models_are_left_alone(calls):
    config = zoo.RetNetConfig(hidden_size=32, num_hidden_layers=1, vocab_size=5000)
    with torch.no_grad():
        zoo.RetNetForCausalLM(config)(IDS)
    assert calls == []


def test_gradients_are_pytorchs(model, calls):
    model(IDS, labels=IDS).loss.backward()
    model.zero_grad()
    with torch.no_grad(), torch.enable_grad():
        model(IDS)

    def project():
        with torch.enable_grad():  # someone's hook
            return model.lm_head(torch.ones(1, 1, WIDTH))

    with torch.no_grad():
        assert onednn.run_by_onednn(project, torch.ones(1, 1, WIDTH), WIDTH).requires_grad
    assert calls == []


def test_autocast_is_kept(model, calls):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model.lm_head(torch.ones(1, 1, WIDTH)).dtype == torch.bfloat16
        model(IDS)
    assert calls == []


def test_who_counts_operations_sees_them(model, calls):
    def flops():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(IDS)
        return counter.get_total_flops()

    with torch.backends.mkldnn.flags(enabled=False):
        expected = flops()
    assert flops() == expected > 0
    assert calls == []


def test_who_differentiates_forward_is_left_alone(model, calls):
    x = torch.randn(1, 2, WIDTH)
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        assert forward_ad.unpack_dual(model.lm_head(dual)).tangent is not None
        onednn.run_by_onednn(lambda: model.lm_head(dual), x, WIDTH)
    with torch.no_grad():
        each = torch.vmap(lambda x: onednn.run_by_onednn(lambda: model.lm_head(x), x, WIDTH))(x)
    assert_equal(each, model.lm_head(x))
    assert calls == []


class Head(torch.nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        return onednn.run_by_onednn(lambda: self.head(x), x, WIDTH)


def test_what_is_compiled_or_traced_has_pytorchs(model, calls):
    expected = reference(model)
    with torch.no_grad():
        assert_equal(torch.compile(model, backend="eager", fullgraph=True)(IDS).logits, expected)
        program = torch.export.export(model, (IDS,), {"use_cache": False}, strict=False)
        traced = torch.jit.trace(Head(model.lm_head), torch.ones(1, 1, WIDTH), check_trace=False)
    assert calls == []
    assert "mkldnn" not in str(program.graph) + str(traced.inlined_graph)


def test_a_compiled_part_is_compiled_once(model, calls):
    """A layer that is compiled by itself, with the rest as it is."""
    expected, graphs = reference(model), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    model = copy.deepcopy(model)
    model.model.layers[0].mlp = torch.compile(
        model.model.layers[0].mlp, backend=backend, fullgraph=True
    )
    with torch.no_grad():
        for _ in range(3):
            assert_equal(model(IDS).logits, expected)
    assert len(graphs) == 1
    assert "mkldnn" not in str(graphs[0].graph)
    assert calls


def test_weights_that_are_more_than_numbers_are_left_alone(model, calls):
    class Weight(torch.Tensor):
        pass

    weight = model.lm_head.weight.detach().as_subclass(Weight)
    with torch.no_grad():
        hidden = torch.ones(1, 400, WIDTH)
        project = lambda: F.linear(hidden, weight)  # noqa: E731
        assert type(onednn.run_by_onednn(project, hidden, WIDTH)) is Weight
        assert calls == []
        other = torch.ones(WIDTH, 800)[:, ::2].T
        onednn.run_by_onednn(lambda: F.linear(hidden, other), hidden, WIDTH)
    assert calls == []


def test_the_transpose_of_a_weight_has_rows_enough(calls):
    """Of few rows MKL is faster with it."""
    rows, transposed = torch.ones(1, 8, WIDTH), torch.eye(WIDTH, 400).T
    with torch.no_grad():
        expected = F.linear(rows, transposed)
        for count in (7, 8):
            few = rows[:, :count]
            y = onednn.run_by_onednn(lambda few=few: F.linear(few, transposed), few, WIDTH)
            torch.testing.assert_close(y, expected[:, :count])
            assert len(calls) == (count == 8)


def test_a_model_is_pickled_as_before(model):
    assert b"onednn" not in pickle.dumps(model)


@pytest.mark.parametrize(
    ("capability", "processor", "is_faster"),
    [
        ("AVX512", "vendor_id : AuthenticAMD", True),
        ("AVX512", "AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD", True),
        ("AVX2", "vendor_id : AuthenticAMD", False),
        ("AVX512", "vendor_id : GenuineIntel", False),
        ("AVX512", "", False),
    ],
)
def test_where_it_is_faster(monkeypatch, capability, processor, is_faster):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(host_products, "_processor", lambda: processor)
    assert host_products.is_faster_here.__wrapped__() is is_faster


def test_an_operator_that_has_changed_is_not_taken(monkeypatch):
    assert host_products._is_what_we_know()
    for changed in (lambda x, weight, bias: x @ weight.T, lambda x: x, None):
        monkeypatch.setattr(host_products, "product", changed)
        assert not host_products._is_what_we_know()


def test_a_pytorch_that_no_longer_says_who_follows(monkeypatch):
    """Then everyone may: the ordinary operations run."""
    assert autograd_rules.by_autograd_alone()
    monkeypatch.delattr(torch._C, "_are_functorch_transforms_active")
    monkeypatch.setattr(autograd_rules, "_followers", autograd_rules._all_followers())
    assert not autograd_rules.by_autograd_alone()
