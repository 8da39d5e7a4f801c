"""tokenizers/rwkv_world.py: greedy longest match over bytes, ids kept, without code in the folder.

The World vocabulary itself is not part of this project. A small one in its format stands in, which
has what is difficult about it; where the author's package is installed, its own is checked as well.
"""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tokenizers" / "rwkv_world.py"
END_OF_TEXT = "<|rwkv_tokenizer_end_of_text|>"
HOLES = {5, 300, 301, 302}  # ids without a line

PIECES = [
    *(bytes([byte]) for byte in range(256)),
    # Pieces that begin alike, with gaps: after abcd the match falls back from abcdefg to abc.
    *(b"ab", b"abc", b"abcdefg", b"bcd", b"cdefghi", b"defgh", b"the", b" the", b" theatre"),
    # Runs, and the ends of lines.
    *(b" " * n for n in (2, 3, 4, 8, 16, 31, 128)),
    *(b"\n\n", b"\r\n", b"\r\n\r\n", b" \n", b"\n    ", b"\t\t", b"#" * 80, b"--", b"----"),
    # What a regular expression would take for its own, and quotes for the literals.
    *(b".*", b"[^a]", b"[a-z]+", b"(?:", b"a|b", b"\\d", b"\\\\", b"^$", b"{2}", b"]?", b"&&"),
    b"'\"",
    # Characters, parts of characters, and the end of one with the beginning of the next.
    *("é".encode(), "中文".encode(), " 中".encode(), "😀".encode(), "👩🏽‍🚀".encode()),
    *(b"\xe4\xb8", b"\xb8\xad", b"\xf0\x9f", b"\xf0\x9f\x98", b"\x9f\x98\x80"),
    *(b"\x80\xf0\x9f\x98", b"\xad\xe6", b"a\xf0", b"\xa9b", b"\xff\xfe"),
    b"x" * 256,
    *(bytes([a, b]) for a in b"etaoinsh" for b in b"rdlucmfw"),
]

TEXTS = {
    "empty": "",
    "prefixes": "abcdefgh abcdef abcdefghi bcdefghi abcd the theatre theatr",
    "leading spaces": "   the",
    "runs": " " * 1000 + "#" * 333 + "-" * 7 + "\n" * 5 + "x" * 300,
    "line ends": "one\r\ntwo\rthree\n\n\t\t\t four  \n",
    "controls": "".join(map(chr, range(32))) + "\x7f\x85\u2028",
    "expressions": "[^a] [a-z]+ (?:a|b) \\\\d \\\\\\ ^$ {2} ]? && '\"",
    "chinese": "中文 中 文中",
    "emoji": "😀😀a😀 👩🏽‍🚀🏳️‍🌈😁",
    "accents": "e\u0301 é ﬁ Å ａ ©b",  # composed and decomposed forms stay apart
    "byte order mark": "\ufefftext\ufffe",
    "special strings": f"{END_OF_TEXT}<|endoftext|>a{END_OF_TEXT}",
    "symbols of bytes": "ĠĊĀ Ġ",
    "holes": "[unused 5] [unused 300]",
    # One word for WordPiece, whose search would take hours.
    "long word": "ab" * 200_000,
}


def write_vocabulary(path):
    """Writes the stand-in for the vocabulary file; the ids of its pieces."""
    order = random.Random(0).sample(PIECES, len(PIECES))
    numbers = [n for n in range(1, len(order) + len(HOLES) + 1) if n not in HOLES]
    lines = []
    for number, piece in zip(numbers, order, strict=True):
        try:
            literal = repr(piece.decode())
        except UnicodeDecodeError:
            literal = repr(piece)
        lines.append(f"{number} {literal} {len(piece)}\n")
    path.write_bytes("".join(lines).encode())
    return dict(zip(order, numbers, strict=True))


