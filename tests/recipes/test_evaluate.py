"""Any causal language model, evaluated as a run is."""

import json
import math
import shutil

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

import evaluate
from pretraining.building import REPOSITORY, load_tokenizer
from pretraining.corpus import load_corpus
from pretraining.recipe import Recipe, UsageError
from scoring.texts import boundary_of, held_out_text, tokens_of

SIZES = {"vocab_size": 259, "hidden_size": 16, "num_hidden_layers": 2}
LLAMA = SIZES | {"num_attention_heads": 2, "intermediate_size": 16}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, initializer_range=0.5)),
    "mamba": lambda: MambaForCausalLM(MambaConfig(**SIZES, state_size=4)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=259, n_embd=16, n_layer=1, n_head=2, n_positions=96)
    ),
}
TEXTS = ["".join(f"{n} squared is {n * n}.\n" for n in range(a, a + 12)) for a in range(0, 960, 40)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models of others with the byte tokenizer, and a text of 24 documents."""
    folder = tmp_path_factory.mktemp("foreign")
    for name, build in MODELS.items():
        torch.manual_seed(0)
        build().save_pretrained(folder / name)
        for file in (REPOSITORY / "tokenizers/byte").glob("*.json"):
            shutil.copy(file, folder / name)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (folder / "text.jsonl").write_text(lines)
    return folder


def evaluated(folders, name, *arguments):
    places = ["--data", str(folders / "text.jsonl"), "--output", str(folders / "out.json")]
    evaluate.start([str(folders / name), *places, "--device", "cpu", *arguments])
    return json.loads((folders / "out.json").read_text())


def test_a_model_of_others_by_hand(folders, capsys):
    options = ["--held_out", "0.2", "--sequence-length", "32", "--positions", "4"]
    found = evaluated(folders, "llama", *options, "--contexts", "8", "64", "--dtype", "float32")
    recipe = Recipe("x", "any", data=str(folders / "text.jsonl"), held_out=0.2)
    text, tokenizer = held_out_text(recipe), load_tokenizer(str(folders / "llama"))
    model = AutoModelForCausalLM.from_pretrained(folders / "llama").eval()
    documents = [[258, *text.encode()] for text in text.documents]
    ids = torch.tensor([*sum(documents, []), 258])
    num_bytes = sum(len(text.encode()) for text in text.documents)
    assert tokenizer.eos_token_id == 258 and found["text"]["bytes"] == num_bytes > 500

    @torch.no_grad()
    def nats(ids, first=0):
        log_p = model(ids[None, :-1]).logits[0].log_softmax(-1)
        return -log_p.gather(1, ids[1:, None])[first:, 0].double()

    def bits(nats):
        return pytest.approx(sum(nats).item() / math.log(2) / num_bytes, rel=1e-5)

    windows = [nats(ids[i : i + 33]) for i in range(0, len(ids) - 1, 32)]
    assert found["bits_per_byte"] == bits([x.sum() for x in windows])
    whole = torch.cat([x[8:16] for x in windows]).mean().item()
    assert found["nats_at/8-15"] == pytest.approx(whole, rel=1e-5)
    alone = []
    for document in map(torch.tensor, documents):
        for begin in range(0, len(document) - 1, 32):
            end = min(begin + 32, len(document) - 1)
            start = max(0, end - 32)
            alone.append(nats(document[start : end + 1], begin - start).sum())
    assert found["bits_per_byte_of_documents"] == bits(alone)
    # Keys and values of 2 layers, of 16 float32 each.
    assert found["state_bytes"] == {str(n): 2 * 2 * 16 * 4 * n for n in (8, 32, 64)}
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["parameters_without_embeddings"] == found["parameters"] - 259 * 16
    assert found["trained_length"] is None and found["reading_tokens_per_second"] > 0
    printed = capsys.readouterr().out
    for value in (found["bits_per_byte"], found["bits_per_byte_in_context/64"]):
        assert f"{value:.4f}\n" in printed


def test_a_run_is_evaluated_as_it_measured_itself(in_process, workshop, capsys):
    options = ["--steps", "26", "--eval_every", "0", "--packing", "documents", "--sample_prompts"]
    options += ["[]", "--eval_positions", "8", "--eval_contexts", "[8, 64]"]
    assert in_process(*options).returncode == 0
    folder = workshop.folder / "tiny"
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    output = folder.parent / "out.json"
    words = [str(folder), "--contexts", "8", "64", "--device", "cpu", "--output", str(output)]
    evaluate.start(words)
    found = json.loads(output.read_text())
    assert found["trained_length"] == found["sequence_length"] == 32
    names = [name for name in line if name.startswith(("bits_per_byte", "nats_at"))]
    assert len(names) == 11
    for name in names:
        assert found[name] == pytest.approx(line[name], rel=1e-6)
    state = AutoModelForCausalLM.from_pretrained(folder).state_size(0)
    assert found["state_bytes"] == dict.fromkeys(("8", "32", "64"), state)
    assert "in context 64" in (printed := capsys.readouterr().out)
    assert "longer than in training" in printed


def test_states_and_tasks_of_others(folders):
    found = evaluated(folders, "mamba", "--contexts", "8", "64", "--tasks", "zoo_recall_4")
    sizes = found["state_bytes"]
    # In each of 2 layers 32 channels with a state of 4 and a convolution's last 4 inputs.
    assert set(sizes.values()) == {2 * 32 * (4 + 4) * 4}
    assert found["packing"] == "concat" and 0 <= found["accuracy/zoo_recall_4"] <= 0.6
    found = evaluated(folders, "gpt2")
    assert found["sequence_length"] == 96 and "bits_per_byte_in_context/64" in found
    assert "bits_per_byte_in_context/256" not in found
    with pytest.raises(UsageError, match="has 96 positions, got windows of 128 tokens"):
        evaluated(folders, "gpt2", "--contexts", "64", "128")
    with pytest.raises(UsageError, match="256 has texts of 2.. tokens, and the model 96 pos"):
        evaluated(folders, "gpt2", "--tasks", "zoo_passkey_256")


def test_models_of_a_module_that_is_imported_first(folders, tmp_path, monkeypatch):
    source = "from transformers import AutoConfig, AutoModelForCausalLM\n"
    source += "from transformers import LlamaConfig, LlamaForCausalLM\n"
    source += "class TheirConfig(LlamaConfig):\n    model_type = 'theirs'\n"
    source += "class TheirLM(LlamaForCausalLM):\n    config_class = TheirConfig\n"
    source += "AutoConfig.register('theirs', TheirConfig)\n"
    source += "AutoModelForCausalLM.register(TheirConfig, TheirLM)\n"
    (tmp_path / "their_models.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    shutil.copytree(folders / "llama", tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs/config.json").read_text()) | {"model_type": "theirs"}
    (tmp_path / "theirs/config.json").write_text(json.dumps(config))
    text = ["--data", str(folders / "text.jsonl")]
    with pytest.raises(UsageError, match="--import their_model: No module named 'their_model'"):
        evaluated(folders, "llama", "--import", "their_model")
    with pytest.raises(UsageError, match="no model at .*theirs: .* model type `theirs`"):
        evaluated(tmp_path, "theirs", *text)
    found = evaluated(tmp_path, "theirs", "--import", "their_models", *text)
    assert found["class"] == "TheirLM"


def test_text_is_what_a_run_holds_out(tmp_path, folders):
    tokenizer = load_tokenizer("tokenizers/byte")
    files = tmp_path / "files"
    files.mkdir()
    for number, text in enumerate(TEXTS[:3]):
        (files / f"{number}.txt").write_text(text)
    for data in (str(folders / "text.jsonl"), str(files)):
        recipe = Recipe("x", "any", data=data, held_out=0.3, eval_bytes=700)
        text = held_out_text(recipe)
        ours, run = tokens_of(text.documents, tokenizer), load_corpus(recipe, tokenizer, tmp_path)
        assert ours.ids.tolist() == run.held_out.ids.tolist()
        assert ours.starts.tolist() == run.held_out.starts.tolist()
        assert ours.num_bytes == run.held_out.num_bytes == text.record["bytes"]
        whole = held_out_text(recipe, whole=True)
        assert whole.record["bytes"] == (684 if data == str(files) else 700)
        assert text.record["sha256"] != whole.record["sha256"]


def test_a_tokenizer_that_begins_texts(folders):
    tokenizer = load_tokenizer(str(folders / "llama"))
    assert boundary_of(tokenizer) == (258, True)
    tokenizer.add_bos_token = True
    tokenizer.update_post_processor()
    assert boundary_of(tokenizer) == (257, False)
    tokens = tokens_of(["abc", "de"], tokenizer)
    assert tokens.ids.tolist() == [257, 97, 98, 99, 257, 100, 101, 257]
    assert tokens.window(0, 7, "concat")[1].tolist() == [97, 98, 99, -100, 100, 101, -100]
    assert tokens.num_targets == 5
    tokenizer.eos_token = tokenizer.bos_token = None
    with pytest.raises(UsageError, match="neither an eos_token nor a bos_token"):
        boundary_of(tokenizer)


def test_mistakes_are_one_line(folders, tmp_path):
    (folders / "empty").mkdir()

    def broken(name, change):
        shutil.copytree(folders / "llama", tmp_path / name)
        change(tmp_path / name)
        return str(tmp_path / name)

    def without_tokenizer(folder):
        for file in folder.glob("tokenizer*"):
            file.unlink()

    def with_code(folder):
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "its_own", "auto_map": {"AutoConfig": "code.Its"}}
        (folder / "config.json").write_text(json.dumps(config))

    def with_another_layer(folder):
        config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 3}
        (folder / "config.json").write_text(json.dumps(config))

    def with_few_words(folder):
        LlamaForCausalLM(LlamaConfig(**LLAMA | {"vocab_size": 99})).save_pretrained(folder)

    llama = str(folders / "llama")
    cases = {
        (broken("d", with_few_words),): "gave the id 258, and the model has 99 embeddings; .*--tok",
        (str(folders / "empty"),): "config.json, this one holds nothing",
        (f"{llama}s/",): "no such folder; give a folder or a Hub id. Did you mean .*llama",
        (broken("a", without_tokenizer),): "no tokenizer at .*a: the folder holds config.json, ",
        (broken("b", with_code),): "code comes with it; say --trust_remote_code",
        (broken("c", with_another_layer),): "lack 9 that a LlamaForCausalLM has, as .*layers.2",
        (llama, "--contexts", "9999"): r"--contexts are at most \d+ here, .* got 9999; .*--eval_by",
        (llama, "--tasks", "zoo_recal"): "no task 'zoo_recal': did you mean 'zoo_recall",
        (llama, "--device", "gpu7"): "--device is cpu, cuda, .* got 'gpu7'",
        (llama, "--positions", "0"): "--positions is at least 1, got 0",
        (llama, "--output", str(tmp_path / "no/x.json")): "there is no folder .*no",
        (llama, "--dtypes", "x"): "unrecognized arguments: --dtypes x",
        (): "expected a MODEL, or --write_lm_eval FOLDER",
    }
    for arguments, message in cases.items():
        with pytest.raises(UsageError, match=message) as error:
            evaluate.start([*arguments, "--data", str(folders / "text.jsonl")])
        assert "\n" not in str(error.value)
