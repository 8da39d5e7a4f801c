"""A checkpoint becomes a folder that loads anywhere: `zoo export CHECKPOINT OUT`.

Beside weights, config and tokenizer it holds the architecture's own source files, so that
`from_pretrained(OUT, trust_remote_code=True)` needs torch and transformers only. Where `zoo` is
imported, its classes are used instead.

With `--format native` it becomes a model of another library's own class instead, transformers' or
flash-linear-attention's, where one has a class that computes the same: no code goes along, and none
has to be trusted.
"""

import ast
import functools
import inspect
import re
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from transformers import GenerationConfig

from .card import Subject, render_card
from .convert import write_model
from .convert.formats import native_format
from .files import TOKENIZER_FILES, carry_tokenizer, new_folder
from .folder import (
    build_model,
    check_tokenizer,
    current_names,
    find_dtype,
    head_of,
    load_tokenizer,
    open_tensors,
    read_config,
    read_generation_config,
    read_json,
    rounding,
)
from .measuring import measure
from .messages import HUB_ID, about, not_found, some
from .origin import check_license, origin_of_checkpoint
from .saving import save_model

EXPORT_FORMATS = ("zoo", "native")
ROOT = Path(__file__).resolve().parent.parent.parent
AUTO_CLASSES = {
    "AutoConfig": "config",
    "AutoModel": "model",
    "AutoModelForCausalLM": "causal_lm",
    "AutoModelForSequenceClassification": "sequence_classifier",
    "AutoModelForTokenClassification": "token_classifier",
    "AutoModelForQuestionAnswering": "question_answerer",
}


class Exported(NamedTuple):
    """What an export wrote.

    Attributes:
        num_parameters: written.
        code: names of the source files beside the weights; none for another library's class.
        has_tokenizer: whether there is a tokenizer.
        model_class: name of the class that loads it.
        notes: on what the other library's format left out, and what else to know.
        library: whose class that is, as in "transformers'"; None: ours.
    """

    num_parameters: int
    code: list[str]
    has_tokenizer: bool
    model_class: str
    notes: list[str]
    library: str | None = None


def export(
    checkpoint,
    out,
    overwrite=False,
    license=None,
    max_shard_size="5GB",
    format="zoo",
    base_model=None,
    dtype=None,
    contract=False,
):
    """Writes a checkpoint as a folder for the Hugging Face Hub.

    Args:
        checkpoint: a folder that `save_pretrained` or a training run wrote; of a run without a
            final model, the newest checkpoint.
        out: the folder to write.
        overwrite: replace a model that is there; files that are not its own stay.
        license: of the weights, the Hub's name for it. None: what the checkpoint says, which of a
            training run of ours is apache-2.0; if it says nothing, neither does the card. The
            code's own license is in LICENSE.
        max_shard_size: a file of weights is at most this large.
        format: "zoo", with our code beside the weights, or "native", for another library's own
            class: transformers', else flash-linear-attention's.
        base_model: name on the Hub of the model that these weights are, or were made from. None:
            what the checkpoint says.
        dtype: name of one to round the weights to. None: as they are.
        contract: measure on the written model whether every way of running it gives the same
            numbers, and put the figures on its card.

    Returns:
        An `Exported`.

    Raises:
        ValueError: not a checkpoint of ours, damaged files, a tokenizer of another model, a model
            that the other library's class cannot express, no license's or model's name, or
            something in the way at `out`.
    """
    if format not in EXPORT_FORMATS:
        raise ValueError(f"format is {' or '.join(EXPORT_FORMATS)}, got {format!r}.")
    if contract and format != "zoo":
        raise ValueError(
            "--contract measures our own classes; of another library's, `zoo contract OUT` judges "
            "what this has written."
        )
    dtype = find_dtype(dtype)
    if license is not None:
        check_license(license)
    if base_model is not None and not HUB_ID.fullmatch(base_model):
        raise ValueError(f"a base model is owner/name on the Hub, got {base_model!r}.")
    checkpoint = find_checkpoint(checkpoint)
    if checkpoint.resolve().is_relative_to(Path(out).resolve()):
        raise ValueError(f"{out} contains the checkpoint itself; choose a folder beside it.")
    # Other libraries' classes are language models here.
    architecture, config = read_config(checkpoint, classifiers=format != "native")
    tokenizer = None
    try:
        native = native_format(architecture.name, config) if format == "native" else None
        if any((checkpoint / name).is_file() for name in TOKENIZER_FILES):
            tokenizer = load_tokenizer(checkpoint)
            check_tokenizer(tokenizer, config.vocab_size)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from None
    found = current_names(checkpoint, open_tensors(checkpoint))
    model, tensors = build_model(architecture, config, found, checkpoint, dtype)
    head = head_of(architecture, config)
    if contract and head != "causal_lm":
        raise ValueError(f"{checkpoint}: --contract measures language models, not classifiers.")
    if head == "causal_lm":
        model.generation_config = _generation_config(checkpoint, config, tokenizer)
    origin, remarks = _origin(checkpoint, license, base_model)
    if rounded := rounding(found.values(), dtype):
        remarks.append(f"the weights are rounded {rounded}")
        origin.add_rounding(rounded)
    with new_folder(out, overwrite) as new:
        if native is None:
            code, notes = _save_with_code(model, tensors, architecture, new, max_shard_size), []
        else:
            code = []
            try:
                notes = write_model(native, model, tensors, new, max_shard_size)[1]
            except ValueError as error:
                raise about(checkpoint, error) from None
            model.generation_config.save_pretrained(new)
        carry_tokenizer(checkpoint, new)
        has_curve = origin.write(new)
        measured = measure(new, Path(out).absolute().name) if contract else None
        subject = Subject(
            name=Path(out).absolute().name,
            architecture=architecture,
            config=config,
            dtype=str(model.dtype).removeprefix("torch."),
            prompt=None if tokenizer is None else _prompt(tokenizer),
            num_parameters=sum(p.numel() for p in model.parameters()),
            state_bytes=model.state_size(0),
            state_bytes_per_token=model.state_size(1) - model.state_size(0),
            origin=origin,
            native_format=native,
            native_config=native and read_json(new / "config.json"),
            notes=notes,
            head=head,
            has_curve=has_curve,
            measured=measured,
        )
        if measured is not None and measured.failed:
            remarks.append(f"the contract does not hold: {some(measured.failed)}; see README.md")
        (new / "README.md").write_text(render_card(subject), encoding="utf-8")
    return Exported(
        subject.num_parameters,
        code,
        tokenizer is not None,
        subject.model_class,
        notes + remarks,
        native and native.library.possessive,
    )


