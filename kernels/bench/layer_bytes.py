"""Bytes that a layer moves in training on a GPU, counted without one, and what kernels save.

    python kernels/bench/layer_bytes.py            count, and write results/layer_bytes.json
    python kernels/bench/layer_bytes.py --table    the table of it in README.md, from that file

A model of three layers, 1,024 wide, runs forward and backward in bfloat16 on tensors without
memory, by the kernels that a GPU would run. Every operation of PyTorch moves its operands and its
results once, a kernel of ours what its launch is given; views and allocations move nothing. RMSNorm
is counted as LayerNorm, which is one operation without memory too, as both are on a GPU.

Token shift and mix are counted with and without their kernel. Head norm and gate are counted by
themselves, and beside them what one kernel for each direction would move: each operand, result and
gradient once. What saves a tenth of a layer is worth a kernel.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import zoo
from zoo.kernels import token_mix
from zoo.kernels.bench.aot.checks import bytes_of, traffic
from zoo.kernels.bench.marked import replaced
from zoo.kernels.launch_triton import recording

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "layer_bytes.json"
README = HERE / "README.md"
BATCH, TIME, WIDTH, LAYERS = 8, 4096, 1024, 3
# What moves nothing: views, and memory that nobody has written yet.
NOTHING = set(
    "view _unsafe_view t transpose permute expand select slice unsqueeze squeeze detach alias "
    "split split_with_sizes unbind as_strided diagonal _reshape_alias empty empty_like "
    "empty_strided new_empty new_empty_strided".split()
)


class Counting(TorchDispatchMode):
    """Adds up bytes of operands and results.

    Attributes:
        moved: bytes.
    """

    def __init__(self):
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ not in NOTHING:
            self.moved += sum(map(_bytes, (*args, result)))
        return result


def _bytes(x):
    """Of a tensor, or of several."""
    if isinstance(x, (tuple, list)):
        return sum(map(_bytes, x))
    return bytes_of(x) if torch.is_tensor(x) else 0


@contextlib.contextmanager
def as_on_a_gpu(fused=True):
    """Models on the "meta" device run the kernels of a GPU; yields their launches.

    Args:
        fused: whether token shift and mix are a kernel.
    """

    def layer_norm(x, shape, weight=None, eps=None):
        return F.layer_norm(x, shape, weight, None, eps or torch.finfo(x.dtype).eps)

    with contextlib.ExitStack() as stack:

        def replace(owner, name, value):
            stack.enter_context(mock.patch.object(owner, name, value))

        for name, module in list(sys.modules.items()):
            if name.startswith("zoo.kernels.") and hasattr(module, "choose_backend"):
                backend = "torch" if module is token_mix and not fused else "triton"
                replace(module, "choose_backend", lambda *_, backend=backend: backend)
        replace(F, "rms_norm", layer_norm)
        # Autocast does not know this kind of device.
        replace(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
        replace(torch, "is_autocast_enabled", lambda *_: False)
        yield stack.enter_context(recording(run=False))


def bytes_of_layer(name, fused=True):
    """Forward and backward, per token and channel of the width, of one layer of an architecture."""
    fields = {"head_size": 64} if name.startswith("rwkv") and name != "rwkv4" else {}
    if not name.startswith("rwkv"):
        fields = {"num_attention_heads": WIDTH // 64}
    found = []
    for layers in (1, LAYERS):  # what is beside layers is in both
        config = zoo.MODELS[name].config(
            vocab_size=64, hidden_size=WIDTH, num_hidden_layers=layers, **fields
        )
        with torch.device("meta"):
            model = zoo.MODELS[name].causal_lm(config).to(torch.bfloat16).train()
        ids = torch.empty(BATCH, TIME, dtype=torch.long, device="meta")
        with as_on_a_gpu(fused) as launches, Counting() as counting:
            model(ids, labels=ids).loss.backward()
        found.append(counting.moved + traffic(launches))
    return (found[1] - found[0]) / (LAYERS - 1) / (BATCH * TIME * WIDTH)


class Gate(NamedTuple):
    """A head norm and the gate after it.

    Attributes:
        run: (y [B, T, H, V], gate [B, T, H V], weight [H V]) to the result.
        value_width: H V over the width.
        heads: H.
        operands: what a kernel would read of each token and channel.
    """

    run: Callable
    value_width: int = 1
    heads: int = WIDTH // 64
    operands: int = 2


def _group_norm(y, weight):
    size = y.shape[-2:]
    normed = F.layer_norm(y, size[1:])
    return normed * weight.view(size) + weight.view(size)


GATES = {
    "rwkv5": Gate(lambda y, g, w: _group_norm(y, w).flatten(2) * F.silu(g)),
    "rwkv6": Gate(lambda y, g, w: _group_norm(y, w).flatten(2) * F.silu(g)),
    "rwkv7": Gate(
        lambda y, g, w: (_group_norm(y, w) + _bonus(y, w) * y).flatten(2) * g,
        operands=5,  # and r, k and v, of the bonus
    ),
    "retnet": Gate(lambda y, g, w: F.rms_norm(y, y.shape[-1:]).flatten(2) * F.silu(g), 2),
    "lightning": Gate(lambda y, g, w: g.sigmoid() * F.rms_norm(y.flatten(2), w.shape, w)),
    "gated_deltanet": Gate(
        lambda y, g, w: F.rms_norm(y, y.shape[-1:], w[: y.shape[-1]]).flatten(2) * F.silu(g), 2
    ),
}


def _bonus(y, weight):
    return (y * y * weight.view(y.shape[-2:])).sum(-1, keepdim=True)


def bytes_of_gate(name):
    """(as operations, as one kernel for each direction), as of `bytes_of_layer`."""
    gate = GATES[name]
    shape = BATCH, TIME, gate.heads, gate.value_width * WIDTH // gate.heads
    y, g, out = (torch.empty(*shape, dtype=torch.bfloat16, device="meta") for _ in range(3))
    weight = torch.empty(gate.value_width * WIDTH, dtype=torch.bfloat16, device="meta")
    leaves = y.requires_grad_(), g.flatten(2).requires_grad_(), weight.requires_grad_()
    with as_on_a_gpu(), Counting() as counting:
        torch.autograd.grad(gate.run(*leaves), leaves, out.flatten(2), allow_unused=True)
    fused = 2 * gate.value_width * (gate.operands + 1 + 2 * gate.operands + 1)
    return counting.moved / (BATCH * TIME * WIDTH), fused


def count():
    """{architecture: figures}: bytes per token and channel, and shares of a layer's."""
    found = {}
    for name in ("rwkv4", *GATES):
        layer = bytes_of_layer(name)
        found[name] = {"layer": round(layer, 1)}
        if name.startswith("rwkv"):
            before = bytes_of_layer(name, fused=False)
            found[name] |= {"without the kernel": round(before, 1)}
            found[name] |= {"token mix saves": round(1 - layer / before, 3)}
        if name in GATES:
            separate, fused = bytes_of_gate(name)
            found[name] |= {"norm and gate": round(separate, 1), "fused": fused}
            found[name] |= {"fused would save": round((separate - fused) / layer, 3)}
    return found


def table(found):
    """Lines of a table for people."""
    lines = [
        "| bytes per token and channel, forward and backward | a layer | with token shift and "
        "mix as PyTorch's operations | their kernel saves | norm and gate, now | as one kernel "
        "| would save |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, x in found.items():
        shares = ["token mix saves", "fused would save"]
        saves, would = (f"{x[key]:.0%}" if key in x else "" for key in shares)
        cells = [x["layer"], x.get("without the kernel", ""), saves]
        cells += [x.get("norm and gate", ""), x.get("fused", ""), would]
        lines.append(f"| {name} | " + " | ".join(map(str, cells)) + " |")
    return lines


def main():
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="write README.md from the results")
    if not parser.parse_args().table:
        found = count()
        print("\n".join(table(found)))
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        return
    lines = table(json.loads(RESULTS.read_text()))
    README.write_text(replaced(README.read_text(), "layer bytes", lines))


if __name__ == "__main__":
    main()
