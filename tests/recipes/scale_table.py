"""Every architecture under every layout of processes, beside one process; on CPUs, through gloo.

    python tests/recipes/scale_table.py [retnet ...] [--steps 20]

Prints a table of the largest relative difference of losses and bits per byte to one process' (to a
run that was not killed, where it was), and exits with a status that says whether all are within
`BOUND`. DeepSpeed's columns are left out, and said to be, where it is not installed.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch
from conftest import DEEPSPEED, ROOT, TINY, Workshop, free_port, started_forks
from safetensors.torch import load_file

from pretraining.usage import read_toml
from zoo import MODELS
from zoo.hub.export import export

BOUND = 1e-5  # of float32 sums in another order, over 20 steps; the issue's, and DDP's own
FSDP2 = {"processes": 2, "config": "fsdp2.yaml"}
RECOMPUTED, BF16 = ("--gradient_checkpointing", "true"), ("--precision", "bf16")
LAYOUTS = {
    "DDP 2": ((), {"processes": 2}),
    "DDP 4": ((), {"processes": 4}),
    "DDP 2, replay": (("--replay_segment_length", "16"), {"processes": 2}),
    "FSDP2 2": ((), FSDP2),
    "FSDP2 4": ((), {**FSDP2, "processes": 4}),
    "FSDP2 2, recomputed": (RECOMPUTED, FSDP2),
    "FSDP2 2, asynchronous": (("--async_checkpoints", "true"), FSDP2),
    "ZeRO-2 2": ((), {"processes": 2, "config": "zero2.yaml"}),
    "ZeRO-3 2": ((), {"processes": 2, "config": "zero3_offload.yaml"}),
}
RESUMED = {
    "1": {},
    "FSDP2 2": FSDP2,
    "FSDP2 4": {**FSDP2, "processes": 4},
    "DDP 2": {"processes": 2},
}
# Sizes of the demo that make it small; a field that its architecture lacks stays away.
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_size": 16}
SMALL |= {"head_dim": 16, "intermediate_size": 64, "segment_length": 16, "sliding_window": 16}
WITHOUT_ZOO = """
import sys
sys.path = [p for p in sys.path if p not in ("", {root!r})]
sys.meta_path = [x for x in sys.meta_path if "longzoo" not in getattr(x, "__module__", "")]
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({folder!r}, trust_remote_code=True)
assert "zoo" not in sys.modules
torch.save(model(torch.arange(40)[None] % 200).logits, {out!r})
"""


class Table:
    """The runs of one architecture."""

    def __init__(self, architecture, folder, forks, steps):
        folder.mkdir()
        self.workshop, self.folder = Workshop(folder, folder.parent / "cache", forks), folder
        self.steps = steps
        demo = read_toml(ROOT / f"recipes/configs/{architecture}_demo.toml")
        model = {key: SMALL.get(key, value) for key, value in demo["model"].items()}
        model |= {key: SMALL[key] for key in ("hidden_size", "num_hidden_layers")}
        model.pop("dropout", None)
        recipe = TINY.split("[model]")[0].replace('"retnet"', f'"{architecture}"')
        recipe += "[model]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in model.items())
        self.workshop.recipe.write_text(recipe)
        self.options = ["--learning_rate", "1e-3", "--steps", str(steps), "--decay_steps", "4"]
        self.options += ["--checkpoint_every", "10", "--eval_every", "10"]
        self.options += ["--eval_batch_size", "11", "--sample_prompts", '["def "]']
        self.options += ["--sample_tokens", "5"]

    def run(self, name, *arguments, **layout):
        done = self.workshop.run("--name", name, *self.options, *arguments, **layout)
        assert done.returncode == 0, f"{name}: {done.stderr[-1500:]}"

    def figures(self, name):
        kinds = ("loss", "bits_per_byte")
        lines = [[line.get(kind, 1) for kind in kinds] for line in self.workshop.curve(name)]
        return torch.tensor(lines, dtype=torch.float64)

    def difference(self, name, other):
        one, two = self.figures(name), self.figures(other)
        assert one.shape == two.shape, f"{name} has {len(one)} lines, {other} has {len(two)}"
        return float((one / two - 1).abs().max())

    def killed(self):
        """Kills a run in shards, -9, after its first checkpoint."""
        ranks = self.workshop.start_ranks("--name", "killed", *self.options, **FSDP2)
        metrics = self.folder / "killed/metrics.jsonl"
        while not metrics.is_file() or metrics.read_text().count('"train"') < self.steps // 2 + 2:
            assert all(rank.poll() is None for rank in ranks), ranks[0].communicate()
            time.sleep(0.001)
        for rank in ranks:
            rank.kill()
        for rank in ranks:
            rank.communicate()

    def resumed(self, layout):
        name = "resumed by " + layout
        shutil.copytree(self.folder / "killed", self.folder / name)
        self.run(name, "--resume", **RESUMED[layout])
        return self.difference(name, "one")

    def two_nodes(self):
        """Two launchers of two processes each, which share no cache of tokenised text."""
        command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
        command += ["--num_machines", "2", "--num_processes", "4", "--main_process_ip", "127.0.0.1"]
        command += ["--main_process_port", free_port(), "--rdzv_backend", "static"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        environment["ACCELERATE_USE_CPU"] = "true"
        script = [str(ROOT / "recipes/pretrain.py"), str(self.workshop.recipe), "--name", "nodes"]
        script += ["--output_dir", str(self.folder), *self.options]
        nodes = []
        for rank in range(2):
            own = [*command, "--machine_rank", str(rank), *script]
            own += ["--cache_dir", str(self.folder / f"cache of node {rank}")]
            nodes.append(
                subprocess.Popen(own, env=environment, stdout=subprocess.PIPE, stderr=-2, text=True)
            )
        outputs = [node.communicate(timeout=600)[0] for node in nodes]
        assert not any(node.returncode for node in nodes), "".join(outputs)[-3000:]
        return self.difference("nodes", "one")

    def exported(self):
        """The largest difference of a logit: shards, exported and loaded where there is no zoo."""
        found = []
        for name in ("FSDP2 2", "one"):
            folder, out = self.folder / f"{name} exported", str(self.folder / f"{name}.pt")
            with contextlib.redirect_stderr(io.StringIO()):  # a bar of progress
                export(self.folder / name / f"checkpoint-{self.steps}", folder)
            trained, exported = (
                load_file(x / "model.safetensors") for x in (self.folder / name, folder)
            )
            assert all(exported[key].equal(x) for key, x in trained.items()), name
            code = WITHOUT_ZOO.format(root=str(ROOT), folder=str(folder), out=out)
            done = subprocess.run(
                [sys.executable, "-c", code],
                env={**os.environ, "HF_HOME": str(self.folder / "hf")},
                cwd=self.folder,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr[-1500:]
            found.append(torch.load(out))
        return float((found[0] - found[1]).abs().max() / found[1].abs().max())


def measure(table, deepspeed):
    """Yields (column, difference to one process or None where nothing was run, bound)."""
    table.run("one")
    for name, (options, layout) in LAYOUTS.items():
        if name.startswith("ZeRO") and not deepspeed:
            yield name, None, BOUND
            continue
        table.run(name, *options, **layout)
        yield name, table.difference(name, "one"), BOUND
    table.run("one in bf16", *BF16)
    table.run("bf16", *BF16, **FSDP2)
    # Rounding to bf16 is that of one process; what is left is the order of float32 sums, which
    # now and then turns a rounding to 8 bits over: its size is that of one process to float32.
    yield "FSDP2 2, bf16", table.difference("bf16", "one in bf16"), None
    yield "bf16 to float32", table.difference("one in bf16", "one"), None
    table.killed()
    for layout in RESUMED:
        yield f"killed, resumed by {layout}", table.resumed(layout), BOUND
    yield "two nodes of two", table.two_nodes(), BOUND
    yield "exported, without zoo", table.exported(), BOUND


def main():
    """Reads the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("architectures", nargs="*", default=list(MODELS))
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder, started_forks() as forks:
        for architecture in options.architectures:
            table = Table(architecture, Path(folder) / architecture, forks, options.steps)
            print(f"\n{architecture}", flush=True)
            try:
                for column, found, bound in measure(table, DEEPSPEED.is_dir()):
                    wrong = found is not None and bound is not None and not found <= bound
                    failed += wrong
                    text = (
                        "not run: DeepSpeed is not installed" if found is None else f"{found:.1e}"
                    )
                    print(f"  {column}: {text}{' FAILED' * wrong}", flush=True)
            except AssertionError as error:
                failed += 1
                print(f"  FAILED: {error}", flush=True)
            shutil.rmtree(table.folder)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
