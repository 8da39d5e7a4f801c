"""The resource checks: that each can fail, on kernels made for it, and that what ships passes.

Compiling needs a process without TRITON_INTERPRET, so the kernels below are compiled in one child
process for all tests.
"""

import json
import pickle
import tempfile
import warnings
from pathlib import Path

import compiled
import pytest
import torch
import triton
import triton.language as tl

from zoo.kernels.bench import resources
from zoo.kernels.bench.aot import allowed, checks, compiling, devices
from zoo.kernels.bench.aot.allowed import Allowed
from zoo.kernels.bench.aot.cases import Case, empty
from zoo.kernels.bench.aot.checks import Complaint
from zoo.kernels.launch_triton import Launch, launch

ROOT = Path(__file__).resolve().parents[2]


@triton.jit
def product(x, y, out, rows, STRIDE, C: tl.constexpr, D: tl.constexpr):
    """out = sum over blocks of C rows of x^T y, x and y [rows, D]."""
    r, d = tl.arange(0, C), tl.arange(0, D)
    total = tl.zeros([D, D], tl.float32)
    for start in range(0, rows, C):
        at = (start + r)[:, None] * STRIDE + d[None, :]
        mask = (start + r)[:, None] < rows
        bx = tl.load(x + at, mask=mask, other=0.0)
        by = tl.load(y + at, mask=mask, other=0.0)
        total = tl.dot(tl.trans(bx), by, total)
    tl.store(out + d[:, None] * D + d[None, :], total)


@triton.jit
def greedy(x, out, rows, D: tl.constexpr):
    """Two tiles of D x D float32 that stay alive across a loop: more than the registers hold."""
    at = tl.arange(0, D)[:, None] * D + tl.arange(0, D)[None, :]
    first, second = tl.load(x + at), tl.load(x + D * D + at)
    for i in range(rows):
        first, second = second * tl.sum(first), first + tl.load(x + i * D * D + at)
    tl.store(out + at, first + second)


@triton.jit
def impossible(x, out, D: tl.constexpr):
    """Adds tiles whose shapes do not fit."""
    tl.store(out + tl.arange(0, D), tl.load(x + tl.arange(0, D)) + tl.arange(0, 2 * D))


def products(num_stages=3, chunk=64, width=64, stride=64, dtype=torch.bfloat16, num_warps=4):
    x = empty(4096, width, dtype=dtype)
    arguments = {"x": x, "y": x, "out": empty(width, width, dtype=torch.float32)}
    arguments |= {"rows": 4096, "STRIDE": stride, "C": chunk, "D": width}
    return Launch(product, (1,), arguments, num_warps, num_stages)


def tiles(kernel, width, **arguments):
    x = empty(2, width, width, dtype=torch.float32)
    return Launch(kernel, (1,), {"x": x, "out": x[0], "D": width, **arguments}, 4, 1)


# What is compiled, for which target, and the checks that complain.
COMPILED = {
    "clean sm_80": (products, "sm_80", set()),
    "clean sm_90": (products, "sm_90", set()),
    "clean sm_100": (products, "sm_100", set()),
    "clean gfx942": (products, "gfx942", set()),
    "spills": (lambda: tiles(greedy, 128, rows=8), "sm_90", {"spill"}),
    "spills on AMD": (lambda: tiles(greedy, 256, rows=8), "gfx942", {"spill"}),
    "too much shared memory": (
        lambda: products(num_stages=9, chunk=128, num_warps=8),
        "sm_90",
        {"shared"},
    ),
    "too much for an A100": (
        lambda: products(num_stages=11, chunk=128, num_warps=8),
        "sm_80",
        {"shared"},
    ),
    # The older instructions read their second operand from registers: the loop waits for that.
    "not wgmma": (lambda: products(width=32), "sm_90", {"tensor core", "loads"}),
    "a loop that waits": (lambda: products(num_stages=1), "sm_90", {"loads"}),
    "rows at any address": (lambda: products(stride=65), "sm_90", {"loads"}),
    "does not compile": (lambda: tiles(impossible, 64), "sm_90", {"compile"}),
}


def compile_the_kernels_above():
    """In the child process: prints what `results` returns, as JSON."""
    found = {}
    for name, (make, target, _) in COMPILED.items():
        job = compiling.specialise(make(), target, is_wide=True)
        figures = compiling.compile_job(job)
        complaints = checks.check_figures(job, figures)
        found[name] = {
            "figures": figures,
            "complaints": [[c.check, c.kernel, c.target, str(c)] for c in complaints],
        }
    found["as Triton specialises"] = compare_with_triton()
    found["kept"] = what_is_kept()
    print(json.dumps(found))


