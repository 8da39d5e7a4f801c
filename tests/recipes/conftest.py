"""A tiny recipe, and ways to run it as users do: in processes of its own."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands import launch as accelerate_launch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from forks import Forks
from undrawn import leave_figures

ROOT = Path(__file__).resolve().parents[2]
DEEPSPEED = ROOT / ".venv/deepspeed"
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


def free_port():
    """A port that nobody listens on, as a string."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def two_on_cpus():
    """Options of `accelerate launch` for two processes on CPUs."""
    options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    return [*options, "--main_process_port", free_port()]


def launched_with(config, processes):
    """The environment variables that `accelerate launch` sets for a file of recipes/accelerate."""
    options = ["--config_file", str(ROOT / "recipes/accelerate" / config)]
    options += ["--num_processes", str(processes), "pretrain.py"]
    arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(options))
    if arguments.use_deepspeed:
        fields = ",".join(defaults.deepspeed_config)
        arguments.deepspeed_fields_from_accelerate_config = fields
        _, found = prepare_deepspeed_cmd_env(arguments)
    else:
        found = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in found.items() if os.environ.get(name) != value}


class Workshop:
    """A folder with the tiny recipe in it.

    Attributes:
        folder: where runs go to.
        recipe: the TOML file.
        root: the repository.
    """

    root = ROOT
    launched_with = staticmethod(launched_with)

    def __init__(self, folder, cache_dir, forks):
        self.folder = folder
        self.cache_dir = cache_dir
        self._forks = forks
        self.recipe = folder / "tiny.toml"
        self.recipe.write_text(TINY)

    def _command(self, arguments):
        places = ["--output_dir", str(self.folder), "--cache_dir", str(self.cache_dir)]
        return [str(ROOT / "recipes/pretrain.py"), str(self.recipe), *places, *arguments]

    def launch(self, *arguments, options=()):
        """Starts `accelerate launch` on the tiny recipe, as users do; by default two processes.

        The launcher has imported everything, what it starts has not.
        """
        words = [*(options or two_on_cpus()), *self._command(arguments)]
        environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        if not options:
            environment["ACCELERATE_USE_CPU"] = "true"
        script = accelerate_launch.__file__
        return self._forks().start(script, *words, cwd=self.folder, env=environment)

    def start_ranks(self, *arguments, processes=1, config=None, env=(), apart=False):
        """Starts processes that have imported everything, as torchrun would start them.

        With a `config` of recipes/accelerate, accelerate takes the CPUs for GPUs. `env` is more of
        what a launcher sets. `apart`, each has an output_dir of its own, named by its rank.
        """
        command, launch, ranks = self._command(arguments), {}, []
        if processes > 1:
            launch = {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1"}
            launch |= {"MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1"}
        if config:
            launch |= {"ACCELERATE_USE_CPU": "false", **launched_with(config, processes)}
            command[0] = str(ROOT / "tests/recipes/sharded_on_cpu.py")
        launch |= dict(env)
        for rank in range(processes):
            own = {"RANK": rank, "LOCAL_RANK": rank}
            own |= {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            of_rank = launch | {name: str(value) for name, value in own.items()} if launch else {}
            forks = self._forks(deepspeed="ACCELERATE_USE_DEEPSPEED" in of_rank)
            words = ["--output_dir", self.folder / str(rank)] if apart else []
            ranks.append(forks.start(*command, *words, cwd=self.folder, env=of_rank))
        return ranks

    def run(self, *arguments, **options):
        """The same, waiting for the end."""
        ranks = self.start_ranks(*arguments, **options)
        outputs, errors = zip(*[rank.communicate() for rank in ranks])
        code = max(abs(rank.returncode) for rank in ranks)
        return subprocess.CompletedProcess(arguments, code, "".join(outputs), "".join(errors))

    def curve(self, name):
        """What a run measured, without what depends on the machine and what it did before."""
        clocks = {"seconds", "tokens_per_second", "mfu", "peak_memory"}
        lines = [json.loads(line) for line in open(self.folder / name / "metrics.jsonl")]
        return [{k: v for k, v in line.items() if k not in clocks} for line in lines]


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    """Tokenised corpora that the tests of one session share, whatever worker they run in."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "corpora"
    folder.mkdir(exist_ok=True)
    return folder


@contextlib.contextmanager
def started_forks():
    """Gives the `Forks` that have imported what pretrain.py does, begun when first asked for.

    With `deepspeed`, those that have it too: whoever imports transformers before it is there, never
    has it.
    """
    started = {}

    def get(deepspeed=False):
        if deepspeed not in started:
            path = [ROOT, ROOT / "recipes", ROOT / "tests/recipes"]
            env = {"OMP_NUM_THREADS": "1"}
            modules = [
                "pretrain",
                "accelerate.commands.launch",
                "torch.distributed.run",
                "matplotlib.figure",
                "begin_undrawn",
            ]
            if deepspeed:
                path, modules = [*path, DEEPSPEED], [*modules, "deepspeed"]
                env["DS_ACCELERATOR"] = "cpu"
            started[deepspeed] = Forks(modules, path, env)
        return started[deepspeed]

    try:
        yield get
    finally:
        for server in started.values():
            server.close()


@pytest.fixture(scope="session")
def forks():
    """What `started_forks` gives."""
    with started_forks() as get:
        yield get


def wait_for_output(fork, text):
    """Waits until a fork has written something to stdout."""
    deadline = time.monotonic() + 120
    while text not in fork.written()[0]:
        assert fork.poll() is None, fork.written()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def workshop(tmp_path, cache_dir, forks):
    """A tiny recipe in an empty folder."""
    return Workshop(tmp_path, cache_dir, forks)


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
        data = [] if "[task]" in workshop.recipe.read_text() else ["--data", str(text)]
        words = [str(workshop.recipe), *places, *data, *arguments]
        capsys.readouterr()
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as leaving:
            for name in ("stdout", "stderr"):  # which the script replaces
                patch.setattr(sys, name, getattr(sys, name))
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", [script, *words])
            leave_figures(patch.setattr)
            pretrain.main()
        output, errors = capsys.readouterr()
        return SimpleNamespace(returncode=leaving.value.code, stdout=output, stderr=errors)

    yield run
    forget()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.set_num_threads(threads)
