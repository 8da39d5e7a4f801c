"""A tiny recipe, and ways to run it as users do: in processes of its own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

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
        launches: what comes before a script's name, by number of processes.
    """

    root = ROOT
    launches = LAUNCHES

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


@pytest.fixture
def in_process(workshop, monkeypatch, capsys):
    """`in_process(*arguments, **environment)` runs recipes/pretrain.py here, on a small text.

    That takes a second where a process of its own takes eight.
    """
    import pretrain

    text = workshop.folder / "text.txt"
    text.write_text("".join(f"{n} squared is {n * n}.\n" for n in range(2000)))
    numbers = [signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM]
    handlers = {number: signal.getsignal(number) for number in numbers}
    threads = torch.get_num_threads()

    def forget():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    def run(*arguments, script="pretrain.py", **environment):
        forget()
        places = ["--output_dir", str(workshop.folder), "--cache_dir", str(workshop.folder / "c")]
        words = [str(workshop.recipe), *places, "--data", str(text), *arguments]
        capsys.readouterr()
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as leaving:
            for name in ("stdout", "stderr"):  # which the script replaces
                patch.setattr(sys, name, getattr(sys, name))
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", [script, *words])
            pretrain.main()
        output, errors = capsys.readouterr()
        return SimpleNamespace(returncode=leaving.value.code, stdout=output, stderr=errors)

    yield run
    forget()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.set_num_threads(threads)
