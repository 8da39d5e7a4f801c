"""An exported folder goes to the Hugging Face Hub: `zoo push EXPORTED REPO_ID`.

First a plan, made by reading alone, then one commit: the model's files, no others, and what an
earlier push left there goes. Weights that went up before an interruption are not sent again: the
Hub keeps them by their hash until a commit names them, and huggingface_hub's create_commit asks for
those first. (Its upload_folder and upload_large_folder make many commits, between which the
repository holds half a model.)
"""

import json
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils.sha import git_hash

from .. import MODELS
from .card_holes import check_card
from .files import (
    CHAT_TEMPLATES,
    CONFIG_FILES,
    FIGURES,
    RECORD_FILE,
    TEXTS,
    check_tokenizer_files,
    code_files,
    file_hash,
    is_tokenizer,
    is_weights,
    read_fields,
    read_text,
    recorded_files,
)
from .folder import find_weights, read_json
from .messages import not_found, one_line
from .outline import check_weights
from .secrets import quiet_about_secrets, without_secrets

IMAGES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp")


class Plan(NamedTuple):
    """What a push is to do.

    Attributes:
        folder: the exported one.
        repo_id: "owner/name", as the Hub calls it.
        url: of the repository.
        is_new: whether it is made for this.
        is_private: whether it is, or is to be, seen by its owner alone.
        sizes: bytes of the model's files here, by name.
        states: of each of them, "new" there, "changed" or "unchanged".
        left_out: what else the folder holds, which stays here.
        removed: what the repository holds of an earlier push, which goes.
        parent: the commit that the plan was made for; None: there is no repository yet.
        token: of the user, never shown.
    """

    folder: Path
    repo_id: str
    url: str
    is_new: bool
    is_private: bool
    sizes: dict[str, int]
    states: dict[str, str]
    left_out: list[str]
    removed: list[str]
    parent: str | None
    token: str

    def __repr__(self):
        return f"Plan({self.repo_id!r}, {len(self.sizes)} files)"

    @property
    def sent(self):
        """Names of the files that are to be sent."""
        return [name for name, state in self.states.items() if state != "unchanged"]


def push(exported, repo_id, private=False, message=None, dry_run=False, show=None):
    """Creates a model repository, if it is not there yet, and makes an exported folder its content.

    What goes up is the model: config, weights, tokenizer, code, card and the card's images. Of what
    the repository holds, files of an earlier push go and all others stay.

    Args:
        exported: a folder that `zoo export` wrote.
        repo_id: "user/name" or "organisation/name".
        private: the repository is to be seen by its owner alone.
        message: of the commit.
        dry_run: only say what would be done: nothing is made or sent.
        show: called with the `Plan` before anything is sent.

    Returns:
        The address of the commit; None if there was nothing to send, or it was a dry run.

    Raises:
        ValueError: not an exported folder, no token, a bad name, the Hub cannot be reached, or it
            says no.
    """
    plan = plan_push(exported, repo_id, private)
    if show is not None:
        show(plan)
    if dry_run:
        return None
    return send(plan, message)


def plan_push(exported, repo_id, private=False):
    """What a push is to do. Nothing is made or sent: files here and there are compared.

    Args:
        exported, repo_id, private: as in `push`.

    Returns:
        A `Plan`.

    Raises:
        ValueError: as in `push`.
    """
    exported = Path(exported)
    files, left_out = files_to_push(exported)
    check_weights(exported)
    token = _token()
    with _one_line_errors(repo_id, token):
        api = HfApi(token=token)
        if "/" not in repo_id:
            repo_id = f"{api.whoami()['name']}/{repo_id}"
        try:
            there = api.model_info(repo_id, files_metadata=True)
        except RepositoryNotFoundError as error:
            if error.response.status_code != 404:  # gated, or not with this token
                raise
            there = None
            _may_write(api.whoami(), repo_id)
        if there is not None and private and not there.private:
            raise ValueError(
                f"{repo_id} exists and everyone can see it; make it private in its settings on the "
                "Hub first, or push without --private."
            )
        files_there = {file.rfilename: file for file in there.siblings} if there else {}
        removed = set()
        if there is not None:
            removed = _of_an_earlier_push(api, there, set(files_there), files) - set(files)
    return Plan(
        folder=exported,
        repo_id=there.id if there else repo_id,
        url=without_secrets(f"{constants.ENDPOINT}/{there.id if there else repo_id}", token),
        is_new=there is None,
        is_private=there.private if there else private,
        sizes={name: (exported / name).stat().st_size for name in files},
        states={name: _state(exported / name, files_there.get(name)) for name in files},
        left_out=left_out,
        removed=sorted(removed),
        parent=there.sha if there else None,
        token=token,
    )


