"""The table of a sweep, for a page, for Markdown and for a terminal, and its verdicts in a line."""

import statistics
from dataclasses import dataclass

from .figures import short
from .summary import CONTROL

# Metric -> what a page calls it, and what a terminal does.
NAMES = {"bits_per_byte": ("bits per byte", "bits/byte"), "accuracy": ("accuracy", "accuracy")}


@dataclass
class Column:
    """A column of the table: what a page says above it, what a terminal says, and its cells.

    A cell is a figure and, after a line break, what is to be said of it.
    """

    title: str
    short: str
    cells: list


def columns(results, tasks):
    """The columns of the table, with a cell for each model of the sweep, never an empty one."""
    models = results["models"]
    made = [
        Column("model", "model", list(models)),
        _of_models(models, "parameters, without embeddings", "params", _parameters),
        _of_models(models, "FLOPs per token, forward", "FLOPs", _flops),
        _of_states(models, tasks),
    ]
    baseline = results["sweep"]["sweep"]["baseline"]
    for task in tasks.values():
        full, narrow = NAMES[task.metric]
        entries = [task.entries[model] for model in models]
        several = f"{task.name}: " if len(tasks) > 1 else ""
        made += [
            Column(f"{several}best rate", f"{several}rate", [_rate(e.choice) for e in entries]),
            Column(f"{several}{full}", narrow, [_score(e) for e in entries]),
            Column(f"{several}to {baseline}", f"to {baseline}", [_difference(e) for e in entries]),
        ]
    first = next(iter(tasks.values()))
    speeds = [_speed(first.entries[model]) for model in models]
    made.append(Column(f"tokens per second, training on {first.name}", "tokens/s", speeds))
    return made


def _of_models(models, title, narrow, cell):
    cells = [cell(values) for values in models.values()]
    return Column(title, narrow, cells)


def _parameters(values):
    count = values.get("parameters_without_embeddings")
    return "not known" if count is None else f"{count:,}"


def _flops(values):
    flops = values.get("flops_per_token")
    return "not known" if flops is None else short(flops)


def _of_states(models, tasks):
    known = {n for values in models.values() for n in values.get("state_bytes") or {}}
    lengths = [str(task.length) for task in tasks.values() if str(task.length) in known]
    length = lengths[0] if lengths else max(known, key=int, default=None)
    if length is None:
        return Column("bytes of state", "state", ["not known"] * len(models))
    cells = []
    for values in models.values():
        sizes = values.get("state_bytes") or {}
        if length not in sizes:
            cells.append("not known")
            continue
        longest = max(sizes, key=int)
        grows = sizes[longest] > sizes[length]
        cells.append(short(sizes[length]) + f"\n{short(sizes[longest])} at {longest}" * grows)
    return Column(f"bytes of state at {int(length):,} tokens", f"state at {length}", cells)


def _rate(choice):
    if choice.rate is None:
        return "no score"
    return f"{choice.rate:g}" + "\nat the edge" * bool(choice.edge)


def _score(entry):
    score = entry.score
    if score.mean is None:
        return "no trial"
    notes = ["did not learn"] * (entry.learned is False)
    if score.half is None:
        notes.append("one seed")
    elif entry.missing:
        notes.append(f"{len(entry.trials)} of {len(entry.trials) + len(entry.missing)} seeds")
    return "\n".join(filter(None, [_interval(score, "{:.3f}"), ", ".join(notes)]))


def _difference(entry):
    difference = entry.difference
    if difference is None:
        return entry.verdict
    if entry.score.mean is None:
        return "no trial"
    if difference.mean is None:
        return "no seed in common"
    return f"{_interval(difference, '{:+.3f}')}\n{entry.verdict}"


def _interval(found, form):
    half = "" if found.half is None else f" ± {found.half:.3f}"
    return form.format(found.mean) + half


def _speed(entry):
    speeds = [trial.get("tokens_per_second") for trial in entry.trials.values()]
    speeds = [speed for speed in speeds if speed]
    return short(statistics.median(speeds)) if speeds else "no trial"


def conclusions(results, tasks):
    """A sentence on each task: which models are better than the baseline, and which worse."""
    baseline = results["sweep"]["sweep"]["baseline"]
    sentences = []
    for task in tasks.values():
        which = "lower" if task.lower_is_better else "higher"
        said = []
        for verdict in ("better", "worse", "not separable", "no interval"):
            named = [name for name, e in task.entries.items() if e.verdict == verdict]
            words = {"not separable": "not separable from it"}.get(verdict, verdict)
            said += [f"{words}: {', '.join(named)}"] if named else []
        failed = [name for name, e in task.entries.items() if e.learned is False]
        said += [f"did not learn: {', '.join(failed)}"] if failed else []
        small = [name for name, e in task.entries.items() if e.learned and e.score.mean < CONTROL]
        said += [f"learned the control, not this: {', '.join(small)}"] if small else []
        text = "; ".join(said) or "no model is beside it"
        sentences.append(
            f"{task.name} ({NAMES[task.metric][0]}, {which} is better), beside {baseline}: {text}."
        )
    return sentences


def markdown(table):
    """A table of Markdown."""
    lines = [[column.title for column in table], ["---"] + ["---:"] * (len(table) - 1)]
    lines += [list(row) for row in zip(*[column.cells for column in table])]
    lines = [[cell.replace("|", "\\|").replace("\n", "<br>") for cell in row] for row in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def terminal(table, width=100):
    """Lines of at most so many characters: where columns do not fit, more come below, in parts."""
    table = [
        Column(column.title, column.short, [cell.replace("\n", ", ") for cell in column.cells])
        for column in table
    ]
    head, *rest = table
    widths = [max(map(len, [column.short, *column.cells])) for column in table]
    parts, used = [[]], widths[0]
    for column, size in zip(rest, widths[1:]):
        if parts[-1] and used + 2 + size > width:
            parts.append([])
            used = widths[0]
        parts[-1].append((column, size))
        used += 2 + size
    lines = []
    for part in parts:
        names = [head.short, *head.cells]
        cells = zip(*[[column.short, *column.cells] for column, _ in part])
        for name, row in zip(names, cells):
            said = [f"{cell:>{size}}" for cell, (_, size) in zip(row, part)]
            lines.append("  ".join([f"{name:{widths[0]}}", *said]).rstrip())
        lines.append("")
    return lines[:-1]