def require_license(checkpoint):
    """Raises a ValueError if a checkpoint does not say which license its weights have."""
    origin = origin_of_checkpoint(find_checkpoint(checkpoint))
    if origin.license is None:
        source = f"{origin.source}, where it is from," if origin.source else "it"
        raise ValueError(
            f"{checkpoint}: which license do the weights have? {source} does not say; pass "
            "--license with the Hub's name of it, such as apache-2.0, mit or other."
        )


def _origin(checkpoint, license, base_model):
    """Where a checkpoint comes from, with what the user says of it, and remarks on both."""
    origin, remarks = origin_of_checkpoint(checkpoint), []
    if license is not None and license != origin.license:
        if origin.license is not None and origin.source:
            remarks.append(f"license {license}, as you say; {origin.source} says {origin.license}")
        origin.license, origin.license_name, origin.license_link = license, None, None
    origin.base_model = base_model or origin.base_model
    return origin, remarks


def _prompt(tokenizer):
    """What the card's example begins with: code, or else the first words that a tokenizer has."""
    code = "def main("
    try:
        ids = tokenizer(code, add_special_tokens=False)["input_ids"]
    except Exception:  # tokenizers' own, where a word is missing and nothing stands for it
        ids = []
    if ids and tokenizer.unk_token_id not in ids:
        return code
    words = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
    return tokenizer.decode(sorted(words)[:3])


def find_checkpoint(folder):
    """The folder itself if it holds a model, else its newest `checkpoint-<step>`.

    Raises:
        ValueError: there is neither.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise not_found(folder, "folder of a checkpoint or run")
    if (folder / "config.json").is_file():
        return folder
    steps = {
        int(match[1]): path
        for path in folder.iterdir()
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
        and (path / "config.json").is_file()
    }
    if not steps:
        raise ValueError(
            f"{folder / 'config.json'} is missing and there is no checkpoint-<step> folder; "
            "expected a folder that save_pretrained or a training run wrote."
        )
    return steps[max(steps)]


def modelling_sources(architecture):
    """The source files an architecture runs on, for one flat folder.

    transformers follows `from .name import ...` between files of a folder, and nothing deeper. So
    `from ..core.base import` becomes `from .base import`; all else stays as it is.

    Args:
        architecture: a `zoo.Architecture`.

    Returns:
        File name -> source, the architecture's own file first.
    """
    sources, waiting = {}, [Path(inspect.getfile(architecture.config))]
    while waiting:
        path = waiting.pop()
        if path.name in sources:
            continue
        sources[path.name], imported = _flattened(path, path.read_text(encoding="utf-8"))
        waiting += imported
    return sources


@functools.cache
def _flattened(path, source):
    """A file's source as of a flat folder, and the files that it imports; parsed once."""
    lines, imported = source.splitlines(keepends=True), []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        if not node.module or node.module.count(".") != node.level - 1:
            raise ValueError(
                f"{path}, line {node.lineno}: an exported file imports by "
                "`from .module import name` or `from ..room.module import name` only."
            )
        imported.append(path.parents[node.level - 1] / f"{node.module.replace('.', '/')}.py")
        written = f"from {'.' * node.level}{node.module} "
        flat = f"from .{node.module.rpartition('.')[2]} "
        lines[node.lineno - 1] = lines[node.lineno - 1].replace(written, flat, 1)
    return "".join(lines), imported


def _save_with_code(model, tensors, architecture, folder, max_shard_size):
    """Writes a model and the files it runs on. Returns the names of these."""
    # One file for config and model: from two, transformers would load two copies of the config.
    module = Path(inspect.getfile(architecture.config)).stem
    model.config.auto_map = {
        auto: f"{module}.{getattr(architecture, field).__name__}"
        for auto, field in AUTO_CLASSES.items()
    }
    sources = modelling_sources(architecture)
    save_model(model, tensors, folder, max_shard_size)
    for name, source in sources.items():
        (folder / name).write_text(source, encoding="utf-8")
    (folder / "LICENSE").write_text(_license_text(), encoding="utf-8")
    return sorted(sources)


def _generation_config(checkpoint, config, tokenizer):
    """The checkpoint's, or the config's, with the tokenizer's special tokens where it has none."""
    generation_config = read_generation_config(checkpoint) or GenerationConfig.from_model_config(
        config
    )
    # What is written here is meant: transformers is not to derive it from the config again.
    generation_config._from_model_config = False
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(generation_config, name) is None:
            setattr(generation_config, name, getattr(tokenizer, name, None))
    return generation_config


def _license_text():
    """The project's license: in a clone at its root, installed among the distribution's files."""
    root = ROOT / "LICENSE"
    if (ROOT / "pyproject.toml").is_file() and root.is_file():
        return root.read_text(encoding="utf-8")
    return metadata.distribution("longzoo").read_text("licenses/LICENSE")
