"""Several sources: whose each sample is, what is refused, what is measured and resumed."""

import json
import shutil

import numpy as np
import pytest
import torch

from pretraining import mixing
from pretraining.corpus import Corpus, Tokens
from pretraining.mixing import Batches, Mixture, Part, Shares
from pretraining.recipe import Recipe, UsageError, read_recipe

SHORT = ["--steps", "30", "--eval_every", "15", "--checkpoint_every", "10"]


def test_shares_are_the_weights():
    weights = [6, 3.0, 0.5, 0.4, 0.1]
    shares = Shares(weights, seed=3)
    places = [shares.place(sample) for sample in range(100_000)]
    for source, weight in enumerate(weights):
        numbers = [number for whose, number in places if whose == source]
        assert numbers == list(range(len(numbers)))  # none left out, none twice
        assert len(numbers) == pytest.approx(10_000 * weight, rel=0.01)
    # In no order that a step's windows could follow, and the same from anywhere.
    assert len({tuple(whose for whose, _ in places[n : n + 10]) for n in range(0, 9000, 10)}) > 100
    assert {whose for whose, _ in places[: mixing.BLOCK]} >= {0, 1, 2, 3}
    for sample in (77_777, 256, 255, 0, 99_999):
        again = Shares([2 * weight for weight in weights], seed=3)
        assert again.place(sample) == places[sample]
        counts = np.bincount([whose for whose, _ in places[:sample]], minlength=len(weights))
        assert again.before(sample).tolist() == counts.tolist()
    assert [Shares(weights, seed=4).place(n) for n in range(256)] != places[:256]


def text_of(value, count):
    """A text of one token, repeated: what is read of it says whose it is."""
    ids = np.full(count, value, dtype=np.uint16)
    return Corpus(Tokens(ids, np.arange(0, count - 1, 5), count), None, {})


def test_a_step_reads_the_same_mixture_on_any_number_of_processes():
    recipe = Recipe("x", "retnet", sequence_length=10, batch_size=12, seed=3, packing="documents")
    parts = [Part("a", 3, text_of(7, 300)), Part("b", 1, text_of(8, 100))]
    batches, seen = Batches(recipe, parts), []
    for step in (0, 1, 50, 3):
        alone = batches.batch(step, 0, 0, 1, 12)
        for world, size in ((2, 3), (3, 4), (4, 1)):
            rows = [
                Batches(recipe, parts).batch(step, rank, micro, world, size)
                for micro in range(12 // (world * size))
                for rank in range(world)
            ]
            for name, whole in alone.items():
                assert torch.equal(torch.cat([row[name] for row in rows]), whole)
        seen += alone["input_ids"][:, 0].tolist()
    assert {7, 8} == set(seen) and seen.count(7) > seen.count(8)
    # Two sources of one size go through it in orders of their own.
    same = Batches(recipe, [Part("a", 1, text_of(7, 300)), Part("b", 1, text_of(7, 300))]).readers
    assert [same[0].start(n) for n in range(28)] != [same[1].start(n) for n in range(28)]


def test_all_held_out_text_in_one():
    first = Tokens(np.array([9, 1, 1, 9, 2, 9]), np.array([0, 3]), 3)
    second = Tokens(np.array([9, 3, 9]), np.array([0]), 1)
    parts = [Part("a", 1, Corpus(None, first, {})), Part("b", 5, Corpus(None, second, {}))]
    whole = Mixture(parts, {}).held_out
    assert whole.ids.tolist() == [9, 1, 1, 9, 2, 9, 3, 9]
    assert whole.starts.tolist() == [0, 3, 5] and whole.num_bytes == 4


A = {"name": "a", "data": "a.txt"}


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([{**A, "weight": 0}], "[[sources]] number 1: weight is a number above 0, got 0"),
        ([{**A, "weight": -1.5}], "weight is a number above 0, got -1.5"),
        ([{**A, "weight": float("nan")}], "weight is a number above 0, got nan"),
        ([{**A, "weight": float("inf")}], "weight is a number above 0, got inf"),
        ([{**A, "weight": "much"}], "weight is a number above 0, got 'much'"),
        ([{**A, "weight": True}], "weight is a number above 0, got True"),
        ([A, {**A, "data": "b.txt"}], "has a name of its own, got 'a' 2 times"),
        ([A, {"name": "b"}], "[[sources]] number 2 has no data"),
        ([{"data": "a.txt"}], "[[sources]] number 1 has no name"),
        ([{**A, "name": "a/b"}], "neither spaces nor slashes, got 'a/b'"),
        ([{**A, "wieght": 1}], "has an unknown key 'wieght'; known are name, data, data_config"),
        ([{**A, "text_column": 3}], "text_column is a string, got 3"),
        (3, "sources is a list of tables, got 3"),
    ],
)
def test_bad_sources(tmp_path, sources, message):
    path = tmp_path / "some.toml"
    path.write_text("architecture = 'retnet'\n")
    inline = sources
    if isinstance(sources, list):
        pairs = [", ".join(f"{k} = {json.dumps(v)}" for k, v in s.items()) for s in sources]
        inline = "[" + ", ".join(f"{{{each}}}" for each in pairs) + "]"
    inline = str(inline).replace("NaN", "nan").replace("Infinity", "inf")
    with pytest.raises(UsageError) as error:
        read_recipe(path, ["--sources", inline])
    assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UsageError, match="either data or .* got data = 'stdlib' and 1 "):
        read_recipe(path, ["--sources", '[{name = "a", data = "a.txt"}]', "--data", "stdlib"])
    with pytest.raises(UsageError, match="either data or .* got neither"):
        read_recipe(path, ["--data", ""])