def run_script(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("world")
    write_vocabulary(path / "vocabulary.txt")
    result = run_script(path / "vocabulary.txt", path / "tokenizer")
    assert result.returncode == 0, result.stderr
    assert result.stdout == (
        f"{path / 'tokenizer'}: {len(PIECES)} pieces and {END_OF_TEXT} (id 0)\n"
    )
    return path / "tokenizer"


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def ids(folder):
    return write_vocabulary(folder.parent / "again.txt")


def greedy(text, ids):
    """The definition: again and again the longest piece that the rest begins with."""
    lengths = sorted({len(piece) for piece in ids}, reverse=True)
    data, start, found = text.encode(), 0, []
    while start < len(data):
        piece = next(data[start : start + n] for n in lengths if data[start : start + n] in ids)
        found.append(ids[piece])
        start += len(piece)
    return found


def random_text(seed):
    """Pieces, what pieces consist of, and characters of all kinds, in any order."""
    draw = random.Random(seed)
    whole = [piece.decode("utf-8", "ignore") for piece in PIECES if len(piece) > 1]
    kinds = [
        lambda: draw.choice(whole),
        lambda: (text := draw.choice(whole))[: draw.randint(0, len(text))],
        lambda: draw.choice("abcdefghi"),
        lambda: draw.choice("中文丬😀😁👩🏽‍🚀é©\u00ad"),
        lambda: draw.choice(" \n\r\t#-x") * draw.choice([1, 2, 3, 5, 30, 140]),
        lambda: draw.randbytes(9).decode("utf-8", "replace"),
        lambda: chr(draw.choice([draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)])),
    ]
    return "".join(draw.choice(kinds)() for _ in range(draw.choice([1, 10, 100])))


def assert_exact(tokenizer, ids, text):
    found = tokenizer(text)["input_ids"]
    assert found == greedy(text, ids)
    assert tokenizer.decode(found) == text
    assert tokenizer.decode(found, skip_special_tokens=True) == text


@pytest.mark.parametrize("name", TEXTS)
def test_text_is_cut_as_defined(tokenizer, ids, name):
    assert_exact(tokenizer, ids, TEXTS[name])


def test_random_text_is_cut_as_defined(tokenizer, ids):
    for seed in range(600):
        assert_exact(tokenizer, ids, random_text(seed))


def test_all_of_unicode_comes_back(tokenizer):
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000, 7)]))
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_every_piece_has_its_id(tokenizer, ids):
    for piece, index in ids.items():
        assert tokenizer.decode([index]) == piece.decode("utf-8", "replace")
        try:
            assert tokenizer(piece.decode())["input_ids"] == [index]
        except UnicodeDecodeError:
            continue


def test_ids_decode_in_any_order(tokenizer, ids):
    # As generation makes them: characters begin, end and break anywhere.
    pieces = {index: piece for piece, index in ids.items()}
    draw = random.Random(0)
    for length in [1, 2, 3, 8, 64] * 100:
        found = draw.choices(list(pieces), k=length)
        data = b"".join(pieces[index] for index in found)
        assert tokenizer.decode(found) == data.decode("utf-8", "replace")


def test_a_prefix_decodes_as_far_as_it_goes(tokenizer, ids):
    found = [ids[b"a\xf0"], ids[b"\x9f\x98\x80"]]
    assert tokenizer("a😀")["input_ids"] == found
    assert tokenizer.decode(found[:1]) == "a\ufffd"
    assert tokenizer.decode(found) == "a😀"


def test_ids_without_a_piece(tokenizer):
    assert tokenizer.decode([300]) == "[unused 300]"
    beyond = len(PIECES) + len(HOLES) + 1
    assert tokenizer.vocab_size == len(tokenizer) == beyond
    assert tokenizer.decode([beyond, 65535]) == ""


def test_added_tokens_take_new_ids(folder, ids):
    copy = AutoTokenizer.from_pretrained(folder)
    copy.add_tokens(["<|user|>"])
    new = len(PIECES) + len(HOLES) + 1
    assert copy("ab<|user|>ab")["input_ids"] == [ids[b"ab"], new, ids[b"ab"]]


