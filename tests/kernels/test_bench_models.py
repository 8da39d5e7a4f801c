"""The benchmark of whole models: its arithmetic, and a run of it at a tiny size."""

import json
import weakref
from types import SimpleNamespace

import pytest
import torch

from zoo import MODELS
from zoo.kernels.bench import models
from zoo.kernels.bench.cpu_models import contenders, measuring, peers, tables, tasks

SIZE = contenders.QUICK["2 x 128"]


def test_every_architecture_is_in_a_group():
    names = [x for group in contenders.GROUPS.values() for x in group]
    assert sorted(x for x in names if x in MODELS) == sorted(MODELS)
    assert contenders.GROUPS.keys() == contenders.PEERS.keys()


def test_all_are_as_large_as_mistral():
    """Embeddings and output projection aside; Mamba2 has layers of one kind, and no MLP to fit."""
    size = contenders.SIZES["6 x 512"]
    wanted = contenders.without_embeddings(contenders.on_meta(contenders.MISTRAL, size, size.mlp))
    for name in [x for group in contenders.GROUPS.values() for x in group]:
        mlp = contenders.mlp_width(name, size)
        found = contenders.without_embeddings(contenders.on_meta(name, size, mlp))
        assert abs(found / wanted - 1) < (0.03 if name == "transformers Mamba2" else 0.01), name


def test_floor_of_a_step():
    """By hand: every weight but the embeddings, a row of those, the state read and written."""
    model = contenders.Contender("rwkv4", SIZE)
    with torch.inference_mode():
        cache = model.prompt(torch.ones(1, 5, dtype=torch.long), 3)
        again = model.prompt(torch.ones(1, 5, dtype=torch.long), 1)
        other = model.read(torch.ones(1, 5, dtype=torch.long))
    # Read once, and no copy of another's.
    states = [x.layers[1].tensors["num_ND"] for x in (cache, again, other)]
    assert torch.equal(states[0][1:2], states[2]) and torch.equal(states[1], states[2])
    assert states[0].shape[0] == 3 and states[1].shape[0] == 1
    table = SIZE.vocab * SIZE.width
    state = SIZE.layers * 5 * SIZE.width  # two shifted tokens and three numbers of the recurrence
    expected = model.parameters - table + 3 * SIZE.width + 3 * 2 * state
    assert model.decode_bytes(5, 3, cache) == 4 * expected


def test_floors_of_the_same_model_are_the_same():
    """Ours and transformers', and a peer's, which gives no cache to look at."""
    ids = torch.ones(1, 5, dtype=torch.long)
    ours, theirs = (contenders.Contender(x, SIZE) for x in ("rwkv4", "transformers RWKV-4"))
    with torch.inference_mode():
        caches = [x.prompt(ids, 2) for x in (ours, theirs)]
    found = [x.decode_bytes(5, 2, cache) for x, cache in zip((ours, theirs), caches)]
    assert found[0] == found[1] == ours.decode_bytes(5, 2)
    assert ours.flops(32, False) == theirs.flops(32, False)
    pair = [contenders.Contender(x, SIZE) for x in ("sliding_window", contenders.MISTRAL)]
    with torch.inference_mode():
        cache = pair[0].prompt(ids, 2)
    assert pair[0].decode_bytes(5, 2, cache) == pair[1].decode_bytes(5, 2)
    assert pair[0].flops(32, True) == pair[1].flops(32, True)


def test_floor_of_a_window_is_what_it_has_seen():
    """Not its ring, which may have room for more; nor the head's weights twice where it is tied."""
    tied = contenders.Contender("transformer_xl", SIZE)
    window = contenders.Contender("sliding_window", SIZE)
    with torch.inference_mode():
        ids = torch.ones(1, 5, dtype=torch.long)
        a, b = (x.decode_bytes(5, 1, x.read(ids)) for x in (tied, window))
    keys = SIZE.layers * 2 * 5 * SIZE.width
    assert b == 4 * (window.parameters - SIZE.vocab * SIZE.width + SIZE.width + keys)
    assert a <= 4 * (tied.parameters + keys)


