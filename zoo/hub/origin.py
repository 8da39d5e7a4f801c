"""Where weights come from: a training run, or a foreign checkpoint, and under which license.

It goes with a model as longzoo.json, from folder to folder. Names only: no path of the machine that
the model was made on.
"""

import json
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from huggingface_hub import metadata_load

from .curve import curve_of, is_number, read_curves, write_curves
from .files import RECORD_FILE, read_fields, read_text
from .messages import HUB_ID

# The Hub's names of licenses are of this shape: apache-2.0, llama3.1, cc-by-nc-4.0, other.
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
LICENSE_OF_RUNS = "apache-2.0"
RECIPE_ROWS = {
    "batch_size": "windows per step",
    "sequence_length": "tokens per window",
    "learning_rate": "peak learning rate",
    "schedule": "schedule",
    "warmup_steps": "steps of warm-up",
    "decay_steps": "steps of decay",
    "beta1": "AdamW's beta 1",
    "beta2": "AdamW's beta 2",
    "weight_decay": "weight decay",
    "gradient_clip": "largest norm of the gradient",
    "seed": "seed",
}
# Of files, never of a data set on the Hub.
FILE_ENDINGS = tuple(".parquet .json .jsonl .txt .csv .tsv .arrow .gz .zst .bz2 .xz .zip".split())


@dataclass
class Origin:
    """What is known of weights, as far as it is known.

    Attributes:
        license: the Hub's name of it.
        license_name: its own name, where the Hub's is "other".
        license_link: where it can be read.
        base_model: name on the Hub of the model these weights are, or were made from.
        format: of the foreign checkpoint they were converted from.
        source: name of that checkpoint.
        is_rounded: whether some weights are not the source's bit for bit.
        rounding: to another dtype, when the folder was written ("from float32 to bfloat16").
        data: what it was trained on: a name on the Hub, or in words.
        data_is_on_the_hub: whether `data` is such a name.
        bits_per_byte: of held-out text of the same data.
        training: rows of a table on the training: pairs of what, and its value.
        curves: of its loss, as `curve.curve_of` gives them; they go in a file of their own.
    """

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    base_model: str | None = None
    format: str | None = None
    source: str | None = None
    is_rounded: bool = False
    rounding: str | None = None
    data: str | None = None
    data_is_on_the_hub: bool = False
    bits_per_byte: float | None = None
    training: list = field(default_factory=list)
    curves: dict = field(default_factory=dict)

    @property
    def base_model_relation(self):
        """What the weights are to those of the base model, in the Hub's word; None: the same."""
        if self.base_model is None:
            return None
        if self.training:
            return "finetune"
        return "quantized" if self.rounding else None

    def add_rounding(self, rounding):
        """Takes down that the weights are rounded, `folder.rounding` in words; None: they are not.

        Once rounded, they may be again.
        """
        if rounding:
            self.rounding = f"{self.rounding}, then {rounding}" if self.rounding else rounding

    def write(self, folder):
        """Puts what is known into a model's folder. Returns whether that has a figure now."""
        known = {n: value for n, value in asdict(self).items() if value and n != "curves"}
        text = json.dumps({"origin": known}, indent=2, ensure_ascii=False) + "\n"
        (Path(folder) / RECORD_FILE).write_text(text, encoding="utf-8")
        return write_curves(self.curves, folder)


def check_license(name):
    """Raises a ValueError if a license is not named as the Hub names them."""
    if not LICENSE.fullmatch(name):
        near = re.sub(r"[^a-z0-9.+]+", "-", name.lower()).strip("-")
        hint = f"did you mean {near}?" if LICENSE.fullmatch(near) else "or other, for any license."
        raise ValueError(
            f"a license is the Hub's name of it, such as apache-2.0, mit or other; got {name!r}, "
            f"{hint}"
        )


def origin_of_source(src, format):
    """The origin of weights that are about to be converted.

    Args:
        src: the foreign folder or weight file.
        format: its name.
    """
    # A file in the Hub's cache is a link to one whose name says nothing: its own place counts.
    src = Path(src).resolve() if Path(src).is_dir() else Path(src).parent.resolve() / Path(src).name
    folder = src if src.is_dir() else src.parent
    origin = _recorded(folder)
    origin.format, origin.source = format, src.name
    loaded_from = read_fields(folder / "config.json").get("_name_or_path")
    if cached := _name_in_cache(src):
        origin.base_model = cached
        origin.source = cached if src.is_dir() else f"{cached}/{src.name}"
    elif isinstance(loaded_from, str) and HUB_ID.fullmatch(loaded_from):
        origin.base_model = loaded_from
    return origin


def _name_in_cache(path):
    """The name on the Hub of what lies in the Hub's own cache, or None."""
    # As it calls its folders: models--owner--name/snapshots/revision.
    found = re.search(r"/models--([^/]+)--([^/]+)/snapshots/", f"{path.as_posix()}/")
    return "/".join(found.groups()) if found else None


