"""Time per token on a CPU at growing lengths: linear models are flat, softmax attention is not.

    python kernels/bench/lengths.py [--longest 65536]

Two layers of width 256 with four heads, prefill (forward, without gradients) and training (forward
and backward), one thread, CPU time, medians of three. Softmax attention is transformers' Mistral
without a window, through PyTorch's scaled dot product attention, up to 16,384 tokens. Writes
kernels/bench/results/lengths.json and lengths.svg.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import matplotlib
import torch
from transformers import MistralConfig, MistralForCausalLM

import zoo

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
SHORTEST, SOFTMAX_UNTIL, REPETITIONS = 2048, 16_384, 3
SIZES = {
    "vocab_size": 259,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 704,
}


def models():
    """Name, model and the longest length worth waiting for; None: all."""
    for name in ("lightning", "retnet"):
        architecture = zoo.MODELS[name]
        yield name, architecture.causal_lm(architecture.config(**SIZES)), None
    config = MistralConfig(**SIZES, num_key_value_heads=4, sliding_window=None)
    yield "softmax attention", MistralForCausalLM(config), SOFTMAX_UNTIL


def microseconds(model, length, training):
    """CPU microseconds per token, median."""
    ids = torch.randint(0, 259, (1, length), generator=torch.Generator().manual_seed(0))
    model.train(training)
    samples = []
    for _ in range(REPETITIONS):
        start = time.process_time()
        with torch.set_grad_enabled(training):
            # Softmax attention would keep its logits; none of the others does, so nobody does.
            hidden = model.model(ids, use_cache=False).last_hidden_state
            if training:
                hidden.square().mean().backward()
        samples.append((time.process_time() - start) / length * 1e6)
        model.zero_grad()
    return statistics.median(samples)


def main():
    """Prints a table and writes results and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--longest", type=int, default=65_536, help="tokens (default: 65,536)")
    longest = parser.parse_args().longest
    torch.set_num_threads(1)
    lengths = [SHORTEST << n for n in range(20) if SHORTEST << n <= longest]
    results = {}
    for name, model, until in models():
        microseconds(model, 256, True)  # the first call allocates
        for training in (False, True):
            key = f"{name}, {'training' if training else 'prefill'}"
            own = [length for length in lengths if until is None or length <= until]
            results[key] = {str(n): round(microseconds(model, n, training), 2) for n in own}
            figures = list(results[key].values())
            print(
                f"{key:30} {'  '.join(f'{x:8.1f}' for x in figures)}  us per token, "
                f"{max(figures) / min(figures):.2f} from least to most"
            )
    record = {"device": platform.processor() or platform.machine(), "torch": torch.__version__}
    record |= {"threads": 1, "microseconds_per_token": results}
    (RESULTS / "lengths.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(results)


def plot(results):
    """One line per model and way; the axes are logarithmic in length and in time."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=False)
    for axis, way in zip(axes, ("prefill", "training"), strict=True):
        for key, figures in results.items():
            if key.endswith(way):
                lengths = [int(n) for n in figures]
                axis.plot(lengths, list(figures.values()), "o-", label=key.split(",")[0])
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=way)
        axis.set_xticks([2048, 8192, 32_768], ["2k", "8k", "32k"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("CPU µs per token")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(RESULTS / "lengths.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
