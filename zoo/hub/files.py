"""Which files of a folder are a model's, and writing a folder whole or not at all.

What is written here is replaced here, and nothing else: a file that is no model's, or is of a name
that no export writes, is neither deleted nor uploaded.
"""

import ast
import functools
import hashlib
import json
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

from .guard import check_file
from .unfinished import clear_unfinished, replace_files, unfinished_folder

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
CHAT_TEMPLATES = "additional_chat_templates"  # the folder of those that have a name
RECORD_FILE = "longzoo.json"  # what was written, and where it comes from (origin.py)
CONFIG_FILES = ("config.json", "generation_config.json", RECORD_FILE)
TEXTS = ("README.md", "LICENSE")
# What the card shows: curve.py and measuring.py write it.
CURVE_NUMBERS, CURVE_FIGURE, MEASURED = "loss_curve.json", "loss_curve.png", "contract.json"
FIGURES = (CURVE_NUMBERS, CURVE_FIGURE, MEASURED)
INDEX = "model.safetensors.index.json"
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|" + re.escape(INDEX))
# What a training run leaves: its folder is no export's, however much it looks like a model's.
RUN_FILES = ("run.json", "run.lock", "checkpoint.json")


def file_hash(path):
    """SHA-256 of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def is_weights(name):
    """Whether a file of this name holds weights, or says which file does."""
    return WEIGHTS.fullmatch(name) is not None


def is_tokenizer(name):
    """Whether a file of this name, relative to its model's folder, is a tokenizer's."""
    return name in TOKENIZER_FILES or re.fullmatch(rf"{CHAT_TEMPLATES}/[^/]+\.jinja", name)


def code_files(config, read):
    """Names of the source files that `trust_remote_code` runs for a model.

    Args:
        config: the fields of config.json, whose auto_map names the first ones.
        read: (name) -> a file's text, or None if there is none of that name.

    Returns:
        Those and what they import by `from .module import name`, however deep.
    """
    auto_map = config.get("auto_map")
    values = auto_map.values() if isinstance(auto_map, dict) else ()
    # "repository--module.Class" is code of somewhere else.
    waiting = [value.split(".")[0] for value in values if isinstance(value, str)]
    waiting = [module for module in waiting if module.isidentifier()]
    found = set()
    while waiting:
        name = f"{waiting.pop()}.py"
        if name in found:
            continue
        found.add(name)
        waiting += _imported_modules(read(name) or "")
    return found


@functools.lru_cache(256)  # the same files lie beside many models
def _imported_modules(source):
    """What a file imports by `from .module import name`; () of one that is no Python."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError):
        return ()
    imports = [n for n in nodes if isinstance(n, ast.ImportFrom) and n.level == 1 and n.module]
    return tuple(node.module for node in imports if node.module.isidentifier())


def read_text(path):
    """A file's text, or None if there is none or it is not text."""
    try:
        # Of a pipe one would wait for ever.
        return Path(path).read_text(encoding="utf-8") if Path(path).is_file() else None
    except (OSError, ValueError):
        return None


def read_fields(path):
    """A JSON object that is worth reading, but not worth failing for: {} if it cannot be read."""
    try:
        value = json.loads(read_text(path) or "{}")
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {}


def recorded_files(record):
    """Names of the files that were written together, by the fields of longzoo.json; else None."""
    names = record.get("files")
    if not isinstance(names, list):
        return None
    # Whoever may have edited the record: what is never written is not listed.
    return {
        n
        for n in map(str, names)
        if n in CONFIG_FILES + TEXTS + FIGURES
        or n.endswith(".py")
        or is_weights(n)
        or is_tokenizer(n)
    }


def written_files(folder, others=()):
    """Names of what an export or a conversion wrote into a folder, relative to it.

    Args:
        folder: where.
        others: names of a foreign format's own files.
    """
    folder = Path(folder)
    files = [*folder.glob("*"), *folder.glob(f"{CHAT_TEMPLATES}/*")]
    names = {path.relative_to(folder).as_posix() for path in files}
    recorded = recorded_files(read_fields(folder / RECORD_FILE))
    if recorded is None:
        # Of a version that kept no record.
        config = read_fields(folder / "config.json")
        code = code_files(config, lambda name: read_text(folder / name))
        recorded = {*CONFIG_FILES, *TEXTS, *code} | {n for n in names if is_tokenizer(n)}
    # Weights go by their names: any beside the new ones would be loaded in their place.
    return names & (recorded | set(others)) | {n for n in names if is_weights(n)}


