"""Which format a checkpoint is of, by its configs and the names of its tensors."""

from ... import MODELS
from ..folder import open_tensors, read_json
from .formats import FORMATS


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
    for format in FORMATS.values():
        if format.recognizes(_values(folder, format.config_file), names):
            return f"looks like {format.name}"
    model_type = _values(folder, "config.json").get("model_type")
    if any(model_type == a.config.model_type for a in MODELS.values()):
        return "is already a checkpoint of ours"
    return None


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


def _values(folder, config_file):
    """A config's fields: none, if it is not there or cannot be read."""
    try:
        return read_json(folder / config_file) if config_file else {}
    except ValueError:
        return {}