def test_flops_of_a_prefill_have_one_head():
    model = contenders.Contender("retnet", SIZE)
    whole = model.model.flops_per_token(64) * 64
    assert model.flops(64, True) == 3 * whole
    assert model.flops(64, False) == whole - 63 * 2 * SIZE.vocab * SIZE.width


def test_medians_quartiles_and_ratios():
    """The ratio is of the same rounds: what else runs on the machine slows both sides."""
    found = tasks.figures([1.0, 2.0, 4.0], [2.0, 3.0, 16.0])
    assert found == {"seconds": 2.0, "quartiles": [1.5, 3.0], "samples": 3, "ratio": 2.0}
    assert tasks.figures([3.0], [])["quartiles"] == [3.0, 3.0]
    # Who sat rounds out is compared in those that both have run.
    assert tasks.figures([2.0], [4.0, 100.0])["ratio"] == 2.0


def test_turns_take_turns(monkeypatch):
    clock, ran = [0.0], []
    monkeypatch.setattr(tasks.time, "process_time", lambda: clock[0])

    def turn(name, seconds):
        def run():
            ran.append(name)
            clock[0] += seconds
            if name == "breaks":
                raise RuntimeError("no such operator\nmore")
            return seconds

        return run

    turns = {"a": turn("a", 1), "slow": turn("slow", 30), "breaks": turn("breaks", 1)}
    found = tasks.in_turns(turns, 3, 20)
    assert ran == ["a", "slow", "breaks", "a", "a"]
    assert found == {"a": [1, 1, 1], "slow": [30], "breaks": "RuntimeError: no such operator"}


def test_what_cannot_be_run_is_told_and_the_others_go_on(monkeypatch):
    """A state that is too large, say."""
    monkeypatch.setattr(contenders, "LARGEST", 10**5)
    monkeypatch.setattr(measuring, "matrix_vector", lambda x: tasks.matrix_vector(x, 256))
    small = SIZE._replace(layers=1)
    both = {name: contenders.Contender(name, small) for name in ("rwkv4", "longnet")}
    by = measuring.measure("step 8", both, torch.float32, 1)["by"]
    assert by["rwkv4"]["seconds"] > 0
    assert by["longnet"]["failed"].startswith("MemoryError: the state of 8 texts takes")


def test_share_of_a_ceiling():
    contender = SimpleNamespace(flops=lambda length, is_training: 6e9 if is_training else 2e9)
    assert measuring.share("prefill", contender, 0.5, 1e10, None) == {"floor": 0.2, "share": 0.4}
    assert measuring.share("training", contender, 1.0, 1e10, None)["share"] == 0.6
    contender = SimpleNamespace(decode_bytes=lambda length, rows, cache: rows * 1e8)
    turn = SimpleNamespace(cache=lambda: None)
    assert measuring.share("step 8", contender, 0.1, 1e10, turn)["share"] == pytest.approx(0.8)
    assert measuring.share("generate 8", contender, 0.1, 1e10, turn) == {}


@pytest.mark.parametrize("version", [4, 7])
def test_the_package_gets_our_weights(version):
    """All of them, under the names that our converter reads."""
    from zoo.hub.convert import Weights, rwkv_pth

    model = contenders.Contender(f"rwkv{version}", SIZE).model
    for x in model.parameters():
        torch.nn.init.normal_(x)
    weights = Weights(tensors=peers.authors_tensors(model), others={})
    back = dict(rwkv_pth.read_weights(weights, model.config))
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[name], x) for name, x in model.state_dict().items())


