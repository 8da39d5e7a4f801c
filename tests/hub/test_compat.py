"""`make compat` tests what is declared, and would see what is wrong."""

import copy
import sys
from importlib import metadata

import compat
import pytest
from load_exports import ERROR
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

GOOD = {"hash": "0a", "error": 0.0, "greedy": True, "again": True}
RESULT = {
    "python": "3.10.1",
    "torch": "2.11.0",
    "transformers": "5.17.0",
    "huggingface_hub": "1.5.0",
    "found": [],
    "models": {"retnet": GOOD, "rwkv4": GOOD},
}


def changed(**figures):
    result = copy.deepcopy(RESULT)
    result["models"]["rwkv4"] = figures if "failed" in figures else GOOD | figures
    return result


def test_the_oldest_is_the_lowest_of_what_is_declared():
    python, requirements = compat.declared()
    assert python == "3.10"
    declared = {x.name: x.specifier for x in requirements}
    assert {"torch", "transformers", "safetensors", "huggingface_hub"} <= set(declared)
    oldest = {x.name: x.specifier for x in map(Requirement, compat.wanted("oldest"))}
    assert set(oldest) == set(declared)
    for name, specifier in oldest.items():
        (pin,) = specifier
        assert pin.operator == "==" and Version(pin.version) in declared[name]
        lower = [s for s in declared[name] if s.operator == ">="]
        assert [Version(s.version) for s in lower] == [Version(pin.version)]
    newest = {x.name: x.specifier for x in map(Requirement, compat.wanted("newest"))}
    assert newest == declared


def test_what_is_declared_admits_what_is_installed():
    """And what the installed transformers wants of the others, at least in part."""
    declared = {x.name: x.specifier for x in compat.declared()[1]}
    for name, specifier in declared.items():
        assert specifier.contains(metadata.version(name), prereleases=True), name
    for line in metadata.requires("transformers"):
        needed = Requirement(line)
        name = needed.name.replace("-", "_")
        if needed.marker is None and name in declared:
            pin = Version(compat.lowest(declared[name]))
            # Not above its range; below it, pip takes the lowest that transformers allows.
            above = [s for s in needed.specifier if s.operator in ("<", "<=")]
            assert all(pin in SpecifierSet(str(s)) for s in above), line


def test_a_range_without_a_lowest_version_is_refused():
    with pytest.raises(ValueError, match="expected one lowest version"):
        compat.lowest(SpecifierSet("<6"))


def test_this_python_is_found(monkeypatch, tmp_path):
    name = f"{sys.version_info.major}.{sys.version_info.minor}"
    monkeypatch.setattr(compat, "declared", lambda: (name, []))
    monkeypatch.setattr("shutil.which", lambda x: sys.executable if x == f"python{name}" else None)
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    for environment in compat.ENVIRONMENTS:
        assert compat.find_python(environment) == sys.executable
    monkeypatch.setattr("shutil.which", lambda x: None)
    with pytest.raises(SystemExit, match="--oldest-python PATH"):
        compat.find_python("oldest")


def test_what_is_good_is_said_to_be():
    assert compat.judge("bare", RESULT, RESULT) == []
    assert compat.judge("fla-after", RESULT | {"found": ["triton", "fla"]}, RESULT) == []
    # The frozen are other models, with bits of their own.
    assert compat.judge("version 1", changed(hash="1b"), None) == []
    lines = compat.table("oldest", {"bare": RESULT, "version 1": changed(hash="1b")})
    assert "torch 2.11.0" in lines[0]
    assert [line.split()[-2:] for line in lines[2:]] == [["ok", "ok"]] * 2


@pytest.mark.parametrize(
    ("column", "result", "complaint"),
    [
        ("zoo", changed(hash="1b"), "rwkv4: other bits"),
        ("zoo", changed(error=2 * ERROR), "rwkv4: logits are off"),
        ("zoo", changed(error=float("nan")), "rwkv4: logits are off"),
        ("by-id", changed(greedy=False), "rwkv4: greedy differs"),
        ("fla-after", changed(again=False), "rwkv4: again differs"),
        ("zoo", changed(failed="KeyError: 3"), "rwkv4: KeyError: 3"),
        ("bare", RESULT | {"found": ["triton"]}, "triton should not be there"),
        ("zoo", {"failed": "ImportError: no"}, "ImportError: no"),
    ],
)
def test_what_is_wrong_is_seen(column, result, complaint):
    (line,) = compat.judge(column, result, RESULT)
    assert line.startswith(f"{column}: ") and complaint in line
    table = compat.table("oldest", {"bare": RESULT, column: result})
    if "models" in result and not result["found"]:
        said = "FAILED" if "failed" in result["models"]["rwkv4"] else "WRONG"
        assert [row.split()[-1] for row in table[2:]] == ["ok", said]


def test_a_process_that_fails_is_seen(tmp_path):
    assert "recorded.safetensors" in compat.load(sys.executable, "bare", tmp_path)["failed"]