def origin_of_checkpoint(folder):
    """The origin of a checkpoint of ours: what the run that made it wrote down, or what came along.

    Args:
        folder: of a final model or a checkpoint of a run, of the average of weights in either, or a
            converted or exported one.
    """
    folder, measured = Path(folder).resolve(), "bits_per_byte"
    origin = _recorded(folder)
    origin.base_model = origin.base_model or _name_in_cache(folder)
    made_by = ("run.json", "checkpoint.json")
    if folder.name == "ema" and any((folder.parent / name).is_file() for name in made_by):
        folder, measured = folder.parent, "ema_bits_per_byte"
    checkpoint = read_fields(folder / "checkpoint.json")
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    place = folder.parent if match and not (folder / "run.json").is_file() else folder
    run = read_fields(place / "run.json")
    if not run and not checkpoint:
        return origin
    begun = _part(checkpoint, "init_from") or _part(run, "init_from")
    if begun:  # with the weights of others, whose license it is
        for name in ("license", "license_name", "license_link", "base_model"):
            setattr(origin, name, getattr(origin, name) or begun.get(name))
    else:
        origin.license = origin.license or LICENSE_OF_RUNS
    recipe = _part(checkpoint, "recipe") or _part(run, "recipe")
    step = checkpoint.get("step", int(match[1]) if match else _part(run, "results").get("step"))
    if not match and not checkpoint and step != recipe.get("steps"):
        # A final model does not say its step. Its run goes on, or was killed as it did, so what is
        # written down is of later.
        return origin
    # The record is of how the run was started last, perhaps to go on for longer than to here.
    is_of_this = recipe == _part(run, "recipe")
    lines = map(_fields_of, (read_text(place / "metrics.jsonl") or "").splitlines())
    lines = [line for line in lines if is_number(line.get("step")) and is_number(step)]
    lines = [line for line in lines if line["step"] <= step]
    tested = [line for line in lines if line.get("kind") == "held_out"]
    held_out = [line | {"bits_per_byte": line.get(measured)} for line in tested]
    held_out = [line for line in held_out if is_number(line["bits_per_byte"])]
    trained = [line for line in lines if line.get("kind") == "train"]
    origin.curves = curve_of(trained + (held_out or tested))
    data = recipe.get("data") or ", ".join(_part(_part(run, "corpus"), "sources"))
    _name_the_data(origin, data, "files" in _part(run, "corpus"))
    _describe(origin, recipe, run if is_of_this else {}, held_out[-1] if held_out else {})
    return origin


def _describe(origin, recipe, run, held_out):
    """Fills in what a run says: its recipe, the rest of its record, its last line on the text."""
    rows = [("data", origin.data)] if origin.data else []
    known = {name: value for name, value in recipe.items() if value not in (None, "")}
    rows += [(label, known[name]) for name, label in RECIPE_ROWS.items() if name in known]
    size = _part(_part(run, "corpus"), "train").get("bytes")
    if is_number(size):
        rows.append(("bytes of training text", f"{size:,}"))
    labels = {"step": "steps", "tokens": "tokens trained on"}
    rows += [(t, f"{held_out[n]:,}") for n, t in labels.items() if is_number(held_out.get(n))]
    if held_out:
        origin.bits_per_byte = float(held_out["bits_per_byte"])
        rows.append(("held-out bits per byte", f"{origin.bits_per_byte:.4f}"))
        gzip = _part(run, "results").get("gzip_bits_per_byte")
        if is_number(gzip):
            rows.append(("gzip -9 of the same text", f"{gzip:.4f}"))
    flops, tokens = run.get("training_flops_per_token"), held_out.get("tokens")
    if is_number(flops) and is_number(tokens):
        rows.append(("floating-point operations of the training", f"{flops * tokens:.3g}"))
    rows += [(name, run[name]) for name in ("device", "precision") if run.get(name)]
    versions = _part(run, "versions")
    rows += [(name, versions[name]) for name in ("torch", "transformers") if versions.get(name)]
    if "git_commit" in run:
        rows.append(
            (
                "commit of the code",
                f"{run['git_commit']}{' with changes' * bool(run.get('git_changed'))}",
            )
        )
    origin.training = [[label, str(value)] for label, value in rows]


def _name_the_data(origin, data, is_of_files):
    """Fills in a recipe's data: owner/name on the Hub, or what lies here, without where it lies."""
    if not isinstance(data, str):
        return
    is_file = is_of_files or data.endswith(FILE_ENDINGS) or Path(data).exists()
    origin.data_is_on_the_hub = HUB_ID.fullmatch(data) is not None and not is_file
    name = re.split(r"[/\\]", data.rstrip("/\\"))[-1]
    origin.data = data if origin.data_is_on_the_hub else name


def _recorded(folder):
    """The origin that came along with a folder, or what its README says."""
    found = _part(read_fields(folder / RECORD_FILE), "origin")
    if not found and (folder / "README.md").is_file():
        try:
            metadata = metadata_load(folder / "README.md") or {}
        except Exception:  # somebody else's file, which YAML has many ways to refuse
            metadata = {}
        found = {name: metadata.get(name) for name in ("license", "license_name", "license_link")}
    origin = Origin()
    for entry in fields(Origin):
        if entry.name in found and isinstance(found[entry.name], entry.type):
            setattr(origin, entry.name, found[entry.name])
    if read_fields(folder / RECORD_FILE):
        origin.curves = read_curves(folder)
    rows = [row for row in origin.training if isinstance(row, list) and len(row) == 2]
    origin.training = [[str(cell) for cell in row] for row in rows]
    if not LICENSE.fullmatch(origin.license or ""):
        origin.license = origin.license_name = origin.license_link = None
    if not HUB_ID.fullmatch(origin.base_model or ""):
        origin.base_model = None
    return origin


def _fields_of(line):
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {}


def _part(record, name):
    value = record.get(name)
    return value if isinstance(value, dict) else {}
