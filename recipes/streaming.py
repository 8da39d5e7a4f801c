"""Measures a sliding window with attention sinks on streams far longer than the window.

    python recipes/streaming.py runs/sliding_window_sinks --compile

After StreamingLLM (Xiao et al. 2023, https://arxiv.org/abs/2309.17453): is the perplexity of text
the same at every position of a stream, what do the same weights do without their sinks (a plain
window, which the first tokens leave), and does the state keep its size while the model generates?
The answers go to streaming.json and streaming.png.

Pieces of text differ more than positions do, so each bin of positions has to see the same text.
The held-out text, one file after the other, is cut to N tokens and closed to a circle. N / w
streams begin on it, w tokens apart, and positions are counted in bins of w. In bin b stream s is in
piece s + b (mod N / w) of the circle: over all streams, each bin holds each token of the text
exactly once. A stream is one document to the model: nothing in it resets the state.
"""

import argparse
import json
import math
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads OpenMP

import torch
from transformers import AutoModelForCausalLM

from pretraining.building import REPOSITORY, load_tokenizer
from pretraining.continuing import FREE_KEYS
from pretraining.measuring import attention_on_sinks, generate_stream, nats_by_position
from pretraining.mixing import load_mixture
from pretraining.plotting import plot_streaming
from pretraining.recipe import Recipe, UsageError
from pretraining.reporting import bits_per_byte, environment, write_json
from pretraining.usage import run_script


def read_run(folder):
    """(recipe, steps done, SHA-256 of the corpus) of a finished run or a checkpoint.

    Raises:
        UsageError: no model is there, or nothing that says how it was trained.
    """
    folder = Path(folder)
    names = ("checkpoint.json", "run.json") if (folder / "config.json").is_file() else ()
    for path in [folder / name for name in names if (folder / name).is_file()]:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            recipe = Recipe(**record["recipe"])
            if path.name == "checkpoint.json":
                return recipe, record["step"], record["corpus"]
            return recipe, record["results"]["step"], record["corpus"]["sha256"]
        except (ValueError, TypeError, KeyError):
            raise UsageError(
                f"{path} is damaged, or the run did not end; give a finished run or another "
                "checkpoint."
            ) from None
    raise UsageError(
        f"expected a finished run or a checkpoint, with config.json and run.json or "
        f"checkpoint.json, got {folder}; make one with recipes/pretrain.py."
    )


def load_models(folder, beside=""):
    """The models to compare by name: with sinks, the same without, and another run's.

    Raises:
        UsageError: the first has no sinks to take away.
    """
    models = {"sinks": AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)}
    if not getattr(models["sinks"].config, "num_sink_tokens", 0):
        raise UsageError(
            f"the model in {folder} has no sinks; train one with --model.num_sink_tokens 4, as "
            "recipes/configs/sliding_window_sinks.toml does."
        )
    without = {"num_sink_tokens": 0, "dtype": torch.float32}
    models["evicted"] = AutoModelForCausalLM.from_pretrained(folder, **without)
    if beside:
        models["beside"] = AutoModelForCausalLM.from_pretrained(beside, dtype=torch.float32)
    return {name: model.eval() for name, model in models.items()}


def measure_curve(model, ids, width, num_positions, bits_per_nat):
    """The bins as they are written down: their width, perplexity per token and bits per byte."""
    nats = nats_by_position(model, ids, width, num_positions)
    return {
        "width": width,
        "perplexity": nats.exp().tolist(),
        "bits_per_byte": (nats * bits_per_nat).tolist(),
    }


