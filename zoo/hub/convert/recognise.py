"""Which format a checkpoint is of, by its configs and the names of its tensors."""

from pathlib import Path

from ... import MODELS
from ..folder import open_tensors, read_json
from ..messages import not_found, some
from .formats import FORMATS


def recognise(src):
    """The name of the format that a checkpoint is of: `zoo convert --auto`.

    Args:
        src: as `convert` takes it.

    Raises:
        ValueError: none matches, several do, it is one of ours already, or nothing can be read.
    """
    src = Path(src)
    if not src.exists():
        raise not_found(src)
    folder = src if src.is_dir() else src.parent
    if _is_ours(folder):
        raise ValueError(f"{src} is already a checkpoint of ours; there is nothing to convert.")
    try:
        names, damage = open_tensors(src, {}).keys(), None
    except ValueError as error:
        # What a format needs to be told may be in its config alone.
        names, damage = (), error
    found = _matches(folder, names)
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{src} may be {' or '.join(found)}; name the format that you mean.")
    if damage is not None:
        raise damage
    model_type = _values(folder, "config.json").get("model_type")
    has = f"has model_type {model_type!r}" if model_type else "has no model_type"
    raise ValueError(
        f"{src} is of no format that zoo knows: its config.json {has}, and its tensors are "
        f"{some(sorted(names), 3)}; `zoo convert --list` names the formats."
    )


def names_of(src):
    """The tensors' names of a checkpoint: none, if they cannot be read."""
    try:
        return open_tensors(src, {}).keys()
    except ValueError:
        return ()


def what_it_is(folder, names):
    """What a checkpoint is, in words that follow on "this", or None.

    Args:
        folder: where its configs lie.
        names: of its tensors.
    """
    if found := _matches(folder, names):
        return f"looks like {found[0]}"
    return "is already a checkpoint of ours" if _is_ours(folder) else None


def other_format(chosen, folder, names):
    """A message: a checkpoint is not of the chosen format, but perhaps of another.

    Args:
        chosen: a `Format`.
        folder: where the checkpoint's configs lie.
        names: of its tensors.
    """
    message = f"{chosen.name} expects {chosen.expects}"
    values = _values(folder, "config.json")
    if chosen.config_file == "config.json" and values:
        message += f", got model_type {values.get('model_type')!r}"
    if what := what_it_is(folder, names):
        return f"{message}; this {what}."
    return f"{message}; `zoo convert --list` names the formats."


def _matches(folder, names):
    """Names of the formats that recognise configs and tensors as theirs."""
    return [
        format.name
        for format in FORMATS.values()
        if format.recognizes(_values(folder, format.config_file), names)
    ]


def _is_ours(folder):
    model_type = _values(folder, "config.json").get("model_type")
    return any(model_type == a.config.model_type for a in MODELS.values())


def _values(folder, config_file):
    """A config's fields: none, if it is not there or cannot be read."""
    try:
        return read_json(folder / config_file) if config_file else {}
    except ValueError:
        return {}
