"""The README of an exported folder: hub_cards/<architecture>.md, and what the run wrote down.

Of a folder for transformers' own class, whose code is not ours to describe, hub_cards/native.md.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import EvalResult, ModelCard
from transformers import PreTrainedConfig

from .. import Architecture
from .card_holes import check_card, filled, number
from .classifier_cards import task_of, text_of_classifier, usage_of_classifier
from .convert.format import Format
from .files import CURVE_FIGURE, CURVE_NUMBERS, MEASURED
from .folder import settings
from .measuring import Measured
from .origin import Origin

ZOO = Path(__file__).resolve().parent.parent


class Subject(NamedTuple):
    """What a card is about.

    Attributes:
        name: of the exported folder.
        architecture: a `zoo.Architecture`.
        config: the model's config.
        dtype: of the weights.
        prompt: text that the folder's tokenizer can read; None: the folder holds none.
        num_parameters: tied ones count once.
        state_bytes: recurrent state of one sequence, without what grows with its tokens.
        state_bytes_per_token: what grows.
        origin: where the weights come from, and under which license.
        native_format: the format whose class in another library loads it; None: ours does.
        native_config: config.json of that class.
        notes: on what was left out for it.
        head: the field of `architecture` whose class it is.
        has_curve: whether the folder holds a figure of the training's loss.
        measured: what the contract measured on it, a `measuring.Measured`; None: nothing was.
    """

    name: str
    architecture: Architecture
    config: PreTrainedConfig
    dtype: str
    prompt: str | None
    num_parameters: int
    state_bytes: int
    state_bytes_per_token: int
    origin: Origin
    native_format: Format | None = None
    native_config: dict | None = None
    notes: list[str] = []
    head: str = "causal_lm"
    has_curve: bool = False
    measured: Measured | None = None

    @property
    def model_class(self):
        """Name of the class that loads it."""
        if self.native_format is None:
            return getattr(self.architecture, self.head).__name__
        return self.native_config["architectures"][0]


def render_card(subject):
    """The text of README.md.

    Metadata are written as YAML by huggingface_hub, and what comes from elsewhere is escaped in the
    text, so that no name can break either.

    Args:
        subject: a `Subject`.

    Raises:
        ValueError: something is missing where the card has a number or a word, or what was put
            together is nothing that the Hub takes.
    """
    is_ours, origin = subject.native_format is None, subject.origin
    kind = subject.architecture.name if is_ours else "native"
    card = ModelCard(find_template(kind).read_text(encoding="utf-8"), ignore_metadata_errors=False)
    if subject.head != "causal_lm":
        template = find_template("classifier").read_text(encoding="utf-8")
        card.text = text_of_classifier(template, card.text, subject)
        card.data.pipeline_tag = task_of(subject.head)
    values = settings(subject.config) if is_ours else subject.native_config
    card.text = filled(
        card.text,
        name=_plain(subject.name),
        license_of_weights=_license(origin),
        dtype=subject.dtype,
        num_parameters=number("num_parameters", subject.num_parameters),
        state_bytes=number("state_bytes", subject.state_bytes),
        state=state_in_words(subject.state_bytes, subject.state_bytes_per_token),
        config=_config_table(values),
        model_class=subject.model_class,
        architecture=subject.architecture.name,
        format=None if is_ours else subject.native_format.name,
        library=None if is_ours else subject.native_format.library.possessive,
        needs=None if is_ours else subject.native_format.library.needs,
        notes="".join(f"\n- {note}" for note in subject.notes) + "\n" * bool(subject.notes),
        usage=_usage(subject) if subject.head == "causal_lm" else usage_of_classifier(subject),
        training=_training(origin, subject.has_curve),
        contract=_contract(subject),
    )
    relation = "base_model_relation"
    for name in ("license", "license_name", "license_link", "base_model", relation):
        card.data[name] = getattr(origin, name)
    if not is_ours:
        package = subject.native_format.library.to_import
        card.data.tags = [values["model_type"], *([package] if package else [])]
    if origin.data_is_on_the_hub:
        card.data.datasets = [origin.data]
    if origin.bits_per_byte is not None and subject.head == "causal_lm":
        data = origin.data or "held-out text"
        card.data.model_name = subject.name
        number("bits_per_byte", origin.bits_per_byte)
        card.data.eval_results = [
            EvalResult(
                task_type="text-generation",
                dataset_type=data,
                dataset_name=f"{data}, held out",
                metric_type="bits_per_byte",
                metric_value=round(origin.bits_per_byte, 4),
            )
        ]
    text = str(card)
    check_card(text)
    return text


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


def _config_table(values):
    return _table(
        "setting",
        "value",
        [(_code(name), _code(value)) for name, value in values.items() if value is not None],
    )


def _table(left, right, rows):
    rows = [(left, right), ("---", "---"), *rows]
    # A pipe would end the cell, in code too.
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {a} | {b} |" for a, b in rows)


def _code(value):
    """A value as code on one line, whatever it holds."""
    text = " ".join(str(value).split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if not text or "`" in (text[0], text[-1]) else ""
    return f"{fence}{space}{text}{space}{fence}"


def _plain(text):
    """Text on one line in which Markdown finds nothing to mark up."""
    return re.sub(r"([\\`*\[\]<>#|&$])", r"\\\1", " ".join(text.split()))


def _license(origin):
    if origin.license is None:
        return "their source does not say under which license"
    details = [_plain(x) for x in (origin.license_name, origin.license_link) if x]
    return origin.license + (f" ({', '.join(details)})" if details else "")


def _usage(subject):
    trust = ", trust_remote_code=True" if subject.native_format is None else ""
    has_tokenizer = subject.prompt is not None
    load = [
        "from transformers import AutoModelForCausalLM" + ", AutoTokenizer" * has_tokenizer,
        "",
        # A string of JSON is one of Python, and nothing can end it early.
        f"name = {json.dumps(subject.name, ensure_ascii=False)}  # this folder, or its Hub name",
        f"model = AutoModelForCausalLM.from_pretrained(name{trust})",
    ]
    package = None if subject.native_format is None else subject.native_format.library.to_import
    if package is not None:
        load.insert(0, f"import {package}  # its classes become known to transformers")
    if has_tokenizer:
        load += [
            f"tokenizer = AutoTokenizer.from_pretrained(name{trust})",
            f'inputs = tokenizer({json.dumps(subject.prompt)}, return_tensors="pt")',
            "output = model.generate(**inputs, max_new_tokens=64)",
            "print(tokenizer.decode(output[0]))",
        ]
    else:
        load += [
            "output = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=64)",
            "print(output[0].tolist())  # token ids: this model came without a tokenizer",
        ]
        load.insert(load.index(""), "import torch")
    return "\n".join(load)


def _training(origin, has_curve):
    parts = []
    if origin.format and origin.source:
        exactness = "some of them rounded" if origin.is_rounded else "every one bit for bit"
        parts.append(
            f"The weights were converted from {_code(origin.source)} by "
            f"{_code('zoo convert ' + origin.format)}, {exactness}."
        )
    if origin.rounding:
        parts.append(
            f"The weights were rounded {_plain(origin.rounding)} when this folder was written. "
            "What was measured before that, was measured with the unrounded ones."
        )
    if origin.training:
        for what, value in origin.training:
            if value.strip().lower() in ("", "none", "nan", "inf", "-inf"):
                raise ValueError(f"a card needs a value for {what}, got {value!r}.")
        parts.append(_table("", "", [(_plain(a), _code(b)) for a, b in origin.training]))
    if origin.curves:
        figure = f"![The loss over the training]({CURVE_FIGURE})\n\n" * has_curve
        parts.append(
            f"{figure}The loss over the training, in numbers: [{CURVE_NUMBERS}]({CURVE_NUMBERS})."
        )
    if not parts:
        return "The checkpoint came without the record of its training."
    return "\n\n".join(parts)


def _contract(subject):
    """What is known of the ways to run it: figures with their bounds, or that there are none."""
    measured = subject.measured
    if measured is None:
        how = "`zoo export CHECKPOINT OUT --contract` measures it and writes the figures here"
        if subject.native_format is not None:
            how = "`zoo contract FOLDER` judges it"
        return (
            "That it gives the same numbers whole, in pieces and token by token, alone and in a "
            "batch, is tested of its class; on these weights it was not measured. With the "
            f"`longzoo` package, {how}."
        )
    versions = ", ".join(f"{name} {version}" for name, version in measured.versions.items())
    rows = [
        (title, verdict, _plain(what), _plain(figure), _plain(bound), f"{count:,}")
        for title, verdict, what, figure, bound, count in measured.rows
    ]
    header = ("point", "verdict", "nearest to its bound", "measured", "bound", "checks")
    failed = [f"**Failed:** {_plain('; '.join(measured.failed))}."] if measured.failed else []
    return "\n\n".join(
        [
            "Whether it gives the same numbers however it is run, measured on these weights "
            f"({_plain(versions)}). Of each point the figure that came nearest to its bound; all "
            f"are in [{MEASURED}]({MEASURED}).",
            *failed,
            _wide_table(header, rows),
            f"Not measured here: {'; '.join(measured.others)}. `zoo contract FOLDER` measures all.",
        ]
    )


def _wide_table(header, rows):
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