@pytest.fixture
def two_sources(workshop):
    """Squares as one text, and words as documents in another column, three to one."""
    folder = workshop.folder
    words = [f"document {n}: {'word ' * (n % 30)}" for n in range(300)]
    lines = "".join(json.dumps({"body": text}) + "\n" for text in words)
    (folder / "words.jsonl").write_text(lines)
    tables = [
        f'name = "squares"\ndata = "{folder}/text.txt"\nweight = 3\n',
        f'name = "words"\ndata = "{folder}/words.jsonl"\ntext_column = "body"\n',
    ]
    recipe = "".join(f"\n[[sources]]\n{table}" for table in tables)
    workshop.recipe.write_text(workshop.recipe.read_text() + recipe)
    return folder


def test_a_run_of_two_sources(two_sources, in_process, workshop):
    """Measured by source, resumed exactly, and no other mixture is taken for it."""
    options = [*SHORT, "--data", "", "--packing", "documents", "--keep_checkpoints", "9"]
    whole = in_process(*options)
    assert whole.returncode == 0, whole.stderr
    assert "squares, 75.00% of the samples: " in whole.stdout
    curve = workshop.curve("tiny")
    for step in (20, 30):
        shutil.rmtree(two_sources / f"tiny/checkpoint-{step}")
    resumed = in_process(*options, "--resume")
    assert "after step 10" in resumed.stdout and workshop.curve("tiny") == curve
    last = curve[-1]
    record = json.loads((two_sources / "tiny/run.json").read_text())["corpus"]
    assert list(record["sources"]) == ["squares", "words"]
    sizes = {name: own["held_out"]["bytes"] for name, own in record["sources"].items()}
    bits = sum(last[f"bits_per_byte/{name}"] * size for name, size in sizes.items())
    assert last["bits_per_byte"] == pytest.approx(bits / sum(sizes.values()), rel=1e-12)
    assert f"squares {last['bits_per_byte/squares']:.4f}, words" in whole.stdout
    assert last["bits_per_byte/squares"] != last["bits_per_byte/words"]
    # Other weights, or other text in any of the sources, are another run.
    recipe = workshop.recipe.read_text()
    workshop.recipe.write_text(recipe.replace("weight = 3", "weight = 2"))
    other = in_process(*options, "--resume")
    assert other.returncode == 2 and "sources: {'squares': 3, 'words': 1} -> " in other.stderr
    workshop.recipe.write_text(recipe)
    with open(two_sources / "words.jsonl", "a") as file:
        file.write('{"body": "one more"}\n')
    other = in_process(*options, "--resume")
    assert other.returncode == 2 and "the corpus is another" in other.stderr
