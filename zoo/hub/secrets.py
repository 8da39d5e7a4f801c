"""What opens a door is not printed: a token, or an address with a password or a signature."""

import logging
import re
from contextlib import contextmanager
from urllib.parse import quote

# What the Hub's tokens look like; whose it is does not matter.
_TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}")
_PASSWORD = re.compile(r"(?<=://)[^/\s@'\"]+@")
_SIGNED = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\")]+")


def without_secrets(text, token=None):
    """A text that may be shown to everybody.

    Args:
        text: for the user.
        token: of the user, of whatever shape.

    Returns:
        The text without tokens, without the names and passwords in addresses, and without what
        follows the ? in them, where storage keeps its signatures.
    """
    text = _SIGNED.sub(r"\1", _PASSWORD.sub("", text))
    for secret in {token, token and quote(token, safe="")} - {None, ""}:
        text = text.replace(secret, "(the token)")
    return _TOKEN.sub("(a token)", text)


@contextmanager
def quiet_about_secrets(token=None):
    """What huggingface_hub logs inside of the block, such as an address to try again, is shown so.

    Args:
        token: as in `without_secrets`.
    """

    def clean(record):
        record.msg, record.args = without_secrets(record.getMessage(), token), ()
        return True

    handlers = [h for name in ("huggingface_hub", None) for h in logging.getLogger(name).handlers]
    for handler in handlers:
        handler.addFilter(clean)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(clean)