def test_llama_cpp_gets_our_weights():
    """Names and shapes that it reads; where its package is, logits are compared before timing."""
    from zoo.kernels.bench.cpu_models import gguf_files

    # As wide as ranks of adapters differ.
    model = contenders.Contender("rwkv7", SIZE._replace(width=768, vocab=64, mlp=64)).model
    assert model.config.value_lora_rank != model.config.rate_lora_rank
    found = gguf_files.rwkv7_tensors(model)
    per_layer = {x.removeprefix("blk.1.") for x in found if x.startswith("blk.1.")}
    assert per_layer == {x.removeprefix("blk.0.") for x in found if x.startswith("blk.0.")}
    assert len(per_layer) == 28 and len(found) == 2 * 28 + 6
    shift = found["blk.1.time_mix_lerp_fused.weight"]
    assert shift.shape == (6, 1, 1, 768)
    assert torch.equal(shift[2, 0, 0], model.model.layers[1].mixer.mu[2])
    decay = model.model.layers[1].mixer.decay
    assert torch.equal(found["blk.1.time_mix_w1.weight"], decay.a.T)
    assert torch.equal(found["blk.1.time_mix_w0.weight"], decay.bias)
    # The first layer's residual is not used; it is as wide as the rate's adapter, or not read.
    ranks = [found[f"blk.{i}.time_mix_v1.weight"].shape[0] for i in range(2)]
    assert ranks == [model.config.rate_lora_rank, model.config.value_lora_rank]

    # Heads are rotated by neighbours there: dimension 0, the half's first, 1, ...
    model = contenders.Contender(contenders.MISTRAL, SIZE).model
    own = model.model.layers[0].self_attn.q_proj.weight
    theirs = gguf_files.mistral_tensors(model)["blk.0.attn_q.weight"]
    assert torch.equal(theirs[:4], own[[0, 32, 1, 33]])


@pytest.mark.parametrize("name", [x for group in contenders.PEERS.values() for x in group])
def test_what_is_not_installed_is_told(name, monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda module: None)
    assert "pip install" in peers.missing(name) and peers.missing(name).startswith(name)


def record_of(**by):
    """A result file with one case of a step at the large size."""
    cases = {"12 x 768, float32, step 1, rwkv": {"commit": "abc", "by": by}}
    cases["12 x 768, float32, step 1, rwkv"]["ceilings"] = {"vector float32": 2e10}
    model = {"12 x 768, rwkv4": {"parameters": 169383936, "mlp": 3072}}
    return {"device": "CPU", "versions": {"torch": "2"}, "models": model, "cases": cases}


def test_table_marks_what_misses_a_target():
    mistral = {"seconds": 0.030, "ratio": 1.0}
    fast = {"seconds": 0.024, "ratio": 1.25, "share": 0.8}
    slow = {"seconds": 0.0375, "ratio": 0.8, "share": 0.65}
    near = {"seconds": 0.029, "ratio": 1.03, "share": 0.69}
    package = {"seconds": 0.0276, "ratio": 1.09}
    by = {tables.MISTRAL: mistral, "rwkv4": fast, "rwkv7": slow, "retnet": near}
    by |= {"rwkv package RWKV-4": package, "rwkv package RWKV-7": package}
    by["longnet"] = {"failed": "RuntimeError: x"}
    text = tables.tables(record_of(**by))
    lines = text.splitlines()
    assert "| rwkv4 | 169.4 |  | 24; 1.25; 80% |  |  |  |  |" in lines
    assert "| rwkv7 |  |  | **37.5; 0.80; 65%** |  |  |  |  |" in lines
    assert "| retnet |  |  | **29; 1.03; 69%** |  |  |  |  |" in lines
    assert "| longnet |  |  | failed |  |  |  |  |" in lines
    where = "12 x 768, float32"
    assert f"| a step at 70% of its floor | {where} | 1 of 3 | rwkv7 0.65, retnet 0.69 |" in lines
    assert f"| no slower than Mistral, step | {where} | 2 of 3 | rwkv7 0.80 |" in lines
    assert f"| the `rwkv` package's speed, step | {where} | 1 of 2 | rwkv7 0.74 |" in lines
    assert "vector float32 20.0 GB/s" in text and "commit abc" in text


def test_table_of_what_compiling_gives():
    by = {tables.MISTRAL: {"seconds": 0.03, "ratio": 1.0}, "rwkv7": {"seconds": 0.03, "ratio": 1.0}}
    record = record_of(**by)
    entry = {"commit": "abc", "ceilings": {}, "by": by | {"rwkv7 compiled": {"seconds": 0.02}}}
    record["cases"]["6 x 512, float32, step 1, compiled"] = entry
    lines = tables.tables(record).splitlines()
    assert lines[-1] == "| rwkv7 | 6 x 512, float32 | step, ms | 30 | 20 | 1.50 |"
    # And no row of its own among the others.
    assert not any("6 x 512" in line for line in lines[:-1])


