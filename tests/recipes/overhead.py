"""What the recipe costs over a bare loop of the same model, and what its input costs.

    python tests/recipes/overhead.py [recipes/configs/retnet_demo.toml] [--blocks 8] [--steps 10]

Blocks of steps of both kinds take turns in one process, so that what else the machine does falls
on both. The recipe's steps are those of a run, with their log lines; evaluations and checkpoints,
which a user orders by number, are left out. The bare loop has forward, backward, clipping and
AdamW, on batches that are there.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "recipes"), str(ROOT)]

import torch
from accelerate import Accelerator

from pretraining.building import build_model, parameter_groups
from pretraining.checkpointing import Checkpoint
from pretraining.launching import StopSignals
from pretraining.recipe import read_recipe
from pretraining.recording import Records
from pretraining.reporting import Progress
from pretraining.training import Run


def bare_loop(run):
    """A function that does some steps with a model of its own."""
    recipe = run.recipe
    model = build_model(recipe, run._bare_model().config)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, recipe), lr=1e-3, betas=(0.9, 0.95), fused=True
    )
    batches = [run.windows.batch(step, 0, 0, 1, run.size) for step in range(4)]

    def steps(count):
        for number in range(count):
            batch = batches[number % len(batches)]
            loss = model(**batch, labels=batch["shift_labels"], use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return steps


def timed(function, *arguments):
    """Seconds of processor time, which others on the machine take less from than from the clock."""
    began = time.process_time()
    function(*arguments)
    return time.process_time() - began


def main():
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe", nargs="?", default=str(ROOT / "recipes/configs/retnet_demo.toml"))
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10, help="of a block")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        words = ["--output_dir", folder, "--cache_dir", f"{folder}/cache", "--cpu_threads", "1"]
        words += ["--eval_every", "0", "--checkpoint_every", "0", "--precision", "fp32"]
        words += ["--schedule", "constant"]
        recipe = read_recipe(options.recipe, words)
        recipe.run_dir.mkdir(parents=True)
        run = Run(recipe, Accelerator(cpu=True), 1, Checkpoint())
        run.records = Records(recipe, run.checkpoint, run._about(), run.corpus.record)
        run.progress = Progress(0, recipe.steps)
        run.evaluate = run.save_checkpoint = lambda: None
        signals, bare, ratios, shares = StopSignals(), bare_loop(run), [], []
        batch, inputs = run.windows.batch, []

        def timed_batch(*arguments):
            began = time.process_time()
            found = batch(*arguments)
            inputs.append(time.process_time() - began)
            return found

        run.windows.batch = timed_batch

        def steps(count):
            recipe.steps = run.step + count
            run._run_steps(signals)

        bare(2), steps(2)
        for block in range(options.blocks):
            inputs.clear()
            kinds = [(bare, "bare"), (steps, "recipe")]
            spent = {name: timed(kind, options.steps) for kind, name in kinds[:: 1 - block % 2 * 2]}
            ratios.append(spent["recipe"] / spent["bare"])
            shares.append(sum(inputs) / spent["recipe"])
            print(
                f"{options.steps} steps: bare {spent['bare']:.3f} s, recipe "
                f"{spent['recipe']:.3f} s, {ratios[-1] - 1:+.2%}, input {shares[-1]:.2%}",
                flush=True,
            )
        print(
            f"{recipe.name}: the recipe over a bare loop {statistics.median(ratios) - 1:+.2%} "
            f"({min(ratios) - 1:+.2%} to {max(ratios) - 1:+.2%}), input "
            f"{statistics.median(shares):.2%} of a step (at most {max(shares):.2%})"
        )


if __name__ == "__main__":
    main()
