"""Models larger than the memory: what is written is the same as ever, and a file at a time."""

import contextlib
import ctypes
import gc
import json
import os
import re
import shutil
import signal
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from filelock import FileLock
from rwkv_files import authors_shapes, random_weights
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import zoo
from zoo.cli import main
from zoo.hub import tensors as reading
from zoo.hub.convert import convert, convert_back
from zoo.hub.export import export
from zoo.hub.files import new_folder
from zoo.hub.folder import open_tensors, read_tensors, weight_files
from zoo.hub.lazy import Lazy, are_equal

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
LARGE = {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8}
LARGE |= {"num_attention_heads": 8, "num_key_value_heads": 2}
MB = 1000**2
M_MMAP_THRESHOLD = -3  # of malloc.h


def mistral(dtype=torch.float32, seed=0, **fields):
    """A model with random weights, which transformers has too."""
    torch.manual_seed(seed)
    config = zoo.MODELS["sliding_window"].config(**SIZES | fields)
    return zoo.MODELS["sliding_window"].causal_lm(config).to(dtype)


def in_one_file(model, folder):
    model.save_pretrained(folder)


def in_shards(model, folder):
    model.save_pretrained(folder, max_shard_size="20KB")


def in_pickles(model, folder):
    """Two of them and their index; the second is in the format of before torch 1.6."""
    model.config.save_pretrained(folder)
    state = model.state_dict()
    names = {"a.bin": [n for n in state if "layers.0" in n]}
    names["b.bin"] = [n for n in state if "layers.0" not in n]
    for file, inside in names.items():
        part = {name: state[name] for name in inside}
        torch.save(part, folder / file, _use_new_zipfile_serialization=file == "a.bin")
    weight_map = {name: file for file, inside in names.items() for name in inside}
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def in_dcp(model, folder):
    """As FSDP's processes leave it, each with its part of every matrix; here there is one."""
    model.config.save_pretrained(folder)
    with pytest.warns(UserWarning, match="torch.distributed is"):
        dcp.save({"model": model.state_dict()}, checkpoint_id=folder / "shards", no_dist=True)


def with_adapter(model, folder):
    """A base, and what is added to it; the model's own weights become their sum."""
    base = folder.with_name("base")
    model.save_pretrained(base)
    model.config.save_pretrained(folder)
    (folder / "adapter").mkdir()
    added, state = {}, model.state_dict()
    for name in [n for n in state if n.endswith("q_proj.weight")]:
        place = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = torch.randn(4, state[name].shape[1]), torch.randn(state[name].shape[0], 4)
        added |= {f"{place}.lora_A.weight": a, f"{place}.lora_B.weight": b}
        state[name] += (b @ a * 2.0).to(state[name].dtype)
    save_file(added, folder / "adapter/adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": str(base)}
    (folder / "adapter/adapter_config.json").write_text(json.dumps(fields))


WAYS = (in_one_file, in_shards, in_pickles, in_dcp, with_adapter)


