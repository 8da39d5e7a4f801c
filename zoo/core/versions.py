"""The format of a model's folder, and how the folders of earlier versions are read.

config.json says `format_version`. A version is what fields and weights are called and what they
mean; code that reads it differently is the next one, with a `Change` here that says how the folders
of before are read. zoo goes by it, and so does the code that lies in an exported folder.
tests/hub/frozen holds an export of each version, which all later code must load: freeze.py there
makes that of the present one.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

FORMAT_VERSION = 1
# Of folders that do not say: the format had no number before.
_UNSAID = 1
_NOTHING = MappingProxyType({})


class Change(NamedTuple):
    """What a version changed, in terms of the folders of the versions before it.

    Attributes:
        version: the first that is read without it.
        model_types: the architectures, as config.json names them; none: all.
        renamed_fields: of the config, by old name.
        removed_fields: of the config, with the one value that models still have; a folder with
            another value is refused.
        added_fields: of the config, with the value that folders without it had in effect.
        renamed_weights: by old name, where a name is one or more whole parts of a weight's name,
            "mixer.q_proj" in "model.layers.0.mixer.q_proj.weight". One change renames no name
            that it gives.
    """

    version: int
    model_types: tuple[str, ...] = ()
    renamed_fields: Mapping[str, str] = _NOTHING
    removed_fields: Mapping[str, Any] = _NOTHING
    added_fields: Mapping[str, Any] = _NOTHING
    renamed_weights: Mapping[str, str] = _NOTHING


# In the order of their versions.
CHANGES: tuple[Change, ...] = ()


def version_of(fields):
    """The format version of a folder.

    Args:
        fields: what its config.json holds.

    Raises:
        ValueError: it is no version, or one that this code does not know yet.
    """
    version = fields.get("format_version", _UNSAID)
    if type(version) is not int or version < 1:
        raise ValueError(
            f"format_version is a whole number from 1 to {FORMAT_VERSION}, got {version!r}; "
            "restore config.json."
        )
    if version > FORMAT_VERSION:
        raise ValueError(
            f"the folder has format version {version}, this code reads up to {FORMAT_VERSION}: "
            "upgrade longzoo, or load it by its own code, where zoo is not imported, with "
            "trust_remote_code=True."
        )
    return version


def changes_since(version, model_type):
    """The changes that a folder of some version and architecture has not seen, oldest first."""
    return [
        change
        for change in CHANGES
        if change.version > version and (not change.model_types or model_type in change.model_types)
    ]


def current_fields(fields, model_type):
    """The fields of a config.json in the present version.

    Args:
        fields: what config.json holds, of this version or an earlier one. They stay as they are.
        model_type: of the architecture, as config.json names it.

    Raises:
        ValueError: a version that this code does not know, or a model that it no longer has.
    """
    version, fields = version_of(fields), dict(fields)
    for change in changes_since(version, model_type):
        for old, new in change.renamed_fields.items():
            if old in fields:
                fields[new] = fields.pop(old)
        for name, value in change.removed_fields.items():
            if fields.pop(name, value) != value:
                raise ValueError(
                    f"a folder of format version {version} with {name} other than {value!r} is a "
                    f"model that later versions do not have; load it by its own code, where zoo is "
                    "not imported, with trust_remote_code=True."
                )
        fields = {**change.added_fields, **fields}
    fields["format_version"] = FORMAT_VERSION
    return fields


def renamed_weights(fields, model_type):
    """How the weights of a folder are renamed, for `current_name` and transformers' key_mapping.

    Args:
        fields: what its config.json holds.
        model_type: of the architecture, as config.json names it.

    Returns:
        Regular expression -> text in its place, to be applied one after the other.
    """
    renamed = {}
    for change in changes_since(version_of(fields), model_type):
        for old, new in change.renamed_weights.items():
            # Between dots, or at an end.
            pattern = rf"(?<![^.]){re.escape(old)}(?![^.])"
            if pattern in renamed:
                raise ValueError(f"CHANGES rename {old} twice; choose other names.")
            renamed[pattern] = new
    return renamed


def current_name(name, renamed):
    """A weight's name in the present version, by `renamed_weights`."""
    for pattern, new in renamed.items():
        name = re.sub(pattern, new, name, count=1)
    return name
