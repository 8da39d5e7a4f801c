"""What the README says exists, and what exists is in the README."""

import re
from pathlib import Path

import pytest

import zoo
from zoo.kernels.axes import AXES

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES = [tomllib.loads(path.read_text()) for path in (ROOT / "recipes").glob("*.toml")]


def test_the_alphabet():
    table = README.split("## Names of axes")[1].split("\n## ")[0]
    cells = [cell.strip() for cell in re.findall(r"(?<=\|)[^|\n]*(?=\|)", table)]
    pairs = {a: b for a, b in zip(cells, cells[1:]) if re.fullmatch("[A-Z]", a)}
    assert pairs == AXES


@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_architecture_is_complete(name):
    assert (ROOT / "hub_cards" / f"{name}.md").is_file(), "no card"
    assert any(recipe["architecture"] == name for recipe in RECIPES), "no recipe"
    assert f"`zoo.{name}`" in README, "not in the table of models"


def test_the_tree_names_every_module():
    tree = README.split("## Where things are")[1].split("\n## ")[0]
    modules = [*(ROOT / "zoo").glob("*.py"), *(ROOT / "kernels").glob("*.py")]
    names = [path.name for path in modules if path.name != "__init__.py"]
    assert names
    missing = [name for name in names if f"  {name}" not in tree]
    assert not missing


def test_commands_are_those_of_the_makefile():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^make (\w+)", README, re.MULTILINE)) <= targets


def test_recipe_options_exist():
    """Options shown in the README are fields of the recipe or flags of the script."""
    fields = re.findall(r"^    (\w+): ", (ROOT / "recipes/recipe.py").read_text(), re.MULTILINE)
    flags = re.findall(r'"--(\w+)"', (ROOT / "recipes/pretrain.py").read_text())
    shown = {
        option.split(".")[0]
        for line in README.splitlines()
        if line.startswith("accelerate launch")
        for option in re.findall(r"--([\w.]+)", line)
    }
    assert shown and shown <= {*fields, *flags}
