"""Tasks on our text for lm-evaluation-harness, whose figures compare with those of evaluate.py."""

import json
from dataclasses import asdict
from pathlib import Path

from pretraining.recipe import UsageError
from zoo.hub.files import read_fields

from .word_tasks import PASSKEY_BYTES, TASKS, examples

TEXT_TASK, LOADER = "zoo_text", "zoo_data.py"
# The tasks find their data wherever the folder is: a path in YAML would be taken from where lm_eval
# is started.
LOADER_SOURCE = '''\
"""Reads the data of a task from the file beside this one. Written by recipes/evaluate.py."""

from pathlib import Path

import datasets


def load(file, **options):
    """The examples of a task; lm_eval hands on options of the model that play no part here."""
    path = Path(__file__).with_name(file)
    return datasets.load_dataset("json", data_files={"test": str(path)})
'''
COMMON = """\
task: {task}
{more}custom_dataset: !function zoo_data.load
dataset_kwargs:
  file: {task}.jsonl
test_split: test
"""
TEXT_YAML = """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list:
  - metric: bits_per_byte
  - metric: byte_perplexity
metadata:
  version: 1.0
  sha256: {sha256}
"""
WORDS_YAML = """\
output_type: multiple_choice
doc_to_text: text
doc_to_choice: choices
doc_to_target: answer
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def write_folder(folder, held_out):
    """Writes the tasks: for each a YAML file, and its data as JSON lines.

    zoo_text is the held-out text, of which bits_per_byte is evaluate.py's
    bits_per_byte_of_documents; zoo_passkey and zoo_recall are the tasks in words, of which acc is
    its accuracy.

    Args:
        folder: which need not exist; files of these names in it are replaced.
        held_out: the `HeldOut` text.

    Raises:
        UsageError: the folder cannot be written to.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOADER).write_text(LOADER_SOURCE, encoding="utf-8")
        documents = [{"text": text} for text in held_out.documents]
        text_yaml = TEXT_YAML.format(sha256=held_out.record["sha256"])
        _write(folder, TEXT_TASK, "", text_yaml, documents)
        for task in TASKS:
            tag = f"tag: {task.rpartition('_')[0]}\n"
            _write(folder, task, tag, WORDS_YAML, [asdict(example) for example in examples(task)])
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}.") from None


def _write(folder, task, more, own, rows):
    text = COMMON.format(task=task, more=more) + own
    (folder / f"{task}.yaml").write_text(text, encoding="utf-8")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{task}.jsonl").write_text(lines, encoding="utf-8")


def commands_for(folder, record=None):
    """The commands that run the tasks, in lines.

    Args:
        folder: with the tasks.
        record: what evaluate.py found of a model; None: of which nothing is known.
    """
    lines, model, length, boundary = [], "MODEL", "TOKENS", "ID"
    if record:
        model, length = record["model"], record["sequence_length"]
        boundary = record["boundary"]["id"]
        if record["model_type"].startswith("zoo_"):  # whose code has to come along
            if "auto_map" not in read_fields(Path(model) / "config.json"):
                exported = f"exported/{Path(model).name}"
                lines, model = [f"zoo export {model} {exported}"], exported
            model += ",trust_remote_code=True"
    # A beginning-of-text that the tokenizer puts before text would be scored as if it were text.
    text = f"max_length={length},prefix_token_id={boundary},add_bos_token=False"
    words = f"max_length={2 * max(PASSKEY_BYTES)}"  # the whole of every example
    for options, tasks in ((text, TEXT_TASK), (words, "zoo_passkey,zoo_recall")):
        lines.append(
            f"lm_eval run --model hf --model_args pretrained={model},{options} "
            f"--include_path {folder} --tasks {tasks}"
        )
    return "\n".join(lines)
