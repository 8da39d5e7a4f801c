"""The GPU benchmark's plumbing, on a CPU at tiny sizes: its times mean nothing here."""

import json
import os
import subprocess

import pytest
import torch

from zoo.kernels.bench import run
from zoo.kernels.bench.gpu import checking, tables, timing, variants, workloads
from zoo.kernels.bench.gpu.cases import CASES
from zoo.kernels.bench.marked import replaced
from zoo.kernels.delta_recurrence import delta_recurrence_reference
from zoo.kernels.linear_recurrence import linear_recurrence_reference
from zoo.kernels.wkv4 import wkv4_reference

CPU = timing.Cpu()


def tiny(name):
    return CASES[name].make(CPU.device, True)


def smoke(path, *arguments):
    plain = ["--device", "cpu", "--smoke", "--output", str(path), "--processes", "0"]
    run.main([*plain, *arguments])
    return json.loads(path.read_text())["results"] if path.exists() else {}


def test_every_case_runs_and_only_where_asked(tmp_path):
    before = {path.name: path.read_bytes() for path in tables.RESULTS.iterdir()}
    results = smoke(tmp_path / "all.json")
    assert list(results) == list(CASES)
    for name, case in CASES.items():
        assert "failed" not in results[name], results[name]
        for mode in case.modes:
            figures = results[name][mode]["by"]["ours"]
            assert figures["ms"] > 0 and figures["samples"] >= 3
            assert figures["low_ms"] <= figures["ms"] <= figures["high_ms"]
            assert results[name][mode]["floor_ms"] > 0
            # float32 against float64: what is compared is the same function.
            assert all(error < 1e-4 for error in figures["errors"].values())
            gradients = len(figures["errors"]) - 1
            assert gradients == (len(tiny(name).learned) if mode == "training" else 0)
            assert results[name][mode].get("target") == case.targets.get(mode)
    assert {path.name: path.read_bytes() for path in tables.RESULTS.iterdir()} == before


def test_results_of_other_cases_are_kept(tmp_path, monkeypatch):
    path = tmp_path / "some.json"
    assert list(smoke(path, "--only", "decode (1")) == ["decode (1, 1, 16, 128)"]
    assert len(smoke(path, "--only", "wkv4")) == 2
    # Out of time: nothing more is measured, what there is stays.
    assert len(smoke(path, "--minutes", "0")) == 2
    monkeypatch.setattr(run, "versions", lambda: {"torch": "another"})
    assert list(smoke(path, "--only", "wkv4")) == ["wkv4 (8, 4096, 2048)"]


def wrong_value(**x):
    return 1.05 * linear_recurrence_reference(**x)[0]


def not_a_number(**x):
    return linear_recurrence_reference(**x)[0] * float("nan")


def wrong_gradient(**x):
    o = linear_recurrence_reference(**x)[0]
    return o + 0.1 * (x["k"] - x["k"].detach()).sum()


def fails(**x):
    raise RuntimeError("no kernel image\nfor this device")


@pytest.mark.parametrize(
    ("contender", "reason"),
    [
        (wrong_value, "wrong results"),
        (not_a_number, "wrong results"),
        (wrong_gradient, "wrong results"),
        (fails, "RuntimeError: no kernel image"),
    ],
)
def test_what_is_wrong_is_not_timed(contender, reason):
    workload = tiny("retention (8, 1024, 8, 64)")
    right = {"ours": workload.contenders["ours"]}
    workload = workload._replace(contenders=right | {"fla": contender})
    by = timing.measure(CPU, workload, "training", (1e9, 1e9), 0)["by"]
    assert by["fla"]["failed"] == reason
    assert "ms" not in by["fla"] and "ratio" not in by["fla"]
    assert by["ours"]["ms"] > 0
    # And alone: no figure, no crash.
    alone = workload._replace(contenders={"ours": contender})
    assert timing.measure(CPU, alone, "training", (1e9, 1e9), 0)["by"]["ours"]["failed"] == reason


class Fragile(timing.Cpu):
    """A device that nothing runs on after the first error of a contender."""

    is_lost = False

    def synchronize(self):
        if self.is_lost:
            raise RuntimeError("illegal memory access")


