"""Every model's export, on the oldest and on the newest libraries that pyproject.toml allows.

    make compat
    python tests/hub/compat.py [--folder FOLDER] [--only oldest|newest] [--upgrade]
                               [--oldest-python PATH] [--newest-python PATH]

Two environments are made in the folder (.venv/compat), which takes minutes and, where pip brings
builds of PyTorch for GPUs, gigabytes; they stay:

    oldest   the oldest Python, and of every dependency the lowest version
    newest   the newest Python that is found here, and of every dependency what pip takes for the
             newest; again at each --upgrade

Neither has zoo, triton or fla: the last two lie beside them, for the columns that want them. Each
model is exported here and loaded there in the ways that load_exports.py lists; so are the frozen
exports of every format version. What must hold: within an environment the logits are the same bits
however a model was loaded, they are what was computed here up to rounding, and `generate` and
saving work. Otherwise the exit status is 1.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from freeze import FROZEN, write_exports
from load_exports import ERROR
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from transformers.utils.logging import disable_progress_bar

from zoo.hub.messages import some

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
MODES = ("bare", "by-id", "zoo", "fla-before", "fla-after")
ENVIRONMENTS = ("oldest", "newest")


def declared(text=None):
    """What pyproject.toml says: (the oldest Python, "3.10"; the `Requirement`s of zoo itself)."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8") if text is None else text
    project = tomllib.loads(text)["project"]
    python = lowest(SpecifierSet(project["requires-python"]))
    return python, [Requirement(line) for line in project["dependencies"]]


def lowest(specifiers):
    """The lowest version that a range begins with, as it is written there."""
    bounds = [s.version for s in specifiers if s.operator in (">=", "==")]
    if len(bounds) != 1:
        raise ValueError(f"expected one lowest version (>=), got {str(specifiers)!r}.")
    return bounds[0]


def wanted(environment):
    """What pip is asked for, for an environment."""
    requirements = declared()[1]
    if environment == "newest":
        return [f"{x.name}{x.specifier}" for x in requirements]
    return [f"{x.name}=={lowest(x.specifier)}" for x in requirements]


def find_python(environment):
    """An interpreter for an environment.

    Looked for on the PATH and among those of pyenv; the newest is of the highest number.

    Raises:
        SystemExit: there is none.
    """
    oldest = declared()[0]
    minor = int(oldest.split(".")[1])
    for number in [minor] if environment == "oldest" else range(minor + 20, minor - 1, -1):
        name = f"python3.{number}"
        pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
        found = sorted(pyenv.glob(f"3.{number}.*/bin/{name}"), key=lambda p: Version(p.parts[-3]))
        for path in (shutil.which(name), *reversed(found)):
            # pyenv's names on the PATH may stand for nothing.
            if path and not subprocess.run([path, "-c", ""], capture_output=True).returncode:
                return path
    sys.exit(f"no python{oldest} here; install it, or give one: --{environment}-python PATH")


