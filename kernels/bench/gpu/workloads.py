"""What run.py times: inputs of an operator, and everything that runs it.

A maker takes an operator's shape and returns a function, (device, is_tiny) to `Workload`, as a
`Case` (cases.py) wants it.
"""

import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from zoo.kernels.delta_recurrence import delta_recurrence, delta_recurrence_chunked
from zoo.kernels.dilated_attention import dilated_attention
from zoo.kernels.linear_recurrence import linear_recurrence, linear_recurrence_chunked
from zoo.kernels.wkv4 import wkv4, wkv4_chunked

# Beyond this many tokens attention, quadratic in them, would eat the time of everything else.
ATTENTION_TOKENS = 16384
# RWKV-7's log decay is -exp(-1/2) times a sigmoid. fla's layer promises it this bound.
RWKV7_LOWEST = -math.exp(-0.5)
# Not the same function: nothing to compare with, and no part in the comparison of results.
OTHER_FUNCTIONS = {"attention"}


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


class Random:
    """Reproducible inputs on a device; on the meta device, shapes alone."""

    def __init__(self, device, dtype):
        self.device, self.dtype = device, dtype
        if device.type != "meta":
            self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape, dtype=None):
        if self.device.type == "meta":
            return torch.empty(shape, device=self.device, dtype=dtype or self.dtype)
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
