"""`make gpu` without a GPU: parts, budgets, what is done, and tests that passed."""

import json
import os
import subprocess
import sys
import time

import gpu_passed
import pytest

from zoo.kernels.bench.gpu import parts as gpu_parts
from zoo.kernels.bench.gpu import running, sources, testing
from zoo.kernels.bench.gpu.running import Part, Record, run_parts

SETTING = {"device": "GPU", "versions": {"torch": "2"}}
WRITES = "import sys; open(sys.argv[1] + '.txt', 'a').write('x')"
TELLS = f"{WRITES}; import os; open(os.environ['ZOO_GPU_FAILURES'], 'a').write('a: wrong\\nb\\n')"
HANGS = f"{WRITES}; import time; time.sleep(60)"
ENDS = f"{WRITES}; import os; os.kill(os.getpid(), 11)"


def part(name, code, seconds=20.0, files=()):
    command = (sys.executable, "-S", "-c", code, "{output}")
    return Part(name, "fake", seconds, command, ".txt", files)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """(path of results, a function that runs parts, the code's word in a list)."""
    word = ["code"]
    monkeypatch.setattr(running, "fingerprint", lambda *files: " ".join([*word, *files]))
    output = tmp_path / "gpu"

    def run(*chosen, limit=60.0, setting=SETTING, **keyword):
        record = Record(tmp_path / "gpu-parts.json", setting)
        return run_parts(chosen, record, output, limit, "abc", **keyword)

    return output, run, word


def states(output):
    content = json.loads(output.with_name("gpu-parts.json").read_text())
    return {name: entry["state"] for name, entry in content["parts"].items()}


def test_parts_run_in_order_and_one_that_crashes_ends_alone(place, capsys):
    output, run, _ = place
    assert not run(part("first", WRITES), part("crash", ENDS), part("last", TELLS))
    assert states(output) == {"first": "done", "crash": "failed", "last": "done"}
    assert output.with_name("gpu.txt").read_text() == "xxx"
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if not line.startswith(" ")] == [
        "first",
        "crash",
        "last",
    ]
    assert "done after" in lines[0] and lines[0].endswith("s of 20, gpu.txt")
    assert "SIGSEGV" in lines[2]
    assert lines[-2:] == ["    a: wrong", "    b"]


def test_a_part_that_takes_too_long_is_stopped_and_keeps_its_results(place, tmp_path):
    """With everything that it started."""
    output, run, _ = place
    code = "import subprocess, sys; child = subprocess.Popen([sys.executable, '-S', '-c', "
    code += "'import time; time.sleep(60)']); open(sys.argv[1] + '.txt', 'w').write(str(child.pid))"
    start = time.monotonic()
    assert not run(part("slow", f"{code}; child.wait()", 1.0), part("after", "pass"))
    assert time.monotonic() - start < 15
    assert states(output) == {"slow": "stopped", "after": "done"}
    grandchild = int(output.with_name("gpu.txt").read_text())
    deadline = time.monotonic() + 5
    while is_alive(grandchild) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(grandchild)


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_nothing_begins_after_the_limit_and_nothing_goes_on(place, capsys):
    output, run, _ = place
    start = time.monotonic()
    assert not run(part("slow", HANGS), part("late", WRITES), limit=1.0)
    assert time.monotonic() - start < 15
    assert states(output) == {"slow": "stopped"}
    assert "late: not begun, 1 s are over" in capsys.readouterr().out


def test_a_second_call_goes_on(place, capsys):
    output, run, word = place
    done, broken = part("done", WRITES, files=("a.py",)), part("broken", ENDS)
    text = output.with_name("gpu.txt")
    assert not run(done, broken)
    assert not run(done, broken)
    assert text.read_text() == "xxx"  # the broken one again
    assert "done: done before" in capsys.readouterr().out
    assert run(done) and text.read_text() == "xxx"
    assert run(done, again=True) and text.read_text() == "xxxx"
    # Other code, another file that it depends on, another device, other versions.
    word[0] = "other code"
    assert run(done) and text.read_text() == "xxxxx"
    assert run(done._replace(files=("b.py",))) and text.read_text() == "xxxxxx"
    assert run(done) and run(done) and text.read_text() == "x" * 7
    assert run(done, setting=SETTING | {"device": "another"}) and text.read_text() == "x" * 8
    assert json.loads(output.with_name("gpu-parts.json").read_text())["device"] == "another"