def pip(python, *arguments):
    """Runs pip, by the user's own settings."""
    command = [python, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        lines = [x for x in result.stderr.splitlines() if x.startswith("ERROR")] or ["it failed"]
        sys.exit(f"{' '.join(map(str, command))}: {' '.join(lines)}")


def make(environment, folder, interpreter=None, upgrade=False):
    """Makes an environment, if it is not there as it should be. Returns its Python."""
    home, beside = folder / environment, folder / f"{environment}-fla"
    python, stamp = home / "bin" / "python", home / "compat.txt"
    requirements = wanted(environment)
    asked = "\n".join(requirements) + "\n"
    if stamp.is_file() and stamp.read_text() == asked and not upgrade:
        return python
    print(f"{environment}: installing into {home} (once; minutes)", flush=True)
    if not python.is_file():
        subprocess.run([interpreter or find_python(environment), "-m", "venv", home], check=True)
    pip(python, "install", "--upgrade", *requirements)
    # It comes with builds of PyTorch for GPUs, which need the very one.
    code = "import importlib.metadata as m; print(*m.requires('torch'), sep='\\n')"
    needs = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    triton = [Requirement(x) for x in needs.stdout.splitlines() if x.startswith("triton")]
    triton = [f"triton{x.specifier}" for x in triton] or ["triton"]
    pip(python, "uninstall", "--yes", "triton")
    libraries = ("flash-linear-attention", "fla-core", "einops", *triton)
    pip(python, "install", "--upgrade", "--no-deps", "--target", beside, *libraries)
    stamp.write_text(asked)
    return python


def load(python, mode, exports, path=()):
    """What load_exports.py says, or {"failed": its last line}.

    Args:
        python: that runs it.
        mode: one of `MODES`.
        exports: the folder of exports.
        path: folders of modules beside the environment's own.
    """
    kept = ("PYTHONPATH", "HF_", "TRANSFORMERS_", "VIRTUAL_ENV", "TRITON_")
    environment = {n: x for n, x in os.environ.items() if not n.startswith(kept)}
    with tempfile.TemporaryDirectory() as home:
        environment |= {
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": f"{home}/hub",
            "HF_MODULES_CACHE": f"{home}/modules",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(map(str, path)),
        }
        result = subprocess.run(
            [python, HERE / "load_exports.py", mode, exports],
            cwd=home,
            env=environment,
            capture_output=True,
            text=True,
        )
    if result.returncode:
        return {"failed": (result.stderr.strip().splitlines() or ["it said nothing"])[-1]}
    return json.loads(result.stdout.splitlines()[-1])


def judge(column, result, reference):
    """What is wrong with a run, in lines.

    Args:
        column: its name in the table.
        result: of `load`.
        reference: the result whose bits it must have; None: there is none.
    """
    if "failed" in result:
        return [f"{column}: {result['failed']}"]
    complaints = {}
    for name, model in result["models"].items():
        found = [f"{x} differs" for x in ("greedy", "again") if not model.get(x, True)]
        if "failed" in model:
            found.append(model["failed"])
        elif not model["error"] <= ERROR:
            found.append(f"logits are off by {model['error']:.0e} of the largest")
        elif reference and model["hash"] != reference["models"].get(name, {}).get("hash"):
            found.append("other bits than when it is loaded bare")
        for line in found:
            complaints.setdefault(line, []).append(name)
    wrong = [f"{column}: {some(names)}: {line}" for line, names in complaints.items()]
    if column.startswith(("bare", "by-id", "version")) and result["found"]:
        wrong.append(f"{column}: {some(result['found'])} should not be there")
    return wrong


def run(environment, folder, exports, frozen):
    """All columns of an environment: name -> result of `load`."""
    python, beside = folder / environment / "bin" / "python", folder / f"{environment}-fla"
    paths = {"zoo": [ROOT], "fla-before": [beside], "fla-after": [beside]}
    results = {mode: load(python, mode, exports, paths.get(mode, ())) for mode in MODES}
    return results | {f"version {n}": load(python, "bare", old) for n, old in frozen.items()}


def table(environment, results):
    """The results of an environment as lines: a model a row, a way to load it a column."""
    ran = [x for x in results.values() if "failed" not in x]
    if not ran:
        return [f"{environment}: nothing ran"]
    about = ", ".join(f"{x} {ran[0][x]}" for x in ("python", "torch", "transformers"))
    names = list(dict.fromkeys(name for x in ran for name in x["models"]))
    rows = [["", "hash", "error", *results]]
    for name in names:
        models = {column: x.get("models", {}).get(name) for column, x in results.items()}
        there = [x for x in models.values() if x and "failed" not in x]
        bare = models.get("bare") or {}
        error = f"{max(x['error'] for x in there):.1e}" if there else "-"
        row = [name, bare.get("hash", "-"), error]
        for column, x in models.items():
            if x is None or "failed" in x:
                row.append("-" if x is None else "FAILED")
                continue
            same = x["hash"] == bare.get("hash") or column.startswith("version")
            good = same and x["error"] <= ERROR and x["greedy"] and x["again"]
            row.append("ok" if good else "WRONG")
        rows.append(row)
    width = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(x.ljust(n) for x, n in zip(row, width)).rstrip() for row in rows]
    return [f"{environment}: {about}, huggingface_hub {ran[0]['huggingface_hub']}", *lines]


def main(arguments=None):
    """Makes what is missing, runs everything, prints a table. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv" / "compat")
    parser.add_argument("--only", choices=ENVIRONMENTS, help="one of the two")
    parser.add_argument("--upgrade", action="store_true", help="look for newer versions")
    for name in ENVIRONMENTS:
        parser.add_argument(f"--{name}-python", help="instead of one that is found")
    options = parser.parse_args(arguments)
    disable_progress_bar()
    folder = options.folder.resolve()
    environments = [options.only] if options.only else list(ENVIRONMENTS)
    for name in environments:
        make(name, folder, getattr(options, f"{name}_python"), options.upgrade)
    wrong = []
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor() as pool:
        exports, frozen = Path(work) / "exports", {}
        exports.mkdir()
        write_exports(exports)
        for path in sorted(FROZEN.iterdir()):
            version = path.name.removesuffix(".tar.xz")
            frozen[version] = Path(work) / version
            with tarfile.open(path) as archive:
                archive.extractall(frozen[version], filter="data")
        runs = pool.map(lambda name: run(name, folder, exports, frozen), environments)
        for name, results in zip(environments, runs):
            print("\n".join(["", *table(name, results)]), flush=True)
            for column, result in results.items():
                bare = None if column.startswith("version") else results["bare"]
                bare = None if bare and "failed" in bare else bare
                wrong += [f"{name}: {line}" for line in judge(column, result, bare)]
    print("\n".join(["", *(wrong or ["everything is as it should be"])]))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
