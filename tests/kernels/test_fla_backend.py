"""The adapters to flash-linear-attention, against stand-ins with its signatures.

The stand-ins compute by our definitions, in fla's argument names and with its defaults, and insist
on what its kernels need. Whether fla itself agrees, test_gpu.py says where it is installed.
"""

import sys
import types

import pytest
import torch
from ladder import values_and_gradients, worst
from test_linear_recurrence import FORMS, arguments

from zoo.kernels import fla_backend
from zoo.kernels.delta_recurrence import delta_recurrence_reference
from zoo.kernels.fla_backend import delta_recurrence_fla, linear_recurrence_fla
from zoo.kernels.linear_recurrence import linear_recurrence_reference


class StandIn:
    """fla's functions; `called` holds the name of the last one."""

    called = None

    def run(self, name, reference, tensors, others, options):
        self.called = name
        scale, initial_state, output_final_state, cu_seqlens = options
        assert len({x.dtype for x in tensors}) == 1
        assert initial_state is None or initial_state.dtype == torch.float32
        assert cu_seqlens is None or cu_seqlens.dtype == torch.int64
        return reference(
            *tensors[:3],
            *others,
            *tensors[3:],
            scale=tensors[1].shape[-1] ** -0.5 if scale is None else scale,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
        )

    def chunk_simple_gla(
        self,
        q,
        k,
        v,
        g=None,
        g_gamma=None,
        scale=None,
        initial_state=None,
        output_final_state=False,
        cu_seqlens=None,
    ):
        assert g is None or (g_gamma is None and g.ndim == 3)
        # It returns no gradient of g_gamma.
        decay = g if g_gamma is None else g_gamma.detach()
        options = scale, initial_state, output_final_state, cu_seqlens
        form = "none" if decay is None else "gamma" if g is None else "g"
        return self.run(form, linear_recurrence_reference, (q, k, v), (decay,), options)

    def chunk_gla(
        self,
        q,
        k,
        v,
        g,
        scale=None,
        initial_state=None,
        output_final_state=False,
        cu_seqlens=None,
    ):
        assert q.shape == k.shape == g.shape
        options = scale, initial_state, output_final_state, cu_seqlens
        return self.run("gla", linear_recurrence_reference, (q, k, v), (g,), options)

    def chunk_rwkv6(
        self,
        r,
        k,
        v,
        w,
        u,
        scale=None,
        initial_state=None,
        output_final_state=False,
        cu_seqlens=None,
    ):
        assert r.shape == k.shape == w.shape

        def reference(*tensors, **options):
            return linear_recurrence_reference(*tensors, bonus=u, **options)

        options = scale, initial_state, output_final_state, cu_seqlens
        return self.run("rwkv6", reference, (r, k, v), (w,), options)

    def chunk_rwkv7(
        self,
        r,
        w,
        k,
        v,
        a,
        b,
        scale=1.0,
        initial_state=None,
        output_final_state=False,
        cu_seqlens=None,
    ):
        assert r.shape == k.shape == w.shape == a.shape == b.shape
        options = scale, initial_state, output_final_state, cu_seqlens
        return self.run("rwkv7", delta_recurrence_reference, (r, k, v, a, b), (w,), options)


@pytest.fixture
def fla(monkeypatch):
    stand_in = StandIn()
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name in ("simple_gla", "gla", "rwkv6", "rwkv7"):
        module = types.ModuleType(f"fla.ops.{name}")
        setattr(module, f"chunk_{name}", getattr(stand_in, f"chunk_{name}"))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(fla_backend, "_is_on_gpu", lambda x: True)
    fla_backend._function.cache_clear()
    yield stand_in
    fla_backend._function.cache_clear()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bonus", [False, True], ids=["plain", "bonus"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("initial", [False, True], ids=["zero", "initial"])
