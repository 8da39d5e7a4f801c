"""An exported folder goes to the Hugging Face Hub: `zoo push EXPORTED REPO_ID`.

In one commit: the model's files, no others, and what an earlier push left there goes.
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
)

from .. import MODELS
from .card import check_card
from .files import (
    CHAT_TEMPLATES,
    CONFIG_FILES,
    RECORD_FILE,
    TEXTS,
    code_files,
    is_tokenizer,
    is_weights,
    read_fields,
    read_text,
    recorded_files,
)
from .folder import find_weights, not_found, one_line, read_json

IMAGES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp")


class Pushed(NamedTuple):
    """What a push did.

    Attributes:
        url: of the repository.
        files: names of the model's files, which the repository holds now.
        left_out: what else the folder holds, which stayed here.
        removed: what the repository held of an earlier push.
    """

    url: str
    files: list[str]
    left_out: list[str]
    removed: list[str]


def push(exported, repo_id, private=False, message=None):
    """Creates a model repository, if it is not there yet, and makes an exported folder its content.

    What goes up is the model: config, weights, tokenizer, code, card and the card's images. Of what
    the repository holds, files of an earlier push go and all others stay.

    Args:
        exported: a folder that `zoo export` wrote.
        repo_id: "user/name" or "organisation/name".
        private: the repository is to be seen by its owner alone.
        message: of the commit.

    Returns:
        A `Pushed`.

    Raises:
        ValueError: not an exported folder, no token, a bad name, the Hub cannot be reached, or it
            says no.
    """
    exported = Path(exported)
    files, left_out = files_to_push(exported)
    token = get_token()
    if token is None:
        raise ValueError("there is no Hub token; run `hf auth login` or set HF_TOKEN.")
    if re.search(r"[^!-~]", token):
        # The HTTP library would refuse it too, and print it.
        raise ValueError("the Hub token holds characters that no token has; set HF_TOKEN again.")
    try:
        api = HfApi(token=token)
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        there = api.model_info(repository.repo_id)
        if private and not there.private:
            raise ValueError(
                f"{repo_id} exists and everyone can see it; make it private in its settings on the "
                "Hub first, or push without --private."
            )
        names = {file.rfilename for file in there.siblings}
        removed = sorted(_of_an_earlier_push(api, there, names, files) - set(files))
        api.create_commit(
            there.id,
            [CommitOperationAdd(name, str(exported / name)) for name in files]
            + [CommitOperationDelete(name, is_folder=False) for name in removed],
            commit_message=message or f"Upload {exported.absolute().name}",
            # Whoever pushes at the same time is not undone.
            parent_commit=there.sha,
        )
    except (
        HTTPError,
        OfflineModeIsEnabled,
        HFValidationError,
        RuntimeError,
        UnicodeError,
    ) as error:
        if isinstance(error, RuntimeError):
            print(file=sys.stderr)  # ends the line of the upload's progress
        reason = _reason(error, repo_id).replace(token, "(the token)")
        raise ValueError(reason) from None
    return Pushed(str(repository), files, left_out, removed)


def files_to_push(exported):
    """The files of a model in an exported folder, and what else there is.

    Args:
        exported: the folder.

    Returns:
        (names of the model's files, relative to the folder; names of other files and folders).

    Raises:
        ValueError: not an exported folder, or not a whole one.
    """
    exported = Path(exported)
    if not exported.is_dir():
        raise not_found(exported, "folder")
    config = read_json(exported / "config.json")
    # transformers' own classes bring their code.
    is_ours = any(config.get("model_type") == a.config.model_type for a in MODELS.values())
    lacks_code = is_ours and "auto_map" not in config
    card = read_text(exported / "README.md")
    if lacks_code or card is None:
        raise ValueError(
            f"{exported} is not an exported folder (no auto_map in config.json, or no README.md); "
            "write one with `zoo export CHECKPOINT OUT`."
        )
    check_card(card)
    weights = {path.name for path in find_weights(exported)}
    if not all(map(is_weights, weights)):
        raise ValueError(
            f"{exported} has weights of other names than an export's ({', '.join(weights)}); "
            "write it with `zoo export CHECKPOINT OUT`."
        )
    if len(weights) > 1 or "model.safetensors" not in weights:
        weights.add("model.safetensors.index.json")
    code = code_files(config, lambda name: read_text(exported / name))
    needed = {"config.json", "README.md", *weights, *code}
    entries = [*exported.iterdir(), *exported.glob(f"{CHAT_TEMPLATES}/*")]
    names = {path.relative_to(exported).as_posix() for path in entries if path.is_file()}
    allowed = needed | {n for n in names if n in CONFIG_FILES + TEXTS or is_tokenizer(n)}
    allowed |= _images(exported, card)
    inside = {n for n in allowed if _is_inside(exported, n)}
    for name in sorted(needed - inside):
        what = "leads out of the folder" if (exported / name).exists() else "is missing"
        raise ValueError(
            f"{exported / name} {what}; expected a whole model's own files: copy the folder with "
            "`cp -rL`, or export it again."
        )
    return sorted(inside), _others(exported, inside)


def _others(folder, files):
    """Names of what a folder holds beside some files; of a whole folder without any, its name."""
    parents = {parent.as_posix() for name in files for parent in Path(name).parents}
    found = []
    for path in sorted(folder.iterdir()):
        name = path.name
        if name in parents:
            below = {n.removeprefix(f"{name}/") for n in files if n.startswith(f"{name}/")}
            found += [f"{name}/{other}" for other in _others(path, below)]
        elif name not in files:
            found.append(name + "/" * path.is_dir())
    return found


def _images(folder, card):
    """Names of the images that a card shows from its own folder."""
    linked = re.findall(r"!\[[^\]]*\]\(\s*<?([^)>\s]+)", card)
    linked += re.findall(r"""<img[^>]*\ssrc=["']([^"']+)""", card)
    names = {name.removeprefix("./") for name in linked if name.lower().endswith(IMAGES)}
    parts = {name: name.split("/") for name in names}
    return {n for n in names if (folder / n).is_file() and not any(p[:1] == "." for p in parts[n])}


def _is_inside(folder, name):
    """Whether a file is one of the folder's own, and no link to somewhere else."""
    path = folder / name
    return path.is_file() and path.resolve().is_relative_to(folder.resolve())


def _of_an_earlier_push(api, there, names, files):
    """Names of what a push of ours left in a repository.

    Args:
        api: of the Hub.
        there: what the Hub says of the repository.
        names: of its files.
        files: what is about to be pushed.
    """
    left = {name for name in names if is_weights(name)}
    if any(map(is_tokenizer, files)):
        # A file of another tokenizer would change this one; without one, it may be the user's.
        left |= {name for name in names if is_tokenizer(name)}
    if RECORD_FILE in names:
        path = api.hf_hub_download(there.id, RECORD_FILE, revision=there.sha)
        left |= names & (recorded_files(read_fields(path)) or set())
    return left


def _reason(error, repo_id):
    """What to tell the user of an error of the Hub or on the way there."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return (
            "the Hub does not know this token (mistyped, or expired?); run `hf auth login` or set "
            "HF_TOKEN to one that may write."
        )
    if status == 403:
        return (
            f"the Hub refused {repo_id}: {one_line(error)}; a token with the right to write there?"
        )
    if status in (409, 412):
        return f"{repo_id} changed on the Hub meanwhile; look at it, then push again."
    if isinstance(error, HfHubHTTPError | HFValidationError):
        return f"the Hub refused {repo_id}: {one_line(error)}"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing can be pushed; unset it."
    cause = one_line(error.__cause__ or error) or type(error).__name__
    if isinstance(error, RuntimeError):
        return f"{one_line(error)} ({cause}) Nothing was committed; push again."
    return (
        f"the Hub at {constants.ENDPOINT} cannot be reached ({cause}); check the network, the "
        "proxy and HF_ENDPOINT, then push again."
    )
