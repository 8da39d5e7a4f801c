"""What is said to a user who can put something right."""

import difflib


class UsageError(Exception):
    """Something the user can put right; scripts print it as one line and exit with status 2."""


def nearest(name, known):
    """'did you mean ...?', or the known names if none is near."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}?" if match else f"known are {', '.join(sorted(known))}."
