"""What is said to a user who can put something right."""

import argparse
import difflib
import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

USAGE = 2  # exit status


class UsageError(Exception):
    """Something the user can put right; scripts print it as one line and exit with status 2."""


class Parser(argparse.ArgumentParser):
    """Mistakes are one line, as all others are."""

    def error(self, message):
        """Says what is wrong, without the list of all options."""
        raise UsageError(f"{message} (--help says what there is)")


def nearest(name, known):
    """'did you mean ...?', or the known names if none is near."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}?" if match else f"known are {', '.join(sorted(known))}."


def run_script(start):
    """Calls `start` with the words of the command line; a UsageError is one line and status 2."""
    try:
        start(sys.argv[1:])
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USAGE)


def read_toml(path):
    """What a TOML file says.

    Raises:
        UsageError: no such file, or not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML: {error}") from None
