"""What a memory takes, and what a decoding step costs with it, beside a sliding window on one core.

    python kernels/bench/memories.py [--lengths 1024,8192,32768] [--only memorizing,rmt]

Two layers of width 256 (4 heads of 64; two of keys and values where an architecture has groups),
windows and segments of 256 tokens. Each model reads a text of so many tokens; the bytes of the
cache it then holds are counted, held against what the model says of itself (`state_size`), and told
beside a formula written from the architecture's paper. Then all take one step after the other, in
turns, over a whole segment: that has each model's dear steps in it (those that end a segment, or
begin one) in their proportion. What is told is the mean CPU time of a step, the same divided by
the sliding window's, and the quartiles of that ratio over steps. Writes
kernels/bench/results/memories.json.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

import zoo
from zoo.core.state import state_bytes

RESULTS = Path(__file__).parent / "results"
SIZES = {"vocab_size": 259, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPS = {"num_key_value_heads": 2}
SEGMENT = 256  # tokens, of windows too
PIECE = 1024  # tokens of a pass while a text is read
WINDOW = {"sliding_window": SEGMENT}
FLOAT = 4  # bytes


def keys_and_values(config, tokens):
    """Bytes of so many tokens' keys and values in a layer."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * tokens * heads * config.head_dim * FLOAT


def all_tokens(config, length):
    """Full attention: 2 T G K in each layer."""
    return config.num_hidden_layers * keys_and_values(config, length)


def window(config, length):
    """2 W G K in each layer."""
    return config.num_hidden_layers * keys_and_values(config, SEGMENT)


def hidden_window(config, length):
    """Transformer-XL: mem_len D in each layer."""
    return config.num_hidden_layers * config.mem_len * config.hidden_size * FLOAT


def compressive(config, length):
    """Infini: 2 L G K in each layer, and K (V + 1) per group twice: what is read and written."""
    matrix = config.num_key_value_heads * config.head_dim * (config.head_dim + 1) * FLOAT
    return window(config, length) + config.num_hidden_layers * 2 * matrix


def recurrent(config, length):
    """Block-Recurrent: M D and one more window in a recurrent layer."""
    states = config.num_states * config.hidden_size * FLOAT
    return window(config, length) + states + keys_and_values(config, SEGMENT)


def external(config, length):
    """Memorizing: 2 DB H K and 2 S H K more in the memory layer."""
    tokens = config.memory_size + config.memory_segment_length
    return window(config, length) + keys_and_values(config, tokens)


def focused(config, length):
    """LongLLaMA: 2 T G K in a memory layer, of C windows 2 (C + 1) W G K; 2 W G K in the others."""
    kept = config.memory_windows
    tokens = length if kept is None else (kept + 1) * SEGMENT
    return keys_and_values(config, SEGMENT) + keys_and_values(config, tokens)


def memory_tokens(config, length):
    """RMT: 2 (L + m) G K in each layer, and m D once."""
    count = config.num_memory_tokens
    own = config.num_hidden_layers * keys_and_values(config, SEGMENT + count)
    return own + count * config.hidden_size * FLOAT


def associative(config, length):
    """ARMT: 2 (L + m) G K and 6 d (D + 1) in each layer, for keys of d."""
    layer = keys_and_values(config, SEGMENT + config.num_memory_tokens)
    layer += 6 * config.memory_size * (config.hidden_size + 1) * FLOAT
    return config.num_hidden_layers * layer


def landmarks(config, length):
    """Landmark: 2 T N / (N - 1) G K in each layer, blocks of N with their landmark."""
    per_block = config.block_length
    return config.num_hidden_layers * keys_and_values(config, length * (per_block + 1) / per_block)


