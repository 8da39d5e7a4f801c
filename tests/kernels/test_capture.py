"""Whether a training step and a decoding step can be captured in a CUDA graph.

Without a GPU what stands in the way is looked for: on tensors without values a value that the host
reads raises, and so does here whatever is copied from the host.
"""

import contextlib
import sys

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import zoo
from zoo.kernels.launch_triton import recording

HAS_GPU = torch.cuda.is_available()
SIZES = {"vocab_size": 40, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
# At a token the host asks these where it stands in its segment, so a step differs from the next.
ASK_WHERE = ("landmark", "block_recurrent", "rmt")
# What they hold does not grow with the text: one captured step serves all tokens.
CONSTANT = ("retnet", "rwkv4", "rwkv5", "rwkv6", "rwkv7", "gated_deltanet", "lightning")

gpu_only = pytest.mark.skipif(not HAS_GPU, reason="this torch sees no GPU")


class NothingFromTheHost(TorchDispatchMode):
    """Copies of tensors from the CPU to the device raise."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = [x for x in args if torch.is_tensor(x) and x.ndim]
        if torch.is_tensor(result) and result.device.type == "meta":
            assert all(x.device.type == "meta" for x in given), function
        return result


class NothingBuiltOnTheHost(TorchFunctionMode):
    """And so do tensors from Python's numbers."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if getattr(function, "__name__", "") in ("tensor", "as_tensor", "new_tensor"):
            assert result.device.type != "meta", "a tensor is built of the host's numbers"
        return result


def small(name):
    torch.manual_seed(0)
    classes = zoo.MODELS[name]
    return classes.causal_lm(classes.config(**SIZES))


def ids_of(model, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 40, (2, length), generator=generator).to(model.device)


@pytest.fixture
def without_values(monkeypatch):
    """A function that makes a model whose tensors have none; it takes the road of a GPU's.

    From then on nothing may come from the host, and launches are left out.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith("zoo.kernels.") and hasattr(module, "choose_backend"):
            monkeypatch.setattr(module, "choose_backend", lambda *_: "triton")
    # Autocast does not know this kind of device.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)

    def make(name):
        model = small(name).to("meta")
        for manager in (recording(run=False), NothingFromTheHost(), NothingBuiltOnTheHost()):
            stack.enter_context(manager)
        return model

    with contextlib.ExitStack() as stack:
        yield make


def ids_without_values(length):
    return torch.empty(2, length, dtype=torch.long, device="meta")


@pytest.mark.parametrize("name", zoo.MODELS)
def test_nothing_stands_in_the_way_of_training(name, without_values):
    model, ids = without_values(name).train(), ids_without_values(80)
    model(ids, labels=ids).loss.backward()


@pytest.mark.parametrize("name", [name for name in zoo.MODELS if name not in ASK_WHERE])
def test_nothing_stands_in_the_way_of_decoding(name, without_values):
    model = without_values(name).eval()
    with torch.no_grad():
        cache = model(ids_without_values(80), use_cache=True).past_key_values
        for _ in range(2):
            model(ids_without_values(1), past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("name", ASK_WHERE)
def test_what_asks_where_it_stands(name, without_values):
    """The list above holds no more than it must."""
    model = without_values(name).eval()
    with torch.no_grad():
        cache = model(ids_without_values(80), use_cache=True).past_key_values
        with pytest.raises(RuntimeError, match="meta"):
            model(ids_without_values(1), past_key_values=cache, use_cache=True)


def captured(function):
    """(a graph of what a function does, what it returned), after runs that compile and choose."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


def close(got, expected):
    return (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.gpu
@gpu_only
@pytest.mark.parametrize("name", zoo.MODELS)
def test_a_captured_training_step(name):
    """Loss and gradients of other tokens than it was captured with."""
    model = small(name).train().cuda()
    static = ids_of(model, 80)

    def step():
        loss = model(static, labels=static).loss
        loss.backward()
        return loss

    # Gradients are made anew in the graph's memory, and written at each replay.
    def step_from_nothing():
        model.zero_grad(set_to_none=True)
        return step()

    graph, loss = captured(step_from_nothing)
    static.copy_(ids_of(model, 80, seed=1))
    graph.replay()
    got = [loss.detach().clone(), *(p.grad.clone() for p in model.parameters())]
    expected = [step_from_nothing().detach(), *(p.grad for p in model.parameters())]
    for a, b in zip(got, expected, strict=True):
        assert close(a, b)


@pytest.mark.gpu
@gpu_only
@pytest.mark.parametrize("name", CONSTANT)
@torch.no_grad()
def test_a_captured_decoding_step(name):
    """One graph for every token: it takes the state where it left it."""
    model = small(name).eval().cuda()
    prompt, tokens = ids_of(model, 33), ids_of(model, 6, seed=1)
    cache = model(prompt, use_cache=True).past_key_values
    expected = [
        model(tokens[:, n : n + 1], past_key_values=cache, use_cache=True).logits for n in range(6)
    ]
    cache = model(prompt, use_cache=True).past_key_values
    places = [(dict(layer.tensors), layer.clock) for layer in cache.layers]
    places = [({k: x.clone() for k, x in t.items()}, clock.clone()) for t, clock in places]
    before = [({k: x.clone() for k, x in t.items()}, clock.clone()) for t, clock in places]
    token = tokens[:, :1].clone()

    def step():
        for layer, (tensors, clock) in zip(cache.layers, places, strict=True):
            layer.tensors, layer.clock = dict(tensors), clock
        logits = model(token, past_key_values=cache, use_cache=True).logits
        for layer, (tensors, clock) in zip(cache.layers, places, strict=True):
            for key, place in tensors.items():
                place.copy_(layer.tensors[key])
            clock.copy_(layer.clock)
        return logits

    graph, logits = captured(step)
    for (tensors, clock), (old, old_clock) in zip(places, before, strict=True):
        for key, place in tensors.items():
            place.copy_(old[key])
        clock.copy_(old_clock)
    for n in range(6):
        token.copy_(tokens[:, n : n + 1])
        graph.replay()
        assert close(logits, expected[n])
