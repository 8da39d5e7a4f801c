"""What differs from process to process and nothing else, with two of them in one: as threads.

Each thread has an accelerator of its own. Sums and the averages of data parallelism wait for both.
"""

import contextlib
import dataclasses
import threading
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from pretraining import training
from pretraining.checkpointing import Checkpoint
from pretraining.recipe import Recipe
from pretraining.stepping import step_seed
from pretraining.training import Run

MODEL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


class Group:
    """Processes that wait for one another."""

    def __init__(self, size):
        self.size, self.barrier = size, threading.Barrier(size, timeout=60)
        self.values = [None] * size

    def sum(self, rank, tensor):
        self.values[rank] = tensor.detach().clone()
        self.barrier.wait()
        total = sum(self.values)
        self.barrier.wait()
        return total


class Rank:
    """What a `Run` asks of an accelerator, for one process of a group."""

    device, native_amp, is_fsdp2 = torch.device("cpu"), False, False
    state = SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=SimpleNamespace(value="NO")))

    def __init__(self, group, rank):
        self.group, self.process_index, self.num_processes = group, rank, group.size
        self.is_main_process = rank == 0
        self.logged = {}

    def prepare(self, model, optimizer):
        return model, SimpleNamespace(
            optimizer=optimizer,
            param_groups=optimizer.param_groups,
            step=optimizer.step,
            zero_grad=optimizer.zero_grad,
        )

    def reduce(self, tensor, how):
        assert how == "sum"
        return self.group.sum(self.process_index, tensor)

    def gather(self, number):
        own = torch.zeros(self.num_processes, dtype=number.dtype)
        own[self.process_index] = number
        return self.group.sum(self.process_index, own)

    def backward(self, loss):
        loss.backward()

    def clip_grad_norm_(self, parameters, largest):
        parameters = list(parameters)
        for parameter in parameters:  # as data parallelism has done in backward
            total = self.group.sum(self.process_index, parameter.grad)
            parameter.grad = total / self.num_processes
        return torch.nn.utils.clip_grad_norm_(parameters, largest)

    def no_sync(self, model):
        return contextlib.nullcontext()

    def unwrap_model(self, model, **options):
        return model

    def log(self, figures, step):
        self.logged[step] = figures

    def wait_for_everyone(self):
        self.group.barrier.wait()

    def print(self, text):
        pass

    def init_trackers(self, name, **options):
        pass


@pytest.fixture
def recipe(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} squared is {n * n}.\n" for n in range(2000)))
    values = {"model": MODEL, "data": str(text), "output_dir": str(tmp_path), "cpu_threads": 1}
    values |= {"sequence_length": 32, "batch_size": 4, "steps": 4, "decay_steps": 0}
    values |= {"warmup_steps": 2, "log_every": 1, "eval_batch_size": 2, "eval_bytes": 1000}
    values |= {"eval_positions": 4, "eval_lengths": [16], "eval_contexts": [8, 32]}
    return Recipe("two", "retnet", precision="fp32", **values)


def trained(recipe, size):
    """The lines that the main process of a group wrote, and what each process counted."""
    recipe = dataclasses.replace(recipe, name=f"of_{size}")
    recipe.run_dir.mkdir()
    group = Group(size)
    # One after the other: they draw their first weights from one generator.
    runs = [Run(recipe, Rank(group, rank), 1, Checkpoint()) for rank in range(size)]
    silent = SimpleNamespace(received=None)
    threads = [threading.Thread(target=run.train, args=(silent,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return runs[0].records.metrics.lines, runs


def test_two_processes_are_one(recipe):
    """Losses, norms, rates, tokens and bits per byte are those of the whole batch and text."""
    alone, (one,) = trained(recipe, 1)
    together, two = trained(recipe, 2)
    assert [line["kind"] for line in alone] == ["train"] * 4 + ["held_out"]
    for line, other in zip(alone, together, strict=True):
        for name in ("kind", "seconds", "tokens_per_second", "peak_memory"):
            assert (name in line) == (name in other)
            line.pop(name, None), other.pop(name, None)
        # fp32, with sums in another order.
        assert line == pytest.approx(other, rel=1e-5)
    assert [line["tokens"] for line in together[:4]] == [128, 256, 384, 512]
    for a, b in zip(one.model.parameters(), two[1].model.parameters()):
        torch.testing.assert_close(a, b)


def test_units_of_the_log(recipe):
    lines, _ = trained(recipe, 2)
    train = [line for line in lines if line["kind"] == "train"]
    rates = [line["learning_rate"] for line in train]
    assert rates == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3])
    for before, line in zip([{"tokens": 0, "seconds": 0.0}, *train], train):
        # The tokens of all processes, over this one's clock.
        speed = (line["tokens"] - before["tokens"]) / (line["seconds"] - before["seconds"])
        assert line["tokens_per_second"] == pytest.approx(speed)
        # The tokens of this corpus are bytes, and a boundary for its one document.
        assert line["bits_per_byte"] == pytest.approx(line["loss"] / 0.693147, rel=1e-3)


def test_seeds_differ_by_step_and_by_rank():
    seeds = {step_seed(seed, step, rank) for seed in (0, 1) for step in range(9) for rank in (0, 1)}
    assert len(seeds) == 36
    assert step_seed(3, 5, 1) == step_seed(3, 5, 1)


def test_dropout_differs_by_rank(recipe, monkeypatch):
    """Both processes read the same windows here, so what differs is dropout alone."""
    recipe = dataclasses.replace(recipe, model={**MODEL, "dropout": 0.5})
    batch = training.Batches.batch
    monkeypatch.setattr(
        training.Batches,
        "batch",
        lambda self, step, rank, micro, world, size: batch(self, 0, 0, 0, 1, size),
    )

    class Both(Rank):
        """One process of two whose other is silent: what it computes is seen before the sum."""

        def reduce(self, tensor, how):
            return tensor

        def clip_grad_norm_(self, parameters, largest):
            return torch.nn.utils.clip_grad_norm_(parameters, largest)

    def losses(rank):
        accelerator = Both(Group(2), rank)
        run = Run(recipe, accelerator, 1, Checkpoint())
        for group in run.optimizer.param_groups:
            group["lr_scale"] = 0.0  # the weights stay
        return [run._train_step()[0] for _ in range(2)]

    first, again, other = losses(0), losses(0), losses(1)
    assert first == again
    assert len({*first, *other}) == 4


def test_the_launchers_accumulation_divides_nothing(in_process, monkeypatch):
    """accelerate divides each loss by what it takes from the environment."""
    seen = []
    backward = Accelerator.backward

    def watched(accelerator, loss, **options):
        seen.append(accelerator.gradient_accumulation_steps)
        return backward(accelerator, loss, **options)

    monkeypatch.setattr(Accelerator, "backward", watched)
    # As set behind the script's back: one that it sees is refused.
    monkeypatch.setattr("pretrain.check_environment", lambda environ: None)
    options = ["--steps", "26", "--eval_every", "0"]
    result = in_process(*options, ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4")
    assert result.returncode == 0, result.stderr
    assert set(seen) == {1}
