"""Text that is tokenised while it is trained on: nothing lost, and exact when resumed."""

import gzip
import hashlib
import json
import shutil
from types import SimpleNamespace

import datasets
import pytest

from pretraining import sources, streams
from pretraining.building import load_tokenizer
from pretraining.mixing import Batches, Shares, load_mixture
from pretraining.recipe import Recipe, UsageError
from pretraining.streams import Stream

TEXTS = [f"document {n}: " + "a naïve word " * (n % 23) for n in range(240)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Four files of documents, one compressed, which are read a few at once."""
    monkeypatch.setattr(streams, "READ_AT_ONCE", 500)
    (tmp_path / "text").mkdir()
    for number in range(4):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[number::4])
        name = f"text/{number}.jsonl"
        if number == 2:
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(lines.encode()))
        else:
            (tmp_path / name).write_text(lines)
    return tmp_path


def recipe_for(folder, **values):
    sizes = {"sequence_length": 64, "batch_size": 8, "eval_bytes": 300, "streaming": True}
    return Recipe("x", "retnet", data=str(folder / "text"), **{**sizes, **values})


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tokenizers/byte")


def fingerprint(batches, step, world=1, size=8):
    """The hash of all that the processes see in a step."""
    digest = hashlib.sha256()
    rows = [
        batches.batch(step, rank, micro, world, size)
        for micro in range(8 // (world * size))
        for rank in range(world)
    ]
    for name in rows[0]:
        for row in rows:
            digest.update(row[name].numpy().tobytes())
    return digest.hexdigest()


def test_a_stream_is_its_documents_in_their_order(folder, tokenizer):
    """All but those that are held out, epoch after epoch, with their boundaries."""
    corpus = load_mixture(recipe_for(folder), tokenizer).parts[0].corpus
    stream, tokens, starts = corpus.train, [], 0
    for sample in range(2000):
        found, begin = stream.locate(sample)
        ids, targets, positions = found.window(begin, 64, "documents")
        assert (ids[1:] == targets[:-1]).all()
        starts += int((positions[1:] == 0).sum())
        tokens += ids.tolist()
    boundary = tokenizer.eos_token_id
    read = tokenizer.decode(tokens).split(tokenizer.eos_token)[1:-1]
    assert starts == pytest.approx(tokens.count(boundary), abs=30)  # but for those at a beginning
    held_out = tokenizer.decode(corpus.held_out.ids).split(tokenizer.eos_token)[1:-1]
    assert 0 < corpus.held_out.num_bytes <= 300 and corpus.held_out.ids[-1] == boundary
    hidden = {text for text in TEXTS if any(text.startswith(h) for h in held_out[-1:])}
    kept = [text for text in TEXTS if text not in {*held_out, *hidden}]
    assert len(TEXTS) - len(held_out) == len(kept)
    by_file = [text for number in (0, 1, 2, 3) for text in TEXTS[number::4] if text in kept]
    epochs = [read[n * len(kept) : (n + 1) * len(kept)] for n in range(3)]
    assert epochs[0] == by_file != epochs[2]
    assert all(sorted(epoch) == sorted(kept) for epoch in epochs)


@pytest.mark.parametrize(
    ("length", "values"),
    [
        (64, {"packing": "documents"}),
        (16, {"packing": "documents"}),
        (16, {"position_skip": {"target": 128, "span": 3}}),
    ],
)
def test_resumed_anywhere_it_is_exact(folder, tokenizer, tmp_path, length, values):
    """At every step, in the first epoch and in later ones, on one process and on several."""
    schedule = {"context_schedule": [[0, length], [7, 64]], **values}

    def batches():
        recipe = recipe_for(folder, **schedule)
        return Batches(recipe, load_mixture(recipe, tokenizer).parts)

    whole = batches()
    expected = [fingerprint(whole, step) for step in range(160)]
    assert len(set(expected)) == 160
    for cut in (1, 2, 53, 101, 158):
        first, resumed, again = batches(), batches(), batches()
        for step in range(cut):
            fingerprint(first, step, 2, 2)
        first.save(tmp_path, cut)
        resumed.restore(tmp_path)
        resumed.save(tmp_path, cut)  # at once: nothing was read meanwhile
        again.restore(tmp_path)
        for step in range(cut, min(cut + 9, 160)):
            assert fingerprint(again, step, 4, 1) == expected[step]


def test_one_process_reads_its_own_samples_of_the_whole(folder, tokenizer):
    """Each process has a stream of its own, and leaves out what is another's."""
    recipe = recipe_for(folder)
    whole = Batches(recipe, load_mixture(recipe, tokenizer).parts)
    ranks = [Batches(recipe, load_mixture(recipe, tokenizer).parts) for _ in range(2)]
    for step in range(60):
        ids = whole.batch(step, 0, 0, 1, 8)["input_ids"]
        for rank, own in enumerate(ranks):
            found = own.batch(step, rank, 0, 2, 4)["input_ids"]
            assert (found == ids[4 * rank : 4 * rank + 4]).all()


def test_a_run_of_a_stream_and_a_cache(folder, in_process, workshop, monkeypatch):
    """Resumed exactly; what is another stream is refused."""
    tables = [f'name = "stream"\ndata = "{folder}/text"\nstreaming = true\n']
    tables += [f'name = "cached"\ndata = "{folder}/text.txt"\n']
    recipe = "".join(f"\n[[sources]]\n{table}" for table in tables)
    workshop.recipe.write_text(workshop.recipe.read_text() + recipe)
    options = ["--data", "", "--packing", "documents", "--keep_checkpoints", "9", "--steps", "26"]
    options += ["--checkpoint_every", "10"]
    whole = in_process(*options)
    assert whole.returncode == 0, whole.stderr
    assert "stream, 50.00% of the samples: a stream to train on, 1,000 held out" in whole.stdout
    curve = workshop.curve("tiny")
    assert curve[-1]["bits_per_byte/stream"] > 0 < curve[-1]["bits_per_byte/cached"]
    for step in (20, 26):
        shutil.rmtree(folder / f"tiny/checkpoint-{step}")
    restore, restored = Stream.restore, []

    def watched(stream, state):
        restored.append(state["sample"])
        restore(stream, state)

    monkeypatch.setattr(Stream, "restore", watched)
    resumed = in_process(*options, "--resume")
    # It would be exact without, and read all from the beginning.
    assert restored == [Shares([1, 1], seed=0).before(10 * 4)[0]]
    assert "after step 10" in resumed.stdout, resumed.stderr
    assert workshop.curve("tiny") == curve
    with open(folder / "text/3.jsonl", "a") as file:
        file.write('{"text": "one more"}\n')
    other = in_process(*options, "--resume")
    assert other.returncode == 2 and "the corpus is another" in other.stderr


def test_what_cannot_be_streamed(folder, tokenizer):
    def refused(**values):
        recipe = recipe_for(folder, **values)
        with pytest.raises(UsageError) as error:
            Batches(recipe, load_mixture(recipe, tokenizer).parts).batch(0, 0, 0, 1, 8)
        assert "\n" not in str(error.value)
        return str(error.value)

    with pytest.raises(UsageError, match="eval_bytes limits what is held out of a stream"):
        recipe_for(folder, eval_bytes=0)
    assert "0.jsonl, line 1 has no column 'body'" in refused(text_column="body")
    assert "no document of the stream" in refused(held_out=1e-9)
    assert "has no text to train on" in refused(held_out=1 - 1e-9, eval_bytes=10**9)
    recipe = Recipe("x", "retnet", streaming=True)
    with pytest.raises(UsageError, match="'stdlib' is always here and small; leave out streaming"):
        load_mixture(recipe, tokenizer)


def test_a_stream_of_the_hub(monkeypatch, tokenizer):
    """By its commit, and in rows of several columns."""
    monkeypatch.setattr(sources, "hub_answers", lambda name, kind: True)
    info = SimpleNamespace(repo_info=lambda *_, **__: SimpleNamespace(sha="abc"))
    monkeypatch.setattr(sources, "HfApi", lambda: info)
    asked = []
    table = datasets.Dataset.from_dict({"text": TEXTS, "other": list(range(len(TEXTS)))})

    def load(path, **options):
        asked.append({"path": path, **options})
        return table.to_iterable_dataset(num_shards=3)

    monkeypatch.setattr(datasets, "load_dataset", load)
    recipe = Recipe("x", "retnet", data="owner/name", streaming=True, eval_bytes=300)
    corpus = load_mixture(recipe, tokenizer).parts[0].corpus
    options = {"name": None, "split": "train", "streaming": True, "revision": "abc"}
    assert asked == [{"path": "owner/name", **options}]
    assert isinstance(corpus.train, Stream) and corpus.train.dataset.column_names == ["text"]
    expected = [corpus.train.locate(n)[0].ids[:1025].tolist() for n in range(30)]
    resumed = load_mixture(recipe, tokenizer).parts[0].corpus.train
    for n in range(17):
        resumed.locate(n)
    state = resumed.state(17)
    resumed = load_mixture(recipe, tokenizer).parts[0].corpus.train
    resumed.restore(state)
    for n in range(17, 30):
        assert resumed.locate(n)[0].ids[:1025].tolist() == expected[n]
