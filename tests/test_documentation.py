"""What the README says exists, and what exists is in the README."""

import re
import shutil
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
RECIPES = [tomllib.loads(path.read_text()) for path in (ROOT / "recipes").glob("configs/*.toml")]


PYTHON = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_alphabet():
    table = README.split("## Names of axes")[1].split("\n## ")[0]
    cells = [cell.strip() for cell in re.findall(r"(?<=\|)[^|\n]*(?=\|)", table)]
    pairs = {a: b for a, b in zip(cells, cells[1:]) if re.fullmatch("[A-Z]", a)}
    assert pairs == AXES


@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_architecture_is_complete(name):
    assert (ROOT / "hub_cards" / f"{name}.md").is_file(), "no card"
    assert any(recipe.get("architecture") == name for recipe in RECIPES), "no recipe"
    assert f"`zoo.models.{name}`" in README, "not in the table of models"


def test_the_tree_names_every_module():
    tree = README.split("## Where things are")[1].split("\n## ")[0]
    rooms = ("zoo", "zoo/core", "zoo/layers", "zoo/models", "zoo/hub", "zoo/contract", "kernels")
    rooms += ("recipes", "recipes/pretraining", "recipes/ablating", "recipes/scoring")
    rooms += ("recipes/tasks", "recipes/extrapolating")
    modules = [path for room in rooms for path in (ROOT / room).glob("*.py")]
    names = [path.name for path in modules if path.name != "__init__.py"]
    assert names
    missing = [name for name in names if f"  {name}" not in tree]
    assert not missing


def test_commands_are_those_of_the_makefile():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^make (\w+)", README, re.MULTILINE)) <= targets


def test_recipe_options_exist():
    """Options shown in the README are fields of the recipe or flags of the script."""
    fields = re.findall(
        r"^    (\w+): ", (ROOT / "recipes/pretraining/recipe.py").read_text(), re.MULTILINE
    )
    flags = re.findall(r'"--(\w+)"', (ROOT / "recipes/pretrain.py").read_text())
    shown = {
        option.split(".")[0]
        for line in README.splitlines()
        if line.startswith("accelerate launch")
        # What stands before the script is accelerate's.
        for option in re.findall(r"--([\w.]+)", line.partition("recipes/pretrain.py")[2])
    }
    assert shown and shown <= {*fields, *flags}


@pytest.mark.parametrize("number", range(len(PYTHON)))
@pytest.mark.filterwarnings("ignore")
def test_the_code_runs(number, tmp_path, monkeypatch, capsys):
    """As it stands there, with a tiny model where the demo's would be."""
    folder = "exported/retnet_demo"
    if folder in PYTHON[number]:
        config = zoo.RetNetConfig(
            vocab_size=259, hidden_size=32, num_hidden_layers=1, num_attention_heads=2
        )
        zoo.RetNetForCausalLM(config).save_pretrained(tmp_path / folder)
        for file in (ROOT / "tokenizers/byte").glob("*.json"):
            shutil.copy(file, tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    exec(compile(PYTHON[number], f"README {number}", "exec"), {"__name__": "readme"})
    if "Trainer(" in PYTHON[number]:
        assert (tmp_path / "finetuned/adapter/adapter_config.json").is_file()
    if "softmax_layers" in PYTHON[number]:
        expected = ["zoo_linear_attention"] * 3 + ["zoo_sliding_linear_attention"]
        assert capsys.readouterr().out == f"{expected}\n"


def test_every_figure_has_its_numbers():
    """A picture of results lies beside the raw results it was drawn from."""
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", README)
    assert pictures
    for picture in pictures:
        path = ROOT / picture
        raw = [path.with_suffix(".json")]
        if path.stem == path.parent.name:  # of all that lies there
            raw = [*path.parent.glob("*.json")]
        if path.parent.name == "figures":  # of a sweep's report
            raw = [path.parents[1] / "results.json"]
        assert path.is_file() and raw and all(file.is_file() for file in raw), picture


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert project["version"] == zoo.__version__
    assert f"\nversion: {zoo.__version__}\n" in citation
    assert f"\n## {zoo.__version__}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_extra_is_used():
    """An extra that no code imports is a promise."""
    names = {"flash-linear-attention": "fla", "liger-kernel": "liger_kernel"}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    folders = ("zoo", "kernels", "recipes")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    code = "".join(path.read_text(encoding="utf-8") for path in sources)
    for extra in ("train", "gpu"):
        for requirement in extras["optional-dependencies"][extra]:
            package = re.match(r"[\w-]+", requirement)[0]
            module = names.get(package, package).replace("-", "_")
            assert re.search(rf"\b{module}\b", code), f"{extra}: {package}"
