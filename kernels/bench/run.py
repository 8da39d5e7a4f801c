"""Times the operators on a GPU, beside flash-linear-attention and PyTorch's attention.

    make gpu                                            the GPU tests, then all of this
    python kernels/bench/run.py --only RWKV --minutes 4
    python kernels/bench/run.py --tune                  segments, slices and stages of the scan
    python kernels/bench/run.py --table                 README.md's tables and plot, from results/

What is measured, and how: README.md beside this file. Results go to results/<device>.json after
every case. Nothing is timed before it was compared with float64, and what is wrong is not timed.
"""

import argparse
import contextlib
import importlib
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from zoo.kernels.delta_recurrence import delta_recurrence, delta_recurrence_chunked
from zoo.kernels.dilated_attention import dilated_attention
from zoo.kernels.linear_recurrence import linear_recurrence, linear_recurrence_chunked
from zoo.kernels.wkv4 import wkv4, wkv4_chunked

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
README = HERE / "README.md"
PLOT = RESULTS / "ratios.svg"

# Largest accepted ||x - reference|| / ||reference||, for values and gradients. Products of bfloat16
# are off by 2e-3 to 8e-3; gradients of decays are small differences of large sums.
LIMIT, DECAY_LIMIT = 2e-2, 5e-2
# Beyond this many tokens attention, quadratic in them, would eat the time of everything else.
ATTENTION_TOKENS = 16384
# RWKV-7's log decay is -exp(-1/2) times a sigmoid. fla's layer promises it this bound.
RWKV7_LOWEST = -math.exp(-0.5)


class Workload(NamedTuple):
    """One shape of one operator, with everything that runs it.

    Attributes:
        inputs: tensors by name.
        learned: names of those whose gradients training needs.
        contenders: functions of the inputs as keywords, to the output; "ours" is the first.
        reference: the same in plain PyTorch, for any dtype.
        few: the first two heads (64 channels, of wkv4) of an input, its gradient or "o", by name.
        floors: (bytes, FLOPs) that no implementation can avoid, by mode.
    """

    inputs: dict[str, torch.Tensor]
    learned: tuple[str, ...]
    contenders: dict[str, Callable]
    reference: Callable
    few: Callable[[str, torch.Tensor], torch.Tensor]
    floors: dict[str, tuple[int, int]]


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


class Random:
    """Reproducible inputs on a device."""

    def __init__(self, device, dtype):
        self.generator = torch.Generator(device).manual_seed(0)
        self.device, self.dtype = device, dtype

    def normal(self, *shape, dtype=None):
        return torch.randn(
            shape, generator=self.generator, device=self.device, dtype=dtype or self.dtype
        )


def setting(device, is_tiny, *shape):
    """(random inputs, sizes, keywords of our operators); tiny ones run on a CPU in a test."""
    if is_tiny:
        return Random(device, torch.float32), [min(n, 16) for n in shape], {"backend": "torch"}
    return Random(device, torch.bfloat16), shape, {}


def fla_function(module, name):
    """A function of flash-linear-attention, or None where that is not installed."""
    if importlib.util.find_spec("fla") is None:
        return None
    return getattr(importlib.import_module(f"fla.ops.{module}"), name)


def two_heads(name, x):
    """The first two heads of a tensor [B, T, H, ...], [H, ...] or a state [N, H, K, V]."""
    axis = 1 if name == "state" else 2 if x.ndim > 2 else 0
    return x.narrow(axis, 0, min(2, x.shape[axis]))


