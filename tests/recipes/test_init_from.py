"""Continued training: the weights and config of another model, another run's among them."""

import json
import shutil

import pytest
import torch
from rwkv_files import authors_shapes, random_weights
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from pretraining import starting, training
from zoo.hub.convert import convert
from zoo.hub.origin import origin_of_checkpoint

COMMON = ["--steps", "4", "--warmup_steps", "0", "--schedule", "constant", "--eval_every", "0"]
PACKAGE = """
import sys
import torch
from rwkv.model import RWKV

folder = sys.argv[1]
model = RWKV(model=f"{folder}/source", strategy="cpu fp32")
rows = torch.load(f"{folder}/ids.pt").tolist()
logits = [model.forward(row, None, full_output=True)[0] for row in rows]
torch.save(torch.stack(logits), f"{folder}/logits.pt")
"""


def write_recipe(workshop, architecture, **model):
    head = workshop.recipe.read_text().split("[model]")[0].replace('"retnet"', f'"{architecture}"')
    fields = "".join(f"{key} = {value!r}\n" for key, value in model.items())
    workshop.recipe.write_text(f"{head}[model]\n{fields}")


@pytest.fixture
def batches(monkeypatch):
    """The batches of all steps."""
    seen, original = [], training.accumulate_gradients

    def watched(accelerator, model, batches, *others):
        seen.extend(batches)
        return original(accelerator, model, batches, *others)

    monkeypatch.setattr(training, "accumulate_gradients", watched)
    return seen


@pytest.fixture
def mistral(workshop):
    """transformers' Mistral with random weights, and the folder it was converted to."""
    torch.manual_seed(5)  # not the seed of the recipe
    config = MistralConfig(
        vocab_size=259,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=12,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        initializer_range=0.2,
    )
    model = MistralForCausalLM(config).eval()
    model.save_pretrained(workshop.folder / "mistral")
    convert("hf-mistral", workshop.folder / "mistral", workshop.folder / "source")
    return model


def first_line(workshop, name="tiny"):
    return next(line for line in workshop.curve(name) if line["kind"] == "train")


def run_json(workshop, name="tiny"):
    return json.loads((workshop.folder / name / "run.json").read_text())


def error_line(result):
    assert result.returncode == 2, result.stdout + result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_the_first_loss_is_mistrals(in_process, workshop, mistral, batches):
    write_recipe(workshop, "sliding_window")
    result = in_process(*COMMON, "--init_from", str(workshop.folder / "source"))
    assert result.returncode == 0, result.stderr
    assert "It begins with the weights in" in result.stdout
    with torch.no_grad():
        logits = mistral(batches[0]["input_ids"]).logits
    expected = cross_entropy(logits.flatten(0, 1), batches[0]["shift_labels"].flatten()).item()
    # float32, with sums in another order.
    assert first_line(workshop)["loss"] == pytest.approx(expected, rel=1e-5)
    trained = AutoModelForCausalLM.from_pretrained(workshop.folder / "tiny")
    assert trained.config.rope_parameters["rope_theta"] == 500.0
    assert trained.generation_config.eos_token_id == trained.config.eos_token_id == 258
    record = run_json(workshop)["init_from"]
    assert record["changed"] == [] and len(record["sha256"]["model.safetensors"]) == 64
    # Nobody said under which license its weights are, so the run does not either.
    assert origin_of_checkpoint(workshop.folder / "tiny").license is None


