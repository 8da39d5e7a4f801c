"""What sequence parallelism costs, by a model of it: bytes over a network, beside a layer's work.

    python kernels/bench/sequence_parallel_cost.py [--length 1048576]

Nothing is measured: products of sizes, over assumed speeds. Of each architecture what a process
tells the others in a layer's forward (in backward as much), and how long that takes in parts of the
time that the layer's matrix products take for its slice: on 8 devices that are joined by NVLink,
and on 64 over InfiniBand. As zoo/core/exchange.py does it: up to 8 processes tell everyone, more of
them go in log2 steps; windows go to the next process alone. And the memory of a model of 1.3
billion weights under FSDP2 with gradient checkpointing. Prints the tables in README.md.
"""

import argparse
import math

WIDTH, LAYERS, PARAMETERS = 2048, 24, 1.34e9
# Of an H100, and what of it is reached.
FLOPS = 989e12 * 0.45
# Devices, and bytes per second in one direction for each of them, of 450e9 and 50e9.
NETWORKS = {"8 on NVLink": (8, 350e9), "64 on InfiniBand": (64, 40e9)}
LARGEST_GATHER = 8
# Bytes of an activation (bfloat16) and of a state (float32).
HALF, FULL = 2, 4


def exchanged(length):
    """Of each architecture, batch 1: bytes of a state that all need, and of what the next one."""
    shift = 2 * HALF * WIDTH
    keys = 2 * HALF * 8 * 128  # of a token, 8 groups of 128
    return {
        "RetNet (8 heads, 256 x 512)": (FULL * 8 * 256 * 512, 0),
        "Lightning (16 heads, 128 x 128)": (FULL * 16 * 128 * 128, 0),
        "RWKV-4": (FULL * 3 * WIDTH, shift),
        "RWKV-5 (32 heads, 64 x 64)": (FULL * 32 * 64 * 64, shift),
        "RWKV-6 (32 heads, 64 x 64)": (FULL * 32 * (64 * 64 + 64), shift),
        "RWKV-7 (32 heads, 64 x 64)": (FULL * 32 * 64 * (64 + 64), shift),
        "Infini, linear (8 groups of 128)": (FULL * 8 * 128 * 129, 0),
        "Infini, delta (8 groups of 128)": (FULL * 8 * 128 * (2 * 128 + 1), 0),
        "sliding window of 4,096 (8 groups of 128)": (0, 4095 * keys),
        "Block-Recurrent (512 states, windows of 512)": (0, FULL * 512 * WIDTH + 511 * keys),
    }


def seconds(bytes_for_all, bytes_for_next, devices, speed):
    """Of a layer's exchange in one direction."""
    times = devices - 1 if devices <= LARGEST_GATHER else math.ceil(math.log2(devices))
    return (bytes_for_all * times + bytes_for_next) / speed


def of_softmax(length, devices, groups=8, heads=16, width=128):
    """Bytes of softmax attention over all: by heads, where queries, keys, values and outputs change
    places, if groups of heads divide; else everyone gets all keys and values.
    """
    tokens = length / devices * (devices - 1) * width * HALF
    if groups % devices:
        return 2 * groups * tokens
    return 2 * (heads + groups) * tokens / devices


def memory(length, devices):
    """GiB on a device: weights, gradients and AdamW in shards, a block's input of each layer, and
    all activations of one block, about 32 values per token and unit of width.
    """
    tokens = length / devices * WIDTH * HALF
    return (16 * PARAMETERS / devices + tokens * LAYERS + 32 * tokens) / 2**30


def main():
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=1 << 20, help="tokens (default: 1,048,576)")
    length = parser.parse_args().length
    print("| per layer and direction | tells, MB |", " | ".join(NETWORKS), "|")
    print("|---|---|" + "---|" * len(NETWORKS))
    work = {devices: length / devices * 24 * WIDTH**2 / FLOPS for devices, _ in NETWORKS.values()}
    for name, (for_all, for_next) in exchanged(length).items():
        shares = [
            f"{100 * seconds(for_all, for_next, *network) / work[network[0]]:.2g}%"
            for network in NETWORKS.values()
        ]
        print(f"| {name} | {(for_all + for_next) / 1e6:.2f} |", " | ".join(shares), "|")
    told = [of_softmax(length, devices) for devices, _ in NETWORKS.values()]
    shares = [
        f"{100 * size / speed / work[devices]:.0f}%"
        for size, (devices, speed) in zip(told, NETWORKS.values())
    ]
    sizes = ", ".join(f"{size / 1e6:,.0f}" for size in told)
    print(f"| softmax attention (8 groups of 128), all tokens | {sizes} |", " | ".join(shares), "|")
    print()
    print("| devices |", " | ".join(map(str, (1, 2, 4, 8, 64))), "|")
    print("|---|" + "---|" * 5)
    print("| GiB on each |", " | ".join(f"{memory(length, n):.0f}" for n in (1, 2, 4, 8, 64)), "|")


if __name__ == "__main__":
    main()
