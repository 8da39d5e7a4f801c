"""Build the RWKV World tokenizer, as a folder that `AutoTokenizer` loads, from its vocabulary file.

World models (RWKV 4 to 7) cut the UTF-8 bytes of a text greedily: always the longest piece of the
vocabulary that the rest of the text begins with. The pieces and their ids come from the author's
rwkv_vocab_v20230424.txt (https://github.com/BlinkDL/RWKV-LM), which is not part of this project.

Hugging Face's `tokenizers` does the same in two steps, without code of ours or the author's:

1. Bytes become symbols (GPT-2's alphabet, one printable character per byte), and one regular
   expression cuts them: the trie of all pieces, which at each node prefers to go on, so that it
   matches the longest piece. Every byte is a piece, so it never fails, and its steps per byte are
   bounded by the longest piece: time is linear in the text, whatever the text.
2. What was cut is a piece, and a plain table (WordLevel) has its id.

(WordPiece without a prefix cuts the same way, in time cubic in the text: 9 s for 10 KB.)

Id 0 is `<|rwkv_tokenizer_end_of_text|>`: bos, eos and pad. As with tokenizers/byte, nothing is ever
added to a text, text that spells a special token stays text (`split_special_tokens=False` in a call
asks for the usual behaviour), bytes that are not UTF-8 decode to U+FFFD, and ids beyond the
vocabulary to nothing. `vocab_size` is 65530; models round it up to 65536.

    python tokenizers/rwkv_world.py rwkv_vocab_v20230424.txt FOLDER
"""

import argparse
import ast
import json
import re
import sys
from pathlib import Path

END_OF_TEXT = "<|rwkv_tokenizer_end_of_text|>"  # the name in the models on the Hub
# What from_pretrained reads besides: a leftover of another tokenizer would change this one.
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
MAX_ID = 2**16 - 1  # World's ids are 16 bits in the author's data files, and models have 2^16 rows
MAX_BYTES = 256  # the expression nests by one level per byte; World's longest piece has 128
MAX_BRANCHES = 8  # in an alternation; measured: 4, 8 and 16 hardly differ, 256 is 2-3x slower


def read_vocabulary(path: Path) -> dict[bytes, int]:
    """The pieces of a vocabulary file.

    Args:
        path: a file of lines `INDEX LITERAL LENGTH`: the id, the piece as a Python str or bytes
            literal, and its length in bytes.

    Returns:
        The id of each piece, in the order of the file.

    Raises:
        ValueError: not such a file, or not a vocabulary that any text can be cut with.
    """
    try:
        lines = path.read_bytes().decode().removesuffix("\n").split("\n")
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}); "
            "expected a copy of rwkv_vocab_v20230424.txt, which is in BlinkDL's RWKV-LM."
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected UTF-8 text, got the byte {error.object[error.start]:#04x} at offset "
            f"{error.start}; get the file again, as it is."
        ) from None
    ids: dict[bytes, int] = {}
    pieces: dict[int, bytes] = {}
    for number, line in enumerate(lines, 1):
        try:
            index, piece = parse(line.removesuffix("\r"))
            if index in pieces:
                raise ValueError(f"expected each id once, got {index} again")
            if piece in ids:
                raise ValueError(
                    f"expected each piece once, got {piece!r} again, which has id {ids[piece]}"
                )
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: {error}; the file is damaged or of another kind: "
                "get it again."
            ) from None
        ids[piece], pieces[index] = index, piece
    missing = [byte for byte in range(256) if bytes([byte]) not in ids]
    if missing:
        some = ", ".join(f"{byte:#04x}" for byte in missing[:4])
        raise ValueError(
            f"{path}: expected each of the 256 bytes as a piece, so that any text can be cut, got "
            f"none for {len(missing)} ({some}{', ...' if missing[4:] else ''}); get the whole file."
        )
    return ids


def parse(line: str) -> tuple[int, bytes]:
    """The id and the piece on one line of a vocabulary file.

    Raises:
        ValueError: what was expected there, and what came; without the place and the remedy.
    """
    match = re.fullmatch(r"([0-9]+) (.+) ([0-9]+)", line)
    if match is None:
        raise ValueError(f"expected `INDEX LITERAL LENGTH`, got {line[:80]!r}")
    index, length = int(match[1]), int(match[3])
    if index == 0:
        raise ValueError("expected an id from 1 on, got 0, which is end of text and has no line")
    if index > MAX_ID:
        raise ValueError(f"expected an id of 16 bits, up to {MAX_ID}, got {index}")
    try:
        value = ast.literal_eval(match[2].strip())
        piece = value.encode() if isinstance(value, str) else value
    # All that literal_eval raises on bad input; lone surrogates in `encode` are a ValueError.
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        piece = None
    if not isinstance(piece, bytes):
        raise ValueError(f"expected a Python str or bytes literal, got {match[2][:80]}")
    if len(piece) != length:
        raise ValueError(f"expected {length} bytes, as its last field says, got {len(piece)}")
    if not 1 <= length <= MAX_BYTES:
        raise ValueError(f"expected a piece of 1 to {MAX_BYTES} bytes, got {length}")
    if piece == END_OF_TEXT.encode():
        raise ValueError(f"expected pieces of text, got {END_OF_TEXT}, the name of id 0")
    return index, piece


