"""Every two features of a recipe together: trained, interrupted and resumed, or refused in a line.

    python tests/recipes/feature_pairs.py [--only carry]

Prints what is refused and why, and what is wrong; the exit status says whether anything is.
"""

import argparse
import itertools
import json
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from conftest import TINY, Workshop, started_forks

SHORT = ["--steps", "8", "--warmup_steps", "1", "--decay_steps", "2", "--checkpoint_every", "4"]
SHORT += ["--eval_every", "4"]
FULL = ["--architecture", "sliding_window", "--model.sliding_window", "none"]
COPY = ["--task", "{name = 'copy', tokens = 4}"]


def features(folder):
    """Name -> options, with texts and weights of a folder."""
    sources = [
        f'{{name = "x", data = "{folder / "docs"}", weight = 2.0}}',
        f'{{name = "y", data = "{folder / "more"}", weight = 1.0}}',
    ]
    return {
        "carried states": ["--carry_state", "true", "--packing", "documents"],
        "a schedule": ["--context_schedule", "[[0, 16], [4, 32]]"],
        "a stream": ["--streaming", "true"],
        "sources": ["--sources", f"[{', '.join(sources)}]"],
        "init_from": ["--init_from", str(folder / "base")],
        "lora": ["--init_from", str(folder / "base"), "--lora.rank", "2"],
        "an average": ["--ema_decay", "0.9"],
        "spikes": ["--skip_spikes", "8"],
        "z-loss": ["--z_loss", "1e-3"],
        "recomputing": ["--gradient_checkpointing", "true"],
        "replay": ["--replay_segment_length", "8"],
        "a task": COPY,
        "positions": ["--eval_positions", "4"],
        "lengths": ["--eval_contexts", "[8, 32]", "--eval_lengths", "[16, 64]"],
        "workers": ["--tokenising_workers", "2"],
        "asynchronous": ["--async_checkpoints", "true"],
        "documents": ["--packing", "documents"],
        "micro-batches": ["--micro_batch_size", "1"],
        "bf16": ["--precision", "bf16"],
        "rates": ["--learning_rate_scales.*.mixer.*", "2.0"],
        "chunked loss": ["--loss_chunk_size", "16"],
        "jumps": [*FULL, "--position_skip.target", "128"],
        "groups": [*FULL, "--attention_shift_groups", "4"],
        "samples": ["--sample_prompts", '["1 "]', "--sample_tokens", "4"],
    }


def write_texts(folder):
    """Two folders of documents."""
    for name, factor in (("docs", 3), ("more", 7)):
        (folder / name).mkdir()
        with open(folder / name / "text.jsonl", "w", encoding="utf-8") as file:
            for n in range(600):
                numbers = range(1, 40 + n % 50)
                line = {"text": " ".join(f"{factor * n * k}" for k in numbers)}
                file.write(json.dumps(line) + "\n")


def try_pair(workshop, name, options):
    """What happens: "" if all is well, else what is wrong, and what is refused (one of them)."""
    done = workshop.run("--name", name, *SHORT, *options)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line]
        if done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "):
            return "", lines[0]
        return f"status {done.returncode}: {done.stderr[-1000:]}", ""
    whole, resumed = workshop.folder / name, workshop.folder / f"{name}, resumed"
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoint-8")
    (resumed / "model.safetensors").unlink()
    done = workshop.run("--name", resumed.name, *SHORT, *options, "--resume")
    if done.returncode:
        return f"resuming: status {done.returncode}: {done.stderr[-1000:]}", ""
    one, two = (workshop.curve(folder.name) for folder in (whole, resumed))
    files = [whole / name for name in ("model.safetensors", "adapter/adapter_model.safetensors")]
    weights = [
        file.read_bytes() == (resumed / file.relative_to(whole)).read_bytes()
        for file in files
        if file.exists()
    ]
    shutil.rmtree(whole)
    shutil.rmtree(resumed)
    return "" if one == two and all(weights) else "resumed, it is another run", ""


def try_all(only, forks):
    """Yields (pair, what is wrong, what is refused) of the pairs that have `only` in a name."""
    text = TINY.replace("dropout = 0.1", "")
    of_task = text.replace("eval_bytes = 1000\n", "").replace("sequence_length = 32\n", "")
    for is_task in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            workshop = Workshop(folder, folder / "cache", forks)
            workshop.recipe.write_text(of_task if is_task else text)
            write_texts(folder)
            data = ["--data", str(folder / "docs")]
            begun = workshop.run("--name", "base", *SHORT, *(COPY if is_task else data))
            assert begun.returncode == 0, begun.stderr
            known = features(folder)
            for pair in itertools.combinations(known, 2):
                if ("a task" in pair) != is_task or not any(only in name for name in pair):
                    continue
                options = [*known[pair[0]], *known[pair[1]]]
                if not {"sources", "a task"} & {*pair}:
                    options += data
                yield pair, *try_pair(workshop, " and ".join(pair), options)


def main():
    """Tries all pairs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="part of a feature's name")
    count = refused = wrong = 0
    with started_forks() as forks:
        for pair, failure, refusal in try_all(parser.parse_args().only, forks):
            count, refused, wrong = count + 1, refused + bool(refusal), wrong + bool(failure)
            if failure or refusal:
                verdict = f"WRONG: {failure}" if failure else f"refused: {refusal}"
                print(f"{' and '.join(pair)}: {verdict}", flush=True)
    print(f"{count} pairs: {refused} refused in a line, {wrong} wrong, the others resumed")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
