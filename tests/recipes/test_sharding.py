"""FSDP2 beside one process: the same losses, saved by all ranks, resumed by any number of them."""

import json

import pytest
import torch
from safetensors.torch import load_file

from pretraining.launching import check_environment
from pretraining.recipe import UsageError

SHORT = ["--steps", "24", "--decay_steps", "4", "--checkpoint_every", "8", "--eval_every", "12"]
SHORT += ["--model.dropout", "0"]


def losses(workshop, name):
    lines = workshop.curve(name)
    return torch.tensor([x["loss"] for x in lines if x["kind"] == "train"], dtype=torch.float64)


def test_shards_train_as_one(workshop):
    one = workshop.run("--name", "one", *SHORT)
    assert one.returncode == 0, one.stderr
    two = workshop.run("--name", "two", *SHORT, processes=2, config="fsdp2.yaml")
    assert two.returncode == 0, two.stderr
    print(two.stdout)
    print(losses(workshop, "two") / losses(workshop, "one") - 1)
    assert 0
