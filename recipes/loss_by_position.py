"""Compares runs by their loss at each position of long streams, in windows and far beyond them.

    python recipes/loss_by_position.py runs/windows-0 runs/windows-1 --carried runs/carried-0

Does a model that was trained with its state carried from window to window (carry_state) make more
of text that lies further back than a window? Every bin of positions sees the same held-out text, as
in streaming.py. The answers go to loss_by_position.json and loss_by_position.png.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads OpenMP

import torch
from transformers import AutoModelForCausalLM

import zoo  # noqa: F401  transformers learns of its architectures
from pretraining.building import REPOSITORY, tokenizer_of
from pretraining.continuing import changes_history
from pretraining.measuring import nats_by_position
from pretraining.mixing import load_mixture
from pretraining.plotting import plot_by_position
from pretraining.recipe import Recipe, UsageError
from pretraining.reporting import bits_per_byte, environment, write_json
from pretraining.run_folder import read_record
from pretraining.usage import run_script

MAY_DIFFER = {"carry_state", "seed"}


def read_runs(folders):
    """The recipes of finished runs which differ in nothing but seed and carry_state, by folder.

    Raises:
        UsageError: no finished run, or another one.
    """
    recipes = {}
    for folder in folders:
        record = read_record(folder)
        if not record.get("results") or not (Path(folder) / "config.json").is_file():
            raise UsageError(f"expected a finished run, got {folder}; let recipes/pretrain.py end.")
        recipes[folder] = Recipe(**record["recipe"])
    (first, recipe), *others = recipes.items()
    for folder, other in others:
        changed = changes_history(vars(recipe), other, recipe.steps)
        said = [text for key, text in changed.items() if key not in MAY_DIFFER]
        if said:
            raise UsageError(f"{folder} was trained otherwise than {first}: {'; '.join(said)}.")
    return recipes


def measure(options):
    """Everything that is measured, as it is written to loss_by_position.json."""
    groups = {"windows": options.windows, "carried": options.carried}
    recipes = read_runs([folder for folders in groups.values() for folder in folders])
    recipe = recipes[options.windows[0]]
    corpus = load_mixture(recipe, tokenizer_of(recipe), options.cache_dir)
    held_out = corpus.held_out
    ids = torch.from_numpy(held_out.ids[: options.text].astype("int64"))
    curves = {}
    for name, folders in groups.items():
        curves[name] = []
        for folder in folders:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            nats = nats_by_position(model, ids, options.width, options.positions)
            found = [
                bits_per_byte(x * len(held_out.ids), held_out.num_bytes) for x in nats.tolist()
            ]
            curves[name].append({"seed": recipes[folder].seed, "bits_per_byte": found})
            shown = ", ".join(f"{x:.4f}" for x in found)
            print(f"{folder}: {shown} bits per byte", flush=True)
    return {
        "architecture": recipe.architecture,
        "recipe": {**vars(recipe), "name": None, "output_dir": None, "cache_dir": None},
        "window": recipe.sequence_length,
        "width": options.width,
        "text_tokens": len(ids) // options.width * options.width,
        "corpus_sha256": corpus.record["sha256"],
        "curves": curves,
        **environment(REPOSITORY),
    }


def start(arguments):
    """Reads the command line, measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("windows", nargs="+", help="finished runs without carry_state")
    parser.add_argument("--carried", nargs="+", required=True, help="finished runs with it")
    parser.add_argument("--output_dir", default=str(REPOSITORY / "recipes/results"))
    parser.add_argument("--cache_dir", default="", help="tokenised corpora; empty: the runs'")
    parser.add_argument("--text", type=int, default=49_152, help="tokens of held-out text")
    parser.add_argument("--width", type=int, default=64, help="positions per bin")
    parser.add_argument("--positions", type=int, default=1024, help="tokens of each stream")
    options = parser.parse_args(arguments)
    result = measure(options)
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "loss_by_position.json", result)
    plot_by_position(folder / "loss_by_position.png", result)
    print(f"wrote {folder / 'loss_by_position.json'} and loss_by_position.png")


def main():
    """Turns what the user can put right into one line."""
    run_script(start)


if __name__ == "__main__":
    main()
