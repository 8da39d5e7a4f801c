"""What a card says of a run: this checkpoint's own figures, no paths; and no name breaks it."""

import json
import re
import shutil

import pytest
from huggingface_hub import ModelCard

import zoo
from zoo.cli import main
from zoo.hub.export import export
from zoo.hub.origin import origin_of_checkpoint

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
RECIPE = {"name": "tiny", "data": "stdlib", "steps": 4, "learning_rate": 0.25, "schedule": "wsd"}
FIGURES = {2: 6.5, 4: 5.5, 6: 4.5, 8: 3.5}


def make_run(folder, steps=8, **changes):
    """A run of 4 steps that went on to 8, as far as it is written down; `steps` are done."""
    recipe = RECIPE | {"steps": 8, "learning_rate": 0.75} | changes
    record = {
        "recipe": recipe,
        "command": "recipes/pretrain.py /elsewhere/me/secret.toml --steps 8",
        "device": "cpu",
        "git_commit": "0123abcd",
        "corpus": {"train": {"bytes": 123456}},
        "results": {"step": steps, "gzip_bits_per_byte": 1.75, "held_out_bits_per_byte": 3.5},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(record))
    lines = [
        {"kind": kind, "step": step, "tokens": 100 * step, "bits_per_byte": value + 0.1 * shift}
        for step, value in FIGURES.items()
        for shift, kind in enumerate(("held_out", "train"))
        if step <= steps
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"kind": "held_out", "st')
    return folder


def make_model(folder):
    zoo.RetNetForCausalLM(zoo.RetNetConfig(**SIZES)).save_pretrained(folder)
    return folder


def card_of(checkpoint, out, **options):
    export(checkpoint, out, **options)
    return ModelCard((out / "README.md").read_text())


def test_a_checkpoint_of_a_run_that_went_on_has_its_own_figures(tmp_path):
    run = make_run(tmp_path / "run")
    checkpoint = make_model(run / "checkpoint-4")
    (checkpoint / "checkpoint.json").write_text(json.dumps({"step": 4, "recipe": RECIPE}))
    card = card_of(checkpoint, tmp_path / "out")
    assert card.data.eval_results[0].metric_value == 5.5
    assert "| held-out bits per byte | `5.5000` |" in card.text and "| steps | `4` |" in card.text
    assert "`0.25`" in card.text and "0.75" not in card.text
    # What the record says is of the later start: not of this checkpoint, as far as is known.
    assert not re.search("0123abcd|gzip|cpu|123,456", card.text)
    # The last one is of the recipe in the record.
    shutil.copytree(checkpoint, run / "checkpoint-8")
    (run / "checkpoint-8" / "checkpoint.json").write_text(
        json.dumps({"step": 8, "recipe": RECIPE | {"steps": 8, "learning_rate": 0.75}})
    )
    card = card_of(run / "checkpoint-8", tmp_path / "last")
    assert card.data.eval_results[0].metric_value == 3.5
    for fact in ("0123abcd", "1.7500", "`cpu`", "123,456", "`0.75`"):
        assert fact in card.text


def test_a_final_model_has_figures_only_once_the_run_is_over(tmp_path):
    over = make_model(make_run(tmp_path / "over"))
    assert card_of(over, tmp_path / "a").data.eval_results[0].metric_value == 3.5
    # Killed on its way from 4 steps to 8: the model is of 4, the record of 6.
    killed = make_model(make_run(tmp_path / "killed", steps=6))
    card = card_of(killed, tmp_path / "b")
    assert card.data.eval_results is None and "without the record" in card.text
    assert card.data.license == "apache-2.0"


def test_a_record_is_of_its_own_folder(tmp_path):
    run = make_run(tmp_path / "run")
    assert origin_of_checkpoint(make_model(run / "converted")).training == []
    # A checkpoint that was taken out of its run still says what it is.
    (run / "converted" / "checkpoint.json").write_text(json.dumps({"step": 4, "recipe": RECIPE}))
    origin = origin_of_checkpoint(run / "converted")
    assert ["peak learning rate", "0.25"] in origin.training and origin.bits_per_byte is None


@pytest.mark.parametrize("damage", ["", "null", "[1]", "{", '{"recipe": 3, "results": [], "a": 1}'])
def test_damaged_records_are_no_record(tmp_path, damage):
    run = make_model(make_run(tmp_path / "run"))
    for name in ("run.json", "checkpoint.json", "metrics.jsonl", "longzoo.json", "README.md"):
        (run / name).write_text(damage)
    assert origin_of_checkpoint(run).bits_per_byte is None


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        ("/elsewhere/me/books/", "books"),
        ("../private/text.jsonl", "text.jsonl"),
        ("private/text.txt", "text.txt"),
        ("C:\\Users\\me\\t.csv", "t.csv"),
        ("~/*.parquet", "*.parquet"),
        ("wikimedia/wikipedia", "wikimedia/wikipedia"),
        ("stdlib", "stdlib"),
    ],
)
def test_no_paths_and_no_commands(tmp_path, data, shown):
    run = make_model(make_run(tmp_path / "run", data=data, tokenizer="/elsewhere/me/tokenizer"))
    card = card_of(run, tmp_path / "out")
    assert f"| data | `{shown}` |" in card.text
    assert card.data.eval_results[0].dataset_type == shown
    assert card.data.get("datasets") == ([shown] if "/" in shown else None)
    written = (tmp_path / "out" / "longzoo.json").read_text() + card.content
    assert not re.search(r"elsewhere|Users|private|secret|pretrain\.py|~", written)
    assert str(tmp_path) not in written


NAMES = ["it's", 'a "b"', "x: y", "- a #b", "a\n---\nlicense: mit", "`|` $name **b** <b>", "€ 名"]


@pytest.mark.parametrize("name", NAMES)
def test_names_break_nothing(tmp_path, name):
    run = make_model(make_run(tmp_path / "run", schedule="a|b`c`\nd", data="x | y`"))
    record = json.loads((run / "run.json").read_text())
    record["git_commit"] = "${oops} | <b>"
    (run / "run.json").write_text(json.dumps(record))
    card = card_of(run, tmp_path / name, license="other")
    plain = card_of(run, tmp_path / "plain", license="other")
    assert card.data.license == "other" and card.data.model_name == name
    keys = [list(found.data.to_dict()) for found in (card, plain)]
    assert keys[0] == keys[1] and card.data.tags == plain.data.tags
    # The same lines: no cell, no heading, no fence more.
    assert card.text.count("\n") == plain.text.count("\n")
    rows = [line for line in card.text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3}
    (snippet,) = re.findall(r"```python\n(.*?)\n```", card.text, re.DOTALL)
    line = next(line for line in snippet.splitlines() if line.startswith("name = "))
    found = {}
    exec(compile(line, "card", "exec"), found)
    assert found["name"] == name
    assert main(["info", str(tmp_path / name)]) == 0
