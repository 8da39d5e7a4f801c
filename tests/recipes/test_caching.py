"""Locks between processes, what killed ones leave, and hashes that are remembered."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from conftest import wait_for_output

from pretraining import caching
from pretraining.building import load_tokenizer
from pretraining.corpus import load_corpus
from pretraining.recipe import Recipe, UsageError

# Holds a lock as a process that tokenises does, until it is killed.
HOLDER = """
import sys, time
from pathlib import Path
from pretraining.caching import alone
with alone(Path(sys.argv[1]), "waits"):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def hold(tmp_path, forks):
    """Starts a process that holds a lock."""
    processes, script = [], tmp_path / "holder.py"
    script.write_text(HOLDER)

    def start(path, seconds=60):
        processes.append(forks().start(script, path, seconds, cwd=tmp_path))
        wait_for_output(processes[-1], "held\n")
        return processes[-1]

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.communicate()


def ended(process):
    """How it ended."""
    process.communicate()
    return process.returncode


def folders(cache_dir):
    return sorted(path.name for path in Path(cache_dir).iterdir() if path.is_dir())


def load(folder):
    (folder / "one.txt").write_text("some text, " * 99)
    recipe = Recipe("x", "retnet", data=str(folder / "one.txt"))
    return load_corpus(recipe, load_tokenizer("tokenizers/byte"), folder / "cache")


def test_others_wait_for_the_process_that_tokenises(tmp_path, hold, capsys, monkeypatch):
    path = tmp_path / "cache/key.lock"
    holder = hold(path, seconds=1.5)
    began = time.monotonic()
    with caching.alone(path, "tokenises some data"):
        assert time.monotonic() - began > 1 and ended(holder) == 0
    line = "waiting for another process, which tokenises some data\n"
    assert capsys.readouterr().out == line
    # The kernel releases the lock of one that is killed. Of a launch, the first process speaks.
    monkeypatch.setenv("RANK", "1")
    holder = hold(path)
    threading.Timer(1.3, holder.kill).start()
    with caching.alone(path, "tokenises some data"):
        assert ended(holder) == -signal.SIGKILL
    assert capsys.readouterr().out == ""


def test_a_complete_cache_needs_no_lock(tmp_path, hold):
    first = load(tmp_path)
    (lock,) = (tmp_path / "cache").glob("*.lock")
    hold(lock)
    assert load(tmp_path).record == first.record


def test_what_killed_processes_left_is_removed(tmp_path, hold):
    cache = tmp_path / "cache"
    dead, living, older = "0" * 16, "1" * 16, "2" * 16
    for name in (f"{dead}.unfinished", f"{living}.unfinished", f"{older}.x7_abcde"):
        (cache / name).mkdir(parents=True)
        (cache / name / "train.bin").write_bytes(b"half")
    for name in (f"{dead}.mine", "notes.unfinished"):  # not ours
        (cache / name).mkdir()
    (cache / f"{dead}.unfinish").mkdir()
    (cache / f"{'3' * 16}.unfinished").mkdir()
    (cache / f"{'3' * 16}.unfinished/thesis.doc").write_text("somebody's")
    hold(cache / f"{living}.lock")
    record = load(tmp_path).record
    kept = [f"{dead}.mine", f"{living}.unfinished", f"{'3' * 16}.unfinished", "notes.unfinished"]
    found = folders(cache)
    assert set(kept) < set(found) and not {f"{dead}.unfinished", f"{older}.x7_abcde"} & set(found)
    assert record["train"]["bytes"] > 0


def test_a_refusal_leaves_nothing_half_done(tmp_path):
    (tmp_path / "some.jsonl").write_text('{"text": "' + "a" * 99 + '"}\n' * 30)
    load(tmp_path)
    before = folders(tmp_path / "cache")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    recipe = Recipe("x", "retnet", data=str(tmp_path / "bad.jsonl"))
    with pytest.raises(UsageError, match="bad.jsonl, line 2"):
        load_corpus(recipe, load_tokenizer("tokenizers/byte"), tmp_path / "cache")
    assert folders(tmp_path / "cache") == before
    assert not (tmp_path / "cache/datasets").exists()  # nor is the text on the disk twice


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UsageError, match="cannot write to .*cache: File exists; choose"):
        load(tmp_path)


def test_a_damaged_cache_is_refused(tmp_path):
    load(tmp_path)
    (ids,) = (tmp_path / "cache").glob("*/train.bin")
    ids.write_bytes(ids.read_bytes()[:-2])
    with pytest.raises(UsageError, match="tokens to train, got .*; delete that folder"):
        load(tmp_path)


def test_hashes_of_much_data_are_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(caching, "LARGE", 10)
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path in paths:
        path.write_text(f"the text of {path.name}")
        os.utime(path, (1e9, 1e9))
    expected = [caching.sha256(path.read_bytes()) for path in paths]
    cache = tmp_path / "cache"
    # Files that have only just changed may change again unseen, and are not remembered.
    assert caching.file_hashes(paths, cache) == expected
    assert json.loads((cache / "hashes.json").read_text()) == {}
    later = time.time() + 10
    monkeypatch.setattr(caching.time, "time", lambda: later)
    assert caching.file_hashes(paths, cache) == expected
    known = json.loads((cache / "hashes.json").read_text())
    assert [known[str(path)][1] for path in paths] == expected
    known[str(paths[0])][1] = "remembered"
    (cache / "hashes.json").write_text(json.dumps(known))
    assert caching.file_hashes(paths, cache) == ["remembered", expected[1]]
    # The same size and time of change, but other bytes.
    paths[0].write_text("THE TEXT OF A.TXT")
    os.utime(paths[0], (1e9, 1e9))
    assert caching.file_hashes(paths, cache)[0] == caching.sha256("THE TEXT OF A.TXT")
    (cache / "hashes.json").write_text("half a line {")
    assert caching.file_hashes(paths, cache)[1] == expected[1]
    with pytest.raises(UsageError, match="cannot read .*none.txt: No such file"):
        caching.file_hashes([tmp_path / "none.txt"], cache)


def test_long_work_says_how_far_it_is(capsys):
    pace = caching.Pace("tokenising a", 3_000_000, every_seconds=0)
    pace.add(1_000_000)
    pace.add(2_000_000)
    assert capsys.readouterr().out == "tokenising a: 1 of 3 MB\ntokenising a: 3 of 3 MB\n"
    caching.Pace("tokenising a", every_seconds=60).add(5)
    assert capsys.readouterr().out == ""