# Which names there are and what is in a tensor are matters of their own: each of each way.
@pytest.mark.parametrize(
    ("dtype", "tied"),
    [(torch.float32, False), (torch.bfloat16, True), (torch.float16, False)],
    ids=["float32", "bfloat16-tied", "float16"],
)
@pytest.mark.parametrize("way", WAYS)
def test_every_source_gives_the_model(way, tied, dtype, tmp_path):
    model = mistral(dtype, tie_word_embeddings=tied)
    (tmp_path / "checkpoint").mkdir()
    way(model, tmp_path / "checkpoint")
    expected = model.state_dict()
    for format in ("zoo", "native"):
        out = tmp_path / format
        export(tmp_path / "checkpoint", out, license="mit", max_shard_size="30KB", format=format)
        index = json.loads((out / "model.safetensors.index.json").read_text())
        files = sorted(set(index["weight_map"].values()))
        assert len(files) > 1 and files == sorted(x.name for x in out.glob("*.safetensors"))
        assert index["metadata"]["total_size"] == sum(
            load_file(out / file)[name].nbytes for name, file in index["weight_map"].items()
        )
        assert ("lm_head.weight" in index["weight_map"]) != tied
        loaded = AutoModelForCausalLM.from_pretrained(out)
        assert loaded.dtype == dtype
        if format == "zoo":
            found = loaded.state_dict()
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], x) for name, x in expected.items())
    convert("hf-mistral", tmp_path / "native", tmp_path / "back", max_shard_size="30KB")
    convert_back("hf-mistral", tmp_path / "back", tmp_path / "again", max_shard_size="30KB")
    for name in ("back", "again"):
        found, wanted = (read_tensors(tmp_path / x) for x in (name, "native"))
        wanted = wanted if name == "again" else read_tensors(tmp_path / "zoo")
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[n], x) and x.dtype == dtype for n, x in wanted.items())
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 1


@pytest.mark.parametrize(
    ("place", "wrapped"), [("pytorch_model_fsdp_0", True), ("", True), ("", False)]
)
@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_shards_of_other_trainers(place, wrapped, tmp_path):
    """accelerate's and the Trainer's are in a folder of theirs; anybody's are where they like."""
    model = mistral()
    folder = tmp_path / "checkpoint"
    model.config.save_pretrained(folder)
    state = {"model": model.state_dict(), "optimizer": {"state": torch.ones(3)}}
    state = state if wrapped else model.state_dict()
    dcp.save(state, checkpoint_id=folder / place, no_dist=True)
    export(folder, tmp_path / "out", license="mit")
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], x) for name, x in model.state_dict().items())
    assert [path.name for path in weight_files(folder)] == [".metadata", "__0_0.distcp"]
    # A whole model beside them is the model.
    another = mistral(seed=1)
    another.save_pretrained(folder)
    found = read_tensors(folder)
    assert all(torch.equal(found[name], x) for name, x in another.state_dict().items())
    (folder / "model.safetensors").unlink()
    for path in weight_files(folder):
        path.unlink()
    state = {"model": {"a": torch.ones(3).to(torch.float8_e5m2)}}
    dcp.save(state, checkpoint_id=folder / place, no_dist=True)
    with pytest.raises(ValueError, match=r"model\.a is float8_e5m2; save the weights as plain"):
        export(folder, tmp_path / "again", license="mit")


@contextlib.contextmanager
def measured():
    """Yields a list that gets the greatest number of bytes the process has grown by meanwhile."""

    def figure(name):
        return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    grown, libc = [], ctypes.CDLL("libc.so.6")
    gc.collect()
    # What is free goes back to the system, now and from now on: it is not to be taken unseen, nor
    # counted when nobody has it.
    libc.mallopt(M_MMAP_THRESHOLD, 1024**2)
    libc.malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except OSError as error:
        pytest.skip(f"the peak of memory cannot be asked for here: {error}")
    before = figure("VmRSS")
    yield grown
    grown.append(figure("VmHWM") - before)
    libc.mallopt(M_MMAP_THRESHOLD, 32 * 1024**2)  # to which it moves by itself


@pytest.fixture
def large(tmp_path_factory):
    """Folder of a model of 110 MB, in files of 20; read in pieces that are small for it."""
    folder = tmp_path_factory.mktemp("large")
    mistral(**LARGE).save_pretrained(folder, max_shard_size="20MB")
    return folder


