"""A tiny recipe, and ways to run it as users do: in processes of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "recipes"))

TINY = """
architecture = "retnet"
sequence_length = 32
batch_size = 4
steps = 120
warmup_steps = 5
decay_steps = 20
learning_rate = 1e-2
precision = "fp32"
cpu_threads = 1
eval_every = 40
eval_bytes = 1000
log_every = 1
checkpoint_every = 20

[model]
hidden_size = 16
num_hidden_layers = 2
num_attention_heads = 2
dropout = 0.1
"""
LAUNCHES = {
    1: [sys.executable],
    2: ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
}
LAUNCHES[2] = [sys.executable, *LAUNCHES[2], "--num_machines", "1"]


class Workshop:
    """A folder with the tiny recipe in it.

    Attributes:
        folder: where runs go to.
        recipe: the TOML file.
        root: the repository.
    """

    root = ROOT

    def __init__(self, folder, cache_dir):
        self.folder = folder
        self.cache_dir = cache_dir
        self.recipe = folder / "tiny.toml"
        self.recipe.write_text(TINY)

    def start(self, *arguments, processes=1, launch=None, env=()):
        """Starts recipes/pretrain.py on the tiny recipe."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **dict(env)}
        if processes > 1:
            environment |= {
                "ACCELERATE_USE_CPU": "true",
                "MASTER_PORT": str(29500 + os.getpid() % 999),
            }
            launch = LAUNCHES[2] + ["--main_process_port", environment["MASTER_PORT"]]
        places = ["--output_dir", str(self.folder), "--cache_dir", str(self.cache_dir)]
        return subprocess.Popen(
            [*(launch or LAUNCHES[1]), str(ROOT / "recipes/pretrain.py"), str(self.recipe)]
            + [*places, *arguments],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments, **options):
        """The same, waiting for the end."""
        process = self.start(*arguments, **options)
        output, errors = process.communicate(timeout=240)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def curve(self, name):
        """What a run measured, without what a clock measured."""
        clocks = {"seconds", "tokens_per_second"}
        lines = [json.loads(line) for line in open(self.folder / name / "metrics.jsonl")]
        return [{k: v for k, v in line.items() if k not in clocks} for line in lines]


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    """Tokenised corpora that the tests of one session share."""
    return tmp_path_factory.mktemp("corpora")


@pytest.fixture
def workshop(tmp_path, cache_dir):
    """A tiny recipe in an empty folder."""
    return Workshop(tmp_path, cache_dir)
