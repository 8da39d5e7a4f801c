"""The demo runs of all architectures over three seeds, for others to hold theirs against.

    python recipes/reference.py [retnet_demo ...] [--seeds 0 1 2] [--slots 2]

Every run is on a CPU, in float32, on one thread. What is done already is not done again, what was
interrupted goes on. The losses of every step and what was measured go to
recipes/results/reference/NAME.json, the curves to reference.png there; checkpoints stay in runs/.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pretraining.building import REPOSITORY
from pretraining.plotting import plot_reference
from pretraining.recipe import UsageError, nearest
from pretraining.reporting import write_json
from pretraining.run_folder import METRICS, read_record
from pretraining.usage import run_script

CONFIGS, RESULTS = REPOSITORY / "recipes/configs", REPOSITORY / "recipes/results/reference"
RUNS = REPOSITORY / "runs/reference"
# Losses of one step differ from seed to seed by text and by first weights. With three seeds an
# independent run is off their mean by sqrt(1 + 1/3) times the deviation, and of twenty steps of
# eleven models none should be outside by chance.
DEVIATIONS = 5.0


def train(name, seed):
    """Runs a demo to its end, or on from where it was; its output goes to a file beside it.

    Raises:
        UsageError: it failed.
    """
    RUNS.mkdir(parents=True, exist_ok=True)
    run, output = f"{name}-{seed}", RUNS / f"{name}-{seed}.log"
    command = [sys.executable, REPOSITORY / "recipes/pretrain.py", CONFIGS / f"{name}.toml"]
    options = {"seed": seed, "name": run, "output_dir": RUNS, "cpu_threads": 1, "log_every": 1}
    options["precision"] = "fp32"
    words = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
    with open(output, "a", encoding="utf-8") as file:
        status = subprocess.run(
            [*command, *words, "--resume_or_start"],
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=file,
        ).returncode
    if status:
        raise UsageError(f"{run} ended with status {status}; {output} says why.")
    print(f"{run} is done", flush=True)


def collect(name, seeds):
    """What the runs of a demo measured: recipe, versions and curves by seed."""
    curves = []
    for seed in seeds:
        folder = RUNS / f"{name}-{seed}"
        record = read_record(folder)
        lines = [json.loads(line) for line in open(folder / METRICS, encoding="utf-8")]
        held_out = [line for line in lines if line["kind"] == "held_out"]
        curves.append(
            {
                "seed": seed,
                "loss": [round(x["loss"], 6) for x in lines if x["kind"] == "train"],
                "held_out_bits_per_byte": {x["step"]: x["bits_per_byte"] for x in held_out},
                "training_seconds": round(held_out[-1]["seconds"], 1),
            }
        )
    recipe = {
        key: value
        for key, value in record["recipe"].items()
        if key not in ("seed", "name", "output_dir", "cache_dir")
    }
    return {
        "recipe": recipe,
        "parameters": record["parameters"],
        "corpus_sha256": record["corpus"]["sha256"],
        "device": record["device"],
        "versions": record["versions"],
        "curves": curves,
    }


def band(losses):
    """Where the losses of another seed lie.

    Args:
        losses: [seeds, steps].

    Returns:
        The lower and the upper edge, [steps] each: `DEVIATIONS` of a new run around the mean. The
        deviation is that of all steps together, for three seeds say little of a single step.
    """
    losses = np.asarray(losses)
    deviation = losses.var(axis=0, ddof=1).mean() ** 0.5 * (1 + 1 / len(losses)) ** 0.5
    mean = losses.mean(axis=0)
    return mean - DEVIATIONS * deviation, mean + DEVIATIONS * deviation


def start(arguments):
    """Reads the command line, trains what is missing and writes."""
    demos = sorted(path.stem for path in CONFIGS.glob("*_demo.toml"))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("demos", nargs="*", help="default: all of recipes/configs/*_demo.toml")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--slots", type=int, default=1, help="runs at a time, a core each")
    options = parser.parse_args(arguments)
    chosen = options.demos or demos
    for name in chosen:
        if name not in demos:
            raise UsageError(f"there is no demo {name!r}: {nearest(name, demos)}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.slots) as slots:
        runs = {
            name: [slots.submit(train, name, seed) for seed in options.seeds] for name in chosen
        }
        for name, of_seeds in runs.items():
            for run in of_seeds:
                run.result()
            write_json(RESULTS / f"{name}.json", collect(name, options.seeds))
            print(f"wrote {RESULTS / name}.json", flush=True)
    records = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    plot_reference(RESULTS / "reference.png", records)


def main():
    """Turns what the user can put right into one line."""
    run_script(start)


if __name__ == "__main__":
    main()