def test_the_first_loss_is_that_of_the_rwkv_package(in_process, workshop, batches, forks):
    pytest.importorskip("rwkv", reason="the package rwkv is not installed")
    folder = workshop.folder
    torch.save(random_weights(authors_shapes("7", layers=2, vocab=259)), folder / "source.pth")
    convert("rwkv-pth", folder / "source.pth", folder / "converted")
    write_recipe(workshop, "rwkv7")
    short = ["--sequence_length", "16", "--batch_size", "2"]
    result = in_process(*COMMON, *short, "--init_from", str(folder / "converted"))
    assert result.returncode == 0, result.stderr
    torch.save(batches[0]["input_ids"], folder / "ids.pt")
    environment = {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
    (folder / "package.py").write_text(PACKAGE)
    package = forks().start(folder / "package.py", folder, cwd=folder, env=environment)
    _, errors = package.communicate()
    assert package.returncode == 0, errors
    logits, labels = torch.load(folder / "logits.pt"), batches[0]["shift_labels"]
    expected = cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    # float32; the package rounds e^(-1/2) to six digits.
    assert first_line(workshop)["loss"] == pytest.approx(expected, rel=1e-5)
    AutoModelForCausalLM.from_pretrained(folder / "tiny")


def test_resumed_without_the_source(in_process, workshop, mistral):
    """A run continued from its own checkpoint has the numbers of one that was not interrupted."""
    write_recipe(workshop, "sliding_window", sliding_window=8)
    source = ["--init_from", str(workshop.folder / "source"), "--checkpoint_every", "2"]
    options = ["--model.rope_parameters", "{rope_type = 'linear', factor = 2.0}", *source]
    whole = in_process(*COMMON, *options, "--name", "whole")
    assert whole.returncode == 0, whole.stderr
    assert "sliding_window: 12 -> 8" in whole.stdout
    assert in_process(*COMMON, *options, "--steps", "2").returncode == 0
    record = run_json(workshop)["init_from"]
    shutil.rmtree(workshop.folder / "source")
    resumed = in_process(*COMMON, *options, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    trains = [[x for x in workshop.curve(n) if x["kind"] == "train"] for n in ("whole", "tiny")]
    assert len(trains[0]) == 4 and trains[0] == trains[1]
    assert run_json(workshop)["init_from"] == record == run_json(workshop, "whole")["init_from"]
    config = AutoModelForCausalLM.from_pretrained(workshop.folder / "tiny").config
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    assert config.sliding_window == 8 and config.rope_parameters == rope
    line = error_line(in_process(*COMMON, *options[:2], "--resume"))
    assert "init_from: '" in line and "-> ''" in line


def test_a_checkpoint_of_another_run(in_process, workshop):
    """Its weights alone, with another dropout, rate and length: neither optimizer nor schedule."""
    assert in_process("--steps", "26", "--eval_every", "0", "--name", "first").returncode == 0
    before = workshop.curve("first")
    source = ["--init_from", str(workshop.folder / "first" / "checkpoint-26")]
    options = [*COMMON, "--sequence_length", "48", "--model.dropout", "0"]
    options += ["--learning_rate", "1e-9"]
    result = in_process(*options, *source)
    assert result.returncode == 0, result.stderr
    assert "dropout: 0.1 -> 0.0" in result.stdout
    begun, last = first_line(workshop), [x for x in before if x["kind"] == "train"][-1]
    assert begun["step"] == 1 and begun["learning_rate"] == 1e-9
    assert begun["loss"] == pytest.approx(last["loss"], abs=0.3) and before[0]["loss"] > 4
    assert origin_of_checkpoint(workshop.folder / "tiny").license == "apache-2.0"
    # The same shapes, but a width of 16 is cut into other heads.
    heads = ["--model.num_attention_heads", "4", "--model.num_key_value_heads", "4"]
    assert "num_attention_heads: 2 -> 4" in error_line(
        in_process(*options, *source, *heads, "--name", "other")
    )


def drop_weight(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mixer.q_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_what_is_refused(in_process, workshop, mistral, monkeypatch):
    monkeypatch.setattr(starting, "hub_answers", lambda name, kind: False)
    source = workshop.folder / "source"
    line = error_line(in_process(*COMMON, "--init_from", str(source)))
    assert "architecture 'sliding_window', the recipe says 'retnet'" in line
    write_recipe(workshop, "sliding_window")
    for options, said in (
        (["--model.hidden_size", "48"], "hidden_size: 24 -> 48"),
        (["--model.num_hidden_layers", "3"], "num_hidden_layers: 2 -> 3"),
        (["--model.num_attention_heads", "8"], "num_attention_heads: 4 -> 8"),
        (["--model.vocab_size", "300"], "vocab_size: 259 -> 300"),
        (["--model.window", "8"], "unknown key 'model.window'"),
        (["--init_from", str(workshop.folder / "sorce")], "Did you mean"),
        (
            ["--init_from", "me/nothing"],
            "init_from: no model me/nothing: the Hub cannot be reached",
        ),
        (["--init_from", str(workshop.folder / "mistral")], "goes through `zoo convert` first"),
    ):
        line = error_line(in_process(*COMMON, "--init_from", str(source), *options))
        assert said in line
    drop_weight(source)
    line = error_line(in_process(*COMMON, "--init_from", str(source)))
    assert "1 missing, as model.layers.1.mixer.q_proj.weight" in line


def test_another_tokenizer_is_refused(in_process, workshop, mistral):
    source = workshop.folder / "source"
    shutil.copytree(workshop.root / "tokenizers/byte", source, dirs_exist_ok=True)
    for path in source.glob("tokenizer*.json"):  # two of its ids change places
        text = path.read_text().replace("257", "900").replace("258", "257")
        path.write_text(text.replace("900", "258"))
    write_recipe(workshop, "sliding_window")
    line = error_line(in_process(*COMMON, "--init_from", str(source)))
    assert "for the weights in" in line and "--tokenizer" in line
