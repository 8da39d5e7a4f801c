"""Where documents come from: this Python's own library, files, or the Hub.

A source is a function that yields (key, text) of each document, and a record whose `sha256` changes
when the documents do. The key decides on which side of the split a document falls.
"""

import json
import os
import sysconfig
from collections import Counter
from pathlib import Path

from huggingface_hub import HfApi

from .caching import file_hashes, sha256
from .finding import did_you_mean, hub_answers, is_path
from .readers import READERS, BadRow, kind_of, read_file, text_of
from .recipe import UsageError

NOT_SOURCE = {"test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
NOT_SOURCE |= {"site-packages", "dist-packages"}


def find_source(recipe, cache_dir):
    """(documents, record) of what a recipe's `data` names.

    Args:
        recipe: its data fields say what is read.
        cache_dir: where hashes of large files are remembered.

    Raises:
        UsageError: nothing is there, or nothing that can be read.
    """
    if recipe.data == "stdlib":
        return standard_library()
    if _is_here(recipe):
        return local_files(recipe, cache_dir)
    return hub_dataset(recipe)


def find_stream(recipe):
    """(`datasets.IterableDataset`, record) of what a recipe's `data` names, read in its order.

    The record's hash is that of the files' names and sizes, or of the Hub's commit: what is in them
    is not known before it is read.

    Raises:
        UsageError: nothing is there, or nothing that can be read.
    """
    import datasets

    if recipe.data == "stdlib":
        raise UsageError("data = 'stdlib' is always here and small; leave out streaming.")
    if not _is_here(recipe):
        return _hub_stream(recipe)
    files, not_read = _find_files(recipe)
    places = {"files": [str(file) for file in files], "column": recipe.text_column}
    dataset = datasets.IterableDataset.from_generator(_rows, gen_kwargs=places)
    content = [[file.name, file.stat().st_size] for file in files]
    record = {"source": recipe.data, "files": len(files), "files_not_read": not_read}
    return dataset, {**record, "sha256": sha256(json.dumps([recipe.text_column, *content]))}


def _rows(files, column):
    for file in files:
        for text in read_file(Path(file), column):
            yield {column: text}


def _is_here(recipe):
    path = Path(recipe.data).expanduser()
    if not os.path.exists(path) and (is_path(recipe.data) or kind_of(path)):
        raise UsageError(
            f"no data at {recipe.data}; give a file, a folder, a Hub id or 'stdlib'."
            f"{did_you_mean(recipe.data)}"
        )
    return os.path.exists(path)


def standard_library():
    """The running Python's own library: always there, and its documents are long."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in NOT_SOURCE]
        # _sysconfigdata is a record of how one machine built Python.
        names = [x for x in files if x.endswith(".py") and not x.startswith("_sysconfigdata")]
        paths += [Path(folder, name).relative_to(root) for name in names if name not in NOT_SOURCE]
    paths.sort()
    names = sorted((sha256(path.as_posix()), path) for path in paths)  # mixes the packages

    def documents():
        for _, path in names:
            yield path.as_posix(), (root / path).read_bytes().decode(errors="replace")

    listing = [f"{path.as_posix()} {sha256((root / path).read_bytes())}" for path in paths]
    return documents, {
        "source": "stdlib",
        "files": len(paths),
        "sha256": sha256("\n".join(listing)),
    }


def local_files(recipe, cache_dir):
    """A file, a folder of files of one kind, or a folder that `datasets` saved.

    The files come in the order of their hashes: copied, moved or renamed, they are the same corpus.

    Raises:
        UsageError: files that cannot be read, or options that they do not have.
    """
    files, not_read = _find_files(recipe)
    hashed = sorted(zip(file_hashes(files, cache_dir), files))

    def documents():
        for _, file in hashed:
            for text in read_file(file, recipe.text_column):
                # A document is its own key: copies of it fall on the same side of the split.
                yield text, text

    # Files with the same bytes are other documents where they are read otherwise.
    content = [[digest, kind_of(file), file.suffix.lower()] for digest, file in hashed]
    record = {"source": recipe.data, "files": len(files), "files_not_read": not_read}
    return documents, {**record, "sha256": sha256(json.dumps([recipe.text_column, *content]))}


def _find_files(recipe):
    """The files to read, and how many others there are by suffix."""
    if recipe.data_config:
        raise UsageError(
            f"data_config = {recipe.data_config!r} chooses among a Hub data set's configurations, "
            f"and {recipe.data} is on this disk; leave it out."
        )
    files, not_read = _choose_files(Path(recipe.data).expanduser(), recipe)
    if not any(file.stat().st_size for file in files):
        raise UsageError(f"the corpus {recipe.data} is empty; give files with text in them.")
    return files, not_read


def _choose_files(path, recipe):
    split = recipe.data_split
    if (path / "dataset_dict.json").is_file():  # DatasetDict.save_to_disk
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        if split not in splits:
            raise UsageError(
                f"{recipe.data} has no split {split!r}, only {', '.join(splits)}; choose one with "
                "--data_split."
            )
        path = path / split
    elif split != "train":
        raise UsageError(
            f"data_split = {split!r} chooses among the splits of a data set, and {recipe.data} "
            "has none; leave it out."
        )
    if (path / "state.json").is_file():  # Dataset.save_to_disk
        state = json.loads((path / "state.json").read_text())
        if "_data_files" in state:
            return [path / data_file["filename"] for data_file in state["_data_files"]], {}
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
    inside = {file: file.relative_to(path).parts for file in files}
    hidden = {file for file, parts in inside.items() if any(p.startswith(".") for p in parts)}
    kinds = Counter(kind_of(file) for file in files if file not in hidden)
    others = Counter(
        "hidden" if file in hidden else "".join(file.suffixes[-2:]) or file.name
        for file in files
        if file in hidden or kind_of(file) is None
    )
    known = [kind for kind in kinds if kind]
    if len(known) != 1:
        found = {**{kind: kinds[kind] for kind in known}, **others}
        listing = ", ".join(f"{number} {kind}" for kind, number in list(found.items())[:8])
        raise UsageError(
            f"{recipe.data} must hold files of one kind ({', '.join(READERS)}; text also as .gz, "
            f".bz2, .xz or .zst), got {listing or 'none'}."
        )
    chosen = [file for file in files if file not in hidden and kind_of(file)]
    return chosen, dict(others)


def hub_dataset(recipe):
    """A data set of the Hub, through `datasets`.

    Raises:
        UsageError: it cannot be loaded.
    """
    dataset = _load(recipe)
    column = dataset.select_columns(recipe.text_column)

    def documents():
        for number, row in enumerate(column, 1):
            try:
                text = text_of(row, f"row {number}", recipe.text_column)
            except BadRow as error:
                raise UsageError(f"{recipe.data}, {error}") from None
            yield text, text

    # The fingerprint covers the data set's revision and the split.
    source = {"source": recipe.data, "sha256": sha256(dataset._fingerprint + recipe.text_column)}
    return documents, source


def _hub_stream(recipe):
    try:
        # A commit, so that a run goes on with what it began with.
        commit = HfApi().repo_info(recipe.data, repo_type="dataset", timeout=10).sha
    except Exception:  # which `_load` asks again, and says in a line
        commit = None
    dataset = _load(recipe, streaming=True, revision=commit)
    identity = [commit, recipe.data_config, recipe.data_split, recipe.text_column]
    source = {"source": recipe.data, "sha256": sha256(json.dumps(identity))}
    return dataset.select_columns(recipe.text_column), source


def _load(recipe, **options):
    """A data set of the Hub that has the recipe's column."""
    hint = did_you_mean(recipe.data, also=["stdlib"])
    try:
        online = hub_answers(recipe.data, "dataset")
    except UsageError as error:
        raise UsageError(f"no data at {recipe.data}: {error}{hint}") from None
    import datasets

    # The progress bars of each shard would drown the run's own lines.
    datasets.disable_progress_bars()
    if not online:
        datasets.config.HF_HUB_OFFLINE = True  # what it has in its own cache, at once
    try:
        dataset = datasets.load_dataset(
            recipe.data, name=recipe.data_config or None, split=recipe.data_split, **options
        )
    except Exception as error:  # datasets raises what its readers and the network raise
        reason = " ".join(str(error.__cause__ or error).split())
        if not online:
            reason = "the Hub cannot be reached, and the data set is not in the cache here."
        raise UsageError(f"cannot load {recipe.data}: {reason}{hint}") from error
    # A stream may not know its columns before it is read.
    if recipe.text_column not in (dataset.column_names or [recipe.text_column]):
        raise UsageError(
            f"{recipe.data} has no column {recipe.text_column!r}, only "
            f"{', '.join(dataset.column_names)}; choose one with --text_column."
        )
    return dataset