def byte_symbols() -> list[str]:
    """The printable character that stands for each byte in `tokenizers`' byte-level alphabet.

    Returns:
        256 characters; position b is the symbol of byte b (as in build_byte.py).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)]


def longest_match(words: list[str]) -> str:
    """The regular expression that matches the longest of the words.

    Args:
        words: not empty, in any order.

    Returns:
        A pattern for an engine that tries alternatives from the left: a trie, whose nodes try to
        go on before they end.
    """
    root: dict = {}
    for word in words:
        node = root
        for symbol in word:
            node = node.setdefault(symbol, {})
        node[""] = {}  # a word ends here

    def one_of(symbols: list[str]) -> str:
        escaped = "".join(map(re.escape, symbols))
        return f"[{escaped}]" if len(symbols) > 1 else escaped

    def branches(node: dict, symbols: list[str]) -> list[str]:
        # An alternation tries one branch after the other, and the root has 256: halve it first.
        if len(symbols) <= MAX_BRANCHES:
            return [re.escape(symbol) + pattern(node[symbol]) for symbol in symbols]
        half = len(symbols) // 2
        return [
            f"(?={one_of(part)})(?:{'|'.join(branches(node, part))})"
            for part in (symbols[:half], symbols[half:])
        ]

    def pattern(node: dict) -> str:
        symbols = sorted(symbol for symbol in node if symbol)
        leaves = [symbol for symbol in symbols if list(node[symbol]) == [""]]
        found = branches(node, [symbol for symbol in symbols if symbol not in leaves])
        if leaves:
            found.append(one_of(leaves))
        if not found:
            return ""
        return f"(?:{'|'.join(found)})" + ("?" if "" in node else "")

    return pattern(root)


def tokenizer_json(ids: dict[bytes, int]) -> dict:
    """The content of tokenizer.json: what Hugging Face's `tokenizers` runs.

    Args:
        ids: the id of each piece; every byte is one.

    Returns:
        The pipeline: bytes to symbols, the cut into pieces, ids, and back; nothing added.
    """
    symbols = byte_symbols()
    words = {"".join(symbols[byte] for byte in piece): index for piece, index in ids.items()}
    # `tokenizers` numbers tokens that a user adds by the size of the table, so it has no holes. A
    # space is no symbol of a byte: no text becomes one of these.
    holes = set(range(1, max(ids.values()))).difference(ids.values())
    table = {END_OF_TEXT: 0, **words, **{f"[unused {index}]": index for index in holes}}
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    cut = {
        "type": "Split",
        "pattern": {"Regex": longest_match(list(words))},
        "behavior": "Isolated",
        "invert": False,
    }
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 0, "content": END_OF_TEXT, **flags, "special": True}],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [byte_level, cut]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "WordLevel",
            "vocab": dict(sorted(table.items(), key=lambda item: item[1])),
            # Not in the table: a cut that is no piece would be an error, never a wrong id.
            "unk_token": "",
        },
    }


def tokenizer_config() -> dict:
    """The content of tokenizer_config.json: what `AutoTokenizer` adds to the pipeline.

    Returns:
        The special token and the defaults.
    """
    return {
        "tokenizer_class": "TokenizersBackend",
        "backend": "tokenizers",
        "pad_token": END_OF_TEXT,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "add_bos_token": False,
        "add_eos_token": False,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": int(1e30),
    }


def build(vocabulary: Path, folder: Path) -> int:
    """Write tokenizer.json and tokenizer_config.json.

    Args:
        vocabulary: the vocabulary file.
        folder: where to; made if it does not exist. A model may be there, a tokenizer may not.

    Returns:
        The number of pieces.

    Raises:
        ValueError: a vocabulary that is none, or a folder that cannot be written to.
    """
    ids = read_vocabulary(vocabulary)
    present = [name for name in FILES if (folder / name).exists()]
    if present:
        raise ValueError(
            f"{folder}: expected a folder without a tokenizer, got one with {', '.join(present)}; "
            "choose another, or remove what is there."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = {"tokenizer.json": tokenizer_json(ids), "tokenizer_config.json": tokenizer_config()}
        for name, content in files.items():
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (folder / name).write_bytes(text.encode())
    except OSError as error:
        raise ValueError(
            f"{folder}: expected a folder to write to, got an error ({error.strerror}); "
            "choose another."
        ) from None
    return len(ids)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Build the RWKV World tokenizer from its vocabulary file."
    )
    parser.add_argument("vocabulary", type=Path, help="your copy of rwkv_vocab_v20230424.txt")
    parser.add_argument("folder", type=Path, help="where to; AutoTokenizer loads it from there")
    arguments = parser.parse_args()
    try:
        num_pieces = build(arguments.vocabulary, arguments.folder)
    except ValueError as error:
        sys.exit(f"{parser.prog}: {error}")
    print(f"{arguments.folder}: {num_pieces} pieces and {END_OF_TEXT} (id 0)")