def linear(form, batch, tokens, heads, key_dim, value_dim=None, bonus=False):
    """A maker of `linear_recurrence` workloads: a decay "H", "BTH" or "BTHK"."""

    def make(device, is_tiny):
        shape = batch, tokens, heads, key_dim, value_dim or key_dim
        random, (b, t, h, k_dim, v_dim), how = setting(device, is_tiny, *shape)
        float32 = torch.float32
        inputs = {
            "q": random.normal(b, t, h, k_dim) * k_dim**-0.5,
            "k": random.normal(b, t, h, k_dim),
            "v": random.normal(b, t, h, v_dim),
        }
        if form == "H":
            # Retention's heads; in float32 those after the 24th do not decay at all.
            exponent = -5.0 - torch.arange(h, device=device, dtype=float32)
            inputs["log_decay"] = (1 - 2.0**exponent).log()
        else:
            gate = (b, t, h) if form == "BTH" else (b, t, h, k_dim)
            inputs["log_decay"] = F.logsigmoid(random.normal(*gate, dtype=float32) + 3)
        if bonus:
            inputs["bonus"] = random.normal(h, k_dim, dtype=float32)

        def ours(**x):
            return linear_recurrence(**x, **how)[0]

        others = {}
        if form == "H":
            if function := fla_function("retention", "chunk_retention"):
                others["fla"] = lambda q, k, v, log_decay: function(q, k, v, scale=1.0)[0]
            # The same kernels without building the decays on the host in every call.
            if cached := fla_function("simple_gla", "chunk_simple_gla"):
                others["fla, decays kept"] = lambda q, k, v, log_decay: cached(
                    q, k, v, g_gamma=log_decay, scale=1.0
                )[0]
            if k_dim == v_dim and t <= ATTENTION_TOKENS:
                others["attention"] = attention
        elif form == "BTH":
            if function := fla_function("simple_gla", "chunk_simple_gla"):
                others["fla"] = lambda q, k, v, log_decay: function(
                    q, k, v, g=log_decay, scale=1.0
                )[0]
        elif bonus:
            if function := fla_function("rwkv6", "chunk_rwkv6"):
                others["fla"] = lambda q, k, v, log_decay, bonus: function(
                    q, k, v, log_decay, bonus, scale=1.0
                )[0]
        elif function := fla_function("gla", "chunk_gla"):
            others["fla"] = lambda q, k, v, log_decay: function(q, k, v, log_decay, scale=1.0)[0]

        gate_bytes = 4 * inputs["log_decay"].numel() if form != "H" else 0
        width, size = b * t * h, inputs["q"].element_size()
        forward = width * size * 2 * (k_dim + v_dim) + gate_bytes
        backward = width * size * (4 * k_dim + 3 * v_dim) + 2 * gate_bytes
        chunk = 64
        forward_flops = width * (2 * chunk * (k_dim + v_dim) + 4 * k_dim * v_dim)
        backward_flops = width * (10 * k_dim * v_dim + 6 * chunk * k_dim + 4 * chunk * v_dim)
        return Workload(
            inputs,
            tuple(name for name in inputs if name != "log_decay" or form != "H"),
            {"ours": ours, **others},
            lambda **x: linear_recurrence_chunked(**x)[0],
            two_heads,
            {
                "forward": (forward, forward_flops),
                "training": (forward + backward, forward_flops + backward_flops),
            },
        )

    return make


def attention(q, k, v, log_decay):
    """Causal softmax attention of the same shape: another function, for the scale of things."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


# Not the same function: nothing to compare with, and no part in the comparison of results.
OTHER_FUNCTIONS = {"attention"}


def rwkv7(batch, tokens, heads, width):
    """A maker of RWKV-7's recurrence."""

    def make(device, is_tiny):
        random, (b, t, h, d), how = setting(device, is_tiny, batch, tokens, heads, width)
        key = F.normalize(random.normal(b, t, h, d, dtype=torch.float32), dim=-1)
        rate = torch.sigmoid(random.normal(b, t, h, d, dtype=torch.float32))
        gate = torch.sigmoid(random.normal(b, t, h, d, dtype=torch.float32))
        inputs = {
            "q": random.normal(b, t, h, d) * d**-0.5,
            "k": random.normal(b, t, h, d),
            "v": random.normal(b, t, h, d),
            "log_decay": RWKV7_LOWEST * gate,
            "a": -key.to(random.dtype),
            "b": (key * rate).to(random.dtype),
        }
        contenders = {"ours": lambda **x: delta_recurrence(**x, **how)[0]}
        if function := fla_function("rwkv7", "chunk_rwkv7"):
            contenders["fla"] = lambda q, k, v, log_decay, a, b: function(
                q, log_decay, k, v, a, b, lower_bound=RWKV7_LOWEST
            )[0]
        positions, size = b * t * h * d, inputs["q"].element_size()
        # q, k, v, a, b and o; then those, the output's gradient and the five gradients.
        forward, backward = positions * (6 * size + 4), positions * (11 * size + 8)
        flops = positions * 8 * d
        return Workload(
            inputs,
            tuple(inputs),
            contenders,
            lambda **x: delta_recurrence_chunked(**x)[0],
            two_heads,
            {"forward": (forward, flops), "training": (forward + backward, 3 * flops)},
        )

    return make


