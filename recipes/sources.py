"""Where documents come from: this Python's own library, files, or the Hub.

A source is a function that yields (key, text) of each document, and a record whose `sha256` changes
when the documents do.
"""

import hashlib
import sysconfig
from pathlib import Path

from recipe import UsageError

NOT_SOURCE = {"test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
NOT_SOURCE |= {"site-packages", "dist-packages"}
READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}


def standard_library():
    """The running Python's own library: always there, and its documents are long."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(
        path.relative_to(root)
        for path in root.rglob("*.py")
        # _sysconfigdata is a record of how one machine built Python.
        if not NOT_SOURCE & set(path.relative_to(root).parts)
        and not path.name.startswith("_sysconfigdata")
    )
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


def load_dataset(recipe, cache_dir):
    """A Hub id, a local file, or a folder of files, through `datasets`."""
    path = Path(recipe.data)
    looks_local = path.suffix in READERS or recipe.data.startswith((".", "/", "~"))
    if not path.exists() and (looks_local or recipe.data.count("/") > 1):
        raise UsageError(f"no data at {recipe.data}; give a file, a folder, a Hub id or 'stdlib'.")
    files = sorted(p for p in path.rglob("*") if p.suffix in READERS) if path.is_dir() else [path]
    kinds = {READERS.get(file.suffix) for file in files}
    if path.exists() and (len(kinds) != 1 or None in kinds):
        raise UsageError(
            f"{recipe.data} must hold files of one kind ({', '.join(READERS)}), got "
            f"{', '.join(sorted({file.suffix or file.name for file in files})) or 'none'}."
        )
    if path.exists() and not any(file.stat().st_size for file in files):
        raise UsageError(f"the corpus {recipe.data} is empty; give files with text in them.")

    import datasets

    # The progress bars of each shard would drown the run's own lines.
    datasets.disable_progress_bars()
    options = {"split": recipe.data_split}
    if path.exists():
        reader = kinds.pop()
        options["data_files"] = [str(file) for file in files]
        options["cache_dir"] = str(Path(cache_dir) / "datasets")
        if reader == "text":
            options |= {"sample_by": "document", "encoding_errors": "replace"}
    else:
        reader = recipe.data
        options["name"] = recipe.data_config or None
    try:
        dataset = datasets.load_dataset(reader, **options)
    except Exception as error:  # datasets raises what its readers and the network raise
        reason = " ".join(str(error.__cause__ or error).split())
        raise UsageError(f"cannot load {recipe.data}: {reason}") from error
    if recipe.text_column not in dataset.column_names:
        raise UsageError(
            f"{recipe.data} has no column {recipe.text_column!r}, only "
            f"{', '.join(dataset.column_names)}; choose one with --text_column."
        )
    column = dataset.select_columns(recipe.text_column)

    def documents():
        # A document is its own key: copies of it fall on the same side of the split.
        for row in column:
            text = row[recipe.text_column] or ""
            yield text, text

    source = {"source": recipe.data, "documents": len(dataset)}
    # The fingerprint covers the files' content identity and the loading options.
    return documents, {**source, "sha256": sha256(dataset._fingerprint + recipe.text_column)}


def sha256(content):
    """The SHA-256 of a string or of bytes, in hexadecimal."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()
