"""Times operators and RWKV-4 on a CPU beside what transformers runs there, in one process.

    make bench

Operators on one thread, in CPU time of the process (other jobs on the machine count for little); a
whole training step on all cores, in wall time. The two sides in turns, medians over the
repetitions. Writes kernels/bench/results/cpu.json.
"""

import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch
import transformers
from transformers.models.minimax.configuration_minimax import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention
from transformers.models.rwkv.configuration_rwkv import RwkvConfig
from transformers.models.rwkv.modeling_rwkv import RwkvForCausalLM, rwkv_linear_attention_cpu

from zoo import RWKV4Config, RWKV4ForCausalLM
from zoo.hub.convert import Weights, hf_rwkv
from zoo.kernels.linear_recurrence import linear_recurrence, linear_recurrence_reference
from zoo.kernels.wkv4 import wkv4

HERE = Path(__file__).resolve().parent
REPETITIONS = 5


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


def minimax_loop(heads, width):
    """transformers' loop over blocks of MiniMax-Text-01, without the projections around it.

    Returns:
        (function of q, k, v [B, T, H, D], the log decay of each head).
    """
    config = MiniMaxConfig(
        hidden_size=heads * width,
        num_attention_heads=heads,
        head_dim=width,
        num_hidden_layers=2,
        layer_types=["linear_attention"] * 2,
    )
    layer = MiniMaxLightningAttention(config, 0)
    for name in ("qkv_proj", "act_fn", "norm", "out_proj"):
        setattr(layer, name, torch.nn.Identity())

    class Gate(torch.nn.Module):
        def forward(self, x_BTD):
            return x_BTD[..., : heads * width]

    layer.output_gate = Gate()

    def run(q, k, v):
        return layer(torch.cat([q, k, v], dim=-1).flatten(2), None, None)[0]

    return run, -layer.slope_rate.flatten()


def lightning(batch, time_, heads, width):
    """A constant decay per head against MiniMax's loop."""
    inputs = [normal(batch, time_, heads, width) for _ in range(3)]
    loop, log_decay = minimax_loop(heads, width)
    return inputs, lambda *x: linear_recurrence(*x, log_decay)[0], loop


def rwkv6(batch, time_, heads, width):
    """A decay per channel with bonus against the loop over time steps."""
    inputs = [normal(batch, time_, heads, width) for _ in range(3)]
    log_decay = -torch.exp(normal(batch, time_, heads, width).detach() - 1)
    bonus = normal(heads, width).detach()
    functions = (
        lambda *x, f=f: f(*x, log_decay, bonus=bonus)[0]
        for f in (linear_recurrence, linear_recurrence_reference)
    )
    return inputs, *functions


def rwkv4(batch, time_, width):
    """WKV against transformers' loop over time steps, whose backward is quadratic in T."""
    time_decay, first = normal(width).detach(), normal(width).detach()
    inputs = [normal(batch, time_, width) for _ in range(2)]
    return (
        inputs,
        lambda k, v: wkv4(-time_decay.exp(), first, k, v)[0],
        lambda k, v: rwkv_linear_attention_cpu(time_decay, first, k, v)[0],
    )


def rwkv4_model(batch, time_, layers, width):
    """A training step of the whole model against transformers', with the same weights.

    Raises:
        RuntimeError: the logits differ.
    """
    torch.manual_seed(0)
    sizes = {"vocab_size": 1024, "hidden_size": width, "num_hidden_layers": layers}
    theirs = RwkvForCausalLM(RwkvConfig(**sizes, rescale_every=0)).train()
    ours = RWKV4ForCausalLM(RWKV4Config(**sizes)).train()
    # Theirs begins where nothing but the current token is seen; this one mixes and forgets.
    with torch.no_grad():
        for weight in theirs.parameters():
            weight += 0.3 * torch.randn_like(weight) * weight.shape[-1] ** -0.5
    weights = hf_rwkv.FORMAT.read_weights(Weights(theirs.state_dict()), ours.config)
    ours.load_state_dict(dict(weights))
    ids = torch.randint(0, 1024, (batch, time_))
    with torch.no_grad():
        a, b = (model(ids, use_cache=False).logits for model in (ours, theirs))
    difference = ((a - b).abs().max() / b.abs().max()).item()
    print(f"RWKV-4, logits beside transformers': {difference:.1e} of the largest apart")
    if not difference < 1e-5:
        raise RuntimeError(f"logits differ by {difference} of the largest, at most 1e-5 expected")

    def step(model):
        model.zero_grad()
        return model(ids, labels=ids, use_cache=False).loss

    return [], lambda: step(ours), lambda: step(theirs)


CASES = {
    "lightning (1, 4096, 16, 128) beside transformers' MiniMax loop": (lightning, 1, 4096, 16, 128),
    "RWKV-6 (1, 1024, 12, 64) beside its step loop": (rwkv6, 1, 1024, 12, 64),
    "wkv4 (1, 4096, 768) beside transformers' loop": (rwkv4, 1, 4096, 768),
    "RWKV-4, step of (1, 4096), 6 layers of 512, beside transformers'": (
        rwkv4_model,
        *(1, 4096, 6, 512),
    ),
}
# Half a minute and more a call on the other side.
ONCE = {rwkv4, rwkv4_model}
# A step is mostly matrix products, which take every core there is; a loop leaves the others idle.
ALL_CORES = {rwkv4_model}


def seconds(function, inputs, clock):
    """(forward, forward and backward) seconds of one call."""
    for x in inputs:
        x.grad = None
    start = clock()
    output = function(*inputs)
    forward = clock()
    output.backward(torch.ones_like(output))
    return forward - start, clock() - start


def measure(case, *shape):
    """Medians in milliseconds of both sides, and their ratio, for forward and with backward."""
    torch.set_num_threads(os.cpu_count() if case in ALL_CORES else 1)
    clock = time.perf_counter if case in ALL_CORES else time.process_time
    inputs, ours, theirs = case(*shape)
    seconds(ours, inputs, clock)  # the first call allocates
    times = 1 if case in ONCE else REPETITIONS
    samples = [tuple(seconds(side, inputs, clock) for side in (ours, theirs)) for _ in range(times)]
    figures = {}
    for index, name in enumerate(("forward", "forward and backward")):
        a, b = ([1000 * sample[side][index] for sample in samples] for side in (0, 1))
        figures[name] = {
            "ours_ms": round(statistics.median(a), 1),
            "theirs_ms": round(statistics.median(b), 1),
            "ratio": round(statistics.median(b) / statistics.median(a), 2),
            "ours_spread_ms": [round(min(a), 1), round(max(a), 1)],
            "theirs_spread_ms": [round(min(b), 1), round(max(b), 1)],
        }
    return figures


def main():
    """Prints a table and writes the results."""
    results = {}
    print(f"{'':88} {'ours':>9} {'theirs':>9} {'ratio':>6}")
    for name, case in CASES.items():
        results[name] = measure(*case)
        for direction, figures in results[name].items():
            print(
                f"{name + ': ' + direction:88.88} {figures['ours_ms']:>6.0f} ms "
                f"{figures['theirs_ms']:>6.0f} ms {figures['ratio']:>5.1f}x"
            )
    commit = subprocess.run(
        ["git", "-C", HERE, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    record = {
        "device": platform.processor() or platform.machine(),
        "threads": f"1, and {os.cpu_count()} for the training step",
        "repetitions": f"{REPETITIONS}, or 1 where one takes half a minute",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit or None,
        "results": results,
    }
    (HERE / "results" / "cpu.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