def test_the_memory_is_of_a_file(large, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "AT_ONCE", 2 * MB)
    in_one_file(mistral(), tmp_path / "small")
    for name, source in (("dcp", large), ("small dcp", tmp_path / "small")):
        (tmp_path / name).mkdir()
        in_dcp(AutoModelForCausalLM.from_pretrained(source), tmp_path / name)
    shapes = authors_shapes("7", layers=6, width=512, mlp=2048, vocab=8192)
    torch.save(random_weights(shapes), tmp_path / "rwkv.pth")
    size = {"max_shard_size": "20MB"}
    ways = {
        "export": lambda source, out: export(source, out, license="mit", **size),
        "export from dcp": lambda _, out: export(tmp_path / "dcp", out, license="mit", **size),
        "rounded": lambda source, out: export(source, out, dtype="bfloat16", **size),
        "native": lambda source, out: export(source, out, format="native", **size),
        "reverse": lambda source, out: convert_back("hf-mistral", source, out, **size),
        "pth": lambda _, out: convert("rwkv-pth", tmp_path / "rwkv.pth", out, **size),
        "one file": lambda source, out: export(source, out, max_shard_size="1GB"),
    }
    for name, way in ways.items():
        if name == "export from dcp":
            export(tmp_path / "small dcp", tmp_path / f"{name} small", license="mit")
        elif name != "pth":
            way(tmp_path / "small", tmp_path / f"{name} small")  # code is loaded once
        seen = []
        # What the system took from the process meanwhile, such as a library's pages, counts when it
        # comes back: that is not so every time.
        for _ in range(3):
            with measured() as grown:
                way(large, tmp_path / name)
            seen += grown
            files = [path.stat().st_size for path in (tmp_path / name).glob("*.safetensors")]
            total, most = sum(files), max(files)
            assert total > (45 if name == "rounded" else 90) * MB, name
            shutil.rmtree(tmp_path / name)
            # A file's tensors, and the largest (17 MB) twice: read, and changed or put together.
            if name == "one file" or seen[-1] < 1.3 * most + 36 * MB:
                break
        if name == "one file":
            assert seen[0] > 90 * MB, "what is measured is not the memory"
        else:
            assert most <= 20 * MB and seen[-1] < 1.3 * most + 36 * MB, (name, seen)


def test_lazy_tensors_are_as_others(monkeypatch):
    """Of what converters do with tensors, the shapes are known at once, and values later."""
    x, reads = torch.randn(6, 4), []
    lazy = Lazy(x.to("meta"), lambda: reads.append(1) or x)
    changes = [
        lambda x: x.t().contiguous(),
        lambda x: x.chunk(3)[1],
        lambda x: x.unflatten(0, (2, 3)).unbind(1)[2].flatten(0, 1),
        lambda x: torch.stack([row.flatten() for row in x]),
        lambda x: (-x.double().clamp(1e-3, 0.9).log()).log().float(),
        lambda x: x[[2, 1, 0]][:, 1:],
        lambda x: torch.ones(2, 6) @ x * 2,
        lambda x: x.new_zeros(1, 3),
        lambda x: x.view(1, 1, -1).clone().bfloat16(),
    ]
    for change in changes:
        expected, later = change(x), change(lazy)
        assert not reads and type(later) is Lazy
        assert later.shape == expected.shape and later.dtype == expected.dtype
        assert later.stride() == expected.stride()
        assert torch.equal(later.read(), expected) and are_equal(later, expected)
        reads.clear()
    assert torch.allclose(lazy.double(), x.double()) and lazy[0, 0].item() == x[0, 0].item()
    assert not are_equal(lazy, x + 1) and reads
    with pytest.raises(RuntimeError, match="invalid for input of size 24"):
        lazy.view(5, 5)
    with pytest.raises(NotImplementedError, match="not read yet"):
        lazy.add_(1)


def test_tensors_in_one_piece_of_memory(tmp_path):
    """Untied, but the same numbers in the pickle; and parts of a larger tensor."""
    model = mistral()
    model.config.save_pretrained(tmp_path)
    state = dict(model.state_dict())
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    joined = torch.randn(64, 32)
    name = "model.layers.{}.mixer.q_proj.weight"
    state[name.format(0)], state[name.format(1)] = joined[:32], joined[16:48]
    torch.save(state, tmp_path / "pytorch_model.bin")
    export(tmp_path, tmp_path / "out", license="mit")
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], x) for name, x in state.items())


