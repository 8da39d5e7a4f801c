"""Tasks for lm-evaluation-harness: its files are written as it reads them, on the same text."""

import importlib.util
import json

import numpy as np
import pytest
import yaml

import evaluate
from pretraining.corpus import Tokens
from pretraining.recipe import Recipe
from scoring.lm_eval_folder import commands_for
from scoring.measures import windows_of_documents
from scoring.texts import held_out_text
from scoring.word_tasks import TASKS, chosen, examples


class Loader(yaml.SafeLoader):
    """Reads YAML as lm-evaluation-harness does, but that functions stay names."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def test_the_folder(tmp_path, capsys):
    text = tmp_path / "text.jsonl"
    documents = [f"[{n}]\n\u00e9 {{{{ {n * n} }}}} \n" for n in range(200)]
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    folder = tmp_path / "tasks"
    evaluate.start(["--write_lm_eval", str(folder), "--data", str(text), "--eval_bytes", "90"])
    printed = capsys.readouterr().out
    for tasks in ("zoo_text", "zoo_passkey,zoo_recall"):
        assert f"--include_path {folder} --tasks {tasks}\n" in printed
    found = {path.stem: yaml.load(path.read_text(), Loader) for path in folder.glob("*.yaml")}
    assert set(found) == {"zoo_text", *TASKS}
    held_out = held_out_text(Recipe("x", "any", data=str(text), eval_bytes=90))
    for name, task in found.items():
        assert task["task"] == name and task["custom_dataset"] == "zoo_data.load"
        lines = (folder / task["dataset_kwargs"]["file"]).read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert {task["doc_to_target"], task.get("doc_to_choice", "text")} <= set(rows[0])
        if name == "zoo_text":
            assert task["output_type"] == "loglikelihood_rolling"
            assert {metric["metric"] for metric in task["metric_list"]} >= {"bits_per_byte"}
            assert [row["text"] for row in rows] == held_out.documents
            assert task["metadata"]["sha256"] == held_out.record["sha256"]
        else:
            assert task["output_type"] == "multiple_choice" and task["tag"] in name
            assert rows == [vars(example) for example in examples(name)]
    spec = importlib.util.spec_from_file_location("zoo_data", folder / "zoo_data.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    data = module.load("zoo_text.jsonl", pretrained="what lm_eval hands on")
    assert data["test"]["text"] == held_out.documents


def test_each_token_of_a_document_is_scored_once():
    tokens = Tokens(np.array([9, 1, 2, 3, 9, 4, 5, 6, 7, 8, 9]), np.array([0, 4]), 8)
    windows = [(ids.tolist(), count) for ids, count in windows_of_documents(tokens, 3)]
    # The last of a document sees again what the one before it scored.
    assert windows == [([9, 1, 2, 3], 3), ([9, 4, 5, 6], 3), ([5, 6, 7, 8], 2)]
    assert [(len(ids) - 1, n) for ids, n in windows_of_documents(tokens, 9)] == [(3, 3), (5, 5)]


@pytest.mark.parametrize("name", TASKS)
def test_the_answer_is_in_the_text(name):
    found = examples(name)
    size, answers = TASKS[name][1], [example.answer for example in found]
    assert found == examples(name) and len({example.text for example in found}) == len(found)
    assert len(set(answers)) == len(found[0].choices)
    for example in found:
        right = example.choices[example.answer]
        if "passkey" in name:
            assert f"The pass key is {right}." in example.text
            assert size - 30 < len(example.text.encode()) <= size
            assert sum(choice in example.text for choice in example.choices) == 1
        else:
            asked = example.text.split(". ")[-1].removesuffix(" likes")
            assert f"{asked} likes {right}." in example.text
            assert all(f" likes {choice}." in example.text for choice in example.choices)
            assert example.text.count(" likes ") == size
            assert len(set(example.choices)) == 4


def test_the_commands_are_those_for_a_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    record = {"model": str(tmp_path), "sequence_length": 128, "boundary": {"id": 258}}
    lines = commands_for("tasks", record | {"model_type": "llama"}).splitlines()
    assert len(lines) == 2 and all(f"pretrained={tmp_path},max_length=" in line for line in lines)
    assert "max_length=128,prefix_token_id=258,add_bos_token=False --inc" in lines[0]
    exported = f"exported/{tmp_path.name}"
    ours = commands_for("tasks", record | {"model_type": "zoo_retnet"})
    assert ours.startswith(f"zoo export {tmp_path} {exported}\nlm_eval run")
    assert f"pretrained={exported},trust_remote_code=True,max" in ours
    (tmp_path / "config.json").write_text('{"auto_map": {}}')  # an export
    ours = commands_for("tasks", record | {"model_type": "zoo_retnet"})
    assert "zoo export" not in ours and f"={tmp_path},trust_remote_code=True" in ours


def test_names_of_tasks():
    assert chosen(["zoo_recall_4", "zoo_recall"]) == [n for n in TASKS if "recall" in n]
    assert chosen([]) == []
