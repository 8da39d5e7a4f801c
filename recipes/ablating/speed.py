"""Throughput and memory of a model at growing lengths, on this machine.

    python -m ablating.speed retnet '{"hidden_size": 64}' 3 256 1024     (in recipes/)

Every length is measured in a process of its own, because a process's peak of memory never falls.
They are forks of one that has imported what they need, which takes longer than most lengths do.
"""

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

RECIPES = Path(__file__).resolve().parents[1]
# By default glibc gives a large tensor fresh pages and takes them back at once, so that long
# sequences would pay for page faults which short ones do not. Other C libraries ignore these.
HEAP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
FIRST = 16  # tokens of the pass before anything is measured, which allocates what is made once


def measure(architecture, fields, lengths, repeats=3):
    """Measures a fresh model with one sequence at a time: prefill, and forward and backward.

    Args:
        architecture: a key of zoo.MODELS.
        fields: of its config, as in a recipe's model table.
        lengths: in tokens.
        repeats: passes of each kind and length that the median is taken of, after a first.

    Returns:
        For each length {"length", "prefill_tokens_per_second", "training_tokens_per_second",
        "peak_bytes"}: on a CPU of one thread and per second of its processor time; the peak is that
        of a training pass, beyond what the process held after a pass of 16 tokens. Where a length
        could not be measured, {"length", "error"} with what went wrong.
    """
    python_path = [str(RECIPES), str(RECIPES.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | HEAP | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, python_path))
    words = [architecture, json.dumps(fields), str(repeats), *map(str, lengths)]
    command = [sys.executable, "-m", "ablating.speed", *words]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    said = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    found = {figures["length"]: figures for figures in said}
    last = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
    return [found.get(length, {"length": length, "error": last}) for length in lengths]


def measure_here(architecture, fields, length, repeats):
    """The figures of one length, in this process."""
    import torch

    from pretraining.building import build_config, build_model, load_tokenizer
    from pretraining.costs import peak_memory
    from pretraining.recipe import Recipe

    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = Recipe("speed", architecture, model=fields)
    config = build_config(recipe, load_tokenizer(recipe.tokenizer))
    model = build_model(recipe, config).to(device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, max(length, FIRST)), generator=generator).to(device)

    def prefill(ids):
        with torch.inference_mode():
            model.eval()(ids, use_cache=True, logits_to_keep=1)

    def train(ids):
        model.train()(ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()

    def clock():
        if device.type == "cpu":
            return time.process_time()  # other work on the machine does not count
        torch.cuda.synchronize(device)
        return time.perf_counter()

    def tokens_per_second(run):
        seconds = []
        for _ in range(1 + repeats):
            began = clock()
            run(ids[:, :length])
            seconds.append(clock() - began)
        return length / statistics.median(seconds[1:])

    train(ids[:, :FIRST])
    before = peak_memory(device)[0]
    figures = {"length": length, "training_tokens_per_second": tokens_per_second(train)}
    figures["peak_bytes"] = peak_memory(device)[0] - before
    return figures | {"prefill_tokens_per_second": tokens_per_second(prefill)}


def print_figures(architecture, fields, length, repeats):
    """Prints the figures of a length as JSON, or what went wrong."""
    try:
        figures = measure_here(architecture, fields, length, repeats)
    except Exception as error:  # of whatever a model cannot do at a length
        figures = {"length": length, "error": f"{type(error).__name__}: {error}".split("\n")[0]}
    print(json.dumps(figures), flush=True)


def main(architecture, fields, repeats, *lengths):
    """Measures each length in a fork."""
    import pretraining.building  # noqa: F401  what forks need; it starts no threads

    for length in map(int, lengths):
        measuring = architecture, json.loads(fields), length, int(repeats)
        fork = multiprocessing.get_context("fork").Process(target=print_figures, args=measuring)
        fork.start()
        fork.join()
        if fork.exitcode:
            error = f"the process ended with {fork.exitcode} (-9: killed, as for lack of memory)"
            print(json.dumps({"length": length, "error": error}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
