"""Every fault at random moments of a run: what it cost, and whether the run goes on all the same.

    python tests/recipes/fault_table.py [--seed 0] [--times 3] [--only disk]

Prints a table; the exit status says whether all of it is as it should be. A full disk is a real
one, which only root can make; elsewhere its rows are left out, and said to be.
"""

import argparse
import contextlib
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import psutil
from conftest import Workshop, started_forks
from safetensors.torch import load_file

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
LAYOUTS = {
    "one process": {},
    "two, DDP": {"processes": 2},
    "two, FSDP2": {"processes": 2, "config": "fsdp2.yaml"},
}
STEPS, EVERY, DISK_BYTES = 120, 20, 8 * 2**20
FULL = "error: cannot write to"


class Bench:
    """Runs of the tiny recipe in one layout, in a folder of their own."""

    def __init__(self, folder, cache_dir, forks, layout):
        self.workshop = Workshop(folder, cache_dir, forks)
        self.folder, self.layout = folder, layout

    def run(self, name, *arguments):
        """A run to its end; its output must be that of a success."""
        done = self.workshop.run("--name", name, *arguments, **self.layout)
        assert done.returncode == 0, f"{name}: status {done.returncode}: {done.stderr[-2000:]}"
        return done.stdout

    def start(self, name, *arguments):
        return self.workshop.start_ranks("--name", name, *arguments, **self.layout)

    def steps_seen(self, name):
        path = self.folder / name / "metrics.jsonl"
        if not path.is_file():
            return 0
        steps = [json.loads(x)["step"] for x in path.read_text().splitlines() if x.endswith("}")]
        return steps[-1] if steps else 0

    def saved(self, name):
        folders = (self.folder / name).glob("checkpoint-*")
        steps = [int(x.name.split("-")[1]) for x in folders if x.name.split("-")[1].isdigit()]
        return max(steps, default=0)

    def wait_for(self, name, step, ranks):
        while self.steps_seen(name) < step:
            assert all(x.poll() is None for x in ranks), ranks[0].communicate()
            time.sleep(0.001)

    def difference(self, name):
        """The largest relative difference of a loss to that of the run without a fault."""
        kinds = ("loss", "bits_per_byte")
        one, two = (
            {(x["kind"], x["step"]): [x[k] for k in kinds if k in x][0] for x in lines}
            for lines in (self.workshop.curve(x) for x in ("whole", name))
        )
        assert one.keys() == two.keys(), f"{name} has other lines: {one.keys() ^ two.keys()}"
        a, b = (load_file(self.folder / x / "model.safetensors") for x in ("whole", name))
        weights = max(float((a[key] - b[key]).abs().max()) for key in a)
        return max([weights, *(abs(one[key] - two[key]) / one[key] for key in one)])


def end(ranks, patience=20):
    """Waits for one rank to end, then as torchrun does makes the others; their (status, stderr)."""
    while all(rank.poll() is None for rank in ranks):
        time.sleep(0.005)
    deadline = time.monotonic() + patience
    while any(rank.poll() is None for rank in ranks):
        if time.monotonic() > deadline:
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()
        time.sleep(0.005)
    return [(rank.returncode, rank.communicate()[1]) for rank in ranks]


def by_signal(bench, name, rng, number):
    """Sent to one process: all save the step they are at and leave."""
    ranks, step = bench.start(name), rng.randrange(5, STEPS - 10)
    bench.wait_for(name, step, ranks)
    rng.choice(ranks).send_signal(number)
    ended = end(ranks)
    assert {code for code, _ in ended} == {128 + number}, ended
    seen, saved = bench.steps_seen(name), bench.saved(name)
    assert seen == saved, f"{seen} steps were done and {saved} saved"
    return seen, saved


def by_kill(bench, name, rng):
    """-9 to all: nothing but the time since the last checkpoint is lost."""
    ranks, step = bench.start(name), rng.randrange(5, STEPS - 10)
    bench.wait_for(name, step, ranks)
    for rank in ranks:
        rank.kill()
    end(ranks)
    return bench.steps_seen(name), bench.saved(name)


def by_death_of_one(bench, name, rng):
    """-9 to one of two: the other ends by itself."""
    ranks, step = bench.start(name), rng.randrange(5, STEPS - 10)
    bench.wait_for(name, step, ranks)
    lost = rng.choice(ranks)
    lost.kill()
    began = time.monotonic()
    end(ranks, patience=60)
    assert time.monotonic() - began < 60, "the other process waited for the dead one"
    return bench.steps_seen(name), bench.saved(name)