def test_a_compressed_pickle(tmp_path):
    """No mapping shows what is in it; it is read whole, and is right."""
    model = mistral()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "stored.zip")
    packed = zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "stored.zip") as stored, packed:
        for part in stored.infolist():
            packed.writestr(part.filename, stored.read(part))
    found = open_tensors(tmp_path)
    assert not any(isinstance(x, Lazy) for x in found.values())
    assert all(torch.equal(found[name], x) for name, x in model.state_dict().items())


def test_a_shard_that_is_damaged(tmp_path, capsys):
    """Its index is whole, so it is found only when it is read: nothing is left of the export."""
    (tmp_path / "checkpoint").mkdir()
    in_dcp(mistral(), tmp_path / "checkpoint")
    (shard,) = (tmp_path / "checkpoint/shards").glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    for format in ("zoo", "native"):
        arguments = ["export", str(tmp_path / "checkpoint"), str(tmp_path / "out")]
        assert main([*arguments, "--license", "mit", "--format", format]) == 2
        (error,) = capsys.readouterr().err.splitlines()
        start = f"zoo: error: {tmp_path / 'checkpoint'}"
        assert error.startswith(start) and error.count(start[12:]) == 1, error
        assert "damaged or incomplete" in error
        assert os.listdir(tmp_path) == ["checkpoint"]