@pytest.mark.parametrize("is_variants", [False, True], ids=["run", "variants"])
def test_ends_where_the_device_is_lost(is_variants, tmp_path, monkeypatch, capsys):
    """What came before is kept, what comes after is not blamed."""
    device, path = Fragile(), tmp_path / "results.json"

    def breaks(**x):
        device.is_lost = True
        raise RuntimeError("illegal memory access")

    def broken(*_):
        workload = tiny("retention (8, 1024, 8, 64)")
        return workload._replace(contenders={"ours": breaks})

    first, second, third = list(CASES)[:3]
    cases = {name: CASES[name] for name in (first, second, third)}
    cases[second] = cases[second]._replace(make=broken)
    if is_variants:
        monkeypatch.setattr(variants, "CASES", cases)
        told = tmp_path / "told.txt"
        monkeypatch.setenv("ZOO_GPU_FAILURES", str(told))
        assert not variants.run(device, [second, third], path, float("inf"), True)
        assert "the device is lost" in told.read_text()
        found = json.loads(path.read_text())["variants"]
        assert list(found) == [f"{second} forward"]
        assert "failed" in found[f"{second} forward"]["by"][variants.SHIPPED]
        # A second run goes on after it.
        device.is_lost = False
        assert not variants.run(device, [second, third], path, float("inf"), True)
        found = json.loads(path.read_text())["variants"]
        assert len(found[f"{second} forward"]["by"]) == 2
        return
    assert not run.run(device, cases, path, float("inf"), True)
    results = json.loads(path.read_text())["results"]
    assert list(results) == [first, second]
    assert "failed" not in results[first]
    assert results[second]["failed"] == "ours, forward: RuntimeError: illegal memory access"
    assert "the cases after it were not measured" in capsys.readouterr().out


def test_compiles_in_children_first(tmp_path, monkeypatch):
    """Every case once, and one that hangs is not waited for."""
    commands, waits = [], []

    class Child:
        def __init__(self, command, **_):
            commands.append(command)

        def wait(self, timeout=None):
            waits.append(timeout)
            if timeout and len(waits) == 1:
                raise subprocess.TimeoutExpired("", timeout)

        def kill(self):
            waits.append("killed")

    monkeypatch.setattr(run.subprocess, "Popen", Child)
    run.compile_first(CASES, 3, ["--device", "cuda"], 7)
    shares = [json.loads(command[-1]) for command in commands]
    assert sorted(name for share in shares for name in share) == sorted(CASES)
    assert all(command[2:-1] == ["--device", "cuda", "--compile"] for command in commands)
    assert 0 < waits[0] <= 7 and waits[1:3] == ["killed", None] and len(waits) == 5

    ran = []
    monkeypatch.setattr(run, "check_and_warm_up", lambda device, x, mode: ran.append(mode))
    run.main(["--device", "cpu", "--smoke", "--output", "x", "--compile", json.dumps(shares[0])])
    assert ran == [mode for name in shares[0] for mode in CASES[name].modes]


def test_a_child_compiles(tmp_path):
    """As it is called, from anywhere."""
    arguments = ["--device", "cpu", "--smoke", "--output", str(tmp_path / "x.json")]
    share = json.dumps(["wkv4 (8, 4096, 2048)"])
    command = [run.sys.executable, run.__file__, *arguments, "--compile", share]
    environment = os.environ | {"PYTHONPATH": str(run.HERE.parents[1])}
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert not (tmp_path / "x.json").exists()


def stand_in(module, name):
    """fla's functions by their argument names and defaults, computed by our definitions."""

    def linear(q, k, v, decay, scale, bonus=None, state=None):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return linear_recurrence_reference(
            q, k, v, decay, bonus=bonus, scale=scale, initial_state=state, output_final_state=True
        )

    def chunk_retention(q, k, v, scale=None):
        decay = (1 - 2.0 ** (-5.0 - torch.arange(q.shape[2], dtype=torch.float))).log()
        return linear(q, k, v, decay.to(q.dtype), scale)

    def chunk_simple_gla(q, k, v, g=None, g_gamma=None, scale=None):
        return linear(q, k, v, g if g_gamma is None else g_gamma, scale)

    def fused_recurrent_simple_gla(
        q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False
    ):
        assert output_final_state
        return linear(q, k, v, g if g_gamma is None else g_gamma, scale, state=initial_state)

    def chunk_gla(q, k, v, g, scale=None):
        return linear(q, k, v, g, scale)

    def chunk_rwkv6(r, k, v, w, u, scale=None):
        return linear(r, k, v, w, scale, bonus=u)

    def chunk_rwkv7(r, w, k, v, a, b, scale=1.0, lower_bound=None):
        assert lower_bound <= w.min() and w.max() < 0
        return delta_recurrence_reference(r, k, v, w, a, b, scale=scale)

    def fused_recurrent_rwkv4(w, u, k, v, state):
        assert state.shape == (k.shape[0], 3, 1, k.shape[2])
        return wkv4_reference(-w.exp(), u, k, v, initial_state=state[:, :, 0])

    return locals()[name]


