"""Held-out text: how many bytes of which documents, and that no text is lost."""

import json
import math
from collections import Counter

import pytest

from pretraining.building import load_tokenizer
from pretraining.corpus import load_corpus
from pretraining.recipe import Recipe, UsageError
from pretraining.splitting import FEW_DOCUMENTS, plan_split


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tokenizers/byte")


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def load(path, tokenizer, **values):
    """A corpus, with the texts of its documents in `train` and `held_out`."""
    recipe = Recipe("x", "retnet", data=str(path), **values)
    corpus = load_corpus(recipe, tokenizer, path.parent / ".cache")

    def texts(tokens):
        ends = [*tokens.starts[1:], len(tokens.ids) - 1]
        return [tokenizer.decode(tokens.ids[a + 1 : b]) for a, b in zip(tokens.starts, ends)]

    return corpus, texts(corpus.train), texts(corpus.held_out)


def divided(texts, held_out, eval_bytes):
    """(trained on, held out) of documents that are their own keys, in their order."""
    split = plan_split(((text, text) for text in texts), "test", held_out, eval_bytes)
    return split, [split.divide(text, text) for text in texts]


def num_bytes(texts):
    return len("".join(texts).encode())


MANY = [f"{i} " + "éü€" * (i + 1) for i in range(100)]


@pytest.mark.parametrize("eval_bytes", [0, 1, 2, 100, 701, 2000])
def test_eval_bytes_are_bytes_of_all_documents_together(tmp_path, tokenizer, eval_bytes):
    path = write_lines(tmp_path / "many.jsonl", MANY)
    corpus, train, held_out = load(path, tokenizer, held_out=0.3, eval_bytes=eval_bytes or 700)
    assert num_bytes(held_out) == corpus.held_out.num_bytes == corpus.record["held_out"]["bytes"]
    # A character that is cut is left to the training, and the longest has three bytes.
    budget = eval_bytes or 700
    assert max(budget - 2, 0) <= num_bytes(held_out) <= budget
    assert num_bytes(train) == corpus.train.num_bytes == corpus.record["train"]["bytes"]
    assert num_bytes(train + held_out) == num_bytes(MANY)


@pytest.mark.parametrize("count", [1, 3, FEW_DOCUMENTS - 1, FEW_DOCUMENTS, 100])
@pytest.mark.parametrize("eval_bytes", [0, 200, 333, 10**6])
def test_no_text_is_lost(count, eval_bytes):
    texts = MANY[-count:]
    _, parts = divided(texts, 0.3, eval_bytes)
    for text, (train, held_out) in zip(texts, parts):
        assert text in (train + held_out, held_out + train)
    total = num_bytes([held_out for _, held_out in parts])
    assert 0 < total <= (eval_bytes or math.inf)


def test_each_of_few_files_gives_its_share(tmp_path, tokenizer):
    folder = tmp_path / "files"
    folder.mkdir()
    sizes = [1000, 2000, 3000]
    for letter, size in zip("abc", sizes):
        (folder / f"{letter}.txt").write_text(letter * size)
    for eval_bytes, shares in ((0, [50, 100, 150]), (60, [10, 20, 30]), (10**6, [50, 100, 150])):
        _, train, held_out = load(folder, tokenizer, eval_bytes=eval_bytes)
        counts = Counter("".join(held_out))
        assert [counts[letter] for letter in "abc"] == shares
        assert Counter("".join(train)) + counts == dict(zip("abc", sizes))


def test_a_single_document_gives_its_end(tmp_path, tokenizer):
    text = "".join(f"line {i}\n" for i in range(300))
    (tmp_path / "one.txt").write_text(text)
    _, (train,), (held_out,) = load(tmp_path / "one.txt", tokenizer)
    assert train + held_out == text and len(held_out) == round(0.05 * len(text))
    (tmp_path / "accents.txt").write_text("é" * 1000)
    _, (train,), (held_out,) = load(tmp_path / "accents.txt", tokenizer, eval_bytes=13)
    assert held_out == "é" * 6 and train == "é" * 994


def test_order_of_documents_does_not_matter():
    for eval_bytes in (0, 500):
        _, parts = divided(MANY, 0.2, eval_bytes)
        _, again = divided(MANY[::-1], 0.2, eval_bytes)
        assert parts == again[::-1]
    # Fewer bytes are fewer of the same documents: a longer measurement contains the shorter.
    held = [{p[1] for p in divided(MANY, 0.2, size)[1] if p[0] == ""} for size in (500, 1500, 0)]
    assert held[0] < held[1] < held[2]


def test_copies_fall_on_one_side():
    texts = MANY[:30] * 3
    for eval_bytes in (0, 100, 300, 800):
        _, parts = divided(texts, 0.3, eval_bytes)
        assert parts[:30] == parts[30:60] == parts[60:]
        assert 0 < num_bytes([held_out for _, held_out in parts]) <= (eval_bytes or math.inf)


def test_about_the_fraction_and_at_least_one_document_is_held_out():
    for count in range(FEW_DOCUMENTS, 60):
        texts = [f"{count} {i}" for i in range(count)]
        split, parts = divided(texts, 0.01, 0)
        assert sum(bool(held_out) for _, held_out in parts) >= 1 and split.num_documents == count
    texts = [str(i) for i in range(4000)]
    held_out = sum(bool(held_out) for _, held_out in divided(texts, 0.2, 0)[1])
    assert abs(held_out - 800) < 4 * math.sqrt(4000 * 0.2 * 0.8)  # four standard deviations


def test_the_same_bytes_for_every_tokenizer(tmp_path, tokenizer):
    class Reversed:  # another tokenizer, with other ids
        eos_token_id, all_special_tokens = 256, []

        def get_vocab(self):
            return {chr(i): i for i in range(257)}

        def __len__(self):
            return 257

        def __call__(self, texts, **options):
            return {"input_ids": [[255 - byte for byte in text.encode()] for text in texts]}

    path = write_lines(tmp_path / "many.jsonl", MANY)
    corpora = [load(path, tokenizer, eval_bytes=300)[0]]
    recipe = Recipe("x", "retnet", data=str(path), eval_bytes=300)
    corpora.append(load_corpus(recipe, Reversed(), tmp_path / ".cache"))
    assert corpora[0].record["sha256"] == corpora[1].record["sha256"]
    ids = corpora[0].held_out.ids[1:-1], corpora[1].held_out.ids[1:-1]
    letters = ids[0] < 256
    assert (ids[0][letters] == 255 - ids[1][ids[1] < 256]).all()


def test_documents_without_text_are_counted(tmp_path, tokenizer):
    path = write_lines(tmp_path / "some.jsonl", [*MANY, "", " \n", None])
    corpus, _, _ = load(path, tokenizer)
    assert corpus.record["documents_without_text"] == 3
    write_lines(path, [" ", None])
    with pytest.raises(UsageError, match="is empty: no train text"):
        load(path, tokenizer)
