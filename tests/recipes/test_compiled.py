"""torch.compile under `accelerate launch --dynamo_backend`: the same names, the same numbers."""

import json

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from pretraining.checkpointing import MANIFEST
from pretraining.compiling import check_compiler
from pretraining.measuring import diagnostics
from zoo.hub.files import file_hash

SHORT = ["--eval_every", "0", "--checkpoint_every", "0", "--schedule", "constant"]
BACKEND = "ACCELERATE_DYNAMO_BACKEND"
COMPILED = {BACKEND: "EAGER"}
REGIONS = {**COMPILED, "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "true"}
DOCUMENTS = ["--packing", "documents"]
WITH = {
    "replay": ["retnet", *DOCUMENTS, "--replay_segment_length", "8"],
    "recomputing": ["sliding_window", *DOCUMENTS, "--gradient_checkpointing", "true"],
    "carried states": ["sliding_window", *DOCUMENTS, "--carry_state", "true"],
    "bf16": ["retnet", "--precision", "bf16"],
}


@pytest.fixture
def instructions(monkeypatch):
    """Those for bf16, which a CPU can emulate."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"bf16": True}, raising=False)


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


@pytest.mark.slow
@pytest.mark.parametrize("options", WITH.values(), ids=WITH)
def test_compiled_with(in_process, workshop, recipe, instructions, options):
    """AOTAutograd traces forward and backward too, and fuses nothing: all but inductor's code."""
    found = []
    for name, environment in (("plain", {}), ("compiled", {**COMPILED, BACKEND: "AOT_EAGER"})):
        words = [*SHORT, "--steps", "8", "--name", name, "--architecture", *options]
        result = in_process(*words, **environment)
        assert result.returncode == 0, result.stderr
        assert ("compiled by aot_eager" in result.stdout) == bool(environment)
        lines = workshop.curve(name)
        found.append([x["loss" if "loss" in x else "bits_per_byte"] for x in lines])
    assert len(found[0]) == 9  # what is held out is measured with the compiled model too
    rounding = 3e-3 if "bf16" in options else 1e-5
    assert found[1] == pytest.approx(found[0], rel=rounding)


def test_without_a_compiler_it_is_one_line(in_process, workshop, recipe):
    """Inductor writes C++, and a machine without a compiler says so before anything is written."""
    torch._dynamo.reset()
    with torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",)}):
        result = in_process(*SHORT, "--steps", "8", **{BACKEND: "INDUCTOR"})
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: the launcher asks for torch.compile (--dynamo_backend inductor)")
    assert "No working C++ compiler" in line and "--dynamo_backend no" in line
    assert not (workshop.folder / "tiny").exists()


def test_what_else_the_launcher_compiles_with():
    """Is not tried before: what needs no compiler has none."""
    for backend in (None, "", "no", "NO", "EAGER", "aot_eager"):
        check_compiler({BACKEND: backend}, torch.device("cpu"), compile=None)


@pytest.mark.slow
def test_compiled_by_inductor(in_process, workshop, recipe):
    """As users do: one argument of the launcher, begun, evaluated, continued, sampled from."""
    found = []
    for name, environment in (("plain", {}), ("compiled", {BACKEND: "INDUCTOR"})):
        for steps, more in ((8, []), (12, ["--resume"])):
            words = [*SHORT, "--steps", str(steps), "--name", name, *more]
            result = in_process(*words, "--sample_prompts", "3 sq", **environment)
            assert result.returncode == 0, result.stderr
            assert ("compiled by inductor" in result.stdout) == bool(environment)
            assert "  | 3 sq" in result.stdout
        record = json.loads((workshop.folder / name / "run.json").read_text())
        found.append(losses(workshop, name) + [record["results"]["held_out_bits_per_byte"]])
        assert record["compiler"] == ("inductor" if environment else None)
    assert len(found[0]) == 13
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.slow
def test_compiled_by_two_processes(workshop, recipe):
    """Graphs are cut where data parallelism sums gradients, and the sums stay what they are."""
    for name, more in (("one", {}), ("two", {"processes": 2, "env": COMPILED})):
        result = workshop.run(*SHORT, "--steps", "8", "--name", name, **more)
        assert result.returncode == 0, result.stderr
        assert ("2 x cpu" in result.stdout) == bool(more)
        assert ("compiled by eager" in result.stdout) == bool(more)
    assert losses(workshop, "two") == pytest.approx(losses(workshop, "one"), rel=1e-5)


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
