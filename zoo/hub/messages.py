"""What messages to the user have in common."""

import re
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


def one_line(error):
    """An exception's message on one line, for a message of our own."""
    # @strict puts the message of a validator on a second line, after a sentence about itself.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, StrictDataclassError):
        lines = [
            line.removeprefix("ValueError: ").removeprefix("TypeError: ") for line in lines[1:]
        ]
    return " ".join(lines)


def some(names, limit=4):
    """The first few of many names, for a message."""
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(str, names[:limit])) + rest


def not_found(path, expected="folder or file"):
    """An error about a path that leads nowhere, with what to do if a model on the Hub was meant."""
    hint = ""
    if HUB_ID.fullmatch(str(path)):
        name = Path(path).name
        hint = f"; a model on the Hub comes first to here: hf download {path} --local-dir {name}"
    return ValueError(f"{path}: no such {expected}{hint}.")


def about(source, error):
    """A ValueError that says which checkpoint another one is about, if that does not say it."""
    text = str(error)
    return ValueError(text if text.startswith(str(source)) else f"{source}: {text}")
