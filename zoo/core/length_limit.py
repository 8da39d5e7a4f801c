"""A config's max_position_embeddings: a number, or not there.

Other libraries take the attribute for a number wherever a config has it (sentence-transformers cuts
texts to it). So where there is no limit, None, it is not to be found, as in transformers' own
recurrent models, and config.json is silent on it; that of earlier folders says null.
"""

import inspect
from contextlib import contextmanager

NAME = "max_position_embeddings"


class LengthLimit:
    """The attribute of a config class that has the field."""

    def __get__(self, config, owner=None):
        if config is None or NAME not in vars(config):
            raise AttributeError(f"{owner.__name__} has no limit of length, and so no {NAME}.")
        return vars(config)[NAME]

    def __set__(self, config, value):
        vars(config)[NAME] = value
        if value is None:
            del vars(config)[NAME]


def length_limit(config):
    """A config's max_position_embeddings, or None if it has none."""
    return getattr(config, NAME, None)


@contextmanager
def unlimited_is_none(config):
    """Where there is no limit, the attribute is None for a while, for code that asks unasked."""
    is_ours = isinstance(inspect.getattr_static(type(config), NAME, None), LengthLimit)
    if NAME in vars(config) or not is_ours:
        yield
        return
    vars(config)[NAME] = None
    try:
        yield
    finally:
        vars(config).pop(NAME, None)
