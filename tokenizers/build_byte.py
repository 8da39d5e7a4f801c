"""Write the files of tokenizers/byte: a byte-level tokenizer that needs no code of ours.

A byte-level BPE without merges maps every byte to one token. The vocabulary gives each of the 256
symbols that stand for bytes (GPT-2's alphabet, https://github.com/openai/gpt-2) the value of its
byte as id; pad, bos and eos follow. The JSON is written here rather than by `tokenizers`, so that
the files do not change with that library's version.

    python tokenizers/build_byte.py [FOLDER]
"""

import json
import sys
from pathlib import Path

SPECIAL = PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"


def byte_symbols() -> list[str]:
    """The printable character that stands for each byte in `tokenizers`' byte-level alphabet.

    A printable byte of Latin-1 stands for itself; the others take the code points from 256 on, in
    order.

    Returns:
        256 characters; position b is the symbol of byte b.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)]


def tokenizer_json() -> dict:
    """The content of tokenizer.json: what Hugging Face's `tokenizers` runs.

    Returns:
        The pipeline: no normaliser, no splitting into words, bytes to ids and back, nothing added.
    """
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": 256 + i, "content": token, **flags, "special": True}
            for i, token in enumerate(SPECIAL)
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            # The special tokens too: `tokenizer.vocab_size` is then 259, as a model needs it.
            "vocab": {symbol: i for i, symbol in enumerate([*byte_symbols(), *SPECIAL])},
            "merges": [],
        },
    }


def tokenizer_config() -> dict:
    """The content of tokenizer_config.json: what `AutoTokenizer` adds to the pipeline.

    Returns:
        The special tokens and the defaults; tokenizers/byte/README.md gives the reasons.
    """
    return {
        "tokenizer_class": "TokenizersBackend",
        "backend": "tokenizers",
        "pad_token": PAD,
        "bos_token": BOS,
        "eos_token": EOS,
        "add_bos_token": False,
        "add_eos_token": False,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": int(1e30),
    }


def build(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json.

    Args:
        folder: where to; made if it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {"tokenizer.json": tokenizer_json(), "tokenizer_config.json": tokenizer_config()}
    for name, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_bytes(text.encode())


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "byte")
