"""Tokenising: what a tokenizer is handed at once, long documents in pieces, ids on disk."""

import errno
import json
import random

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pretraining import corpus, tokenising
from pretraining.building import load_tokenizer
from pretraining.corpus import load_corpus
from pretraining.recipe import Recipe, UsageError

LLAMA = (  # how Llama 3 splits text
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITTERS = {
    "gpt": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "prefix": pre_tokenizers.ByteLevel(add_prefix_space=True),  # the beginning is special
    "unsplit": pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    ),  # merges across words
}


class Spy:
    """A byte tokenizer that writes down how much it is handed at once."""

    eos_token_id, all_special_tokens = 256, ["<eos>"]

    def __init__(self, num_tokens=257):
        self.handed = []
        self.vocabulary = {chr(i): i for i in range(256)} | {"<eos>": num_tokens - 1}
        self.eos_token_id = num_tokens - 1

    def get_vocab(self):
        return self.vocabulary

    def __len__(self):
        return len(self.vocabulary)

    def __call__(self, texts, **options):
        self.handed.append((len(texts), sum(len(text.encode()) for text in texts)))
        return {"input_ids": [list(text.encode()) for text in texts]}


def load(folder, tokenizer, texts):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "some.jsonl").write_text(lines)
    recipe = Recipe("x", "retnet", data=str(folder / "some.jsonl"), eval_bytes=1000)
    return load_corpus(recipe, tokenizer, folder / "cache")


@pytest.mark.parametrize("texts", [["é" * 30_000] * 63, ["é" * 2_000_000], ["x"] * 3000])
def test_a_tokenizer_is_handed_few_bytes_at_once(tmp_path, texts):
    spy = Spy()
    loaded = load(tmp_path, spy, [f"{i} {text}" for i, text in enumerate(texts)])
    assert max(size for _, size in spy.handed) <= 2**20
    assert max(number for number, _ in spy.handed) <= 1024
    assert len(spy.handed) < 40  # and not one by one
    total = sum(len(f"{i} {text}".encode()) for i, text in enumerate(texts))
    assert loaded.train.num_bytes + loaded.held_out.num_bytes == total
    ids = np.concatenate([loaded.train.ids, loaded.held_out.ids])
    assert (ids != 256).sum() == total


def awkward_text():
    rng = random.Random(0)
    parts = [
        "a",
        "aa",
        " b",
        "é",
        "\n",
        " ",
        "\r\n",
        "12",
        "...",
        "日本",
        "\n\n",
        "\t",
        "x\ny",
        "'s",
    ]
    return "".join(rng.choice(parts) for _ in range(8000))


@pytest.mark.parametrize("splitter", SPLITTERS)
def test_pieces_of_a_long_document_have_the_ids_of_the_whole(monkeypatch, splitter):
    monkeypatch.setattr(tokenising, "PIECE", 1500)
    monkeypatch.setattr(tokenising, "AROUND", 200)
    text = awkward_text()
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = SPLITTERS[splitter]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": ["<eos>"], "initial_alphabet": alphabet, "show_progress": False}
    model.train_from_iterator([text], trainers.BpeTrainer(vocab_size=600, **options))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>")
    parts = list(tokenising.pieces(tokenizer, text))
    (whole,) = tokenising.encode(tokenizer, [text])
    assert sum(tokenising.encode(tokenizer, parts), []) == whole
    if splitter != "unsplit":
        assert max(map(len, parts)) < 2000 and len(parts) > 5
        # In pieces cut anywhere the ids are others, so it matters where.
        blind = [text[i : i + 1500] for i in range(0, len(text), 1500)]
        assert sum(tokenising.encode(tokenizer, blind), []) != whole
    else:
        assert parts == [text]


def test_bytes_are_cut_anywhere(monkeypatch):
    monkeypatch.setattr(tokenising, "PIECE", 1000)
    monkeypatch.setattr(tokenising, "AROUND", 200)
    tokenizer = load_tokenizer("tokenizers/byte")
    parts = list(tokenising.pieces(tokenizer, "é" * 3500))
    assert [len(part) for part in parts] == [1000, 1000, 1000, 500]


@pytest.mark.parametrize(("num_tokens", "dtype"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_ids_on_disk_hold_the_largest(tmp_path, num_tokens, dtype):
    spy = Spy(num_tokens)  # 257 tokens, and the largest id far beyond
    loaded = load(tmp_path, spy, ["some text, and more of it"] * 9)
    assert loaded.record["train"]["dtype"] == dtype
    assert loaded.train.ids[0] == loaded.train.ids[-1] == num_tokens - 1


def test_another_end_of_text_is_another_corpus(tmp_path):
    tokenizer = load_tokenizer("tokenizers/byte")
    before = load(tmp_path, tokenizer, ["some text, and more of it"] * 9)
    tokenizer.eos_token = "<|pad|>"
    after = load(tmp_path, tokenizer, ["some text, and more of it"] * 9)
    assert (before.train.ids[0], after.train.ids[0]) == (258, 256)
    assert before.record["tokenizer_sha256"] != after.record["tokenizer_sha256"]


def test_what_a_call_changes_in_a_tokenizer_is_no_part_of_it():
    tokenizer = load_tokenizer("tokenizers/byte")
    before = corpus.tokenizer_hash(tokenizer)
    tokenizer(["a", "bc"], truncation=True, max_length=1, padding=True)
    assert corpus.tokenizer_hash(tokenizer) == before


def test_a_full_disk_and_changing_text_are_refused(tmp_path, monkeypatch):
    def full(*paths):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tokenising.os, "replace", full)
        with pytest.raises(UsageError, match="cannot write to .*cache: No space left.*; make room"):
            load(tmp_path, Spy(), ["some text, and more of it"] * 9)
    texts = iter(["some text, and more of it", "some text, and other"])
    source = {"source": "growing", "sha256": "0"}
    monkeypatch.setattr(corpus, "find_source", lambda *_: (lambda: [("", next(texts))], source))
    with pytest.raises(UsageError, match="growing changed while it was read; start again"):
        load(tmp_path, Spy(), [])
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
