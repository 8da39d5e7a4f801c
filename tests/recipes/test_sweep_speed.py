"""Throughput and memory by length: each length in a process of its own."""

import subprocess
from types import SimpleNamespace

from ablating import speed

FIELDS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
NAMES = {"prefill_tokens_per_second", "training_tokens_per_second", "peak_bytes"}


def test_lengths_are_measured_and_what_fails_is_said(forks, tmp_path, monkeypatch):
    file = tmp_path / "main.py"
    file.write_text("import runpy\nrunpy.run_module('ablating.speed', run_name='__main__')\n")

    def run(command, env, **options):
        """As it is called, but in a process that has imported everything."""
        assert command[1:3] == ["-m", "ablating.speed"] and env["OMP_NUM_THREADS"] == "1"
        fork = forks().start(file, *command[3:], cwd=tmp_path, env=env)
        stdout, stderr = fork.communicate()
        return SimpleNamespace(stdout=stdout, stderr=stderr, returncode=fork.returncode)

    monkeypatch.setattr(subprocess, "run", run)
    (wrong,) = speed.measure("retmet", FIELDS, [64], repeats=1)
    assert wrong["error"].startswith("UsageError: unknown architecture 'retmet'")
    long, short = speed.measure("retnet", FIELDS, [4096, 1024], repeats=1)
    assert (long.pop("length"), short.pop("length")) == (4096, 1024)
    assert set(short) == set(long) == NAMES
    for figures in (short, long):
        assert figures["prefill_tokens_per_second"] > figures["training_tokens_per_second"] > 0
    # At least a layer's activations of width 16 in fp32; and a peak is of its own length.
    assert 1024 * 16 * 4 < short["peak_bytes"] < long["peak_bytes"] < 2**30


def test_a_process_that_is_killed(monkeypatch):
    def run(command, **options):
        return SimpleNamespace(stdout='{"length": 32}\nnoise', stderr="why\nno memory\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert speed.measure("retnet", FIELDS, [32, 64]) == [
        {"length": 32},
        {"length": 64, "error": "no memory"},
    ]
