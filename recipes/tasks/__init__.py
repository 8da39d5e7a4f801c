"""Synthetic tasks, whose examples are generated where they are asked for: `load(table)`."""

from pretraining.usage import UsageError, nearest

from .copying import Copy, Induction
from .definition import Task
from .passkey import Passkey
from .passkey_by_segment import PasskeyBySegment
from .recall import MQAR, Recall
from .state_tracking import S5, Parity

_ALL = (Recall, MQAR, Copy, Induction, Passkey, PasskeyBySegment, Parity, S5)
FAMILIES = {family.name: family for family in _ALL}


def load(table):
    """The task of a table such as {"name": "recall", "pairs": 8}.

    Args:
        table: `name`, a key of FAMILIES, and those of the family's settings that are no defaults.

    Raises:
        UsageError: no such family or setting, or a value that no example could have.
    """
    settings = dict(table)
    name = settings.pop("name", None)
    if name not in FAMILIES:
        said = "there is none" if name is None else f"got {name!r}"
        raise UsageError(f"task.name is that of a task, {said}: {nearest(str(name), FAMILIES)}")
    family = FAMILIES[name]
    kinds = family.kinds()
    for key, value in settings.items():
        if key not in kinds:
            raise UsageError(f"unknown key {'task.' + key!r} of {name}: {nearest(key, kinds)}")
        settings[key] = _typed(f"task.{key}", value, kinds[key])
    try:
        return family(**settings)
    except ValueError as error:
        raise UsageError(f"task {name}: {error}") from None


def _typed(key, value, kind):
    if kind is float and type(value) is int:
        return float(value)
    if kind == list[int] and type(value) is int:
        return [value]  # one number stands for a list
    good = {
        int: lambda: type(value) is int,
        float: lambda: type(value) is float,
        list[int]: lambda: _are_numbers(value),
        list[list[int]]: lambda: isinstance(value, list) and all(map(_are_numbers, value)),
    }[kind]()
    called = {
        int: "a whole number",
        float: "a number",
        list[int]: "a list of whole numbers",
        list[list[int]]: "a list of lists of whole numbers",
    }[kind]
    if not good:
        raise UsageError(f"{key} is {called}, got {value!r}.")
    return value


def _are_numbers(values):
    return isinstance(values, list) and all(type(value) is int for value in values)


__all__ = ["FAMILIES", "Task", "load"]
