"""What somebody made to do harm, or a disk to look like it: one line that names the file, no more.

No code is run, no address asked, nothing written, no memory taken for what a file merely claims.
"""

import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import zoo
from zoo.cli import main
from zoo.hub.export import export

GOLDENS = Path(__file__).resolve().parent.parent / "parity" / "goldens"
BYTE = Path(__file__).resolve().parent.parent.parent / "tokenizers" / "byte"
SIZES = {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
MEMORY = 2 * 1024**3  # bytes that a refusal may take at most: of address space, so of anything
SECONDS = 20

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
GENERATION, CARD = "generation_config.json", "README.md"


class Evil:
    """Pickled, it writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def config(**changes):
    """Fields of config.json, changed."""

    def damage(folder):
        path = folder / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def write(name, content):
    """A file with other content."""

    def damage(folder):
        path = folder / name
        path.unlink(missing_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def replace(name, old, new):
    """A file whose text has another passage."""

    def damage(folder):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return damage


def directory(name):
    def damage(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return damage


def pipe(name):
    """A named pipe, which whoever opens it waits at."""

    def damage(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return damage


def device(name):
    """A link to what never ends."""

    def damage(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("/dev/zero")

    return damage


def huge(name):
    """100 GB of nothing, which lie on no disk."""

    def damage(folder):
        (folder / name).unlink(missing_ok=True)
        with open(folder / name, "wb") as file:
            file.truncate(100 * 10**9)

    return damage


def header(entries, content=b""):
    """model.safetensors with a header of one's own."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return write(WEIGHTS, struct.pack("<Q", len(text)) + text + content)


def tensor(shape, offsets, dtype="F32"):
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def weights(change):
    """model.safetensors with other tensors."""

    def damage(folder):
        tensors = load_file(folder / WEIGHTS)
        name = next(name for name in tensors if name.endswith("q_proj.weight"))
        save_file(change(tensors, name), folder / WEIGHTS)

    return damage


def index(**places):
    """An index beside the weights, instead of them."""

    def damage(folder):
        (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
        names = load_file(folder / "model-00001-of-00001.safetensors")
        mapped = dict.fromkeys(names, "model-00001-of-00001.safetensors") | places
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": mapped}))
        (folder.parent / "outside.safetensors").write_bytes(b"")

    return damage


def pickled(name, make):
    """Weights in a pickle instead."""

    def damage(folder):
        (folder / WEIGHTS).unlink(missing_ok=True)
        make(folder / name, folder.parent / "evil")

    return damage


def with_code(path, evil):
    torch.save({"x": torch.zeros(2), "y": Evil(evil)}, path)


def bare_code(path, evil):
    path.write_bytes(pickle.dumps(Evil(evil)))


def compressed(path, evil):
    """A file of 64 kB that unpacks to 64 MB."""
    stored = io.BytesIO()
    torch.save({"x": torch.zeros(256)}, stored)
    with zipfile.ZipFile(stored) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            if "/data/" not in name:
                new.writestr(name, old.read(name))
                continue
            with new.open(name, "w", force_zip64=True) as part:
                for _ in range(64):
                    part.write(bytes(1 << 20))


def expanded(path, evil):
    """One number, seen as 4 TB of them."""
    torch.save({"x": torch.zeros(1).expand(10**12)}, path)


def deep(path, evil):
    path.write_bytes(pickle.PROTO + b"\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")


OURS = [
    ("unknown field", config(rotary_tpye=1), CONFIG, "no field 'rotary_tpye'"),
    ("wrong type", config(hidden_size="32"), CONFIG, "hidden_size"),
    ("a truth for a number", config(rms_norm_eps=[1e-6]), CONFIG, "rms_norm_eps"),
    ("NaN", replace(CONFIG, "{", '{"x": NaN,'), CONFIG, "NaN"),
    ("infinity", replace(CONFIG, "{", '{"x": -Infinity,'), CONFIG, "Infinity"),
    ("a key twice", replace(CONFIG, "{", '{"vocab_size": 1,'), CONFIG, "'vocab_size' twice"),
    ("no UTF-8", write(CONFIG, b'{"a": "\xff\xfe"}'), CONFIG, "utf-8"),
    ("UTF-16", write(CONFIG, "{}".encode("utf-16")), CONFIG, "cannot be read as JSON"),
    ("empty", write(CONFIG, b""), CONFIG, "cannot be read as JSON"),
    ("a list", write(CONFIG, b"[1]"), CONFIG, "expected a JSON object, got list"),
    ("deep", write(CONFIG, b'{"a":' * 200_000), CONFIG, "nested too deep"),
    ("a number of a million digits", write(CONFIG, b'{"a":' + b"1" * 10**6), CONFIG, "digits"),
    ("a directory", directory(CONFIG), CONFIG, "missing"),
    ("a pipe", pipe(CONFIG), CONFIG, "missing"),
    ("a device", device(CONFIG), CONFIG, "missing"),
    ("100 GB", huge(CONFIG), CONFIG, "more than any such"),
    ("vocabulary of a trillion", config(vocab_size=10**12), "", "[1000000000000, 32] by the"),
    ("vocabulary beyond 64 bits", config(vocab_size=10**30), CONFIG, "vocab_size"),
    ("width of 2^62", config(hidden_size=2**62), CONFIG, "hidden_size"),
    ("a billion layers", config(num_hidden_layers=10**9), CONFIG, "num_hidden_layers"),
    ("a million heads", config(num_attention_heads=10**6), CONFIG, "multiple of"),
    ("fewer than no layers", config(num_hidden_layers=-3), CONFIG, "at least 1, got -3"),
    ("a vocabulary below nothing", config(vocab_size=-1), CONFIG, "vocab_size is at least 1"),
    ("no heads", config(num_attention_heads=0), CONFIG, "num_attention_heads"),
    ("a type that is a list", config(model_type=["zoo_retnet"]), CONFIG, "expected model_type"),
    ("a type that is a path", config(model_type="../evil"), CONFIG, "expected model_type"),
    ("a number of architectures", config(architectures=7), CONFIG, "expected a language model"),
    ("another head", config(architectures=["Evil"]), CONFIG, "expected a language model"),
    ("weights renamed", pickled(WEIGHTS, with_code), WEIGHTS, "not a readable safetensors file"),
    ("bare code renamed", pickled(WEIGHTS, bare_code), WEIGHTS, "not a readable safetensors file"),
    ("code", pickled("pytorch_model.bin", with_code), "pytorch_model.bin", "runs code"),
    ("bare code", pickled("pytorch_model.bin", bare_code), "pytorch_model.bin", "runs code"),
    ("code elsewhere", pickled("x.pth", with_code), "x.pth", "runs code"),
    (
        "a bomb",
        pickled("pytorch_model.bin", compressed),
        "pytorch_model.bin",
        "would unpack to 67,",
    ),
    ("4 TB of one number", pickled("x.pth", expanded), "x.pth", "would unpack to 4,000,"),
    ("a deep pickle", pickled("x.pth", deep), "x.pth", "damaged"),
    ("an empty pickle", pickled("x.pth", lambda path, _: path.touch()), "x.pth", "damaged"),
    ("no weights", lambda folder: (folder / WEIGHTS).unlink(), "", "found none"),
    ("empty weights", write(WEIGHTS, b""), WEIGHTS, "not a readable safetensors file"),
    ("half of a header", write(WEIGHTS, b"\x09"), WEIGHTS, "not a readable safetensors file"),
    ("a header of 2^60", write(WEIGHTS, struct.pack("<Q", 2**60) + b"{}"), WEIGHTS, "header"),
    ("a header of 90 MB", write(WEIGHTS, struct.pack("<Q", 9 * 10**7)), WEIGHTS, "header"),
    ("no JSON", header(b"{]"), WEIGHTS, "header"),
    ("a deep header", header(b'{"x":' * 100_000), WEIGHTS, "header"),
    ("a header of bytes", header(b"\xff\xff\xff"), WEIGHTS, "header"),
    ("a trillion numbers", header(tensor([10**12], [0, 8]), bytes(8)), WEIGHTS, "not a readable"),
    ("2^80 numbers", header(tensor([2**40, 2**40], [0, 8]), bytes(8)), WEIGHTS, "not a readable"),
    ("minus one number", header(tensor([-1], [0, 8]), bytes(8)), WEIGHTS, "not a readable"),
    ("offsets beyond", header(tensor([2], [2**40, 2**40 + 8]), bytes(8)), WEIGHTS, "not a read"),
    ("offsets backwards", header(tensor([2], [8, 0]), bytes(8)), WEIGHTS, "not a readable"),
    ("more than its header says", header(tensor([2], [0, 8]), bytes(99)), WEIGHTS, "not a readab"),
    ("a wrong shape", weights(lambda x, n: x | {n: x[n][:-1].clone()}), "", "by the config"),
    ("a wrong type", weights(lambda x, n: x | {n: x[n].long()}), "", "not a float"),
    ("one too few", weights(lambda x, n: {k: x[k] for k in x if k != n}), "", "fit: no "),
    ("one too many", weights(lambda x, n: x | {"evil": x[n].clone()}), "", "no place for evil"),
    ("weights that are a pipe", pipe(WEIGHTS), WEIGHTS, "is no file"),
    ("weights that are a device", device(WEIGHTS), WEIGHTS, "is no file"),
    ("weights that are a directory", directory(WEIGHTS), WEIGHTS, "is no file"),
    ("a shard outside", index(x="../outside.safetensors"), INDEX, "outside of its folder"),
    ("a shard at the root", index(x="/etc/passwd"), INDEX, "outside of its folder"),
    ("a shard below", index(x="a/b.safetensors"), INDEX, "outside of its folder"),
    ("a shard that is the folder", index(x="."), INDEX, "outside of its folder"),
    ("a shard that is missing", index(x="b.safetensors"), "b.safetensors", "is missing"),
    ("a shard with a zero byte", index(x="b\0.safetensors"), INDEX, "outside of its folder"),
    ("a shard of no name", index(x=7), INDEX, "no name of a file"),
    ("an index of nothing", write(INDEX, b"{}"), INDEX, ""),
    ("a tokenizer of garbage", write(TOKENIZER, b"\x00\xff"), TOKENIZER, "does not load"),
    ("a tokenizer of nothing", write(TOKENIZER, b"{}"), "", "does not load"),
    ("a deep tokenizer", write(TOKENIZER, b'{"a":' * 100_000), TOKENIZER, "does not load"),
    ("a tokenizer that is a pipe", pipe(TOKENIZER), TOKENIZER, "is no file"),
    ("a tokenizer that is a directory", directory(TOKENIZER), TOKENIZER, "is no file"),
    (
        "a tokenizer of code elsewhere",
        write(
            TOKENIZER_CONFIG,
            '{"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["a/b--c.Evil", null]}}',
        ),
        "tokenizer",
        "code",
    ),
    (
        "a tokenizer of code here",
        lambda folder: [
            write("evil.py", "import os\nos.mkdir('evil')\nclass Evil: pass\n")(folder),
            write(TOKENIZER_CONFIG, '{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}}')(folder),
        ],
        "tokenizer",
        "code",
    ),
    ("settings of garbage", write(GENERATION, b"{"), GENERATION, "cannot be read as JSON"),
    ("settings that are a list", write(GENERATION, b"[]"), GENERATION, "expected a JSON object"),
    ("settings that are a pipe", pipe(GENERATION), GENERATION, "is no file"),
    ("settings of a wrong type", write(GENERATION, b'{"top_k": "x"}'), GENERATION, ""),
]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Folders without damage: a checkpoint of ours, and what it is exported to."""
    folder = tmp_path_factory.mktemp("good")
    zoo.RetNetForCausalLM(zoo.RetNetConfig(**SIZES)).save_pretrained(folder / "ours")
    AutoTokenizer.from_pretrained(BYTE).save_pretrained(folder / "ours")
    export(folder / "ours", folder / "out", license="mit")
    return folder


@pytest.fixture(autouse=True)
def guarded(monkeypatch):
    """Nothing may ask the network, start a process, wait, or take much memory."""

    asked = []

    def refuse(*arguments, **_):
        asked.append(arguments)
        raise AssertionError(f"asked for {arguments}")

    def late(*_):
        raise AssertionError(f"not refused in {SECONDS} seconds")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr("builtins.input", refuse)
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    # Somebody may have caught what that raised.
    assert asked == []


def refused(capsys, folder, arguments, out=""):
    """The line with which a command refuses, after which all is as before.

    Args:
        out: what it may say before: a pattern.
    """
    names = sorted(str(path) for path in folder.rglob("*"))
    capsys.readouterr()
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert re.fullmatch(r"zoo: error: .+\n", said.err), said.err
    assert re.fullmatch(out, said.out) and len(said.err) < 1000
    assert sorted(str(path) for path in folder.rglob("*")) == names
    return said.err


def table(cases):
    names = ("damage", "file", "message")
    return pytest.mark.parametrize(names, [c[1:] for c in cases], ids=[c[0] for c in cases])


@table(OURS)
def test_export(good, tmp_path, capsys, monkeypatch, damage, file, message):
    monkeypatch.chdir(tmp_path)
    ours = shutil.copytree(good / "ours", tmp_path / "ours")
    damage(ours)
    error = refused(capsys, tmp_path, ["export", "ours", "out", "--license", "mit"])
    assert f"ours/{file}".rstrip("/") in error or file in error, error
    assert message in error, error


# What the command does with a config or weights of others, where that differs from the above.
THEIRS = [
    ("unknown field", config(evil=1), CONFIG, "fields this converter does not know: evil = 1"),
    ("a string for a number", config(hidden_size="64"), "", "hidden_size"),
    ("a list for a number", config(num_heads=[4]), "", ""),
    ("nothing for a number", config(num_heads=None), "", ""),
    ("no heads", config(num_heads=0), "", ""),
    ("fewer than no heads", config(num_heads=-4), "", ""),
    ("NaN", replace(CONFIG, "{", '{"x": NaN,'), CONFIG, "NaN"),
    ("a key twice", replace(CONFIG, "{", '{"hidden_size": 1,'), CONFIG, "'hidden_size' twice"),
    ("deep", write(CONFIG, b'{"a":' * 200_000), CONFIG, "nested too deep"),
    ("empty", write(CONFIG, b""), CONFIG, "cannot be read as JSON"),
    ("a list", write(CONFIG, b"[]"), CONFIG, "expected a JSON object"),
    ("a directory", directory(CONFIG), CONFIG, "is no file"),
    ("a pipe", pipe(CONFIG), CONFIG, "is no file"),
    ("a device", device(CONFIG), CONFIG, "is no file"),
    ("vocabulary of a trillion", config(vocab_size=10**12), "", "[1000000000000, 64] by the"),
    ("vocabulary beyond 64 bits", config(vocab_size=10**30), CONFIG, "vocab_size is beyond"),
    ("width of 2^39", config(hidden_size=2**39), "", ""),
    ("a billion layers", config(num_hidden_layers=10**9), CONFIG, "num_hidden_layers"),
    ("thousands of layers", config(num_hidden_layers=9_999), "", ""),
    ("a type that is a list", config(model_type=["retnet"]), "", "expects"),
    ("another type", config(model_type="../retnet"), "", "expects"),
    ("weights renamed", pickled(WEIGHTS, with_code), WEIGHTS, "not a readable safetensors file"),
    ("code", pickled("pytorch_model.bin", with_code), "pytorch_model.bin", "runs code"),
    ("a bomb", pickled("pytorch_model.bin", compressed), "pytorch_model.bin", "would unpack to"),
    ("4 TB of one number", pickled("pytorch_model.bin", expanded), "pytorch_model.bin", "unpack"),
    ("a wrong shape", weights(lambda x, n: x | {n: x[n][:-1].clone()}), "", ""),
    ("one dimension more", weights(lambda x, n: x | {n: x[n][None].clone()}), "", ""),
    ("one too many", weights(lambda x, n: x | {"evil": x[n].clone()}), "", "nothing uses evil"),
    ("a shard outside", index(x="../outside.safetensors"), INDEX, "outside of its folder"),
    ("weights that are a pipe", pipe(WEIGHTS), WEIGHTS, "is no file"),
    ("a tokenizer of garbage", write(TOKENIZER, b"\x00\xff"), TOKENIZER, "does not load"),
    ("a tokenizer that is a pipe", pipe(TOKENIZER), TOKENIZER, "is no file"),
    ("settings of garbage", write(GENERATION, b"{"), GENERATION, "cannot be read as JSON"),
]


@table(THEIRS)
@pytest.mark.parametrize("format", ["fla-retnet", "--auto"])
def test_convert(tmp_path, capsys, monkeypatch, format, damage, file, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs").mkdir()
    for name in (CONFIG, WEIGHTS):
        shutil.copyfile(GOLDENS / "retnet-fla" / name, tmp_path / "theirs" / name)
    damage(tmp_path / "theirs")
    recognised = "(theirs: .+\n)?" if format == "--auto" else ""
    error = refused(capsys, tmp_path, ["convert", format, "theirs", "out"], recognised)
    # Where nothing is recognised, a line says so, and not what is wrong.
    assert "theirs" in error and (format == "--auto" or file in error and message in error), error


PTH = [
    ("code", with_code, "runs code"),
    ("bare code", bare_code, "runs code"),
    ("a bomb", compressed, "would unpack to"),
    ("4 TB of one number", expanded, "would unpack to 4,000,"),
    ("nothing", lambda path, _: path.touch(), "damaged"),
    ("a list", lambda path, _: torch.save([1, 2], path), "expected a dict of tensors, got list"),
    ("names that are numbers", lambda path, _: torch.save({7: torch.zeros(2)}, path), "expect"),
    ("a pipe", lambda path, _: os.mkfifo(path), ""),
    ("a device", lambda path, _: path.symlink_to("/dev/zero"), ""),
    ("a directory", lambda path, _: path.mkdir(), ""),
    ("a zip of other things", lambda path, _: zipfile.ZipFile(path, "w").close(), "damaged"),
]


@pytest.mark.parametrize("format", ["rwkv-pth", "--auto"])
@pytest.mark.parametrize(("make", "message"), [c[1:] for c in PTH], ids=[c[0] for c in PTH])
def test_convert_pth(tmp_path, capsys, monkeypatch, format, make, message):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "theirs.pth", tmp_path / "evil")
    recognised = "(theirs.pth: .+\n)?" if format == "--auto" else ""
    error = refused(capsys, tmp_path, ["convert", format, "theirs.pth", "out"], recognised)
    assert "theirs.pth" in error and message in error, error


def adapter(weights=None, **changes):
    """A checkpoint that holds an adapter on a model beside it."""

    def damage(folder):
        base = folder.rename(folder.parent / "base")
        (folder / "adapter").mkdir(parents=True)
        shutil.copyfile(base / CONFIG, folder / CONFIG)
        fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "base"}
        text = json.dumps(fields | changes)
        (folder / "adapter" / "adapter_config.json").write_text(text)
        name = "base_model.model.model.layers.0.mixer.q_proj.lora_{}.weight"
        tensors = {name.format("A"): torch.zeros(2, 32), name.format("B"): torch.zeros(32, 2)}
        changed = {name.format(letter): x for letter, x in (weights or {}).items()}
        path = folder / "adapter" / "adapter_model.safetensors"
        save_file({n: x for n, x in (tensors | changed).items() if x is not None}, path)

    return damage


def circle(folder):
    """An adapter on an adapter on the first."""
    adapter(base_model_name_or_path="other")(folder)
    other = shutil.copytree(folder, folder.parent / "other")
    replace("adapter/adapter_config.json", '"other"', '"ours"')(other)


def shards(content):
    """A checkpoint in shards, whose index is a pickle."""

    def damage(folder):
        (folder / WEIGHTS).unlink()
        (folder / "shards").mkdir()
        if isinstance(content, bytes):
            (folder / "shards" / ".metadata").write_bytes(content)
        else:
            content(folder / "shards" / ".metadata", folder.parent / "evil")

    return damage


RUNS = [
    ("on no rank", adapter(r=0), "adapter", "got 4 and 0"),
    ("of a rank that is a word", adapter(r="x"), "adapter", "got 4 and 'x'"),
    ("of another kind", adapter(peft_type="EVIL"), "adapter", "expected a plain LoRA adapter"),
    ("half of it", adapter({"B": None}), "adapter", "no counterpart"),
    ("of another rank", adapter({"B": torch.zeros(32, 3)}), "adapter", "no counterpart"),
    ("of another width", adapter({"A": torch.zeros(2, 31)}), "adapter", "no place in the model"),
    ("on nothing", adapter(base_model_name_or_path=7), "", "which is no folder here"),
    ("on what is not here", adapter(base_model_name_or_path="../../x"), "", "no folder here"),
    ("on itself", adapter(base_model_name_or_path="ours"), "", "on itself"),
    ("on one another", circle, "", "on itself"),
    ("shards of nothing", shards(b""), "shards", "damaged or incomplete"),
    ("shards of code", shards(bare_code), "shards", "names posix.mkdir"),
    ("shards of a zip file", shards(b"PK\x03\x04"), "shards", "damaged or incomplete"),
]


@table(RUNS)
def test_checkpoints_of_runs(good, tmp_path, capsys, monkeypatch, damage, file, message):
    monkeypatch.chdir(tmp_path)
    damage(shutil.copytree(good / "ours", tmp_path / "ours"))
    error = refused(capsys, tmp_path, ["export", "ours", "out", "--license", "mit"])
    assert "ours" in error and file in error and message in error, error


@pytest.mark.parametrize("name", ["longzoo.json", "run.json", "metrics.jsonl", CARD])
@pytest.mark.parametrize("damage", [pipe, device, directory, lambda name: write(name, b"\xff{[")])
def test_records_that_are_none_say_nothing(good, tmp_path, monkeypatch, name, damage):
    """What is worth reading, but not worth failing for."""
    monkeypatch.chdir(tmp_path)
    damage(name)(shutil.copytree(good / "ours", tmp_path / "ours"))
    assert main(["export", "ours", "out", "--license", "mit"]) == 0


# It asks any class of transformers, and reads no tokenizer and no settings.
NOT_IN_CONTRACT = ("a number of architectures", "another head", "a wrong type", "one too many")
NOT_IN_CONTRACT += ("unknown field", "NaN", "infinity")  # where that is allowed, for others
NOT_IN_CONTRACT += tuple(case[0] for case in OURS if "tokenizer" in case[0] or GENERATION in case)


@table([case for case in OURS if case[0] not in NOT_IN_CONTRACT])
def test_contract(good, tmp_path, capsys, monkeypatch, damage, file, message):
    monkeypatch.chdir(tmp_path)
    damage(shutil.copytree(good / "ours", tmp_path / "ours"))
    names = sorted(str(path) for path in tmp_path.rglob("*"))
    capsys.readouterr()
    assert main(["contract", "ours", "--points", "4"]) == 2
    said = capsys.readouterr()
    assert re.fullmatch(r"zoo contract: .*ours.*\n", said.err) and said.out == "", said
    assert sorted(str(path) for path in tmp_path.rglob("*")) == names


IN_INFO = ("config", "NaN", "deep", "a pipe", "100 GB", "vocabulary beyond 64 bits")
IN_INFO += ("width of 2^62", "a billion layers", "fewer than no layers", "a type that is a list")


@table([case for case in OURS if case[0] in IN_INFO])
def test_info(good, tmp_path, capsys, monkeypatch, damage, file, message):
    monkeypatch.chdir(tmp_path)
    damage(shutil.copytree(good / "ours", tmp_path / "ours"))
    error = refused(capsys, tmp_path, ["info", "ours"])
    assert f"ours/{file}" in error, error


CODE = "retnet.py"
PUSHED = [
    ("code elsewhere", config(auto_map={"AutoModel": "a/b--c.Evil"}), CONFIG, "'a/b--c.Evil'"),
    ("code above", config(auto_map={"AutoModel": "../evil.Evil"}), CONFIG, "'../evil.Evil'"),
    ("code of no name", config(auto_map={"AutoModel": 7}), CONFIG, "auto_map names '7'"),
    ("code in a list", config(auto_map=["evil.Evil"]), CONFIG, "auto_map"),
    ("no code", config(auto_map={}), "", "no auto_map in config.json"),
    ("code that is missing", lambda folder: (folder / CODE).unlink(), CODE, "is missing"),
    ("code that is a pipe", pipe(CODE), CODE, "is missing"),
    ("code that is a link outside", lambda folder: link(folder / CODE), CODE, "leads out of the"),
    ("weights that are one", lambda folder: link(folder / WEIGHTS), WEIGHTS, "leads out of the"),
    ("a config that is one", lambda folder: link(folder / CONFIG), CONFIG, "leads out of the"),
    ("weights renamed", pickled(WEIGHTS, with_code), WEIGHTS, "not a readable safetensors file"),
    (
        "code for weights",
        pickled("pytorch_model.bin", with_code),
        "pytorch_model.bin",
        "other names",
    ),
    ("a wrong shape", weights(lambda x, n: x | {n: x[n][:-1].clone()}), "", "by the config"),
    ("one too few", weights(lambda x, n: {k: x[k] for k in x if k != n}), "", "fit: no "),
    ("a wrong type", weights(lambda x, n: x | {n: x[n].long()}), WEIGHTS, "not a plain float"),
    ("a shard outside", index(x="../outside.safetensors"), INDEX, "outside of its folder"),
    ("unknown field", config(rotary_tpye=1), CONFIG, "no field 'rotary_tpye'"),
    ("a billion layers", config(num_hidden_layers=10**9), CONFIG, "num_hidden_layers"),
    ("NaN", replace(CONFIG, "{", '{"x": NaN,'), CONFIG, "NaN"),
    ("a pipe", pipe(CONFIG), CONFIG, "is no file"),
    ("a tokenizer of garbage", write(TOKENIZER, b"\x00\xff"), TOKENIZER, "does not load"),
    (
        "a tokenizer of code",
        write(TOKENIZER_CONFIG, b'{"auto_map": {"AutoTokenizer": ["a--b.C"]}}'),
        TOKENIZER_CONFIG,
        "code of its own",
    ),
    ("a tokenizer that is a pipe", pipe(TOKENIZER), TOKENIZER, "is no file"),
    ("a card of bytes", write(CARD, b"\xff\xff"), "", "no README.md"),
    ("a card that is a pipe", pipe(CARD), "", "no README.md"),
    ("a card of other YAML", write(CARD, "---\nlicense: [\n---\n"), CARD, "cannot be read"),
    ("a card that runs code", write(CARD, "---\na: !!python/name:os.mkdir\n---\n"), CARD, "cannot"),
    ("an odd license", write(CARD, "---\nlicense: 'a: b'\n---\n"), CARD, "has license 'a: b'"),
    ("an odd base", write(CARD, "---\nbase_model: ../a\n---\n"), CARD, "has base_model '../a'"),
    ("a key twice", replace(CONFIG, "{", '{"vocab_size": 1,'), CONFIG, "'vocab_size' twice"),
]


def link(path):
    """A file moves out of its folder, and a link stays."""
    path.rename(path.parent.parent / path.name)
    path.symlink_to(path.parent.parent / path.name)


@table(PUSHED)
def test_push(good, tmp_path, capsys, monkeypatch, damage, file, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    damage(shutil.copytree(good / "out", tmp_path / "pushed"))
    error = refused(capsys, tmp_path, ["push", "pushed", "me/tiny"])
    assert "pushed" in error or file == CARD, error
    assert file in error and message in error, error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "ours", "out", "--license", "mit\nbase_model: evil/x"], "did you mean"),
        (["export", "ours", "out", "--license", "[mit"], "got '[mit', did you mean mit?"),
        (["export", "ours", "out", "--license", ""], "or other, for any license"),
        (["export", "ours", "out", "--license", "mit", "--base-model", "a/b\nc: d"], "owner/name"),
        (["export", "ours", "out", "--license", "mit", "--base-model", "../../x"], "owner/name"),
        (["export", "ours", "out", "--license", "mit", "--max-shard-size", "-1"], ""),
        (["export", "ours", "out", "--license", "mit", "--max-shard-size", "x"], ""),
        (["export", "ours", "ours/out", "--license", "mit"], None),
        (["export", "ours", ".", "--license", "mit"], "contains the checkpoint itself"),
        (["export", "ours", "ours/config.json", "--license", "mit"], "is a file"),
        (["push", "out", "me/a b"], "me/a b"),
        (["push", "out", "me/tiny\nx"], "me/tiny"),
        (["push", "out", "../../etc"], "etc"),
        (["info", "../" * 50 + "etc"], "etc"),
        (["convert", "fla-retnet", "ours", "out"], "ours"),
        (["convert", "../fla-retnet", "ours", "out"], "unknown format"),
    ],
)
def test_names(good, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    shutil.copytree(good / "ours", tmp_path / "ours")
    if arguments[0] == "push":
        shutil.copytree(good / "out", tmp_path / "out")
    if message is None:
        assert main(arguments) == 0
        return
    assert message in refused(capsys, tmp_path, arguments)


def test_code_elsewhere_in_a_checkpoint_is_replaced_by_ours(good, tmp_path, monkeypatch):
    """What somebody fine-tuned with code of the Hub says so: its export brings our own."""
    monkeypatch.chdir(tmp_path)
    ours = shutil.copytree(good / "ours", tmp_path / "ours")
    config(auto_map={"AutoConfig": "a/b--c.Evil", "AutoModel": "a/b--c.Evil"})(ours)
    assert main(["export", "ours", "out", "--license", "mit"]) == 0
    places = json.loads((tmp_path / "out" / CONFIG).read_text())["auto_map"]
    assert {place.split(".")[0] for place in places.values()} == {"retnet"}


def test_a_link_into_a_cache_is_no_attack(good, tmp_path, monkeypatch):
    """The Hub's cache is made of links."""
    monkeypatch.chdir(tmp_path)
    ours = shutil.copytree(good / "ours", tmp_path / "ours")
    for name in (CONFIG, WEIGHTS, TOKENIZER):
        link(ours / name)
    assert main(["export", "ours", "out", "--license", "mit"]) == 0
