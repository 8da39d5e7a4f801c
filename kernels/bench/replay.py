"""Segment replay on a CPU: peak memory and time of a training step with it and without.

    python kernels/bench/replay.py [--length 65536] [--segment 1024]

Forward and backward of one sequence through six layers of width 128 with two heads, one thread.
Each way in a process of its own, whose heap keeps what is freed (as in lengths.py): peak memory
beyond what it held after a short step, and CPU time, the least of two. Prints the ratios, and
writes kernels/bench/results/replay.json. RWKV-7 is not among them: without replay its step of that
length does not fit into 24 GB.
"""

import argparse
import json
import platform
import time

import torch
from lengths import RESULTS, measured_apart, peak_bytes

import zoo

SIZES = {
    "vocab_size": 259,
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "intermediate_size": 352,
}
MODELS = {
    "retnet": {},
    "rwkv4": {},
    "rwkv5": {},
    "rwkv6": {},
    "infini": {"segment_length": 1024},
    "lightning": {},
    "sliding_window": {"sliding_window": 512},
    "block_recurrent": {"sliding_window": 512, "num_states": 128},
}


def measure(name, length, segment):
    """{"peak_bytes", "seconds"} of a training step; segment 0: without replay."""
    torch.set_num_threads(1)
    architecture = zoo.MODELS[name]
    torch.manual_seed(0)
    model = architecture.causal_lm(architecture.config(**SIZES | MODELS[name])).train()
    model.model.replay_segment_length = segment or None

    def step(length):
        ids = torch.randint(0, 259, (1, length), generator=torch.Generator().manual_seed(0))
        hidden = model.model(ids, use_cache=False).last_hidden_state
        hidden.square().mean().backward()
        model.zero_grad()

    step(256)
    before, seconds = peak_bytes(), []
    for _ in range(2):
        start = time.process_time()
        step(length)
        seconds.append(time.process_time() - start)
    return {"peak_bytes": peak_bytes() - before, "seconds": round(min(seconds), 2)}


def main():
    """Prints a line per model and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=65_536, help="tokens (default: 65,536)")
    parser.add_argument("--segment", type=int, default=1024, help="tokens (default: 1,024)")
    parser.add_argument("--only", choices=MODELS, help="measure this with --segment, as JSON")
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(arguments.only, arguments.length, arguments.segment)))
        return
    results = {}
    for name in MODELS:
        ways = {}
        for way, segment in (("replay", arguments.segment), ("whole", 0)):
            options = "--only", name, "--segment", segment, "--length", arguments.length
            ways[way] = measured_apart(__file__, *options)
        memory = ways["whole"]["peak_bytes"] / ways["replay"]["peak_bytes"]
        slower = ways["replay"]["seconds"] / ways["whole"]["seconds"]
        print(
            f"{name:16} {ways['whole']['peak_bytes'] / 2**20:8.0f} MiB whole, "
            f"{ways['replay']['peak_bytes'] / 2**20:6.0f} with replay: 1/{memory:.1f}; "
            f"{ways['whole']['seconds']:6.1f} s, {ways['replay']['seconds']:6.1f}: {slower:.2f}x",
            flush=True,
        )
        results[name] = ways | {"memory_ratio": memory, "time_ratio": slower}
        record = {"device": platform.processor() or platform.machine(), "torch": torch.__version__}
        record |= {"length": arguments.length, "segment": arguments.segment, "models": results}
        (RESULTS / "replay.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
