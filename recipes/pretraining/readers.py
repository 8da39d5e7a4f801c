"""The rows of one file, whatever its format, and the place of a row that is no text."""

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from .recipe import UsageError

OPENERS = {
    "": lambda path: open(path, "rb"),
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: io.BufferedReader(pa.input_stream(str(path), compression="zstd")),
}
COLUMNAR = {".parquet", ".arrow"}  # compressed within
BROKEN_FILE = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException, csv.Error)


class BadRow(Exception):
    """A row that cannot be used; the message says where it is and what was found."""


def kind_of(path):
    """A file's suffix without that of its compression, such as '.jsonl', or None if unknown."""
    *_, before, last = "", "", *(suffix.lower() for suffix in Path(path).suffixes)
    if last in OPENERS:
        return before if before in READERS.keys() - COLUMNAR else None
    return last if last in READERS else None


def read_file(path, column):
    """Yields the text of each row, '' of a row without.

    Args:
        path: a file of one of the kinds in `READERS`, compressed or not.
        column: where the text is, in files that have columns.

    Raises:
        UsageError: a file or a row that cannot be read, or is no text.
    """
    suffix = Path(path).suffix.lower()
    try:
        with OPENERS.get(suffix, OPENERS[""])(path) as file:
            for place, row in READERS[kind_of(path)](file, column):
                yield text_of(row, place, column)
    except BadRow as error:
        raise UsageError(f"{path}, {error}") from None
    except BROKEN_FILE as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"cannot load {path}: {reason}; is it whole?") from None


def text_of(row, place, column):
    """A row's text.

    Args:
        row: the text itself, None, or a dictionary with the text in `column`.
        place: of the row, such as "line 3".

    Raises:
        BadRow: it has no such column, or no text in it.
    """
    if isinstance(row, dict):
        if column not in row:
            raise BadRow(
                f"{place} has no column {column!r}, only {', '.join(map(str, row)) or 'none'}; "
                "choose one with --text_column."
            )
        row = row[column]
    if row is None:
        return ""
    if not isinstance(row, str):
        raise BadRow(
            f"{place}: expected text in {column!r}, got {type(row).__name__} {_short(row)}; "
            "choose another --text_column, or make it text."
        )
    try:
        row.encode()
    except UnicodeEncodeError as error:
        raise BadRow(
            f"{place}: half of a surrogate pair, {row[error.start]!r}, is no text; remove it."
        ) from None
    return row


def _short(value):
    text = " ".join(repr(value).split())
    return text if len(text) <= 40 else text[:37] + "..."


def _decode(content, first_line=1):
    try:
        return content.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        wide = content[:2] in (b"\xff\xfe", b"\xfe\xff")
        raise BadRow(
            f"line {line}: expected UTF-8, got byte 0x{content[error.start]:02x}"
            f"{', and UTF-16 by its first bytes' if wide else ''}; convert the file, for example "
            f"with iconv -f {'utf-16' if wide else 'latin1'} -t utf-8."
        ) from None


def _lines(file):
    for number, line in enumerate(file, 1):
        yield number, _decode(line, number)


def _read_text(file, column):
    yield "its text", _decode(file.read())


def _parse(text, place=""):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        near = _short(text[max(error.pos - 20, 0) : error.pos + 20])
        place = place or f"line {error.lineno}"
        raise BadRow(
            f"{place} is not JSON ({error.msg}, near {near}); mend or remove it."
        ) from None
    except RecursionError:
        raise BadRow(f"{place or 'its list'} is nested too deeply; mend or remove it.") from None


def _object(value, place, column):
    if not isinstance(value, dict):
        raise BadRow(
            f"{place}: expected an object such as {{{column!r}: ...}}, got {_short(value)}."
        )
    return value


def _read_json_lines(file, column):
    for number, line in _lines(file):
        if line.strip():
            place = f"line {number}"
            yield place, _object(_parse(line.strip(), place), place, column)


def _read_json(file, column):
    file = io.BufferedReader(file)
    if not file.peek(100).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _read_json_lines(file, column)
        return
    for number, row in enumerate(_parse(_decode(file.read())), 1):
        place = f"row {number}"
        yield place, row if isinstance(row, str) else _object(row, place, column)


def _read_table(file, delimiter):
    csv.field_size_limit(sys.maxsize)  # a document may be longer than csv's 128 KiB
    rows = csv.reader((line for _, line in _lines(file)), delimiter=delimiter, strict=True)
    begin, header = 1, None
    try:
        for row in rows:
            place, begin = f"line {begin}", rows.line_num + 1
            if not row:  # an empty line
                continue
            if header is None:
                header = row
            elif len(row) != len(header):
                raise BadRow(
                    f"{place}: expected {len(header)} fields as in the header, got {len(row)}: "
                    f"{_short(row)}; mend or remove it."
                )
            else:
                yield place, dict(zip(header, row))
    except csv.Error as error:
        raise BadRow(f"line {begin}: {error}; mend or remove it.") from None


def _read_batches(batches, column):
    number = 0
    for batch in batches:
        for value in batch.column(column):
            number += 1
            try:
                yield f"row {number}", value.as_py()
            except UnicodeDecodeError as error:
                raise BadRow(f"row {number}: expected UTF-8 ({error}).") from None


def _check_column(schema, column):
    if column not in schema.names:
        text_of(dict.fromkeys(schema.names), "its table", column)


def _read_parquet(file, column):
    table = pyarrow.parquet.ParquetFile(file)
    _check_column(table.schema_arrow, column)
    yield from _read_batches(table.iter_batches(batch_size=64, columns=[column]), column)


def _read_arrow(file, column):
    mapped = pa.memory_map(file.name)  # a batch need not fit into memory
    if file.read(6) == b"ARROW1":  # the format with a table of contents at its end
        table = pa.ipc.open_file(mapped)
        batches = (table.get_batch(index) for index in range(table.num_record_batches))
    else:
        table = batches = pa.ipc.open_stream(mapped)
    _check_column(table.schema, column)
    yield from _read_batches(batches, column)


READERS = {
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": lambda file, column: _read_table(file, ","),
    ".tsv": lambda file, column: _read_table(file, "\t"),
    ".txt": _read_text,
}
