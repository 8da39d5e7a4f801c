"""What a recipe's [[sources]], its [task] and its context_schedule may say."""

import dataclasses
import math

from tasks import load

from .usage import UsageError

# Of these a source may have its own; else it has the recipe's.
TEXT_KEYS = ("data", "data_config", "data_split", "text_column", "streaming")
KEYS = ("name", *TEXT_KEYS, "weight")
# What a recipe with a task has in place of these keys' defaults: it has no text, and its length
# follows.
NOT_OF_A_TASK = {"data": "", "tokenizer": "", "sequence_length": 0}
# Of these it has the defaults.
OF_TEXT = TEXT_KEYS[1:] + ("sources", "held_out", "packing", "carry_state", "tokenising_workers")
OF_TEXT += ("eval_bytes", "eval_positions", "eval_lengths", "eval_contexts", "sample_prompts")


def check_sources(sources, data):
    """Checks a recipe's [[sources]] against each other and against its `data`.

    Args:
        sources: tables with a name, data and a weight, and what else says how the data is read.
        data: the recipe's own, '' where there are sources.

    Raises:
        ValueError: a table that no run could use.
    """
    if bool(sources) == bool(data):
        raise ValueError(
            "a recipe has either data or [[sources]], got "
            + (f"data = {data!r} and {len(sources)} [[sources]]" if data else "neither")
            + "; say what is read in one way."
        )
    for number, source in enumerate(sources, 1):
        _check_source(source, f"[[sources]] number {number}")
    names = [source["name"] for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"each of the [[sources]] has a name of its own, got {name!r} "
                f"{names.count(name)} times; rename all but one."
            )


def _check_source(source, where):
    for key, value in source.items():
        if key not in KEYS:
            raise ValueError(f"{where} has an unknown key {key!r}; known are {', '.join(KEYS)}.")
        kind, called = (bool, "true or false") if key == "streaming" else (str, "a string")
        if key != "weight" and type(value) is not kind:
            raise ValueError(f"{where}: {key} is {called}, got {value!r}.")
    for key in ("name", "data"):
        if not source.get(key):
            raise ValueError(f"{where} has no {key}; add a line such as {key} = 'web'.")
    if any(character.isspace() or character == "/" for character in source["name"]):
        raise ValueError(
            f"{where}: name becomes part of the names of figures, so it has neither spaces nor "
            f"slashes, got {source['name']!r}."
        )
    weight = source.get("weight", 1)
    if type(weight) not in (int, float) or not 0 < weight < math.inf:
        raise ValueError(
            f"{where}: weight is a number above 0, got {weight!r}; leave out a source that is not "
            "wanted."
        )


def check_schedule(schedule, sequence_length, steps, task=None):
    """Checks a recipe's context_schedule.

    Args:
        schedule: pairs of a step and the tokens of a window from that step on.
        sequence_length: tokens of the longest windows, which are cut into the shorter.
        steps: of the run.
        task: the recipe's [task], whose examples are made in each length; {}: there is a text.

    Raises:
        ValueError: a schedule that no run could follow.
    """
    for pair in schedule:
        if len(pair) != 2 or any(type(number) is not int or number < 0 for number in pair):
            raise ValueError(
                f"context_schedule is a list such as [[0, 256], [500, 1024]], of steps and tokens "
                f"per window, got {pair!r} in it."
            )
        if task:
            _check_length_of_task(pair[1], sequence_length, task)
        elif not pair[1] or sequence_length % pair[1]:
            raise ValueError(
                f"context_schedule: each length divides sequence_length = {sequence_length}, so "
                f"that every step has as many tokens, got {pair[1]}."
            )
    begins = [step for step, _ in schedule]
    if schedule and (begins[0] != 0 or begins != sorted(set(begins)) or begins[-1] >= steps):
        raise ValueError(
            f"context_schedule begins at step 0 and goes on to later ones before the last of "
            f"{steps}, got steps {', '.join(map(str, begins))}."
        )


def _check_length_of_task(length, longest, task):
    if not 0 < length <= longest:
        raise ValueError(
            f"context_schedule: each length is at most that of the task's examples, {longest}, got "
            f"{length}; make the examples of the task longer."
        )
    try:
        load(task).of_length(length)
    except ValueError as error:
        raise ValueError(f"context_schedule: {error}") from None


def settle_task(recipe):
    """Fills in what follows from a recipe's [task], and refuses what it has no use for.

    Args:
        recipe: a `Recipe`; its `task` gets all settings, its `sequence_length` that of the task.

    Raises:
        UsageError: a task that there is not, or a key that is about text.
    """
    task = load(recipe.task)
    recipe.task = task.table()
    length = recipe.sequence_length
    if length not in (0, task.length):
        raise UsageError(
            f"sequence_length follows from the task, whose examples have {task.length} tokens, got "
            f"{length}; leave it out."
        )
    recipe.sequence_length = task.length
    defaults = {
        entry.name: entry.default_factory()
        if entry.default is dataclasses.MISSING
        else entry.default
        for entry in dataclasses.fields(recipe)
        if entry.name in OF_TEXT
    }
    for key, expected in {**defaults, "data": "", "tokenizer": ""}.items():
        if getattr(recipe, key) != expected:
            raise UsageError(
                f"{key} is about text, and [task] is in the place of text, got "
                f"{getattr(recipe, key)!r} and the task {task.name}; leave out one of them."
            )