def test_rounding_is_said(tmp_path, capsys):
    model = mistral()
    in_one_file(model, tmp_path / "a")
    ends = ["--license", "mit", "--dtype", "bfloat16"]
    assert main(["export", str(tmp_path / "a"), str(tmp_path / "b"), *ends]) == 0
    assert "the weights are rounded from float32 to bfloat16" in capsys.readouterr().out
    found = load_file(tmp_path / "b/model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(found[name], x.bfloat16()) for name, x in state.items())
    assert json.loads((tmp_path / "b/config.json").read_text())["dtype"] == "bfloat16"
    origin = json.loads((tmp_path / "b/longzoo.json").read_text())["origin"]
    assert origin["rounding"] == "from float32 to bfloat16"
    assert "rounded from float32 to bfloat16" in (tmp_path / "b/README.md").read_text()
    # To a wider dtype nothing is rounded; and what once was, is known ever after.
    back = ["convert", "hf-mistral", "--reverse", str(tmp_path / "b"), str(tmp_path / "c")]
    assert main([*back, "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert "float32, exactly as in" in out and "rounded" not in out
    origin = json.loads((tmp_path / "c/longzoo.json").read_text())["origin"]
    assert origin["rounding"] == "from float32 to bfloat16"
    assert all(
        x.dtype == torch.float32 for x in load_file(tmp_path / "c/model.safetensors").values()
    )
    forth = ["convert", "hf-mistral", str(tmp_path / "c"), str(tmp_path / "d")]
    assert main([*forth, "--dtype", "float16"]) == 0
    assert "float16, from" in capsys.readouterr().out
    origin = json.loads((tmp_path / "d/longzoo.json").read_text())["origin"]
    assert origin["is_rounded"]
    assert origin["rounding"] == "from float32 to bfloat16, then from float32 to float16"
    with pytest.raises(ValueError, match="dtype is float32, bfloat16, float16 or none.*'int8'"):
        export(tmp_path / "a", tmp_path / "e", dtype="int8")


@pytest.mark.parametrize("verb", ["export", "export --format native", "convert hf-mistral"])
def test_a_number_too_large_for_the_dtype(verb, tmp_path, capsys):
    model = mistral()
    with torch.no_grad():
        model.model.norm.weight[3] = 70000
    in_one_file(model, tmp_path / "a")
    if verb.startswith("convert"):
        convert_back("hf-mistral", tmp_path / "a", tmp_path / "theirs")
        shutil.rmtree(tmp_path / "a")
        (tmp_path / "theirs").rename(tmp_path / "a")
    ends = [] if verb.startswith("convert") else ["--license", "mit"]
    arguments = [*verb.split(), str(tmp_path / "a"), str(tmp_path / "b"), *ends]
    assert main([*arguments, "--dtype", "float16"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error == (
        f"zoo: error: {tmp_path / 'a'}: model.norm.weight holds 7e+04, which is beyond float16 "
        "(up to 6.55e+04); leave it float32, as it is."
    )
    assert os.listdir(tmp_path) == ["a"]
    assert main([*arguments, "--dtype", "bfloat16"]) == 0


def killed(act):
    """Runs something in a process that ends as one does which is killed."""
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            act()
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def fill(path, names, **options):
    """Writes a folder of some files of text."""
    with new_folder(path, **options) as new:
        for name in names:
            (new / name).write_text(f"new {name}")


def left(folder):
    return [path for path in folder.iterdir() if path.name.endswith(".unfinished")]


def test_what_a_killed_export_leaves_goes_next_time(tmp_path):
    def act():
        with new_folder(tmp_path / "out") as new:
            (new / "model.safetensors").write_text("half of it")
            kill()

    killed(act)
    (work,) = left(tmp_path)
    assert re.fullmatch(r"\.out\.[a-z0-9_]{8}\.unfinished", work.name)
    mine = tmp_path / ".out.mine.unfinished"
    mine.mkdir()  # of another's making, however much its name is like ours
    fill(tmp_path / "out.2", ["config.json"])
    assert sorted(left(tmp_path)) == sorted([work, mine])
    fill(tmp_path / "out", ["config.json"])
    assert left(tmp_path) == [mine]
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "longzoo.json"]


def test_two_exports_to_one_place(tmp_path):
    with new_folder(tmp_path / "out") as new:
        (new / "config.json").write_text("{}")
        with pytest.raises(ValueError, match="out is being written by another process; wait"):
            fill(tmp_path / "out", ["config.json"])
        fill(tmp_path / "beside", ["config.json"])
    assert sorted(os.listdir(tmp_path)) == ["beside", "out"]
    assert (tmp_path / "out/config.json").read_text() == "{}"


@pytest.mark.parametrize("after", range(1, 8))
def test_killed_between_two_files(after, tmp_path, monkeypatch):
    """Of three old files and four new ones: whoever comes next ends what was begun."""
    fill(tmp_path / "out", ["config.json", "model.safetensors"])
    names = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    replace, calls = os.replace, []

    def failing(source, target):
        calls.append(source)
        replace(source, target)
        if len(calls) == after:
            kill()

    monkeypatch.setattr("os.replace", failing)
    killed(lambda: fill(tmp_path / "out", names, overwrite=True))
    monkeypatch.undo()
    assert len(left(tmp_path)) == 1
    with pytest.raises(ValueError, match="exists and is not empty"):
        fill(tmp_path / "out", names)
    assert os.listdir(tmp_path) == ["out"]
    assert sorted(os.listdir(tmp_path / "out")) == sorted([*names, "longzoo.json"])
    for name in names:
        assert (tmp_path / "out" / name).read_text() == f"new {name}"


def test_moves_that_lead_elsewhere_are_not_made(tmp_path):
    work = tmp_path / ".out.01234567.unfinished"
    (work / "new").mkdir(parents=True)
    (work / "lock").touch()
    (work / "new/a").write_text("mine")
    moves = {"folder": "out", "old": ["../../b"], "new": ["a"]}
    (work / "moves.json").write_text(json.dumps(moves))
    with pytest.raises(ValueError, match="names files outside of its folder; remove"):
        fill(tmp_path / "out", ["config.json"])
    assert (work / "new/a").read_text() == "mine"
    with FileLock(work / "lock"):
        pass
