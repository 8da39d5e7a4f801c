"""A results.json as a sweep would leave it, with true effects that are known.

python tests/recipes/made_results.py FOLDER      # thirteen models, to look at a report
"""

import hashlib
import json
import random
import sys
from pathlib import Path

# Name -> (effect in bits per byte, share of 16 pairs recalled, of 8, bytes of state, tokens/s).
MODELS = {
    "transformer": (0.0, 0.999, 1.0, 131_072, 61_000),
    "window": (0.06, 0.145, 0.31, 32_768, 66_000),
    "retnet": (-0.03, 0.96, 0.99, 16_896, 72_000),
    "lightning": (0.02, 0.958, 0.99, 16_384, 70_000),
    "hybrid": (-0.05, 0.943, 0.98, 73_728, 65_000),
    "rwkv4": (0.11, 0.09, 0.2, 2_560, 48_000),
    "rwkv5": (-0.04, 0.995, 1.0, 17_408, 55_000),
    "rwkv6": (-0.06, 0.978, 1.0, 17_408, 44_000),
    "rwkv7": (-0.12, 0.993, 1.0, 17_408, 38_000),
    "gated_deltanet": (-0.1, 0.97, 1.0, 18_944, 41_000),
    "infini": (0.001, 0.986, 1.0, 41_216, 52_000),
    "block_recurrent": (0.03, 0.28, 0.45, 49_152, 33_000),
    "longnet": (0.2, 0.01, 0.02, 98_304, 29_000),
}
FEW = ("transformer", "retnet", "rwkv7")
RATES, SEEDS, BEST = (1e-3, 3e-3, 1e-2), (1, 2, 3), 3e-3
TASKS = {
    "text": {"data": "stdlib", "sequence_length": 256, "eval_lengths": [64, 128, 1024]},
    "recall": {
        "task": {
            "name": "recall",
            "keys": 64,
            "values": 64,
            "pairs": 16,
            "test_pairs": [4, 8, 16, 24, 32],
            "control_pairs": 8,
        }
    },
}
STEPS = {"text": 500, "recall": 300}


