"""Files of every kind: read, or refused with what was found and where."""

import bz2
import gzip
import io
import json
import lzma
import os
import shutil
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pytest

from pretraining import sources
from pretraining.building import load_tokenizer
from pretraining.corpus import load_corpus
from pretraining.recipe import Recipe, UsageError
from pretraining.sources import find_source

TEXTS = [f'row {i}, "naïve"\tand\n' + "more " * i for i in range(30)]


def zstd(content):
    stream = pa.BufferOutputStream()
    with pa.CompressedOutputStream(stream, "zstd") as file:
        file.write(content)
    return stream.getvalue().to_pybytes()


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}
TABLE = {"text": TEXTS, "other": list(range(30))}


def arrow(table, make):
    stream = io.BytesIO()
    with make(stream, table.schema) as file:
        file.write_table(table, max_chunksize=7)
    return stream.getvalue()


def as_bytes(kind):
    """The texts as a file of that kind."""
    frame, table = datasets.Dataset.from_dict(TABLE), pa.table(TABLE)
    stream = io.BytesIO()
    if kind in (".jsonl", ".ndjson"):
        frame.to_json(stream)
    elif kind == ".json":
        frame.to_json(stream, lines=False)
    elif kind == ".parquet":
        frame.to_parquet(stream)
    elif kind in (".csv", ".tsv"):
        frame.to_csv(stream, sep={".csv": ",", ".tsv": "\t"}[kind])
    elif kind == ".arrow":
        stream.write(arrow(table, pa.ipc.new_stream))
    elif kind == ".txt":
        stream.write("".join(TEXTS).encode())
    return stream.getvalue()


def read(path, **values):
    """The texts of all documents, and the identity of their files."""
    recipe = Recipe("x", "retnet", data=str(path), **values)
    documents, record = find_source(recipe, os.path.join(os.path.dirname(path), ".cache"))
    return [text for _, text in documents()], record


