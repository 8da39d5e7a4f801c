"""What a decoding step costs with each rope_extension, beside plain RoPE, on one core.

    python kernels/bench/extensions.py [--lengths 2048,8192,32768] [--rounds 41]

One token after a text of so many, through two layers of width 512 (8 heads of 64, two of keys and
values) that were trained for 1,024 tokens, with a cache made of random numbers: all ways take turns
in every round, and what is told is the median over rounds of their CPU time divided by plain
RoPE's in the same round, with the quartiles. Bytes of the cache are counted and held against the
formula of zoo/layers/extended_softmax.py. Writes kernels/bench/results/extensions.json.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from zoo import SlidingWindowConfig, SlidingWindowForCausalLM
from zoo.core.state import new_cache, state_bytes

RESULTS = Path(__file__).parent / "results"
SIZES = {
    "vocab_size": 259,
    "hidden_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "sliding_window": None,
}
WAYS = {
    "rope": None,
    "rerope": {"type": "rerope", "window": 512, "log_n_length": 1024},
    "leaky_rerope": {"type": "leaky_rerope", "window": 512, "factor": 16},
    "self_extend": {"type": "self_extend", "window": 512, "group_size": 16},
    "dual_chunk": {"type": "dual_chunk", "chunk_size": 768, "local_window": 128},
}


def model_of(extension):
    """A random model with that extension."""
    torch.manual_seed(0)
    config = SlidingWindowConfig(**SIZES, rope_extension=extension)
    return SlidingWindowForCausalLM(config).eval()


def filled_cache(model, length):
    """A cache as after so many tokens."""
    generator = torch.Generator().manual_seed(0)
    cache = new_cache(model.config)
    for layer, specs in zip(cache.layers, model.model.state_specs(), strict=True):
        for name, spec in specs.items():
            shape = [length if size is None else size for size in spec.shape]
            layer.tensors[name] = torch.randn(1, *shape, generator=generator, dtype=spec.dtype)
        layer.clock, layer.length = torch.tensor([length]), length
    return cache


def expected_bytes(config, length):
    """By the formula, in float32."""
    width = config.num_key_value_heads * config.head_dim
    near = (config.rope_extension or {}).get("window", 0)
    return config.num_hidden_layers * 4 * width * (2 * length + near)


@torch.inference_mode()
def measure(length, rounds):
    """{way: {"milliseconds", "ratio", "quartiles", "bytes"}} of a step after so many tokens."""
    models = {name: model_of(extension) for name, extension in WAYS.items()}
    caches = {name: filled_cache(model, length) for name, model in models.items()}
    results = {}
    for name, model in models.items():
        held = state_bytes(caches[name])
        assert held == expected_bytes(model.config, length), (name, held)
        results[name] = {"bytes": held}
    seconds = {name: [] for name in WAYS}
    token = torch.tensor([[1]])
    for round_ in range(rounds + 3):
        for name, model in models.items():
            start = time.process_time()
            model(token, past_key_values=caches[name], use_cache=True)
            if round_ >= 3:
                seconds[name].append(time.process_time() - start)
    for name, taken in seconds.items():
        ratios = [own / plain for own, plain in zip(taken, seconds["rope"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        results[name] |= {
            "milliseconds": round(1000 * statistics.median(taken), 3),
            "ratio": round(middle, 3),
            "quartiles": [round(low, 3), round(high, 3)],
        }
    return results


def main():
    """Prints a line per length and way, and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="2048,8192,32768", help="tokens before the step")
    parser.add_argument("--rounds", type=int, default=41, help="steps of each way (default: 41)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    record = {"device": platform.processor() or platform.machine(), "torch": torch.__version__}
    record |= {"rounds": arguments.rounds, "ways": WAYS, "lengths": {}}
    for length in map(int, arguments.lengths.split(",")):
        record["lengths"][length] = measure(length, arguments.rounds)
        for name, x in record["lengths"][length].items():
            low, high = x["quartiles"]
            print(
                f"{length:6} tokens, {name:12} {x['milliseconds']:8.2f} ms, {x['ratio']:.2f} times "
                f"plain RoPE ({low:.2f} to {high:.2f}), {x['bytes'] / 2**20:.2f} MiB",
                flush=True,
            )
    (RESULTS / "extensions.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
