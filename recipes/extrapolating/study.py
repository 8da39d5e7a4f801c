"""A study of lengths beyond those of training: which trials are read in which ways, from TOML."""

import copy
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path

from ablating.sweep import read_sweep
from pretraining.recipe import UsageError, nearest, parse_value, typed
from pretraining.recipe import pairs as words_in_pairs
from pretraining.usage import read_toml
from tasks import load

FAMILIES = "passkey", "passkey_by_segment"  # of recall


@dataclass
class Way:
    """One way to read with the weights of a model of the sweep.

    Attributes:
        model: a key of the sweep's models.
        fields: of the config, in place of those that it was trained with.
        by_length: field, or table.field -> its value for each of the study's lengths.
        attention: an attn_implementation that computes the same faster; empty: the model's own.
        panel: ways with the same one are drawn together.
    """

    model: str
    fields: dict = field(default_factory=dict)
    by_length: dict = field(default_factory=dict)
    attention: str = ""
    panel: str = ""


@dataclass
class Study:
    """What is measured. The fields are the keys of the TOML.

    Attributes:
        sweep: a TOML of ablate.py, whose finished trials are read.
        lengths: tokens of context, rising; the first is that of training.
        seeds: of the trials that are read.
        ways: name -> `Way`'s keys. The first is the baseline.
        name: results are written to output_dir/name.
        output_dir: a folder.
        text: a task of the sweep, for losses; empty: none.
        places: stretches of held-out text, one after the other and as long as the longest of
            lengths, of which the last tokens are targets, as many as the shortest has.
        first: token of these, among all that is held out.
        recall: a task of the sweep of the family passkey, or passkey_by_segment, for accuracies;
            empty: none.
        distances: from key to question, in tokens, or in segments from the key's to the question's,
            rising. In tokens each is of documents of the first of lengths that has it, in segments
            of documents of every length that has it.
        examples: of each distance.
    """

    sweep: str
    lengths: list[int]
    seeds: list[int]
    ways: dict
    name: str
    output_dir: str = "runs/extrapolation"
    text: str = ""
    places: int = 8
    first: int = 0
    recall: str = ""
    distances: list[int] = field(default_factory=list)
    examples: int = 32

    def __post_init__(self):
        """Checks that the keys fit each other and the sweep.

        Raises:
            UsageError: something that no study could use.
        """
        if not self.name or set(self.name) & set("/\\\0") or self.name.startswith("."):
            raise UsageError(f"name is the name of a folder, without slashes, got {self.name!r}.")
        self.plan_of = read_sweep(self.sweep)
        self.segment_length = self._segment_length()
        for key, least in (("lengths", 1), ("distances", 0 if self.segment_length else 1)):
            values = getattr(self, key)
            if sorted({*values}) != values or min(values, default=least) < least:
                called = "above 0" if least else "of at least 0"
                raise UsageError(f"{key} are numbers {called} that rise, got {values}.")
        if not self.lengths:
            raise UsageError("lengths are tokens of context, and there is none.")
        for key in ("places", "examples"):
            if getattr(self, key) < 1:
                raise UsageError(f"{key} is at least 1, got {getattr(self, key)}.")
        if not self.seeds or len({*self.seeds}) < len(self.seeds):
            raise UsageError(f"seeds are different, one or more, got {self.seeds}.")
        if self.first < 0:
            raise UsageError(f"first is at least 0, got {self.first}.")
        self._check_tasks()
        if not self.ways:
            raise UsageError("ways are tables such as [ways.NAME], and there is none.")
        self.ways = {name: self._way(name, table) for name, table in self.ways.items()}

    def _check_tasks(self):
        sweep = self.plan_of
        tasks = {"text": self.text, "recall": self.recall}
        if not any(tasks.values()):
            raise UsageError("name a task of the sweep: text for losses, recall for accuracies.")
        for key, name in tasks.items():
            if name and name not in sweep.tasks:
                raise UsageError(f"{key} is a task of {self.sweep}: {nearest(name, sweep.tasks)}")
        if self.text and not sweep.lower_is_better(self.text):
            raise UsageError(f"text is a task with a text, and {self.text!r} is a synthetic one.")
        if not self.recall:
            return
        recipe = self._recall_recipe()
        if recipe.task.get("name") not in FAMILIES:
            raise UsageError(
                f"recall is a task of the family {' or '.join(FAMILIES)}, got {self.recall!r}, "
                f"which is {recipe.task.get('name', 'a text')!r}."
            )
        if not self.distances:
            raise UsageError("distances say how far keys lie back, and there is none.")
        if self.segment_length:
            self._check_segments()
        else:
            self.example_lengths(recipe)

    def _recall_recipe(self):
        return self.plan_of.resolve(self.recall, next(iter(self.plan_of.models)), 1.0, 0)

    def _segment_length(self):
        """Tokens of a segment where distances are in segments, else 0."""
        is_synthetic = self.recall in self.plan_of.tasks
        return self._recall_recipe().task.get("segment_length", 0) if is_synthetic else 0

    def _check_segments(self):
        for length in self.lengths:
            if length % self.segment_length:
                raise UsageError(
                    f"lengths are those of whole segments of {self.segment_length} tokens, got "
                    f"{length}."
                )
        if self.distances[-1] >= self.lengths[-1] // self.segment_length:
            raise UsageError(
                f"the longest of lengths has {self.lengths[-1] // self.segment_length} segments, "
                f"and no key lies {self.distances[-1]} segments back; take shorter distances."
            )

    def _way(self, name, table):
        way = _made(Way, table, f"ways.{name}")
        sweep = self.plan_of
        if way.model not in sweep.models:
            raise UsageError(f"ways.{name}.model: {nearest(way.model, sweep.models)}")
        for key, values in way.by_length.items():
            if not isinstance(values, list) or len(values) != len(self.lengths):
                raise UsageError(
                    f"ways.{name}.by_length.{key} is a list of {len(self.lengths)} values, one for "
                    f"each of lengths, got {values!r}."
                )
        return way

    @property
    def folder(self):
        """What results are written to."""
        return Path(self.output_dir) / self.name

    @property
    def baseline(self):
        """The first way."""
        return next(iter(self.ways))

    def changed(self, way, length):
        """The fields of a config that a way sets, in texts of at most so many tokens.

        Args:
            way: a `Way`.
            length: tokens; the values for the first of `lengths` that holds them are taken.
        """
        index = next(n for n, longest in enumerate(self.lengths) if length <= longest)
        found = copy.deepcopy(way.fields)
        for key, values in way.by_length.items():
            *tables, last = key.split(".")
            table = found
            for name in tables:
                table = table.setdefault(name, {})
            table[last] = values[index]
        return found

    def example_lengths(self, recipe):
        """Distance -> tokens of the documents with it, the first of `lengths` that holds them.

        Raises:
            UsageError: a distance that no document has.
        """
        try:
            task = load({**recipe.task, "test_distances": self.distances})
        except UsageError as error:
            raise UsageError(f"distances: {error}") from None
        found = {}
        for distance in self.distances:
            least = task.length_of({"distance": distance})
            found[distance] = next((n for n in self.lengths if n >= least), None)
            if found[distance] is None:
                raise UsageError(
                    f"a document with a distance of {distance} has at least {least} tokens, more "
                    f"than the longest of lengths, {self.lengths[-1]}; take shorter distances."
                )
        return found

    def segments_back(self, length):
        """The distances, in segments, that documents of so many tokens have."""
        return [back for back in self.distances if back < length // self.segment_length]

    def measured(self, task, way):
        """What the figures of a trial are a function of, beside the trial itself."""
        by_length = {str(n): self.changed(way, n) for n in self.lengths}
        of_way = {"fields": by_length, "attention": way.attention}
        if task == self.text:
            return {**of_way, "places": self.places, "first": self.first}
        recalled = {**of_way, "distances": self.distances, "examples": self.examples}
        return recalled | ({"of": ["answers", "digits"]} if self.segment_length else {})


def read_study(path, overrides=()):
    """Reads a TOML file and applies overrides.

    Args:
        path: the file. Its stem is the study's name unless it says otherwise.
        overrides: command-line words: `--key value`, `--ways.NAME.key value`.

    Raises:
        UsageError: no such file, not TOML, an unknown key, a value of the wrong type or range.
    """
    values = read_toml(path)
    values.setdefault("name", Path(path).stem)
    for key, text in words_in_pairs(overrides):
        *tables, last = key.split(".")
        table = values
        for name in tables:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise UsageError(f"--{key}: {name} is no table.")
        table[last] = text if key in ("name", "output_dir", "sweep") else parse_value(text)
    for key in ("sweep", "lengths", "seeds"):
        if key not in values:
            raise UsageError(f"{path} does not say {key}.")
    return _made(Study, {"ways": {}, **values}, "")


def _made(kind, values, where):
    types = typing.get_type_hints(kind)
    if not isinstance(values, dict):
        raise UsageError(f"{where} is a table, got {values!r}.")
    for key in values:
        if key not in types:
            inside = f" in [{where}]" if where else ""
            raise UsageError(f"unknown key {key!r}{inside}: {nearest(key, types)}")
    names = {entry.name for entry in fields(kind)} & set(values)
    made = {name: typed(f"{where}.{name}".lstrip("."), values[name], types[name]) for name in names}
    if kind is Way and "model" not in made:
        raise UsageError(f"{where} names no model of the sweep; add a line model = 'NAME'.")
    return kind(**made)
