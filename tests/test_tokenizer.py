"""tokenizers/byte: ids are bytes, every text comes back, every sequence of ids decodes."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tokenizers" / "byte"

TEXTS = {
    "empty": "",
    "nul": "a\x00b\x00",
    "line ends": "one\r\ntwo\rthree\n\n\t four  \n",
    "spaces": "  two  spaces , a comma . do n't 's  ",
    "accents": "e\u0301 é ﬁ Å ａ",  # composed, decomposed and compatibility forms stay apart
    "emoji": "👩🏽‍🚀🏳️‍🌈",
    "byte order mark": "\ufefftext\ufffe",
    "special strings": "<|eos|><|pad|> <|bos|>text<|eos|>",
    "symbols of bytes": "ĠĊĀ",
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


def assert_round_trip(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("name", TEXTS)
def test_text_comes_back(tokenizer, name):
    assert_round_trip(tokenizer, TEXTS[name])


def test_all_of_unicode_comes_back(tokenizer):
    assert_round_trip(tokenizer, "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)])))


def test_invalid_utf8_is_replaced(tokenizer):
    draw = random.Random(0)
    # A leading byte next to arbitrary ones meets every kind of truncated and overlong sequence.
    for length in [1, 2, 3, 4, 5, 8, 64] * 100:
        data = bytes([draw.randrange(0xC0, 0x100)]) + draw.randbytes(length)
        assert tokenizer.decode(list(data)) == data.decode("utf-8", "replace")


def test_ids_beyond_the_vocabulary_decode_to_nothing(tokenizer):
    assert tokenizer.decode([72, 259, 105, 4095]) == "Hi"


def test_special_tokens(tokenizer):
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert ids == (256, 257, 258)
    assert len(tokenizer) == tokenizer.vocab_size == 259
    assert tokenizer.decode([257, 72, 105, 258, 256]) == "<|bos|>Hi<|eos|><|pad|>"
    assert tokenizer.decode([257, 72, 105, 258, 256], skip_special_tokens=True) == "Hi"
    asked = tokenizer("Hi<|eos|>", split_special_tokens=False)["input_ids"]
    assert asked == [72, 105, 258]


def test_nothing_is_added(tokenizer):
    for add_special_tokens in (True, False):
        assert tokenizer("Hi", add_special_tokens=add_special_tokens)["input_ids"] == [72, 105]


def test_pads_on_the_left(tokenizer):
    batch = tokenizer(["Hi", "four"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[256, 256, 72, 105], list(b"four")]
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert set(batch) == {"input_ids", "attention_mask"}


def test_there_is_no_length_limit(tokenizer):
    assert len(tokenizer("x" * 300_000, truncation=True)["input_ids"]) == 300_000


def test_saved_copy_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    copy = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS.values():
        assert_round_trip(copy, text)
    assert copy.padding_side == "left"
    assert copy.special_tokens_map == tokenizer.special_tokens_map


def test_script_writes_these_very_files(tmp_path):
    script = ROOT / "tokenizers" / "build_byte.py"
    subprocess.run([sys.executable, script, tmp_path], check=True)
    names = sorted(path.name for path in FOLDER.glob("*.json"))
    assert names == sorted(path.name for path in tmp_path.iterdir())
    for name in names:
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes(), name