def sha(*parts):
    """A hash in hexadecimal digits."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def made_trial(task, model, rate, seed, role="select", points=20):
    """A trial. Seeds move all models alike by 0.02, and each by 0.003 of its own."""
    shared, own = random.Random(f"{task} {seed}"), random.Random(f"{task} {model} {rate} {seed}")
    effect, recalled, control, _, speed = MODELS[model]
    off = {1e-3: 0.09, 3e-3: 0.0, 1e-2: 0.05}.get(rate, 0.3)
    is_text, tokens_per_step = task == "text", 8192 if task == "text" else 64 * 16
    noise = shared.gauss(0, 0.02) + own.gauss(0, 0.003)
    if is_text:
        score = 2.2 + effect + off + noise
        lengths = {64: 0.2, 128: 0.08, 1024: 0.9 if "transformer" in model else -0.03}
        figures = {"bits_per_byte": score}
        figures |= {f"bits_per_byte_at/{n}": score + more for n, more in lengths.items()}
        contexts = {**lengths, 256: 0.0}
        figures |= {f"bits_per_byte_in_context/{n}": score + contexts[n] for n in sorted(contexts)}
    else:
        score = min(1.0, max(0.0, recalled - off - abs(noise) / 4))
        figures = {"accuracy": score, "nats": 4 * (1 - score) + 0.01}
        for pairs in TASKS["recall"]["task"]["test_pairs"]:
            easy = control if pairs <= 8 else score
            figures[f"accuracy/pairs_{pairs}"] = easy * min(1.0, (16 / pairs) ** 0.5)
    steps, curve = STEPS[task], []
    for n in range(1, points + 1):
        step = steps * n // points
        loss = 0.9 * score + 3.5 * (step + 1) ** -0.5 + own.gauss(0, 0.02)
        loss = loss if is_text else figures["nats"] + 4 * 2.0 ** (-step / 30)
        curve.append(
            [step, step * tokens_per_step, step * tokens_per_step / speed, max(loss, 0.01)]
        )
    tokens, seconds = curve[-1][1:3]
    name = sha(task, model, rate, seed, role == "noise")[:12]
    return {
        "hash": name,
        "task": task,
        "model": model,
        "learning_rate": rate,
        "seed": seed,
        "role": role,
        "status": "done",
        "command": f"python recipes/pretrain.py trials/{name}/recipe.toml --resume_or_start",
        "recipe": {
            **TASKS[task],
            "architecture": model,
            "model": {"hidden_size": 64, "num_hidden_layers": 2},
            "batch_size": 32,
            "steps": steps,
            "learning_rate": rate,
            "seed": seed,
            "sequence_length": tokens_per_step // (32 if is_text else 64),
        },
        "device": "cpu",
        "precision": "fp32",
        "cpu_threads": 1,
        "processes": 1,
        "versions": {"torch": "2.13.0"},
        "git_commit": "c0ffee",
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": speed,
        "peak_memory": 500_000_000,
        "training_flops_per_token": 600_000 + 1000 * list(MODELS).index(model),
        "corpus_sha256": sha(task),
        "tokenizer_sha256": sha(task, "tokenizer"),
        "order_sha256": sha(task, seed),
        "score": score,
        "curve": curve,
        "held_out": [{"step": steps, "tokens": tokens, "seconds": seconds, **figures}],
    }


def made_model(name, index):
    """A model's entry, matched to within 0.3%."""
    _, _, _, state, speed = MODELS[name]
    grows = name == "transformer"
    count, flops = 98_304 + 20 * index, 200_000 + 500 * index
    sizes = {str(n): state * (n // 256 if grows else 1) for n in (256, 1024)}
    return {
        "architecture": name,
        "fields": {"hidden_size": 64, "num_hidden_layers": 2},
        "parameters": count + 16_576,
        "parameters_without_embeddings": count,
        "intermediate_size": 176 - index,
        "flops_per_token": flops,
        "training_flops_per_token": 3 * flops,
        "state_bytes": sizes,
        "match": {"by": "parameters", "target": 98_304, "found": count, "off": count / 98_304 - 1},
        "per_task": {
            task: {"parameters_without_embeddings": count, "state_bytes": sizes} for task in TASKS
        },
        "speed": [
            {
                "length": length,
                "prefill_tokens_per_second": 3 * speed / (1 + grows * length / 1000),
                "training_tokens_per_second": speed / (1 + grows * length / 1000),
                "peak_bytes": 40_000 * length * (1 + grows * length / 2000),
            }
            for length in (256, 1024, 4096)
        ],
    }


def made_results(models=FEW, points=20):
    """A finished sweep: three rates on seed 0, the best on three seeds, the baseline once more."""
    trials = []
    for task in TASKS:
        for model in models:
            trials += [made_trial(task, model, rate, 0, points=points) for rate in RATES]
            trials += [made_trial(task, model, BEST, seed, "report", points) for seed in SEEDS]
        rerun = made_trial(task, "transformer", BEST, SEEDS[0], "noise", points)
        trials.append(rerun | {"score": rerun["score"] - 1e-5})
    return {
        "sweep": {
            "name": "made",
            "match": {"by": "parameters", "reference": "transformer"},
            "sweep": {
                "learning_rates": list(RATES),
                "select_seed": 0,
                "seeds": list(SEEDS),
                "extend_at_edge": 1,
                "baseline": "transformer",
            },
            "tasks": TASKS,
            "models": {name: {"architecture": name} for name in models},
        },
        "environment": {"versions": {"torch": "2.13.0"}, "git_commit": "c0ffee"},
        "engine": "local",
        "models": {name: made_model(name, n) for n, name in enumerate(models)},
        "trials": trials,
    }


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    text = json.dumps(made_results(MODELS, points=150))
    (Path(sys.argv[1]) / "results.json").write_text(text)
