"""Tokenises gigabytes of text with recipes/prepare.py and says how much memory that took at most.

    python tests/recipes/large_text.py [--gigabytes 2] [--workers 2] [--tokenizer tokenizers/byte]

The text is JSON lines: Python's standard library, cut into documents of 200 bytes to 200 kB whose
lines are put in another order, so that no two documents are the same. Memory is that of the whole
tree of processes, where a page that n of them share counts 1/n to each (PSS; Linux alone has it).
The exit status says whether it stayed under `BOUND`.
"""

import argparse
import json
import math
import random
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
BOUND = 1e9  # bytes, whatever the size of the text
EVERY = 0.25  # seconds between two looks at the processes


def write_text(path, size, seed):
    """JSON lines of `size` bytes in all, or a document more."""
    rng, written = random.Random(seed), 0
    lines = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        lines += file.read_text(errors="replace").splitlines(keepends=True)
    smallest, largest = math.log(200), math.log(200_000)
    with path.open("w") as file:
        while written < size:
            count = int(math.exp(rng.uniform(smallest, largest)) / 35) + 1  # bytes of a mean line
            text = "".join(rng.choices(lines, k=count))
            written += file.write(json.dumps({"text": text}) + "\n")
    return path.stat().st_size


def memory(process):
    """Bytes that a process and those it began take together; 0 for those that have gone."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def main():
    """Reads the command line, writes the text and watches prepare.py."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=2.0, help="10^9 bytes")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tokenizer", default="tokenizers/byte")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.jsonl"
        size = write_text(text, options.gigabytes * 1e9, options.seed)
        command = [sys.executable, ROOT / "recipes/prepare.py"]
        command += [ROOT / "recipes/configs/retnet_demo.toml", "--workers", str(options.workers)]
        command += ["--data", text, "--tokenizer", options.tokenizer]
        command += ["--cache_dir", Path(folder) / "cache"]
        began, peak = time.monotonic(), 0
        with psutil.Popen([str(word) for word in command]) as process:
            while process.poll() is None:
                peak = max(peak, memory(process))
                try:
                    process.wait(EVERY)
                except psutil.TimeoutExpired:
                    continue
        seconds = time.monotonic() - began
    print(
        f"{size:,} bytes, {options.workers} workers, status {process.returncode}: at most "
        f"{peak / 1e6:.0f} MB in {seconds:.0f} s"
    )
    sys.exit(process.returncode or int(peak > BOUND))


if __name__ == "__main__":
    main()
