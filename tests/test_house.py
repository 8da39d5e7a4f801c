"""The rules of the repository that nothing else would notice being broken."""

import ast
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports

ROOT = Path(__file__).resolve().parent.parent
# A room and those it may import from, beside itself. kernels/ stands in zoo/ as a link.
ROOMS = {
    "models": {"layers", "core", "kernels"},
    "layers": {"core", "kernels"},
    "core": {"kernels"},
    "kernels": set(),
}
# What exporting copies beside a checkpoint, flat: transformers must be able to run it alone.
MODELLING = sorted(
    path
    for room in ROOMS
    for path in (ROOT / "zoo" / room).glob("*.py")
    if path.name != "__init__.py"
)
LIBRARIES = {"torch", "transformers", "huggingface_hub", "safetensors", "triton"}
# Faster where it is installed; imported inside a function, behind a try.
LIBRARIES |= {"liger_kernel"}
modelling_file = pytest.mark.parametrize(
    "path", MODELLING, ids=lambda p: f"{p.parent.name}/{p.name}"
)


def project_files():
    """What a commit of everything would hold."""
    listing = subprocess.run(
        # The owner of a checkout in a container is often somebody else, which git refuses.
        ["git", "-c", "safe.directory=*", "ls-files", "-z", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    paths = {ROOT / name for name in listing.stdout.split("\0") if name}
    return sorted(path for path in paths if path.is_file())


def imports_of(path):
    """The imports of a file as (level, module, whether an ImportError would be survived)."""

    def visit(node, guarded):
        if isinstance(node, ast.Import):
            found.extend((0, alias.name, guarded) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or "", guarded))
        for child in ast.iter_child_nodes(node):
            # transformers looks inside functions too, but only in the file of the model itself.
            helper = path.parent.name == "kernels"
            survives = isinstance(node, ast.Try) and child in node.body
            available = isinstance(node, ast.If) and "available" in ast.unparse(node.test)
            in_function = helper and isinstance(node, ast.FunctionDef)
            visit(child, guarded or survives or available or in_function)

    found = []
    visit(ast.parse(path.read_text()), False)
    return found


def test_the_guards_have_something_to_guard():
    assert {path.parent.name for path in MODELLING} == set(ROOMS)


@pytest.mark.parametrize("folder", ["kernels", "tokenizers", "hub_cards"])
def test_never_a_package(folder):
    # With an __init__.py, `import transformers` breaks for whoever runs Python from the root:
    # the names kernels and tokenizers belong to Hugging Face.
    assert list((ROOT / folder).rglob("__init__.py")) == []


def test_kernels_are_linked_into_zoo():
    assert os.readlink(ROOT / "zoo" / "kernels") == "../kernels"


def test_transformers_imports_from_the_root():
    code = (
        "from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer\n"
        "print(AutoTokenizer.from_pretrained('tokenizers/byte')('Hi')['input_ids'])\n"
    )
    # -c puts the working folder first on the path, as running `python` there does.
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "[72, 105]\n"


def test_modelling_file_names_are_unique():
    # An exported folder is flat.
    counts = Counter(path.name for path in MODELLING)
    assert [name for name, count in counts.items() if count > 1] == []


@modelling_file
def test_modelling_file_imports(path):
    allowed = LIBRARIES | sys.stdlib_module_names
    for level, module, guarded in imports_of(path):
        if level == 0:
            package = module.split(".")[0]
            assert package in allowed, f"imports {module}"
            needs_triton = package == "triton" and not path.stem.endswith("_triton")
        else:
            # What the exporter makes `from .module import name` of.
            form = {1: r"(\w+)", 2: r"\w+\.(\w+)"}.get(level, "")
            assert re.fullmatch(form, module), f"from {'.' * level}{module} import"
            target = path.parents[level - 1] / (module.replace(".", "/") + ".py")
            assert target.is_file(), f"from .{module}: only a file can be copied beside the model"
            room, other = path.parent.name, target.parent.name
            assert other in ROOMS[room] | {room}, f"{room} must not know of {other}"
            needs_triton = module.endswith("_triton") and not path.stem.endswith("_triton")
        assert guarded or not needs_triton, f"imports {module} where it may be missing"


@modelling_file
def test_modelling_file_loads_from_the_hub(path):
    # From there transformers asks for whatever any of the files imports outside of a try, inside
    # functions too, before it runs one. A folder's other files it does not look into.
    optional = {"triton", "liger_kernel"}
    assert set(get_imports(path)) <= (LIBRARIES - optional) | sys.stdlib_module_names


@modelling_file
def test_modelling_file_survives_export(path):
    tree = ast.parse(path.read_text())
    strings = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    # transformers finds imports by regular expression, in docstrings as well.
    lines = [line for text in strings for line in text.splitlines()]
    assert [line for line in lines if re.match(r"\s*(from|import)\s+\.", line)] == []
    # Postponed annotations are strings, which @strict cannot check.
    assert (0, "__future__") not in {found[:2] for found in imports_of(path)}


def test_no_file_is_large():
    assert [str(p) for p in project_files() if p.stat().st_size > 1_000_000] == []


def test_no_file_names_one_machine():
    # Where a package comes from is the user's setting, and nobody else has these folders.
    folders = r"(?<![\w.~])/(?:work|opt|root|home)/|\bfile:///"
    hosts = r"\bpypi\.org|pythonhosted\.org|download\.pytorch\.org|--(?:extra-)?index-url"
    pattern = re.compile(f"{folders}|{hosts}".encode())
    found = {str(p): m[0] for p in project_files() if (m := pattern.search(p.read_bytes()))}
    assert found == {}


def test_test_file_names_are_unique():
    # pytest imports two files of one name as one module, and stops.
    counts = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in counts.items() if count > 1] == []
    # An __init__.py in tests/kernels would put a package `kernels` on the path.
    assert list((ROOT / "tests").rglob("__init__.py")) == []