def test_fla_gets_the_same_function(monkeypatch):
    """Through its own arguments, which are not ours."""
    monkeypatch.setattr(workloads, "fla_function", stand_in)
    for name, case in CASES.items():
        workload = tiny(name)
        sides = [side for side in workload.contenders if side.startswith("fla")]
        # fla has no dilated attention.
        assert bool(sides) != name.startswith("LongNet"), name
        for side in sides:
            errors = checking.errors(workload, case.modes[-1], workload.contenders[side])
            assert all(error < 1e-4 for error in errors.values()), (name, side, errors)


def test_variants_are_ranked_and_kept(tmp_path, capsys, monkeypatch):
    path = tmp_path / "variants.json"
    arguments = ["--device", "cpu", "--smoke", "--only", "retention (8, 1024"]
    arguments += ["--output", str(path)]
    assert variants.main([*arguments, "--seconds", "0"]) == 1
    assert variants.main(arguments) == 0
    blocks = capsys.readouterr().out.strip().split("\n\n")
    assert [block.splitlines()[0].split()[-1] for block in blocks] == ["forward", "training"]
    for block in blocks:
        _, *lines = block.splitlines()
        times = [float(line.split()[0]) for line in lines]
        assert times == sorted(times) and sum(variants.SHIPPED in line for line in lines) == 1
    before = path.read_text()
    assert variants.main([*arguments, "--seconds", "0"]) == 0  # nothing is left to do
    assert path.read_text() == before
    monkeypatch.setattr(run, "versions", lambda: {"torch": "another"})
    assert variants.main([*arguments, "--seconds", "0"]) == 1


def test_variants_are_other_programs():
    """Each candidate launches something else; those of shipped wide heads are among them."""
    for name in variants.SHAPES:
        workload = CASES[name].make(torch.device("meta"), False)
        found = variants.candidates(workload)
        chosen = [tuple(sorted(x.items())) for x in found.values()]
        assert len(set(chosen)) == len(chosen) > 6 and found[variants.SHIPPED] == {}


def test_a_second_run_goes_on(tmp_path):
    """With what was not measured with this code; what failed comes last."""
    path, setting = tmp_path / "results.json", {"device": "cpu", "versions": run.versions()}
    code, (first, second, third) = run.fingerprint(), [x for x in CASES if "retention" not in x][:3]
    some = {name: CASES[name] for name in (first, second, third)}
    results = {first: {"sources": code}, second: {"sources": "older"}}
    path.write_text(json.dumps(setting | {"results": results}))
    never, failed = run.not_measured(some, path, setting)
    assert list(never) == [second, third] and not failed
    results[second] = {"sources": code, "failed": "out of memory"}
    path.write_text(json.dumps(setting | {"results": results}))
    never, failed = run.not_measured(some, path, setting)
    assert list(never) == [third] and list(failed) == [second]
    never, failed = run.not_measured(some, path, setting | {"versions": {}})
    assert list(never) == list(some) and not failed


def test_a_lost_device_is_lost_to_one_process(tmp_path, monkeypatch):
    """The cases after it are left to another, with the time that is left; nobody goes round."""
    device, path, begun = Fragile(), tmp_path / "results.json", []

    def breaks(**x):
        device.is_lost = True
        raise RuntimeError("illegal memory access")

    def broken(*_):
        return tiny("wkv4 (8, 4096, 2048)")._replace(contenders={"ours": breaks})

    first, second = "decode (1, 1, 16, 128)", "wkv4 (8, 4096, 2048)"
    cases = {second: CASES[second]._replace(make=broken), first: CASES[first]}
    monkeypatch.setattr(run, "CASES", cases)
    monkeypatch.setattr(run, "Cpu", lambda: device)
    monkeypatch.setattr(run.os, "execv", lambda *words: begun.append(words))
    arguments = ["--device", "cpu", "--smoke", "--output", str(path), "--processes", "0"]
    arguments += ["--seconds", "60", "--go-on"]
    assert run.main(arguments) == 1
    assert list(json.loads(path.read_text())["results"]) == [second]
    [(program, words)] = begun
    assert program == words[0] and words[1:] == [run.__file__, *arguments, *words[-4:]]
    assert words[-4::2] == ["--seconds", "--processes"] and 1 < int(words[-3]) <= 60
    # The other process: what is left first, then once more what failed.
    device.is_lost = False
    assert run.main(words[2:]) == 1
    assert len(begun) == 1
    assert list(json.loads(path.read_text())["results"]) == [second, first]


def test_words_of_several_parts(tmp_path):
    results = smoke(tmp_path / "x.json", "--only", "wkv4", "--only", "decode (1,", "--go-on")
    assert list(results) == ["decode (1, 1, 16, 128)", "wkv4 (8, 4096, 2048)"]
    before = (tmp_path / "x.json").read_text()
    smoke(tmp_path / "x.json", "--only", "wkv4", "--only", "decode (1,", "--go-on")
    after = json.loads((tmp_path / "x.json").read_text())["results"]
    assert after == json.loads(before)["results"]


