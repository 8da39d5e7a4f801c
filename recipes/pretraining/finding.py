"""What a name in a recipe stands for: something on this disk, or a repository of the Hub."""

import difflib
import os
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
)

from .recipe import UsageError


def is_path(name):
    """Whether a name cannot be a repository of the Hub, which is `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def did_you_mean(name, root=".", also=()):
    """' Did you mean ...?' with what a mistyped name resembles, or ''.

    Args:
        name: a path that is not there.
        root: folder that it is relative to.
        also: other names that would do.
    """
    path = Path(root) / Path(name).expanduser()
    missing = [p for p in (path, *path.parents) if not os.path.exists(p)]
    if not missing:
        return ""
    first = missing[-1]  # the part of the path that may be mistyped
    try:
        known = [entry.name for entry in first.parent.iterdir()]
    except OSError:
        known = []
    match = difflib.get_close_matches(first.name, [*also, *known], n=1)
    if not match:
        return ""
    meant = first.parent / match[0]
    if match[0] not in also and (meant / path.relative_to(first)).exists():
        meant /= path.relative_to(first)
    meant = meant.relative_to(root) if meant.is_relative_to(root) else meant
    return f" Did you mean {str(meant)!r}?"


def hub_answers(name, kind):
    """Whether the Hub can be reached. Asked once and briefly: its libraries go on for a minute.

    Args:
        name: of the repository.
        kind: "model" or "dataset".

    Raises:
        UsageError: the Hub answers that it has no such repository for this user.
    """
    try:
        HfApi().repo_info(name, repo_type=kind, timeout=10)
    except HFValidationError:
        raise UsageError(f"{name!r} is neither here nor a name that the Hub allows.") from None
    except GatedRepoError:
        raise UsageError(
            f"the {kind} {name} is gated; ask for access on its page, and log in with `hf auth "
            "login`."
        ) from None
    except RepositoryNotFoundError:
        raise UsageError(
            f"the Hub has no {kind} {name} (or hides it: log in with `hf auth login`)."
        ) from None
    except HfHubHTTPError:
        return True  # another trouble, which the library that loads it describes
    except Exception:  # no network; the class depends on the HTTP library
        return False
    return True
