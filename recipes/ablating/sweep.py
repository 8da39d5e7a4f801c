"""A sweep: which models are compared on which tasks, and how, from TOML plus `--key value`."""

import math
import typing
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path

from pretraining.recipe import (
    Recipe,
    UsageError,
    make_recipe,
    nearest,
    pairs,
    parse_value,
    typed,
)
from pretraining.usage import read_toml

# Keys of a recipe that a sweep sets itself, and where it says what they are.
NOT_A_TASKS = {
    "name": "a trial's folder follows from its recipe",
    "output_dir": "say it once, at the top",
    "architecture": "say it in [models.NAME]",
    "model": "call them `fields`",
    "learning_rate": "say [sweep] learning_rates",
    "seed": "say [sweep] seeds and select_seed",
}
MATCHED = ("parameters", "flops", "none")


@dataclass
class Match:
    """What models have in common. The MLP's width is solved for it."""

    by: str = "parameters"  # without embeddings; "flops": of training, per token; or "none"
    reference: str = ""  # the model that the others are made to match; empty: the baseline


@dataclass
class Search:
    """Which learning rates and seeds are tried."""

    learning_rates: list[float] = field(default_factory=lambda: [1e-3, 3e-3, 1e-2])
    select_seed: int = 0  # rates are compared on it
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])  # others, for the best rate
    extend_at_edge: int = 1  # further rates tried beyond a best one at the edge
    baseline: str = ""  # differences are to it, and it is run twice; empty: the first model


@dataclass
class Engine:
    """Where trials run."""

    slots: int = 1  # trials at once
    gpus_per_trial: int = 0
    slurm: dict = field(default_factory=dict)  # parameters of submitit's executor
    ray: dict = field(default_factory=dict)  # arguments of ray.init


@dataclass
class Speed:
    """What is measured of each model beside its trials, one sequence at a time."""

    lengths: list[int] = field(default_factory=list)  # tokens
    repeats: int = 3  # passes that a median is taken of


