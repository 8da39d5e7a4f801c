"""Time and memory per token on a CPU at growing lengths: linear models are flat, softmax is not.

    python kernels/bench/lengths.py [--longest 65536]

Models: two layers of width 256 with four heads, prefill (forward, without gradients) and training
(forward and backward). Softmax attention is transformers' Mistral without a window, through
PyTorch's scaled dot product attention. Operators: attention of 8 heads of 64 to a window of 512
keys, banded, and as scaled dot product attention with a dense mask. One thread, CPU time, medians
of three after a first run; what is quadratic up to 16,384 tokens. Peak memory is that of the
process beyond what it had before, in training.

Every case runs in a process of its own, whose heap keeps what is freed (`HEAP`). By default glibc
gives every tensor above 32 MiB fresh pages and takes them back at once, so that long sequences pay
for page faults that short ones do not. Writes kernels/bench/results/lengths.json and lengths.svg.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"
SHORTEST, QUADRATIC_UNTIL, REPETITIONS = 2048, 16_384, 3
WINDOW, HEADS, HEAD_DIM = 512, 8, 64
# glibc's own settings; other C libraries ignore them.
HEAP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
SIZES = {
    "vocab_size": 259,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 704,
}
MODELS = {
    "lightning": ("lightning", {}),
    "retnet": ("retnet", {}),
    "sliding window": ("sliding_window", {"sliding_window": WINDOW}),
}
SOFTMAX, BANDED, DENSE = "softmax attention", "banded operator", "dense mask operator"
QUADRATIC = (SOFTMAX, DENSE)
CASES = (*MODELS, SOFTMAX, BANDED, DENSE)


def model_runner(case):
    """(length, training) -> None, which runs a model once."""
    if case == SOFTMAX:
        from transformers import MistralConfig, MistralForCausalLM

        model = MistralForCausalLM(
            MistralConfig(**SIZES, num_key_value_heads=4, sliding_window=None)
        )
    else:
        import zoo

        name, fields = MODELS[case]
        architecture = zoo.MODELS[name]
        model = architecture.causal_lm(architecture.config(**SIZES | fields))

    def run(length, training):
        ids = torch.randint(0, 259, (1, length), generator=torch.Generator().manual_seed(0))
        model.train(training)
        # Softmax attention would keep its logits; none of the others does, so nobody does.
        hidden = model.model(ids, use_cache=False).last_hidden_state
        if training:
            hidden.square().mean().backward()
            model.zero_grad()

    return run


def operator_runner(case):
    """The same for attention alone."""
    from zoo.kernels.windowed_attention import windowed_attention

    def dense(q, k, v):
        positions_T = torch.arange(q.shape[1])
        distance_TT = positions_T[:, None] - positions_T
        mask_TT = (distance_TT >= 0) & (distance_TT < WINDOW)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask_TT)

    def run(length, training):
        shape = 1, length, HEADS, HEAD_DIM
        qkv = [torch.randn(shape, requires_grad=training) for _ in range(3)]
        o = windowed_attention(*qkv, WINDOW) if case == BANDED else dense(*qkv)
        if training:
            o.square().mean().backward()

    return run


def measured_apart(script, *options):
    """What a script prints as JSON in its last line, in a process with a heap that keeps pages."""
    command = [sys.executable, script, *map(str, options)]
    output = subprocess.run(
        command, env=os.environ | HEAP, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return json.loads(output.splitlines()[-1])


def peak_bytes():
    """The most physical memory that this process held so far."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def measure(case, longest):
    """Figures of one case: CPU microseconds per token by way and length, peak bytes by length."""
    torch.set_num_threads(1)
    run = (model_runner if case in (*MODELS, SOFTMAX) else operator_runner)(case)
    until = min(longest, QUADRATIC_UNTIL) if case in QUADRATIC else longest
    lengths = [SHORTEST << n for n in range(20) if SHORTEST << n <= until]
    run(256, True)  # the first call allocates
    figures, before = {"prefill": {}, "training": {}, "peak_bytes": {}}, peak_bytes()
    for length in lengths:
        for way in ("training", "prefill"):
            samples = []
            for _ in range(1 + REPETITIONS):
                start = time.process_time()
                with torch.set_grad_enabled(way == "training"):
                    run(length, way == "training")
                samples.append((time.process_time() - start) / length * 1e6)
            figures[way][length] = round(statistics.median(samples[1:]), 2)
        figures["peak_bytes"][length] = peak_bytes() - before
    return figures


def main():
    """Prints a table and writes results and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--longest", type=int, default=65_536, help="tokens (default: 65,536)")
    parser.add_argument("--case", choices=CASES, help="measure this alone, print it as JSON")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments.case, arguments.longest)))
        return
    results = {}
    for case in CASES:
        results[case] = measured_apart(__file__, "--case", case, "--longest", arguments.longest)
        for way in ("prefill", "training"):
            report(f"{case}, {way}", list(results[case][way].values()), "us per token")
        per_token = [size / int(n) for n, size in results[case]["peak_bytes"].items()]
        report(f"{case}, peak", per_token, "bytes per token")
    ratios = {
        way: results[DENSE][way][str(QUADRATIC_UNTIL)] / results[BANDED][way][str(QUADRATIC_UNTIL)]
        for way in ("prefill", "training")
        if str(QUADRATIC_UNTIL) in results[DENSE][way]
    }
    for way, ratio in ratios.items():
        print(f"{QUADRATIC_UNTIL:,} tokens, {way}: dense mask / banded = {ratio:.1f}")
    record = {"device": platform.processor() or platform.machine(), "torch": torch.__version__}
    record |= {"threads": 1, "dense_mask_over_banded": ratios, "cases": results}
    (RESULTS / "lengths.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(results)


def report(name, figures, unit):
    """One line: figures by length, and how far they are from flat."""
    listed = "  ".join(f"{x:8.1f}" for x in figures)
    print(f"{name:32} {listed}  {unit}, {max(figures) / min(figures):.2f} from least to most")


def plot(results):
    """One line per model and way; lengths are on a logarithmic axis, time begins at zero."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=False)
    for axis, way in zip(axes, ("prefill", "training"), strict=True):
        for case in (*MODELS, SOFTMAX):
            lengths = [int(n) for n in results[case][way]]
            axis.plot(lengths, list(results[case][way].values()), "o-", label=case)
        axis.set(xscale="log", ylim=(0, None), xlabel="tokens", title=way)
        axis.set_xticks([2048, 8192, 32_768], ["2k", "8k", "32k"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("CPU µs per token")
    axes[1].legend(loc="center right", bbox_to_anchor=(1, 0.45))
    figure.tight_layout()
    figure.savefig(RESULTS / "lengths.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
