"""The README of an exported folder: hub_cards/<architecture>.md, and what the run wrote down.

Of a folder for transformers' own class, whose code is not ours to describe, hub_cards/native.md.
"""

import json
import math
import re
from pathlib import Path
from string import Template
from typing import NamedTuple

from huggingface_hub import EvalResult, ModelCard
from transformers import PreTrainedConfig

from .. import Architecture
from .folder import settings

ZOO = Path(__file__).resolve().parent.parent


class Subject(NamedTuple):
    """What a card is about.

    Attributes:
        name: of the exported folder.
        architecture: a `zoo.Architecture`.
        config: the model's config.
        dtype: of the weights.
        license: of the weights.
        has_tokenizer: whether the folder holds one.
        num_parameters: tied ones count once.
        state_bytes: recurrent state of one sequence, without what grows with its tokens.
        state_bytes_per_token: what grows.
        run_folder: where run.json and metrics.jsonl may be, or in its parent.
        native_format: name of the format whose class in transformers loads it; None: ours does.
        native_config: config.json of that class.
        notes: on what was left out for it.
    """

    name: str
    architecture: Architecture
    config: PreTrainedConfig
    dtype: str
    license: str
    has_tokenizer: bool
    num_parameters: int
    state_bytes: int
    state_bytes_per_token: int
    run_folder: Path
    native_format: str | None = None
    native_config: dict | None = None
    notes: list[str] = []

    @property
    def model_class(self):
        """Name of the class that loads it."""
        if self.native_format is None:
            return self.architecture.causal_lm.__name__
        return self.native_config["architectures"][0]


def render_card(subject):
    """The text of README.md.

    Args:
        subject: a `Subject`.
    """
    is_ours = subject.native_format is None
    kind = subject.architecture.name if is_ours else "native"
    template = Template(find_template(kind).read_text(encoding="utf-8"))
    values = settings(subject.config) if is_ours else subject.native_config
    run, metrics = read_run(subject.run_folder)
    text = template.substitute(
        name=subject.name,
        license=subject.license,
        dtype=subject.dtype,
        num_parameters=f"{subject.num_parameters:,}",
        state_bytes=f"{subject.state_bytes:,}",
        state=state_in_words(subject.state_bytes, subject.state_bytes_per_token),
        config=_config_table(values),
        model_class=subject.model_class,
        model_type=subject.config.model_type if is_ours else values["model_type"],
        architecture=subject.architecture.name,
        format=subject.native_format,
        notes="".join(f"\n- {note}" for note in subject.notes) + "\n" * bool(subject.notes),
        usage=_usage(subject),
        training=_training(run, metrics),
    )
    card = ModelCard(text)
    if held_out := _held_out(metrics):
        corpus = str(_part(run, "recipe").get("data", "held-out text"))
        card.data.model_name = subject.name
        card.data.eval_results = [
            EvalResult(
                task_type="text-generation",
                dataset_type=corpus,
                dataset_name=f"{corpus}, held out",
                metric_type="bits_per_byte",
                metric_value=round(held_out["bits_per_byte"], 4),
            )
        ]
    return card.content


def state_in_words(num_bytes, num_bytes_per_token):
    """What a sequence's state takes: always, and for each token."""
    if not num_bytes_per_token:
        return f"{num_bytes:,} bytes of state per sequence, however long the text"
    beside = f", and {num_bytes:,} beside" if num_bytes else ""
    return f"{num_bytes_per_token:,} bytes of state per token of each sequence{beside}"


def find_template(name):
    """hub_cards/<name>.md: inside the package when installed, beside it in a clone."""
    folders = [ZOO / "hub_cards", ZOO.parent / "hub_cards"]
    return next((f / f"{name}.md" for f in folders if f.is_dir()), folders[-1] / f"{name}.md")


def read_run(folder):
    """run.json and the lines of metrics.jsonl of the run behind a checkpoint, as far as there are.

    Args:
        folder: the run's own folder, or a checkpoint in it.
    """
    folder = Path(folder).resolve()
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    last = int(match[1]) if match else math.inf
    for place in (folder, folder.parent):
        if (place / "run.json").is_file():
            run = _json_or_empty((place / "run.json").read_text(encoding="utf-8"))
            lines = []
            if (place / "metrics.jsonl").is_file():
                text = (place / "metrics.jsonl").read_text(encoding="utf-8")
                lines = [_json_or_empty(line) for line in text.splitlines()]
            # The run may have gone on after this checkpoint.
            return run, [line for line in lines if line.get("step", math.inf) <= last]
    return {}, []


def _json_or_empty(text):
    # A record is worth showing, but not worth failing for.
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {}


def _part(record, name):
    value = record.get(name)
    return value if isinstance(value, dict) else {}


def _held_out(metrics):
    lines = [line for line in metrics if line.get("kind") == "held_out"]
    lines = [line for line in lines if isinstance(line.get("bits_per_byte"), float)]
    return lines[-1] if lines else None


def _config_table(values):
    rows = [(f"`{name}`", f"`{value}`") for name, value in values.items() if value is not None]
    return _table("setting", "value", rows)


def _table(left, right, rows):
    return "\n".join(
        [f"| {left} | {right} |", "| --- | --- |", *(f"| {a} | {b} |" for a, b in rows)]
    )


def _usage(subject):
    trust = ", trust_remote_code=True" if subject.native_format is None else ""
    load = [
        "from transformers import AutoModelForCausalLM" + ", AutoTokenizer" * subject.has_tokenizer,
        "",
        f'name = "{subject.name}"  # this folder, or its name on the Hub',
        f"model = AutoModelForCausalLM.from_pretrained(name{trust})",
    ]
    if subject.has_tokenizer:
        load += [
            f"tokenizer = AutoTokenizer.from_pretrained(name{trust})",
            'inputs = tokenizer("def main(", return_tensors="pt")',
            "output = model.generate(**inputs, max_new_tokens=64)",
            "print(tokenizer.decode(output[0]))",
        ]
    else:
        load += [
            "output = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=64)",
            "print(output[0].tolist())  # token ids: this model came without a tokenizer",
        ]
        load.insert(0, "import torch")
    return "\n".join(load)


def _training(run, metrics):
    recipe, held_out, results = _part(run, "recipe"), _held_out(metrics), _part(run, "results")
    names = {
        "data": "data",
        "batch_size": "windows per step",
        "sequence_length": "tokens per window",
        "learning_rate": "peak learning rate",
        "schedule": "schedule",
        "weight_decay": "weight decay",
        "seed": "seed",
    }
    rows = [(label, recipe[name]) for name, label in names.items() if name in recipe]
    size = _part(_part(run, "corpus"), "train").get("bytes")
    if isinstance(size, int):
        rows.append(("bytes of training text", f"{size:,}"))
    if held_out:
        labels = {"step": "steps", "tokens": "tokens trained on"}
        rows += [(labels[n], f"{held_out[n]:,}") for n in labels if n in held_out]
        rows.append(("held-out bits per byte", f"{held_out['bits_per_byte']:.4f}"))
        gzip = results.get("gzip_bits_per_byte")
        if isinstance(gzip, float):
            rows.append(("`gzip -9` of the same text", f"{gzip:.4f}"))
    rows += [(name, f"`{run[name]}`") for name in ("device", "precision", "command") if name in run]
    if "git_commit" in run:
        changed = " with changes" if run.get("git_changed") else ""
        rows.append(("source", f"{run['git_commit']}{changed}"))
    if not rows:
        return "The checkpoint came without the record of a training run."
    return _table("", "", rows)