@dataclass
class Sweep:
    """A comparison of models. The fields are the tables of the TOML."""

    name: str  # the sweep is written to output_dir/name
    tasks: dict  # name -> keys of a recipe; `fields` are those of all models there
    models: dict  # name -> architecture, fields, keys of a recipe, tasks.NAME with both of these
    output_dir: str = "runs/ablations"
    recipe: dict = field(default_factory=dict)  # keys of all recipes
    fields: dict = field(default_factory=dict)  # of all models
    match: Match = field(default_factory=Match)
    sweep: Search = field(default_factory=Search)
    speed: Speed = field(default_factory=Speed)
    engine: Engine = field(default_factory=Engine)

    def __post_init__(self):
        """Checks names, ranges and that tables fit each other.

        Raises:
            UsageError: something that no sweep could use.
        """
        if not self.name or set(self.name) & set("/\\\0") or self.name.startswith("."):
            raise UsageError(f"name is the name of a folder, without slashes, got {self.name!r}.")
        for name in ("tasks", "models"):
            tables = getattr(self, name)
            if not tables or not all(isinstance(table, dict) for table in tables.values()):
                raise UsageError(f"{name} are tables such as [{name}.NAME], and there is none.")
        self.sweep.baseline = self.sweep.baseline or next(iter(self.models))
        self.match.reference = self.match.reference or self.sweep.baseline
        for key, name in (
            ("sweep.baseline", self.sweep.baseline),
            ("match.reference", self.match.reference),
        ):
            if name not in self.models:
                raise UsageError(f"{key} is one of the models, got {name!r}: " + self._model(name))
        self._check_search()
        known = {*Recipe.__dataclass_fields__, "fields"}
        _check_keys("recipe", self.recipe, known - {"fields"})
        for name, table in self.tasks.items():
            _check_keys(f"tasks.{name}", table, known)
        for name, table in self.models.items():
            if not isinstance(table.get("architecture"), str):
                raise UsageError(f"models.{name} names no architecture, a key of zoo.MODELS.")
            own = {key: value for key, value in table.items() if key != "architecture"}
            _check_keys(f"models.{name}", own, known | {"tasks"})
            for task, changed in table.get("tasks", {}).items():
                if task not in self.tasks:
                    raise UsageError(f"models.{name}.tasks.{task}: {nearest(task, self.tasks)}")
                _check_keys(f"models.{name}.tasks.{task}", changed, known)
                self._check_width(name, changed)
            self._check_width(name, table)
            for task in self.tasks:
                self.resolve(task, name, self.sweep.learning_rates[0], 0)

    def _model(self, name):
        return nearest(name, self.models)

    def _check_search(self):
        search, engine = self.sweep, self.engine
        if self.match.by not in MATCHED:
            known = ", ".join(map(repr, MATCHED))
            raise UsageError(f"match.by is one of {known}, got {self.match.by!r}.")
        search.learning_rates = sorted({*search.learning_rates})
        if not search.learning_rates or not 0 < search.learning_rates[0] < math.inf:
            raise UsageError(
                f"sweep.learning_rates are numbers above 0, got {search.learning_rates}."
            )
        if not search.seeds or len({*search.seeds}) < len(search.seeds) or min(search.seeds) < 0:
            raise UsageError(f"sweep.seeds are different and at least 0, got {search.seeds}.")
        if search.select_seed in search.seeds:
            raise UsageError(
                f"sweep.seeds are others than select_seed = {search.select_seed}, on which the "
                f"rate was chosen, got {search.seeds}; take it out."
            )
        for name, value in (
            ("sweep.extend_at_edge", search.extend_at_edge),
            ("sweep.select_seed", search.select_seed),
            ("engine.gpus_per_trial", engine.gpus_per_trial),
            ("engine.slots", engine.slots - 1),
        ):
            if value < 0:
                least = 1 if name == "engine.slots" else 0
                raise UsageError(f"{name} is at least {least}, got {value + least}.")

    def _check_width(self, name, table):
        is_solved = self.match.by != "none" and name != self.match.reference
        if is_solved and "intermediate_size" in table.get("fields", {}):
            raise UsageError(
                f"models.{name}: intermediate_size is solved for, to match "
                f'{self.match.reference}; leave it out, or say [match] by = "none".'
            )

    @property
    def folder(self):
        """What the sweep is written to."""
        return Path(self.output_dir) / self.name

    def resolve(self, task, model, learning_rate, seed, width=None):
        """The recipe of a trial, whose folder is not known yet.

        What is said of fewer trials comes over what is said of more: of all, of a task, of a model,
        of a model on a task.

        Args:
            task: a key of `tasks`.
            model: a key of `models`.
            learning_rate: its peak.
            seed: of weights and data.
            width: of the MLP; None: as the tables say.

        Raises:
            UsageError: keys that make no recipe.
        """
        own = self.models[model]
        layers = [self.recipe, self.tasks[task], own, own.get("tasks", {}).get(task, {})]
        config = dict(self.fields)
        values = {"cache_dir": str(Path(self.output_dir) / ".corpus")}
        for layer in layers:
            values |= {k: v for k, v in layer.items() if k not in ("fields", "tasks")}
            config |= layer.get("fields", {})
        if width is not None:
            config["intermediate_size"] = width
        values |= {"name": "run", "model": config, "learning_rate": learning_rate, "seed": seed}
        try:
            return make_recipe({**values, "output_dir": str(self.folder)}, f"models.{model}")
        except UsageError as error:
            raise UsageError(f"{model} on {task}: {error}") from None

    def lower_is_better(self, task):
        """Whether the score of a task is bits per byte, of text, and not an accuracy."""
        return not self.tasks[task].get("task", self.recipe.get("task"))


def _check_keys(where, table, known):
    for key in table:
        if key in NOT_A_TASKS:
            raise UsageError(f"{where}.{key} is not said there: {NOT_A_TASKS[key]}.")
        if key not in known:
            raise UsageError(f"unknown key {key!r} in [{where}]: {nearest(key, known)}")
    for key in ("fields", "tasks"):
        if not isinstance(table.get(key, {}), dict):
            raise UsageError(f"{where}.{key} is a table, got {table[key]!r}.")


def read_sweep(path, overrides=()):
    """Reads a TOML file and applies overrides.

    Args:
        path: the file. Its stem is the sweep's name unless it says otherwise.
        overrides: command-line words: `--sweep.seeds "[1, 2]"`, `--recipe.steps 20`, `--name x`.

    Raises:
        UsageError: no such file, not TOML, an unknown key, a value of the wrong type or range.
    """
    values = read_toml(path)
    values.setdefault("name", Path(path).stem)
    for key, text in pairs(overrides):
        *tables, last = key.split(".")
        table = values
        for name in tables:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise UsageError(f"--{key}: {name} is no table.")
        table[last] = text if key in ("name", "output_dir") else parse_value(text)
    for name in ("tasks", "models"):
        values.setdefault(name, {})
    return _made(Sweep, values, "")


def _made(kind, values, where):
    """A dataclass from a table, whose keys and types are checked."""
    types = typing.get_type_hints(kind)
    for key in values:
        if key not in types:
            inside = f" in [{where}]" if where else ""
            raise UsageError(f"unknown key {key!r}{inside}: {nearest(key, types)}")
    made = {}
    for entry in fields(kind):
        if entry.name in values:
            value, name = values[entry.name], f"{where}.{entry.name}".lstrip(".")
            expected = types[entry.name]
            value = typed(name, value, dict if is_dataclass(expected) else expected)
            made[entry.name] = _made(expected, value, name) if is_dataclass(expected) else value
    return kind(**made)