def test_linear_recurrence_maps_to_fla(form, bonus, packed, initial, fla):
    positional, keyword = arguments(form, bonus, packed, initial, dtype=torch.float32)
    if packed:
        keyword["cu_seqlens"] = keyword["cu_seqlens"].int()
    if form == "H" and not bonus:
        positional[3] = positional[3].detach()
    tensors = [x for x in (*positional, *keyword.values()) if torch.is_tensor(x)]
    leaves = [x for x in tensors if x.requires_grad]

    def values(function):
        results = function(*positional, **keyword, output_final_state=True)
        return [*results, *torch.autograd.grad(sum(x.sum() for x in results), leaves)]

    got, expected = values(linear_recurrence_fla), values(linear_recurrence_reference)
    # The same function in the same precision; a repeated decay's gradient is summed otherwise.
    assert worst(got, expected) < 1e-6
    names = {"none": "none", "H": "gamma", "BTH": "g", "BTHK": "gla"}
    assert fla.called == ("rwkv6" if bonus else names[form])


@pytest.mark.parametrize("form", FORMS)
def test_delta_recurrence_maps_to_fla(form, fla):
    (q, k, v, log_decay), keyword = arguments(form, False, False, True, dtype=torch.float32)
    a, b = (
        0.3 * torch.nn.functional.normalize(torch.randn_like(q), dim=-1).requires_grad_()
        for _ in range(2)
    )
    given = [q, k, v, log_decay, a.detach().requires_grad_(), b.detach().requires_grad_()]
    del keyword["bonus"]
    got = values_and_gradients(delta_recurrence_fla, given, keyword)
    expected = values_and_gradients(delta_recurrence_reference, given, keyword)
    assert worst(got, expected) < 1e-6
    assert fla.called == "rwkv7"


def test_dtypes_and_no_final_state(fla):
    """Mixed dtypes meet in the widest, o comes in v's, the default scale is ours, not fla's."""
    (q, k, v, log_decay), _ = arguments("BTH", False, False, False, dtype=torch.float32)
    o, state = linear_recurrence_fla(q, k.bfloat16(), v.bfloat16(), log_decay.bfloat16())
    expected, _ = linear_recurrence_reference(q, k.bfloat16(), v.bfloat16(), log_decay.bfloat16())
    assert (o.dtype, state) == (torch.bfloat16, None)
    assert torch.equal(o, expected)
    o, state = delta_recurrence_fla(q, k.bfloat16(), v.bfloat16(), log_decay, 0.1 * q, 0.1 * k)
    assert (o.dtype, state) == (torch.bfloat16, None)


def test_what_fla_cannot_do_is_refused(fla, monkeypatch):
    (q, k, v, log_decay), _ = arguments("H", False, False, False, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"no gradient of log_decay \[H\].*repeat it"):
        linear_recurrence_fla(q, k, v, log_decay)
    with torch.no_grad():
        linear_recurrence_fla(q, k, v, log_decay)
    with pytest.raises(ValueError, match="float32, bfloat16 or float16, got float64"):
        linear_recurrence_fla(q.double(), k.double(), v.double())
    wide = torch.ones(1, 2, 1, 257)
    with pytest.raises(ValueError, match="K up to 256, got 257"):
        delta_recurrence_fla(wide, wide, wide, None, wide, wide)
    monkeypatch.undo()
    for call in (
        lambda: linear_recurrence_fla(q, k, v),
        lambda: delta_recurrence_fla(q, k, v, None, q, k),
    ):
        with pytest.raises(ValueError, match="needs tensors on a GPU, got cpu; move them"):
            call()


def test_without_fla(monkeypatch):
    monkeypatch.setattr(fla_backend, "_is_on_gpu", lambda x: True)
    monkeypatch.setitem(sys.modules, "fla", None)
    fla_backend._function.cache_clear()
    x = torch.ones(1, 2, 1, 16)
    with pytest.raises(ImportError, match="needs flash-linear-attention"):
        linear_recurrence_fla(x, x, x)