KINDS = [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt"]


@pytest.mark.parametrize("kind", KINDS + [f"{k}{c}" for k in KINDS[:5] for c in COMPRESS])
def test_files_are_read(tmp_path, kind):
    kind, _, compression = kind[1:].partition(".")
    content = as_bytes(f".{kind}")
    path = tmp_path / f"data.{kind}{'.' + compression if compression else ''}"
    path.write_bytes(COMPRESS[f".{compression}"](content) if compression else content)
    texts, record = read(path)
    assert texts == (["".join(TEXTS)] if kind == "txt" else TEXTS)
    assert record["files"] == 1 and len(record["sha256"]) == 64


def test_other_forms_of_these_files(tmp_path):
    (tmp_path / "file.arrow").write_bytes(arrow(pa.table(TABLE), pa.ipc.new_file))
    assert read(tmp_path / "file.arrow")[0] == TEXTS
    content = as_bytes(".jsonl")
    (tmp_path / "two.jsonl.zst").write_bytes(zstd(content) + zstd(content))  # two frames
    assert read(tmp_path / "two.jsonl.zst")[0] == TEXTS * 2
    (tmp_path / "LOUD.JSONL.GZ").write_bytes(gzip.compress(b"\xef\xbb\xbf" + content))
    assert read(tmp_path / "LOUD.JSONL.GZ")[0] == TEXTS  # without the byte order mark
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\n")
    assert read(tmp_path / "bom.txt")[0] == ["a\r\nb\n"]
    (tmp_path / "lines.json").write_bytes(b"\n" + content)
    assert read(tmp_path / "lines.json")[0] == TEXTS
    (tmp_path / "strings.json").write_text(json.dumps(TEXTS))
    assert read(tmp_path / "strings.json")[0] == TEXTS
    # pandas would take these for numbers and for nothing.
    (tmp_path / "words.csv").write_text("text\n1.50\nNA\n\nnull\n" + "x" * 200_000 + "\n")
    assert read(tmp_path / "words.csv")[0] == ["1.50", "NA", "null", "x" * 200_000]


def test_saved_folders(tmp_path):
    saved = datasets.Dataset.from_dict(TABLE)
    saved.save_to_disk(tmp_path / "one", num_shards=3)
    assert sorted(read(tmp_path / "one")[0]) == sorted(TEXTS)
    both = datasets.DatasetDict({"train": saved, "test": saved.select(range(3, 7))})
    both.save_to_disk(tmp_path / "two")
    assert read(tmp_path / "two")[0] == TEXTS
    assert read(tmp_path / "two", data_split="test")[0] == TEXTS[3:7]
    with pytest.raises(UsageError, match="has no split 'tset', only train, test"):
        read(tmp_path / "two", data_split="tset")


def test_a_folder_says_what_it_does_not_read(tmp_path):
    for name in ("a.jsonl", "deep/b.jsonl.gz", ".ipynb_checkpoints/c.jsonl", "._a.jsonl"):
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(COMPRESS.get(path.suffix, bytes)(as_bytes(".jsonl")))
    (tmp_path / "folder/empty.jsonl").touch()
    (tmp_path / "folder/README.md").write_text("about")
    texts, record = read(tmp_path / "folder")
    assert texts == TEXTS * 2
    assert record["files_not_read"] == {"hidden": 2, ".md": 1}
    (tmp_path / "folder/notes.txt").write_text("text")
    with pytest.raises(UsageError, match=r"one kind .*, got 3 .jsonl, 1 .txt, 2 hidden, 1 .md\."):
        read(tmp_path / "folder")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "no data at"),
        ("empty.txt", b"", "is empty"),
        ("notes.md", b"text", "must hold files of one kind"),
        ("a.parquet.gz", b"text", "must hold files of one kind"),
        ("a.jsonl", b'{"words": "a b"}\n', "line 1 has no column 'text', only words"),
        ("a.jsonl", b'{"text": "a"}\n\n{"txt": "b"}\n', "a.jsonl, line 3 has no column 'text'"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl, line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n[1, 2]\n', "line 2: expected an object"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: expected text in 'text', got int 3"),
        ("a.jsonl", b'{"text": ["a", "b"]}\n', "got list ['a', 'b']"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: half of a surrogate pair"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "line 2: expected UTF-8, got byte 0xe9"),
        ("a.jsonl", b"[" * 100_000, "line 1 is nested too deeply"),
        ("a.json", b'[{"text": "a"}, {"text": {}}]', "row 2: expected text in 'text', got dict"),
        ("a.json", b'[{"text": "a"},\n{]', "a.json, line 2 is not JSON (Expecting property name"),
        ("a.txt", b"a\nb\nc\xff", "line 3: expected UTF-8, got byte 0xff"),
        ("a.txt", "text".encode("utf-16"), "UTF-16"),
        ("a.csv", b'text,b\n"a\nb",1\nc\n', "a.csv, line 4: expected 2 fields"),
        ("a.csv", b'text,b\nd,e\n"a\nb,1\n', "a.csv, line 3: unexpected end of data"),
        ("a.csv", b"words\na\n", "has no column 'text', only words"),
        ("a.parquet", b"not parquet", "cannot load"),
        ("a.arrow", b"not arrow", "cannot load"),
        ("a.txt.gz", b"not gzip", "cannot load"),
        ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], "cannot load"),
        ("a.txt.xz", lzma.compress(b"text" * 99)[:-9], "cannot load"),
        ("a.txt.zst", zstd(b"text" * 99)[:-9], "cannot load"),
        ("a.txt.zst", b"not zstd", "cannot load"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as error:
        read(tmp_path / name)
    assert message in str(error.value) and name in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_columns_of_other_types(tmp_path):
    for values, found in (([1, 2], "int 1"), ([["a"]], "list ['a']"), ([b"a"], "bytes b'a'")):
        datasets.Dataset.from_dict({"text": values}).to_parquet(tmp_path / "a.parquet")
        with pytest.raises(UsageError) as error:
            read(tmp_path / "a.parquet")
        assert f"row 1: expected text in 'text', got {found}" in str(error.value)
        with pytest.raises(UsageError, match="has no column 'body', only text"):
            read(tmp_path / "a.parquet", text_column="body")
    datasets.Dataset.from_dict({"text": ["a", None, "b"]}).to_parquet(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")[0] == ["a", "", "b"]


def test_options_that_files_do_not_have(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    for options in ({"data_split": "test"}, {"data_config": "en"}):
        with pytest.raises(UsageError, match="leave it out"):
            read(tmp_path / "a.txt", **options)


def test_mistyped_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus/deep").mkdir(parents=True)
    (tmp_path / "corpus/deep/data.jsonl").write_bytes(as_bytes(".jsonl"))
    monkeypatch.setattr(sources, "hub_answers", lambda name, kind: False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # and as it was after the test
    for name, meant in (
        ("corpsu/deep/data.jsonl", "corpus/deep/data.jsonl"),
        ("./corpus/deep/dat.jsonl", "corpus/deep/data.jsonl"),
        (str(tmp_path / "corpus/depe"), str(tmp_path / "corpus/deep")),
        ("corpu", "corpus"),
        ("stdlb", "stdlib"),
    ):
        with pytest.raises(UsageError) as error:
            read(name)
        assert str(error.value).endswith(f" Did you mean {meant!r}?")
    with pytest.raises(UsageError, match="the Hub cannot be reached.*not in the cache here.$"):
        read("nobody/nothing")


def test_a_data_set_of_the_hub(monkeypatch):
    monkeypatch.setattr(sources, "hub_answers", lambda name, kind: True)
    table = datasets.Dataset.from_dict({**TABLE, "text": [*TEXTS[:28], None, "end"]})
    asked = []

    def load(path, **options):
        asked.append(SimpleNamespace(path=path, **options))
        return table

    monkeypatch.setattr(datasets, "load_dataset", load)
    texts, _ = read("owner/name", data_config="en", data_split="train[:10%]")
    assert texts == [*TEXTS[:28], "", "end"]
    assert vars(asked[0]) == {"path": "owner/name", "name": "en", "split": "train[:10%]"}
    with pytest.raises(UsageError, match="owner/name, row 1: expected text in 'other', got int 0"):
        read("owner/name", text_column="other")


def test_identity_is_content(tmp_path):
    """Copied, touched, moved, renamed and packed files give the same tokens and identity."""
    tokenizer = load_tokenizer("tokenizers/byte")

    def load(folder, cache):
        recipe = Recipe("x", "retnet", data=str(folder), eval_bytes=100)
        return load_corpus(recipe, tokenizer, tmp_path / cache)

    first = tmp_path / "first"
    first.mkdir()
    for name in ("a", "b", "c"):
        (first / f"{name}.jsonl").write_text(json.dumps({"text": f"{name} " * 300}) + "\n")
    before = load(first, "cache 1")
    os.utime(first / "a.jsonl", (1e9, 1e9))
    assert load(first, "cache 2").record["sha256"] == before.record["sha256"]
    shutil.copytree(first, tmp_path / "second/deep")
    (tmp_path / "second/deep/a.jsonl").rename(tmp_path / "second/z.jsonl")
    moved = load(tmp_path / "second", "cache 3")
    assert moved.record["sha256"] == before.record["sha256"]
    assert (moved.train.ids == before.train.ids).all()
    # The cache of one serves the other, under the name that was asked for.
    shared = load(tmp_path / "second", "cache 1")
    assert shared.record == {**before.record, "source": str(tmp_path / "second")}
    assert len([path for path in (tmp_path / "cache 1").iterdir() if path.is_dir()]) == 1
    one = tmp_path / "one.jsonl"
    one.write_bytes(as_bytes(".jsonl"))
    (tmp_path / "one.jsonl.gz").write_bytes(gzip.compress(one.read_bytes()))
    packed = load(tmp_path / "one.jsonl.gz", "cache 1").record["sha256"]
    assert packed == load(one, "cache 1").record["sha256"] != before.record["sha256"]
    one.write_text(one.read_text().replace("row 7", "row 8"))
    os.utime(one, (1e9, 1e9))
    assert load(one, "cache 1").record["sha256"] != packed