def test_words_for_code(tmp_path):
    """Of zoo and kernels without bench, whose files count where they are named; not of git."""
    for name in ("zoo/core/a.py", "kernels/b.py", "kernels/bench/c.py", "zoo/notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "zoo" / "kernels").symlink_to("../kernels")

    def word(*files):
        return sources.fingerprint(*files, root=tmp_path)

    plain, with_bench = word(), word("kernels/bench/c.py")
    assert plain != with_bench
    (tmp_path / "zoo/notes.md").write_text("other")
    (tmp_path / "kernels/bench/c.py").write_text("other")
    assert word() == plain and word("kernels/bench/c.py") != with_bench
    (tmp_path / "kernels/b.py").write_text("other")
    assert word() != plain
    assert sources.fingerprint() == sources.fingerprint()


def test_the_real_parts(capsys, monkeypatch):
    """What is unknown first; all scripts are there; each case of run.py is in a part."""
    names = [x.name for x in gpu_parts.parts()]
    assert names[:4] == ["tests", "tests alone", "unknown operators", "variants"]
    assert names[-1] == "operators"
    for x in gpu_parts.parts():
        assert (sources.ROOT / x.command[1]).is_file()
        assert all((sources.ROOT / name).is_file() for name in x.files)
        assert all("{" not in word.format(output="o", seconds=1) for word in x.command)
    monkeypatch.setattr(gpu_parts, "setting", lambda: None)
    assert gpu_parts.main(["--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(names) + 1
    assert all(name in line for name, line in zip(names, lines))
    assert lines[-1].split()[0] == str(sum(round(x.seconds) for x in gpu_parts.parts()))
    assert gpu_parts.main([]) == 1
    assert capsys.readouterr().err.endswith("sees no GPU\n")
    with pytest.raises(SystemExit):
        gpu_parts.main(["--only", "nothing"])
    assert "no part's name contains 'nothing'" in capsys.readouterr().err


def test_parts_are_told_where_they_are():
    variables = gpu_parts.environment("cache", SETTING)
    assert json.loads(variables[testing.SETTING]) == SETTING
    assert variables["TRITON_CACHE_DIR"] == "cache"
    assert "TRITON_CACHE_DIR" not in gpu_parts.environment()
    places = variables["PYTHONPATH"].split(os.pathsep)
    assert places[:2] == [str(sources.ROOT), str(sources.ROOT / "tests")]


def test_a_dry_run_says_what_is_done(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_parts, "setting", lambda: SETTING)
    chosen = gpu_parts.parts()
    record = Record(tmp_path / "gpu-parts.json", SETTING)
    word = sources.fingerprint(*chosen[0].files)
    record.write(chosen[0], state="done", sources=word)
    record.write(chosen[1], state="stopped", sources=sources.fingerprint(*chosen[1].files))
    assert gpu_parts.main(["--dry-run", "--output", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith("(done)") for line in lines] == [True] + [False] * len(chosen)


TESTS = """
import os, pytest

@pytest.mark.gpu
@pytest.mark.parametrize("number", range(3))
def test_right(number):
    with open("ran.txt", "a") as file:
        file.write(f"right {number}\\n")

@pytest.mark.gpu
def test_wrong():
    with open("ran.txt", "a") as file:
        file.write("wrong\\n")
    assert os.path.exists("mended"), "not mended"

@pytest.mark.gpu
def test_lost():
    with open("ran.txt", "a") as file:
        file.write("lost\\n")
    if not os.path.exists("mended"):
        import gpu_passed
        gpu_passed.device_is_lost = lambda: True
        raise RuntimeError("illegal memory access")

@pytest.mark.gpu
def test_after():
    with open("ran.txt", "a") as file:
        file.write("after\\n")
    import gpu_passed
    assert not gpu_passed.device_is_lost()

def test_of_another_mark():
    raise AssertionError
"""


@pytest.mark.parametrize("processes", [0, 2], ids=["one process", "xdist"])
def test_tests_that_passed_are_not_run_again(processes, tmp_path, monkeypatch):
    """And one that loses the device ends its process, not the tests after it."""
    (tmp_path / "test_x.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: a GPU\n")
    record, told, ran = (tmp_path / name for name in ("tests.jsonl", "told.txt", "ran.txt"))
    monkeypatch.setattr(testing, "ROOT", tmp_path)
    monkeypatch.setattr(testing, "fingerprint", lambda: "code")
    monkeypatch.setenv("PYTHONPATH", str(sources.ROOT / "tests"))
    monkeypatch.setenv("ZOO_GPU_FAILURES", str(told))
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    # Importing all plugins that are installed takes a process longer than these tests.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_PLUGINS", "xdist.plugin")

    def run():
        ran.write_text("")
        clock = iter([f"{time.monotonic()}"])
        monkeypatch.setattr(testing.time, "time", lambda: float(next(clock)) * 1e6)
        arguments = ["--mark", "gpu", "--record", str(record), "--processes", str(processes)]
        return testing.main([*arguments, "test_x.py"]), sorted(ran.read_text().splitlines())

    code, names = run()
    assert code == 1
    assert names == ["after", "lost", "right 0", "right 1", "right 2", "wrong"]
    outcomes = {k.split("::")[1]: x["outcome"] for k, x in gpu_passed.entries(record).items()}
    failed = {name for name, outcome in outcomes.items() if outcome == "failed"}
    assert failed == {"test_wrong", "test_lost"} and len(outcomes) == 6
    assert "test_x.py::test_wrong: AssertionError: not mended" in told.read_text()
    assert "illegal memory access" in told.read_text()
    # A second call: what has not passed, and then nothing.
    (tmp_path / "mended").write_text("")
    assert run() == (0, ["lost", "wrong"])
    assert run() == (0, [])
    # Another device or other versions, and other tests in the file: all of it again.
    monkeypatch.setenv(testing.SETTING, "another")
    assert len(run()[1]) == 6 and run() == (0, [])
    (tmp_path / "test_x.py").write_text(TESTS + "\n# another\n")
    assert len(run()[1]) == 6


def test_side_by_side_where_xdist_is_installed(monkeypatch):
    words = testing.command("gpu", "record", "call", 8, ["a.py"])
    assert words[-5:] == ["-n", "8", "--dist", "worksteal", "a.py"]
    assert "-n" not in testing.command("gpu", "record", "call", 0, ["a.py"])
    monkeypatch.setattr(testing.importlib.util, "find_spec", lambda _: None)
    assert "-n" not in testing.command("gpu", "record", "call", 8, ["a.py"])


def test_files_of_tests_that_need_a_gpu():
    """All of them, by their texts: those that pytest finds with the mark."""
    names = {path.rpartition("/")[2] for path in testing.files()}
    known = {"test_gpu.py", "test_dilated_attention_gpu.py", "test_capture.py", "test_base.py"}
    assert known | {"test_models_gpu.py"} <= names
    assert not any("recipes" in path for path in testing.files())


def test_what_never_ran_comes_first(tmp_path):
    """Then what failed; a line that was cut off is no line."""
    record = tmp_path / "tests.jsonl"
    lines = [
        {"test": "a", "outcome": "passed", "sources": "x"},
        {"test": "a", "outcome": "failed", "sources": "x"},
        {"test": "b", "outcome": "passed", "sources": "x"},
    ]
    record.write_text("\n".join(map(json.dumps, lines)) + '\n{"test": "c", "outc')
    known = gpu_passed.entries(record)
    assert {name: entry["outcome"] for name, entry in known.items()} == {
        "a": "failed",
        "b": "passed",
    }


def test_make_gpu_without_a_gpu():
    """One line, and exit status 1 (make's is 2)."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = ["make", "gpu", f"PYTHON={sys.executable}"]
    child = subprocess.run(
        command, cwd=sources.ROOT, env=environment, capture_output=True, text=True
    )
    assert child.returncode == 2
    assert child.stderr.splitlines()[0].endswith("sees no GPU")