def by_death_of_a_worker(bench, name, rng):
    """-9 to a process that tokenises: one line, and the next start tokenises again."""
    text = bench.folder / f"{name}.txt"
    if not text.exists():
        text.write_text("".join(f"{n} squared is {n * n}.\n\n" for n in range(400_000)))
    fresh = bench.folder / f"cache of {name}"
    options = ["--data", str(text), "--tokenising_workers", "2", "--cache_dir", str(fresh)]
    ranks = bench.start(name, *options)
    while True:
        assert ranks[0].poll() is None, "it had tokenised all before a worker was killed"
        with contextlib.suppress(psutil.NoSuchProcess):
            if children := psutil.Process(ranks[0].pid).children(recursive=True):
                time.sleep(rng.uniform(0, 0.1))
                children[-1].kill()
                break
        time.sleep(0.001)
    ended = end(ranks)
    assert {code for code, _ in ended} == {2}, ended
    lines = [line for _, err in ended for line in err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: a process that tokenised"), lines
    return 0, 0, options


def by_full_disk(bench, name, rng):
    """One line, no half checkpoint, and after room is made the run goes on."""
    ranks, step = bench.start(name), rng.randrange(5, STEPS - EVERY)
    bench.wait_for(name, step, ranks)
    filler = bench.folder / "filler"
    with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    ended = end(ranks)
    lines = [line for line in ended[0][1].splitlines() if line]
    assert ended[0][0] == 2 and len(lines) == 1 and FULL in lines[0], ended[0]
    assert not list((bench.folder / name).glob("*.unfinished")), "half a checkpoint is left"
    seen, saved = bench.steps_seen(name), bench.saved(name)
    filler.unlink()
    return seen, saved


def by_damage(bench, name, rng):
    """A file of the newest checkpoint is cut or changed: the one before is taken, and it stays."""
    ranks, step = bench.start(name), rng.randrange(2 * EVERY + 1, STEPS - 10)
    bench.wait_for(name, step, ranks)
    for rank in ranks:
        rank.kill()
    end(ranks)
    newest = bench.folder / name / f"checkpoint-{bench.saved(name)}"
    file = rng.choice(sorted(path for path in newest.rglob("*") if path.stat().st_size > 1))
    content = bytearray(file.read_bytes())
    if rng.random() < 0.5:
        content = content[: rng.randrange(len(content))]
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return bench.steps_seen(name), bench.saved(name) - EVERY


FAULTS = {name[3:]: functools.partial(by_signal, number=getattr(signal, name)) for name in SIGNALS}
FAULTS |= {"kill -9": by_kill, "a dead process": by_death_of_one}
FAULTS |= {"a dead worker": by_death_of_a_worker, "a full disk": by_full_disk}
FAULTS |= {"a damaged checkpoint": by_damage}


@contextlib.contextmanager
def small_disk(folder):
    """Mounts a disk of a few megabytes there."""
    folder.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", folder], check=True
    )
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def strike(fault, layout, folder, cache_dir, forks, rng, times):
    """A row of the table: (fault, layout, [(step, lost, difference)])."""
    found = []
    bench = Bench(folder, cache_dir, forks, LAYOUTS[layout])
    if fault != "a dead worker":
        bench.run("whole")
    for number in range(times):
        name = f"struck{number}"
        seen, saved, *options = FAULTS[fault](bench, name, rng)
        (options,) = options or [[]]
        assert 0 <= seen - saved <= EVERY + (EVERY if fault == "a damaged checkpoint" else 0)
        if options:  # the text is another
            bench.run("whole", *options, *(["--overwrite"] if number else []))
        output = bench.run(name, "--resume_or_start", *options)
        assert not saved or f"after step {saved}\n" in output, output
        found.append((seen, seen - saved, bench.difference(name)))
        shutil.rmtree(bench.folder / name)
    return found


def main():
    """Reads the command line and strikes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--only", default="", help="part of a fault's name")
    options = parser.parse_args()
    failed, rng = 0, random.Random(options.seed)
    print("| fault | processes | after step | steps lost | largest difference |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, started_forks() as forks:
        cache_dir = Path(folder) / "cache"
        for fault in FAULTS:
            for place, layout in enumerate(LAYOUTS):
                if options.only not in fault:
                    continue
                if fault == "a dead process" and not place or fault == "a dead worker" and place:
                    continue
                if fault == "a full disk" and os.geteuid():
                    print(f"| {fault} | {layout} | not run: only root can mount a small disk |||")
                    continue
                here = Path(folder) / f"{fault} {place}"
                disk = small_disk(here) if fault == "a full disk" else contextlib.nullcontext(here)
                here.mkdir() if fault != "a full disk" else None
                try:
                    with disk:
                        found = strike(fault, layout, here, cache_dir, forks, rng, options.times)
                except AssertionError as error:
                    failed += 1
                    print(f"| {fault} | {layout} | FAILED: {error} |||", flush=True)
                    continue
                bound = 0 if not place else 1e-6
                largest = max(x for *_, x in found)
                failed += largest > bound
                steps, lost = (", ".join(str(row[n]) for row in found) for n in (0, 1))
                verdict = "" if largest <= bound else f" FAILED: more than {bound}"
                print(
                    f"| {fault} | {layout} | {steps} | {lost} | {largest:.1g}{verdict} |",
                    flush=True,
                )
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