@pytest.mark.parametrize(
    ("code", "output", "expected"),
    [
        (0, "a warning\n3.257\n", {"seconds": 3.26}),
        (1, "", {"failed": "RuntimeError: no kernel image"}),
        (None, "", {"failed": "not done after 60 s"}),
    ],
)
def test_first_calls_start_with_nothing_compiled(code, output, expected, monkeypatch):
    def child(command, env, timeout, **_):
        assert command[-3:] == ["--first-call", "some case", "fla"] and timeout == 60
        assert os.listdir(env["TRITON_CACHE_DIR"]) == []
        if code is None:
            raise subprocess.TimeoutExpired(command, timeout)
        error = "Traceback\nRuntimeError: no kernel image"
        return subprocess.CompletedProcess(command, code, output, error)

    monkeypatch.setattr(run.subprocess, "run", child)
    assert run.measure_first_call("some case", "fla", 60) == expected


def test_floors():
    """At D = 128 in bfloat16: 1,024 bytes forward and 2,816 with backward for a token and head."""
    workload = tiny("retention (4, 2048, 16, 128)")
    q = workload.inputs["q"]
    units = q.shape[0] * q.shape[1] * q.shape[2] * q.shape[3] * q.element_size()
    assert workload.floors["forward"][0] == 4 * units
    assert workload.floors["training"][0] == 11 * units


def test_a_gpu_table():
    figures = {"ms": 1.5, "errors": {"o": 0.002, "dq": 0.004}, "host_us": 50.0, "peak_mb": 7.0}
    ours = figures | {"of_floor": 0.5}
    by = {"ours": ours, "fla": {"failed": "wrong results"}, "fla, decays kept": {"ms": 3.0}}
    by["fla, decays kept"]["ratio"] = 2.0
    entry = {
        "training": {"by": by, "target": 2.0, "floor_ms": 0.75, "floor_of": "bytes"},
        "first call": {"ours": {"seconds": 3.25}, "fla": {"failed": "not done after 60 s"}},
    }
    record = {"device": "GPU", "versions": {"torch": "2"}, "results": {"some case": entry}}
    table = tables.gpu_table(record | {"copy_tb_per_s": 4.3, "matmul_tflops": 790.0})
    row = "| some case | training | 1.5 | 50% | 0.004 | 50.0 | 7.0 | 3.0 | 2.0 | 2.0 |  |"
    assert row in table.splitlines()
    assert "ours: 3.25 s" in table and "fla: not done after 60 s" in table
    lines = tables.lines_of("c", {"training": by_known(by)})
    assert any("ours is 2.0x as fast" in line for line in lines)


def test_a_training_table():
    by = {"ours": {"ms": 1.0, "tokens_per_s": 900, "mfu": 0.412, "peak_gb": 20.5}}
    entry = {"parameters": 340_200_000, "batch": [4, 4096], "by": by}
    by["fla"] = {"failed": "LookupError: fla has no such model"}
    other = {"ours": by["ours"], "fla": by["ours"] | {"tokens_per_s": 450, "ratio": 2.0}}
    models = {"lightning": entry, "rwkv7": entry | {"by": other}}
    record = {"device": "GPU", "versions": {"torch": "2"}, "models": models}
    lines = tables.training_table(record).splitlines()
    start = "340 | (4, 4096) | 900 | 41% | 20.5 |"
    assert f"| lightning | {start} LookupError: fla has no such model |  |  |  |" in lines
    assert f"| rwkv7 | {start} 450 | 41% | 20.5 | 2.0 |" in lines


def by_known(by):
    """The same with what a printed line needs of every contender."""
    spread = {"low_ms": 1.0, "high_ms": 2.0, "host_us": 1.0, "peak_mb": 1.0}
    return {
        "floor_of": "bytes",
        "by": {k: v if "failed" in v else v | spread for k, v in by.items()},
    }


def test_the_readme_has_the_results():
    """If not: python kernels/bench/run.py --table"""
    text = tables.README.read_text()
    assert tables.with_tables(text) == text
    assert tables.PLOT.read_text() == tables.plot()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "goes with --smoke and --output"),
        (["--device", "cpu", "--smoke"], "goes with --smoke and --output"),
        (["--device", "cpu", "--smoke", "--output", "x.json", "--only", "S4"], "no case's name"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert message in capsys.readouterr().err


def test_parts_between_marks():
    text = "a\n<!-- x -->\nold\n<!-- end of x -->\nb\n"
    assert replaced(text, "x", ["1", "2"]) == text.replace("old", "1\n2")
    for mark in ("y", "a b"):
        with pytest.raises(ValueError, match=f"one part from <!-- {mark} --> to"):
            replaced(text, mark, [])