def compare_with_triton():
    """How `specialise` differs from Triton's own code, which is not public; None without it."""
    try:
        from triton.backends.amd.compiler import HIPBackend
        from triton.backends.nvidia.compiler import CUDABackend
        from triton.runtime.jit import native_specialize_impl
    except ImportError:
        return None
    differences = []
    x = empty(4096, 64)
    values = {"rows": [1, 2, 16, 2**31, -1, 2**40, True, 0.5], "STRIDE": [1, 64, 65, None]}
    for target, backend in (("sm_90", CUDABackend), ("gfx942", HIPBackend)):
        for name, choices in (values | {"x": [x, x[:, 1:], x.int(), x.long()]}).items():
            for value in choices:
                arguments = products().arguments | {name: value}
                job = compiling.specialise(Launch(product, (1,), arguments, 4, 3), target, True)
                kind, key = native_specialize_impl(backend, value, False, True, True)
                position = product.arg_names.index(name)
                ours = dict(job.signature)[name], dict(job.attributes).get(position, ())
                attributes = backend.parse_attr(key) if isinstance(key, str) else []
                theirs = kind, tuple(map(tuple, attributes))
                if ours != theirs:
                    differences.append(f"{target} {name}={value}: {ours}, Triton {theirs}")
    return differences


def what_is_kept():
    """Of changes to a compilation those that leave its key alone, and what compiled.json does."""
    job = compiling.specialise(products(), "sm_90", True)
    key = compiled.key_of(job)
    changes = [{"chunk": 32}, {"stride": 65}, {"dtype": torch.float16}, {"num_warps": 8}]
    jobs = [compiling.specialise(products(**change), "sm_90", True) for change in changes]
    jobs.append(compiling.specialise(products(), "sm_80", True))
    unseen = [str(x) for x in jobs if compiled.key_of(x) == key]
    source = product.src
    product._unsafe_update_src(source.replace("tl.trans(bx), by", "tl.trans(by), bx"))
    unseen += ["the source"] if compiled.key_of(job) == key else []
    product._unsafe_update_src(source)

    def compile_all(jobs, processes):
        asked.extend(jobs)
        return {x: {"registers": 8, "seconds": 0.1} for x in jobs}

    asked, wrong = [], None
    with tempfile.TemporaryDirectory() as folder:
        compiled.FILE = Path(folder) / "compiled.json"
        compiled.FILE.write_text(json.dumps({key: {"registers": 8}}))
        compiled.compile_changed([job, *jobs], 1, compile_all)
        compiled.FILE.write_text(json.dumps({key: {"registers": 9}}))
        try:
            compiled.compile_changed([job], 1, compile_all)
        except SystemExit as error:
            wrong = str(error)
    # All that changed, and the first of what did not, each time.
    return {"unseen": unseen, "asked": asked == [*jobs, job, job], "wrong": wrong}


@pytest.fixture(scope="module")
def results(tmp_path_factory, compilers):
    folder = tmp_path_factory.mktemp("triton")
    script = folder / "script.py"
    script.write_text("import test_resources; test_resources.compile_the_kernels_above()")
    output = compilers(script, TRITON_CACHE_DIR=str(folder))
    return json.loads(output.splitlines()[-1])


@pytest.mark.parametrize("name", COMPILED)
def test_each_check_can_fail(name, results):
    _, target, expected = COMPILED[name]
    complaints = results[name]["complaints"]
    assert {check for check, *_ in complaints} == expected, results[name]
    for check, kernel, on, text in complaints:
        assert on == target
        assert f"{target} {kernel} [" in text
        assert check in checks.REMEDIES


def test_figures_of_a_clean_kernel(results):
    """Of each kind of machine code, and plausible."""
    for target, registers in (("sm_80", 255), ("sm_90", 255), ("sm_100", 255), ("gfx942", 512)):
        figures = results[f"clean {target}"]["figures"]
        assert 16 < figures["registers"] <= registers
        assert figures["tensor_core"] > 0
        assert figures["bfloat16_dots"] == 1
        # Three stages of two tiles of 64 x 64 bfloat16; AMD holds some in registers.
        assert 16384 <= figures["shared"] <= 3 * 2 * 8192 + 1024
        assert figures["programs"] >= 2
    assert results["clean sm_90"]["figures"]["copies"] == 24


def test_specialises_as_triton_does(results):
    if results["as Triton specialises"] is None:
        pytest.skip("this Triton keeps it elsewhere")
    assert results["as Triton specialises"] == []


def test_what_changed_is_compiled_again(results):
    assert results["kept"]["unseen"] == []
    assert results["kept"]["asked"]
    assert "is not what the compiler says" in results["kept"]["wrong"]


def test_occupancy_below_the_table():
    job = compiling.Job("m:kernel", "sm_90", (), (("C", 64),), (), 4, 2, True)
    figures = {
        "registers": 255,
        "stack": 0,
        "spilled": 0,
        "shared": 100_000,
        "bfloat16_dots": 0,
        "programs": devices.occupancy("sm_90", {"registers": 255, "shared": 100_000}, 4),
    }
    assert figures["programs"] == 2
    assert checks.check_figures(job, figures, {"programs": 2}) == []
    # The table has another version of Triton's, or lacks the kernel: nothing to compare with.
    assert checks.check_figures(job, figures, None) == []
    (complaint,) = checks.check_figures(job, figures, {"programs": 3})
    assert complaint.check == "occupancy"
    assert "expected 3" in str(complaint) and "C=64" in str(complaint)


