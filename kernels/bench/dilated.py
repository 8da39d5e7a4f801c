"""Dilated attention on a CPU at growing lengths, beside dense attention: the figure 1 of LongNet.

    python kernels/bench/dilated.py [--longest 1048576]

The operator with four heads of 64, segments of 2,048, 4,096, ... up to 32,768 tokens with rates 1,
2, ... 16, and a LongNet of two layers of width 256 with the same; dense attention is PyTorch's own,
causal and fused. Forward and backward from 4,096 to 131,072 tokens (dense up to 16,384), medians of
three after a first run; forward alone up to a million, once. One thread, CPU time, every case in a
process of its own with a heap that keeps what is freed (lengths.py says why). Writes
kernels/bench/results/dilated.json and dilated.svg.
"""

import argparse
import json
import platform
import statistics
import time

import torch
from lengths import RESULTS, SIZES, measured_apart, peak_bytes, report

HEADS, HEAD_DIM = 4, 64
BRANCHES = [2048 << n for n in range(5)], [1 << n for n in range(5)]
SHORTEST, LONGEST_TRAINING, LONGEST_DENSE, REPETITIONS = 4096, 131_072, 16_384, 3
CASES = ("dilated attention", "dense attention", "LongNet")


def operator_runner(case):
    """(length, training) -> None, which runs attention once."""
    from zoo.kernels.dilated_attention import dilated_attention

    def dense(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    def run(length, training):
        shape = 1, length, HEADS, HEAD_DIM
        qkv = [torch.randn(shape, requires_grad=training) for _ in range(3)]
        start = time.process_time()
        o = dense(*qkv) if case == "dense attention" else dilated_attention(*qkv, *BRANCHES)
        if training:
            o.backward(torch.ones_like(o))
        return time.process_time() - start

    return run


def model_runner():
    """The same for a model, without its logits."""
    import zoo

    lengths, rates = BRANCHES
    fields = {"segment_lengths": lengths, "dilation_rates": rates}
    model = zoo.LongNetModel(zoo.LongNetConfig(**SIZES | fields))

    def run(length, training):
        ids = torch.randint(0, 259, (1, length))
        start = time.process_time()
        hidden = model(ids, use_cache=False).last_hidden_state
        if training:
            hidden.square().mean().backward()
            model.zero_grad()
        return time.process_time() - start

    return run


def measure(case, longest):
    """CPU seconds by way and length, and peak bytes of training by length."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    run = model_runner() if case == "LongNet" else operator_runner(case)
    most = {"training": min(longest, LONGEST_TRAINING), "forward": longest}
    if case == "dense attention":
        most = dict.fromkeys(most, min(longest, LONGEST_DENSE))
    elif case == "LongNet":
        del most["forward"]
    run(256, True)  # the first call allocates
    figures, before = {"peak_bytes": {}}, peak_bytes()
    for way, until in most.items():
        figures[way] = {}
        length = SHORTEST
        while length <= until:
            times = 1 if length > LONGEST_TRAINING else 1 + REPETITIONS
            with torch.set_grad_enabled(way == "training"):
                samples = [run(length, way == "training") for _ in range(times)]
            figures[way][length] = round(statistics.median(samples[1:] or samples), 4)
            if way == "training":
                figures["peak_bytes"][length] = peak_bytes() - before
            length *= 2
    return figures


def main():
    """Prints a table and writes results and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--longest", type=int, default=1 << 20, help="tokens (default: 1,048,576)")
    parser.add_argument("--case", choices=CASES, help="measure this alone, print it as JSON")
    parser.add_argument("--plot", action="store_true", help="draw the stored figures again")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments.case, arguments.longest)))
        return
    path = RESULTS / "dilated.json"
    if arguments.plot:
        plot(json.loads(path.read_text())["cases"])
        return
    results = {}
    for case in CASES:
        results[case] = measured_apart(__file__, "--case", case, "--longest", arguments.longest)
        for way in ("training", "forward"):
            if way in results[case]:
                per_token = [s / int(n) * 1e6 for n, s in results[case][way].items()]
                report(f"{case}, {way}", per_token, "us per token")
        per_token = [size / int(n) for n, size in results[case]["peak_bytes"].items()]
        report(f"{case}, peak", per_token, "bytes per token")
    record = {"device": platform.processor() or platform.machine(), "torch": torch.__version__}
    record |= {"threads": 1, "heads": [HEADS, HEAD_DIM], "branches": BRANCHES, "cases": results}
    path.write_text(json.dumps(record, indent=1) + "\n")
    plot(results)


def plot(results):
    """Time per token of training, and time of a forward pass, against the length."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for case, ways in results.items():
        lengths = [int(n) for n in ways["training"]]
        per_token = [s / n * 1e6 for n, s in zip(lengths, ways["training"].values())]
        (line,) = axes[0].plot(lengths, per_token, "o-", label=case)
        if "forward" in ways:
            lengths = [int(n) for n in ways["forward"]]
            seconds = list(ways["forward"].values())
            axes[1].plot(lengths, seconds, "o-", color=line.get_color(), label=case)
    axes[0].set(title="forward and backward", ylabel="CPU µs per token", ylim=(0, None))
    axes[1].set(title="forward", ylabel="CPU seconds", yscale="log")
    for axis in axes:
        axis.set(xscale="log", xlabel="tokens")
        axis.grid(alpha=0.3)
        ticks = {4096: "4k", 32_768: "32k", 131_072: "128k"}
        if axis is axes[1]:
            ticks[1 << 20] = "1M"
        axis.set_xticks(list(ticks), list(ticks.values()))
        axis.minorticks_off()
        axis.legend()
    figure.tight_layout()
    figure.savefig(RESULTS / "dilated.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