def send(plan, message=None):
    """Does what a plan says, in one commit; if there is nothing to do, in none.

    Args:
        plan: a `Plan`.
        message: of the commit.

    Returns:
        The address of the commit, or None.

    Raises:
        ValueError: as in `push`.
    """
    if not plan.sent and not plan.removed:
        return None
    with _one_line_errors(plan.repo_id, plan.token):
        api, parent = HfApi(token=plan.token), plan.parent
        if plan.is_new:
            api.create_repo(plan.repo_id, private=plan.is_private)
            parent = api.model_info(plan.repo_id).sha
        commit = api.create_commit(
            plan.repo_id,
            [CommitOperationAdd(name, str(plan.folder / name)) for name in plan.sent]
            + [CommitOperationDelete(name, is_folder=False) for name in plan.removed],
            commit_message=message or f"Upload {plan.folder.absolute().name}",
            # Whoever pushes at the same time is not undone.
            parent_commit=parent,
        )
    return without_secrets(commit.commit_url, plan.token)


def _token():
    token = get_token()
    if token is None:
        raise ValueError("there is no Hub token; run `hf auth login` or set HF_TOKEN.")
    if re.search(r"[^!-~]", token):
        # The HTTP library would refuse it too, and print it.
        raise ValueError("the Hub token holds characters that no token has; set HF_TOKEN again.")
    return token


def _may_write(who, repo_id):
    """Refuses early what the Hub would refuse: a new repository by a token that may read alone."""
    token = (who.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise ValueError(
            f"the Hub token of {who.get('name')} may only read, and {repo_id} is not there yet; "
            "run `hf auth login` or set HF_TOKEN to one that may write."
        )


def _state(path, there):
    """Whether a file is there, as it is here: "new", "changed" or "unchanged"."""
    if there is None:
        return "new"
    if there.size != path.stat().st_size:
        return "changed"
    if there.lfs is not None:
        return "unchanged" if there.lfs.sha256 == file_hash(path) else "changed"
    return "unchanged" if there.blob_id == git_hash(path.read_bytes()) else "changed"


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
    lacks_code = is_ours and not config.get("auto_map")
    _check_auto_map(exported / "config.json", config)
    check_tokenizer_files(exported)
    if (exported / "tokenizer_config.json").is_file():
        # Its code would not go along: only what the model needs does.
        path = exported / "tokenizer_config.json"
        if read_json(path).get("auto_map"):
            raise ValueError(f"{path} has an auto_map: a tokenizer that needs code of its own.")
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
    allowed = needed | {n for n in names if n in CONFIG_FILES + TEXTS + FIGURES or is_tokenizer(n)}
    allowed |= _images(exported, card)
    inside = {n for n in allowed if _is_inside(exported, n)}
    for name in sorted(needed - inside):
        there = exported / name
        what = "leads out of the folder" if there.is_file() else "is missing, or no file"
        raise ValueError(
            f"{exported / name} {what}; expected a whole model's own files: copy the folder with "
            "`cp -rL`, or export it again."
        )
    return sorted(inside), _others(exported, inside)


def _check_auto_map(path, config):
    """Refuses a config whose users would be asked to trust code that is not in the folder."""
    auto_map = config.get("auto_map", {})
    for name, place in auto_map.items() if isinstance(auto_map, dict) else [("auto_map", auto_map)]:
        module, _, class_name = str(place).partition(".")
        if not (isinstance(place, str) and module.isidentifier() and class_name.isidentifier()):
            raise ValueError(
                f"{path}: auto_map names {str(place)[:80]!r} as {name}; "
                "expected module.Class of a .py file beside it. Export it again."
            )


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


@contextmanager
def _one_line_errors(repo_id, token):
    """Whatever goes wrong with the Hub becomes a ValueError of one line, without a token."""
    try:
        with quiet_about_secrets(token):
            yield
    except Exception as error:  # of the network, of storage, of an answer that is none of the Hub's
        if isinstance(error, RuntimeError):
            print(file=sys.stderr)  # ends the line of the upload's progress
        raise ValueError(without_secrets(_reason(error, repo_id), token)) from None


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
        return (
            f"{one_line(error)} ({cause}) Nothing was committed; push again: files that went up "
            "whole are not sent again."
        )
    if isinstance(error, json.JSONDecodeError | KeyError | TypeError | AttributeError):
        return (
            f"the Hub at {constants.ENDPOINT} gave an answer that is none of the Hub's ({cause}); "
            "check HF_ENDPOINT and the proxy."
        )
    if isinstance(error, ValueError) and not isinstance(error, UnicodeError):
        return one_line(error)
    return (
        f"the Hub at {constants.ENDPOINT} cannot be reached ({cause}); check the network, the "
        "proxy and HF_ENDPOINT, then push again."
    )
