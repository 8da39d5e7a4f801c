"""Tokenizers: which are found, and how many embeddings they need."""

import shutil

import pytest
from huggingface_hub import HfApi

from pretraining import building
from pretraining.building import REPOSITORY, build_config, load_tokenizer, vocabulary_size
from pretraining.recipe import Recipe, UsageError


def refused(name):
    with pytest.raises(UsageError) as error:
        load_tokenizer(name)
    assert str(error.value).startswith(f"no tokenizer at {name}: ") and "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def offline(monkeypatch):
    """Without a network. The Hub's libraries would go on trying for a minute."""
    asked = []

    def fail(self, name, **options):
        asked.append(name)
        raise ConnectionError("no network")

    monkeypatch.setattr(HfApi, "repo_info", fail)
    return asked


def test_a_largest_id_beyond_the_length(tmp_path):
    tokenizer = load_tokenizer("tokenizers/byte")
    assert vocabulary_size(tokenizer) == 259
    shutil.copytree(REPOSITORY / "tokenizers/byte", tmp_path / "gaps")
    for path in (tmp_path / "gaps").glob("*.json"):
        path.write_text(path.read_text().replace("258", "70000"))
    gaps = load_tokenizer(str(tmp_path / "gaps"))
    assert len(gaps) == 259 and gaps.eos_token_id == 70000
    assert vocabulary_size(gaps) == 70001
    assert build_config(Recipe("x", "retnet"), gaps).vocab_size == 70001
    too_small = Recipe("x", "retnet", model={"vocab_size": 70000})
    with pytest.raises(UsageError, match="model.vocab_size must be at least 70001"):
        build_config(too_small, gaps)
    larger = Recipe("x", "retnet", model={"vocab_size": 70016})
    assert build_config(larger, gaps).vocab_size == 70016


def test_none_in_a_list():
    """TOML has no word for what is None, and a layer without positions is that."""
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = sizes | {"position_embedding_type": ["rope", "none"]}
    recipe = Recipe("x", "sliding_window", model=model)
    config = build_config(recipe, load_tokenizer("tokenizers/byte"))
    assert config.position_embedding_type == ["rope", None]


def test_mistyped_folders(tmp_path, monkeypatch, offline):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(REPOSITORY / "tokenizers/byte", tmp_path / "mine/bytes")
    assert len(load_tokenizer("mine/bytes")) == 259
    assert "no such folder; give a folder or a Hub id. Did you mean 'mine/bytes'?" in refused(
        "./mine/byte"
    )
    assert offline == []
    assert refused("tokenizers/bite").endswith(" Did you mean 'tokenizers/byte'?")
    assert refused("mine/bite").endswith(" Did you mean 'mine/bytes'?")
    assert "a file, not a folder" in refused("mine/bytes/tokenizer.json")
    (tmp_path / "mine/bytes/tokenizer.json").write_text("{")
    assert "holds README.md, tokenizer.json, tokenizer_config.json." in refused("mine/bytes")
    assert "The folder holds bytes." in refused("mine")


def test_the_hub(monkeypatch, offline):
    used = []

    def load(name, local_files_only, trust_remote_code):
        used.append(local_files_only)
        raise OSError("several\nlines")

    monkeypatch.setattr(building.AutoTokenizer, "from_pretrained", load)
    assert "the Hub cannot be reached" in refused("nobody/nothing")
    assert used == [True] and offline == ["nobody/nothing"]
    monkeypatch.setattr(HfApi, "repo_info", lambda self, name, **options: None)
    assert refused("nobody/nothing") == "no tokenizer at nobody/nothing: several"
    assert used == [True, False]
    monkeypatch.undo()  # the Hub's own check of the name needs no network
    assert "nor a name that the Hub allows" in refused("no name")
