"""torch.compile under `accelerate launch --dynamo_backend`: the same names, the same numbers."""

import json

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from pretraining.checkpointing import MANIFEST
from pretraining.measuring import diagnostics
from zoo.hub.files import file_hash

SHORT = ["--eval_every", "0", "--checkpoint_every", "0", "--schedule", "constant"]
COMPILED = {"ACCELERATE_DYNAMO_BACKEND": "EAGER"}
REGIONS = {**COMPILED, "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "true"}


@pytest.fixture
def recipe(workshop):
    text = workshop.recipe.read_text().replace("dropout = 0.1", "")
    workshop.recipe.write_text(text.replace("num_hidden_layers = 2", "num_hidden_layers = 1"))
    return workshop.recipe


def names(folder):
    state = torch.load(folder / "training_state.pt", weights_only=True)["optimizer"]["state"]
    return set(load_file(folder / "model.safetensors")), set(state)


def losses(workshop, name):
    return [line["loss"] for line in workshop.curve(name) if line["kind"] == "train"]


def test_compiled_and_not_continue_each_other(in_process, workshop, recipe):
    def run(name, steps, *options, **environment):
        options = [*SHORT, "--steps", str(steps), "--name", name, *options]
        result = in_process(*options, "--sample_prompts", "3 sq", **environment)
        assert result.returncode == 0, result.stderr
        assert ("compiled by eager" in result.stdout) == bool(environment)
        assert "  | 3 sq" in result.stdout
        return names(workshop.folder / name / f"checkpoint-{steps}")

    plain = run("plain", 12)
    assert not any("_orig_mod" in name for name in plain[0] | plain[1])
    for name, first, then in (
        ("there", {}, COMPILED),
        ("back", COMPILED, {}),
        ("regions", REGIONS, COMPILED),
    ):
        assert run(name, 8, **first) == plain
        assert run(name, 12, "--resume", **then) == plain
        # Sums may be in another order where operations are fused.
        assert losses(workshop, name) == pytest.approx(losses(workshop, "plain"), rel=1e-5)


def test_a_compiled_model_keeps_its_data_parallelism():
    """Unwrapping takes it out of the compiled module, unless the bare model is asked for."""

    class Parallel(torch.nn.parallel.DistributedDataParallel):
        def __init__(self, module):
            torch.nn.Module.__init__(self)
            self.module = module

    compiled = torch.compile(Parallel(torch.nn.Linear(2, 2)))
    diagnostics(Accelerator(cpu=True), compiled)
    assert isinstance(compiled._orig_mod, Parallel)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), "1 missing, as model.norm.weight"),
        (lambda w: w.update(extra=torch.ones(2)), "1 unknown, as extra"),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(3)}),
            "1 of another shape, as model.norm.weight",
        ),
        (
            lambda w: w.update({f"_orig_mod.{name}": w.pop(name) for name in list(w)}),
            "missing, as ",
        ),
    ],
)
def test_weights_that_are_not_the_models_are_refused(in_process, workshop, recipe, change, message):
    """Even where checkpoint.json says that they are what was saved."""
    options = [*SHORT, "--steps", "8", "--name", "a"]
    assert in_process(*options).returncode == 0
    folder = workshop.folder / "a" / "checkpoint-8"
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})
    manifest = json.loads((folder / MANIFEST).read_text())
    entry = {"bytes": path.stat().st_size, "sha256": file_hash(path)}
    manifest["files"]["model.safetensors"] = entry
    (folder / MANIFEST).write_text(json.dumps(manifest))
    result = in_process(*options, "--resume")
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "are not those of its model" in line and message in line
