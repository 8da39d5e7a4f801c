"""A model of the Hugging Face Hub where a folder is taken: its name instead of a path.

OWNER/NAME, and where need be @REVISION and /FILE: `them/rwkv-7@v1/RWKV-x070.pth`. What comes is
what a model is read from, its configs, weights and tokenizer, through huggingface_hub's own cache;
code does not come, and none is run. A folder or file of that name is taken first.
"""

import glob
import re
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, constants, get_token, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.utils import logging

from .convert.formats import FORMATS
from .files import CONFIG_FILES, TEXTS, is_tokenizer
from .folder import NOT_WEIGHTS
from .messages import not_found, one_line, some
from .secrets import quiet_about_secrets, without_secrets

logger = logging.get_logger(__name__)

# A pull request's revision is the only one with slashes: refs/pr/1.
NAME = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.-]*/[\w.-]+)"
    r"(@(?P<revision>refs/pr/\d+|[^/@]+))?"
    r"(/(?P<file>[^@]+))?",
    re.ASCII,
)
CONFIGS = {*CONFIG_FILES, *TEXTS, *(f.config_file for f in FORMATS.values() if f.config_file)}
# In order of preference, as `find_weights` has them: ending, and the name of what is one model.
WEIGHTS = {".safetensors": "model", ".bin": "pytorch_model", ".pth": None, ".pt": None}


class Name(NamedTuple):
    """What a name on the Hub means.

    Attributes:
        repository: "owner/name".
        revision: a branch, tag or commit; None: the repository's main one.
        file: of weights, by its path in the repository; None: the repository says which.
    """

    repository: str
    revision: str | None
    file: str | None

    def __str__(self):
        return self.repository + (f"@{self.revision}" if self.revision else "")


def fetch(name, weights=True, expected="folder or file"):
    """The place on this machine of a model that may be on the Hub, downloaded where need be.

    Args:
        name: a path, or OWNER/NAME[@REVISION][/FILE] on the Hub; of the two, what is here.
        weights: whether they are needed, or the configs alone.
        expected: what a path here is to be, for the message if there is none.

    Returns:
        A path: what is here, else the folder in huggingface_hub's cache, or FILE in it.

    Raises:
        ValueError: there is nothing of that name here or there, nothing that may be read, not
            enough to read a model from, or the Hub cannot be reached and the cache has no copy.
    """
    if Path(name).exists():
        return Path(name)
    match = NAME.fullmatch(str(name))
    if match is None:
        raise not_found(name, expected)
    wanted, token = Name(**match.groupdict()), get_token()
    try:
        with quiet_about_secrets(token):
            folder = _fetch(wanted, weights)
    except ValueError as error:
        raise ValueError(without_secrets(one_line(error), token)) from None
    except Exception as error:  # of the network, or an answer that is none of the Hub's
        raise ValueError(without_secrets(_reason(error, wanted), token)) from None
    return folder / wanted.file if wanted.file else folder


def needed(names, wanted, weights=True):
    """Which files of a repository a model is read from.

    Args:
        names: of all its files.
        wanted: a `Name`.
        weights: whether they are needed.

    Returns:
        Their names, sorted.

    Raises:
        ValueError: there are no weights, or several and it does not say which.
    """
    place, _, file = (wanted.file or "").rpartition("/")
    prefix = f"{place}/" if place else ""
    here = [n.removeprefix(prefix) for n in names if n.startswith(prefix)]
    found = {n for n in here if n in CONFIGS or is_tokenizer(n)}
    if weights:
        found |= _weights([n for n in here if "/" not in n], wanted, file)
    return sorted(prefix + name for name in found)