def compare(measured, near, far):
    """The perplexity of the bins that two positions lie in, and the second over the first."""
    at = {str(position): position // measured["width"] for position in (near, far)}
    found = {position: measured["perplexity"][index] for position, index in at.items()}
    return found | {"ratio": found[str(far)] / found[str(near)]}


def measure(options):
    """Everything that is measured, as it is written to streaming.json.

    Raises:
        UsageError: a run that is not there, or text that is not its own.
    """
    runs = {"sinks": options.run} | ({"beside": options.beside} if options.beside else {})
    trained = {name: read_run(folder) for name, folder in runs.items()}
    if not options.near < options.far < options.positions:
        raise UsageError(
            "expected near < far < positions, got "
            f"{options.near}, {options.far} and {options.positions}; make the streams longer."
        )
    if options.generate < 1:
        raise UsageError(f"generate is at least one token, got {options.generate}.")
    recipe, _, text = trained["sinks"]
    models = load_models(options.run, options.beside)
    config, tokenizer = models["sinks"].config, load_tokenizer(options.run)
    corpus = load_mixture(recipe, tokenizer, options.cache_dir)
    if any(corpus.record["sha256"] != run[2] for run in trained.values()):
        raise UsageError(
            f"{recipe.data or 'what the sources name'} is not the text that the runs were trained "
            "on, so what they held out is not known; measure with the Python or the files of the "
            "training."
        )
    held_out = corpus.held_out
    ids = torch.from_numpy(held_out.ids[: options.text].astype("int64"))
    bits_per_nat = bits_per_byte(len(held_out.ids), held_out.num_bytes)
    shares = attention_on_sinks(models["sinks"], ids)
    print(f"attention on sinks by layer and head: {shares}", flush=True)
    curves, fine = {}, max(1, config.sliding_window // 2)
    for name, model in models.items():
        late = measure_curve(model, ids, options.width, options.positions, bits_per_nat)
        early = measure_curve(model, ids, fine, 8 * fine, bits_per_nat)
        compared = compare(late, options.near, options.far)
        curves[name] = {"compared": compared, "early": early, "late": late}
        print(f"{name}: perplexity by position {json.dumps(compared)}", flush=True)
    model = torch.compile(models["sinks"]) if options.compile else models["sinks"]
    sampled, records = generate_stream(
        model, tokenizer.eos_token_id, options.generate, options.seed
    )
    numbers_per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    is_bytes = len(held_out.ids) == held_out.num_bytes + len(held_out.starts) + 1
    return {
        "runs": {
            name: {
                "steps": steps,
                "recipe": {k: v for k, v in vars(run).items() if k not in FREE_KEYS},
            }
            for name, (run, steps, _) in trained.items()
        },
        "parameters": models["sinks"].num_parameters(),
        "sliding_window": config.sliding_window,
        "num_sink_tokens": config.num_sink_tokens,
        "corpus_sha256": text,
        "token": "byte" if is_bytes else "token",
        "text_tokens": len(ids) // options.width * options.width,
        "streams": len(ids) // options.width,
        "attention_on_sinks": shares,
        "curves": curves,
        "generation": {
            "seed": options.seed,
            "compiled": options.compile,
            "state_size": models["sinks"].state_size(),
            "bytes_per_token_of_full_attention": 4 * numbers_per_token,
            "is_finite": all(math.isfinite(record["largest_logit"]) for record in records),
            "records": records,
            "last_text": tokenizer.decode(sampled[-300:]),
        },
        "cpu_threads": torch.get_num_threads(),
        **environment(REPOSITORY),
    }


def start(arguments):
    """Reads the command line, measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", help="a finished run's folder, or a checkpoint")
    parser.add_argument("--beside", default="", help="a run that was trained without sinks")
    parser.add_argument("--output_dir", default=str(REPOSITORY / "recipes/results"))
    parser.add_argument("--cache_dir", default="", help="tokenised corpora; empty: the run's")
    parser.add_argument("--text", type=int, default=49_152, help="tokens of held-out text")
    parser.add_argument("--width", type=int, default=4096, help="positions per bin")
    parser.add_argument("--positions", type=int, default=102_400, help="tokens of each stream")
    parser.add_argument("--near", type=int, default=10_000, help="the position compared with")
    parser.add_argument("--far", type=int, default=100_000, help="the position compared")
    parser.add_argument("--generate", type=int, default=1_000_000, help="tokens to sample")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--compile", action="store_true", help="generate with torch.compile")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # a token at a time is too little work to share
    result = measure(options)
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "streaming.json", result)
    plot_streaming(folder / "streaming.png", result)
    print(f"wrote {folder / 'streaming.json'} and streaming.png")


def main():
    """Turns what the user can put right into one line."""
    run_script(start)


if __name__ == "__main__":
    main()
