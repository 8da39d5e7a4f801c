"""Corpora: which bytes are trained on, which are held out, and which window a step reads."""

import gzip
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from pretraining.building import load_tokenizer
from pretraining.corpus import Corpus, Tokens, Windows, held_out_batches, load_corpus
from pretraining.measuring import held_out_bits_per_byte
from pretraining.mixing import Batches, Part
from pretraining.recipe import Recipe, UsageError


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tokenizers/byte")


def numbers(count, every=7):
    """Token i has id i, and a document begins at every seventh."""
    return Tokens(np.arange(count, dtype=np.uint16), np.arange(0, count - 1, every), count)


def batches_of(tokens, length, batch_size, seed=0, packing="concat"):
    """The batches of a run that reads one text."""
    sizes = {"sequence_length": length, "batch_size": batch_size, "seed": seed}
    recipe = Recipe("x", "retnet", packing=packing, **sizes)
    return Batches(recipe, [Part("", 1, Corpus(tokens, None, {}))])


def starts_of_step(windows, step, world, size):
    accumulation = windows.batch_size // (world * size)
    batches = [
        windows.batch(step, rank, micro, world, size)
        for micro in range(accumulation)
        for rank in range(world)
    ]
    return [int(row[0]) for batch in batches for row in batch["input_ids"]]


def test_a_step_reads_the_same_windows_on_any_number_of_processes():
    windows = batches_of(numbers(1000), 10, 12, seed=3)
    for step in range(20):  # more than two epochs
        alone = starts_of_step(windows, step, 1, 12)
        for world, size in ((1, 4), (2, 3), (3, 1), (4, 3), (12, 1)):
            assert starts_of_step(windows, step, world, size) == alone
        fresh = batches_of(numbers(1000), 10, 12, seed=3)
        assert starts_of_step(fresh, step, 1, 12) == alone


def test_an_epoch_reads_each_window_once_and_the_next_in_another_order():
    tokens = numbers(1000)
    windows = Windows(tokens, 10, seed=3)
    count = windows.num_windows
    epochs = [[windows.start(i) for i in range(e * count, (e + 1) * count)] for e in range(3)]
    for starts in epochs:
        assert sorted(starts) == list(range(min(starts), min(starts) + 10 * count, 10))
        assert 0 <= min(starts) < 10 and max(starts) + 10 < 1000
        assert starts != sorted(starts)
    assert epochs[0] != epochs[1] != epochs[2]
    # What runs of earlier versions read, so that they go on.
    assert [windows.start(i) for i in (0, 1, 2, 98, 99, 250)] == [156, 696, 606, 294, 944, 862]
    other = Windows(tokens, 10, seed=4)
    assert [other.start(i) for i in range(count)] != epochs[0]


def test_windows_and_their_targets():
    windows = batches_of(numbers(1000), 10, 4, packing="documents")
    batch = windows.batch(0, 0, 0, 1, 4)
    assert torch.equal(batch["shift_labels"], batch["input_ids"] + 1)
    for ids, positions in zip(batch["input_ids"].tolist(), batch["position_ids"].tolist()):
        starts = [token for token in ids if token % 7 == 0]
        expected = [token - max([s for s in starts if s <= token] or ids[:1]) for token in ids]
        assert positions == expected
    assert "position_ids" not in batches_of(numbers(1000), 10, 4).batch(0, 0, 0, 1, 4)


@pytest.mark.parametrize(
    ("length", "size", "world"), [(10, 4, 1), (10, 3, 3), (99, 1, 2), (7, 2, 5)]
)
def test_held_out_scores_each_target_once(length, size, world):
    tokens = numbers(100)
    ranks = [
        list(held_out_batches(tokens, length, size, "concat", rank, world)) for rank in range(world)
    ]
    targets = [x for rank in ranks for batch in rank for x in batch["shift_labels"].flatten()]
    assert sorted(x.item() for x in targets if x != -100) == list(range(1, 100))
    # Where weights are gathered from all processes, each is there as often as the others.
    assert len({len(rank) for rank in ranks}) == 1


def recipe_for(data, **values):
    return Recipe("x", "retnet", data=str(data), **values)


def write_documents(path, count=60):
    texts = [f"document {i}: {'naïve ' * (i + 1)}<|eos|>" for i in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def documents_of(tokens, tokenizer):
    assert tokens.ids[0] == tokens.ids[-1] == tokenizer.eos_token_id
    ends = [*tokens.starts[1:], len(tokens.ids) - 1]
    return [tokenizer.decode(tokens.ids[a + 1 : b].tolist()) for a, b in zip(tokens.starts, ends)]


def test_split_and_bytes(tmp_path, tokenizer):
    texts = write_documents(tmp_path / "some.jsonl")
    recipe = recipe_for(tmp_path / "some.jsonl", held_out=0.2)
    corpus = load_corpus(recipe, tokenizer, tmp_path / "cache")
    train, held_out = (documents_of(part, tokenizer) for part in (corpus.train, corpus.held_out))
    # Text that spells the end of text does not become one.
    assert sorted(train + held_out) == sorted(texts)
    assert 0 < len(held_out) < len(train)
    content = "".join(held_out).encode()
    assert corpus.held_out.num_bytes == len(content)
    size = len(gzip.compress(content, 9))
    assert corpus.record["held_out"]["gzip_bits_per_byte"] == 8 * size / len(content)
    # The split does not depend on the order of the documents.
    lines = (tmp_path / "some.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "some.jsonl").write_text("".join(reversed(lines)))
    again = load_corpus(recipe, tokenizer, tmp_path / "cache")
    assert sorted(documents_of(again.held_out, tokenizer)) == sorted(held_out)


def test_standard_library(tokenizer, cache_dir):
    corpus = load_corpus(Recipe("x", "retnet"), tokenizer, cache_dir)
    assert corpus.record["files"] > 300
    assert corpus.train.num_bytes > 5e6
    assert 1e5 < corpus.held_out.num_bytes <= 1e6
    again = load_corpus(Recipe("x", "retnet"), tokenizer, cache_dir)
    assert again.record == corpus.record


def test_bits_per_byte_of_a_uniform_model(tmp_path, tokenizer):
    write_documents(tmp_path / "some.jsonl")
    recipe = recipe_for(tmp_path / "some.jsonl", sequence_length=50, eval_batch_size=3)
    tokens = load_corpus(recipe, tokenizer, tmp_path / "cache").held_out

    class Uniform(torch.nn.Module):
        def forward(self, input_ids, shift_labels, num_items_in_batch, **kwargs):
            nats = shift_labels.numel() * math.log(259) / num_items_in_batch
            return SimpleNamespace(loss=torch.tensor(nats))

    measured = held_out_bits_per_byte(Accelerator(cpu=True), Uniform(), tokens, recipe)
    targets = tokens.num_bytes + len(tokens.starts)  # each byte, and the end of each document
    assert measured == pytest.approx(math.log2(259) * targets / tokens.num_bytes, rel=1e-6)


def test_too_little_text():
    with pytest.raises(UsageError, match="the training text has 15 tokens, two windows"):
        Windows(numbers(15), 10, 0)
    assert Windows(numbers(21), 10, 0).num_windows == 1


def test_a_tokenizer_without_end_of_text(tmp_path, tokenizer):
    (tmp_path / "one.txt").write_text("text")
    bare = load_tokenizer("tokenizers/byte")
    bare.eos_token = None
    with pytest.raises(UsageError, match="has no eos_token"):
        load_corpus(recipe_for(tmp_path / "one.txt"), bare, tmp_path / "cache")
