"""Tokenising in several processes and beforehand: the same bytes, nothing left half done."""

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from prepare import prepare as fill_caches
from pretraining import encoding, tokenising
from pretraining.building import load_tokenizer
from pretraining.corpus import load_corpus
from pretraining.recipe import Recipe, UsageError
from pretraining.splitting import plan_split


def contents(cache_dir):
    """Every file of the caches by name, as bytes."""
    folders = [path for path in Path(cache_dir).iterdir() if path.is_dir()]
    return {
        path.relative_to(cache_dir).as_posix(): path.read_bytes()
        for folder in folders
        for path in folder.iterdir()
    }


def write_text(path, count, words=40):
    texts = [f"document {n}: {'naïve <|eos|> ' * (n * 7 % words)}" for n in range(count)]
    texts[count // 2] *= 300  # longer than a batch
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_any_number_of_workers_fills_the_same_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenising, "BATCH_BYTES", 2**15)
    monkeypatch.setattr(tokenising, "PIECE", 2**13)
    monkeypatch.setattr(encoding, "PORTION", 2**12)
    write_text(tmp_path / "some.jsonl", 500)
    found = []
    for workers in (1, 2, 3):
        places = {"data": str(tmp_path / "some.jsonl"), "tokenising_workers": workers}
        recipe = Recipe("x", "retnet", eval_bytes=5000, **places)
        load_corpus(recipe, load_tokenizer("tokenizers/byte"), tmp_path / f"{workers}")
        found.append(contents(tmp_path / f"{workers}"))
    assert len(found[0]) == 5 and sum(map(len, found[0].values())) > 300_000
    assert found[0] == found[1] == found[2]


def test_no_more_is_read_than_workers_are_given():
    read = []

    def batches():
        for number in range(30):
            read.append(number)
            yield [(False, True, f"text {number}")]

    tokenizer = load_tokenizer("tokenizers/byte")
    for number, (batch, ids) in enumerate(encoding.encoded(tokenizer, batches(), 2, "uint16")):
        assert batch == [(False, True, f"text {number}")]
        assert bytes(ids[0].tolist()) == f"text {number}".encode()
        assert len(read) <= number + 5  # two for each worker, and the one that is there
    assert number == 29


def test_a_worker_hands_its_tokenizer_little_at_once(monkeypatch):
    monkeypatch.setattr(encoding, "PORTION", 100)
    handed = []

    def tokenizer(texts, **options):
        handed.append(sum(map(len, texts)))
        return {"input_ids": [list(text.encode()) for text in texts]}

    texts = ["a" * n for n in range(60)]
    found = encoding._Encoder(tokenizer, "uint16")[texts]
    assert [bytes(ids.tolist()).decode() for ids in found] == texts
    assert max(handed) <= 100 and len(handed) < 40


def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path):
    """Its workers may hold the lock for seconds more, so that a start cannot remove it at once."""
    documents = [(f"{n}", f"document {n}") for n in range(30)]
    split = plan_split(documents, "some", 0.1, 0)
    (tmp_path / "cache.unfinished").mkdir()
    (tmp_path / "cache.unfinished/train.bin").write_text("half")
    tokenizer = load_tokenizer("tokenizers/byte")
    tokenising.fill_cache(tmp_path / "cache", documents, split, tokenizer, {"source": "some"})
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_workers_are_for_large_text(monkeypatch):
    monkeypatch.setattr(encoding.psutil, "cpu_count", lambda logical: 6)
    monkeypatch.setattr(encoding.os, "sched_getaffinity", lambda process: set(range(99)))
    assert [encoding.num_workers(0, size) for size in (10**6, 2**25, 2**40)] == [1, 6, 6]
    assert [encoding.num_workers(3, size) for size in (10, 2**40)] == [3, 3]