MEMORY = {"memory_layers": [1], "memory_segment_length": SEGMENT, "memory_size": 2048}
MEMORY |= WINDOW | {"num_states": 0, "memory_neighbors": 32}
FOCUSED = GROUPS | {"segment_length": SEGMENT, "memory_layers": [1]}
TOKENS = GROUPS | {"segment_length": SEGMENT, "num_memory_tokens": 16}
# Name -> (architecture, fields, formula).
WAYS = {
    "window": ("sliding_window", GROUPS | WINDOW, window),
    "full": ("sliding_window", GROUPS | {"sliding_window": None}, all_tokens),
    "transformer_xl": ("transformer_xl", {"mem_len": SEGMENT}, hidden_window),
    "infini": ("infini", GROUPS | {"segment_length": SEGMENT}, compressive),
    "block_recurrent": (
        "block_recurrent",
        WINDOW | {"num_states": 32, "recurrent_layers": [0]},
        recurrent,
    ),
    "memorizing": ("block_recurrent", MEMORY, external),
    "memorizing_exact": ("block_recurrent", MEMORY | {"memory_selection": "exact"}, external),
    "long_llama": ("long_llama", FOCUSED, focused),
    "long_llama_ring": ("long_llama", FOCUSED | {"memory_windows": 7}, focused),
    "long_llama_top": ("long_llama", FOCUSED | {"memory_top_k": 32}, focused),
    "rmt": ("rmt", TOKENS, memory_tokens),
    "armt": ("rmt", TOKENS | {"memory": "associative", "memory_size": 16}, associative),
    "landmark": ("landmark", GROUPS | {"block_length": 63}, landmarks),
    "landmark_top": (
        "landmark",
        GROUPS | {"block_length": 63, "retrieved_blocks": 4},
        landmarks,
    ),
}


def model_of(name):
    """A random model of that kind."""
    architecture, fields, _ = WAYS[name]
    torch.manual_seed(0)
    found = zoo.MODELS[architecture]
    return found.causal_lm(found.config(**SIZES | fields)).eval()


def read(model, length):
    """The cache after a random text of so many tokens."""
    generator, cache, done = torch.Generator().manual_seed(0), None, 0
    while done < length:
        size = min(PIECE, length - done)
        ids = torch.randint(1, 259, (1, size), generator=generator)
        output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, done = output.past_key_values, done + size
    return cache


@torch.inference_mode()
def measure(names, length, steps):
    """{name: figures} after so many tokens."""
    models, caches, results = {name: model_of(name) for name in names}, {}, {}
    for name, model in models.items():
        caches[name] = read(model, length)
        held, said = state_bytes(caches[name]), model.state_size(length)
        if held != said:
            raise ValueError(f"{name} holds {held} bytes after {length} tokens, but says {said}.")
        results[name] = {"bytes": held, "formula_bytes": round(WAYS[name][2](model.config, length))}
    seconds, token = {name: [] for name in names}, torch.tensor([[1]])
    for _ in range(steps):
        for name, model in models.items():
            start = time.process_time()
            model(token, past_key_values=caches[name], use_cache=True)
            seconds[name].append(time.process_time() - start)
    for name, taken in seconds.items():
        ratios = [own / plain for own, plain in zip(taken, seconds["window"], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        mean = statistics.fmean(taken)
        results[name] |= {
            "milliseconds": round(1000 * mean, 3),
            "dearest_milliseconds": round(1000 * max(taken), 3),
            "ratio": round(mean / statistics.fmean(seconds["window"]), 3),
            "quartiles": [round(low, 3), round(high, 3)],
        }
    return results


def main():
    """Prints a line per length and memory, and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="1024,8192,32768", help="tokens before the steps")
    parser.add_argument("--steps", type=int, default=SEGMENT, help=f"of each (default: {SEGMENT})")
    parser.add_argument("--only", default="", help="names, beside window (default: all)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    only = [name for name in arguments.only.split(",") if name]
    names = ["window", *(name for name in only or WAYS if name != "window")]
    record = {"device": platform.processor() or platform.machine(), "torch": torch.__version__}
    record |= {"sizes": SIZES, "steps": arguments.steps}
    record |= {"ways": {x: {"architecture": WAYS[x][0]} | WAYS[x][1] for x in names}, "lengths": {}}
    for length in map(int, arguments.lengths.split(",")):
        record["lengths"][length] = measure(names, length, arguments.steps)
        for name, x in record["lengths"][length].items():
            low, high = x["quartiles"]
            print(
                f"{length:6} tokens, {name:16} {x['bytes'] / 2**20:7.3f} MiB, formula "
                f"{x['formula_bytes'] / 2**20:7.3f}; a step {x['milliseconds']:6.2f} ms, "
                f"{x['ratio']:.2f} times the window's ({low:.2f} to {high:.2f})",
                flush=True,
            )
    if not only:
        (RESULTS / "memories.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