def test_products_without_tensor_cores():
    job = compiling.Job("m:kernel", "gfx942", (), (), (), 4, 2, False)
    figures = {"registers": 8, "stack": 0, "spilled": 0, "shared": 0, "programs": 8}
    figures |= {"bfloat16_dots": 2, "tensor_core": 0}
    (complaint,) = checks.check_figures(job, figures)
    assert complaint.check == "tensor core"


def some_call(num_launches):
    x = empty(4, 8, 16)

    def run():
        for _ in range(num_launches):
            launch(product, (1,), 4, 2, x=x, y=x[:, :1].expand(4, 8, 16), out=None, rows=4)

    return Case(run, 4 * 8, True, max_bytes=40)


def test_bytes_and_launches_of_a_call():
    """x is 1,024 bytes; y repeats one of its eight rows, which moves once: 36 a token and head."""
    for count, stored, expected in ((1, 1, set()), (1, 0, {"launches"}), (2, 2, {"bytes"})):
        case = some_call(count)
        launches = resources.collect({"call": case}, ["sm_90"])["call", "sm_90"]
        figures, complaints = checks.check_call(
            "call", "sm_90", case, launches, {"launches": stored}
        )
        assert figures == {"launches": count, "bytes": 36.0 * count}
        assert {c.check for c in complaints} == expected


def test_every_head_size_needs_one_good_configuration():
    jobs = [compiling.Job("m:kernel", "gfx942", (), (("C", c),), (), 4, 2, True) for c in (32, 64)]
    # A word or two on the stack is the assembler's choice, not a lack of registers.
    good = {"stack": 16, "spilled": 2, "shared": 65536}
    spills, large, broken = good | {"stack": 24}, good | {"shared": 65537}, {"error": "no"}
    for bad in (spills, large, broken):
        assert not checks.check_head_sizes([("128", jobs[0], bad), ("128", jobs[1], good)])
        (complaint,) = checks.check_head_sizes([("128", jobs[0], bad), ("64", jobs[1], good)])
        assert complaint[:4] == ("head size", "m.kernel", "gfx942", "128")


def test_accepted_complaints():
    """Named ones are excused, with their reason; one that no longer occurs, and no head size."""
    spill = Complaint("spill", "scan", "sm_80", "fp32 K=128 warps=4", "")
    other = spill._replace(target="sm_90")
    entry = Allowed("spill", "scan", "sm_80", "K=128", "float32 is rare on an A100.")
    assert allowed.excuse([spill, other], [entry], True) == ([other], [(spill, entry.reason)])
    assert allowed.excuse([spill], [entry._replace(target="")], True)[0] == []
    for changed in ({"kernel": "step"}, {"where": "K=64"}, {"check": "loads"}):
        standing, excused = allowed.excuse([spill], [entry._replace(**changed)], True)
        assert excused == []
        assert [c.check for c in standing] == ["spill", "allowed"]
    assert allowed.excuse([], [entry], is_complete=False) == ([], [])
    size = spill._replace(check="head size")
    assert allowed.excuse([size], [entry._replace(check="head size")], False) == ([size], [])


def test_the_table_is_written_a_line_each(tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "TABLE", tmp_path / "resources.json")
    row = {"registers": 8, "stack": 0, "shared": 16, "programs": 2}
    calls = {"sm_90 a call": {"launches": 4, "bytes": 4096.0}}
    kernels = {"b": row | {"seconds": 3.0}, "a": row, "c": {"error": "does not compile"}}
    resources.write_table(calls, kernels)
    text = resources.TABLE.read_text()
    assert json.loads(text) == {
        "triton": triton.__version__,
        "calls": calls,
        "kernels": {"a": row, "b": row},
    }
    assert sum("registers" in line for line in text.splitlines()) == 2


def test_many_are_compiled_by_other_processes(monkeypatch):
    """To which jobs and what compiles them can be sent."""
    sent = []

    class Pool:
        def __init__(self, processes, mp_context):
            assert processes == 2 and mp_context.get_start_method() == "spawn"

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def map(self, function, jobs):
            sent.extend(pickle.loads(pickle.dumps((function, jobs)))[1])
            return [len(sent)] * len(jobs)

    monkeypatch.setattr(resources, "ProcessPoolExecutor", Pool)
    parts = (("x", "*fp32"),), (("SIZE", 64),), ((0, (("tt.divisibility", 16),)),)
    jobs = [compiling.Job("a:b", "sm_90", *parts, n, 3, True) for n in range(resources.FEW + 1)]
    assert resources.compile_all(jobs) == dict.fromkeys(jobs, len(jobs))
    assert sent == jobs


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="there is a GPU: it compiles")
def test_refuses_to_interpret(capsys):
    with pytest.raises(SystemExit):
        resources.main([])
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err


@pytest.mark.slow
def test_what_ships_is_clean(compilers):
    """`make aot`, without compiling again what has not changed since compiled.json."""
    output = compilers(Path(__file__).with_name("compiled.py"))
    if "\ncompiled: 0 that changed" not in "\n" + output:
        warnings.warn(
            "kernels changed and took minutes to compile: `python tests/kernels/compiled.py "
            "--write` keeps what came out.",
            stacklevel=1,
        )