def test_ids_are_those_of_the_tokenizers_own_call():
    text = "a naïve <|eos|> test, <s> and again naïve\n"
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": ["<s>"], "initial_alphabet": alphabet, "show_progress": False}
    model.train_from_iterator([text] * 9, trainers.BpeTrainer(vocab_size=290, **options))
    trained = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<s>", pad_token="<s>")
    for tokenizer in (trained, load_tokenizer("tokenizers/byte")):
        expected = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        tokenizer([text, "b"], truncation=True, max_length=3, padding=True)
        assert encoding.encode(tokenizer, [text, ""]) == [expected["input_ids"], []]
        assert tokenizer.eos_token_id not in expected["input_ids"]
        spelt = tokenizer(tokenizer.eos_token, split_special_tokens=False)["input_ids"]
        assert spelt == [tokenizer.eos_token_id]  # and it is a tokenizer that takes it for one

    class Lower(PreTrainedTokenizerFast):
        def __call__(self, texts, **options):
            return super().__call__([text.lower() for text in texts], **options)

    own = Lower(tokenizer_object=model, eos_token="<s>")
    assert encoding.encode(own, ["A"]) == encoding.encode(trained, ["a"])


class Dying:
    """A tokenizer that is killed in a process of its own."""

    eos_token_id, all_special_tokens, parent = 256, [], os.getpid()

    def get_vocab(self):
        return {str(i): i for i in range(257)}

    def __len__(self):
        return 257

    def __call__(self, texts, **options):
        if os.getpid() != self.parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"input_ids": [list(text.encode()) for text in texts]}


def test_a_dead_worker_is_one_line(tmp_path):
    write_text(tmp_path / "some.jsonl", 50)
    recipe = Recipe("x", "retnet", data=str(tmp_path / "some.jsonl"), tokenising_workers=2)
    with pytest.raises(UsageError) as error:
        load_corpus(recipe, Dying(), tmp_path / "cache")
    message = str(error.value)
    assert "a process that tokenised" in message and "with fewer --tokenising_workers" in message
    assert "died (DataLoader worker" in message and "\n" not in message
    assert not contents(tmp_path / "cache")


@pytest.fixture
def prepare(workshop):
    """Starts recipes/prepare.py on the tiny recipe and 6 MB of text."""
    write_text(workshop.folder / "some.jsonl", 6000, words=130)

    def start(cache, *options):
        words = [workshop.recipe, "--data", "some.jsonl", "--cache_dir", cache, *options]
        script = workshop.root / "recipes/prepare.py"
        return workshop._forks().start(script, *words, cwd=workshop.folder)

    return start


def ended(process):
    output, errors = process.communicate()
    return process.returncode, output, errors


def test_stopped_and_started_again(prepare, workshop, tmp_path):
    """What is stopped leaves nothing that counts, and the next start makes the whole cache."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        process = prepare("cache", "--workers", "2")
        deadline = time.monotonic() + 60
        while not any(path.stat().st_size for path in tmp_path.glob("cache/*/train.bin")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        workers = psutil.Process(process.pid).children()
        process.send_signal(number)
        code, output, errors = ended(process)
        assert len(workers) == 2 and not psutil.wait_procs(workers, timeout=20)[1]
        if number == signal.SIGKILL:
            assert code == -number
            assert [path.suffix for path in tmp_path.glob("cache/*/")] == [".unfinished"]
        else:
            assert code == 128 + number
            assert errors == f"{number.name}: nothing is left half done; start again\n"
            assert not contents(tmp_path / "cache")
    code, output, errors = ended(prepare("cache", "--workers", "2"))
    assert (code, errors) == (0, "") and "tokens of " in output, errors
    assert ended(prepare("alone", "--workers", "1"))[0] == 0
    found = contents(tmp_path / "cache")
    assert len(found) == 5 and found == contents(tmp_path / "alone")
    # What is there is taken, here and by a run.
    code, output, errors = ended(prepare("cache", "--workers", "2"))
    assert code == 0 and "Tokenising" not in output


def test_mistakes_are_one_line(prepare):
    for options, said in (
        (["--workers", "-1"], "tokenising_workers must not be negative, got -1"),
        (["--workers", "many"], "argument --workers: invalid int value: 'many'"),
        (["--stpes", "3"], "did you mean 'steps'?"),
    ):
        code, output, errors = ended(prepare("cache", *options))
        assert code == 2 and errors.count("\n") == 1 and said in errors


def test_a_stream_is_not_prepared():
    with pytest.raises(UsageError, match="stdlib is streamed, which fills no cache"):
        fill_caches(Recipe("x", "retnet", streaming=True))
