"""Kernels compiled without a GPU are found by a process that has one: here, one that says so."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from zoo.kernels.bench.gpu import compiled_ahead

CASE = "decode (1, 1, 16, 128)"
# As on the other machine: an operator is called, by the ordinary way through Triton, which is to
# compile nothing. Its own driver alone is not there.
FINDS = """
import sys, torch, triton
from zoo.kernels.bench.gpu.cases import CASES
from zoo.kernels.bench.gpu.checking import calls
from zoo.kernels.bench.gpu.compiled_ahead import _Driver, install

folder, case = sys.argv[1:]
print(install(folder))
triton.runtime.driver.set_active(_Driver())
found = []
triton.knobs.compilation.listener = lambda *, cache_hit, **_: found.append(cache_hit)
workload = CASES[case].make(torch.device("meta"), False)
calls(workload, "decode")["ours"]()
print(found)
"""


JOBS = """
from zoo.kernels.bench.gpu.compiled_ahead import jobs
print(*jobs(), sep="\\n")
"""


@pytest.mark.slow
def test_another_process_finds_them(tmp_path, compilers):
    """Also where the folder was moved; and not where another Triton made them."""
    here, there = tmp_path / "here", tmp_path / "there"
    words = compiled_ahead.__file__, str(here), "--only", f"case {CASE}", "--processes", "1"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON")}
    environment["PYTHONPATH"] = str(compiled_ahead.ROOT)
    child = subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    said = child.stdout.splitlines()
    assert said[-1].startswith("1 kernels, ")
    shutil.move(here, there)
    about = json.loads((there / compiled_ahead.ABOUT).read_text())
    assert about["triton"] == triton.__version__
    [kernel] = compiled_ahead.kernels(there)
    [made] = [path for path in kernel.glob("*.json") if not path.name.startswith("__")]
    target = json.loads(made.read_text())["target"]
    assert (target["backend"], target["arch"]) == ("cuda", 90)
    assert not list(there.rglob("*.source"))
    finds = tmp_path / "finds.py"
    finds.write_text(FINDS)
    cache = {"TRITON_CACHE_DIR": str(there)}
    told, found = compilers(finds, there, CASE, **cache).splitlines()
    assert told.endswith("finds") and found == "[True]"
    # It could not have compiled in silence: another key, and it is compiled anew.
    kernel.rename(kernel.with_name("A" * len(kernel.name)))
    (there / compiled_ahead.ABOUT).write_text(json.dumps(about | {"key": "other"}))
    told, found = compilers(finds, there, CASE, **cache).splitlines()
    assert told.endswith("none will be found") and found == "[False]"


def test_paths_are_those_of_the_place(tmp_path):
    """Triton keeps whole paths beside a kernel."""
    group = tmp_path / "KEY" / "__grp___scan.json"
    group.parent.mkdir()
    group.write_text(json.dumps({"child_paths": {"_scan.cubin": "/elsewhere/KEY/_scan.cubin"}}))
    key = compiled_ahead._short(compiled_ahead.key_of_triton())
    (tmp_path / compiled_ahead.ABOUT).write_text(json.dumps({"key": key, "triton": "3"}))
    assert "which this Triton" in compiled_ahead.install(tmp_path)
    written = json.loads(group.read_text())["child_paths"]
    assert written == {"_scan.cubin": str(group.parent / "_scan.cubin")}


def test_the_key_of_another_triton(tmp_path):
    """Of the files in a folder, its shared library too: as if it were installed."""
    installed = Path(triton.__file__).parent
    package = tmp_path / "triton"
    for name in ("compiler", "backends", "language", "runtime"):
        shutil.copytree(
            installed / name, package / name, ignore=shutil.ignore_patterns("bin", "lib")
        )
    (package / "_C").mkdir()
    library = next((installed / "_C").glob("libtriton.*"))
    (package / "_C" / library.name).symlink_to(library)
    key = compiled_ahead.key_of_triton()
    assert compiled_ahead.key_of_triton(package) == key
    (package / "_C" / library.name).unlink()
    (package / "_C" / library.name).write_bytes(b"of another Python")
    assert compiled_ahead.key_of_triton(package) != key


@pytest.mark.slow
def test_jobs_are_cases_variants_and_tests(tmp_path, compilers):
    """All shapes of the tests, none of those that ask the device."""
    (tmp_path / "jobs.py").write_text(JOBS)
    lines = compilers(tmp_path / "jobs.py").splitlines()
    kinds = [line.split("'")[1] for line in lines]
    assert {"case", "variant", "test"} == set(kinds) and kinds.count("test") > 90
    assert any("(8, 2048, 32, 256): chunk 64, slice 128, 8 warps, 3 stages" in x for x in lines)
    linear = [line for line in lines if "::test_linear_recurrence[" in line]
    assert len(linear) == 36  # six forms; four shapes in bfloat16, one in two other dtypes
    assert not any("compiles_whole" in line for line in lines)


def test_the_interpreter_compiles_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with (
        pytest.raises(ValueError, match="TRITON_INTERPRET is set"),
        compiled_ahead.compiling(tmp_path, "key"),
    ):
        pass
