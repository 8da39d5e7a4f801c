"""`import zoo` is the same library from a clone, an editable install, a wheel and an sdist."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from forks import Forks

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = sysconfig.get_paths()["purelib"]
# Imports every module of zoo and prints where each came from. -S keeps the editable install of
# this very checkout out of the way: without it a wheel that lacks a file would find it here.
IMPORT_ALL = """
import importlib, json, site, sys
assert "zoo" not in sys.modules
sys.path[:1], sites = json.loads(sys.argv[1])
for folder in sites:
    site.addsitedir(folder)
print(json.dumps({name: importlib.import_module(name).__file__ for name in sys.argv[2:]}))
"""
# What zoo imports of others, once for all of them.
IMPORTED = ["torch", "transformers.modeling_utils", "transformers.generation.utils"]


def run(*command, cwd, **environment):
    """Run a command and return what it printed; fail with what it said."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [str(part) for part in command]
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def pip_install(target, *arguments):
    options = ["-q", "--no-index", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
    run(sys.executable, "-m", "pip", "install", *options, "-t", target, *arguments, cwd=target)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The files a commit of everything would hold, in a folder of their own."""
    listing = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    folder = tmp_path_factory.mktemp("clone")
    for name in filter(None, listing.stdout.split("\0")):
        if os.path.lexists(ROOT / name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def build(kind, source, folder):
    """Build an sdist or a wheel with the backend, without a network. Returns the file."""
    code = f"from setuptools.build_meta import build_{kind} as b; import sys; b(sys.argv[1])"
    run(sys.executable, "-c", code, folder, cwd=source)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(clone, tmp_path_factory):
    source = tmp_path_factory.mktemp("source") / "clone"
    shutil.copytree(clone, source, symlinks=True)
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def wheel_of_sdist(clone, tmp_path_factory):
    source = tmp_path_factory.mktemp("source") / "clone"
    shutil.copytree(clone, source, symlinks=True)
    sdist = build("sdist", source, tmp_path_factory.mktemp("sdist"))
    unpacked = tmp_path_factory.mktemp("unpacked")
    shutil.unpack_archive(sdist, unpacked)
    (source,) = unpacked.iterdir()
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


def module_names(clone):
    """Every module of zoo, by the names it is imported under."""
    paths = [path.relative_to(clone) for path in (clone / "zoo").rglob("*.py")]
    paths += ["zoo" / path.relative_to(clone) for path in (clone / "kernels").glob("*.py")]
    names = {".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths}
    return sorted(name for name in names if not name.endswith("__main__"))


@pytest.fixture(scope="module")
def forks():
    """Forks of a Python that has torch and transformers, and finds nothing else by itself."""
    forks = Forks(IMPORTED, path=[LIBRARIES], env={"OMP_NUM_THREADS": "1"}, options=["-S"])
    yield forks
    forks.close()


def assert_imports(forks, clone, home, cwd, path=(), site=()):
    """Import all of zoo in a fork in `cwd`; every module must come from `home`."""
    names = module_names(clone)
    assert any(name.startswith("zoo.kernels.") for name in names)
    script = cwd / "import_all.py"
    script.write_text(IMPORT_ALL)
    # As `python -c` has it: the working folder, then PYTHONPATH.
    paths = [list(map(str, x)) for x in ((cwd, *path), site)]
    fork = forks.start(script, json.dumps(paths), *names, cwd=cwd)
    output, errors = fork.communicate()
    script.unlink()
    assert fork.returncode == 0, errors
    found = json.loads(output)
    assert set(found) == set(names)
    home = home.resolve()
    elsewhere = {n: f for n, f in found.items() if not Path(f).resolve().is_relative_to(home)}
    assert elsewhere == {}


def test_clone(forks, clone):
    # Not installed: the working folder is on the path.
    assert_imports(forks, clone, home=clone, cwd=clone)


def test_editable(forks, clone, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    pip_install(target, "-e", clone)
    # On the path too, before the libraries: this checkout's own finder has the same name.
    assert_imports(forks, clone, home=clone, cwd=tmp_path, path=[target], site=[target])


@pytest.mark.parametrize("kind", ["wheel", "wheel_of_sdist"])
def test_wheel(forks, clone, kind, request, tmp_path):
    built = request.getfixturevalue(kind)
    target = tmp_path / "target"
    target.mkdir()
    pip_install(target, built)
    assert_imports(forks, clone, home=target, cwd=tmp_path, path=[target])
    script = (target / "bin" / "zoo").read_text()
    assert "from zoo.cli import main" in script


@pytest.mark.parametrize("kind", ["wheel", "wheel_of_sdist"])
def test_wheel_holds_everything_under_one_name(clone, kind, request):
    with zipfile.ZipFile(request.getfixturevalue(kind)) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0] for name in names} == {"zoo", "longzoo-0.1.0.dist-info"}
    data = [*clone.glob("hub_cards/*.md"), *clone.glob("tokenizers/byte/*")]
    expected = {f"zoo/{path.relative_to(clone).as_posix()}" for path in data}
    expected |= {p.relative_to(clone).as_posix() for p in clone.glob("zoo/**/*.py")}
    expected |= {f"zoo/kernels/{path.name}" for path in clone.glob("kernels/*.py")}
    assert expected - names == set()