def rwkv4(batch, tokens, width):
    """A maker of RWKV-4's wkv."""

    def make(device, is_tiny):
        random, (b, t, d), how = setting(device, is_tiny, batch, tokens, width)
        time_decay = random.normal(d, dtype=torch.float32)
        inputs = {
            "w": -time_decay.exp(),
            "u": random.normal(d, dtype=torch.float32),
            "k": random.normal(b, t, d),
            "v": random.normal(b, t, d),
        }
        contenders = {"ours": lambda **x: wkv4(**x, **how)[0]}
        if function := fla_function("rwkv4", "fused_recurrent_rwkv4"):
            empty = torch.zeros(b, 3, 1, d, device=device)
            empty[:, 2] = -1e38

            def theirs(w, u, k, v):
                # It takes the logarithm of our decay; the gradient passes through.
                return function((-w).log(), u, k, v, empty)[0]

            contenders["fla"] = theirs
        positions, size = b * t * d, inputs["k"].element_size()
        return Workload(
            inputs,
            tuple(inputs),
            contenders,
            lambda **x: wkv4_chunked(**x)[0],
            lambda name, x: x[..., :64],
            {"forward": (3 * size * positions, 0), "training": (8 * size * positions, 0)},
        )

    return make


def longnet(batch, tokens, heads, width):
    """A maker of LongNet's dilated attention; offsets by head, so that two heads stand for all."""
    lengths, rates = [2048 << n for n in range(5)], [1 << n for n in range(5)]

    def make(device, is_tiny):
        random, (b, t, h, d), how = setting(device, is_tiny, batch, tokens, heads, width)
        inputs = {name: random.normal(b, t, h, d) for name in "qkv"}
        segments = [w // 512 if is_tiny else w for w in lengths]
        branches = {"segment_lengths": segments, "dilation_rates": rates, "offsets": "modulo"}
        positions, size = b * t * h, inputs["q"].element_size()
        # Each query of a branch, one in r, sees half of w / r keys on average.
        pairs = positions * sum(min(w, t) / (2 * r * r) for w, r in zip(segments, rates))
        traffic, flops = positions * d * size, int(4 * d * pairs)
        return Workload(
            inputs,
            tuple(inputs),
            {
                "ours": lambda **x: dilated_attention(**x, **branches, **how),
                "attention": lambda q, k, v: attention(q, k, v, None),
            },
            lambda **x: dilated_attention(**x, **branches, backend="torch"),
            two_heads,
            {"forward": (4 * traffic, flops), "training": (11 * traffic, 7 * flops // 2)},
        )

    return make


def decode(batch, heads, width):
    """A maker of one token of a retention for each of `batch` rows."""

    def make(device, is_tiny):
        random, (b, h, d), how = setting(device, is_tiny, batch, heads, width)
        exponent = -5.0 - torch.arange(h, device=device, dtype=torch.float32)
        inputs = {
            "q": random.normal(b, 1, h, d) * d**-0.5,
            "k": random.normal(b, 1, h, d),
            "v": random.normal(b, 1, h, d),
            "log_decay": (1 - 2.0**exponent).log(),
            "state": random.normal(b, h, d, d, dtype=torch.float32),
        }

        def plain(q, k, v, log_decay, state, **how):
            return linear_recurrence(q, k, v, log_decay, initial_state=state, **how)[0]

        if is_tiny:
            contenders = {"ours": lambda **x: plain(**x, **how)}
        else:
            from zoo.kernels.linear_recurrence_triton import linear_recurrence_step

            contenders = {"ours": lambda **x: linear_recurrence_step(**x, in_place=True)[0]}
        if function := fla_function("simple_gla", "fused_recurrent_simple_gla"):
            contenders["fla"] = lambda q, k, v, log_decay, state: function(
                q,
                k,
                v,
                g_gamma=log_decay,
                scale=1.0,
                initial_state=state,
                output_final_state=True,
            )[0]
        state_bytes = 2 * inputs["state"].numel() * 4
        return Workload(
            inputs,
            (),
            contenders,
            lambda **x: plain(**x, backend="torch"),
            two_heads,
            {"decode": (state_bytes, 0)},
        )

    return make


def retention(*shape):
    """A case of retention with our targets for it."""
    return Case(linear("H", *shape), BOTH, {"forward": 1.5, "training": 2.0})


BOTH = ("forward", "training")
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


class Gpu:
    """Times on a CUDA or ROCm device."""

    def __init__(self, device):
        self.device = device
        properties = torch.cuda.get_device_properties(device)
        self.name = properties.name
        # Several times the L2 cache: what a call reads is not there from the call before.
        self.flushed = torch.empty(1 << 28, dtype=torch.int8, device=device)
        self.flush_seconds = self.elapsed(self.flushed.zero_, 0)
        self.flush_seconds = self.elapsed(self.flushed.zero_, 0)

    def synchronize(self):
        torch.cuda.synchronize(self.device)

    def elapsed(self, function, flushes):
        """Seconds on the device of one call, after the cache was overwritten `flushes` times."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(flushes):
            self.flushed.zero_()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def flushes_for(self, host_seconds):
        """Flushes that keep the device busy until the host has asked for everything."""
        return 1 + math.ceil(1.5 * host_seconds / self.flush_seconds)

    def peak(self, function):
        """Most bytes that one call allocates on top of its inputs."""
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        function()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before

    def ceilings(self):
        """(bytes per second of a copy, FLOP per second of a bfloat16 matrix product), measured."""
        x = torch.randn(1 << 29, device=self.device).bfloat16()
        y = torch.empty_like(x)
        a, b = (torch.randn(8192, 8192, device=self.device).bfloat16() for _ in range(2))
        out = torch.empty_like(a)
        copy = statistics.median(self.elapsed(lambda: y.copy_(x), 1) for _ in range(10))
        product = statistics.median(
            self.elapsed(lambda: torch.mm(a, b, out=out), 1) for _ in range(10)
        )
        return 2 * x.numel() * x.element_size() / copy, 2 * 8192**3 / product


class Cpu:
    """Stands in for a device where there is none: the harness runs, its times mean nothing."""

    name = "cpu"
    device = torch.device("cpu")

    def synchronize(self):
        pass

    def elapsed(self, function, flushes):
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    def flushes_for(self, host_seconds):
        return 0

    def peak(self, function):
        function()
        return 0

    def ceilings(self):
        return 1e10, 1e11


def calls(workload, mode):
    """Functions without arguments, by contender: one call of the mode."""
    inputs = workload.inputs
    if mode != "training":

        def no_gradients(function):
            def call():
                with torch.no_grad():
                    return function(**inputs)

            return call

        return {name: no_gradients(function) for name, function in workload.contenders.items()}

    leaves = leaves_of(workload, inputs)
    cotangent = None

    def training(function):
        def call():
            nonlocal cotangent
            o = function(**(inputs | leaves))
            if cotangent is None:
                cotangent = cotangent_like(o)
            return torch.autograd.grad(o, list(leaves.values()), cotangent)

        return call

    return {name: training(function) for name, function in workload.contenders.items()}


def leaves_of(workload, inputs):
    """What training needs gradients of, detached from everything else."""
    return {name: inputs[name].detach().requires_grad_() for name in workload.learned}


def cotangent_like(o):
    generator = torch.Generator(o.device).manual_seed(1)
    return torch.randn(o.shape, generator=generator, device=o.device, dtype=o.dtype)


def relative(x, reference):
    """||x - reference|| / ||reference||."""
    return ((x.double() - reference).norm() / reference.norm()).item()


def errors(workload, mode, function):
    """Relative errors against float64 by name, on a few heads of all: they know nothing of others.

    The state that decoding replaces is a copy.
    """
    few = workload.few
    inputs = {name: x.clone() for name, x in workload.inputs.items()}
    exact = {name: few(name, x).double() for name, x in workload.inputs.items()}
    if mode != "training":
        with torch.no_grad():
            return {"o": relative(few("o", function(**inputs)), workload.reference(**exact))}
    leaves, exact_leaves = leaves_of(workload, inputs), leaves_of(workload, exact)
    o, expected = function(**(inputs | leaves)), workload.reference(**(exact | exact_leaves))
    cotangent = cotangent_like(o)
    gradients = torch.autograd.grad(o, list(leaves.values()), cotangent)
    expected_gradients = torch.autograd.grad(
        expected, list(exact_leaves.values()), few("o", cotangent).double()
    )
    found = {"o": relative(few("o", o.detach()), expected.detach())}
    for name, gradient, exact_gradient in zip(leaves, gradients, expected_gradients, strict=True):
        found[f"d{name}"] = relative(few(name, gradient), exact_gradient)
    return found


def is_right(found):
    """Whether all errors are small; one that is not a number is not."""
    return all(
        error <= (DECAY_LIMIT if name in ("dlog_decay", "dw") else LIMIT)
        for name, error in found.items()
    )


def first_line(error):
    """An exception in a line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"


class DeviceLost(RuntimeError):
    """After some errors, such as an illegal access, a process can do nothing more on its device."""


def check_and_warm_up(device, workload, mode):
    """(functions that may be timed, what is known of every contender), both by name.

    What fails or computes something else is not timed; `known` says why.

    Raises:
        DeviceLost: a contender failed in a way that no other could be run after it.
    """
    functions, known = {}, {}
    for name, call in calls(workload, mode).items():
        known[name] = {}
        try:
            if name not in OTHER_FUNCTIONS:
                found = errors(workload, mode, workload.contenders[name])
                known[name]["errors"] = {key: float(f"{e:.2g}") for key, e in found.items()}
                if not is_right(found):
                    known[name]["failed"] = "wrong results"
                    continue
            for _ in range(3):
                call()
        except Exception as error:  # any failure of theirs or ours is a result, not the end
            known[name]["failed"] = first_line(error)
            try:
                device.synchronize()
            except Exception as lost:
                raise DeviceLost(f"{name}, {mode}: {first_line(error)}") from lost
            continue
        functions[name] = call
    return functions, known


def host_seconds(device, function):
    """Seconds for which one call keeps the host, the median of three rows of calls."""
    samples = []
    for _ in range(3):
        device.synchronize()
        start = time.perf_counter()
        for _ in range(5):
            function()
        samples.append((time.perf_counter() - start) / 5)
    device.synchronize()
    return statistics.median(samples)


def measure(device, workload, mode, ceilings, seconds):
    """All figures of one mode of a workload, contenders in turns.

    Args:
        ceilings: (bytes per second, FLOP per second) of the device.
        seconds: about how long the timing may take.
    """
    functions, known = check_and_warm_up(device, workload, mode)
    moved, computed = workload.floors[mode]
    floors = {"bytes": moved / ceilings[0], "FLOPs": computed / ceilings[1]}
    floor_of = max(floors, key=floors.get)
    record = {"floor_ms": milliseconds(floors[floor_of]), "floor_of": floor_of, "by": known}
    if not functions:
        return record
    hosts = {name: host_seconds(device, function) for name, function in functions.items()}
    # Decoding is what a loop of it sees, the host included: many calls in a row.
    in_a_row, flushes = (
        (50, 0) if mode == "decode" else (1, device.flushes_for(max(hosts.values())))
    )

    def sample(function):
        def row():
            for _ in range(in_a_row):
                function()

        return device.elapsed(row, flushes) / in_a_row

    start = time.perf_counter()
    samples = {name: [sample(function)] for name, function in functions.items()}
    one_round = time.perf_counter() - start
    for _ in range(max(2, min(50, int(seconds / one_round)))):
        for name, function in functions.items():
            samples[name].append(sample(function))
    for name, function in functions.items():
        times = sorted(samples[name])
        median = statistics.median(times)
        known[name] |= {
            "ms": milliseconds(median),
            "low_ms": milliseconds(times[len(times) // 10]),
            "high_ms": milliseconds(times[-1 - len(times) // 10]),
            "samples": len(times),
            "host_us": round(1e6 * hosts[name], 1),
            "peak_mb": round(device.peak(function) / 1e6, 1),
        }
        if name not in OTHER_FUNCTIONS:
            known[name]["of_floor"] = round(floors[floor_of] / median, 3)
        if name != "ours" and "ours" in functions:
            known[name]["ratio"] = round(median / statistics.median(samples["ours"]), 2)
    return record


def milliseconds(seconds):
    """For a JSON file: four digits."""
    return float(f"{1000 * seconds:.4g}")


def first_call(name, contender):
    """In a child process: seconds from nothing imported to the first gradients."""
    device = torch.device("cuda")
    torch.zeros(1, device=device)
    torch.cuda.synchronize()
    start = time.perf_counter()
    workload = CASES[name].make(device, False)
    calls(workload, "training")[contender]()
    torch.cuda.synchronize()
    print(time.perf_counter() - start)


def measure_first_call(name, contender, seconds):
    """{"seconds": ...} of `first_call` in a fresh process that has compiled nothing yet."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--first-call", name, contender]
        try:
            child = subprocess.run(
                command,
                env=os.environ | {"TRITON_CACHE_DIR": folder},
                capture_output=True,
                text=True,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {seconds:.0f} s"}
    if child.returncode:
        return {"failed": child.stderr.strip().splitlines()[-1][:200]}
    return {"seconds": round(float(child.stdout.split()[-1]), 2)}


def tune(device, deadline, cases, is_tiny):
    """Prints times of the scan with other segments, slices and stages, best first."""
    from zoo.kernels.launch_triton import Config
    from zoo.kernels.segments_triton import override

    for name, case in cases.items():
        if not name.startswith("retention (") or "training" not in case.modes:
            continue
        workload = case.make(device.device, is_tiny)
        workload = workload._replace(contenders={"ours": workload.contenders["ours"]})
        tokens = workload.inputs["q"].shape[1]
        for mode in case.modes:
            rows = []
            choices = itertools.product((None, 1, 4, 16), (None, 32, 64), (2, 3))
            for segments, width, stages in choices:
                if time.perf_counter() > deadline or (width is None and stages == 3):
                    continue
                chosen = {"segment": -(-tokens // segments)} if segments else {}
                if width:
                    chosen["scan"] = Config(64, width, 4, stages)
                with override(**chosen):
                    seconds = 0.0 if is_tiny else 0.3
                    try:
                        record = measure(device, workload, mode, (1, 1), seconds)["by"]["ours"]
                    except DeviceLost as error:
                        print(f"{name} {mode}, {chosen}: the device is lost: {error}")
                        return
                words = f"segments {segments or 'as shipped'}, "
                words += f"slice {width}, stages {stages}" if width else "configuration as shipped"
                rows.append((record.get("ms", math.inf), words, record.get("failed", "")))
            print(f"\n{name} {mode}")
            for ms, words, failed in sorted(rows):
                print(f"  {ms:9.4f} ms  {words}  {failed}", flush=True)


def compile_first(cases, processes, arguments, seconds):
    """Lets child processes compile everything, the cases shared out: fla's configurations are many.

    What they compile is in Triton's cache when this process wants it. What goes wrong there will
    go wrong here, and be told.
    """
    command = [sys.executable, __file__, *arguments, "--compile"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    shares = (json.dumps(list(cases)[i::processes]) for i in range(processes))
    children = [subprocess.Popen([*command, share], **quiet) for share in shares]
    end = time.perf_counter() + seconds
    for child in children:
        try:
            child.wait(max(0.0, end - time.perf_counter()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def compile_share(device, cases, is_tiny):
    """In a child process: runs every mode of the cases once."""
    for case in cases.values():
        with contextlib.suppress(Exception):
            workload = case.make(device.device, is_tiny)
            for mode in case.modes:
                check_and_warm_up(device, workload, mode)


def versions():
    """What a result depends on, beside the device."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    found["cuda"] = torch.version.cuda or torch.version.hip
    for name, package in (("triton", "triton"), ("fla", "fla")):
        with contextlib.suppress(ImportError):
            found[name] = importlib.import_module(package).__version__
    return found


def commit():
    """The commit that is measured, "+" if there are changes on top; None outside a checkout."""

    def git(*arguments):
        command = ["git", "-c", "safe.directory=*", "-C", str(HERE), *arguments]
        with contextlib.suppress(OSError):
            return subprocess.run(command, capture_output=True, text=True).stdout.strip()
        return ""

    name = git("rev-parse", "--short", "HEAD")
    return name + "+" * bool(git("status", "--porcelain", "-uno")) if name else None


def run(device, cases, output, deadline, is_tiny):
    """Measures the cases in their order until the deadline, and writes the file after each."""
    record = {"device": device.name, "versions": versions(), "results": {}}
    if output.exists():
        old = json.loads(output.read_text())
        if (old["device"], old["versions"]) == (record["device"], record["versions"]):
            record["results"] = old["results"]
    ceilings = device.ceilings()
    record["copy_tb_per_s"] = round(ceilings[0] / 1e12, 3)
    record["matmul_tflops"] = round(ceilings[1] / 1e12, 1)
    if "fla" not in record["versions"]:
        print("flash-linear-attention is not installed: ours alone is measured.")
    this_commit = commit()

    def write():
        unfinished = output.with_suffix(".part")
        unfinished.write_text(json.dumps(record, indent=1) + "\n")
        unfinished.replace(output)

    for name, case in cases.items():
        if time.perf_counter() > deadline:
            print(f"out of time before {name}")
            break
        entry, is_lost = {"commit": this_commit}, False
        try:
            workload = case.make(device.device, is_tiny)
            for mode in case.modes:
                seconds = 0.0 if is_tiny else 2.0
                entry[mode] = measure(device, workload, mode, ceilings, seconds)
                if mode in case.targets:
                    entry[mode]["target"] = case.targets[mode]
        except DeviceLost as error:
            entry["failed"] = str(error)
            is_lost = True
        except Exception as error:  # out of memory, say: the other cases can still be measured
            entry["failed"] = first_line(error)
        workload = None
        record["results"][name] = entry
        write()
        print("\n".join(lines_of(name, entry)), flush=True)
        if is_lost:
            print("The device is lost to this process: the cases after it were not measured.")
            return
    for name in () if is_tiny else FIRST_CALLS:
        if name not in cases or time.perf_counter() > deadline:
            continue
        entry = record["results"][name]
        entry["first call"] = {
            side: measure_first_call(name, side, FIRST_CALL_SECONDS)
            for side in entry.get("training", {}).get("by", {})
            if side in ("ours", "fla")
        }
        write()
        print("\n".join(first_call_lines(name, entry)), flush=True)


def lines_of(name, entry):
    """A case as lines of text."""
    lines = [f"{name}: {entry['failed']}"] if "failed" in entry else []
    for mode, record in entry.items():
        if not isinstance(record, dict) or "by" not in record:
            continue
        for who, figures in record["by"].items():
            said = f"{name} {mode}, {who}: "
            if "failed" in figures:
                lines.append(f"{said}not timed: {figures['failed']} {figures.get('errors', '')}")
                continue
            said += f"{figures['ms']} ms ({figures['low_ms']} to {figures['high_ms']})"
            said += f", host {figures['host_us']} us, {figures['peak_mb']} MB"
            if "of_floor" in figures:
                said += f", {figures['of_floor']:.0%} of the floor ({record['floor_of']})"
            if "ratio" in figures:
                said += f"; ours is {figures['ratio']}x as fast"
            lines.append(said)
    return lines


def first_call_lines(name, entry):
    return [f"{name} first call, {who}: {x}" for who, x in entry.get("first call", {}).items()]


def fla_of(by):
    """fla's figures; the faster ones, where there are two ways to call it."""
    theirs = [figures for who, figures in by.items() if who.startswith("fla")]
    return min(theirs, key=lambda figures: figures.get("ms", math.inf), default={})


def gpu_table(record):
    """A Markdown table of one GPU's results."""
    rows = [
        "| (B, T, H, K[, V]) | | ours ms | of the floor | error | host us | MB | fla ms | ratio "
        "| wanted | attention ms |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, entry in record["results"].items():
        for mode in ("forward", "training", "decode"):
            if mode not in entry:
                continue
            by = entry[mode]["by"]
            ours, other = (by.get(who, {}) for who in ("ours", "attention"))
            fla = fla_of(by)
            error = max(ours.get("errors", {}).values(), default="")
            share = f"{ours['of_floor']:.0%}" if "of_floor" in ours else ""
            cells = [name, mode, ours.get("ms", ours.get("failed", "")), share, error]
            cells += [ours.get("host_us", ""), ours.get("peak_mb", "")]
            cells += [fla.get("ms", fla.get("failed", "")), fla.get("ratio", "")]
            cells += [entry[mode].get("target", ""), other.get("ms", "")]
            rows.append("| " + " | ".join(map(str, cells)) + " |")
    for name, entry in record["results"].items():
        for who, figures in entry.get("first call", {}).items():
            said = figures.get("failed") or f"{figures['seconds']} s"
            rows.append(f"\nFirst call, nothing compiled, {name}, {who}: {said}.")
    known = ", ".join(f"{key} {value}" for key, value in record["versions"].items())
    title = f"**{record['device']}** ({known}): a copy moves {record['copy_tb_per_s']} TB/s, a "
    title += f"bfloat16 matrix product does {record['matmul_tflops']} TFLOP/s."
    return "\n".join([title, "", *rows])


def cpu_table(record):
    """A Markdown table of cpu.py's results."""
    rows = ["| | | ours ms | theirs ms | ratio |", "|---|---|---|---|---|"]
    for name, directions in record["results"].items():
        for direction, figures in directions.items():
            cells = [name, direction, figures["ours_ms"], figures["theirs_ms"], figures["ratio"]]
            rows.append("| " + " | ".join(map(str, cells)) + " |")
    title = f"**CPU**, {record['device']}, threads: {record['threads']} (torch {record['torch']}, "
    title += f"transformers {record['transformers']}, commit {record['commit']})."
    return "\n".join([title, "", *rows])


def records(folder=RESULTS):
    """(GPU results, CPU results): the files of run.py and those of cpu.py."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    found = [x for x in found if "results" in x]
    return [x for x in found if "versions" in x], [x for x in found if "versions" not in x]


def tables():
    """The README's part that comes from the result files."""
    gpus, cpus = records()
    parts = [gpu_table(record) for record in gpus] or ["**GPU**: not measured on a GPU yet."]
    return "\n\n".join(parts + [cpu_table(record) for record in cpus])


def with_tables(text):
    """The README's text with up-to-date tables between its two markers."""
    begin, end = "<!-- tables -->\n", "<!-- end of tables -->"
    before, rest = text.split(begin)
    return before + begin + "\n" + tables() + "\n\n" + end + rest.split(end)[1]


def plot():
    """An SVG image of all ratios, their time over ours, on a logarithmic scale."""
    gpus, cpus = records()
    bars = []
    for record in gpus:
        for name, entry in record["results"].items():
            for mode in ("forward", "training", "decode"):
                ratio = fla_of(entry.get(mode, {}).get("by", {})).get("ratio")
                if ratio:
                    bars.append((f"{record['device']}: {name} {mode}, beside fla", ratio))
    for record in cpus:
        for name, directions in record["results"].items():
            bars += [(f"CPU: {name}, {key}", x["ratio"]) for key, x in directions.items()]
    left, step, row = 560, 70, 22  # where 1x is, pixels for a factor of 2, height of a bar
    right = left + step * math.ceil(math.log2(max(2, *(ratio for _, ratio in bars)))) + 60
    height = row * len(bars) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{right}" height="{height}" '
        'font-family="sans-serif" font-size="12" fill="#777">',
        f'<line x1="{left}" y1="0" x2="{left}" y2="{height - 25}" stroke="#777"/>',
        f'<text x="{left}" y="{height - 8}" text-anchor="middle">as fast</text>',
    ]
    for i, (label, ratio) in enumerate(bars):
        width = step * abs(math.log2(ratio))
        start, y = left if ratio >= 1 else left - width, row * i + 4
        colour = "#4878a8" if ratio >= 1 else "#b05030"
        parts += [
            f'<text x="{min(left, start) - 6:.0f}" y="{y + 12}" text-anchor="end">{label}</text>',
            f'<rect x="{start:.0f}" y="{y}" width="{width:.0f}" height="15" fill="{colour}"/>',
            f'<text x="{max(left, start + width) + 5:.0f}" y="{y + 12}">{ratio}x</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def write_readme():
    """Brings the README's tables and the plot up to date with the result files."""
    README.write_text(with_tables(README.read_text()))
    PLOT.write_text(plot())


def main(arguments=None):
    """Measures, tunes or writes tables; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--minutes", type=float, default=8.0, help="no case starts after them")
    parser.add_argument("--tune", action="store_true", help="try configurations of the scan")
    parser.add_argument("--table", action="store_true", help="rewrite the README's tables")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to test this script")
    parser.add_argument(
        "--output", type=Path, help="result file, in place of results/<device>.json"
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=min(8, os.cpu_count()),
        help="compile everything first, in so many (0: each case when its turn comes)",
    )
    parser.add_argument("--compile", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--first-call", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.table:
        write_readme()
        return
    if options.first_call:
        first_call(*options.first_call)
        return
    if options.device == "cpu" and not (options.smoke and options.output):
        parser.error("times on a CPU are cpu.py's; --device cpu goes with --smoke and --output.")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("this torch sees no GPU; --device cpu --smoke --output PATH tests the script.")
    deadline = time.perf_counter() + 60 * options.minutes
    device = Cpu() if options.device == "cpu" else Gpu(torch.device("cuda", 0))
    cases = {name: case for name, case in CASES.items() if options.only in name}
    if not cases:
        parser.error(f"no case's name contains {options.only!r}; there are: {', '.join(CASES)}.")
    if options.compile is not None:
        compile_share(device, {name: CASES[name] for name in options.compile}, options.smoke)
        return
    if options.processes and not options.tune:
        given = ["--device", options.device, *["--smoke"] * options.smoke]
        given += ["--output", str(options.output)] if options.output else []
        compile_first(cases, options.processes, given, 20 * options.minutes)
    if options.tune:
        tune(device, deadline, cases, options.smoke)
        return
    slug = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")
    run(device, cases, options.output or RESULTS / f"{slug}.json", deadline, options.smoke)
    if options.output is None:
        write_readme()


if __name__ == "__main__":
    main()
