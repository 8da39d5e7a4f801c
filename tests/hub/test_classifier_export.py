"""Classifiers of texts, of tokens and finders of answers: exported, and what their cards say."""

import json
import re

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoTokenizer, pipeline
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import zoo
from zoo.cli import main
from zoo.hub.export import export
from zoo.hub.folder import CLASSIFIERS
from zoo.hub.outline import check_weights

SIZES = {
    "vocab_size": 264,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 256,
}
LABELS = {0: "O", 1: "B-PER `x` $name", 2: 'I-"PER"'}
TASKS = {
    "sequence_classifier": "text-classification",
    "token_classifier": "token-classification",
    "question_answerer": "question-answering",
}
IDS = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])


def save_classifier(folder, name, head, tokenizer=True, **fields):
    torch.manual_seed(0)
    found = zoo.MODELS[name]
    if head != "question_answerer" and "num_labels" not in fields:
        fields |= {"id2label": LABELS, "label2id": {v: k for k, v in LABELS.items()}}
    model = getattr(found, head)(found.config(**SIZES | fields)).eval()
    model.save_pretrained(folder)
    if tokenizer:
        AutoTokenizer.from_pretrained("tokenizers/byte").save_pretrained(folder)
    return model


def scores(model):
    with torch.no_grad():
        output = model(IDS, attention_mask=MASK)
    return output.logits if "logits" in output else torch.stack(output.to_tuple()[:2])


# Every architecture, each with one of the heads, and RetNet with all of them.
CASES = {(name, CLASSIFIERS[i % 3]) for i, name in enumerate(zoo.MODELS)}
CASES |= {("retnet", head) for head in CLASSIFIERS}


@pytest.mark.parametrize("name, head", sorted(CASES))
def test_round_trip(name, head, tmp_path):
    """The folder's own code gives the same scores, bit for bit, and so does what it saves again."""
    model = save_classifier(tmp_path / "checkpoint", name, head, tokenizer=False)
    exported = export(tmp_path / "checkpoint", tmp_path / "out", license="mit")
    wanted = getattr(zoo.MODELS[name], head).__name__
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert exported.model_class == wanted and config["architectures"] == [wanted]
    check_weights(tmp_path / "out")
    place = next(x for x in config["auto_map"].values() if x.endswith(f".{wanted}"))
    remote = get_class_from_dynamic_module(place, tmp_path / "out")
    assert remote.__module__.startswith("transformers_modules")
    for folder in ("out", "again"):
        loaded, report = remote.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(report[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
        assert torch.equal(scores(loaded.eval()), scores(model))
        if head != "question_answerer":
            assert loaded.config.id2label == LABELS and loaded.num_labels == 3
        loaded.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "out" / "generation_config.json").exists()


@pytest.mark.parametrize("head", CLASSIFIERS)
def test_card(head, tmp_path):
    save_classifier(tmp_path / "checkpoint", "gated_deltanet", head)
    export(tmp_path / "checkpoint", tmp_path / "out", license="mit")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.pipeline_tag == TASKS[head] and card.data.license == "mit"
    assert "custom_code" in card.data.tags and card.data.library_name == "transformers"
    assert "language model" not in card.text and "generate" not in card.text
    assert not re.search("@(kind|labels|paper|model)", card.text)
    assert "(https://arxiv.org/abs/2412.06464)" in card.text.partition("```")[0]
    assert "`num_attention_heads`" in card.text and "S_t" in card.text
    if head != "question_answerer":
        assert json.dumps(list(LABELS.values())) in card.text.splitlines()
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
    code = code.replace('name = "out"', f"name = {str(tmp_path / 'out')!r}")
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"num_labels": 1}, "Its output is a number, not a class."),
        ({"num_labels": 3, "problem_type": "regression"}, "Its output is 3 numbers, not a class."),
        ({"num_labels": 2, "problem_type": "multi_label_classification"}, "several may hold"),
    ],
)
def test_what_a_card_says_of_outputs(fields, said, tmp_path):
    save_classifier(tmp_path / "in", "rwkv4", "sequence_classifier", tokenizer=False, **fields)
    export(tmp_path / "in", tmp_path / "out", license="mit")
    text = (tmp_path / "out" / "README.md").read_text()
    assert said in text and "it came without a tokenizer" in text


def test_pipelines(tmp_path):
    """transformers 5 has none for answers in a text."""
    for head in ("sequence_classifier", "token_classifier"):
        save_classifier(tmp_path / head, "longnet", head)
        export(tmp_path / head, tmp_path / "out", license="mit", overwrite=True)
        pipe = pipeline(TASKS[head], model=str(tmp_path / "out"), trust_remote_code=True)
        texts = ["one text", "another, longer one"]
        together, apart = pipe(texts, batch_size=2), [pipe(text) for text in texts]
        for a, b in zip(together, apart, strict=True):
            b = b[0] if isinstance(a, dict) else b
            a, b = ([x] if isinstance(x, dict) else x for x in (a, b))
            assert [x.get("label", x.get("entity")) for x in a] == [
                x.get("label", x.get("entity")) for x in b
            ]
            assert {x.get("label", x.get("entity")) for x in a} <= set(LABELS.values())
            torch.testing.assert_close([x["score"] for x in a], [x["score"] for x in b])


def test_what_takes_language_models_alone_says_so(tmp_path, capsys):
    save_classifier(tmp_path / "in", "sliding_window", "token_classifier", tokenizer=False)
    wanted = "expected a language model (SlidingWindowForCausalLM), got SlidingWindowForToken"
    capsys.readouterr()
    for command in (
        ["export", str(tmp_path / "in"), str(tmp_path / "out"), "--format", "native"],
        ["convert", "hf-mistral", "--reverse", str(tmp_path / "in"), str(tmp_path / "out")],
    ):
        assert main(command + ["--license", "mit"] * (command[0] == "export")) == 2
        said = capsys.readouterr().err
        assert wanted in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert main(["info", str(tmp_path / "in")]) == 0
    assert "SlidingWindowForTokenClassification" in capsys.readouterr().out