def _weights(names, wanted, file):
    if file:
        if file not in names:
            kinds = (*WEIGHTS, ".index.json")
            there = some(sorted(n for n in names if n.endswith(kinds)) or sorted(names))
            raise ValueError(f"{wanted} has no file {wanted.file}; it has {there or 'none there'}.")
        return {file} | _shards(file, names)
    for ending, stem in WEIGHTS.items():
        found = {n for n in names if n.endswith(ending) and not n.startswith(NOT_WEIGHTS)}
        indices = [n for n in names if n.endswith(f"{ending}.index.json")]
        if stem and {f"{stem}{ending}"} & found and f"{stem}{ending}.index.json" not in indices:
            return {f"{stem}{ending}"}
        if stem and indices == [f"{stem}{ending}.index.json"] and f"{stem}{ending}" not in found:
            return {*indices, *_shards(indices[0], names)}
        choices = sorted(found | set(indices))
        if len(choices) == 1:
            return set(choices)
        if choices:
            example = f"{wanted}/{choices[0]}"
            raise ValueError(
                f"{wanted} holds several files of weights ({some(choices)}); name the one you "
                f"mean, as in {example}."
            )
    raise ValueError(f"{wanted} holds no weights ({', '.join(WEIGHTS)}) beside its configs.")


def _shards(index, names):
    """The shards of an index, by their names: model-00001-of-00002.safetensors and so on."""
    if not index.endswith(".index.json"):
        return set()
    stem, _, ending = index.removesuffix(".index.json").rpartition(".")
    return {n for n in names if re.fullmatch(rf"{re.escape(stem)}-.+\.{re.escape(ending)}", n)}


def _fetch(wanted, weights):
    """The folder in the cache that holds what is needed."""
    try:
        info = HfApi().model_info(wanted.repository, revision=wanted.revision)
    except RevisionNotFoundError:
        raise
    except (HTTPError, OSError) as error:
        return _cached(wanted, weights, error)
    names = needed([file.rfilename for file in info.siblings or ()], wanted, weights)
    if not names:
        raise ValueError(f"{wanted} holds no config of a model.")
    return _snapshot(wanted, names)


def _cached(wanted, weights, error):
    """The folder in the cache, where the Hub did not say what it should hold."""
    try:
        folder = _snapshot(wanted, [], local_files_only=True)
    except LocalEntryNotFoundError:
        raise error from None
    there = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    try:
        missing = not needed(there, wanted, weights)
    except ValueError:
        missing = True
    if missing:
        raise error
    if not isinstance(error, OfflineModeIsEnabled):
        logger.warning(f"{_reason(error, wanted)} Taken from the cache, as of {folder.name}.")
    return folder


def _snapshot(wanted, names, **options):
    """The folder of a revision in the cache, with these files."""
    patterns = [glob.escape(name) for name in names]
    return Path(
        snapshot_download(
            wanted.repository, revision=wanted.revision, allow_patterns=patterns, **options
        )
    )


def _reason(error, wanted):
    """What to tell the user of an error of the Hub or on the way there."""
    page = f"{constants.ENDPOINT}/{wanted.repository}"
    if isinstance(error, OfflineModeIsEnabled):
        return (
            f"{wanted} is not here, and HF_HUB_OFFLINE is set; the cache at "
            f"{constants.HF_HUB_CACHE} does not hold what is needed: unset it, or fill the cache "
            "where there is a network."
        )
    if isinstance(error, GatedRepoError):
        return f"{wanted} is gated: accept its terms at {page}, then `hf auth login`."
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, RepositoryNotFoundError) or status == 401 and get_token() is None:
        return (
            f"{wanted} is neither a path here nor a model on the Hub that you may see; check the "
            "name, or `hf auth login` if it is private."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{wanted.repository} has no revision {wanted.revision} on the Hub; see {page}."
    if status == 401:
        return f"the Hub does not know this token, and gives no {wanted}; run `hf auth login`."
    if isinstance(error, HfHubHTTPError):
        return f"the Hub does not give {wanted}: {one_line(error)}"
    cause = one_line(error.__cause__ or error) or type(error).__name__
    return (
        f"{wanted} is not here, and the Hub at {constants.ENDPOINT} cannot be reached ({cause}); "
        "check the name, the network, the proxy and HF_ENDPOINT."
    )