def carry_files(src, dst, names):
    """Copies those of the named files that a folder has. Returns their names."""
    found = [name for name in names if (Path(src) / name).is_file()]
    for name in found:
        (Path(dst) / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(Path(src) / name, Path(dst) / name)
    return found


def check_tokenizer_files(folder):
    """Raises a ValueError if a file of a tokenizer is none, or holds no JSON where it should."""
    for name in TOKENIZER_FILES:
        path = Path(folder) / name
        check_file(path)
        if path.suffix != ".json" or not path.is_file():
            continue
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} cannot be read as JSON, so the tokenizer does not load "
                f"({str(error)[:200]}); replace or remove it."
            ) from None


def carry_tokenizer(src, dst):
    """Copies the files of a tokenizer. Returns their names.

    Raises:
        ValueError: as `check_tokenizer_files`.
    """
    check_tokenizer_files(src)
    templates = sorted(Path(src).glob(f"{CHAT_TEMPLATES}/*.jinja"))
    names = [*TOKENIZER_FILES, *(f"{CHAT_TEMPLATES}/{path.name}" for path in templates)]
    return carry_files(src, dst, names)


@contextmanager
def new_folder(path, overwrite=False, config_file="config.json", others=()):
    """A folder that appears at `path` complete, or, if the block fails, not at all.

    Args:
        path: where; its parents are made.
        overwrite: replace the files of a model folder that is there. What else is in it stays, and
            any other folder is left alone.
        config_file: what a model folder is told by.
        others: names of what else such a folder holds, where transformers' names are not used.

    Yields:
        An empty folder beside `path` to fill.

    Raises:
        ValueError: something is in the way, or another process is writing there.
    """
    path = Path(path).absolute()
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; expected a new folder's name.")
    clear_unfinished(path)
    old_names = _replaceable(path, overwrite, config_file, others)
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished_folder(path) as work:
        new = work / "new"
        yield new
        new_names = _finish_record(new)
        for name in new_names:
            # safetensors writes for the owner alone; the folder was made as the user's umask says.
            (new / name).chmod(new.stat().st_mode & 0o666)
        if not path.is_dir():
            os.replace(new, path)
            return
        foreign = [n for n in new_names if n not in old_names and os.path.lexists(path / n)]
        if foreign:
            raise ValueError(
                f"{path} holds {foreign[0]}, which is not of the model there; move it away first."
            )
        # The config goes first and comes last: without one, nobody takes what is there for whole.
        old_names = sorted(old_names, key=lambda name: name != config_file)
        new_names = sorted(new_names, key=lambda name: name == config_file)
        replace_files(work, path, old_names, new_names)


def _finish_record(folder):
    """Completes longzoo.json by the names of the files in a folder, which are returned."""
    record = folder / RECORD_FILE
    fields = {"files": [], **read_fields(record)}
    record.write_text("{}")
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    record.write_text(json.dumps(fields | {"files": names}, indent=2) + "\n", encoding="utf-8")
    return names


def _replaceable(path, overwrite, config_file, others):
    """Names of the files in a folder that go when a new model comes; a ValueError if none may."""
    if not path.is_dir() or not any(path.iterdir()):
        return set()
    if not overwrite:
        raise ValueError(
            f"{path} exists and is not empty; choose another name, or pass --overwrite."
        )
    run_files = [name for name in RUN_FILES if (path / name).exists()]
    if run_files:
        raise ValueError(
            f"{path} is a training run's ({run_files[0]}), so --overwrite does not touch it; "
            "choose another name."
        )
    fields = read_fields(path / "config.json")
    is_ours = str(fields.get("model_type")).startswith("zoo_") or (path / RECORD_FILE).is_file()
    if (path / config_file).is_file() and not is_ours:
        raise ValueError(
            f"{path} holds a model that zoo did not write, so --overwrite does not touch it; "
            "choose another name."
        )
    if not (path / config_file).is_file():
        raise ValueError(
            f"{path} holds no model (no {config_file}), so --overwrite does not touch it; "
            "choose another name."
        )
    return written_files(path, {config_file, *others})
