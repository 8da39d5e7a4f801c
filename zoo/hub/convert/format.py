"""What a format file is made of: reading a foreign config and foreign weights to the last name."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedConfig

from ..folder import some

REQUIRED = object()


class Fields:
    """A foreign config.json, read field by field, so that what nobody read is noticed.

    Args:
        values: the file's content.

    Attributes:
        notes: what was left out and why, for the report.
    """

    def __init__(self, values):
        self.values = dict(values)
        self.unread = set(values)
        self.notes = []

    def take(self, name, default=REQUIRED, kind=object):
        """The value of a field; `default` where the format has one.

        Args:
            name: of the field.
            default: if it is missing.
            kind: a type to insist on, where the value is computed with.

        Raises:
            ValueError: the field is missing and has no default, or is not of its kind.
        """
        self.unread.discard(name)
        value = self.values.get(name, default)
        if value is REQUIRED:
            raise ValueError(f"config.json has no {name}, which this format needs.")
        if not isinstance(value, kind):
            raise ValueError(f"config.json has {name} = {value!r}, which is not of the right type.")
        return value

    def refuse(self, name, reason):
        """Raises a ValueError if a field is set: we do not compute what it asks for."""
        value = self.take(name, None)
        if value:
            raise ValueError(f"config.json has {name} = {value!r}: {reason}.")

    def drop(self, reason, *names):
        """Leaves out fields that do not change what the model computes, and notes the set ones."""
        values = {name: self.take(name, None) for name in names}
        listed = ", ".join(f"{name} = {value!r}" for name, value in values.items() if value)
        if listed:
            self.notes.append(f"left out {listed}: {reason}")

    def finish(self):
        """Raises a ValueError for fields nobody read that are set and could change the function."""
        known = _general_fields()
        unknown = [name for name in self.unread - known if self.values[name]]
        if unknown:
            listed = some(f"{name} = {self.values[name]!r}" for name in sorted(unknown))
            raise ValueError(
                f"config.json has fields this converter does not know: {listed}; remove those that "
                "do not change what the model computes."
            )


def _general_fields():
    """What transformers may write into any config.json; none of it changes the function."""
    general = {"auto_map", "model_type", "torch_dtype", "_name_or_path", "is_decoder"}
    return general | set(PreTrainedConfig().to_dict()) | set(GenerationConfig().to_dict())


class Weights:
    """Foreign tensors, taken one by one, so that those nobody took are noticed.

    Args:
        tensors: by their own names.
    """

    def __init__(self, tensors):
        self.tensors = tensors
        self.untaken = set(tensors)
        self.missing = []

    def take(self, name):
        """A tensor, or None, to be complained about in `finish`, if there is none of that name."""
        if name not in self.tensors:
            self.missing.append(name)
            return None
        self.untaken.discard(name)
        return self.tensors[name]

    def drop_constant(self, name, expected, absolute=0.0):
        """Leaves out a stored constant, if there is one, after checking that ours is the same.

        Args:
            name: theirs.
            expected: our value, in float64.
            absolute: rounding to allow for beside that of the tensor's dtype.

        Raises:
            ValueError: theirs is another.
        """
        if name not in self.tensors:
            return
        value = self.take(name)
        # Theirs was computed in float32, through a few roundings.
        relative = max(1e-5, 2 * torch.finfo(value.dtype).eps)
        same = value.shape == expected.shape and torch.allclose(
            value.double(), expected.double(), rtol=relative, atol=absolute
        )
        if not same:
            raise ValueError(
                f"{name} is {_start_of(value)}, but by config.json it would be "
                f"{_start_of(expected)}; correct the config, or the weights are of another model."
            )

    def finish(self):
        """Raises a ValueError for tensors that are missing or that nobody took."""
        problems = []
        if self.missing:
            problems.append(f"the weights have no {some(self.missing)}")
        if self.untaken:
            problems.append(f"nothing uses {some(sorted(self.untaken))}")
        if problems:
            raise ValueError(
                f"weights and config.json do not fit: {'; '.join(problems)}; "
                "is this the right format and the right config?"
            )


def _start_of(x):
    values = ", ".join(f"{value:.6g}" for value in x.flatten()[:3].tolist())
    return f"{list(x.shape)} [{values}, ...]"


class Format(NamedTuple):
    """A foreign checkpoint format.

    Attributes:
        name: as on the command line.
        title: one line about it.
        architecture: a key of `zoo.MODELS`.
        recognizes: (config.json as a dict) -> whether it is one of this format.
        expects: what `recognizes` looks for, in words.
        read_config: (Fields, tensor names) -> our config.
        read_weights: (Weights, our config) -> pairs of our name and the tensor.
    """

    name: str
    title: str
    architecture: str
    recognizes: Callable
    expects: str
    read_config: Callable
    read_weights: Callable