def test_special_tokens(tokenizer, ids):
    assert {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id} == {0}
    assert tokenizer.unk_token is None
    found = [0, ids[b"ab"], 0]
    assert tokenizer.decode(found) == f"{END_OF_TEXT}ab{END_OF_TEXT}"
    assert tokenizer.decode(found, skip_special_tokens=True) == "ab"
    # Text is only ever text, unless it is asked for.
    text = f"{END_OF_TEXT}ab{END_OF_TEXT}"
    assert 0 not in tokenizer(text)["input_ids"]
    assert tokenizer(text, split_special_tokens=False)["input_ids"] == found


def test_nothing_is_added(tokenizer, ids):
    for add_special_tokens in (True, False):
        found = tokenizer(" the", add_special_tokens=add_special_tokens)["input_ids"]
        assert found == [ids[b" the"]]


def test_pads_on_the_left(tokenizer, ids):
    batch = tokenizer(["abc", "abc the"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[0, ids[b"abc"]], [ids[b"abc"], ids[b" the"]]]
    assert batch["attention_mask"].tolist() == [[0, 1], [1, 1]]
    assert set(batch) == {"input_ids", "attention_mask"}


def test_offsets_are_of_characters(tokenizer):
    found = tokenizer("abc 😁中", return_offsets_mapping=True)["offset_mapping"]
    # 😁 is f0 9f 98, 81; 中 is e4 b8, ad.
    assert found == [(0, 3), (3, 4), (4, 5), (4, 5), (5, 6), (5, 6)]


def test_saved_copy_is_the_same(tokenizer, ids, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    copy = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS.values():
        assert copy(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert copy.padding_side == "left"
    assert copy.special_tokens_map == tokenizer.special_tokens_map


def test_folder_needs_no_code(folder, ids, tmp_path):
    assert {path.name for path in folder.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    code = (
        "import sys\n"
        "sys.modules['zoo'] = None  # importing it is an error\n"
        "from transformers import AutoTokenizer\n"
        f"print(AutoTokenizer.from_pretrained({str(folder)!r})('abcdefgh the')['input_ids'])\n"
    )
    result = subprocess.run(
        [sys.executable, "-I", "-c", code],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{greedy('abcdefgh the', ids)}\n"


def test_goes_beside_a_model(folder, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert run_script(folder.parent / "vocabulary.txt", tmp_path).returncode == 0
    for path in folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_line_ends_of_windows(folder, tmp_path):
    lines = (folder.parent / "vocabulary.txt").read_bytes()
    (tmp_path / "crlf.txt").write_bytes(lines.replace(b"\n", b"\r\n"))
    assert run_script(tmp_path / "crlf.txt", tmp_path / "tokenizer").returncode == 0
    found = (tmp_path / "tokenizer" / "tokenizer.json").read_bytes()
    assert found == (folder / "tokenizer.json").read_bytes()


# A line of the file, and what is said about it.
BAD_LINES = {
    "not a line": ("# a comment", "expected `INDEX LITERAL LENGTH`, got '# a comment'"),
    "blank": ("", "expected `INDEX LITERAL LENGTH`, got ''"),
    "no length": ("900 'zz'", "expected `INDEX LITERAL LENGTH`"),
    "negative": ("-9 'zz' 2", "expected `INDEX LITERAL LENGTH`"),
    "id 0": ("0 'zz' 2", "expected an id from 1 on, got 0, which is end of text"),
    "large id": ("65536 'zz' 2", "expected an id of 16 bits, up to 65535, got 65536"),
    "not a literal": ("900 zz 2", "expected a Python str or bytes literal, got zz"),
    "not closed": ("900 'zz 2", "expected a Python str or bytes literal, got 'zz"),
    "a number": ("900 12 2", "expected a Python str or bytes literal, got 12"),
    "code": ("900 print('ran') 2", "expected a Python str or bytes literal, got print('ran')"),
    "surrogate": (r"900 '\ud800' 3", "expected a Python str or bytes literal"),
    "in characters": ("900 'éé' 2", "expected 2 bytes, as its last field says, got 4"),
    "too short": ("900 'zz' 3", "expected 3 bytes, as its last field says, got 2"),
    "nothing": ("900 '' 0", "expected a piece of 1 to 256 bytes, got 0"),
    "too long": (f"900 '{'z' * 257}' 257", "expected a piece of 1 to 256 bytes, got 257"),
    "id twice": ("7 'zz' 2", "expected each id once, got 7 again"),
    "piece twice": (r"900 b'\x61b' 2", "expected each piece once, got b'ab' again, which has id"),
    "end of text": (f"900 '{END_OF_TEXT}' 30", "expected pieces of text"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_line_is_refused(folder, tmp_path, name):
    line, message = BAD_LINES[name]
    good = (folder.parent / "vocabulary.txt").read_text(encoding="utf-8")
    (tmp_path / "bad.txt").write_text(f"{good}{line}\n", encoding="utf-8")
    result = run_script(tmp_path / "bad.txt", tmp_path / "tokenizer")
    assert (result.returncode, result.stdout) == (1, "")
    place = f"bad.txt, line {len(PIECES) + 1}: "
    assert place in result.stderr and "Traceback" not in result.stderr
    assert message in result.stderr
    assert result.stderr.endswith("; the file is damaged or of another kind: get it again.\n")
    assert not (tmp_path / "tokenizer").exists()


def test_missing_bytes_are_refused(folder, tmp_path):
    lines = (folder.parent / "vocabulary.txt").read_text(encoding="utf-8").splitlines(True)
    kept = [line for line in lines if r"b'\xc0' 1" not in line and "'A' 1" not in line]
    (tmp_path / "short.txt").write_text("".join(kept), encoding="utf-8")
    result = run_script(tmp_path / "short.txt", tmp_path / "tokenizer")
    assert result.returncode == 1
    assert "expected each of the 256 bytes as a piece" in result.stderr
    assert "got none for 2 (0x41, 0xc0); get the whole file." in result.stderr
    assert not (tmp_path / "tokenizer").exists()


def test_bad_files_and_folders_are_refused(folder, tmp_path):
    vocabulary = folder.parent / "vocabulary.txt"
    (tmp_path / "binary").write_bytes(b"PK\x03\x04\xff")
    (tmp_path / "file").write_text("")
    for arguments, message in [
        ((tmp_path / "none.txt", tmp_path / "new"), "none.txt cannot be read (No such file"),
        ((tmp_path, tmp_path / "new"), "cannot be read (Is a directory)"),
        ((tmp_path / "binary", tmp_path / "new"), "expected UTF-8 text, got the byte 0xff at off"),
        ((tmp_path / "file", tmp_path / "new"), "line 1: expected `INDEX LITERAL LENGTH`, got ''"),
        ((vocabulary, folder), "got one with tokenizer.json, tokenizer_config.json; choose"),
        ((vocabulary, tmp_path / "file"), "expected a folder to write to, got an error"),
    ]:
        result = run_script(*arguments)
        assert (result.returncode, result.stdout) == (1, "")
        assert message in result.stderr and "Traceback" not in result.stderr
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("source", ["stand-in", "World"])
def test_equals_the_authors(folder, tmp_path, source):
    author = pytest.importorskip("rwkv.rwkv_tokenizer", reason="the author's package, rwkv")
    vocabulary = folder.parent / "vocabulary.txt"
    if source == "World":
        vocabulary = Path(author.__file__).parent / "rwkv_vocab_v20230424.txt"
    assert run_script(vocabulary, tmp_path / "tokenizer").returncode == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    official = author.TRIE_TOKENIZER(str(vocabulary))
    own_text = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/*.py"))
    for text in [*map(random_text, range(600)), *TEXTS.values(), own_text]:
        found = tokenizer(text)["input_ids"]
        assert found == official.encode(text)
        assert tokenizer.decode(found) == text
    if source == "World":
        assert tokenizer.vocab_size == 65530
        assert tokenizer("Hello")["input_ids"] == [33155]