def test_the_readme_has_the_results():
    """If not: python kernels/bench/models.py --table"""
    text = tables.README.read_text()
    assert text.count("<!-- models -->") == text.count("<!-- end of models -->") == 1
    if models.RESULTS.exists():
        assert tables.with_tables(text, json.loads(models.RESULTS.read_text())) == text


def test_a_group_is_gone_when_the_next_is_built(tmp_path, monkeypatch):
    """Two at once would not fit in memory."""
    alive = []

    def measure(task, found, dtype, rounds):
        alive.append([x for x in known if x() is not None])
        known.extend(weakref.ref(x.model) for x in found.values())
        return {"ceilings": {}, "by": {name: {"seconds": 1.0} for name in found}}

    known = []
    monkeypatch.setattr(models, "measure", measure)
    models.main(["--quick", "--only", "rwkv4,retnet", "--tasks", "step 1", "--dtypes", "float32"])
    assert alive == [[], []] and len(known) == 4


@pytest.mark.slow
def test_a_run_and_going_on(tmp_path, monkeypatch, capsys):
    """Every task of one architecture and a peer; what is there already is not run again."""
    monkeypatch.setattr(models, "commit", lambda: "abc")
    monkeypatch.setattr(measuring, "matrix_vector", lambda x: tasks.matrix_vector(x, 256))
    monkeypatch.setattr(measuring, "matrix_product", lambda x: tasks.matrix_product(x, 128))
    path = tmp_path / "models.json"
    arguments = ["--quick", "--output", str(path), "--dtypes", "float32"]
    models.main([*arguments, "--only", "rwkv7", "--tasks", "prefill,step 1"])
    record = json.loads(path.read_text())
    assert list(record["cases"]) == [f"2 x 128, float32, {x}, rwkv" for x in ("prefill", "step 1")]
    for entry in record["cases"].values():
        assert entry["commit"] == "abc" and all(x > 0 for x in entry["ceilings"].values())
        own = entry["by"]["rwkv7"]
        low, high = own["quartiles"]
        assert 0 < low <= own["seconds"] <= high and own["samples"] == 3 and own["ratio"] > 0
        assert own["share"] == pytest.approx(own["floor"] / own["seconds"])
        assert entry["by"][tables.MISTRAL]["ratio"] == 1
    before = path.read_bytes()
    capsys.readouterr()
    models.main([*arguments, "--only", "rwkv7", "--tasks", "step 1"])
    assert capsys.readouterr().out == "" and path.read_bytes() == before
    # Nor for one that cannot do the task: the package does not train.
    more = [*arguments, "--only", "rwkv7,rwkv package RWKV-7", "--tasks", "step 1,training"]
    models.main(more)
    cases = json.loads(path.read_text())["cases"]
    assert cases["2 x 128, float32, step 1, rwkv"]["by"]["rwkv package RWKV-7"]["seconds"] > 0
    assert "rwkv package RWKV-7" not in cases["2 x 128, float32, training, rwkv"]["by"]
    capsys.readouterr()
    models.main(more)
    assert capsys.readouterr().out == ""
    # Another one beside it: what was measured stays.
    models.main([*arguments, "--only", "rwkv4", "--tasks", "step 8,generate 1,generate 8,training"])
    models.main([*arguments, "--only", "rwkv4", "--tasks", "step 1"])
    cases = json.loads(path.read_text())["cases"]
    assert cases["2 x 128, float32, step 1, rwkv"]["by"].keys() == {
        tables.MISTRAL,
        "rwkv4",
        "rwkv7",
        "rwkv package RWKV-7",
    }
    assert len(cases) == 6 and all("seconds" in x for e in cases.values() for x in e["by"].values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--only", "mamba3"], "got 'mamba3'"), (["--tasks", "step 2"], "expected some of prefill")],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        models.main(arguments)
    assert message in capsys.readouterr().err
